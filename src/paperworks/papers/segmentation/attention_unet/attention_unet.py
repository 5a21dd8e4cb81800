"""Attention U-Net: gates on the skips let through what the coarser decoder level is asking for.

Oktay, Schlemper, Le Folgoc, Lee, Heinrich, Misawa, Mori, McDonagh, Hammerla, Kainz, Glocker and Rueckert, "Attention U-Net: Learning Where
to Look for the Pancreas", MIDL 2018 (arXiv 1804.03999).

A cascade of networks first finds a small organ and then segments it, and learns the same low-level features twice. An additive attention
gate does the finding inside one U-Net: each skip is multiplied, position by position, with a coefficient in (0, 1) that is computed from
the skip and from the decoder one level below.

As in the official code (ozan-oktay/Attention-Gated-Networks) where the paper's figure leaves it open: a 1x1 convolution with batch norm
after each gate and another, with ReLU, before the concatenation; up-sampling without a change of channels; the finest skip is not gated;
the answer is a 1x1 convolution of the answers of all four decoder levels. Different from it: the bias of psi starts at 3, so that a new
gate lets most through (the paper's wish; the official segmentation gates start at about 0), other biases at 0, batch norm's scale at 1.

Shapes: B batch, C image channels, K classes, *S the spatial axes (H W, or D H W of a volume), *s = *S / 2^(l-1) at level l, F and G
channels, A gates of a skip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.augment import Augment
from paperworks.nn.conv import LAYERS, DoubleConv, he_init
from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe
from paperworks.tasks.segmentation import IGNORE

LINEAR = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The U-Net's body and what is on its skips."""

    widths: tuple[int, int, int, int, int] = (16, 32, 64, 128, 256)
    """Channels of levels 1 to 5 (64 ... 1024 by the official ``feature_scale`` of 4)."""
    gates: int = 1
    """Gates on each of the skips of levels 2 to 4; 0 is the paper's baseline, the same U-Net without them."""
    psi_bias: float = 3.0
    """b_psi at the start: sigmoid(3) = 0.95 of everything passes."""


def projection(inputs: int, outputs: int, ndim: int) -> nn.Sequential:
    """1x1 convolution and batch norm."""
    of = LAYERS[ndim]
    return nn.Sequential(of.conv(inputs, outputs, kernel_size=1), of.batch_norm(outputs))


class AttentionGate(nn.Module):
    """The grid attention gate, eqs. 1 and 2 and figure 2."""

    def __init__(self, width: int, query_width: int, ndim: int) -> None:
        super().__init__()
        conv = LAYERS[ndim].conv
        self.mode = LINEAR[ndim]
        self.w_x = conv(width, width, kernel_size=2, stride=2, bias=False)  # F_int = F_x, on the grid of g
        self.w_g = conv(query_width, width, kernel_size=1)  # its bias is b_g
        self.psi = conv(width, 1, kernel_size=1)  # its bias is b_psi
        self.out = projection(width, width, ndim)

    def forward(self, x: Float[Tensor, "B F *s"], g: Float[Tensor, "B G *half"]) -> tuple[Float[Tensor, "B F *s"], Float[Tensor, "B 1 *s"]]:
        """Gate the skip ``x`` by the coarser ``g``, which has half its sides (odd ones rounded down, as pooling does).

        Returns:
            The gated skip, and alpha: the share, in (0, 1), of each position of ``x`` that was let through.
        """
        q = self.psi(F.relu(self.w_x(x) + self.w_g(g)))  # eq. 1, B 1 *half
        alpha = F.interpolate(torch.sigmoid(q), size=x.shape[2:], mode=self.mode, align_corners=False)  # eq. 2: a sigmoid, not a softmax
        return self.out(alpha * x), alpha


class GatedSkip(nn.Module):
    """``gates`` attention gates side by side, and a 1x1 convolution with batch norm and ReLU that combines them."""

    def __init__(self, gates: int, width: int, query_width: int, ndim: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(AttentionGate(width, query_width, ndim) for _ in range(gates))
        self.combine = nn.Sequential(*projection(gates * width, width, ndim), nn.ReLU(inplace=True))

    def forward(self, x: Float[Tensor, "B F *s"], g: Float[Tensor, "B G *half"]) -> tuple[Float[Tensor, "B F *s"], Float[Tensor, "B A *s"]]:
        """The gated skip and the maps of its gates."""
        gated, alphas = zip(*(gate(x, g) for gate in self.gates))
        return self.combine(torch.cat(gated, 1)), torch.cat(alphas, 1)


class AttentionUNet(nn.Module):
    """The U-Net of figure 1. Sides of the input are multiples of 16."""

    grid = Grid(16)

    def __init__(self, channels: int, classes: int, config: Config, ndim: int = 2) -> None:
        super().__init__()
        f = config.widths
        conv, self.mode = LAYERS[ndim].conv, LINEAR[ndim]
        self.pool = LAYERS[ndim].max_pool(2)
        # The official convolutions have a bias, which the batch norm takes away again.
        self.encoder = nn.ModuleList(DoubleConv(i, o, bias=True, ndim=ndim) for i, o in zip((channels, *f[:-1]), f))
        self.decoder = nn.ModuleDict({str(i): DoubleConv(f[i] + f[i - 1], f[i - 1], bias=True, ndim=ndim) for i in (4, 3, 2, 1)})
        self.answers = nn.ModuleDict({str(i): conv(f[i - 1], classes, kernel_size=1) for i in (1, 2, 3, 4)})
        self.final = conv(4 * classes, classes, kernel_size=1)
        self.skips = nn.ModuleDict()
        if config.gates:
            self.query = nn.Sequential(*projection(f[4], f[4], ndim), nn.ReLU(inplace=True))
            for i in (4, 3, 2):
                self.skips[str(i)] = GatedSkip(config.gates, f[i - 1], f[i], ndim)
        he_init(self)
        for module in self.modules():
            if isinstance(module, AttentionGate):
                nn.init.constant_(module.psi.bias, config.psi_bias)  # pyright: ignore[reportArgumentType]

    def forward(self, image: Float[Tensor, "B C *S"]) -> Output:
        """Segment, and say where the gates looked.

        Returns:
            ``logits`` B K *S and, where there are gates, ``attention_2``, ``attention_3`` and ``attention_4`` (B A *s): alpha at levels 2
            to 4, at half, a quarter and an eighth of the image's sides.
        """
        skips: dict[int, Tensor] = {}
        x = image
        for i, block in enumerate(self.encoder, 1):
            skips[i] = x = block(x if i == 1 else self.pool(x))
        out: Output = {}
        answers = []
        for i in (4, 3, 2, 1):
            skip = skips[i]
            if str(i) in self.skips:
                g = self.query(x) if i == 4 else x  # below level 4 is the encoder's end, below the others the decoder
                skip, out[f"attention_{i}"] = self.skips[str(i)](skip, g)
            x = self.decoder[str(i)](torch.cat([skip, self._enlarge(x, 2)], 1))
            answers.append(self._enlarge(self.answers[str(i)](x), 2 ** (i - 1)))  # deep supervision: B K *S
        out["logits"] = self.final(torch.cat(answers[::-1], 1))
        return out

    def _enlarge(self, x: Tensor, scale: int) -> Tensor:
        return x if scale == 1 else F.interpolate(x, scale_factor=float(scale), mode=self.mode, align_corners=False)


def sorensen_dice(logits: Float[Tensor, "B K *S"], target: Int[Tensor, "B ..."], smooth: float = 0.01) -> Tensor:
    """1 - the soft Dice coefficient, averaged over the images of the batch and over all classes, the background too.

    The official (2 (sum p t + s)) / (sum p + sum t + s) counts ``smooth`` twice in the numerator: a class that is neither there nor
    predicted scores 2, not 1, so the loss of a perfect answer can be negative.
    """
    valid = (target != IGNORE).unsqueeze(1)
    p = logits.float().softmax(1) * valid
    t = F.one_hot(target.where(target != IGNORE, 0), logits.shape[1]).movedim(-1, 1) * valid
    axes = tuple(range(2, logits.ndim))
    return 1 - (2 * ((p * t).sum(axes) + smooth) / (p.sum(axes) + t.sum(axes) + smooth)).mean()


def dice_loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """The Soerensen-Dice loss of the answer."""
    return {"loss": sorensen_dice(output["logits"], batch["mask"])}


VARIANTS = {
    "paper": Config(),
    "paper_multi": Config(gates=2),
    "wide": Config(widths=(32, 64, 128, 256, 512)),
    "small": Config(widths=(8, 16, 32, 64, 128)),
    "test": Config(widths=(2, 4, 4, 8, 8)),
}


def recipe(config: Config) -> Recipe:
    """The official training of the official widths; the other variants are trained in minutes."""
    if config.widths != Config().widths:
        return Recipe(lr=3e-3 if config.widths[0] <= 16 else 1e-3, weight_decay=1e-2, batch_size=8, average=0.99)
    augment = Augment(rotate=15, scale=(0.7, 1.3), shift=0.1, brightness=0, contrast=0, gamma=0)
    # Officially the learning rate is halved after each quarter of 1000 epochs; ``step`` divides it by ten, here before the last quarter.
    return Recipe(
        optimizer="adam", lr=1e-4, momentum=0.9, weight_decay=1e-6, schedule="step", decay_at=(0.75,), warmup=0.0,
        batch_size=2, patch=160, clip=None, augment=augment,
    )  # fmt: skip


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: AttentionUNet(spec.channels, len(spec.classes), config, spec.ndim),
    recipe=recipe,
    auto=("small", "wide"),
    loss=lambda config: dice_loss,
)
