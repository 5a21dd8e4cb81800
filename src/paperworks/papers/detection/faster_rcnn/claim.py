"""Claim: with the same number of regions, learned proposals beat an even grid of sliding windows.

``paperworks claim faster_rcnn``: nine runs at 128 pixels on blood cells, about five minutes on one core. ``rpn`` pools the forty best
proposals of an image; ``windows`` pools at most forty windows of the anchors' shapes, spread evenly (section 4.1's one-stage rival with the
proposals taken out), and learns the rest alike. ``untrained`` is the first one's RPN after one step, whose proposals are as good as chance:
it shows that coverage is learned, and is not the doing of the anchors.

``recall`` is the share of the true boxes that some region covers with an overlap of 0.5 or more.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import resize

from paperworks.tasks.claim import Claim, Lab, Results, Trained

SIDE, REGIONS = 128, 40
STEPS = {"rpn": 150, "windows": 150, "untrained": 1}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm; score its detections and its regions."""
    settings: dict[str, Any] = {"image_size": SIDE, "sizes": (12, 24, 48, 96), "canonical": 48, "after": (REGIONS, REGIONS)}
    trained = lab.fit(variant="small", steps=STEPS[arm], proposals="windows" if arm == "windows" else "rpn", **settings)
    scores = lab.evaluate(trained.predict)
    return {"ap50": scores["ap50"], "ap": scores["ap"], "recall": recall(lab, trained)}


def recall(lab: Lab, trained: Trained) -> float:
    """The share of the validation split's boxes that a region covers."""
    hit = total = 0
    for sample in lab.validation:
        image, boxes = sample["image"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor)
        regions = trained.output(resize(image, [SIDE, SIDE], antialias=True))["proposals"][0].cpu()
        regions = regions * torch.tensor([image.shape[2], image.shape[1]] * 2) / SIDE
        if len(boxes):
            hit += int((box_iou(boxes, regions).amax(1) >= 0.5).sum())
            total += len(boxes)
    return hit / total


def holds(results: Results) -> bool:
    """More covered and more found on average, and not by an untrained RPN."""
    mean = {arm: {name: fmean(values) for name, values in metrics.items()} for arm, metrics in results.items()}
    rpn, windows, untrained = (mean[arm] for arm in ("rpn", "windows", "untrained"))
    return rpn["recall"] > windows["recall"] and rpn["ap50"] > windows["ap50"] and rpn["recall"] > untrained["recall"]


CLAIM = Claim(
    data="pack:blood_cells",
    arms=("rpn", "windows", "untrained"),
    control="windows",
    metric="ap50",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, both AP50 and the share of objects that a region covers are higher with the RPN's regions than with as many "
        "sliding windows, and the RPN covers more objects than it does before training.",
        "按随机种子取平均：使用 RPN 区域时，AP50 与被区域覆盖的目标比例都高于同样数目的滑动窗口；且训练后的 RPN 比训练前覆盖更多目标。",
    ),
    minutes=5.0,
)
