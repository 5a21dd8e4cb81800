"""Claim: crops need colour distortion beside them, and the representation is better before the head than behind it.

``paperworks claim simclr``: six short trainings of the small variant on 1,500 photographs of 32 pixels, about five
minutes on one core. ``composed`` and ``crop_only`` differ in the colour distortion (jitter and grey) and in nothing else. The first part is the
paper's figure 5 at one point, the second its section 4.2; a linear probe with the labels judges both. Either may fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from paperworks.tasks.base import Sample
from paperworks.tasks.claim import Claim, Lab, Results, Trained
from paperworks.tasks.representation import linear_probe, nearest_vote

STEPS = 150
CROP_ONLY: dict[str, Any] = {"augment.jitter_chance": 0.0, "augment.grey": 0.0}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm and judge h and z with the labels."""
    trained = lab.fit(variant="small", steps=STEPS, **(CROP_ONLY if arm == "crop_only" else {}))
    (h, z, label), (h_val, z_val, truth) = (encoded(lab, trained, samples) for samples in (lab.training, lab.validation))
    answers = {
        "linear": linear_probe(h, label, h_val),
        "linear_z": linear_probe(z, label, z_val),
        "knn": nearest_vote(h, label, h_val),
    }
    return {name: float((answer == truth).float().mean()) for name, answer in answers.items()}


@torch.inference_mode()
def encoded(lab: Lab, trained: Trained, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """H and z of all samples, and their labels."""
    deployed = lab.data.deploy(trained.network, lab.data.spec).eval()
    images = torch.stack([lab.data.network_input(lab.data.given(s), deployed.grid) for s in samples])
    outputs = [trained.network(deployed.normalised(part)) for part in images.split(250)]
    h, z = (torch.cat([output[name] for output in outputs]) for name in ("embedding", "projection"))
    return h, z, torch.stack([s["label"] for s in samples])


def holds(results: Results) -> bool:
    """The probe is better with colour distortion, and better on h than on z."""
    mean = {arm: {name: fmean(values) for name, values in metrics.items()} for arm, metrics in results.items()}
    return mean["composed"]["linear"] > mean["crop_only"]["linear"] and mean["composed"]["linear"] > mean["composed"]["linear_z"]


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=("composed", "crop_only"),
    control="crop_only",
    metric="linear",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, the linear probe is more accurate with crops and colour distortion than with crops alone, and on h than on z.",
        "对各种子取平均：裁剪加颜色扰动的线性探测准确率高于只用裁剪，并且在 h 上高于在 z 上。",
    ),
    minutes=5.0,
)
