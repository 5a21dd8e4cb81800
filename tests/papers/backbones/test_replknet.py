"""RepLKNet against numbers of the official code, its merging by algebra, and the field that it sees."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.nn.fuse import fused
from paperworks.papers.backbones.replknet.claim import ARMS, CLAIM
from paperworks.papers.backbones.replknet.replknet import (
    VARIANTS,
    Config,
    ConvFFN,
    LargeKernel,
    RepLKBlock,
    RepLKNet,
    area_ratio,
    effective_receptive_field,
    heat,
    recipe,
)
from paperworks.papers.backbones.replknet.weights import PUBLISHED, SOURCES
from peers import check_pyramid, macs, randomised_norms, relative

randomised = partial(randomised_norms, spread=0.3, variance=(0.3, 2.0))

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "replknet.json").read_text())
RULE = runpy.run_path(str(FIXTURES / "replknet_record.py"))
KNOWN = {
    "31b": (79_864_168, 79_527_272, 15.3),
    "31l": (172_671_016, 172_165_672, 96.0),
    "xl": (335_435_752, 335_399_656, 128.7),
    "25b": (78_709_096, 78_372_200, 14.8),
    "13b": (74_156_392, 73_819_496, 13.4),
    "7b": (72_712_552, 72_375_656, 13.1),
    "3b": (71_906_408, 71_894_376, 12.9),
}
"""Parameters in training and merged; 10^9 multiply-adds at the variant's image size, merged, as tables 5 and 6 and the README round them."""


def built(config: Config, side: int = 64, classes: int = 7) -> RepLKNet:
    torch.manual_seed(0)
    return RepLKNet(3, classes, side, config).eval()


def configured(name: str) -> Config:
    given = FIXTURE["settings"][name]
    return Config(
        layers=tuple(given["layers"]), kernels=tuple(given["large_kernel_sizes"]), widths=tuple(given["channels"]),
        small_kernel=given["small_kernel"], depthwise_ratio=given.get("dw_ratio", 1.0), drop_path=0,
    )  # fmt: skip


def converted(name: str) -> RepLKNet:
    net = built(configured(name))
    theirs = {key: RULE["draw"](key, tuple(shape)) for key, shape in FIXTURE["networks"][name]["shapes"].items()}
    net.load_state_dict(SOURCES["official"](theirs, configured(name)))
    return net


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    training, merged, multiply_adds = KNOWN[name]
    side = VARIANTS[name].image_size
    with torch.device("meta"):
        net = built(VARIANTS[name], side, classes=1000)
        assert sum(p.numel() for p in net.parameters()) == training
        for block in net.modules():
            if isinstance(block, RepLKBlock):
                block.depthwise = block.depthwise.merged()
        # Merging adds a bias and takes the batch norms and the small kernel away.
        assert sum(p.numel() for p in net.parameters()) == merged
    assert macs(net, side) / 1e9 == pytest.approx(multiply_adds, abs=0.06)


def test_every_variant_of_the_paper_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)


# --- The official code


@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_equal_the_official_code(evidence, name):
    net, golden = converted(name), FIXTURE["networks"][name]
    image, theirs = RULE["draw"]("image", tuple(FIXTURE["input"])), torch.tensor(golden["logits"])
    with torch.inference_mode():
        error = relative(net(image)["logits"].flatten(), theirs)
        merged = relative(fused(net)(image)["logits"].flatten(), torch.tensor(golden["merged_logits"]))
        net.stages[0][0].depthwise.large[0].weight[:, :, 4, 4] *= 1.5  # a perturbed weight is seen
        assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    assert max(error, merged) < TOLERANCE
    where = f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}"
    evidence.fidelity(against=where, error=error)
    evidence.fidelity(against=f"{where}, kernels merged", error=merged)


@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_contribution_of_pixels_equals_the_official_script(evidence, name):
    net, golden = converted(name), FIXTURE["networks"][name]
    field = effective_receptive_field(lambda x: net.pyramid(x)[-1], RULE["draw"]("image", tuple(FIXTURE["input"])))
    ours = F.avg_pool2d(field[None], 8)[0].flatten() * FIXTURE["input"][0]  # ours is the mean over images
    error = relative(ours, torch.tensor(golden["contribution"]))
    assert error < TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, erf/visualize_erf.py, {name}", error=error)


def test_mmpretrains_names(evidence):
    net = converted("small_kernels")
    theirs = FIXTURE["networks"]["small_kernels"]["shapes"]
    renamed = {("head.fc." + k[5:] if k.startswith("head.") else "backbone." + k): RULE["draw"](k, tuple(v)) for k, v in theirs.items()}
    for given in (renamed, {"state_dict": renamed, "meta": {}}):
        mapped = SOURCES["mmpretrain"](given, configured("small_kernels"))
        assert mapped.keys() == net.state_dict().keys()
        assert all(torch.equal(mapped[key], value) for key, value in net.state_dict().items())
    evidence.property(
        "state dicts with mmpretrain's prefixes load, and give the same network as the official names",
        "带 mmpretrain 前缀的 state dict 可以加载，得到的网络与官方命名的相同",
    )


def test_published_weights_are_of_the_named_variants():
    assert set(PUBLISHED) == {"31b", "31l", "xl"}
    for name, published in PUBLISHED.items():
        assert f"RepLKNet-{name[:2].upper()}" in published.url
    assert PUBLISHED["xl"].mean == (0.5, 0.5, 0.5)  # README, tip 1


# --- Re-parameterisation


@pytest.mark.parametrize(("kernel", "small"), [(31, 5), (13, 5), (7, 3), (5, 5), (9, None)])
def test_merged_kernel_is_the_sum_of_both_branches(evidence, kernel, small):
    block = randomised(LargeKernel(6, kernel, small))
    x = torch.randn(2, 6, 11, 14)  # smaller than the largest kernel: guideline 5, where padding is most of what it sees
    with torch.inference_mode():
        one = block.merged()
        assert (one.kernel_size, one.padding, one.groups) == ((kernel, kernel), (kernel // 2, kernel // 2), 6)
        torch.testing.assert_close(one(x), block(x), rtol=1e-5, atol=1e-5)
        if small:
            inside = kernel // 2 - small // 2
            alone = block.large.folded()
            difference = one.weight - alone.weight
            assert difference[:, :, inside : inside + small, inside : inside + small].abs().min() > 0
            difference[:, :, inside : inside + small, inside : inside + small] = 0
            assert not difference.any()  # all of the small kernel lies in the middle
            wrong = torch.roll(one.weight - alone.weight, 1, -1) + alone.weight  # one cell off the middle
            assert relative(F.conv2d(x, wrong, one.bias, padding=kernel // 2, groups=6), block(x)) > 0.01
    if kernel == 31:
        evidence.property(
            "31x31 and 5x5 branches with batch norms = one 31x31 convolution with a bias, on maps smaller than the kernel",
            "带批归一化的 31x31 与 5x5 两支 = 一个带偏置的 31x31 卷积，在小于核的特征图上验证",
        )


def test_the_whole_network_answers_the_same_merged(evidence):
    net = randomised(built(replace(VARIANTS["small"], drop_path=0.3)))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        one = fused(net)
        assert relative(one(image)["logits"], net(image)["logits"]) < 1e-5
    assert not [m for m in one.modules() if isinstance(m, LargeKernel)]
    # Norms that stand in front of a convolution stay: one a block and the last.
    assert sum(isinstance(m, nn.BatchNorm2d) for m in one.modules()) == 2 * sum(VARIANTS["small"].layers) + 1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())  # the trained one is left alone
    evidence.property(
        "whole network: kernels merged and norms folded, equal logits; the trained network is unchanged",
        "整个网络：合并卷积核、吸收批归一化后 logits 相等；训练好的网络不变",
    )


def test_merging_needs_evaluation():
    with pytest.raises(AssertionError):
        LargeKernel(4, 7, 3).train().merged()


# --- Mechanisms


def test_blocks_are_what_figure_4_draws(evidence):
    x = torch.randn(2, 6, 9, 9)
    with torch.inference_mode():
        block = randomised(RepLKBlock(6, 9, 7, 3, 0.0))
        y = block.norm(x)
        y = F.relu(block.expand[1](F.conv2d(y, block.expand[0].weight)))
        large, small = block.depthwise.large, block.depthwise.small
        y = large[1](F.conv2d(y, large[0].weight, padding=3, groups=9)) + small[1](F.conv2d(y, small[0].weight, padding=1, groups=9))
        y = block.project[1](F.conv2d(F.relu(y), block.project[0].weight))
        torch.testing.assert_close(block(x), x + y)
        ffn = randomised(ConvFFN(6, 0.0))
        y = ffn.expand[1](F.conv2d(ffn.norm(x), ffn.expand[0].weight))
        assert y.shape[1] == 24
        y = ffn.project[1](F.conv2d(0.5 * y * (1 + torch.erf(y / 2**0.5)), ffn.project[0].weight))
        torch.testing.assert_close(ffn(x), x + y)
    evidence.property(
        "RepLK and ConvFFN blocks by hand, norm first, shortcut around all",
        "RepLK 块与 ConvFFN 块逐步手算：先归一化，捷径跨过全部",
    )


@pytest.mark.parametrize("kernel", [3, 13])
def test_a_block_sees_as_far_as_its_large_kernel(evidence, kernel):
    block = randomised(RepLKBlock(4, 4, kernel, 3, 0.0))
    with torch.inference_mode():
        x = torch.randn(1, 4, 21, 21)
        changed = x.clone()
        changed[:, :, 10, 10] += 1
        seen = (block(changed) != block(x)).any(1)[0].nonzero()
    assert seen.amin(0).tolist() == [10 - kernel // 2] * 2
    assert seen.amax(0).tolist() == [10 + kernel // 2] * 2
    if kernel == 13:
        evidence.property(
            "a block mixes exactly 13x13 cells, and 3x3 with that kernel",
            "核为 13x13 的块恰好混合 13x13 个格子，核为 3x3 时为 3x3 个",
        )


def test_stochastic_depth_is_one_rate_a_pair_and_grows_over_all_stages(evidence):
    net = built(Config(layers=(1, 2, 2), kernels=(5, 5, 5), widths=(4, 4, 4), small_kernel=3, drop_path=0.4))
    rates = [block.drop_path.p for stage in net.stages for block in stage]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    evidence.property(
        "stochastic depth: linear over the pairs of all stages, the same in both blocks of a pair",
        "随机深度：丢弃率沿所有阶段的块对线性增长，一对中的两块相同",
    )


@pytest.mark.parametrize(
    ("name", "side", "strides"),
    [("31b", 224, (4, 8, 16, 32)), ("small", 32, (2, 4, 8)), ("small", 64, (4, 8, 16)), ("small", 96, (4, 8, 16)), ("xl", 320, (4, 8, 16, 32))],
)  # fmt: skip
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert net.strides == strides


@pytest.mark.parametrize("settings", [{"kernels": (13, 12, 7)}, {"small_kernel": 9}, {"small_kernel": 4}, {"stem_stride": 3}])
def test_settings_that_do_not_fit(settings):
    with pytest.raises(InputError):
        built(replace(VARIANTS["small"], **settings))


# --- The effective receptive field


def stack(kernel: int, layers: int) -> nn.Module:
    """Depthwise convolutions of equal, positive weights: the field is known exactly."""
    parts = [nn.Conv2d(1, 1, kernel, padding=kernel // 2, bias=False) for _ in range(layers)]
    for part in parts:
        nn.init.constant_(part.weight, 1 / kernel**2)
    return nn.Sequential(*parts)


def test_field_of_a_known_filter(evidence):
    image = torch.rand(2, 1, 31, 31)
    field = effective_receptive_field(stack(5, 1), image)
    expected = torch.zeros(31, 31)
    expected[13:18, 13:18] = 1 / 25
    torch.testing.assert_close(field, expected)
    assert not image.requires_grad
    # Three layers of a 5x5 box: a box convolved with itself, by hand.
    line = torch.zeros(31)
    line[9:22] = F.conv1d(F.conv1d(torch.ones(1, 1, 5), torch.ones(1, 1, 5), padding=4), torch.ones(1, 1, 5), padding=4)[0, 0] / 125
    torch.testing.assert_close(effective_receptive_field(stack(5, 3), image), line[:, None] * line)
    evidence.property(
        "effective receptive field of known filters: a box and its convolution with itself, by hand",
        "已知滤波器的有效感受野：方框及其与自身的卷积，手算验证",
    )


def test_field_grows_with_the_kernel_and_with_the_root_of_the_depth(evidence):
    """Section 5: one 31x31 sees further than fifteen 3x3, although the outermost pixels that reach the middle are the same."""
    image = torch.rand(1, 1, 65, 65)

    def spread(kernel: int, layers: int) -> float:
        field = effective_receptive_field(stack(kernel, layers), image)
        away = torch.arange(65.0) - 32
        return float((field.sum(0) * away**2).sum() / field.sum()) ** 0.5

    assert spread(3, 8) / spread(3, 2) == pytest.approx(2, rel=1e-4)  # four times as deep: twice as far
    assert spread(13, 1) / spread(3, 1) == pytest.approx(((13**2 - 1) / (3**2 - 1)) ** 0.5, rel=1e-4)
    assert spread(31, 1) / spread(3, 15) == pytest.approx(8**0.5, rel=1e-3)
    evidence.property(
        "fields grow with the kernel's side and with the root of the depth; 31x31 once against 3x3 fifteen times: 2.8 times wider",
        "感受野随核的边长、随深度的平方根增长；一层 31x31 是十五层 3x3 的 2.8 倍宽",
    )


def test_positive_parts_only():
    """As in the released script: what lowers the middle cell does not count."""
    layer = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    nn.init.constant_(layer.weight, -1.0)
    nn.init.constant_(layer.weight[:, :, 0], 1.0)
    field = effective_receptive_field(layer, torch.cat([torch.ones(1, 1, 2, 5), torch.zeros(1, 1, 3, 5)], 2))
    assert field.nonzero().tolist() == [[1, 1], [1, 2], [1, 3]]


def test_heat_and_the_square_that_holds_a_share():
    field = torch.zeros(9, 9)
    field[4, 4] = 9
    field[3:6, 3:6] += 99
    warm = heat(field)
    assert warm.max() == 1
    torch.testing.assert_close(warm[3, 3], torch.log10(torch.tensor(100.0)) / torch.log10(torch.tensor(109.0)))
    assert area_ratio(warm, 0.1) == 1 / 81
    assert area_ratio(warm, 0.5) == 9 / 81
    assert area_ratio(torch.ones(9, 9), 0.99) == 1
    assert area_ratio(torch.ones(8, 12), 0.2) == 25 / 96


def test_large_kernels_of_a_new_network_see_further_than_a_deeper_net_of_small_ones(evidence):
    image = torch.randn(4, 3, 96, 96)
    one_stage = replace(VARIANTS["small"], widths=(16,), stem_stride=2, drop_path=0)
    ratio = {}
    for name, settings in ARMS.items():
        net = built(replace(one_stage, **settings))
        ratio[name] = area_ratio(heat(effective_receptive_field(lambda x, net=net: net.pyramid(x)[-1], image)), 0.5)
    assert ratio["large"] > 2 * ratio["deep"] >= 2 * ratio["small"]
    evidence.property(
        "untrained: half of the heat of 4 layers of 13x13 takes more than twice the square of 12 layers of 3x3",
        "未训练时：装下一半热度的方块，4 层 13x13 的是 12 层 3x3 的两倍以上",
    )


# --- Training


def test_recipe_keeps_the_papers_rate_per_image():
    b = recipe(VARIANTS["31b"])
    assert b.lr / b.batch_size == pytest.approx(4e-3 / 2048)
    assert (b.optimizer, b.weight_decay, b.warmup, b.average, b.clip) == ("adamw", 0.05, 10 / 300, 0.9999, None)


def test_rule_of_the_claim():
    def results(large, deep):
        arm = lambda value: {"area_50": [value] * 3}  # noqa: E731
        return {"large": arm(large), "small": arm(0.01), "deep": arm(deep)}

    assert CLAIM.holds(results(0.2, 0.05))
    assert not CLAIM.holds(results(0.05, 0.05))
    assert not CLAIM.holds(results(0.05, 0.2))
