"""MoCo: learning without labels as looking up a view in a large, consistent dictionary.

He, Fan, Wu, Xie and Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020 (arXiv 1911.05722), and
Chen, Fan, Girshick and He, "Improved Baselines with Momentum Contrastive Learning", 2020 (arXiv 2003.04297), which is version 2.

One view of an image is encoded as the query q, the other as the key k+; q has to be more like k+ than like the keys of other images. These
lie in a queue, which makes the dictionary larger than a batch; they come from an encoder whose weights follow the query encoder's slowly,
which makes old and new keys comparable. No gradient flows into a key.

As in the official code (facebookresearch/moco): the key encoder is updated before the keys are computed, its batch norm statistics are its
own, and the keys of a step enter the queue after its loss. Different from it: on one device the shuffled batch norm is kept as in the
authors' CIFAR demo, by statistics of ``splits`` parts of the batch; a batch need not divide the queue.

Shapes: N queries, C numbers of a key, K keys in the queue, F numbers of the representation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import TwoViews
from paperworks.nn.batch_norm import SplitBatchNorm2d
from paperworks.nn.processes import from_first, gathered, rank
from paperworks.papers.learning.encoders import Stem, encoder
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Spec
from paperworks.tasks.representation import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """Version 1 on ImageNet by default."""

    backbone: str = "resnet50"
    """``resnet18`` ... ``resnet101``, or PAPER/VARIANT of a paper on classification."""
    stem: Stem = "imagenet"
    width: int = 64
    """Channels of the ResNet's first stage."""
    dim: int = 128
    """C, numbers of a key."""
    queue: int = 65536
    """K, keys in the queue."""
    key_momentum: float = 0.999
    """m: what share of itself the key encoder keeps at a step."""
    temperature: float = 0.07
    """tau of InfoNCE."""
    mlp: bool = False
    """Version 2's head: a hidden layer of F units and a ReLU."""
    splits: int = 1
    """Parts of the batch with batch norm statistics of their own, as on so many GPUs."""
    shuffle: bool = True
    """Keys are encoded in another order than their queries, so that other examples share their statistics."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class Branch(nn.Module):
    """f_q or f_k: a backbone, and a head in the place of its classifier."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        norm = partial(SplitBatchNorm2d, splits=config.splits) if config.splits > 1 else nn.BatchNorm2d
        self.backbone = encoder(config.backbone, spec, stem=config.stem, width=config.width, zero_init_residual=False, norm=norm)
        features: int = self.backbone.embedding  # pyright: ignore[reportAssignmentType]
        hidden = (nn.Linear(features, features), nn.ReLU(inplace=True)) if config.mlp else ()
        self.head = nn.Sequential(*hidden, nn.Linear(features, config.dim))

    def forward(self, image: Float[Tensor, "N c h w"]) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N C"]]:
        """The representation, and its projection onto the unit sphere."""
        h = self.backbone.embed(image)  # pyright: ignore[reportCallIssue]
        return h, F.normalize(self.head(h).float(), dim=1)


class MoCo(nn.Module):
    """Algorithm 1 of the paper, but for the loss and the optimiser."""

    queue: Tensor
    pointer: Tensor

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        self.m, self.shuffle = config.key_momentum, config.shuffle
        self.query = Branch(spec, config)
        self.grid = getattr(self.query.backbone, "grid", Grid(fixed=config.image_size or image_side(spec)))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.dim, config.queue), dim=0))  # C K
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @property
    def encoder(self) -> nn.Module:
        """What is kept of the training: the query encoder without its head."""
        return self.query.backbone

    def forward(self, image: Float[Tensor, "N c h w"], view: Float[Tensor, "N c h w"] | None = None) -> Output:
        """Encode images, and in training compare them with the keys.

        Returns:
            ``embedding`` N F, the backbone's representation and, in training, ``similarity`` N (1 + K): of q with its own key (at 0) and
            with those of the queue.
        """
        if not self.training:
            return {"embedding": self.encoder.embed(image)}  # pyright: ignore[reportCallIssue]
        assert view is not None
        h, q = self.query(image)
        self.follow()
        k = self.keys(view)
        with torch.autocast(image.device.type, enabled=False):  # half precision is too coarse for what is divided by tau
            positive = (q * k).sum(1, keepdim=True)
            negative = q @ self.queue.clone()  # a copy, as the queue changes before the gradient is computed
        self.enqueue(k)
        return {"embedding": h, "similarity": torch.cat([positive, negative], 1)}

    @torch.no_grad()
    def follow(self) -> None:
        """Equation 2: theta_k <- m theta_k + (1 - m) theta_q. Parameters only: f_k has batch norm statistics of its own."""
        for theta_q, theta_k in zip(self.query.parameters(), self.key.parameters()):
            theta_k.lerp_(theta_q, 1 - self.m)

    @torch.no_grad()
    def keys(self, view: Float[Tensor, "N c h w"]) -> Float[Tensor, "N C"]:
        """Section 3.3, shuffling BN: over all processes the views change places, are encoded, and change back."""
        if not self.shuffle:
            return self.key(view)[1]
        views, n = gathered(view), len(view)
        order = from_first(torch.randperm(len(views), device=view.device))
        own = slice(rank() * n, (rank() + 1) * n)
        k = gathered(self.key(views[order[own]])[1])
        return k[order.argsort()[own]]

    @torch.no_grad()
    def enqueue(self, k: Float[Tensor, "N C"]) -> None:
        """The newest keys (of all processes) take the places of the oldest."""
        k, size = gathered(k), self.queue.shape[1]
        k = k[-size:]
        self.queue[:, (self.pointer + torch.arange(len(k), device=k.device)) % size] = k.T
        self.pointer.copy_((self.pointer + len(k)) % size)


def info_nce(similarity: Float[Tensor, "N K1"], temperature: float) -> Tensor:
    """Equation 1: cross-entropy of finding the own key, which is the first, among all."""
    return F.cross_entropy(similarity.float() / temperature, similarity.new_zeros(len(similarity), dtype=torch.long))


def loss(config: Config) -> Loss:
    """InfoNCE, and the share of queries that found their key."""

    def contrast(output: Output, batch: Batch) -> dict[str, Tensor]:
        found = (output["similarity"].argmax(1) == 0).float().mean()
        return {"loss": info_nce(output["similarity"], config.temperature), "found": found}

    return contrast


CIFAR = Config(
    backbone="resnet18", stem="cifar", queue=4096, key_momentum=0.99, temperature=0.1, splits=8, image_size=None
)  # fmt: skip

VARIANTS = {
    "v1": Config(),
    "v2": Config(mlp=True, temperature=0.2),
    "cifar": CIFAR,
    "small": Config(backbone="resnet18", width=16, queue=1024, key_momentum=0.99, temperature=0.1, mlp=True, splits=8, image_size=None),
    "test": Config(
        backbone="resnet18", stem="cifar", width=2, dim=8, queue=16, key_momentum=0.9, temperature=0.2, mlp=True, splits=2, image_size=32
    ),
}


def recipe(config: Config) -> Recipe:
    """The official training of either version; that of the authors' CIFAR demo where the stem is CIFAR's."""
    small = TwoViews(area=(0.08, 1.0))
    if config.width < 64:
        return Recipe(lr=2e-3, weight_decay=1e-4, batch_size=128, patch=128, clip=None, augment=small)  # minutes, not days
    if config.stem == "cifar":
        return Recipe(optimizer="sgd", lr=0.06, weight_decay=5e-4, warmup=0.0, batch_size=512, patch=128, clip=None, augment=small)
    if config.mlp:
        view = TwoViews(blur=0.5)
        return Recipe(optimizer="sgd", lr=0.03, weight_decay=1e-4, warmup=0.0, batch_size=256, patch=224, clip=None, augment=view)
    view = TwoViews(jitter=(0.4, 0.4, 0.4, 0.4), jitter_chance=1.0)
    return Recipe(
        optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="step", decay_at=(0.6, 0.8), warmup=0.0,
        batch_size=256, patch=224, clip=None, augment=view,
    )  # fmt: skip


PAPER = Paper(variants=VARIANTS, build=MoCo, recipe=recipe, auto=("small", "cifar"), loss=loss)
