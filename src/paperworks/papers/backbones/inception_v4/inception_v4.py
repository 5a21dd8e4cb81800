"""Inception-v4 and Inception-ResNet: what residual connections do for wide modules of parallel branches.

Szegedy, Ioffe, Vanhoucke and Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning", AAAI 2017
(arXiv 1602.07261).

A pure Inception net, made uniform and deeper (v4), is compared with nets that add each module's output to its input, scaled down: these train
faster and end about level. Beside them stand the modules that they grew from: v1 (1409.4842), v2 and v3 (1512.00567).

A network is written as its figures are drawn: ``chain`` and ``fork`` of convolutions. As in the official code (tensorflow/models, slim): batch norm
with an epsilon of 1e-3 behind each convolution but a residual's last, no ReLU behind the last module of Inception-ResNet-v2. Different from it:
AdamW stands in for RMSProp. ``resnet_v2_figures`` is what the paper draws, ``resnet_v2`` what the published weights are of.

Shapes: B batch, C image channels, K classes, S side of the image, h w cells, I and O channels before and after, F of the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.papers.backbones.convnext.convnext import Varied, smoothed
from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side

Architecture = Literal["v1", "v2", "v3", "v4", "resnet_v1", "resnet_v2", "resnet_v2_figures"]
Part = Callable[[int], tuple[nn.Module, int]]
"""Channels that come in -> a module, and the channels that it gives."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which network, and how much of it; Inception-v4 by default."""

    architecture: Architecture = "v4"
    blocks: tuple[int, int, int] = (4, 7, 3)
    """Modules at each of the three resolutions (figure 9: A, B and C)."""
    width: float = 1.0
    """Factor on all channels."""
    scales: tuple[float, float, float] = (0.17, 0.1, 0.2)
    """Of the residuals at the three resolutions (section 3.3: between 0.1 and 0.3)."""
    small_images: bool = False
    """A stem of two convolutions that halves the side once, and reductions that halve it exactly; the paper's total stride is 32."""
    auxiliary: bool = False
    """A second classifier on the middle resolution, in training (v3); for images of 299 pixels."""
    dropout: float = 0.2
    """In front of the classifier (keep 0.8)."""
    image_size: int | None = 299
    """Side of the images; None takes it from the data."""


# Figures as code


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU(inplace=True))


class Fork(nn.ModuleList):
    """The same input through all branches, their outputs one behind the other: an Inception module."""

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        """Concatenate the branches."""
        return torch.cat([branch(x) for branch in self], 1)


class Residual(nn.Module):
    """Figures 10 to 20: a module, a *linear* 1x1 convolution back to the trunk's width, a scale, the sum, ReLU."""

    def __init__(self, trunk: int, branches: nn.Module, width: int, scale: float, relu: bool) -> None:
        super().__init__()
        self.branches = branches
        self.linear = nn.Conv2d(width, trunk, 1)
        self.scale, self.relu = scale, relu

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B I h w"]:
        """Scaled down before it is added, which keeps wide modules from dying early in training (section 3.3)."""
        y = x + self.scale * self.linear(self.branches(x))
        return F.relu(y) if self.relu else y


def chain(*parts: Part) -> Part:
    """One part after the other."""

    def make(inputs: int) -> tuple[nn.Module, int]:
        modules, width = [], inputs
        for part in parts:
            module, width = part(width)
            modules.append(module)
        return (modules[0] if len(modules) == 1 else nn.Sequential(*modules)), width

    return make


def fork(*parts: Part) -> Part:
    """Parts beside each other."""

    def make(inputs: int) -> tuple[nn.Module, int]:
        made = [part(inputs) for part in parts]
        return Fork([module for module, _ in made]), sum(width for _, width in made)

    return make


def residual(scale: float, *branches: Part, relu: bool = True) -> Part:
    """A fork that is added to its input."""

    def make(inputs: int) -> tuple[nn.Module, int]:
        module, width = fork(*branches)(inputs)
        return Residual(inputs, module, width, scale, relu), inputs

    return make


def pool(module: nn.Module) -> Part:
    """A pooling, which leaves the channels."""
    return lambda inputs: (module, inputs)


def average(count_padding: bool = False) -> Part:
    """3x3 average pooling that keeps the side; zeros around the map do not count, but in the v3 that PyTorch knows."""
    return pool(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=count_padding))


class Modules:
    """The modules' convolutions and reductions at the configuration's width and borders."""

    def __init__(self, config: Config) -> None:
        self.width, self.exact = config.width, config.small_images

    def conv(self, outputs: int, *kernel: int, stride: int = 1, valid: bool = False) -> Part:
        """``conv(n)`` is 1x1, ``conv(n, 3)`` 3x3, ``conv(n, 1, 7)`` 1x7. ``valid`` is the figures' V: nothing is put around the map."""
        height, width = kernel if len(kernel) == 2 else (*kernel, *kernel) if kernel else (1, 1)
        padding = (0, 0) if valid and not self.exact else (height // 2, width // 2)
        scaled = max(4, round(outputs * self.width))
        return lambda inputs: (ConvNorm(inputs, scaled, (height, width), stride, padding), scaled)

    def down(self, outputs: int) -> Part:
        """A 3x3 convolution of stride 2."""
        return self.conv(outputs, 3, stride=2, valid=True)

    def max(self) -> Part:
        """3x3 max pooling of stride 2."""
        return pool(nn.MaxPool2d(3, stride=2, padding=int(self.exact)))


Stages = tuple[Part, Part, Part, Part]
"""The stem, and what is done at each of the three resolutions."""


def repeat(part: Callable[[], Part], times: int) -> list[Part]:
    """The same module, with weights of its own each time."""
    return [part() for _ in range(times)]


# Inception-v4 (figures 3 to 9)


def stem_v4(m: Modules) -> Part:
    """Figure 3: 299 x 299 -> 35 x 35 x 384."""
    return chain(
        m.conv(32, 3, stride=2, valid=True), m.conv(32, 3, valid=True), m.conv(64, 3),
        fork(m.max(), m.down(96)),
        fork(chain(m.conv(64), m.conv(96, 3, valid=True)),
             chain(m.conv(64), m.conv(64, 1, 7), m.conv(64, 7, 1), m.conv(96, 3, valid=True))),
        fork(m.down(192), m.max()),
    )  # fmt: skip


def reduction_a(m: Modules, k: int, l: int, mm: int, n: int) -> Part:  # noqa: E741  (table 1's letters)
    """Figure 7 and table 1: 35 x 35 -> 17 x 17."""
    return fork(m.down(n), chain(m.conv(k), m.conv(l, 3), m.down(mm)), m.max())


def v4(m: Modules, config: Config) -> Stages:
    """Figure 9."""
    a, b, c = config.blocks
    inception_a = lambda: fork(  # noqa: E731  (figure 4)
        m.conv(96), chain(m.conv(64), m.conv(96, 3)), chain(m.conv(64), m.conv(96, 3), m.conv(96, 3)), chain(average(), m.conv(96))
    )
    inception_b = lambda: fork(  # noqa: E731  (figure 5)
        m.conv(384),
        chain(m.conv(192), m.conv(224, 1, 7), m.conv(256, 7, 1)),
        chain(m.conv(192), m.conv(192, 7, 1), m.conv(224, 1, 7), m.conv(224, 7, 1), m.conv(256, 1, 7)),
        chain(average(), m.conv(128)),
    )
    inception_c = lambda: fork(  # noqa: E731  (figure 6)
        m.conv(256),
        chain(m.conv(384), fork(m.conv(256, 1, 3), m.conv(256, 3, 1))),
        chain(m.conv(384), m.conv(448, 3, 1), m.conv(512, 1, 3), fork(m.conv(256, 1, 3), m.conv(256, 3, 1))),
        chain(average(), m.conv(256)),
    )
    reduction_b = fork(  # figure 8
        chain(m.conv(192), m.down(192)), chain(m.conv(256), m.conv(256, 1, 7), m.conv(320, 7, 1), m.down(320)), m.max()
    )
    return (
        stem_v4(m),
        chain(*repeat(inception_a, a)),
        chain(reduction_a(m, 192, 224, 256, 384), *repeat(inception_b, b)),
        chain(reduction_b, *repeat(inception_c, c)),
    )


# Inception-ResNets (figures 10 to 20)


def stem_pooled(m: Modules) -> list[Part]:
    """What figure 14, the v3 and the official Inception-ResNet-v2 begin with: 299 x 299 -> 73 x 73 x 64."""
    return [m.conv(32, 3, stride=2, valid=True), m.conv(32, 3, valid=True), m.conv(64, 3), m.max()]


def resnet_v1(m: Modules, config: Config) -> Stages:
    """Figures 10 to 15."""
    (a, b, c), (sa, sb, sc) = config.blocks, config.scales
    block_a = lambda: residual(  # noqa: E731  (figure 10)
        sa, m.conv(32), chain(m.conv(32), m.conv(32, 3)), chain(m.conv(32), m.conv(32, 3), m.conv(32, 3))
    )
    block_b = lambda: residual(sb, m.conv(128), chain(m.conv(128), m.conv(128, 1, 7), m.conv(128, 7, 1)))  # noqa: E731  (figure 11)
    block_c = lambda: residual(sc, m.conv(192), chain(m.conv(192), m.conv(192, 1, 3), m.conv(192, 3, 1)))  # noqa: E731  (figure 13)
    reduction_b = fork(  # figure 12
        chain(m.conv(256), m.down(384)), chain(m.conv(256), m.down(256)), chain(m.conv(256), m.conv(256, 3), m.down(256)), m.max()
    )
    return (
        chain(*stem_pooled(m), m.conv(80), m.conv(192, 3, valid=True), m.down(256)),
        chain(*repeat(block_a, a)),
        chain(reduction_a(m, 192, 192, 256, 384), *repeat(block_b, b)),
        chain(reduction_b, *repeat(block_c, c)),
    )


def resnet_v2(m: Modules, config: Config) -> Stages:
    """Figures 16 to 20 behind the stem of v4; or, as in the official code, behind v3's and one module, with a last one without ReLU."""
    (a, b, c), (sa, sb, sc) = config.blocks, config.scales
    block_a = lambda: residual(  # noqa: E731  (figure 16)
        sa, m.conv(32), chain(m.conv(32), m.conv(32, 3)), chain(m.conv(32), m.conv(48, 3), m.conv(64, 3))
    )
    block_b = lambda: residual(sb, m.conv(192), chain(m.conv(128), m.conv(160, 1, 7), m.conv(192, 7, 1)))  # noqa: E731  (figure 17)

    def block_c(scale: float = sc, relu: bool = True) -> Part:
        """Figure 19."""
        return residual(scale, m.conv(192), chain(m.conv(192), m.conv(224, 1, 3), m.conv(256, 3, 1)), relu=relu)

    reduction_b = fork(  # figure 18
        chain(m.conv(256), m.down(384)), chain(m.conv(256), m.down(288)), chain(m.conv(256), m.conv(288, 3), m.down(320)), m.max()
    )
    if config.architecture == "resnet_v2_figures":
        stem, last = stem_v4(m), repeat(block_c, c)
    else:
        mixed = fork(
            m.conv(96), chain(m.conv(48), m.conv(64, 5)), chain(m.conv(64), m.conv(96, 3), m.conv(96, 3)), chain(average(), m.conv(64))
        )
        stem = chain(*stem_pooled(m), m.conv(80), m.conv(192, 3, valid=True), m.max(), mixed)
        last = [*repeat(block_c, c - 1), block_c(1.0, relu=False), m.conv(1536)]
    return (
        stem,
        chain(*repeat(block_a, a)),
        chain(reduction_a(m, 256, 256, 384, 384), *repeat(block_b, b)),
        chain(reduction_b, *last),
    )


# What they grew from


def v1(m: Modules, config: Config) -> Stages:
    """GoogLeNet (1409.4842, figure 2 b and table 1): 1x1, 3x3 and 5x5 beside a pooling, with 1x1 convolutions that reduce the channels first."""

    def inception(one: int, reduce3: int, three: int, reduce5: int, five: int, pooled: int) -> Part:
        pooling = pool(nn.MaxPool2d(3, stride=1, padding=1))
        return fork(
            m.conv(one), chain(m.conv(reduce3), m.conv(three, 3)), chain(m.conv(reduce5), m.conv(five, 5)), chain(pooling, m.conv(pooled))
        )

    rows = (
        [(64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)],
        [(192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128)],
        [(256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)],
    )  # fmt: skip
    half = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    first, second, third = ([inception(*row) for row in rows[i][-n:]] for i, n in enumerate(config.blocks))
    return (
        chain(m.conv(64, 7, stride=2), pool(half), m.conv(64), m.conv(192, 3), pool(half)),
        chain(*first),
        chain(pool(half), *second),
        chain(pool(nn.MaxPool2d(2, stride=2, ceil_mode=True)), *third),
    )


def v2_v3(m: Modules, config: Config) -> Stages:
    """1512.00567: 5x5 becomes two 3x3 (figure 5), n x n becomes 1xn and nx1 (figure 6), the last modules widen instead of deepen (figure 7).

    v3 is as released: n = 7, and 5x5 again in the first modules. The paper's v2 has n = 7 too; here it has 3, which sets the first step apart.
    """
    n, second = (3, 3) if config.architecture == "v2" else (7, 5)

    def at_35(pooled: int) -> Part:
        return fork(
            m.conv(64), chain(m.conv(48), m.conv(64, second)), chain(m.conv(64), m.conv(96, 3), m.conv(96, 3)),
            chain(average(True), m.conv(pooled)),
        )  # fmt: skip

    def at_17(inner: int) -> Part:
        return fork(
            m.conv(192),
            chain(m.conv(inner), m.conv(inner, 1, n), m.conv(192, n, 1)),
            chain(m.conv(inner), m.conv(inner, n, 1), m.conv(inner, 1, n), m.conv(inner, n, 1), m.conv(192, 1, n)),
            chain(average(True), m.conv(192)),
        )

    def at_8() -> Part:
        return fork(
            m.conv(320),
            chain(m.conv(384), fork(m.conv(384, 1, 3), m.conv(384, 3, 1))),
            chain(m.conv(448), m.conv(384, 3), fork(m.conv(384, 1, 3), m.conv(384, 3, 1))),
            chain(average(True), m.conv(192)),
        )

    a, b, c = config.blocks
    to_17 = fork(m.down(384), chain(m.conv(64), m.conv(96, 3), m.down(96)), m.max())
    to_8 = fork(chain(m.conv(192), m.down(320)), chain(m.conv(192), m.conv(192, 1, n), m.conv(192, n, 1), m.down(192)), m.max())
    return (
        chain(*stem_pooled(m), m.conv(80), m.conv(192, 3, valid=True), m.max()),
        chain(*(at_35(pooled) for pooled in (32, 64, 64)[:a])),
        chain(to_17, *(at_17(inner) for inner in (128, 160, 160, 192)[:b])),
        chain(to_8, *repeat(at_8, c)),
    )


ARCHITECTURES: Mapping[Architecture, Callable[[Modules, Config], Stages]] = {
    "v1": v1,
    "v2": v2_v3,
    "v3": v2_v3,
    "v4": v4,
    "resnet_v1": resnet_v1,
    "resnet_v2": resnet_v2,
    "resnet_v2_figures": resnet_v2,
}


class Auxiliary(nn.Module):
    """v3's second classifier. It speeds nothing up in the beginning, but helps late in training (1512.00567, section 4): a regulariser."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(5, stride=3)
        self.convs = nn.Sequential(ConvNorm(inputs, 128, (1, 1), 1, (0, 0)), ConvNorm(128, 768, (5, 5), 1, (0, 0)))
        self.head = nn.Linear(768, classes)

    def forward(self, x: Float[Tensor, "B I 17 17"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.head(self.convs(self.pool(x)).mean((2, 3)))


class Inception(nn.Module):
    """A stem and three resolutions, an average, dropout, a classifier (figures 9 and 15).

    Attributes:
        widths: channels of what the three resolutions end with.
        strides: input pixels from one of their cells to the next; borders that are cut off leave a cell or two fewer.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size)
        m = Modules(config)
        stem, *stages = ARCHITECTURES[config.architecture](m, config)
        if config.small_images:
            stem = chain(m.conv(96, 3, stride=2), m.conv(384, 3))
        self.stem, width = stem(channels)
        self.stages, widths = nn.ModuleList(), []
        for part in stages:
            stage, width = part(width)
            self.stages.append(stage)
            widths.append(width)
        self.widths = tuple(widths)
        self.strides = (2, 4, 8) if config.small_images else (8, 16, 32)
        self.embedding = width
        self.auxiliary = Auxiliary(self.widths[1], classes) if config.auxiliary else None
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, classes)

    def pyramid(self, image: Float[Tensor, "B C S S"]) -> list[Tensor]:
        """What each resolution ends with, of ``widths`` channels."""
        features, x = [], self.stem(image)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def embed(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B F"]:
        """The last map, averaged over its cells."""
        return self.pyramid(image)[-1].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C S S"]) -> Output:
        """``logits``, B K; in training also ``auxiliary`` where there is a second classifier."""
        _, middle, last = self.pyramid(image)
        output = {"logits": self.head(self.dropout(last.mean((2, 3))))}
        if self.training and self.auxiliary is not None:
            output["auxiliary"] = self.auxiliary(middle)
        return output

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifiers'."""
        return [*self.head.parameters(), *(self.auxiliary.head.parameters() if self.auxiliary else ())]


def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy with labels smoothed by 0.1, and 0.4 of the second classifier's."""
    terms = smoothed(output, batch)
    if "auxiliary" in output:
        second = smoothed({"logits": output["auxiliary"]}, batch)["loss"]
        terms = {"loss": terms["loss"] + 0.4 * second, "auxiliary": second}
    return terms


SMALL = Config(blocks=(1, 2, 1), width=0.2, small_images=True, image_size=None)
VARIANTS: Mapping[str, Config] = {
    "v4": Config(),
    "resnet_v1": Config(architecture="resnet_v1", blocks=(5, 10, 5)),
    "resnet_v2": Config(architecture="resnet_v2", blocks=(10, 20, 10)),
    "resnet_v2_figures": Config(architecture="resnet_v2_figures", blocks=(5, 10, 5)),
    "v3": Config(architecture="v3", blocks=(3, 4, 2)),
    "v3_auxiliary": Config(architecture="v3", blocks=(3, 4, 2), auxiliary=True),
    "v1": Config(architecture="v1", blocks=(2, 5, 2), dropout=0.4, image_size=224),
    "small": SMALL,
    "small_resnet": Config(architecture="resnet_v2_figures", blocks=(2, 4, 2), width=0.2, small_images=True, image_size=None),
    "small_v3": Config(architecture="v3", blocks=(1, 2, 1), width=0.2, small_images=True, image_size=None),
    "small_v2": Config(architecture="v2", blocks=(1, 2, 1), width=0.2, small_images=True, image_size=None),
    "small_v1": Config(architecture="v1", blocks=(1, 2, 1), width=0.4, small_images=True, image_size=None),
    "test": Config(architecture="resnet_v2_figures", blocks=(1, 1, 1), width=0.05, small_images=True, image_size=None),
}


def recipe(config: Config) -> Recipe:
    """Section 4: averaged weights and, as in v3, smoothed labels; AdamW and a cosine stand in for RMSProp and 0.94 every two epochs."""
    if config.image_size is None:
        return Recipe(lr=3e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))
    return Recipe(lr=1e-3, weight_decay=4e-5, batch_size=64, patch=config.image_size, average=0.9999, augment=Varied(chance=0, erase=0))


def build(spec: Spec, config: Config) -> Inception:
    """The network for a data set."""
    return Inception(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "v3"), loss=lambda config: loss)
