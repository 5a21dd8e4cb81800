"""Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs (DeepLab v1).

Chen, Papandreou, Kokkinos, Murphy & Yuille, ICLR 2015, arXiv:1412.7062. Mean-field inference: Kraehenbuehl & Koltun, NIPS 2011,
arXiv:1210.5644.

VGG-16 is made dense: its last two poolings keep the size and the filters after them are dilated (the hole algorithm), so the
same weights give scores at stride 8. These are smooth enough to be interpolated bilinearly; a fully connected CRF, whose messages
are Gaussian filters, then moves the borders to the image's edges. The CRF refines any segmentation: ``predict RUN --with dense_crf``.

The geometry is that of the released nets (3x3 poolings, average pooling in front of LargeFOV's fc6); it is known from ports of the
prototxt. The network is trained in one piece, also the multi-scale one, whose new layers the paper trains last and alone.

Shapes: B batch, C image channels, K classes, h w = H W / 8 the score map, N = H W pixels of one image.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.augment import Augment
from paperworks.errors import InputError
from paperworks.nn.permutohedral import Permutohedral
from paperworks.tasks.base import Batch, Grid, Method, Output, Paper, Recipe, Refiner
from paperworks.tasks.segmentation import IGNORE

STRIDES = (2, 2, 2, 1, 1)
"""Of the five poolings. In VGG-16 all are 2; the last two keep the size here (section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """DeepLab-LargeFOV by default; table 2 varies the first fully connected layer."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Features of the five stages."""
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    """3x3 convolutions of the five stages; VGG-16."""
    features: int = 1024
    """Of fc6 and fc7; 4096 in VGG-16."""
    kernel: int = 3
    """Side of fc6; 7 in VGG-16, decimated to 4 or 3 (section 3.2)."""
    dilation: int = 12
    """Input stride of fc6. Field of view: 8 (kernel - 1) dilation + 32 pixels."""
    average_pool: bool = True
    """3x3 average pooling after pool5, as in the released LargeFOV."""
    multi_scale: int = 0
    """Features of each multi-scale branch (section 4.3: 128); 0 has none."""
    dropout: float = 0.5
    """After fc6 and after fc7."""
    norm: bool = False
    """Batch normalisation after each convolution. Not in the paper, which starts from ImageNet weights; narrow nets start from none."""


def convolution(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1, *, stride: int = 1, norm: bool = False) -> nn.Sequential:
    """Convolution, batch normalisation if asked for, ReLU. Keeps the size where the stride is 1."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=dilation * (kernel - 1) // 2, dilation=dilation, bias=not norm)
    return nn.Sequential(conv, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU(inplace=True))


class DeepLab(nn.Module):
    """VGG-16 as a dense feature extractor (section 3). Sides of inputs are 8 k + 1, those of the scores k + 1."""

    grid = Grid(8, offset=1)

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        norm, inputs, n = config.norm, (channels, *config.widths), config.multi_scale
        self.average_pool = config.average_pool
        self.stages = nn.ModuleList()
        for i, (depth, before, width) in enumerate(zip(config.depths, inputs, config.widths)):
            dilation = 2 if i == 4 else 1  # conv5 follows a pooling that no longer subsamples
            first = convolution(before, width, 3, dilation, norm=norm)
            rest = [convolution(width, width, 3, dilation, norm=norm) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(first, *rest))
        self.fc6 = convolution(config.widths[-1], config.features, config.kernel, config.dilation, norm=norm)
        self.fc7 = convolution(config.features, config.features, 1, norm=norm)
        self.dropout = nn.Dropout(config.dropout)
        # Multi-scale prediction: the image and the first four poolings, each brought to stride 8 by its 3x3 layer.
        self.branches = nn.ModuleList()
        if n:
            for c, stride in zip(inputs[:5], (8, 4, 2, 1, 1)):
                self.branches.append(nn.Sequential(convolution(c, n, 3, stride=stride, norm=norm), convolution(n, n, 1, norm=norm)))
        self.fc8 = nn.Conv2d(config.features + len(self.branches) * n, classes, 1)
        self.apply(_init)
        nn.init.normal_(self.fc8.weight, std=0.01)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``scores`` B K h w, which the loss sees, and ``logits`` B K H W, the same interpolated bilinearly."""
        x, levels = image, [image]
        for stage, stride in zip(self.stages, STRIDES):
            x = F.max_pool2d(stage(x), 3, stride, padding=1)
            levels.append(x)
        if self.average_pool:
            x = F.avg_pool2d(x, 3, 1, padding=1)
        x = self.dropout(self.fc7(self.dropout(self.fc6(x))))
        x = torch.cat([x, *(branch(level) for branch, level in zip(self.branches, levels))], 1)
        scores = self.fc8(x)
        # Score (i, j) belongs to pixel (8 i, 8 j), hence aligned corners.
        logits = F.interpolate(scores, size=image.shape[-2:], mode="bilinear", align_corners=True)
        return {"scores": scores, "logits": logits}

    def head_parameters(self) -> list[nn.Parameter]:
        """The layers that ImageNet weights do not cover: the classifier and the multi-scale branches."""
        return [*self.fc8.parameters(), *self.branches.parameters()]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy at stride 8, all positions and classes alike (section 3.2). The truth is subsampled, not the scores enlarged."""
    target = batch["mask"][..., ::8, ::8]
    total = F.cross_entropy(output["scores"], target, ignore_index=IGNORE, reduction="sum")
    return {"loss": total / (target != IGNORE).sum().clamp(min=1)}


@dataclass(frozen=True, kw_only=True)
class DenseCRFConfig:
    """The energy of section 2.2 (eq. 2 and 3) and its inference. Distances in pixels, colours on the scale 0 to 255.

    Fit ``w1``, ``sigma_alpha`` and ``sigma_beta`` to some held-out images. The paper searched w1 in 5..10, sigma_alpha in 50..100 and
    sigma_beta in 3..10, with w2 = sigma_gamma = 3, for photographs of 500 pixels with large objects; that erases small ones. The defaults
    are those of images of 200 pixels.
    """

    w1: float = 2.0
    """Weight of the appearance kernel: nearby pixels of similar colour have the same class."""
    sigma_alpha: float = 10.0
    """Its reach in pixels."""
    sigma_beta: float = 8.0
    """Its reach in colour, 0..255. With an image left in 0..1 all colours would be alike, so images are scaled here."""
    w2: float = 0.0
    """Weight of the smoothness kernel, which knows positions only: no small islands, but also no small objects."""
    sigma_gamma: float = 3.0
    """Its reach in pixels."""
    iterations: int = 10
    """Mean-field steps."""
    exclude_self: bool = False
    """Leave out a pixel's message to itself, as the sum over j != i says. The released densecrf sends it, hence so do we by default."""

    def __post_init__(self) -> None:
        if min(self.w1, self.w2) < 0 or self.w1 + self.w2 == 0:
            raise InputError(f"dense_crf: w1={self.w1}, w2={self.w2}: a weight is 0 or more, and one of them more than 0")
        if min(self.sigma_alpha, self.sigma_beta, self.sigma_gamma) <= 0:
            raise InputError("dense_crf: sigma_alpha, sigma_beta and sigma_gamma must be more than 0")


def kernels(image: Float[Tensor, "C H W"], config: DenseCRFConfig) -> list[tuple[float, Float[Tensor, "N d"]]]:
    """(weight, features in standard deviations) of the appearance kernel (x, y and colours) and of the smoothness kernel (x, y)."""
    _, h, w = image.shape
    y, x = torch.meshgrid(torch.arange(h).to(image), torch.arange(w).to(image), indexing="ij")
    position = torch.stack([x, y])
    appearance = torch.cat([position / config.sigma_alpha, image * 255 / config.sigma_beta])
    weighted = ((config.w1, appearance), (config.w2, position / config.sigma_gamma))
    return [(weight, features.flatten(1).T) for weight, features in weighted if weight]


def gaussian(weight: float, features: Float[Tensor, "N d"]) -> Permutohedral:
    """W D^-1/2 K D^-1/2, where K is the lattice's Gaussian and D its row sums: densecrf's symmetric normalisation."""
    lattice = Permutohedral(features)
    rows = lattice(torch.ones_like(features[:, :1])).squeeze(1)
    return lattice.scaled(weight**0.5 * (rows + 1e-20).rsqrt())


def mean_field(unary: Float[Tensor, "N K"], message: Callable[[Tensor], Tensor], iterations: int) -> Float[Tensor, "N K"]:
    """Algorithm 1 of Kraehenbuehl & Koltun: Q <- softmax(-unary - mu sum_m w_m K_m Q), all pixels at once.

    Args:
        unary: -log P, not negative.
        message: Q (N K) -> sum_m w_m K_m Q; it must not be negative and take any number of columns. Potts, mu(l, l') = [l != l'], makes
            of it the penalty sum_m w_m K_m (1 - Q).
        iterations: 0 gives P back.
    """
    alone = unary + message(torch.ones_like(unary[:, :1]))  # the energy of a label that no other pixel has
    q = _softmax(-unary)
    for _ in range(iterations):
        q = _softmax(message(q).sub_(alone))
    return q


def _softmax(x: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """In place, for x <= 0, so that exp needs no shift: torch's own is slow on rows as short as these."""
    q = x.clamp_(min=-80).exp_()  # labels that are all hopeless are equally so
    return q.mul_((q @ q.new_ones(q.shape[1], 1)).reciprocal_())


def dense_crf(config: DenseCRFConfig) -> Refiner:
    """(image C H W in [0, 1], probabilities K H W) -> refined probabilities K H W; one to four channels."""

    def refine(image: Float[Tensor, "C H W"], probabilities: Float[Tensor, "K H W"]) -> Float[Tensor, "K H W"]:
        unary = -probabilities.flatten(1).T.clamp(min=1e-5).log().contiguous()  # N K; of a zero no image could talk a pixel out
        parts = [gaussian(weight, features) for weight, features in kernels(image.to(unary), config)]
        message = reduce(operator.add, parts)
        if config.exclude_self:
            to_self = reduce(operator.add, [part.diagonal() for part in parts])[:, None]
            refined = mean_field(unary, lambda q: message(q) - to_self * q, config.iterations)
        else:
            refined = mean_field(unary, message, config.iterations)
        return refined.T.reshape(probabilities.shape)

    return refine


VARIANTS = {
    "largefov": Config(),
    "msc_largefov": Config(multi_scale=128),
    "7x7": Config(features=4096, kernel=7, dilation=4, average_pool=False),
    "4x4": Config(features=4096, kernel=4, dilation=8, average_pool=False),
    "deeplab": Config(features=4096, kernel=4, dilation=4, average_pool=False),
    "small": Config(widths=(16, 32, 64, 96, 96), depths=(1, 2, 2, 2, 2), features=128, dilation=4, dropout=0.0, norm=True),
    "test": Config(widths=(4, 4, 8, 8, 8), depths=(1, 1, 1, 1, 1), features=8, dilation=2, norm=True),
}


def recipe(config: Config) -> Recipe:
    """Section 5 for the networks that start from ImageNet; ours for the narrow ones that start from nothing."""
    if config.norm:
        return Recipe(lr=3e-3, weight_decay=1e-2, batch_size=8, average=0.98)
    # 6000 iterations; the classifier learns ten times as fast.
    augment = Augment(rotate=0, scale=(1, 1), brightness=0, contrast=0, gamma=0)
    return Recipe(
        optimizer="sgd", lr=1e-3, head_lr=10, momentum=0.9, weight_decay=5e-4, schedule="step", decay_at=(1 / 3, 2 / 3), warmup=0,
        batch_size=20, patch=321, clip=None, augment=augment,
    )  # fmt: skip


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: DeepLab(spec.channels, len(spec.classes), config),
    recipe=recipe,
    auto=("small",),
    loss=lambda config: loss,
)

METHODS = {"dense_crf": Method(DenseCRFConfig(), dense_crf)}
