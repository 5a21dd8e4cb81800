"""DLA: layers are merged step by step and in trees, instead of by one skip connection at the end.

Yu, Wang, Shelhamer and Darrell, "Deep Layer Aggregation", CVPR 2018 (arXiv 1707.06484).

Hierarchical aggregation makes the blocks of a stage the leaves of a tree, whose nodes go back into the stage; iterative aggregation hands each
stage's input to the root of its tree, from shallow to deep. For dense prediction, ``DLAUp`` aggregates the stages once more while it brings
them to one resolution.

As in the official code (ucbdrive/dla): nodes without a residual but in DLA-102, X-102 and 169; max pooling on shortcuts; no dropout.
Different from it: projections that a deep tree makes and never uses do not exist (timm leaves them out too), the classifier is a linear
layer, and colour jitter along principal components is left out. The control ``aggregation="plain"`` is figure 2 (a).

Shapes: B batch, C image channels, K classes, H W pixels, h w cells of a stage, I and O channels before and after, F of the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.papers.backbones.convnext.convnext import Varied
from paperworks.tasks.base import Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """A row of table 1; DLA-34 by default."""

    depths: tuple[int, ...] = (1, 2, 2, 1)
    """Depth of each stage's tree, from stage 2 on; one of depth d has 2^d blocks."""
    widths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Channels of the two plain stages in front and of each tree."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1."""
    groups: int = 1
    """Of a bottleneck's 3x3 convolution; more than 1 is the split block of the X models."""
    residual_root: bool = False
    """Nodes add their first input (equation 4)."""
    aggregation: Literal["deep", "plain"] = "deep"
    """``plain`` puts the same blocks in a row (figure 2 a)."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class ConvNorm(nn.Sequential):
    """Convolution without a bias that keeps the map's side, or divides it by the stride, and batch norm; with ReLU where asked for."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


class Block(nn.Module):
    """A leaf: a residual block (section 4); its shortcut is pooled where the stage gets coarser and projected where it gets wider."""

    def __init__(self, inputs: int, outputs: int, stride: int, config: Config) -> None:
        super().__init__()
        if config.block == "basic":
            layers = [ConvNorm(inputs, outputs, 3, stride), ConvNorm(outputs, outputs, 3, relu=False)]
        else:
            inner = outputs // 2 if config.groups == 1 else outputs * config.groups // 32
            layers = [
                ConvNorm(inputs, inner),
                ConvNorm(inner, inner, 3, stride, config.groups),
                ConvNorm(inner, outputs, relu=False),
            ]
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(
            nn.MaxPool2d(stride) if stride > 1 else nn.Identity(),
            ConvNorm(inputs, outputs, relu=False) if inputs != outputs else nn.Identity(),
        )

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        """ReLU of the shortcut plus what the branch adds."""
        y = self.branch(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Node(nn.Module):
    """Equations 3 and 4: N(x1, ..., xn) = ReLU(BN(sum of W_i x_i) (+ x1))."""

    def __init__(self, inputs: int, outputs: int, residual: bool) -> None:
        super().__init__()
        self.merge = ConvNorm(inputs, outputs, relu=False)
        self.residual = residual

    def forward(self, children: Sequence[Float[Tensor, "B _ h w"]]) -> Float[Tensor, "B O h w"]:
        """Merge the children, the deepest first."""
        y = self.merge(torch.cat(tuple(children), 1))
        if self.residual:
            y += children[0]
        return F.relu(y, inplace=True)


class Tree(nn.Module):
    """Equation 2: hierarchical aggregation with nodes that go back into the stage and are merged where they meet (figure 2 f).

    A tree of depth 1 is two blocks and the node that merges them. In a deeper one, the node of the left half is the input of the right half and a
    child of its root as well, together with all children from further up.
    """

    def __init__(self, depth: int, inputs: int, outputs: int, stride: int, above: int, config: Config) -> None:
        super().__init__()
        self.root: Node | None = None
        if depth == 1:
            self.left: nn.Module = Block(inputs, outputs, stride, config)
            self.right: nn.Module = Block(outputs, outputs, 1, config)
            self.root = Node(2 * outputs + above, outputs, config.residual_root)
        else:
            self.left = Tree(depth - 1, inputs, outputs, stride, 0, config)
            self.right = Tree(depth - 1, outputs, outputs, 1, above + outputs, config)

    def forward(self, x: Float[Tensor, "B I H W"], above: tuple[Tensor, ...] = ()) -> Float[Tensor, "B O h w"]:
        """Aggregate the leaves; ``above`` are children that the root gets from further up."""
        left = self.left(x)
        if self.root is None:
            return self.right(left, (*above, left))
        return self.root((self.right(left), left, *above))


class Stage(nn.Module):
    """One resolution: a tree, whose root gets the stage's input too, which is the iterative aggregation of figure 3."""

    def __init__(self, depth: int, inputs: int, outputs: int, iterative: bool, config: Config) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if iterative else None
        self.tree = Tree(depth, inputs, outputs, 2, inputs if iterative else 0, config)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        """Half the resolution."""
        return self.tree(x, () if self.pool is None else (self.pool(x),))


class DLA(nn.Module):
    """Figure 3: two plain stages, then one tree a stage.

    Attributes:
        level_widths: channels of all stages' outputs, the two plain ones first.
        widths: channels of the trees' outputs.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        first, second, *_ = config.widths
        self.grid = Grid(fixed=image_size)
        self.level_widths, self.widths = config.widths, config.widths[2:]
        self.strides = tuple(4 * 2**i for i in range(len(self.widths)))
        self.embedding = self.widths[-1]
        self.base = ConvNorm(channels, first, 7)
        self.plain = nn.ModuleList([ConvNorm(first, first, 3), ConvNorm(first, second, 3, stride=2)])
        self.stages = nn.ModuleList()
        for i, (depth, (inputs, outputs)) in enumerate(zip(config.depths, pairwise(config.widths[1:]))):
            if config.aggregation == "deep":
                self.stages.append(Stage(depth, inputs, outputs, i > 0, config))
            else:
                rest = [Block(outputs, outputs, 1, config) for _ in range(2**depth - 1)]
                self.stages.append(nn.Sequential(Block(inputs, outputs, 2, config), *rest))
        self.head = nn.Linear(self.embedding, classes)
        _init(self)
        # Officially a 1x1 convolution, drawn as all others; that rule would give few classes logits of any size.
        nn.init.normal_(self.head.weight, std=sqrt(2 / max(classes, 1000)))

    def levels(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each stage ends with, the two plain ones included: strides 1, 2, 4, ..."""
        features, x = [], self.base(image)
        for stage in (*self.plain, *self.stages):
            x = stage(x)
            features.append(x)
        return features

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each tree ends with, of ``widths`` channels at ``strides``."""
        return self.levels(image)[2:]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The last map, averaged over its cells."""
        return self.pyramid(image)[-1].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def _init(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # The official rule, which counts the outputs of a grouped convolution as if it had no groups.
            nn.init.normal_(module.weight, std=sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# Section 3.3 and figure 4: from a classifier to dense prediction


class Bilinear(nn.ConvTranspose2d):
    """Brings a map to ``factor`` times its side, each channel alone; it starts as bilinear interpolation between zeros beyond the border."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(channels, channels, 2 * factor, factor, factor // 2, groups=channels, bias=False)
        half = ceil(2 * factor / 2)
        centre = (2 * half - 1 - half % 2) / (2 * half)
        line = 1 - (torch.arange(2 * factor) / half - centre).abs()
        with torch.no_grad():
            self.weight.copy_(line[:, None] * line)


class IDAUp(nn.Module):
    """Iterative aggregation of maps of falling resolution (equation 1), all brought to the first one's width and resolution."""

    def __init__(self, width: int, inputs: Sequence[int], factors: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Identity() if n == width else ConvNorm(n, width) for n in inputs)
        self.up = nn.ModuleList(nn.Identity() if f == 1 else Bilinear(width, f) for f in factors)
        self.nodes = nn.ModuleList(ConvNorm(2 * width, width, 3) for _ in inputs[1:])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """After each node, one map fewer than there were."""
        y, *rest = [up(project(x)) for x, project, up in zip(maps, self.project, self.up, strict=True)]
        aggregated = []
        for x, node in zip(rest, self.nodes):
            y = node(torch.cat([y, x], 1))
            aggregated.append(y)
        return aggregated


class DLAUp(nn.Module):
    """Figure 4: from the two coarsest maps on, one finer map more in each turn, until all are merged at the finest resolution."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        inputs, scales, steps = list(widths), [2**i for i in range(len(widths))], []
        for j in reversed(range(len(widths) - 1)):
            steps.append(IDAUp(widths[j], inputs[j:], [scale // scales[j] for scale in scales[j:]]))
            inputs[j + 1 :] = [widths[j]] * len(inputs[j + 1 :])  # what comes after has the width and the resolution of map j now
            scales[j + 1 :] = [scales[j]] * len(scales[j + 1 :])
        self.steps = nn.ModuleList(steps)

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Maps from fine to coarse, each of half the side of the one before -> one of the first one's shape."""
        maps = list(maps)
        for j, step in zip(reversed(range(len(maps) - 1)), self.steps):
            maps[j + 1 :] = step(maps[j:])
        return maps[-1]


class Segmenter(nn.Module):
    """DLA with DLAUp and a classifier for each pixel; sides have to be multiples of the last stride.

    Args:
        base: the classifier to build on; its own head is not used.
        classes: of pixels.
        ratio: stride of the finest stage that takes part, 2 in the paper; from there a fixed bilinear interpolation leads to the pixels.
    """

    def __init__(self, base: DLA, classes: int, ratio: Literal[2, 4, 8] = 2) -> None:
        super().__init__()
        self.base, self.first = base, (1, 2, 4, 8).index(ratio)
        widths = base.level_widths[self.first :]
        self.up = DLAUp(widths)
        self.head = nn.Conv2d(widths[0], classes, 1)
        self.grid = Grid(base.strides[-1])
        _init(self.up)
        _init(self.head)
        self.enlarge = Bilinear(classes, ratio).requires_grad_(False)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K H W."""
        return {"logits": self.enlarge(self.head(self.up(self.base.levels(image)[self.first :])))}


COMPACT = (16, 32, 64, 64, 128, 256)
WIDE = (16, 32, 128, 256, 512, 1024)
VARIANTS: Mapping[str, Config] = {
    "34": Config(),
    "46_c": Config(widths=COMPACT, block="bottleneck"),
    "60": Config(depths=(1, 2, 3, 1), widths=WIDE, block="bottleneck"),
    "102": Config(depths=(1, 3, 4, 1), widths=WIDE, block="bottleneck", residual_root=True),
    "169": Config(depths=(2, 3, 5, 1), widths=WIDE, block="bottleneck", residual_root=True),
    "x_46_c": Config(widths=COMPACT, block="bottleneck", groups=32),
    "x_60_c": Config(depths=(1, 2, 3, 1), widths=COMPACT, block="bottleneck", groups=32),
    "x_60": Config(depths=(1, 2, 3, 1), widths=WIDE, block="bottleneck", groups=32),
    "x_102": Config(depths=(1, 3, 4, 1), widths=WIDE, block="bottleneck", groups=32, residual_root=True),
    "x_102_64": Config(depths=(1, 3, 4, 1), widths=WIDE, block="bottleneck", groups=64, residual_root=True),
    "small": Config(depths=(1, 2, 1), widths=(16, 24, 48, 80, 112), image_size=None),
    "test": Config(depths=(1, 2), widths=(4, 6, 8, 10), image_size=None),
}


def recipe(config: Config) -> Recipe:
    """Section 5.1: SGD, 0.1 for 256 images, divided by ten each quarter of 120 epochs. From nothing in minutes: AdamW and a cosine."""
    if config.image_size is None:
        return Recipe(lr=3e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))
    return Recipe(
        optimizer="sgd", lr=0.1 * 128 / 256, momentum=0.9, weight_decay=1e-4, schedule="step", decay_at=(0.25, 0.5, 0.75), warmup=0,
        batch_size=128, patch=config.image_size, clip=None, augment=Varied(chance=0, erase=0),
    )  # fmt: skip


def build(spec: Spec, config: Config) -> DLA:
    """The network for a data set."""
    return DLA(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "34"))
