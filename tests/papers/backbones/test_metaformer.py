"""MetaFormer against timm and numbers of both official repositories, and its parts by hand."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.backbones.metaformer.metaformer import (
    MIXERS,
    VARIANTS,
    Block,
    CellNorm,
    Config,
    ImageNorm,
    MetaFormer,
    Pooling,
    RandomMixing,
    SelfAttention,
    StarReLU,
    recipe,
)
from paperworks.papers.backbones.metaformer.weights import PUBLISHED, SOURCES
from peers import check_pyramid, check_timms, macs, randomised, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "metaformer.json").read_text())
BASIC = {"s12": (11_891_712, 1.8), "s24": (21_341_464, 3.4), "s36": (30_791_216, 5.0), "m36": (56_077_168, 8.8), "m48": (73_346_056, 11.5)}
RANDOM = {"s12": (235_298, 1.9), "s24": (470_596, 3.5), "s36": (705_894, 5.2), "m36": (705_894, 9.0), "m48": (941_192, 11.9)}
"""Numbers that are frozen, and multiply-adds with them."""
KNOWN = {
    "poolformer_s12": (11_915_176, 1.8),
    "poolformer_s24": (21_388_968, 3.4),
    "poolformer_s36": (30_862_760, 5.0),
    "poolformer_m36": (56_172_520, 8.8),
    "poolformer_m48": (73_473_448, 11.6),
    "metaformer_id_s12": (11_915_176, 1.8),
    "metaformer_pppa_s12": (14_038_440, None),
    "metaformer_ppaa_s12": (16_535_592, None),
    "metaformer_pppf_s12": (11_919_978, None),
    "metaformer_ppff_s12": (12_150_474, None),
    **{f"{family}_{size}": known for family in ("identityformer", "poolformerv2") for size, known in BASIC.items()},
    **{f"randformer_{size}": (BASIC[size][0], flops) for size, (_, flops) in RANDOM.items()},
    "convformer_s18": (26_774_448, 3.9),
    "convformer_s36": (40_012_152, 7.6),
    "convformer_m36": (57_051_640, 12.8),
    "convformer_b36": (99_882_616, 22.6),
    "caformer_s18": (26_341_656, 4.1),
    "caformer_s36": (39_297_102, 8.0),
    "caformer_m36": (56_204_878, 13.2),
    "caformer_b36": (98_753_614, 23.2),
}
"""Parameters, and 10^9 multiply-adds as the repositories' tables round them (fvcore, which counts norms and pooling as well)."""
LITTLE = Config(depths=(1, 1, 2, 1), widths=(8, 12, 16, 24), layer_scale=0.5, image_size=64)


def built(config: Config, side: int = 64, classes: int = 10) -> MetaFormer:
    torch.manual_seed(0)
    return MetaFormer(3, classes, side, config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, classes=1000)
    parameters, multiply_adds = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    if multiply_adds is not None:
        assert macs(net, 224) / 1e9 == pytest.approx(multiply_adds, rel=0.007, abs=0.06)
    frozen = sum(b.numel() for b in net.buffers())
    assert frozen == (RANDOM[name.removeprefix("randformer_")][0] if name.startswith("randformer") else 0)


def test_every_variant_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)
    assert set(PUBLISHED) == set(KNOWN)


# --- Other implementations


@pytest.mark.parametrize("name", ["caformer_s18", "poolformerv2_s12"])
def test_outputs_equal_timms(evidence, name):
    peer = randomised(timm.create_model(name))
    net = built(VARIANTS[name], 224, classes=1000)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), VARIANTS[name]))
    image = torch.randn(1, 3, 64, 96)
    theirs = peer(image)
    error = relative(net(image)["logits"], theirs)
    assert error < TOLERANCE
    net.stages[2][1].branches[1][0].weight *= 1.1  # a perturbed weight is seen
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} {name}", error=error)


def test_poolformers_features_equal_timms_whose_head_is_another(evidence):
    """timm pools and then normalises the vector; the authors normalise the map and then pool."""
    peer = randomised(timm.create_model("poolformer_s12"))
    net = built(VARIANTS["poolformer_s12"], 224, classes=1000)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), VARIANTS["poolformer_s12"]))
    image = torch.randn(1, 3, 64, 96)
    theirs = peer.forward_intermediates(image, intermediates_only=True)
    ours = net.pyramid(image)
    assert len(ours) == len(theirs) == 4
    error = max(map(relative, ours, theirs))
    assert error < TOLERANCE
    assert relative(net(image)["logits"], peer(image)) > 0.01
    evidence.fidelity(against=f"timm {timm.__version__} poolformer_s12, outputs of all stages", error=error)


@pytest.mark.parametrize(("paper", "name"), [(paper, name) for paper, of in FIXTURE["papers"].items() for name in of["networks"]])
def test_outputs_equal_the_official_code(evidence, paper, name):
    draw = runpy.run_path(str(FIXTURES / "metaformer_record.py"))["draw"]
    record = FIXTURE["papers"][paper]
    settings, golden = record["settings"][name], record["networks"][name]
    later = {"layer_scale": 0.0, "later": True, "mlp_head": settings["mlp_head"]} if paper == "baselines" else {}
    config = Config(
        mixers=tuple(settings["mixers"]), depths=tuple(FIXTURE["depths"]), widths=tuple(FIXTURE["widths"]), norm=settings["norm"], **later
    )
    net = built(config, 64, classes=7)
    official = {key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}
    net.load_state_dict(SOURCES[paper](official, config))
    theirs = torch.tensor(golden["logits"])
    image = draw("image", tuple(FIXTURE["input"]))
    error = relative(net(image)["logits"].flatten(), theirs)
    assert error < TOLERANCE
    net.stages[3][-1].branches[1][2].weight[:4] *= 1.5
    assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    evidence.fidelity(against=f"{record['repository']}@{record['commit'][:7]}, {name}", error=error)


@pytest.mark.parametrize("name", [name for name, published in PUBLISHED.items() if published.repo])
def test_published_weights_are_where_timm_says(name):
    check_timms(PUBLISHED[name])


# --- Mechanisms


def test_pooling_is_the_mean_of_the_neighbours_inside_less_the_cell(evidence):
    x = torch.randn(2, 3, 5, 6)
    expected = torch.empty_like(x)
    for i in range(5):
        for j in range(6):
            expected[:, :, i, j] = x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((2, 3)) - x[:, :, i, j]
    torch.testing.assert_close(Pooling()(x), expected)
    assert not Pooling()(torch.ones(1, 2, 4, 4)).any()  # borders are not darkened
    evidence.property(
        "pooling: mean of the cells inside, by brute force, less the cell; a flat map gives zero at borders too",
        "池化：图内格子的平均（穷举核对）减去该格本身；常数特征图在边界处也得零",
    )


def test_block_is_the_general_architecture(evidence):
    """Eqs. 2 and 3 with any mixer; what table 5 takes away is taken away."""
    block = randomised(Block(8, Pooling(), LITTLE, 0.0, scaled=False))
    x = torch.randn(2, 8, 6, 6)
    one, two = (s.weight[:, None, None] for s in block.scales)
    y = x + one * Pooling()(block.norms[0](x))
    mlp = block.branches[1]
    hidden = F.gelu(torch.einsum("oi,bihw->bohw", mlp[0].weight[..., 0, 0], block.norms[1](y)) + mlp[0].bias[:, None, None])
    branch = two * (torch.einsum("oi,bihw->bohw", mlp[2].weight[..., 0, 0], hidden) + mlp[2].bias[:, None, None])
    torch.testing.assert_close(block(x), y + branch, rtol=1e-4, atol=1e-5)
    block.residual = False
    bare = one * Pooling()(block.norms[0](x))
    assert relative(block(x), bare + branch) > 0.1
    assert len(Block(8, Pooling(), replace(LITTLE, channel_mlp=False), 0.0, scaled=False).branches) == 1
    assert isinstance(Block(8, Pooling(), replace(LITTLE, norm="off"), 0.0, scaled=False).norms[0], nn.Identity)
    evidence.property(
        "block: norm, mixer, layer scale, shortcut, norm, MLP of two 1x1 with exact GELU, layer scale, shortcut; by hand",
        "块：归一化、混合器、layer scale、捷径，再归一化、两个 1x1 加精确 GELU 的 MLP、layer scale、捷径；手算核对",
    )


def test_only_the_mixer_tells_the_networks_apart(evidence):
    """With the mixers' own weights set aside, all of the first paper's networks have the same weights."""
    names = {}
    for mixer in ("identity", "random", "pooling"):
        net = built(replace(LITTLE, mixers=(mixer,)))
        names[mixer] = {(name, tuple(p.shape)) for name, p in net.named_parameters()}
    assert names["identity"] == names["random"] == names["pooling"]
    identity = built(replace(LITTLE, mixers=("identity",)))
    pooling = built(replace(LITTLE, mixers=("pooling",)))
    assert all(torch.equal(a, b) for a, b in zip(identity.parameters(), pooling.parameters()))
    image = torch.randn(1, 3, 64, 64)
    assert relative(identity(image)["logits"], pooling(image)["logits"]) > 1e-3
    evidence.property(
        "identity, random and pooling networks have the same parameters; only the mixer differs",
        "恒等、随机、池化三种网络的参数相同，只有混合器不同",
    )


@pytest.mark.parametrize(("mixer", "reach"), [("identity", 0), ("pooling", 1), ("depthwise", 1), ("separable", 3), ("attention", 9)])
def test_how_far_a_mixer_reaches(mixer, reach):
    torch.manual_seed(0)
    made = MIXERS[mixer](8, 100, Config(head_width=4))
    x = torch.randn(1, 8, 10, 10)
    changed = x.clone()
    changed[:, :, 0, 0] += 1
    seen = (made(changed) != made(x)).any(1)[0].nonzero()
    assert seen.amax(0).tolist() == [reach, reach]


def test_random_mixing_is_drawn_once_and_frozen(evidence):
    net = built(replace(LITTLE, mixers=("identity", "identity", "random", "random")))
    mixing = [m for m in net.modules() if isinstance(m, RandomMixing)]
    assert [len(m.get_buffer("matrix")) for m in mixing] == [16, 16, 4]
    assert not [name for name, _ in net.named_parameters() if "matrix" in name]
    assert "stages.2.0.branches.0.matrix" in net.state_dict()
    matrix = mixing[0].get_buffer("matrix")
    torch.testing.assert_close(matrix.sum(1), torch.ones(16))
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(mixing[0](x)[0, 1].flatten(), matrix @ x[0, 1].flatten())
    evidence.property(
        "random mixing: rows sum to one, no gradient, kept with the weights, one matrix for all channels",
        "随机混合：每行之和为一，没有梯度，随权重保存，所有通道共用一个矩阵",
    )


def test_norms(evidence):
    x = 3 + 2 * torch.randn(2, 6, 5, 4)
    y = ImageNorm(6, 1e-5, bias=True)(x)
    torch.testing.assert_close(y.mean((1, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    assert y.mean(1).abs().max() > 0.1
    torch.testing.assert_close(CellNorm(6)(x).mean(1), torch.zeros(2, 5, 4), rtol=0, atol=1e-5)
    assert ImageNorm(6, 1e-6, bias=False).bias is None
    evidence.property(
        "norm over channels and cells of an image in pooling networks, over the channels of a cell with attention",
        "池化网络的归一化对一张图的全部通道和格子做，含注意力的网络对每个格子的通道做",
    )


def test_order_of_norm_and_pooling_in_the_head(evidence):
    image = torch.randn(2, 3, 64, 64)
    first = randomised(built(LITTLE))
    last = first.pyramid(image)[-1]
    torch.testing.assert_close(first.embed(image), first.norm(last).mean((2, 3)))
    later = randomised(built(replace(LITTLE, later=True, layer_scale=0)))
    torch.testing.assert_close(later.embed(image), later.norm(later.pyramid(image)[-1].mean((2, 3))))
    evidence.property(
        "head: norm then pooling in the first paper, pooling then norm in Baselines",
        "头部：第一篇论文先归一化再池化，Baselines 先池化再归一化",
    )


def test_what_baselines_changes(evidence):
    net = built(Config(mixers=("separable",), depths=(1,) * 4, widths=(8,) * 4, norm="cell",
                layer_scale=0, later=True, mlp_head=True))  # fmt: skip
    assert [[type(k).__name__ for k in stage[0].keeps] for stage in net.stages] == [["Identity"] * 2] * 2 + [["Scale"] * 2] * 2
    assert isinstance(net.embeddings[0].after, CellNorm)
    assert isinstance(net.embeddings[0].before, nn.Identity)
    assert isinstance(net.embeddings[1].before, CellNorm)
    assert not [n for n, _ in net.stages.named_parameters() if n.endswith("bias") and ".branches.1.1." not in n and ".0.1." not in n]
    star = randomised(StarReLU())
    x = torch.randn(100)
    torch.testing.assert_close(star(x), star.scale * x.clamp_min(0) ** 2 + star.bias)
    evidence.property(
        "Baselines: StarReLU, no biases in blocks, norm behind the stem and before embeddings, scaled shortcuts at the top",
        "Baselines：StarReLU，块内没有偏置，stem 之后和其余嵌入之前有归一化，最后两个阶段的捷径带缩放",
    )


def test_attention_stands_where_layers_of_other_papers_fit():
    attention = randomised(SelfAttention(12, 4, bias=True))
    z = torch.randn(2, 9, 12)
    q, k, v = attention.qkv(z).split(12, -1)
    heads = [(q[..., s] @ k[..., s].mT / 2).softmax(-1) @ v[..., s] for s in (slice(0, 4), slice(4, 8), slice(8, 12))]
    torch.testing.assert_close(attention(z), attention.out(torch.cat(heads, -1)), rtol=1e-4, atol=1e-5)
    assert (attention.heads, attention.qkv.out_features) == (3, 36)


def test_positions_are_added_once_where_attention_begins():
    net = built(Config(mixers=("pooling", "attention", "attention"), depths=(1, 1, 1), widths=(32, 32, 64)))
    assert [name for name, _ in net.named_parameters() if name.endswith(".map")] == ["stages.1.0.map"]
    assert net.stages[1][0].map.shape == (32, 8, 8)
    assert not net.stages[1][0].map.any()


def test_stochastic_depth_grows_over_all_blocks():
    net = built(replace(LITTLE, drop_path=0.4))
    assert [block.drop_path.p for stage in net.stages for block in stage] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("name", "side", "strides"),
    [("poolformer_s12", 224, (4, 8, 16, 32)), ("caformer_s18", 224, (4, 8, 16, 32)), ("small", 32, (2, 4, 8, 16)),
     ("small", 96, (3, 6, 12, 24)), ("small", 128, (4, 8, 16, 32)), ("test", 32, (2, 4, 8))],
)  # fmt: skip
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert net.strides == strides


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"mixers": ("pool",)}, "no token mixer is called pool"), ({"mixers": ("attention",)}, "does not divide a width of 8"),
     ({"mixers": ("identity", "pooling")}, "do not make stages")],
)  # fmt: skip
def test_settings_that_make_no_network(setting, message):
    with pytest.raises(InputError, match=message):
        built(replace(LITTLE, **setting))


def test_recipe_keeps_the_papers_rate_per_image():
    first, later = recipe(VARIANTS["poolformer_s12"]), recipe(VARIANTS["convformer_s18"])
    assert first.lr / first.batch_size == pytest.approx(1e-3 / 1024)
    assert (first.optimizer, first.weight_decay, first.clip) == ("adamw", 0.05, None)
    assert (first.warmup, later.warmup) == pytest.approx((5 / 300, 20 / 300))
