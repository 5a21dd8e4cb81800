"""Trained Inceptions: timm's state dicts, which list the same layers in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paperworks.papers.backbones.inception_v4.inception_v4 import Config, Inception
from paperworks.tasks.base import Published


def timm(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Each tensor under our name for its place; v3's second classifier, which stands before the last resolution there, comes behind it.

    Raises:
        ValueError: the layers differ in number or in shape.
    """
    second = {name: value for name, value in state.items() if name.startswith("AuxLogits.")}
    rest = {name: value for name, value in state.items() if name not in second}
    head = dict(list(rest.items())[-2:])  # the classifier's weight and bias
    values = [*(value for name, value in rest.items() if name not in head), *second.values(), *head.values()]
    with torch.device("meta"):
        image = next(value for value in state.values() if value.ndim == 4)
        ours = Inception(image.shape[1], len(values[-1]), int(config.image_size or 0), config).state_dict()
    if [value.shape for value in values] != [value.shape for value in ours.values()]:
        raise ValueError("these are not the layers of this network")
    return dict(zip(ours, values))


SOURCES = {"timm": timm}

LICENCE = "Apache-2.0; ImageNet's own terms are for research"
HALF = (0.5, 0.5, 0.5)
PUBLISHED = {
    "v4": Published(source="timm", repo="timm/inception_v4.tf_in1k", licence=LICENCE, mean=HALF, std=HALF),
    "resnet_v2": Published(source="timm", repo="timm/inception_resnet_v2.tf_in1k", licence=LICENCE, mean=HALF, std=HALF),
    "v3": Published(source="timm", repo="timm/inception_v3.tf_in1k", licence=LICENCE, mean=HALF, std=HALF),
    "v3_auxiliary": Published(source="timm", repo="timm/inception_v3.tv_in1k", licence=LICENCE, mean=HALF, std=HALF),
}
"""Of TF-slim, converted by timm; the one with a second classifier is torchvision's."""
