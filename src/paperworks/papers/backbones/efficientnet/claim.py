"""Claim: for the same multiply-adds, scaling three dimensions together beats scaling any one of them.

``paperworks claim efficientnet``: twelve runs of 160 steps, about ten minutes on one core. The network that is scaled is ``small`` on
photographs of 32 pixels brought down to 16; every arm spends four times its multiply-adds: deeper, wider, up to the photographs' real 32
pixels, or all three by phi = 1.5. Factors were set by counting (channels go up in steps of eight, maps in steps of one:
that is why phi = 1.5 costs four times and not 2^1.5 times), before any run.

It can fail: from 16 to 32 pixels the photographs regain real detail, which the paper's 224 to 560 does not offer, and a deep network may need
more than 160 steps.
"""

from __future__ import annotations

from statistics import fmean

import torch
from torch.utils.flop_counter import FlopCounterMode

from paperworks.papers.backbones.efficientnet.efficientnet import compound
from paperworks.tasks.claim import Claim, Lab, Results

SIDE = 16
STEPS = 160
SCALE = compound(1.5)
ARMS = {
    "compound": {"depth": SCALE.depth, "width": SCALE.width, "image_size": round(SIDE * SCALE.resolution)},
    "depth": {"depth": 4.3, "image_size": SIDE},
    "width": {"width": 2.1, "image_size": SIDE},
    "resolution": {"image_size": 2 * SIDE},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network; its accuracy, and its multiply-adds for one image in millions."""
    trained = lab.fit(variant="small", steps=STEPS, **ARMS[arm])
    side = ARMS[arm]["image_size"]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        trained.network(torch.zeros(1, 3, side, side))
    return {"top1": lab.evaluate(trained.predict)["top1"], "mega_multiply_adds": counter.get_total_flops() / 2e6}


def holds(results: Results) -> bool:
    """Scaled together is better than each alone, averaged over the seeds."""
    mean = {arm: fmean(metrics["top1"]) for arm, metrics in results.items()}
    return all(mean["compound"] > mean[arm] for arm in ("depth", "width", "resolution"))


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="depth",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, the network scaled in all three dimensions is more accurate than each of those scaled in depth, in width or "
        "in resolution alone, at multiply-adds that are equal within a tenth.",
        "按随机种子取平均：乘加次数相差不超过十分之一时，三个维度一起放大的网络，准确率高于只加深、只加宽、只提高分辨率的每一个。",
    ),
    minutes=5.0,
)
