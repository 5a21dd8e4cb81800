"""ConvNeXt against timm, torchvision and numbers of the official code, and its parts by hand."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision import tv_tensors

from paperworks.papers.backbones.convnext.convnext import (
    VARIANTS,
    Beginning,
    Block,
    Config,
    ConvNeXt,
    LayerNorm,
    ResNetConfig,
    Varied,
    ramp,
    recipe,
    smoothed,
)
from paperworks.papers.backbones.convnext.weights import PUBLISHED, SOURCES
from peers import check_pyramid, check_timms, macs, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "convnext.json").read_text())
KNOWN = {
    "tiny": (28_589_128, 4.5),
    "small": (50_223_688, 8.7),
    "base": (88_591_464, 15.4),
    "large": (197_767_336, 34.4),
    "xlarge": (350_196_968, 60.9),
    "isotropic_small": (22_308_712, 4.3),
    "isotropic_base": (87_083_752, 16.9),
    "isotropic_large": (305_942_504, 59.7),
    "resnet50": (25_557_032, 4.1),
}
"""Parameters, and 10^9 multiply-adds as the paper's tables round them."""
LITTLE = Config(depths=(1, 1, 2, 1), widths=(8, 12, 16, 24), stem=4, layer_scale=0.5, image_size=64)


def built(config: Config | ResNetConfig, side: int = 64, channels: int = 3, classes: int = 10):
    torch.manual_seed(0)
    return (ConvNeXt if isinstance(config, Config) else Beginning)(channels, classes, side, config).eval()


def randomised(peer: nn.Module) -> nn.Module:
    """Weights that keep the scale of what flows through, norms with something to say, layer scale far from zero."""
    torch.manual_seed(1)
    for name, value in peer.named_parameters():
        if name.endswith(("gamma", "layer_scale")):
            nn.init.uniform_(value, 0.1, 0.5)
        elif value.ndim > 1:
            nn.init.normal_(value, 0, (value.numel() / len(value)) ** -0.5)
        else:
            nn.init.normal_(value, float(name.endswith("weight")), 0.2)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return peer.eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, classes=1000)
    parameters, multiply_adds = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert macs(net, 224) / 1e9 == pytest.approx(multiply_adds, abs=0.06)


def test_every_variant_of_the_papers_is_counted_here():
    assert set(KNOWN) | {"laptop", "laptop_resnet", "test"} == set(VARIANTS)


# --- Other implementations


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_outputs_equal_other_implementations(evidence, source):
    peer = randomised(timm.create_model("convnext_tiny") if source == "timm" else torchvision.models.convnext_tiny())
    net = built(VARIANTS["tiny"], 224, classes=1000)
    net.load_state_dict(SOURCES[source](peer.state_dict(), VARIANTS["tiny"]))
    image = torch.randn(1, 3, 64, 96)
    theirs = peer(image)
    error = relative(net(image)["logits"], theirs)
    assert error < TOLERANCE
    net.stages[2][4].depthwise.weight[:, :, 3, 3] *= 1.1  # a perturbed weight is seen
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    version = (timm if source == "timm" else torchvision).__version__
    evidence.fidelity(against=f"{source} {version} convnext_tiny", error=error)


def test_features_equal_timms(evidence):
    settings = {"depths": (1, 2, 3, 1), "dims": (16, 24, 32, 40)}
    peer = randomised(timm.models.convnext.ConvNeXt(num_classes=7, **settings))
    net = built(Config(depths=settings["depths"], widths=settings["dims"]), classes=7)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), Config()))
    image = torch.randn(2, 3, 64, 96)
    theirs = peer.forward_intermediates(image, intermediates_only=True)
    ours = net.pyramid(image)
    assert len(ours) == len(theirs) == 4
    error = max(map(relative, ours, theirs))
    assert error < TOLERANCE
    torch.testing.assert_close(net.embed(image), peer.forward_head(theirs[-1], pre_logits=True))
    evidence.fidelity(against=f"timm {timm.__version__} ConvNeXt, outputs of all stages", error=error)


@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_equal_the_official_code(evidence, name):
    draw = runpy.run_path(str(FIXTURES / "convnext_record.py"))["draw"]
    settings, golden = FIXTURE["settings"][name], FIXTURE["networks"][name]
    scale = settings["layer_scale_init_value"]
    if "dims" in settings:
        config = Config(depths=tuple(settings["depths"]), widths=tuple(settings["dims"]), layer_scale=scale)
    else:
        config = Config(depths=(settings["depth"],), widths=(settings["dim"],), stem=16, layer_scale=scale)
    net = built(config, classes=7)
    official = {key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}
    net.load_state_dict(SOURCES["official"](official, config))
    ours = net(draw("image", tuple(FIXTURE["input"])))["logits"].flatten()
    error = relative(ours, torch.tensor(golden["logits"]))
    assert error < TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}", error=error)


def test_the_road_begins_at_torchvisions_resnet(evidence):
    peer = randomised(torchvision.models.resnet50())
    net = built(ResNetConfig(), classes=1000)
    net.load_state_dict({k.replace("fc.", "head.") if k.startswith("fc.") else f"body.{k}": v for k, v in peer.state_dict().items()})
    image = torch.randn(1, 3, 96, 96)
    error = relative(net(image)["logits"], peer(image))
    assert error < TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} resnet50 (the roadmap's beginning)", error=error)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_where_timm_says(name):
    check_timms(PUBLISHED[name])


# --- Mechanisms


def test_block_is_what_figure_4_draws(evidence):
    """One norm, one activation, the depthwise convolution first; by hand with convolutions of B D h w."""
    block = randomised(Block(8, 7, 0.1, 0.0))
    assert [type(m).__name__ for m in block.children()] == ["Conv2d", "LayerNorm", "Linear", "Linear", "StochasticDepth"]
    x = torch.randn(2, 8, 9, 11)
    y = F.conv2d(F.pad(x, (3, 3, 3, 3)), block.depthwise.weight, block.depthwise.bias, groups=8)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    y = y * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
    y = F.conv2d(y, block.expand.weight[:, :, None, None], block.expand.bias)
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))  # the exact GELU
    y = F.conv2d(y, block.project.weight[:, :, None, None], block.project.bias)
    torch.testing.assert_close(block(x), x + block.gamma[:, None, None] * y, rtol=1e-4, atol=1e-5)
    evidence.property(
        "block: depthwise 7x7, LayerNorm per pixel, 4x wider 1x1 with exact GELU, 1x1, layer scale, sum; by hand in B D h w",
        "块：7x7 深度卷积，逐像素 LayerNorm，放宽到 4 倍的 1x1 与精确 GELU，1x1，layer scale，相加；按 B D h w 排布手算",
    )


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_a_block_sees_as_far_as_its_kernel(evidence, kernel):
    block = randomised(Block(4, kernel, 1.0, 0.0))
    x = torch.randn(1, 4, 15, 15)
    changed = x.clone()
    changed[:, :, 7, 7] += 1
    seen = (block(changed) != block(x)).any(1)[0].nonzero()
    assert seen.amin(0).tolist() == [7 - kernel // 2] * 2
    assert seen.amax(0).tolist() == [7 + kernel // 2] * 2
    if kernel == 7:
        evidence.property("a block mixes exactly 7x7 cells", "一个块恰好混合 7x7 个格子")


def test_stem_cuts_patches_that_do_not_overlap(evidence):
    net = built(LITTLE)
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[:, :, 8:12, 20:24] += 1
    different = (net.down[0](changed) != net.down[0](image)).any(1)[0]
    assert different.nonzero().tolist() == [[2, 5]]
    evidence.property("patchify stem: one 4x4 patch reaches one cell", "分块 stem：一个 4x4 图块只影响一个格子")


def test_norm_is_over_the_channels_of_a_pixel_and_after_pooling(evidence):
    norm = LayerNorm(6)
    y = norm(3 + 2 * torch.randn(2, 6, 5, 4))
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 5, 4), rtol=0, atol=1e-5)
    net = randomised(built(LITTLE))
    image = torch.randn(2, 3, 64, 64)
    last = net.pyramid(image)[-1]
    torch.testing.assert_close(net.embed(image), net.norm(last.mean((2, 3))))
    before_pooling = net.norm(last.movedim(1, -1)).mean((1, 2))
    assert relative(before_pooling, net.embed(image)) > 0.01
    evidence.property(
        "LayerNorm per pixel over channels; the head's norm comes after pooling, and the order matters",
        "LayerNorm 对每个像素的各通道做；头部的归一化在池化之后，顺序会改变结果",
    )


def test_layer_scale_starts_near_the_identity_and_can_be_left_out(evidence):
    x = torch.randn(1, 8, 6, 6)
    scaled, bare = Block(8, 7, 1e-6, 0.0), Block(8, 7, 0.0, 0.0)
    assert 0 < (scaled(x) - x).abs().max() < 1e-5
    assert bare.gamma is None
    assert (bare(x) - x).abs().max() > 1e-5
    for variant in ("isotropic_small", "isotropic_base"):
        with torch.device("meta"):
            assert not [name for name, _ in built(VARIANTS[variant]).named_parameters() if name.endswith("gamma")]
    evidence.property(
        "layer scale 1e-6 per channel; absent in isotropic S and B",
        "layer scale 每通道一个，初值 1e-6；各向同性的 S 和 B 没有",
    )


def test_stochastic_depth_grows_from_zero_over_all_blocks_and_is_drawn_per_image(evidence):
    net = built(replace(LITTLE, drop_path=0.4))
    rates = [block.drop_path.p for stage in net.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert ramp(0.5, 1) == [0]
    block = Block(4, 3, 1.0, 0.5).train()
    nn.init.ones_(block.project.bias)
    x = torch.zeros(1000, 4, 2, 2)
    out = block(x)[:, 0, 0, 0]
    added = block.eval()(x)[0, 0, 0, 0]
    kept = out != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(out[kept], (2 * added).expand(int(kept.sum())))
    evidence.property(
        "stochastic depth: linear from 0 over all blocks, per image, what is kept is scaled up",
        "随机深度：从 0 开始在所有块上线性增长，逐图抽取，保留下来的按比例放大",
    )


def test_first_weights():
    net = built(VARIANTS["laptop"], 32)
    for name, value in net.named_parameters():
        if name.endswith("bias"):
            assert not value.any()
        elif value.numel() > 2000:
            assert float(value.std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("name", "side", "strides"),
    [("tiny", 224, (4, 8, 16, 32)), ("isotropic_small", 224, (16,)), ("laptop", 32, (2, 4, 8, 16)), ("laptop", 128, (4, 8, 16, 32)),
     ("laptop", 96, (3, 6, 12, 24)), ("laptop_resnet", 32, (1, 2, 4, 8)), ("resnet50", 224, (4, 8, 16, 32))],
)  # fmt: skip
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert net.strides == strides


# --- Training


def test_loss_is_cross_entropy_with_smoothed_labels():
    logits, label = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    target = 0.9 * F.one_hot(label, 4) + 0.1 / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(smoothed({"logits": logits}, {"label": label})["loss"], expected)


def test_recipe_keeps_the_papers_rate_per_image():
    tiny, isotropic = recipe(VARIANTS["tiny"]), recipe(VARIANTS["isotropic_base"])
    assert tiny.lr / tiny.batch_size == pytest.approx(4e-3 / 4096)
    assert (tiny.optimizer, tiny.weight_decay, tiny.momentum, tiny.average, tiny.clip) == ("adamw", 0.05, 0.9, 0.9999, None)
    assert tiny.warmup == pytest.approx(20 / 300)
    assert isotropic.warmup == pytest.approx(50 / 300)
    assert recipe(VARIANTS["laptop"]) == recipe(VARIANTS["laptop_resnet"])


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_augmentation_follows_the_generator_alone(channels):
    image = tv_tensors.Image(torch.rand(channels, 40, 50))
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(views))
        out = Varied(erase=1.0)({"image": image, "name": "a"}, (32, 24), torch.Generator().manual_seed(seed))
        views.append(out["image"])
        assert out["name"] == "a"
        assert out["image"].shape == (channels, 32, 24)
        assert out["image"].isfinite().all()
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_augmentation_that_does_nothing():
    image = tv_tensors.Image(torch.full((3, 32, 32), 0.3))
    out = Varied(chance=0, erase=0)({"image": image}, (32, 32), torch.Generator().manual_seed(0))["image"]
    torch.testing.assert_close(out.as_subclass(torch.Tensor), image.as_subclass(torch.Tensor))
