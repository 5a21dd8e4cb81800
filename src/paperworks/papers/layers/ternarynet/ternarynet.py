"""TernaryNet: weights and activations are -1, 0 or 1, and convolutions are ANDs, XORs and counts of bits.

Heinrich, Blendowski and Oktay, "TernaryNet: Faster Deep Model Inference without GPUs for Medical 3D Segmentation using Sparse and Binary
Convolutions", International Journal of Computer Assisted Radiology and Surgery 2018 (arXiv 1801.09449).

In training activations are a smooth function with three plateaus whose slope grows (``advance``); in evaluation they are the steps that it goes to.
Weights are ternary in every forward pass, with a scale for each filter, and their gradient goes to real ones that are kept beside. ``packed``
then makes a network that computes the same from two bit planes of each tensor.

From the released script (mattiaspaul/TernaryNet): the U-Net over a stack of slices, which convolutions are ternary, the class weights, Xavier
weights, and bilinear up-sampling as PyTorch 0.3 had it (``align_corners``). Different from it: the script sets the slope where its network does not
read it, so that it is never annealed and never a step; here both happen, as the paper says. Average pooling and up-sampling make quarters
out of ternary values. With ``resampling="ternary"`` what they give is made ternary again, which bits need; ``"mean"`` is the script's.

Shapes: B batch, C channels, K classes, O filters, H W pixels, n words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.augment import Augment
from paperworks.errors import InputError
from paperworks.nn.swap import swapped
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, grid_of
from paperworks.tasks.base import Layer as Offer
from paperworks.tasks.segmentation import IGNORE, Segmentation

Planes = tuple[np.ndarray, np.ndarray]
"""Of a ternary tensor: which values are not zero, and which of them are negative; each an array of words with channels packed along the last axis."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The released network by default."""

    base: int = 32
    """Filters of the first convolution."""
    levels: int = 3
    """Poolings."""
    weights: Literal["ternary", "float"] = "ternary"
    """Of all convolutions but the first, which sees the image, and the classifier."""
    activation: Literal["ternary", "binary", "relu"] = "ternary"
    slope: tuple[float, float] = (3.0, 8.0)
    """beta at the beginning and at the end of training."""
    resampling: Literal["mean", "ternary"] = "mean"
    """Averages of pooling and up-sampling stay as they are, or are made ternary (binary) again."""
    organ_weight: float | None = 5.0
    """What a pixel of an organ weighs in the cross-entropy, in pixels of background; None trains with the task's own loss."""


@dataclass(frozen=True, kw_only=True)
class TernaryLayer:
    """A ternary convolution in the place of one of another paper's network."""

    activations: bool = True
    """What it sees is normalised and made ternary as well."""
    slope: tuple[float, float] = (3.0, 8.0)


def ternary_tanh(x: Float[Tensor, "..."], beta: float | Tensor) -> Float[Tensor, "..."]:
    """Odd, with plateaus at -1, 0 and 1 and its steepest places at -1/2 and 1/2; the larger beta, the more of a step it is."""
    return (torch.tanh(2 * beta * x - beta) + torch.tanh(2 * beta * x + beta)) / 2


def ternary(x: Float[Tensor, "..."], threshold: float = 0.5) -> Float[Tensor, "..."]:
    """What the ternary tanh goes to: the sign where the size is above the threshold, else 0."""
    return x.sign() * (x.abs() > threshold)


class Activation(nn.Module):
    """Ternary (or binary) activations: smooth in training, steps in evaluation."""

    beta: Tensor

    def __init__(self, kind: Literal["ternary", "binary"], slope: tuple[float, float]) -> None:
        super().__init__()
        self.kind, self.slope = kind, slope
        self.register_buffer("beta", torch.tensor(slope[0]))

    def advance(self, share: float) -> None:
        """The slope grows linearly over the training."""
        first, last = self.slope
        self.beta.fill_(first + (last - first) * share)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Of any shape."""
        if self.kind == "binary":
            return torch.tanh(self.beta * x) if self.training else torch.where(x < 0, -1.0, 1.0)
        return ternary_tanh(x, self.beta) if self.training else ternary(x)


def ternarised(weight: Float[Tensor, "O C h w"]) -> tuple[Float[Tensor, "O C h w"], Float[Tensor, "O 1 1 1"]]:
    """Ternary weight networks (Li and Liu 2016): signs of what is above 0.7 of a filter's mean size, and the mean size of those as its scale."""
    size = weight.abs()
    signs = weight.sign() * (size > 0.7 * size.mean((1, 2, 3), keepdim=True))
    scale = (size * signs.abs()).sum((1, 2, 3), keepdim=True) / signs.abs().sum((1, 2, 3), keepdim=True).clamp_min(1)
    return signs, scale


class TernaryConv2d(nn.Conv2d):
    """Convolves with ternary weights; the real ones are what learns."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O h w"]:
        """The gradient of the ternary weights is taken for that of the real ones."""
        signs, scale = ternarised(self.weight.detach())
        weight = scale * signs + (self.weight - self.weight.detach())  # exactly 0 is added
        return self._conv_forward(input, weight, self.bias)


class Block(nn.Sequential):
    """Convolution, BatchNorm, activation."""

    def __init__(self, inputs: int, outputs: int, config: Config, *, kernel: int = 3, first: bool = False, last: bool = False) -> None:
        conv = TernaryConv2d if config.weights == "ternary" and not first else nn.Conv2d
        super().__init__(conv(inputs, outputs, kernel, bias=False), nn.BatchNorm2d(outputs), nn.ReLU() if last else activation(config))


def activation(config: Config) -> nn.Module:
    """As configured."""
    return nn.ReLU() if config.activation == "relu" else Activation(config.activation, config.slope)


class TernaryUNet(nn.Module):
    """The U-Net of the paper: valid convolutions on an image with so much of a border that what is left is the image."""

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        self.levels = config.levels
        self.grid = Grid(2)  # any even side; a border makes up for the rest
        width = [config.base * 2**i for i in range(config.levels + 1)]
        again = config.resampling == "ternary" and config.activation != "relu"
        self.again = activation(config) if again else nn.Identity()

        self.contracting = nn.ModuleList()
        for i, (now, after) in enumerate(pairwise(width)):
            first = i == 0
            self.contracting.append(nn.Sequential(Block(channels if first else now, now, config, first=first), Block(now, after, config)))
        deepest = width[-1]
        self.bottom = nn.Sequential(*(Block(deepest, deepest, config, kernel=1) for _ in range(2)))
        self.expanding = nn.ModuleList()
        for i in reversed(range(config.levels)):
            now, after = width[i + 1], width[max(i, 1)]
            self.expanding.append(nn.Sequential(Block(2 * now, now, config), Block(now, after, config, last=i == 0)))
        self.head = nn.Conv2d(width[1], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, 2**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def border(self, side: int) -> tuple[int, int]:
        """Pixels that are put around a side, and those of them that are left at the end.

        Two convolutions take 4 pixels at each level on the way down, and 4 on the way up: 8 (2^L - 1) in all. What is left must halve L times.
        """
        more = (4 - side) // 2 % 2 ** (self.levels - 1)
        return 4 * (2**self.levels - 1) + more, more

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K H W."""
        (above, bottom), (left, right) = self.border(image.shape[2]), self.border(image.shape[3])
        x, skips = F.pad(image, (left, left, above, above)), []
        for i, block in enumerate(self.contracting):
            x = block(self.again(F.avg_pool2d(x, 2)) if i else x)
            skips.append(x)
        x = self.bottom(self.again(F.avg_pool2d(x, 2)))
        for block in self.expanding:
            x = self.again(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
            skip = skips.pop()
            cut = (skip.shape[2] - x.shape[2]) // 2
            x = block(torch.cat([x, F.pad(skip, [-cut] * 4)], 1))
        return {"logits": F.pad(self.head(x), (-right, -right, -bottom, -bottom))}


# --- Bits


def packed_bits(bits: Int[np.ndarray, "... C"]) -> UInt[np.ndarray, "... n"]:
    """Truth values along the last axis as words: of 64 bits, or of 8, 16 or 32 where that is enough for all."""
    octets = np.packbits(bits.astype(bool), axis=-1)
    word = min(8, 1 << (octets.shape[-1] - 1).bit_length())
    missing = -octets.shape[-1] % word
    return np.ascontiguousarray(np.pad(octets, [(0, 0)] * (octets.ndim - 1) + [(0, missing)])).view(f"u{word}")


def planes(x: Float[Tensor, "... C"]) -> Planes:
    """A ternary tensor as bits: 2 for each value instead of 32.

    Raises:
        InputError: it is not ternary.
    """
    values = x.detach().cpu().numpy()
    if not np.isin(values, (-1, 0, 1)).all():
        raise InputError("a convolution of bits sees values other than -1, 0 and 1; train with resampling=ternary and ternary activations")
    return packed_bits(values != 0), packed_bits(values < 0)


def dot(a: Planes, b: Planes) -> Int[np.ndarray, "..."]:
    """Sum of products of ternary vectors: places where both say something, less twice those where they say opposite things."""
    both = a[0] & b[0]
    agree, oppose = np.bitwise_count(both), np.bitwise_count(both & (a[1] ^ b[1]))
    return agree.sum(-1, dtype=np.int32) - 2 * oppose.sum(-1, dtype=np.int32)


class PackedConv2d(nn.Module):
    """A ternary convolution of ternary maps by bits; all that it keeps is two planes of its filters, their scales and the bias."""

    def __init__(self, conv: TernaryConv2d) -> None:
        super().__init__()
        signs, scale = ternarised(conv.weight.detach())
        self.filters = planes(signs.permute(2, 3, 0, 1))  # h w O n
        self.scale, self.bias = scale[:, 0], conv.bias
        self.kernel, self.stride, self.padding, self.dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation

    @property
    def bytes(self) -> int:
        """What the filters and their scales take."""
        return sum(plane.nbytes for plane in self.filters) + 4 * self.scale.numel()

    def counted(self, x: Float[Tensor, "B C H W"]) -> Int[Tensor, "B O h w"]:
        """The convolution with the signs: integers. A border of zeros is ternary too."""
        (above, left), (down, right), (wide, broad) = self.padding, self.stride, self.dilation
        maps = planes(F.pad(x, (left, left, above, above)).permute(0, 2, 3, 1))  # B H W n  # pyright: ignore[reportArgumentType]
        height = (maps[0].shape[1] - wide * (self.kernel[0] - 1) - 1) // down + 1
        width = (maps[0].shape[2] - broad * (self.kernel[1] - 1) - 1) // right + 1
        total = np.zeros((len(x), height, width, len(self.scale)), np.int32)
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                rows, columns = slice(wide * i, wide * i + down * height, down), slice(broad * j, broad * j + right * width, right)
                seen = tuple(plane[:, rows, columns, None] for plane in maps)
                total += dot((seen[0], seen[1]), (self.filters[0][i, j], self.filters[1][i, j]))
        return torch.from_numpy(total).permute(0, 3, 1, 2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O h w"]:
        """As the ternary convolution, but for rounding."""
        y = self.counted(x) * self.scale[None]
        return y if self.bias is None else y + self.bias[:, None, None]


def packed(network: nn.Module) -> nn.Module:
    """``network``, changed in place: its ternary convolutions compute by bits. For evaluation on a CPU."""
    return swapped(network.eval(), lambda module: isinstance(module, TernaryConv2d), lambda module: PackedConv2d(module))  # pyright: ignore[reportArgumentType]


# --- In other networks


class TernaryInput(nn.Sequential):
    """Normalised, ternary, convolved."""

    def __init__(self, conv: nn.Conv2d, config: TernaryLayer) -> None:
        before = [nn.BatchNorm2d(conv.in_channels, affine=False), Activation("ternary", config.slope)] if config.activations else []
        super().__init__(*before, converted(conv))


def converted(conv: nn.Conv2d) -> TernaryConv2d:
    """The same convolution with ternary weights."""
    bias = conv.bias is not None
    made = TernaryConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=bias,  # pyright: ignore[reportArgumentType]
        device=conv.weight.device,
    )  # fmt: skip
    made.load_state_dict(conv.state_dict())
    return made


def called(network: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that an image goes through, in this order. Others only lend their weights, to deformable sampling for instance."""
    found: list[nn.Conv2d] = []
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not convs:
        return found
    handles = [conv.register_forward_pre_hook(lambda conv, _: found.append(conv)) for conv in convs]  # pyright: ignore[reportArgumentType]
    training, side, weight = network.training, grid_of(network).fit(64), convs[0].weight
    with torch.no_grad():
        network.eval()(torch.zeros(1, convs[0].in_channels, side, side, device=weight.device, dtype=weight.dtype))
    network.train(training)
    for handle in handles:
        handle.remove()
    return found


def put(network: nn.Module, config: TernaryLayer) -> nn.Module:
    """Every ordinary convolution of more than one pixel becomes ternary, but for the network's first, which sees the image."""
    seen = called(network)
    inner = set(seen) - set(seen[:1])

    def fits(module: nn.Module) -> bool:
        if type(module) is not nn.Conv2d or module not in inner:
            return False
        return module.groups == 1 and max(module.kernel_size) > 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    return swapped(network, fits, lambda module: TernaryInput(module, config))  # pyright: ignore[reportArgumentType]


def loss(config: Config) -> Loss:
    """Weighted cross-entropy, or the task's loss (cross-entropy and soft Dice)."""
    if config.organ_weight is None:
        return Segmentation.loss

    def weighted(output: Output, batch: Batch) -> dict[str, Tensor]:
        logits = output["logits"]
        weight = torch.ones(logits.shape[1], dtype=logits.dtype, device=logits.device)
        weight[1:] = config.organ_weight  # pyright: ignore[reportArgumentType]
        return {"loss": F.cross_entropy(logits, batch["mask"], weight, ignore_index=IGNORE)}

    return weighted


VARIANTS: Mapping[str, Config] = {
    "paper": Config(),
    "float": Config(weights="float", activation="relu"),
    "small": Config(base=8, slope=(0.5, 6.0), resampling="ternary", organ_weight=None),
    "test": Config(base=4, levels=2, resampling="ternary", organ_weight=None),
}


def recipe(config: Config) -> Recipe:
    """The script's Adam; its rate goes down by 0.9 an epoch for 40 epochs, here by a cosine. Augmentation is ours, and the short training of small nets."""
    if config.base >= 32:
        return Recipe(optimizer="adam", lr=2.5e-3, batch_size=10, patch=176, augment=Augment())
    return Recipe(optimizer="adam", lr=1e-2, batch_size=4, patch=96, augment=Augment())


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: TernaryUNet(spec.channels, len(spec.classes), config),
    recipe=recipe,
    auto=("small", "paper"),
    loss=loss,
)
LAYERS: Mapping[str, Offer] = {"ternary_conv": Offer("conv", TernaryLayer(), put)}
