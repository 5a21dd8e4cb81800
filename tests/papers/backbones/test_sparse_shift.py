"""Sparse shift and FE-Net against numbers of the official code, against grid_sample and loops, and what the layer promises."""

from __future__ import annotations

import json
import re
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
from paperworks.papers.backbones.sparse_shift.sparse_shift import (
    VARIANTS,
    Config,
    FEBlock,
    FENet,
    Learnable,
    Settled,
    Shift,
    ShiftLayer,
    moved,
    put,
    read,
    recipe,
    settled,
    share_moved,
)
from paperworks.papers.backbones.vit import vit

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "sparse_shift.json").read_text())
KNOWN = {
    "1.0x": (4_229_648, 307.2),
    "1.375x": (6_002_486, 563.7),
    "1.0x_released": (4_623_408, 417.9),
    "1.375x_released": (6_745_470, 773.2),
}
"""Parameters and 10^6 multiply-adds of the official code with hidden layers by the input's and (as it is) by the output's width."""
PAPERS = {"1.0x": 301, "1.375x": 563}
"""10^6 multiply-adds that the paper's tables and the repository state."""


def built(config: Config, side: int = 32, channels: int = 3, classes: int = 10) -> FENet:
    torch.manual_seed(0)
    return FENet(channels, classes, side, config).eval()


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.normal_(1, 0.2)
                m.bias.normal_(0, 0.2)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.5, 1.5)
            if isinstance(m, ShiftLayer):
                m.a.normal_(0, 1.3 / m.rate)
                m.b.normal_(0, 1.3 / m.rate)
    return module.eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, classes=1000)
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 224, 224))
    parameters, millions = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    found = counter.get_total_flops() / 2e6
    assert found == pytest.approx(millions, abs=0.06)
    if name in PAPERS:  # which do not seem to count the classifier
        assert found - net.embedding * 1000 / 1e6 == pytest.approx(PAPERS[name], rel=0.02)


def test_every_variant_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)


# --- The official code


def ours(name: str) -> str:
    """The official code's name of a tensor under our names."""
    parts = {"conv1": "expand.0", "bn1": "expand.1", "shift2": "mix", "conv2": "project.0", "bn2": "project.1"}
    name = re.sub(r"^conv1\.", "stem.0.", re.sub(r"^bn1\.", "stem.1.", name))
    name = re.sub(r"^conv2\.", "last.0.", re.sub(r"^bn2\.", "last.1.", name)).replace("fc.", "head.")
    name = re.sub(r"^ibssl\.", "blocks.0.", re.sub(r"^ibpool\.", "blocks.1.", name))
    name = re.sub(r"^feblock(\d)\.", lambda m: f"blocks.{int(m[1]) + 1}.units.", name)
    name = re.sub(r"units\.resibssl_(\d)\.", lambda m: f"units.{int(m[1]) - 1}.", name)
    name = re.sub(r"blocks\.(\d)\.units\.(ibpool|ibssl)\.", lambda m: f"blocks.{m[1]}.units.{2 + (m[1] in '345')}.", name)
    return re.sub(r"\.(conv1|bn1|shift2|conv2|bn2)\.", lambda m: f".{parts[m[1]]}.", name)


@pytest.mark.parametrize("width", FIXTURE["networks"])
def test_outputs_equal_the_official_code(evidence, width):
    draw, golden = runpy.run_path(str(FIXTURES / "sparse_shift_record.py"))["draw"], FIXTURE["networks"][width]
    net = built(Config(expand=width), 64, classes=7)
    official = {ours(key): draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}
    net.load_state_dict({key: value.flatten(1) if key == "head.weight" else value for key, value in official.items()})
    image, theirs = draw("image", tuple(FIXTURE["input"])), torch.tensor(golden["logits"])
    with torch.no_grad():
        features = net.pyramid(image)
        errors = [relative(f.flatten()[:: f.numel() // 50], torch.tensor(s)) for f, s in zip(features, golden["stages"], strict=True)]
        error = max(relative(net(image)["logits"].flatten(), theirs), *errors)
        assert error < TOLERANCE
        net.blocks[2].units[1].mix.a += 1  # the channels of one layer move elsewhere
        assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    against = f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, FE-Net 1.0x, hidden width by the {width}, logits and five resolutions"
    evidence.fidelity(against=against, error=error)


# --- Shifts (section 3)


def by_loops(x: torch.Tensor, i: list[int], j: list[int]) -> torch.Tensor:
    y, (h, w) = torch.zeros_like(x), x.shape[2:]
    for c in range(x.shape[1]):
        for row in range(h):
            for column in range(w):
                if 0 <= row + i[c] < h and 0 <= column + j[c] < w:
                    y[:, c, row, column] = x[:, c, row + i[c], column + j[c]]
    return y


def sampled(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Each channel at real displacements by ``grid_sample``."""
    k, h, w = x.shape[1:]
    y = torch.arange(h, dtype=x.dtype)[None, :, None] + a[:, None, None]
    z = torch.arange(w, dtype=x.dtype)[None, None] + b[:, None, None]
    grid = torch.stack([(2 * z / (w - 1) - 1).expand(k, h, w), (2 * y / (h - 1) - 1).expand(k, h, w)], -1)
    found = F.grid_sample(x.transpose(0, 1), grid, align_corners=True)  # channels stand in the place of images
    return found.transpose(0, 1)


def places(width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, width, dtype=torch.float64).mul(1.5).unbind(0)


def test_whole_shift_by_loops(evidence):
    x = torch.randn(2, 6, 4, 5)
    i, j = [0, 1, -2, 3, 9, -4], [0, -1, 4, 2, 0, -9]  # some leave the map
    torch.testing.assert_close(moved(x, torch.tensor(i), torch.tensor(j)), by_loops(x, i, j))
    rolled = x[:, :1].roll((-1, -2), (2, 3))
    rolled[:, :, -1:], rolled[:, :, :, -2:] = 0, 0
    torch.testing.assert_close(moved(x[:, :1], torch.tensor([1]), torch.tensor([2])), rolled)
    evidence.property(
        "whole shifts by a loop over cells, and as a roll filled with zeros, beyond the map too",
        "整数位移与逐格循环一致，也与补零的 roll 一致，移出特征图时亦然",
    )


def test_real_shift_and_its_gradients_are_grid_samples(evidence):
    a, b = (v.requires_grad_() for v in places())
    x = torch.randn(2, 12, 6, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    expected = sampled(x, a, b)
    theirs = torch.autograd.grad(expected, (x, a, b), grad)
    found = Learnable.apply(x, a, b, False, 0.0)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(torch.autograd.grad(found, (x, a, b), grad), theirs):
        torch.testing.assert_close(mine, other)
    assert torch.autograd.gradcheck(
        lambda *v: Learnable.apply(*v, False, 0.0),
        (x[:1, :4].detach().requires_grad_(), *(v[:4].detach().requires_grad_() for v in (a, b))),
    )
    evidence.property(
        "real (active) shifts: values and all gradients are grid_sample's in double precision, and those of differences",
        "实数位移（active）：双精度下值和全部梯度与 grid_sample 相等，也与差分相等",
    )


def test_rounded_forward_real_backward(evidence):
    """Section 3.3, which the reading group marked: as in quantised networks, the forward pass rounds, the backward pass does not know of it."""
    a, b = (v.requires_grad_() for v in places())
    x = torch.randn(2, 12, 6, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    found = Learnable.apply(x, a, b, True, 0.0)
    whole = a.round().long().tolist(), b.round().long().tolist()
    torch.testing.assert_close(found, by_loops(x.detach(), *whole))
    back, slope_a, slope_b = torch.autograd.grad(found, (x, a, b), grad)
    torch.testing.assert_close(back, by_loops(grad, *([-v for v in way] for way in whole)))
    theirs = torch.autograd.grad(sampled(x.detach(), a, b), (a, b), grad)
    torch.testing.assert_close((slope_a, slope_b), theirs)
    at_rounded = torch.autograd.grad(sampled(x.detach(), a.round().detach().requires_grad_(), b), b, grad)[0]
    assert relative(slope_b, at_rounded) > 0.1
    evidence.property(
        "sparse shift: values and input gradient of the rounded displacement, displacement gradient of the real one",
        "稀疏位移：值和输入的梯度按取整后的位移，位移的梯度按实数位移",
    )


def test_penalty_is_that_of_l1():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 18, 5, 5), torch.randn(2, 18, 5, 5)
    grads = []
    for inside, outside in ((0.3, 0.0), (0.0, 0.3)):
        layer = ShiftLayer(18, Shift(penalty=inside))
        with torch.no_grad():
            layer.a += 0.2
        ((layer(x) * weight).sum() + outside * (layer.a.abs().sum() + layer.b.abs().sum())).backward()
        grads.append(torch.stack([layer.a.grad, layer.b.grad]))
    torch.testing.assert_close(*grads)
    active = ShiftLayer(18, Shift(by="active", penalty=0.3))
    assert active.penalty == 0


def test_a_rate_is_a_larger_unit_of_displacement():
    slow, fast = ShiftLayer(18, Shift()), ShiftLayer(18, Shift(rate=10))
    x = torch.randn(2, 18, 5, 5)
    torch.testing.assert_close(slow(x), fast(x))
    assert torch.equal(slow.displacements(), fast.displacements())
    for layer in (slow, fast):
        layer(x).square().sum().backward()
    torch.testing.assert_close(fast.a.grad, 10 * slow.a.grad, rtol=1e-4, atol=1e-3)


def test_penalty_alone_brings_every_channel_home(evidence):
    layer = ShiftLayer(27, Shift(penalty=0.1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert share_moved(layer) == pytest.approx(24 / 27)
    x = torch.randn(1, 27, 4, 4)
    for _ in range(60):
        optimizer.zero_grad()
        (0 * layer(x)).sum().backward()
        optimizer.step()
    assert share_moved(layer) == 0
    torch.testing.assert_close(layer(x), x)
    evidence.property(
        "the penalty's gradient is lambda times the sign; with nothing against it all displacements go to zero, and zero is the identity",
        "惩罚的梯度是 lambda 乘以符号；没有其他作用时所有位移都回到零，位移为零就是恒等映射",
    )


def test_nine_directions_at_the_start(evidence):
    layer = ShiftLayer(20, Shift())
    directions, counts = layer.displacements()[:18].unique(dim=0, return_counts=True)
    assert directions.tolist() == [[i, j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert counts.tolist() == [2] * 9
    assert not layer.displacements()[18:].any()
    grouped = ShiftLayer(20, Shift(by="grouped"))
    assert list(grouped.parameters()) == []
    x = torch.randn(2, 20, 5, 5)
    torch.testing.assert_close(grouped(x), layer(x))
    evidence.property(
        "start: nine equal groups, one direction each, what is left over stays; grouped shift keeps that for good",
        "初值：九等份，每份一个方向，余下的通道不动；分组位移一直保持这样",
    )


def test_displacements_learn_in_the_first_half():
    layer = ShiftLayer(18, Shift())
    x = torch.randn(2, 18, 5, 5, requires_grad=True)
    for share, learns in ((0.0, True), (0.49, True), (0.5, False), (0.9, False), (0.2, True)):
        layer.a.grad = None
        layer.advance(share)
        layer(x).square().sum().backward()
        assert (layer.a.grad is not None) == learns
        assert x.grad is not None


@pytest.mark.parametrize("by", ["sparse", "active", "grouped"])
def test_evaluation_computes_what_training_does(by):
    layer = randomised(ShiftLayer(18, Shift(by=by)))
    x = torch.randn(2, 18, 6, 5)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    x.requires_grad_()
    layer(x).square().sum().backward()  # explanations ask for this
    expected = read(2 * layer(x).detach(), layer.a.detach(), layer.b.detach(), layer.whole, -1)
    torch.testing.assert_close(x.grad, expected)


def test_settled_network_moves_blocks_of_channels(evidence):
    net = randomised(built(VARIANTS["test"]))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = net(image)["logits"]
        torch.testing.assert_close(settled(net)(image)["logits"], before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, ShiftLayer) for m in net.modules())
    layer = randomised(ShiftLayer(18, Shift()))
    small = torch.randn(2, 18, 2, 3)  # some channels leave it
    torch.testing.assert_close(Settled(layer)(small), layer(small))
    still = ShiftLayer(8, Shift())
    assert Settled(still).ways == []
    evidence.property(
        "copying only the channels that move, in blocks of equal displacement, gives the same network",
        "只复制移动的通道，位移相同的成块复制，网络的结果不变",
    )


# --- FE-Net (section 4)


@pytest.mark.parametrize(("units", "stride"), [(3, 1), (3, 2), (4, 1), (4, 2)])
def test_block_feeds_groups_one_after_the_other(evidence, units, stride):
    block = randomised(FEBlock(32, 48, units, stride, Config()))
    x = torch.randn(2, 32, 8, 8)
    quarter = {3: (16, 24), 4: (16, 24, 28)}[units]
    parts = x.tensor_split(quarter, 1)
    with torch.no_grad():
        y = block.units[0](parts[-1])
        for k, part in enumerate(parts[-2::-1], start=1):
            y = block.units[k](torch.cat([part, y], 1))
        torch.testing.assert_close(block(x), y)
    assert y.shape == (2, 48, 8 // stride, 8 // stride)
    assert [u.residual for u in block.units] == [True] * (units - 1) + [False]
    inner = [u.expand[0].in_channels for u in block.units]
    assert inner == [32 // 2**k for k in range(units)][::-1]
    assert isinstance(block.units[-1].mix, nn.AvgPool2d if stride == 2 else ShiftLayer)
    evidence.property(
        f"FE block of {units} units, stride {stride}: groups by hand, the last unit sees all channels and does not add",
        f"FE 块，{units} 个单元，步长 {stride}：各组与手算一致，最后一个单元看到全部通道，不做残差相加",
    )


def test_hidden_width():
    wide, narrow = (FEBlock(16, 32, 3, 2, Config(expand=e)).units[-1].expand[0].out_channels for e in ("output", "input"))
    assert (wide, narrow) == (192, 96)


@pytest.mark.parametrize("by", ["sparse", "active", "grouped", "depthwise", "still"])
def test_every_mixer_learns(by):
    net = built(replace(VARIANTS["test"], by=by)).train()
    net(torch.randn(4, 3, 32, 32))["logits"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert sum(isinstance(m, ShiftLayer) for m in net.modules()) == (7 if by in ("sparse", "active", "grouped") else 0)


@pytest.mark.parametrize(
    ("name", "side", "strides"), [("1.0x", 224, (2, 4, 8, 16, 32)), ("small", 64, (1, 2, 4, 8)), ("test", 32, (1, 2, 4))]
)
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        features = net.pyramid(torch.zeros(1, 3, side, side))
        assert net.embed(torch.zeros(2, 3, side, side)).shape == (2, net.embedding)
    assert net.strides == strides
    assert [tuple(f.shape) for f in features] == [(1, w, side // s, side // s) for w, s in zip(net.widths, net.strides)]


# --- In other networks


def test_layer_in_other_networks(evidence):
    torch.manual_seed(0)
    host = put(convnext.ConvNeXt(3, 5, 64, replace(convnext.VARIANTS["test"], widths=(9, 12, 16, 24))), Shift())
    assert [n for n, m in host.named_modules() if isinstance(m, ShiftLayer)] == [
        f"stages.{i}.depthwise" for i in ("0.0", "1.0", "2.0", "2.1", "3.0")
    ]
    image = torch.randn(2, 3, 64, 64)
    host(image)["logits"].square().sum().backward()
    assert all(p.grad is not None for p in host.parameters())
    host.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(host, (image,)).module()(image)["logits"], host(image)["logits"])
    evidence.property("in place of a ConvNeXt's depthwise convolutions: trains and exports", "替换 ConvNeXt 的深度卷积：可以训练和导出")


def test_layer_in_a_resnet_keeps_its_resolutions():
    with torch.device("meta"):
        plain, host = ResNet(50, stem="cifar"), put(ResNet(50, stem="cifar"), Shift())
        shapes = [[f.shape for f in net.eval().pyramid(torch.zeros(1, 3, 60, 60))] for net in (plain, host)]
    assert shapes[0] == shapes[1]
    assert sum(isinstance(m, ShiftLayer) for m in host.modules()) == 13
    assert sum(isinstance(m, nn.AvgPool2d) for m in host.modules()) == 3
    assert sum(p.numel() for p in host.parameters()) < 0.65 * sum(p.numel() for p in plain.parameters())


def test_bad_input():
    with pytest.raises(InputError, match="width=3"):
        built(replace(VARIANTS["test"], width=3))
    with pytest.raises(InputError, match="no place"):
        put(vit.ViT(3, 5, 32, vit.VARIANTS["test"]), Shift())


def test_recipe():
    paper = recipe(VARIANTS["1.0x"])
    assert (paper.optimizer, paper.weight_decay, paper.schedule) == ("sgd", 4e-5, "cosine")
    assert paper.lr / paper.batch_size == pytest.approx(0.6 / 1024)
    assert (VARIANTS["1.0x"].rate, VARIANTS["1.0x"].penalty, VARIANTS["small"].penalty) == (1, 5e-4, 5e-4)
