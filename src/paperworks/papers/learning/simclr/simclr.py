"""SimCLR: two augmentations of one image find each other among those of a large batch.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020 (arXiv 2002.05709).

Of N images come 2N views; each has one positive, the other view of its image, and 2N - 2 negatives. What makes it work is the composition of
crops with colour distortion, a non-linear head between the representation h and the z that the loss sees, and many negatives.

As in the official code (google-research/simclr): layers of the head have no bias but a batch norm each, the last one's without beta, and
batch norm and negatives are those of all processes. Different from it: the loss is the paper's mean over 2N anchors, half of what
the code adds up; the crop is resized linearly with antialiasing, not cubically; the optimiser is SGD with momentum where the paper has LARS
for batches of thousands, so that the learning rates of the paper's variants are ours.

Shapes: N images, c h w an image, F numbers of the representation, C of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import TwoViews
from paperworks.nn.batch_norm import GlobalBatchNorm
from paperworks.nn.processes import joined, rank
from paperworks.papers.learning.encoders import Stem, encoder
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Spec
from paperworks.tasks.representation import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """ResNet-50 on ImageNet by default."""

    backbone: str = "resnet50"
    """``resnet18`` ... ``resnet101``, or PAPER/VARIANT of a paper on classification."""
    stem: Stem = "imagenet"
    width: int = 64
    """Channels of the ResNet's first stage; 128 and 256 are the paper's 2x and 4x."""
    dim: int = 128
    """C, numbers of z."""
    zero_init: bool = True
    """A ResNet's blocks start as their shortcuts."""
    temperature: float = 0.1
    """tau of NT-Xent."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class ProjectionHead(nn.Sequential):
    """g: z = W2 relu(W1 h), with a batch norm after each layer."""

    def __init__(self, features: int, dim: int) -> None:
        last = GlobalBatchNorm(dim)
        last.register_parameter("bias", None)  # no beta
        super().__init__(
            nn.Linear(features, features, bias=False), GlobalBatchNorm(features), nn.ReLU(inplace=True),
            nn.Linear(features, dim, bias=False), last,
        )  # fmt: skip


class SimCLR(nn.Module):
    """Algorithm 1 of the paper, but for the loss and the optimiser."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        self.encoder = encoder(
            config.backbone, spec, stem=config.stem, width=config.width, zero_init_residual=config.zero_init, norm=GlobalBatchNorm
        )
        self.head = ProjectionHead(self.encoder.embedding, config.dim)  # pyright: ignore[reportArgumentType]
        self.grid = getattr(self.encoder, "grid", Grid(fixed=config.image_size or image_side(spec)))

    def forward(self, image: Float[Tensor, "N c h w"], view: Float[Tensor, "N c h w"] | None = None) -> Output:
        """Encode images; in training their second views too, in one batch.

        Returns:
            ``embedding`` N F, h, which is what one keeps, ``projection`` N C, z, and, where there is a ``view``, ``projected_view`` N C.
        """
        h: Tensor = self.encoder.embed(image if view is None else torch.cat([image, view]))  # pyright: ignore[reportCallIssue]
        z = self.head(h)
        if view is None:
            return {"embedding": h, "projection": z}
        n = len(image)
        return {"embedding": h[:n], "projection": z[:n], "projected_view": z[n:]}


def nt_xent(z: Float[Tensor, "N C"], z_view: Float[Tensor, "N C"], temperature: float) -> Tensor:
    """Equation 1, averaged over the 2N anchors of this process; positives and negatives are those of all processes.

    Row i of ``z`` and row i of ``z_view`` are a positive pair. An anchor is no negative of itself.
    """
    n = len(z)
    z, z_view = (F.normalize(part.float(), dim=1) for part in (z, z_view))
    anchors = torch.cat([z, z_view])  # 2N C
    z_all, z_view_all = joined(z), joined(z_view)
    others = torch.cat([z_all, z_view_all])  # 2M C, M images of all processes
    similarity = anchors @ others.T / temperature
    first = torch.arange(n, device=z.device) + rank() * n
    second = first + len(z_all)
    own, partner = torch.cat([first, second]), torch.cat([second, first])
    similarity = similarity.scatter(1, own[:, None], float("-inf"))
    return F.cross_entropy(similarity, partner)


def loss(config: Config) -> Loss:
    """NT-Xent."""

    def contrast(output: Output, batch: Batch) -> dict[str, Tensor]:
        return {"loss": nt_xent(output["projection"], output["projected_view"], config.temperature)}

    return contrast


VARIANTS = {
    "r50": Config(),
    "r50_2x": Config(width=128),
    "r50_4x": Config(width=256),
    "cifar": Config(backbone="resnet18", stem="cifar", temperature=0.5, image_size=None),
    "small": Config(backbone="resnet18", width=16, temperature=0.5, image_size=None),
    "test": Config(backbone="resnet18", stem="cifar", width=2, dim=8, zero_init=False, temperature=0.5, image_size=32),
}


def distortion(strength: float) -> tuple[float, float, float, float]:
    """Appendix A: brightness, contrast, saturation and hue for a strength s."""
    return (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)


def recipe(config: Config) -> Recipe:
    """Appendix A's augmentation with s = 1 and blur, for CIFAR (appendix B.9) with s = 0.5 and without."""
    small = TwoViews(area=(0.08, 1.0), jitter=distortion(0.5))
    if config.width < 64:
        return Recipe(lr=2e-3, weight_decay=1e-4, batch_size=128, patch=128, clip=None, augment=small)  # minutes, not days
    if config.stem == "cifar":
        return Recipe(optimizer="sgd", lr=0.5, weight_decay=1e-4, warmup=0.1, batch_size=512, patch=128, clip=None, augment=small)
    view = TwoViews(area=(0.08, 1.0), jitter=distortion(1.0), blur=0.5)
    return Recipe(optimizer="sgd", lr=0.5, weight_decay=1e-4, warmup=0.1, batch_size=512, patch=224, clip=None, augment=view)


PAPER = Paper(variants=VARIANTS, build=SimCLR, recipe=recipe, auto=("small", "cifar"), loss=loss)
