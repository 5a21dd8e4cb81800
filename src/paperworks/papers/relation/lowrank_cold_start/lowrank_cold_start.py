"""LLAE: a low-rank linear auto-encoder between what people did and what is known of them.

Li, Jing, Lu, Zhu, Yang and Huang, "From Zero-Shot Learning to Cold-Start Recommendation", AAAI 2019 (arXiv 1906.08511).

A new user has attributes but no behaviour, as an unseen class has attributes but no pictures. One matrix W encodes behaviour into attributes, its
transpose decodes attributes into behaviour; what W does beyond its first r singular vectors is punished, which takes out spurious pairs of an
attribute and an item, and a few entries of the encoder's input are dropped. The minimum is found by Sylvester equations, without gradient steps.

Official code (lijin118/LLAE, MATLAB, only for zero-shot classes): the same equations. Different from it, and why: beta is relative to the mean square of
the attributes, as an absolute one means nothing on other data; behaviour is centred and the mean added back, as otherwise the popularity of items is
lost; behaviour is not scaled to unit norm per item, which would rank rare items with frequent ones; a small ridge keeps solutions unique.

Shapes: N entities, k attributes, d items, r rank. X d N behaviour, Xc d N with dropped entries, S k N attributes (both centred), W k d, U k k.
The columns of the paper's matrices are rows of a batch here: ``behaviour`` B d, ``attributes`` B k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Spec
from paperworks.tasks.recommendation import Unvaried

SHARE = 36 / 85
"""Rank over attributes in the official demonstration."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The objective's weights. With ``beta`` and ``corruption`` 0 it is the Semantic AutoEncoder (SAE)."""

    encoder_weight: float = 0.001
    """lambda: of the encoder's error, beside that of the decoder."""
    beta: float = 1.0
    """Of the squared singular values beyond the rank, times the mean square of the attributes."""
    rank: int | None = None
    """r; None takes 36/85 of the attributes, as in the official demonstration."""
    corruption: float = 0.05
    """Share of the entries of each behaviour that the encoder does not see."""
    iterations: int = 5
    """Solutions, each with the U of the one before; the first has none."""
    ridge: float = 1e-6
    """Of all squared weights, times the mean square of the attributes."""

    def rank_of(self, attributes: int) -> int:
        """The rank for so many attributes."""
        return max(1, round(SHARE * attributes)) if self.rank is None else min(self.rank, attributes)


# The solution


def corrupted(behaviour: Float[Tensor, "N d"], share: float) -> Float[Tensor, "N d"]:
    """Every row with the same number of its entries set to zero, by torch's own chance."""
    dropped = torch.rand_like(behaviour).argsort(1)[:, : int(share * behaviour.shape[1])]
    return behaviour.scatter(1, dropped, 0.0)


def spectrum(Xc: Float[Tensor, "d N"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "d m"]]:
    """Eigenvalues of Xc Xc^T that are not zero and their eigenvectors, from the smaller of Xc Xc^T and Xc^T Xc."""
    wide = Xc.shape[0] <= Xc.shape[1]
    b, Q = torch.linalg.eigh(Xc @ Xc.T if wide else Xc.T @ Xc)
    kept = b > 1e-12 * b[-1]
    b, Q = b[kept], Q[:, kept]
    return b, Q if wide else Xc @ Q / b.sqrt()


def solve_sylvester(
    A: Float[Tensor, "k k"], b: Float[Tensor, " m"], Q: Float[Tensor, "d m"], C: Float[Tensor, "k d"]
) -> Float[Tensor, "k d"]:
    """W of A W + W B = C for a symmetric A of positive eigenvalues and B = Q diag(b) Q^T.

    In the eigenvectors P of A and Q of B the equation falls apart into numbers: (a_i + b_j) w_ij = c_ij. Where B is zero (most of the space
    if there are more items than entities) it is A W = C, so that no d x d matrix is needed there.
    """
    a, P = torch.linalg.eigh(A)
    C = P.T @ C
    inside = (C @ Q) * (1 / (a[:, None] + b) - 1 / a[:, None])
    return P @ (C / a[:, None] + inside @ Q.T)


def beyond_rank(W: Float[Tensor, "k d"], rank: int) -> Float[Tensor, "k k"]:
    """U = I - V_r V_r^T: what W does beyond its first r singular vectors. tr(W^T U W) is the sum of their squared singular values."""
    _, vectors = torch.linalg.eigh(W @ W.T)  # ascending
    rest = vectors[:, : len(W) - rank]
    return rest @ rest.T


def llae(X: Float[Tensor, "d N"], S: Float[Tensor, "k N"], config: Config) -> Float[Tensor, "k d"]:
    """The W that is left after ``config.iterations`` Sylvester equations, in double precision."""
    X, S = X.double(), S.double()
    Xc = corrupted(X.T, config.corruption).T
    scale = S.square().sum() / len(S)
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    A = S @ S.T + config.ridge * scale * eye
    C = S @ X.T + config.encoder_weight * S @ Xc.T
    b, Q = spectrum(Xc)
    W = solve_sylvester(A, config.encoder_weight * b, Q, C)
    for _ in range(config.iterations - 1 if config.beta else 0):
        U = beyond_rank(W, config.rank_of(len(S)))
        W = solve_sylvester(A + config.beta * scale * U, config.encoder_weight * b, Q, C)
    return W


# The network


class LowRankAutoEncoder(nn.Module):
    """Attributes B k -> scores B d; with the behaviour B d also its code in the space of attributes."""

    centre: Tensor
    popularity: Tensor

    def __init__(self, attributes: int, items: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.grid = Grid(fixed=1)
        self.weight = nn.Parameter(torch.randn(attributes, items) * attributes**-0.5)
        self.register_buffer("centre", torch.zeros(attributes))
        self.register_buffer("popularity", torch.zeros(items))

    def forward(self, attributes: Float[Tensor, "B k"], behaviour: Float[Tensor, "B d"] | None = None) -> Output:
        """Decode the attributes: W^T s and the mean. With ``behaviour`` also encode it: W xc."""
        attributes = attributes - self.centre
        output = {"scores": attributes @ self.weight + self.popularity}
        if behaviour is not None:
            centred = behaviour - self.popularity
            seen = corrupted(centred, self.config.corruption) if self.training else centred
            output |= {"attributes": attributes, "code": seen @ self.weight.T, "weight": self.weight}
        return output


def objective(config: Config) -> Loss:
    """The paper's objective over the number of entities, whose sum over all of them ``solve`` brings to its minimum."""

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        attributes, weight = output["attributes"], output["weight"]
        scale = attributes.square().mean()
        singular = torch.linalg.svdvals(weight.float())
        terms = {
            "decoder": (batch["behaviour"] - output["scores"]).square().sum(1).mean(),
            "encoder": config.encoder_weight * (output["code"] - attributes).square().sum(1).mean(),
            "low_rank": config.beta * scale * singular[config.rank_of(len(weight)) :].square().sum(),
            "ridge": config.ridge * scale * weight.square().sum(),
        }
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    return loss


def solve(config: Config) -> Callable[[nn.Module, Iterable[Batch]], None]:
    """What sets a network's weights from all batches at once: W is what :func:`llae` gives for what is centred."""

    def solver(network: nn.Module, batches: Iterable[Batch]) -> None:
        assert isinstance(network, LowRankAutoEncoder)
        parts = [(batch["behaviour"], batch["attributes"]) for batch in batches]
        behaviour, attributes = (torch.cat(part).double() for part in zip(*parts))
        popularity, centre = behaviour.mean(0), attributes.mean(0)
        with torch.no_grad():
            network.weight.copy_(llae((behaviour - popularity).T, (attributes - centre).T, config))
            network.popularity.copy_(popularity)
            network.centre.copy_(centre)

    return solver


# Zero-shot classification, where the idea comes from: features of images, attributes of classes of which no image was seen. Scalings are those of
# the official demonstration: rows of W have unit norm, and so has what is known of classes, but over the classes.


def unseen_by_attributes(W: Float[Tensor, "k d"], features: Float[Tensor, "N d"], classes: Float[Tensor, "C k"]) -> Float[Tensor, "N C"]:
    """Cosines of the encoded features with the classes' attributes."""
    return F.normalize(features @ F.normalize(W).T) @ F.normalize(F.normalize(classes, dim=0)).T


def unseen_by_features(W: Float[Tensor, "k d"], features: Float[Tensor, "N d"], classes: Float[Tensor, "C k"]) -> Float[Tensor, "N C"]:
    """Cosines of the features with the decoded attributes of the classes."""
    decoded = F.normalize(classes, dim=0) @ F.normalize(W)
    return F.normalize(features) @ F.normalize(F.normalize(decoded, dim=0)).T


VARIANTS = {
    "small": Config(),
    "sae": Config(beta=0.0, corruption=0.0),
    "test": Config(rank=1),
}


def build(spec: Spec, config: Config) -> LowRankAutoEncoder:
    """The network for as many attributes and items as the data have."""
    return LowRankAutoEncoder(spec.channels, len(spec.classes), config)


def recipe(config: Any) -> Recipe:
    """Batches in which the data are read; the optimiser is for those who train the objective by gradient steps."""
    return Recipe(optimizer="adam", lr=1e-2, batch_size=256, augment=Unvaried())


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small",), loss=objective, solve=solve)
