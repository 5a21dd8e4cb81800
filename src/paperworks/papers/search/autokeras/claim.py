"""Claim: guided by Bayesian optimisation, network morphism finds a better network than edits at random, of equal cost (section 5.2).

``paperworks claim autokeras``: nine searches of eight networks each, about three minutes on one core. Every network is trained for 40 steps on four
fifths of the training images, of 16 pixels, and valued on the others. The search begins with three layers of eight filters. ``guided`` is the paper's;
``random`` edits any trained network at random and keeps its weights; ``scratch`` edits at random and begins with new weights. The value of a
search is that of its best network.

It can fail, and easily: seven edits are few for a Gaussian process; nearly every edit makes the network larger, and inherited training helps
whatever was edited; the best of eight values on 300 images carries a standard error of about two points.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, stdev

from paperworks.papers.search.autokeras.autokeras import VARIANTS, grown
from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 40
SETTINGS = {"start": "8p, 8p, 8p", "candidates": 8, "image_size": 16, "largest": 2**15}
SPACE = replace(VARIANTS["small"], **SETTINGS)
ARMS = {"guided": (True, True), "random": (False, True), "scratch": (False, False)}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """One search: the value of its best network, of the best of the first half, and of the mean."""
    guided, inherited = ARMS[arm]
    trials = grown(SPACE, lab.trials(variant="small", steps=STEPS, **SETTINGS), guided=guided, inherited=inherited)
    values = [trial.value for trial in trials]
    return {"best": max(values), "best_of_4": max(values[:4]), "mean": fmean(values), "first": values[0]}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences to edits at random is more than two of its standard errors above zero, and the mean is above scratch."""
    gains = [one - other for one, other in zip(results["guided"]["best"], results["random"]["best"])]
    above = fmean(results["guided"]["best"]) > fmean(results["scratch"]["best"])
    return above and fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="random",
    metric="best",
    run=run,
    holds=holds,
    rule=(
        "With three paired seeds, the best network of the guided search is more accurate than that of edits at random by more than two standard errors "
        "of the mean difference, and on average more accurate than that of edits at random without inherited weights.",
        "三个配对种子下，引导搜索所得最好网络的准确率高于随机编辑，差距大于平均差的两倍标准误；并且平均高于不继承权重的随机编辑。",
    ),
    minutes=3.0,
)
