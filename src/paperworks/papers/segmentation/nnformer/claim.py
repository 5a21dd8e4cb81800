"""Claim: skips that are asked by attention serve the decoder better than skips that are added.

``paperworks claim nnformer``: six runs of 200 steps on crops of the hippocampus. ``attention`` and ``sum`` differ in the first block of each
decoder stage and in nothing else: it takes queries from the decoder and keys and values from the encoder, or all three from their sum (which
has a few more parameters, since queries are projected too). Two hundred steps are few for a transformer: what is compared is how fast the two
learn, not where they end.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 200
MARGIN = 0.005


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm and score it."""
    trained = lab.fit(variant="small", steps=STEPS, skip_attention=arm == "attention")
    scores = lab.evaluate(trained.predict)
    return {key: scores[key] for key in ("dice", "hd95")}


def holds(results: Results) -> bool:
    """Mean Dice larger with skip attention than with sums, by more than a margin."""
    return fmean(results["attention"]["dice"]) > fmean(results["sum"]["dice"]) + MARGIN


CLAIM = Claim(
    data="pack:hippocampus_mr",
    arms=("attention", "sum"),
    control="sum",
    metric="dice",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, Dice with skip attention is higher than with summed skips by more than 0.005.",
        "按随机种子取平均，跳连注意力的 Dice 比跳连相加高出 0.005 以上。",
    ),
    minutes=4.0,
)
