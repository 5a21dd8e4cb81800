"""Convolutions of images and of volumes, and the double convolution that the U-Nets are made of."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

from torch import nn


@dataclass(frozen=True)
class Layers:
    """The layers that know how many axes there are."""

    conv: type[nn.Module]
    up_conv: type[nn.Module]
    max_pool: type[nn.Module]
    batch_norm: type[nn.Module]


LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.BatchNorm2d),
    3: Layers(nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.BatchNorm3d),
}
"""By number of axes: 2 for images (B C H W), 3 for volumes (B C D H W)."""


class DoubleConv(nn.Sequential):
    """Two 3x3 (3x3x3) convolutions, each followed by batch normalisation where ``norm`` is set, and by a ReLU.

    Args:
        inputs: channels of the input.
        outputs: channels after either convolution.
        norm: put a batch normalisation after each convolution.
        bias: give the convolutions a bias; default: only where no normalisation follows to take it away again.
        padding: 1 keeps height and width, 0 is the valid convolution that takes one pixel off each side.
        ndim: 2 for images, 3 for volumes.
    """

    def __init__(self, inputs: int, outputs: int, *, norm: bool = True, bias: bool | None = None, padding: int = 1, ndim: int = 2) -> None:
        of, bias = LAYERS[ndim], not norm if bias is None else bias
        layers = []
        for channels in (inputs, outputs):
            layers.append(of.conv(channels, outputs, kernel_size=3, padding=padding, bias=bias))
            if norm:
                layers.append(of.batch_norm(outputs))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


def he_init(network: nn.Module) -> None:
    """Draw the weights of all convolutions from a Gaussian of standard deviation sqrt(2 / N), biases zero (He et al. 2015).

    N is the number of inputs that one output pixel sees. In a transposed convolution that is not every tap of the kernel: a stride of
    s leaves one in s of them along each axis, which ``nn.init.kaiming_normal_`` does not know (it also takes the output channels for
    the input channels).
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            seen = module.in_channels // module.groups * prod(module.kernel_size)
            if module.transposed:
                seen //= prod(module.stride)
            nn.init.normal_(module.weight, std=sqrt(2 / seen))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
