"""BatchBALD: label next the batch of images whose answers, taken together, say most about the network's weights.

Kirsch, van Amersfoort and Gal, "BatchBALD: Efficient and Diverse Batch Acquisition for Deep Bayesian Active Learning", NeurIPS 2019
(arXiv 1906.08158).

BALD scores an image by the mutual information between its label and the weights. The ten best by that score may be ten copies of one image. BatchBALD
scores the joint information of the batch, which counts shared information once; it is submodular, so that choosing greedily is at least
1 - 1/e of the best batch.

As in the authors' batchbald_redux the joint entropy is exact while its configurations are few and an importance-weighted estimate after that, in
float64. Different from it: the sampled configurations follow from a seed, and the draws of the weights are taken through hooks on the dropout
layers, so that any network with dropout will do; nothing is scored beforehand to leave candidates out.

Shapes: N images of the pool, K draws of the weights, C classes, B the batch that is chosen, n of it chosen so far, M configurations (y_1 ... y_n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torchvision import tv_tensors

from paperworks.errors import InputError
from paperworks.tasks.acquire import Acquire, Acquirer, Chosen
from paperworks.tasks.base import Grid, Output, Paper, Recipe, Sample, Spec
from paperworks.tasks.classification import middle_square

CONFIGURATIONS = 40_000
"""Most configurations that are enumerated, and how many are drawn beyond that (four chosen images of ten classes)."""
AT_ONCE = 2**23
"""Probabilities held while candidates are scored."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network of the MNIST experiments by default."""

    channels: tuple[int, ...] = (32, 64)
    """Of each convolution."""
    pooled: tuple[int, ...] = (0, 1)
    """The convolutions that a pooling follows."""
    kernel: int = 5
    hidden: int = 128
    dropout: float = 0.5
    """Chance of a channel behind each convolution, and of a number behind the hidden layer."""
    image_size: int = 28


# Section 3: information about the weights, in nats


def conditional_entropy(log_probs: Float[Tensor, "N K C"]) -> Float[Tensor, " N"]:
    """E_w H[y | x, w]: how unsure the draws are, each for itself. It adds up over a batch (equation 7)."""
    return torch.special.entr(log_probs.double().exp()).sum(2).mean(1)


def bald(log_probs: Float[Tensor, "N K C"]) -> Float[Tensor, " N"]:
    """Equation 1: I(y; w | x) = H[y | x] - E_w H[y | x, w] of each image."""
    mean = log_probs.double().exp().mean(1)
    return torch.special.entr(mean).sum(1) - conditional_entropy(log_probs)


class Joint:
    """What is kept of the chosen images: the probability of each of their M configurations under each draw of the weights, M K.

    Args:
        draws: K.
        configurations: at most so many are enumerated; beyond that so many are drawn from the network itself.
        generator: the source of the drawn ones.
    """

    def __init__(self, draws: int, configurations: int, generator: torch.Generator) -> None:
        self.given = torch.ones(1, draws, dtype=torch.float64)
        self.shares = torch.ones(1, dtype=torch.float64)
        """What a configuration counts for: 1 where all are there, 1 / (M q) where they were drawn with probability q."""
        self.chosen: list[Tensor] = []
        self.configurations, self.generator = configurations, generator

    def add(self, probs: Float[Tensor, "K C"]) -> None:
        """Another image is chosen."""
        self.chosen.append(probs)
        if probs.shape[1] ** len(self.chosen) <= self.configurations:
            self.given = torch.einsum("mk,kc->mck", self.given, probs).flatten(0, 1)  # section 3.3: M C configurations
            self.shares = torch.ones(len(self.given), dtype=torch.float64)
        else:
            self._draw()

    def _draw(self) -> None:
        """Appendix C: the labels that each draw of the weights gives to the chosen images, M / K times."""
        draws = self.given.shape[1]
        each = max(1, self.configurations // draws)
        self.given = torch.ones(draws * each, draws, dtype=torch.float64)
        for probs in self.chosen:
            labels = torch.multinomial(probs, each, replacement=True, generator=self.generator).flatten()  # K each -> M
            self.given *= probs.T[labels]
        self.shares = 1 / (self.given.mean(1) * len(self.given))

    def entropies(self, probs: Float[Tensor, "N K C"]) -> Float[Tensor, " N"]:
        """H[y_1 ... y_n, y] of the chosen images with each of the candidates (equations 8 and 9; 11 where configurations are drawn)."""
        found = []
        classes = probs.shape[2]
        for part in probs.split(max(1, AT_ONCE // (len(self.given) * classes))):
            p = self.given @ part.transpose(0, 1).flatten(1) / self.given.shape[1]  # M, of all candidates' classes side by side
            found.append((self.shares @ torch.special.entr(p)).view(-1, classes).sum(1))
        return torch.cat(found)


def batchbald(log_probs: Float[Tensor, "N K C"], size: int, *, configurations: int = CONFIGURATIONS, seed: int = 0) -> Chosen:
    """Algorithm 1: add the image that makes I(y_1 ... y_n; w) largest, ``size`` times.

    Args:
        log_probs: of each image and draw of the weights; the draws must be the same for all images.
        size: B; all images where there are fewer.
        configurations: exact up to so many, sampled beyond.
        seed: of the sampling.
    """
    probs, conditional = log_probs.double().exp(), conditional_entropy(log_probs)
    joint = Joint(probs.shape[1], configurations, torch.Generator().manual_seed(seed))
    indices: list[int] = []
    scores: list[float] = []
    for _ in range(min(size, len(probs))):
        found = joint.entropies(probs) - conditional - conditional[indices].sum()  # equation 6
        found[indices] = -torch.inf
        best = int(found.argmax())
        indices.append(best)
        scores.append(float(found[best]))
        if len(indices) < size:
            joint.add(probs[best])
    return Chosen(indices, scores)


def bald_batch(log_probs: Float[Tensor, "N K C"], size: int) -> Chosen:
    """What BALD does with a batch: the ``size`` best, as if what they tell added up."""
    best = bald(log_probs).topk(min(size, len(log_probs)))
    return Chosen(best.indices.tolist(), best.values.cumsum(0).tolist())


# Section 4: draws of the weights


@contextmanager
def drawn(network: nn.Module, draw: int, seed: int = 0) -> Iterator[None]:
    """A network in evaluation mode becomes one draw of its weights: each dropout layer has one mask for all images, here and in later calls.

    Masks that differ from image to image would be draws of their own, and the joint entropy of images under them means nothing.

    Raises:
        InputError: the network has no dropout.
    """
    layers = [m for m in network.modules() if isinstance(m, _DropoutNd) and 0 < m.p < 1]
    if not layers:
        raise InputError("this network has no dropout, so there is nothing to draw; train one that has it")

    def masking(place: int) -> Callable[[Any, Any, Tensor], Tensor]:
        def masked(layer: _DropoutNd, _: Any, output: Tensor) -> Tensor:
            whole = isinstance(layer, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)  # channels are dropped as a whole
            shape = (output.shape[1], *(1,) * (output.ndim - 2)) if whole else output.shape[1:]
            generator = torch.Generator().manual_seed((seed * 1_000_003 + draw) * 1009 + place)
            mask = torch.rand(shape, generator=generator) >= layer.p
            return output * (mask / (1 - layer.p)).to(output)

        return masked

    hooks = [layer.register_forward_hook(masking(place)) for place, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def posterior(network: nn.Module, batches: Iterable[Float[Tensor, "n c s s"]], draws: int, seed: int = 0) -> Float[Tensor, "N K C"]:
    """Log-probabilities of normalised images under K draws of the weights, the same draws for all of them."""
    network.eval()
    found = []
    for images in batches:
        rows = []
        for k in range(draws):
            with drawn(network, k, seed):
                rows.append(network(images)["logits"].float().log_softmax(1).cpu())
        found.append(torch.stack(rows, 1))
    return torch.cat(found)


def predictive(log_probs: Float[Tensor, "N K C"]) -> Float[Tensor, "N C"]:
    """Probabilities averaged over the draws: the prediction of the experiments."""
    return (log_probs.logsumexp(1) - math.log(log_probs.shape[1])).exp()


class BayesianCNN(nn.Module):
    """Convolutions and a hidden layer with dropout behind each; in evaluation mode it is the mean of its draws, about."""

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        self.grid, self.pooled = Grid(fixed=config.image_size), config.pooled
        pairs = list(zip((channels, *config.channels), config.channels))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, config.kernel) for i, o in pairs)
        self.drops = nn.ModuleList(nn.Dropout2d(config.dropout) for _ in pairs)
        side = config.image_size
        for i in range(len(pairs)):
            side = (side - config.kernel + 1) // (2 if i in config.pooled else 1)
        self.hidden = nn.Linear(config.channels[-1] * side**2, config.hidden)
        self.drop = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden, classes)

    def forward(self, image: Float[Tensor, "B c s s"]) -> Output:
        """``logits`` B C."""
        x = image
        for i, (convolution, drop) in enumerate(zip(self.convolutions, self.drops)):
            x = drop(convolution(x))
            x = F.relu(F.max_pool2d(x, 2) if i in self.pooled else x)
        return {"logits": self.classifier(F.relu(self.drop(self.hidden(x.flatten(1)))))}


@dataclass(frozen=True, kw_only=True)
class Unvaried:
    """The image as it is, at the network's size: the paper augments nothing."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """``sample`` with the middle square of its image."""
        return sample | {"image": tv_tensors.Image(middle_square(sample["image"].as_subclass(Tensor), patch[0]))}


VARIANTS = {
    "mnist": Config(),
    "emnist": Config(channels=(32, 64, 128), pooled=(0, 2), kernel=3, hidden=512),
    "small": Config(channels=(16, 32), hidden=64),
    "test": Config(channels=(4, 8), hidden=16),
}


def recipe(config: Config) -> Recipe:
    """Appendix: Adam as it comes, batches of 64. A fixed schedule stands in for early stopping on a validation set."""
    return Recipe(optimizer="adam", lr=1e-3, schedule="constant", warmup=0.0, batch_size=64, clip=None, augment=Unvaried())


def build(spec: Spec, config: Config) -> BayesianCNN:
    """The network for a data set."""
    return BayesianCNN(spec.channels, len(spec.classes), config)


@dataclass(frozen=True, kw_only=True)
class Question:
    """How `paperworks acquire` asks."""

    draws: int = 20
    """K; no batch can hold more than log K nats."""
    configurations: int = 10_000
    """Exact up to so many configurations, sampled beyond."""
    seed: int = 0


def _batchbald(question: Question) -> Acquire:
    def ask(network: nn.Module, batches: Iterable[Tensor], size: int) -> Chosen:
        log_probs = posterior(network, batches, question.draws, question.seed)
        return batchbald(log_probs, size, configurations=question.configurations, seed=question.seed)

    return ask


def _bald(question: Question) -> Acquire:
    return lambda network, batches, size: bald_batch(posterior(network, batches, question.draws, question.seed), size)


ACQUIRERS = {"batchbald": Acquirer(Question(), _batchbald), "bald": Acquirer(Question(), _bald)}

PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "mnist"))
