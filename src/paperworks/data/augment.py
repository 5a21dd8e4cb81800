"""Augmentation in one resampling: crop, mirroring, rotation, scale, shift and U-Net's elastic deformation, then grey values.

The elastic part is that of Ronneberger, Fischer and Brox, *U-Net* (2015), section 3.1: Gaussian displacement vectors on a coarse
grid and bicubic interpolation between them. Interpolation is linear in the vectors and separable in the axes, and so is an affine
map; the whole coordinate field is therefore one small tensor of coefficients multiplied with one narrow matrix per axis.
Nothing here knows how many axes there are, but for the rotation, which turns the last two (the plane of the slices of a volume).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchvision import tv_tensors


@dataclass(frozen=True)
class Augment:
    """How training samples vary. Calling it draws one variation.

    Zero (``scale=(1, 1)``, ``flip=False``) turns a part off. With all of them off a call is a plain random crop, exact to the bit.
    """

    flip: bool = True
    """Mirror each axis with probability 1/2."""
    rotate: float = 15.0
    """Largest angle in degrees to either side; 180 takes any."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest magnification, drawn uniformly in the logarithm."""
    shift: float = 0.0
    """Largest shift as a share of the patch, beyond the random position of the crop."""
    elastic: float = 0.0
    """Standard deviation in pixels of the displacements at the nodes of the coarse grid (U-Net: 10)."""
    elastic_grid: int = 3
    """Nodes along each axis of the patch, the outermost in its corners (U-Net: 3)."""
    brightness: float = 0.1
    """Largest amount that is added to or taken from all grey values."""
    contrast: float = 0.2
    """The distances from the mean grey value are multiplied by 1 - contrast to 1 + contrast."""
    gamma: float = 0.2
    """Grey values are raised to the power exp(-gamma) to exp(gamma)."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise on the grey values."""
    probability: float = 0.5
    """Chance of each of rotation, scale, shift, elastic deformation and the four changes of grey values."""

    def __call__(self, sample: dict[str, Any], patch: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Cut one varied patch out of a sample.

        The image is interpolated linearly, every ``tv_tensors.Mask`` of the sample takes the nearest pixel; what lies beyond the
        border is mirrored. The rest of the sample is passed on.

        Args:
            sample: ``image`` C H W, float32 in [0, 1] (or C D H W), and masks of its height and width.
            patch: height and width of the result, whatever the size of the image.
            generator: the only source of chance; its state and the sample fix the result.
        """
        image: Tensor = sample["image"].as_subclass(Tensor)
        masks = {key: value.as_subclass(Tensor) for key, value in sample.items() if isinstance(value, tv_tensors.Mask)}
        size, patch = image.shape[1:], tuple(patch)
        ndim = len(patch)

        # Every draw is made whether it is used or not: turning one part off leaves the others as they were.
        flips, places, shifts = torch.rand(3, ndim, generator=generator, dtype=torch.float64).tolist()
        chosen = (torch.rand(8, generator=generator) < self.probability).tolist()
        amounts = (2 * torch.rand(8, generator=generator, dtype=torch.float64) - 1).tolist()
        vectors = torch.randn(*[self.elastic_grid] * ndim, ndim, generator=generator)  # in pixels of the patch, after scaling by elastic

        angle = math.radians(self.rotate * amounts[0]) if chosen[0] else 0.0
        low, high = map(math.log, self.scale)
        scale = math.exp((low + high) / 2 + amounts[1] * (high - low) / 2) if chosen[1] else 1.0
        shift = [round((2 * s - 1) * self.shift * n) if chosen[2] else 0 for s, n in zip(shifts, patch)]
        elastic = self.elastic if chosen[3] else 0.0
        sign = [-1.0 if self.flip and f < 0.5 else 1.0 for f in flips]
        origin = []  # of the part of the image that fills the patch: anywhere inside, or around the middle if the image is smaller
        for place, n, p, s in zip(places, size, patch, shift):
            room = n - round(p / scale)
            origin.append((int(place * (room + 1)) if room > 0 else room // 2) + s)

        if angle == 0 and scale == 1 and elastic == 0:
            index = [mirrored(o, p, n) for o, p, n in zip(origin, patch, size)]
            index = [i.flip(0) if s < 0 else i for i, s in zip(index, sign)]
            image = _take(image, index)
            masks = {key: _take(mask, index) for key, mask in masks.items()}
        else:
            middle = [o + (round(p / scale) - 1) / 2 for o, p in zip(origin, patch)]
            matrix = torch.eye(ndim)  # patch -> image, both from their middles
            matrix[-2:, -2:] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            matrix = matrix * torch.tensor(sign) / scale
            unit = 2 / (torch.tensor(size) - 1).clamp(min=1)  # grid_sample: -1 and 1 are the outermost pixels, the last axis comes first
            where = field(patch, (unit[:, None] * matrix).flip(0), (unit * torch.tensor(middle) - 1).flip(0), elastic * vectors)
            image = _sample(image, where, "bilinear")
            if masks:
                stack = torch.stack([mask.float() for mask in masks.values()])  # labels below 2^24 are exact in float32
                moved = _sample(stack, where, "nearest")
                masks = {key: part.to(mask.dtype) for (key, mask), part in zip(masks.items(), moved)}

        image = self._grey(image, chosen[4:], amounts[4:], generator)
        out = dict(sample)
        out["image"] = tv_tensors.Image(image)
        out.update({key: tv_tensors.Mask(mask) for key, mask in masks.items()})
        return out

    def _grey(self, image: Tensor, chosen: Sequence[bool], amounts: Sequence[float], generator: torch.Generator) -> Tensor:
        """Change the grey values of an image that is ours to overwrite, within [0, 1]."""
        brightness = self.brightness * amounts[0] if chosen[0] else 0.0
        contrast = 1 + self.contrast * amounts[1] if chosen[1] else 1.0
        gamma = math.exp(self.gamma * amounts[2]) if chosen[2] else 1.0
        noise = self.noise * abs(amounts[3]) if chosen[3] else 0.0
        if gamma != 1:
            image = image.clamp_(min=0).pow_(gamma)
        if brightness != 0 or contrast != 1:
            offset = (1 - contrast) * image.mean().item() + brightness
            image = image.mul_(contrast).add_(offset)
        if noise > 0:
            image = image.add_(torch.randn(image.shape, generator=generator), alpha=noise)
        return image.clamp_(0, 1)


def field(
    patch: Sequence[int], matrix: Float[Tensor, "n n"], middle: Float[Tensor, " n"], vectors: Float[Tensor, "*nodes n"]
) -> Float[Tensor, "*patch n"]:
    """Where in the image each pixel of the patch is taken from.

    A pixel at x (in pixels from the middle of the patch) comes from ``matrix @ (x + d(x)) + middle``. The displacements d are
    ``vectors`` at the nodes of a coarse grid whose outermost nodes are the patch's corner pixels, and bicubic in between (Keys'
    kernel, a = -0.75).
    """
    nodes = vectors.shape[0]
    ndim = len(patch)
    # Per axis the columns [cubic kernel at each node | 1 | x]; their products span the displacements and the affine map alike.
    coefficients = vectors.new_zeros(*[nodes + 2] * ndim, ndim)
    coefficients[(slice(nodes),) * ndim] = vectors @ matrix.T
    ones = [nodes] * ndim
    coefficients[tuple(ones)] = middle
    for axis in range(ndim):
        linear = list(ones)
        linear[axis] = nodes + 1
        coefficients[tuple(linear)] = matrix[:, axis]
    for length in reversed(patch):  # the axis just multiplied comes first, so that the next one to do is always the last
        coefficients = torch.einsum("xn,...nc->x...c", _basis(length, nodes), coefficients)
    return coefficients


@functools.lru_cache(maxsize=32)
def _basis(length: int, nodes: int) -> Tensor:
    """Basis, length x (nodes + 2): the weights of the nodes in cubic interpolation, a column of ones, the distance from the middle."""
    kernel = F.interpolate(torch.eye(nodes)[None, None], (length, nodes), mode="bicubic", align_corners=True)[0, 0]
    x = torch.arange(length) - (length - 1) / 2
    return torch.cat([kernel, torch.ones(length, 1), x[:, None]], 1)


def _sample(image: Tensor, where: Tensor, mode: str) -> Tensor:
    """Values of C *size at grid_sample's coordinates; beyond its border the image is mirrored about its outermost pixels."""
    return F.grid_sample(image[None], where[None], mode=mode, padding_mode="reflection", align_corners=True)[0]


def mirrored(origin: int, length: int, size: int) -> Int[Tensor, " length"]:
    """Indices origin ... origin + length - 1 folded back into 0 ... size - 1 at the outermost pixels, as often as it takes."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(origin, origin + length).remainder(period)
    return torch.minimum(index, period - index)


def _take(image: Tensor, index: Sequence[Tensor]) -> Tensor:
    """Pixels at the crossings of indices along the last axes."""
    for axis, i in enumerate(index, start=image.ndim - len(index)):
        image = image.index_select(axis, i)
    return image
