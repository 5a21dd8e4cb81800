"""Octave convolution against ordinary convolutions, torchvision's ResNet and loops, and what the layer promises."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext import convnext
from paperworks.papers.backbones.vit import vit
from paperworks.papers.layers.octave_conv.octave_conv import (
    COUNTS,
    VARIANTS,
    Config,
    Octave,
    OctaveConv,
    Octaves,
    OctResNet,
    Packed,
    cost,
    down,
    frequency,
    high,
    memory,
    put,
    recipe,
    resnet,
    up,
    whole,
)
from peers import randomised_norms, relative

pytestmark = pytest.mark.usefixtures("no_gradients")
randomised = partial(randomised_norms, variance=(0.5, 1.5))

TOLERANCE = 1e-4
PARAMETERS = {26: 15_995_176, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808, 200: 64_673_832}
PAPERS = {"r50": 4.1, "r50_a125": 3.6, "r50_a250": 3.1, "r50_a500": 2.4, "r50_a750": 1.9}
"""10^9 multiply-adds as the paper's ablation rounds them."""


def built(config: Config, side: int = 32, classes: int = 10) -> OctResNet:
    torch.manual_seed(0)
    return OctResNet(3, classes, side, config).eval()


def conv(inputs: int = 8, outputs: int = 12, **settings) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, **({"kernel_size": 3, "padding": 1} | settings))


def pair(width: int, alpha: float, side: int = 12) -> Octaves:
    torch.manual_seed(2)
    return Octaves(torch.randn(2, high(width, alpha), side, side), torch.randn(2, width - high(width, alpha), side // 2, side // 2))


# --- Sizes


@pytest.mark.parametrize("depth", COUNTS)
def test_parameters_are_those_of_the_resnet(depth):
    with torch.device("meta"):
        counts = {
            sum(p.numel() for p in built(VARIANTS[name], 224, 1000).parameters()) for name in VARIANTS if name.startswith(f"r{depth}")
        }
    assert counts == {PARAMETERS[depth]}


@pytest.mark.parametrize("name", PAPERS)
def test_multiply_adds_are_the_papers(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, 1000)
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PAPERS[name], abs=0.05)


@pytest.mark.parametrize(("alpha", "share"), [(0.125, 0.824), (0.25, 0.672), (0.5, 0.4375), (0.75, 0.297)])
def test_cost_and_memory_of_a_layer(evidence, alpha, share):
    assert cost(alpha) == pytest.approx(share, abs=1e-3)
    layer, x = OctaveConv(conv(64, 64), alpha, alpha), pair(64, alpha, 16)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == pytest.approx(cost(alpha) * 2 * 2 * 16 * 16 * 9 * 64 * 64)
    assert y.high.numel() + y.low.numel() == memory(alpha) * 2 * 64 * 16 * 16
    evidence.property(
        f"alpha = {alpha}: multiply-adds and numbers in a map are the paper's formulas, exactly",
        f"alpha = {alpha}：乘加次数与特征图中数的个数恰为论文公式所给",
    )


# --- The convolution


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("alpha_in", "alpha_out"), [(0.25, 0.25), (0.0, 0.5), (0.5, 0.0), (0.75, 0.25)])
def test_convolution_is_its_four_paths(evidence, stride, alpha_in, alpha_out):
    """Four modules with weights of their own, resized by other means, in double precision."""
    base = conv(8, 12, stride=stride).double()
    layer, x = OctaveConv(base, alpha_in, alpha_out), pair(8, alpha_in)
    x = Octaves(x.high.double(), x.low.double())
    hi, ho = high(8, alpha_in), high(12, alpha_out)
    w = base.weight

    def pool(t, factor):
        return F.interpolate(t, scale_factor=1 / factor, mode="area") if factor > 1 else t

    y_high = F.conv2d(pool(x.high, stride), w[:ho, :hi], padding=1) + base.bias[:ho, None, None]
    y_low = F.conv2d(pool(x.high, 2 * stride), w[ho:, :hi], padding=1) + base.bias[ho:, None, None] if alpha_out else torch.zeros(())
    if alpha_in:
        came = F.conv2d(x.low, w[:ho, hi:], padding=1)
        y_high = y_high + (came if stride == 2 else came.repeat_interleave(2, 2).repeat_interleave(2, 3))
        y_low = y_low + F.conv2d(pool(x.low, stride), w[ho:, hi:], padding=1) if alpha_out else y_low
    ours = layer(x if alpha_in else x.high)
    if alpha_out:
        assert relative(ours.low, y_low) < 1e-10
        ours = ours.high
    assert relative(ours, y_high) < 1e-10
    evidence.property(
        f"stride {stride}, alpha {alpha_in} to {alpha_out}: four paths by hand, strides as pooling",
        f"步长 {stride}，alpha 从 {alpha_in} 到 {alpha_out}：四条路径与手算一致，步长以池化实现",
    )


def test_without_a_low_part_it_is_the_ordinary_convolution(evidence):
    base, x = conv(), torch.randn(2, 8, 12, 12)
    torch.testing.assert_close(OctaveConv(base, 0, 0)(x), base(x))
    torch.testing.assert_close(OctaveConv(conv(stride=2), 0, 0)(x), F.conv2d(down(x), base.weight, base.bias, padding=1))
    evidence.property(
        "alpha = 0 to 0: nn.Conv2d; with a stride, pooling and nn.Conv2d",
        "alpha 从 0 到 0：即 nn.Conv2d；有步长时为池化加 nn.Conv2d",
    )


def test_constant_maps_do_not_notice_the_split(evidence):
    base = conv(8, 12, padding=0, kernel_size=1)
    x = torch.randn(1, 8, 1, 1).expand(1, 8, 12, 12)
    split = OctaveConv(base, 0.5, 0.25)(Octaves(x[:, :4], down(x[:, 4:])))
    torch.testing.assert_close(whole(split), base(x), rtol=1e-4, atol=1e-5)
    evidence.property(
        "on maps that are constant in space the result is the ordinary convolution's, whatever the shares",
        "特征图在空间上恒定时，无论比例如何，结果都与普通卷积相同",
    )


def test_depthwise_parts_do_not_exchange():
    layer = OctaveConv(conv(8, 8, groups=8), 0.25, 0.25)
    x = pair(8, 0.25)
    y = layer(x)
    torch.testing.assert_close(y.high, F.conv2d(x.high, layer.weight[:6], layer.bias[:6], padding=1, groups=6))
    torch.testing.assert_close(y.low, F.conv2d(x.low, layer.weight[6:], layer.bias[6:], padding=1, groups=2))


def test_pooling_keeps_the_centre_and_strides_shift_it(evidence):
    """Section 3.3: a blob that goes down and up again stays where it was."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    blob = torch.exp(-((y - 15.5) ** 2 + (x - 15.5) ** 2) / 18)[None, None]

    def centre(image):
        return float((image[0, 0] * y).sum() / image.sum())

    assert centre(up(down(blob), blob.shape[2:])) == pytest.approx(15.5, abs=1e-3)
    assert abs(centre(up(blob[..., ::2, ::2], blob.shape[2:])) - 15.5) > 0.4
    evidence.property(
        "average pooling keeps a blob's centre through down and up, a strided sample moves it by half a cell",
        "先降再升，平均池化不移动光斑的中心，带步长的取样使它移动半格",
    )


def test_low_part_sees_twice_as_far(evidence):
    layer = OctaveConv(conv(8, 8), 0.5, 0.5)
    x = torch.randn(1, 4, 16, 16)
    other = x.clone()
    other[..., 8, 8] += 1
    low = torch.zeros(1, 4, 8, 8)
    first, second = layer(Octaves(x, low)), layer(Octaves(other, low))
    assert [int((a != b).any(1).any(2).sum()) for a, b in ((first.high, second.high), (first.low, second.low))] == [3, 3]
    odd = down(torch.randn(1, 2, 7, 5))
    assert odd.shape == (1, 2, 4, 3)
    assert up(odd, torch.Size((7, 5))).shape == (1, 2, 7, 5)
    evidence.property(
        "a cell reaches 3x3 cells of each part: 3x3 and 6x6 cells of full resolution",
        "一格影响两部分各 3×3 格：即全分辨率的 3×3 与 6×6 格",
    )


# --- Networks


def test_network_without_octaves_is_torchvisions(evidence):
    peer = randomised(torchvision.models.resnet50())
    net = built(VARIANTS["r50"], 96, 1000)
    net.load_state_dict({k.replace("fc.", "head.") if k.startswith("fc.") else f"body.{k}": v for k, v in peer.state_dict().items()})
    image = torch.randn(1, 3, 96, 96)
    error = relative(net(image)["logits"], peer(image))
    assert error < TOLERANCE
    net.body.layer2[0].conv2.weight[0] *= 1.5
    assert relative(net(image)["logits"], peer(image)) > TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} resnet50, alpha = 0", error=error)


@pytest.mark.parametrize("alpha", [0.125, 0.5])
def test_pairs_and_packed_layers_agree(evidence, alpha):
    """The network whose maps are pairs, and a ResNet into which the layer was put: two ways through the same numbers."""
    torch.manual_seed(0)
    host = randomised(put(resnet(50, 3, "cifar", 16), Octave(alpha=alpha)))
    whole_net = built(Config(alpha=alpha, stem="cifar", width=16))
    net = whole_net.body
    state = {}
    for key, value in host.state_dict().items():
        key = key.replace(".octave.", ".")
        target = key if key in net.state_dict() else None
        if target is None:  # a batch norm that is two here
            at, name = key.rsplit(".", 1)
            if name == "num_batches_tracked":
                state |= {f"{at}.high.{name}": value, f"{at}.low.{name}": value}
            else:
                cut = high(len(value), alpha)
                state |= {f"{at}.high.{name}": value[:cut], f"{at}.low.{name}": value[cut:]}
        else:
            state[target] = value
    net.load_state_dict(state)
    image = torch.randn(2, 3, 32, 32)
    error = max(relative(whole(a), b) for a, b in zip(whole_net.octaves(image), host.pyramid(image)))
    assert error < TOLERANCE
    assert sum(isinstance(m, OctaveConv) for m in net.modules()) == sum(isinstance(m, Packed) for m in host.modules()) == 45
    plain = resnet(50, 3, "cifar", 16).eval()
    plain.load_state_dict({k.replace(".octave.", "."): v for k, v in host.state_dict().items()})
    assert relative(host(image), plain(image)) > 0.01
    evidence.fidelity(against=f"pairs against packed layers in torchvision-like ResNet-50, alpha = {alpha}, all stages", error=error)


def test_stages():
    net = built(VARIANTS["small"])
    maps = net.octaves(torch.randn(2, 3, 32, 32))
    assert [type(m).__name__ for m in maps] == ["Octaves"] * 3 + ["Tensor"]
    assert [(tuple(m.high.shape[1:]), tuple(m.low.shape[1:])) for m in maps[:3]] == [
        ((48, 32, 32), (16, 16, 16)), ((96, 16, 16), (32, 8, 8)), ((192, 8, 8), (64, 4, 4)),
    ]  # fmt: skip
    features = net.pyramid(torch.randn(2, 3, 32, 32))
    assert [f.shape[1:] for f in features] == [(w, 32 // s, 32 // s) for w, s in zip(net.widths, net.strides)]
    assert net.embed(torch.randn(2, 3, 32, 32)).shape == (2, net.embedding)


def test_layer_in_other_networks(evidence):
    torch.manual_seed(0)
    host = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"]).eval()
    image = torch.randn(2, 3, 32, 32)
    before = host(image)["logits"]
    host = put(host, Octave(alpha=0.5))
    places = [name for name, m in host.named_modules() if isinstance(m, Packed)]
    assert places == [f"stages.{i}.depthwise" for i in ("0.0", "1.0", "2.0", "2.1", "3.0")]
    assert relative(host(image)["logits"], before) > 1e-4
    with torch.enable_grad():
        host(image)["logits"].square().sum().backward()
    assert all(p.grad is not None for p in host.parameters())
    torch.testing.assert_close(torch.export.export(host, (image,)).module()(image)["logits"], host(image)["logits"])
    evidence.property("in a ConvNeXt: all depthwise convolutions, trains and exports", "在 ConvNeXt 中：替换全部深度卷积，可训练、可导出")


def test_bad_input():
    with pytest.raises(InputError, match=r"alpha=1\.0"):
        OctResNet(3, 5, 32, Config(alpha=1.0, depth=26, width=4))
    with pytest.raises(InputError, match="alpha=-1"):
        put(nn.Sequential(conv()), Octave(alpha=-1))
    with pytest.raises(InputError, match="no place"):
        put(vit.ViT(3, 5, 32, vit.VARIANTS["test"]), Octave())


def test_frequency(evidence):
    x = torch.arange(32.0)
    wave = torch.cos(2 * torch.pi * x / 8).expand(1, 1, 32, 32)
    assert frequency(wave) == pytest.approx(1 / 8, abs=1e-4)
    assert frequency(wave + 5) == pytest.approx(1 / 8, abs=1e-4)
    noise = torch.randn(1, 8, 32, 32)
    assert frequency(up(down(noise), noise.shape[2:])) < frequency(noise)
    evidence.property(
        "mean frequency: a wave of 8 cells has 1/8; what was pooled is lower",
        "平均频率：周期为 8 格的波为 1/8；池化之后更低",
    )


def test_recipe():
    paper = recipe(VARIANTS["r50_a125"])
    assert (paper.optimizer, paper.weight_decay) == ("sgd", 1e-4)
    assert paper.lr / paper.batch_size == pytest.approx(0.4 / 1024)
