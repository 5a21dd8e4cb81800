"""The deep autoencoder: a network squeezes its input through a narrow layer and learns to rebuild it.

Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", Science 313, 2006.

A non-linear PCA: the code layer describes an image by a few numbers, and a mirrored network makes the image of them again. Deep ones did not
train from random weights at the time, so each layer is first trained alone, as a restricted Boltzmann machine; back-propagation then
fine-tunes the unrolled stack.

There is no repository of the authors, who gave MATLAB code. Different from the paper: fine-tuning by Adam in place of conjugate gradients,
and Adam on the contrastive divergence in place of gradient ascent with momentum and weight cost; ``pretrain`` counts steps, not epochs.
Variants ``modern`` and ``small`` are what replaced pre-training: ReLU units.

Shapes: B batch, C image channels, S side of the (square) image, D = C S S, V visible and H hidden units of one layer, K numbers of the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe
from paperworks.tasks.generation import Vary, image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """Layers and how they come by their first weights."""

    widths: tuple[int, ...] = (1000, 500, 250)
    """Hidden layers of the encoder; the decoder has them in reverse."""
    code: int = 30
    """K."""
    units: Literal["logistic", "relu"] = "logistic"
    """Those of the hidden layers; the code is linear and the output logistic."""
    pretrain: int = 0
    """Steps for which each layer is trained as a restricted Boltzmann machine before all are fine-tuned; for logistic units."""
    image_size: int | None = None
    """S; None takes the data set's."""


def free_energy(v: Float[Tensor, "B V"], visible_bias: Tensor, hidden_input: Float[Tensor, "B H"], gaussian: bool) -> Float[Tensor, "B"]:
    """F(v) = -log sum_h exp(-E(v, h)), up to a constant, of an RBM whose hidden units receive ``hidden_input`` = c + W v.

    Binary hidden units are summed out; those of the code are linear with unit-variance Gaussian noise and are integrated out.
    """
    hidden = hidden_input.square().sum(1) / 2 if gaussian else F.softplus(hidden_input).sum(1)
    return -(v @ visible_bias) - hidden


def mirrored(sizes: tuple[int, ...]) -> nn.ModuleList:
    """A layer for each pair of neighbouring sizes."""
    layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layers


class Autoencoder(nn.Module):
    """Encoder D-1000-500-250-K and its mirror (figure 1)."""

    steps: Tensor

    def __init__(self, channels: int, side: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)
        self.shape = (channels, side, side)
        self.pretrain = config.pretrain
        self.units = torch.sigmoid if config.units == "logistic" else F.relu
        sizes = (channels * side**2, *config.widths, config.code)
        self.encoder = mirrored(sizes)
        self.decoder = mirrored(sizes[::-1])
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # training steps so far: which layer's turn it is

    def encode(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B K"]:
        """The code: no non-linearity after the last layer."""
        return self.encoder[-1](self._hidden(image.flatten(1), len(self.encoder) - 1))

    def logits(self, code: Float[Tensor, "B K"]) -> Float[Tensor, "B C S S"]:
        """The decoder before its logistic output."""
        x = code
        for i, layer in enumerate(self.decoder):
            x = layer(self.units(x) if i else x)
        return x.view(-1, *self.shape)

    def decode(self, code: Float[Tensor, "B K"]) -> Float[Tensor, "B C S S"]:
        """Images in (0, 1)."""
        return self.logits(code).sigmoid()

    def forward(self, image: Float[Tensor, "B C S S"]) -> Output:
        """Rebuild, and pre-train the layer whose turn it is.

        Returns:
            ``reconstruction`` and ``logits`` B C S S, ``code`` B K; in training, as long as layers are pre-trained, ``divergence`` too (a
            scalar): its gradient is the contrastive divergence of the present layer, with the sign turned for a descent.
        """
        output: Output = {}
        if self.training and self.pretrain:
            layer = int(self.steps) // self.pretrain
            if int(self.steps) <= self.pretrain * len(self.encoder):
                self.unroll()
            if layer < len(self.encoder):
                output["divergence"] = self.divergence(image, layer)
            self.steps += 1
        code = self.encode(image)
        logits = self.logits(code)
        return output | {"reconstruction": logits.sigmoid(), "logits": logits, "code": code}

    def divergence(self, image: Float[Tensor, "B C S S"], layer: int) -> Tensor:
        """One step of contrastive divergence (CD-1) of the RBM whose hidden units are those of ``layer``.

        Its data are the hidden probabilities of the layer below. F(data) - F(reconstruction), the latter held fixed, has the gradient
        <v h>_reconstruction - <v h>_data in W, and the like in both biases. The visible bias is that of the decoder's mirrored layer.
        """
        with torch.no_grad():
            data = self._hidden(image.flatten(1), layer)
        up, visible_bias, gaussian = self.encoder[layer], self.decoder[-1 - layer].bias, layer == len(self.encoder) - 1
        assert isinstance(visible_bias, Tensor)
        hidden_input = up(data)
        with torch.no_grad():
            hidden = hidden_input + torch.randn_like(hidden_input) if gaussian else torch.bernoulli(hidden_input.sigmoid())
            # probabilities, not samples, of the visible units
            rebuilt = (hidden @ up.weight + visible_bias).sigmoid()  # pyright: ignore[reportOperatorIssue]
        before = free_energy(data, visible_bias, hidden_input, gaussian)
        after = free_energy(rebuilt, visible_bias, up(rebuilt), gaussian)
        return (before - after).mean()

    @torch.no_grad()
    def unroll(self) -> None:
        """W of every encoder layer, transposed, is the decoder's first weight (figure 1, middle)."""
        for up, down in zip(self.encoder, reversed(self.decoder)):
            down.weight.copy_(up.weight.T)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _hidden(self, x: Tensor, layers: int) -> Tensor:
        for layer in self.encoder[:layers]:
            x = self.units(layer(x))
        return x


def cross_entropy(output: Output, batch: Batch) -> dict[str, Tensor]:
    """-sum_i x_i log y_i + (1 - x_i) log(1 - y_i), summed over the pixels of an image; the divergence as long as layers are pre-trained."""
    terms = F.binary_cross_entropy_with_logits(output["logits"], batch["image"], reduction="none")
    fine_tuning = terms.flatten(1).sum(1).mean()
    return {"loss": output.get("divergence", fine_tuning), "cross_entropy": fine_tuning}


VARIANTS = {
    "paper": Config(pretrain=30_000),
    "plane": Config(code=2, pretrain=30_000),
    "modern": Config(units="relu"),
    "small": Config(widths=(400, 200, 100), units="relu"),
    "test": Config(widths=(12, 8), code=4, image_size=8),
}


def recipe(config: Config) -> Recipe:
    """Batches of 100 as in the paper; Adam as everybody does today."""
    schedule = "constant" if config.pretrain else "cosine"
    return Recipe(optimizer="adam", lr=1e-3, schedule=schedule, warmup=0.0, batch_size=100, clip=None, augment=Vary())


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: Autoencoder(spec.channels, image_side(spec, config.image_size), config),
    recipe=recipe,
    auto=("small", "modern"),
    loss=lambda config: cross_entropy,
)
