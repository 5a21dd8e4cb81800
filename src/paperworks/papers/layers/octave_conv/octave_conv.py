"""Octave convolution: a share of the channels varies slowly in space, so it is kept and computed at half the resolution.

Chen, Fan, Xu, Yan, Kalantidis, Rohrbach, Yan and Feng, "Drop an Octave: Reducing Spatial Redundancy in Convolutional Neural Networks with
Octave Convolution", ICCV 2019 (arXiv 1904.05049).

A map is a pair: (1 - alpha) D channels at full resolution and alpha D at half of it. A convolution of pairs has four paths, high and low to
high and low, which share out one ordinary kernel, so that the number of weights stays and the multiplications fall; the low part also sees
twice as far. In ResNets the stem stays as it is, stages 1 to 3 use alpha, and stage 4 returns to one resolution.

As in the official code (facebookresearch/OctConv, MXNet): where the network halves its resolution, all paths pool (average, 2x2) and convolve with
stride 1, in stage 4 too, as strides shift the centre of what is sampled. Different from it: one kernel is kept and cut into the four, the
ResNets are post-activation (the authors' ablation has pre-activation ones), and alpha = 0 is the plain ResNet with its strides.
ResNeXt, SE, MobileNet and DenseNet hosts are not rebuilt; as a layer the convolution goes into any network of the archive.

Shapes: B batch, C image channels, K classes, D channels, h w cells at full resolution, F channels of the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.nn.resnet import Bottleneck, ResNet
from paperworks.nn.swap import swapped
from paperworks.tasks.base import Grid, Layer, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Octave:
    """The one number of the method."""

    alpha: float = 0.25
    """Share of the channels at half the resolution; 0 leaves one part, and of a ResNet's strides makes pooling all the same."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A ResNet and its alpha."""

    depth: Literal[26, 50, 101, 152, 200] = 50
    alpha: float = 0.125
    width: int = 64
    """Of the ResNet's first stage."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


# --- Section 3.1: the representation


@dataclass(frozen=True)
class Octaves:
    """A map in two parts."""

    high: Float[Tensor, "B D1 h w"]
    low: Float[Tensor, "B D2 h/2 w/2"]

    def __add__(self, other: Octaves) -> Octaves:
        """Part by part."""
        return Octaves(self.high + other.high, self.low + other.low)


def down(x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h/2 w/2"]:
    """Average pooling 2x2; a last odd row or column is a cell by itself."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def up(x: Float[Tensor, "B D h/2 w/2"], size: torch.Size) -> Float[Tensor, "B D h w"]:
    """The nearest neighbour, cut to ``size``."""
    return F.interpolate(x, scale_factor=2, mode="nearest")[..., : size[0], : size[1]]


def whole(x: Tensor | Octaves) -> Float[Tensor, "B D h w"]:
    """Both parts at full resolution, the high one first."""
    return torch.cat([x.high, up(x.low, x.high.shape[2:])], 1) if isinstance(x, Octaves) else x


# --- Section 3.2: the convolution


class OctaveConv(nn.Conv2d):
    """Y_H = f(X_H; W_HH) + up(f(X_L; W_LH)), Y_L = f(X_L; W_LL) + f(pool(X_H); W_HL): figure 2.

    Args:
        conv: an ordinary convolution; its kernel, which is kept, is cut into the four.
        alpha_in: share of the channels that it is given at half the resolution.
        alpha_out: share that it gives so.
    """

    def __init__(self, conv: nn.Conv2d, alpha_in: float, alpha_out: float) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        self.weight, self.bias = conv.weight, conv.bias
        self.strided = conv.stride != (1, 1)
        self.depthwise = conv.groups > 1  # channels do not mix, so neither do the parts
        self.high_in, self.high_out = high(conv.in_channels, alpha_in), high(conv.out_channels, alpha_out)
        self.split = (self.high_in < conv.in_channels, self.high_out < conv.out_channels)

    def path(self, x: Tensor, outputs: slice, inputs: slice) -> Tensor:
        """One of the four convolutions, always of stride 1."""
        weight = self.weight[outputs] if self.depthwise else self.weight[outputs, inputs]
        return F.conv2d(x, weight, None, 1, self.padding, self.dilation, x.shape[1] if self.depthwise else 1)

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update both parts, and let them exchange."""
        of_high, of_low = (slice(0, self.high_in), slice(self.high_in, None))
        to_high, to_low = (slice(0, self.high_out), slice(self.high_out, None))
        above, below = (x.high, x.low) if isinstance(x, Octaves) else (x, None)
        above = down(above) if self.strided else above
        y_high = self.path(above, to_high, of_high)
        if below is not None and not self.depthwise:
            came = self.path(below, to_high, of_low)
            y_high = y_high + (came if self.strided else up(came, y_high.shape[2:]))  # a halved map has the low part's size already
        if self.bias is not None:
            y_high = y_high + self.bias[to_high, None, None]
        if not self.split[1]:
            return y_high
        paths = [] if self.depthwise else [self.path(down(above), to_low, of_high)]
        if below is not None:
            paths.append(self.path(down(below) if self.strided else below, to_low, of_low))
        y_low = paths[0] if len(paths) == 1 else paths[0] + paths[1]
        return Octaves(y_high, y_low if self.bias is None else y_low + self.bias[to_low, None, None])


def high(width: int, alpha: float) -> int:
    """Channels at full resolution."""
    return width - int(alpha * width)


class OctaveNorm(nn.Module):
    """Batch normalisation of each part."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.high = nn.BatchNorm2d(high(width, alpha))
        self.low = nn.BatchNorm2d(width - high(width, alpha))

    def forward(self, x: Octaves) -> Octaves:
        """Part by part."""
        return Octaves(self.high(x.high), self.low(x.low))


class OctaveReLU(nn.Module):
    """ReLU of each part."""

    def forward(self, x: Octaves) -> Octaves:
        """Part by part."""
        return Octaves(F.relu(x.high), F.relu(x.low))


# --- In ResNets, whose maps become pairs


class OctaveUnit(nn.Module):
    """A bottleneck between pairs; the first one of stage 1 is given one map, that of stage 4 returns to one."""

    def __init__(self, unit: Bottleneck) -> None:
        super().__init__()
        for name, part in unit.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        """The bottleneck's formula."""
        y = self.relu(self.bn1(self.conv1(x)))  # pyright: ignore[reportCallIssue]
        y = self.relu(self.bn2(self.conv2(y)))  # pyright: ignore[reportCallIssue]
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))  # pyright: ignore[reportCallIssue]


def plan(resnet: ResNet, alpha: float) -> dict[nn.Conv2d, tuple[float, float]]:
    """Which convolutions of a ResNet take and give what share at half the resolution: alpha behind the stem, none from stage 4 on.

    Convolutions that halve the resolution of one part only are there too: they pool.
    """
    found: dict[nn.Conv2d, tuple[float, float]] = {}
    before = 0.0
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        after = 0.0 if stage is resnet.layer4 else alpha
        for unit in stage:
            for name, conv in unit.named_modules():
                if type(conv) is nn.Conv2d:
                    given = before if name == "conv1" or name.startswith("downsample") else after
                    if given or after or conv.stride != (1, 1):
                        found[conv] = (given, after)
            before = after
    return found


def octaved(resnet: ResNet, alpha: float) -> None:
    """Let pairs flow through stages 1 to 3 of a ResNet of bottlenecks, from the stem's one map to stage 4's."""
    shares = plan(resnet, alpha)
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        for i, unit in enumerate(stage):
            for parent in (unit, unit.get_submodule("downsample")):
                for name, module in list(parent.named_children()):
                    if isinstance(module, nn.Conv2d) and module in shares:
                        setattr(parent, name, OctaveConv(module, *shares[module]))
                    elif isinstance(module, nn.BatchNorm2d) and stage is not resnet.layer4:
                        setattr(parent, name, OctaveNorm(module.num_features, alpha))
                    elif isinstance(module, nn.ReLU) and stage is not resnet.layer4:
                        setattr(parent, name, OctaveReLU())
            if stage is not resnet.layer4 or i == 0:
                stage[i] = OctaveUnit(cast(Bottleneck, unit))


COUNTS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
"""Depth -> bottlenecks in each stage."""


def resnet(depth: int, channels: int, stem: Literal["imagenet", "cifar"], width: int) -> ResNet:
    """A ResNet of bottlenecks of the depths that the paper has."""
    network = ResNet(50, channels, stem=stem, width=width)
    for i, (stage, count) in enumerate(zip((network.layer1, network.layer2, network.layer3, network.layer4), COUNTS[depth])):
        del stage[count:]
        for _ in range(count - len(stage)):
            unit = Bottleneck(network.widths[i], width * 2**i, 1, nn.BatchNorm2d)
            for conv in (m for m in unit.modules() if isinstance(m, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            stage.append(unit)
    return network


class OctResNet(nn.Module):
    """A ResNet with octave convolutions, and a classifier.

    Attributes:
        widths: channels of the stages' outputs.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        checked(config.alpha)
        self.grid = Grid(fixed=image_size)
        self.body = resnet(config.depth, channels, config.stem, config.width)
        if config.alpha:
            octaved(self.body, config.alpha)
        self.widths, self.strides, self.embedding = self.body.widths, self.body.strides, self.body.embedding
        self.head = nn.Linear(self.embedding, classes)

    def octaves(self, image: Float[Tensor, "B C H W"]) -> list[Tensor | Octaves]:
        """The outputs of the stages as they are: pairs, and for stage 4 (and alpha = 0) one map."""
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(image))))
        features: list[Tensor | Octaves] = []
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            features.append(x)
        return features

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The same at full resolution, of ``widths`` channels at ``strides``."""
        return [whole(x) for x in self.octaves(image)]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Stage 4, averaged over its cells."""
        return whole(self.octaves(image)[-1]).mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def checked(alpha: float) -> None:
    """Refuse what is no share."""
    if not 0 <= alpha < 1:
        raise InputError(f"alpha={alpha}: the share of channels at half the resolution is from 0 to below 1")


# --- In other networks, whose maps stay as they are


class Packed(nn.Module):
    """An octave convolution between ordinary maps: the last channels are the low part, pooled before it and repeated behind it.

    As pooling undoes the repetition, a chain of these with norms and ReLUs between computes what pairs do, though it saves no memory.
    """

    def __init__(self, conv: OctaveConv) -> None:
        super().__init__()
        self.octave = conv

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E h w"]:
        """Split, convolve, join."""
        if self.octave.split[0]:
            above, below = x.split([self.octave.high_in, x.shape[1] - self.octave.high_in], 1)
            return whole(self.octave(Octaves(above, down(below))))
        return whole(self.octave(x))


def put(network: nn.Module, config: Octave) -> nn.Module:
    """The network with octave convolutions between its ordinary maps: as ``plan`` says in ResNets, otherwise wherever one fits.

    Raises:
        InputError: there is no place, or alpha is no share.
    """
    checked(config.alpha)
    resnets = [m for m in network.modules() if isinstance(m, ResNet)]
    shares = {conv: share for net in resnets for conv, share in plan(net, config.alpha).items()}
    if not resnets:
        shares = dict.fromkeys(fitting(network, config.alpha), (config.alpha, config.alpha))
    return swapped(network, shares.__contains__, lambda conv: Packed(OctaveConv(cast(nn.Conv2d, conv), *shares[cast(nn.Conv2d, conv)])))


def fitting(network: nn.Module, alpha: float) -> list[nn.Conv2d]:
    """Convolutions behind the first one that keep the resolution or halve it, are dense or depthwise, and have channels for both parts."""
    found = [m for m in network.modules() if type(m) is nn.Conv2d][1:]  # other types may pad in their own way

    def fits(conv: nn.Conv2d) -> bool:
        same = conv.padding == tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size)) and all(k % 2 for k in conv.kernel_size)
        mixes = conv.groups in (1, conv.in_channels) and (conv.groups == 1 or conv.in_channels == conv.out_channels)
        both = min(int(alpha * conv.in_channels), int(alpha * conv.out_channels)) > 0
        return same and mixes and both and conv.stride in ((1, 1), (2, 2)) and conv.padding_mode == "zeros"

    return [conv for conv in found if fits(conv)]


# --- What the paper states and looks at


def cost(alpha: float) -> float:
    """Table 1: multiplications of a layer with alpha_in = alpha_out = alpha, as a share of the ordinary one's."""
    return 1 - 0.75 * alpha * (2 - alpha)


def memory(alpha: float) -> float:
    """Numbers in a pair, as a share of an ordinary map's."""
    return 1 - 0.75 * alpha


def frequency(maps: Float[Tensor, "B D h w"]) -> float:
    """The mean spatial frequency of maps in cycles a cell (0 to 0.7), weighted by energy and without the constant; figure 4 in one number."""
    energy = torch.fft.fft2(maps).abs().square().mean((0, 1))
    energy[0, 0] = 0
    y, x = (torch.fft.fftfreq(n, device=maps.device) for n in maps.shape[2:])
    radius = (y.square()[:, None] + x.square()).sqrt()
    return float((energy * radius).sum() / energy.sum().clamp_min(1e-12))


VARIANTS = {
    **{
        f"r{depth}{f'_a{alpha:.3f}'.replace('0.', '') if alpha else ''}": Config(depth=depth, alpha=alpha)  # pyright: ignore[reportArgumentType]
        for depth, alphas in ((26, (0, 0.125, 0.25, 0.5, 0.75)), (50, (0, 0.125, 0.25, 0.5, 0.75)), (101, (0, 0.125, 0.25, 0.5)))
        for alpha in alphas
    },
    "r152_a125": Config(depth=152),
    **{f"r200_a{name}": Config(depth=200, alpha=alpha) for name, alpha in (("125", 0.125), ("250", 0.25), ("500", 0.5))},
    "small": Config(depth=26, alpha=0.25, width=16, stem="cifar", image_size=None),
    "test": Config(depth=26, alpha=0.25, width=4, stem="cifar", image_size=None),
}


def recipe(config: Config) -> Recipe:
    """ImageNet with the authors' cosine and warm-up of 5 epochs; a laptop's own for small images."""
    if config.image_size is None:
        view = View(area=(0.5, 1.0), jitter_chance=0, grey=0)
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=view)
    view = View(area=(0.08, 1.0), jitter_chance=0, grey=0)
    return Recipe(
        optimizer="sgd", lr=0.1, weight_decay=1e-4, batch_size=256, warmup=5 / 110, patch=config.image_size, augment=view
    )  # 0.4 at a batch of 1024


def build(spec: Spec, config: Config) -> OctResNet:
    """The network for a data set."""
    return OctResNet(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


LAYERS = {"octave_conv": Layer("conv", Octave(), put)}
PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "r50_a125"))
