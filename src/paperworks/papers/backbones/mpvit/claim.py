"""Claim: several sizes of patches are better than one, at equal size and cost (section 4.4, table 6).

``paperworks claim mpvit``: three networks, four paired seeds, 100 steps on 1,500 photographs of 32 pixels, about three minutes on one core.

- ``paths_3``: three paths of one block at each stage and the local path, 142 thousand parameters, 7.5 M multiply-adds;
- ``path_1``: one path of three blocks and the local path, brought to the same cost by its widths (138 thousand, 7.3 M): the control;
- ``no_local``: three paths without the local one, everything else as in the first; run and reported, no part of the rule.

It can fail: 100 steps reward networks that are quick to learn, a path of three blocks is deeper than three of one, and on maps of 16, 8 and 4
cells a chain of 3x3 convolutions soon sees everything. The paper's gain on ImageNet is about a point; the standard error of one run of 500
validation images is about two.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 100
ARMS: dict[str, dict[str, Any]] = {
    "paths_3": {"paths": (3, 3, 3), "layers": (1, 1, 1), "widths": (16, 32, 48)},
    "path_1": {"paths": (1, 1, 1), "layers": (3, 3, 3), "widths": (16, 36, 52)},
    "no_local": {"paths": (3, 3, 3), "layers": (1, 1, 1), "widths": (16, 32, 48), "local": False},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    trained = lab.fit(variant="laptop", steps=STEPS, **ARMS[arm])
    scores = lab.evaluate(trained.predict)
    parameters = sum(p.numel() for p in trained.network.parameters())
    return {"top1": scores["top1"], "nll": scores["nll"], "parameters": float(parameters)}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences in accuracy is more than two of its standard errors above zero."""
    gains = [many - one for many, one in zip(results["paths_3"]["top1"], results["path_1"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="path_1",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With four paired seeds, the mean gain in accuracy of three paths over one path of equal size is larger than two standard errors "
        "of that mean.",
        "四个配对的随机种子下，三条路径相对同等规模单路径的平均准确率增益，大于该均值标准误的两倍。",
    ),
    seeds=(0, 1, 2, 3),
    minutes=3.0,
)
