"""MPViT against numbers of the official code, CoaT's blocks in timm, and its parts by hand."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import coat
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.backbones.mpvit.claim import ARMS
from paperworks.papers.backbones.mpvit.mpvit import (
    VARIANTS,
    Config,
    Encoder,
    FactorisedAttention,
    LocalPath,
    MPViT,
    PositionEncoding,
    RelativePositions,
    Stage,
    reach,
    recipe,
)
from paperworks.papers.backbones.mpvit.weights import PUBLISHED, SOURCES
from peers import check_pyramid, macs, randomised, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "mpvit.json").read_text())
KNOWN = {
    "tiny": (5_843_736, 1_654_163_812),
    "xsmall": (10_573_448, 2_971_396_560),
    "small": (22_892_400, 4_799_650_824),
    "base": (74_845_976, 16_445_326_240),
}
"""Parameters, and multiply-adds as the official code states them (fvcore, which counts norms as well)."""
LITTLE = Config(paths=(2, 3), layers=(1, 2), widths=(16, 24), windows=(3, 5, 5, 7), stem=2, image_size=32)


def built(config: Config, side: int = 32, classes: int = 10) -> MPViT:
    torch.manual_seed(0)
    return MPViT(3, classes, side, config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, classes=1000)
    parameters, multiply_adds = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert macs(net, 224) == pytest.approx(multiply_adds, rel=0.02)


def test_every_variant_is_counted_here():
    assert set(KNOWN) | {"laptop", "test"} == set(VARIANTS)
    assert set(PUBLISHED) == set(KNOWN)


def test_arms_of_the_claim_cost_the_same():
    costs = {}
    for arm, settings in ARMS.items():
        with torch.device("meta"):
            net = built(replace(VARIANTS["laptop"], **settings))
        costs[arm] = (sum(p.numel() for p in net.parameters()), round(macs(net, 32) / 1e6, 1))
    assert costs["paths_3"] == (142_226, 7.5)
    assert costs["path_1"] == (137_530, 7.3)


# --- Other implementations


def official(settings: dict) -> tuple[MPViT, dict[str, torch.Tensor]]:
    draw = runpy.run_path(str(FIXTURES / "mpvit_record.py"))["draw"]
    config = Config(
        paths=tuple(settings["num_path"]), layers=tuple(settings["num_layers"]), widths=tuple(settings["embed_dims"]),
        mlp_ratio=settings["mlp_ratios"][0],
    )  # fmt: skip
    net = built(config, 64, classes=7)
    state = {key: draw(FIXTURE["drawn"].get(key, key), tuple(shape)) for key, shape in FIXTURE["shapes"].items()}
    net.load_state_dict(SOURCES["official"](state, config))
    net.load_state_dict(SOURCES["official"]({"model": state}, config))  # as a checkpoint holds them
    return net, draw("image", tuple(FIXTURE["input"]))


def test_outputs_equal_the_official_code(evidence):
    net, image = official(FIXTURE["settings"])
    theirs = torch.tensor(FIXTURE["logits"])
    error = relative(net(image)["logits"].flatten(), theirs)
    assert error < TOLERANCE
    for ours, known in zip(net.pyramid(image), FIXTURE["features"], strict=True):
        seen = torch.stack([ours.mean(), ours.std(), ours.flatten()[0], ours.flatten()[-1]])
        assert relative(seen, torch.tensor(known)) < TOLERANCE
    net.stages[1].encoders[0].relative.convs[0].weight[:, :, 1, 1] *= 1.1  # a perturbed weight is seen
    assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, logits and all stages", error=error)


def test_attention_equals_coats(evidence):
    """CoaT's has a class token, which our tokens do without: one is put in front, and stays out of what is compared by a key of -inf."""
    torch.manual_seed(0)
    windows = (3, 3, 5, 5, 5, 7, 7, 7)
    theirs_relative = coat.ConvRelPosEnc(head_chs=4, num_heads=8, window={3: 2, 5: 3, 7: 3})
    theirs = randomised(coat.FactorAttnConvRelPosEnc(32, num_heads=8, qkv_bias=True, shared_crpe=theirs_relative))
    ours, relative_positions = FactorisedAttention(32, 8).eval(), RelativePositions(32, windows)
    ours.qkv.load_state_dict(theirs.qkv.state_dict())
    ours.out.load_state_dict(theirs.proj.state_dict())
    for mine, his in zip(relative_positions.convs, theirs_relative.conv_list):
        mine.load_state_dict(his.state_dict())
    x = torch.randn(2, 5, 6, 32)
    direction = theirs.qkv.weight[32:64]
    token = -(torch.linalg.pinv(direction) @ torch.full((32,), 200.0)).expand(2, 1, 32)  # its keys vanish in the softmax
    expected = theirs(torch.cat([token, x.flatten(1, 2)], 1), (5, 6))[:, 1:]
    error = relative(ours(x, relative_positions).flatten(1, 2), expected)
    assert error < TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} coat.FactorAttnConvRelPosEnc", error=error)


# --- Mechanisms


def test_paths_read_patches_of_3_5_and_7_cells_in_one_length(evidence):
    with torch.inference_mode(False):
        net = built(replace(LITTLE, paths=(3, 3)))
        assert reach(net, 0) == [3, 5, 7]
        assert reach(net, 1) == [3, 7, 11]  # the first one halves the map
    maps = net.stages[1].embedded(torch.randn(1, 24, 16, 16))
    assert [tuple(m.shape) for m in maps] == [(1, 24, 8, 8)] * 3
    evidence.property(
        "multi-scale patch embedding: in series, tokens of path 1, 2, 3 have seen 3, 5, 7 cells; sequences of one length",
        "多尺度 patch 嵌入：串联，路径 1、2、3 的 token 看过 3、5、7 格；各序列等长",
    )


def test_factorised_attention_by_hand(evidence):
    attention, positions = randomised(FactorisedAttention(12, 3)), randomised(RelativePositions(12, (3, 5, 5)))
    x = torch.randn(2, 4, 5, 12)
    q, k, v = attention.qkv(x).flatten(1, 2).split(12, -1)
    out = []
    for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
        weights = k[..., head].exp() / k[..., head].exp().sum(1, keepdim=True)  # over places
        context = torch.einsum("bnk,bnv->bkv", weights, v[..., head])
        out.append(torch.einsum("bnk,bkv->bnv", q[..., head], context) / 2)
    picture = v.reshape(2, 4, 5, 12).permute(0, 3, 1, 2)
    small, large = positions.convs
    moved = torch.cat(
        [F.conv2d(picture[:, :4], small.weight, small.bias, padding=1, groups=4),
         F.conv2d(picture[:, 4:], large.weight, large.bias, padding=2, groups=8)], 1,
    )  # fmt: skip
    expected = attention.out(torch.cat(out, -1) + q * moved.permute(0, 2, 3, 1).flatten(1, 2))
    torch.testing.assert_close(attention(x, positions).flatten(1, 2), expected, rtol=1e-4, atol=1e-5)
    evidence.property(
        "factorised attention: softmax of keys over places, none of queries, scale on the content term alone; by hand",
        "因子化注意力：softmax 沿位置、只对键不对查询，缩放只乘在内容项上；与手算一致",
    )


def test_attention_never_holds_a_matrix_of_tokens_by_tokens():
    attention, positions = FactorisedAttention(16, 2), RelativePositions(16, (3, 3))
    cost = []
    for side in (8, 16):
        with FlopCounterMode(display=False) as counter:
            attention(torch.randn(1, side, side, 16), positions)
        cost.append(counter.get_total_flops())
    assert cost[1] == 4 * cost[0]


def test_encodings_of_place_are_shared_by_the_blocks_of_a_path_only():
    names = [name for name, _ in built(replace(LITTLE, layers=(2, 3))).named_parameters() if name.endswith("places.weight")]
    assert names == [f"stages.{i}.encoders.{j}.places.weight" for i, paths in enumerate(LITTLE.paths) for j in range(paths)]
    encoder = randomised(Encoder(16, LITTLE, [0.0, 0.0]))
    x = torch.randn(1, 6, 6, 16)
    by_hand = x
    for block in encoder.blocks:
        by_hand = block(encoder.places(by_hand), encoder.relative)  # the same encodings in front of and in each block
    torch.testing.assert_close(encoder(x.movedim(-1, 1)), by_hand.movedim(-1, 1))


def test_positions_are_added_and_known_by_the_border():
    places = randomised(PositionEncoding(4))
    x = torch.randn(1, 5, 6, 4)
    conv = F.conv2d(x.permute(0, 3, 1, 2), places.weight, places.bias, padding=1, groups=4)
    torch.testing.assert_close(places(x), x + conv.permute(0, 2, 3, 1))
    flat = places(torch.ones(1, 5, 5, 4))
    assert not torch.allclose(flat[0, 0, 0], flat[0, 2, 2])


def test_stage_concatenates_the_local_path_and_all_encoders(evidence):
    stage = randomised(Stage(16, 20, 3, 2, replace(LITTLE, layers=(1, 1)), [0.0]))
    x = torch.randn(2, 16, 12, 12)
    maps = stage.embedded(x)
    parts = torch.cat([stage.local(maps[0]), *(e(m) for e, m in zip(stage.encoders, maps))], 1)
    assert parts.shape == (2, 64, 6, 6)
    conv, norm = stage.aggregate[0], stage.aggregate[1]
    torch.testing.assert_close(stage(x), F.hardswish(norm(conv(parts))))
    alone = Stage(16, 20, 3, 2, replace(LITTLE, local=False), [0.0])
    assert alone.local is None
    assert alone.aggregate[0].in_channels == 48
    evidence.property(
        "stage: local path on the first embedding, encoders, concatenation, 1x1 convolution to the next width",
        "阶段：第一个嵌入上的局部路径、各编码器、拼接、到下一阶段宽度的 1×1 卷积",
    )


def test_local_path_is_an_inverted_residual():
    local = randomised(LocalPath(6))
    x = torch.randn(2, 6, 7, 7)
    y = F.hardswish(local.expand[1](local.expand[0](x)))
    y = F.hardswish(local.norm(F.conv2d(y, local.depthwise.weight, padding=1, groups=6)))
    torch.testing.assert_close(local(x), x + local.project[1](local.project[0](y)))


def test_stochastic_depth_is_one_list_for_all_paths_of_a_stage():
    net = built(replace(LITTLE, drop_path=0.4))
    rates = [[[block.drop_path.p for block in encoder.blocks] for encoder in stage.encoders] for stage in net.stages]
    assert rates == [[[0.0]] * 2, [[pytest.approx(0.2), pytest.approx(0.4)]] * 3]


def test_first_weights():
    net = built(VARIANTS["tiny"], 224)
    stage = net.stages[2]
    assert float(stage.embeddings[0][0].weight.std()) == pytest.approx((2 / (9 * 176)) ** 0.5, rel=0.1)
    assert float(stage.local.depthwise.weight.std()) == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert float(stage.aggregate[0].weight.std()) == pytest.approx((2 / 216) ** 0.5, rel=0.1)
    assert float(stage.encoders[0].blocks[0].attention.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not stage.encoders[0].blocks[0].attention.qkv.bias.any()


def test_an_encoder_keeps_the_shape_of_its_map():
    encoder = Encoder(16, LITTLE, [0.0, 0.0])
    assert encoder(torch.randn(2, 16, 5, 7)).shape == (2, 16, 5, 7)


@pytest.mark.parametrize(
    ("name", "side", "widths", "strides"),
    [("tiny", 224, (96, 176, 216, 216), (4, 8, 16, 32)), ("laptop", 32, (48, 96, 120, 120), (2, 4, 8, 16)),
     ("laptop", 128, (48, 96, 120, 120), (4, 8, 16, 32)), ("test", 32, (12, 16, 16), (2, 4, 8))],
)  # fmt: skip
def test_pyramid(name, side, widths, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert (net.widths, net.strides) == (widths, strides)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"widths": (16, 18)}, "do not divide a width of 18"), ({"stem": 3}, "a stem of stride 3"), ({"paths": (1,)}, "do not make stages")],
)
def test_settings_that_make_no_network(setting, message):
    with pytest.raises(InputError, match=message):
        built(replace(LITTLE, **setting))


def test_recipe_keeps_the_papers_rate_per_image():
    tiny = recipe(VARIANTS["tiny"])
    assert tiny.lr / tiny.batch_size == pytest.approx(1e-3 / 1024)
    assert (tiny.optimizer, tiny.weight_decay, tiny.clip) == ("adamw", 0.05, None)
    assert tiny.warmup == pytest.approx(5 / 300)
