"""nnFormer: Volumetric Medical Image Segmentation via a 3D Transformer. Zhou, Guo, Zhang, Han, Yu, Wang, Yu, arXiv:2109.03201, TIP 2023.

Convolutions say exactly where things are: they embed the volume and change its scale. Between them, self-attention within small volumes
(LV-MSA, and SLV-MSA in shifted ones) gathers context, at the bottom within the whole map (GV-MSA). Skips are neither added nor concatenated:
the decoder asks, and the encoder's map of that scale answers (skip attention).

Different from the official code (282857341/nnFormer): it takes one crop size, here attention takes any map, in windows that are filled up
and masked, and is the same at the official crop. Its index of relative positions leads the 343 offsets of a 4x4x4 window to 115 entries; here
each offset has its own. The ACDC network cuts 14 slices to 7 and 3; here depth is filled up as the other axes are.

Shapes: B batch, C image channels, K classes, F features, D H W the axes (of tokens from the embedding on), N tokens of a window, n windows.
"""
# Pyright cannot see that tuples made of three things by zip have three, nor what the lists of modules hold; Liskov is not meant by SkipBlock.
# pyright: reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false, reportIncompatibleMethodOverride=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from paperworks.data.augment import Augment
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe
from paperworks.tasks.segmentation import Segmentation

Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network for the organs of Synapse by default."""

    dim: int = 192
    """Features of the first stage; each further stage has twice as many."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage, in the encoder and in the decoder."""
    heads: tuple[int, ...] = (6, 12, 24, 48)
    decoder_heads: tuple[int, ...] = (6, 12, 24)
    patch: Size = (2, 4, 4)
    """Voxels to a token: the strides of the embedding."""
    windows: tuple[Size, ...] = ((4, 4, 4), (4, 4, 4), (8, 8, 8), (4, 4, 4))
    """Tokens of a window in each stage."""
    local: int = 2
    """Stages whose every other block shifts its windows. The windows of the others hold the whole map of the official crop."""
    strides: tuple[Size, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    """Of the convolutions between the stages."""
    multiple: int = 32
    """Sides of the input are multiples of it, so that every stage halves even sides."""
    skip_attention: bool = True
    """False: the paper's baseline, in which skip and decoder are added and attend to their sum."""
    deep_supervision: bool = True
    """Answers of the coarser decoder stages are trained too."""
    drop_path: float = 0.2
    """Share of the residual branches that are dropped in the last block of encoder and decoder; it grows linearly from 0."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the features of B F D H W."""

    def forward(self, x: Float[Tensor, "B F D H W"]) -> Float[Tensor, "B F D H W"]:
        """Normalise each voxel."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Conv(nn.Conv3d):
    """A convolution that halves an axis of stride 2, with a kernel of 3 or, along axes that it leaves alone, 1 or 3.

    Zeros lie on both sides of an axis of stride 1, and before one of stride 2: its sides are even, so that the kernel never reaches what would
    lie behind, and the length is plainly half, also to an exporter that knows no more of it than that.
    """

    def __init__(self, inputs: int, outputs: int, kernel: Size, stride: Size) -> None:
        super().__init__(inputs, outputs, kernel, stride)
        self.zeros = [n for k, s in zip(kernel[::-1], stride[::-1]) for n in (k // 2, k // 2 if s == 1 else 0)]

    def forward(self, x: Float[Tensor, "B F D H W"]) -> Float[Tensor, "B G d h w"]:
        """Pad and convolve."""
        return super().forward(F.pad(x, self.zeros))


class Embedding(nn.Sequential):
    """The embedding layer: four 3x3x3 convolutions where others cut patches; the first and the third have the strides. B C D H W -> tokens."""

    def __init__(self, channels: int, dim: int, patch: Size) -> None:
        first, one = tuple(min(p, 2) for p in patch), (1, 1, 1)
        layers: list[nn.Module] = []
        widths = (channels, dim // 2, dim // 2, dim, dim)
        for i, stride in enumerate((first, one, tuple(p // f for p, f in zip(patch, first)), one)):
            layers += [Conv(widths[i], widths[i + 1], (3, 3, 3), stride), nn.GELU(), ChannelNorm(widths[i + 1])]
        del layers[-2]  # the last convolution is normalised as it is
        super().__init__(*layers)


class Down(nn.Module):
    """GELU, norm and a strided convolution to twice the features, in the place of Swin's patch merging."""

    def __init__(self, dim: int, stride: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = Conv(dim, 2 * dim, tuple(3 if s > 1 else 1 for s in stride), stride)

    def forward(self, x: Float[Tensor, "B D H W F"]) -> Float[Tensor, "B d h w G"]:
        """G = 2F."""
        return self.conv(self.norm(F.gelu(x)).movedim(-1, 1)).movedim(1, -1)


class Up(nn.Module):
    """Norm and a transposed convolution to half the features."""

    def __init__(self, dim: int, stride: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.ConvTranspose3d(dim, dim // 2, stride, stride)

    def forward(self, x: Float[Tensor, "B d h w G"]) -> Float[Tensor, "B D H W F"]:
        """F = G / 2."""
        return self.conv(self.norm(x).movedim(-1, 1)).movedim(1, -1)


def split(x: Tensor, window: Size) -> Tensor:
    """Cut B D H W F, whose axes the window divides, into windows: B n N F."""
    (b, *size, f), (i, j, k) = x.shape, window
    x = x.view(b, size[0] // i, i, size[1] // j, j, size[2] // k, k, f)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, i * j * k, f)


def join(x: Tensor, window: Size, size: Size) -> Tensor:
    """The inverse of ``split``; ``size`` is D H W."""
    (b, _, _, f), (i, j, k) = x.shape, window
    x = x.view(b, size[0] // i, size[1] // j, size[2] // k, i, j, k, f)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *size, f)


def roll(x: Tensor, shift: Size, back: bool = False) -> Tensor:
    """B D H W F with the first ``shift`` tokens of each axis moved to its end, or the last to its beginning."""
    for axis, first in enumerate(shift, start=1):
        if first:
            first = x.shape[axis] - first if back else first
            x = torch.cat([x.narrow(axis, first, x.shape[axis] - first), x.narrow(axis, 0, first)], axis)
    return x


def offsets(window: Size) -> Int[Tensor, "N N"]:
    """For each pair of a window's tokens the number of the way from one to the other, 0 to (2 i - 1)(2 j - 1)(2 k - 1) - 1."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij")).flatten(1)  # 3 N
    way = place[:, :, None] - place[:, None, :] + torch.tensor(window)[:, None, None] - 1
    return (way[0] * (2 * window[1] - 1) + way[1]) * (2 * window[2] - 1) + way[2]


class VolumeAttention(nn.Module):
    """Multi-head self-attention within windows of a volume: LV-MSA, SLV-MSA if ``shifted``, GV-MSA if one window holds all.

    With ``asked`` it is skip attention: queries come from outside and as they are, keys and values from the tokens.
    """

    def __init__(self, dim: int, heads: int, window: Size, *, shifted: bool = False, asked: bool = False, even: bool = False) -> None:
        """``even``: windows always come out even, nothing is to be filled up."""
        super().__init__()
        self.heads, self.window, self.even = heads, window, even
        self.shift = tuple(n // 2 if shifted else 0 for n in window)
        self.project = nn.Linear(dim, (2 if asked else 3) * dim)
        self.out = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty(heads, prod(2 * n - 1 for n in window)))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.register_buffer("offsets", offsets(window), persistent=False)

    def forward(self, x: Float[Tensor, "B D H W F"], query: Float[Tensor, "B D H W F"] | None = None) -> Float[Tensor, "B D H W F"]:
        """softmax(Q K^T / sqrt(F / heads) + bias) V in each window; what ``query`` is asks, by default the tokens themselves."""
        size = tuple(x.shape[1:4])
        tokens = self._windows(x)  # B n N F
        parts = self.project(tokens).chunk(2 if query is not None else 3, dim=-1)
        if query is not None:
            parts = (self._windows(query), *parts)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in parts)  # B n heads N c
        score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.bias[:, self.offsets]
        score = score.masked_fill(self._apart(size, x.device)[:, None], float("-inf"))
        tokens = self.out((score.softmax(-1) @ v).transpose(-2, -3).flatten(-2))
        x = roll(join(tokens, self.window, self._filled(size)), self.shift, back=True)
        return x if self.even else x[:, : size[0], : size[1], : size[2]]

    def _filled(self, size: Size) -> Size:
        """Sides of whole windows."""
        return size if self.even else tuple(n + -n % w for n, w in zip(size, self.window))

    def _windows(self, x: Tensor) -> Tensor:
        """Fill up to whole windows, shift, cut: B D H W F -> B n N F."""
        if not self.even:
            missing = [-n % w for n, w in zip(x.shape[1:4], self.window)]
            x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        return split(roll(x, self.shift), self.window)

    def _apart(self, size: Size, device: torch.device) -> Bool[Tensor, "n N N"]:
        """Pairs of a window that must not see each other: one was rolled in from the volume's other end, or fills the window up only."""
        kinds = []
        for n, whole, shift in zip(size, self._filled(size), self.shift):
            place = torch.arange(whole, device=device)  # of the tokens after the shift: the first ones now lie at the end
            kinds.append((place >= whole - shift) * 1 + ((place >= n - shift) & (place < whole - shift)) * 2)
        kind = (kinds[0][:, None, None] * 4 + kinds[1][:, None]) * 4 + kinds[2]
        token = split(kind[None, ..., None], self.window)[0, :, :, 0]  # n N
        return token[:, :, None] != token[:, None, :]


class Block(nn.Module):
    """A transformer block: attention, then a perceptron of four times the features, each normalised before and added."""

    def __init__(self, dim: int, attention: VolumeAttention, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = StochasticDepth(drop, "row")

    def forward(self, x: Float[Tensor, "B D H W F"]) -> Float[Tensor, "B D H W F"]:
        """The tokens ask each other."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SkipBlock(Block):
    """Skip attention: the decoder's tokens ask those of the encoder. One norm serves both; what is added is added to their plain sum."""

    def forward(self, skip: Float[Tensor, "B D H W F"], up: Float[Tensor, "B D H W F"]) -> Float[Tensor, "B D H W F"]:
        """``up`` asks, ``skip`` answers."""
        x = skip + up + self.drop_path(self.attention(self.norm1(skip), self.norm1(up)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NNFormer(nn.Module):
    """The U of the paper: embedding, four stages down, three up, and an expanding layer that turns tokens into voxels."""

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        self.skip_attention, stages = config.skip_attention, len(config.depths)
        dims = [config.dim * 2**i for i in range(stages)]

        def drops(depths: tuple[int, ...]) -> list[list[float]]:
            return list(map(list, torch.linspace(0, config.drop_path, sum(depths), device="cpu").split(depths)))

        def blocks(i: int, heads: int, rates: list[float], first: type[Block] = Block) -> nn.ModuleList:
            dim, window = dims[i], config.windows[i]
            tokens = [config.multiple // (p * prod(steps[:i])) for p, *steps in zip(config.patch, *config.strides)]  # of the smallest input
            even = all(n % w == 0 for n, w in zip(tokens, window))
            made = []
            for j, rate in enumerate(rates):
                kind = first if j == 0 else Block
                shifted = j % 2 == 1 and i < config.local
                attention = VolumeAttention(dim, heads, window, shifted=shifted, asked=kind is SkipBlock, even=even)
                made.append(kind(dim, attention, float(rate)))
            return nn.ModuleList(made)

        self.embedding = Embedding(channels, config.dim, config.patch)
        self.encoder = nn.ModuleList(blocks(i, config.heads[i], rates) for i, rates in enumerate(drops(config.depths)))
        self.norms = nn.ModuleList(map(nn.LayerNorm, dims))
        self.down = nn.ModuleList(map(Down, dims[:-1], config.strides))
        self.up = nn.ModuleList(map(Up, dims[1:], config.strides))
        falling = drops(config.depths[-2::-1])[::-1]  # from the finest stage, whose last block drops most
        asked = SkipBlock if config.skip_attention else Block
        self.decoder = nn.ModuleList(blocks(i, config.decoder_heads[i], rates, asked) for i, rates in enumerate(falling))
        answered = range(stages - 1 if config.deep_supervision else 1)
        self.expand = nn.ModuleList(nn.ConvTranspose3d(dims[i], classes, config.patch, config.patch) for i in answered)
        self.grid = Grid(config.multiple)

    def forward(self, image: Float[Tensor, "B C D H W"]) -> Output:
        """``logits`` B K D H W; while it is trained with deep supervision also ``logits_1``, ``logits_2`` of the coarser stages."""
        x = self.embedding(image).movedim(1, -1)  # B D/2 H/4 W/4 F
        skips = []
        for i, (stage, norm) in enumerate(zip(self.encoder, self.norms)):
            for block in stage:
                x = block(x)
            skips.append(norm(x))
            if i < len(self.down):
                x = self.down[i](x)
        out: Output = {}
        x = skips.pop()
        for i in reversed(range(len(skips))):
            first, *others = self.decoder[i]
            up = self.up[i](x)
            x = first(skips[i], up) if self.skip_attention else first(skips[i] + up)
            for block in others:
                x = block(x)
            if i == 0 or (self.training and i < len(self.expand)):
                out[f"logits_{i}" if i else "logits"] = self.expand[i](x.movedim(-1, 1))
        return out


def supervised(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Deep supervision: the loss of each answer against the labels at its scale; each coarser one weighs half, all together 1.

    Soft Dice and cross-entropy are the task's, which are those of nnU-Net but for the smoothing term (1 for 1e-5).
    """
    names = sorted(output)  # logits, logits_1, logits_2
    weights = [0.5**i for i in range(len(names))]
    total = output["logits"].new_zeros(())
    for name, weight in zip(names, weights):
        size = output[name].shape[2:]
        mask = F.interpolate(batch["mask"][:, None].float(), size, mode="nearest-exact")[:, 0].long()
        total = total + weight / sum(weights) * Segmentation.loss({"logits": output[name]}, {"mask": mask})["loss"]
    return {"loss": total}


def loss(config: Config) -> Loss:
    """Deep supervision, or the task's loss of the one answer."""
    return supervised if config.deep_supervision else Segmentation.loss


VARIANTS = {
    "synapse": Config(),
    "tumour": Config(
        dim=96, heads=(3, 6, 12, 24), decoder_heads=(6, 12, 24), patch=(4, 4, 4), deep_supervision=False
    ),  # the official file gives each stage of the decoder the heads of the next deeper one
    "acdc": Config(
        dim=96,
        heads=(3, 6, 12, 24),
        decoder_heads=(3, 6, 12),
        patch=(1, 4, 4),
        windows=((3, 5, 5), (3, 5, 5), (7, 10, 10), (3, 5, 5)),
        strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
        deep_supervision=False,
    ),
    "small": Config(
        dim=24, depths=(2, 2, 2), heads=(2, 4, 8), decoder_heads=(2, 4), windows=((4, 4, 4), (4, 4, 4), (4, 2, 2)),
        strides=((2, 2, 2), (2, 2, 2)), drop_path=0.0,
    ),
    "test": Config(
        dim=8, depths=(2, 2), heads=(1, 2), decoder_heads=(1,), patch=(2, 2, 2), windows=((2, 2, 2), (2, 2, 2)), local=1,
        strides=((2, 2, 2),), multiple=8,
    ),
}  # fmt: skip
CROPS = {"synapse": 64 * 128 * 128, "tumour": 128**3, "acdc": 14 * 160 * 160}
"""Voxels of the official training crops."""


def recipe(config: Config) -> Recipe:
    """The training of nnU-Net, which is the official one; minutes on a laptop for the small network."""
    named = {
        variant: crop for variant, crop in CROPS.items() if VARIANTS[variant].dim == config.dim and VARIANTS[variant].patch == config.patch
    }
    if not named:
        # Crops of 32 x 32 x 32 voxels, for which the small network's windows are made. Left and right are not the same in a body.
        return Recipe(lr=2e-3, weight_decay=1e-2, batch_size=4, patch=181, average=0.99, augment=Augment(flip=False))
    # 1000 epochs of 250 batches officially; Nesterov's momentum is left out. Rotation here is in the plane of the slices.
    augment = Augment(rotate=30, scale=(0.7, 1.4), brightness=0.25, contrast=0.25, gamma=0.4, noise=0.1)
    (crop,) = named.values()
    return Recipe(
        optimizer="sgd", lr=1e-2, momentum=0.99, weight_decay=3e-5, schedule="poly", warmup=0.0,
        batch_size=4 if config.patch[0] == 1 else 2, patch=round(crop**0.5), clip=12.0, augment=augment,
    )  # fmt: skip


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: NNFormer(spec.channels, len(spec.classes), config),
    recipe=recipe,
    auto=("small",),
    loss=loss,
)
