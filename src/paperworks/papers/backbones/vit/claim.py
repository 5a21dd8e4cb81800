"""Claim: what a ViT lacks in knowledge of images, more data make up for (section 4.3, figures 3 and 4).

``paperworks claim vit``: twelve runs of 400 steps on handwritten digits, about five minutes on one core. A ViT and a ResNet-50 of an eighth of
the width (354,000 and 376,000 parameters) are trained on the first 100 digits and on all 5,000, for the same number of steps. The paper goes
from 1.3 to 303 million photographs, where the lines cross; nothing here is near that, so only the direction is tried: the ViT's errors,
counted in those of the ResNet, become fewer with more data.

It can fail, and easily: with more data the ResNet gets better too, and the ratio only falls if the ViT gains more than it does. Both begin
with 8 x 8 cells or coarser ones: 4 x 4 patches of 8 pixels, a stem of stride 4. Each keeps its own recipe;
mirror images and narrow crops, which no digit survives, are left out. The number of steps and the ResNet's learning rate are those at
which both learn at all from 5,000 digits, seen with another seed before the first run.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 400
FEW = 100
ARMS = {"many": None, "few": FEW}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train both networks on one amount of data: accuracies, and the ViT's errors over the ResNet's."""
    settings = {"steps": STEPS, "limit": ARMS[arm], "augment.flip": 0.0, "augment.area": (0.8, 1.0)}
    vit = lab.fit(variant="small", layers=3, patch=8, **settings)
    resnet = lab.fit("convnext", variant="laptop_resnet", stem="imagenet", lr=5e-3, **settings)
    top1, other = (lab.evaluate(trained.predict)["top1"] for trained in (vit, resnet))
    one = 1 / len(lab.data.val)  # of no error at all there is no ratio
    return {"top1": top1, "resnet_top1": other, "error_ratio": max(1 - top1, one) / max(1 - other, one)}


def holds(results: Results) -> bool:
    """The error ratio, averaged over the seeds, is lower with many images, and lower for every seed by itself."""
    many, few = results["many"]["error_ratio"], results["few"]["error_ratio"]
    return fmean(many) < fmean(few) and all(m < f for m, f in zip(many, few))


CLAIM = Claim(
    data="pack:mnist_subset",
    arms=tuple(ARMS),
    control="few",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "The ViT's share of errors over the ResNet's is lower with 5,000 training images than with 100, on average and for every seed.",
        "ViT 与 ResNet 的错误率之比，用 5,000 张训练图时低于用 100 张时，平均如此，每个随机种子也都如此。",
    ),
    minutes=5.0,
)
