"""CoPE: positions are counted in what the context says counts, and need not be whole numbers.

Golovneva, Wang, Weston and Sukhbaatar, "Contextual Position Encoding: Learning to Count What's Important", 2024 (arXiv 2405.18719).

For each query a gate says of every earlier token whether it counts. The position of a key is the sum of the gates from it up to the query, and its
embedding is interpolated between those of the whole numbers around. So attention can ask for the third last sentence, or how often something
was increased; with all gates open what is left is relative position.

As in the official code (facebookresearch/RAM, projects/cope): gates from the scaled product of query and key, closed by the mask after the sigmoid;
logits interpolated, not embeddings; their sum with the content's divided by the root of d; embeddings from zero, shared by the heads of a layer;
the decoder of its counting task, norms after the sums, output tied to the embeddings. Different from it: a source and a target stand behind one
another, as the archive's task of translation has it, and padding between them is closed; the relative positions that it is compared with are its
own with all gates open, a table from zero in each layer (officially one for all layers, from random numbers). A separate key for the gates, sharing
between layers, the sum with relative positions and RoPE are not here.

Shapes: B batch, L symbols of the source, T of the target, N tokens that can be looked at, M the last of them that ask, V symbols known, D width,
A heads, d = D / A, P positions with an embedding of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.bpe import PAD
from paperworks.errors import InputError
from paperworks.nn.swap import swapped
from paperworks.papers.layers.agent_attention.trunks import attends
from paperworks.tasks.base import Grid, Layer, Output, Paper, Recipe, Spec
from paperworks.tasks.translation import AsTheyAre, greedy

Gates = Literal["keys", "values", "ones"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The decoder of the counting task (the official ``run.sh``)."""

    layers: int = 4
    width: int = 256
    """D; the hidden layer of the feed-forward part is four times as wide."""
    heads: int = 4
    dropout: float = 0.1
    position: Literal["cope", "relative", "absolute"] = "cope"
    """What says where a token stands: the paper's, or what it is compared with."""
    gates: Gates = "keys"
    """What CoPE's gates are made of besides the query."""
    positions: int = 513
    """P, from 0 on; what is farther takes the last. Of absolute positions there are as many as the longest text asks for."""


@dataclass(frozen=True, kw_only=True)
class Contextual:
    """CoPE as a layer of other networks."""

    gates: Gates = "keys"
    positions: int = 64
    """P; what is farther takes the last."""


class ContextualAttention(nn.Module):
    """Multi-head self-attention whose logits know contextual positions."""

    def __init__(self, width: int, heads: int, positions: int | None, gates: Gates = "keys") -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"a width of {width} is not divisible into {heads} heads")
        if positions is not None and positions < 2:
            raise InputError(f"positions={positions} leaves nothing to count; 2 or more do")
        self.heads, self.gates = heads, gates
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.positions = None if positions is None else nn.Parameter(torch.zeros(width // heads, positions))  # e[0] to e[P - 1]

    def split(self, z: Float[Tensor, "B M D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, B A M d."""
        q, k, v = rearrange(self.qkv(z), "b m (t a d) -> t b a m d", t=3, a=self.heads)
        return q, k, v

    def where(self, q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "#B 1 #M N"] | None) -> Float[Tensor, "B A M N"]:
        """p_ij, the position of key j for query i: the sum of the gates from j to the last token that i may see."""
        asked = {"keys": k, "values": v}.get(self.gates)
        g = torch.ones_like(q @ k.mT) if asked is None else (q @ asked.mT / q.shape[-1] ** 0.5).sigmoid()
        g = g.float()  # many small numbers are added up
        if mask is not None:
            g = g * mask  # after the sigmoid: what is closed counts nothing
        return g.flip(-1).cumsum(-1).flip(-1)

    def weights(self, q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "#B 1 #M N"] | None) -> Float[Tensor, "B A M N"]:
        """Attention: softmax of (q k + z(p)) over the root of d."""
        scores = q @ k.mT
        if self.positions is not None:
            scores = scores + interpolated(q @ self.positions, self.where(q, k, v, mask))
        scores = scores / q.shape[-1] ** 0.5
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)

    def attention(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B A N N"]:
        """The weight of each token (last axis) for each."""
        return self.weights(*self.split(z), None)

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Every token sees every other; positions are counted from the last one back."""
        q, k, v = self.split(z)
        return self.merge(self.weights(q, k, v, None) @ v)

    def merge(self, found: Float[Tensor, "B A M d"]) -> Float[Tensor, "B M D"]:
        """The heads' findings, projected."""
        return self.out(rearrange(found, "b a m d -> b m (a d)"))


def interpolated(z: Float[Tensor, "B A M P"], p: Float[Tensor, "B A M N"]) -> Float[Tensor, "B A M N"]:
    """Logits at fractional places of its last axis: between the whole numbers around, beyond the last the last. Gates learn by the share between."""
    p = p.clamp(max=z.shape[-1] - 1)
    below = p.detach().floor()
    share = p - below
    index = below.long()
    above = (index + 1).clamp(max=z.shape[-1] - 1)
    return (1 - share) * z.gather(-1, index) + share * z.gather(-1, above)


class DecoderLayer(nn.Module):
    """Attention and a feed-forward part, norms after the sums."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, absolute = config.width, config.position == "absolute"
        gates = "ones" if config.position == "relative" else config.gates
        self.attention = ContextualAttention(width, config.heads, None if absolute else config.positions, gates)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.hidden, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B M D"], past: tuple[Tensor, Tensor], mask: Bool[Tensor, "B 1 M N"]
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B M N"], tuple[Tensor, Tensor]]:
        """What becomes of ``x``, where it looked (mean over the heads), and the keys and values of all so far, B A N d."""
        q, k, v = self.attention.split(x)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        weights = self.attention.weights(q, k, v, mask)
        found = self.attention.merge(self.dropout(weights) @ v)
        x = self.norm1(x + self.dropout(found))
        y = self.output(self.dropout(F.relu(self.hidden(x))))
        return self.norm2(x + self.dropout(y)), weights.mean(1), (k, v)


class Decoder(nn.Module):
    """A language model that reads the source and goes on with the target, each token seeing those before it."""

    def __init__(self, config: Config, symbols: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.longest, width = Grid(fixed=size[0]), size[1], config.width
        self.shape = (config.heads, width // config.heads)
        self.embedding = nn.Embedding(symbols, width)  # also the last layer
        absolute = config.position == "absolute"
        self.positions = nn.Parameter(torch.randn(sum(size), width) * width**-0.5) if absolute else None
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def read(self, symbols: Int[Tensor, "B M"], seen: Bool[Tensor, "B N"], past: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits B M V, where the last layer looked B M N, and keys and values of all ``seen``, of which ``symbols`` are the last."""
        m, n = symbols.shape[1], seen.shape[1]
        x = self.embedding(symbols)
        if self.positions is not None:
            x = x + self.positions[(seen.cumsum(1)[:, n - m :] - 1).clamp(min=0)]  # padding has no place
        x, looked, after = self.dropout(x), x, []
        own = torch.ones(m, n, dtype=torch.bool, device=symbols.device)
        # Padding sees itself, so that its softmax is over something.
        mask = (own.tril(n - m) & seen[:, None, None]) | (own.tril(n - m) & own.triu(n - m))
        for i, layer in enumerate(self.layers):
            x, looked, kept = layer(x, (past[2 * i], past[2 * i + 1]), mask)
            after += kept
        return F.linear(x, self.embedding.weight), looked, after

    def nothing(self, symbols: Int[Tensor, "B M"]) -> list[Tensor]:
        """Keys and values before anything is read."""
        empty = self.embedding.weight.new_zeros(symbols.shape[0], self.shape[0], 0, self.shape[1])
        return [empty] * (2 * len(self.layers))

    def forward(self, source: Int[Tensor, "B L"], target_in: Int[Tensor, "B T"] | None = None) -> Output:
        """Logits B T V of what follows each symbol of ``target_in``, all at once; without it of what is written greedily.

        ``attention`` (B T L) is that of the last layer to the source.
        """
        if target_in is None:
            target_in = greedy(self, source)
        both, length = torch.cat([source, target_in], 1), source.shape[1]
        logits, looked, _ = self.read(both, torch.cat([source != PAD, torch.ones_like(target_in, dtype=torch.bool)], 1), self.nothing(both))
        return {"logits": logits[:, length:], "attention": looked[:, length:, :length]}

    def begin(self, source: Int[Tensor, "B L"]) -> list[Tensor]:
        """Which tokens are no padding, and each layer's keys and values of the source."""
        seen = source != PAD
        return [seen, *self.read(source, seen, self.nothing(source))[2]]

    def step(self, symbol: Int[Tensor, " B"], state: list[Tensor]) -> tuple[Float[Tensor, "B V"], list[Tensor]]:
        """Logits of what follows ``symbol``; the keys and values of all before it are in ``state``."""
        seen = torch.cat([state[0], torch.ones_like(symbol[:, None], dtype=torch.bool)], 1)
        logits, _, after = self.read(symbol[:, None], seen, state[1:])
        return logits[:, 0], [seen, *after]


def put(network: nn.Module, config: Contextual) -> nn.Module:
    """CoPE in every self-attention, on top of what positions the network has; projections stay as the network made them.

    Raises:
        InputError: there is none.
    """

    def make(module: nn.Module) -> nn.Module:
        qkv, out = module.qkv, getattr(module, "out", None)
        assert isinstance(qkv, nn.Linear)
        layer = ContextualAttention(qkv.in_features, int(module.heads), config.positions, config.gates)  # pyright: ignore[reportArgumentType]
        layer.qkv = qkv
        if isinstance(out, nn.Linear):
            layer.out = out
        return layer

    return swapped(network, lambda m: attends(m) and not isinstance(m, ContextualAttention), make)


VARIANTS: Mapping[str, Config] = {
    "counting": Config(),
    "counting_relative": Config(position="relative"),
    "counting_absolute": Config(position="absolute"),
    "small": Config(layers=2, width=64, positions=48),
    "test": Config(layers=1, width=16, heads=2, dropout=0.0, positions=12),
}


def build(spec: Spec, config: Config) -> Decoder:
    """A network for the data set's symbols and longest texts."""
    first, second = spec.size
    return Decoder(config, len(spec.more["tokens"]), (first, second))


def recipe(config: Config) -> Recipe:
    """The counting task's learning rate and batch, officially without decay or clipping; a small decoder's own."""
    if config.width < 256:
        return Recipe(
            optimizer="adam", lr=2e-3, beta2=0.98, schedule="inverse_sqrt", warmup=0.1, batch_size=64, clip=1.0, average=0.99,
            augment=AsTheyAre(),
        )  # fmt: skip
    return Recipe(optimizer="adam", lr=7e-5, schedule="constant", warmup=0.0, batch_size=64, clip=None, augment=AsTheyAre())


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "counting"))
LAYERS: Mapping[str, Layer] = {"cope": Layer(slot="attention", config=Contextual(), put=put)}
