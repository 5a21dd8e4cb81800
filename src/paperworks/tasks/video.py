"""Video classification: every film gets a class.

A sample is ``reel`` (a film of any length and size, whose frames are read when they are asked for) and ``label``. A network takes clips
C T S S of one length and side (``Grid(fixed=side, frames=T, step=tau)``: T frames, every tau-th of the film) and returns ``logits`` (B K).

To train, a clip is cut from a film at a random time and varied. In use several clips are spread over the film, from wide or tall frames three
crops are taken, and a prediction holds the probabilities of each of these views, V K: their mean is the film's, each by itself a clip's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.classes import ClassItem
from paperworks.data.clips import ClipFolder, is_clip, looks_like_clips, open_clip, open_clips
from paperworks.data.films import Film
from paperworks.data.images import unit
from paperworks.errors import InputError
from paperworks.tasks.base import Batch, Grid, Recipe, Sample, Spec, grid_of, spec_of
from paperworks.tasks.classification import Classification, ClassScores, titled
from paperworks.tasks.contract import Model, Predict, Progress
from paperworks.tasks.drawing import Picture, display, montage

CLIPS = 10
"""Clips of a film, at most, that a prediction looks at."""
CROPS = 3
"""Crops of each of them along the longer side of the frames."""
SQUARE = 1.1
"""Frames whose longer side is at most so many times the shorter one are seen by one crop."""
SHOWN = 9
"""Frames in a picture of a film."""
LOOKED_AT = 16
"""Frames of a film that the baselines see."""
THUMBNAIL = 8
"""Side of the baselines' thumbnails."""


class Reel:
    """A film as networks are given it: frames by their numbers, in [0, 1], with the channels of the data set."""

    def __init__(self, film: Film, value_range: tuple[float, float], channels: int) -> None:
        self.film, self.range, self.channels = film, value_range, channels

    def __len__(self) -> int:
        return len(self.film)

    def frames(self, places: Sequence[int]) -> Float[Tensor, "C T H W"]:
        """Those frames, one after another."""
        try:
            return torch.stack([unit(self.film.frame(i), self.range, self.channels) for i in places], 1)
        except InputError as error:
            path = str(self.film.path)
            raise error if path in str(error) else InputError(f"{path}: {error}") from None

    def spread(self, count: int) -> Float[Tensor, "C T H W"]:
        """So many frames at even distances, from the first to the last."""
        return self.frames(evenly(len(self), count))


def evenly(length: int, count: int) -> list[int]:
    """Numbers of frames from 0 to ``length`` - 1 at even distances."""
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def clip_places(length: int, grid: Grid, at: float) -> list[int]:
    """Numbers of a clip's frames in a film of ``length`` frames, ``at`` (0 to 1) between its earliest and its latest place.

    A film that is too short for a clip is spread evenly over it, so that some frames stand twice.
    """
    room = length - ((grid.frames - 1) * grid.step + 1)
    if room < 0:
        return evenly(length, grid.frames)
    first = round(at * room)
    return [first + i * grid.step for i in range(grid.frames)]


def all_clips(length: int, grid: Grid) -> list[list[int]]:
    """The clips by which a film is judged: as many as cover it, ``CLIPS`` at most, at even distances."""
    count = min(max(math.ceil(length / (grid.frames * grid.step)), 1), CLIPS)
    return [clip_places(length, grid, i / max(count - 1, 1)) for i in range(count)]


def resized(clip: Float[Tensor, "C T H W"], short: int) -> Float[Tensor, "C T h w"]:
    """Its shorter side brought to ``short``, bilinearly and antialiased."""
    height, width = clip.shape[2:]
    factor = short / min(height, width)
    size = (max(short, round(height * factor)), max(short, round(width * factor)))
    if size == (height, width):
        return clip
    return F.interpolate(clip.transpose(0, 1), size, mode="bilinear", antialias=True).transpose(0, 1).clamp(0, 1)


def crops(clip: Float[Tensor, "C T H W"], side: int) -> Float[Tensor, "V C T side side"]:
    """Squares of a clip along the longer side of its frames: both ends and the middle; the middle alone where the frames are nearly square."""
    clip = resized(clip, side)
    rest = [n - side for n in clip.shape[2:]]
    places = [i / (CROPS - 1) for i in range(CROPS)] if max(rest) > (SQUARE - 1) * side else [0.5]
    corners = [[round(at * r) for r in rest] for at in places]
    return torch.stack([clip[:, :, top : top + side, left : left + side] for top, left in corners])


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """A random part of a clip, the same in all of its frames."""

    scale: tuple[float, float] = (256 / 224, 320 / 224)
    """The shorter side of the frames before the crop, in sides of the crop, drawn uniformly."""
    flip: float = 0.5
    """Chance of mirrored frames; 0 where left and right matter."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """``sample`` with another crop of its ``clip``, of the height and width of ``patch``."""
        draw = torch.rand(4, generator=generator).tolist()
        low, high = self.scale
        clip = resized(sample["clip"], round(patch[0] * (low + (high - low) * draw[0])))
        top, left = (int(x * (n - p + 1)) for x, n, p in zip(draw[1:3], clip.shape[2:], patch))
        clip = clip[:, :, top : top + patch[0], left : left + patch[1]]
        return sample | {"clip": (clip.flip(-1) if draw[3] < self.flip else clip).contiguous()}


class VideoScores(ClassScores):
    """Those of classification for whole films, and ``clip_top1``, the accuracy of single views."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self.right: list[Tensor] = []

    def update(self, prediction: Float[Tensor, "V K"], sample: Sample) -> None:
        """Count one film."""
        super().update(prediction.mean(0), sample)
        self.right.append((prediction.argmax(1).cpu() == int(sample["label"])).float())

    def compute(self) -> dict[str, float]:
        """Metrics over all films; of ``clip_top1`` over all views."""
        return {**super().compute(), "clip_top1": float(torch.cat(self.right).mean())}

    def per_item(self) -> list[dict[str, Any]]:
        """``top1`` (0 or 1), ``nll`` and ``clip_top1`` of each film."""
        return [row | {"clip_top1": float(right.mean())} for row, right in zip(super().per_item(), self.right)]


class Video(Classification):
    """A data set of films with a class each."""

    name = "video"
    noun = ("film", "films", "视频")
    pack = "pack:moving_digits"
    metric_names: ClassVar = {**Classification.metric_names, "clip_top1": ("Accuracy of single clips", "单个片段准确率", 1)}
    explained: ClassVar = {
        **Classification.explained,
        "top1": ("Accuracy: share of films whose most probable class, by the mean over their clips, is right.", "准确率：各片段概率取平均后，概率最高的类别正确的视频比例。"),
        "clip_top1": ("Accuracy of single clips: each clip and crop is judged by itself.", "单个片段准确率：每个片段、每个裁剪单独判断。"),
    }  # fmt: skip
    baseline_names: ClassVar = {
        "majority": ("Majority class", "多数类"),
        "mean_frame": ("Nearest mean of mean frames (blind to motion)", "最近均值：平均帧（看不到运动）"),
        "differences": ("Nearest mean of frame differences", "最近均值：帧间差"),
    }
    inputs: ClassVar = ("clip",)
    images: ClassVar = ("clip",)

    folder: ClipFolder  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, source: str | Path, *, progress: Progress | None = None) -> None:
        """Open class folders of films, ``clips.csv`` or ``pack:NAME``.

        Raises:
            InputError: there is nothing to learn from.
        """
        self.folder = open_clips(source, progress=progress)
        self.source = str(source)
        self.sha256 = self.folder.fingerprint.sha256
        self.train, self.val = self.folder.split("train"), self.folder.split("val")
        self.enough(source, "films with labels", add="films")
        if len(self.folder.classes) < 2:
            raise InputError(f"{source} holds one class only; there is nothing to tell apart")
        frames, *size = self.folder.fingerprint.median_size
        self.spec = spec_of(self.name, self.folder.fingerprint, self.folder.classes, size=tuple(size), more={"frames": frames})

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """``clips.csv``, or class folders that hold videos or folders of numbered frames."""
        return looks_like_clips(path)

    def sample(self, item: ClassItem) -> Sample:
        """One film with its label."""
        print_ = self.folder.fingerprint
        return {
            "reel": Reel(self.folder.film(item), print_.range, print_.channels),
            "label": torch.tensor(item.label),
            "name": item.name,
        }

    def training_sample(self, item: ClassItem, recipe: Recipe, grid: Grid, generator: torch.Generator) -> Sample:
        """One varied clip from a random place in the film."""
        sample = self.sample(item)
        reel = sample.pop("reel")
        sample["clip"] = reel.frames(clip_places(len(reel), grid, float(torch.rand((), generator=generator))))
        return recipe.augment(sample, (grid.fixed, grid.fixed), generator)

    def given(self, sample: Sample) -> Reel:
        """The film."""
        return sample["reel"]

    @classmethod
    def network_input(cls, given: Reel, grid: Grid) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The middle of the film, C T side side."""
        views = crops(given.frames(clip_places(len(given), grid, 0.5)), grid.fixed)
        return views[len(views) // 2]

    @classmethod
    def predictor(
        cls, deployed: Callable[[Tensor], Tensor], spec: Spec, grid: Grid, *, window: int = 1024, overlap: float = 0.25
    ) -> Predict:
        """A function from a film to the probabilities of its views, V K."""

        def predict(reel: Reel) -> Tensor:
            with torch.inference_mode():
                found = [deployed(crops(reel.frames(places), grid.fixed)) for places in all_clips(len(reel), grid)]
                return torch.cat(found).float().cpu()

        return predict

    def scores(self) -> VideoScores:
        """An accumulator of the task's metrics over a split."""
        return VideoScores(self.spec.classes)

    def baselines(self) -> dict[str, Predict]:
        """The commonest class; the class whose mean of time-averaged thumbnails is nearest; the same of thumbnails of what changes."""
        labels = torch.tensor([i.label for i in self.train])
        counts = torch.bincount(labels, minlength=len(self.spec.classes)).float()
        films = torch.stack([thumbnails(self.given(self.sample(i))) for i in self.train])

        def nearest_mean(describe: Callable[[Tensor], Tensor]) -> Predict:
            known = describe(films)
            means = torch.stack([known[labels == k].mean(0) if n else torch.full_like(known[0], torch.inf) for k, n in enumerate(counts)])
            spread = (known - means[labels]).square().sum(1).mean().clamp_min(1e-12)
            return lambda reel: (-8 * (describe(thumbnails(reel)[None]) - means).square().sum(1) / spread).softmax(0)[None]

        return {
            "majority": lambda _: (counts / counts.sum())[None],
            "mean_frame": nearest_mean(lambda films: films.mean(2).flatten(1)),
            "differences": nearest_mean(differences),
        }

    def shown(self, sample: Sample) -> dict[str, Picture]:
        """Frames of the film, row by row, under the name of its class."""
        frames = montage(self.given(sample).spread(SHOWN), range(SHOWN))
        return {"input": titled(display(frames), self.spec.classes[int(sample["label"])])}

    def drawn(self, sample: Sample, prediction: Tensor) -> dict[str, Picture]:
        """The film's most probable classes as bars, the right one green."""
        return super().drawn(sample, prediction.mean(0))

    def files(self, items: Sequence[ClassItem]) -> list[Path]:
        """The films' files, or the folders of their frames."""
        return [item.path for item in items]

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """A video, an animated GIF, a TIFF file with pages, a folder with frames."""
        return is_clip(path)

    @classmethod
    def probabilities(cls, model: Model, source: Path) -> Float[Tensor, " K"]:
        """The prediction for one film."""
        reel = Reel(open_clip(source), model.spec.range, model.spec.channels)
        return cls.predictor(model.forward, model.spec, model.grid)(reel).mean(0)

    @classmethod
    def plain_spec(cls, channels: int = 3, classes: int = 2, ndim: int = 2, size: tuple[int, ...] | None = None) -> Spec:
        """Films of 16 frames."""
        spec = super().plain_spec(channels, classes, ndim, size)
        return Spec(**{**vars(spec), "more": {"frames": 16}})

    @classmethod
    def example(cls, spec: Spec, grid: Grid, *, size: Sequence[int] | None = None, batch: int = 1, seed: int = 0) -> Tensor:
        """A clip of noise."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, spec.channels, grid.frames, grid.fixed, grid.fixed, generator=generator)

    @classmethod
    def plain_batch(cls, network: nn.Module, spec: Spec, *, size: int = 48, batch: int = 2, seed: int = 0) -> Batch:
        """Noise with labels of chance."""
        generator, grid = torch.Generator().manual_seed(seed), grid_of(network)
        return {
            "clip": torch.randn(batch, spec.channels, grid.frames, grid.fixed, grid.fixed, generator=generator),
            "label": torch.randint(0, len(spec.classes), (batch,), generator=generator),
            "name": [f"noise {i}" for i in range(batch)],
        }


def frame_step(spec: Spec, frames: int) -> int:
    """Step between the frames of a clip for networks of these data: a clip covers the median film, with every eighth frame at most."""
    return min(max(spec.more["frames"] // frames, 1), 8)


def thumbnails(reel: Reel) -> Float[Tensor, "C T h w"]:
    """Sixteen frames of a film, each as a thumbnail."""
    return F.interpolate(reel.spread(LOOKED_AT).transpose(0, 1), (THUMBNAIL, THUMBNAIL), mode="area").transpose(0, 1)


def differences(films: Float[Tensor, "N C T h w"]) -> Float[Tensor, "N F"]:
    """What changes from frame to frame and where, and what is there in the later half of a film and was not in the earlier one."""
    step = films.diff(dim=2).abs().mean(2)
    half = films.shape[2] // 2
    return torch.cat([step.flatten(1), (films[:, :, half:].mean(2) - films[:, :, :half].mean(2)).flatten(1)], 1)
