"""Auto-Keras: Bayesian optimisation decides how a trained network is to grow, and every child begins with its parent's function.

Jin, Song and Hu, "Auto-Keras: An Efficient Neural Architecture Search System", KDD 2019 (arXiv 1806.10282).

Each candidate is a trained network that was edited (deeper, wider, an additive or a concatenating skip) so that its outputs stay the same, which
saves training time. A Gaussian process over the edit distance between networks predicts which edit pays, and a search over the tree of edits
finds the network that it should try next.

The distance is that of the paper and release 0.4.0 (keras-team/autokeras) for layers of one kernel size; today's autokeras is another method.
Different from the release: an edit keeps the function exactly (no noise is added; doubled units differ by unequal shares of the weights that
leave them), networks are chains of 3x3 convolutions with skips, and query points go through the same Bourgain embedding as the trained ones.
What a search finds is trained once more from new weights.

Architectures are text: ``16p, 16p, 32; 1+3, 1|3`` has three layers of 16, 16 and 32 filters, a maximum pooling after the first two, and layer 1's output
both added to and concatenated with layer 3's input.

Shapes: B batch, C image channels, K classes, H W pixels, D channels, n m networks, s subsets.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import Varied
from paperworks.tasks.base import Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side
from paperworks.tasks.trials import Search, Trial, Trials


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, and how it is searched for."""

    architecture: str = ""
    """What was found, or is wanted; empty: searched for."""
    start: str = "64p, 64p, 64p"
    """The first network of a search."""
    candidates: int = 12
    """Networks that a search trains, the first included."""
    beta: float = 2.576
    """How much a large deviation counts in the acquisition function."""
    skip_weight: float = 1.0
    """lambda of the edit distance."""
    coldest: float = 1e-4
    """T_low, at which the tree search ends."""
    cooling: float = 0.9
    """r, factor on its temperature."""
    largest: int = 2**25
    """Parameters of the convolutions of a network that may be tried: the memory's limit."""
    image_size: int | None = None
    """Side of the images; None takes it from the data."""


# Architectures


class Skip(NamedTuple):
    """The output of layer ``start`` (from 1 on) joins the input of layer ``end``."""

    start: int
    end: int
    kind: Literal["+", "|"]


@dataclass(frozen=True)
class Plan:
    """Layers in order, whether a pooling follows each, and the skip connections."""

    widths: tuple[int, ...]
    pools: tuple[bool, ...]
    skips: tuple[Skip, ...] = ()

    def __str__(self) -> str:
        layers = ", ".join(f"{w}{'p' if p else ''}" for w, p in zip(self.widths, self.pools))
        return layers + "".join(f"{', ' if i else '; '}{s.start}{s.kind}{s.end}" for i, s in enumerate(self.skips))

    def concatenated(self, layer: int) -> list[int]:
        """Layers whose outputs lie behind the main input of a layer."""
        return [s.start for s in self.skips if s.end == layer and s.kind == "|"]

    def size(self, channels: int = 3) -> int:
        """Weights of the convolutions."""
        before = (channels, *self.widths)
        main = sum(9 * (before[i] + sum(self.widths[u - 1] for u in self.concatenated(i + 1))) * w for i, w in enumerate(self.widths))
        return main + sum(self.widths[s.start - 1] * before[s.end - 1] for s in self.skips if s.kind == "+")


def parsed(text: str) -> Plan:
    """The plan of a network.

    Raises:
        InputError: it is not written as networks are.
    """
    body, _, tail = text.partition(";")
    layers = [re.fullmatch(r"([1-9]\d*)(p?)", part.strip()) for part in body.split(",")]
    skips = [re.fullmatch(r"(\d+)([+|])(\d+)", part.strip()) for part in tail.split(",")] if tail.strip() else []
    if not all(layers) or not all(skips):
        raise InputError(f"{text!r} is no network; one is written as 16p, 16p, 32; 1+3, 1|3: widths, p for a pooling, skips")
    found = tuple(Skip(int(s[1]), int(s[3]), "+" if s[2] == "+" else "|") for s in skips if s)
    if any(not 1 <= s.start <= s.end - 2 <= len(layers) - 2 for s in found) or len(set(found)) < len(found):
        raise InputError(f"{text!r}: a skip goes from a layer to the input of a layer at least two behind it, and each is there once")
    return Plan(tuple(int(x[1]) for x in layers if x), tuple(bool(x[2]) for x in layers if x), found)


class Network(nn.Module):
    """Convolutions of 3x3, norms and ReLUs in a chain, with skips into the inputs of later layers.

    Attributes:
        widths: channels of the last layer.
        strides: input pixels from one of its cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, plan: Plan) -> None:
        super().__init__()
        self.grid, self.plan = Grid(fixed=image_size), plan
        self.layers, self.adds = nn.ModuleList(), nn.ModuleDict()
        before = (channels, *plan.widths)
        for i, width in enumerate(plan.widths, 1):
            inputs = before[i - 1] + sum(before[u] for u in plan.concatenated(i))
            conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
        for start, end, kind in plan.skips:
            if kind == "+":
                self.adds[f"{start}_{end}"] = nn.Conv2d(before[start], before[end - 1], 1, bias=False)
        self.embedding = plan.widths[-1]
        self.widths, self.strides = (self.embedding,), (2 ** sum(plan.pools),)
        self.head = nn.Linear(self.embedding, classes)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The last layer's map, alone."""
        outputs = [image]
        for i, layer in enumerate(self.layers, 1):
            x, more = outputs[-1], []
            for start, end, kind in self.plan.skips:
                if end == i:
                    pooled = 2 ** sum(self.plan.pools[start : end - 1])
                    skipped = F.max_pool2d(outputs[start], pooled) if pooled > 1 else outputs[start]
                    if kind == "+":
                        x = x + self.adds[f"{start}_{end}"](skipped)
                    else:
                        more.append(skipped)
            x = layer(torch.cat([x, *more], 1) if more else x)
            outputs.append(F.max_pool2d(x, 2) if self.plan.pools[i - 1] else x)
        return [outputs[-1]]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The average over the last map."""
        return self.pyramid(image)[0].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


# Network morphism (section 3): edits that keep the function


class Edit(NamedTuple):
    """``deep``: a layer is inserted behind ``first``; ``wide``: ``first`` gets twice its filters; ``add``, ``concat``: a skip to ``second``."""

    kind: Literal["deep", "wide", "add", "concat"]
    first: int
    second: int = 0


def edited(plan: Plan, edit: Edit) -> Plan:
    """The plan after an edit."""
    at = edit.first
    if edit.kind == "wide":
        return replace(plan, widths=(*plan.widths[: at - 1], 2 * plan.widths[at - 1], *plan.widths[at:]))
    if edit.kind == "deep":
        skips = tuple(Skip(s.start + (s.start > at), s.end + (s.end > at), s.kind) for s in plan.skips)
        widths, pools = (*plan.widths[:at], plan.widths[at - 1], *plan.widths[at:]), (*plan.pools[:at], False, *plan.pools[at:])
        return Plan(widths, pools, skips)
    return replace(plan, skips=(*plan.skips, Skip(at, edit.second, "+" if edit.kind == "add" else "|")))


def edits(plan: Plan, largest: int) -> list[Edit]:
    """Every edit that leaves the network small enough."""
    count = len(plan.widths)
    found = [Edit(kind, i) for kind in ("deep", "wide") for i in range(1, count + 1)]
    for kind, sign in (("add", "+"), ("concat", "|")):
        pairs = itertools.combinations(range(1, count + 1), 2)
        found += [Edit(kind, u, v) for u, v in pairs if v >= u + 2 and Skip(u, v, sign) not in plan.skips]  # pyright: ignore[reportArgumentType]
    return [edit for edit in found if edited(plan, edit).size() <= largest]


@torch.no_grad()
def morph(parent: Network, child: Network, edit: Edit, generator: torch.Generator) -> None:
    """Weights for ``child``, the parent after ``edit``, with which it computes the same in evaluation mode.

    New layers are the identity (inputs are not negative, so the ReLU changes nothing), new skips are zero. Of a doubled filter both copies
    compute the same, and the weights that read them are split between the two in shares of chance, so that training tells them apart.
    """
    state = {name: value.clone() for name, value in parent.state_dict().items()}
    plan, at = parent.plan, edit.first
    if edit.kind == "deep":
        moved = {}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            key, _, leaf = rest.partition(".")
            if part == "layers":
                name = f"layers.{int(key) + (int(key) >= at)}.{leaf}"
            elif part == "adds":
                start, end = map(int, key.split("_"))
                name = f"adds.{start + (start > at)}_{end + (end > at)}.{leaf}"
            moved[name] = value
        state = moved
        fresh = child.layers[at]
        nn.init.dirac_(fresh[0].weight)  # pyright: ignore
        fresh[1].weight.fill_(math.sqrt(1 + fresh[1].eps))  # pyright: ignore
        state |= {f"layers.{at}.{name}": value for name, value in fresh.state_dict().items()}
    elif edit.kind == "wide":
        _widen(state, plan, at, generator)
    elif edit.kind == "add":
        name = f"adds.{edit.first}_{edit.second}.weight"
        state[name] = torch.zeros_like(child.state_dict()[name])
    else:
        name = f"layers.{edit.second - 1}.0.weight"
        old = state[name]
        state[name] = torch.cat([old, old.new_zeros(len(old), plan.widths[at - 1], 3, 3)], 1)
    child.load_state_dict(state)


def _widen(state: dict[str, Tensor], plan: Plan, at: int, generator: torch.Generator) -> None:
    """Double the filters of layer ``at`` in everything that makes or reads them (the edit reaches through sums and concatenations)."""
    width = plan.widths[at - 1]

    def twice(name: str) -> None:
        state[name] = torch.cat([state[name]] * 2)

    def split(name: str, begin: int) -> None:
        """Inputs ``begin`` to ``begin + width`` of a weight become two, each with a share."""
        weight = state[name]
        share = 0.3 + 0.4 * torch.rand(width, generator=generator).to(weight).reshape(-1, *[1] * (weight.ndim - 2))
        before, own, after = weight[:, :begin], weight[:, begin : begin + width], weight[:, begin + width :]
        state[name] = torch.cat([before, own * share, own * (1 - share), after], 1)

    for leaf in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        twice(f"layers.{at - 1}.{leaf}")
    for start, end, kind in plan.skips:
        if kind == "+":
            if end == at + 1:  # it is added to the doubled map
                twice(f"adds.{start}_{end}.weight")
            if start == at:
                split(f"adds.{start}_{end}.weight", 0)
    for layer in range(at + 1, len(plan.widths) + 1):
        begins = list(itertools.accumulate([plan.widths[layer - 2], *(plan.widths[u - 1] for u in plan.concatenated(layer))], initial=0))
        sources = [layer - 1, *plan.concatenated(layer)]
        for begin, source in reversed(list(zip(begins, sources))):  # from behind, so that the places in front stay
            if source == at:
                split(f"layers.{layer - 1}.0.weight", begin)
    if at == len(plan.widths):
        split("head.weight", 0)


def inherit(parent: Network, path: Sequence[Edit], seed: int) -> Callable[[nn.Module], None]:
    """What gives a fresh network, ``parent`` after all edits of ``path``, the parent's function."""

    def begin(network: nn.Module) -> None:
        generator, last = torch.Generator().manual_seed(seed), parent
        channels, classes = parent.layers[0][0].in_channels, parent.head.out_features  # pyright: ignore
        for edit in path:
            grown = Network(channels, classes, parent.grid.fixed, edited(last.plan, edit))
            morph(last, grown, edit, generator)
            last = grown
        network.load_state_dict(last.state_dict())

    return begin


# The kernel (section 3.1)


def layers_distance(a: Plan, b: Plan) -> float:
    """Cost of turning the layers of one network into those of another, matched in order (equations 4 and 5)."""
    widths = np.array(a.widths)[:, None], np.array(b.widths)[None]
    match = np.abs(widths[0] - widths[1]) / np.maximum(*widths)
    table = np.add.outer(np.arange(len(a.widths) + 1.0), np.arange(len(b.widths) + 1.0))
    for i, j in np.ndindex(match.shape):
        table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + match[i, j])
    return float(table[-1, -1])


def skips_distance(a: Plan, b: Plan) -> float:
    """Cost of the skips, matched as cheaply as can be (Hungarian algorithm), and one for each that is left over (equations 6 and 7)."""

    def cost(s: Skip, t: Skip) -> float:
        if s.kind != t.kind:
            return 1.0
        lengths = s.end - s.start, t.end - t.start
        return (abs(s.start - t.start) + abs(lengths[0] - lengths[1])) / (max(s.start, t.start) + max(lengths))

    costs = np.array([[cost(s, t) for t in b.skips] for s in a.skips]).reshape(len(a.skips), len(b.skips))
    return float(costs[linear_sum_assignment(costs)].sum()) + abs(len(a.skips) - len(b.skips))


def edit_distance(a: Plan, b: Plan, skip_weight: float = 1.0) -> float:
    """How much must be edited to get from one network to the other (equation 3)."""
    return layers_distance(a, b) + skip_weight * skips_distance(a, b)


class Process:
    """A Gaussian process over networks: kernel exp(-rho(d)^2), where rho is the distance after an embedding into a Euclidean space.

    Edit distances alone do not make a positive semi-definite kernel. Bourgain's embedding does: coordinates are distances to subsets of the
    known networks, of 1, 2, 4, ... members.
    """

    def __init__(self, plans: Sequence[Plan], values: Sequence[float], *, skip_weight: float, seed: int = 0, noise: float = 1e-3) -> None:
        self.plans, self.skip_weight = list(plans), skip_weight
        chance = np.random.default_rng(seed)
        count = len(self.plans)
        scales = range(max(1, math.ceil(math.log2(count)) + 1))
        self.subsets = [chance.choice(count, min(2**i, count), replace=False) for i in scales for _ in range(len(scales) + 2)]
        self.points = self.embedded(self.plans)
        self.mean, self.scale = float(np.mean(values)), max(float(np.std(values)), 1e-6)
        self.factor = cho_factor(self.kernel(self.points, self.points) + noise * np.eye(count), lower=True)
        self.weights = cho_solve(self.factor, (np.asarray(values) - self.mean) / self.scale)

    def embedded(self, plans: Sequence[Plan]) -> Float[np.ndarray, "n s"]:
        """Coordinates of networks."""
        distances = np.array([[edit_distance(a, b, self.skip_weight) for b in self.plans] for a in plans])
        return np.stack([distances[:, subset].min(1) for subset in self.subsets], 1) / math.sqrt(len(self.subsets))

    @staticmethod
    def kernel(a: Float[np.ndarray, "n s"], b: Float[np.ndarray, "m s"]) -> Float[np.ndarray, "n m"]:
        """How alike networks are, from 0 to 1."""
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(2))

    def predict(self, plans: Sequence[Plan]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Mean and standard deviation of what the networks will be worth."""
        across = self.kernel(self.embedded(plans), self.points)
        variance = 1 - (across * cho_solve(self.factor, across.T).T).sum(1)
        return self.mean + self.scale * across @ self.weights, self.scale * np.sqrt(np.clip(variance, 0, None))


# The search (section 3.2)


class Choice(NamedTuple):
    """A network that should be tried, from which trained one it grows, and how."""

    plan: Plan
    parent: int
    path: tuple[Edit, ...]


def acquire(process: Process, plans: Sequence[Plan], values: Sequence[float], config: Config, chance: np.random.Generator) -> Choice:
    """Algorithm 1: the network of the highest upper confidence bound mu + beta sigma, by a search over the tree of edits.

    Best-first as A*, with the annealing's chance that a worse child is followed too; the trained networks are the roots.
    """
    counter = itertools.count()
    queue = [(-value, next(counter), Choice(plan, i, ())) for i, (plan, value) in enumerate(zip(plans, values))]
    heapq.heapify(queue)
    seen = {str(plan) for plan in plans}
    best, bound, temperature = None, -math.inf, 1.0
    while queue and (temperature > config.coldest or best is None):
        temperature *= config.cooling
        _, _, node = heapq.heappop(queue)
        children = []
        for edit in edits(node.plan, config.largest):
            plan = edited(node.plan, edit)
            if str(plan) not in seen:
                seen.add(str(plan))
                children.append(Choice(plan, node.parent, (*node.path, edit)))
        if not children:
            continue
        mean, deviation = process.predict([child.plan for child in children])
        for child, worth in zip(children, (mean + config.beta * deviation).tolist()):
            if worth > bound or math.exp((worth - bound) / temperature) > chance.random():
                heapq.heappush(queue, (-worth, next(counter), child))
            if worth > bound:
                best, bound = child, worth
    if best is None:
        raise InputError(f"no edit of {config.start!r} stays below largest={config.largest}; take a smaller start or a larger limit")
    return best


def at_random(plans: Sequence[Plan], config: Config, chance: np.random.Generator) -> Choice:
    """What the process is compared with: any edit of any trained network."""
    while True:
        parent = int(chance.integers(len(plans)))
        possible = edits(plans[parent], config.largest)
        if possible:
            edit = possible[int(chance.integers(len(possible)))]
            plan = edited(plans[parent], edit)
            if str(plan) not in set(map(str, plans)):
                return Choice(plan, parent, (edit,))


def grown(config: Config, trials: Trials, *, guided: bool = True, inherited: bool = True) -> list[Trial]:
    """Update, generation, observation, again and again: all networks that were trained, in order.

    ``guided`` and ``inherited`` take the two ideas out: edits at random, weights from scratch.
    """
    chance = np.random.default_rng(trials.seed)
    done = trials.run([{"architecture": config.start}])
    while len(done) < config.candidates:
        plans, values = [parsed(str(t.settings["architecture"])) for t in done], [t.value for t in done]
        if guided:
            process = Process(plans, values, skip_weight=config.skip_weight, seed=trials.seed)
            choice = acquire(process, plans, values, config, chance)
        else:
            choice = at_random(plans, config, chance)
        parent = done[choice.parent].network
        assert isinstance(parent, Network)
        begin = [inherit(parent, choice.path, trials.seed)] if inherited else None
        done += trials.run([{"architecture": str(choice.plan)}], begin=begin)
    return done


def find(config: Config, trials: Trials) -> Mapping[str, Any]:
    """The best network that was grown."""
    best = max(grown(config, trials), key=lambda trial: trial.value)
    return {"architecture": best.settings["architecture"]}


VARIANTS: Mapping[str, Config] = {
    "paper": Config(),
    "small": Config(start="16p, 16p, 16p", largest=2**18),
    "test": Config(architecture="6p, 8, 8p, 8; 1+3, 1|4, 2|4, 2+4"),
}


def recipe(config: Config) -> Recipe:
    """Adam with flips and crops, for short trainings."""
    return Recipe(lr=3e-3, weight_decay=0.02, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))


def build(spec: Spec, config: Config) -> Network:
    """The network for a data set; the first of the search where none is named."""
    side, plan = int(config.image_size or image_side(spec)), parsed(config.architecture or config.start)
    if side < 2 ** sum(plan.pools):
        raise InputError(f"images of {side} pixels cannot be pooled {sum(plan.pools)} times; take another architecture")
    return Network(spec.channels, len(spec.classes), side, plan)


PAPER = Paper(
    variants=VARIANTS,
    build=build,
    recipe=recipe,
    auto=("small",),
    search=Search(trials=lambda config: 0 if config.architecture else config.candidates, find=find),
)
