"""The variational autoencoder: a model of the data and its inference network, learnt together by one bound.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014 (arXiv 1312.6114).

An image x is drawn by a decoder p(x|z) from a latent z ~ N(0, I); an encoder q(z|x) says which z may have drawn it. Writing the draw of z as a
function of noise, z = mu + sigma * epsilon, lets back-propagation through the sample, so that both learn from the lower bound on log p(x).

There is no official repository. Different from the paper: Adam in place of Adagrad, and no weight decay by default. ``wake_sleep`` is the
paper's rival on the same two networks (section 5), ``A`` and ``B`` are its two estimators of the bound.

Shapes: B batch, L samples of z for each image, C image channels, S side of the (square) image, D = C S S, J latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe
from paperworks.tasks.generation import Vary, image_side

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The two networks and how they are trained."""

    width: int = 500
    """Units of the hidden layer of each network."""
    latents: int = 20
    """J."""
    decoder: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x|z): Bernoulli for images that are nearly black and white, Gaussian for others."""
    estimator: Literal["B", "A", "wake_sleep"] = "B"
    """B has the KL divergence in closed form (eq. 7), A samples all of the bound (eq. 6)."""
    samples: int = 1
    """L; one is enough where the batch is large (100)."""
    image_size: int | None = None
    """S; None takes the data set's."""


def gaussian_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The logarithm of N(x; mean, exp(log_variance)), summed over the last axis."""
    return -0.5 * (LOG_2PI + log_variance + (x - mean).square() / log_variance.exp()).sum(-1)


def standard_log_density(z: Tensor) -> Tensor:
    """The logarithm of N(z; 0, I), summed over the last axis."""
    return -0.5 * (LOG_2PI + z.square()).sum(-1)


def kl_divergence(mean: Float[Tensor, "B J"], log_variance: Float[Tensor, "B J"]) -> Float[Tensor, "B"]:
    """KL(q(z|x) || N(0, I)) in closed form (appendix B)."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


class GaussianMLP(nn.Module):
    """One hidden layer of tanh units, then mean and log variance (appendix C.2)."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.mean = nn.Linear(width, outputs)
        self.log_variance = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance; any axes before the last."""
        h = self.hidden(x).tanh()
        return self.mean(h), self.log_variance(h)


class BernoulliMLP(nn.Module):
    """One hidden layer of tanh units, then a probability for each pixel (appendix C.1)."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, width)
        self.logits = nn.Linear(width, outputs)

    def forward(self, z: Tensor) -> tuple[Tensor, None]:
        """Log odds; any axes before the last."""
        return self.logits(self.hidden(z).tanh()), None


class VAE(nn.Module):
    """Encoder q(z|x) and decoder p(x|z)."""

    def __init__(self, channels: int, side: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)
        self.shape = (channels, side, side)
        self.config = config
        pixels = channels * side**2
        self.encoder = GaussianMLP(pixels, config.width, config.latents)
        self.decoder = (BernoulliMLP if config.decoder == "bernoulli" else GaussianMLP)(config.latents, config.width, pixels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)  # section 5: N(0, 0.01)
                nn.init.zeros_(layer.bias)

    def encode(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B J"]:
        """The mean of q(z|x)."""
        return self.encoder(image.flatten(1))[0]

    def decode(self, z: Float[Tensor, "B J"]) -> Float[Tensor, "B C S S"]:
        """The mean of p(x|z)."""
        return self.decoder(z)[0].sigmoid().view(-1, *self.shape)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "B C S S"]:
        """Means of p(x|z) for z ~ N(0, I)."""
        return self.decode(torch.randn(n, self.config.latents, generator=generator).to(self.encoder.mean.bias))

    def log_likelihood(self, x: Float[Tensor, "*any D"], out: Tensor, log_variance: Tensor | None) -> Float[Tensor, "*any"]:
        """The logarithm of p(x|z) for what the decoder returned."""
        if log_variance is None:
            return -F.binary_cross_entropy_with_logits(out, x, reduction="none").sum(-1)
        return gaussian_log_density(x, out.sigmoid(), log_variance)  # means held in (0, 1) (section 5)

    def forward(self, image: Float[Tensor, "B C S S"]) -> Output:
        """Infer z and rebuild the image.

        Returns:
            ``reconstruction`` B C S S and the ``mean`` and ``log_variance`` of q(z|x), B J. In evaluation z is the mean. In training the L
            samples are drawn and the terms of the bound come too, B each: ``log_likelihood``, E log p(x|z); ``sampled_kl``, E log q(z|x) - log
            p(z); for wake-sleep ``sleep``, log q(z|x) of a dream.
        """
        x = image.flatten(1)
        mean, log_variance = self.encoder(x)
        output: Output = {"mean": mean, "log_variance": log_variance}
        if not self.training:
            return output | {"reconstruction": self.decode(mean)}
        noise = torch.randn(len(x), self.config.samples, self.config.latents, device=x.device, dtype=x.dtype)
        z = mean[:, None] + (log_variance[:, None] / 2).exp() * noise  # B L J (section 2.4)
        if self.config.estimator == "wake_sleep":
            z = z.detach()  # the wake phase teaches the decoder only
            output["sleep"] = self.dream(len(x), x)
        out, out_log_variance = self.decoder(z)  # B L D
        output["log_likelihood"] = self.log_likelihood(x[:, None].expand_as(out), out, out_log_variance).mean(1)
        density = gaussian_log_density(z, mean[:, None], log_variance[:, None])
        output["sampled_kl"] = (density - standard_log_density(z)).mean(1)
        return output | {"reconstruction": out[:, 0].sigmoid().view(-1, *self.shape)}

    def dream(self, n: int, like: Tensor) -> Float[Tensor, "B"]:
        """The sleep phase: log q(z|x) of a z ~ N(0, I) and an x ~ p(x|z), which teaches the encoder only."""
        with torch.no_grad():
            z = torch.randn(n, self.config.latents, device=like.device, dtype=like.dtype)
            out, log_variance = self.decoder(z)
            x = torch.bernoulli(out.sigmoid()) if log_variance is None else out.sigmoid() + (log_variance / 2).exp() * torch.randn_like(out)
        return gaussian_log_density(z, *self.encoder(x))

    @torch.no_grad()
    def importance_weighted(self, image: Float[Tensor, "B C S S"], samples: int, generator: torch.Generator) -> Float[Tensor, "B"]:
        """An estimate of log p(x): log 1/n sum_l p(x|z_l) p(z_l) / q(z_l|x).

        It is a lower bound on average and tightens as ``samples`` grows; one sample is estimator A.
        """
        x = image.flatten(1)
        mean, log_variance = self.encoder(x)
        weights = []
        for _ in range(samples):
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            z = mean + (log_variance / 2).exp() * noise
            prior, posterior = standard_log_density(z), gaussian_log_density(z, mean, log_variance)
            weights.append(self.log_likelihood(x, *self.decoder(z)) + prior - posterior)
        return torch.stack(weights).logsumexp(0) - math.log(samples)


def negative_bound(config: Config) -> Loss:
    """-ELBO in nats: summed over the pixels and latents, averaged over the images (eq. 3, without the prior on the weights)."""

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        reconstruction = -output["log_likelihood"].mean()
        kl = kl_divergence(output["mean"], output["log_variance"]).mean()
        if config.estimator == "wake_sleep":
            return {"loss": reconstruction - output["sleep"].mean(), "reconstruction_error": reconstruction, "kl": kl.detach()}
        if config.estimator == "A":
            kl = output["sampled_kl"].mean()
        return {"loss": reconstruction + kl, "reconstruction_error": reconstruction, "kl": kl}

    return loss


VARIANTS = {
    "paper": Config(),
    "frey": Config(width=200, latents=20, decoder="gaussian"),
    "plane": Config(latents=2),
    "small": Config(width=400),
    "test": Config(width=16, latents=4, image_size=8),
}


def recipe(config: Config) -> Recipe:
    """Batches of 100 as in the paper; Adam, which one of the authors published a year later. Short runs of ``small`` want a higher rate."""
    lr = 3e-3 if config.width == VARIANTS["small"].width else 1e-3
    return Recipe(optimizer="adam", lr=lr, schedule="constant", warmup=0.0, batch_size=100, clip=None, augment=Vary())


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: VAE(spec.channels, image_side(spec, config.image_size), config),
    recipe=recipe,
    auto=("small", "paper"),
    loss=negative_bound,
)
