"""Feature pyramid networks (Lin et al., CVPR 2017, arXiv:1612.03144): coarse, knowing maps are added to fine, ignorant ones."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class FeaturePyramid(nn.Module):
    """The top-down path and lateral connections of figure 3.

    Args:
        widths: channels of C2, C3, ... (strides ascending).
        width: channels of every map of the pyramid (256 in the paper).
        extra: add a coarser map by subsampling the last one (P6, which only the proposals use).
    """

    def __init__(self, widths: Sequence[int], width: int = 256, *, extra: bool = True) -> None:
        super().__init__()
        self.extra = extra
        self.lateral = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)  # against aliasing of the up-sampling
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: list[Tensor]) -> list[Float[Tensor, "B F _ _"]]:
        """P2, P3, ... of C2, C3, ...: the same sizes, one width; and one more map of half the last one's sides where ``extra`` is set."""
        merged = [lateral(c) for lateral, c in zip(self.lateral, features, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[2:], mode="nearest")
        out = [smooth(m) for smooth, m in zip(self.smooth, merged)]
        return [*out, F.max_pool2d(out[-1], 1, 2)] if self.extra else out
