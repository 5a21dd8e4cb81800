"""Agent attention against numbers of the official networks, its two softmaxes by hand, and as a layer of other networks."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import PAPER as CONVNEXT
from paperworks.papers.backbones.vit.vit import MSA
from paperworks.papers.backbones.vit.vit import PAPER as VIT
from paperworks.papers.layers.agent_attention.agent_attention import (
    LAYERS,
    PAPER,
    VARIANTS,
    AgentAttention,
    Agents,
    Config,
    build,
    multiply_adds,
    put,
    recipe,
)
from paperworks.papers.layers.agent_attention.trunks import Place, WindowAttention, as_map, as_tokens
from paperworks.papers.layers.agent_attention.weights import PUBLISHED, SOURCES
from paperworks.tasks.classification import Classification
from peers import check_pyramid, macs, relative, scattered, trained

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "agent_attention.json").read_text())
KNOWN = {
    "deit_t": (6_015_640, 1.2),
    "deit_s": (22_647_112, 4.4),
    "deit_b": (87_204_904, 17.6),
    "pvt_t": (11_570_352, 2.0),
    "pvt_s": (20_635_066, 4.0),
    "pvt_m": (35_921_746, 7.0),
    "pvt_l": (48_738_180, 10.4),
    "swin_t": (28_902_964, 4.5),
    "swin_s": (49_666_684, 8.7),
    "swin_b": (88_095_096, 15.4),
}
"""Parameters of the official networks, and 10^9 multiply-adds as the paper rounds them."""
SETTINGS = {
    "deit": Config(depths=(3,), widths=(24,), heads=(3,), patch=8, agents=(9,), agent_blocks=(2,), image_size=64),
    "pvt": replace(
        VARIANTS["pvt_t"], depths=(1, 1, 2, 1), widths=(8, 16, 24, 32), heads=(1, 2, 3, 4), patch=2, agents=(9, 16, 16, 4),
        agent_blocks=(1, 1, 2, 1), image_size=64,
    ),
    "swin": replace(
        VARIANTS["swin_t"], depths=(2, 2, 2), widths=(12, 24, 48), heads=(2, 3, 4), ratios=(4, 4, 4), agents=(9, 16, 49),
        agent_blocks=(0, 1, 2), image_size=112,
    ),
}  # fmt: skip
"""The little networks of the fixture."""
SPEC = Classification.plain_spec(size=(32, 32))
PLACE = Place(stage=0, block=0, width=12, heads=3, side=6, class_token=False)


def built(config: Config, classes: int = 10, side: int = 32):
    torch.manual_seed(0)
    return build(Classification.plain_spec(classes=classes, size=(side, side)), config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 1000)
    parameters, known = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert macs(net, 224) / 1e9 == pytest.approx(known, rel=0.03 if known < 2 else 0.02)  # 1.2 has two digits


def test_every_variant_of_the_paper_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)


def test_agents_stand_where_the_official_settings_have_them(evidence):
    def agents(name):
        with torch.device("meta"):
            net = built(VARIANTS[name], 1000)
        kinds = [[block.attention for block in stage] for stage in net.stages]
        return ["".join("A" if isinstance(a, AgentAttention) else "B" for a in stage) for stage in kinds], kinds

    assert agents("deit_b")[0] == ["AAAABBBBBBBB"]
    assert agents("swin_t")[0] == ["AA", "AA", "AAAAAA", "BB"]
    assert agents("swin_s")[0] == ["AA", "AA", "B" * 18, "BB"]
    patterns, kinds = agents("swin_b")
    assert patterns == ["AA", "AA", "AA" + "B" * 16, "BB"]
    assert [a.shift for a in kinds[2][2:]] == [0, 3] * 8
    assert [a.shift for a in kinds[3]] == [0, 0]  # a window is the map
    assert [a.side for a in agents("pvt_t")[1][0]] == [3, 3]
    evidence.property(
        "agent and ordinary blocks in the official patterns (AAAB, AABB, AAMB2, 4 of 12); windows shift in every second block",
        "代理块与普通块的排布同官方设置（AAAB、AABB、AAMB2、12 块中的 4 块）；窗口隔块移位",
    )


# --- The official code


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_equal_the_official_code(evidence, name):
    draw = runpy.run_path(str(FIXTURES / "agent_attention_record.py"))["draw"]
    config, golden = SETTINGS[name], FIXTURE["networks"][name]
    net = built(config, 7)
    official = {key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}
    net.load_state_dict(SOURCES["official"](official, config))
    image, theirs = draw("image", (2, 3, config.image_size, config.image_size)), torch.tensor(golden["logits"])
    error = relative(net(image)["logits"].flatten(), theirs)
    assert error < TOLERANCE
    place = next(m for m in net.modules() if isinstance(m, AgentAttention))
    place.broadcast_bias.rows[:, 0] += 1  # a perturbed weight is seen
    assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, Agent-{name.upper()}", error=error)


def test_nobody_published_weights_under_a_licence():
    assert not PUBLISHED


# --- The attention


@pytest.mark.parametrize("class_token", [False, True])
def test_agents_gather_and_broadcast(evidence, class_token):
    """softmax(Q A^T + B_2) softmax(A K^T + B_1) V + DWC(V), head by head."""
    layer = scattered(AgentAttention(replace(PLACE, class_token=class_token), 4))
    z = torch.randn(2, 36 + class_token, 12)
    q, k, v = layer.qkv(z).chunk(3, 2)
    grid = q[:, class_token:].reshape(2, 2, 3, 2, 3, 12)
    agents = grid.mean((2, 4)).reshape(2, 4, 12)  # means of the four quarters of the 6 x 6 map
    heads = []
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        b1, b2 = layer.gather_bias()[i], layer.broadcast_bias()[i].T
        gathered = (agents[..., part] @ k[..., part].mT / 2 + b1).softmax(-1) @ v[..., part]
        heads.append((q[..., part] @ agents[..., part].mT / 2 + b2).softmax(-1) @ gathered)
    out = torch.cat(heads, -1)
    local = F.conv2d(as_map(v), layer.conv.weight, layer.conv.bias, padding=1, groups=12)
    out[:, class_token:] += as_tokens(local)
    torch.testing.assert_close(layer(z), layer.out(out), rtol=1e-4, atol=1e-5)
    evidence.property(
        f"agent attention by hand, {'with' if class_token else 'without'} a class token, which no agent pools and which asks and is asked",
        f"代理注意力与手算相等，{'有' if class_token else '没有'}类别 token；代理池化时不含它，但它既是查询也是键",
    )


def test_it_is_attention_of_the_rank_of_the_agents(evidence):
    layer = scattered(AgentAttention(PLACE, 4, conv=False))
    z = torch.randn(2, 36, 12)
    full = layer.attention(z)  # B A N N
    assert (full >= 0).all()
    torch.testing.assert_close(full.sum(-1), torch.ones(2, 3, 36))
    assert torch.linalg.matrix_rank(full.double(), rtol=1e-5).max() <= 4
    v = layer.headed(layer.qkv(z).chunk(3, 2)[2])
    torch.testing.assert_close(layer(z), layer.out((full @ v).transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)
    exact = scattered(MSA(12, 3))
    exact.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith(("qkv", "out"))})
    assert torch.linalg.matrix_rank(exact.attention(z).double(), rtol=1e-5).min() > 4  # of softmax attention it is not so
    evidence.property(
        "equals linear attention: an N x N map of rank n, rows of which sum to one; softmax attention has a higher rank",
        "等于线性注意力：乘开后是秩为 n 的 N x N 注意力图，每行之和为一；softmax 注意力的秩更高",
    )


def test_agent_bias_is_a_block_rows_and_columns():
    layer = scattered(AgentAttention(replace(PLACE, class_token=True), 4))
    bias = layer.gather_bias
    grid = bias()[:, :, 1:].reshape(3, 4, 6, 6)
    block = F.interpolate(bias.block, (6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(grid, block + bias.rows + bias.columns)
    torch.testing.assert_close(bias()[:, :, 0], bias.token[..., 0])
    assert AgentAttention(PLACE, 4).gather_bias.block.std() == pytest.approx(0.02, rel=0.2)


def test_cost_is_linear_in_the_tokens(evidence):
    """The counter's figures are the formula's, and agents are cheaper once there are more than about twice as many tokens."""

    def counted(module: nn.Module, side: int) -> int:
        with FlopCounterMode(display=False) as counter:
            module(torch.zeros(1, side**2, 48, device="meta"))
        return counter.get_total_flops() // 2 - 4 * side**2 * 48**2  # without projections

    for side in (8, 16, 32):
        with torch.device("meta"):
            place = replace(PLACE, width=48, side=side)
            assert counted(AgentAttention(place, 16), side) == multiply_adds(side**2, 48, 16)
            assert counted(MSA(48, 3), side) == multiply_adds(side**2, 48)
    assert multiply_adds(4096, 48, 16) == 64 * multiply_adds(64, 48, 16)
    assert multiply_adds(4096, 48) == 4096 * multiply_adds(64, 48)
    assert multiply_adds(49, 48) > multiply_adds(49, 48, 16) > multiply_adds(36, 48)
    evidence.property(
        "multiply-adds: 4 n N D + 9 N D against 2 N^2 D, counted at 64 to 1024 tokens; the lines cross near 2 n tokens",
        "乘加：4 n N D + 9 N D 对 2 N^2 D，在 64 到 1024 个 token 上计数；两条线在 N 略大于 2n 处相交",
    )


def test_windows_do_not_see_over_their_edge(evidence):
    """An ordinary block of Swin: what a cell reaches is its window, and in shifted windows not what came round the edge."""
    for block, reached in ((0, ((0, 3), (0, 3))), (1, ((0, 1), (0, 1)))):
        layer = scattered(WindowAttention(Place(stage=0, block=block, width=8, heads=2, side=8, class_token=False), 4))
        z = torch.randn(1, 64, 8)
        changed = z.clone()
        changed[:, 0] += 1
        seen = ((layer(changed) - layer(z)).abs() > 1e-5).any(2).reshape(8, 8).nonzero()
        assert [seen.amin(0).tolist(), seen.amax(0).tolist()] == [list(c) for c in zip(*reached)]
    evidence.property(
        "ordinary Swin blocks: a cell reaches its window, shifted windows are masked over the edge",
        "普通 Swin 块：一个格子只影响自己的窗口，移位窗口不会越过边缘",
    )


# --- Other networks


@pytest.mark.parametrize("agents", [4, 16])
@torch.enable_grad()
def test_in_a_vit_it_learns(evidence, agents):
    host = VIT.build(SPEC, VIT.variants["test"])
    before = {n: p.clone() for n, p in host.named_parameters()}
    net = put(host, Agents(agents=agents))
    places = [m for m in net.modules() if isinstance(m, AgentAttention)]
    assert len(places) == 2
    assert all(place.gather_bias.token is not None and place.gather_bias.side == 8 for place in places)
    assert not [m for m in net.modules() if isinstance(m, MSA)]
    for name in ("qkv.weight", "out.bias"):
        assert torch.equal(net.get_parameter(f"layers.1.msa.{name}"), before[f"layers.1.msa.{name}"])
    losses = trained(net)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in places[0].parameters())
    evidence.property(
        f"in a ViT: every attention replaced, projections kept, {agents} agents learn; a class token is noticed",
        f"放进 ViT：所有注意力都被替换，投影层保留，{agents} 个代理能学习；能识别出类别 token",
    )


def test_in_an_exported_vit():
    net = put(VIT.build(SPEC, VIT.variants["test"]), Agents()).eval()
    exported = torch.export.export(net, (torch.zeros(2, 3, 32, 32),)).module()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(exported(image)["logits"], net(image)["logits"])


def test_parts_can_be_left_out():
    sizes = {}
    for settings in ({}, {"conv": False}, {"bias": False}):
        net = put(VIT.build(SPEC, VIT.variants["test"]), Agents(**settings))
        sizes[tuple(settings)] = sum(p.numel() for p in net.parameters())
    assert sizes[()] - sizes["conv",] == 2 * 10 * 16
    assert sizes[()] - sizes["bias",] == 2 * 2 * 2 * 16 * (49 + 8 + 8 + 1)


def test_what_does_not_fit():
    with pytest.raises(InputError, match="no place that fits"):
        put(CONVNEXT.build(SPEC, CONVNEXT.variants["test"]), Agents())
    for agents in (15, 81, 0):
        with pytest.raises(InputError, match="no square number between 1 and the 64 tokens"):
            put(VIT.build(SPEC, VIT.variants["test"]), Agents(agents=agents))
    wrong = {
        "a width of 50 is not divisible into 4 heads": {"widths": (48, 50, 192)},
        "as many numbers as there are stages": {"heads": (2, 4)},
        "agents and agent_blocks want a number for each": {"agents": (4,)},
        "do not divide into patches": {"patch": 7},
        "windows of 5 do not divide": {"trunk": "swin", "window": 5, "agent_blocks": (0, 0, 0)},
    }
    for message, settings in wrong.items():
        with pytest.raises(InputError, match=message):
            built(replace(VARIANTS["small"], **settings))


# --- The network


@pytest.mark.parametrize(("name", "side", "strides"), [("deit_t", 224, (16,)), ("swin_t", 224, (4, 8, 16, 32)), ("small", 96, (6, 12, 24))])
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side=side)
        check_pyramid(net, side)
    assert net.strides == strides


def test_recipe_is_the_trunks():
    deit, pvt, large = recipe(VARIANTS["deit_s"]), recipe(VARIANTS["pvt_t"]), recipe(VARIANTS["pvt_l"])
    assert deit.lr / deit.batch_size == pytest.approx(1e-3 / 1024)
    assert (deit.weight_decay, deit.clip, deit.warmup) == (0.05, 5.0, pytest.approx(20 / 300))
    assert (pvt.clip, large.clip, pvt.warmup) == (None, 1.0, pytest.approx(5 / 300))
    rates = [block.drop_path.p for block in built(replace(SETTINGS["deit"], drop_path=0.2)).stages[0]]
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert LAYERS["agent_attention"].slot == "attention"
    assert PAPER.auto[0] == "small"
