"""Batch normalisations whose statistics are those of more, or of fewer, examples than one process sees at once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.nn.processes import summed, world


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Normalises ``splits`` parts of a training batch by their own statistics, as many GPUs do with a batch that they share.

    Example n belongs to part n mod ``splits``. The running statistics are the mean of the parts'. A batch that cannot be divided is
    divided by the largest number below ``splits`` that divides it.
    """

    def __init__(self, features: int, splits: int) -> None:
        super().__init__(features)
        self.splits = splits

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise."""
        if not self.training:
            return super().forward(input)
        splits = next(n for n in range(self.splits, 0, -1) if input.shape[0] % n == 0)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None and self.momentum
        mean, var, weight, bias = (v.repeat(splits) for v in (self.running_mean, self.running_var, self.weight, self.bias))
        parts = input.reshape(-1, splits * input.shape[1], *input.shape[2:])  # a part is a stretch of channels
        out = F.batch_norm(parts, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(splits, -1).mean(0))
        self.running_var.copy_(var.view(splits, -1).mean(0))
        self.num_batches_tracked.add_(1)
        return out.reshape(input.shape)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalises by the statistics of the whole batch that the processes of a training share, on any device; B C and any axes.

    ``nn.SyncBatchNorm`` does the same and works on GPUs only.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes will do."""

    def forward(self, input: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        """Normalise."""
        if not self.training or world() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None and self.momentum
        axes = (0, *range(2, input.ndim))
        shape = (1, -1, *(1,) * (input.ndim - 2))
        count = world() * input.numel() // input.shape[1]  # processes have equal shares
        mean = summed(input.float().mean(axes)) / world()
        centred = input.float() - mean.view(shape)
        var = summed(centred.square().mean(axes)) / world()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        out = centred * ((var + self.eps).rsqrt() * self.weight).view(shape)
        return (out if self.bias is None else out + self.bias.view(shape)).to(input.dtype)
