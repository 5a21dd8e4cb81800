"""torchvision's COCO weights for ``300``: names mapped to ours.

They go with COCO's default boxes, ``scales=(0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)``; classes are COCO's 90 numbers, in their order.
Images are in [0, 1], RGB, less the mean (0.48235, 0.45882, 0.40784) and times 255 (a standard deviation of 1 / 255).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from paperworks.papers.detection.ssd.ssd import Config
from paperworks.tasks.base import Published

_FIRST = {0: (0, 0), 2: (0, 2), 5: (1, 0), 7: (1, 2), 10: (2, 0), 12: (2, 2), 14: (2, 4), 17: (3, 0), 19: (3, 2), 21: (3, 4)}
"""Index in torchvision's ``features`` -> our block and layer."""


def from_torchvision(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our names for the state dict of ``torchvision.models.detection.ssd300_vgg16``."""
    del config
    return {_ours(name): value for name, value in state.items()}


def _ours(name: str) -> str:
    name = re.sub(r"^backbone\.features\.(\d+)", lambda m: "trunk.blocks.{}.{}".format(*_FIRST[int(m[1])]), name)
    name = re.sub(r"^backbone\.extra\.0\.([135])\.", lambda m: f"trunk.blocks.4.{int(m[1]) - 1}.", name)
    name = re.sub(r"^backbone\.extra\.0\.7\.", "fc.", name)
    name = re.sub(r"^backbone\.extra\.(\d)\.", lambda m: f"extra.{int(m[1]) - 1}.", name)
    name = name.replace("backbone.scale_weight", "l2_norm.scale")
    name = re.sub(r"^head\.classification_head\.module_list\.", "conf.", name)
    return re.sub(r"^head\.regression_head\.module_list\.", "loc.", name)


SOURCES: Mapping[str, Callable[[Mapping[str, Tensor], Config], dict[str, Tensor]]] = {"torchvision": from_torchvision}
PUBLISHED: Mapping[str, Published] = {}
"""None: torchvision's file lies on no model hub."""
