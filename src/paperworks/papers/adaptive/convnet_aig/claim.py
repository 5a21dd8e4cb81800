"""Claim: the gates know which images need which blocks (sections 4.2 and 4.4).

``paperworks claim convnet_aig``: three trainings of 300 steps on 1,500 photographs of 32 pixels with nine gated blocks of 16
to 64 channels and a target rate of 0.6, about two minutes on one core. All arms are the same trained network, and execute the same number of blocks:

``own``       each image takes the path that its own gates choose.
``borrowed``  each image takes the path of another image of the validation split, which is the control: the paths and their frequencies are the
              same, only their relation to the image is cut.
``all``       every block of every image: what is lost or gained by skipping at all, and what it saves.

It can fail: gates may open for the same blocks of all images, and then a borrowed path is as good as an own one. Multiply-adds and milliseconds
of images that come alone are measured too, with the gates' own cost. They are numbers, no part of the rule.
"""

from __future__ import annotations

from statistics import fmean, stdev

import torch

from paperworks.papers.adaptive.convnet_aig.convnet_aig import rates_by_class
from paperworks.papers.adaptive.paths import along, cost, validation
from paperworks.tasks.claim import Claim, Lab, Results

STEPS, TARGET = 300, 0.6
WIDTH = 16


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train once for all arms, and look along an arm's paths."""
    network = lab.fit(variant="laptop", steps=STEPS, target=TARGET, width=WIDTH).network
    image, label = validation(lab)
    with torch.inference_mode():
        own = network(image)["gates"]
    others = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(lab.seed))]
    given = {"own": None, "borrowed": others, "all": torch.ones_like(own)}[arm]
    specialised = rates_by_class(network, image, label).std(0).mean()  # 0: a block is as busy with one class as with another  # pyright: ignore[reportArgumentType]
    return {**along(network, image, label, given), **cost(lab, network, image, given), "spread_of_classes": float(specialised)}


def holds(results: Results) -> bool:
    """The own paths' gain in accuracy over borrowed ones is more than two standard errors above zero."""
    gains = [own - other for own, other in zip(results["own"]["top1"], results["borrowed"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=("own", "borrowed", "all"),
    control="borrowed",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "Over three seeds, the mean gain in accuracy of the images' own paths over borrowed ones is larger than two standard errors of that mean.",
        "三个随机种子下，图像走自己的路径相对借用他图路径的平均准确率增益大于该均值标准误的两倍。",
    ),
    minutes=4.0,
)
