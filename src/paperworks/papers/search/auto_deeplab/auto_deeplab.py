"""Auto-DeepLab: the cell of a segmentation network and the resolutions that it passes through are found together, by gradient descent.

Liu, Chen, Schroff, Adam, Hua, Yuille and Fei-Fei, "Auto-DeepLab: Hierarchical Neural Architecture Search for Semantic Image Segmentation",
CVPR 2019 (arXiv 1901.02985).

The space is a trellis: in each of L layers a cell may halve, keep or double the resolution, between strides 4 and 32. One network, the supernet,
holds all paths with weights beta, and in each cell all operations with weights alpha. Weights are learned on one half of the training images,
alpha and beta on the other; then the most probable path and the strongest operations are kept, and that network is trained afresh.

An architecture is text: the strides of its path, and its cell in NASNet's words, ``sep3(b1)+atr5(p)``, where h is the last cell's output, p
the one before, b0 the first block. Where it is left open, ``build`` gives the supernet, and training begins with a search. The released code has
the found network only; stem, sizes (sides of 32 k + 1 pixels, aligned corners) and strided cells follow it. In the supernet ours where the paper
is silent: 3x3 for the convolutions of stride 2, one cell for all arrows into a node, batch norm without scale, as in DARTS.

Shapes: B batch, C image channels, K classes, I O channels in and out, H W pixels, h w cells of a map, L layers, E edges of a cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import cos, pi
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import stochastic_depth

from paperworks.errors import InputError
from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.contract import normalise
from paperworks.tasks.segmentation import IGNORE
from paperworks.tasks.trials import Search, Trials

STRIDES = (4, 8, 16, 32)
"""Of the trellis; a level is a position in it."""
OPERATIONS = ("zero", "max3", "avg3", "skip", "sep3", "sep5", "atr3", "atr5")
"""Section 3.1: no connection, pooling, identity, depthwise-separable, and atrous convolutions with rate 2."""
FOUND = "4 4 4 8 16 8 16 16 32 32 16 8; atr5(p)+sep3(h), sep3(p)+atr3(h), sep3(b1)+sep3(p), sep5(b2)+sep5(b0), sep5(b1)+atr5(b3)"
"""Figure 3, in the order of the released code."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, and how it is searched for."""

    architecture: str = FOUND
    """Path and cell; empty: searched for."""
    filters: int = 20
    """F. A block at stride s has F s / 4 filters."""
    stem: tuple[int, ...] = (64, 64, 128)
    """Filters of the three convolutions in front, of which the first and the third halve the resolution (section 5.2)."""
    features: int = 256
    """Of the pyramid pooling and of the decoder."""
    low_features: int = 48
    """To which the decoder reduces the map of stride 4."""
    drop_path: float = 0.2
    """ScheduledDropPath of the last cell at the end of training."""
    layers: int = 12
    """L of the trellis."""
    blocks: int = 5
    """B, blocks of a cell."""
    search_filters: int = 8
    """F while searching."""
    architecture_lr: float = 3e-3
    """Of alpha and beta, which are learned by Adam."""
    alone: float = 0.5
    """Share of the search in which only weights are learned."""


# Architectures as text


class Term(NamedTuple):
    """An operation on a state of a cell: 0 is h, 1 is p, 2 the first block's result, and so on."""

    operation: str
    state: int


class Architecture(NamedTuple):
    """Levels of the path, layer by layer, and the two terms of each of the cell's blocks."""

    path: list[int]
    blocks: list[tuple[Term, Term]]


def parsed(text: str) -> Architecture:
    """What an architecture's text says.

    Raises:
        InputError: it is not written as architectures are.
    """
    strides, _, cell = text.partition(";")
    names = [str(stride) for stride in STRIDES]
    if not strides.split() or not set(strides.split()) <= set(names):
        raise InputError(f"{strides!r} is no path; it is written as 4 8 16 8, of the strides {', '.join(names)}")
    path = [names.index(stride) for stride in strides.split()]
    if any(abs(to - at) > 1 for at, to in pairwise([0, *path])):
        raise InputError(
            f"{strides!r} is no path; it begins with 4 or 8, and from one cell to the next the stride doubles, halves or stays"
        )
    blocks: list[tuple[Term, Term]] = []
    for block in cell.split(","):
        terms = [_term(term.strip(), len(blocks)) for term in block.split("+")]
        if len(terms) != 2:
            raise InputError(f"{block.strip()!r} is no block of a cell; one is written as sep3(h)+atr5(p)")
        blocks.append((terms[0], terms[1]))
    return Architecture(path, blocks)


def _term(text: str, block: int) -> Term:
    found, states = re.fullmatch(r"(\w+)\((\w+)\)", text), ["h", "p", *(f"b{i}" for i in range(block))]
    if not found or found[1] not in OPERATIONS[1:] or found[2] not in states:
        raise InputError(f"{text!r} in block {block} of a cell is none of {', '.join(OPERATIONS[1:])} of {', '.join(states)}, as sep3(h)")
    return Term(found[1], states.index(found[2]))


def written(architecture: Architecture) -> str:
    """The text of an architecture."""
    name = lambda state: "hp"[state] if state < 2 else f"b{state - 2}"  # noqa: E731
    blocks = ("+".join(f"{term.operation}({name(term.state)})" for term in block) for block in architecture.blocks)
    return f"{' '.join(str(STRIDES[level]) for level in architecture.path)}; {', '.join(blocks)}"


def paths(layers: int) -> Iterator[list[int]]:
    """All paths through the trellis. The stem ends at stride 4, so that the first cell has stride 4 or 8."""
    if not layers:
        yield []
    for path in paths(layers - 1) if layers else ():
        at = path[-1] if path else 0
        yield from ([*path, to] for to in (at - 1, at, at + 1) if 0 <= to < len(STRIDES))


# Operations (section 3.1)


def conv(before: int, after: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, or takes 2 n + 1 cells to n + 1."""
    return nn.Conv2d(before, after, kernel, stride, dilation * (kernel - 1) // 2, dilation, groups, bias=False)


def norm(width: int, affine: bool = True) -> nn.BatchNorm2d:
    """The batch norm of cells; without scale and shift in the supernet, where they would undo alpha."""
    return nn.BatchNorm2d(width, eps=1e-3, affine=affine)


def squeezed(before: int, after: int, kernel: int = 1, stride: int = 1, affine: bool = True) -> nn.Sequential:
    """ReLU, convolution, norm: what brings a cell's input to its width."""
    return nn.Sequential(nn.ReLU(), conv(before, after, kernel, stride), norm(after, affine))


def operation(name: str, width: int, stride: int = 1, affine: bool = True) -> nn.Module:
    """One of ``OPERATIONS`` but zero. Separable convolutions are applied twice, the stride is in the first.

    Of an atrous convolution the released code takes every second cell before a rate of 1, which is a rate of 2 with the stride.
    """
    kind, kernel = name[:3], int(name[3:]) if name[3:].isdigit() else 1
    match kind:
        case "sep":
            steps: list[nn.Module] = []
            for step in (stride, 1):
                steps += [nn.ReLU(), conv(width, width, kernel, step, groups=width), conv(width, width, 1), norm(width, affine)]
            return nn.Sequential(*steps)
        case "atr":
            return nn.Sequential(nn.ReLU(), conv(width, width, kernel, stride, dilation=2), norm(width, affine))
        case "max":
            return nn.MaxPool2d(3, stride, padding=1)
        case "avg":
            return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    return nn.Identity() if stride == 1 else squeezed(width, width, stride=stride, affine=affine)


def resized(x: Float[Tensor, "B I h w"], size: Sequence[int]) -> Float[Tensor, "B I h2 w2"]:
    """Bilinear; the corners stay where they are."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def doubled(x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B I h2 w2"]:
    """From n cells to 2 n - 1."""
    return resized(x, [2 * n - 1 for n in x.shape[2:]])


def pyramid_pooling(width: int, rates: Sequence[int], features: int) -> ASPP:
    """1x1, 3x3 with each of the rates, and the mean over the image, side by side; then 1x1 to ``features``."""
    pooling = ASPP(width, list(rates), features)
    pooling.project[3] = nn.Dropout(0.1)  # torchvision's is 0.5
    return pooling


def stem_of(channels: int, widths: Sequence[int]) -> nn.ModuleList:
    """Up to stride 2, and on to stride 4; the ReLU after each is the next one's."""
    first, second, third = widths
    half = nn.Sequential(conv(channels, first, 3, 2), norm(first), nn.ReLU(), conv(first, second, 3), norm(second))
    return nn.ModuleList([half, squeezed(second, third, 3, 2)])


def initialise(network: nn.Module) -> None:
    """He's initialisation; for grouped convolutions too it counts what one output sees."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def several(image: Tensor, training: bool) -> None:
    """Refuse to learn from one image: the mean over it is one value for each feature, which a batch norm cannot scale."""
    if training and len(image) < 2:
        raise InputError("auto_deeplab pools over whole images: set batch_size to 2 or more")


# The network of one architecture


class Shape(NamedTuple):
    """Channels and level of a map; -1 is stride 2."""

    channels: int
    level: int


class Cell(nn.Module):
    """Two inputs to one output: the blocks' results, side by side.

    Args:
        blocks: what is done.
        h: the last cell's output.
        p: that of the cell before, resized to h.
        level: of the output. If it is finer than h, h is enlarged first; if it is coarser, operations on h and p have stride 2.
        width: filters of a block.
        drop_path: chance that an operation's result is left out for an image at the end of training.
    """

    def __init__(self, blocks: Sequence[tuple[Term, Term]], h: Shape, p: Shape, level: int, width: int, drop_path: float) -> None:
        super().__init__()
        self.blocks, self.drop_path, self.now = blocks, drop_path, 0.0
        self.enlarge, self.resize = level < h.level, p.level != min(h.level, level)
        self.squeeze, self.align = squeezed(h.channels, width), squeezed(p.channels, width)
        stride = 2 if level > h.level else 1
        self.operations = nn.ModuleList(
            nn.ModuleList(operation(term.operation, width, stride if term.state < 2 else 1) for term in block) for block in blocks
        )
        self.made = Shape(len(blocks) * width, level)

    def advance(self, share: float) -> None:
        """ScheduledDropPath: the chance grows over training."""
        self.now = self.drop_path * share

    def forward(self, h: Float[Tensor, "B I h w"], p: Float[Tensor, "B I2 h2 w2"]) -> Float[Tensor, "B O h3 w3"]:
        """The blocks one after the other; each adds two states."""
        h = doubled(h) if self.enlarge else h
        p = resized(p, h.shape[2:]) if self.resize else p
        states = [self.squeeze(h), self.align(p)]
        for block, (left, right) in zip(self.blocks, self.operations):  # pyright: ignore[reportGeneralTypeIssues]
            one, other = block
            states.append(self._dropped(one, left(states[one.state])) + self._dropped(other, right(states[other.state])))
        return torch.cat(states[2:], 1)

    def _dropped(self, term: Term, x: Tensor) -> Tensor:
        if not self.training or not self.now or term.operation == "skip":
            return x
        return stochastic_depth(x, self.now, "row")


class AutoDeepLab(nn.Module):
    """Stem, the cells of the path, atrous pyramid pooling, and the decoder of DeepLabv3+ (section 5.2)."""

    grid = Grid(32, offset=1)

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        path, blocks = parsed(config.architecture)
        self.stem = stem_of(channels, config.stem)
        shapes = [Shape(config.stem[1], -1), Shape(config.stem[2], 0)]
        self.cells = nn.ModuleList()
        for layer, level in enumerate(path, start=1):
            width = config.filters * 2**level
            cell = Cell(blocks, shapes[-1], shapes[-2], level, width, config.drop_path * layer / len(path))
            self.cells.append(cell)
            shapes.append(cell.made)
        # The decoder's fine map is the last one of stride 4 before the path leaves it: cell 3 of the found network.
        self.fine = 1 + next((i for i, level in enumerate(path) if level), len(path))
        last = shapes[-1]
        self.pooling = pyramid_pooling(last.channels, [rate * 16 // STRIDES[last.level] for rate in (6, 12, 18)], config.features)
        self.low = _decoding(shapes[self.fine].channels, config.low_features, 1)
        first = _decoding(config.features + config.low_features, config.features, 3)
        self.decoder = nn.Sequential(first, _decoding(config.features, config.features, 3))
        self.head = nn.Conv2d(config.features, classes, 1)
        initialise(self)

    def maps(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The stem's two, and what each cell gives."""
        half = self.stem[0](image)
        maps = [half, self.stem[1](half)]
        for cell in self.cells:
            maps.append(cell(maps[-1], maps[-2]))
        return maps

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits`` B K H W, interpolated from stride 4."""
        several(image, self.training)
        maps = self.maps(image)
        low = self.low(maps[self.fine])
        top = resized(self.pooling(F.relu(maps[-1])), low.shape[2:])
        scores = self.head(self.decoder(torch.cat([top, low], 1)))
        return {"logits": resized(scores, image.shape[2:])}

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def _decoding(before: int, after: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(conv(before, after, kernel), nn.BatchNorm2d(after), nn.ReLU())


# The supernet (section 4.1)


class Mixed(nn.Module):
    """All operations at once (equation 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.operations = nn.ModuleList()
        for name in OPERATIONS[1:]:
            pool = name in ("max3", "avg3")
            self.operations.append(
                nn.Sequential(operation(name, width), norm(width, False)) if pool else operation(name, width, affine=False)
            )

    def forward(self, x: Float[Tensor, "B I h w"], alpha: Float[Tensor, " 8"]) -> Float[Tensor, "B I h w"]:
        """The sum weighted by alpha, to which zero adds nothing."""
        return torch.stack([weight * step(x) for weight, step in zip(alpha[1:], self.operations)]).sum(0)


class Node(nn.Module):
    """A layer of the trellis at one resolution: arrows from the layer before it, and one cell for what comes by any of them (equation 6).

    Args:
        sources: level -> channels of the maps that arrows come from.
        before: channels of the map of this level two layers ago; None: there was none, and no edge begins there.
        level: of this node.
        width: filters of a block.
        blocks: how many.
    """

    def __init__(self, sources: Mapping[int, int], before: int | None, level: int, width: int, blocks: int) -> None:
        super().__init__()
        self.level, self.count = level, blocks
        self.arrows = nn.ModuleDict()
        for source, channels in sources.items():
            finer = source < level
            self.arrows[str(source)] = squeezed(channels, width, 3 if finer else 1, 2 if finer else 1, affine=False)
        self.before = squeezed(before, width, affine=False) if before else None
        self.edges = nn.ModuleDict({
            str(row): Mixed(width) for row, (_, state) in enumerate(edges(blocks)) if state != 1 or before
        })  # fmt: skip

    def forward(self, sources: Mapping[int, Tensor], before: Tensor | None, beta: Tensor, alpha: Tensor) -> Float[Tensor, "B O h w"]:
        """The cell's outputs for the arrows, weighted by beta. All arrows pass the cell together, as one batch."""
        inputs = []
        for source, arrow in self.arrows.items():
            x = sources[int(source)]
            inputs.append(arrow(doubled(x) if int(source) > self.level else x))
        states: list[Any] = [torch.cat(inputs), None]
        if self.before is not None and before is not None:
            states[1] = self.before(before).repeat(len(inputs), 1, 1, 1)
        for block in range(self.count):
            into = [(row, state) for row, (end, state) in enumerate(edges(self.count)) if end == block and str(row) in self.edges]
            states.append(torch.stack([self.edges[str(row)](states[state], alpha[row]) for row, state in into]).sum(0))
        weights = torch.stack([beta[int(source), self.level - int(source) + 1] for source in self.arrows])
        outputs = torch.cat(states[2:], 1).unflatten(0, (len(inputs), -1))
        return torch.einsum("n,nbchw->bchw", weights, outputs)


def edges(blocks: int) -> list[tuple[int, int]]:
    """(block, state) of a cell's edges: block i may take h, p and the i blocks before it."""
    return [(block, state) for block in range(blocks) for state in range(2 + block)]


class Supernet(nn.Module):
    """All architectures of the space in one network.

    Attributes:
        alpha: E 8, of the operations on each edge, before the softmax; all cells have the same.
        beta: L 4 3, of the arrows that leave a level for a finer, the same and a coarser one, before the softmax.
    """

    grid = Grid(32, offset=1)

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        self.blocks = config.blocks
        self.stem = stem_of(channels, config.stem)
        self.nodes = nn.ModuleList()
        before: dict[int, int] = {}
        last = {0: config.stem[2]}
        for layer in range(config.layers):
            row = nn.ModuleDict()
            for level in range(min(layer + 2, len(STRIDES))):
                sources = {at: last[at] for at in (level - 1, level, level + 1) if at in last}
                row[str(level)] = Node(sources, before.get(level), level, config.search_filters * 2**level, config.blocks)
            self.nodes.append(row)
            before, last = last, {int(level): config.blocks * config.search_filters * 2 ** int(level) for level in row}
        self.poolings = nn.ModuleDict({
            str(level): nn.Sequential(nn.ReLU(), pyramid_pooling(width, [96 // STRIDES[level]], width), nn.Conv2d(width, classes, 1))
            for level, width in last.items()
        })  # fmt: skip
        initialise(self)
        self.alpha = nn.Parameter(1e-3 * torch.randn(len(edges(config.blocks)), len(OPERATIONS)))
        self.beta = nn.Parameter(1e-3 * torch.randn(config.layers, len(STRIDES), 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits`` B K H W, the sum over the resolutions of the last layer."""
        several(image, self.training)
        alpha, beta = self.alpha.softmax(-1), transitions(self.beta)
        before: dict[int, Tensor] = {}
        last: dict[int, Tensor] = {0: self.stem[1](self.stem[0](image))}
        for row, leaving in zip(self.nodes, beta):
            assert isinstance(row, nn.ModuleDict)
            new = {int(level): node(last, before.get(int(level)), leaving, alpha) for level, node in row.items()}
            before, last = last, new
        scores = [resized(self.poolings[str(level)](x), image.shape[2:]) for level, x in last.items()]
        return {"logits": torch.stack(scores).sum(0)}

    def architecture_parameters(self) -> list[nn.Parameter]:
        """Those that the second half of the images decides."""
        return [self.alpha, self.beta]

    def decoded(self) -> str:
        """The architecture that is most probable now (section 4.3)."""
        with torch.no_grad():
            return written(Architecture(viterbi(transitions(self.beta)), strongest(self.alpha.softmax(-1), self.blocks)))


def transitions(beta: Float[Tensor, "L 4 3"]) -> Float[Tensor, "L 4 3"]:
    """Softmax over the arrows that leave a node (equation 7): finer, same, coarser. Nodes at the border have two."""
    allowed = torch.ones(beta.shape[1:], dtype=torch.bool, device=beta.device)
    allowed[0, 0] = allowed[-1, -1] = False
    return beta.masked_fill(~allowed, -torch.inf).softmax(-1)


def viterbi(probabilities: Float[Tensor, "L 4 3"]) -> list[int]:
    """The path whose product of probabilities is the largest, as levels."""
    table = probabilities.double().log().tolist()
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for leaving in table:
        reached: dict[int, tuple[float, list[int]]] = {}
        for at, (value, path) in best.items():
            for arrow, gain in enumerate(leaving[at]):
                to = at + arrow - 1
                if 0 <= to < len(leaving) and (to not in reached or value + gain > reached[to][0]):
                    reached[to] = value + gain, [*path, to]
        best = reached
    return max(best.values())[1]


def strongest(alpha: Float[Tensor, "E 8"], blocks: int) -> list[tuple[Term, Term]]:
    """For each block the two states whose strongest operation other than zero is the strongest, with that operation."""
    chosen: list[tuple[Term, Term]] = []
    value, index = alpha[:, 1:].max(-1)
    rows = [(block, state, float(v), OPERATIONS[1 + int(i)]) for (block, state), v, i in zip(edges(blocks), value, index)]
    for block in range(blocks):
        ranked = sorted((row for row in rows if row[0] == block), key=lambda row: -row[2])
        one, other = (Term(name, state) for _, state, _, name in ranked[:2])
        chosen.append((one, other))
    return chosen


# The search (section 4.2)


def find(config: Config, trials: Trials) -> Mapping[str, Any]:
    """Train the supernet once, and read the architecture from it.

    The items are split in two halves; groups stay whole. Weights are learned on one; after ``alone`` of the search, alpha and beta in turn with
    them on the other (first order: what a change of alpha would do to the weights is left out).
    """
    data, how, device = trials.data, trials.recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(trials.seed)
    mean, std = (torch.tensor(values, device=device) for values in (data.spec.mean, data.spec.std))
    halves = halved(data.train, generator)

    with torch.random.fork_rng():
        torch.manual_seed(trials.seed)
        network = Supernet(data.spec.channels, len(data.spec.classes), config).to(device).train()
        architecture = network.architecture_parameters()
        own = {id(p) for p in architecture}
        weights = [p for p in network.parameters() if id(p) not in own]
        optimizers = (
            torch.optim.SGD(weights, how.lr, how.momentum, weight_decay=how.weight_decay),
            torch.optim.Adam(architecture, config.architecture_lr, weight_decay=1e-3),
        )

        def update(half: int) -> None:
            items = [halves[half][i] for i in torch.randint(len(halves[half]), (how.batch_size,), generator=generator).tolist()]
            batch = data.collate([data.training_sample(item, how, network.grid, generator) for item in items])
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            terms = loss(network(normalise(batch["image"], mean, std)), batch)
            network.zero_grad(set_to_none=True)
            terms["loss"].backward()
            optimizers[half].step()

        rounds = max(1, round(trials.steps / (2 - config.alone)))  # a round in which both are learned takes two steps
        for done in range(rounds):
            optimizers[0].param_groups[0]["lr"] = 0.001 + (how.lr - 0.001) * (1 + cos(pi * done / rounds)) / 2
            update(0)
            if done >= config.alone * rounds:
                update(1)
            trials.stepped(round((done + 1) / rounds * trials.steps))
    return {"architecture": network.decoded()}


def halved(items: Sequence[Any], generator: torch.Generator) -> tuple[list[Any], list[Any]]:
    """Every second group of the items, in an order of chance, and the others."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, "group", None) or item.name, []).append(item)
    order = [list(groups)[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    one, other = ([item for name in order[start::2] for item in groups[name]] for start in (0, 1))
    return one, other


# Training


def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy over the pixels."""
    return {"loss": F.cross_entropy(output["logits"], batch["mask"], ignore_index=IGNORE)}


LAPTOP = Config(
    filters=8, stem=(16, 16, 32), features=48, low_features=12, drop_path=0.0, layers=5, blocks=2, search_filters=4, architecture_lr=0.02,
)  # fmt: skip
VARIANTS: Mapping[str, Config] = {
    "s": Config(),
    "m": Config(filters=32),
    "l": Config(filters=48),
    "small": replace(LAPTOP, architecture=""),
    "test": replace(
        LAPTOP,
        architecture="4 8 16 8; atr3(p)+sep3(h), max3(h)+skip(b0)",
        filters=2,
        stem=(4, 4, 8),
        features=8,
        low_features=4,
        drop_path=0.2,
    ),
}
"""Table 2 by its names, and ours."""


def recipe(config: Config) -> Recipe:
    """Of the supernet section 5.1, of networks section 5.2; ours for those that fit a laptop."""
    ours = config.stem[0] < 64
    if not config.architecture:
        batch, patch = (4, 96) if ours else (2, 321)
        return Recipe(optimizer="sgd", lr=0.025, weight_decay=3e-4, warmup=0, batch_size=batch, patch=patch, clip=None)
    if ours:
        return Recipe(lr=3e-3, weight_decay=1e-2, batch_size=8, patch=96, average=0.98)
    return Recipe(optimizer="sgd", lr=0.05, weight_decay=4e-5, schedule="poly", warmup=0, batch_size=8, patch=769, clip=None)


def build(spec: Spec, config: Config) -> nn.Module:
    """The network of the architecture; the supernet where it is open."""
    kind: Callable[[int, int, Config], nn.Module] = AutoDeepLab if config.architecture else Supernet
    return kind(spec.channels, len(spec.classes), config)


PAPER = Paper(
    variants=VARIANTS,
    build=build,
    recipe=recipe,
    auto=("small",),
    loss=lambda config: loss,
    search=Search(trials=lambda config: 0 if config.architecture else 1, find=find),
)
