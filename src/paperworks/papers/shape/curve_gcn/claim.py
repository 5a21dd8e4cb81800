"""Claim: looking again helps. Points that move in steps, and see the image where they are, end nearer to the outline.

``paperworks claim curve_gcn``: four arms, three seeds, nuclei. All arms have the same encoder, batches and number of steps of the optimiser. ``three``
is the paper's network (three graph networks, spline). ``one`` has a single graph network of as many parameters (seven residual pairs instead of
three times two), which looks at the image once, at the circle. ``direct`` has two fully connected layers, again with as many parameters. ``polygon`` is ``three``
without the spline. The controls can win: each has the capacity, and less that must be learnt one on top of the other.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.tasks.claim import Claim, Lab, Results

SETTINGS = {
    "three": {},
    "one": {"iterations": 1, "residuals": 7},
    "direct": {"head": "fc"},
    "polygon": {"curve": "polygon"},
}
STEPS = 100


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm and outline every third validation object."""
    trained = lab.fit(variant="small", steps=STEPS, batch_size=8, corrections=0, **SETTINGS[arm])
    return lab.data.evaluate(trained.predict, lab.data.val[::3])[0]


def holds(results: Results) -> bool:
    """Three steps above both controls for the mean over the seeds, and the spline not worse than the polygon by more than the seeds differ."""
    iou = {arm: fmean(values["iou"]) for arm, values in results.items()}
    spread = max(results["three"]["iou"]) - min(results["three"]["iou"])
    return iou["three"] > iou["one"] and iou["three"] > iou["direct"] and iou["three"] >= iou["polygon"] - spread


CLAIM = Claim(
    data="pack:nuclei",
    arms=("three", "one", "direct", "polygon"),
    control="one",
    metric="iou",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, the IoU of three steps is above that of one step and above that of direct regression, each with as many parameters; "
        "the spline's is not below the polygon's by more than the spread of the spline over the seeds.",
        "各随机种子平均，三步的交并比高于参数量相当的一步和直接回归；样条的交并比若低于多边形，差距不超过样条自身在种子间的波动。",
    ),
    minutes=5.0,
)
