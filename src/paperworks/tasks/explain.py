"""What a paper offers that shows why a network answered as it did, and how that is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.tasks.drawing import Picture, display

Explain = Callable[[nn.Module, Tensor, int], Tensor]
"""(network in evaluation mode, its normalised input B C H W, class) -> heat B H W from 0: how much each place speaks for the class."""


@dataclass(frozen=True)
class Explainer:
    """A way to explain an answer, as an entry of a module's ``EXPLAINERS``."""

    config: Any
    """Frozen dataclass with the defaults; ``--set`` changes its fields."""
    build: Callable[[Any], Explain]


def scaled(heat: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
    """Each map over its maximum; one that is zero everywhere stays so."""
    top = heat.amax((1, 2), keepdim=True)
    return heat / top.where(top > 0, 1)


def heat_overlay(image: Float[Tensor, "C H W"], heat: Float[Tensor, "H W"], opacity: float = 0.6) -> Picture:
    """The image in grey under the colours of a map in [0, 1]: nothing where it is 0, yellow where it is 1."""
    grey = np.repeat(display(image).mean(2, keepdims=True), 3, axis=2)
    strength = heat.cpu().float().clamp(0, 1).numpy()
    colours = 255 * matplotlib.colormaps["inferno"](strength)[..., :3]
    return (grey + opacity * np.sqrt(strength)[..., None] * (colours - grey) + 0.5).astype(np.uint8)
