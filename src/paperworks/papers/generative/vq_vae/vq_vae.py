"""VQ-VAE: the code is a map of indices into a learnt codebook, and a second model learns which maps occur.

van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017 (arXiv 1711.00937).

The encoder's vector at each position is replaced by the nearest of K codebook vectors; gradients skip the choice by being copied from the
decoder's input to the encoder's output. A PixelCNN over the indices is the prior that images are sampled from.

Layers as in the authors' Sonnet module and CIFAR notebook (google-deepmind/sonnet). Different from them: moving averages start at the
first codebook with a count of one for each vector, so that unused vectors stay where they are (Sonnet's start at 0, which sends them to the
origin); the codebook starts at encoder outputs of the first batch; the squared error is divided by the variance of the batch, not
of the data set; the prior learns at the same time, from indices through which no gradient passes, not afterwards.

Shapes: B batch, C image channels, S side of the (square) image, W channels within, D those of a code, h w = S/4 S/4, K codebook vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe
from paperworks.tasks.generation import Vary, image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """Encoder, codebook, decoder and prior."""

    width: int = 256
    """W."""
    residual: int = 256
    """Channels inside a residual block."""
    blocks: int = 2
    """Residual blocks on each side."""
    codes: int = 512
    """K."""
    code_width: int = 64
    """D."""
    beta: float = 0.25
    """Weight of the commitment (eq. 3)."""
    codebook: Literal["ema", "loss"] = "loss"
    """``loss``: the second term of eq. 3; ``ema``: moving averages in its place (appendix A.1)."""
    decay: float = 0.99
    """gamma of the moving averages."""
    prior_width: int = 128
    prior_blocks: int = 10
    image_size: int | None = None
    """S, a multiple of 4; None takes the data set's."""


class Quantizer(nn.Module):
    """The codebook e (section 3.1)."""

    started: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.moving, self.decay, self.epsilon = config.codebook == "ema", config.decay, 1e-5
        self.e = nn.Parameter(torch.randn(config.codes, config.code_width), requires_grad=not self.moving)  # K D
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        if self.moving:
            self.register_buffer("count", torch.ones(config.codes))  # N_k
            self.register_buffer("total", self.e.detach().clone())  # m_k

    def nearest(self, z: Float[Tensor, "B D h w"]) -> Int[Tensor, "B h w"]:
        """argmin_j ||z_e - e_j|| at each position (eq. 1)."""
        flat = rearrange(z.float(), "b d h w -> (b h w) d")
        with torch.autocast(z.device.type, enabled=False):
            distance = self.e.square().sum(1) - 2 * flat @ self.e.T  # ||z||^2 is the same for all j
        return rearrange(distance.argmin(1), "(b h w) -> b h w", h=z.shape[2], w=z.shape[3])

    def lookup(self, index: Int[Tensor, "B h w"]) -> Float[Tensor, "B D h w"]:
        """e_k at each position."""
        return rearrange(F.embedding(index, self.e), "b h w d -> b d h w")

    def forward(self, z: Float[Tensor, "B D h w"]) -> tuple[Float[Tensor, "B D h w"], Float[Tensor, "B D h w"], Int[Tensor, "B h w"]]:
        """What the decoder is given (gradients go straight through to ``z``), the codebook vectors, and their indices."""
        if self.training and not self.started:
            self.start(z)
        index = self.nearest(z)
        e = self.lookup(index)
        if self.training and self.moving:
            self.follow(z, index)
        return z + (e - z).detach(), e, index

    @torch.no_grad()
    def start(self, z: Float[Tensor, "B D h w"]) -> None:
        """Put the codebook where the encoder's outputs are."""
        flat = rearrange(z.float(), "b d h w -> (b h w) d")
        self.e.copy_(flat[torch.randint(len(flat), (len(self.e),), device=flat.device)])
        if self.moving:
            self.total.copy_(self.e)
        self.started.fill_(True)

    @torch.no_grad()
    def follow(self, z: Float[Tensor, "B D h w"], index: Int[Tensor, "B h w"]) -> None:
        """One step of the moving averages (appendix A.1, eqs. 6 to 8); as in Sonnet the counts are smoothed (Laplace)."""
        flat = rearrange(z.float(), "b d h w -> (b h w) d")
        with torch.autocast(z.device.type, enabled=False):
            chosen = F.one_hot(index.flatten(), len(self.e)).float()  # n K
            self.count.lerp_(chosen.sum(0), 1 - self.decay)
            self.total.lerp_(chosen.T @ flat, 1 - self.decay)
        n = self.count.sum()
        smoothed = (self.count + self.epsilon) / (n + len(self.e) * self.epsilon) * n
        self.e.copy_(self.total / smoothed[:, None])


class Residual(nn.Module):
    """ReLU, 3x3, ReLU, 1x1, and the input added (section 4.1)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(width, inner, 3, padding=1)
        self.conv1 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Float[Tensor, "B W h w"]) -> Float[Tensor, "B W h w"]:
        """Shapes stay."""
        return x + self.conv1(F.relu(self.conv3(F.relu(x))))


class MaskedConv(nn.Conv2d):
    """A convolution that sees the positions above and to the left; ``own`` says whether it sees its own position (mask B) or not (mask A)."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, own: bool) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        mask = torch.ones(kernel, kernel)
        mask[kernel // 2, kernel // 2 + own :] = 0
        mask[kernel // 2 + 1 :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Conv2d
        """Shapes stay."""
        return F.conv2d(input, self.weight * self.mask, self.bias, padding=self.padding)


class CausalBlock(nn.Module):
    """Residual block of the PixelCNN (van den Oord et al. 2016, figure 5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 2, 1)
        self.conv = MaskedConv(width // 2, width // 2, 3, own=True)
        self.widen = nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Float[Tensor, "B W h w"]) -> Float[Tensor, "B W h w"]:
        """Shapes stay."""
        return x + self.widen(F.relu(self.conv(F.relu(self.reduce(F.relu(x))))))


class PixelCNN(nn.Module):
    """p(z) = product over positions, row by row, of p(z_i | those before) (section 3.3)."""

    def __init__(self, codes: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(codes, width)
        self.first = MaskedConv(width, width, 7, own=False)
        self.blocks = nn.Sequential(*(CausalBlock(width) for _ in range(blocks)))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, codes, 1))

    def forward(self, index: Int[Tensor, "B h w"]) -> Float[Tensor, "B K h w"]:
        """Log odds of each index, given those before it."""
        return self.last(self.blocks(self.first(rearrange(self.embed(index), "b h w c -> b c h w"))))

    @torch.no_grad()
    def sample(self, n: int, height: int, width: int, generator: torch.Generator) -> Int[Tensor, "B h w"]:
        """Maps of indices, drawn position by position."""
        index = torch.zeros(n, height, width, dtype=torch.long)
        device = self.embed.weight.device
        for y in range(height):
            for x in range(width):
                p = self(index[:, : y + 1].to(device))[:, :, y, x].float().softmax(1).cpu()
                index[:, y, x] = torch.multinomial(p, 1, generator=generator)[:, 0]
        return index.to(device)


class VQVAE(nn.Module):
    """Encoder, quantiser and decoder (figure 1), and the prior over the indices."""

    def __init__(self, channels: int, side: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)
        self.codes, self.cells = config.codes, side // 4
        w = config.width

        def residuals() -> nn.Sequential:
            return nn.Sequential(*(Residual(w, config.residual) for _ in range(config.blocks)), nn.ReLU())

        self.encoder = nn.Sequential(
            nn.Conv2d(channels, w // 2, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(w // 2, w, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(w, w, 3, padding=1), residuals(), nn.Conv2d(w, config.code_width, 1),
        )  # fmt: skip
        self.quantizer = Quantizer(config)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_width, w, 3, padding=1), residuals(),
            nn.ConvTranspose2d(w, w // 2, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(w // 2, channels, 4, stride=2, padding=1),
        )  # fmt: skip
        self.prior = PixelCNN(config.codes, config.prior_width, config.prior_blocks)

    def encode(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B D h w"]:
        """z_e, before it is quantised."""
        return self.encoder(image - 0.5)

    def index(self, image: Float[Tensor, "B C S S"]) -> Int[Tensor, "B h w"]:
        """The discrete code of an image."""
        return self.quantizer.nearest(self.encode(image))

    def decode(self, z: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C S S"]:
        """Images in [0, 1] of the codebook vectors nearest to ``z``."""
        return self.decode_index(self.quantizer.nearest(z))

    def decode_index(self, index: Int[Tensor, "B h w"]) -> Float[Tensor, "B C S S"]:
        """Images in [0, 1] of discrete codes."""
        return (self.decoder(self.quantizer.lookup(index)) + 0.5).clamp(0, 1)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "B C S S"]:
        """Decoded draws of the prior."""
        return self.decode_index(self.prior.sample(n, self.cells, self.cells, generator))

    def forward(self, image: Float[Tensor, "B C S S"]) -> Output:
        """Rebuild through the codebook.

        Returns:
            ``reconstruction`` B C S S in [0, 1] and ``mean``, the same before it is cut off there; ``z_e``, ``e`` B D h w; ``index`` B h w;
            ``prior`` B K h w, the log odds that the prior gives to the indices.
        """
        z = self.encode(image)
        z_q, e, index = self.quantizer(z)
        mean = self.decoder(z_q) + 0.5
        return {"reconstruction": mean.clamp(0, 1), "mean": mean, "z_e": z, "e": e, "index": index, "prior": self.prior(index)}


def perplexity(index: Tensor, codes: int) -> Tensor:
    """The exponential of the entropy of how often each index is used: how many vectors of the codebook are in use, 1 to K."""
    p = torch.bincount(index.flatten(), minlength=codes).float() / index.numel()
    return torch.special.entr(p).sum().exp()


def objective(config: Config) -> Loss:
    """Eq. 3, each term a mean over its numbers as in Sonnet, and the prior's cross-entropy (nats per index)."""

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        image, z_e, e = batch["image"], output["z_e"], output["e"]
        reconstruction = F.mse_loss(output["mean"], image) / image.var().clamp_min(1e-3)
        commitment = F.mse_loss(z_e, e.detach())
        prior = F.cross_entropy(output["prior"], output["index"])
        total = reconstruction + config.beta * commitment + prior
        if config.codebook == "loss":
            total = total + F.mse_loss(e, z_e.detach())
        used = perplexity(output["index"], config.codes)
        return {"loss": total, "reconstruction_error": reconstruction, "commitment": commitment, "prior_nats": prior, "perplexity": used}

    return loss


VARIANTS = {
    "paper": Config(),
    "sonnet": Config(width=128, residual=32, codebook="ema"),
    "small": Config(width=32, residual=16, codes=64, code_width=16, codebook="ema", prior_width=32, prior_blocks=3),
    "test": Config(width=8, residual=4, blocks=1, codes=16, code_width=4, prior_width=8, prior_blocks=1, image_size=16),
}


def recipe(config: Config) -> Recipe:
    """The paper's Adam and batch; the notebook's; and what teaches the small one in minutes."""
    if config.width >= 256:
        return Recipe(optimizer="adam", lr=2e-4, schedule="constant", warmup=0.0, batch_size=128, clip=None, augment=Vary())
    lr = 3e-4 if config.width >= 128 else 2e-3
    return Recipe(optimizer="adam", lr=lr, schedule="cosine", warmup=0.0, batch_size=32, clip=None, augment=Vary())


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: VQVAE(spec.channels, image_side(spec, config.image_size), config),
    recipe=recipe,
    auto=("small", "sonnet"),
    loss=objective,
)
