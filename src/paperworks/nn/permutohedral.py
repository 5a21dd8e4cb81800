"""High-dimensional Gaussian filtering on the permutohedral lattice (Adams, Baek & Davis, Eurographics 2010).

Filtering N points with a Gaussian costs N^2 evaluations; this costs O(N d^2). The points are embedded in a lattice whose cells
are simplices, their values are *splatted* to the d + 1 corners of the simplex around each of them, the occupied corners are
*blurred* with [1/2, 1, 1/2] along each of the d + 1 lattice directions, and the result is *sliced* at the points again.

Nothing here is compiled for the purpose and nothing is hashed: corners become 64-bit integers, sorting finds the occupied ones and
binary search their neighbours. Splat, blur and slice are then one and the same operation, a weighted sum of a few rows of a
table, for which torch has a fast kernel on every device (``embedding_bag``). The lattice is built once and filters any number
of channels at a time, and the gradient with respect to the values comes for free.

Legend: N points, d features, D = d + 1 corners of a simplex, c value channels, M occupied corners.
"""

from __future__ import annotations

import copy
import math
from itertools import zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class Permutohedral:
    """The filter v_i -> sum_j exp(-|f_i - f_j|^2 / 2) v_j, approximately and with j = i included.

    Divide each feature by its standard deviation first. Corners that no point's simplex touches do not exist, so what the blur
    would carry through them is lost: where points are sparse (five features) the raw sums are far too small, and the filter is
    not quite symmetric, since the order of the directions matters then. A normalised filter, divided by what it makes of ones,
    is right to a few per cent.

    Args:
        features: N d, float32 or float64; values are filtered in the same precision.

    Raises:
        ValueError: the features span so many standard deviations that a corner does not fit into 64 bits.
    """

    corner: Int[Tensor, "N D"]
    """Of each point the d + 1 corners of its simplex, as numbers below M."""
    weight: Float[Tensor, "N D"]
    """Its barycentric coordinates there, times a constant that makes the filter a Gaussian of height 1."""

    def __init__(self, features: Float[Tensor, "N d"]) -> None:
        d = features.shape[1]
        y = _elevate(features.T)
        # The nearest point of the lattice's zero-coloured sublattice, coordinate by coordinate; `gap` is what is left.
        cell = (y / (d + 1)).round()
        zero = cell * (d + 1)
        gap = y - zero
        # rank[i] = how many coordinates have a larger gap; of equals the first is ahead.
        rank = torch.stack([(gap[:i] >= gap[i]).sum(0) + (gap[i + 1 :] > gap[i]).sum(0) for i in range(d + 1)])
        # Rounded coordinates may leave the hyperplane: move as many of the extreme ones by a period as brings them back.
        shifted = rank + cell.sum(0).long()
        rank = shifted % (d + 1)
        zero += rank - shifted

        by_rank = torch.empty_like(y).scatter_(0, rank, (y - zero) / (d + 1)).flip(0)
        weight = by_rank - by_rank.roll(1, 0)  # d+1 N, barycentric coordinates
        weight[0] += 1
        # On a full lattice the blur gives a corner 1 + 2^-d of itself: by staying, and by going round all directions either way.
        weight /= math.sqrt(1 + 2.0**-d)

        keys, strides = _keys(zero.long(), rank)  # d+1 N
        sorted_keys, order = keys.flatten().sort(stable=True)
        first = torch.cat([sorted_keys.new_ones(1, dtype=torch.bool), sorted_keys[1:] != sorted_keys[:-1]])
        corner = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
        self.corner, self.weight = corner.view_as(keys).T.contiguous(), weight.T.contiguous()
        # The transpose, for splatting: corner by corner the points around it.
        self._start = first.nonzero().squeeze(1)
        self._point = order % len(features)
        self._point_weight = weight.flatten()[order]

        occupied = sorted_keys[first]
        self._blur = [_neighbours(occupied, step, weight.dtype) for step in (strides.sum() - (d + 1) * strides).tolist()]

    def __call__(self, values: Float[Tensor, "N c"]) -> Float[Tensor, "N c"]:
        """Filter c channels at once."""
        table = F.embedding_bag(self._point, values, self._start, mode="sum", per_sample_weights=self._point_weight)  # M c
        for index, share in self._blur:
            table = F.embedding_bag(index, table, mode="sum", per_sample_weights=share)
        return F.embedding_bag(self.corner, table, mode="sum", per_sample_weights=self.weight)

    def __add__(self, other: Permutohedral) -> Permutohedral:
        """The sum of two filters of the same points, sliced in one pass."""
        out = copy.copy(self)
        corners, entries = len(self._start), len(self._point)
        out.corner = torch.cat([self.corner, other.corner + corners], 1)
        out.weight = torch.cat([self.weight, other.weight], 1)
        out._point = torch.cat([self._point, other._point])
        out._point_weight = torch.cat([self._point_weight, other._point_weight])
        out._start = torch.cat([self._start, other._start + entries])
        steps = zip_longest(self._blur, other._blur)
        out._blur = [_side_by_side(a or _stay(self), b or _stay(other)) for a, b in steps]
        return out

    def scaled(self, factor: Float[Tensor, " N"]) -> Permutohedral:
        """The filter diag(factor) K diag(factor), at no cost per use."""
        out = copy.copy(self)
        out.weight = self.weight * factor[:, None]
        out._point_weight = self._point_weight * factor[self._point]
        return out

    def diagonal(self) -> Float[Tensor, " N"]:
        """How much of its own value each point receives back (on a full lattice; 1 for the Gaussian itself).

        Colours k and l of one simplex are |k - l| directions apart, or d + 1 - |k - l| the other way round.
        """
        d = self.weight.shape[1] - 1
        colour = torch.arange(d + 1, device=self.weight.device)
        apart = (colour[:, None] - colour).abs()
        passed = (0.5**apart + 0.5 ** (d + 1 - apart)).to(self.weight)
        passed.diagonal().add_(0.5 ** (d + 1))  # all the way round in either sense
        return ((self.weight @ passed) * self.weight).sum(1)


Blur = tuple[Tensor, Tensor]
"""One direction of the blur: each corner itself, the one a step back and the one a step ahead (M 3), and their shares (M 3)."""


def _neighbours(occupied: Int[Tensor, " M"], step: int, dtype: torch.dtype) -> Blur:
    """The blur along the direction in which keys differ by ``step``; what is not occupied has no share."""
    here = torch.arange(len(occupied), device=occupied.device)
    back = torch.searchsorted(occupied, occupied - step).clamp_(max=len(here) - 1)
    found = occupied[back] == occupied - step
    ahead, lies_ahead = here.clone(), torch.zeros_like(found)
    ahead[back[found]] = here[found]
    lies_ahead[back[found]] = True
    share = torch.stack([torch.full_like(found, 2, dtype=dtype), found.to(dtype), lies_ahead.to(dtype)], 1) / 2
    return torch.stack([here, back, ahead], 1), share


def _stay(lattice: Permutohedral) -> Blur:
    """A step that leaves everything where it is."""
    here = torch.arange(len(lattice._start), device=lattice._start.device)
    return here[:, None].expand(-1, 3), lattice.weight.new_tensor([1, 0, 0]).expand(len(here), 3)


def _side_by_side(a: Blur, b: Blur) -> Blur:
    """The blur of two separate sets of corners as one, the second set counted on from the first."""
    return torch.cat([a[0], b[0] + len(a[0])]), torch.cat([a[1], b[1]])


def _elevate(features: Float[Tensor, "d N"]) -> Float[Tensor, "d+1 N"]:
    """Rotate the features into the hyperplane of R^(d+1) whose coordinates sum to zero, a standard deviation to that of the blur."""
    d = len(features)
    rows: list[Tensor] = []
    total = torch.zeros_like(features[0])
    for i in range(d, 0, -1):
        scaled = features[i - 1] * ((d + 1) * math.sqrt(2 / 3) / math.sqrt(i * (i + 1)))
        rows.append(total - i * scaled)
        total = total + scaled
    return torch.stack([total, *reversed(rows)])


def _keys(zero: Int[Tensor, "D N"], rank: Int[Tensor, "D N"]) -> tuple[Int[Tensor, "D N"], Int[Tensor, " D"]]:
    """Corners as integers: key = strides . coordinates, the last coordinate following from the others.

    The corner of colour k lies at ``zero`` + k in the coordinates of rank <= d - k and at ``zero`` + k - (d + 1) in the others.
    """
    d = len(zero) - 1
    reach = 2 * d  # a corner is at most d away from `zero`, its neighbours d from it
    low = zero.amin(1) - reach
    spans = (zero.amax(1) + reach - low + 1).tolist()[:d]
    if math.prod(spans) >= 2**63:
        raise ValueError(f"features span {' x '.join(map(str, spans))} lattice steps, more than 64 bits number; divide them by more")
    strides = torch.tensor([math.prod(spans[:i]) for i in range(d)] + [0], device=zero.device)
    first = ((zero - low[:, None]) * strides[:, None]).sum(0)
    ranked = torch.empty_like(zero).scatter_(0, rank, strides[:, None].expand_as(zero))  # strides in the order of rank
    steps = strides.sum() - (d + 1) * ranked.flip(0)[:d]  # from colour k to k + 1
    return torch.cat([first[None], steps]).cumsum(0), strides
