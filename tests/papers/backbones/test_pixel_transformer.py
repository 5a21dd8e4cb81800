"""Pixel Transformer against timm's ViT with patches of one pixel, and what single pixels do not notice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.backbones.pixel_transformer.pixel_transformer import (
    VARIANTS,
    Config,
    PixelTransformer,
    multiply_adds,
    recipe,
    shuffled,
    smoothed,
)
from paperworks.papers.backbones.vit import vit
from paperworks.papers.backbones.vit.weights import from_timm
from peers import randomised, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
KNOWN = {
    "t/1": (100, 5_555_812, 192, 3, 1),
    "s/1": (100, 21_728_356, 384, 6, 1),
    "b/1": (100, 85_923_940, 768, 12, 1),
    "t/2": (100, 5_410_084, 192, 3, 2),
    "s/2": (100, 21_436_900, 384, 6, 2),
    "b/2": (100, 85_341_028, 768, 12, 2),
    "s/1-28": (1000, 21_982_696, 384, 6, 1),
    "b/1-28": (1000, 86_431_720, 768, 12, 1),
}
"""Classes, parameters, width, heads, side of a patch."""
LITTLE = Config(layers=3, width=48, heads=3, image_size=8)


def built(config: Config, channels: int = 3, classes: int = 10) -> PixelTransformer:
    torch.manual_seed(0)
    return PixelTransformer(channels, classes, config.image_size or 32, config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds(name):
    """Parameters are those of timm's ViT of the same numbers; multiply-adds those that the formula gives."""
    classes, parameters, width, heads, patch = KNOWN[name]
    config = VARIANTS[name]
    assert (config.width, config.heads, config.patch, config.layers) == (width, heads, patch, 12)
    side = config.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = built(config, classes=classes)
        net(torch.zeros(1, 3, side, side))
        peer = VisionTransformer(img_size=side, patch_size=patch, embed_dim=width, num_heads=heads, num_classes=classes)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in peer.parameters()) == parameters
    assert counter.get_total_flops() / 2 == multiply_adds(config, side, 3, classes)


def test_every_variant_of_the_paper_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)


def test_price_of_pixels(evidence):
    """Four times the tokens cost four times the layers and sixteen times the attention."""
    pixels, patches = (multiply_adds(VARIANTS[name], 32, 3, 100) for name in ("b/1", "b/2"))
    assert 4.5 < pixels / patches < 4.7
    attention = [24 * ((32 // p) ** 2 + 1) ** 2 * 768 for p in (1, 2)]
    assert 15.8 < attention[0] / attention[1] < 16
    evidence.property(
        "multiply-adds in closed form equal the counted ones; Base on 32 x 32 pixels costs 4.6 times as much as with patches of 2",
        "乘加次数的公式与实际计数相等；Base 处理 32 x 32 像素的代价是小块边长为 2 时的 4.6 倍",
    )


# --- Another implementation


@pytest.mark.parametrize("patch", [1, 2])
def test_outputs_equal_timm(evidence, patch):
    config = Config(layers=4, width=96, heads=3, patch=patch, image_size=16)
    peer = randomised(VisionTransformer(img_size=16, patch_size=patch, embed_dim=96, depth=4, num_heads=3, num_classes=10))
    net = built(config)
    net.load_state_dict(from_timm(peer.state_dict(), vit.Config(patch=patch, image_size=16)))
    image = torch.randn(2, 3, 16, 16)
    theirs = peer(image)
    error = max(relative(net(image)["logits"], theirs), relative(net.encode(image), peer.forward_features(image)))
    assert error < TOLERANCE
    net.layers[2].msa.qkv.weight[5] *= 1.1  # a perturbed weight is seen
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} VisionTransformer, patch_size={patch}, logits and all tokens", error=error)


# --- Pixels


def test_a_token_is_a_pixel(evidence):
    net = randomised(built(LITTLE))
    image = torch.randn(2, 3, 8, 8)
    changed = image.clone()
    changed[:, :, 3, 5] += 1
    before, after = net.embedded(image), net.embedded(changed)
    assert before.shape == (2, 65, 48)
    assert (before != after).any(2)[0].nonzero().flatten().tolist() == [1 + 3 * 8 + 5]
    expected = image[:, :, 3, 5] @ net.patches.weight[:, :, 0, 0].T + net.patches.bias + net.positions[0, 1 + 3 * 8 + 5]
    torch.testing.assert_close(before[:, 1 + 3 * 8 + 5], expected)
    evidence.property(
        "a token is 3 D + D numbers' linear map of one pixel, plus its own learned position",
        "一个 token 是一个像素的线性映射（3 D + D 个数），再加上自己学到的位置编码",
    )


def test_pixels_and_positions_may_be_shuffled_together(evidence):
    """The grid is nowhere in the network: an image is a set of (pixel, position) pairs. With patches it is not so."""
    image = torch.randn(2, 3, 8, 8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    mixed = image.flatten(2)[:, :, order].view_as(image)
    for patch in (1, 2):
        net = randomised(built(replace(LITTLE, patch=patch)))
        nn.init.normal_(net.positions)
        plain = net(image)["logits"]
        assert relative(net(mixed)["logits"], plain) > 0.01  # positions matter
        if patch == 1:
            net.positions[:, 1:] = net.positions[:, 1:][:, order]
            error = relative(net(mixed)["logits"], plain)
            assert error < 1e-5
    evidence.property(
        f"exact symmetry: pixels and rows of the position table permuted together give the same logits ({error:.0e})",
        f"严格的对称性：像素与位置表的各行按同一排列重排，logits 不变（{error:.0e}）",
    )


def test_swaps_are_a_shuffle_of_the_input(evidence):
    config = replace(LITTLE, swaps=40)
    net, plain = built(config), built(LITTLE)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "order"})
    image = torch.randn(2, 3, 8, 8)
    mixed = image.flatten(2)[:, :, net.order].view_as(image)
    torch.testing.assert_close(net(image)["logits"], plain(mixed)["logits"])
    assert relative(net.embedded(image), plain.embedded(image)) > 0.01
    torch.manual_seed(5)
    other = PixelTransformer(3, 10, 8, config)
    assert torch.equal(net.order, other.order)  # not of the weights' chance: the same for each seed
    evidence.property(
        "swaps: one fixed permutation of the pixels of every image, kept with the weights",
        "交换：对每张图的像素做同一个固定排列，与权重一起保存",
    )


@pytest.mark.parametrize("reach", [1, 3, None])
def test_shuffle_swaps_pairs_within_reach(evidence, reach):
    one = shuffled(9, 1, reach, seed=4)
    moved = (one != torch.arange(81)).nonzero().flatten().tolist()
    assert len(moved) == 2
    a, b = moved
    assert one[[a, b]].tolist() == [b, a]
    assert abs(a // 9 - b // 9) + abs(a % 9 - b % 9) <= (reach or 99)
    many = shuffled(9, 500, reach)
    assert many.sort().values.tolist() == list(range(81))
    distances = [
        abs(a // 9 - b // 9) + abs(a % 9 - b % 9)
        for seed in range(60)
        for a, b in [(shuffled(9, 1, reach, seed) != torch.arange(81)).nonzero().flatten().tolist()]
    ]
    assert max(distances) == reach or (reach is None and max(distances) > 6)
    if reach is None:
        evidence.property(
            "a swap takes a pixel and another within reach rows and columns; any number of swaps is a permutation",
            "一次交换取一个像素和相距不超过 reach 行列步数的另一个像素；任意次交换之后仍是一个排列",
        )


def test_positions_are_learned_from_chance():
    """No sines: they would bring the grid back in."""
    net = built(VARIANTS["small"])
    rows = net.positions[0, 1:]
    assert isinstance(net.positions, nn.Parameter)
    assert float(rows.std()) == pytest.approx(0.02, rel=0.05)
    grid = F.normalize(rows, dim=1).view(12, 12, -1)
    assert abs(float((grid[:, 1:] * grid[:, :-1]).sum(-1).mean())) < 0.02  # neighbours are as strange to each other as any two


def test_pyramid_has_a_cell_a_pixel():
    net = built(VARIANTS["small"])
    (feature,) = net.pyramid(torch.randn(1, 3, 12, 12))
    assert net.strides == (1,)
    assert feature.shape == (1, net.widths[0], 12, 12)
    assert net.embed(torch.randn(2, 3, 12, 12)).shape == (2, net.embedding)


@pytest.mark.parametrize(("change", "word"), [({"heads": 5}, "heads"), ({"patch": 3}, "patch")])
def test_numbers_that_do_not_fit(change, word):
    with pytest.raises(InputError, match=word):
        built(replace(LITTLE, **change))


# --- Training


def test_loss_and_recipe():
    logits, label = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    target = 0.9 * F.one_hot(label, 4) + 0.1 / 4
    torch.testing.assert_close(smoothed({"logits": logits}, {"label": label})["loss"], -(target * logits.log_softmax(1)).sum(1).mean())
    deit = recipe(VARIANTS["s/1"])
    assert deit.lr / deit.batch_size == pytest.approx(5e-4 / 512)
    assert (deit.optimizer, deit.weight_decay, deit.patch) == ("adamw", 0.05, 32)
