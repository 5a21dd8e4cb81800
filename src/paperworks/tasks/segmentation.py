"""Segmentation: every pixel gets a class.

A sample is ``image`` (C H W, float32 in [0, 1]), ``mask`` (H W, class index, 255 = ignore) and, where the labels tell objects apart,
``instances`` (H W, 0 = background). A network returns ``logits`` (B K h w), which cover the input less its grid's margin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors

from paperworks.data import Folder, Item, open_folder
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.tasks.base import Batch, Grid, Output, Recipe, Sample, Spec, centre_crop, grid_of
from paperworks.tasks.drawing import display, error_map, overlay, panel
from paperworks.tasks.metrics import SegmentationScores
from paperworks.tasks.tiling import predict_array

IGNORE = 255
Predict = Callable[[Tensor], Tensor]
"""Image C H W in [0, 1], any size -> probabilities K H W."""


class Segmentation:
    """A data set seen as a segmentation task."""

    name = "segmentation"
    metric = "dice"
    higher_is_better = True

    def __init__(self, source: str | Path, *, progress: Callable[[int, int], None] | None = None) -> None:
        """Open a folder, an annotation file or ``pack:NAME``.

        Raises:
            InputError: there is nothing to learn from.
        """
        self.folder: Folder = open_folder(source, progress=progress)
        self.train: tuple[Item, ...] = self.folder.train
        self.val: tuple[Item, ...] = self.folder.val
        if not self.train or not self.val:
            raise InputError(
                f"{self.folder.source}: {len(self.train)} training and {len(self.val)} validation images with masks; "
                "add images, or say which is which in splits.json"
            )
        print_ = self.folder.fingerprint
        if len(self.folder.class_names) < 2:
            raise InputError(f"{self.folder.source}: the masks hold one class only; there is nothing to tell apart")
        self.spec = Spec(
            task=self.name,
            channels=print_.channels,
            classes=tuple(self.folder.class_names),
            size=tuple(print_.median_size),
            mean=tuple(print_.mean),
            std=tuple(max(s, 1e-4) for s in print_.std),
            range=(float(print_.range[0]), float(print_.range[1])),
            spacing=tuple(print_.spacing) if print_.spacing else None,
            instances=self.folder.instances,
        )

    def check(self, spec: Spec) -> None:
        """Refuse data on which a network built for ``spec`` cannot be measured.

        Raises:
            InputError: other classes or channels.
        """
        for what, ours, theirs in (("classes", self.spec.classes, spec.classes), ("channels", self.spec.channels, spec.channels)):
            if ours != theirs:
                raise InputError(
                    f"{self.folder.source} has {what} {ours} where the model was trained on {theirs}; give data of the same kind"
                )

    def sample(self, item: Item) -> Sample:
        """One example as it lies on the disk."""
        mask = torch.from_numpy(self.folder.mask(item).astype(np.int64))
        sample: Sample = {
            "image": tv_tensors.Image(self.folder.unit(self.folder.image(item))),
            "mask": tv_tensors.Mask(mask),
            "name": item.name,
        }
        if self.folder.instances and (instances := self.folder.instance_map(item)) is not None:
            sample["instances"] = tv_tensors.Mask(torch.from_numpy(instances.astype(np.int32)))
        return sample

    def training_sample(self, item: Item, recipe: Recipe, grid: Grid, generator: torch.Generator) -> Sample:
        """One augmented example of a valid input size; the network's output covers its centre."""
        return recipe.augment(self.sample(item), self.patch(recipe, grid), generator)

    def patch(self, recipe: Recipe, grid: Grid) -> tuple[int, ...]:
        """Height and width of training inputs."""
        return tuple(grid.fit(min(recipe.patch, length)) for length in self.spec.size)

    @staticmethod
    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy plus soft Dice, the loss that a paper without its own is trained with."""
        logits = output["logits"]
        target = centre_crop(batch["mask"], tuple(logits.shape[2:]))
        cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE)
        dice = 1 - soft_dice(logits.float().softmax(1), target)
        return {"loss": cross_entropy + dice, "cross_entropy": cross_entropy, "dice_loss": dice}

    def scores(self) -> SegmentationScores:
        """An accumulator of the task's metrics over a split."""
        return SegmentationScores(self.spec.classes, ignore=IGNORE, instances=self.spec.instances)

    def evaluate(
        self, predict: Predict, items: Sequence[Item] | None = None, *, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of ``predict`` over ``items`` (default: the validation split), and those of each image."""
        items = self.val if items is None else items
        scores = self.scores()
        for i, item in enumerate(items):
            sample = self.sample(item)
            scores.update(predict(sample["image"].as_subclass(Tensor)), sample["mask"], sample.get("instances"), sample["name"])
            if progress:
                progress(i + 1, len(items))
        return scores.compute(), scores.per_image()

    def picture(self, predict: Predict, items: Sequence[Item], path: Path) -> None:
        """A sheet with a row per image: image, truth, prediction, errors."""
        rows = []
        for item in items:
            sample = self.sample(item)
            image, mask = sample["image"].as_subclass(Tensor), sample["mask"].as_subclass(Tensor)
            predicted = predict(image).argmax(0)
            pictures = [display(image), self.overlay(image, mask), self.overlay(image, predicted), error_map(image, mask, predicted)]
            rows.append(panel(pictures, [sample["name"], "truth", "prediction", "errors"], side=240))
        width = max(row.shape[1] for row in rows)
        sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows])
        with atomic(path) as temporary:
            PIL.Image.fromarray(sheet).save(temporary)

    def overlay(self, image: Tensor, labels: Tensor) -> np.ndarray:
        """Labels drawn on the image, H W 3 uint8."""
        return overlay(image, labels, len(self.spec.classes))

    def baselines(self) -> dict[str, Predict]:
        """What a table must be better than: Otsu's threshold and the majority class."""
        return {"otsu": self._otsu(), "majority": self._majority()}

    def _majority(self) -> Predict:
        shares = self.folder.fingerprint.class_pixels
        winner = int(np.argmax([shares[c] for c in range(len(self.spec.classes))]))

        def majority(image: Tensor) -> Tensor:
            out = torch.zeros(len(self.spec.classes), *image.shape[1:])
            out[winner] = 1
            return out

        return majority

    def _otsu(self) -> Predict:
        """Otsu's threshold between the two sides of each image; each side gets the class that it holds most often in training.

        A side is told from the other by class frequency relative to the class's overall share, so that the rarer class has its side.
        """
        classes = len(self.spec.classes)
        counts = np.zeros((2, classes))
        for item in self.train[:64]:
            sample = self.sample(item)
            bright = bright_side(sample["image"].as_subclass(Tensor))
            mask = sample["mask"].as_subclass(Tensor)
            for side in (0, 1):
                counts[side] += torch.bincount(mask[(bright == bool(side)) & (mask != IGNORE)], minlength=classes).numpy()[:classes]
        lift = counts / np.maximum(counts.sum(0, keepdims=True), 1)
        sides = lift.argmax(0)  # class -> the side where it is at home
        winner = [int(np.argmax(np.where(sides == side, counts[side], -1))) for side in (0, 1)]

        def otsu(image: Tensor) -> Tensor:
            bright = bright_side(image)
            return F.one_hot(torch.where(bright, winner[1], winner[0]), classes).permute(2, 0, 1).float()

        return otsu


def bright_side(image: Float[Tensor, "C H W"]) -> Tensor:
    """Pixels above Otsu's threshold (the one that maximises the variance between the two sides) of the mean over channels, H W bool."""
    grey = image.mean(0)
    low, high = float(grey.min()), float(grey.max())
    if high <= low:
        return torch.zeros_like(grey, dtype=torch.bool)
    bins = 256
    level = ((grey - low) / (high - low) * (bins - 1)).round().long()
    share = torch.bincount(level.flatten(), minlength=bins).double() / level.numel()
    below = share.cumsum(0)
    moment = (share * torch.arange(bins)).cumsum(0)
    between = (moment[-1] * below - moment) ** 2 / (below * (1 - below)).clamp_min(1e-12)
    return level > int(between[:-1].argmax())


def soft_dice(probabilities: Float[Tensor, "B K *S"], target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice over the batch, averaged over the classes but the first (the background)."""
    classes = probabilities.shape[1]
    valid = target != IGNORE
    truth = F.one_hot(target.where(valid, 0), classes).movedim(-1, 1) * valid.unsqueeze(1)
    probabilities = probabilities * valid.unsqueeze(1)
    axes = (0, *range(2, probabilities.ndim))
    overlap = (probabilities * truth).sum(axes)
    size = probabilities.sum(axes) + truth.sum(axes)
    return ((2 * overlap + smooth) / (size + smooth))[1:].mean()


class Deployed(nn.Module):
    """A trained network as it is used: images B C H W in [0, 1] of a valid size in, probabilities B K h w out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.network = network
        self.grid = grid_of(network)
        shape = (1, spec.channels, *(1,) * spec.ndim)
        self.register_buffer("mean", torch.tensor(spec.mean).view(shape))
        self.register_buffer("std", torch.tensor(spec.std).view(shape))

    def forward(self, image: Tensor) -> Tensor:
        """Normalise, run, softmax."""
        return self.network((image - self.mean) / self.std)["logits"].softmax(1)


def predictor(deployed: Callable[[Tensor], Tensor], spec: Spec, grid: Grid, *, window: int = 1024, overlap: float = 0.25) -> Predict:
    """A function from an image of any size to its probabilities, tiled where it is larger than ``window`` pixels a side."""

    def predict(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return predict_array(deployed, image, grid, window=window, overlap=overlap)

    return predict
