"""SlowFast against numbers of pytorchvideo, and its parts by hand."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.papers.video.slowfast.slowfast import SMALL, VARIANTS, Block, Config, SlowFast, build, recipe
from paperworks.papers.video.slowfast.weights import PUBLISHED, SOURCES
from paperworks.tasks.base import Grid
from paperworks.tasks.video import Video
from peers import relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "slowfast.json").read_text())
DRAW = runpy.run_path(str(FIXTURES / "slowfast_record.py"))["draw"]
PEERS = {
    "slowfast_kernel_7": Config(frames=4),
    "slowfast_kernel_5": Config(frames=4, lateral=5),
    "slow_only": Config(frames=4, alpha=1, fast_share=0),
}
LITTLE = dataclasses.replace(VARIANTS["test"], frames=4, stride=4)
"""Clips of 16 frames."""


def built(config: Config, channels: int = 3, classes: int = 5) -> SlowFast:
    torch.manual_seed(0)
    return build(Video.plain_spec(channels, classes, size=(32, 32)), config).eval()


def lively(net: SlowFast) -> SlowFast:
    """Norms with something to say."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            for value, low in ((module.weight, 0.5), (module.bias, -0.3), (module.running_mean, -0.3), (module.running_var, 0.5)):
                assert value is not None
                nn.init.uniform_(value, low, low + 0.8)
    return net


def as_recorded(name: str) -> SlowFast:
    """Our network with the weights that were drawn for theirs, through the mapping of names."""
    names = FIXTURE["networks"][name].get("names") or FIXTURE["networks"]["slowfast_kernel_7"]["names"]
    net = built(PEERS[name], classes=400)
    own = net.state_dict()
    theirs = SOURCES["pytorchvideo"]({n: n for n in names}, PEERS[name])
    assert set(theirs) == {key for key, value in own.items() if value.is_floating_point()}
    net.load_state_dict(own | {ours: DRAW(peer, tuple(own[ours].shape)) for ours, peer in theirs.items()})
    return net


# --- Other implementations


@pytest.mark.parametrize("name", PEERS)
def test_outputs_equal_pytorchvideo(evidence, name):
    golden, net = FIXTURE["networks"][name], as_recorded(name)
    clip = DRAW("clip", tuple(FIXTURE["clip"]))
    if PEERS[name].alpha == 1:
        clip = clip[:, :, [0, 5, 10, 15]]
    theirs = torch.tensor(golden["logits"])
    error = relative(net(clip)["logits"].flatten()[::5], theirs)
    assert error < TOLERANCE
    assert sum(p.numel() for p in net.parameters()) == golden["parameters"]
    net.slow.stages[2][1].a[0].weight[:, :, 1] *= 1.1  # a perturbed weight is seen
    assert relative(net(clip)["logits"].flatten()[::5], theirs) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']} {name}", error=error)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("8x8", 34_566_488), ("4x16", 34_480_216), ("16x8", 34_566_488), ("8x8_r101", 62_826_968), ("slow_8x8", 32_454_096), ("slow_4x16", 32_454_096)],
)  # fmt: skip
def test_parameters_are_those_of_the_released_models(name, parameters):
    with torch.device("meta"):
        net = build(Video.plain_spec(3, 400), VARIANTS[name])
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_multiply_adds_are_the_papers(evidence):
    """Table 2: 36.1 and 65.7 G for views of 256 pixels; 27.3 for the Slow pathway alone, and the Fast one is a fifth of 4x16."""
    counted = {}
    for name in ("4x16", "8x8", "slow_4x16"):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            net = build(Video.plain_spec(3, 400), dataclasses.replace(VARIANTS[name], image_size=256))
            net(torch.zeros(1, 3, net.grid.frames, 256, 256))
        counted[name] = counter.get_total_flops() / 2e9
        if name == "4x16":
            by_part = counter.get_flop_counts()
            fast = sum(by_part["SlowFast.fast.stem"].values()) + sum(sum(by_part[f"SlowFast.fast.stages.{i}"].values()) for i in range(4))
            assert 0.15 < fast / counter.get_total_flops() < 0.25
    assert counted == pytest.approx({"4x16": 36.1, "8x8": 65.7, "slow_4x16": 27.3}, abs=0.6)
    evidence.property(
        "multiply-adds of table 2 (36.1, 65.7, 27.3 G), a fifth of 4x16's in the Fast pathway",
        "表 2 的乘加次数（36.1、65.7、27.3 G），4x16 的五分之一在快路径",
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_of_variants(name):
    assert PUBLISHED[name].source in SOURCES and PUBLISHED[name].classes == 400
    assert SOURCES["pytorchvideo"]({"model_state": {"blocks.6.proj.bias": torch.ones(1)}}, VARIANTS[name]).keys() == {"head.bias"}


# --- Mechanisms


def test_slow_sees_floors_of_even_distances(evidence):
    net = built(dataclasses.replace(LITTLE, frames=8, alpha=4))
    assert net.slow_places(32) == [0, 4, 8, 13, 17, 22, 26, 31] == torch.linspace(0, 31, 8).long().tolist()
    assert net.grid == Grid(fixed=32, frames=32, step=1)
    evidence.property(
        "Slow takes its frames at floor(i (alpha T - 1) / (T - 1)), as the released code",
        "慢路径取第 floor(i (alpha T - 1) / (T - 1)) 帧，与官方代码一致",
    )


def test_a_block_is_a_bottleneck_that_leaves_time_alone(evidence):
    torch.manual_seed(0)
    block = Block(6, 4, 3, 2).eval()
    x = torch.randn(2, 6, 5, 8, 8)

    def unit(x, unit, **options):
        y = F.conv3d(x, unit[0].weight, **options)
        norm = unit[1]
        shape = (1, -1, 1, 1, 1)
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        return y * scale.view(shape) + (norm.bias - norm.running_mean * scale).view(shape)

    y = unit(x, block.a, padding=(1, 0, 0)).relu()
    y = unit(y, block.b, padding=(0, 1, 1), stride=(1, 2, 2)).relu()
    y = (unit(y, block.c) + unit(x, block.shortcut, stride=(1, 2, 2))).relu()
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)
    assert block(x).shape == (2, 16, 5, 4, 4)
    evidence.property("block: 3x1x1, 1x3x3 with the stride, 1x1x1, shortcut; by hand", "块：3x1x1、带步长的 1x3x3、1x1x1、捷径；手算验证")


@pytest.mark.parametrize("name", ["8x8", "4x16", "16x8"])
def test_shapes_of_table_1(name):
    config = VARIANTS[name]
    with torch.device("meta"):
        net = build(Video.plain_spec(3, 400), config)
        clip = torch.zeros(1, 3, net.grid.frames, 224, 224)
        slow, fast = net.slow.stem(clip[:, :, net.slow_places(clip.shape[2])]), net.fast.stem(clip)
        for lateral, d, e, side in zip(net.lateral, (64, 256, 512, 1024), (8, 32, 64, 128), (56, 56, 28, 14), strict=True):
            assert tuple(slow.shape) == (1, d, config.frames, side, side)
            assert tuple(fast.shape) == (1, e, config.alpha * config.frames, side, side)
            assert tuple(lateral(fast).shape) == (1, 2 * e, config.frames, side, side)
            i = next(k for k, part in enumerate(net.lateral) if part is lateral)
            slow, fast = net.slow.stages[i](torch.cat([slow, lateral(fast)], 1)), net.fast.stages[i](fast)
    assert net.embedding == 2048 + 256 and slow.shape[1:] == (2048, config.frames, 7, 7)


def test_only_the_last_stages_of_slow_see_time(evidence):
    kernels = {}
    with torch.device("meta"):
        net = build(Video.plain_spec(3, 400), VARIANTS["8x8"])
    for name, pathway in (("slow", net.slow), ("fast", net.fast)):
        kernels[name] = [pathway.stem[0][0].kernel_size[0], *(stage[0].a[0].kernel_size[0] for stage in pathway.stages)]
    assert kernels == {"slow": [1, 1, 1, 3, 3], "fast": [5, 3, 3, 3, 3]}
    evidence.property(
        "temporal kernels: Slow in res4 and res5 alone, Fast in the stem (5) and everywhere (3)",
        "时间卷积核：慢路径只在 res4、res5，快路径在 stem（5）和其余各处（3）",
    )


def test_without_lateral_weights_slow_is_the_slow_network(evidence):
    """Zero lateral outputs and the channels that they feed ignored: Slow's features are those of slow-only with the same weights."""
    net = lively(built(LITTLE))
    for part in net.lateral:
        part[1].weight.zero_()
        part[1].bias.zero_()
        part[1].running_mean.zero_()
    alone = built(dataclasses.replace(LITTLE, alpha=1, fast_share=0))
    own = alone.state_dict()
    alone.load_state_dict(
        {
            k: own[k] if k.startswith("head") else v[:, : own[k].shape[1]] if v.ndim == 5 else v
            for k, v in net.state_dict().items()
            if k in own
        }
    )
    clip = torch.randn(2, 3, 16, 32, 32)
    slow = net.embed(clip)[:, : alone.embedding]
    assert relative(slow, alone.embed(clip[:, :, net.slow_places(16)])) < 1e-5
    assert relative(net.embed(clip.flip(2))[:, : alone.embedding], slow) > 1e-3
    evidence.property(
        "with silent lateral connections Slow's features are those of the slow-only network",
        "横向连接静默时，慢路径的特征就是单独慢路径网络的特征",
    )


def test_only_fast_sees_the_frames_in_between(evidence):
    torch.manual_seed(1)
    clip = torch.randn(1, 3, 16, 32, 32)
    changed = clip.clone()
    changed[:, :, 7] += 1  # Slow takes 0, 5, 10, 15
    for config, seen in ((LITTLE, True), (dataclasses.replace(LITTLE, lateral=0), False)):
        net = lively(built(config))
        slow = net.slow.widths[-1]
        before, after = net.embed(clip), net.embed(changed)
        assert (relative(after[:, :slow], before[:, :slow]) > 1e-6) == seen
        assert relative(after[:, slow:], before[:, slow:]) > 1e-4
    evidence.property(
        "frames between Slow's reach Slow through the lateral connections alone",
        "慢路径各帧之间的帧只能经横向连接影响慢路径",
    )


def test_blocks_begin_as_identities():
    net = built(SMALL)
    x = torch.rand(1, 4 * SMALL.width, 2, 4, 4)
    block = Block(4 * SMALL.width, SMALL.width, 1, 1).eval()
    nn.init.zeros_(block.c[1].weight)
    torch.testing.assert_close(block(x), x)
    found = {
        float(m.c[1].weight.abs().max()) for m in build(Video.plain_spec(3, 4), VARIANTS["slow_8x8"]).modules() if isinstance(m, Block)
    }
    assert found == {0.0} and net.head.bias.abs().max() == 0


# --- Use


def test_small_takes_its_size_and_step_from_the_data():
    long = dataclasses.replace(Video.plain_spec(3, 4, size=(90, 120)), more={"frames": 70})
    assert build(long, SMALL).grid == Grid(fixed=96, frames=16, step=4)
    assert build(long, dataclasses.replace(SMALL, alpha=1, fast_share=0)).grid == Grid(fixed=96, frames=4, step=8)
    assert build(long, VARIANTS["8x8"]).grid == Grid(fixed=224, frames=32, step=2)
    assert build(long, VARIANTS["slow_4x16"]).grid == Grid(fixed=224, frames=4, step=16)


def test_recipe_is_the_papers():
    found = recipe(VARIANTS["8x8"])
    assert (found.optimizer, found.lr, found.batch_size, found.weight_decay, found.schedule) == ("sgd", 0.1, 64, 1e-4, "cosine")
    assert found.augment.scale == pytest.approx((256 / 224, 320 / 224)) and found.augment.flip == 0.5
    assert recipe(SMALL).augment.flip == 0, "left is not right where motion is the class"
