"""SAN against numbers of the official code, against loops in double precision, and what its operators promise."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.nn.resnet import ResNet
from paperworks.papers.backbones.convnext import convnext
from paperworks.papers.backbones.san.san import (
    LAYERS,
    PAIRWISE,
    PATCHWISE,
    SAN,
    VARIANTS,
    Attention,
    Pairwise,
    Patchwise,
    SelfAttention,
    aggregate,
    attention,
    coordinates,
    footprint,
    put,
    recipe,
    reflected,
    smoothed,
)
from paperworks.papers.backbones.san.weights import SOURCES
from paperworks.papers.backbones.vit import vit
from peers import check_pyramid, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "san.json").read_text())
KNOWN = {
    "san10_pairwise": (10_531_848, 2.2),
    "san10_patchwise": (11_841_124, 1.9),
    "san15_pairwise": (14_065_436, 3.0),
    "san15_patchwise": (16_181_310, 2.6),
    "san19_pairwise": (17_596_156, 3.8),
    "san19_patchwise": (20_518_470, 3.3),
}
"""Parameters, and 10^9 operations as the paper's table 2 rounds them."""


def built(config, side: int = 32, channels: int = 3, classes: int = 10) -> SAN:
    torch.manual_seed(0)
    return SAN(channels, classes, side, config).eval()


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.normal_(1, 0.2)
            m.bias.normal_(0, 0.2)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
    return module.eval()


# --- Sizes


def operations(net: SAN, side: int) -> float:
    """As the official counter has it: multiply-adds of linear maps, one for each bias, two for a norm and one for its ReLU, one for what is
    pooled, one for a subtraction, P for each cell and channel of an aggregation; the softmax does not count."""
    extra = []

    def norm(module, given, out):
        extra.append(3 * out.numel())  # each norm of this network is followed by a ReLU

    def conv(module, given, out):
        extra.append(out.numel() * (module.bias is not None))

    def pool(module, given, out):
        extra.append(given[0].numel())

    def operator(module, given, out):
        places = module.kernel**2
        extra.append(out.numel() * places)
        if isinstance(module, Pairwise):
            extra.append((module.inner + 2) * places * given[0][0, 0].numel())

    hooks = ((nn.BatchNorm2d, norm), (nn.Conv2d, conv), (nn.MaxPool2d, pool), (SelfAttention, operator))
    for module in net.modules():
        for kind, hook in hooks:
            if isinstance(module, kind):
                module.register_forward_hook(hook)
    with FlopCounterMode(display=False) as counter:
        features = net.pyramid(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2 + sum(extra) + features[-1].numel() + net.embedding * 1000


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_operations_are_the_papers(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, classes=1000)
        count = operations(net, 224)
    parameters, billions = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert count / 1e9 == pytest.approx(billions, abs=0.05)


def test_every_variant_of_the_paper_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)


# --- The official code


@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_equal_the_official_code(evidence, name):
    draw, golden = runpy.run_path(str(FIXTURES / "san_record.py"))["draw"], FIXTURE["networks"][name]
    net = built(VARIANTS[name], 224, classes=7)
    state = {f"module.{key}": draw(f"{name} {key}", tuple(shape)) for key, shape in golden["shapes"].items()}
    net.load_state_dict(SOURCES["official"](state, VARIANTS[name]))
    image = draw("image", tuple(FIXTURE["input"]))
    features = net.pyramid(image)
    errors = [relative(f.flatten()[:: f.numel() // 50], torch.tensor(theirs)) for f, theirs in zip(features, golden["stages"], strict=True)]
    theirs = torch.tensor(golden["logits"])
    error = relative(net.head(features[-1].mean((2, 3)))[0], theirs)
    assert max(error, *errors) < TOLERANCE
    net.stages[1][0].operator.psi.weight[0] *= -2  # a perturbed weight is seen
    assert relative(net(image)["logits"][0], theirs) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}, logits and five stages", error=max(error, *errors))


# --- The operators (section 3), by loops over cells and places in double precision


def around(x: torch.Tensor, i: int, j: int, kernel: int) -> list[torch.Tensor]:
    """The vectors in the footprint of a cell, row by row, mirrored at the border."""
    half, (h, w) = kernel // 2, x.shape[2:]

    def mirrored(at: int, side: int) -> int:
        return -at if at < 0 else 2 * (side - 1) - at if at >= side else at

    return [x[0, :, mirrored(i + dy, h), mirrored(j + dx, w)] for dy in range(-half, half + 1) for dx in range(-half, half + 1)]


def linear(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    y = conv.weight.flatten(1) @ x
    return y if conv.bias is None else y + conv.bias


def normal(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    return ((x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias).clamp_min(0)


def gamma(op: SelfAttention, x: torch.Tensor) -> torch.Tensor:
    first, _, narrow, second, _, wide = op.gamma
    return linear(wide, normal(second, linear(narrow, normal(first, x))))


@pytest.mark.parametrize(("kind", "relation"), [*((Pairwise, r) for r in PAIRWISE), *((Patchwise, r) for r in PATCHWISE)])
def test_operator_by_loops(evidence, kind, relation):
    name, kernel, share = kind.__name__.lower(), 3, 2
    torch.manual_seed(0)
    op = randomised(attention(6, 8, kernel, Attention(operator=name, relation=relation, share=share))).double()
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    expected = torch.zeros(1, 8, 4, 5, dtype=torch.float64)
    place = torch.stack([torch.tensor([2 * j / 4 - 1, 2 * i / 3 - 1], dtype=torch.float64) for i in range(4) for j in range(5)]).T.view(
        1, 2, 4, 5
    )
    for i in range(4):
        for j in range(5):
            centre, there = linear(op.phi, x[0, :, i, j]), around(x, i, j, kernel)
            psi = [linear(op.psi, v) for v in there]
            if kind is Pairwise:
                here = linear(op.position, place[0, :, i, j])
                offset = [here - linear(op.position, p) for p in around(place, i, j, kernel)]
                delta = {
                    "subtraction": lambda v, c=centre: c - v,
                    "summation": lambda v, c=centre: c + v,
                    "concatenation": lambda v, c=centre: torch.cat([c, v]),
                    "hadamard": lambda v, c=centre: c * v,
                    "dot": lambda v, c=centre: (c @ v)[None],
                }[relation]
                weights = torch.stack([gamma(op, torch.cat([delta(v), o])) for v, o in zip(psi, offset)]).softmax(0)  # P G
            else:
                phi = [linear(op.phi, v) for v in there]
                delta = {
                    "concatenation": lambda psi=psi, c=centre: torch.cat([c, torch.stack(psi, 1).flatten()]),
                    "star": lambda psi=psi, c=centre: torch.stack([c @ v for v in psi]),
                    "clique": lambda psi=psi, phi=phi: torch.stack([a @ b for a in phi for b in psi]),
                }[relation]()
                weights = gamma(op, delta).view(8 // share, kernel**2).T
            for c in range(8):
                group = c % (8 // share)
                expected[0, c, i, j] = sum(weights[p, group] * linear(op.beta, v)[c] for p, v in enumerate(there))
    error = relative(op(x), expected)
    assert error < 1e-10
    evidence.property(
        f"{name} attention, {relation}: by a loop over cells, places and channels in double precision",
        f"{name} 注意力，{relation}：与双精度下逐格、逐位置、逐通道的循环相等",
    )


def test_aggregation_and_its_gradient(evidence):
    torch.manual_seed(0)
    weights, values = torch.randn(2, 3, 25, 20, dtype=torch.float64), torch.randn(2, 6, 4, 5, dtype=torch.float64)
    unfolded = footprint(values, 5).unflatten(1, (2, 3))  # B E/G G P N
    expected = (weights[:, None] * unfolded).sum(3).flatten(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(aggregate(weights, values, 5), expected)
    with torch.enable_grad():
        small = weights[:1, :, :9].requires_grad_(), values[:1].requires_grad_()
        assert torch.autograd.gradcheck(lambda w, v: aggregate(w, v, 3), small)
    evidence.property(
        "aggregation place by place equals the unfolded sum in double precision; gradients by differences",
        "逐个相对位置的汇集与双精度下展开后求和相等；梯度与差分相等",
    )


def test_aggregation_holds_little(evidence):
    """The unfolded values would be 49 maps; what training keeps beside weights and values is about one."""
    kept = []
    weights, values = torch.randn(1, 2, 49, 256, requires_grad=True), torch.randn(1, 16, 16, 16, requires_grad=True)

    def keep(tensor):
        kept.append((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        aggregate(weights, values, 7)
    held = sum(dict(kept).values())
    assert held < weights.nbytes + 3 * values.nbytes
    evidence.property(
        "for the gradient the aggregation keeps weights and padded values, not patches",
        "为求梯度，汇集只保留权重和填充后的值，不保留 patch",
    )


def test_a_map_that_is_too_small_to_be_mirrored_repeats_its_border():
    x = torch.randn(1, 2, 3, 5)
    padded = reflected(x, 7)
    assert padded.shape == (1, 2, 9, 11)
    torch.testing.assert_close(padded[:, :, 0], padded[:, :, 3])
    torch.testing.assert_close(reflected(x, 5)[:, :, 0, 2:-2], x[:, :, 2])
    assert attention(8, 8, 7, Attention()).eval()(torch.zeros(1, 8, 1, 1)).shape == (1, 8, 1, 1)


# --- What sets them apart (sections 3.1 and 3.2)


def without_position(op: Pairwise) -> Pairwise:
    op.position.weight.zero_()
    return op


def centre_of(op: SelfAttention, patch: torch.Tensor) -> torch.Tensor:
    """The result at the middle of a patch 1 D k k that is the whole footprint."""
    return op(patch)[0, :, patch.shape[2] // 2, patch.shape[3] // 2]


def test_pairwise_attention_is_of_a_set_and_patchwise_is_not(evidence):
    torch.manual_seed(0)
    patch = torch.randn(1, 16, 5, 5)
    order = torch.arange(25)
    others = torch.cat([order[:12], order[13:]])
    order[others] = others[torch.randperm(24)]  # the centre stays
    shuffled = patch.flatten(2)[:, :, order].view_as(patch)
    pairwise, patchwise = (randomised(attention(16, 16, 5, Attention(operator=o))) for o in ("pairwise", "patchwise"))
    assert relative(centre_of(pairwise, shuffled), centre_of(pairwise, patch)) > 1e-3  # by the position alone
    without_position(pairwise)
    torch.testing.assert_close(centre_of(pairwise, shuffled), centre_of(pairwise, patch), rtol=1e-4, atol=1e-5)
    assert relative(centre_of(patchwise, shuffled), centre_of(patchwise, patch)) > 1e-2
    evidence.property(
        "pairwise attention without position does not see the order of a footprint; with it, and patchwise attention, do",
        "去掉位置的 pairwise 注意力看不出邻域内的顺序；带位置的 pairwise 和 patchwise 注意力看得出",
    )


def test_pairwise_attention_does_not_depend_on_the_footprints_size(evidence):
    """Section 3.1: the same weights serve a footprint of any size; of equal neighbours the mean stays."""
    torch.manual_seed(0)
    small = without_position(randomised(attention(16, 16, 3, Attention(operator="pairwise"))))
    large = attention(16, 16, 7, Attention(operator="pairwise")).eval()
    large.load_state_dict(small.state_dict())
    x = torch.randn(1, 16, 1, 1).expand(1, 16, 8, 8)
    torch.testing.assert_close(small(x), large(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small(x), small.beta(x), rtol=1e-4, atol=1e-5)
    counts = [sum(p.numel() for p in attention(16, 16, k, Attention(operator="patchwise")).parameters()) for k in (3, 7)]
    assert counts[1] > counts[0]
    evidence.property(
        "pairwise weights serve 3x3 and 7x7 alike, a convex mean of beta; patchwise parameters grow with the footprint",
        "pairwise 的同一套参数可用于 3x3 和 7x7，结果是 beta 的凸平均；patchwise 的参数随邻域增大",
    )


def test_one_neighbour_speaks_for_another_only_in_patchwise_attention(evidence):
    """The reading group's mark: competition in the patch. A change of one cell changes the ratio of two others' weights, or does not."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 5, 5)
    changed = x.clone()
    changed[:, :, 0, 0] += 2
    for name, moves in (("pairwise", False), ("patchwise", True)):
        op = randomised(attention(16, 16, 5, Attention(operator=name)))
        before, after = (op.weights(v).unflatten(3, (5, 5))[0, :, :, 2, 2] for v in (x, changed))
        ratio = [w[:, 3] / w[:, 20] for w in (before, after)]
        assert bool(relative(*ratio) > 1e-3) == moves, name
    evidence.property(
        "a neighbour changes the ratio of two other neighbours' weights in patchwise attention, never in pairwise attention",
        "在 patchwise 注意力中，一个邻居会改变另外两个邻居的权重之比；在 pairwise 注意力中从不会",
    )


def test_patchwise_attention_includes_convolution(evidence):
    """With weights that do not look at the patch it is a depthwise convolution of beta(x), one filter a group, with any signs."""
    torch.manual_seed(0)
    op = randomised(attention(8, 16, 3, Attention(share=4)))
    op.gamma[5].weight.zero_()
    op.gamma[5].bias.normal_()
    x = torch.randn(2, 8, 6, 7)
    filters = op.gamma[5].bias.view(4, 1, 3, 3)[torch.arange(16) % 4]
    expected = F.conv2d(F.pad(op.beta(x), [1] * 4, mode="reflect"), filters, groups=16)
    torch.testing.assert_close(op(x), expected, rtol=1e-4, atol=1e-5)
    assert (op.weights(x) < 0).any()
    pairwise = randomised(attention(8, 16, 3, Attention(operator="pairwise", share=4))).weights(x)
    assert (pairwise > 0).all()
    torch.testing.assert_close(pairwise.sum(2), torch.ones(2, 4, 42))
    evidence.property(
        "patchwise attention of constant weights is a convolution; pairwise weights are positive and sum to one",
        "权重恒定的 patchwise 注意力就是卷积；pairwise 的权重为正且和为一",
    )


def test_attention_is_a_vector(evidence):
    torch.manual_seed(0)
    weights = randomised(attention(16, 32, 3, Attention(operator="pairwise", share=8))).weights(torch.randn(1, 16, 4, 4))
    assert weights.shape == (1, 4, 9, 16)
    assert float(weights.std(1).max()) > 1e-2
    assert attention(16, 32, 3, Attention(share=32)).weights(torch.randn(1, 16, 4, 4)).shape[1] == 1
    evidence.property(
        "weights differ between groups of 8 channels; one group for all is scalar attention",
        "每 8 个通道一组，各组权重不同；所有通道一组就是标量注意力",
    )


def test_coordinates_are_from_minus_one_to_one():
    x, y = coordinates(torch.zeros(1, 3, 4, 5))[0]
    torch.testing.assert_close(x, torch.tensor([-1, -0.5, 0, 0.5, 1]).expand(4, 5))
    torch.testing.assert_close(y[:, 0], torch.tensor([-1, -1 / 3, 1 / 3, 1]))


# --- The network


def test_no_spatial_convolution():
    for name in ("san10_pairwise", "san10_patchwise"):
        with torch.device("meta"):
            net = built(VARIANTS[name], 224)
        assert {m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    convolution = built(replace(VARIANTS["small"], operator="convolution"))
    assert sum(m.kernel_size == (3, 3) for m in convolution.modules() if isinstance(m, nn.Conv2d)) == 5
    counts = [sum(p.numel() for p in net.parameters()) for net in (built(VARIANTS["small"]), convolution)]
    assert counts[0] < counts[1]


def test_block_adds_to_its_input(evidence):
    block = randomised(built(VARIANTS["test"])).stages[1][0]
    x = torch.randn(2, 64, 8, 8)
    y = F.relu(block.after(block.operator(F.relu(block.norm(x)))))
    torch.testing.assert_close(block(x), x + F.conv2d(y, block.out.weight, block.out.bias))
    evidence.property(
        "block: norm, ReLU, attention to a quarter of the channels, norm, ReLU, linear, plus the input",
        "块：归一化、ReLU、注意力（输出四分之一的通道）、归一化、ReLU、线性，再加上输入",
    )


@pytest.mark.parametrize(("name", "side"), [("san10_patchwise", 224), ("small", 32), ("small", 128), ("test", 64)])
def test_pyramid(name, side):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert net.strides[0] == 2


@pytest.mark.parametrize("operator", ["pairwise", "patchwise", "convolution"])
@pytest.mark.parametrize("relation", [None, "concatenation"])
def test_every_operator_learns(operator, relation):
    if operator == "convolution" and relation:
        return
    net = built(replace(VARIANTS["test"], operator=operator, relation=relation)).train()
    with torch.enable_grad():
        net(torch.randn(4, 3, 32, 32))["logits"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert [n for n, p in net.named_parameters() if not p.grad.any() and not n.endswith("bias")] == []


# --- In other networks


@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_other_networks(evidence, name):
    torch.manual_seed(0)
    host = convnext.ConvNeXt(3, 5, 64, convnext.VARIANTS["test"])
    host = put(host, replace(LAYERS[name].config, kernel=3, share=4)).eval()
    assert [n for n, m in host.named_modules() if isinstance(m, SelfAttention)] == [
        f"stages.{i}.depthwise" for i in ("0.0", "1.0", "2.0", "2.1", "3.0")
    ]
    image = torch.randn(2, 3, 64, 64)
    with torch.enable_grad():
        host(image)["logits"].square().sum().backward()
    assert all(p.grad is not None for p in host.parameters())
    torch.testing.assert_close(torch.export.export(host, (image,)).module()(image)["logits"], host(image)["logits"])
    evidence.property(
        f"{name}: in place of a ConvNeXt's depthwise convolutions, trains and exports",
        f"{name}：替换 ConvNeXt 的深度卷积，可以训练和导出",
    )


def test_layer_in_a_resnet_keeps_its_resolutions():
    with torch.device("meta"):
        plain, host = ResNet(50, stem="cifar"), put(ResNet(50, stem="cifar"), LAYERS["san_patchwise"].config)
        shapes = [[f.shape for f in net.pyramid(torch.zeros(1, 3, 64, 64))] for net in (plain, host)]
    assert shapes[0] == shapes[1]
    assert sum(isinstance(m, SelfAttention) for m in host.modules()) == 16
    assert type(host.conv1) is nn.Conv2d  # the stem reads three channels
    assert sum(isinstance(m, nn.MaxPool2d) for m in host.modules()) == 3
    assert isinstance(host.layer2[0].conv2, nn.Sequential)


def test_bad_input():
    with pytest.raises(InputError, match="relation=star"):
        attention(8, 8, 3, Attention(operator="pairwise", relation="star"))
    with pytest.raises(InputError, match="share=3"):
        attention(8, 8, 3, Attention(share=3))
    with pytest.raises(InputError, match="share=0"):
        put(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)), Attention(share=0))
    with pytest.raises(InputError, match="share=5"):
        built(replace(VARIANTS["test"], share=5))
    with pytest.raises(InputError, match="odd side"):
        attention(8, 8, 4, Attention())
    with pytest.raises(InputError, match="equally many"):
        built(replace(VARIANTS["test"], kernels=(3,)))
    with pytest.raises(InputError, match="no place"):
        put(vit.ViT(3, 5, 32, vit.VARIANTS["test"]), Attention())


# --- Training


def test_recipe_and_loss():
    paper = recipe(VARIANTS["san10_patchwise"])
    assert (paper.optimizer, paper.lr, paper.batch_size, paper.weight_decay, paper.schedule) == ("sgd", 0.1, 256, 1e-4, "cosine")
    logits, label = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    target = 0.9 * F.one_hot(label, 4) + 0.1 / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(smoothed({"logits": logits}, {"label": label})["loss"], expected)
