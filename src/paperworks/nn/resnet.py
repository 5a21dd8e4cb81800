"""The residual networks that several papers are built on (He et al., CVPR 2016, arXiv:1512.03385), without a classifier.

The bottleneck has its stride on the 3 x 3 convolution (as torchvision and most later papers have it; the paper has it on the first 1 x 1),
and modules are named as in torchvision, so that its weights load. B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
"""Number of channels -> normalisation layer."""
Depth = Literal[18, 34, 50, 101]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (the paper's Fig. 5 left)."""

    expansion: ClassVar[int] = 1

    def __init__(self, inplanes: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inplanes, planes, stride, norm)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 h w"]:
        """Relu of the shortcut plus what the convolutions add to it."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1 x 1 down, 3 x 3, 1 x 1 up to four times the width, around a shortcut (Fig. 5 right)."""

    expansion: ClassVar[int] = 4

    def __init__(self, inplanes: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = norm(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inplanes, planes * 4, stride, norm)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 h w"]:
        """Relu of the shortcut plus what the convolutions add to it."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _shortcut(inplanes: int, outplanes: int, stride: int, norm: Norm) -> nn.Module:
    """The identity where shapes agree, else a 1 x 1 projection (option B of the paper)."""
    if stride == 1 and inplanes == outplanes:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), norm(outplanes))


LAYERS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Depth -> block and how many of them each of the four stages has (Table 1)."""


class ResNet(nn.Module):
    """Four stages of residual blocks.

    Args:
        depth: of the paper's Table 1.
        channels: of the image.
        stem: ``imagenet`` is the 7 x 7 convolution of stride 2 and a max pooling, ``cifar`` one 3 x 3 convolution of stride 1 for images of about 32 pixels.
        zero_init_residual: each block starts as its shortcut: the scale of its last normalisation is 0 (Goyal et al. 2017).
        norm: makes the normalisation layers.
        width: of the first stage before a bottleneck's expansion; each stage doubles it.

    Attributes:
        widths: channels of C2, C3, C4, C5.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that ``embed`` gives.
    """

    def __init__(
        self,
        depth: Depth,
        channels: int = 3,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        zero_init_residual: bool = False,
        norm: Norm = nn.BatchNorm2d,
        width: int = 64,
    ) -> None:
        super().__init__()
        block, counts = LAYERS[depth]
        wide = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False) if wide else nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if wide else nn.Identity()
        planes = [width * 2**i for i in range(4)]
        self.widths = tuple(n * block.expansion for n in planes)
        self.strides = (4, 8, 16, 32) if wide else (1, 2, 4, 8)
        self.embedding = self.widths[-1]

        def stage(i: int) -> nn.Sequential:
            first = block(width if i == 0 else self.widths[i - 1], planes[i], 1 if i == 0 else 2, norm)
            return nn.Sequential(first, *(block(self.widths[i], planes[i], 1, norm) for _ in range(counts[i] - 1)))

        self.layer1, self.layer2, self.layer3, self.layer4 = (stage(i) for i in range(4))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_((module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight)  # pyright: ignore[reportArgumentType]

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The outputs of the four stages, C2 to C5, of ``widths`` channels at ``strides``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F h w"]:
        """The last of them, C5."""
        return self.pyramid(image)[-1]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The mean of C5 over its cells, which a classifier would see."""
        return self(image).mean((2, 3))
