"""Graph convolution for rich documents. Liu, Gao, Zhang, Zhao, NAACL-HLT 2019 (industry), https://arxiv.org/abs/1903.11279.

What a piece of text on an invoice means depends on what stands around it. The pieces become the nodes of a fully connected graph whose edges
say how two boxes lie to each other; convolution over node-edge-node triplets gives each piece an embedding that knows its surroundings,
and a BiLSTM-CRF that is given it beside every token tags the fields. No official code. What the paper leaves open is decided here: tokens
are UTF-8 bytes with learned embeddings in place of word2vec; the MLPs have one hidden layer; distances are taken from middle to middle,
divided by the height of the first box as the other features are, and all five go through asinh, so that a page of fifty lines does not
drown the rest. In place of one matrix on a concatenation its blocks are applied apart, which is the same and spares N x N copies.

Shapes: B pages, N segments of a page, L tokens of a segment, T tags, D width of node, edge and triplet embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.documents import BOX, Vary, bytes_of

FEATURES = 5
"""Of an edge (eq. 1)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, which the paper does not publish, and its ablations and baselines."""

    embedding: int = 32
    """Of a token."""
    width: int = 128
    """D; both directions of a BiLSTM together have it too."""
    layers: int = 2
    """Graph convolutions."""
    context: Literal["graph", "document", "segment"] = "graph"
    """What a segment's tokens know of the page: the graph; all text before and behind them, in reading order (the paper's baseline II); or
    nothing (baseline I)."""
    edge_features: bool = True
    """Edges say how two boxes lie to each other; without them a page is a bag of texts."""
    attention: bool = True
    """Neighbours are weighted by what the triplet says; without it all alike."""
    multi_task: bool = True
    """Segments are classified too; only the graph's nodes can be."""
    dropout: float = 0.1


class BiLSTM(nn.Module):
    """One layer in both directions over sequences of unlike lengths."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width // 2, batch_first=True, bidirectional=True)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.ones_(bias.data[width // 2 : width])  # the gate that forgets begins open

    def forward(self, x: Float[Tensor, "M L E"], mask: Bool[Tensor, "M L"]) -> Float[Tensor, "M L D"]:
        """States of both directions; the mask is true up to each sequence's end, and states behind it are 0."""
        lengths = mask.sum(1).clamp_min(1).cpu()  # what fills a page up is read as one empty token, and hidden
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0] * mask[..., None]

    @staticmethod
    def ends(states: Float[Tensor, "M L D"], mask: Bool[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """The last state of each direction: forward at a sequence's end, backward at its beginning."""
        half = states.shape[2] // 2
        last = (mask.sum(1) - 1).clamp_min(0)[:, None, None].expand(-1, 1, half)
        return torch.cat([states[..., :half].gather(1, last)[:, 0], states[:, 0, half:]], -1)


def edge_features(box: Float[Tensor, "B 4 N"]) -> Float[Tensor, "B N N 5"]:
    """Eq. 1: r_ij = [x_ij, y_ij, w_i, h_j, w_j] / h_i of boxes (x, y, w, h), so that neither place nor scale of a page matters.

    Not symmetric: the first node's height is the unit.
    """
    x, y, w, h = box.unbind(1)
    h = h.clamp_min(1e-4)  # what fills a page up has none
    n = x.shape[1]
    features = [
        x[:, None, :] - x[:, :, None],
        y[:, None, :] - y[:, :, None],
        w[:, :, None].expand(-1, n, n),
        h[:, None, :].expand(-1, n, n),
        w[:, None, :].expand(-1, n, n),
    ]
    return (torch.stack(features, -1) / h[:, :, None, None]).asinh()


class GraphConvolution(nn.Module):
    """Triplets, attention, new nodes and new edges (eqs. 2 to 5)."""

    def __init__(self, config: Config, features: int, *, last: bool) -> None:
        super().__init__()
        d = config.width
        self.source = nn.Linear(d, d)  # with the next two: the first layer of the MLP on [t_i ; r_ij ; t_j]
        self.target = nn.Linear(d, d, bias=False)
        self.edge = nn.Linear(features, d, bias=False) if config.edge_features else None
        self.triplet = nn.Linear(d, d)
        self.attend = nn.Linear(d, 1, bias=False) if config.attention else None
        self.renew = nn.Linear(d, d) if config.edge_features and not last else None

    def forward(
        self, t: Float[Tensor, "B N D"], r: Float[Tensor, "B N N R"], nodes: Bool[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B N D"], Tensor]:
        """New nodes and edges; every node is a neighbour of every node, of itself too."""
        h = self.source(t)[:, :, None] + self.target(t)[:, None]
        if self.edge is not None:
            h = h + self.edge(r)
        h = self.triplet(h.relu())  # B N N D (eq. 2)
        scores = F.leaky_relu(self.attend(h))[..., 0] if self.attend is not None else torch.zeros_like(h[..., 0])
        a = scores.masked_fill(~nodes[:, None], -1e9).softmax(-1)  # eq. 4
        t = torch.einsum("bij,bijd->bid", a, h).relu()  # eq. 3
        return t, self.renew(h).relu() if self.renew is not None else r  # eq. 5


def crf_loss(
    emissions: Float[Tensor, "M L T"],
    tags: Int[Tensor, "M L"],
    mask: Bool[Tensor, "M L"],
    start: Float[Tensor, "T"],
    transitions: Float[Tensor, "T T"],
    end: Float[Tensor, "T"],
) -> Float[Tensor, "M"]:
    """-log p(tags) of a linear chain, whose normaliser is the sum over all paths (forward algorithm).

    A path's score is start + emissions + ``transitions[from, to]`` + end; the mask is true up to each sequence's end, and at its first place.
    """
    score = start + emissions[:, 0]
    for k in range(1, emissions.shape[1]):
        step = (score[:, :, None] + transitions).logsumexp(1) + emissions[:, k]
        score = torch.where(mask[:, k, None], step, score)
    normaliser = (score + end).logsumexp(1)
    own = (emissions.gather(2, tags[..., None])[..., 0] * mask).sum(1)
    own = own + (transitions[tags[:, :-1], tags[:, 1:]] * mask[:, 1:]).sum(1)
    final = tags.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    return normaliser - own - start[tags[:, 0]] - end[final]


def viterbi(
    emissions: Float[Tensor, "M L T"],
    mask: Bool[Tensor, "M L"],
    start: Float[Tensor, "T"],
    transitions: Float[Tensor, "T T"],
    end: Float[Tensor, "T"],
) -> Int[Tensor, "M L"]:
    """The best path of each sequence; 0 behind its end."""
    score, backs = start + emissions[:, 0], []
    stay = torch.arange(len(start), device=emissions.device)
    for k in range(1, emissions.shape[1]):
        best, back = (score[:, :, None] + transitions).max(1)
        score = torch.where(mask[:, k, None], best + emissions[:, k], score)
        backs.append(torch.where(mask[:, k, None], back, stay))
    path = [(score + end).argmax(1)]
    for back in reversed(backs):
        path.append(back.gather(1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1) * mask


class RichDocuments(nn.Module):
    """Segment embeddings, graph convolutions and the tagger (figure 3)."""

    def __init__(self, classes: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid()
        self.config = config
        tags, d = 2 * classes + 1, config.width
        graph = config.context == "graph"
        self.embedding = nn.Embedding(256, config.embedding)
        if graph:
            self.segment = BiLSTM(config.embedding, d)
            features = [FEATURES, *[d] * (config.layers - 1)]
            self.graph = nn.ModuleList(
                GraphConvolution(config, f, last=i == config.layers - 1) for i, f in enumerate(features[: config.layers])
            )
        if graph and config.multi_task:
            self.classify = nn.Linear(d, classes + 1)
        self.tagger = BiLSTM(config.embedding + d * graph, d)
        self.emit = nn.Linear(d, tags)
        self.start, self.end = (nn.Parameter(torch.empty(tags).uniform_(-0.1, 0.1)) for _ in range(2))
        self.transitions = nn.Parameter(torch.empty(tags, tags).uniform_(-0.1, 0.1))
        if graph and config.multi_task:
            self.log_variance = nn.Parameter(torch.zeros(2))  # u = log s^2 of both tasks
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, page: Float[Tensor, "B F N"]) -> Output:
        """Tag pages, whose layout ``tasks/documents.py`` describes.

        Returns:
            ``logits`` B N L T and, with the graph, ``segments`` B N K+1. In training what the loss needs besides: ``start``, ``transitions`` and
            ``end`` of the CRF and ``log_variance`` (2); in evaluation ``tags`` (B N L), the best path.
        """
        tokens = bytes_of(page)  # B N L
        b, n, length = tokens.shape
        mask = (tokens > 0).flatten(0, 1)
        x = self.dropout(self.embedding(tokens.flatten(0, 1)))  # BN L E
        output: Output = {}
        if self.config.context == "graph":
            t = BiLSTM.ends(self.segment(x, mask), mask).view(b, n, -1)
            r, nodes = edge_features(page[:, :BOX]), tokens[..., 0] > 0
            for layer in self.graph:
                t, r = layer(t, r, nodes)
            t = self.dropout(t)
            if self.config.multi_task:
                output["segments"] = self.classify(t)
            x = torch.cat([x, t.flatten(0, 1)[:, None].expand(-1, length, -1)], -1)
        states = self._whole_pages(x, mask, n) if self.config.context == "document" else self.tagger(x, mask)
        logits = self.emit(self.dropout(states))
        output["logits"] = logits.view(b, n, length, -1)
        chain = {"start": self.start, "transitions": self.transitions, "end": self.end}
        if not self.training:
            return output | {"tags": viterbi(logits, mask, **chain).view(b, n, length)}
        return output | chain | ({"log_variance": self.log_variance} if "segments" in output else {})

    def _whole_pages(self, x: Float[Tensor, "M L E"], mask: Bool[Tensor, "M L"], n: int) -> Float[Tensor, "M L D"]:
        """The tagger over all tokens of a page as one sequence, without the holes at the segments' ends."""
        m, length, e = x.shape
        whole = mask.reshape(-1, n * length)
        order = (torch.arange(n * length, device=x.device) + n * length * ~whole).argsort(1)[..., None]  # tokens first, in their order
        states = self.tagger(x.reshape(-1, n * length, e).gather(1, order.expand(-1, -1, e)), whole.gather(1, order[..., 0]))
        back = order.argsort(1).expand(-1, -1, states.shape[2])
        return states.gather(1, back).reshape(m, length, -1)


def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Tagging and classification, each weighted by its learned uncertainty: sum of L_i / (2 s_i^2) + log s_i (eq. 9), in u_i = log s_i^2."""
    tokens = bytes_of(batch["page"])
    nodes = tokens[..., 0] > 0
    mask = tokens[nodes] > 0
    longest = int(mask.sum(1).max())
    chain = (output[name] for name in ("start", "transitions", "end"))
    tagging = crf_loss(output["logits"][nodes][:, :longest], batch["tags"][nodes][:, :longest], mask[:, :longest], *chain).mean()
    if "segments" not in output:
        return {"loss": tagging}
    classification = F.cross_entropy(output["segments"][nodes], batch["segments"][nodes])
    losses, u = torch.stack([tagging, classification]), output["log_variance"]
    return {"loss": (0.5 * (-u).exp() * losses + 0.5 * u).sum(), "tagging": tagging.detach(), "classification": classification.detach()}


VARIANTS = {
    "paper": Config(embedding=128, width=256),
    "small": Config(embedding=32, width=64),
    "test": Config(embedding=8, width=8),
}


def recipe(config: Config) -> Recipe:
    """Adam. Rates and batches are ours, as the paper names none: with some dozens of pages many small steps are worth more than smooth ones."""
    lr = 1e-2 if config.width < VARIANTS["paper"].width else 3e-3
    return Recipe(optimizer="adam", lr=lr, schedule="cosine", batch_size=1, clip=1.0, augment=Vary())


def build(spec: Spec, config: Config) -> RichDocuments:
    """For as many fields as the data have."""
    return RichDocuments(len(spec.classes), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "paper"), loss=lambda config: loss)
