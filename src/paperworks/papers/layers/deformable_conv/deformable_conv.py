"""Deformable convolution: the places at which a filter reads its input move by offsets that are learned from the input itself.

Dai, Qi, Xiong, Li, Zhang, Hu and Wei, "Deformable Convolutional Networks", ICCV 2017 (arXiv 1703.06211).

A second convolution over the same features says for every cell how far each of the filter's places moves; the input is read there by
bilinear interpolation, so that the gradient reaches the offsets. Receptive fields follow objects, and nothing supervises the offsets but the
task's own loss. RoI pooling gets offsets in the same way, relative to the size of the box. The relatives that section 2.3 argues with stand
in the same frame: fixed (dilated) places, places shared by all cells, one affine map of the whole input, and weights that vary in place of places.

Different from the official code (msracver/Deformable-ConvNets): what lies outside the map counts as zero (eq. 4, torchvision), where the
kernel clamps to the border within a cell of it; a ResNet's stride is on its 3x3 convolution; the learning rate of the RoI offsets' layer
is not divided by 100. Detectors are not rebuilt: their parts are here, and as a layer the convolution goes into any network of the archive.

Shapes: B batch, C image channels, K classes, D channels of a map, H W its cells, h w those of the result, N places of a filter, G groups of
channels that share offsets, M boxes, Q groups of channels that share a box's offsets, k bins and s samples a side, F channels of res5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors

from paperworks.errors import InputError
from paperworks.nn.resnet import Depth, ResNet
from paperworks.nn.swap import swapped
from paperworks.tasks.base import Grid, Layer, Output, Paper, Recipe, Sample, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How convolutions choose what they read, and which of a network do."""

    by: Literal["deformable", "active", "affine", "dynamic", "regular"] = "deformable"
    """Offsets from the features (the paper's); offsets that all cells share (active convolution, Jeon & Kim 2017); one affine map of the
    whole input (spatial transformer, Jaderberg et al. 2015); weights from the features at fixed places (dynamic filters, De Brabandere et
    al. 2016); nothing of all that."""
    last: int | None = 3
    """How many of the convolutions with kernels of 3 and more, counted from the output; None takes all (table 1 has 0, 1, 2, 3 and 6)."""
    groups: int = 1
    """G: channels have offsets of their own in so many groups; the released networks have 4."""
    dilation: int | None = None
    """Distance of the regular places; None leaves the convolution's (dilated convolution is ``regular`` with 2, 4, 6 or 8, as in table 3)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A ResNet whose res5 keeps the resolution of res4, and how its last convolutions sample."""

    depth: Depth = 101
    sampling: Sampling = Sampling()
    width: int = 64
    """Of the ResNet's first stage."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


# --- Deformable convolution (section 2.1)


def places(conv: nn.Conv2d, offsets: Float[Tensor, "B GN2 h w"]) -> Float[Tensor, "B G N 2 h w"]:
    """p0 + pn + dpn of eq. 2 for each cell: (y, x) in cells of the input, which start at 0.

    Args:
        conv: whose kernel, stride, padding and dilation set the regular grid.
        offsets: dpn; the channels are ordered by group, then place of the kernel row by row, then (dy, dx).
    """
    h, w = offsets.shape[2:]
    axes: list[Tensor] = []
    for axis, length in enumerate((h, w)):
        start = torch.arange(length, device=offsets.device) * conv.stride[axis] - int(conv.padding[axis])
        tap = torch.arange(conv.kernel_size[axis], device=offsets.device) * conv.dilation[axis]
        axes.append(tap[:, None] + start)  # kernel's side, length
    (rows, height), (columns, width) = axes[0].shape, axes[1].shape
    y = axes[0][:, None, :, None].expand(rows, columns, height, width)
    x = axes[1][None, :, None, :].expand(rows, columns, height, width)
    regular = torch.stack([y, x], 2).flatten(0, 1)  # N 2 h w
    return regular + offsets.unflatten(1, (-1, rows * columns, 2))


def sampled(x: Float[Tensor, "B D H W"], at: Float[Tensor, "B G N 2 h w"]) -> Float[Tensor, "B D N h w"]:
    """Eqs. 3 and 4: the input at real places, bilinear between its cells and zero outside."""
    size, (groups, number, _, h, _) = x.shape[2:], at.shape[1:]
    y, x_ = ((2 * at[:, :, :, i] + 1) / size[i] - 1 for i in (0, 1))  # grid_sample: -1 and 1 are the borders
    grid = torch.stack([x_, y], -1).clamp(-2, 2).flatten(0, 1).flatten(1, 2)  # BG Nh w 2; far outside is zero like a cell outside
    maps = x.unflatten(1, (groups, -1)).flatten(0, 1)
    values = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
    return values.unflatten(2, (number, h)).unflatten(0, (-1, groups)).flatten(1, 2)


def convolved(conv: nn.Conv2d, values: Float[Tensor, "B D N h w"]) -> Float[Tensor, "B E h w"]:
    """The sum over places and channels that ``conv`` makes of what was read."""
    h, w = values.shape[3:]
    weight = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    y = (weight @ values.reshape(values.shape[0], conv.groups, -1, h * w)).reshape(values.shape[0], -1, h, w)
    return y if conv.bias is None else y + conv.bias[:, None, None]


class DeformableConv(nn.Module):
    """Eq. 2: y(p0) = sum_n w(pn) x(p0 + pn + dpn), with dpn from a convolution of the same kernel that starts at zero."""

    def __init__(self, conv: nn.Conv2d, groups: int = 1) -> None:
        super().__init__()
        if groups < 1 or conv.in_channels % groups:
            raise InputError(f"groups={groups} do not divide the {conv.in_channels} channels that a deformable convolution reads")
        self.conv = conv
        self.offset = beside(conv, 2 * groups * math.prod(conv.kernel_size))

    def offsets(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B GN2 h w"]:
        """How far each place moves, for each cell of the result."""
        return self.offset(x)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E h w"]:
        """Read where the offsets say, weigh, sum."""
        return convolved(self.conv, sampled(x, places(self.conv, self.offsets(x))))


def beside(conv: nn.Conv2d, outputs: int) -> nn.Conv2d:
    """A convolution with the kernel, stride, padding and dilation of another, all zeros."""
    new = nn.Conv2d(conv.in_channels, outputs, *geometry(conv))
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)  # pyright: ignore[reportArgumentType]
    return new


def geometry(conv: nn.Conv2d) -> tuple[Any, Any, Any, Any]:
    """Kernel, stride, padding, dilation."""
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


# --- Its relatives (section 2.3), in the same frame


class ActiveConv(DeformableConv):
    """Active convolution: the offsets are parameters, the same for all cells and images."""

    def __init__(self, conv: nn.Conv2d, groups: int = 1) -> None:
        super().__init__(conv, groups)
        self.offset = nn.ParameterDict({"shared": torch.zeros(self.offset.out_channels)})  # pyright: ignore[reportArgumentType, reportCallIssue]

    def offsets(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B GN2 h w"]:
        """The shared ones, at every cell."""
        kernel, stride, padding, dilation = geometry(self.conv)
        h, w = ((x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
        return self.offset["shared"][:, None, None].expand(x.shape[0], -1, h, w)


class AffineConv(nn.Module):
    """A spatial transformer in front of a convolution: one affine map, found from the whole input, says where all of it is read."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.localise = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * conv.in_channels, 6))
        last = self.localise[2]
        nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            last.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))  # pyright: ignore[reportCallIssue]

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E h w"]:
        """Warp, then convolve."""
        grid = F.affine_grid(self.localise(x).view(-1, 2, 3), list(x.shape), align_corners=False)
        return self.conv(F.grid_sample(x, grid, padding_mode="zeros", align_corners=False))


class DynamicConv(nn.Module):
    """Dynamic filters: the features change the filter's values at each cell, and its places stay. Here a factor for each place, 1 at the start."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.factor = beside(conv, math.prod(conv.kernel_size))

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E h w"]:
        """sum_n w(pn) (1 + mn(p0)) x(p0 + pn)."""
        factors = 1 + self.factor(x)  # B N h w
        kernel, stride, padding, dilation = geometry(self.conv)
        values = F.unfold(x, kernel, dilation, padding, stride).reshape(x.shape[0], x.shape[1], *factors.shape[1:])
        return convolved(self.conv, values * factors[:, None])


def fitting(network: nn.Module) -> list[nn.Conv2d]:
    """The convolutions with an odd kernel of 3 and more and zeros around the map, in the network's order."""
    found = [m for m in network.modules() if type(m) is nn.Conv2d]  # others may pad in their own way
    odd = [m for m in found if all(side > 1 and side % 2 for side in m.kernel_size)]
    return [m for m in odd if m.padding_mode == "zeros" and not isinstance(m.padding, str)]


def put(network: nn.Module, config: Sampling) -> nn.Module:
    """The network with its last fitting convolutions sampling as the configuration says; what it computes is at first unchanged.

    Raises:
        InputError: there is none, or the groups do not divide the channels.
    """
    if config.last is not None and config.last < 1:
        raise InputError(f"last={config.last}: a number of convolutions from 1 on, or none for all of them")
    found = fitting(network)
    chosen = set(found if config.last is None else found[-config.last :])

    def make(conv: nn.Module) -> nn.Module:
        assert isinstance(conv, nn.Conv2d)
        if config.dilation is not None:
            conv.dilation = (config.dilation, config.dilation)
            conv.padding = tuple(config.dilation * (side // 2) for side in conv.kernel_size)
        match config.by:
            case "deformable":
                return DeformableConv(conv, config.groups)
            case "active":
                return ActiveConv(conv, config.groups)
            case "affine":
                return AffineConv(conv)
            case "dynamic":
                return DynamicConv(conv)
            case "regular":
                return conv

    return swapped(network, chosen.__contains__, make)


# --- Deformable RoI pooling (section 2.2)


def roi_pool(
    features: Float[Tensor, "B D H W"],
    boxes: Float[Tensor, "M 5"],
    offsets: Float[Tensor, "M Q 2 k k"] | None = None,
    *,
    side: int = 7,
    scale: float = 1 / 16,
    samples: int = 4,
    gamma: float = 0.1,
    sensitive: bool = False,
) -> Float[Tensor, "M E k k"]:
    """Eqs. 5 and 6: the mean of the features in each bin of each box, with the bins moved by gamma times offsets times the box's size.

    As in the released kernel a box covers its pixels whole, samples start at the bin's corner, and those more than half a cell outside
    the map do not count.

    Args:
        features: of the image or images.
        boxes: image's index, x1, y1, x2, y2 in pixels.
        offsets: (dx, dy) of each bin in box widths and heights over gamma; channel group q of Q has its own. None moves nothing.
        side: k, bins a side.
        scale: cells per pixel.
        samples: s, samples a side in a bin.
        gamma: scales the offsets.
        sensitive: position-sensitive: features hold E k k channels, and bin (i, j) reads channel (e, i, j).
    """
    if offsets is None:
        offsets = features.new_zeros(len(boxes), 1, 2, side, side)
    height, width = features.shape[2:]
    corner = (boxes[:, 1:3] + 0.5).floor() * scale - 0.5
    size = (((boxes[:, 3:5] + 0.5).floor() + 1) * scale - 0.5 - corner).clamp_min(0.1)  # M 2, (w, h)
    step = torch.arange(side * samples, device=features.device) / (side * samples)  # all samples of a side, as shares of the box
    at: list[Tensor] = []
    for axis, shape in ((0, (1, side, 1, samples)), (1, (side, 1, samples, 1))):  # x varies with j and its sample, y with i and its own
        moved = gamma * offsets[:, :, axis, :, :, None, None]  # M Q k k 1 1
        share = step.view(side, samples).view(shape) + moved
        at.append(corner[:, axis].view(-1, *[1] * 5) + share * size[:, axis].view(-1, *[1] * 5))
    x, y = torch.broadcast_tensors(*at)  # M Q k k s s
    inside = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)

    groups = offsets.shape[1]
    index = [boxes[:, 0].long().view(-1, *[1] * 5), torch.arange(groups, device=x.device).view(-1, *[1] * 4)]
    if sensitive:
        maps = features.unflatten(1, (groups, -1, side, side)).permute(0, 1, 3, 4, 5, 6, 2)  # B Q k k H W E/Q
        bins = torch.arange(side, device=x.device)
        index += [bins.view(-1, 1, 1, 1), bins.view(-1, 1, 1)]
    else:
        maps = features.unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2)  # B Q H W E/Q

    low_x, low_y = x.detach().floor(), y.detach().floor()
    total = features.new_zeros(())
    for far_y in (0, 1):
        for far_x in (0, 1):
            i, j = (low_y + far_y).clamp_max(height - 1).long(), (low_x + far_x).clamp_max(width - 1).long()
            share = (1 - (y - low_y - far_y).abs()) * (1 - (x - low_x - far_x).abs())
            total = total + maps[(*index, i, j)] * (share * inside)[..., None]  # M Q k k s s E/Q
    mean = total.sum((4, 5)) / inside.sum((4, 5)).clamp_min(1)[..., None]
    return mean.movedim(-1, 2).flatten(1, 2)


class DeformableRoIPool(nn.Module):
    """Figure 3: a fully connected layer on the ordinary pooled features says how far each bin moves; it starts at zero."""

    def __init__(self, width: int, side: int = 7, scale: float = 1 / 16) -> None:
        super().__init__()
        self.side, self.scale = side, scale
        self.offset = nn.Linear(width * side * side, 2 * side * side)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, features: Float[Tensor, "B D H W"], boxes: Float[Tensor, "M 5"]) -> Float[Tensor, "M D k k"]:
        """Pool, find the offsets, pool again."""
        pooled = roi_pool(features, boxes, side=self.side, scale=self.scale)
        offsets = self.offset(pooled.flatten(1)).view(-1, 1, 2, self.side, self.side)
        return roi_pool(features, boxes, offsets, side=self.side, scale=self.scale)


class DeformablePSRoIPool(nn.Module):
    """Figure 4: scores and offsets are both maps, k k of them for each class; 1x1 convolutions make them."""

    def __init__(self, width: int, classes: int, side: int = 7, scale: float = 1 / 16) -> None:
        super().__init__()
        self.side, self.scale = side, scale
        self.score = nn.Conv2d(width, side * side * classes, 1)
        self.offset = nn.Conv2d(width, 2 * side * side * classes, 1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Float[Tensor, "B D H W"], boxes: Float[Tensor, "M 5"]) -> Float[Tensor, "M K k k"]:
        """Each class moves its own bins."""
        kept: dict[str, Any] = {"side": self.side, "scale": self.scale, "sensitive": True}
        offsets = roi_pool(self.offset(features), boxes, **kept).unflatten(1, (-1, 2))
        return roi_pool(self.score(features), boxes, offsets, **kept)


# --- The network


class DeformableNet(nn.Module):
    """A ResNet for dense tasks (section 3.1): res5 has stride 1 and its 3x3 convolutions are dilated by 2; the last ones sample as configured.

    Attributes:
        widths: channels of the stages' outputs, res2 to res5.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size)
        self.body = ResNet(config.depth, channels, stem=config.stem, width=config.width)
        for conv in (m for m in self.body.layer4.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)
        put(self.body, config.sampling)
        strides = self.body.strides
        self.widths, self.strides, self.embedding = self.body.widths, (*strides[:3], strides[2]), self.body.embedding
        self.head = nn.Linear(self.embedding, classes)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """res2 to res5, of ``widths`` channels at ``strides``."""
        return self.body.pyramid(image)

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """res5, averaged over its cells."""
        return self.body.embed(image)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


# --- What the paper looks at (figures 5 and 6, table 2)


def observed(network: nn.Module, image: Float[Tensor, "B C H W"]) -> list[tuple[DeformableConv, Tensor]]:
    """Each deformable (or active) convolution in the order in which the image meets them, with its places B G N 2 h w."""
    found: list[tuple[DeformableConv, Tensor]] = []

    def look(conv: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(conv, DeformableConv)
        found.append((conv, places(conv.conv, conv.offsets(given[0]))))

    hooks = [m.register_forward_hook(look) for m in network.modules() if isinstance(m, DeformableConv)]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return found


def sampling_places(network: nn.Module, image: Float[Tensor, "1 C H W"], cell: tuple[int, int], levels: int = 3) -> Float[Tensor, "P 2"]:
    """Figure 6: where a cell of the last deformable convolution reads from, through ``levels`` of them: N to the power of levels places (y, x).

    A place between cells, or outside, moves on as the nearest cell does. In cells of the input of the first convolution that is passed.
    """
    at = torch.tensor([cell], dtype=torch.float32)
    for layer, where in observed(network, image)[::-1][:levels]:
        h, w = where.shape[4:]
        y, x = at[:, 0].round().long().clamp(0, h - 1), at[:, 1].round().long().clamp(0, w - 1)
        beyond = (at - torch.stack([y, x], 1)) * torch.tensor(layer.conv.stride)
        at = (where[0, 0, :, :, y, x].permute(2, 0, 1) + beyond[:, None]).flatten(0, 1)  # N places of each
    return at


def effective_dilation(conv: nn.Conv2d, where: Float[Tensor, "B G N 2 h w"]) -> Float[Tensor, "B h w"]:
    """Table 2: the mean distance between neighbouring places of a filter at each cell; that of a regular filter is its dilation."""
    grid = where.unflatten(2, conv.kernel_size)  # B G rows columns 2 h w
    down, right = grid.diff(dim=2).norm(dim=4), grid.diff(dim=3).norm(dim=4)
    return torch.cat([down.flatten(1, 3), right.flatten(1, 3)], 1).mean(1)


def receptive_field(network: nn.Module, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "H W"]:
    """The effective receptive field (Luo et al. 2016): how much each pixel moves the middle cell of the last map, averaged over the images."""
    pixels = image.detach().clone().requires_grad_()
    last: Tensor = network.pyramid(pixels)[-1]  # pyright: ignore[reportCallIssue]
    (gradient,) = torch.autograd.grad(last[:, :, last.shape[2] // 2, last.shape[3] // 2].sum(), pixels)
    return gradient.abs().mean((0, 1))


def radius(field: Float[Tensor, "H W"]) -> float:
    """How wide a receptive field is: the root mean square distance of its weight from its middle, in pixels."""
    share = field / field.sum()
    y, x = (torch.arange(n, dtype=share.dtype) for n in field.shape)
    rows, columns = share.sum(1), share.sum(0)
    variance = (rows * y.square()).sum() - (rows * y).sum() ** 2 + (columns * x.square()).sum() - (columns * x).sum() ** 2
    return float(variance.clamp_min(0).sqrt())


# --- Training


@dataclass(frozen=True, kw_only=True)
class Warped:
    """Images turned, magnified and sheared by chance around their middle: the variation that the paper is about. The border is continued."""

    flip: bool = True
    """Mirror left and right with probability 1/2."""
    rotate: float = 10.0
    """Largest angle in degrees to either side."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest magnification, uniform."""
    shear: float = 0.0
    """Largest shear to either side, a tangent."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """One variation of ``sample["image"]``, resized to ``patch``."""
        turn, magnify, shear, mirror = torch.rand(4, generator=generator).tolist()
        angle = math.radians(self.rotate) * (2 * turn - 1)
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * magnify
        image = warped(sample["image"].as_subclass(Tensor), patch, angle, scale, self.shear * (2 * shear - 1))
        return sample | {"image": tv_tensors.Image(image.flip(-1) if self.flip and mirror < 0.5 else image)}


def warped(image: Float[Tensor, "C H W"], patch: Sequence[int], angle: float, scale: float, shear: float) -> Float[Tensor, "C h w"]:
    """The image turned by ``angle`` (radians), magnified by ``scale`` and sheared, resized so that its middle fills ``patch``."""
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    matrix = torch.tensor([[cosine, -sine + shear * cosine, 0], [sine, cosine + shear * sine, 0]], dtype=image.dtype)
    grid = F.affine_grid(matrix[None], [1, len(image), *patch], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


REGULAR = Sampling(by="regular")
VARIANTS = {
    "r101": Config(sampling=REGULAR),
    "r101+1": Config(sampling=Sampling(last=1)),
    "r101+2": Config(sampling=Sampling(last=2)),
    "r101+3": Config(),
    "r101+6": Config(sampling=Sampling(last=6)),
    "r101+3_g4": Config(sampling=Sampling(groups=4)),
    "small": Config(depth=18, width=16, stem="cifar", image_size=None),
    "small_regular": Config(depth=18, width=16, stem="cifar", sampling=REGULAR, image_size=None),
    "test": Config(depth=18, width=4, stem="cifar", image_size=32),
}


def recipe(config: Config) -> Recipe:
    """ImageNet as it is usually trained (the paper starts from such weights); a laptop's own for small images."""
    if config.stem == "cifar":
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Warped())
    return Recipe(
        optimizer="sgd",
        lr=0.1,
        weight_decay=1e-4,
        batch_size=256,
        patch=config.image_size,  # pyright: ignore[reportArgumentType]
        augment=Warped(rotate=0, scale=(1, 2)),
    )


def build(spec: Spec, config: Config) -> DeformableNet:
    """The network for a data set."""
    return DeformableNet(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


LAYERS = {
    "deformable_conv": Layer("conv", Sampling(), put),
    "active_conv": Layer("conv", Sampling(by="active"), put),
    "affine_conv": Layer("conv", Sampling(by="affine"), put),
    "dynamic_conv": Layer("conv", Sampling(by="dynamic"), put),
}
PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "r101+3"))
