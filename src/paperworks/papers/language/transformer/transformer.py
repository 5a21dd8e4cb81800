"""Attention Is All You Need. Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, NIPS 2017, arXiv:1706.03762.

A sequence is turned into another without recurrence: encoder and decoder are stacks of attention and position-wise feed-forward layers. Every
position reaches every other in one step, all positions are trained in parallel, and sinusoids say where each one stands.

What differs from the authors' tensor2tensor: sinusoids are interleaved as section 3.5 writes them (the code puts all sines before all
cosines, with slightly other wavelengths), the decoder begins with a symbol ``<s>`` instead of a vector of zeros, dropout is where section 5.4
puts it (the code also drops attention weights and hidden units of the feed-forward layers), and label smoothing spreads over all symbols, the true one too.

Shapes: B batch, L symbols of the source, T of the target, V symbols known, d d_model, h heads, k = d / h the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.bpe import PAD
from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.translation import AsTheyAre, greedy


@dataclass(frozen=True, kw_only=True)
class Config:
    """A row of table 3."""

    layers: int = 6
    """N, of the encoder and of the decoder."""
    d_model: int = 512
    d_ff: int = 2048
    heads: int = 8
    dropout: float = 0.1
    """P_drop."""
    label_smoothing: float = 0.1


def attention(
    q: Float[Tensor, "B h T k"], k: Float[Tensor, "B h L k"], v: Float[Tensor, "B h L k"], mask: Bool[Tensor, "#B 1 #T L"]
) -> tuple[Float[Tensor, "B h T k"], Float[Tensor, "B h T L"]]:
    """Scaled dot-product attention (eq. 1) over what ``mask`` leaves open, and its weights.

    Products of independent components of variance 1 add up to variance d_k: divided by its root they stay where softmax has a gradient.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights @ v, weights


class MultiHeadAttention(nn.Module):
    """h attentions side by side, each on its own projections of width d / h (section 3.2.2)."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model, bias=False)  # W_i^Q of all heads, one below the other
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)  # W^O

    def split(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B h T k"]:
        """A part for each head."""
        return rearrange(x, "b t (h k) -> b h t k", h=self.heads)

    def remember(self, memory: Float[Tensor, "B L d"]) -> tuple[Float[Tensor, "B h L k"], Float[Tensor, "B h L k"]]:
        """Keys and values of what can be looked at."""
        return self.split(self.key(memory)), self.split(self.value(memory))

    def forward(
        self, x: Float[Tensor, "B T d"], k: Float[Tensor, "B h L k"], v: Float[Tensor, "B h L k"], mask: Bool[Tensor, "#B 1 #T L"]
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T L"]]:
        """What each position of ``x`` found, and where it looked (mean over the heads)."""
        found, weights = attention(self.split(self.query(x)), k, v, mask)
        return self.output(rearrange(found, "b h t k -> b t (h k)")), weights.mean(1)


class FeedForward(nn.Module):
    """max(0, x W_1 + b_1) W_2 + b_2 at each position (eq. 2)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d_model, d_ff)
        self.outer = nn.Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """Each position by itself."""
        return self.outer(self.inner(x).relu())


class AddNorm(nn.Module):
    """LayerNorm(x + Dropout(Sublayer(x))): the norm comes after the sum (sections 3.1 and 5.4)."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T d"], sublayer: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """``sublayer`` is what the sub-layer made of ``x``."""
        return self.norm(x + self.dropout(sublayer))


class EncoderLayer(nn.Module):
    """Self-attention, feed-forward."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config.d_model, config.heads)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)
        self.add_norms = nn.ModuleList(AddNorm(config.d_model, config.dropout) for _ in range(2))

    def forward(self, x: Float[Tensor, "B L d"], mask: Bool[Tensor, "B 1 1 L"]) -> Float[Tensor, "B L d"]:
        """Every position sees every other that is no padding."""
        first, second = self.add_norms
        x = first(x, self.self_attention(x, *self.self_attention.remember(x), mask)[0])
        return second(x, self.feed_forward(x))


class DecoderLayer(nn.Module):
    """Masked self-attention, attention to the encoder's output, feed-forward."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config.d_model, config.heads)
        self.cross_attention = MultiHeadAttention(config.d_model, config.heads)
        self.feed_forward = FeedForward(config.d_model, config.d_ff)
        self.add_norms = nn.ModuleList(AddNorm(config.d_model, config.dropout) for _ in range(3))

    def forward(
        self,
        y: Float[Tensor, "B T d"],
        past: tuple[Float[Tensor, "B h S k"], Float[Tensor, "B h S k"]],
        causal: Bool[Tensor, "1 1 T S"],
        memory: tuple[Float[Tensor, "B h L k"], Float[Tensor, "B h L k"]],
        mask: Bool[Tensor, "B 1 1 L"],
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T L"]]:
        """``past`` holds the keys and values of all positions so far, those of ``y`` among them. Gives where it looked in the source, too."""
        first, second, third = self.add_norms
        y = first(y, self.self_attention(y, *past, causal)[0])
        found, looked = self.cross_attention(y, *memory, mask)
        y = second(y, found)
        return third(y, self.feed_forward(y)), looked


class PositionalEncoding(nn.Module):
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos of the same (section 3.5); no position is too far."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.register_buffer("rate", 10_000 ** (-torch.arange(0, d_model, 2) / d_model), persistent=False)

    def forward(self, x: Float[Tensor, "B T d"], start: int = 0) -> Float[Tensor, "B T d"]:
        """``x`` with the encodings of the positions from ``start`` on added."""
        angle = torch.arange(start, start + x.shape[1], device=x.device)[:, None] * self.rate  # pyright: ignore[reportOperatorIssue]
        return x + torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(x.dtype)


class Transformer(nn.Module):
    """Figure 1."""

    def __init__(self, config: Config, symbols: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.grid = Grid(fixed=size[0])
        self.longest = size[1]
        self.embedding = nn.Embedding(symbols, config.d_model)  # one matrix for source, target and softmax (section 3.4)
        self.position = PositionalEncoding(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)

    def embed(self, symbols: Int[Tensor, "B T"], start: int = 0) -> Float[Tensor, "B T d"]:
        """Embeddings times the root of d_model, positions added, dropout on the sum."""
        return self.dropout(self.position(self.embedding(symbols) * math.sqrt(self.embedding.embedding_dim), start))

    def encode(self, source: Int[Tensor, "B L"]) -> tuple[Float[Tensor, "B L d"], Bool[Tensor, "B 1 1 L"]]:
        """What was read, and which of its positions are no padding."""
        mask = (source != PAD)[:, None, None]
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask)
        return x, mask

    def forward(self, source: Int[Tensor, "B L"], target_in: Int[Tensor, "B T"] | None = None) -> Output:
        """Logits B T V of what follows each symbol of ``target_in``, all at once; without it of what is written greedily.

        ``attention`` (B T L) is that of the last layer to the source.
        """
        if target_in is None:
            target_in = greedy(self, source)
        memory, mask = self.encode(source)
        y = self.embed(target_in)
        causal = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device=y.device).tril()[None, None]
        looked = memory
        for layer in self.decoder:
            y, looked = layer(y, layer.self_attention.remember(y), causal, layer.cross_attention.remember(memory), mask)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        return {"logits": F.linear(y, self.embedding.weight), "attention": looked}

    def begin(self, source: Int[Tensor, "B L"]) -> list[Tensor]:
        """The source's mask, and for each layer keys and values of the source and of what is written, which is nothing yet."""
        memory, mask = self.encode(source)
        state = [mask]
        for layer in self.decoder:
            key, value = layer.cross_attention.remember(memory)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            state += [key, value, key[:, :, :0], value[:, :, :0]]
        return state

    def step(self, symbol: Int[Tensor, " B"], state: list[Tensor]) -> tuple[Float[Tensor, "B V"], list[Tensor]]:
        """Logits of what follows ``symbol``; the keys and values of all before it are in ``state``."""
        y = self.embed(symbol[:, None], start=state[3].shape[2])
        out = state[:1]
        for i, layer in enumerate(self.decoder):
            memory, past = state[4 * i + 1 : 4 * i + 3], state[4 * i + 3 : 4 * i + 5]
            past = [torch.cat(both, 2) for both in zip(past, layer.self_attention.remember(y))]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            every = torch.ones(1, 1, 1, past[0].shape[2], dtype=torch.bool, device=y.device)
            y, _ = layer(y, past, every, memory, state[0])
            out += [*memory, *past]
        return F.linear(y[:, 0], self.embedding.weight), out


def smoothed(config: Config) -> Callable[[Output, Batch], dict[str, Tensor]]:
    """Cross-entropy with 1 - eps of the weight on the true symbol and eps spread over all of them (section 5.4)."""

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        logits, target = output["logits"].flatten(0, 1), batch["target"].flatten()
        return {"loss": F.cross_entropy(logits, target, ignore_index=PAD, label_smoothing=config.label_smoothing)}

    return loss


VARIANTS = {
    "base": Config(),
    "big": Config(d_model=1024, d_ff=4096, heads=16, dropout=0.3),
    "small": Config(layers=2, d_model=64, d_ff=256, heads=4),
    "test": Config(layers=1, d_model=16, d_ff=32, heads=2, dropout=0.0),
}
"""Table 3's base and big; ``small`` is for thousands of pairs, two cores and a minute."""


def build(spec: Spec, config: Config) -> Transformer:
    """A network for the data set's symbols and longest texts."""
    first, second = spec.size
    return Transformer(config, len(spec.more["tokens"]), (first, second))


def recipe(config: Config) -> Recipe:
    """Section 5: Adam, and eq. 3, whose 4,000 steps of warm-up are a share of the 100,000 (base) and 300,000 (big) that are planned.

    Instead of the last 5 or 20 checkpoints, ten minutes apart, a moving average over as many steps is kept for prediction. 900 pairs of about 28
    symbols are 25,000 on either side. ``small`` has a tenth of its steps, whatever their number, to warm up.
    """
    if config.d_model < 512:
        lr, warmup, average, batch = 2e-3, 0.1, 0.99, 64
    else:
        lr, warmup, average, batch = (config.d_model * 4000) ** -0.5, 0.04 if config.d_model == 512 else 0.013333333, 0.9998, 900
    return Recipe(
        optimizer="adam",
        lr=lr,
        momentum=0.9,
        beta2=0.98,
        eps=1e-9,
        schedule="inverse_sqrt",
        warmup=warmup,
        batch_size=batch,
        clip=None,
        average=average,
        augment=AsTheyAre(),
    )


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "base"), loss=smoothed)
