"""Claim: beside a Slow pathway of few frames, a light Fast pathway of many makes motion recognisable (section 4.1, table 5a).

``paperworks claim slowfast``: twelve runs of 150 steps on 400 films of handwritten digits in ten kinds of motion, about three minutes on one core. All
arms are `small`: Slow sees 4 frames of 16, Fast all of them with a quarter of the channels. `slow_only` is the control; `no_lateral` keeps Fast but
hands nothing over before the classifier, and is there to be looked at, the rule does not ask for it.

It can fail: most of the motions (left, right, growing ...) show in 4 frames as well, only shaking, which is faster than Slow's sampling, and swaying need the
frames in between; 120 validation films have a standard error of two to four points; and the Fast pathway is one more thing to train in 150 steps.
"""

from __future__ import annotations

from statistics import fmean, stdev

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 150
ARMS = {"slowfast": {}, "slow_only": {"alpha": 1, "fast_share": 0}, "no_lateral": {"lateral": 0}}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    trained = lab.fit(variant="small", steps=STEPS, **ARMS[arm])
    scores = lab.evaluate(trained.predict)
    parameters = sum(p.numel() for p in trained.network.parameters())
    kept = {name: scores[name] for name in ("top1", "nll", "recall/shaking", "recall/swaying")}
    return {**kept, "parameters": float(parameters)}


def holds(results: Results) -> bool:
    """The mean of the seeds' gains in accuracy is more than two of its standard errors above zero."""
    gains = [both - slow for both, slow in zip(results["slowfast"]["top1"], results["slow_only"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:moving_digits",
    arms=tuple(ARMS),
    control="slow_only",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With four paired seeds, the mean gain in accuracy of SlowFast over its Slow pathway alone is larger than two standard errors of that mean.",
        "四个配对的随机种子下，SlowFast 相对单独慢路径的平均准确率增益，大于该均值标准误的两倍。",
    ),
    seeds=(0, 1, 2, 3),
    minutes=3.0,
)
