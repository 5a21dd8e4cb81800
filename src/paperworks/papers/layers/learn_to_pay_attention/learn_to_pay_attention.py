"""Learn to Pay Attention: the classifier is given attention-weighted sums of middle layers' features, and nothing else.

Jetley, Lord, Lee and Torr, "Learn to Pay Attention", ICLR 2018 (arXiv 1804.02391).

A global vector g scores the local features of up to three layers; a softmax over the positions turns the scores into a map; the features' sum
under that map goes to the classifier in g's place. So the network must say where the evidence is in order to use it.

As in the official code (saumya-jetley/cd_ICLR18_LearnToPayAttention, Torch7): where widths differ g is brought down to the local features'
(BN, ReLU, dropout, linear), each attended vector passes BN, ReLU and dropout, convolutions before BN have biases, BN's epsilon in the VGG is
1e-3. Different from it: u has no bias (a softmax takes it away), "indep" averages probabilities as the paper says (the code adds
logits), and maps that are not 1x1 before g, of larger images than 32 pixels, are averaged.

A softmax also takes u . g away from u . (l_i + g): with the parametrised compatibility the maps do not depend on g at all (see the note).

Shapes: B batch, C image channels, K classes, H W pixels, S levels, D channels of a local map, h w its cells, G width of g.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.nn.conv import he_init
from paperworks.tasks.base import Grid, Layer, Output, Paper, Recipe, Spec, grid_of
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What tells the paper's heads apart."""

    levels: int = 3
    """S: how many maps are attended, counted from the last; 0 classifies g."""
    compatibility: Literal["parametrised", "dot"] = "parametrised"
    """pc: u . (l_i + g), or dp: l_i . g."""
    combine: Literal["concat", "indep"] = "concat"
    """One classifier of all attended vectors, or one of each, whose probabilities are averaged."""
    dropout: float = 0.5
    """Of the attended vectors."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A body with an attending head."""

    attend: Attention = Attention()
    body: Literal["vgg", "resnet"] = "vgg"
    width: int = 64
    """Channels of the VGG's first convolution, 16 of the ResNet's."""
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Convolutions of the VGG's five widths before L3, or residual units of the ResNet's three stages."""
    image_size: int | None = 32
    """Side of the images; None takes it from the data."""


class Compatibility(nn.Module):
    """Scores and the sum under them (section 3.1, eqs. 1 and 2)."""

    def __init__(self, local: int, globe: int, function: Literal["parametrised", "dot"]) -> None:
        super().__init__()
        down = (nn.BatchNorm1d(globe), nn.ReLU(), nn.Dropout(0.5), nn.Linear(globe, local)) if globe != local else ()
        self.down = nn.Sequential(*down)
        self.u = nn.Linear(local, 1, bias=False) if function == "parametrised" else None

    def weights(self, cells: Float[Tensor, "B D N"], g: Float[Tensor, "B G"]) -> Float[Tensor, "B 1 N"]:
        """The softmax over all positions of c(l_i, g)."""
        query = self.down(g)[:, :, None]
        scores = query.mT @ cells if self.u is None else self.u.weight @ (cells + query)
        return scores.softmax(2)

    def forward(self, local: Float[Tensor, "B D h w"], g: Float[Tensor, "B G"]) -> Float[Tensor, "B D"]:
        """g_a: the convex combination of the local features."""
        cells = local.flatten(2)
        return (cells @ self.weights(cells, g).mT)[:, :, 0]


class AttendingHead(nn.Module):
    """Compatibilities of S levels, and what classifies their sums."""

    def __init__(self, widths: Sequence[int], globe: int, classes: int, config: Attention) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Compatibility(width, globe, config.compatibility) for width in widths)
        seen = tuple(widths) or (globe,)
        self.after = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(config.dropout)) for width in seen)
        self.classifiers = nn.ModuleList(nn.Linear(width, classes) for width in (seen if config.combine == "indep" else (sum(seen),)))
        self.embedding = sum(seen)

    def vectors(self, maps: Sequence[Tensor], g: Float[Tensor, "B G"]) -> list[Tensor]:
        """What a classifier sees of each level, B D."""
        attended = [level(local, g) for level, local in zip(self.levels, maps)]
        return [after(vector) for after, vector in zip(self.after, attended or [g])]

    def forward(self, maps: Sequence[Tensor], g: Float[Tensor, "B G"]) -> Float[Tensor, "B K"]:
        """Logits."""
        vectors = self.vectors(maps, g)
        if len(self.classifiers) == 1:
            return self.classifiers[0](torch.cat(vectors, 1))
        votes = torch.stack([classify(vector).log_softmax(1) for classify, vector in zip(self.classifiers, vectors)])
        return votes.logsumexp(0)  # the log of the mean of the probabilities, up to a constant


class Attending(nn.Module):
    """A body and an attending head.

    Attributes:
        widths: channels of the body's maps.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, body: nn.Module, describe: nn.Module, globe: int, classes: int, config: Attention) -> None:
        super().__init__()
        self.body, self.describe = body, describe
        self.grid = grid_of(body)
        self.widths: tuple[int, ...] = tuple(body.widths)  # pyright: ignore[reportArgumentType]
        self.strides: tuple[int, ...] = tuple(body.strides)  # pyright: ignore[reportArgumentType]
        self.count = min(config.levels, len(self.widths))
        self.head = AttendingHead(self.widths[len(self.widths) - self.count :], globe, classes, config)
        self.embedding = self.head.embedding

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The body's maps, of ``widths`` channels at ``strides``."""
        return self.body.pyramid(image)  # pyright: ignore[reportCallIssue]

    def looked(self, image: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], Tensor]:
        """The maps that are attended, and g, B G."""
        maps = self.pyramid(image)
        return maps[len(maps) - self.count :], self.describe(maps[-1])

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The attended vectors, as the classifier sees them."""
        return torch.cat(self.head.vectors(*self.looked(image)), 1)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(*self.looked(image))}

    def attention(self, image: Float[Tensor, "B C H W"], query: Float[Tensor, "B C H W"] | None = None) -> list[Tensor]:
        """The maps of each level, B h w; with ``query`` those under the global vectors of other images (section 5.4)."""
        maps, g = self.looked(image)
        g = g if query is None else self.looked(query)[1]
        found = []
        for level, local in zip(self.head.levels, maps):
            assert isinstance(level, Compatibility)
            found.append(level.weights(local.flatten(2), g).view(local.shape[0], *local.shape[2:]))
        return found

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifiers'."""
        return self.head.classifiers.parameters()


# --- Bodies


def conv(inputs: int, outputs: int, dropout: float = 0.0, eps: float = 1e-3) -> list[nn.Module]:
    """A 3x3 convolution with BN, ReLU and, where it is not 0, dropout."""
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, eps=eps), nn.ReLU(inplace=True)]
    return [*layers, *[nn.Dropout(dropout)] * (dropout > 0)]


def pool() -> nn.MaxPool2d:
    """2x2, the last odd row kept."""
    return nn.MaxPool2d(2, 2, ceil_mode=True)


class VGG(nn.Module):
    """The VGG of appendix A: no pooling before L1, so that the first map has a cell for each pixel."""

    strides = (1, 2, 4)

    def __init__(self, channels: int, side: int, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)
        inputs, parts = channels, []
        for i, (factor, depth) in enumerate(zip((1, 2, 4, 8, 8), depths, strict=True)):
            for j in range(depth):
                drop = 0.0 if j == depth - 1 else 0.4 if i else 0.3  # none on what is attended
                parts.append(conv(inputs, factor * width, drop))
                inputs = factor * width
        first, second = sum(depths[:3]), sum(depths[:4])
        groups = (parts[:first], parts[first:second], parts[second:])
        self.blocks = nn.ModuleList(
            nn.Sequential(*[pool()] * (i > 0), *(layer for part in group for layer in part)) for i, group in enumerate(groups)
        )
        self.widths = (4 * width, 8 * width, 8 * width)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """L1, L2, L3."""
        maps, x = [], image
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class Unit(nn.Module):
    """A bottleneck with norms before its convolutions (He et al. 2016, ECCV); where widths differ both branches share the first norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, inner, 1, stride, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(inner), nn.Conv2d(inner, outputs, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O u v"]:
        """The convolutions' sum with the input, or with its projection."""
        first = F.relu(self.norm1(x))
        y = F.relu(self.norm2(self.conv1(first)))
        y = self.conv3(F.relu(self.norm3(self.conv2(y))))
        return y + (x if self.shortcut is None else self.shortcut(first))


class ResNet(nn.Module):
    """ResNet-164 for small images: 18 units in each of three stages; their outputs are attended as they are."""

    strides = (1, 2, 4)

    def __init__(self, channels: int, side: int, width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)
        self.widths = (4 * width, 8 * width, 16 * width)
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stages, inputs = nn.ModuleList(), width
        for i, (outputs, depth) in enumerate(zip(self.widths, depths, strict=True)):
            units = [Unit(inputs if j == 0 else outputs, outputs, 2 if i and j == 0 else 1) for j in range(depth)]
            self.stages.append(nn.Sequential(*units))
            inputs = outputs

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Outputs of the three stages."""
        maps, x = [], self.stem(image)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def describing(body: Literal["vgg", "resnet"], width: int) -> nn.Module:
    """From the last map to g: what is left of the VGG, or what the authors put on the ResNet."""
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(width, width))
    if body == "vgg":
        return nn.Sequential(pool(), *conv(width, width, 0.4), pool(), *conv(width, width, 0.4), pool(), *end)
    return nn.Sequential(
        nn.BatchNorm2d(width), nn.ReLU(), pool(), *conv(width, width, 0.4), nn.MaxPool2d(4, 4, ceil_mode=True), *end
    )  # fmt: skip


def build(spec: Spec, config: Config) -> Attending:
    """The network for a data set."""
    side = int(config.image_size or image_side(spec))
    body = (VGG if config.body == "vgg" else ResNet)(spec.channels, side, config.width, config.depths)
    width = body.widths[-1]
    network = Attending(body, describing(config.body, width), width, len(spec.classes), config.attend)
    he_init(network)
    return network


# --- As a layer


def put(network: nn.Module, config: Attention) -> Attending:
    """An attending head on another paper's backbone, in its classifier's place; g is a linear map of the average over the last map.

    Raises:
        InputError: it is no backbone, or has no classifier that can be told from the rest.
    """
    classes, width = headless(network), int(network.widths[-1])  # pyright: ignore[reportIndexIssue, reportArgumentType]
    describe = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, width))
    return Attending(network, describe, width, classes, config)


def headless(network: nn.Module) -> int:
    """Take a backbone's classifier away; how many classes it told apart.

    Raises:
        InputError: it has no ``pyramid``, answers with more than logits (its loss would miss them), or no module holds the parameters of
            ``head_parameters()`` and nothing else.
    """
    name, first = type(network).__name__, next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or not hasattr(network, "pyramid") or not hasattr(network, "head_parameters"):
        raise InputError(f"{name} has no pyramid of features, or no classifier of its own")
    training, side = network.training, grid_of(network).fit(64)
    with torch.no_grad():
        answer = network.eval()(torch.zeros(1, first.in_channels, side, side, device=first.weight.device))
    network.train(training)
    if set(answer) != {"logits"}:
        raise InputError(
            f"{name} answers with more than logits: {', '.join(sorted(set(answer) - {'logits'}))}; another head would drop them"
        )
    own = list(network.head_parameters())  # pyright: ignore[reportCallIssue]
    for place, module in network.named_modules():
        if place and {id(p) for p in module.parameters()} == {id(p) for p in own}:
            parent, _, last = place.rpartition(".")
            setattr(network.get_submodule(parent), last, nn.Identity())
            return own[-1].shape[0]  # of the last layer's bias, or weight
    raise InputError(f"the classifier of {name} is no module of its own")


PC, DP = Attention(), Attention(compatibility="dot")
RN = Config(body="resnet", width=16, depths=(18, 18, 18), attend=replace(PC, levels=2, dropout=0.3))
VARIANTS = {
    "vgg": Config(attend=replace(PC, levels=0)),
    "vgg_att1_concat_pc": Config(attend=replace(PC, levels=1)),
    "vgg_att2_concat_pc": Config(attend=replace(PC, levels=2)),
    "vgg_att2_concat_dp": Config(attend=replace(DP, levels=2)),
    "vgg_att2_indep_pc": Config(attend=replace(PC, levels=2, combine="indep")),
    "vgg_att3_concat_pc": Config(attend=PC),
    "vgg_att3_concat_dp": Config(attend=DP),
    "vgg_att3_indep_pc": Config(attend=replace(PC, combine="indep")),
    "rn164": replace(RN, attend=replace(RN.attend, levels=0)),
    "rn164_att2_concat_pc": RN,
    "rn164_att2_concat_dp": replace(RN, attend=replace(RN.attend, compatibility="dot")),
    "small": Config(width=16, depths=(1, 1, 1, 1, 1), attend=PC, image_size=None),
    "test": Config(width=4, depths=(1, 1, 1, 1, 1), attend=DP, image_size=None),
}


def recipe(config: Config) -> Recipe:
    """The authors' learning rates, 1 for the VGG and 0.1 for the ResNet, in two steps; a laptop's own for small images.

    The authors halve the VGG's after every 25 of 300 epochs, to 1/2048 of it in the end; here it is divided by ten twice.
    """
    if config.image_size is None:
        view = View(area=(0.5, 1.0), jitter_chance=0, grey=0)
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=view)
    view = View(area=(0.7, 1.0), jitter_chance=0, grey=0)
    lr = 1.0 if config.body == "vgg" else 0.1
    return Recipe(optimizer="sgd", lr=lr, weight_decay=5e-4, schedule="step", batch_size=128, patch=config.image_size, augment=view)


LAYERS = {"pay_attention": Layer("head", PC, put)}
PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "vgg_att3_concat_pc"))
