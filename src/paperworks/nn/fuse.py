"""The same network with less to do: branches merged, batch norms folded into their convolutions, weights laid out for the processor."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def fast(module: nn.Module) -> nn.Module:
    """A copy of ``module`` for prediction, :func:`fused` and with :func:`channels_last` weights.

    It gives the same output, but for rounding, and cannot be trained. The module itself is left as it is.
    """
    return channels_last(fused(module))


def channels_last(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in evaluation mode whose 2-D convolutions keep the channels of a pixel side by side in memory, as kernels like it."""
    copy = deepcopy(module).eval()
    for part in copy.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copy


def fused(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in evaluation mode whose convolutions have absorbed the batch norms behind them.

    At evaluation a batch norm is y = a x + b per channel, which the weights and the bias of the convolution before it can do as well.
    Only neighbours within a plain ``nn.Sequential`` are joined, where the order of the children is the order of the computation; any
    other batch norm stays. A part with a method ``merged()``, which is trained as several branches, gives way to the one layer that
    it makes of them.
    """
    copy = deepcopy(module).eval()
    for parent in list(copy.modules()):
        for at, part in list(parent.named_children()):
            if callable(merged := getattr(part, "merged", None)):
                setattr(parent, at, merged())
    for part in list(copy.modules()):
        if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
            for (at, layer), (after, norm) in pairwise(list(part.named_children())):
                if _foldable(layer, norm):
                    transposed = isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d))
                    setattr(part, at, fuse_conv_bn_eval(layer, norm, transpose=transposed))  # type: ignore[type-var]
                    setattr(part, after, nn.Identity())
    return copy


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    # Exact types: a subclass (weight norm, a quantised layer) may compute its weights anew in each forward.
    if type(layer) not in CONVOLUTIONS or type(norm) not in NORMS or norm.running_mean is None:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks
    # A transposed convolution in groups does not keep its output channels on one axis of the weights.
    return not hooked and not (getattr(layer, "transposed", False) and layer.groups != 1)
