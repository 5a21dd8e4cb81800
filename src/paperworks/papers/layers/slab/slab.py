"""SLAB: batch norm takes over from layer norm while a Transformer trains, and attention becomes linear with a ReLU.

Guo, Chen, Tang and Wang, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch Normalization",
ICML 2024 (arXiv 2405.11582).

A layer norm computes statistics for every token that it sees; a batch norm has them ready and vanishes into the next linear layer, but Transformers
train badly with it. PRepBN starts as LayerNorm and ends as RepBN, a batch norm with a shortcut. Simplified linear attention takes the ReLU of
queries and keys as their features, and a depthwise convolution of the values for what that misses.

As in the official code (xinghaochen/SLAB): one eta a norm; evaluation takes RepBN alone at any time; statistics over batch and tokens; attention in
single precision; SLAB-DeiT without a class token, and mean pooling. Different from it: the share of the training that is done decides on
lambda, not a counter of forward passes; the class token that its SLAB-DeiTs keep without use is gone; one linear layer makes queries, keys
and values in the PVTs too; SLAB-CSwin, detection and LLaMA are not here; Mixup and CutMix, which mix the images of a batch, are left out.

Shapes: B batch, C image channels, K classes, N tokens, h w cells of a map, D width, A heads, d = D / A.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isqrt

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.nn.swap import swapped
from paperworks.papers.backbones.convnext.convnext import Varied, smoothed
from paperworks.papers.layers.agent_attention.trunks import (
    Block,
    Cut,
    Merge,
    Mixer,
    Place,
    Transformer,
    Trunk,
    as_map,
    as_tokens,
    attends,
    softmax,
    tokens_of,
)
from paperworks.tasks.base import Layer, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Norm:
    """PRepBN as a layer of other networks, and what the paper compares it with."""

    ramp: float = 0.16
    """Share of the training in which lambda falls from 1 to 0; 0 is RepBN from the start."""
    shortcut: bool = True
    """RepBN's eta x; without it what remains is a batch norm."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Simplified linear attention as a layer of other networks."""

    kernel: int = 5
    """Side of the depthwise convolution of the values."""


@dataclass(frozen=True, kw_only=True)
class Config(Trunk):
    """A trunk, how much of it has linear attention, and when its norms change."""

    linear_blocks: tuple[int, ...] = (12,)
    """How many blocks of each stage, from its first, have simplified linear attention; the others keep the trunk's own."""
    kernel: int = 5
    """Side of the depthwise convolution of the values."""
    ramp: float = 0.16
    """Share of the training in which lambda falls from 1 to 0: officially 60,000 of 375,000 steps, and 300,000 in the PVTs."""


class RepBN(nn.Module):
    """BN(x) + eta x with one learned eta; statistics over everything but the channels, which come last."""

    def __init__(self, width: int, *, shortcut: bool = True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width)
        self.eta = nn.Parameter(torch.ones(1)) if shortcut else None

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalise by the batch's statistics, in evaluation by the running ones."""
        y = self.bn(x.reshape(-1, x.shape[-1])).view(x.shape)
        return y if self.eta is None else y + self.eta * x

    def affine(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """What it is in evaluation: a x + b with a = gamma / sigma + eta, b = beta - mu gamma / sigma."""
        mean, var = self.bn.running_mean, self.bn.running_var
        assert mean is not None and var is not None
        scale = self.bn.weight / (var + self.bn.eps).sqrt()
        return scale if self.eta is None else scale + self.eta, self.bn.bias - mean * scale


class Affine(nn.Module):
    """a x + b for each channel: what is left of a RepBN where no linear layer takes it in."""

    def __init__(self, scale: Float[Tensor, " D"], shift: Float[Tensor, " D"]) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """One multiplication and one addition."""
        return self.scale * x + self.shift


class PRepBN(nn.Module):
    """lambda LN(x) + (1 - lambda) RepBN(x) in training, with lambda falling from 1 to 0; RepBN(x) in evaluation."""

    def __init__(self, norm: nn.LayerNorm, settings: Norm) -> None:
        super().__init__()
        if not 0 <= settings.ramp <= 1:
            raise InputError(f"ramp={settings.ramp} is no share of the training from 0 to 1")
        self.layer_norm, self.ramp = norm, settings.ramp
        self.rep = RepBN(norm.normalized_shape[0], shortcut=settings.shortcut)
        self.weight = 0.5  # lambda; half and half until a training says how far it is

    def advance(self, share: float) -> None:
        """Set lambda for a step before which ``share`` of the training is done."""
        self.weight = max(0.0, 1 - share / self.ramp) if self.ramp else 0.0

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The mixture; RepBN gathers its statistics from the first step."""
        y = self.rep(x)
        return self.weight * self.layer_norm(x) + (1 - self.weight) * y if self.training and self.weight else y

    def merged(self) -> Affine:
        """The same in evaluation, without statistics."""
        with torch.no_grad():
            return Affine(*self.rep.affine())


class SimplifiedLinearAttention(nn.Module):
    """SLA: ReLU(Q) (ReLU(K + P)^T V), normalised, and a depthwise convolution of V whose kernels all heads share."""

    def __init__(self, place: Place, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise InputError(f"kernel={kernel} is even; a convolution that keeps the map's size has an odd one")
        self.heads, depth = place.heads, place.width // place.heads
        self.qkv, self.out = nn.Linear(place.width, 3 * place.width), nn.Linear(place.width, place.width)
        self.positions = nn.Parameter(torch.zeros(1, place.side**2 + place.class_token, place.width))
        self.conv = nn.Conv2d(depth, depth, kernel, padding=kernel // 2, groups=depth)

    def features(self, z: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor, Tensor]:
        """ReLU of queries, ReLU of keys with their positions, values; B A N d each."""
        q, k, v = self.qkv(z).chunk(3, 2)
        parts = (F.relu(q), F.relu(k + self.positions), v)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in parts)
        return q, k, v

    def attention(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B A N N"]:
        """The N x N weights that are never computed where N is larger than d."""
        q, k, _ = self.features(z)
        weights = q @ k.mT
        return weights / (weights.sum(-1, keepdim=True) + 1e-6)

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Whichever order of the three products is cheaper, then the convolution."""
        q, k, v = self.features(z)
        out = normalised(q.float(), k.float(), v.float()).to(v.dtype)
        values = as_map(rearrange(v, "b a n d -> (b a) n d"))
        local = rearrange(as_tokens(self.conv(values)), "(b a) n d -> b a n d", a=self.heads)
        out = out + F.pad(local, (0, 0, out.shape[2] - local.shape[2], 0))  # nothing for a class token
        return self.out(rearrange(out, "b a n d -> b n (a d)"))


def normalised(q: Float[Tensor, "B A N d"], k: Float[Tensor, "B A N d"], v: Float[Tensor, "B A N d"]) -> Float[Tensor, "B A N d"]:
    """The numerator q (k^T v) over q (k^T 1): N d^2 multiply-adds, or N^2 d for fewer tokens than d; never in half precision."""
    with torch.autocast("cuda" if q.is_cuda else "cpu", enabled=False):
        total = q @ k.sum(2, keepdim=True).mT + 1e-6
        out = q @ (k.mT @ v) if q.shape[2] > q.shape[3] else (q @ k.mT) @ v
        return out / total


class Slab(Transformer):
    """A trunk with linear attention and PRepBN, which hands over a network without norms for prediction."""

    def merged(self) -> Transformer:
        """A copy for evaluation in which linear layers and convolutions have taken in all norms but the last, of which an ``Affine`` is left."""
        copy = deepcopy(self).eval()
        with torch.no_grad():
            for module in list(copy.modules()):
                if isinstance(module, Block):
                    qkv = module.attention.qkv
                    assert isinstance(qkv, nn.Linear) and isinstance(module.norm1, PRepBN) and isinstance(module.norm2, PRepBN)
                    module.attention.qkv, module.norm1 = folded(module.norm1.rep, qkv), nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
                    module.hidden, module.norm2 = folded(module.norm2.rep, module.hidden), nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
                elif isinstance(module, Merge) and isinstance(module.norm, PRepBN):
                    module.reduce, module.norm = folded(module.norm.rep, module.reduce), nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
                elif isinstance(module, Cut) and isinstance(module.norm, PRepBN):
                    scale, shift = module.norm.rep.affine()  # here the norm comes after
                    assert module.patches.bias is not None
                    module.patches.weight.mul_(scale[:, None, None, None])
                    module.patches.bias.mul_(scale).add_(shift)
                    module.norm = nn.Identity()
            if isinstance(copy.norm, PRepBN):
                copy.norm = copy.norm.merged()
        return copy


def folded(norm: RepBN, linear: nn.Linear) -> nn.Linear:
    """The linear layer that does what ``linear`` does behind ``norm`` in evaluation: W diag(a), and W b added to the bias."""
    scale, shift = norm.affine()
    out = nn.Linear(linear.in_features, linear.out_features, device=scale.device, dtype=scale.dtype)
    with torch.no_grad():
        out.weight.copy_(linear.weight * scale)
        out.bias.copy_(linear.weight @ shift if linear.bias is None else linear.bias + linear.weight @ shift)
    return out


def put_norm(network: nn.Module, config: Norm) -> nn.Module:
    """PRepBN in place of every LayerNorm over channels that come last; the LayerNorm stays inside.

    Raises:
        InputError: there is none.
    """
    return swapped(network, lambda m: type(m) is nn.LayerNorm and len(m.normalized_shape) == 1, lambda m: PRepBN(m, config))  # type: ignore[arg-type]


def put_attention(network: nn.Module, config: Linear) -> nn.Module:
    """Simplified linear attention in place of every self-attention over the tokens of a square map; projections stay the network's own.

    Raises:
        InputError: there is none.
    """
    tokens = tokens_of(network)

    def make(module: nn.Module) -> nn.Module:
        n, qkv, out = tokens[module], module.qkv, getattr(module, "out", None)
        assert isinstance(qkv, nn.Linear)
        side, heads = isqrt(n), int(module.heads)  # pyright: ignore[reportArgumentType]
        place = Place(stage=0, block=0, width=qkv.in_features, heads=heads, side=side, class_token=n > side**2)
        layer = SimplifiedLinearAttention(place, config.kernel)
        layer.qkv = qkv
        if isinstance(out, nn.Linear):
            layer.out = out
        return layer

    return swapped(network, lambda m: attends(m) and m in tokens and not isinstance(m, SimplifiedLinearAttention), make)


def mixer(config: Config) -> Mixer:
    """Linear attention in the first blocks of each stage, the trunk's own in the others."""
    own = softmax(config)

    def make(place: Place) -> nn.Module:
        linear = place.block < config.linear_blocks[place.stage]
        return SimplifiedLinearAttention(place, config.kernel) if linear else own(place)

    return make


PVT = Config(
    trunk="pvt", depths=(2, 2, 2, 2), widths=(64, 128, 320, 512), heads=(1, 2, 5, 8), ratios=(8, 8, 4, 4), patch=4, drop_path=0.0,
    linear_blocks=(2, 2, 2, 2), ramp=0.8,
)  # fmt: skip
SWIN = Config(
    trunk="swin", depths=(2, 2, 6, 2), widths=(96, 192, 384, 768), heads=(3, 6, 12, 24), ratios=(4,) * 4, patch=4, drop_path=0.2,
    linear_blocks=(2, 2, 0, 0),
)  # fmt: skip
VARIANTS: Mapping[str, Config] = {
    "deit_t": Config(drop_path=0.0),
    "deit_s": Config(widths=(384,), heads=(6,), drop_path=0.0),
    "pvt_t": PVT,
    "pvt_s": replace(PVT, depths=(3, 4, 6, 3), linear_blocks=(3, 4, 6, 3), drop_path=0.1),
    "pvt_m": replace(PVT, depths=(3, 4, 18, 3), linear_blocks=(3, 4, 18, 3), drop_path=0.3),
    "swin_t": SWIN,
    "swin_s": replace(SWIN, depths=(2, 2, 18, 2), drop_path=0.3),
    "swin_b": replace(SWIN, depths=(2, 2, 18, 2), widths=(128, 256, 512, 1024), heads=(4, 8, 16, 32), drop_path=0.5),
    "small": Config(
        trunk="pvt", depths=(1, 2, 2), widths=(48, 96, 192), heads=(2, 4, 8), ratios=(4,) * 3, patch=None, drop_path=0.0,
        linear_blocks=(1, 2, 2), ramp=0.8, image_size=None,
    ),
    "test": Config(
        trunk="pvt", depths=(1, 1), widths=(16, 32), heads=(2, 4), ratios=(2, 2), patch=None, drop_path=0.0, linear_blocks=(1, 1),
        image_size=None,
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """The trunks' recipe with its learning rate of 5e-4 at a batch of 512 brought down in proportion; a laptop's own for small images."""
    if config.image_size is None:
        return Recipe(
            lr=2e-3, weight_decay=0.05, warmup=0.1, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0)
        )
    pvt = config.trunk == "pvt"
    clip = (1.0 if sum(config.depths) > 16 else None) if pvt else 5.0
    return Recipe(
        lr=5e-4 * 128 / 512, weight_decay=0.05, warmup=(5 if pvt else 20) / 300, batch_size=128, patch=config.image_size, clip=clip, augment=Varied(),
    )  # fmt: skip


def build(spec: Spec, config: Config) -> nn.Module:
    """The network for a data set."""
    if len(config.linear_blocks) != len(config.depths):
        raise InputError(f"linear_blocks wants a number for each of the {len(config.depths)} stages")
    side = int(config.image_size or image_side(spec))
    network = Slab(spec.channels, len(spec.classes), side, config, mixer(config), class_token=False)
    return put_norm(network, Norm(ramp=config.ramp))


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "pvt_t"), loss=lambda config: smoothed)
LAYERS: Mapping[str, Layer] = {
    "slab": Layer(slot="norm", config=Norm(), put=put_norm),
    "simplified_linear": Layer(slot="attention", config=Linear(), put=put_attention),
}
