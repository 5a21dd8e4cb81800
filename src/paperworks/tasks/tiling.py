"""Dense prediction on images of any size, in memory that does not grow with their height.

An image is covered by windows. Their origins are multiples of ``grid.multiple``, so that the poolings of the network fall on the same
pixels in every window; at other steps even a network without padding gives windows that disagree (the 388 pixels that one pass of
the 2015 U-Net delivers are not a multiple of its 16). Every window takes its context from the image, which is mirrored only
beyond its own border. The windows of a network without padding (``margin`` > 0) are exact and laid side by side; those of a padded one
suffer at their edges and are blended, with weights that fall off smoothly and add up to one.

The weights are a product of one factor per axis, and so is their sum: the factors are normalised once per axis, nothing is accumulated
but the weighted predictions. For volumes, ``_axis`` would be called for the depth too and slabs would be runs of slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.data.augment import mirrored
from paperworks.tasks.base import Grid

Forward = Callable[[Tensor], Tensor]
"""B C h w, images in [0, 1] -> B K h' w' on any device, where h' = h - 2 * margin."""
ReadRows = Callable[[int, int], Tensor]
"""(top, bottom) -> those rows of the image, C (bottom - top) W in [0, 1]."""


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
    forward: Forward, read_rows: ReadRows, height: int, width: int, grid: Grid, *, window: int = 512, overlap: float = 0.25, batch: int = 1
) -> Iterator[Float[Tensor, "K rows W"]]:
    """Predict an image of any height from top to bottom; yields finished rows as they come, on the processor, each row once.

    Held in memory are one window's height of the image and of the predictions.

    Args:
        forward: the network; any normalisation and the softmax are its business.
        read_rows: the image.
        height: of the image.
        width: of the image.
        grid: which sizes the network takes.
        window: longest side, in output pixels, that is predicted in one pass (rounded up to a size that the network takes). An image
            no larger than that is one window, padded to a valid size by reflection.
        overlap: smallest share of a window that its neighbour covers too. Not for networks without padding, whose windows agree.
        batch: windows per call of ``forward``.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share of the window from 0 to less than 1, not {overlap}")
    rows, columns = _axis(height, grid, window, overlap), _axis(width, grid, window, overlap)
    across = mirrored(-grid.margin, columns.origins[-1] + columns.input, width)
    sums: Tensor | None = None
    for i, top in enumerate(rows.origins):
        down = mirrored(top - grid.margin, rows.input, height)
        first = int(down.min())
        slab = read_rows(first, int(down.max()) + 1).index_select(1, down - first).index_select(2, across)
        for j in range(0, len(columns.origins), batch):
            lefts = columns.origins[j : j + batch]
            with torch.inference_mode():
                predicted = forward(torch.stack([slab[:, :, left : left + columns.input] for left in lefts])).float().cpu()
            if sums is None:
                sums = torch.zeros(predicted.shape[1], rows.output, columns.origins[-1] + columns.output)
            if predicted.shape[2:] != (rows.output, columns.output):
                raise ValueError(
                    f"the network returned {tuple(predicted.shape[2:])} for a window of {(rows.input, columns.input)} where its {grid} "
                    f"promises {(rows.output, columns.output)}"
                )
            for k, (left, part) in enumerate(zip(lefts, predicted), start=j):
                part = part * rows.weights[i][:, None] * columns.weights[k]
                sums[:, :, left : left + columns.output] += part
        assert sums is not None
        done = (rows.origins[i + 1] if i + 1 < len(rows.origins) else height) - top
        yield sums[:, :done, :width].clone()
        kept = sums.shape[1] - done
        sums[:, :kept] = sums[:, done:].clone()
        sums[:, kept:] = 0


def predict_array(
    forward: Forward, image: Float[Tensor, "C H W"], grid: Grid, *, window: int = 512, overlap: float = 0.25, batch: int = 1
) -> Float[Tensor, "K H W"]:
    """Predict an image that fits in memory. The arguments are those of :func:`predict_slabs`."""
    _, height, width = image.shape
    result: Tensor | None = None
    top = 0
    slabs = predict_slabs(
        forward, lambda top, bottom: image[:, top:bottom], height, width, grid, window=window, overlap=overlap, batch=batch
    )
    for slab in slabs:
        if result is None:
            if slab.shape[1] == height:
                return slab
            result = slab.new_empty(slab.shape[0], height, width)
        result[:, top : top + slab.shape[1]] = slab
        top += slab.shape[1]
    assert result is not None
    return result


def padded(image: Float[Tensor, "C H W"], grid: Grid) -> Float[Tensor, "C h w"]:
    """The image mirrored to the smallest valid input whose output covers it; the output begins at the image's first pixel."""
    _, height, width = image.shape
    down, across = (mirrored(-grid.margin, grid.fit(n), n) for n in (height, width))
    return image.index_select(1, down).index_select(2, across)
