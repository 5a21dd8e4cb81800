"""TernaryNet against numbers of the released script, its bits against integer algebra, and its parts by hand."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.layers.ternarynet.claim import with_own_statistics
from paperworks.papers.layers.ternarynet.ternarynet import (
    LAYERS,
    VARIANTS,
    Activation,
    Config,
    PackedConv2d,
    TernaryConv2d,
    TernaryInput,
    TernaryLayer,
    TernaryUNet,
    converted,
    dot,
    loss,
    packed,
    planes,
    put,
    ternarised,
    ternary,
    ternary_tanh,
)
from paperworks.tasks.base import Grid
from peers import relative

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "ternarynet.json").read_text())
PLACES = {
    "c1": "contracting.0", "c2": "contracting.1", "c3": "contracting.2", "c4": "bottom",
    "c5": "expanding.0", "c6": "expanding.1", "c7": "expanding.2",
}  # fmt: skip
"""The script's convolutions c1a, c1b, ... and the norms b1a, ... by their level."""


def built(config: Config, channels: int = 1, classes: int = 3) -> TernaryUNet:
    torch.manual_seed(0)
    return TernaryUNet(channels, classes, config).eval()


def lively(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


def trits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


# --- The released script


@pytest.fixture(scope="module")
def official() -> TernaryUNet:
    """Our network with the fixture's weights."""
    draw = runpy.run_path(str(FIXTURES / "ternarynet_record.py"))["draw"]
    net = built(VARIANTS["paper"], channels=15, classes=2)
    state = {}
    for theirs, shape in FIXTURE["shapes"].items():
        layer, _, what = theirs.partition(".")
        if layer == "c8":
            ours, value = f"head.{what}", draw(theirs, tuple(shape))
            value = value[..., None] if what == "weight" else value
        else:
            ours, value = f"{PLACES['c' + layer[1]]}.{'ab'.index(layer[2])}.{'cb'.index(layer[0])}.{what}", draw(theirs, tuple(shape))
        state[ours] = value
    missing = net.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(k.endswith(("num_batches_tracked", "beta")) for k in missing.missing_keys)
    return net


@pytest.mark.parametrize("slope", FIXTURE["logits"])
def test_outputs_equal_the_released_script(evidence, official, slope):
    """Ternary weights; activations smooth with a slope of 3 and 8, and as steps (0.5 in the script is the threshold)."""
    draw = runpy.run_path(str(FIXTURES / "ternarynet_record.py"))["draw"]
    for module in official.modules():
        if isinstance(module, Activation):
            module.train(float(slope) >= 1)
            module.beta.fill_(float(slope))
    theirs = torch.tensor(FIXTURE["logits"][slope])
    with torch.inference_mode():
        image = draw("image", tuple(FIXTURE["size"]))
        error = relative(official(image)["logits"].flatten(), theirs)
        assert error < TOLERANCE
        weight = official.expanding[1][0][0].weight
        kept = weight.clone()
        weight.mul_(1.1)
        assert relative(official(image)["logits"].flatten(), theirs) > TOLERANCE
        weight.copy_(kept)
    what = "steps" if float(slope) < 1 else f"slope {slope}"
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, ternary weights, activations: {what}", error=error)


def test_parameters_are_the_released_networks(evidence):
    for name in ("paper", "float"):
        assert sum(p.numel() for p in built(VARIANTS[name], 15, 2).parameters()) == FIXTURE["parameters"] == 2_664_482
    ours = [m for m in built(VARIANTS["paper"], 15, 2).modules() if isinstance(m, TernaryConv2d)]
    assert len(ours) == 13
    assert not [m for m in built(VARIANTS["float"], 15, 2).modules() if isinstance(m, TernaryConv2d | Activation)]
    evidence.property(
        "2,664,482 parameters; 13 convolutions are ternary, the first and the classifier are not",
        "2,664,482 个参数；13 个卷积是三值的，第一个卷积和分类层不是",
    )


# --- Activations and weights


def test_ternary_tanh(evidence):
    x = torch.linspace(-2, 2, 81)
    for slope in ("3.0", "8.0"):
        torch.testing.assert_close(ternary_tanh(x, float(slope)), torch.tensor(FIXTURE["tanh"][slope]), rtol=1e-5, atol=1e-6)
    off = (x.abs() - 0.5).abs() > 1e-3
    assert torch.equal(ternary(x)[off], torch.tensor(FIXTURE["tanh"]["0.5"])[off])
    torch.testing.assert_close(ternary_tanh(-x, 3.0), -ternary_tanh(x, 3.0))
    for beta in (3.0, 8.0):
        torch.testing.assert_close(ternary_tanh(torch.tensor([0.0, 0.5, 1e3]), beta), torch.tensor([0.0, 0.5 * math.tanh(2 * beta), 1.0]))
    gap = [float((ternary_tanh(x, beta) - ternary(x))[off].abs().max()) for beta in (3.0, 8.0, 4000.0)]
    assert gap[0] > gap[1] > gap[2]
    assert gap[2] < 1e-6
    evidence.property(
        "ternary tanh: odd, half-way at 1/2, goes to the step as its slope grows",
        "三值 tanh：奇函数，在 1/2 处取到一半，斜率增大时趋于阶跃",
    )


def test_slope_grows_with_training(evidence):
    act = Activation("ternary", (3.0, 8.0))
    x = torch.linspace(-1.2, 1.2, 49)
    for share, beta in ((0.0, 3.0), (0.5, 5.5), (0.9, 7.5), (0.2, 4.0)):  # of the share alone, not of what was before
        act.train().advance(share)
        torch.testing.assert_close(act(x), ternary_tanh(x, beta))
        assert torch.equal(act.eval()(x), ternary(x))
    assert "beta" in act.state_dict()
    net = built(VARIANTS["test"])
    for module in net.modules():
        if hasattr(module, "advance"):
            module.advance(1.0)
    assert {float(m.beta) for m in net.modules() if isinstance(m, Activation)} == {8.0}
    evidence.property(
        "advance: beta is linear in the share of training; evaluation takes the steps",
        "advance：beta 随训练比例线性变化；评估时取阶跃",
    )


def test_binary_activations():
    act = Activation("binary", (3.0, 8.0))
    x = torch.tensor([-2.0, -0.1, 0.0, 0.3])
    assert act.eval()(x).tolist() == [-1, -1, 1, 1]
    torch.testing.assert_close(act.train()(x), torch.tanh(3 * x))


def test_weights_are_ternarised_filter_by_filter(evidence):
    weight = torch.tensor([[[[0.1, -0.9, 0.5], [0.0, 2.0, -0.4]]], [[[3.0, 3.0, -3.0], [3.0, 3.0, 3.0]]]])
    signs, scale = ternarised(weight)
    assert signs[0].flatten().tolist() == [0, -1, 1, 0, 1, 0]  # mean size 0.65, threshold 0.455
    assert scale.flatten().tolist() == pytest.approx([(0.9 + 0.5 + 2.0) / 3, 3.0])
    assert signs[1].flatten().tolist() == [1, 1, -1, 1, 1, 1]
    random = torch.randn(8, 4, 3, 3)
    signs, scale = ternarised(random)
    best = (random - scale * signs).square().sum((1, 2, 3))
    for other in (0.9 * scale, 1.1 * scale):  # for these signs the scale is the least squares one
        assert (best < (random - other * signs).square().sum((1, 2, 3))).all()
    evidence.property(
        "weights: 0.7 of a filter's mean size as threshold, the mean above it as scale, which is the least-squares one",
        "权重：阈值为滤波器绝对值均值的 0.7 倍，尺度为超过阈值者的均值，正是最小二乘解",
    )


def test_gradient_goes_to_the_real_weights(evidence):
    conv = TernaryConv2d(3, 4, 3, bias=False)
    x, seen = torch.randn(2, 3, 7, 7), torch.randn(2, 4, 5, 5)
    (conv(x) * seen).sum().backward()
    signs, scale = ternarised(conv.weight.detach())
    weight = (scale * signs).requires_grad_()
    y = F.conv2d(x, weight)
    (y * seen).sum().backward()
    assert torch.equal(conv(x), y)
    torch.testing.assert_close(conv.weight.grad, weight.grad)
    evidence.property(
        "forward exactly the ternary weights, backward their gradient to the real ones",
        "前向恰为三值权重，反向把它们的梯度传给实数权重",
    )


# --- Bits


@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 288, 1000])
def test_dot_products_of_bits_are_those_of_integers(evidence, length):
    a, b = trits(50, length, seed=1), trits(50, length, seed=2)
    assert dot(planes(a), planes(b)).tolist() == (a * b).sum(1).int().tolist()
    words = planes(a)[0]
    assert words.shape == (50, -(-length // 64))
    assert words.dtype.itemsize == {1: 1, 17: 4}.get(length, 8)
    evidence.property(
        "popcount(both) - 2 popcount(both and signs differ) equals the integer product, for any length",
        "popcount(都非零) - 2 popcount(都非零且符号不同) 等于整数点积，任意长度",
    )


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride", "padding", "dilation"),
    [(8, 5, 3, 1, 0, 1), (64, 16, 3, 1, 1, 1), (70, 6, 1, 1, 0, 1), (12, 7, 5, 2, 2, 1), (9, 4, 3, 2, 0, 2), (3, 2, (1, 4), (2, 1), (0, 3), 1)],
)  # fmt: skip
def test_packed_convolution_equals_the_float_one(evidence, channels, filters, kernel, stride, padding, dilation):
    torch.manual_seed(0)
    conv = TernaryConv2d(channels, filters, kernel, stride, padding, dilation, bias=True)
    x = trits(2, channels, 13, 11)
    bits = PackedConv2d(conv)
    with torch.inference_mode():
        signs, _ = ternarised(conv.weight)
        expected = F.conv2d(x.double(), signs.double(), None, stride, padding, dilation)
        assert torch.equal(bits.counted(x).double(), expected)  # exactly
        torch.testing.assert_close(bits(x), conv(x), rtol=1e-5, atol=1e-5)
    evidence.property(
        "packed convolution: integers exactly those of the float convolution with the signs; strides, borders, dilation, bias",
        "打包的卷积：整数与用符号做的浮点卷积完全相等；含步长、边界、空洞、偏置",
    )


def test_what_is_not_ternary_is_refused():
    with pytest.raises(InputError, match="resampling=ternary"):
        planes(torch.tensor([0.5, 1.0]))
    net = packed(lively(built(replace(VARIANTS["test"], resampling="mean"))))
    with pytest.raises(InputError, match="resampling=ternary"):
        net(torch.randn(1, 1, 16, 16))


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_packed_network_answers_the_same(evidence, kind):
    net = lively(built(replace(VARIANTS["small"], activation=kind)))
    image = torch.randn(2, 1, 32, 48)
    with torch.inference_mode():
        plain = net(image)["logits"]
        bits = packed(net)
        assert sum(isinstance(m, PackedConv2d) for m in bits.modules()) == 13
        assert not any(isinstance(m, TernaryConv2d) for m in bits.modules())
        error = relative(bits(image)["logits"], plain)
    assert error < 1e-5
    evidence.property(
        f"a whole network of bits answers as the float one ({kind} activations, made so again after resampling)",
        f"整个位网络与浮点网络的答案相同（{kind} 激活，重采样后再做一次）",
    )


def test_memory(evidence):
    """The paper's network: 2 bits a weight, and a scale a filter."""
    net = built(VARIANTS["paper"], 15, 2)
    convs = [m for m in net.modules() if isinstance(m, TernaryConv2d)]
    real = sum(4 * c.weight.numel() for c in convs)
    bits = sum(PackedConv2d(c).bytes for c in convs)
    assert bits == real / 16 + 4 * sum(c.out_channels for c in convs)
    evidence.property(
        f"ternary weights of the paper's network: {real / 2**20:.2f} MiB as floats, {bits / 2**20:.2f} MiB packed",
        f"论文网络的三值权重：浮点为 {real / 2**20:.2f} MiB，打包后为 {bits / 2**20:.2f} MiB",
    )


# --- The network


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(16, 22), (2, 34), (40, 28)])
def test_any_even_size_comes_back(levels, size):
    net = built(replace(VARIANTS["test"], levels=levels, base=2))
    with torch.inference_mode():
        assert net(torch.randn(1, 1, *size))["logits"].shape == (1, 3, *size)


def test_borders_are_the_scripts():
    net = built(replace(VARIANTS["test"], levels=3))
    assert net.border(176) == (30, 2)
    assert net.border(110) == (31, 3)


def test_output_lies_over_its_input(evidence):
    """A change of one pixel is felt around it and symmetrically, so border and cut fit together."""
    net = built(Config(base=4, levels=2, weights="float", activation="relu")).double()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / (module.in_channels * module.kernel_size[0] ** 2))
    with torch.inference_mode():
        image = torch.zeros(1, 1, 64, 66, dtype=torch.float64)
        image[0, 0, 31:33, 32:34] = 1
        felt = net(image)["logits"][0, 0]
        centre = [float((felt.sum(1 - axis) * torch.arange(n)).sum() / felt.sum()) for axis, n in enumerate((64, 66))]
    assert centre == pytest.approx([31.5, 32.5], abs=0.1)
    evidence.property("borders and cuts leave the answer over the pixels that it is of", "补边与裁剪之后，答案仍对准它所属的像素")


def test_loss_weighs_an_organ_five_times():
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    mask[0, 0] = 255
    entropy = -logits.log_softmax(1).gather(1, mask.clamp_max(2)[:, None])[:, 0]
    weight = torch.where(mask == 0, 0.5, 2.5) * (mask != 255)
    found = loss(VARIANTS["paper"])({"logits": logits}, {"mask": mask})["loss"]
    torch.testing.assert_close(found, (weight * entropy).sum() / weight.sum())


# --- In other networks


def test_layer_takes_ordinary_convolutions_but_the_first(evidence):
    host = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 3, stride=2),
    )  # fmt: skip
    host.grid = Grid(fixed=9)
    kept = host[2].weight.detach().clone()
    assert LAYERS["ternary_conv"].slot == "conv"
    net = put(host, TernaryLayer())
    assert [isinstance(m, TernaryInput) for m in net] == [False, False, True, False, False, True]
    assert torch.equal(net[2][-1].weight, kept)
    x = torch.randn(2, 3, 9, 9)
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net[2].parameters())
    with torch.inference_mode():
        plain = net.eval()(x)
        error = relative(packed(net)(x), plain)
    assert error < 1e-5
    for nowhere in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Linear(4, 4))):
        nowhere.grid = Grid(fixed=9)
        with pytest.raises(InputError, match="no place"):
            put(nowhere, TernaryLayer())
    evidence.property(
        "as a layer: every ungrouped convolution of more than one pixel but the first; packs into bits as well",
        "作为层：除第一个以外，所有不分组、核大于一个像素的卷积；同样可以打包成位",
    )


def test_layer_leaves_convolutions_that_only_lend_their_weights():
    class Lender(nn.Module):
        grid = Grid(fixed=8)

        def __init__(self):
            super().__init__()
            self.first, self.second, self.lent = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            return F.conv2d(self.second(self.first(x)), self.lent.weight)

    net = put(Lender().train(), TernaryLayer())
    assert [type(m) for m in net.children()] == [nn.Conv2d, TernaryInput, nn.Conv2d]
    assert net.training
    assert not net.second._forward_pre_hooks


def test_layer_without_ternary_weights_in_the_way_is_the_convolution():
    """Where the weights are ternary already and activations stay, nothing changes."""
    conv = nn.Conv2d(5, 4, 3, padding=1)
    with torch.inference_mode():
        conv.weight.copy_(0.3 * trits(4, 5, 3, 3))
        x = torch.randn(2, 5, 8, 8)
        torch.testing.assert_close(converted(conv)(x), conv(x))
        torch.testing.assert_close(TernaryInput(conv, TernaryLayer(activations=False))(x), conv(x))


def test_the_claims_statistics_are_those_of_the_image_alone(evidence):
    """In evaluation a norm's output has the mean and deviation that its weights say, whatever the image's brightness and the running statistics."""
    net = lively(built(VARIANTS["test"]))
    norm, seen = net.contracting[0][1][1], []
    norm.register_forward_hook(lambda _, given, output: seen.append(output))
    with_own_statistics(net)
    for brightness in (0.1, 10.0):
        net.eval()(brightness * torch.randn(1, 1, 32, 32))
        torch.testing.assert_close(seen[-1].mean((0, 2, 3)), norm.bias, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(seen[-1].std((0, 2, 3), correction=0), norm.weight.abs(), atol=1e-3, rtol=1e-2)
    evidence.property(
        "the claim compares all arms with each image's own BatchNorm statistics",
        "主张比较各组时，都用每张图自己的 BatchNorm 统计量",
    )
