"""NAS: a recurrent controller writes a network token by token and learns by REINFORCE from the accuracy that the network reaches.

Zoph and Le, "Neural Architecture Search with Reinforcement Learning", ICLR 2017 (arXiv 1611.01578).

A description of a network is a sentence of varying length, so a recurrent network can write it; its accuracy cannot be differentiated, so the
writer learns by policy gradient. Skip connections are drawn by attention over the layers so far; recurrent cells are written as trees.

There is no official release of the search. Chosen here where the paper is silent: features are averaged over the map before the classifier;
smaller maps get their zeros around them; the memory of a cell is that of a leaf; the baseline decays by 0.9. Different: one controller instead of
100 asynchronous ones, the last accuracy of a child instead of the best of its last five epochs, and recurrent cells read the rows
of an image instead of words. The networks that the paper found are drawn in figures only, and are not rebuilt here.

Architectures are text. Layers: ``3x5x36`` has 36 filters of height 3 and width 5, ``/2`` is its stride, ``@1+2`` its inputs (none: the image).
Trees: ``add tanh, mult relu, mult sigmoid; add relu 0 1`` has two leaves and a root, and injects the memory into leaf 0 by addition and ReLU;
leaf 1 becomes the new memory.

Shapes: B batch, C image channels, K classes, H W pixels, D channels or hidden units, N sentences, T rows of an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import Varied
from paperworks.tasks.base import Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side
from paperworks.tasks.trials import Search, Trials

COMBINATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "mult": torch.mul}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The controller (section 4.1)."""

    architecture: str = ""
    """What was found, or is wanted; empty: searched for."""
    candidates: int = 12
    """Networks that a search trains; the paper: 12,800."""
    per_update: int = 4
    """m, of them for one step of the controller; the paper: 8."""
    controller_lr: float = 6e-4
    decay: float = 0.9
    """Of the baseline."""
    image_size: int | None = None
    """Side of the images; None takes it from the data."""


@dataclass(frozen=True, kw_only=True)
class Config(SearchConfig):
    """Convolutional networks: what the controller chooses from (sections 3.1 to 3.3)."""

    layers: int = 6
    """At the end of the schedule."""
    first_layers: int = 6
    """At its beginning."""
    grow_by: int = 2
    grow_every: int = 1600
    """Candidates between two steps of the depth schedule."""
    sides: tuple[int, ...] = (1, 3, 5, 7)
    """Heights, and widths."""
    filters: tuple[int, ...] = (24, 36, 48, 64)
    strides: tuple[int, ...] = (1,)
    skips: bool = True
    """Connections are chosen; without, every layer reads the one before it."""
    pool_after: tuple[int, ...] = ()
    """Numbers of layers that a 2x2 maximum follows."""


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(SearchConfig):
    """Recurrent cells (section 3.4): trees over the row of an image and the last hidden state."""

    base: int = 2
    """Leaves of the tree; the paper: 8."""
    hidden: int = 64


# Architectures as text


class Layer(NamedTuple):
    """A convolution and the layers that it reads, counted from 1; none: the image."""

    height: int
    width: int
    filters: int
    stride: int
    inputs: tuple[int, ...]


def parsed(text: str) -> list[Layer]:
    """The layers of a convolutional network.

    Raises:
        InputError: it is not written as networks are.
    """
    layers: list[Layer] = []
    for part in (p.strip() for p in text.split(",")):
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\d+))?(?:@(\d+(?:\+\d+)*))?", part)
        if not found:
            raise InputError(f"{part!r} is no layer; one is written as 3x5x36/2@1+2: height, width, filters, stride, layers that it reads")
        height, width, filters, stride = (int(v or 1) for v in found.groups()[:4])
        inputs = tuple(map(int, found[5].split("+"))) if found[5] else ()
        if any(not 1 <= j <= len(layers) for j in inputs):
            raise InputError(f"{part!r} is layer {len(layers) + 1} and can only read layers before it, from 1 on")
        if not (height % 2 and width % 2 and filters and stride):
            raise InputError(f"{part!r}: heights and widths are odd, filters and strides at least 1")
        layers.append(Layer(height, width, filters, stride, inputs))
    return layers


def written(layers: Iterable[Layer]) -> str:
    """The text of a convolutional network."""
    text = []
    for h, w, n, stride, inputs in layers:
        text.append(f"{h}x{w}x{n}" + (f"/{stride}" if stride > 1 else "") + (f"@{'+'.join(map(str, inputs))}" if inputs else ""))
    return ", ".join(text)


class Tree(NamedTuple):
    """A recurrent cell: combination and activation of each node (leaves first, the root last) and of the injection, and where memory goes."""

    nodes: list[tuple[str, str]]
    inject: tuple[str, str]
    into: int
    memory: int


def parsed_tree(text: str) -> Tree:
    """The tree of a recurrent cell.

    Raises:
        InputError: it is not written as trees are.
    """
    words = [part.split() for part in re.split("[,;]", text)]
    *nodes, last = words
    leaves = (len(nodes) + 1) // 2
    known = all(len(n) == 2 and n[0] in COMBINATIONS and n[1] in ACTIVATIONS for n in (*nodes, last[:2]))
    if (
        not known
        or leaves & (leaves - 1)
        or len(nodes) != 2 * leaves - 1
        or len(last) != 4
        or not set(last[2:]) <= set(map(str, range(leaves)))
    ):
        raise InputError(f"{text!r} is no recurrent cell; one with two leaves is 'add tanh, mult relu, mult sigmoid; add relu 0 1'")
    return Tree([(a, b) for a, b in nodes], (last[0], last[1]), int(last[2]), int(last[3]))


def written_tree(tree: Tree) -> str:
    """The text of a recurrent cell."""
    return ", ".join(f"{a} {b}" for a, b in tree.nodes) + f"; {tree.inject[0]} {tree.inject[1]} {tree.into} {tree.memory}"


# Networks


def concatenated(maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
    """Side by side in depth, smaller maps with zeros around them (section 3.3)."""
    height, width = (max(m.shape[axis] for m in maps) for axis in (2, 3))
    padded = []
    for m in maps:
        down, right = height - m.shape[2], width - m.shape[3]
        padded.append(F.pad(m, (right // 2, right - right // 2, down // 2, down - down // 2)) if down or right else m)
    return torch.cat(padded, 1) if len(padded) > 1 else padded[0]


class ConvNet(nn.Module):
    """Layers that read any of those before them; what no layer reads goes to the classifier.

    Attributes:
        widths: channels of the map that the classifier averages.
        strides: input pixels from one of its cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size)
        self.plan = parsed(config.architecture) if config.architecture else plain(config)
        self.pool_after = config.pool_after
        self.layers = nn.ModuleList()
        sides: list[int] = []
        for i, (height, width, filters, stride, inputs) in enumerate(self.plan, 1):
            before = sum(self.plan[j - 1].filters for j in inputs) or channels
            conv = nn.Conv2d(before, filters, (height, width), stride, (height // 2, width // 2), bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU()))
            side = -(-max((sides[j - 1] for j in inputs), default=image_size) // stride)
            sides.append(-(-side // 2) if i in config.pool_after else side)
        read = {j for layer in self.plan for j in layer.inputs}
        self.unread = [i for i in range(1, len(self.plan) + 1) if i not in read]
        self.embedding = sum(self.plan[i - 1].filters for i in self.unread)
        self.widths = (self.embedding,)
        self.strides = (round(image_size / max(sides[i - 1] for i in self.unread)),)
        self.head = nn.Linear(self.embedding, classes)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The map before the classifier, alone."""
        outputs: list[Tensor] = []
        for i, (layer, plan) in enumerate(zip(self.layers, self.plan), 1):
            x = layer(concatenated([outputs[j - 1] for j in plan.inputs]) if plan.inputs else image)
            outputs.append(F.max_pool2d(x, 2, ceil_mode=True) if i in self.pool_after else x)
        return [concatenated([outputs[i - 1] for i in self.unread])]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The average over the map."""
        return self.pyramid(image)[0].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def plain(config: Config) -> list[Layer]:
    """What is built where nothing was searched for: a chain of 3x3 convolutions (or the nearest side) of the second number of filters."""
    side = min(config.sides, key=lambda s: abs(s - 3))
    number, stride = config.filters[min(1, len(config.filters) - 1)], max(config.strides)
    return [Layer(side, side, number, stride if i % 2 else 1, (i,) if i else ()) for i in range(config.layers)]


class TreeCell(nn.Module):
    """A recurrent cell that a tree describes (figure 5). Leaves have weights for input and hidden state; the nodes above only combine."""

    def __init__(self, inputs: int, hidden: int, tree: Tree) -> None:
        super().__init__()
        self.tree, self.leaves = tree, (len(tree.nodes) + 1) // 2
        self.input = nn.Linear(inputs, self.leaves * hidden)
        self.hidden = nn.Linear(hidden, self.leaves * hidden, bias=False)

    def forward(self, x: Float[Tensor, "B I"], h: Float[Tensor, "B D"], c: Float[Tensor, "B D"]) -> tuple[Tensor, Tensor]:
        """The next hidden state and memory."""
        level, memory = [], c
        for i, (from_x, from_h) in enumerate(zip(self.input(x).chunk(self.leaves, 1), self.hidden(h).chunk(self.leaves, 1))):
            combine, activate = self.tree.nodes[i]
            before = COMBINATIONS[combine](from_x, from_h)
            if i == self.tree.memory:
                memory = before  # in front of the activation
            value = ACTIVATIONS[activate](before)
            if i == self.tree.into:
                combine, activate = self.tree.inject
                value = ACTIVATIONS[activate](COMBINATIONS[combine](value, c))
            level.append(value)
        nodes = iter(self.tree.nodes[self.leaves :])
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2])
            level = [ACTIVATIONS[activate](COMBINATIONS[combine](a, b)) for (a, b), (combine, activate) in zip(pairs, nodes)]
        return level[0], memory


class RowReader(nn.Module):
    """A found cell at work: it reads an image row by row, and the last hidden state goes to the classifier."""

    def __init__(self, channels: int, classes: int, image_size: int, config: RecurrentConfig) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size)
        self.embedding = config.hidden
        tree = parsed_tree(config.architecture) if config.architecture else figure_5(config.base)
        self.cell = TreeCell(channels * image_size, config.hidden, tree)
        self.head = nn.Linear(config.hidden, classes)

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The hidden state after the last row."""
        h = c = image.new_zeros(len(image), self.embedding)
        for row in image.unbind(2):
            h, c = self.cell(row.flatten(1), h, c)
        return h

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def figure_5(base: int = 2) -> Tree:
    """The example of section 3.4; with more leaves, as often as they need it."""
    leaves = [("add", "tanh"), ("mult", "relu")] * (base // 2)
    return Tree([*leaves, *[("mult", "sigmoid")] * (base - 1)], ("add", "relu"), 0, 1)


# The controller (sections 3.1 to 3.4)


class Sentence(NamedTuple):
    """Decisions of one kind of softmax each, and for each layer which of those before it are read."""

    tokens: list[int]
    skips: list[list[bool]]


class Controller(nn.Module):
    """A two-layer LSTM that makes one decision after the other; each is embedded as the input of the next.

    Args:
        kinds: how many choices each decision of a layer (or node) has.
        skips: an anchor follows each layer, at which the layers before it are chosen by attention.
        tail: decisions after the last layer, for recurrent cells.
    """

    def __init__(self, kinds: Sequence[int], *, skips: bool, tail: Sequence[int] = (), hidden: int = 35) -> None:
        super().__init__()
        self.kinds, self.tail, self.hidden = tuple(kinds), tuple(tail), hidden
        self.cells = nn.ModuleList(nn.LSTMCell(hidden, hidden) for _ in range(2))
        self.first = nn.Parameter(torch.empty(hidden))
        self.heads = nn.ModuleList(nn.Linear(hidden, n) for n in (*kinds, *tail))
        self.embeddings = nn.ModuleList(nn.Embedding(n, hidden) for n in (*kinds, *tail))
        self.skips = skips
        if skips:
            self.anchor = nn.Parameter(torch.empty(hidden))  # what the anchor gives to the next step
            self.previous, self.current = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
            self.v = nn.Linear(hidden, 1, bias=False)
        for value in self.parameters():
            nn.init.uniform_(value, -0.08, 0.08)

    def forward(
        self, layers: int, given: Sentence | None = None, generator: torch.Generator | None = None, uniform: bool = False
    ) -> tuple[Sentence, Float[Tensor, ""]]:
        """A sentence about ``layers`` layers (or ``given``), and the logarithm of its probability.

        ``uniform`` draws every decision with equal chances: random search.
        """
        state: list[Any] = [None, None]
        x, total = self.first, torch.zeros(())
        tokens: list[int] = []
        skips: list[list[bool]] = []
        anchors: list[Tensor] = []

        def step(x: Tensor) -> Tensor:
            for i, cell in enumerate(self.cells):
                state[i] = cell(x[None] if x.ndim == 1 else x, state[i])
                x = state[i][0]
            return x[0]

        def decide(kind: int) -> None:
            nonlocal x, total
            log = self.heads[kind](step(x)).log_softmax(0)
            chances = torch.ones_like(log) if uniform else log.detach().exp()
            token = given.tokens[len(tokens)] if given else int(torch.multinomial(chances, 1, generator=generator))
            tokens.append(token)
            total = total + log[token]
            x = self.embeddings[kind](torch.tensor(token))

        for i in range(layers):
            for kind in range(len(self.kinds)):
                decide(kind)
            if self.skips:
                anchors.append(step(x))
                reads: list[bool] = []
                if i:  # P(layer j is an input of layer i), equation in section 3.3
                    scores = self.v(torch.tanh(self.previous(torch.stack(anchors[:-1])) + self.current(anchors[-1])))[:, 0]
                    chances = torch.full((i,), 0.5) if uniform else scores.detach().sigmoid()
                    reads = given.skips[i] if given else (torch.rand(i, generator=generator) < chances).tolist()
                    total = total - F.binary_cross_entropy_with_logits(scores, torch.tensor(reads).float(), reduction="sum")
                skips.append(reads)
                x = self.anchor
        for kind in range(len(self.tail)):
            decide(len(self.kinds) + kind)
        return Sentence(tokens, skips), total


def reinforce(
    controller: Controller,
    reward: Callable[[list[Sentence]], Sequence[float]],
    number: int,
    *,
    layers: Callable[[int], int],
    per_update: int,
    lr: float,
    decay: float,
    generator: torch.Generator,
) -> tuple[list[Sentence], list[float]]:
    """Williams's rule with a baseline (section 3.2); all sentences that were drawn, with their rewards.

    The gradient is the mean over the m sentences of (R - b) times that of log P; b is the moving average of the rewards before.
    """
    optimizer = torch.optim.Adam(controller.parameters(), lr)
    drawn: list[Sentence] = []
    rewards: list[float] = []
    baseline: float | None = None
    while len(drawn) < number:
        new = [controller(layers(len(drawn)), generator=generator) for _ in range(min(per_update, number - len(drawn)))]
        found = [float(r) for r in reward([sentence for sentence, _ in new])]
        mean = sum(found) / len(found)
        b = mean if baseline is None else baseline
        loss = torch.stack([(b - r) * log for r, (_, log) in zip(found, new)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = mean if baseline is None else decay * baseline + (1 - decay) * mean
        drawn += [sentence for sentence, _ in new]
        rewards += found
    return drawn, rewards


def controller_of(config: Config | RecurrentConfig) -> Controller:
    """The controller for a space."""
    if isinstance(config, Config):
        kinds = (len(config.sides), len(config.sides), len(config.filters), *([len(config.strides)] if len(config.strides) > 1 else []))
        return Controller(kinds, skips=config.skips)
    return Controller(
        (len(COMBINATIONS), len(ACTIVATIONS)), skips=False, tail=(len(COMBINATIONS), len(ACTIVATIONS), config.base, config.base)
    )


def depth(config: Config | RecurrentConfig, done: int) -> int:
    """Layers of the next candidate when ``done`` were tried (section 3.3: more layers as training goes on); nodes of a tree."""
    if isinstance(config, RecurrentConfig):
        return 2 * config.base - 1
    return min(config.first_layers + config.grow_by * (done // config.grow_every), config.layers)


def spelled(sentence: Sentence, config: Config | RecurrentConfig) -> str:
    """The architecture that a sentence stands for."""
    tokens = sentence.tokens
    if isinstance(config, RecurrentConfig):
        pairs = [(list(COMBINATIONS)[a], list(ACTIVATIONS)[b]) for a, b in zip(tokens[:-2:2], tokens[1:-2:2])]
        return written_tree(Tree(pairs[:-1], pairs[-1], tokens[-2], tokens[-1]))
    step = 4 if len(config.strides) > 1 else 3
    layers = []
    for i, (h, w, n, *stride) in enumerate(tokens[at : at + step] for at in range(0, len(tokens), step)):
        inputs = tuple(j + 1 for j, read in enumerate(sentence.skips[i]) if read) if config.skips else (i,) if i else ()
        layers.append(
            Layer(config.sides[h], config.sides[w], config.filters[n], config.strides[stride[0]] if stride else config.strides[0], inputs)  # pyright: ignore[reportGeneralTypeIssues]
        )
    return written(layers)


def find(config: Config | RecurrentConfig, trials: Trials) -> Mapping[str, Any]:
    """The best architecture that the controller wrote. Its reward is the accuracy cubed; one that it writes again is not trained again."""
    generator = torch.Generator().manual_seed(trials.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trials.seed)
        controller = controller_of(config)
    known: dict[str, float] = {}

    def reward(sentences: list[Sentence]) -> list[float]:
        names = [spelled(sentence, config) for sentence in sentences]
        new = list(dict.fromkeys(name for name in names if name not in known))
        known.update({name: t.value for name, t in zip(new, trials.run([{"architecture": name} for name in new]))})
        return [known[name] ** 3 for name in names]

    reinforce(
        controller, reward, config.candidates, layers=lambda done: depth(config, done), per_update=config.per_update,
        lr=config.controller_lr, decay=config.decay, generator=generator,
    )  # fmt: skip
    return {"architecture": max(known, key=lambda name: known[name])}


VARIANTS: Mapping[str, Config | RecurrentConfig] = {
    "v1": Config(layers=15, image_size=32, candidates=12_800, per_update=8),
    "v2": Config(layers=20, strides=(1, 2, 3), image_size=32, candidates=12_800, per_update=8),
    "small": Config(
        layers=5, first_layers=3, grow_by=1, grow_every=4, filters=(16, 24, 32, 48), strides=(1, 2), controller_lr=0.01,
    ),
    "rows": RecurrentConfig(controller_lr=0.01),
    "test": Config(architecture="3x3x8/2, 1x3x8@1, 5x3x8/2@1+2, 3x1x6", layers=4),
}  # fmt: skip


def recipe(config: Config | RecurrentConfig) -> Recipe:
    """Children of the paper: SGD of 0.1 with momentum, decay 1e-4. Those for data at hand: ours, for short trainings."""
    if config.image_size is None:
        return Recipe(lr=3e-3, weight_decay=0.02, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))
    view = Varied(area=(0.7, 1.0), chance=0, erase=0)
    return Recipe(optimizer="sgd", lr=0.1, weight_decay=1e-4, batch_size=128, patch=config.image_size, augment=view)


def build(spec: Spec, config: Config | RecurrentConfig) -> nn.Module:
    """The network for a data set."""
    side = int(config.image_size or image_side(spec))
    if isinstance(config, RecurrentConfig):
        return RowReader(spec.channels, len(spec.classes), side, config)
    return ConvNet(spec.channels, len(spec.classes), side, config)


PAPER = Paper(
    variants=VARIANTS,
    build=build,
    recipe=recipe,
    auto=("small",),
    search=Search(trials=lambda config: 0 if config.architecture else config.candidates, find=find),
)
