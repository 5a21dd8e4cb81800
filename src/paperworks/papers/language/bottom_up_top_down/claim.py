"""Claim: with the same decoder and as many features, regions of a detector beat the cells of a grid.

``paperworks claim bottom_up_top_down``: six runs of 200 steps on scenes of digits, about four minutes on one core. Both arms learn the same
detector from the same boxes with the same loss, and the same captioner on 16 features of it that it cannot change. ``regions`` are its 16 best
proposals (fixed in number, as the paper's 36 are in one of its settings); ``grid`` are the 4 x 4 cells to which its last map is resized.

It can fail: a detector of 200 steps proposes poorly, and a grid covers everything. ``pointing`` is, at each word that names a digit of the image,
the share of the attended area that lies in that digit's box; ``chance`` is the same if all regions were attended alike.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 200
ARMS: dict[str, dict[str, Any]] = {"regions": {"variant": "small", "least": 16, "most": 16}, "grid": {"variant": "small_grid", "cells": 4}}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm; score its captions, and where it looked when it named a digit."""
    trained = lab.fit(steps=STEPS, **ARMS[arm])
    scores = lab.evaluate(trained.predict)
    pairs = [pair for sample in lab.validation for pair in looks(trained.predict(lab.data.given(sample)), sample, lab.data.spec.classes)]
    pointing, chance = (fmean(values) for values in zip(*pairs)) if pairs else (0.0, 0.0)
    return {"cider_d": scores["cider_d"], "exact": scores["exact"], "bleu4": scores["bleu4"], "pointing": pointing, "chance": chance}


def looks(found: dict[str, Any], sample: dict[str, Any], classes: tuple[str, ...]) -> list[tuple[float, float]]:
    """For each word that names an object of the image: the share of what is looked at that lies in its box, by attention and evenly."""
    boxes, out = found["boxes"], []
    for word, attention in zip(found["words"], found["attention"]):
        for truth, label in zip(sample["boxes"].as_subclass(Tensor), sample["labels"].tolist()):
            if classes[label] == word:
                extent = torch.minimum(boxes[:, 2:], truth[2:]) - torch.maximum(boxes[:, :2], truth[:2])
                inside = extent.clamp(min=0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)
                out.append((float((attention * inside).sum()), float(inside.mean())))
    return out


def holds(results: Results) -> bool:
    """Better captions, and attention that lies on what is named more than evenly spread attention would."""
    mean = {arm: {name: fmean(values) for name, values in metrics.items()} for arm, metrics in results.items()}
    regions, grid = mean["regions"], mean["grid"]
    return regions["cider_d"] > grid["cider_d"] and regions["pointing"] > regions["chance"]


CLAIM = Claim(
    data="pack:digit_scenes",
    arms=tuple(ARMS),
    control="grid",
    metric="cider_d",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, CIDEr-D is higher with 16 regions of the detector than with the 16 cells of a grid of the same network, and at "
        "words that name a digit more of the attention lies in its box than if all regions were attended alike.",
        "按随机种子取平均：用检测器的 16 个区域时 CIDEr-D 高于同一网络的 16 个网格格子；并且说出数字名称时，落在该数字框内的注意力多于对所有区域均匀注意的情形。",
    ),
    minutes=4.0,
)
