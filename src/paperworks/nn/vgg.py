"""The convolutions of VGG-16 (Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556) that detectors are built on."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from paperworks.nn.conv import he_init

DEPTHS = (2, 2, 3, 3, 3)
"""Convolutions of each block (configuration D)."""


class VGG(nn.Module):
    """Thirteen 3x3 convolutions with ReLU in five blocks; a 2x2 max pooling before each block but the first.

    Args:
        channels: of the image.
        widths: of the blocks (64, 128, 256, 512, 512 in the paper).
        norm: a batch normalisation after each convolution, which narrow networks trained from nothing need.
        round_up: the poolings keep a last odd row (Caffe's rule; 300 -> 150 -> 75 -> 38), else they drop it.

    Attributes:
        strides: input pixels from one cell of a block's output to the next.
    """

    strides = (1, 2, 4, 8, 16)

    def __init__(
        self, channels: int = 3, widths: Sequence[int] = (64, 128, 256, 512, 512), *, norm: bool = False, round_up: bool = False
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=round_up)
        self.blocks = nn.ModuleList(block(i, o, depth, norm) for i, o, depth in zip((channels, *widths[:-1]), widths, DEPTHS, strict=True))
        he_init(self)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each block gives, before the pooling behind it: conv1_2, conv2_2, conv3_3, conv4_3, conv5_3."""
        features = []
        x = image
        for i, part in enumerate(self.blocks):
            x = part(self.pool(x) if i else x)
            features.append(x)
        return features


def block(inputs: int, outputs: int, depth: int, norm: bool) -> nn.Sequential:
    """``depth`` convolutions of one width, each with ReLU."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(outputs)] * norm
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
