"""UNet++: U-Nets of depth 1 to 4 in one network, trained together and cut apart afterwards.

Zhou, Siddiquee, Tajbakhsh and Liang, "UNet++: Redesigning Skip Connections to Exploit Multiscale Features in Image Segmentation", IEEE TMI
2020 (arXiv 1912.05074); first version DLMIA 2018 (arXiv 1807.10165).

How deep a U-Net should be is unknown before it is trained, and its skips join maps that are semantically far apart. UNet++ fills the
triangle between encoder and decoder with nodes x(i,j), each of which sees all earlier nodes of its row and the one below, up-sampled. Deep
supervision makes every node x(0,j) of the top row an answer, so that the trained network can be cut to the depth that a device can afford
(``prune``).

Differences from the official Keras code (read for facts; it is under a non-commercial licence): the up-sampled map comes last in the
concatenation, as in eq. 1 (there: first); K classes with a softmax (there: one class with a sigmoid); the transposed convolutions are drawn
from He's distribution too. Batch normalisation is not in the paper's network; the smaller variants have it, as they are trained in minutes.

Shapes: B batch, C image channels, K classes, *S the spatial axes (H W, or D H W of a volume), f(i) channels of row i, whose maps have the
sides *S / 2^i, N supervised nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.nn.conv import LAYERS, he_init
from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe
from paperworks.tasks.segmentation import IGNORE, soft_dice


@dataclass(frozen=True, kw_only=True)
class Config:
    """The triangle of nodes and what is in them."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """f(i), channels of row i; one more than the depth."""
    deep_supervision: bool = True
    """A head on each of x(0,1) ... x(0,L); without it only on x(0,L)."""
    norm: bool = False
    """Batch normalisation after each convolution."""
    dropout: float = 0.5
    """Rate after each convolution."""
    regions: bool = False
    """Train on the loss of the first version, whose Dice is that of whole regions; the journal's is a sum over single pixels."""


class H(nn.Sequential):
    """H(.): two 3x3 convolutions, each with a ReLU and dropout."""

    def __init__(self, inputs: int, outputs: int, config: Config, ndim: int) -> None:
        of = LAYERS[ndim]
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers.append(of.conv(channels, outputs, kernel_size=3, padding=1, bias=not config.norm))
            if config.norm:
                layers.append(of.batch_norm(outputs))
            layers.append(nn.ReLU(inplace=True))
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
        super().__init__(*layers)


class UNetPlusPlus(nn.Module):
    """UNet++ L^d of depth d = len(widths) - 1: the nodes x(i,j) with i + j <= d. Sides of the input are multiples of 2^d."""

    def __init__(self, channels: int, classes: int, config: Config, ndim: int = 2) -> None:
        super().__init__()
        self.channels, self.classes, self.config, self.ndim = channels, classes, config, ndim
        f, of = config.widths, LAYERS[ndim]
        self.depth = len(f) - 1
        self.grid = Grid(2**self.depth)
        self.pool = of.max_pool(2)
        self.nodes, self.up = nn.ModuleDict(), nn.ModuleDict()
        for i in range(self.depth + 1):
            self.nodes[name(i, 0)] = H(f[i - 1] if i else channels, f[i], config, ndim)
            for j in range(1, self.depth - i + 1):
                self.up[name(i, j)] = of.up_conv(f[i + 1], f[i], kernel_size=2, stride=2)  # U(.)
                self.nodes[name(i, j)] = H((j + 1) * f[i], f[i], config, ndim)
        supervised = range(1, self.depth + 1) if config.deep_supervision else (self.depth,)
        self.heads = nn.ModuleDict({name(0, j): of.conv(f[0], classes, kernel_size=1) for j in supervised})
        he_init(self)

    def forward(self, image: Float[Tensor, "B C *S"]) -> Output:
        """Answer with all supervised nodes.

        Returns:
            ``logits`` B K *S, whose softmax is the mean of the heads' probabilities (the paper's accurate mode), and
            ``heads`` N B K *S, the logits of each head from the shallowest to the deepest.
        """
        x: dict[tuple[int, int], Tensor] = {}
        # The d-th diagonal i + j = d is what L^d has more than L^(d-1): one step down the encoder, then all the way up.
        for d in range(self.depth + 1):
            x[d, 0] = self.nodes[name(d, 0)](self.pool(x[d - 1, 0]) if d else image)
            for j in range(1, d + 1):
                i = d - j
                row = [x[i, k] for k in range(j)]
                x[i, j] = self.nodes[name(i, j)](torch.cat([*row, self.up[name(i, j)](x[i + 1, j - 1])], 1))  # eq. 1
        heads = torch.stack([head(x[0, int(key[-1])]) for key, head in self.heads.items()])  # N B K *S
        return {"logits": heads.log_softmax(2).logsumexp(0) - math.log(len(self.heads)), "heads": heads}

    def prune(self, depth: int) -> UNetPlusPlus:
        """A copy cut to UNet++ L^depth: only the nodes with i + j <= depth, and the head on x(0,depth) alone (the fast mode).

        Its output is that of this network's own head on x(0,depth), for fewer parameters and computations. A network that was trained
        without deep supervision has one head, on its last node; the cut network gets that one, which was never trained on x(0,depth).

        Raises:
            ValueError: this network has no such depth.
        """
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth {depth}: this network can be pruned to 1 ... {self.depth}")
        config = replace(self.config, widths=self.config.widths[: depth + 1], deep_supervision=False)
        pruned = UNetPlusPlus(self.channels, self.classes, config, self.ndim)
        for key in pruned.nodes:
            pruned.nodes[key].load_state_dict(self.nodes[key].state_dict())
        for key in pruned.up:
            pruned.up[key].load_state_dict(self.up[key].state_dict())
        mine = self.heads[name(0, depth)] if self.config.deep_supervision else self.heads[name(0, self.depth)]
        pruned.heads[name(0, depth)].load_state_dict(mine.state_dict())
        return pruned.to(next(self.parameters()).device).train(self.training)


def name(i: int, j: int) -> str:
    """Key of node x(i,j): row i counted down the encoder, column j along the skip."""
    return f"{i}_{j}"


def hybrid_loss(logits: Float[Tensor, "B K *S"], target: Int[Tensor, "B ..."]) -> tuple[Tensor, Tensor]:
    """The two terms of the hybrid loss (TMI paper, eq. 3), as they are printed there: pixel by pixel.

    -1/N sum_c sum_n (y log p + 2 y p / (y^2 + p^2)) over the N pixels that are not ignored. With y in {0, 1} only the true class's
    probability p is left of the sums: -log p and -2 p / (1 + p^2). A perfect answer costs 0 - 1 = -1.
    """
    valid = target != IGNORE
    log_p = logits.float().log_softmax(1).gather(1, target.where(valid, 0).unsqueeze(1)).squeeze(1)  # of the true class, B *S
    p = log_p.exp()
    pixels = valid.sum().clamp_min(1)
    return -(log_p * valid).sum() / pixels, -(2 * p / (1 + p**2) * valid).sum() / pixels


def region_loss(logits: Float[Tensor, "B K *S"], target: Int[Tensor, "B ..."]) -> tuple[Tensor, Tensor]:
    """The two terms of the first version's loss (DLMIA paper, eq. 3): half the cross-entropy, less the soft Dice over the batch.

    The Dice of K classes is the mean of those but the background. A perfect answer costs 0 - 1 = -1 as well.
    """
    probabilities = logits.float().softmax(1)
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE) / 2, -soft_dice(probabilities, target)


def deep_loss(output: Output, batch: Batch, regions: bool = False) -> dict[str, Tensor]:
    """Sum over the heads (eq. 4, all weights eta = 1) of the hybrid loss or of the first version's, and its two terms."""
    one = region_loss if regions else hybrid_loss
    terms = torch.stack([torch.stack(one(head, batch["mask"])) for head in output["heads"]]).sum(0)
    return {"loss": terms.sum(), "cross_entropy": terms[0], "dice": terms[1]}


VARIANTS = {
    "paper": Config(),
    "norm": Config(norm=True, dropout=0.0, regions=True),
    "small": Config(widths=(16, 32, 64, 128, 256), norm=True, dropout=0.0, regions=True),
    "tiny": Config(widths=(8, 16, 32, 64, 128), norm=True, dropout=0.0, regions=True),
    "test": Config(widths=(2, 4, 4, 8, 8), norm=True, dropout=0.0),
}


def recipe(config: Config) -> Recipe:
    """The paper's Adam at a constant 3e-4; the normalised variants are trained in minutes."""
    if config.norm:
        return Recipe(lr=3e-3 if config.widths[0] <= 16 else 1e-3, weight_decay=1e-2, batch_size=8, average=0.99)
    # Keras' L2 of 1e-4 is added to the loss as 1e-4 |w|^2, whose gradient is that of a weight decay of 2e-4.
    return Recipe(optimizer="adam", lr=3e-4, momentum=0.9, weight_decay=2e-4, schedule="constant", warmup=0.0, clip=None)


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: UNetPlusPlus(spec.channels, len(spec.classes), config, spec.ndim),
    recipe=recipe,
    auto=("tiny", "small", "norm"),
    loss=lambda config: partial(deep_loss, regions=config.regions),
)
