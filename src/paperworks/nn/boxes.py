"""Boxes for detectors: their coding relative to reference boxes, assignment, suppression. Boxes are x1 y1 x2 y2 in pixels.

N reference boxes (anchors, default boxes, proposals), G true boxes, K classes of objects (background is none of them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.ops import nms

Weights = tuple[float, float, float, float]
"""Factors on t_x, t_y, t_w, t_h: one over their standard deviations."""
LARGEST = math.log(1000 / 16)
"""Bound on t_w and t_h when they are decoded, so that an early network's exponentials stay finite (Detectron's)."""
BACKGROUND, BETWEEN = -1, -2
"""What :func:`match` says of boxes that are no object's."""


def encode(boxes: Float[Tensor, "*n 4"], anchors: Float[Tensor, "*n 4"], weights: Weights = (1, 1, 1, 1)) -> Float[Tensor, "*n 4"]:
    """Where ``boxes`` lie as seen from ``anchors``: t = ((x - x_a) / w_a, (y - y_a) / h_a, log(w / w_a), log(h / h_a)) (R-CNN's coding).

    x, y, w, h are a box's centre, width and height; widths and heights must be positive.
    """
    (x, y, w, h), (x_a, y_a, w_a, h_a) = _centred(boxes), _centred(anchors)
    t = torch.stack([(x - x_a) / w_a, (y - y_a) / h_a, (w / w_a).log(), (h / h_a).log()], -1)
    return t * t.new_tensor(weights)


def decode(t: Float[Tensor, "*n 4"], anchors: Float[Tensor, "*#n 4"], weights: Weights = (1, 1, 1, 1)) -> Float[Tensor, "*n 4"]:
    """The inverse of :func:`encode`."""
    t_x, t_y, t_w, t_h = (t / t.new_tensor(weights)).unbind(-1)
    x_a, y_a, w_a, h_a = _centred(anchors)
    x, y = t_x * w_a + x_a, t_y * h_a + y_a
    w, h = t_w.clamp(max=LARGEST).exp() * w_a, t_h.clamp(max=LARGEST).exp() * h_a
    return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], -1)


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1, y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


def clip(boxes: Float[Tensor, "*n 4"], side: float) -> Float[Tensor, "*n 4"]:
    """Boxes cut off at the border of a square image."""
    return boxes.clamp(0, side)


def match(iou: Float[Tensor, "G N"], positive: float, negative: float) -> Int[Tensor, " N"]:
    """For each of N boxes the true box that it overlaps most: its index if the overlap is ``positive`` or more.

    Below ``negative`` the box is ``BACKGROUND``, and what lies between the two is ``BETWEEN``.
    """
    if not len(iou):
        return torch.full((iou.shape[1],), BACKGROUND, device=iou.device)
    best, index = iou.max(0)
    return index.where(best >= positive, torch.where(best < negative, BACKGROUND, BETWEEN))


def of_image(boxes: Float[Tensor, "M 4"], labels: Int[Tensor, " M"]) -> tuple[Float[Tensor, "G 4"], Int[Tensor, " G"]]:
    """One image's true boxes and classes out of a batch, where a class of -1 fills up the rows that the image has no object for."""
    real = labels >= 0
    return boxes[real], labels[real]


def grid_boxes(shapes: Float[Tensor, "A 4"], size: tuple[int, int], stride: tuple[float, float], offset: float) -> Float[Tensor, "N 4"]:
    """Boxes around (0, 0) laid over a feature map of height and width ``size``; N = height * width * A, row by row.

    ``stride`` is the step down and to the right in pixels of the image, ``offset`` the place of the first centre in steps.
    """
    y, x = ((torch.arange(n, device=shapes.device, dtype=shapes.dtype) + offset) * step for n, step in zip(size, stride))
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([x, y, x, y], -1).view(-1, 1, 4)
    return (centres + shapes).view(-1, 4)


def rows(maps: Float[Tensor, "B AQ H W"], columns: int) -> Float[Tensor, "B N {columns}"]:
    """What a convolution says of A boxes at each place as rows in the order of :func:`grid_boxes`; each box has ``columns`` channels."""
    batch, _, height, width = maps.shape
    return maps.view(batch, -1, columns, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, columns)


def suppress(boxes: Float[Tensor, "N 4"], scores: Float[Tensor, " N"], groups: Int[Tensor, " N"], iou: float) -> Bool[Tensor, " N"]:
    """Greedy non-maximum suppression within each group: whether a box is kept, as no better one of its group overlaps it by more than ``iou``.

    The answer has one size whatever is kept, which batches and exported graphs need.
    """
    apart = groups.to(boxes.dtype) * (boxes.max() + 1)  # groups are moved to where they do not meet
    kept = nms(boxes + apart[:, None], scores, iou)
    return torch.zeros_like(scores).index_put((kept,), scores.new_ones(())) > 0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How a detector's many boxes become its few detections."""

    score: float = 0.05
    """What scores less is dropped."""
    iou: float = 0.5
    """Of two boxes of a class that overlap more, the better one stays."""
    candidates: int = 400
    """Boxes of each class, at most, that go into the suppression."""
    keep: int = 100
    """Detections of an image, at most."""


class Detect(nn.Module):
    """Score threshold, suppression by class and a limit on the number, with as many rows for each image."""

    MOST = 2000
    """Boxes of all classes together that go into the suppression: above it the time would be noticed, and so weak a box is never kept."""

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection

    def forward(
        self, boxes: Float[Tensor, "B N Q 4"], scores: Float[Tensor, "B N K"]
    ) -> tuple[Float[Tensor, "B M 4"], Float[Tensor, "B M"], Int[Tensor, "B M"]]:
        """Boxes, scores and classes of the detections, best first; rows that are none have score 0, class -1 and no extent.

        Args:
            boxes: one for each class (Q = K) or one for all (Q = 1).
            scores: of each class of objects, from 0 to 1.
        """
        found = [self._one(b, s) for b, s in zip(boxes.unbind(0), scores.unbind(0), strict=True)]
        b, s, c = (torch.stack(parts) for parts in zip(*found))
        return b, s, c

    def _one(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of, classes = self.selection, scores.shape[1]
        scores, index = scores.topk(min(of.candidates, len(scores)), dim=0)  # n K
        labels = torch.arange(classes, device=scores.device).expand_as(index)
        boxes = boxes[index, labels if boxes.shape[1] > 1 else 0].view(-1, 4)  # n K 4
        scores, order = scores.reshape(-1).topk(min(self.MOST, scores.numel()))
        boxes, labels = boxes[order], labels.reshape(-1)[order]
        kept = suppress(boxes, scores, labels, of.iou) & (scores > of.score)
        scores, order = (scores * kept).topk(min(of.keep, len(scores)))
        real = scores > 0
        return boxes[order] * real[:, None], scores, labels[order].where(real, -1)
