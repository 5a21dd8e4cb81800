"""GCNet: the attention maps of a non-local block hardly depend on the query, so one map for all of them is enough.

Cao, Xu, Lin, Wei and Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCV Workshops 2019 (arXiv 1904.11492).

A block of global context has three steps: pool all positions into one vector, transform it, fuse it into every position. The simplified
non-local block, squeeze-and-excitation and the paper's own block are settings of these steps (figure 4), and here of one class; the
non-local block with its four pairwise functions, which the paper starts from, is another.

As in the official code (xvjiarui/GCNet): the block stands inside each residual unit of c3 to c5, before the addition; LayerNorm with an
epsilon of 1e-5 in the bottleneck; the last weights start at zero, so that an adding block is the identity. Different from it: the stride
of a bottleneck is on its 3x3 convolution, and the embedded Gaussian is not scaled (the official plugin means to divide its logits by the
root of the width and multiplies by it). Detection is not rebuilt; as a layer the blocks go into any ResNet of this archive, detectors' too.

Shapes: B batch, C image channels, K classes, D channels of a map, h w its cells, N = h w, r ratio, F channels of c5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.nn.resnet import BasicBlock, Bottleneck, Depth, ResNet
from paperworks.nn.swap import swapped
from paperworks.tasks.base import Grid, Layer, Output, Paper, Recipe, Spec, grid_of
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Context:
    """The three steps of figure 4(a): pooling, transform, fusion. The defaults are the paper's block."""

    pooling: Literal["attention", "average"] = "attention"
    """Weights of the positions: a softmax of a 1x1 convolution, or all the same."""
    transform: Literal["bottleneck", "bare", "linear"] = "bottleneck"
    """Two 1x1 convolutions with LayerNorm and ReLU between, with ReLU alone, or one 1x1 convolution."""
    fusion: Literal["add", "scale"] = "add"
    """The vector is added to every position, or its sigmoid multiplies it."""
    ratio: int = 16
    """r: the bottleneck has D / r channels."""
    place: Literal["inside", "after"] = "inside"
    """Of a residual unit: before the addition ("after1x1" of table 4b), or behind the unit ("afterAdd"); in units other than a ResNet's behind."""
    start: float = 0.0
    """Standard deviation of the last weights at the start; 0 makes an adding block the identity."""


SIMPLIFIED = Context(transform="linear", place="after")
"""Eq. 3, figure 4(b): the non-local block with one map for all queries."""
SQUEEZE_EXCITATION = Context(pooling="average", transform="bare", fusion="scale")
"""Figure 4(c), Hu et al. 2018."""


@dataclass(frozen=True, kw_only=True)
class Pairwise:
    """The non-local block that the paper starts from (section 3.1; Wang et al. 2018)."""

    function: Literal["gaussian", "embedded", "dot", "concat"] = "embedded"
    """What relates a query to a key."""
    reduction: int = 2
    """Queries, keys and values have D / reduction channels."""
    start: float = 0.0
    """Standard deviation of W_z at the start; 0 makes the block the identity."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A ResNet and what of global context is in it."""

    depth: Depth = 50
    block: Context | Pairwise | None = Context()
    """None leaves the ResNet as it is."""
    single: bool = False
    """One block, before the last residual unit of c4, in place of one in every unit of c3 to c5."""
    width: int = 64
    """Of the ResNet's first stage."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class GlobalContext(nn.Module):
    """Figure 4(a); with the defaults of ``Context`` it is figure 4(d), eq. 5."""

    def __init__(self, width: int, config: Context) -> None:
        super().__init__()
        if config.ratio < 1:
            raise InputError(f"ratio={config.ratio}: the bottleneck of a context block has 1/ratio of the channels, so it is 1 or more")
        self.scale = config.fusion == "scale"
        inner = max(
            width // config.ratio, min(width, 4)
        )  # fewer would leave the LayerNorm nothing to say; no net of the paper is so narrow
        self.mask = nn.Linear(width, 1) if config.pooling == "attention" else None  # W_k: a 1x1 convolution
        last = nn.Linear(width if config.transform == "linear" else inner, width)
        if config.transform == "linear":
            self.transform = nn.Sequential(last)  # W_v
        else:
            norm = [nn.LayerNorm(inner)] * (config.transform == "bottleneck")
            self.transform = nn.Sequential(nn.Linear(width, inner), *norm, nn.ReLU(inplace=True), last)  # W_v1, LN, ReLU, W_v2
        if self.mask is not None:
            nn.init.kaiming_normal_(self.mask.weight, mode="fan_in")
            nn.init.zeros_(self.mask.bias)
        nn.init.normal_(last.weight, std=config.start)
        nn.init.zeros_(last.bias)

    def attention(self, cells: Float[Tensor, "B D N"]) -> Float[Tensor, "B 1 N"]:
        """The weights of all positions, the same for each query."""
        if self.mask is None:
            return cells.new_full((cells.shape[0], 1, cells.shape[2]), 1 / cells.shape[2])
        return (self.mask.weight @ cells + self.mask.bias).softmax(2)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """Pool, transform, fuse."""
        cells = x.flatten(2)
        change = self.transform((cells @ self.attention(cells).mT)[:, :, 0])[:, :, None, None]
        return x * change.sigmoid() if self.scale else x + change


class NonLocal(nn.Module):
    """Eqs. 1 and 2: z_i = x_i + W_z sum_j w_ij W_v x_j."""

    def __init__(self, width: int, config: Pairwise) -> None:
        super().__init__()
        if config.reduction < 1:
            raise InputError(f"reduction={config.reduction}: queries have 1/reduction of the channels, so it is 1 or more")
        inner = max(width // config.reduction, 1)
        self.function = config.function
        embedded = config.function != "gaussian"
        self.query = nn.Conv2d(width, inner, 1) if embedded else nn.Identity()  # W_q
        self.key = nn.Conv2d(width, inner, 1) if embedded else nn.Identity()  # W_k
        self.pair = nn.Conv1d(2 * inner, 1, 1, bias=False) if config.function == "concat" else None
        self.value = nn.Conv2d(width, inner, 1)  # W_v
        self.out = nn.Conv2d(inner, width, 1)  # W_z
        nn.init.normal_(self.out.weight, std=config.start)
        nn.init.zeros_(self.out.bias)  # pyright: ignore[reportArgumentType]

    def attention(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N N"]:
        """w: a map over all positions (last axis) for each query."""
        query, key = self.query(x).flatten(2), self.key(x).flatten(2)  # B d N
        if self.pair is not None:
            # ReLU(w . [q_i, k_j]) / N; the product with the concatenation is the sum of the products with its halves.
            of_query, of_key = self.pair.weight.chunk(2, 1)
            return F.relu(F.conv1d(query, of_query).mT + F.conv1d(key, of_key)) / query.shape[2]
        logits = query.mT @ key
        return logits / query.shape[2] if self.function == "dot" else logits.softmax(2)

    def gathered(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """What is added to the input."""
        values = self.value(x)
        return self.out((values.flatten(2) @ self.attention(x).mT).view_as(values))

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """Fuse by addition."""
        return x + self.gathered(x)


def made(width: int, config: Context | Pairwise) -> nn.Module:
    """The block for a map of ``width`` channels."""
    return GlobalContext(width, config) if isinstance(config, Context) else NonLocal(width, config)


LAST: dict[type[nn.Module], str] = {BasicBlock: "bn2", Bottleneck: "bn3"}
"""What a residual unit of a ResNet does last before its addition."""


def put(network: nn.Module, config: Context | Pairwise) -> nn.Module:
    """The network with a block inside, or behind, each of its ``units``.

    Raises:
        InputError: it has none.
    """
    found = units(network)

    def make(unit: nn.Module) -> nn.Module:
        block = made(found[unit], config)
        if isinstance(config, Pairwise) or config.place == "after" or type(unit) not in LAST:
            return nn.Sequential(unit, block)
        last = LAST[type(unit)]
        setattr(unit, last, nn.Sequential(unit.get_submodule(last), block))
        return unit

    return swapped(network, found.__contains__, make)


def units(network: nn.Module) -> dict[nn.Module, int]:
    """Where context is put, and how many channels are there: the residual units of all ResNets inside, but for those of c2.

    In a backbone of another kind: the modules of its sequences that mix positions and whose result has the shape of their input, but for
    those at the finest resolution, if there is more than one.
    """
    resnets = [module for module in network.modules() if isinstance(module, ResNet)]
    if resnets:
        stages = [pair for net in resnets for pair in zip((net.layer2, net.layer3, net.layer4), net.widths[1:])]
        return {unit: width for stage, width in stages for unit in stage}
    shapes = unchanged(network)
    finest = max((shape[2] for shape in shapes.values()), default=0)
    coarser = {unit: shape[1] for unit, shape in shapes.items() if shape[2] < finest}
    return coarser or {unit: shape[1] for unit, shape in shapes.items()}


def unchanged(network: nn.Module) -> dict[nn.Module, torch.Size]:
    """Modules in sequences of a backbone whose result B D h w has the shape of their input, seen by sending an image through."""
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    shapes: dict[nn.Module, torch.Size] = {}
    if first is None or not hasattr(network, "pyramid"):
        return shapes

    def look(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        if len(given) == 1 and isinstance(result, Tensor) and result.ndim == 4 and result.shape == given[0].shape:
            shapes[module] = result.shape

    sequences = [m for m in network.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    children = [child for sequence in sequences for child in sequence if not isinstance(child, nn.Sequential) and mixes(child)]
    hooks = [child.register_forward_hook(look) for child in children]
    training, side = network.training, grid_of(network).fit(64)
    with torch.no_grad():
        network.eval().pyramid(torch.zeros(1, first.in_channels, side, side, device=first.weight.device))  # pyright: ignore[reportCallIssue]
    network.train(training)
    for hook in hooks:
        hook.remove()
    return shapes


def mixes(module: nn.Module) -> bool:
    """Something inside has a kernel of more than one cell."""
    inside = (m for m in module.modules() if m is not module)
    return any(isinstance(m, nn.Conv2d | nn.AvgPool2d) and m.kernel_size not in (1, (1, 1)) for m in inside)


class GCNet(nn.Module):
    """A ResNet with context in it, and a classifier.

    Attributes:
        widths: channels of the stages' outputs, c2 to c5.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size)
        self.body = ResNet(config.depth, channels, stem=config.stem, width=config.width)
        self.widths, self.strides, self.embedding = self.body.widths, self.body.strides, self.body.widths[-1]
        self.head = nn.Linear(self.embedding, classes)
        if config.block is not None and config.single:
            self.body.layer3.insert(len(self.body.layer3) - 1, made(self.widths[2], config.block))
        elif config.block is not None:
            put(self.body, config.block)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """c2 to c5, of ``widths`` channels at ``strides``."""
        return self.body.pyramid(image)

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """c5, averaged over its cells."""
        return self.body(image).mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


# --- What the paper measures (section 3.2)


def cosine_distance(vectors: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """Eq. 4 with the cosine distance (1 - cos) / 2, averaged over all pairs of the N vectors.

    The mean of all products of unit vectors is the squared length of their mean, so no pair is looked at.
    """
    return (1 - F.normalize(vectors, dim=2).mean(1).square().sum(1)) / 2


def jensen_shannon(maps: Float[Tensor, "B N M"]) -> Float[Tensor, " B"]:
    """Eq. 4 with the Jensen-Shannon divergence of maps that are distributions, in nats."""
    first, second = maps[:, :, None], maps[:, None]
    middle = (first + second) / 2
    return (torch.xlogy(first, first / middle) + torch.xlogy(second, second / middle)).sum(3).mean((1, 2)) / 2


def query_share(maps: Float[Tensor, "B N M"]) -> Float[Tensor, " B"]:
    """How much of what makes the maps uneven depends on the query, 0 to 1; ours, not the paper's.

    Maps that are nearly uniform have a small distance whatever they say. Of their squared deviation from the uniform map this is the part
    that is not common to all queries.
    """
    own = (maps - maps.mean(1, keepdim=True)).square().sum((1, 2))
    return own / (maps - maps.mean(2, keepdim=True)).square().sum((1, 2)).clamp_min(1e-12)


def query_dependence(network: nn.Module, image: Float[Tensor, "B C H W"]) -> dict[str, float]:
    """A row of table 1, averaged over the network's non-local blocks and the images.

    Mean distances between positions of the blocks' ``input``, of their ``output`` before fusion and of the ``attention`` maps; the latter's
    Jensen-Shannon divergence ``jsd`` and their ``query_share``. Maps that do not sum to one are divided by their sums for these two.
    """
    rows: list[dict[str, float]] = []

    def look(block: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(block, NonLocal)
        x, maps = given[0], block.attention(given[0])
        shares = maps.clamp_min(0) / maps.clamp_min(0).sum(2, keepdim=True).clamp_min(1e-12)
        found = {
            "input": cosine_distance(x.flatten(2).mT),
            "output": cosine_distance(block.gathered(x).flatten(2).mT),
            "attention": cosine_distance(maps),
            "jsd": jensen_shannon(shares),
            "query_share": query_share(shares),
        }
        rows.append({name: float(value.mean()) for name, value in found.items()})

    hooks = [block.register_forward_hook(look) for block in network.modules() if isinstance(block, NonLocal)]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}


NL, GC, LITTLE = Pairwise(), Context(), Context(ratio=4, start=0.01)
VARIANTS = {
    "r50": Config(block=None),
    "r50+nl": Config(block=NL, single=True),
    "r50+snl": Config(block=SIMPLIFIED, single=True),
    "r50+gc1": Config(block=GC, single=True),
    "r50+se": Config(block=SQUEEZE_EXCITATION),
    "r50+gc": Config(block=GC),
    "r50+gc_r4": Config(block=replace(GC, ratio=4)),
    "r101+gc": Config(depth=101, block=GC),
    "r101+gc_r4": Config(depth=101, block=replace(GC, ratio=4)),
    "small": Config(depth=18, width=16, stem="cifar", block=LITTLE, image_size=None),
    "small_nl": Config(depth=18, width=16, stem="cifar", block=replace(NL, start=0.01), single=True, image_size=None),
    "test": Config(depth=18, width=4, stem="cifar", block=replace(LITTLE, ratio=2), image_size=32),
}


def recipe(config: Config) -> Recipe:
    """ImageNet as it is usually trained, with a cosine; a laptop's own for small images."""
    if config.stem == "cifar":
        view = View(area=(0.5, 1.0), jitter_chance=0, grey=0)
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=view)
    view = View(area=(0.08, 1.0), jitter_chance=0, grey=0)
    return Recipe(optimizer="sgd", lr=0.1, weight_decay=1e-4, batch_size=256, patch=config.image_size or 224, augment=view)


def build(spec: Spec, config: Config) -> GCNet:
    """The network for a data set."""
    return GCNet(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


LAYERS = {
    "global_context": Layer("context", GC, put),
    "simplified_non_local": Layer("context", SIMPLIFIED, put),
    "squeeze_excitation": Layer("context", SQUEEZE_EXCITATION, put),
    "non_local": Layer("context", NL, put),
}
PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "r50+gc"))
