"""torchvision's COCO weights for ``resnet50_fpn``: names mapped to ours.

They were trained with frozen batch norms of epsilon 0, which ``norm="frozen"`` gives; classes are COCO's 90 numbers, in their order. Images
are in [0, 1], RGB, less the mean (0.485, 0.456, 0.406) and divided by (0.229, 0.224, 0.225).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from paperworks.papers.detection.faster_rcnn.faster_rcnn import Config
from paperworks.tasks.base import Published

_NAMES = (
    (r"^backbone\.body\.", "trunk."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.smooth.\1."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn.conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn.cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.reg."),
    (r"^roi_heads\.box_head\.", "head."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "head.cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "head.reg."),
)


def from_torchvision(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our names for the state dict of ``torchvision.models.detection.fasterrcnn_resnet50_fpn``."""
    out = {}
    for name, value in state.items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        out[name] = value
    if config.norm == "batch":  # which counts its batches
        for name in [n for n in out if n.endswith(".running_mean")]:
            out.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return out


SOURCES: Mapping[str, Callable[[Mapping[str, Tensor], Config], dict[str, Tensor]]] = {"torchvision": from_torchvision}
PUBLISHED: Mapping[str, Published] = {}
"""None: torchvision's file lies on no model hub."""
