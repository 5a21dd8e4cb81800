"""U-Net: Convolutional Networks for Biomedical Image Segmentation. Ronneberger, Fischer, Brox, MICCAI 2015, arXiv:1505.04597.

A contracting path gathers context; an expanding path of the same width brings it back to full resolution, and at every level takes
over the contracting path's map of that level, so that context and location meet. Borders between touching cells are learnt because
the loss weighs them, and thirty images are enough because elastic deformations multiply them.

Variant ``paper`` is the network of figure 1: valid convolutions, so the output is 92 pixels smaller on each side and tiles fit together
without seams. Most people know the padded ``same`` one with batch normalisation; it is here under its own name. The paper leaves open
how the classes are balanced, the learning rate and which layers drop out; what stands here is said beside each.

Shapes: B batch, C image channels, K classes, F features, S the spatial axes (H W, or D H W of a volume).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor, nn
from torchvision import tv_tensors

from paperworks.data.augment import Augment
from paperworks.nn.conv import LAYERS, DoubleConv, he_init
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Sample, centre_crop
from paperworks.tasks.segmentation import IGNORE, Segmentation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Figure 1 by default."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Features of each level; a 2x2 max pooling lies between two levels."""
    padding: Literal["valid", "same"] = "valid"
    """``valid``: each 3x3 convolution takes a pixel off every side, as in the paper. ``same``: zero padding keeps the size."""
    norm: bool = False
    """Batch normalisation after each 3x3 convolution, which then has no bias."""
    dropout: float = 0.5
    """At the end of the contracting path: after its two deepest levels, as in the authors' released network."""
    border_weight: float | None = 10.0
    """w0 of eq. 2; 0 leaves the class balance alone; None trains with the task's own loss (cross-entropy and soft Dice)."""
    border_sigma: float = 5.0
    """sigma of eq. 2 in pixels."""


class UNet(nn.Module):
    """Figure 1: contracting path on the left, expanding path on the right."""

    def __init__(self, channels: int, classes: int, config: Config, ndim: int = 2) -> None:
        super().__init__()
        of, widths, poolings = LAYERS[ndim], config.widths, len(config.widths) - 1
        valid = config.padding == "valid"

        def block(inputs: int, outputs: int) -> DoubleConv:
            return DoubleConv(inputs, outputs, norm=config.norm, padding=0 if valid else 1, ndim=ndim)

        self.contracting = nn.ModuleList(block(*pair) for pair in pairwise((channels, *widths)))
        self.pool = of.max_pool(2)
        self.dropout = nn.Dropout(config.dropout)
        rising = list(pairwise(widths[::-1]))
        self.up_convs = nn.ModuleList(of.up_conv(deep, wide, kernel_size=2, stride=2) for deep, wide in rising)
        self.expanding = nn.ModuleList(block(2 * wide, wide) for _, wide in rising)
        self.head = of.conv(widths[0], classes, kernel_size=1)
        he_init(self)

        step = 2**poolings  # sides at the bottom are whole numbers: 16 k + 12 pixels with four poolings; 92 are lost on each side
        self.grid = Grid(step, offset=-4 % step, margin=2 * (3 * step - 2)) if valid else Grid(step)

    def forward(self, image: Float[Tensor, "B C *S"]) -> Output:
        """``logits`` B K and the axes of the image less ``grid.margin`` on each side."""
        skips: list[Tensor] = []
        x = image
        for level, block in enumerate(self.contracting):
            x = block(x if level == 0 else self.pool(x))
            if level >= len(self.contracting) - 2:
                x = self.dropout(x)
            skips.append(x)
        x = skips.pop()
        for up_conv, block in zip(self.up_convs, self.expanding):
            x = up_conv(x)  # B 2F s -> B F 2s
            skip = centre_crop(skips.pop(), tuple(x.shape[2:]))
            x = block(torch.cat([skip, x], dim=1))  # B 2F 2s -> B F 2s (less four pixels where convolutions are valid)
        return {"logits": self.head(x)}


def touching(mask: Int[np.ndarray, "*S"], instances: Int[np.ndarray, "*S"]) -> Bool[np.ndarray, "*S"]:
    """Pixels next to (also diagonally) another instance of their class: made background, they separate the two (section 3)."""
    found = np.zeros(mask.shape, dtype=bool)
    for index in np.setdiff1d(mask, (0, IGNORE)):
        cells = np.where(mask == index, instances, 0)
        highest = ndimage.maximum_filter(cells, 3)
        lowest = ndimage.minimum_filter(np.where(cells > 0, cells, highest), 3)
        found |= (cells > 0) & (lowest != highest)
    return found


def class_balance(mask: Int[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """w_c of eq. 2: the pixels of each class that is present weigh the same in sum, and 1 on average. Ours; the paper gives no formula."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    counts[IGNORE] = 0
    each = counts.sum() / max(np.count_nonzero(counts), 1) / np.maximum(counts, 1)
    return np.where(counts > 0, each, 0.0)[mask]


def border_weights(instances: Int[np.ndarray, "*S"], w0: float = 10.0, sigma: float = 5.0) -> Float[np.ndarray, "*S"]:
    """Second term of eq. 2, w0 exp(-(d1 + d2)^2 / 2 sigma^2), on the background; 0 on the cells.

    d1 and d2 are the distances in pixels to the nearest and the second nearest cell, exact within six sigma of it; farther off, where
    the term is below 2e-8 w0, it is left at 0.

    Args:
        instances: 0 is background, every other number a cell.
        w0: largest weight, approached where two cells almost touch.
        sigma: how far apart two cells may be, in pixels.
    """
    reach = ceil(6 * sigma)
    d1, d2 = np.full((2, *instances.shape), np.inf)
    for index, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is not None:
            near = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
            distance = np.asarray(ndimage.distance_transform_edt(instances[near] != index))
            np.minimum(d2[near], np.maximum(d1[near], distance), out=d2[near])
            np.minimum(d1[near], distance, out=d1[near])
    return np.where(instances == 0, w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2)), 0.0)


def components(mask: Int[np.ndarray, "*S"]) -> Int[np.ndarray, "*S"]:
    """Connected components of each class, numbered from 1: the cells of a data set that does not tell cells apart."""
    found, total = np.zeros(mask.shape, dtype=np.int32), 0
    for index in np.setdiff1d(mask, (0, IGNORE)):
        parts, count = ndimage.label(mask == index)  # type: ignore[misc]
        found[parts > 0] = parts[parts > 0] + total
        total += count
    return found


class Labels:
    """What is made of a sample's labels after augmentation, so that distances are those of the pixels that the loss sees."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, sample: Sample) -> Sample:
        """Separate touching instances; add ``weight`` (w of eq. 2, float32, the mask's shape) where the loss wants it."""
        sample = dict(sample)
        mask = sample["mask"].numpy()
        if "instances" in sample:
            instances = sample["instances"].numpy()
            gap = touching(mask, instances)
            mask, instances = np.where(gap, 0, mask), np.where(gap, 0, instances)
            sample["mask"], sample["instances"] = tv_tensors.Mask(mask), tv_tensors.Mask(instances)
        else:
            instances = components(mask)
        if self.config.border_weight is not None:
            weight = class_balance(mask) + border_weights(instances, self.config.border_weight, self.config.border_sigma)
            sample["weight"] = torch.from_numpy(weight.astype(np.float32))
        return sample


def weighted_cross_entropy(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Eq. 1, the cross-entropy of each pixel weighted with w(x). The mean over the pixels; the paper writes the sum."""
    logits = output["logits"]
    size = tuple(logits.shape[2:])
    entropy = F.cross_entropy(logits, centre_crop(batch["mask"], size), ignore_index=IGNORE, reduction="none")
    return {"loss": (centre_crop(batch["weight"], size) * entropy).mean()}


def loss(config: Config) -> Loss:
    """Eq. 1, or the task's loss where there is no border weight."""
    return Segmentation.loss if config.border_weight is None else weighted_cross_entropy


VARIANTS = {
    "paper": Config(),
    "half": Config(widths=(32, 64, 128, 256, 512), padding="same", dropout=0.0, border_weight=None),
    "same": Config(padding="same", norm=True, dropout=0.0, border_weight=None),
    "small": Config(widths=(16, 32, 64, 128, 256), padding="same", norm=True, dropout=0.0, border_weight=None),
    "tiny": Config(widths=(8, 16, 32, 64, 128), padding="same", norm=True, dropout=0.0, border_weight=None),
    "test": Config(widths=(4, 8, 16), padding="same", norm=True),
}


def recipe(config: Config) -> Recipe:
    """The paper's training of the valid network; ours, for minutes on a laptop, of the padded ones."""
    if config.padding == "valid":
        # Section 3: one large tile at a time, so momentum 0.99; section 3.1: deformations of 10 pixels on a 3x3 grid, shift, rotation and
        # grey values. Learning rate, warm-up and the clipping of gradients are ours; the paper is silent.
        augment = Augment(flip=False, rotate=180, scale=(1, 1), shift=0.05, elastic=10, elastic_grid=3)
        return Recipe(optimizer="sgd", lr=1e-3, momentum=0.99, schedule="constant", batch_size=1, patch=388, augment=augment)
    if config.norm:
        lr = 3e-3 if config.widths[0] <= 16 else 1e-3
        return Recipe(lr=lr, weight_decay=1e-2, batch_size=8, patch=128, average=0.99)  # small crops: four times the steps
    return Recipe(lr=3e-4, batch_size=8, average=0.99)


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: UNet(spec.channels, len(spec.classes), config, spec.ndim),
    recipe=recipe,
    auto=("tiny", "small", "same"),
    loss=loss,
    prepare=Labels,
)
