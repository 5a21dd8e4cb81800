"""Claim: the angular margin makes classes compact, and strangers easier to tell apart.

``paperworks claim arcface``: six trainings of a small IR-ResNet on 110 handwritten characters, about five minutes on one core; all pairs of
drawings of 26 characters of another alphabet are then judged. ``margin`` and ``no_margin`` differ in m (0.5 and 0: the softmax of
scaled cosines) and in nothing else. The angle is that between training images and the centre of their class, as the paper's table of
intra-class angles has it. That a tighter training set helps with strangers is not certain on so few classes: this can fail.
"""

from __future__ import annotations

from statistics import fmean

import torch

from paperworks.tasks.claim import Claim, Lab, Results, Trained

STEPS = 250
SETTINGS = {"image_size": 32, "augment.flip": 0.0, "augment.area": (0.6, 1.0)}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm; verification of strangers, and how far training images are from their centres."""
    trained = lab.fit(variant="small", steps=STEPS, m2=0.5 if arm == "margin" else 0.0, **SETTINGS)
    scores = lab.evaluate(trained.predict)
    return {"auc": scores["auc"], "eer": scores["eer"], "retrieval": scores["retrieval"], "angle": angle(lab, trained)}


@torch.inference_mode()
def angle(lab: Lab, trained: Trained) -> float:
    """Mean angle in degrees between the training images' embeddings and the centres of their classes."""
    deployed = lab.data.deploy(trained.network, lab.data.spec).eval()
    samples = lab.training
    images = torch.stack([lab.data.network_input(lab.data.given(s), deployed.grid) for s in samples])
    cosine = torch.cat([trained.network(deployed.normalised(part))["cosine"] for part in images.split(250)])
    own = cosine.gather(1, torch.stack([s["label"] for s in samples])[:, None])
    return float(own.clamp(-1, 1).acos().rad2deg().mean())


def holds(results: Results) -> bool:
    """AUC on strangers higher, angles of training images smaller."""
    mean = {arm: {name: fmean(values) for name, values in metrics.items()} for arm, metrics in results.items()}
    return mean["margin"]["auc"] > mean["no_margin"]["auc"] and mean["margin"]["angle"] < mean["no_margin"]["angle"]


CLAIM = Claim(
    data="pack:omniglot",
    arms=("margin", "no_margin"),
    control="no_margin",
    metric="auc",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, verification AUC on characters never seen is higher with the margin than without, and the mean angle between "
        "training images and the centres of their classes is smaller.",
        "对各种子取平均：带间隔时，未见过字符上的验证 AUC 更高，且训练图与其类中心的平均夹角更小。",
    ),
    minutes=5.0,
)
