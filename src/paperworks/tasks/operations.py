"""Counting what a network computes: floating-point operations and activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchvision.ops  # noqa: F401  registers the deformable convolution
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _deformable(image: Shape, weight: Shape, *_: object, out_shape: Shape, **__: object) -> int:
    batch, outputs, height, width = out_shape
    return 2 * batch * outputs * height * width * weight[1] * weight[2] * weight[3]


COUNTED: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.torchvision.deform_conv2d: _deformable,
}
"""What torch's counter leaves out: the CPU's fused attention, and torchvision's deformable convolution."""


def flop_counter() -> FlopCounterMode:
    """A context that counts floating-point operations of matrix products, convolutions and attentions; a multiplication with its addition is two."""
    return FlopCounterMode(display=False, custom_mapping=dict(COUNTED))


class ActivationCounter(TorchDispatchMode):
    """A context that counts the numbers which matrix products, convolutions and attentions write (Radosavovic et al. 2020, section 3.3).

    What a network has to move through memory follows from them rather than from its operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func._overloadpacket, kwargs or {}
        counts = packet in flop_registry or packet in COUNTED
        if not counts:
            with self:  # in inference mode compound operations come whole
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if counts:
            first = out[0] if isinstance(out, (tuple, list)) else out
            self.total += first.numel() if isinstance(first, Tensor) else 0
        return out
