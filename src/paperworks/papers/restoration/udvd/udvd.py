"""UDVD: a film is denoised by a network that has seen nothing but noisy films, or this one film.

Sheth, Mohan, Vincent, Manzorro, Crozier, Khapra, Simoncelli and Fernandez-Granda, "Unsupervised Deep Video Denoising", ICCV 2021
(arXiv 2011.15045).

Noise is independent from pixel to pixel and what is filmed is not. A network that estimates a pixel from five frames *without that pixel*
can therefore be trained on the noisy pixel itself: it cannot learn to copy it, and the best that it can do is the clean value. Where the
noise level is known, it gives a distribution, and Bayes' rule puts the pixel that was left out back in.

As in the official code (sreyas-mohan/udvd) but for this: frames that are no squares are mirrored to squares there, which puts copies of
a pixel where the blind spot does not hide them; here upright and sideways branches run one after the other, which is the same on squares and
blind everywhere. Frames are normalised, as everywhere in this archive, and the noise level with them. Squared error is a mean, not half a sum.

Shapes: B batch, T frames of a window, C channels of a frame (TC: all channels of all frames), H W height and width, F G features,
N = C (C + 1) / 2 entries of a triangle.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.restoration import FilmAugment, frames_of, middle

SLOPE = 0.1
"""Of all leaky ReLUs."""
EPSILON = 1e-5
"""Added to both covariances, as the official code has it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network, and what is known of the noise."""

    width: int = 48
    """Features of the encoder; decoder and branches have twice as many."""
    frames: Literal[1, 3, 5] = 5
    """Frames of the window: 1 and 3 take one U-Net, 5 the cascade (section 4 compares them)."""
    noise: Literal["stated", "estimated"] = "stated"
    """``stated``: the standard deviation is taken from the data; where they state none, the error is squared and there is no posterior.
    ``estimated``: a second network looks at the noisy frames and says it."""
    blind: bool = True
    """False gives the same network without a blind spot: the control, which learns to copy."""


# --- Causal layers: what is computed at a row depends on this row and those above


def down(x: Float[Tensor, "B F H W"]) -> Float[Tensor, "B F H W"]:
    """Everything one row down; the first row becomes zero."""
    return F.pad(x, (0, 0, 1, -1))


class Conv(nn.Module):
    """3x3 convolution without bias and a leaky ReLU. Causal: the kernel's last row lies on the row that is computed."""

    def __init__(self, inputs: int, outputs: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3, bias=False)

    def forward(self, x: Float[Tensor, "B F H W"]) -> Float[Tensor, "B G H W"]:
        """Sides repeat the outermost pixels; above a causal one are zeros."""
        x = F.pad(x, (1, 1, 0, 0) if self.causal else (1, 1, 1, 1), mode="replicate")
        x = F.pad(x, (0, 0, 2, 0)) if self.causal else x
        return F.leaky_relu(self.conv(x), SLOPE)


class Convs(nn.Sequential):
    """Convolutions one after another."""

    def __init__(self, *widths: int, causal: bool) -> None:
        super().__init__(*(Conv(i, o, causal) for i, o in pairwise(widths)))


class UNet(nn.Module):
    """The denoiser D: two poolings, nearest upsampling, and the input itself as the finest skip. Sides are multiples of 4."""

    def __init__(self, inputs: int, outputs: int, width: int, causal: bool) -> None:
        super().__init__()
        w = width
        self.causal = causal
        self.enc1 = Convs(inputs, w, w, w, causal=causal)
        self.enc2 = Convs(w, w, w, w, causal=causal)
        self.enc3 = Convs(w, 2 * w, 2 * w, w, causal=causal)
        self.dec2 = Convs(2 * w, 2 * w, 2 * w, 2 * w, 2 * w, causal=causal)
        self.dec1 = Convs(2 * w + inputs, 2 * w, 2 * w, 2 * w, outputs, causal=causal)

    def forward(self, image: Float[Tensor, "B F H W"]) -> Float[Tensor, "B G H W"]:
        """Row i of a causal one's output has seen rows 0 to i."""
        x1 = self.pool(self.enc1(image))
        x2 = self.pool(self.enc2(x1))
        x = self.dec2(torch.cat([enlarged(self.enc3(x2)), x1], 1))
        return self.dec1(torch.cat([enlarged(x), image], 1))

    def pool(self, x: Tensor) -> Tensor:
        """2x2 maximum; one row down before it, or row 2i of what is enlarged again would know row 2i + 1."""
        return F.max_pool2d(down(x) if self.causal else x, 2)


def enlarged(x: Tensor) -> Tensor:
    """Each pixel twice in both directions."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


# --- The blind network


class UDVD(nn.Module):
    """Figure 2: two stages of U-Nets in four directions, shifted by a row, and three 1x1 convolutions over all of them."""

    grid = Grid(4)

    def __init__(self, channels: int, sigma: float | None, config: Config) -> None:
        super().__init__()
        w, self.channels, self.frames, self.blind = config.width, channels, config.frames, config.blind
        self.sigma, estimated = sigma, config.noise == "estimated"
        triangle = channels * (channels + 1) // 2 if estimated or sigma is not None else 0
        if config.frames == 5:
            self.denoiser1 = UNet(3 * channels, 2 * w // 3, w, config.blind)
        self.denoiser2 = UNet(3 * (2 * w // 3) if config.frames == 5 else config.frames * channels, 2 * w, w, config.blind)
        self.noise_net = UNet(config.frames * channels, 1, w, causal=False) if estimated else None
        self.nin_a = nn.Conv2d(8 * w, 8 * w, kernel_size=1, bias=False)
        self.nin_b = nn.Conv2d(8 * w, 2 * w, kernel_size=1, bias=False)
        self.nin_c = nn.Conv2d(2 * w, channels + triangle, kernel_size=1, bias=False)

    def forward(self, image: Float[Tensor, "B TC H W"]) -> Output:
        """Denoise the middle frame of each window.

        Returns:
            ``restored`` B C H W and ``mean`` B C H W, which has not seen its own pixel of any frame; where the noise level is known or
            estimated also ``triangle`` B N H W and ``sigma`` B, and ``restored`` is the posterior mean.
        """
        frames = list(frames_of(image).unbind(1))
        frames = frames[(len(frames) - self.frames) // 2 :][: self.frames]
        # Directions that have the same height and width go through together. The order is that of the official weights: 0, 90, 180, 270.
        above, below = self.features([torch.cat([f, turned(f, 2)]) for f in frames]).unflatten(0, (2, -1))
        left, right = self.features([torch.cat([turned(f, -1), turned(f, 1)]) for f in frames]).unflatten(0, (2, -1))
        x = torch.cat([above, turned(left, 1), turned(below, 2), turned(right, -1)], 1)  # B 8w H W
        x = F.leaky_relu(self.nin_b(F.leaky_relu(self.nin_a(x), SLOPE)), SLOPE)
        x = self.nin_c(x).float()  # what follows wants more digits than bfloat16 has
        mean, triangle = x.split([self.channels, self.nin_c.out_channels - self.channels], 1)
        if not triangle.shape[1]:
            return {"restored": mean, "mean": mean}
        sigma = (
            mean.new_full(mean.shape[:1], self.sigma) if self.noise_net is None else self.noise_net(torch.cat(frames, 1)).mean((1, 2, 3))
        )
        restored = posterior(mean, triangle, frames[len(frames) // 2], sigma)
        return {"restored": restored, "mean": mean, "triangle": triangle, "sigma": sigma}

    def features(self, frames: list[Tensor]) -> Float[Tensor, "B F H W"]:
        """One direction: what lies strictly above a pixel, in all frames (each B C H W)."""
        x = torch.cat(frames, 1)
        if self.frames == 5:
            x = torch.cat([self.denoiser1(torch.cat(frames[i : i + 3], 1)) for i in range(3)], 1)
        x = self.denoiser2(x)
        return down(x) if self.blind else x  # without this row "above" would be "above and beside", and the pixel would see itself


def turned(x: Float[Tensor, "B F H W"], quarters: int) -> Tensor:
    """Turned counterclockwise by quarters of a turn."""
    return torch.rot90(x, quarters, (2, 3))


# --- The noisy pixel comes back (section 3 and supplement)

Matrix = list[list[Tensor]]
"""C x C maps of B H W: one small matrix at every pixel."""


def covariance(triangle: Float[Tensor, "B N H W"], channels: int) -> Matrix:
    """A^T A + eps I of the clean pixel given what surrounds it. Row r of A holds C - r entries of the network's output, from column 0 on."""
    entries = iter(triangle.unbind(1))
    zero = torch.zeros_like(triangle[:, 0])
    a = [[next(entries) if column < channels - row else zero for column in range(channels)] for row in range(channels)]
    return added([[sum((r[i] * r[j] for r in a), zero) for j in range(channels)] for i in range(channels)], zero + EPSILON)


def added(matrix: Matrix, value: Tensor) -> Matrix:
    """Value I is added."""
    return [[entry + value if i == j else entry for j, entry in enumerate(row)] for i, row in enumerate(matrix)]


def solved(matrix: Matrix, right: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B H W"]]:
    """The solution matrix^-1 right and log det matrix at every pixel: Gauss's elimination, written out. A covariance needs no pivoting.

    ``torch.linalg`` takes a hundred times as long for so many matrices so small, and is not in ONNX.
    """
    m, x, n = [list(row) for row in matrix], list(right.unbind(1)), len(matrix)
    for i in range(n):
        for j in range(i + 1, n):
            factor = m[j][i] / m[i][i]
            m[j] = [b - factor * a for a, b in zip(m[i], m[j])]
            x[j] = x[j] - factor * x[i]
    for i in reversed(range(n)):
        for j in range(i + 1, n):
            x[i] = x[i] - m[i][j] * x[j]
        x[i] = x[i] / m[i][i]
    return torch.stack(x, 1), sum((m[i][i].log() for i in range(1, n)), m[0][0].log())


def posterior(
    mean: Float[Tensor, "B C H W"], triangle: Float[Tensor, "B N H W"], noisy: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"]
) -> Float[Tensor, "B C H W"]:
    """E[x | y] of x ~ N(mean, S) and y ~ N(x, sigma^2 I): mean + S (S + sigma^2 I)^-1 (y - mean).

    The same as the paper's (S^-1 + sigma^-2 I)^-1 (S^-1 mean + sigma^-2 y), with one inverse in place of three.
    """
    s = covariance(triangle, mean.shape[1])
    weighed, _ = solved(added(s, sigma.view(-1, 1, 1) ** 2 + EPSILON), noisy - mean)
    return mean + torch.stack([sum((a * w for a, w in zip(row, weighed.unbind(1))), torch.zeros_like(weighed[:, 0])) for row in s], 1)


# --- Loss


def likelihood(output: Output, noisy: Float[Tensor, "B C H W"]) -> Tensor:
    """Negative logarithm of the density of the noisy pixels, y ~ N(mean, A^T A + sigma^2 I), less constants, a mean over pixels.

    0.1 sigma is taken off as in the official code: nothing where sigma is known; where it is estimated, the reason not to call noise detail.
    """
    sigma = output["sigma"]
    s = covariance(output["triangle"], noisy.shape[1])
    error = noisy - output["mean"]
    weighed, log_det = solved(added(s, sigma.view(-1, 1, 1) ** 2), error)
    return (0.5 * (error * weighed).sum(1) + 0.5 * log_det).mean() - 0.1 * sigma.mean()


def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Against the noisy middle frame; no clean one is asked for."""
    noisy = middle(batch["image"])
    error = F.mse_loss(output["mean"], noisy)
    return {"loss": likelihood(output, noisy) if "sigma" in output else error, "blind_error": error}


VARIANTS = {
    "paper": Config(),
    "paper_estimated": Config(noise="estimated"),
    "paper_3": Config(frames=3),
    "paper_1": Config(frames=1),
    "small": Config(width=12),
    "tiny": Config(width=6),
    "test": Config(width=3),
}


def recipe(config: Config) -> Recipe:
    """The official training of the official width (README and ``single_train.py``); the others are trained in minutes."""
    if config.width == Config().width:
        # Officially halved at epochs 20, 25 and 30 of 32 or 40; ``step`` divides by ten, here once, at the second of them.
        return Recipe(
            optimizer="adam", lr=1e-4, schedule="step", decay_at=(0.7,), warmup=0.0, batch_size=8, patch=128, clip=None,
            keep="best", augment=FilmAugment(),
        )  # fmt: skip
    return Recipe(optimizer="adam", lr=3e-3, batch_size=4, patch=48, average=0.99, keep="best", augment=FilmAugment())


def build(spec: Spec, config: Config) -> UDVD:
    """The noise as large as it is in normalised frames."""
    sigma = spec.more["sigma"]
    return UDVD(spec.channels, None if sigma is None else sigma / spec.std[0], config)


PAPER = Paper(
    variants=VARIANTS,
    build=build,
    recipe=recipe,
    auto=("tiny", "small"),
    loss=lambda config: loss,
)
