"""NASNet against timm, and its cells, schedule and search by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.search.nasnet import nasnet
from paperworks.papers.search.nasnet.nasnet import (
    NORMAL_A,
    OPERATIONS,
    PAPER,
    REDUCTION_A,
    VARIANTS,
    Cell,
    Config,
    Controller,
    NASNet,
    Pool,
    Reduce,
    Shape,
    loss,
    operation,
    parsed,
    ppo,
    searched,
    sizes,
    spelled,
    uniform,
    written,
)
from paperworks.papers.search.nasnet.weights import PUBLISHED, SOURCES
from paperworks.tasks.trials import Trial
from peers import macs, relative

TOLERANCE = 1e-4
KNOWN = {"large": (88_753_150, 23.8, 331, 1000), "mobile": (5_289_978, 0.564, 224, 1000)}
"""Parameters, 10^9 multiply-adds as the paper has them, image side, classes."""
LITTLE = replace(VARIANTS["large"], filters=16, stem_filters=16)


def built(config: Config, side: int = 32, classes: int = 7) -> NASNet:
    torch.manual_seed(0)
    return NASNet(3, classes, side, config).eval()


def randomised(peer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Conv2d):  # so strong that the image is not lost on its way
            nn.init.normal_(module.weight, 0, (2 * len(module.weight) / module.weight.numel()) ** 0.5)
    return peer.eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    parameters, multiply_adds, side, classes = KNOWN[name]
    with torch.device("meta"):
        net = NASNet(3, classes, side, VARIANTS[name]).eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert macs(net, side) / 1e9 == pytest.approx(multiply_adds, rel=0.02)


UNLIKE = {
    "5 @ 1538": (replace(VARIANTS["7at1920"], repeats=5, filters=64), 12.26, 10.9, 2.69, 299, 1000),
    "7 @ 1920": (VARIANTS["7at1920"], 24.61, 22.6, 5.37, 299, 1000),
    "7 @ 2304": (VARIANTS["cifar_7at2304"], 32.59, 27.6, 5.15, 32, 10),
}
"""Of the nets that were not released: 10^6 parameters, ours and the paper's, our 10^9 multiply-adds, image side, classes."""


def test_nets_that_were_released_have_the_papers_size_and_the_others_have_not(evidence):
    """What the note says of the others: too large, on ImageNet by the same number of times F squared, whatever N is."""
    excess = {}
    for name, (config, millions, papers, billions, side, classes) in UNLIKE.items():
        with torch.device("meta"):
            net = NASNet(3, classes, side, config).eval()
        count = sum(p.numel() for p in net.parameters()) / 1e6
        assert (count, macs(net, side) / 1e9) == (pytest.approx(millions, abs=0.005), pytest.approx(billions, abs=0.005))
        excess[name] = (count - papers) / config.filters**2
    assert excess["5 @ 1538"] == pytest.approx(excess["7 @ 1920"], rel=0.1)
    with torch.device("meta"):
        cifar = NASNet(3, 10, 32, VARIANTS["cifar_6at768"])
        fewer = NASNet(3, 10, 32, replace(VARIANTS["cifar_7at2304"], repeats=6))  # section 4.1: N is 4 or 6
    assert sum(p.numel() for p in cifar.parameters()) == 3_346_538
    assert sum(p.numel() for p in fewer.parameters()) / 1e6 == pytest.approx(28.2, abs=0.05)
    evidence.property(
        "large and mobile: the paper's multiply-adds, parameters exact; 6 @ 768: 3.3 million",
        "large 与 mobile：乘加次数与论文一致，参数量完全相同；6 @ 768：3.3 百万",
    )


# --- Another implementation


class Inside(nn.Module):
    """An average of stride 2 over what lies inside the map, by counting it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = [((n % 2 + 1) // 2, 1) for n in x.shape[2:]]
        padding = (*pads[1], *pads[0])
        ones = F.pad(torch.ones_like(x), padding)
        return F.avg_pool2d(F.pad(x, padding), 3, 2) / F.avg_pool2d(ones, 3, 2)


@torch.inference_mode()
@pytest.mark.parametrize("side", [75, 97])
def test_outputs_equal_timms(evidence, side):
    """timm pads by hand before averages of stride 2 and counts the zeros; TensorFlow, for which the weights were trained, does not."""
    peer = randomised(timm.create_model("nasnetalarge", stem_size=16, num_features=24 * 16, num_classes=7))
    assert isinstance(peer, nn.Module)
    net = built(LITTLE)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), LITTLE))
    image = torch.randn(2, 3, side, side)
    before = peer(image)
    assert relative(before[0], before[1]) > 0.01
    for cell in (peer.cell_stem_0, peer.cell_stem_1, peer.reduction_cell_0, peer.reduction_cell_1):
        cell.comb_iter_2_left = Inside()
    theirs, features = peer(image), peer.forward_intermediates(image, intermediates_only=True)
    error = relative(net(image)["logits"], theirs)
    assert error < TOLERANCE < relative(before, theirs)
    rows = max(map(relative, net.pyramid(image), features[2:]))
    assert rows < TOLERANCE
    net.rows[1][2].operations[0][1].weight *= 1.1  # a perturbed weight is seen
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(
        against=f"timm {timm.__version__} nasnetalarge at 16 filters, {side} pixels, its stride-2 averages without padding", error=error
    )
    evidence.fidelity(against=f"timm {timm.__version__} nasnetalarge, outputs of all rows, {side} pixels", error=rows)


@torch.inference_mode()
def test_outputs_equal_timms_as_it_is_where_zeros_count(evidence, monkeypatch):
    peer = randomised(timm.create_model("nasnetalarge", stem_size=16, num_features=24 * 16, num_classes=7))
    net = built(LITTLE)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), LITTLE))
    ours = Pool.forward

    def counting(self: Pool, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "max" or self.stride == 1:
            return ours(self, x)
        pads = [nasnet.spare(n, 3) for n in x.shape[2:]]
        return F.avg_pool2d(F.pad(x, (*pads[1], *pads[0])), 3, 2)

    monkeypatch.setattr(Pool, "forward", counting)
    image = torch.randn(1, 3, 96, 96)
    error = relative(net(image)["logits"], peer(image))
    assert error < TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} nasnetalarge as it is, ours counting the padding of stride-2 averages", error=error)


def test_published_weights_are_where_timm_says():
    published = PUBLISHED["large"]
    theirs = timm.get_pretrained_cfg("nasnetalarge.tf_in1k")
    assert published.repo == "timm/nasnetalarge.tf_in1k"
    assert (published.mean, published.std, published.classes) == (theirs.mean, theirs.std, theirs.num_classes)
    assert theirs.license.lower() in published.licence.lower()


# --- Cells


@torch.inference_mode()
def test_normal_cell_by_hand(evidence):
    cell = randomised(Cell(parsed(NORMAL_A), Shape(5, 1), Shape(6, 1), 4, 1, 0.0, 1e-3))
    h, p = torch.randn(2, 5, 9, 9), torch.randn(2, 6, 9, 9)
    a, b, ops = cell.squeeze(h), cell.align(p), cell.operations
    average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    blocks = [ops[0](a) + ops[1](b), ops[2](b) + ops[3](b), average(a) + b, average(b) + average(b), ops[8](a) + a]
    torch.testing.assert_close(cell(h, p), torch.cat([b, *blocks], 1))
    assert [m.kernel_size[0] for i in (0, 1, 2, 3, 8) for m in ops[i] if isinstance(m, nn.Conv2d) and m.groups > 1] == [5, 5, 3, 3] * 2 + [
        3,
        3,
    ]
    evidence.property(
        "the normal cell is that of figure 4, by hand; its output is p and the five blocks",
        "普通单元就是图 4 的单元，与手算相等；输出是 p 和五个块",
    )


@torch.inference_mode()
def test_reduction_cell_by_hand(evidence):
    cell = randomised(Cell(parsed(REDUCTION_A), Shape(5, 1), Shape(6, 1), 4, 2, 0.0, 1e-3))
    h, p = torch.randn(2, 5, 9, 9), torch.randn(2, 6, 9, 9)
    a, b, ops = cell.squeeze(h), cell.align(p), cell.operations
    first = ops[0](a) + ops[1](b)
    second = F.max_pool2d(a, 3, 2, 1) + ops[3](b)
    third = F.avg_pool2d(a, 3, 2, 1, count_include_pad=False) + ops[5](b)
    fourth = second + F.avg_pool2d(first, 3, 1, 1, count_include_pad=False)
    fifth = ops[8](first) + F.max_pool2d(a, 3, 2, 1)
    torch.testing.assert_close(cell(h, p), torch.cat([second, third, fourth, fifth], 1))
    assert cell(h, p).shape == (2, 16, 5, 5)
    evidence.property(
        "the reduction cell is that of figure 4, by hand; its output is the last four blocks",
        "降采样单元就是图 4 的单元，与手算相等；输出是后四个块",
    )


@torch.inference_mode()
def test_a_separable_convolution_is_applied_twice_and_relu_comes_first(evidence):
    layer = randomised(operation("sep5", 3, 4, 2, 1e-3))
    image = x = torch.randn(1, 3, 9, 9)
    weights = [m for m in layer if isinstance(m, nn.Conv2d)]
    norms = [m for m in layer if isinstance(m, nn.BatchNorm2d)]
    for i, (stride, norm) in enumerate(zip((2, 1), norms)):
        x = F.conv2d(F.relu(x), weights[2 * i].weight, stride=stride, padding=2, groups=x.shape[1])
        x = norm(F.conv2d(x, weights[2 * i + 1].weight))
    torch.testing.assert_close(layer(image), x)
    evidence.property(
        "separable convolutions: ReLU, depthwise, pointwise, norm, twice; the stride in the first",
        "可分离卷积：ReLU、深度卷积、逐点卷积、归一化，做两次；步长在第一次",
    )


@torch.inference_mode()
def test_reducing_loses_no_column(evidence):
    """Every cell of the map reaches the output: even ones by the first path, odd ones by the second."""
    reduce = randomised(Reduce(2, 4, 1e-3))
    for side in (6, 7):
        x = torch.randn(1, 2, side, side)
        for row in range(side):
            changed = x.clone()
            changed[:, :, row, row] += 1
            different = (reduce(changed) != reduce(x)).nonzero()[:, 1].unique().tolist()
            assert different == ([0, 1] if row % 2 == 0 else [2, 3])
    evidence.property(
        "factorised reduction: two shifted 1x1 paths, no cell is lost",
        "因子化降采样：两条错开一个像素的 1x1 通路，不漏任何像素",
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_or_halves_the_map(name):
    for side, stride in product((8, 9), (1, 2)):
        out = operation(name, 4, 6, stride, 1e-3).eval()(torch.randn(1, 4, side, side))
        assert out.shape == (1, 6, -(-side // stride), -(-side // stride))


@torch.inference_mode()
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_pooling_of_stride_2_pads_as_tensorflow(side, kernel):
    """SAME padding: on even sides one more behind than before."""
    x = torch.randn(1, 2, side, side)
    before, after = nasnet.spare(side, kernel)
    assert before + after == max((-(-side // 2) - 1) * 2 + kernel - side, 0)
    padded = F.pad(x, (before, after) * 2, value=-torch.inf)
    torch.testing.assert_close(Pool("max", kernel, 2)(x), F.max_pool2d(padded, kernel, 2))


def test_cells_are_text():
    for text in (NORMAL_A, REDUCTION_A):
        blocks, outputs = parsed(text)
        assert len(blocks) == 5
        assert text.startswith(written(blocks) + ";")
        assert parsed(written(blocks)).outputs != outputs  # the official nets break the rule of unused states
    blocks, outputs = parsed("sep3(h)|max3(h), b0+conv1x7(h)")
    assert outputs == [1, 3]
    cell = Cell(parsed("sep3(h)|max3(h), avg3(h)+conv1x7(h)"), Shape(4, 1), Shape(4, 1), 4, 2, 0.0, 1e-3)
    assert cell.made == Shape(12, 2)  # p reduced, the concatenated block brought to F, the second block
    assert cell(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)).shape == (1, 12, 4, 4)


@pytest.mark.parametrize("text", ["sep3(h)", "sep3(h)+b0", "blur3(h)+p", "sep3(h)*p", "", "h+p; b3"])
def test_bad_cells_are_refused(text):
    with pytest.raises(InputError, match="cell"):
        parsed(text)


def test_scheduled_drop_path(evidence):
    net = built(replace(VARIANTS["test"], repeats=2, drop_path=0.4)).train()
    cells = [c for c in net.modules() if isinstance(c, Cell)]
    assert sorted(c.drop_path for c in cells) == pytest.approx([0.4 * i / 8 for i in range(1, 9)])
    deepest = max(cells, key=lambda c: c.drop_path)
    assert deepest is net.rows[2][1]
    chances = []
    for share in (0.0, 0.5, 0.75):
        for c in cells:
            c.advance(share)
        chances.append(deepest.now)
    assert chances == pytest.approx([0, 0.2, 0.3])
    h, p = torch.randn(600, 24, 2, 2), torch.randn(600, 24, 2, 2)
    deepest = Cell(parsed("avg3(h)+p; b0"), Shape(24, 1), Shape(24, 1), 24, 1, 0.5, 1e-3).train()
    deepest.advance(1.0)
    added = deepest(h, p) - p
    kept = added.abs().amax((1, 2, 3)) > 1e-6
    assert 0.4 < kept.float().mean() < 0.6  # an operation's result goes or stays for an image; the identity always stays
    torch.testing.assert_close(added[kept], 2 * deepest.operations[0](deepest.squeeze(h))[kept], rtol=1e-4, atol=1e-5)
    evidence.property(
        "ScheduledDropPath grows with depth and over training; per image, never of the identity",
        "ScheduledDropPath 的丢弃概率随深度、也随训练增长；逐图丢弃，恒等从不被丢弃",
    )


def test_the_cell_after_a_reduction():
    """In the large net it takes what the reduction took as p; in the others what the reduction took as h."""
    seen: dict[str, torch.Tensor] = {}
    for skip in (True, False):
        net = built(replace(VARIANTS["test"], repeats=2, skip=skip))
        first, second = net.rows[0]
        first.register_forward_hook(lambda m, i, o: seen.__setitem__("first", o))
        second.register_forward_hook(lambda m, i, o: seen.__setitem__("second", o))
        net.rows[1][0].register_forward_hook(lambda m, i, o: seen.__setitem__("p", i[1]))
        net(torch.randn(1, 3, 32, 32))
        assert seen["p"] is seen["first" if skip else "second"]


def test_auxiliary_classifier():
    config = replace(VARIANTS["test"], auxiliary=0.4)
    net = built(config, 128).train()
    out = net(torch.randn(2, 3, 128, 128))
    label = torch.tensor([1, 2])
    terms = loss(config)(out, {"label": label})
    torch.testing.assert_close(terms["loss"], F.cross_entropy(out["logits"], label) + 0.4 * F.cross_entropy(out["auxiliary"], label))
    assert set(net.eval()(torch.randn(1, 3, 128, 128))) == {"logits"}


@pytest.mark.parametrize("name", ["mobile", "small", "test"])
def test_pyramid(name):
    side = VARIANTS[name].image_size or 64
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        features = net.pyramid(torch.zeros(1, 3, side, side))
        assert net.embed(torch.zeros(2, 3, side, side)).shape == (2, net.embedding)
    assert [tuple(f.shape) for f in features] == [(1, w, -(-side // s), -(-side // s)) for w, s in zip(net.widths, net.strides)]


# --- The search


def test_probabilities_of_all_sequences_sum_to_one(evidence):
    torch.manual_seed(0)
    controller = Controller([2, 2, 3, 3, 2], hidden=8)
    for value in controller.parameters():
        nn.init.normal_(value, 0, 1)
    every = torch.tensor(list(product(*map(range, controller.choices))))
    _, logs, entropy = controller(len(every), given=every)
    assert float(logs.sum(1).exp().sum().detach()) == pytest.approx(1, abs=1e-5)
    again, drawn, _ = controller(500, generator=torch.Generator().manual_seed(0))
    _, taught, _ = controller(500, given=again)
    torch.testing.assert_close(drawn, taught)
    assert 0 < float(entropy.detach()) < 1.2
    evidence.property(
        "the controller's probabilities over all sequences sum to 1; drawn and given decisions have the same ones",
        "控制器对所有序列的概率之和为 1；同样的决定，无论抽取还是给定，概率都相同",
    )


def test_decisions_spell_cells():
    config = VARIANTS["small"]
    assert sizes(config)[:10] == [2, 2, 13, 13, 2, 3, 3, 13, 13, 2]
    assert searched(config) == ["normal", "reduction"]
    generator = torch.Generator().manual_seed(0)
    for decisions in uniform(sizes(config) * 2, 20, generator).tolist():
        cells = spelled(decisions, config)
        for text in cells.values():
            assert written(parsed(text).blocks) == text
    net = built(replace(config, **cells), 32)
    assert net(torch.randn(1, 3, 32, 32))["logits"].shape == (1, 7)
    half = replace(config, reduction=REDUCTION_A)
    assert set(spelled(uniform(sizes(half), 1, generator)[0].tolist(), half)) == {"normal"}


def test_ppo_learns_a_table(evidence):
    """Reward for one operation in one place; random search stays where it is, and so does a controller without a reward."""
    choices = [2, 2, 4, 4, 1]

    def late(reward: Callable[[list[int]], float]) -> float:
        torch.manual_seed(0)
        tried, _ = ppo(
            Controller(choices),
            lambda drawn: [reward(d) for d in drawn],
            300,
            per_update=5,
            lr=5e-3,
            generator=torch.Generator().manual_seed(0),
        )
        return sum(d[2] == 3 for d in tried[-60:]) / 60

    assert late(lambda d: float(d[2] == 3)) > 0.6
    assert late(lambda d: 0.5) < 0.5
    evidence.property(
        "PPO raises the share of what is rewarded in a tabulated space, and does not without a reward",
        "在列成表的空间里，PPO 提高受奖励者的比例；没有奖励则不会",
    )


class Table:
    """Trials that only look at how many separable convolutions a cell has."""

    seed = 3

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def run(self, candidates: Sequence[Mapping[str, Any]], *, variant: str | None = None, begin: Any = None) -> list[Trial]:
        self.seen += candidates
        return [
            Trial(settings=c, value=f"{c['normal']} {c['reduction']}".count("sep"), seconds=0, network=nn.Identity()) for c in candidates
        ]

    def value(self, network: nn.Module) -> float:
        return 0.0


def test_find_hands_over_the_best_cells_and_repeats_itself(evidence):
    assert PAPER.search is not None
    config = VARIANTS["small"]
    one, two = Table(), Table()
    found = PAPER.search.find(config, one)
    assert found == PAPER.search.find(config, two)
    assert len(one.seen) == config.candidates == PAPER.search.trials(config)
    best = max(f"{c['normal']} {c['reduction']}".count("sep") for c in one.seen)
    assert f"{found['normal']} {found['reduction']}".count("sep") == best > 0
    assert all(c["repeats"] == 1 for c in one.seen)  # searched shallow, stacked deeper
    assert [PAPER.search.trials(VARIANTS[name]) for name in ("large", "mobile", "test")] == [0, 0, 0]
    assert PAPER.search.trials(replace(config, **found)) == 0
    evidence.property(
        "a search trains as many candidates as it says, in shallow nets, and hands over the best of them; same seed, same cells",
        "搜索训练的候选数与声明的一致，用的是浅网络，交出其中最好的；种子相同，单元相同",
    )
