"""ImageNet weights of VGG-16 as published by torchvision, from which the paper's networks start.

Their images are in [0, 1], RGB, less the mean (0.485, 0.456, 0.406) and divided by (0.229, 0.224, 0.225); the Caffe weights that the
paper used saw BGR in 0..255 less a mean. Nothing is published for fc8 and for the multi-scale branches: they stay as initialised.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paperworks.papers.segmentation.deeplab_crf.deeplab_crf import VARIANTS, Config
from paperworks.tasks.base import Published

CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices in torchvision's ``features``, stage by stage."""


def from_torchvision(state: Mapping[str, Tensor], config: Config = VARIANTS["largefov"]) -> dict[str, Tensor]:
    """Our names for the state dict of ``torchvision.models.vgg16``; the rest of the network stays as it is.

    The fully connected layers become convolutions. fc6 is a 7x7 filter; smaller ones keep every second or third of its rows and
    columns, narrower ones every n-th feature (section 3.2; which features the authors kept is not stated).
    """
    out: dict[str, Tensor] = {}
    for stage, indices in enumerate(CONVOLUTIONS):
        for layer, index in enumerate(indices):
            for kind in ("weight", "bias"):
                out[f"stages.{stage}.{layer}.0.{kind}"] = state[f"features.{index}.{kind}"]
    keep = torch.arange(0, 4096, 4096 // config.features)
    taps = torch.linspace(0, 6, config.kernel).long()
    fc6 = state["classifier.0.weight"].view(4096, 512, 7, 7)
    out["fc6.0.weight"] = fc6[keep][:, :, taps][:, :, :, taps]
    out["fc6.0.bias"] = state["classifier.0.bias"][keep]
    out["fc7.0.weight"] = state["classifier.3.weight"][keep][:, keep, None, None]
    out["fc7.0.bias"] = state["classifier.3.bias"][keep]
    return out


SOURCES = {"torchvision": from_torchvision}
VGG16 = Published(
    source="torchvision",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    licence="BSD-3-Clause (torchvision); trained on ImageNet, whose own terms are for research",
)
"""Nothing is published for fc8: its 1000 classes are those of a layer that the paper throws away."""
PUBLISHED = {"largefov": VGG16, "msc_largefov": VGG16}
