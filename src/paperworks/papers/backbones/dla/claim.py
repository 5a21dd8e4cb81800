"""Claim: for the same parameters, blocks that are aggregated deeply are more accurate than blocks in a row (section 5.1, figure 2).

``paperworks claim dla``: eight runs of 120 steps on photographs of 32 pixels, about three minutes on one core. ``deep`` is ``small``; ``plain`` has the
same blocks in a row, as a ResNet, and a twentieth more channels in the two last stages, which makes up for the nodes (1,031,146 and 1,031,874
parameters).

It can fail: the paper compares networks of 34 layers and more on a million images, where paths are long; here they have sixteen.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 120
ARMS: dict[str, dict[str, Any]] = {
    "deep": {"aggregation": "deep", "widths": (16, 24, 48, 80, 112)},
    "plain": {"aggregation": "plain", "widths": (16, 24, 48, 84, 116)},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    trained = lab.fit(variant="small", steps=STEPS, **ARMS[arm])
    scores = lab.evaluate(trained.predict)
    parameters = sum(p.numel() for p in trained.network.parameters())
    return {"top1": scores["top1"], "nll": scores["nll"], "parameters": float(parameters)}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences in accuracy is more than two of its standard errors above zero."""
    gains = [deep - plain for deep, plain in zip(results["deep"]["top1"], results["plain"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="plain",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With four paired seeds, the mean gain in accuracy of deep aggregation over blocks in a row, at equal parameters, is larger than two "
        "standard errors of that mean.",
        "四个配对的随机种子下，参数量相同时，深层聚合相对顺序排列的平均准确率增益，大于该均值标准误的两倍。",
    ),
    seeds=(0, 1, 2, 3),
    minutes=3.0,
)
