"""Auto-DeepLab: the found network against the released code, decoding against a port and brute force, the supernet and its search by hand."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.search.auto_deeplab.auto_deeplab import (
    FOUND,
    OPERATIONS,
    PAPER,
    VARIANTS,
    AutoDeepLab,
    Cell,
    Config,
    Shape,
    Supernet,
    Term,
    doubled,
    edges,
    find,
    halved,
    operation,
    parsed,
    paths,
    recipe,
    strongest,
    transitions,
    viterbi,
    written,
)
from paperworks.tasks import task
from paperworks.train.api import fit
from paperworks.train.search import divided
from peers import relative

GOLDEN = json.loads((Path(__file__).parent / "fixtures/auto_deeplab.json").read_text())
TABLE = {"s": (10.15e6, 333.25), "m": (21.62e6, 460.93), "l": (44.42e6, 695.03)}
"""Parameters and 10^9 multiply-adds of table 2, on images of 1024 x 2048."""
LITTLE = replace(VARIANTS["small"], layers=3, blocks=2, stem=(4, 4, 8), search_filters=2)
LEAST = replace(LITTLE, layers=2, blocks=1)


def supernet(config: Config = LITTLE, spread: float = 1.0) -> Supernet:
    """One with opinions, whose norms have something to say."""
    torch.manual_seed(0)
    net = Supernet(1, 3, config)
    nn.init.normal_(net.alpha, 0, spread)
    nn.init.normal_(net.beta, 0, spread)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


# --- The found network


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_those_of_table_2(name, evidence):
    parameters, multiply_adds = TABLE[name]
    with torch.device("meta"):
        net = AutoDeepLab(3, 19, VARIANTS[name]).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 1025, 2049))
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e4) == round(parameters / 1e4)
    assert count == GOLDEN["sizes"][name]["parameters"]
    # TensorFlow's profiler counts convolutions with a rate as it computes them, on maps padded to a multiple of the rate; ours counts the map.
    theirs, ours = GOLDEN["sizes"][name]["multiply_adds"], counter.get_total_flops() / 2e9
    assert theirs == pytest.approx(multiply_adds, rel=0.02)
    assert ours < theirs < 1.04 * ours
    evidence.property(
        f"{name}: the paper's parameters to four digits, those of the released code exactly",
        f"{name}：参数量与论文的四位数字一致，与发布的代码完全相同",
    )


def tensorflow(name: str) -> str:
    """The released code's name of a tensor."""
    *path, last = name.split(".")
    kind = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}[last]
    match path:
        case ["stem", *place]:
            layer = {"0.0": "conv0", "0.1": "conv0_bn", "0.3": "conv1", "0.4": "conv1_bn", "1.1": "conv2", "1.2": "conv2_bn"}[
                ".".join(place)
            ]
            return f"hnasnet/{layer}/{kind if layer.endswith('bn') else 'weights'}"
        case ["cells", cell, "squeeze" | "align" as where, step]:
            layers = {"squeeze": ("1x1/weights", "beginning_bn"), "align": ("prev_1x1/weights", "prev_bn")}[where]
            return f"hnasnet/cell_{cell}/{layers[0] if step == '1' else f'{layers[1]}/{kind}'}"
        case ["cells", cell, "operations", block, side, step]:
            term = parsed(FOUND).blocks[int(block)][int(side)].operation
            scope = f"hnasnet/cell_{cell}/comb_iter_{block}/{('left', 'right')[int(side)]}"
            size = f"{term[3]}x{term[3]}"
            if term.startswith("atr"):
                return f"{scope}/atrous_{size}/weights" if step == "1" else f"{scope}/bn_atr_{size}/{kind}"
            times, place = divmod(int(step), 4)
            if place == 3:
                return f"{scope}/bn_sep_{size}_{times + 1}/{kind}"
            return f"{scope}/separable_{size}_{times + 1}/{('', 'depthwise', 'pointwise')[place]}_weights"
        case ["pooling", "convs", "4", step]:
            return f"image_pooling/{'weights' if step == '1' else f'BatchNorm/{kind}'}"
        case ["pooling", "convs", branch, step]:
            return f"aspp{branch}/{'weights' if step == '0' else f'BatchNorm/{kind}'}"
        case ["head"]:
            return f"logits/semantic/{'weights' if last == 'weight' else 'biases'}"
        case ["pooling", "project", step]:
            scope = "concat_projection"
        case ["low", step]:
            scope = "decoder/feature_projection0"
        case ["decoder", layer, step]:
            scope = f"decoder/decoder_conv0/decoder_conv0_{int(layer) + 1}"
        case _:
            raise AssertionError(name)
    return f"{scope}/{'weights' if step == '0' else f'BatchNorm/{kind}'}"


def rule(name: str, ours: Tensor) -> Tensor:
    """The fixture's weights, in our order of axes."""
    theirs = tensorflow(name)
    rng, last = np.random.default_rng(zlib.crc32(theirs.encode())), theirs.rsplit("/", 1)[1]
    shape = tuple(ours.shape)
    if last in ("gamma", "moving_variance"):
        return torch.from_numpy(rng.uniform(0.5, 1.5, shape))
    if last in ("beta", "moving_mean", "biases"):
        return torch.from_numpy(rng.normal(0, 0.2, shape))
    o, i, h, w = shape
    if last == "depthwise_weights":
        return torch.from_numpy(rng.normal(0, np.sqrt(2 / (h * w)), (h, w, o, i))).permute(2, 3, 0, 1)
    value = torch.from_numpy(rng.normal(0, np.sqrt(2 / (h * w * i)), (h, w, i, o))).permute(3, 2, 0, 1)
    # There the mean over the image comes first of what is side by side, here last.
    return value.roll(-i // 5, 1) if theirs == "concat_projection/weights" else value


@torch.no_grad()
def test_output_equals_the_released_code(evidence):
    net = AutoDeepLab(3, 5, Config(filters=4)).eval()
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len({tensorflow(name) for name in state}) == len(state) == GOLDEN["variables"]
    for name, value in state.items():
        value.copy_(rule(name, value))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 65, 97, 3)).transpose(0, 3, 1, 2)).float()
    theirs = torch.tensor(GOLDEN["output"])
    error = relative(net(x)["logits"].flatten()[::41], theirs)
    assert error < 1e-4
    evidence.fidelity(against=GOLDEN["official"] + ", hnasnet with pooling and decoder, F = 4", error=error)
    net.cells[9].operations[4][1][1].weight *= 1.1  # pyright: ignore[reportIndexIssue]
    assert relative(net(x)["logits"].flatten()[::41], theirs) > 1e-4


@torch.no_grad()
def test_halving_an_atrous_convolution_is_a_stride(evidence):
    """The released code resizes bilinearly with aligned corners, 2 n + 1 to n + 1, and convolves with rate 1."""
    for kernel in (3, 5):
        x = torch.randn(2, 4, 17, 25)
        step = operation(f"atr{kernel}", 4, stride=2).eval()
        half = F.interpolate(F.relu(x), (9, 13), mode="bilinear", align_corners=True)
        torch.testing.assert_close(step[1](F.relu(x)), F.conv2d(half, step[1].weight, padding=kernel // 2), atol=1e-5, rtol=1e-5)  # pyright: ignore
    evidence.property(
        "an atrous convolution of stride 2 is the released code's: bilinear to half, then rate 1",
        "步长为 2 的空洞卷积与发布的代码相同：先双线性缩小一半，再以空洞率 1 卷积",
    )


@torch.no_grad()
@pytest.mark.parametrize("name", OPERATIONS[1:])
def test_every_operation_keeps_or_halves_the_map(name):
    x = torch.randn(1, 4, 9, 17)
    assert operation(name, 4).eval()(x).shape == x.shape
    assert operation(name, 4, stride=2).eval()(x).shape == (1, 4, 5, 9)
    assert doubled(operation(name, 4, stride=2).eval()(x)).shape == x.shape


@torch.no_grad()
def test_cell_by_hand(evidence):
    """From stride 16 up to 8, with p at stride 32: h is enlarged before its convolution, p brought to its size."""
    torch.manual_seed(0)
    cell = Cell([(Term("atr3", 1), Term("max3", 0)), (Term("skip", 2), Term("sep5", 1))], Shape(6, 2), Shape(5, 3), 1, 4, 0.0).eval()
    h, p = torch.randn(2, 6, 9, 5), torch.randn(2, 5, 5, 3)
    a = cell.squeeze(F.interpolate(h, (17, 9), mode="bilinear", align_corners=True))
    b = cell.align(F.interpolate(p, (17, 9), mode="bilinear", align_corners=True))
    first = cell.operations[0][0](b) + F.max_pool2d(a, 3, 1, 1)  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(cell(h, p), torch.cat([first, first + cell.operations[1][1](b)], 1))  # pyright: ignore[reportIndexIssue]
    evidence.property("a cell that goes to a finer resolution, by hand", "通往更高分辨率的单元，与手算相等")


def test_the_decoder_takes_the_last_map_of_stride_4():
    """Cell 3 of the found network; the stem's where the path leaves at once."""
    blocks = FOUND.partition(";")[2]
    for path, fine in (("4 4 4 8 4", 4), ("8 16", 1), ("4 4", 3)):
        with torch.device("meta"):
            net = AutoDeepLab(3, 5, Config(architecture=f"{path};{blocks}", filters=2, features=8))
            assert net.maps(torch.zeros(1, 3, 65, 65))[net.fine].shape[2:] == (17, 17)
        assert net.fine == fine


def test_scheduled_drop_path(evidence):
    net = AutoDeepLab(1, 2, VARIANTS["test"]).train()
    cells = [c for c in net.cells if isinstance(c, Cell)]
    assert [c.drop_path for c in cells] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    for share in (0.0, 0.5):
        for c in cells:
            c.advance(share)
        assert [c.now for c in cells] == pytest.approx([share * c.drop_path for c in cells])
    cell = Cell([(Term("max3", 0), Term("skip", 1))], Shape(4, 0), Shape(4, 0), 0, 4, 0.5).train()
    cell.advance(1.0)
    h, p = torch.randn(500, 4, 3, 3), torch.randn(500, 4, 3, 3)
    with torch.no_grad():
        dropped = (cell(h, p) - cell.align(p)).abs().amax((1, 2, 3)) < 1e-6
    assert 0.4 < dropped.float().mean() < 0.6
    evidence.property(
        "ScheduledDropPath grows with depth and over training; the skip connection is never dropped",
        "ScheduledDropPath 的丢弃概率随深度、也随训练增长；跳跃从不被丢弃",
    )


def test_one_image_cannot_be_learned_from():
    for config in (VARIANTS["test"], LITTLE):
        net = PAPER.build(SimpleNamespace(channels=1, classes=("a", "b")), config)  # pyright: ignore[reportArgumentType]
        with pytest.raises(InputError, match="batch_size"):
            net.train()(torch.zeros(1, 1, 33, 33))


# --- Architectures as text, and the space


def test_architectures_are_text():
    path, blocks = parsed(FOUND)
    assert path == [0, 0, 0, 1, 2, 1, 2, 2, 3, 3, 2, 1]
    assert [term.state for block in blocks for term in block] == [1, 0, 1, 0, 3, 1, 4, 2, 3, 5]
    assert written(parsed(FOUND)) == FOUND


@pytest.mark.parametrize("path", ["4 16", "16", "5", "", "8 8 32"])
def test_bad_paths_are_refused(path):
    with pytest.raises(InputError, match="no path"):
        parsed(f"{path}; skip(h)+skip(p)")


@pytest.mark.parametrize("cell", ["", "skip(h)", "zero(h)+skip(p)", "skip(h)+skip(b0)", "sep7(h)+skip(p)", "sep3+skip(p)"])
def test_bad_cells_are_refused(cell):
    with pytest.raises(InputError, match="cell"):
        parsed(f"4 4; {cell}")


def test_the_space_has_the_papers_size(evidence):
    """Section 5.1: 5.6 10^14 cells (any two inputs for each block, in order, each with one of eight operations).

    Of paths it counts 2.9 10^4: those of eleven free layers. With stride 4 or 8 for the first of twelve, as section 3.2 has it, there are more.
    """
    assert sum(1 for _ in paths(11)) == 28_657
    assert sum(1 for _ in paths(12)) == 75_025
    assert prod((2 + block) ** 2 * len(OPERATIONS) ** 2 for block in range(5)) == pytest.approx(5.6e14, rel=0.01)
    assert sorted(paths(2)) == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    evidence.property(
        "the space has 5.6e14 cells as the paper says; its 2.9e4 paths are those of eleven free layers",
        "搜索空间有 5.6e14 种单元，与论文所说一致；论文的 2.9e4 条路径是十一层自由选择的数目",
    )


# --- Decoding (section 4.3)


def test_beta_is_normalised_over_outgoing_arrows(evidence):
    beta = torch.randn(6, 4, 3)
    found = transitions(beta)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, 4))
    assert not found[:, 0, 0].any() and not found[:, 3, 2].any()
    torch.testing.assert_close(found[:, 0, 1], (beta[:, 0, 1] - beta[:, 0, 2]).sigmoid())
    torch.testing.assert_close(found[:, 1], beta[:, 1].softmax(-1))
    evidence.property(
        "beta: softmax over the arrows that leave a node, two at the border",
        "beta：从一个节点出发的箭头上的 softmax，边界节点只有两条",
    )


def test_viterbi_equals_brute_force(evidence):
    for seed in range(30):
        table = transitions(torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(seed)) * 2)

        def chance(path: list[int], table: Tensor = table) -> float:
            return prod(float(table[i, a, b - a + 1]) for i, (a, b) in enumerate(zip([0, *path], path)))

        assert viterbi(table) == max(paths(6), key=chance)
    assert sum(chance(path) for path in paths(6)) == pytest.approx(1)
    evidence.property(
        "Viterbi equals the best of all paths; their probabilities sum to 1",
        "Viterbi 的结果等于所有路径中最好的一条；所有路径的概率之和为 1",
    )


def test_decoding_equals_a_port(evidence):
    """The port multiplies the arrows of border nodes by 2/3 and counts p as state 0; its cells may hold the operation zero."""
    names = ("zero", "max3", "avg3", "skip", "sep3", "sep5", "atr3", "atr5")
    assert names == OPERATIONS
    different = 0
    for case in GOLDEN["decoded"]:
        rng = np.random.default_rng(case["seed"])
        alpha, beta = torch.tensor(rng.normal(size=(20, 8))), torch.tensor(rng.normal(size=(12, 4, 3))).float()
        table = transitions(beta)
        different += viterbi(table) != case["path"]
        table[:, 0] *= 2 / 3
        table[:, 3] *= 2 / 3
        assert viterbi(table) == case["path"]
        swapped = {0: 1, 1: 0}
        rows = [edges(5).index((block, swapped.get(state, state))) for block, state in edges(5)]
        for block, found in enumerate(strongest(alpha.softmax(-1)[rows], 5)):
            theirs = [(swapped.get(row - sum(2 + b for b in range(block)), row - sum(2 + b for b in range(block))), op)
                      for row, op in case["cell"][2 * block : 2 * block + 2]]  # fmt: skip
            assert [term.state for term in found] == [state for state, _ in theirs]
            assert all(op == 0 or OPERATIONS[op] == term.operation for term, (_, op) in zip(found, theirs))
    assert different  # the factor changes paths
    evidence.property(
        f"paths and cells of 20 random alpha and beta equal {GOLDEN['decoder']} with its factor of 2/3 at the border",
        f"对 20 组随机的 alpha 和 beta，路径和单元都与 {GOLDEN['decoder']} 一致（加上它在边界处的 2/3 因子）",
    )


def test_zero_never_wins():
    alpha = torch.full((2, 8), 0.01)
    alpha[0, 0], alpha[0, 4], alpha[1, 7] = 0.9, 0.05, 0.06
    assert strongest(alpha, 1) == [(Term("atr5", 1), Term("sep3", 0))]


# --- The supernet (section 4.1)


@torch.no_grad()
def test_supernet_is_equations_1_to_6(evidence):
    """Arrow by arrow and edge by edge; in the network all arrows into a node pass its cell as one batch."""
    net, x = supernet(), torch.randn(2, 1, 33, 65)
    alpha, beta = net.alpha.softmax(-1), transitions(net.beta)
    last, before = {0: net.stem[1](net.stem[0](x))}, {}
    for layer, row in enumerate(net.nodes):
        new = {}
        for name, node in row.items():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            level, total = int(name), torch.zeros(())
            assert set(node.arrows) == {str(s) for s in (level - 1, level, level + 1) if s in last}
            for source, arrow in node.arrows.items():
                h = last[int(source)]
                states = [arrow(doubled(h)) if int(source) > level else arrow(h), node.before(before[level]) if level in before else None]
                for block in range(2):
                    total_block = torch.zeros(())
                    for state, value in enumerate(states):
                        k = edges(2).index((block, state))
                        if value is not None:
                            steps = node.edges[str(k)].operations
                            total_block = total_block + sum(alpha[k, 1 + i] * step(value) for i, step in enumerate(steps))
                    states.append(total_block)
                total = total + beta[layer, int(source), level - int(source) + 1] * torch.cat(states[2:], 1)
            new[level] = total
        before, last = last, new
    assert set(last) == {0, 1, 2, 3}
    expected = sum(F.interpolate(net.poolings[str(k)](v), (33, 65), mode="bilinear", align_corners=True) for k, v in last.items())
    error = relative(net(x)["logits"], expected)
    assert error < 1e-5
    evidence.property("the supernet equals equations 1 to 6, arrow by arrow and edge by edge", "超网等于公式 1 到 6，逐箭头、逐边核对")


@torch.no_grad()
def test_one_hot_supernet_is_one_path_and_one_operation_per_edge(evidence):
    net, x = supernet(), torch.randn(1, 1, 33, 33)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)  # so that nothing comes of nothing: nodes off the path give no map
    path, choice = [1, 1, 2], [4, 1, 6, 3, 7]
    nn.init.constant_(net.alpha, -1e4)
    nn.init.constant_(net.beta, -1e4)
    for row, op in enumerate(choice):
        net.alpha[row, op] = 1e4
    for layer, (at, to) in enumerate(zip([0, *path], path)):
        net.beta[layer, at, to - at + 1] = 1e4
    assert net.decoded().startswith("8 8 16;")
    maps, h = {}, net.stem[1](net.stem[0](x))
    for layer, to in enumerate(path):
        node = net.nodes[layer][str(to)]  # pyright: ignore[reportIndexIssue]
        source = path[layer - 1] if layer else 0
        states = [node.arrows[str(source)](h), None]
        if node.before is not None:
            states[1] = node.before(
                maps[layer - 2] if layer > 1 and path[layer - 2] == to else torch.zeros(1, node.before[1].in_channels, *states[0].shape[2:])
            )
        for block in range(2):
            rows = [(k, state) for k, (b, state) in enumerate(edges(2)) if b == block and states[state] is not None]
            states.append(torch.stack([node.edges[str(k)].operations[choice[k] - 1](states[state]) for k, state in rows]).sum(0))
        h = maps[layer] = torch.cat(states[2:], 1)
    seen = {}
    for level, head in net.poolings.items():
        head.register_forward_pre_hook(lambda m, i, level=level: seen.__setitem__(int(level), i[0]))
    net(x)
    assert relative(seen[2], h) < 1e-5
    assert seen[1].any()  # not all else is shut: the node beside the path has the path's map of two layers ago as p
    evidence.property(
        "with one-hot alpha and beta, what the path 8 8 16 ends with is the path alone, with one operation on each edge",
        "alpha 和 beta 取独热时，路径 8 8 16 末端的结果就是这条路径单独的结果，每条边只有一个操作",
    )


def test_every_parameter_of_the_supernet_learns():
    net = supernet().train()
    net(torch.randn(2, 1, 33, 33))["logits"].square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.alpha.grad is not None and net.alpha.grad.any(-1).all()


# --- The search (section 4.2)


class Watched:
    """A data set that notes which items are asked for."""

    def __init__(self, data: Any) -> None:
        self.inner, self.asked = data, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def training_sample(self, item: Any, *rest: Any) -> Any:
        self.asked.append(item.name)
        return self.inner.training_sample(item, *rest)


def test_weights_and_architecture_learn_in_turn_from_different_items(blobs: Path, monkeypatch: pytest.MonkeyPatch, evidence):
    data, log = Watched(divided(task("segmentation")(blobs))), []
    for kind in (torch.optim.SGD, torch.optim.Adam):

        def step(self: Any, inner: Any = kind.step, name: str = kind.__name__) -> None:
            values = [p for group in self.param_groups for p in group["params"]]
            old = [p.detach().clone() for p in values]
            inner(self)
            log.append((name, len(values), any(not torch.equal(a, b) for a, b in zip(old, values)), frozenset(data.asked)))
            data.asked.clear()

        monkeypatch.setattr(kind, "step", step)
    told: list[int] = []
    trials: Any = SimpleNamespace(data=data, steps=6, seed=0, recipe=recipe(LEAST), stepped=told.append)
    found = find(LEAST, trials)
    assert told == [2, 3, 4, 6]  # of six steps, after each of four rounds
    assert [name for name, *_ in log] == ["SGD"] * 2 + ["SGD", "Adam"] * 2
    assert {count for name, count, *_ in log if name == "Adam"} == {2}
    assert all(changed for _, _, changed, _ in log)
    one, other = (set().union(*(items for name, *_, items in log if name == kind)) for kind in ("SGD", "Adam"))
    assert one and other and not one & other
    assert one | other <= {item.name for item in data.train}
    assert len(parsed(found["architecture"]).path) == 2
    assert found == find(LEAST, trials)
    evidence.property(
        "first weights alone, then weights and architecture in turn, from halves of the images that do not overlap",
        "先只学权重，再轮流学权重和结构，分别用互不重叠的两半图像",
    )


def test_halves_keep_groups_whole():
    items = [SimpleNamespace(name=f"{group}{i}", group=group) for group in "abcdef" for i in range(3)]
    one, other = halved(items, torch.Generator().manual_seed(0))
    assert len(one) == len(other) == 9
    assert not {i.group for i in one} & {i.group for i in other}


def test_training_begins_with_the_search(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"layers": 2, "blocks": 1, "stem": (4, 4, 8), "search_filters": 2, "filters": 2, "features": 8, "patch": 32, "batch_size": 2}
    batches = []
    forward = Supernet.forward
    monkeypatch.setattr(Supernet, "forward", lambda self, image: batches.append(tuple(image.shape)) or forward(self, image))
    run = fit("auto_deeplab", blobs, tmp_path / "run", variant="small", steps=6, settings=settings, precision="fp32")
    assert {(2, 1, 33, 33)} == set(batches), "--set batch_size and patch hold for the search too"  # 32 k + 1
    assert isinstance(run.network(), AutoDeepLab)
    assert len(run.request.settings["architecture"].split(";")[0].split()) == 2
    assert run.record["steps"] == 3
    with pytest.raises(InputError, match="trains one network"):
        fit("auto_deeplab", blobs, tmp_path / "shared", variant="small", steps=6, settings=settings, ray="local")
    assert PAPER.search is not None and PAPER.search.trials(VARIANTS["s"]) == 0 < PAPER.search.trials(VARIANTS["small"])
