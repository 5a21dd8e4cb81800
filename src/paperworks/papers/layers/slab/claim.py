"""Claim: batch norm put in place of layer norm makes a Transformer worse; taking over progressively, with a shortcut, it does not (PRepBN).

``paperworks claim slab``: nine runs of 200 steps on 1,500 photographs of 32 pixels, about four minutes on one core. The host is the archive's
ViT with two layers; the arms differ in its five norms alone: PRepBN, whose lambda falls over 16 % of the training, batch norm from the first
step, and the host's layer norm. The rule asks for a gain of PRepBN over batch norm; layer norm, the mark that is to be reached, decides nothing.

It can fail: two layers are far from the depth at which batch norm made DeiT's training collapse, and 200 steps leave 32 for the ramp. A network is
timed after its norms became multiplications and additions, on whatever runs besides: ``milliseconds`` is to look at, not to judge by.
"""

from __future__ import annotations

from statistics import fmean, stdev

import torch

from paperworks.nn.fuse import fused
from paperworks.tasks.claim import Claim, Lab, Results

STEPS, LAYERS = 200, 2
ARMS: dict[str, dict[str, object]] = {
    "prepbn": {"norm": "slab"},
    "batch_norm": {"norm": "slab", "norm.ramp": 0.0, "norm.shortcut": False},
    "layer_norm": {},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one ViT, score it, and time it with its batch norms merged."""
    trained = lab.fit("vit", variant="small", steps=STEPS, layers=LAYERS, **ARMS[arm])  # pyright: ignore[reportArgumentType]
    scores = lab.evaluate(trained.predict)
    network, images = fused(trained.network), torch.zeros(16, 3, 32, 32)
    with torch.inference_mode():
        seconds = lab.seconds(lambda: network(images))
    return {"top1": scores["top1"], "nll": scores["nll"], "milliseconds": 1000 * seconds}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences in accuracy is more than two of its standard errors above zero."""
    gains = [ours - plain for ours, plain in zip(results["prepbn"]["top1"], results["batch_norm"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="batch_norm",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With three paired seeds, the mean gain in accuracy of PRepBN over batch norm is larger than two standard errors of that mean.",
        "三个配对的随机种子下，PRepBN 相对 BatchNorm 的平均准确率增益，大于该均值标准误的两倍。",
    ),
    minutes=4.0,
)
