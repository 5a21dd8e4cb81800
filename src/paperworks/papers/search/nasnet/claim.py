"""Claim: a controller that learns finds better cells than random search of equal cost (section 4.4, figure 6).

``paperworks claim nasnet``: a table of 36 small networks, about two minutes on one core, and then searches that only look values up. The space is
a normal cell of one block: two terms, each of h or p with identity, 3x3 average, 3x3 maximum or separable 3x3; the reduction cell is given.
Every cell of it is trained once for 30 steps on four fifths of the training images, of 16 pixels, and valued on the others. Controller and random
search then draw 200 cells each, twenty times from different starts. There is one table, and hence one seed of the trainings; what varies is the
search, and its standard error is among the metrics.

It can fail: 300 images value a cell with a standard error of about two points, so the table is partly noise; two hundred draws are few for
reinforcement learning (the paper had 20,000), and in a space this small random search meets the best cell anyway, so that only what is
drawn late in the search can differ. As best cells found are equal in such a space, they are among the metrics but not in the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import fmean, stdev

import torch

from paperworks.papers.search.nasnet.nasnet import VARIANTS, Controller, ppo, sizes, spelled, uniform
from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 30
DRAWS = 200
SEARCHES = 20
SETTINGS = {"repeats": 1, "filters": 8, "stem_filters": 8, "image_size": 16, "reduction": "sep3(h)+max3(p)"}
SPACE = replace(VARIANTS["small"], blocks=1, operations=("id", "avg3", "max3", "sep3"), joins=("+",), **SETTINGS)

_tables: dict[int, dict[str, float]] = {}


def cell(decisions: list[int]) -> str:
    """The cell that decisions stand for; of two that differ in the order of their terms, always the same one."""
    left, right, one, other, join = decisions
    first, second = sorted([(left, one), (right, other)])
    return spelled([first[0], second[0], first[1], second[1], join], SPACE)["normal"]


def table(lab: Lab) -> dict[str, float]:
    """The value of every cell, trained once."""
    if lab.seed not in _tables:
        cells = sorted({cell(list(decisions)) for decisions in product(*map(range, sizes(SPACE)))})
        trials = lab.trials(variant="small", steps=STEPS, **SETTINGS).run([{"normal": name} for name in cells])
        _tables[lab.seed] = {name: trial.value for name, trial in zip(cells, trials)}
    return _tables[lab.seed]


def search(arm: str, value: Callable[[list[list[int]]], list[float]], seed: int) -> list[float]:
    """Values of all cells that one search draws, in order."""
    generator = torch.Generator().manual_seed(seed)
    if arm == "random":
        return value(uniform(sizes(SPACE), DRAWS, generator).tolist())
    torch.manual_seed(seed)
    return ppo(Controller(sizes(SPACE)), value, DRAWS, per_update=5, lr=SPACE.controller_lr, generator=generator)[1]


def run(lab: Lab, arm: str) -> dict[str, float]:
    """The mean value of the last fifth of the cells drawn, with its standard error over the searches, and the best of the first twenty."""
    values = table(lab)
    found = [search(arm, lambda drawn: [values[cell(d)] for d in drawn], seed) for seed in range(SEARCHES)]
    late = [fmean(drawn[-DRAWS // 5 :]) for drawn in found]
    return {
        "late": fmean(late),
        "late_error": stdev(late) / SEARCHES**0.5,
        "best_of_20": fmean(max(drawn[:20]) for drawn in found),
        "best_of_200": fmean(max(drawn) for drawn in found),
        "table_mean": fmean(values.values()),
        "table_best": max(values.values()),
    }


def holds(results: Results) -> bool:
    """The cells drawn late by the controller are better than random search's by more than two standard errors of the difference."""
    means = [fmean(results[arm]["late"]) for arm in ("controller", "random")]
    error = sum(fmean(results[arm]["late_error"]) ** 2 for arm in ("controller", "random")) ** 0.5
    return means[0] - means[1] > 2 * error


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=("controller", "random"),
    control="random",
    metric="late",
    run=run,
    holds=holds,
    rule=(
        "Of 200 cells drawn, the last fifth has a higher mean accuracy with the controller than with random search, "
        "by more than two standard errors over twenty searches each.",
        "在抽取的 200 个单元中，最后五分之一的平均准确率，控制器高于随机搜索，差距大于各二十次搜索所得标准误的两倍。",
    ),
    seeds=(0,),
    minutes=2.0,
)
