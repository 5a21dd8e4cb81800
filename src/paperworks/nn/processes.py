"""What the processes of one training give one another. With a single process everything stays as it is.

P processes, each with B examples; results are in the order of the processes' ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed


def world() -> int:
    """Number of processes P."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def from_first(x: Shaped[Tensor, "..."]) -> Tensor:
    """What ``x`` is in the first process."""
    if world() > 1:
        distributed.broadcast(x, 0)
    return x


@torch.no_grad()
def gathered(x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "PB ..."]:
    """``x`` of all processes one after the other, without a gradient."""
    if world() == 1:
        return x.detach()
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world())]
    distributed.all_gather(parts, x)
    return torch.cat(parts)


class _Sum(torch.autograd.Function):
    """Sum over the processes; as every process's sum depends on every ``x``, gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        out = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(out)
        return out


def summed(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The sum of ``x`` over the processes, through which gradients reach each of them."""
    return _Sum.apply(x) if world() > 1 else x  # pyright: ignore[reportReturnType]


def joined(x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "PB ..."]:
    """As :func:`gathered`, but gradients flow back into each process's ``x``."""
    if world() == 1:
        return x
    own = x.new_zeros(world(), *x.shape)
    own[rank()] = x
    return summed(own).flatten(0, 1)
