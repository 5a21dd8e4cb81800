"""Claim: quadratic terms of low rank in the last layer make a network more accurate (table 3: ResNet-164 23.64 % errors, with them 22.50 %).

``paperworks claim factorized_bilinear``: six runs of 150 steps on photographs of 32 pixels, about three minutes on one core. Both arms are the
Inception-BN of a quarter of the width, whose last activation is tanh; ``quadratic`` has 20 factors an output with DropFactor, ``linear``
none, and nothing else differs.

It can fail: DropFactor is noise for a network that has hardly begun, and 150 steps may end before the quadratic terms say much. ``without`` is
the accuracy of the trained quadratic network when these terms are taken away, to see whether it uses them.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.papers.layers.factorized_bilinear.factorized_bilinear import FactorizedBilinear
from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 150
FACTORS = {"quadratic": 20, "linear": 0}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it, with its quadratic terms and without."""
    trained = lab.fit(variant="small", steps=STEPS, width=0.25, **{"last.factors": FACTORS[arm]})  # pyright: ignore[reportArgumentType]
    scores = lab.evaluate(trained.predict)
    for module in trained.network.modules():
        if isinstance(module, FactorizedBilinear):
            module.factor = None
    return {"top1": scores["top1"], "nll": scores["nll"], "without": lab.evaluate(trained.predict)["top1"]}


def holds(results: Results) -> bool:
    """More accurate for every seed, and by a point on average."""
    gains = [quadratic - linear for quadratic, linear in zip(results["quadratic"]["top1"], results["linear"]["top1"])]
    return min(gains) > 0 and fmean(gains) > 0.01


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(FACTORS),
    control="linear",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With 20 factors the network is more accurate than with none for every seed, and by more than one point on average.",
        "每个随机种子下，20 个因子的网络都比没有因子的更准，平均高出一个百分点以上。",
    ),
    minutes=4.0,
)
