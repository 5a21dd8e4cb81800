"""ViT against timm and torchvision, its position embeddings against scipy, and its parts by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import scipy.ndimage
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed, _resnetv2
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.papers.backbones.vit.vit import (
    MSA,
    VARIANTS,
    Config,
    Layer,
    StdConv,
    ViT,
    attention_distance,
    recipe,
    resized,
    rollout,
    same,
)
from paperworks.papers.backbones.vit.weights import PUBLISHED, SOURCES
from peers import check_timms, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
PARAMETERS = {
    "b/16": 86_567_656,
    "b/32": 88_224_232,
    "l/16": 304_326_632,
    "l/32": 306_535_400,
    "h/14": 632_045_800,
    "s/16": 22_050_664,
    "ti/16": 5_717_416,
    "r50+b/16": 98_659_112,
    "r50+b/32": 110_945_832,
    "r50+l/16": 316_483_624,
    "r50+l/32": 328_994_856,
}
"""With a linear head of 1000 classes, at 224 pixels."""
PEERS = {
    "b/16": "vit_base_patch16_224",
    "l/32": "vit_large_patch32_224",
    "h/14": "vit_huge_patch14_224",
    "r50+l/32": "vit_large_r50_s32_224",
}
LITTLE = Config(layers=3, width=48, heads=3, patch=8, image_size=64)


def built(config: Config, channels: int = 3, classes: int = 10) -> ViT:
    torch.manual_seed(0)
    return ViT(channels, classes, config.image_size or 32, config).eval()


def randomised(peer: nn.Module) -> nn.Module:
    """Weights that keep the scale of what flows through, norms with something to say, a head that is not zero."""
    torch.manual_seed(1)
    for name, value in peer.named_parameters():
        if isinstance(peer.get_submodule(name.rpartition(".")[0]), nn.Conv2d) and "backbone" in name:
            nn.init.normal_(value)  # will be standardised; so large that timm's smaller epsilon there makes no difference
        elif value.ndim > 1:
            nn.init.normal_(value, 0, (value.numel() / len(value)) ** -0.5)
        else:
            nn.init.normal_(value, float(name.endswith("weight")), 0.2)
    return peer.eval()


# --- Sizes


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], classes=1000)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PEERS)
def test_parameter_counts_are_timms(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(PEERS[name], num_classes=1000).parameters()) == PARAMETERS[name]


def test_every_variant_of_the_papers_is_counted_here():
    assert set(PARAMETERS) | {"small", "test"} == set(VARIANTS)


def test_multiply_adds_of_b_16():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        built(VARIANTS["b/16"], classes=1000)(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(17.6, abs=0.1)


# --- Other implementations


def test_outputs_equal_timm(evidence):
    peer = randomised(timm.create_model("vit_tiny_patch16_224"))
    net = built(VARIANTS["ti/16"], classes=1000)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), VARIANTS["ti/16"]))
    image = torch.randn(1, 3, 224, 224)
    theirs = peer(image)
    error = max(relative(net(image)["logits"], theirs), relative(net.encode(image), peer.forward_features(image)))
    assert error < TOLERANCE
    net.layers[7].msa.qkv.weight[5] *= 1.1  # a perturbed weight is seen
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} vit_tiny_patch16_224, logits and all tokens", error=error)


@pytest.mark.parametrize("pretraining", [False, True])
def test_outputs_equal_torchvision(evidence, pretraining):
    config = replace(LITTLE, pretraining=pretraining)
    head = 48 if pretraining else None
    peer = randomised(torchvision.models.VisionTransformer(64, 8, 3, 3, 48, 192, num_classes=10, representation_size=head))
    net = built(config)
    net.load_state_dict(SOURCES["torchvision"](peer.state_dict(), config))
    image = torch.randn(2, 3, 64, 64)
    error = relative(net(image)["logits"], peer(image))
    assert error < TOLERANCE
    what = "pre-training head" if pretraining else "linear head"
    evidence.fidelity(against=f"torchvision {torchvision.__version__} VisionTransformer, {what}", error=error)


@pytest.mark.parametrize(("units", "side"), [((2, 1, 3), 64), ((1, 2, 1, 1), 96)])
def test_hybrids_equal_timms(evidence, units, side):
    config = Config(layers=2, width=48, heads=3, patch=1, image_size=side, resnet=units)
    embedding = partial(HybridEmbed, backbone=_resnetv2(units))
    peer = VisionTransformer(img_size=side, patch_size=1, embed_dim=48, depth=2, num_heads=3, num_classes=10, embed_layer=embedding)
    randomised(peer)
    net = built(config)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), config))
    assert net.strides == (16 if len(units) == 3 else 32,)
    image = torch.randn(2, 3, side, side)
    error = relative(net(image)["logits"], peer(image))
    assert error < TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} hybrid, ResNet of {len(units)} stages", error=error)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_where_timm_says(name):
    check_timms(PUBLISHED[name])


# --- Mechanisms


def test_patches_are_flattened_and_mapped_linearly(evidence):
    """Section 3.1: x_p E by hand."""
    net = randomised(built(LITTLE))
    image = torch.randn(2, 3, 64, 64)
    flat = F.unfold(image, 8, stride=8).mT  # B N 3PP
    expected = flat @ net.patches.weight.flatten(1).T + net.patches.bias
    torch.testing.assert_close(net.embedded(image)[:, 1:] - net.positions[:, 1:], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.embedded(image)[:, 0], (net.class_token + net.positions[:, :1])[:, 0].expand(2, -1))
    evidence.property(
        "eq. 1: class token first, then flattened patches times E, plus E_pos",
        "式 1：class token 在最前，随后是展平的小块乘 E，再加 E_pos",
    )


def test_attention_by_hand(evidence):
    """Appendix A, head by head."""
    msa = randomised(MSA(12, 3))
    z = torch.randn(2, 5, 12)
    q, k, v = (msa.qkv(z)[..., 12 * i : 12 * (i + 1)] for i in range(3))
    heads, weights = [], []
    for a in range(3):
        part = slice(4 * a, 4 * (a + 1))
        weights.append((q[..., part] @ k[..., part].mT / 4**0.5).softmax(-1))
        heads.append(weights[-1] @ v[..., part])
    torch.testing.assert_close(msa(z), msa.out(torch.cat(heads, -1)))
    torch.testing.assert_close(msa.attention(z), torch.stack(weights, 1))
    evidence.property("eqs. 5 to 8, head by head, with a scale of 1/sqrt(D/heads)", "式 5 至式 8，逐头计算，缩放为 1/sqrt(D/头数)")


def test_layer_is_pre_norm(evidence):
    layer = randomised(Layer(12, 3, 0.0))
    z = torch.randn(2, 5, 12)
    z1 = z + layer.msa(F.layer_norm(z, (12,), layer.norm1.weight, layer.norm1.bias, 1e-6))
    h = layer.hidden(F.layer_norm(z1, (12,), layer.norm2.weight, layer.norm2.bias, 1e-6))
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    torch.testing.assert_close(layer(z), z1 + layer.output(h))
    evidence.property("eqs. 2 and 3: LayerNorm before, residual after; exact GELU", "式 2、式 3：LayerNorm 在前，残差在后；精确的 GELU")


def test_order_of_patches_matters_through_the_position_embeddings_alone(evidence):
    net = randomised(built(LITTLE))
    image = torch.randn(1, 3, 64, 64)
    cells = image.unflatten(3, (8, 8)).unflatten(2, (8, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # B N C P P
    torch.manual_seed(0)
    cells = cells[:, torch.randperm(64)]
    shuffled = cells.unflatten(1, (8, 8)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    assert shuffled.shape == image.shape
    assert relative(net(shuffled)["logits"], net(image)["logits"]) > 0.01
    net.positions.zero_()
    assert relative(net(shuffled)["logits"], net(image)["logits"]) < 1e-5
    evidence.property(
        "shuffled patches change the answer; without E_pos they do not (1e-5)",
        "打乱小块会改变答案；去掉 E_pos 后就不会（1e-5）",
    )


@pytest.mark.parametrize("size", [(7, 7), (3, 3), (6, 9)])
def test_position_embeddings_are_interpolated_as_officially(evidence, size):
    """scipy.ndimage.zoom of order 1, as the official loading of weights; the class token's is kept apart."""
    positions = torch.randn(1, 5 * 5 + 1, 4)
    ours = resized(positions, *size)
    grid = positions[0, 1:].reshape(5, 5, 4).double().numpy()
    expected = scipy.ndimage.zoom(grid, (size[0] / 5, size[1] / 5, 1), order=1).reshape(-1, 4)
    torch.testing.assert_close(ours[0, 1:].double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    assert torch.equal(ours[:, :1], positions[:, :1])
    assert resized(positions, 5, 5) is positions
    half_pixel = F.interpolate(torch.from_numpy(grid).permute(2, 0, 1)[None], size=size, mode="bilinear")
    assert (half_pixel[0].permute(1, 2, 0).reshape(-1, 4) - torch.from_numpy(expected)).abs().max() > 0.05  # the other convention
    evidence.property(
        "section 3.2: position embeddings interpolated in 2-D equal scipy's zoom of order 1, class token apart",
        "第 3.2 节：二维插值的位置编码等于 scipy 的一阶 zoom，class token 的另放",
    )


def test_weights_of_another_size_are_taken(evidence):
    """At 96 pixels with weights of 64: the same network, fed by interpolated embeddings."""
    peer = randomised(VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10))
    larger = replace(LITTLE, image_size=96)
    net, small = built(larger), built(LITTLE)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), larger))
    small.load_state_dict(SOURCES["timm"](peer.state_dict(), LITTLE))
    image = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(net(image), small(image))
    assert net.positions.shape == (1, 145, 48)
    evidence.property(
        "weights of one image size load at another and equal interpolation on the fly",
        "一种图像尺寸的权重可加载到另一种尺寸，与运行时插值的结果相等",
    )


def test_heads(evidence):
    """Section 3.1: a hidden layer at pre-training; section 3.2: one layer of zeros at fine-tuning."""
    fine = built(LITTLE)
    assert not any(p.any() for p in fine.head_parameters())
    pre = built(replace(LITTLE, pretraining=True))
    y = pre.embed(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(pre.head(y), pre.head[2](torch.tanh(pre.head[0](y))))
    assert pre.head[2].weight.any()
    evidence.property("heads: tanh layer and linear layer, or one linear layer of zeros", "头：tanh 层加线性层，或一个全零的线性层")


def test_dropout_is_after_dense_layers_and_positions():
    """Appendix B.1: not on queries, keys and values. All of it dropped: the class token's output is that of zeros."""
    net = randomised(built(replace(LITTLE, dropout=1.0))).train()
    z = net.embedded(torch.randn(1, 3, 64, 64))
    assert not z.any()
    assert not net.layers(z).any()
    assert net.eval().embedded(torch.randn(1, 3, 64, 64)).any()


def test_same_padding_is_tensorflows():
    x = torch.arange(1.0, 7).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    assert same(x, 7, 2).shape == (1, 1, 11, 11)
    assert same(x, 7, 2)[0, 0, 5].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0]  # 2 in front, 3 behind
    assert same(x[..., :5], 3, 2)[0, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert same(x, 3, 2)[0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 0]  # the odd one behind
    assert same(x, 1, 2).shape == x.shape


def test_weights_are_standardised():
    """Scale and mean of a filter do not matter."""
    conv, other = StdConv(4, 6, 3), StdConv(4, 6, 3)
    other.weight.copy_(5 * conv.weight + 0.3)
    x = torch.randn(1, 4, 8, 8)
    assert relative(other(x), conv(x)) < 1e-3


def test_attention_maps(evidence):
    net = randomised(built(LITTLE))
    maps = net.attention(torch.randn(2, 3, 64, 64))
    assert maps.shape == (3, 2, 3, 65, 65)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 3, 65))
    flow = rollout(maps)
    assert flow.shape == (2, 65)
    torch.testing.assert_close(flow.sum(1), torch.ones(2))
    by_hand = torch.eye(65)
    for layer in maps[:, 1]:
        by_hand = (0.5 * layer.mean(0) + 0.5 * torch.eye(65)) @ by_hand
    torch.testing.assert_close(flow[1], by_hand[0])

    local = torch.zeros(1, 1, 2, 10, 10)
    local[0, 0, 0] = torch.eye(10)  # each patch looks at itself
    local[0, 0, 1] = 1 / 10  # everywhere alike
    near, far = attention_distance(local, 16)[0].tolist()
    places = [(16 * i, 16 * j) for i in range(3) for j in range(3)]
    mean = sum(((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in places for c, d in places) / 81
    assert near == 0
    assert far == pytest.approx(mean)
    evidence.property("attention rollout and mean attention distance by hand", "注意力 rollout 与平均注意力距离，手算验证")


@pytest.mark.parametrize(("name", "side", "stride"), [("b/16", 224, 16), ("h/14", 224, 14), ("r50+b/16", 224, 16), ("r50+b/32", 224, 32)])
def test_pyramid(name, side, stride):
    with torch.device("meta"):
        net = built(VARIANTS[name])
        (feature,) = net.pyramid(torch.zeros(1, 3, side, side))
    assert net.strides == (stride,)
    assert feature.shape == (1, net.widths[0], side // stride, side // stride)


@pytest.mark.parametrize("side", [32, 64, 96, 128])
def test_small_variants_cut_every_image_into_64_patches(side):
    torch.manual_seed(0)
    net = ViT(3, 10, side, VARIANTS["small"]).eval()
    assert net.encode(torch.randn(1, 3, side, side)).shape == (1, 65, 96)
    assert net.embed(torch.randn(2, 3, side, side)).shape == (2, net.embedding)


def test_recipes_are_those_of_the_appendix():
    fine, pre = recipe(VARIANTS["b/16"]), recipe(replace(VARIANTS["b/16"], pretraining=True))
    assert (fine.optimizer, fine.momentum, fine.weight_decay, fine.clip, fine.schedule) == ("sgd", 0.9, 0, 1, "cosine")
    assert fine.lr / fine.batch_size == pytest.approx(0.03 / 512)
    assert (pre.optimizer, pre.weight_decay, pre.clip) == ("adamw", 0.3, 1)
    assert pre.lr / pre.batch_size == pytest.approx(3e-3 / 4096)
