"""Auto-Keras: distances against numbers of the official code, morphism, kernel and search by hand and by brute force."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paperworks.errors import InputError
from paperworks.papers.search.autokeras.autokeras import (
    PAPER,
    VARIANTS,
    Edit,
    Network,
    Plan,
    Process,
    Skip,
    acquire,
    at_random,
    edit_distance,
    edited,
    edits,
    grown,
    inherit,
    layers_distance,
    morph,
    parsed,
    skips_distance,
)
from paperworks.tasks.trials import Trial
from peers import relative

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "autokeras.json").read_text())
TEXTS = ["6p, 6, 8p", "6p, 8, 8p, 8; 1+3, 1|4, 2|4, 2+4", "4, 6p, 6, 5, 4p; 1+3, 2+4, 3|5, 1|5"]


def filled(text: str, seed: int = 0) -> Network:
    """A network in evaluation mode whose norms have something to say."""
    torch.manual_seed(seed)
    network = Network(3, 4, 16, parsed(text)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return network


# --- Network morphism


@torch.inference_mode()
@pytest.mark.parametrize("text", TEXTS)
def test_every_edit_keeps_the_function(evidence, text):
    parent, image = filled(text), torch.randn(2, 3, 16, 16)
    theirs, generator = parent(image)["logits"], torch.Generator().manual_seed(0)
    assert relative(theirs[0], theirs[1]) > 0.01  # the image is seen
    every = edits(parent.plan, 2**20)
    assert {edit.kind for edit in every} == {"deep", "wide", "add", "concat"}
    worst = 0.0
    for edit in every:
        child = Network(3, 4, 16, edited(parent.plan, edit)).eval()
        assert relative(child(image)["logits"], theirs) > 1e-3  # with its own weights it is another function
        morph(parent, child, edit, generator)
        worst = max(worst, relative(child(image)["logits"], theirs))
    assert worst < 1e-5
    evidence.fidelity(against=f"the network before the edit, all {len(every)} edits of {text}", error=worst)


@torch.inference_mode()
def test_a_path_of_edits_keeps_the_function(evidence):
    parent, image = filled(TEXTS[1]), torch.randn(2, 3, 16, 16)
    path, plan, chance = [], parent.plan, np.random.default_rng(0)
    for _ in range(8):
        possible = edits(plan, 2**20)
        path.append(possible[int(chance.integers(len(possible)))])
        plan = edited(plan, path[-1])
    child = Network(3, 4, 16, plan).eval()
    inherit(parent, path, 0)(child)
    error = relative(child(image)["logits"], parent(image)["logits"])
    assert len({edit.kind for edit in path}) > 2
    assert error < 1e-5
    evidence.property("eight edits in a row keep the function", "连续八次编辑后函数不变")


def test_copies_of_a_filter_part_ways_in_training():
    parent = filled("4, 6p, 4")
    child = Network(3, 4, 16, edited(parent.plan, Edit("wide", 1)))
    morph(parent, child, Edit("wide", 1), torch.Generator().manual_seed(0))
    first = child.layers[0][0].weight
    assert torch.equal(first[:4], first[4:])
    child.train()(torch.randn(2, 3, 16, 16))["logits"].square().sum().backward()
    assert not torch.allclose(first.grad[:4], first.grad[4:])


@torch.inference_mode()
def test_a_skip_reaches_its_layer():
    """After a pooling the skip is pooled as well; the sum is in front of the layer, what is concatenated lies behind it."""
    net = filled("4, 6p, 5; 1+3, 1|3")
    image = torch.randn(1, 3, 16, 16)
    one = net.layers[0](image)
    two = nn.functional.max_pool2d(net.layers[1](one), 2)
    small = nn.functional.max_pool2d(one, 2)
    three = net.layers[2](torch.cat([two + net.adds["1_3"](small), small], 1))
    torch.testing.assert_close(net(image)["logits"], net.head(three.mean((2, 3))))


def test_networks_are_text():
    for text in TEXTS:
        assert str(parsed(text)) == text
    plan = parsed(TEXTS[1])
    assert str(edited(plan, Edit("deep", 2))) == "6p, 8, 8, 8p, 8; 1+4, 1|5, 2|5, 2+5"
    assert str(edited(plan, Edit("wide", 3))) == "6p, 8, 16p, 8; 1+3, 1|4, 2|4, 2+4"
    assert str(edited(parsed("4, 4, 4"), Edit("concat", 1, 3))) == "4, 4, 4; 1|3"
    for text in TEXTS:
        weights = sum(p.numel() for name, p in Network(3, 4, 16, parsed(text)).named_parameters() if p.ndim == 4)
        assert parsed(text).size() == weights


@pytest.mark.parametrize("text", ["", "4, x", "4, 4; 1+2", "4, 4, 4; 1+4", "4, 4, 4; 0+2", "4, 4, 4; 1+3, 1+3", "4, 4, 4; 13"])
def test_bad_networks_are_refused(text):
    with pytest.raises(InputError):
        parsed(text)


def test_edits_stay_below_the_limit():
    plan = parsed("8, 8, 8")
    limit = plan.size() + 9 * 8 * 8
    found = edits(plan, limit)
    assert found
    assert all(edited(plan, edit).size() <= limit for edit in found)
    assert len(found) < len(edits(plan, 10**9))


# --- The kernel


def test_distances_equal_the_official_code(evidence):
    plans = [
        Plan(tuple(w), (False,) * len(w), tuple(Skip(u, v, "+" if add else "|") for u, v, add in skips)) for w, skips in FIXTURE["networks"]
    ]
    ours = np.array([[edit_distance(a, b) for b in plans] for a in plans])
    theirs = np.array(FIXTURE["distances"])
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert error < 1e-6
    half = np.array([[edit_distance(a, b, 0.5) for b in plans] for a in plans])
    assert np.linalg.norm(half - theirs) / np.linalg.norm(theirs) > 0.01
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, edit distances of {len(plans)} networks", error=error)


def test_distances_by_brute_force(evidence):
    """Layers: the cheapest of all matchings in order. Skips: the cheapest of all matchings."""

    def cheapest(a: Sequence[int], b: Sequence[int]) -> float:
        costs = []
        for n in range(min(len(a), len(b)) + 1):
            for left, right in itertools.product(itertools.combinations(a, n), itertools.combinations(b, n)):
                costs.append(sum(abs(x - y) / max(x, y) for x, y in zip(left, right)) + len(a) + len(b) - 2 * n)
        return min(costs)

    for one, two in itertools.product([(16, 32), (8, 64, 16), (16, 16, 32, 8)], repeat=2):
        plans = [Plan(w, (False,) * len(w)) for w in (one, two)]
        assert layers_distance(*plans) == pytest.approx(cheapest(one, two))
    one, two = parsed("4, 4, 4, 4, 4; 1+3, 2|5"), parsed("4, 4, 4, 4, 4; 1|3, 2+4, 3+5")
    costs = {(0, 1): (1 + 0) / (2 + 2), (0, 2): (2 + 0) / (3 + 2), (0, 0): 1, (1, 0): (1 + 1) / (2 + 3), (1, 1): 1, (1, 2): 1}
    best = min(costs[0, i] + costs[1, j] for i, j in itertools.permutations(range(3), 2))
    assert skips_distance(one, two) == pytest.approx(best + 1)
    assert edit_distance(one, one) == 0
    evidence.property("edit distances equal brute force over all matchings", "编辑距离等于对所有匹配的穷举结果")


def test_kernel_is_positive_semi_definite_and_the_process_interpolates(evidence):
    chance = np.random.default_rng(0)
    plans = [parsed("4, 4, 4")]
    for _ in range(12):
        plan = plans[int(chance.integers(len(plans)))]
        possible = edits(plan, 2**18)
        plans.append(edited(plan, possible[int(chance.integers(len(possible)))]))
    plans = list(dict.fromkeys(plans))
    values = [0.1 * len(p.widths) for p in plans]
    process = Process(plans[:-2], values[:-2], skip_weight=1.0, noise=1e-8)
    everything = process.kernel(process.embedded(plans), process.embedded(plans))
    assert np.linalg.eigvalsh(everything).min() > -1e-9
    np.testing.assert_allclose(np.diag(everything), 1)
    mean, deviation = process.predict(plans)
    np.testing.assert_allclose(mean[:-2], values[:-2], atol=1e-3)
    assert deviation[:-2].max() < 1e-2 < deviation[-2:].max()
    # the textbook's formulas
    k = everything[:-2, :-2] + 1e-8 * np.eye(len(plans) - 2)
    y = (np.array(values[:-2]) - process.mean) / process.scale
    expected = process.mean + process.scale * everything[-2:, :-2] @ np.linalg.solve(k, y)
    np.testing.assert_allclose(mean[-2:], expected, atol=1e-4)
    evidence.property(
        "the kernel after Bourgain's embedding is positive semi-definite; the process equals the textbook's posterior",
        "Bourgain 嵌入之后的核半正定；高斯过程等于教科书上的后验",
    )


def test_embedding_does_not_stretch_distances():
    plans = [parsed(text) for text in (*TEXTS, "4, 4, 4", "16, 4, 4p; 1+3")]
    process = Process(plans, [0.0, 1, 2, 3, 4], skip_weight=1.0)
    points = process.embedded(plans)
    for (a, p), (b, q) in itertools.combinations(zip(plans, points), 2):
        assert 0 < np.linalg.norm(p - q) <= edit_distance(a, b) + 1e-9


# --- The search


class Flat(Process):
    """A process that likes filters and is sure of it."""

    def predict(self, plans: Sequence[Plan]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([sum(p.widths) / 1000 for p in plans]), np.zeros(len(plans))


def test_the_tree_search_finds_what_the_acquisition_likes(evidence):
    config = replace(VARIANTS["small"], coldest=0.2, largest=2**16)
    plans = [parsed("4p, 4, 4"), parsed("4p, 4, 4; 1+3")]
    process = Flat(plans, [0.1, 0.2], skip_weight=1.0)
    choice = acquire(process, plans, [0.1, 0.2], config, np.random.default_rng(0))
    plan = plans[choice.parent]
    for edit in choice.path:
        plan = edited(plan, edit)
    assert plan == choice.plan  # the path leads there
    assert plan.size() <= config.largest
    single = max(sum(edited(p, e).widths) for p in plans for e in edits(p, config.largest))
    assert sum(plan.widths) > single  # it looks more than one edit ahead
    again = acquire(process, plans, [0.1, 0.2], config, np.random.default_rng(0))
    assert again == choice
    evidence.property(
        "the tree search goes several edits deep and returns a network of higher bound than any single edit",
        "树搜索一次走好几步编辑，返回的网络的上界高于任何单步编辑",
    )


def test_what_is_known_is_not_tried_again():
    plans = [parsed("4, 4, 4")]
    config = replace(VARIANTS["small"], coldest=0.5)
    for _ in range(3):
        choice = acquire(Process(plans, range(len(plans)), skip_weight=1.0), plans, [0.0] * len(plans), config, np.random.default_rng(0))
        assert choice.plan not in plans
        plans.append(choice.plan)
    for seed in range(20):
        assert at_random(plans, config, np.random.default_rng(seed)).plan not in plans
    with pytest.raises(InputError, match="largest"):
        acquire(Process(plans[:1], [0], skip_weight=1.0), plans[:1], [0.0], replace(config, largest=10), np.random.default_rng(0))


class Table:
    """Trials that train nothing: the value is the share of filters, and the networks are as they begin."""

    seed = 1

    def __init__(self) -> None:
        self.begun: list[bool] = []
        self.images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.outputs: dict[str, torch.Tensor] = {}

    def run(
        self,
        candidates: Sequence[Mapping[str, Any]],
        *,
        variant: str | None = None,
        begin: Sequence[Callable[[nn.Module], None]] | None = None,
    ) -> list[Trial]:
        found = []
        for i, candidate in enumerate(candidates):
            self.begun.append(begin is not None)
            plan = parsed(candidate["architecture"])
            network = Network(3, 4, 16, plan).eval()
            if begin:
                begin[i](network)
            with torch.inference_mode():
                self.outputs[str(plan)] = network(self.images)["logits"]
            found.append(Trial(settings=candidate, value=sum(plan.widths) / 1000, seconds=0, network=network))
        return found

    def value(self, network: nn.Module) -> float:
        return 0.0


def test_find(evidence):
    assert PAPER.search is not None
    config = replace(VARIANTS["small"], start="4p, 4, 4", candidates=5, coldest=0.3, largest=2**14)
    one, two, scratch = Table(), Table(), Table()
    torch.manual_seed(0)
    found = PAPER.search.find(config, one)
    torch.manual_seed(0)
    assert found == PAPER.search.find(config, two)
    assert one.begun == [False, True, True, True, True]
    assert len(one.outputs) == PAPER.search.trials(config) == 5
    assert sum(parsed(found["architecture"]).widths) == max(sum(parsed(text).widths) for text in one.outputs)
    first = one.outputs["4p, 4, 4"]
    assert all(relative(logits, first) < 1e-4 for logits in one.outputs.values())  # all of them descend from the first
    trials = grown(config, scratch, guided=False, inherited=False)
    assert len(trials) == 5
    assert not any(scratch.begun)
    assert PAPER.search.trials(replace(config, **found)) == 0
    evidence.property(
        "a search trains as many candidates as it says; each begins with the function of the network that it grew from",
        "搜索训练的候选数与声明的一致；每个候选开始时的函数都与其父网络相同",
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_interface(name):
    config = VARIANTS[name]
    net = Network(3, 10, 32, parsed(config.architecture or config.start)).eval()
    (features,) = net.pyramid(torch.zeros(2, 3, 32, 32))
    assert (features.shape[1], 32 // features.shape[2]) == (net.widths[0], net.strides[0])
    assert net.embed(torch.zeros(2, 3, 32, 32)).shape == (2, net.embedding)


def test_too_many_poolings_for_the_image():
    from paperworks.papers.search.autokeras.autokeras import build
    from paperworks.tasks.base import Spec

    spec = Spec(task="classification", channels=3, classes=("a", "b"), size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(InputError, match="pooled 7 times"):
        build(spec, replace(VARIANTS["small"], architecture=", ".join(["4p"] * 7)))
