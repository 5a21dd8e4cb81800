"""EfficientNet against timm and torchvision with the same weights, its scaling rule, and its parts by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

from paperworks.papers.backbones.efficientnet.claim import ARMS
from paperworks.papers.backbones.efficientnet.efficientnet import (
    VARIANTS,
    EfficientNet,
    MBConv,
    SameConv2d,
    Varied,
    candidates,
    channels_of,
    compound,
    recipe,
    smoothed,
)
from paperworks.papers.backbones.efficientnet.weights import PUBLISHED, SOURCES
from peers import randomised_norms, relative

pytestmark = pytest.mark.usefixtures("no_gradients")
randomised = partial(randomised_norms, variance=(0.5, 1.5), kernels=True)

TOLERANCE = 1e-4
PARAMS = (5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616, 30_389_784, 43_040_704, 66_347_960)
GFLOPS = (0.386, 0.687, 0.994, 1.83, 4.39, 10.3, 19.1, 37.7)
"""Multiply-adds of convolutions and the classifier, counted by hand for the official table."""


def network(config, side=64, channels=3, classes=1000):
    torch.manual_seed(0)
    return EfficientNet(channels, classes, config, side).eval()


# --- Against other implementations


@pytest.mark.parametrize("name", [f"b{i}" for i in range(8)])
def test_parameters_and_cost_are_the_tables(name):
    config = VARIANTS[name]
    with torch.device("meta"):
        net = network(config, config.image_size)
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, config.image_size, config.image_size))
    i = int(name[1])
    assert sum(p.numel() for p in net.parameters()) == PARAMS[i]
    assert counter.get_total_flops() / 2e9 == pytest.approx(GFLOPS[i], rel=0.06)


@pytest.mark.parametrize(
    ("name", "side", "peer", "settings"),
    [
        ("b0", 224, "timm tf_efficientnet_b0", {}),
        ("b0", 225, "timm tf_efficientnet_b0", {}),
        ("b3", 97, "timm tf_efficientnet_b3", {}),
        ("b1", 96, "timm efficientnet_b1", {"same": False, "eps": 1e-5}),
        ("b0", 96, "torchvision efficientnet_b0", {"same": False, "eps": 1e-5}),
        ("b5", 64, "torchvision efficientnet_b5", {"same": False, "eps": 1e-3}),
    ],
)
def test_outputs_equal_the_peer(evidence, name, side, peer, settings):
    package, model = peer.split()
    version = {"timm": timm, "torchvision": torchvision}[package].__version__.split("+")[0]
    theirs = randomised(timm.create_model(model) if package == "timm" else torchvision.models.get_model(model))
    config = replace(VARIANTS[name], **settings)
    ours = network(config, side)
    ours.load_state_dict(SOURCES[package](theirs.state_dict(), config))
    image = torch.randn(2, 3, side, side)
    expected = theirs(image)
    error = relative(ours(image)["logits"], expected)
    assert error < TOLERANCE
    ours.stages[2][0].depthwise[0].weight.mul_(1.02)  # a perturbed weight is seen
    assert relative(ours(image)["logits"], expected) > TOLERANCE
    evidence.fidelity(against=f"{package} {version} {model}, {side} pixels", error=error)


@pytest.mark.parametrize(("settings", "side"), [({"same": False}, 64), ({"eps": 1e-5}, 64)])
def test_padding_and_eps_of_ports_do_not_pass(settings, side):
    """Negative control: what ports have otherwise is another network for the authors' weights."""
    theirs = randomised(timm.create_model("tf_efficientnet_b0"))
    config = replace(VARIANTS["b0"], **settings)
    ours = network(config, side)
    ours.load_state_dict(SOURCES["timm"](theirs.state_dict(), config))
    image = torch.randn(1, 3, side, side)
    assert relative(ours(image)["logits"], theirs(image)) > TOLERANCE


def test_pyramid_and_embedding_equal_timms(evidence):
    theirs = randomised(timm.create_model("tf_efficientnet_b0"))
    ours = network(VARIANTS["b0"])
    ours.load_state_dict(SOURCES["timm"](theirs.state_dict(), VARIANTS["b0"]))
    image = torch.randn(1, 3, 64, 64)
    expected = theirs.forward_intermediates(image, intermediates_only=True)[-4:]
    maps = ours.pyramid(image)
    errors = [relative(a, b) for a, b in zip(maps, expected, strict=True)]
    errors.append(relative(ours.embed(image), theirs.forward_head(theirs.forward_features(image), pre_logits=True)))
    assert max(errors) < TOLERANCE
    assert ours.strides == (4, 8, 16, 32)
    assert ours.widths == (24, 40, 112, 320) == tuple(m.shape[1] for m in maps)
    evidence.fidelity(against=f"timm {timm.__version__} tf_efficientnet_b0, four maps and the embedding", error=max(errors))


def test_published_weights_fit_the_variants_as_they_are():
    for name, published in PUBLISHED.items():
        cfg = timm.get_pretrained_cfg(published.repo.removeprefix("timm/"))
        assert (cfg.mean, cfg.std, cfg.num_classes) == (published.mean, published.std, published.classes)
        assert cfg.input_size == (3, VARIANTS[name].image_size, VARIANTS[name].image_size)
        assert cfg.license.lower() == published.licence.split()[0].lower()


# --- The scaling rule


def test_compound_scaling_doubles_the_cost_with_each_step(evidence):
    assert compound(1).flops == pytest.approx(1.2 * 1.1**2 * 1.15**2)
    assert compound(1).flops == pytest.approx(1.92, abs=0.01)
    for phi in (0.5, 2, 6):
        assert compound(phi).flops == pytest.approx(compound(1).flops ** phi)
    assert compound(0) == (1, 1, 1)
    evidence.property(
        "alpha beta^2 gamma^2 = 1.92 with the paper's factors, and phi is its exponent",
        "按论文的系数 alpha beta^2 gamma^2 = 1.92，phi 是它的指数",
    )


def test_the_papers_factors_are_among_the_candidates():
    found = list(candidates())
    assert any(s == pytest.approx((1.2, 1.1, 1.15)) for s in found)
    assert all(1.9 <= s.flops <= 2.1 and min(s) >= 1 for s in found)
    assert any(s.depth == pytest.approx(2) and s.width == s.resolution == 1 for s in found)


def test_b1_is_not_phi_one():
    """The released table is rounded by hand: testing the formula against it would be wrong."""
    assert (VARIANTS["b1"].depth, VARIANTS["b1"].width, VARIANTS["b1"].image_size) == (1.1, 1.0, 240)
    assert compound(1).depth != VARIANTS["b1"].depth


def test_measured_cost_follows_the_rule(evidence):
    """Of the network itself, with real rounding: phi = 2 on the small one costs about 1.92^2 times as much."""
    base, scale = VARIANTS["small"], compound(2)
    cost = [
        flops(base, 64),
        flops(replace(base, depth=scale.depth, width=scale.width), round(64 * scale.resolution)),
    ]
    assert cost[1] / cost[0] == pytest.approx(scale.flops, rel=0.35)
    assert 3 < cost[1] / cost[0] < 5.5
    evidence.property(
        "phi = 2 makes the small network about four times as dear, counted",
        "phi = 2 时小网络的计算量约为四倍，由实际统计得出",
    )


def flops(config, side):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(config, side, classes=10)(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1.0, 32), (32, 1.1, 32), (16, 1.1, 16), (24, 1.2, 32), (24, 1.4, 32), (320, 1.8, 576), (3, 1, 8)],
)
def test_channels_are_multiples_of_eight_and_not_a_tenth_too_few(channels, width, expected):
    assert channels_of(channels, width) == expected
    assert channels_of(channels, width) >= 0.9 * channels * width


# --- The block


def test_squeezing_follows_the_input_not_the_expanded_width():
    """From the expanded width B0 would have 8,423,848 parameters."""
    block = MBConv(24, 40, 5, 2, 6, 0.0, VARIANTS["b0"])
    assert block.se.squeeze.out_channels == 6
    with torch.device("meta"):
        net = network(VARIANTS["b0"])
    extra = 0
    for block in (block for stage in net.stages for block in stage):
        expanded, squeezed = block.se.squeeze.in_channels, block.se.squeeze.out_channels
        extra += (expanded // 4 - squeezed) * (2 * expanded + 1)
    assert 5_288_548 + extra == 8_423_848


@pytest.mark.parametrize(("side", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (9, 5, 2), (10, 5, 2), (10, 5, 1), (3, 5, 2)])
def test_same_padding_by_hand(evidence, side, kernel, stride):
    """Output i looks at inputs i s - p ... with p = (what is missing) // 2, and there are ceil(side / s) of them."""
    conv = SameConv2d(1, 1, kernel, stride, bias=False).double()
    x = torch.randn(1, 1, side, side, dtype=torch.float64)
    count = -(-side // stride)
    before = max((count - 1) * stride + kernel - side, 0) // 2
    expected = torch.zeros(1, 1, count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            for a in range(kernel):
                for b in range(kernel):
                    y, z = i * stride - before + a, j * stride - before + b
                    if 0 <= y < side and 0 <= z < side:
                        expected[0, 0, i, j] += conv.weight[0, 0, a, b] * x[0, 0, y, z]
    torch.testing.assert_close(conv(x), expected)
    evidence.property(
        f"SAME padding equals the definition (side {side}, kernel {kernel}, stride {stride})",
        f"SAME 填充等于定义（边长 {side}，核 {kernel}，步长 {stride}）",
    )


def test_drop_connect_rises_with_depth_and_keeps_the_mean(evidence):
    net = network(VARIANTS["b0"])
    rates = [block.drop_connect.p for stage in net.stages for block in stage]
    torch.testing.assert_close(torch.tensor(rates), 0.2 * torch.arange(16) / 16)
    peer = timm.create_model("tf_efficientnet_b0", drop_path_rate=0.2)
    theirs = [getattr(block.drop_path, "drop_prob", 0.0) for stage in peer.blocks for block in stage]
    assert rates == pytest.approx(theirs)
    block = MBConv(8, 8, 3, 1, 2, 0.5, VARIANTS["test"]).train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.randn(1, 8, 5, 5)
    branch = block.eval()(x) - x
    block.drop_connect.train()
    outs = torch.stack([block(x) - x for _ in range(400)])
    kept = outs.flatten(1).abs().sum(1) > 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(outs[kept], (2 * branch).expand_as(outs[kept]), rtol=1e-4, atol=1e-5)
    evidence.property(
        "drop connect: the branch as a whole, for each image, divided by the chance that it stays; 0 to 0.2 over the blocks",
        "drop connect：对每张图丢掉整个分支，保留时除以保留概率；丢弃概率沿各模块从 0 升向 0.2",
    )


def test_first_weights_keep_the_scale():
    """Depthwise filters are drawn for one channel: with the fan-out of all channels the answers of a new B0 are about 1e-5."""
    net = network(VARIANTS["b0"], 64)
    block = net.stages[1][1]
    assert block.depthwise[0].weight.std() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert block.project[0].weight.std() == pytest.approx((2 / 24) ** 0.5, rel=0.1)


# --- Loss and contract


def test_loss_is_smoothed_cross_entropy():
    logits, label = torch.randn(4, 5), torch.tensor([0, 3, 1, 4])
    target = 0.9 * F.one_hot(label, 5) + 0.1 / 5
    torch.testing.assert_close(smoothed({"logits": logits}, {"label": label})["loss"], -(target * logits.log_softmax(1)).sum(1).mean())


def test_small_networks_keep_four_maps():
    for name in ("small", "test"):
        net = network(VARIANTS[name], 32, classes=10)
        maps = net.pyramid(torch.randn(2, 3, 32, 32))
        assert net.strides == (1, 2, 4, 8)
        assert [m.shape[2] for m in maps] == [32, 16, 8, 4]
        assert tuple(m.shape[1] for m in maps) == net.widths
        assert net.embed(torch.randn(2, 3, 32, 32)).shape == (2, net.embedding)


def test_recipe_of_the_table_and_of_minutes():
    assert recipe(VARIANTS["b0"]).average == 0.9999
    assert recipe(VARIANTS["small"]).average < 0.99


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_augmentation_resizes_and_follows_its_generator(channels):
    sample = {"image": tv_tensors.Image(torch.rand(channels, 32, 40)), "name": "a"}
    views = [Varied()(sample, (16, 16), torch.Generator().manual_seed(seed))["image"] for seed in (0, 0, 1)]
    assert all(v.shape == (channels, 16, 16) and v.min() >= 0 and v.max() <= 1 for v in views)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    half = Varied(area=(0.9, 1.0), policy=False)(
        sample | {"image": tv_tensors.Image(torch.linspace(0, 1, 40).expand(3, 40, 40))}, (8, 8), torch.Generator()
    )
    assert half["image"].max() - half["image"].min() > 0.7  # the whole image made smaller, not a part of eight pixels


# --- The claim's arms


def test_arms_of_the_claim_cost_the_same():
    costs = [flops(replace(VARIANTS["small"], **arm), arm["image_size"]) for arm in ARMS.values()]
    assert max(costs) / min(costs) < 1.1
    assert min(costs) / flops(VARIANTS["small"], 16) == pytest.approx(4, rel=0.1)
