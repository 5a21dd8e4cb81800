"""Factorized bilinear models: a linear layer gets the products of its inputs, with a matrix of low rank for each output.

Li, Wang, Liu and Hou, "Factorized Bilinear Models for Image Recognition", ICCV 2017 (arXiv 1611.05709).

y_j = b_j + w_j . x + x F_j' F_j x costs k more weights an input in place of n (factorisation machines). It takes the classifier's place, at
every position before the average pooling; DropFactor, a dropout of whole factors, keeps it from overfitting.

As in the official code (lyttonhao/Factorized-Bilinear-Network, whose operator is in lyttonhao/mxnet): two 1x1 convolutions, one of the linear terms
and one of the factors; tanh in place of the last ReLU, so that what is squared is bounded; F from a variance of 2 / (k n); k = 20, of which half are
dropped, in one draw for all images and outputs of a step; batch norm's epsilon 1e-5; gradients clipped at 10. Different from it, with the paper:
inputs meet themselves too (the operator takes the terms in x_i^2 out again), and DropFactor scales in evaluation alone (the operator also divides
by the chance in training). Different for ease: one bias, none in the ResNet before a norm; the slow start is the warm-up from 0. ImageNet's
networks are not built; as a layer the head goes onto any backbone.

Shapes: B batch, C image channels, K classes, n inputs of the layer, j of c outputs, f of k factors, N positions, h w cells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.nn.conv import he_init
from paperworks.nn.swap import swapped
from paperworks.papers.layers.learn_to_pay_attention.learn_to_pay_attention import ResNet, headless
from paperworks.tasks.base import Grid, Layer, Output, Paper, Recipe, Spec, grid_of
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A factorized bilinear layer."""

    factors: int = 20
    """k: the rank of each output's matrix; 0 is a linear layer."""
    drop: float = 0.5
    """DropFactor: the chance that a factor is dropped from a training step."""
    start: float | None = None
    """Standard deviation of F at the start, by default the root of 2 / (k n); the quadratic terms explode from large ones."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A network for small images and its last layer."""

    body: Literal["inception", "resnet"] = "inception"
    last: Factors | None = Factors()
    """None is the network that the paper starts from: ReLU, average pooling, linear layer."""
    units: int = 18
    """Residual units of each of the ResNet's three stages."""
    width: float = 1.0
    """Factor on all channels."""
    image_size: int | None = 32
    """Side of the images; None takes it from the data."""


class FactorizedBilinear(nn.Module):
    """Eq. 5 as a 1x1 convolution, with DropFactor (section 3.3)."""

    def __init__(self, inputs: int, outputs: int, config: Factors, *, bias: bool = True) -> None:
        super().__init__()
        if config.factors < 0 or not 0 <= config.drop < 1:
            raise InputError(f"factors={config.factors}, drop={config.drop}: a rank of 0 or more, and a chance below 1, are needed")
        self.factors, self.keep = config.factors, 1 - config.drop
        self.linear = nn.Conv2d(inputs, outputs, 1, bias=bias)
        self.factor = nn.Conv2d(inputs, outputs * self.factors, 1, bias=False) if self.factors else None  # F, output by output
        if self.factor is not None:
            nn.init.normal_(self.factor.weight, std=sqrt(2 / (self.factors * inputs)) if config.start is None else config.start)

    def interactions(self, x: Float[Tensor, "B n h w"]) -> Float[Tensor, "B c h w"]:
        """Sum of (F_jf . x)^2 over f; in training some f are dropped from it, in evaluation all are scaled by the chance to stay."""
        assert self.factor is not None
        squares = self.factor(x).square().unflatten(1, (-1, self.factors))  # B c k h w
        if self.training and self.keep < 1:
            mask = torch.rand(self.factors, device=x.device) < self.keep  # one for the whole step
            return (squares * mask[:, None, None]).sum(2)
        return squares.sum(2) * self.keep

    def forward(self, x: Float[Tensor, "B n h w"]) -> Float[Tensor, "B c h w"]:
        """Linear terms and interactions at each position by itself."""
        return self.linear(x) if self.factor is None else self.linear(x) + self.interactions(x)


class FactorizedHead(nn.Module):
    """Norm, tanh, the layer at every position, and only then the average: the mean of squares is not the square of the mean."""

    def __init__(self, width: int, classes: int, config: Factors, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.layer = FactorizedBilinear(width, classes, config)

    def forward(self, features: Float[Tensor, "B n h w"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.layer(self.norm(features).tanh()).mean((2, 3))


class LinearHead(nn.Module):
    """Norm, ReLU, average, linear layer: what the paper starts from."""

    def __init__(self, width: int, classes: int, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.layer = nn.Linear(width, classes)

    def forward(self, features: Float[Tensor, "B n h w"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.layer(self.norm(features).relu().mean((2, 3)))


class Factorized(nn.Module):
    """A body and one of the heads.

    Attributes:
        widths: channels of the body's maps.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that ``embed`` gives.
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.grid = grid_of(body)
        self.widths: tuple[int, ...] = tuple(body.widths)  # pyright: ignore[reportArgumentType]
        self.strides: tuple[int, ...] = tuple(body.strides)  # pyright: ignore[reportArgumentType]
        self.embedding = self.widths[-1]

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The body's maps, of ``widths`` channels at ``strides``."""
        return self.body.pyramid(image)  # pyright: ignore[reportCallIssue]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The last map, averaged over its cells."""
        return self.pyramid(image)[-1].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.pyramid(image)[-1])}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's, with its norm."""
        return self.head.parameters()


# --- The Inception network for small images


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, active: bool = True) -> nn.Sequential:
    """Convolution with bias, norm, and a ReLU where ``active``."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * active)


class Simple(nn.Module):
    """A 1x1 and a 3x3 convolution beside each other."""

    def __init__(self, inputs: int, one: int, three: int, *, active: bool = True) -> None:
        super().__init__()
        self.one, self.three = conv(inputs, one, 1, active=active), conv(inputs, three, 3, active=active)

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O h w"]:
        """Their channels one after the other."""
        return torch.cat([self.one(x), self.three(x)], 1)


class Down(nn.Module):
    """A 3x3 convolution of stride 2 beside a max pooling."""

    def __init__(self, inputs: int, three: int) -> None:
        super().__init__()
        self.three, self.pool = conv(inputs, three, 3, 2), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O u v"]:
        """Their channels one after the other."""
        return torch.cat([self.three(x), self.pool(x)], 1)


STAGES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((32, 32), (32, 48)),
    ((0, 80), (112, 48), (96, 64), (80, 80), (48, 96)),
    ((0, 96), (176, 160), (176, 160)),
)
"""3a to 5b: channels of the 1x1 and of the 3x3 convolutions; no 1x1 means Down."""


class Inception(nn.Module):
    """The Inception-BN that MXNet has for CIFAR; the last block's activation is left to the head."""

    strides = (1, 2, 4)

    def __init__(self, channels: int, side: int, width: float) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)

        def scaled(n: int) -> int:
            return max(round(n * width), 2)

        inputs = scaled(96)
        self.stem = conv(channels, inputs, 3)
        self.stages, widths = nn.ModuleList(), []
        for i, stage in enumerate(STAGES):
            blocks = []
            for j, (one, three) in enumerate(stage):
                active = (i, j) != (2, 2)
                blocks.append(Simple(inputs, scaled(one), scaled(three), active=active) if one else Down(inputs, scaled(three)))
                inputs = scaled(three) + (scaled(one) if one else inputs)
            self.stages.append(nn.Sequential(*blocks))
            widths.append(inputs)
        self.widths = tuple(widths)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Outputs of 3b, 4d and 5b."""
        maps, x = [], self.stem(image)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def build(spec: Spec, config: Config) -> Factorized:
    """The network for a data set."""
    side, classes = int(config.image_size or image_side(spec)), len(spec.classes)
    inception, resnet = config.body == "inception", round(16 * config.width)
    body = Inception(spec.channels, side, config.width) if inception else ResNet(spec.channels, side, resnet, (config.units,) * 3)
    he_init(body)
    width, norm = body.widths[-1], not inception  # the ResNet's last norm stands before its activation
    head = LinearHead(width, classes, norm=norm) if config.last is None else FactorizedHead(width, classes, config.last, norm=norm)
    return Factorized(body, head)


# --- As a layer


def put_head(network: nn.Module, config: Factors) -> Factorized:
    """A norm, tanh and the layer on the last map of another paper's backbone, in its classifier's place.

    Raises:
        InputError: it is no backbone, or has no classifier that can be told from the rest.
    """
    classes = headless(network)
    return Factorized(network, FactorizedHead(int(network.widths[-1]), classes, config, norm=True))  # pyright: ignore[reportIndexIssue, reportArgumentType]


def put_convolutions(network: nn.Module, config: Factors) -> nn.Module:
    """The layer in the place of every 1x1 convolution of stride 1; its linear terms keep the weights.

    Raises:
        InputError: there is none.
    """

    def fits(module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)

    def make(module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Conv2d)
        layer = FactorizedBilinear(module.in_channels, module.out_channels, config, bias=module.bias is not None)
        layer.linear = module
        return layer

    return swapped(network, fits, make)


FB = Factors()
RESNET = Config(body="resnet")
VARIANTS = {
    "inception": Config(last=None),
    "inception_fbn": Config(),
    "resnet164": replace(RESNET, last=None),
    "resnet164_fbn": RESNET,
    "resnet1001": replace(RESNET, units=111, last=None),
    "resnet1001_fbn": replace(RESNET, units=111),
    "small": Config(width=0.5, image_size=None),
    "test": Config(width=0.1, last=Factors(factors=3), image_size=None),
}


def recipe(config: Config) -> Recipe:
    """The authors' for CIFAR, whose slow start takes 3 epochs and whose gradients are clipped at 10; a laptop's own for small images."""
    if config.image_size is None:
        view = View(area=(0.5, 1.0), jitter_chance=0, grey=0)
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=view)
    view, inception = View(area=(0.7, 1.0), jitter_chance=0, grey=0), config.body == "inception"
    return Recipe(
        optimizer="sgd", lr=0.2 if inception else 0.1, weight_decay=1e-4, schedule="step", decay_at=(0.5, 0.75),
        warmup=3 / (400 if inception else 200), clip=10.0, batch_size=128, patch=config.image_size, augment=view,
    )  # fmt: skip


LAYERS = {
    "factorized_bilinear": Layer("head", FB, put_head),
    "factorized_bilinear_1x1": Layer("conv", Factors(factors=2, start=0.01), put_convolutions),  # nothing bounds what is squared there
}
PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "inception_fbn"))
