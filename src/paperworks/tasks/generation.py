"""Generation: images are rebuilt from a short description, and new ones are made like them.

A sample is ``image`` (C S S, float32 in [0, 1]): a picture's largest centred square at the data set's side. Classes may be known and are not
used. A network takes such images as they are (mean 0, deviation 1) and returns ``reconstruction`` (B C S S in [0, 1]) with what its loss
needs. It has ``encode`` (images -> codes) and ``decode`` (codes -> images) and, where it models the codes too, ``sample(n, generator)``.

All networks are judged alike: how near a reconstruction is to its image, and how near a set of images is to another (Frechet distance).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import center_crop, resize

from paperworks.data.classes import ClassFolder, ClassItem, open_classes
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.tasks.base import Batch, Grid, Output, Recipe, Sample, Spec, grid_of
from paperworks.tasks.contract import Deployed, Model, Options, Predict, Progress, Task, mean_of
from paperworks.tasks.drawing import Picture, display, panel
from paperworks.tasks.files import read_unit

LARGEST = 64
"""Side to which larger images are reduced, unless a network asks for its own."""
STEP = 4
"""Sides are multiples of it, so that networks may halve them twice."""
COMPONENTS = 30
"""Principal components of the baseline: as many as the codes of the autoencoder of 2006 have numbers."""
BEST = 100.0
"""Peak signal-to-noise ratio in dB of what is equal to its image."""


@dataclass(frozen=True, kw_only=True)
class Vary:
    """Training images: squares of the network's side, mirrored by chance. Digits and letters must not be mirrored."""

    flip: float = 0.0
    """Chance that left and right change places."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """The sample at the side ``patch``."""
        image = square(sample["image"].as_subclass(Tensor), patch[0])
        if float(torch.rand((), generator=generator)) < self.flip:
            image = image.flip(2)
        return sample | {"image": tv_tensors.Image(image)}


def square(image: Float[Tensor, "C H W"], side: int) -> Float[Tensor, "C S S"]:
    """The largest centred square, resized to ``side`` (antialiased)."""
    image = center_crop(image, [min(image.shape[1:])] * 2)
    return image if image.shape[1] == side else resize(image, [side, side], antialias=True).clamp(0, 1)


def image_side(spec: Spec, asked: int | None) -> int:
    """Side of a network's images: what its configuration asks for, or the data set's.

    Raises:
        InputError: no multiple of 4.
    """
    side = asked or spec.size[0]
    if side % STEP or side < 2 * STEP:
        raise InputError(f"image_size={side} is no multiple of {STEP} from {2 * STEP}; take {max(side // STEP, 2) * STEP}")
    return side


class RandomFeatures(nn.Module):
    """What images are compared by: a small convolutional network whose weights were drawn once and never learnt.

    Two layers (5x5, stride 2; ReLU) of 16 and 32 filters and the means over a 2x2 grid of each second map: 128 numbers of an image. Features of
    chance tell edges and their arrangement apart without labels, and are the same for every data set, but know nothing of meaning: distances
    are comparable within one data set, and never with those of the Inception network.
    """

    num_features = 128

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 5, stride=2, padding=2, bias=False) for i, o in ((channels, 16), (16, 32)))
        for layer in self.layers:
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            noise = torch.randn(weight.shape, generator=generator)
            noise -= noise.mean((1, 2, 3), keepdim=True)  # flat regions give nothing
            weight.data = noise * (2 / noise[0].numel()) ** 0.5
            weight.requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features in double precision, in which their covariances are taken."""
        for layer in self.layers:
            image = F.relu(layer(image))
        return F.adaptive_avg_pool2d(image, 2).flatten(1).double()


class Frechet:
    """Frechet distance between two sets of images: of the Gaussians that have the mean and covariance of their features."""

    def __init__(self, channels: int) -> None:
        self.inner = FrechetInceptionDistance(RandomFeatures(channels), normalize=True)

    def update(self, images: Float[Tensor, "B C H W"], *, real: bool) -> None:
        """Count images of one of the sets."""
        self.inner.update(images.float(), real=real)

    def compute(self) -> float:
        """The distance times 1000; NaN where a set has fewer than two images."""
        if min(int(self.inner.real_features_num_samples), int(self.inner.fake_features_num_samples)) < 2:
            return float("nan")
        return 1000 * max(float(self.inner.compute()), 0.0)


def frechet(images: Float[Tensor, "N C H W"], others: Float[Tensor, "M C H W"]) -> float:
    """Frechet distance (times 1000) between two sets of images of one size."""
    distance = Frechet(images.shape[1])
    for batch in images.split(256):
        distance.update(batch, real=True)
    for batch in others.split(256):
        distance.update(batch, real=False)
    return distance.compute()


class ReconstructionScores:
    """How near reconstructions are to their images."""

    def __init__(self, channels: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.distance = Frechet(channels)

    def update(self, prediction: Float[Tensor, "C S S"], sample: Sample) -> None:
        """Count one image."""
        image, rebuilt = sample["image"].as_subclass(Tensor), prediction.float().cpu()
        error = (image - rebuilt).square()
        self.rows.append(
            {
                "name": sample["name"],
                "psnr": min(float(peak_signal_noise_ratio(rebuilt, image, data_range=1.0)), BEST),
                "mse": float(error.mean()),
                "squared_error": float(error.sum()),
                # no surer than half a step of an eight-bit pixel
                "cross_entropy": float(F.binary_cross_entropy(rebuilt.clamp(1 / 512, 511 / 512), image)),
            }
        )
        self.distance.update(image[None], real=True)
        self.distance.update(rebuilt[None], real=False)

    def compute(self) -> dict[str, float]:
        """Means over the images, and the distance between originals and reconstructions."""
        return {name: mean_of(self.rows, name) for name in ("psnr", "mse", "squared_error", "cross_entropy")} | {
            "frechet": self.distance.compute()
        }

    def per_item(self) -> list[dict[str, Any]]:
        """The scores of each image."""
        return self.rows


class Reconstruction(Deployed):
    """Images B C S S in [0, 1] -> their reconstructions."""

    def finish(self, output: Output) -> Tensor:
        """The reconstruction alone."""
        return output["reconstruction"]


class Generation(Task):
    """A folder of images, with or without classes, seen as examples of what to make."""

    name = "generation"
    pack = "pack:mnist_subset"
    metric = "psnr"
    metric_names = {
        "psnr": ("PSNR (dB)", "峰值信噪比（dB）", 1),
        "mse": ("Squared error per pixel", "每像素平方误差", -1),
        "squared_error": ("Squared error per image", "每幅图平方误差", -1),
        "cross_entropy": ("Cross-entropy per pixel (nats)", "每像素交叉熵（奈特）", -1),
        "frechet": ("Frechet distance of reconstructions × 1000", "重建图的 Fréchet 距离 × 1000", -1),
    }
    explained = {
        "psnr": (
            "Peak signal-to-noise ratio of reconstructions in decibels: ten times the logarithm of 1 over the mean squared error; 10 dB are a factor of ten.",
            "重建图的峰值信噪比（分贝）：均方误差倒数的对数乘以十；每 10 dB 相差十倍。",
        ),
        "mse": ("Squared difference, mean over pixels in [0, 1].", "像素取值 [0, 1] 时的平方差，按像素平均。"),
        "squared_error": (
            "Squared difference summed over the pixels of an image, as the autoencoder paper reports it; it grows with the image's size.",
            "一幅图所有像素的平方差之和，自编码器论文报告的就是它；随图像尺寸增大。",
        ),
        "cross_entropy": (
            "Nats per pixel when the image's value is read as a probability of white; even a perfect reconstruction of grey pixels has some.",
            "把像素值看作“白”的概率时每像素的奈特数；灰色像素即使完美重建也不为零。",
        ),
        "frechet": (
            "Frechet distance between originals and reconstructions by the features of a small fixed network of random weights; "
            "compare within one data set only.",
            "原图与重建图在一个随机权重、固定不变的小网络特征上的 Fréchet 距离；只能在同一数据集内比较。",
        ),
    }
    baseline_names = {"pca": (f"PCA, {COMPONENTS} components", f"主成分分析，{COMPONENTS} 个分量"), "mean": ("Mean image", "平均图")}
    views = {"reconstruction": ("reconstruction", "重建"), "difference": ("difference", "差异")}
    output = "reconstruction"
    outputs = ("reconstruction",)

    def __init__(self, source: str | Path, *, progress: Progress | None = None) -> None:
        """Open a folder of images or ``pack:NAME``.

        Raises:
            InputError: there is nothing to learn from.
        """
        self.folder: ClassFolder = open_classes(source, labelled=False, progress=progress)
        print_ = self.folder.fingerprint
        self.source, self.sha256 = self.folder.source, print_.sha256
        self.train: Sequence[Any] = self.folder.train
        self.val: Sequence[Any] = self.folder.val
        self.enough(self.source, "images", add="images")
        side = max(min(*print_.median_size, LARGEST) // STEP, 2) * STEP
        self.spec = self._spec(print_.channels, side, (float(print_.range[0]), float(print_.range[1])))

    @classmethod
    def _spec(cls, channels: int, side: int, span: tuple[float, float] = (0.0, 255.0)) -> Spec:
        return Spec(
            task=cls.name, channels=channels, classes=(), size=(side, side), mean=(0.0,) * channels, std=(1.0,) * channels, range=span
        )

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Never: any folder of images could be meant, so this task is asked for by name."""
        return False

    def describe(self) -> dict[str, Any]:
        """What the folder says of itself, and the side at which images are seen."""
        return self.folder.describe() | {"task": self.name, "side": self.spec.size[0]}

    def sample(self, item: ClassItem) -> Sample:
        """An image's square at the data set's side."""
        return {"image": tv_tensors.Image(square(self._read(item), self.spec.size[0])), "name": item.name}

    def training_sample(self, item: ClassItem, recipe: Recipe, grid: Grid, generator: torch.Generator) -> Sample:
        """An image's square at the network's side."""
        sample: Sample = {"image": tv_tensors.Image(self._read(item)), "name": item.name}
        return recipe.augment(sample, (grid.fit(self.spec.size[0]),) * 2, generator)

    def _read(self, item: ClassItem) -> Tensor:
        return self.folder.unit(self.folder.image(item))

    @staticmethod
    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        """Squared error, summed over the pixels of an image."""
        return {"loss": (output["reconstruction"] - batch["image"]).square().flatten(1).sum(1).mean()}

    @classmethod
    def deploy(cls, network: nn.Module, spec: Spec) -> Reconstruction:
        """The network, as it is."""
        return Reconstruction(network, spec)

    @classmethod
    def network_input(cls, given: Tensor, grid: Grid) -> Tensor:
        """The square at the network's side."""
        return square(given, grid.fit(min(given.shape[1:])))

    @classmethod
    def predictor(
        cls, deployed: Callable[[Tensor], Tensor], spec: Spec, grid: Grid, *, window: int = 1024, overlap: float = 0.25
    ) -> Predict:
        """A function from an image of any size to the reconstruction of its centred square, in the square's own size."""

        def predict(image: Tensor) -> Tensor:
            with torch.inference_mode():
                rebuilt = deployed(cls.network_input(image, grid)[None])[0]
            return square(rebuilt.float().cpu(), min(image.shape[1:]))

        return predict

    def scores(self) -> ReconstructionScores:
        """An accumulator of the task's metrics."""
        return ReconstructionScores(self.spec.channels)

    def baselines(self) -> dict[str, Predict]:
        """The mean of the training images, and their first principal components."""
        images = torch.stack([self.sample(item)["image"].as_subclass(Tensor) for item in self.train])
        mean = images.mean(0)
        return {"pca": principal_components(images, min(COMPONENTS, len(images))), "mean": lambda image: mean}

    def shown(self, sample: Sample) -> dict[str, Picture]:
        """The image."""
        return {"input": display(self.given(sample))}

    def drawn(self, sample: Sample, prediction: Tensor) -> dict[str, Picture]:
        """The reconstruction, and where it is too bright or too dark."""
        image = self.given(sample)
        return {"reconstruction": display(prediction), "difference": signed(prediction - image)}

    def legend(self) -> list[dict[str, Any]]:
        """What the greys of a difference mean."""
        return [
            {"colour": (255, 255, 255), "en": "reconstruction brighter", "zh": "重建偏亮", "view": "difference"},
            {"colour": (0, 0, 0), "en": "reconstruction darker", "zh": "重建偏暗", "view": "difference"},
        ]

    def files(self, items: Sequence[ClassItem]) -> list[Path]:
        """The images' files; those that are rows of an array are written to a temporary folder first."""
        folder = Path(tempfile.gettempdir()) / f"paperworks_{self.sha256[:12]}"
        return [item.path if item.row is None else self._written(item, folder) for item in items]

    def _written(self, item: ClassItem, folder: Path) -> Path:
        path = folder / f"{item.name.replace('/', '_')}.png"
        save_picture(self._read(item), path)
        return path

    @classmethod
    def predict_file(cls, model: Model, source: Path, target: Path, options: Options) -> None:
        """Write the reconstruction of a file's centred square; with ``overlays`` also a picture of both side by side."""
        options.refuse(cls.name, "refine", "probabilities")
        image = read_unit(source, model.spec)
        rebuilt = cls.predictor(model.forward, model.spec, model.grid)(image)
        save_picture(rebuilt, target)
        if options.overlays:
            original = square(image, rebuilt.shape[1])
            pair = panel([display(original), display(rebuilt)], ["original", "reconstruction"], side=max(240, rebuilt.shape[1]))
            with atomic(target.with_name(target.stem + ".overlay.png")) as temporary:
                PIL.Image.fromarray(pair).save(temporary)

    @classmethod
    def plain_spec(cls, channels: int = 3, classes: int = 2, ndim: int = 2, size: tuple[int, ...] | None = None) -> Spec:
        """A spec of no data set in particular; there are no classes."""
        return cls._spec(channels, (size or (32, 32))[0])

    @classmethod
    def plain_batch(cls, network: nn.Module, spec: Spec, *, size: int = 48, batch: int = 2, seed: int = 0) -> Batch:
        """Noise in [0, 1]."""
        side = grid_of(network).fit(size)
        image = torch.rand(batch, spec.channels, side, side, generator=torch.Generator().manual_seed(seed))
        return {"image": image, "name": [f"noise {i}" for i in range(batch)]}


def principal_components(images: Float[Tensor, "N C S S"], components: int) -> Predict:
    """PCA: the projection of an image on the directions in which ``images`` vary most."""
    flat = images.flatten(1)
    mean = flat.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the decomposition starts from random vectors
        directions = torch.pca_lowrank(flat, q=components, niter=8)[2]  # D components

    def project(image: Float[Tensor, "C S S"]) -> Float[Tensor, "C S S"]:
        code = (image.flatten() - mean) @ directions
        return (mean + directions @ code).view(image.shape).clamp(0, 1)

    return project


def signed(difference: Float[Tensor, "C S S"]) -> Picture:
    """Differences of images in [0, 1]: none is mid-grey in every picture, and half of the range or more is white or black."""
    planes = difference.cpu().float()
    planes = (planes if len(planes) == 3 else planes.mean(0, keepdim=True)).expand(3, -1, -1)
    return ((0.5 + planes).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def save_picture(image: Float[Tensor, "C S S"], path: Path) -> None:
    """Eight bits a channel; one channel is a grey image, three a coloured one, of others what ``display`` shows."""
    planes = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = {1: planes[0].numpy(), 3: planes.permute(1, 2, 0).numpy()}.get(len(planes), display(image))
    with atomic(path) as temporary:
        PIL.Image.fromarray(pixels).save(temporary)
