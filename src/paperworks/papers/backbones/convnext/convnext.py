"""ConvNeXt: a ResNet that takes over the design of Swin Transformers one step at a time, without attention.

Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, "A ConvNet for the 2020s", CVPR 2022 (arXiv 2201.03545).

Training recipe, stage ratio, patchify stem, depthwise convolution, inverted bottleneck, 7x7 kernels, one activation and one LayerNorm a block,
separate downsampling: each is known and small, and their sum is a plain convolutional network that is level with Swin at equal cost. Both
ends of that road are here: ``ConvNeXt``, and the ResNet that it starts from, trained by the same recipe.

As in the official code (facebookresearch/ConvNeXt): biases in all convolutions, LayerNorm with an epsilon of 1e-6 over the channels of a
pixel, the exact GELU, the last norm after the average pooling, no norm after the stem of isotropic nets. Different from it: Mixup and
CutMix, which mix the images of a batch, are left out, and a smaller batch takes a learning rate in proportion. The variant ``laptop`` has a
stem for small images and layer scale from 0.1, as a short training hardly leaves the identity from 1e-6.

Shapes: B batch, C image channels, K classes, H W pixels, h w cells of a stage, D channels of a stage, F channels of the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2

from paperworks.nn.resnet import ResNet
from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Sample, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers that tell ConvNeXts apart; one stage alone is an isotropic net (section 3.3)."""

    depths: tuple[int, ...] = (3, 3, 9, 3)
    """Blocks of each stage (section 2.2: 1:1:3:1, in larger nets 1:1:9:1)."""
    widths: tuple[int, ...] = (96, 192, 384, 768)
    """Channels of each stage."""
    stem: int | None = 4
    """Side of a patch of the stem; None takes the smallest from 2 on that leaves at most 32 cells a side."""
    kernel: int = 7
    """Side of the depthwise kernels (section 2.5 tries 3 to 11)."""
    layer_scale: float = 1e-6
    """gamma at the start; 0 leaves it out."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows linearly from 0."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """The road's beginning (section 2.1): a ResNet-50, its width, and its stem."""

    width: int = 64
    stem: Literal["imagenet", "cifar"] = "imagenet"
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class LayerNorm(nn.LayerNorm):
    """Over the channels of each pixel of B D h w."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, input: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """Normalise, with the channels last for the time being."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Figure 4, right: spatial mixing by a depthwise convolution first, then an inverted bottleneck of 1x1 convolutions, written as linear layers."""

    def __init__(self, width: int, kernel: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)  # the block's only norm (section 2.6)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """What the block adds, drawn per image, and its input."""
        y = self.depthwise(x).movedim(1, -1)  # B h w D
        y = self.project(F.gelu(self.expand(self.norm(y))))  # the block's only activation
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.movedim(-1, 1))


class ConvNeXt(nn.Module):
    """Where the roadmap of figure 2 ends.

    Attributes:
        widths: channels of the stages' outputs.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        depths, self.widths = config.depths, config.widths
        patch = int(config.stem or max(2, image_size // 32))
        self.grid = Grid(fixed=image_size)
        self.strides = tuple(patch * 2**i for i in range(len(depths)))
        self.embedding = self.widths[-1]
        rates = iter(ramp(config.drop_path, sum(depths)))

        stem = nn.Conv2d(channels, self.widths[0], patch, stride=patch)  # "patchify" (section 2.2)
        self.down = nn.ModuleList([nn.Sequential(stem, LayerNorm(self.widths[0])) if len(depths) > 1 else stem])
        for before, after in zip(self.widths, self.widths[1:]):
            # Separate downsampling (section 2.6): the norm in front is what keeps the training from diverging.
            self.down.append(nn.Sequential(LayerNorm(before), nn.Conv2d(before, after, 2, stride=2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, config.kernel, config.layer_scale, next(rates)) for _ in range(depth)))
            for depth, width in zip(depths, self.widths)
        )
        self.norm = nn.LayerNorm(self.embedding, eps=1e-6)
        self.head = nn.Linear(self.embedding, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each stage ends with, of ``widths`` channels at ``strides``."""
        features, x = [], image
        for down, stage in zip(self.down, self.stages):
            x = stage(down(x))
            features.append(x)
        return features

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The average over all cells, normalised after pooling, not before."""
        return self.norm(self.pyramid(image)[-1].mean((2, 3)))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def ramp(last: float, blocks: int) -> list[float]:
    """Stochastic depth rates that grow linearly from 0 over all blocks of all stages (Huang et al. 2016)."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


class Beginning(nn.Module):
    """The ResNet-50 that the roadmap of figure 2 starts from, with the interface of ``ConvNeXt``."""

    def __init__(self, channels: int, classes: int, image_size: int, config: ResNetConfig) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size)
        self.body = ResNet(50, channels, stem=config.stem, width=config.width)
        self.widths, self.strides, self.embedding = self.body.widths, self.body.strides, self.body.widths[-1]
        self.head = nn.Linear(self.embedding, classes)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """C2 to C5."""
        return self.body.pyramid(image)

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """C5, averaged over its cells."""
        return self.body(image).mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def smoothed(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy with 0.1 of each label spread over all classes (table 5)."""
    return {"loss": F.cross_entropy(output["logits"], batch["label"], label_smoothing=0.1)}


@dataclass(frozen=True, kw_only=True)
class Varied:
    """Table 5's augmentation of single images: a random part, mirrored, RandAugment (9, 0.5) and random erasing."""

    area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image that is cut out."""
    flip: float = 0.5
    """Chance of a mirror image."""
    magnitude: int = 9
    """Of RandAugment's operations, of 10. Officially it varies by a standard deviation of 0.5 as well."""
    chance: float = 0.5
    """Of each of RandAugment's two operations."""
    erase: float = 0.25
    """Chance of a rectangle of noise."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """``sample`` with another view of its image, of the height and width of ``patch``."""
        image = sample["image"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            steps = [
                v2.RandomResizedCrop(tuple(patch), self.area, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(self.flip),
            ]
            if len(image) in (1, 3):  # RandAugment's colours
                operations = int((torch.rand(2) < self.chance).sum())
                steps.append(v2.RandAugment(operations, self.magnitude, num_magnitude_bins=11))
            image = v2.Compose(steps)(image).clamp(0, 1)
            hole = v2.RandomErasing(self.erase, value=1)(torch.zeros(1, *patch)) > 0
            noise = 0.5 + 0.25 * torch.randn(image.shape)  # about N(0, 1) when it is normalised
        return sample | {"image": tv_tensors.Image(torch.where(hole, noise, image))}


DEEP = (3, 3, 27, 3)
VARIANTS: Mapping[str, Config | ResNetConfig] = {
    "tiny": Config(),
    "small": Config(depths=DEEP, drop_path=0.4),
    "base": Config(depths=DEEP, widths=(128, 256, 512, 1024), drop_path=0.5),
    "large": Config(depths=DEEP, widths=(192, 384, 768, 1536), drop_path=0.5),
    "xlarge": Config(depths=DEEP, widths=(256, 512, 1024, 2048), drop_path=0.2),
    "isotropic_small": Config(depths=(18,), widths=(384,), stem=16, layer_scale=0, drop_path=0.1),
    "isotropic_base": Config(depths=(18,), widths=(768,), stem=16, layer_scale=0, drop_path=0.2),
    "isotropic_large": Config(depths=(36,), widths=(1024,), stem=16, drop_path=0.5),
    "resnet50": ResNetConfig(),
    "laptop": Config(depths=(2, 2, 6, 2), widths=(24, 48, 96, 192), stem=None, layer_scale=0.1, image_size=None),
    "laptop_resnet": ResNetConfig(width=8, stem="cifar", image_size=None),
    "test": Config(depths=(1, 1, 2, 1), widths=(8, 12, 16, 24), stem=2, layer_scale=0.1, image_size=None),
}


def recipe(config: Config | ResNetConfig) -> Recipe:
    """Table 5 with the learning rate of 4e-3 at a batch of 4096 brought down in proportion; the laptop's own for small images."""
    if config.image_size is None:
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))
    isotropic = isinstance(config, Config) and len(config.depths) == 1
    return Recipe(
        lr=4e-3 * 128 / 4096, weight_decay=0.05, warmup=(50 if isotropic else 20) / 300, batch_size=128, patch=config.image_size,
        clip=None, average=0.9999, augment=Varied(),
    )  # fmt: skip


def build(spec: Spec, config: Config | ResNetConfig) -> nn.Module:
    """The network for a data set."""
    side = int(config.image_size or image_side(spec))
    network = ConvNeXt if isinstance(config, Config) else Beginning
    return network(spec.channels, len(spec.classes), side, config)  # pyright: ignore[reportArgumentType]


PAPER = Paper(
    variants=VARIANTS,
    build=build,
    recipe=recipe,
    auto=("laptop", "tiny"),
    loss=lambda config: smoothed,
)
