"""Claim: with everything else equal, depthwise kernels of 7x7 are better than those of 3x3 (section 2.5).

``paperworks claim convnext``: ten runs of 300 steps on 1,500 photographs of 32 pixels, about five minutes on one core. The arms differ in the
side of the kernels alone; the larger ones add 5 % to the parameters and a tenth to the multiply-adds. The net is ``laptop`` with half of
its blocks and three quarters of its channels, so that there is time for five seeds.

It can fail: one run of 500 validation images has a standard error of about two points, so the gap has to be seen over paired seeds; in the
last stage, of 2 x 2 cells, a 7x7 kernel mostly sees zeros; and 1,500 images may be too few to train the additional weights.
"""

from __future__ import annotations

from statistics import fmean, stdev

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 300
KERNELS = {"kernel_7": 7, "kernel_3": 3}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    trained = lab.fit(variant="laptop", steps=STEPS, depths=(1, 1, 3, 1), widths=(18, 36, 72, 144), kernel=KERNELS[arm])
    scores = lab.evaluate(trained.predict)
    parameters = sum(p.numel() for p in trained.network.parameters())
    return {"top1": scores["top1"], "nll": scores["nll"], "parameters": float(parameters)}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences in accuracy is more than two of its standard errors above zero."""
    gains = [large - small for large, small in zip(results["kernel_7"]["top1"], results["kernel_3"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(KERNELS),
    control="kernel_3",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With five paired seeds, the mean gain in accuracy of 7x7 over 3x3 kernels is larger than two standard errors of that mean.",
        "五个配对的随机种子下，7x7 核相对 3x3 核的平均准确率增益，大于该均值标准误的两倍。",
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=4.0,
)
