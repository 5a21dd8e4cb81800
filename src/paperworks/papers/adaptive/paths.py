"""What the claims of this section measure: accuracy along given paths, and what a path costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paperworks.tasks.claim import Lab
from paperworks.tasks.contract import normalise

SINGLES = 60
"""Validation images, at even steps, that are passed one by one to take the time."""


def validation(lab: Lab) -> tuple[Tensor, Tensor]:
    """The validation images as a network sees them, B C S S, and their classes. They have to be of one size, the network's."""
    samples = lab.validation
    spec = lab.data.spec
    image = torch.stack([sample["image"].as_subclass(Tensor) for sample in samples])
    label = torch.stack([sample["label"] for sample in samples])
    return normalise(image, torch.tensor(spec.mean), torch.tensor(spec.std)), label


@torch.inference_mode()
def along(network: nn.Module, image: Tensor, label: Tensor, given: Tensor | None) -> dict[str, float]:
    """Accuracy with the decisions ``given`` (B N), or with the network's own, and the share of blocks that is executed."""
    output = network(image, given)
    return {"top1": float((output["logits"].argmax(1) == label).float().mean()), "executed": float(output["gates"].mean())}


@torch.inference_mode()
def cost(lab: Lab, network: nn.Module, image: Tensor, given: Tensor | None) -> dict[str, float]:
    """Multiply-adds (10^6) and milliseconds of an image that comes alone, over ``SINGLES`` images of all classes."""
    singles = [(image[i : i + 1], None if given is None else given[i : i + 1]) for i in range(0, len(image), len(image) // SINGLES)]

    def all_of_them() -> None:
        for one, way in singles:
            network(one, way)

    with FlopCounterMode(display=False) as counter:
        all_of_them()
    return {
        "mega_multiply_adds": counter.get_total_flops() / 2e6 / len(singles),
        "milliseconds": 1000 * lab.seconds(all_of_them) / len(singles),
    }
