"""MPViT: patches of several sizes at every stage, a Transformer path for each size, and a convolutional path beside them.

Lee, Kim, Willette and Hwang, "MPViT: Multi-Path Vision Transformer for Dense Prediction", CVPR 2022 (arXiv 2112.11010).

Objects of one picture have many sizes, and a stage of an ordinary vision Transformer reads one size of patch. Here overlapping convolutions
in series give sequences of one length whose tokens have seen 3, 5 and 7 cells; each sequence has its own encoder, and what they and a local
convolution found is mixed. Factorised attention with convolutional relative positions (of CoaT, Xu et al. 2021) keeps the cost linear.

As in the official code (youngwanLEE/MPViT): position encodings are shared by all blocks of a path, keys go through a softmax over places and
queries through none, the scale is on the content term alone, LayerNorm with an epsilon of 1e-6, no norm before the classifier. Different
from it: maps keep their channels last between the convolutions, so that nothing is copied; Mixup, CutMix and repeated augmentation, which work
on batches, are left out; a stem of stride 2 for small images.

Shapes: B batch, C image channels, K classes, H W pixels, h w cells of a stage, N = h w, D channels of a stage, A attention heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import Varied, ramp, smoothed
from paperworks.tasks.base import Grid, Output, Paper, Recipe
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """A row of table 1."""

    paths: tuple[int, ...] = (2, 3, 3, 3)
    """Sizes of patches, and encoders, of each stage."""
    layers: tuple[int, ...] = (1, 2, 4, 1)
    """L: blocks of each encoder of a stage."""
    widths: tuple[int, ...] = (64, 96, 176, 216)
    """D of each stage; a stage hands on the width of the next."""
    mlp_ratio: int = 2
    windows: tuple[int, ...] = (3, 3, 5, 5, 5, 7, 7, 7)
    """For each attention head the side of the kernels of its relative positions."""
    local: bool = True
    """The convolutional path (table 6 takes it away)."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0, alike in all paths of a stage."""
    stem: int | None = 4
    """Stride of the stem, 2 or 4; None takes 2 for images below 64 pixels."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm and, where asked for, Hardswish."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, active: bool = True) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            *([nn.Hardswish()] if active else []),
        )


class PatchEmbedding(nn.Sequential):
    """Section 3.2: a depthwise separable 3x3 convolution. n of them in series see 2n + 1 cells, with fewer weights than one large kernel."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.Hardswish(),
        )


class LocalPath(nn.Module):
    """Section 3.3's L_i: an inverted residual block (of expansion 1) keeps what is near together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = ConvNorm(width, width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.project = ConvNorm(width, width, active=False)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """What the convolutions add to ``x``, and ``x``."""
        return x + self.project(F.hardswish(self.norm(self.depthwise(self.expand(x)))))


class PositionEncoding(nn.Conv2d):
    """Conditional positions (CPVT): a depthwise convolution knows by the zeros around the map where a token lies."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1, groups=width)

    def forward(self, input: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        """Added to the tokens."""
        return input + super().forward(input.movedim(-1, 1)).movedim(1, -1)


class RelativePositions(nn.Module):
    """CoaT's convolutional relative positions: each head's values, convolved depthwise with the window of that head."""

    def __init__(self, width: int, windows: tuple[int, ...]) -> None:
        super().__init__()
        runs = [(side, width // len(windows) * len(list(heads))) for side, heads in groupby(windows)]
        self.shares = [share for _, share in runs]
        self.convs = nn.ModuleList(nn.Conv2d(share, share, side, padding=side // 2, groups=share) for side, share in runs)

    def forward(self, q: Float[Tensor, "B h w D"], v: Float[Tensor, "B h w D"]) -> Float[Tensor, "B h w D"]:
        """``q o conv(v)``, element by element."""
        parts = v.movedim(-1, 1).split(self.shares, 1)
        return q * torch.cat([conv(part) for conv, part in zip(self.convs, parts)], 1).movedim(1, -1)


class FactorisedAttention(nn.Module):
    """Section 3.3, after CoaT: keys and values meet first, in a matrix of D/A x D/A a head, so that the cost is linear in the number of tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.count, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Float[Tensor, "B h w D"]) -> Float[Tensor, "B A N d"]:
        """The share of each head."""
        return x.flatten(1, 2).unflatten(-1, (self.count, -1)).transpose(1, 2)

    def forward(self, x: Float[Tensor, "B h w D"], relative: RelativePositions) -> Float[Tensor, "B h w D"]:
        """``Q (softmax_N(K)^T V) / sqrt(d) + Q o conv(V)``."""
        q, k, v = self.qkv(x).chunk(3, -1)
        context = self.split(k).softmax(2).mT @ self.split(v)  # over places: what each key feature finds in the whole map, B A d d
        found = self.split(q) @ context
        return self.out(self.scale * found.transpose(1, 2).reshape(x.shape) + relative(q, v))


class Block(nn.Module):
    """A layer of an encoder."""

    def __init__(self, width: int, config: Config, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = FactorisedAttention(width, len(config.windows))
        self.mlp = nn.Sequential(nn.Linear(width, config.mlp_ratio * width), nn.GELU(), nn.Linear(config.mlp_ratio * width, width))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Float[Tensor, "B h w D"], relative: RelativePositions) -> Float[Tensor, "B h w D"]:
        """Attention, MLP."""
        x = x + self.drop_path(self.attention(self.norm1(x), relative))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """One path: L blocks over the tokens of one size of patch, and two encodings of place that they share."""

    def __init__(self, width: int, config: Config, rates: list[float]) -> None:
        super().__init__()
        self.places, self.relative = PositionEncoding(width), RelativePositions(width, config.windows)
        self.blocks = nn.ModuleList(Block(width, config, rate) for rate in rates)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """Channels last on the way."""
        tokens = x.movedim(1, -1)
        for block in self.blocks:
            tokens = block(self.places(tokens), self.relative)
        return tokens.movedim(-1, 1)


class Stage(nn.Module):
    """Figure 3: multi-scale patch embedding, encoders side by side, the local path, and their aggregation (eqs. 4 and 5)."""

    def __init__(self, width: int, outputs: int, paths: int, stride: int, config: Config, rates: list[float]) -> None:
        super().__init__()
        if width % len(config.windows):
            raise InputError(f"{len(config.windows)} attention heads do not divide a width of {width}; set windows or widths")
        self.width = width
        self.embeddings = nn.ModuleList(PatchEmbedding(width, stride if i == 0 else 1) for i in range(paths))
        self.encoders = nn.ModuleList(Encoder(width, config, rates) for _ in range(paths))
        self.local = LocalPath(width) if config.local else None
        self.aggregate = ConvNorm((paths + config.local) * width, outputs)

    def embedded(self, x: Float[Tensor, "B D h w"]) -> list[Tensor]:
        """Maps of one size whose cells have seen 3, 5, 7, ... cells of ``x``."""
        maps = []
        for embedding in self.embeddings:
            x = embedding(x)
            maps.append(x)
        return maps

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E h2 w2"]:
        """Local and global features, side by side in the channels, then mixed by a 1x1 convolution."""
        maps = self.embedded(x)
        found = [encoder(tokens) for encoder, tokens in zip(self.encoders, maps)]
        return self.aggregate(torch.cat(([self.local(maps[0])] if self.local else []) + found, 1))


class MPViT(nn.Module):
    """Figure 3.

    Attributes:
        widths: channels of the stages' outputs: those of the next stage, and the last's own.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        stem = int(config.stem or (2 if image_size < 64 else 4))
        if stem not in (2, 4):
            raise InputError(f"a stem of stride {stem}; there are 2 and 4")
        if not len(config.paths) == len(config.layers) == len(config.widths):
            raise InputError(f"{len(config.paths)} paths, {len(config.layers)} layers and {len(config.widths)} widths do not make stages")
        first = config.widths[0]
        self.grid = Grid(fixed=image_size)
        self.widths = (*config.widths[1:], config.widths[-1])
        self.strides = tuple(stem * 2**i for i in range(len(config.widths)))
        self.embedding = config.widths[-1]
        rates = iter(ramp(config.drop_path, sum(config.layers)))

        self.stem = nn.Sequential(ConvNorm(channels, first // 2, 3, 2), ConvNorm(first // 2, first, 3, stem // 2))
        self.stages = nn.Sequential(
            *(
                Stage(width, outputs, paths, 1 if i == 0 else 2, config, [next(rates) for _ in range(layers)])
                for i, (width, outputs, paths, layers) in enumerate(zip(config.widths, self.widths, config.paths, config.layers))
            )
        )
        self.head = nn.Linear(self.embedding, classes)
        self.apply(started)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each stage ends with, of ``widths`` channels at ``strides``."""
        features, x = [], self.stem(image)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The average over all cells; no norm."""
        return self.pyramid(image)[-1].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def started(module: nn.Module) -> None:
    """First weights: by the outputs of convolutions without bias (of the local path, those of a group), 0.02 for linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.bias is None:
        nn.init.normal_(module.weight, std=(2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
    elif isinstance(module, LocalPath):
        nn.init.normal_(module.depthwise.weight, std=(2 / 9) ** 0.5)  # after its parts


def reach(network: MPViT, stage: int) -> list[int]:
    """Figure 2's picture in numbers: cells on a side of the stage's input that a token of each path has seen before its encoder.

    Found by the gradient, in evaluation mode, on a map of noise that is large enough.
    """
    part = network.stages[stage]
    assert isinstance(part, Stage)
    was = part.training
    part.eval()
    sides = []
    with torch.enable_grad():
        x = torch.randn(1, part.width, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for tokens in part.embedded(x):
            middle = tokens.shape[-1] // 2
            (slope,) = torch.autograd.grad(tokens[0, :, middle, middle].sum(), x, retain_graph=True)
            columns = slope.abs().sum((0, 1, 2)).nonzero()
            sides.append(int(columns.max() - columns.min()) + 1)
    part.train(was)
    return sides


VARIANTS: Mapping[str, Config] = {
    "tiny": Config(),
    "xsmall": Config(widths=(64, 128, 192, 256), mlp_ratio=4),
    "small": Config(layers=(1, 3, 6, 3), widths=(64, 128, 216, 288), mlp_ratio=4, drop_path=0.05),
    "base": Config(layers=(1, 3, 8, 3), widths=(128, 224, 368, 480), mlp_ratio=4, drop_path=0.3),
    "laptop": Config(layers=(1, 1, 2, 1), widths=(24, 48, 96, 120), windows=(3, 5, 5, 7), stem=None, image_size=None),
    "test": Config(
        paths=(1, 2, 3), layers=(1, 2, 1), widths=(8, 12, 16), windows=(3, 5), drop_path=0.1, stem=None, image_size=None
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """DeiT's and CoaT's, as section 4.1 has it, with the learning rate of 1e-3 at a batch of 1024 in proportion; a laptop's own."""
    if config.image_size is None:
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))
    return Recipe(
        lr=1e-3 * 128 / 1024, weight_decay=0.05, warmup=5 / 300, batch_size=128, patch=config.image_size, clip=None, augment=Varied(),
    )  # fmt: skip


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: MPViT(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config),
    recipe=recipe,
    auto=("laptop", "tiny"),
    loss=lambda config: smoothed,
)
