"""Claim: skips that are asked by attention serve the decoder better than skips that are added.

``paperworks claim nnformer``: nine runs of 90 steps on whole volumes of the hippocampus. ``attention`` and ``sum`` differ in the first block
of each decoder stage and in nothing else: it takes queries from the decoder and keys and values from the encoder, or all three from their sum
(which has more parameters: queries are projected too). ``unet`` is a convolutional U-Net of about half the parameters, seeing the same
samples; no rule asks anything of it, it shows where the two stand.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 90
MARGIN = 0.005


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm and score it."""
    if arm == "unet":
        trained = lab.fit("unet", variant="tiny", steps=STEPS, widths="8,16,32,64", batch_size=2, **{"augment.flip": False})
    else:
        trained = lab.fit(variant="small", steps=STEPS, skip_attention=arm == "attention")
    scores = lab.evaluate(trained.predict)
    return {key: scores[key] for key in ("dice", "hd95")}


def holds(results: Results) -> bool:
    """Mean Dice larger with skip attention than with sums, by more than a margin."""
    return fmean(results["attention"]["dice"]) > fmean(results["sum"]["dice"]) + MARGIN


CLAIM = Claim(
    data="pack:hippocampus_mr",
    arms=("attention", "sum", "unet"),
    control="sum",
    metric="dice",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, Dice with skip attention is higher than with summed skips by more than 0.005.",
        "按随机种子取平均，跳连注意力的 Dice 比跳连相加高出 0.005 以上。",
    ),
    minutes=6.0,
)
