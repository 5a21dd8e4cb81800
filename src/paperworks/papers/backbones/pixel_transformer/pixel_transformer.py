"""Pixel Transformer: a plain Transformer whose tokens are single pixels, so that no part of it knows which pixels are neighbours.

Nguyen, Assran, Jain, Oswald, Snoek and Chen, "An Image is Worth More Than 16x16 Patches: Exploring Transformers on Individual Pixels", ICLR 2025
(arXiv 2406.09415). Not to be taken for the pooling-based ViT, which is called PiT as well.

A ViT still says that pixels of one patch belong together. Patches of one pixel and a position embedding that starts from chance take the last of
that away: what remains is a set of pixels, each with a name. The finding is that this learns at least as well, for a sequence that is
P^2 times as long. The paper's second experiment is here too: ``swaps`` of pixels, the same for every image, which a ViT has to suffer and
a set does not notice.

No official code is known. The encoder is ``papers/backbones/vit``; its head starts from N(0, 0.02), as nothing is fine-tuned here. Mixup, CutMix and
RandAugment of the DeiT recipe and its stochastic depth are left out.

Shapes: B batch, C image channels, K classes, S side of the images, P side of a patch, N = (S / P)^2 tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.papers.backbones.vit import vit
from paperworks.tasks.base import Batch, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """A plain ViT's numbers, and what is done to the order of its pixels."""

    layers: int = 12
    width: int = 384
    """D. The MLPs are four times as wide."""
    heads: int = 6
    patch: int = 1
    """P: 1 is the paper's, more are the ViTs that it is compared with."""
    image_size: int | None = 32
    """S; None takes it from the data."""
    swaps: int = 0
    """Pairs of pixels that change places, the same ones in every image (section 5)."""
    reach: int | None = None
    """Largest distance of such a pair, in steps along rows and columns; None is any."""


class PixelTransformer(vit.ViT):
    """A ViT of pixels, or of larger patches for comparison, that may see all images through one and the same shuffle of their pixels."""

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        if config.width % config.heads:
            raise InputError(f"width={config.width} is not a multiple of heads={config.heads}")
        if image_size % config.patch:
            raise InputError(f"patch={config.patch} does not divide images of {image_size} pixels")
        plain = vit.Config(layers=config.layers, width=config.width, heads=config.heads, patch=config.patch, image_size=image_size)
        super().__init__(channels, classes, image_size, plain)
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        self.register_buffer("order", shuffled(image_size, config.swaps, config.reach) if config.swaps else None)

    def embedded(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B N+1 D"]:
        """The class token and the tokens of the pixels, or of patches of the shuffled pixels."""
        if self.order is not None:
            image = image.flatten(2)[:, :, self.order].view_as(image)  # pyright: ignore[reportArgumentType]
        return super().embedded(image)


def shuffled(side: int, swaps: int, reach: int | None = None, seed: int = 0) -> Int[Tensor, " S*S"]:
    """Which pixel comes to each place when ``swaps`` pairs have changed places one after the other (section 5).

    A pair is a pixel and another one at most ``reach`` steps away, both drawn evenly. The seed is part of the experiment, not of the network's weights.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(side * side)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # S*S 2
    for _ in range(swaps):
        one = int(torch.randint(side * side, (), generator=generator))
        distance = (place - place[one]).abs().sum(1)
        near = ((distance > 0) & (distance <= (reach or 2 * side))).nonzero()[:, 0]
        other = int(near[torch.randint(len(near), (), generator=generator)])
        order[[one, other]] = order[[other, one]]
    return order


def multiply_adds(config: Config, image_size: int, channels: int, classes: int) -> int:
    """What one image costs: linear in the tokens where each is looked at alone, quadratic where all look at all."""
    patches, width = (image_size // config.patch) ** 2, config.width
    tokens = patches + 1  # with the class token
    layer = 12 * tokens * width**2 + 2 * tokens**2 * width  # queries, keys, values, output and MLP; scores and sums
    return patches * channels * config.patch**2 * width + config.layers * layer + width * classes


def smoothed(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy with 0.1 of each label spread over all classes, as DeiT."""
    return {"loss": F.cross_entropy(output["logits"], batch["label"], label_smoothing=0.1)}


TINY, SMALL, BASE = Config(width=192, heads=3), Config(), Config(width=768, heads=12)
VARIANTS: Mapping[str, Config] = {
    "t/1": TINY,
    "s/1": SMALL,
    "b/1": BASE,
    "t/2": replace(TINY, patch=2),
    "s/2": replace(SMALL, patch=2),
    "b/2": replace(BASE, patch=2),
    "s/1-28": replace(SMALL, image_size=28),
    "b/1-28": replace(BASE, image_size=28),
    "small": Config(layers=3, width=64, heads=4, image_size=12),
    "test": Config(layers=2, width=16, heads=2, image_size=8),
}


def recipe(config: Config) -> Recipe:
    """DeiT's, with its learning rate of 5e-4 at a batch of 512. ``small`` has one for minutes, in which positions would hardly leave their start."""
    if config.layers < 12:
        view = View(area=(0.8, 1.0), jitter_chance=0, grey=0)
        return Recipe(lr=2e-3, weight_decay=0.05, warmup=0.1, batch_size=32, average=0.98, rates={"positions": 20.0}, augment=view)
    view = View(area=(0.08, 1.0), jitter_chance=0, grey=0)
    return Recipe(
        lr=5e-4 * 128 / 512, weight_decay=0.05, warmup=0.02, batch_size=128, patch=config.image_size or 32, clip=None, augment=view
    )


def build(spec: Spec, config: Config) -> PixelTransformer:
    """The network for a data set."""
    return PixelTransformer(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small",), loss=lambda config: smoothed)
