"""Claim: a slowly moving key encoder makes features that serve k-NN, better than none and better than keys from the query encoder itself.

``paperworks claim moco``: six short trainings of the small variant on 1,500 photographs of 32 pixels, about five
minutes on one core. ``momentum`` and ``no_momentum`` differ in m and in nothing else (0.99, as in the authors' CIFAR demo, and 0: the key
encoder is the query encoder of the step). ``untrained`` is the same network after one step.

The authors report that m = 0 does not train at all on ImageNet; on so few images and steps it may, so this can fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from paperworks.tasks.base import Sample
from paperworks.tasks.claim import Claim, Lab, Results, Trained
from paperworks.tasks.representation import linear_probe, nearest_vote

STEPS = {"momentum": 150, "no_momentum": 150, "untrained": 1}
MARGIN = 0.03
"""Points of k-NN accuracy by which training has to beat no training."""


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm and judge its frozen features with the labels."""
    trained = lab.fit(variant="small", steps=STEPS[arm], key_momentum=0.0 if arm == "no_momentum" else 0.99)
    (bank, label), (x, truth) = (embedded(lab, trained, samples) for samples in (lab.training, lab.validation))
    answers = {"knn": nearest_vote(bank, label, x), "linear": linear_probe(bank, label, x)}
    return {name: float((answer == truth).float().mean()) for name, answer in answers.items()}


@torch.inference_mode()
def embedded(lab: Lab, trained: Trained, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The backbone's features of all samples, N F, and their labels."""
    deployed = lab.data.deploy(trained.network, lab.data.spec).eval()
    images = torch.stack([lab.data.network_input(lab.data.given(s), deployed.grid) for s in samples])
    return torch.cat([deployed(part) for part in images.split(250)]), torch.stack([s["label"] for s in samples])


def holds(results: Results) -> bool:
    """k-NN better than untrained by a margin, and better than without momentum."""
    knn = {arm: fmean(metrics["knn"]) for arm, metrics in results.items()}
    return knn["momentum"] > knn["untrained"] + MARGIN and knn["momentum"] > knn["no_momentum"]


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=("momentum", "no_momentum", "untrained"),
    control="no_momentum",
    metric="knn",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, k-NN accuracy with momentum 0.99 exceeds that of the untrained network by more than 0.03, and that with momentum 0.",
        "对各种子取平均：动量 0.99 的 k 近邻准确率比未训练网络高出 0.03 以上，并且高于动量为 0 的情形。",
    ),
    minutes=5.0,
)
