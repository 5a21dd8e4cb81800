"""I3D: an image network inflated to three dimensions, its weights included.

Carreira and Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", CVPR 2017 (arXiv 1705.07750).

Every k x k kernel of an Inception-v1 with batch norm becomes k x k x k, and starts as t copies of the image kernel divided by t: a film
that stands still is answered as its frame was (section 2.4, "boring video"). Here the image network is the same code with kernels of one frame
(``flat``), and `inflate` makes the one's weights into the other's. The flow stream is the same network on two channels.

As in the authors' code (deepmind/kinetics-i3d) and its port (piergiaj/pytorch-i3d): 3x3x3 kernels where Inception-v1 has 5x5, TensorFlow's SAME padding (as
much as the size asks for, the odd one behind), an epsilon of 1e-3 in batch norm, no pooling over time in the first two pools, logits averaged over time.
Batch norm has a scale, as the port's (Sonnet's has none). Weights start as He's normal ones. Variant `small`, for frames of 32 to 128 pixels, has
five of the nine modules and an eighth of the channels.

Shapes: B batch, C image channels, K classes, D channels, T time, H W pixels; t h w cells of a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.tasks.base import Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side
from paperworks.tasks.video import Jitter, frame_step

MODULES: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of each Inception module: 1x1 | 1x1, 3x3 | 1x1, 3x3 | after pooling, 1x1 (figure 3 and Szegedy et al., table 1)."""
POOLS = {"3": ((1, 3, 3), (1, 2, 2)), "4": ((3, 3, 3), (2, 2, 2)), "5": ((2, 2, 2), (2, 2, 2))}
"""Kernel and stride of the pooling in front of the modules 3, 4, 5: time is not pooled before module 4 (section 2.4)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Figure 3, and how much of it a smaller network has."""

    frames: int = 64
    """Of a clip."""
    step: int | None = 1
    """Frames of the film from one of them to the next; None takes it from the data."""
    flat: bool = False
    """The image network: kernels, poolings and strides of one frame."""
    width: float = 1.0
    """Share of the channels."""
    modules: tuple[str, ...] = tuple(MODULES)
    """Inception modules that are there."""
    dropout: float = 0.5
    momentum: float = 0.01
    """How much of batch norm's running statistics a step replaces; a short training needs 0.1."""
    image_size: int | None = 224
    """Side of the frames; None takes it from the data."""


Triple = tuple[int, int, int]


def same(x: Float[Tensor, "B D T H W"], kernel: Triple, stride: Triple) -> Float[Tensor, "B D t h w"]:
    """TensorFlow's SAME padding with zeros: ceil(n / stride) positions, what is missing shared out, the odd one at the end."""
    missing = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(x.shape[2:], kernel, stride)]
    return F.pad(x, [side for m in reversed(missing) for side in (m // 2, m - m // 2)])


class Unit(nn.Module):
    """Convolution with SAME padding and without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.norm = nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x: Float[Tensor, "B D T H W"]) -> Float[Tensor, "B E t h w"]:
        """Padded as its size asks for."""
        return self.norm(self.conv(same(x, self.kernel, self.stride))).relu()


class MaxPool(nn.Module):
    """Pooling with SAME padding; behind a ReLU zeros are no larger than anything."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Float[Tensor, "B D T H W"]) -> Float[Tensor, "B D t h w"]:
        """Largest values."""
        return F.max_pool3d(same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """An Inception module (figure 3, right). ``side`` is the kernel 3x3x3, in the image network 1x3x3."""

    def __init__(self, inputs: int, widths: tuple[int, ...], side: Triple) -> None:
        super().__init__()
        one: Triple = (1, 1, 1)
        self.branch_0 = Unit(inputs, widths[0], one)
        self.branch_1 = nn.Sequential(Unit(inputs, widths[1], one), Unit(widths[1], widths[2], side))
        self.branch_2 = nn.Sequential(Unit(inputs, widths[3], one), Unit(widths[3], widths[4], side))
        self.branch_3 = nn.Sequential(MaxPool(side, one), Unit(inputs, widths[5], one))

    def forward(self, x: Float[Tensor, "B D t h w"]) -> Float[Tensor, "B E t h w"]:
        """The four branches, one after another."""
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], 1)


class I3D(nn.Module):
    """Figure 3, left; with ``flat`` the Inception-v1 that it is inflated from, for clips of any number of frames, each by itself.

    Attributes:
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, step: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size, frames=config.frames, step=step)

        def time(shape: Triple) -> Triple:
            return (1, *shape[1:]) if config.flat else shape

        def scaled(width: int) -> int:
            return max(round(width * config.width), 1)

        first, third = scaled(64), scaled(192)
        self.trunk = nn.Sequential()
        self.trunk.append(Unit(channels, first, time((7, 7, 7)), time((2, 2, 2))))  # Conv3d_1a
        self.trunk.append(MaxPool((1, 3, 3), (1, 2, 2)))
        self.trunk.append(Unit(first, first, (1, 1, 1)))  # Conv3d_2b
        self.trunk.append(Unit(first, third, time((3, 3, 3))))  # Conv3d_2c
        self.inception = nn.ModuleDict()
        inputs, level = third, ""
        for name in config.modules:
            widths = tuple(scaled(w) for w in MODULES[name])
            module = Mixed(inputs, widths, time((3, 3, 3)))
            if name[0] != level:
                level = name[0]
                kernel, stride = (time(shape) for shape in POOLS[level])
                self.inception[f"pool_{level}a"] = MaxPool(kernel, stride)
            self.inception[f"mixed_{name}"] = module
            inputs = widths[0] + widths[2] + widths[4] + widths[5]
        self.embedding = inputs
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Conv3d(inputs, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and module is not self.head:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.momentum = config.momentum
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)  # pyright: ignore[reportArgumentType]

    def features(self, clip: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D t h w"]:
        """What the last module gives; an eighth of the frames, a thirty-second of the sides."""
        x = self.trunk(clip)
        for module in self.inception.values():
            x = module(x)
        return x

    def pooled(self, clip: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D t 1 1"]:
        """Averages over two steps of time and the whole frame (7x7 cells of 224 pixels)."""
        x = self.features(clip)
        return F.avg_pool3d(x, (min(2, x.shape[2]), x.shape[3], x.shape[4]), stride=1)

    def embed(self, clip: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D"]:
        """These averaged over time."""
        return self.pooled(clip).mean((2, 3, 4))

    def forward(self, clip: Float[Tensor, "B C T H W"]) -> Output:
        """``logits``, B K: those of each step of time, averaged."""
        return {"logits": self.head(self.dropout(self.pooled(clip))).mean((2, 3, 4))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def inflate(flat: Mapping[str, Tensor], network: I3D) -> dict[str, Tensor]:
    """A state dict for ``network`` made of that of the image network of the same widths (section 2.4): W[..., i, :, :] = W2d / t for i = 1 ... t.

    Kernels may be D C k k or D C 1 k k. The head stays the network's own where it tells other classes apart, and so does a first kernel for other channels,
    which is averaged over the image's and scaled so that grey answers alike.
    """
    own = network.state_dict()
    out = {}
    for name, value in own.items():
        image = flat[name]
        if value.ndim == 5:
            image = image if image.ndim == 5 else image[:, :, None]
            if image.shape[1] != value.shape[1]:
                image = image.sum(1, keepdim=True).expand(-1, value.shape[1], -1, -1, -1) / value.shape[1]
            image = image.expand(-1, -1, value.shape[2], -1, -1) / value.shape[2]
        out[name] = image.clone() if image.shape == value.shape else value
    return out


FEW = ("3b", "3c", "4b", "4f", "5c")
VARIANTS: Mapping[str, Config] = {
    "rgb": Config(),
    "flow": Config(),
    "inception_v1": Config(flat=True, frames=1),
    "small": Config(frames=16, step=None, width=1 / 8, modules=FEW, dropout=0.2, momentum=0.1, image_size=None),
    "small_2d": Config(flat=True, frames=1, width=1 / 8, modules=FEW, dropout=0.2, momentum=0.1, image_size=None),
    "test": Config(frames=8, step=None, width=1 / 16, modules=("3b", "4b", "5c"), dropout=0.2, momentum=0.1, image_size=32),
}


def recipe(config: Config) -> Recipe:
    """Section 3: SGD with momentum, 0.1 divided by ten twice, crops of 224 from 256; the small nets' own for short trainings."""
    if config.image_size != 224:
        return Recipe(lr=3e-3, weight_decay=0.01, batch_size=16, augment=Jitter(scale=(1.0, 1.2), flip=0))
    return Recipe(
        optimizer="sgd", lr=0.1, momentum=0.9, batch_size=64, schedule="step", warmup=0, patch=224, clip=None,
        augment=Jitter(scale=(256 / 224, 256 / 224)),
    )  # fmt: skip


def build(spec: Spec, config: Config) -> I3D:
    """The network for a data set."""
    step = frame_step(spec, config.frames) if config.step is None else config.step
    return I3D(spec.channels, len(spec.classes), config.image_size or image_side(spec), step, config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "rgb"))
