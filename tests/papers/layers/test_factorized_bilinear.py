"""The factorized bilinear layer against dense algebra, and the networks against counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext import convnext
from paperworks.papers.backbones.vit import vit
from paperworks.papers.layers.factorized_bilinear.factorized_bilinear import (
    STAGES,
    VARIANTS,
    Config,
    Factorized,
    FactorizedBilinear,
    FactorizedHead,
    Factors,
    Inception,
    build,
    put_convolutions,
    put_head,
    recipe,
)
from paperworks.tasks import task

MILLIONS = {"inception": 1.7, "inception_fbn": 2.4, "resnet164": 1.7, "resnet164_fbn": 2.2, "resnet1001": 10.2, "resnet1001_fbn": 10.7}
"""Parameters as the authors' repository states them."""


def built(config: Config, classes: int = 10, side: int = 32) -> Factorized:
    torch.manual_seed(0)
    return build(task("classification").plain_spec(3, classes, 2, (side, side)), config).eval()


def layer(inputs: int, outputs: int, start: float = 0.5, **settings) -> FactorizedBilinear:
    torch.manual_seed(0)
    return FactorizedBilinear(inputs, outputs, Factors(start=start, **settings))


def dense(fb: FactorizedBilinear) -> torch.Tensor:
    """F_j' F_j of each output, c n n."""
    f = fb.factor.weight[:, :, 0, 0].unflatten(0, (-1, fb.factors))
    return f.mT @ f


# --- Sizes


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_the_papers(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in built(VARIANTS[name], 100).parameters())
        plain = sum(p.numel() for p in built(replace(VARIANTS[name], last=None), 100).parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=0.02)
    width = 336 if "inception" in name else 256
    assert count - plain == (100 * 20 * width if name.endswith("fbn") else 0)  # linear in the inputs


def test_the_layer_costs_little():
    with torch.device("meta"):
        counts = []
        for head in (None, Factors()):
            with FlopCounterMode(display=False) as counter:
                built(replace(VARIANTS["inception_fbn"], last=head), 100)(torch.zeros(1, 3, 32, 32))
            counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * (64 * 100 * 20 * 336 + 63 * 100 * 336)  # factors, and linear terms at 64 places in place of one
    assert counts[1] < 1.2 * counts[0]


def test_inception_is_the_one_of_the_authors_symbol():
    net = Inception(3, 32, 1.0)
    assert net.widths == (80, 144, 336)
    assert sum(len(stage) for stage in STAGES) == 10
    with torch.device("meta"):
        maps = Inception(3, 32, 1.0).pyramid(torch.zeros(1, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(1, 80, 32, 32), (1, 144, 16, 16), (1, 336, 8, 8)]
    assert isinstance(net.stages[2][1].one[-1], nn.ReLU)
    assert isinstance(net.stages[2][2].one[-1], nn.BatchNorm2d)  # 5b: tanh, in the head


# --- Algebra


def test_interactions_are_the_dense_quadratic_form(evidence):
    fb = layer(7, 4, factors=3, drop=0.0).double().eval()
    x = torch.randn(2, 7, 3, 5, dtype=torch.float64)
    cells = x.movedim(1, -1)
    quadratic = torch.einsum("...n,cnm,...m->...c", cells, dense(fb), cells)
    expected = F.linear(cells, fb.linear.weight[:, :, 0, 0], fb.linear.bias) + quadratic
    error = float(((fb(x).movedim(1, -1) - expected).norm() / expected.norm()).detach())
    assert error < 1e-12
    assert torch.linalg.matrix_rank(dense(fb)).tolist() == [3] * 4
    assert torch.linalg.eigvalsh(dense(fb)).min() > -1e-9  # positive semi-definite, whatever F is
    fb.factor.weight.data[0, 0] += 0.1
    assert not torch.allclose(fb(x).movedim(1, -1), expected)
    evidence.fidelity(against="dense algebra in float64: b + w x + x F'F x by einsum", error=error)
    evidence.property("each output's matrix is symmetric, positive semi-definite and of rank k", "每个输出的矩阵对称、半正定，秩为 k")


def test_head_is_a_low_rank_classifier_of_pooled_bilinear_features(evidence):
    """Section 3.4: bilinear pooling z = mean of x x', classified by W_j = F_j' F_j."""
    torch.manual_seed(0)
    head = FactorizedHead(6, 3, Factors(factors=2, start=0.5), norm=False).double().eval()
    features = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    x = features.tanh().flatten(2)  # B n N
    pooled = x @ x.mT / 16
    expected = 0.5 * torch.einsum("bnm,cnm->bc", pooled, dense(head.layer)) + F.linear(
        x.mean(2), head.layer.linear.weight[:, :, 0, 0], head.layer.linear.bias
    )
    torch.testing.assert_close(head(features), expected)
    squared_mean = head.layer(features.tanh().mean((2, 3), keepdim=True))[:, :, 0, 0]
    assert not torch.allclose(head(features), squared_mean)
    evidence.property(
        "the head equals a linear classifier with W_j = F_j'F_j of bilinear pooling; the mean of squares is not the square of the mean",
        "分类头等于双线性池化之上 W_j = F_j'F_j 的线性分类器；平方的平均不等于平均的平方",
    )


def test_no_factors_is_a_linear_layer(evidence):
    fb = layer(5, 3, factors=0)
    x = torch.randn(2, 5, 4, 4)
    assert torch.equal(fb(x), F.conv2d(x, fb.linear.weight, fb.linear.bias))
    assert sum(p.numel() for p in fb.parameters()) == 18
    evidence.property("k = 0 is a linear layer", "k = 0 就是线性层")


def test_one_factor_solves_what_no_linear_layer_can(evidence):
    """Exclusive or: the sign of x_1 x_2 = ((x_1 + x_2)^2 - (x_1 - x_2)^2) / 4."""
    torch.manual_seed(0)
    x = torch.randn(1000, 8)
    label = (x[:, 0] * x[:, 1] > 0).long()
    fb = layer(8, 2, factors=1, drop=0.0).eval()
    with torch.no_grad():
        for p in fb.parameters():
            p.zero_()
        fb.factor.weight[1, :2, 0, 0] = torch.tensor([1.0, 1.0])
        fb.factor.weight[0, :2, 0, 0] = torch.tensor([1.0, -1.0])
        assert (fb(x[:, :, None, None])[:, :, 0, 0].argmax(1) == label).all()
    ones = torch.cat([x, torch.ones(1000, 1)], 1)
    best = torch.linalg.lstsq(ones, 2.0 * label[:, None] - 1).solution
    assert float((((ones @ best)[:, 0] > 0) == label).float().mean()) < 0.6
    evidence.property(
        "exclusive or of two features: solved exactly by one factor an output, by chance by the best linear map",
        "两个特征的异或：每个输出一个因子即可完全解决，最好的线性映射只有随机水平",
    )


def test_gradient_of_the_layer(evidence):
    fb = layer(3, 2, factors=2, drop=0.0).double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, f: torch.nn.functional.conv2d(x, f).square().unflatten(1, (-1, 2)).sum(2), (x, fb.factor.weight))
    (gradient,) = torch.autograd.grad(fb.eval().interactions(x).sum(), x)
    cells = x.movedim(1, -1)
    torch.testing.assert_close(gradient.movedim(1, -1), 2 * torch.einsum("cnm,...m->...n", dense(fb), cells))
    evidence.property("gradient of the interactions: 2 F'F x, and gradcheck", "二次项的梯度：2 F'F x，并通过 gradcheck")


# --- DropFactor


@torch.no_grad()
def test_drop_factor_drops_whole_factors_of_a_step(evidence):
    fb = layer(5, 3, factors=4, drop=0.5).train()
    x = torch.randn(20, 5, 1, 1).expand(-1, -1, 3, 3).contiguous()
    squares = fb.factor(x).square().unflatten(1, (-1, 4))[..., 0, 0]  # B c k
    torch.manual_seed(3)
    steps = torch.stack([fb.interactions(x) for _ in range(400)])
    torch.testing.assert_close(steps, steps[..., :1, :1].expand_as(steps))  # the same factors at all positions
    kept = torch.tensor([[(n >> f) & 1 for f in range(4)] for n in range(16)]).float()
    sums = squares @ kept.T  # all that dropping can leave, B c 16
    distance, nearest = (sums - steps[..., :1, 0]).abs().amax((1, 2)).min(1)  # the same for all images and outputs
    assert distance.max() < 1e-4
    drawn = kept[nearest]  # steps k
    assert (drawn.mean(0) - 0.5).abs().max() < 0.15
    assert (drawn.T.corrcoef() - torch.eye(4)).abs().max() < 0.3  # each factor by itself
    mean = steps[..., 0, 0].mean(0)
    fb.eval()
    torch.testing.assert_close(fb.interactions(x)[..., 0, 0], squares.sum(2) / 2)
    assert float(((mean - squares.sum(2) / 2).norm() / mean.norm()).detach()) < 0.1
    assert torch.equal(fb.linear(x), layer(5, 3, factors=4).linear(x))
    evidence.property(
        "DropFactor: whole factors, one draw for all images, outputs and positions of a step; evaluation is the mean of training",
        "DropFactor：丢的是整个因子，每一步只抽一次，所有图像、输出和位置共用；评估值是训练时的平均",
    )


def test_factors_start_as_in_the_authors_script():
    """Their initialiser counts k n inputs for a weight of shape c k n 1 1."""
    torch.manual_seed(0)
    weight = FactorizedBilinear(336, 100, Factors()).factor.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (20 * 336)) ** 0.5, rel=0.01)
    assert float(FactorizedBilinear(336, 100, Factors(start=0.03)).factor.weight.detach().std()) == pytest.approx(0.03, rel=0.01)


# --- As a layer


def test_on_other_backbones(evidence):
    torch.manual_seed(0)
    host = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"])
    net = put_head(host, Factors()).eval()
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        assert net(image)["logits"].shape == (2, 5)
        assert net.head.layer.linear.in_channels == host.widths[-1]
        assert isinstance(host.head, nn.Identity)
        torch.testing.assert_close(torch.export.export(net, (image,)).module()(image)["logits"], net(image)["logits"])
    evidence.property(
        "the head on a ConvNeXt: shapes, the old classifier gone, exported to the same numbers",
        "分类头放到 ConvNeXt 上：形状正确，旧分类器已去掉，导出后数值相同",
    )


def test_beside_1x1_convolutions(evidence):
    config = VARIANTS["test"]
    host = built(config)
    count = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in host.body.modules())
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = host.body.pyramid(image)[-1]
        put_convolutions(host.body, Factors(factors=2, start=0.0))
        assert sum(isinstance(m, FactorizedBilinear) for m in host.body.modules()) == count == 8
        torch.testing.assert_close(host.body.pyramid(image)[-1], before)  # F = 0: the linear terms keep their weights
        for m in host.body.modules():
            if isinstance(m, FactorizedBilinear):
                m.factor.weight.normal_(0, 0.1)
        assert not torch.allclose(host.body.pyramid(image)[-1], before)
    evidence.property(
        "beside 1x1 convolutions: every one of stride 1, the same function where F is zero",
        "加在 1x1 卷积旁边：步长为 1 的每一个都加；F 为零时函数不变",
    )


def test_what_does_not_fit():
    with pytest.raises(InputError, match="no place"):
        put_convolutions(vit.ViT(3, 5, 32, vit.VARIANTS["test"]), Factors())
    with pytest.raises(InputError, match="factors=-1"):
        FactorizedBilinear(3, 2, Factors(factors=-1))
    with pytest.raises(InputError, match="drop=1"):
        FactorizedBilinear(3, 2, Factors(drop=1.0))


def test_recipe():
    inception, resnet = recipe(VARIANTS["inception_fbn"]), recipe(VARIANTS["resnet164_fbn"])
    assert (inception.lr, resnet.lr, inception.clip, inception.weight_decay, inception.batch_size) == (0.2, 0.1, 10.0, 1e-4, 128)
    assert inception.warmup == pytest.approx(3 / 400)
    assert inception.decay_at == resnet.decay_at == (0.5, 0.75)
    assert recipe(VARIANTS["small"]).optimizer == "adamw"
