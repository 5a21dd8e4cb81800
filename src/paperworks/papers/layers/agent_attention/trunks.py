"""DeiT, PVT and Swin without their attention: the trunks into which papers on attention put their own.

Touvron et al., "Training data-efficient image transformers", ICML 2021 (arXiv 2012.12877); Wang et al., "Pyramid Vision Transformer", ICCV 2021
(arXiv 2102.12122); Liu et al., "Swin Transformer", ICCV 2021 (arXiv 2103.14030).

All three cut an image into patches and pass the tokens through blocks of attention and MLP, normalised in front. DeiT has one resolution; PVT
and Swin have four, a convolution or the merging of 2 x 2 tokens between them. A paper hands over a function that makes the attention of a
block; whatever it makes maps tokens B N D to tokens B N D.

Shapes: B batch, C image channels, K classes, N tokens, h w cells of a stage (N = h w, and one more with a class token), D channels of a stage,
A heads, F channels of the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import ramp
from paperworks.papers.backbones.vit.vit import MSA
from paperworks.tasks.base import Grid, Output


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """What tells the trunks apart; one number a stage where there are several."""

    trunk: Literal["deit", "pvt", "swin"] = "deit"
    depths: tuple[int, ...] = (12,)
    widths: tuple[int, ...] = (192,)
    heads: tuple[int, ...] = (3,)
    ratios: tuple[int, ...] = (4,)
    """Width of the MLPs over that of the tokens."""
    patch: int | None = 16
    """Side of a patch; None takes an eighth of the image's side for a DeiT, a sixteenth for the others."""
    window: int = 7
    """Side of the windows of Swin's own attention."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; it grows linearly from 0."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a block's attention is to stand."""

    stage: int
    block: int
    width: int
    heads: int
    side: int
    """h = w."""
    class_token: bool


Mixer = Callable[[Place], nn.Module]
"""Makes the attention of a block."""


def as_map(z: Float[Tensor, "B N D"]) -> Float[Tensor, "B D h w"]:
    """The tokens of a square as a map, a view with the channels last; a class token in front is left out."""
    side = isqrt(z.shape[1])
    return z[:, z.shape[1] - side**2 :].mT.unflatten(2, (side, side))


def as_tokens(x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N D"]:
    """A map's cells in a row."""
    return x.flatten(2).mT


class WindowAttention(nn.Module):
    """Swin's attention within windows, which lie half a window further in every second block; what meets there over the edge is masked."""

    index: Tensor
    mask: Tensor

    def __init__(self, place: Place, window: int) -> None:
        super().__init__()
        self.heads, self.side, self.window = place.heads, place.side, min(window, place.side)
        if self.side % self.window:
            raise InputError(f"windows of {window} do not divide a map of {self.side} cells; another window or image_size does")
        self.shift = self.window // 2 if place.block % 2 and self.window < self.side else 0
        self.qkv, self.out = nn.Linear(place.width, 3 * place.width), nn.Linear(place.width, place.width)
        self.positions = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, place.heads))  # one bias for each distance in y and x
        nn.init.trunc_normal_(self.positions, std=0.02)
        cell = torch.cartesian_prod(*[torch.arange(self.window)] * 2)
        distance = cell[:, None] - cell + self.window - 1  # n n 2
        self.register_buffer("index", distance[..., 0] * (2 * self.window - 1) + distance[..., 1], persistent=False)
        # Cells belong together that came from the same of the 3 x 3 parts which the shift makes of the map.
        start = torch.arange(self.side)
        part = (start >= self.side - self.window).long() + (start >= self.side - self.shift)
        parts = self.cut((3 * part[:, None] + part)[None, :, :, None])  # windows n 1
        apart = torch.where(parts == parts.mT, 0.0, -100.0)[:, None]
        self.register_buffer("mask", apart if self.shift else apart[:1] * 0, persistent=False)  # windows (or 1) 1 n n

    def cut(self, x: Tensor) -> Tensor:
        """Windows of a map B H W D: (B windows) n D."""
        return rearrange(x, "b (y p) (x q) d -> (b y x) (p q) d", p=self.window, q=self.window)

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Cut, attend, put together."""
        p, many = self.window, self.side // self.window
        qkv = self.qkv(z).unflatten(1, (self.side, self.side))
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), (1, 2))
        bias = self.mask + self.positions[self.index].movedim(2, 0)  # windows (or 1) A n n
        # Heads of all windows stand side by side, so that one bias of each serves the whole batch.
        cut = "b (y p) (x q) (t a d) -> t b (y x a) (p q) d"
        q, k, v = rearrange(qkv, cut, p=p, q=p, t=3, a=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(many**2, -1, -1, -1).flatten(0, 1)[None])
        out = rearrange(out, "b (y x a) (p q) d -> b (y p) (x q) (a d)", y=many, x=many, p=p)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return self.out(out.flatten(1, 2))


class Block(nn.Module):
    """A layer of all three: LayerNorm in front, residual connection and stochastic depth after."""

    def __init__(self, width: int, mixer: nn.Module, ratio: int, drop_path: float, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = mixer
        self.hidden, self.output = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Attention, then two layers with a GELU."""
        z = z + self.drop_path(self.attention(self.norm1(z)))
        return z + self.drop_path(self.output(F.gelu(self.hidden(self.norm2(z)))))


class Cut(nn.Module):
    """A map becomes the tokens of its patches: normalised but in DeiT, with a class token in DeiT alone, with learned positions but in Swin."""

    def __init__(self, channels: int, width: int, patch: int, side: int, *, norm: bool, class_token: bool, positions: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        self.positions = nn.Parameter(torch.empty(1, side**2 + class_token, width)) if positions else None
        for value in (self.class_token, self.positions):
            if value is not None:
                nn.init.trunc_normal_(value, std=0.02)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Convolution, norm, class token, positions: what there is of them."""
        z = self.norm(as_tokens(self.patches(x)))
        if self.class_token is not None:
            z = torch.cat([self.class_token.expand(len(z), -1, -1), z], 1)
        return z if self.positions is None else z + self.positions


class Merge(nn.Module):
    """Swin's way to the next stage: four neighbours one after the other, column by column, normalised, mapped to twice the channels."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * before), nn.Linear(4 * before, width, bias=False)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N E"]:
        """A quarter of the tokens."""
        return self.reduce(self.norm(rearrange(x, "b d (h p) (w q) -> b (h w) (q p d)", p=2, q=2)))


class Transformer(nn.Module):
    """A trunk with the attention that ``mixer`` makes, and a classifier.

    Attributes:
        widths: channels of the stages' outputs.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, trunk: Trunk, mixer: Mixer, *, class_token: bool) -> None:
        super().__init__()
        kind, stages = trunk.trunk, len(trunk.depths)
        patch = trunk.patch or image_size // (8 if kind == "deit" else 16)
        check(trunk, image_size, patch)
        self.grid, self.widths, self.embedding = Grid(fixed=image_size), trunk.widths, trunk.widths[-1]
        self.strides = tuple(patch * 2**i for i in range(stages))
        eps = 1e-5 if kind == "swin" else 1e-6  # as each is published; PVT's patches keep PyTorch's
        rates, before = iter(ramp(trunk.drop_path, sum(trunk.depths))), channels
        self.cuts, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (depth, width, heads, ratio) in enumerate(zip(trunk.depths, trunk.widths, trunk.heads, trunk.ratios)):
            side = image_size // self.strides[i]
            if kind == "swin" and i:
                self.cuts.append(Merge(before, width))
            else:
                new = {"norm": kind != "deit", "class_token": class_token, "positions": kind != "swin"}
                self.cuts.append(Cut(before, width, patch if i == 0 else 2, side, **new))
            places = [Place(stage=i, block=j, width=width, heads=heads, side=side, class_token=class_token) for j in range(depth)]
            self.stages.append(nn.Sequential(*(Block(width, mixer(place), ratio, next(rates), eps) for place in places)))
            before = width
        self.norm = nn.Identity() if kind == "pvt" else nn.LayerNorm(self.embedding, eps)
        self.head = nn.Linear(self.embedding, classes)
        self.class_token = class_token
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The tokens that each stage ends with, B N D; the last are normalised."""
        outputs, x = [], image
        for cut, stage in zip(self.cuts, self.stages):
            outputs.append(stage(cut(x)))
            x = as_map(outputs[-1])
        return [*outputs[:-1], self.norm(outputs[-1])]

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each stage ends with as a map, of ``widths`` channels at ``strides``."""
        return [as_map(z) for z in self.encode(image)]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The class token where there is one, else the mean of all tokens."""
        z = self.encode(image)[-1]
        return z[:, 0] if self.class_token else z.mean(1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def check(trunk: Trunk, image_size: int, patch: int) -> None:
    """Settings that go together.

    Raises:
        InputError: they do not.
    """
    stages = {name: len(getattr(trunk, name)) for name in ("depths", "widths", "heads", "ratios")}
    if len(set(stages.values())) > 1:
        raise InputError(f"as many numbers as there are stages, please; there are {', '.join(f'{n} of {k}' for k, n in stages.items())}")
    for width, heads in zip(trunk.widths, trunk.heads):
        if width % heads:
            raise InputError(f"a width of {width} is not divisible into {heads} heads")
    if image_size % (patch * 2 ** (len(trunk.depths) - 1)):
        raise InputError(
            f"images of {image_size} pixels do not divide into patches of {patch}, halved {len(trunk.depths) - 1} times; another image_size does"
        )


def softmax(trunk: Trunk) -> Mixer:
    """The trunk's own attention: in windows for Swin, over all tokens for DeiT, and for PVT as in its last stage, where keys are not reduced."""
    return lambda place: WindowAttention(place, trunk.window) if trunk.trunk == "swin" else MSA(place.width, place.heads)


def attends(module: nn.Module) -> bool:
    """Whether a module is self-attention over tokens as far as its structure says: ``heads``, and a linear ``qkv``."""
    qkv = getattr(module, "qkv", None)
    return isinstance(getattr(module, "heads", None), int) and isinstance(qkv, nn.Linear) and qkv.out_features == 3 * qkv.in_features


def tokens_of(network: nn.Module) -> dict[nn.Module, int]:
    """How many tokens each self-attention in a network is given, where they are those of a square map, with a class token or without."""
    seen: dict[nn.Module, int] = {}

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        n = given[0].shape[1] if given[0].ndim == 3 else 0
        if n and n - isqrt(n) ** 2 <= 1:
            seen[module] = n

    reader = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if reader is None or not isinstance(getattr(network, "grid", None), Grid):
        return seen
    hooks = [module.register_forward_pre_hook(look) for module in network.modules() if attends(module)]
    training, side, weight = network.training, network.grid.fit(1), reader.weight  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    with torch.no_grad():
        network.eval()(torch.zeros(1, reader.in_channels, side, side, dtype=weight.dtype, device=weight.device))
    for hook in hooks:
        hook.remove()
    network.train(training)
    return seen
