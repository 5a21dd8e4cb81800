"""RepLKNet: a few depthwise kernels of up to 31x31 see further than a deep stack of 3x3.

Ding, Zhang, Zhou, Han, Ding and Sun, "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022 (arXiv 2203.06717).

The effective receptive field grows with the kernel's side and only with the root of the depth. Five guidelines make sides of 31 trainable:
depthwise, with shortcuts, with a parallel small kernel that is merged into the large one after training, judged by what follows on the
classification, and large on coarse maps too. ``LargeKernel.merged`` is that merging, ``effective_receptive_field`` the measurement.

As in the official code (DingXiaoH/RepLKNet-pytorch): no small kernel in XL, one stochastic depth rate for the two blocks of a pair, torch's
default initialisation, the field measured by positive parts of gradients. Different from it: batch norms are those of one process, and
Mixup and CutMix, which mix the images of a batch, are left out. ``small`` has three stages and a stem that suits small images.

Shapes: B batch, C image channels, K classes, H W pixels, h w cells of a stage, D channels of a stage, E of its depthwise convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import StochasticDepth

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import Varied, ramp, smoothed
from paperworks.tasks.base import Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of section 4.1, as B, K and C of it; 31B by default."""

    layers: tuple[int, ...] = (2, 2, 18, 2)
    """B: pairs of a RepLK block and a ConvFFN block in each stage."""
    kernels: tuple[int, ...] = (31, 29, 27, 13)
    """K: sides of the large kernels, odd."""
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    """C: channels of the stages."""
    small_kernel: int | None = 5
    """Side of the kernel beside each large one (guideline 3), odd; None leaves it out."""
    depthwise_ratio: float = 1.0
    """Channels of the large kernels for each channel of the stage."""
    drop_path: float = 0.5
    """Stochastic depth of the last pair; it grows linearly from 0."""
    stem_stride: int | None = 4
    """2 or 4; None takes 4, but 2 for images of up to 32 pixels."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class ConvNorm(nn.Sequential):
    """Convolution without a bias that keeps the map's side, or divides it by the stride, and batch norm; with ReLU where asked for."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = False) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))

    def folded(self) -> nn.Conv2d:
        """The convolution, with a bias, that does the same as both in evaluation."""
        conv, norm = self[0], self[1]
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        return fuse_conv_bn_eval(conv, norm)


class LargeKernel(nn.Module):
    """A depthwise K x K convolution beside a small one, each with its batch norm, summed (figure 2)."""

    def __init__(self, width: int, kernel: int, small: int | None) -> None:
        super().__init__()
        self.large = ConvNorm(width, width, kernel, groups=width)
        self.small = ConvNorm(width, width, small, groups=width) if small else None

    def forward(self, x: Float[Tensor, "B E h w"]) -> Float[Tensor, "B E h w"]:
        """Both, as they are trained."""
        return self.large(x) if self.small is None else self.large(x) + self.small(x)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """The one convolution that does the same in evaluation: norms folded into both, the small kernel added to the large one's centre."""
        one = self.large.folded()
        if self.small is not None:
            other = self.small.folded()
            assert one.bias is not None and other.bias is not None
            border = (one.kernel_size[0] - other.kernel_size[0]) // 2  # as many zeros as the large kernel reaches further
            one.weight += F.pad(other.weight, [border] * 4)
            one.bias += other.bias
        return one


class RepLKBlock(nn.Module):
    """Moves information between cells: a large depthwise kernel between two 1x1 convolutions, in a shortcut (figure 4)."""

    def __init__(self, width: int, inner: int, kernel: int, small: int | None, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.expand = ConvNorm(width, inner, relu=True)
        self.depthwise = LargeKernel(inner, kernel, small)
        self.project = ConvNorm(inner, width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """The input and what the block adds, drawn per image."""
        return x + self.drop_path(self.project(F.relu(self.depthwise(self.expand(self.norm(x))))))


class ConvFFN(nn.Module):
    """Moves information between channels: a Transformer's feed-forward network with batch norms, in a shortcut (figure 4)."""

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.expand = ConvNorm(width, 4 * width)
        self.project = ConvNorm(4 * width, width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """The input and what the block adds, drawn per image."""
        return x + self.drop_path(self.project(F.gelu(self.expand(self.norm(x)))))


class RepLKNet(nn.Module):
    """Figure 4: stem, stages, and transitions between them.

    Attributes:
        widths: channels of the stages' outputs.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        if any(k % 2 == 0 or k < (config.small_kernel or 1) for k in config.kernels) or (config.small_kernel or 1) % 2 == 0:
            raise InputError(f"kernels={config.kernels}, small_kernel={config.small_kernel}: sides are odd, the small one the smallest")
        if config.stem_stride not in (2, 4, None):
            raise InputError(f"stem_stride={config.stem_stride} is neither 2 nor 4")
        self.grid = Grid(fixed=image_size)
        self.widths, first = config.widths, config.widths[0]
        stride = config.stem_stride or (4 if image_size > 32 else 2)
        self.strides = tuple(stride * 2**i for i in range(len(self.widths)))
        self.embedding = self.widths[-1]
        # The depthwise layers of the stem keep details cheaply before the second downsampling.
        self.stem = nn.Sequential(
            ConvNorm(channels, first, 3, stride=2, relu=True),
            ConvNorm(first, first, 3, groups=first, relu=True),
            ConvNorm(first, first, relu=True),
            ConvNorm(first, first, 3, stride=stride // 2, groups=first, relu=True),
        )
        rates = iter(ramp(config.drop_path, sum(config.layers)))
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList([nn.Identity()])
        for depth, kernel, width in zip(config.layers, config.kernels, self.widths):
            blocks: list[nn.Module] = []
            for rate in [next(rates) for _ in range(depth)]:
                inner = int(width * config.depthwise_ratio)
                blocks += [RepLKBlock(width, inner, kernel, config.small_kernel, rate), ConvFFN(width, rate)]
            self.stages.append(nn.Sequential(*blocks))
        for before, after in zip(self.widths, self.widths[1:]):
            down = ConvNorm(after, after, 3, stride=2, groups=after, relu=True)
            self.transitions.append(nn.Sequential(ConvNorm(before, after, relu=True), down))
        self.norm = nn.BatchNorm2d(self.embedding)
        self.head = nn.Linear(self.embedding, classes)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each stage ends with, of ``widths`` channels at ``strides``."""
        features, x = [], self.stem(image)
        for transition, stage in zip(self.transitions, self.stages):
            x = stage(transition(x))
            features.append(x)
        return features

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The last map, normalised and averaged over its cells."""
        return self.norm(self.pyramid(image)[-1]).mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


# Section 5 and figure 1: what a cell of the last map really sees


def effective_receptive_field(features: Callable[[Tensor], Tensor], images: Float[Tensor, "B C H W"]) -> Float[Tensor, "H W"]:
    """Contribution of each pixel to the middle cell of ``features`` (images -> B D h w), as the appendix measures it.

    The gradient of the cell's positive values, summed over channels, with respect to the pixels; its positive part, summed over colours
    and averaged over images. The network has to be in evaluation mode.
    """
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        last = features(images)
        middle = last[:, :, last.shape[2] // 2, last.shape[3] // 2].relu().sum()
        (gradient,) = torch.autograd.grad(middle, images)
    return gradient.relu().sum((0, 1)) / len(images)


def heat(contribution: Float[Tensor, "H W"]) -> Float[Tensor, "H W"]:
    """What figure 1 shows: logarithms, as the values differ by orders of magnitude, scaled to [0, 1]."""
    scores = torch.log10(contribution + 1)
    return scores / scores.max()


def area_ratio(heat: Float[Tensor, "H W"], share: float) -> float:
    """Table 10: the part of the image that the smallest square around its middle takes in which ``share`` of the heat lies."""
    (height, width), enough = heat.shape, share * heat.sum()
    for i in range(min(height, width) // 2):
        rows, columns = (slice(n // 2 - i, n // 2 + i + 1) for n in (height, width))
        if heat[rows, columns].sum() > enough:
            return (2 * i + 1) ** 2 / (height * width)
    return 1.0


LARGE = Config()
VARIANTS: Mapping[str, Config] = {
    "31b": LARGE,
    "31l": Config(widths=(192, 384, 768, 1536), image_size=384),
    "xl": Config(kernels=(27, 27, 27, 13), widths=(256, 512, 1024, 2048), small_kernel=None, depthwise_ratio=1.5, image_size=320),
    "25b": replace(LARGE, kernels=(25, 25, 25, 13)),
    "13b": replace(LARGE, kernels=(13, 13, 13, 13)),
    "7b": replace(LARGE, kernels=(7, 7, 7, 7)),
    "3b": replace(LARGE, kernels=(3, 3, 3, 3), small_kernel=None),
    "small": Config(layers=(1, 2, 2), kernels=(13, 13, 7), widths=(48, 96, 192), drop_path=0.1, stem_stride=None, image_size=None),
    "test": Config(layers=(1, 1), kernels=(9, 7), widths=(8, 12), small_kernel=3, drop_path=0.1, stem_stride=None, image_size=None),
}


def recipe(config: Config) -> Recipe:
    """Section 4.2: AdamW, 4e-3 for 2048 images brought down to a batch of 128, 10 of 300 epochs of warm-up; ``small`` its own."""
    if config.image_size is None:
        return Recipe(lr=3e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))
    return Recipe(
        lr=4e-3 * 128 / 2048, weight_decay=0.05, warmup=10 / 300, batch_size=128, patch=config.image_size,
        clip=None, average=0.9999, augment=Varied(),
    )  # fmt: skip


def build(spec: Spec, config: Config) -> RepLKNet:
    """The network for a data set."""
    return RepLKNet(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "31b"), loss=lambda config: smoothed)
