"""Segmentation: every pixel of an image, or voxel of a volume, gets a class.

A sample is ``image`` (C H W, float32 in [0, 1]), ``mask`` (H W, class index, 255 = ignore) and, where the labels tell objects apart,
``instances`` (H W, 0 = background). A network returns ``logits`` (B K h w), which cover the input less its grid's margin. Volumes have
D H W where images have H W, and ``spacing``, the millimetres between voxels.

What a size means for images it means for volumes by its number of pixels: a training crop of ``patch`` has patch x patch voxels at the
most, and so has a ``window``, with sides of equal length in millimetres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors

from paperworks.data import Folder, Item, open_folder
from paperworks.data.nifti import is_volume, stem
from paperworks.errors import InputError
from paperworks.tasks import drawing, masks, volumes
from paperworks.tasks.base import Batch, Grid, Output, Recipe, Sample, Spec, centre_crop, grid_of, spec_of
from paperworks.tasks.contract import Deployed, Model, Options, Progress, Task
from paperworks.tasks.drawing import Picture, display, error_map, montage, overlay, places
from paperworks.tasks.metrics import SegmentationScores
from paperworks.tasks.tiling import predict_array
from paperworks.tasks.volumes import window_of

IGNORE = 255
KINDS = {2: "images", 3: "volumes"}
Predict = Callable[[Tensor], Tensor]
"""Image C H W (or volume C D H W) in [0, 1], any size -> probabilities K H W (or K D H W)."""


class Probabilities(Deployed):
    """Images B C H W in [0, 1] of a valid size -> probabilities B K h w."""

    def finish(self, output: Output) -> Tensor:
        """Softmax over the classes."""
        return output["logits"].softmax(1)


class SampleScores:
    """Scores of predictions beside the samples that they were made for."""

    def __init__(self, scores: SegmentationScores) -> None:
        self.inner = scores

    def update(self, prediction: Tensor, sample: Sample) -> None:
        """Count one image."""
        self.inner.update(prediction, sample["mask"], sample.get("instances"), sample["name"], sample.get("spacing"))

    def compute(self) -> dict[str, float]:
        """Metrics over all images."""
        return self.inner.compute()

    def per_item(self) -> list[dict[str, Any]]:
        """Metrics of each image."""
        return list(self.inner.per_image())


class Segmentation(Task):
    """A data set seen as a segmentation task."""

    name = "segmentation"
    pack = "pack:cardiac_mr"
    metric = "dice"
    metric_names = {
        "dice": ("Dice", "Dice 系数", 1),
        "iou": ("IoU", "交并比", 1),
        "boundary_f": ("Boundary F", "边界 F 值", 1),
        "accuracy": ("Pixel accuracy", "像素准确率", 1),
        "hd95": ("HD95 (mm)", "HD95（毫米）", -1),
    }
    explained = {
        "dice": (
            "Dice: twice the overlap of prediction and labels over the sum of their areas; 1 is perfect.",
            "Dice 系数：预测与标注重叠面积的两倍除以两者面积之和；1 为完全一致。",
        ),
        "iou": ("IoU: overlap over union; always at most Dice.", "交并比：重叠面积除以并集面积，不会大于 Dice 系数。"),
        "boundary_f": (
            "Boundary F: how well the outlines agree within a small tolerance, which the overlap of large objects hides.",
            "边界 F 值：轮廓在小容差内的吻合程度，大目标的重叠率往往掩盖这一点。",
        ),
        "accuracy": (
            "Pixel accuracy: share of pixels with the right class; high for anyone where one class fills most of the image.",
            "像素准确率：类别正确的像素比例；某一类占据大部分画面时，任何方法都会很高。",
        ),
        "hd95": (
            "HD95, of volumes: 95 % of each surface lies nearer than this to the other one; a class that was missed counts with the diagonal.",
            "HD95（仅体数据）：两个表面各有 95% 的点到另一表面的距离不超过此值；整类漏检时按体数据的对角线长度计。",
        ),
    }
    baseline_names = {"otsu": ("Otsu's threshold", "Otsu 阈值"), "majority": ("Majority class", "多数类")}
    views = {"errors": ("errors", "误差"), "overlay": ("predictions", "预测")}

    def __init__(self, source: str | Path, *, progress: Progress | None = None) -> None:
        """Open a folder, an annotation file or ``pack:NAME``.

        Raises:
            InputError: there is nothing to learn from.
        """
        self.folder: Folder = open_folder(source, progress=progress)
        self.source = str(self.folder.source)
        self.sha256 = self.folder.fingerprint.sha256
        self.train = self.folder.train
        self.val = self.folder.val
        self.enough(self.folder.source, "images with masks", add="images")
        if len(self.folder.class_names) < 2:
            raise InputError(f"{self.folder.source}: the masks hold one class only; there is nothing to tell apart")
        self.spec = spec_of(self.name, self.folder.fingerprint, self.folder.class_names, instances=self.folder.instances)

    @classmethod
    def inspect(cls, source: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
        """What the folder says of itself."""
        return open_folder(source, progress=progress).describe()

    def describe(self) -> dict[str, Any]:
        """What the folder says of itself."""
        return self.folder.describe()

    def sample(self, item: Item) -> Sample:
        """One example as it lies on the disk."""
        mask = torch.from_numpy(self.folder.mask(item).astype(np.int64))
        sample: Sample = {
            "image": tv_tensors.Image(self.folder.unit(self.folder.image(item))),
            "mask": tv_tensors.Mask(mask),
            "name": item.name,
        }
        if self.spec.ndim == 3:
            sample["spacing"] = self.folder.spacing(item)
        if self.folder.instances and (instances := self.folder.instance_map(item)) is not None:
            sample["instances"] = tv_tensors.Mask(torch.from_numpy(instances.astype(np.int32)))
        return sample

    def training_sample(self, item: Item, recipe: Recipe, grid: Grid, generator: torch.Generator) -> Sample:
        """One augmented example of a valid input size; the network's output covers its centre."""
        return recipe.augment(self.sample(item), self.patch(recipe, grid), generator)

    def patch(self, recipe: Recipe, grid: Grid) -> tuple[int, ...]:
        """Height and width of training inputs; of volumes the depth comes first."""
        sides = window_of(self.spec.size, recipe.patch, self.spec.spacing)
        return tuple(grid.fit(min(side, length)) for side, length in zip(sides, self.spec.size, strict=True))

    def share_shown(self, recipe: Recipe) -> float:
        """Pixels of a training crop over those of an image of median size."""
        sides = window_of(self.spec.size, recipe.patch, self.spec.spacing)
        return math.prod(min(side, length) / length for side, length in zip(sides, self.spec.size, strict=True))

    def check(self, spec: Spec) -> None:
        """Refuse data on which a network built for ``spec`` cannot be measured.

        Raises:
            InputError: other classes or channels, or images for volumes.
        """
        super().check(spec)
        if self.spec.ndim != spec.ndim:
            raise InputError(
                f"{self.source} holds {KINDS[self.spec.ndim]} where the model was trained on {KINDS[spec.ndim]}; give such data"
            )

    @staticmethod
    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy plus soft Dice, the loss that a paper without its own is trained with."""
        logits = output["logits"]
        target = centre_crop(batch["mask"], tuple(logits.shape[2:]))
        cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE)
        dice = 1 - soft_dice(logits.float().softmax(1), target)
        return {"loss": cross_entropy + dice, "cross_entropy": cross_entropy, "dice_loss": dice}

    @classmethod
    def deploy(cls, network: nn.Module, spec: Spec) -> Probabilities:
        """Normalisation, network, softmax."""
        return Probabilities(network, spec)

    @classmethod
    def predictor(
        cls, deployed: Callable[[Tensor], Tensor], spec: Spec, grid: Grid, *, window: int = 1024, overlap: float = 0.25
    ) -> Predict:
        """A function from an image or volume of any size to its probabilities, tiled where it is larger than the window."""

        def predict(image: Tensor) -> Tensor:
            sides = window_of(tuple(image.shape[1:]), window, spec.spacing)
            with torch.inference_mode():
                return predict_array(deployed, image, grid, window=sides, overlap=overlap)

        return predict

    def scores(self) -> SampleScores:
        """An accumulator of the task's metrics over a split."""
        return SampleScores(SegmentationScores(self.spec.classes, ignore=IGNORE, instances=self.spec.instances))

    def shown(self, sample: Sample) -> dict[str, Picture]:
        """The image, and its labels drawn on it."""
        image, mask = self._flat(sample, self.given(sample), sample["mask"].as_subclass(Tensor))
        return {"input": display(image), "truth": self._overlay(image, mask)}

    def drawn(self, sample: Sample, prediction: Tensor) -> dict[str, Picture]:
        """What is wrong, and what was predicted."""
        image, mask, predicted = self._flat(sample, self.given(sample), sample["mask"].as_subclass(Tensor), prediction.argmax(0))
        return {"errors": error_map(image, mask, predicted), "overlay": self._overlay(image, predicted)}

    def _flat(self, sample: Sample, *given: Tensor) -> list[Tensor]:
        """As they are, or slices of volumes: those in which the truth has something."""
        if self.spec.ndim == 2:
            return list(given)
        chosen = places(sample["mask"].as_subclass(Tensor))
        return [montage(volume.cpu(), chosen) for volume in given]

    def legend(self) -> list[dict[str, Any]]:
        """The colours of errors and of the classes."""
        wrong = [
            {"colour": drawing.MISSED, "en": "missed (hatched)", "zh": "漏检（斜线）", "hatched": True, "view": "errors"},
            {"colour": drawing.FALSE, "en": "false alarm", "zh": "误检", "view": "errors"},
            {"colour": drawing.CONFUSED, "en": "one class for another", "zh": "类别混淆", "view": "errors"},
            {"colour": (255, 255, 255), "en": "true outline", "zh": "真实轮廓", "view": "errors"},
        ]
        classes = [{"colour": drawing.colour(i), "en": c, "zh": c, "view": ""} for i, c in enumerate(self.spec.classes) if i]
        return wrong + classes

    def _overlay(self, image: Tensor, labels: Tensor) -> Picture:
        return overlay(image, labels, len(self.spec.classes))

    def files(self, items: Sequence[Item]) -> list[Path]:
        """The images' files (the first channel's where channels are files of their own)."""
        return [item.images[0] for item in items]

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Images and NIfTI volumes."""
        return super().accepts(path) or is_volume(path)

    @classmethod
    def target(cls, name: Path) -> Path:
        """A mask is a PNG, that of a TIFF a TIFF; labels of a volume are .nii.gz."""
        if is_volume(name):
            return name.with_name(f"{stem(name)}.nii.gz")
        return name.with_suffix(".tif" if name.suffix.lower() in masks.TIFF else ".png")

    @classmethod
    def predict_file(cls, model: Model, source: Path, target: Path, options: Options) -> None:
        """Write a mask of class indexes; large TIFF images are read, predicted and written by rows, volumes predicted by slabs."""
        kind = 3 if is_volume(source) else 2
        if kind != model.spec.ndim:
            raise InputError(f"{source} is none of the {KINDS[model.spec.ndim]} that the model was trained on; give such files")
        (volumes if kind == 3 else masks).predict_file(model, source, target, options)

    @classmethod
    def plain_batch(cls, network: nn.Module, spec: Spec, *, size: int = 48, batch: int = 2, seed: int = 0) -> Batch:
        """Noise with labels of chance; every pixel is an object of its class."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *(grid_of(network).fit(size),) * spec.ndim)
        mask = torch.randint(0, len(spec.classes), shape, generator=generator)
        return {
            "image": torch.randn(batch, spec.channels, *shape[1:], generator=generator),
            "mask": mask,
            "instances": mask.int(),
            "weight": torch.ones(shape),
            "name": [f"noise {i}" for i in range(batch)],
        }

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
            return F.one_hot(torch.where(bright, winner[1], winner[0]), classes).movedim(-1, 0).float()

        return otsu


def bright_side(image: Float[Tensor, "C *S"]) -> Bool[Tensor, "*S"]:
    """Pixels above Otsu's threshold (the one that maximises the variance between the two sides) of the mean over channels."""
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
    """Soft Dice over the batch, averaged over the classes but the one that fills most of it.

    That is the background nearly always. Where it is not (thin dark membranes around large bright cells, class 0 and 1), leaving out class 0
    would leave out the very class that the term is there to help.
    """
    classes = probabilities.shape[1]
    valid = target != IGNORE
    truth = F.one_hot(target.where(valid, 0), classes).movedim(-1, 1) * valid.unsqueeze(1)
    probabilities = probabilities * valid.unsqueeze(1)
    axes = (0, *range(2, probabilities.ndim))
    overlap = (probabilities * truth).sum(axes)
    size = probabilities.sum(axes) + truth.sum(axes)
    dice = (2 * overlap + smooth) / (size + smooth)
    return (dice.sum() - dice[truth.sum(axes).argmax()]) / (classes - 1)
