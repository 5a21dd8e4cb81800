"""NAS with reinforcement learning: its networks, cells, controller and gradient by hand; there is no official code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.search.nas_rl.nas_rl import (
    PAPER,
    VARIANTS,
    Config,
    Controller,
    ConvNet,
    Layer,
    RecurrentConfig,
    RowReader,
    Sentence,
    TreeCell,
    concatenated,
    controller_of,
    depth,
    parsed,
    parsed_tree,
    reinforce,
    spelled,
    written,
    written_tree,
)
from paperworks.tasks.trials import Trial
from peers import relative

TOLERANCE = 1e-4


def every(controller: Controller, layers: int) -> list[Sentence]:
    """All sentences about so many layers."""
    choices = [*controller.kinds * layers, *controller.tail]
    bits = list(range(layers)) if controller.skips else []
    found = []
    for tokens in product(*map(range, choices)):
        for reads in product(*(product((False, True), repeat=i) for i in bits)):
            found.append(Sentence(list(tokens), [list(r) for r in reads]))
    return found


def peaked(controller: Controller) -> Controller:
    """With opinions that are far from uniform."""
    torch.manual_seed(3)
    for value in controller.parameters():
        nn.init.normal_(value, 0, 0.7)
    return controller


# --- Networks


@torch.inference_mode()
def test_a_network_is_what_its_text_says(evidence):
    text = "3x5x4/2, 1x3x6@1, 5x1x3@1+2, 3x3x2"
    torch.manual_seed(0)
    net = ConvNet(3, 7, 16, replace(VARIANTS["test"], architecture=text)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)

    def layer(i: int, x: torch.Tensor, padding: tuple[int, int], stride: int = 1) -> torch.Tensor:
        conv, norm, _ = net.layers[i]
        x = F.conv2d(x, conv.weight, stride=stride, padding=padding)
        mean, scale = norm.running_mean[:, None, None], norm.weight / (norm.running_var + 1e-5).sqrt()
        return F.relu((x - mean) * scale[:, None, None] + norm.bias[:, None, None])

    image = torch.randn(2, 3, 16, 16)
    one = layer(0, image, (1, 2), stride=2)
    two = layer(1, one, (0, 1))
    three = layer(2, torch.cat([one, two], 1), (2, 0))
    four = layer(3, image, (1, 1))  # no input is chosen: the image
    last = torch.cat([F.pad(three, (4, 4, 4, 4)), four], 1)  # what nobody reads; the smaller map with zeros around it
    theirs = F.linear(last.mean((2, 3)), net.head.weight, net.head.bias)
    error = relative(net(image)["logits"], theirs)
    assert error < TOLERANCE
    assert (net.widths, net.strides, net.embedding) == ((5,), (1,), 5)
    net.layers[1][0].weight[0] *= 1.2
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(against="section 3.3 by hand: inputs joined in depth, image where none, unread layers to the classifier", error=error)


def test_smaller_maps_get_zeros():
    large, small = torch.ones(1, 1, 5, 4), torch.ones(1, 2, 2, 3)
    out = concatenated([large, small])
    assert out.shape == (1, 3, 5, 4)
    assert out[0, 1].sum() == 6
    assert out[0, 1, 1:3, 0:3].sum() == 6


def test_networks_are_text():
    text = "3x5x4/2, 1x3x6@1, 5x1x3@1+2, 3x3x2"
    assert parsed(text)[2] == Layer(5, 1, 3, 1, (1, 2))
    assert written(parsed(text)) == text


@pytest.mark.parametrize("text", ["3x3", "3x3x4@1", "3x3x4, 3x3x4@2", "2x3x4", "3x3x0", "3x3x4/0", ""])
def test_bad_networks_are_refused(text):
    with pytest.raises(InputError):
        parsed(text)


def test_pooling_and_sizes():
    net = ConvNet(3, 4, 32, replace(VARIANTS["test"], architecture="3x3x4, 5x5x6@1, 3x3x8/3@2", pool_after=(1,)))
    (map_,) = net.pyramid(torch.zeros(1, 3, 32, 32))
    assert map_.shape == (1, 8, 6, 6)
    assert net.strides == (5,)


@pytest.mark.parametrize("name", ["v1", "v2", "small", "test"])
def test_interface(name):
    with torch.device("meta"):
        net = ConvNet(3, 10, 32, VARIANTS[name]).eval()
        (map_,) = net.pyramid(torch.zeros(2, 3, 32, 32))
        assert (map_.shape[1], net.embed(torch.zeros(2, 3, 32, 32)).shape) == (net.widths[0], (2, net.embedding))


# --- Recurrent cells


def test_the_cell_of_figure_5(evidence):
    """Section 3.4's example, written out with the paper's symbols."""
    torch.manual_seed(0)
    cell = TreeCell(5, 4, parsed_tree("add tanh, mult relu, mult sigmoid; add relu 0 1"))
    x, h, c = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 4)
    (w1, w3), (b1, b3), (w2, w4) = cell.input.weight.chunk(2), cell.input.bias.chunk(2), cell.hidden.weight.chunk(2)
    a0 = torch.tanh(x @ w1.T + b1 + h @ w2.T)
    product_ = (x @ w3.T + b3) * (h @ w4.T)
    a1 = torch.relu(product_)
    a0 = torch.relu(a0 + c)
    new_h, new_c = cell(x, h, c)
    torch.testing.assert_close(new_h, torch.sigmoid(a0 * a1))
    torch.testing.assert_close(new_c, product_)  # in front of the activation
    evidence.property(
        "the recurrent cell of figure 5 by hand: injection of the memory, and the new memory in front of the activation",
        "图 5 的循环单元与手算相等：记忆的注入，以及取自激活之前的新记忆",
    )


def test_trees_of_more_leaves():
    config = RecurrentConfig(base=4, hidden=6, image_size=8)
    controller = controller_of(config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        sentence, _ = controller(depth(config, 0), generator=generator)
        text = spelled(sentence, config)
        assert written_tree(parsed_tree(text)) == text
        assert len(parsed_tree(text).nodes) == 7
    net = RowReader(3, 5, 8, replace(config, architecture=text))
    assert net(torch.randn(2, 3, 8, 8))["logits"].shape == (2, 5)
    image = torch.randn(1, 3, 8, 8)
    assert not torch.equal(net.embed(image), net.embed(image.flip(2)))  # rows are read in order


@pytest.mark.parametrize("text", ["add tanh; add relu 0 1", "add tanh, mult relu; add relu 0 0", "add swish; add relu 0 0", "add tanh", ""])
def test_bad_trees_are_refused(text):
    with pytest.raises(InputError, match="recurrent cell"):
        parsed_tree(text)


# --- The controller


@pytest.mark.parametrize("skips", [True, False])
def test_probabilities_of_all_sentences_sum_to_one(evidence, skips):
    controller = peaked(Controller((2, 2), skips=skips, tail=() if skips else (2,), hidden=6))
    sentences = every(controller, 3)
    logs = torch.stack([controller(3, given=sentence)[1] for sentence in sentences]).detach()
    assert len(sentences) == 64 * (8 if skips else 2)
    assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-4)
    again, log = controller(3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(log, controller(3, given=again)[1])
    if skips:
        evidence.property("probabilities of all sentences, skip connections included, sum to 1", "所有句子（含跳跃连接）的概率之和为 1")


def test_skips_are_chosen_by_attention_over_anchors(evidence):
    """P(j feeds i) = sigmoid(v tanh(W_prev h_j + W_curr h_i)), and the choices are independent given the anchors."""
    controller = peaked(Controller((2,), skips=True, hidden=5))
    seen: list[torch.Tensor] = []
    controller.v.register_forward_hook(lambda module, given, output: seen.append(output[:, 0].detach()))
    tokens = [1, 0, 1]
    base = Sentence(tokens, [[], [False], [False, False]])
    reference = controller(3, given=base)[1].detach()
    scores = seen[-1]
    assert scores.shape == (2,)
    for j in range(2):
        reads = [False, False]
        reads[j] = True
        other = controller(3, given=Sentence(tokens, [[], [False], reads]))[1].detach()
        torch.testing.assert_close(other - reference, scores[j], rtol=1e-4, atol=1e-4)  # log(p / (1 - p)) is the score
    evidence.property(
        "set-selection attention: each earlier layer by its own Bernoulli, with the score as log-odds",
        "选出集合的注意力：前面的每一层各有自己的伯努利变量，得分就是对数几率",
    )


def test_reinforce_is_the_gradient_of_the_expected_reward(evidence):
    """Exact over all sentences of a small space: sum of P (R - b) grad log P equals grad sum of P R, for any baseline b."""
    controller = peaked(Controller((2, 3), skips=True, hidden=4))
    sentences = every(controller, 2)
    rewards = torch.rand(len(sentences), generator=torch.Generator().manual_seed(0))
    parameters = list(controller.parameters())

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)])

    logs = torch.stack([controller(2, given=sentence)[1] for sentence in sentences])
    exact = gradient((logs.exp() * rewards).sum())
    for baseline in (0.0, 0.7):
        error = relative(gradient((logs.exp().detach() * (rewards - baseline) * logs).sum()), exact)
        assert error < 1e-3
    assert relative(gradient((logs.exp().detach() * rewards * logs.exp()).sum()), exact) > 0.01
    evidence.property(
        "REINFORCE equals the exact gradient of the expected reward in a tabulated space, with and without a baseline",
        "在列成表的空间里，REINFORCE 的梯度等于期望奖励的精确梯度，有无基线都是如此",
    )


def test_one_step_of_reinforce(monkeypatch):
    """The first step follows (1/m) sum of (R - b) grad log P, b the mean of the first rewards."""
    controller = peaked(Controller((3,), skips=False, hidden=4))
    start = [p.detach().clone() for p in controller.parameters()]
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    generator = torch.Generator().manual_seed(0)
    value = lambda sentence: float(sentence.tokens[0] == 1) + 0.1 * sentence.tokens[1]  # noqa: E731
    drawn, rewards = reinforce(
        controller, lambda new: [value(s) for s in new], 4, layers=lambda done: 2, per_update=4, lr=0.1, decay=0.9, generator=generator
    )
    moved = [p.detach().clone() for p in controller.parameters()]
    with torch.no_grad():
        for p, before in zip(controller.parameters(), start):
            p.copy_(before)
    b = sum(rewards) / 4
    assert len(set(rewards)) > 1
    loss = sum((b - r) * controller(2, given=s)[1] for s, r in zip(drawn, rewards)) / 4
    for before, after, g in zip(start, moved, torch.autograd.grad(loss, list(controller.parameters()), allow_unused=True)):
        torch.testing.assert_close(after, before if g is None else before - 0.1 * g)


def test_the_controller_learns_a_table(evidence):
    def late(reward: bool) -> float:
        torch.manual_seed(0)
        controller = Controller((4,), skips=True)
        drawn, _ = reinforce(
            controller, lambda new: [float(s.tokens[1] == 2) * reward for s in new], 300, layers=lambda done: 2, per_update=5, lr=0.01,
            decay=0.9, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return sum(s.tokens[1] == 2 for s in drawn[-60:]) / 60

    assert late(True) > 0.6
    assert late(False) < 0.5
    evidence.property(
        "REINFORCE raises the share of what is rewarded, and does not without a reward",
        "REINFORCE 提高受奖励者的比例；没有奖励则不会",
    )


def test_depth_schedule():
    config = Config()
    assert [depth(replace(config, layers=9), done) for done in (0, 1599, 1600, 3200, 12_800)] == [6, 6, 8, 9, 9]
    assert [depth(VARIANTS["small"], done) for done in (0, 3, 4, 8, 11)] == [3, 3, 4, 5, 5]


def test_random_search_draws_evenly():
    controller = peaked(Controller((2,), skips=True, hidden=4))
    generator = torch.Generator().manual_seed(0)
    drawn = [controller(2, generator=generator, uniform=True)[0] for _ in range(400)]
    for share in (sum(s.tokens[0] for s in drawn) / 400, sum(s.skips[1][0] for s in drawn) / 400):
        assert 0.42 < share < 0.58


# --- The search


class Table:
    """Trials that only count the filters that an architecture names."""

    seed = 2

    def __init__(self) -> None:
        self.seen: list[str] = []

    def run(self, candidates: Sequence[Mapping[str, Any]], *, variant: str | None = None, begin: Any = None) -> list[Trial]:
        names = [c["architecture"] for c in candidates]
        self.seen += names
        return [Trial(settings=c, value=n.count("32") / 10, seconds=0, network=nn.Identity()) for c, n in zip(candidates, names)]

    def value(self, network: nn.Module) -> float:
        return 0.0


@pytest.mark.parametrize("name", ["small", "rows"])
def test_find_hands_over_the_best_and_repeats_itself(evidence, name):
    assert PAPER.search is not None
    config = VARIANTS[name]
    one, two = Table(), Table()
    found = PAPER.search.find(config, one)
    assert found == PAPER.search.find(config, two)
    assert len(one.seen) == len(set(one.seen)) <= PAPER.search.trials(config) == config.candidates
    assert found["architecture"].count("32") == max(n.count("32") for n in one.seen)
    assert PAPER.search.trials(replace(config, **found)) == 0
    if name == "small":
        assert [len(parsed(n)) for n in one.seen] == [3] * 4 + [4] * 4 + [5] * 4  # the depth schedule
        evidence.property(
            "a search trains as many candidates as it says, by the depth schedule, and hands over the best; same seed, same network",
            "搜索训练的候选数与声明的一致，层数按日程增加，交出其中最好的；种子相同，网络相同",
        )
