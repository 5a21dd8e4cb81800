"""DLA against timm, its segmentation network against numbers of the official code, and the trees by hand."""

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

from paperworks.papers.backbones.dla.claim import ARMS, CLAIM
from paperworks.papers.backbones.dla.dla import DLA, VARIANTS, Bilinear, Block, Config, DLAUp, Node, Segmenter, Tree, recipe
from paperworks.papers.backbones.dla.weights import NAMES, PUBLISHED, SOURCES
from peers import check_pyramid, check_timms, macs, randomised_norms, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "dla.json").read_text())
RULE = runpy.run_path(str(FIXTURES / "dla_record.py"))
KNOWN = {
    "34": (15_742_104, 3.1),
    "46_c": (1_301_400, 0.58),
    "60": (22_036_632, 4.2),
    "102": (33_268_888, 7.2),
    "169": (53_389_720, 11.6),
    "x_46_c": (1_068_440, 0.54),
    "x_60_c": (1_319_832, 0.59),
    "x_60": (17_352_344, 3.5),
    "x_102": (26_309_272, 5.9),
    "x_102_64": (41_282_200, 9.3),
}
"""Parameters without the unused projections, and 10^9 multiply-adds at 224 pixels as the paper's and PaddleClas' tables round them."""


def built(config: Config, side: int = 64, classes: int = 5) -> DLA:
    torch.manual_seed(0)
    return DLA(3, classes, side, config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, classes=1000)
    parameters, multiply_adds = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert macs(net, 224) / 1e9 == pytest.approx(multiply_adds, rel=0.02)


def test_every_variant_of_the_paper_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)
    assert NAMES.keys() == KNOWN.keys()


def test_arms_of_the_claim_have_equal_parameters():
    counts = [sum(p.numel() for p in built(replace(VARIANTS["small"], **arm), 32, 10).parameters()) for arm in ARMS.values()]
    assert counts == [1_031_146, 1_031_874]


# --- timm


@pytest.mark.parametrize("name", ["34", "46_c", "x_60_c", "102"])
def test_outputs_equal_timms(evidence, name):
    peer = randomised_norms(timm.create_model(NAMES[name]))
    net = built(VARIANTS[name], 224, classes=1000)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), VARIANTS[name]))
    image = torch.randn(1, 3, 64, 64)
    theirs = peer(image)
    error = relative(net(image)["logits"], theirs)
    assert error < TOLERANCE
    net.stages[3].tree.root.merge[0].weight[:, 3] *= 3  # a perturbed weight is seen
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} {NAMES[name]}", error=error)


def test_features_equal_timms(evidence):
    peer = randomised_norms(timm.create_model("dla46_c"))
    net = built(VARIANTS["46_c"], 224, classes=1000)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), VARIANTS["46_c"]))
    image = torch.randn(2, 3, 64, 96)
    theirs = peer.forward_intermediates(image, intermediates_only=True)
    ours = net.levels(image)
    assert len(ours) == len(theirs) == 6
    error = max(map(relative, ours, theirs))
    assert error < TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(net.pyramid(image), ours[2:]))
    evidence.fidelity(against=f"timm {timm.__version__} dla46_c, outputs of all six levels", error=error)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_where_timm_says(name):
    check_timms(PUBLISHED[name])


# --- The official code


def converted(name: str) -> tuple[DLA, Segmenter, dict[str, torch.Tensor]]:
    """The classifier and the segmentation network with the fixture's weights, and those."""
    given = FIXTURE["settings"][name]
    config = Config(
        depths=tuple(given["levels"][2:]),
        widths=tuple(given["channels"]),
        block="basic" if given["block"] == "BasicBlock" else "bottleneck",
        residual_root=given.get("residual_root", False),
    )
    theirs = {key: RULE["draw"](key, tuple(shape)) for key, shape in FIXTURE["networks"][name]["shapes"].items()}
    base = built(config, classes=FIXTURE["classes"])
    base.load_state_dict(SOURCES["official"]({k[5:]: v for k, v in theirs.items() if k.startswith("base.")}, config))
    net = Segmenter(base, FIXTURE["classes"]).eval()
    up = {}
    for key, value in theirs.items():
        if key.startswith("dla_up."):
            _, step, part, *rest = key.split(".")
            step = step.removeprefix("ida_")
            kind, _, number = part.partition("_")
            index = int(number) - (kind == "node")
            up[".".join([step, {"proj": "project", "up": "up", "node": "nodes"}[kind], str(index), *rest])] = value
    net.up.steps.load_state_dict(up)
    net.head.load_state_dict({"weight": theirs["fc.0.weight"], "bias": theirs["fc.0.bias"]})
    return base, net, theirs


@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_equal_the_official_code(evidence, name):
    base, net, _ = converted(name)
    golden, image = FIXTURE["networks"][name], RULE["draw"]("image", tuple(FIXTURE["input"]))
    error = relative(base(image)["logits"].flatten(), torch.tensor(golden["logits"]))
    pixels = net(image)["logits"]
    assert pixels.shape == (2, FIXTURE["classes"], 64, 96)
    whole = relative(pixels[:, :, ::9, ::9].flatten(), torch.tensor(golden["enlarged"]))
    before = net.head(net.up(base.levels(image)[1:]))[:, :, ::8, ::8].flatten()
    half = relative(before, torch.tensor(golden["pixels"]))
    assert max(error, whole, half) < TOLERANCE
    where = f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}"
    evidence.fidelity(against=f"{where} dla.py, {name}", error=error)
    evidence.fidelity(against=f"{where} dla_up.py DLASeg, {name}", error=max(whole, half))
    net.up.steps[1].nodes[0][0].weight[:, 1] *= 2  # a perturbed weight is seen
    assert relative(net(image)["logits"][:, :, ::9, ::9].flatten(), torch.tensor(golden["enlarged"])) > TOLERANCE


def test_official_projections_of_deep_trees_are_not_used(evidence):
    """What they are does not matter there, as the equal outputs show; here they do not exist."""
    _, net, theirs = converted("basic")
    unused = [
        key
        for key in theirs
        if ".project." in key and key.startswith(("base.level3.project", "base.level4.project", "base.level4.tree1.project"))
    ]
    assert len(unused) == 3 * 6
    surplus = sum(theirs[key].numel() for key in unused if key.endswith(("weight", "bias")))
    ours = sum(p.numel() for p in net.parameters())
    assert ours + surplus == FIXTURE["networks"]["basic"]["parameters"]
    evidence.property(
        "parameters of the official segmentation network = ours and the projections that deep trees never use",
        "官方分割网络的参数量 = 我们的参数量加上深树从不使用的投影",
    )


# --- Mechanisms


def test_a_tree_of_depth_three_by_hand(evidence):
    """Figure 2 (f): each left half's node feeds the right half, and every deepest right root sees all of them."""
    config = Config(widths=(4, 4, 4), residual_root=False)
    tree = randomised_norms(Tree(3, 5, 6, 2, 7, config))
    x, above = torch.randn(2, 5, 16, 16), torch.randn(2, 7, 8, 8)
    blocks = [m for m in tree.modules() if isinstance(m, Block)]
    nodes = [m for m in tree.modules() if isinstance(m, Node)]
    assert (len(blocks), len(nodes)) == (8, 4)
    b, n = iter(blocks), iter(nodes)

    def pair(x, *more):
        one = next(b)(x)
        two = next(b)(one)
        return next(n)([two, one, *more])

    first = pair(x)
    second = pair(first, first)
    third = pair(second)
    fourth = pair(third, above, second, third)
    assert torch.equal(tree(x, (above,)), fourth)
    assert [node.merge[0].in_channels for node in nodes] == [12, 18, 12, 12 + 7 + 6 + 6]
    evidence.property(
        "a tree of depth 3 by hand: 8 blocks, 4 nodes, merged nodes at the right ends, the stage's input at the last",
        "手算深度为 3 的树：8 个块、4 个节点，合并的节点在右端，阶段的输入接到最后一个节点",
    )


def test_children_are_not_kept_between_calls():
    tree = randomised_norms(Tree(2, 4, 4, 1, 0, Config(widths=(4, 4, 4))))
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(tree(x), tree(x))


@pytest.mark.parametrize("residual", [False, True])
def test_node_is_equations_3_and_4(evidence, residual):
    node = randomised_norms(Node(9, 4, residual))
    children = [torch.randn(2, n, 5, 5) for n in (4, 3, 2)]
    y = node.merge[1](F.conv2d(torch.cat(children, 1), node.merge[0].weight))
    torch.testing.assert_close(node(children), (y + residual * children[0]).relu())
    if residual:
        evidence.property(
            "node: one 1x1 convolution of all children, batch norm, the first child added where asked for, ReLU",
            "节点：对全部子节点做一次 1×1 卷积，批归一化，需要时加上第一个子节点，ReLU",
        )


@pytest.mark.parametrize(
    ("kind", "groups", "inner"), [("basic", 1, 8), ("bottleneck", 1, 4), ("bottleneck", 32, 64), ("bottleneck", 64, 128)]
)
def test_blocks(kind, groups, inner):
    width = 64 if groups > 1 else 8
    block = randomised_norms(Block(6, width, 2, Config(block=kind, groups=groups)))
    x = torch.randn(2, 6, 8, 8)
    assert block.branch[0][0].out_channels == (width if kind == "basic" else inner)
    pooled = F.max_pool2d(x, 2)
    shortcut = block.shortcut[1][1](F.conv2d(pooled, block.shortcut[1][0].weight))
    torch.testing.assert_close(block(x), (block.branch(x) + shortcut).relu())
    assert isinstance(Block(8, 8, 1, Config()).shortcut[1], nn.Identity)


def test_iterative_aggregation_hands_the_stages_input_to_its_root(evidence):
    net = randomised_norms(built(Config(depths=(1, 2, 1), widths=(4, 6, 8, 10, 12))))
    assert [stage.pool is None for stage in net.stages] == [True, False, False]
    stage, x = net.stages[1], torch.randn(1, 8, 8, 8)
    root = stage.tree.right.root
    seen = []
    root.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    stage(x)
    assert torch.equal(seen[0][2], F.max_pool2d(x, 2))
    assert torch.equal(seen[0][3], stage.tree.left(x))
    root.merge[0].weight[:, 20:28] = 0  # the weights that read it
    changed = stage(x)
    root.merge[0].weight[:, 20:28] = 1
    assert relative(stage(x), changed) > 0.01
    evidence.property(
        "from the second tree on, the last root also merges the stage's pooled input",
        "从第二棵树起，最后的根还融合该阶段池化后的输入",
    )


def test_blocks_in_a_row_are_the_same_blocks_without_nodes():
    deep, plain = (built(Config(depths=(1, 2, 1), widths=(4, 6, 8, 10, 12), aggregation=a)) for a in ("deep", "plain"))
    kinds = [
        [(m.branch[0][0].in_channels, m.branch[0][0].out_channels) for m in net.modules() if isinstance(m, Block)] for net in (deep, plain)
    ]
    assert kinds[0] == kinds[1]
    assert not [m for m in plain.modules() if isinstance(m, Node)]


# --- Dense prediction


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_upsampling_starts_bilinear(evidence, factor):
    up = Bilinear(2, factor)
    row = torch.tensor(FIXTURE["bilinear"][str(factor)])  # the first of the official weights
    torch.testing.assert_close(up.weight[1, 0], torch.outer(row, row) / row[0])
    x = torch.rand(1, 2, 6, 7)
    inside = F.interpolate(x, scale_factor=factor, mode="bilinear")[:, :, factor:-factor, factor:-factor]
    torch.testing.assert_close(up(x)[:, :, factor:-factor, factor:-factor], inside)
    if factor == 8:
        evidence.property(
            "up-sampling weights are the official ones, and bilinear interpolation away from the border",
            "上采样权重与官方的相同，离开边界处即双线性插值",
        )


def test_dla_up_merges_from_coarse_to_fine(evidence):
    """The wiring of figure 4 with sums in place of nodes: running sums from each map on, over what the turn before gave."""
    up = DLAUp((1, 1, 1, 1)).eval()
    for step in up.steps:
        for node in step.nodes:
            node.forward = lambda x: x.sum(1, keepdim=True)
    counts = []
    for i in range(4):
        maps = [torch.full((1, 1, 64 >> j, 64 >> j), float(i == j)) for j in range(4)]
        counts.append(round(float(up(maps)[0, 0, 32, 32])))
    # (a, b, c, d) -> (c + d); (b + c, b + 2c + d); (a + b, a + 2b + c, a + 3b + 3c + d)
    assert counts == [1, 3, 3, 1]
    evidence.property(
        "wiring of DLAUp: how often each map arrives at the output, by hand",
        "DLAUp 的连线：每张特征图到达输出的次数与手算一致",
    )


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_segmentation_network_gives_pixels(ratio):
    base = built(Config(depths=(1, 1, 1), widths=(4, 6, 8, 10, 12)))
    assert Segmenter(base, 3, ratio).eval()(torch.randn(1, 3, 32, 48))["logits"].shape == (1, 3, 32, 48)
    assert Segmenter(base, 3, ratio).grid.multiple == 16


@pytest.mark.parametrize(("name", "side"), [("34", 224), ("small", 32), ("small", 96)])
def test_pyramid(name, side):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert net.strides == (4, 8, 16, 32)[: len(net.strides)]


# --- Training


def test_recipe_is_the_papers():
    r = recipe(VARIANTS["34"])
    assert r.lr / r.batch_size == pytest.approx(0.1 / 256)
    assert (r.optimizer, r.momentum, r.weight_decay, r.schedule, r.decay_at) == ("sgd", 0.9, 1e-4, "step", (0.25, 0.5, 0.75))


def test_rule_of_the_claim():
    def results(deep, plain):
        return {"deep": {"top1": deep}, "plain": {"top1": plain}}

    low, high = [0.30, 0.31, 0.30, 0.32], [0.36, 0.36, 0.37, 0.37]
    assert CLAIM.holds(results(high, low))
    assert not CLAIM.holds(results(low, low))
    assert not CLAIM.holds(results(low, high))
