"""Dense prediction on images and volumes of any size, in memory that does not grow with their height (of volumes: their depth).

An image is covered by windows. Their origins are multiples of ``grid.multiple``, so that the poolings of the network fall on the same
pixels in every window; at other steps even a network without padding gives windows that disagree (the 388 pixels that one pass of
the 2015 U-Net delivers are not a multiple of its 16). Every window takes its context from the image, which is mirrored only
beyond its own border. The windows of a network without padding (``margin`` > 0) are exact and laid side by side; those of a padded one
suffer at their edges and are blended, with weights that fall off smoothly and add up to one.

The weights are a product of one factor per axis, and so is their sum: the factors are normalised once per axis, nothing is accumulated
but the weighted predictions. The first axis is worked through from its beginning: a slab is a run of rows, or of slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.data.augment import mirrored
from paperworks.tasks.base import Grid

Forward = Callable[[Tensor], Tensor]
"""B C h w, images in [0, 1] -> B K h' w' on any device, where h' = h - 2 * margin; of volumes B C d h w."""
Read = Callable[[int, int], Tensor]
"""(top, bottom) -> those rows of the image, C (bottom - top) W in [0, 1], or those slices of a volume."""


@dataclass(frozen=True)
class _Axis:
    """The windows along one axis."""

    origins: list[int]
    """Where the output of each window begins."""
    input: int
    """Length of a window as the network sees it; it begins ``margin`` before its origin."""
    weights: Float[Tensor, "n output"]
    """What each window contributes to each of its output pixels; one in sum over the windows."""

    @property
    def output(self) -> int:
        return self.weights.shape[1]


def _axis(length: int, grid: Grid, window: int, overlap: float) -> _Axis:
    """Cover ``length`` pixels with windows of equal size and nearly equal steps."""
    input = grid.fit(length if length <= window else max(window, grid.multiple))
    output = input - 2 * grid.margin
    step = max(int(output * (1 - overlap if grid.margin == 0 else 1)) // grid.multiple, 1)  # in multiples
    last = max(-(-(length - output) // grid.multiple), 0)
    gaps = -(-last // step)
    origins = [i * last // max(gaps, 1) * grid.multiple for i in range(gaps + 1)]

    bump = torch.sin(math.pi * (torch.arange(output, dtype=torch.float64) + 0.5) / output) ** 2
    total = torch.zeros(origins[-1] + output, dtype=torch.float64)
    for o in origins:
        total[o : o + output] += bump
    return _Axis(origins, input, torch.stack([bump / total[o : o + output] for o in origins]).float())


def predict_slabs(
    forward: Forward,
    read: Read,
    size: Sequence[int],
    grid: Grid,
    *,
    window: int | Sequence[int] = 512,
    overlap: float = 0.25,
    batch: int = 1,
) -> Iterator[Float[Tensor, "K run *S"]]:
    """Predict an image of any height from top to bottom; yields finished rows as they come, on the processor, each row once.

    Held in memory are one window's height of the image and of the predictions. Of a volume the depth is what the height is here.

    Args:
        forward: the network; any normalisation and the softmax are its business.
        read: the image.
        size: of the image: height and width, or depth, height and width.
        grid: which sizes the network takes.
        window: longest side, in output pixels, that is predicted in one pass (rounded up to a size that the network takes), or one for
            each axis. An image no larger than that is one window, padded to a valid size by reflection.
        overlap: smallest share of a window that its neighbour covers too. Not for networks without padding, whose windows agree.
        batch: windows per call of ``forward``.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share of the window from 0 to less than 1, not {overlap}")
    sides = [window] * len(size) if isinstance(window, int) else window
    axes = [_axis(length, grid, side, overlap) for length, side in zip(size, sides, strict=True)]
    first, others = axes[0], axes[1:]
    around = [mirrored(-grid.margin, axis.origins[-1] + axis.input, length) for axis, length in zip(others, size[1:])]
    places = list(itertools.product(*(range(len(axis.origins)) for axis in others)))
    promised = tuple(axis.output for axis in axes)
    sums: Tensor | None = None
    for i, top in enumerate(first.origins):
        down = mirrored(top - grid.margin, first.input, size[0])
        begin = int(down.min())
        slab = read(begin, int(down.max()) + 1).index_select(1, down - begin)
        for k, index in enumerate(around, start=2):
            slab = slab.index_select(k, index)
        for j in range(0, len(places), batch):
            cut = [[slice(a.origins[k], a.origins[k] + a.input) for a, k in zip(others, place)] for place in places[j : j + batch]]
            with torch.inference_mode():
                predicted = forward(torch.stack([slab[(slice(None), slice(None), *where)] for where in cut])).float().cpu()
            if predicted.shape[2:] != promised:
                inputs = tuple(axis.input for axis in axes)
                raise ValueError(
                    f"the network returned {tuple(predicted.shape[2:])} for a window of {inputs} where its {grid} promises {promised}"
                )
            if sums is None:
                sums = torch.zeros(predicted.shape[1], first.output, *(axis.origins[-1] + axis.output for axis in others))
            for place, part in zip(places[j : j + batch], predicted):
                weights = first.weights[i]
                for axis, n in zip(others, place):
                    weights = weights[..., None] * axis.weights[n]
                where = [slice(a.origins[n], a.origins[n] + a.output) for a, n in zip(others, place)]
                sums[(slice(None), slice(None), *where)].addcmul_(part, weights)
        assert sums is not None
        done = (first.origins[i + 1] if i + 1 < len(first.origins) else size[0]) - top
        yield sums[(slice(None), slice(done), *map(slice, size[1:]))].clone()
        kept = sums.shape[1] - done
        sums[:, :kept] = sums[:, done:].clone()
        sums[:, kept:] = 0


def predict_array(
    forward: Forward, image: Float[Tensor, "C *S"], grid: Grid, *, window: int | Sequence[int] = 512, overlap: float = 0.25, batch: int = 1
) -> Float[Tensor, "K *S"]:
    """Predict an image or a volume that fits in memory. The arguments are those of :func:`predict_slabs`."""
    size = tuple(image.shape[1:])
    result: Tensor | None = None
    top = 0
    slabs = predict_slabs(forward, lambda top, bottom: image[:, top:bottom], size, grid, window=window, overlap=overlap, batch=batch)
    for slab in slabs:
        if result is None:
            if slab.shape[1] == size[0]:
                return slab
            result = slab.new_empty(slab.shape[0], *size)
        result[:, top : top + slab.shape[1]] = slab
        top += slab.shape[1]
    assert result is not None
    return result


def padded(image: Float[Tensor, "C *S"], grid: Grid) -> Float[Tensor, "C *s"]:
    """The image mirrored to the smallest valid input whose output covers it; the output begins at the image's first pixel."""
    for axis, side in enumerate(grid.sides(image.shape[1:]), start=1):
        image = image.index_select(axis, mirrored(-grid.margin, side, image.shape[axis]))
    return image


def box(size: Sequence[int], pixels: int, spacing: Sequence[float] | None = None) -> tuple[int, ...]:
    """Sides of the largest box in ``size`` that has no more than ``pixels`` pixels and is as long in each axis, where there is room.

    Lengths are those of ``spacing``: of a volume with slices far apart it takes few of them.
    """
    spacing = spacing or (1.0,) * len(size)
    sides = list(size)
    free = set(range(len(size)))
    while free:
        taken = math.prod(sides[i] for i in range(len(size)) if i not in free)
        length = (pixels / taken * math.prod(spacing[i] for i in free)) ** (1 / len(free))
        thin = {i for i in free if length < spacing[i]}
        short = {i for i in free if size[i] * spacing[i] <= length}
        settled = thin or short or set(free)
        for i in settled - short:
            sides[i] = max(int(length / spacing[i] + 1e-9), 1)
        free -= settled
    return tuple(sides)
