"""Claim: of two digits in a scene, the map of a class points at the digit of that class.

``paperworks claim grad_cam``: three networks (one a seed, shared by the arms) learn from scenes of two different digits which digits are
there, never where; about two minutes on one core. Each arm then says, for both digits of each of 500 new scenes, which pixel speaks most
for it. ``grad_cam`` takes the map's maximum, ``gradient`` that of the score's gradient by the image, ``untrained`` is Grad-CAM on a network that has
learnt nothing, ``random`` any pixel.

A map that finds digits but not their classes scores a half at most, and never finds both; a network that has not learnt (fewer than 95 % of
its answers right) makes the claim fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.papers.insight.grad_cam.grad_cam import explain, score
from paperworks.tasks.base import Sample
from paperworks.tasks.claim import Claim, Lab, Results

SIDE, DIGIT = 36, 14
STEPS, BATCH = 500, 64
SCENES = 500
LAYER = "features"

Scenes = tuple[Float[Tensor, "B 1 S S"], Int[Tensor, "B 2"], Int[Tensor, "B 2 2"]]
"""Images, the classes of their two digits, and the digits' upper left corners (row, column)."""


def scenes(samples: Sequence[Sample], count: int, generator: torch.Generator) -> Scenes:
    """Two different digits of half size, side by side with some room, anywhere else at will."""
    digits = F.avg_pool2d(torch.stack([s["image"].as_subclass(Tensor) for s in samples]), 2)[:, 0]
    labels = torch.stack([s["label"] for s in samples])
    images, classes, corners = torch.zeros(count, 1, SIDE, SIDE), torch.zeros(count, 2, dtype=torch.long), torch.zeros(count, 2, 2).long()
    for n in range(count):
        first, second = 0, 0
        while labels[first] == labels[second]:
            first, second = torch.randint(len(labels), (2,), generator=generator).tolist()
        at = torch.zeros(2, 2).long()
        while (at[0] - at[1]).abs().max() < DIGIT:  # they would overlap
            at = torch.randint(SIDE - DIGIT + 1, (2, 2), generator=generator)
        for (row, column), digit in zip(at.tolist(), (first, second)):
            images[n, 0, row : row + DIGIT, column : column + DIGIT] = digits[digit]
        classes[n], corners[n] = labels[[first, second]], at
    return images, classes, corners


class Presence(nn.Module):
    """Four convolutions, a dense ending, and a score for each class being there."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 32, 32)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            if i < 2:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, image: Float[Tensor, "B 1 S S"]) -> dict[str, Tensor]:
        """``logits`` B K, each of its own class."""
        return {"logits": self.classifier(self.features(image))}


NETWORKS: dict[int, nn.Module] = {}
"""By seed: the arms look at the same network."""


def trained(lab: Lab) -> nn.Module:
    """The network of the lab's seed."""
    if lab.seed not in NETWORKS:
        generator = torch.Generator().manual_seed(lab.seed)
        images, classes, _ = scenes(lab.training, 12_000, generator)
        present = torch.zeros(len(images), 10).scatter_(1, classes, 1)
        torch.manual_seed(lab.seed)
        network = Presence().train()
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
        for _ in range(STEPS):
            batch = torch.randint(len(images), (BATCH,), generator=generator)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(network(images[batch])["logits"], present[batch]).backward()
            optimizer.step()
            schedule.step()
        NETWORKS[lab.seed] = network.eval()
    return NETWORKS[lab.seed]


def heat(arm: str, network: nn.Module, image: Float[Tensor, "1 1 S S"], target: int, generator: torch.Generator) -> Float[Tensor, "S S"]:
    """What an arm says of where a class is."""
    if arm == "random":
        return torch.rand(SIDE, SIDE, generator=generator)
    if arm == "gradient":
        image = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(network(image), target).sum(), image)
        return gradient[0, 0].abs()
    return explain(network, image, LAYER, target)[0]


def hits(place: int, corners: Int[Tensor, "2 2"]) -> Bool[Tensor, "2"]:
    """In which of the two digits' boxes a pixel lies."""
    at = torch.tensor(divmod(place, SIDE))
    return ((at >= corners) & (at < corners + DIGIT)).all(1)


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Pointing accuracy over both digits, the share of scenes in which both are found, and how well the network knows what is there."""
    generator = torch.Generator().manual_seed(1_000 + lab.seed)
    images, classes, corners = scenes(lab.validation, SCENES, generator)
    torch.manual_seed(lab.seed)
    network = Presence().eval() if arm == "untrained" else trained(lab)
    found = torch.zeros(SCENES, 2, dtype=torch.bool)
    for n in range(SCENES):
        for digit, target in enumerate(classes[n].tolist()):
            place = int(heat(arm, network, images[n : n + 1], target, generator).argmax())
            found[n, digit] = hits(place, corners[n])[digit]
    with torch.inference_mode():
        present = torch.zeros(SCENES, 10, dtype=torch.bool).scatter_(1, classes, value=True)
        right = float(((network(images)["logits"] > 0) == present).float().mean())
    return {"pointing": float(found.float().mean()), "both": float(found.all(1).float().mean()), "answers_right": right}


def holds(results: Results) -> bool:
    """The network has learnt, its map points better than the other arms' and moves from digit to digit in most scenes."""
    mean = {arm: {name: fmean(values) for name, values in metrics.items()} for arm, metrics in results.items()}
    best = all(mean["grad_cam"]["pointing"] > mean[arm]["pointing"] for arm in ("gradient", "untrained", "random"))
    return mean["grad_cam"]["answers_right"] >= 0.95 and best and mean["grad_cam"]["both"] > 0.5


CLAIM = Claim(
    data="pack:mnist_subset",
    arms=("grad_cam", "gradient", "untrained", "random"),
    control="untrained",
    metric="pointing",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, the network gives at least 95 % of its answers rightly, the maximum of Grad-CAM lies in the box of the digit "
        "that is asked for more often than that of the gradient, of an untrained network's Grad-CAM and of a random pixel, and it finds both "
        "digits in more than half of the scenes.",
        "按随机种子取平均：网络至少答对 95%；Grad-CAM 的最大值落在所问数字框内的比例，高于梯度、未训练网络的 Grad-CAM 和随机像素；并且在半数以上的场景里两个数字都能指对。",
    ),
    minutes=2.0,
)
