"""Claim: review, the teaching of deep levels of the student by shallow levels of the teacher, is what helps.

``paperworks claim review_kd``: nine runs of 200 steps, about five minutes on one core. The student is `small`'s, a ResNet-8 of half the usual width;
the teacher the one that comes with it, trained on the same 1,500 photographs for thirty epochs. ``same_level`` has the same teacher, ABFs without
fusion and the same loss, so that each level is compared with its equal only; ``plain`` has no teacher.

It can fail: 500 validation photographs leave a standard error of about two points a run, in seven epochs any teacher may hinder as much as help,
and the paper's own ablation is of 240 epochs on thirty times as many.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 200
ARMS: dict[str, dict[str, Any]] = {"review": {}, "same_level": {"review": False}, "plain": {"teacher": ""}}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one student; its accuracy and log-loss."""
    scores = lab.evaluate(lab.fit(variant="small", steps=STEPS, **ARMS[arm]).predict)
    return {"top1": scores["top1"], "nll": scores["nll"]}


def holds(results: Results) -> bool:
    """Review is more accurate than both others, averaged over the seeds."""
    mean = {arm: fmean(metrics["top1"]) for arm, metrics in results.items()}
    return all(mean["review"] > mean[arm] for arm in ("same_level", "plain"))


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="same_level",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, the student taught with review is more accurate than the one whose levels are compared with equal levels only, "
        "and than the one without a teacher, after as many steps.",
        "按随机种子取平均：步数相同时，带回顾机制的学生准确率高于只做同层比较的学生，也高于没有教师的学生。",
    ),
    minutes=5.0,
)
