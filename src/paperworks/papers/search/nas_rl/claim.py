"""Claim: the controller writes better networks as it learns; random search, of equal cost, does not (section 4.1).

``paperworks claim nas_rl``: a table of 32 small networks, about two minutes on one core, and then searches that only look values up. The space has two
layers; for each, height and width are 1 or 5, and the second reads the first or, as it reads nothing, the image. Every network of it is trained once
for 30 steps on four fifths of the training images, of 16 pixels, and valued on the others. Twenty controllers draw 200 networks each and
are paid the cubed accuracy; then the expected accuracy of what they would write next is summed exactly over all sentences. Random search's is the
table's mean. There is one table, and hence one seed of the trainings; what varies is the search.

It can fail: 300 images value a network with a standard error of about two points, so the table is partly noise; cubes of accuracies near 0.2 differ
by less than 0.01; 200 draws are few (the paper had 12,800). In so small a space both meet the best network, so best ones are metrics, not rule.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from statistics import fmean, stdev

import torch

from paperworks.papers.search.nas_rl.nas_rl import VARIANTS, Config, Sentence, controller_of, reinforce, spelled
from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 30
DRAWS = 200
SEARCHES = 20
SETTINGS = {"layers": 2, "first_layers": 2, "sides": (1, 5), "filters": (12,), "strides": (2,), "image_size": 16}
SPACE = replace(VARIANTS["small"], **SETTINGS)
SENTENCES = [
    Sentence([*first, 0, *second, 0], [[], [reads]])
    for first, second, reads in product(product((0, 1), repeat=2), product((0, 1), repeat=2), (False, True))
]

_tables: dict[int, dict[str, float]] = {}


def table(lab: Lab) -> dict[str, float]:
    """The value of every network, trained once."""
    assert isinstance(SPACE, Config)
    if lab.seed not in _tables:
        names = [spelled(sentence, SPACE) for sentence in SENTENCES]
        trials = lab.trials(variant="small", steps=STEPS, **SETTINGS).run([{"architecture": name} for name in names])
        _tables[lab.seed] = {name: trial.value for name, trial in zip(names, trials)}
    return _tables[lab.seed]


def search(arm: str, values: dict[str, float], seed: int) -> tuple[float, list[float]]:
    """Expected accuracy of what would be written next, and the accuracies of what was drawn."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    controller = controller_of(SPACE)
    accuracy = lambda sentence: values[spelled(sentence, SPACE)]  # noqa: E731
    if arm == "random":
        drawn = [controller(2, generator=generator, uniform=True)[0] for _ in range(DRAWS)]
        return fmean(values.values()), [accuracy(sentence) for sentence in drawn]
    drawn, _ = reinforce(
        controller, lambda new: [accuracy(sentence) ** 3 for sentence in new], DRAWS, layers=lambda done: 2, per_update=5,
        lr=SPACE.controller_lr, decay=SPACE.decay, generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        expected = sum(float(controller(2, given=sentence)[1].exp()) * accuracy(sentence) for sentence in SENTENCES)
    return expected, [accuracy(sentence) for sentence in drawn]


def run(lab: Lab, arm: str) -> dict[str, float]:
    """The expected accuracy after the search, with its standard error over the searches, and the best network of the first ten draws."""
    values = table(lab)
    expected, drawn = zip(*(search(arm, values, seed) for seed in range(SEARCHES)))
    return {
        "expected": fmean(expected),
        "expected_error": stdev(expected) / SEARCHES**0.5,
        "late": fmean(fmean(d[-DRAWS // 5 :]) for d in drawn),
        "best_of_10": fmean(max(d[:10]) for d in drawn),
        "best_of_200": fmean(max(d) for d in drawn),
        "table_mean": fmean(values.values()),
        "table_best": max(values.values()),
    }


def holds(results: Results) -> bool:
    """The controllers' expected accuracy is above random search's by more than two standard errors of the difference."""
    means = [fmean(results[arm]["expected"]) for arm in ("controller", "random")]
    error = sum(fmean(results[arm]["expected_error"]) ** 2 for arm in ("controller", "random")) ** 0.5
    return means[0] - means[1] > 2 * error


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=("controller", "random"),
    control="random",
    metric="expected",
    run=run,
    holds=holds,
    rule=(
        "After 200 draws the expected accuracy of the networks that the controller writes is above that of random search, "
        "by more than two standard errors over twenty searches.",
        "抽取 200 次之后，控制器所写网络的期望准确率高于随机搜索，差距大于二十次搜索所得标准误的两倍。",
    ),
    seeds=(0,),
    minutes=2.0,
)
