"""Claim: tokens and bridges are worth what they cost; Mobile alone, made as dear by wider layers, is less accurate (section 5.3).

``paperworks claim mobileformer``: three networks, four paired seeds, 100 steps on 1,500 photographs of 32 pixels, about three minutes on one core.

- ``mobile_former``: five blocks with four tokens, 3.6 M multiply-adds;
- ``mobile``: the control, the same blocks without tokens and bridges and with ReLU6, widened to 3.8 M multiply-adds, a twentieth
  more. The paper's measure is multiply-adds; in parameters it stays the smaller one (77 against 179 thousand);
- ``no_return``: as the first without Former to Mobile; the dynamic ReLU still hears the first token. Run and reported, no part of the rule.

It can fail: what is global in a photograph of 32 pixels is soon seen by convolutions, the generators of slopes have to be learned in 100 steps,
and the standard error of one run of 500 validation images is about two points.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 100
BLOCKS = ((2, 8, 1), (4, 16, 2), (3, 16, 1), (4, 32, 2), (3, 32, 1))
WIDER = ((2, 8, 1), (4, 18, 2), (4, 18, 1), (4, 34, 2), (4, 34, 1))
ARMS: dict[str, dict[str, Any]] = {
    "mobile_former": {"blocks": BLOCKS},
    "mobile": {"blocks": WIDER, "former": False},
    "no_return": {"blocks": BLOCKS, "former_to_mobile": False},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    trained = lab.fit(variant="small", steps=STEPS, stem=8, token_width=48, hidden=192, **ARMS[arm])
    scores = lab.evaluate(trained.predict)
    parameters = sum(p.numel() for p in trained.network.parameters())
    return {"top1": scores["top1"], "nll": scores["nll"], "parameters": float(parameters)}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences in accuracy is more than two of its standard errors above zero."""
    gains = [both - alone for both, alone in zip(results["mobile_former"]["top1"], results["mobile"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="mobile",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With four paired seeds, the mean gain in accuracy of Mobile-Former over Mobile alone at equal multiply-adds is larger than two "
        "standard errors of that mean.",
        "四个配对的随机种子下，乘加次数相当时 Mobile-Former 相对单独 Mobile 的平均准确率增益，大于该均值标准误的两倍。",
    ),
    seeds=(0, 1, 2, 3),
    minutes=3.0,
)
