"""Bilinear CNNs against torchvision's VGG and closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.backbones.bilinear_cnn.bilinear_cnn import (
    EPS,
    VARIANTS,
    BilinearCNN,
    BilinearPooling,
    Config,
    D,
    M,
    Pooling,
    bilinear,
    build,
    put,
    recipe,
    signed_root,
)
from paperworks.papers.backbones.convnext import convnext
from paperworks.tasks import task
from peers import check_pyramid, relative

TOLERANCE = 1e-4
KNOWN = {"d_d": 67_143_688, "m_m": 58_957_640, "d_m": 73_672_328, "d_d_512x64": 21_301_256}
"""With 200 classes."""


def built(config: Config, classes: int = 10, side: int = 32) -> BilinearCNN:
    torch.manual_seed(0)
    return build(task("classification").plain_spec(3, classes, 2, (side, side)), config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 200)
    assert sum(p.numel() for p in net.parameters()) == KNOWN[name]
    assert net.embedding == (512 * 64 if name == "d_d_512x64" else 262_144)


def test_streams_have_the_papers_maps():
    with torch.device("meta"):
        image = torch.zeros(1, 3, 448, 448)
        d, m = D(3, (64, 128, 256, 512, 512), False), M(3)
        assert d.pyramid(image)[-1].shape == (1, 512, 28, 28)
        assert m.pyramid(image)[-1].shape == (1, 512, 27, 27)
    assert sum(p.numel() for p in d.parameters()) == 14_714_688
    assert sum(p.numel() for p in m.parameters()) == 6_528_640
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)


# --- Other implementations


def test_d_d_equals_torchvisions_vgg_and_the_closed_form(evidence):
    torch.manual_seed(1)
    peer = torchvision.models.vgg16().features[:-1].eval()  # up to relu5_3, before the last pooling
    net = built(replace(VARIANTS["d_d"], image_size=64), 7)
    convolutions = [[m for m in one.modules() if isinstance(m, nn.Conv2d)] for one in (net.first, peer)]
    assert len(convolutions[0]) == len(convolutions[1]) == 13
    with torch.no_grad():
        for ours, theirs in zip(*convolutions):
            theirs.bias.normal_(0, 0.1)
            ours.load_state_dict(theirs.state_dict())
        image = torch.randn(2, 3, 64, 64)
        x = peer(image)
        products = torch.einsum("bphw,bqhw->bpq", x, x) / 16
        descriptor = F.normalize((products + EPS).sqrt().flatten(1) * (products > 0).flatten(1))  # features behind a ReLU: nothing below 0
        expected = F.linear(descriptor, net.head.weight, net.head.bias)
        error = max(relative(net(image)["logits"], expected), relative(net.embed(image), descriptor))
        assert error < TOLERANCE
        net.first.blocks[4][0].weight.mul_(1.5)  # perturbed weights are seen
        assert relative(net.embed(image), descriptor) > TOLERANCE
    evidence.fidelity(
        against=f"torchvision {torchvision.__version__} vgg16 up to relu5_3, with products, roots and length by einsum", error=error
    )


def test_m_is_the_network_of_its_paper(evidence):
    torch.manual_seed(0)
    net, x = M(3).double().eval(), torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        y = F.conv2d(x, net.conv1[0].weight, net.conv1[0].bias, stride=2).relu()
        for conv in (None, net.conv2[0]):
            if conv is not None:
                y = F.conv2d(y, conv.weight, conv.bias, stride=2, padding=1).relu()
            squares = F.pad(y.square(), (0, 0, 0, 0, 2, 2))
            y = (
                y / (2 + 1e-4 * sum(squares[:, i : i + y.shape[1]] for i in range(5))) ** 0.75
            )  # kappa 2, alpha 1e-4, beta 0.75 over 5 channels
            y = F.max_pool2d(y, 3, 2, ceil_mode=True)
        for i in (0, 2, 4):
            y = F.conv2d(y, net.conv3[i].weight, net.conv3[i].bias, padding=1).relu()
        error = relative(net.pyramid(x)[-1], y)
    assert error < 1e-10
    evidence.property(
        "VGG-M: strides, paddings and the local response normalisation by hand",
        "VGG-M：步长、填充与局部响应归一化和手算一致",
    )


# --- The operation


def test_products_at_every_place_by_a_loop(evidence):
    a, b = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 6, 3, 4, dtype=torch.float64)
    expected = sum(a[:, :, i, j, None] * b[:, None, :, i, j] for i in range(3) for j in range(4)) / 12
    torch.testing.assert_close(bilinear(a, b), expected)
    shuffled = torch.randperm(12)
    moved = [x.flatten(2)[:, :, shuffled].view_as(x) for x in (a, b)]
    torch.testing.assert_close(bilinear(*moved), expected)
    one_moved = bilinear(moved[0], b)
    assert not torch.allclose(one_moved, expected)
    evidence.property(
        "pooled outer products by a loop; without order: the same where places are shuffled, if both streams' are",
        "外积池化等于逐位置循环；与次序无关：两路按同一次序打乱位置，结果不变",
    )


def test_one_stream_with_itself_is_the_gram_matrix(evidence):
    """What style transfer matches (Gatys et al.)."""
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    gram = bilinear(x, x)
    flat = x.flatten(2)
    torch.testing.assert_close(gram, torch.bmm(flat, flat.transpose(1, 2)) / 25)
    torch.testing.assert_close(gram, gram.mT)
    assert torch.linalg.eigvalsh(gram).min() > -1e-12
    evidence.property(
        "one stream with itself: the Gram matrix, symmetric and positive semi-definite",
        "一路特征与自身：Gram 矩阵，对称且半正定",
    )


def test_the_kernel_of_the_descriptor_is_the_squared_inner_product():
    """What compact bilinear pooling approximates: <x x', y y'> = (x . y)^2."""
    x, y = torch.randn(2, 1, 7, 1, 1, dtype=torch.float64)
    product = (bilinear(x, x) * bilinear(y, y)).sum()
    torch.testing.assert_close(product, (x * y).sum() ** 2)


def test_gradients_are_the_papers(evidence):
    """Section 3.3, figure 3: dl/dA = (dl/dx) B and dl/dB = (dl/dx)' A, place by place."""
    a = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(2, 4, 5, dtype=torch.float64)
    of_a, of_b = torch.autograd.grad((bilinear(a, b) * outer).sum(), (a, b))
    torch.testing.assert_close(of_a.flatten(2), outer @ b.flatten(2) / 9)
    torch.testing.assert_close(of_b.flatten(2), outer.mT @ a.flatten(2) / 9)
    assert gradcheck(bilinear, (a, b))
    x = torch.rand(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) + 0.1
    pooling = BilinearPooling(3, 3, Pooling()).double()
    assert gradcheck(lambda x: pooling(x, x), (x,))
    evidence.property(
        "gradients of the outer product: (dl/dx) B and (dl/dx)' A; gradcheck of products, root and length",
        "外积的梯度：(dl/dx) B 与 (dl/dx)' A；乘积、开方与归一化通过 gradcheck",
    )


def test_root_and_length(evidence):
    x = torch.tensor([[-4.0, 0.0, 9.0]], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(signed_root(x), torch.tensor([[-2.0, 0.0, 3.0]], dtype=torch.float64), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(signed_root(x).sum(), x)
    assert gradient[0, 1] == 0  # not infinite
    torch.testing.assert_close(gradient[0, [0, 2]], torch.tensor([1 / 4, 1 / 6], dtype=torch.float64), rtol=1e-3, atol=0)
    a = torch.rand(3, 4, 5, 5)
    pooled = BilinearPooling(4, 4, Pooling())(a, a)
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(BilinearPooling(4, 4, Pooling(normalise=False))(a, a), bilinear(a, a).flatten(1))
    # Dividing by the number of places changes nothing behind root and length, but for what stands under the root.
    torch.testing.assert_close(pooled, F.normalize(signed_root(25 * bilinear(a, a)).flatten(1)), rtol=1e-3, atol=1e-4)
    evidence.property(
        "signed square root with a finite gradient at 0, length one; the number of places cancels",
        "带符号的平方根在 0 处梯度有限，长度为一；位置数被约去",
    )


def test_with_the_constant_one_it_is_average_pooling(evidence):
    net = built(replace(VARIANTS["small"], second="one", pooling=Pooling(normalise=False)))
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(net.embed(image), net.pyramid(image)[-1].mean((2, 3)))
    assert net.embedding == 96
    evidence.property("bilinear pooling with the constant 1 is average pooling", "与常数 1 做双线性池化即平均池化")


def test_two_streams_of_different_maps_share_what_both_have():
    a, b = torch.randn(1, 3, 28, 28), torch.randn(1, 4, 27, 27)
    torch.testing.assert_close(bilinear(a, b), bilinear(a[:, :, :27, :27], b))
    net = built(Config(second="M", widths=(4, 6, 8), image_size=64))
    assert net(torch.randn(1, 3, 64, 64))["logits"].shape == (1, 10)
    assert net.embedding == 8 * 512


def test_projection_of_one_stream(evidence):
    pooling = BilinearPooling(6, 6, Pooling(project=2, normalise=False))
    x = torch.randn(2, 6, 4, 4)
    full = bilinear(x, x)
    torch.testing.assert_close(pooling(x, x).view(2, 6, 2), full @ pooling.project.weight[:, :, 0, 0].T, rtol=1e-4, atol=1e-5)
    evidence.property("projecting one stream multiplies the matrix of products from one side", "投影其中一路，等于从一侧乘乘积矩阵")


# --- Training


def test_the_classifier_learns_alone_first(evidence):
    net = built(replace(VARIANTS["test"], alone=0.5)).train()

    def learn() -> tuple[bool, bool]:
        net.zero_grad(set_to_none=True)
        net(torch.randn(2, 3, 32, 32))["logits"].square().sum().backward()
        return net.head.weight.grad is not None, any(p.grad is not None for p in net.first.parameters())

    seen = []
    for share in (0.0, 0.49, 0.5, 0.99, 0.2):
        net.advance(share)
        seen.append(learn())
    assert seen == [(True, False), (True, False), (True, True), (True, True), (True, False)]
    net = built(VARIANTS["small"])
    net.advance(0.0)
    assert all(p.requires_grad for p in net.parameters())
    evidence.property(
        "two steps of training: the classifier alone, then everything; it follows from the share of training alone",
        "两步训练：先只训练分类器，再训练全部；处于哪一步只由训练进行的比例决定",
    )


def test_recipe():
    paper = recipe(VARIANTS["d_d"])
    assert (paper.lr, paper.lr * paper.head_lr, paper.patch) == (1e-3, 1.0, 448)
    assert VARIANTS["d_d"].alone == 0.5


# --- As a layer


def test_on_other_backbones(evidence):
    torch.manual_seed(0)
    host = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"])
    net = put(host, Pooling(project=4)).eval()
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        assert net(image)["logits"].shape == (2, 5)
        assert net.embedding == 4 * host.widths[-1]
        assert isinstance(host.head, nn.Identity)
        torch.testing.assert_close(torch.export.export(net, (image,)).module()(image)["logits"], net(image)["logits"])
    evidence.property(
        "bilinear pooling on a ConvNeXt: shapes, the old classifier gone, exported to the same numbers",
        "ConvNeXt 上的双线性池化：形状正确，原分类器已去掉，导出后数值相同",
    )


def test_what_does_not_fit():
    with pytest.raises(InputError, match="five blocks"):
        D(3, (8,) * 6, False)
    with pytest.raises(InputError, match="no pyramid"):
        put(nn.Linear(2, 2), Pooling())


@pytest.mark.parametrize(("name", "side"), [("small", 32), ("small", 64)])
def test_pyramid(name, side):
    with torch.device("meta"):
        net = built(VARIANTS[name], side=side)
        check_pyramid(net, side)
