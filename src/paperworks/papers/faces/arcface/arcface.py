"""ArcFace: a constant margin on the angle between an embedding and the centre of its class.

Deng, Guo, Xue and Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019 (arXiv 1801.07698).

A softmax separates the classes it was trained on and does not ask that they be compact, which is what telling strangers apart needs. With
features and class weights of length one a logit is the cosine of an angle; adding a margin to the angle of the true class pulls every
embedding closer to its centre than a right answer would take.

As in the official code (deepinsight/insightface) where the paper is silent: beyond theta + m = pi, where the cosine would rise again, the
target is cos(theta) - m sin(m); the last batch norm's scale is 1 and not trained. Different from it: the gradient is that of the margin itself
(the newest official code gives the true class the gradient of a plain shift); cosines are kept off -1 and 1, where that gradient
has no bound; a combined margin is one formula (the official code has either m2 or m3).

Shapes: B images, c h w an image, F numbers of an embedding, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Spec
from paperworks.tasks.representation import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """ResNet-50 on faces of 112 pixels by default."""

    blocks: tuple[int, int, int, int] = (3, 4, 14, 3)
    """Residual blocks of the four stages."""
    width: int = 64
    """Channels of the first stage; each doubles it."""
    embedding: int = 512
    """F."""
    dropout: float = 0.0
    """Of the features before the last layer: 0.4 in the paper, 0 in today's official settings."""
    scale: float = 64.0
    """s, the radius of the sphere."""
    m1: float = 1.0
    """SphereFace's factor on the angle."""
    m2: float = 0.5
    """ArcFace's margin in radians."""
    m3: float = 0.0
    """CosFace's margin on the cosine."""
    image_size: int | None = 112
    """Side of the images, a multiple of 16; None takes it from the data."""


class Block(nn.Module):
    """The improved residual unit, section 3.1: BN-Conv-BN-PReLU-Conv-BN, the stride on the second convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 h w"]:
        """The shortcut plus what the convolutions add to it; no ReLU after the sum."""
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + self.downsample(x)


class IResNet(nn.Module):
    """The trunk: a 3 x 3 convolution of stride 1, four stages that halve the sides, and the output setting E, BN-Dropout-FC-BN."""

    def __init__(self, channels: int, side: int, config: Config) -> None:
        super().__init__()
        widths = [config.width * 2**i for i in range(4)]
        self.conv1 = nn.Conv2d(channels, config.width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.prelu = nn.PReLU(config.width)

        def stage(i: int) -> nn.Sequential:
            first = Block(widths[max(i - 1, 0)], widths[i], 2)
            return nn.Sequential(first, *(Block(widths[i], widths[i], 1) for _ in range(config.blocks[i] - 1)))

        self.layer1, self.layer2, self.layer3, self.layer4 = (stage(i) for i in range(4))
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(widths[3] * (side // 16) ** 2, config.embedding)
        self.features = nn.BatchNorm1d(config.embedding)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, image: Float[Tensor, "B c h w"]) -> Float[Tensor, "B F"]:
        """Embeddings, not of unit length yet."""
        x = self.prelu(self.bn1(self.conv1(image)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.dropout(self.bn2(x).flatten(1))))


class ArcFace(nn.Module):
    """The trunk and the centres of the classes."""

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        if len(spec.classes) < 2:
            raise InputError("the training images have fewer than two classes; put those of each class into a folder of its own")
        side = config.image_size or image_side(spec)
        self.grid = Grid(fixed=side)
        self.trunk = IResNet(spec.channels, side, config)
        self.centres = nn.Parameter(0.01 * torch.randn(len(spec.classes), config.embedding))  # W, K F

    def forward(self, image: Float[Tensor, "B c h w"], view: Tensor | None = None) -> Output:
        """Embed images; ``view``, which methods without labels need, is not looked at.

        Returns:
            ``embedding`` B F and ``cosine`` B K, of its angles with the centres.
        """
        x = self.trunk(image)
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse for angles
            return {"embedding": x, "cosine": F.linear(F.normalize(x.float()), F.normalize(self.centres.float()))}


EDGE = 1e-6
"""How near to 1 the absolute value of a cosine comes: there the gradient of its angle is 707."""


def margin_logits(
    cosine: Float[Tensor, "B K"], label: Int[Tensor, "B"], *, scale: float, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0
) -> Float[Tensor, "B K"]:
    """Equation 4: s cos(theta), and s (cos(m1 theta + m2) - m3) for the true class; equation 3 is m1 = 1, m3 = 0.

    For m1 = 1 the target falls on beyond theta + m2 = pi, as in the official code. Labels below 0 have no target.
    """
    target = cosine.gather(1, label.clamp_min(0)[:, None])
    theta = target.clamp(EDGE - 1, 1 - EDGE).acos()
    moved = (m1 * theta + m2).cos()
    if m1 == 1:
        moved = moved.where(theta + m2 <= math.pi, target - m2 * math.sin(m2))
    moved = (moved - m3).where(label[:, None] >= 0, target)
    return scale * cosine.scatter(1, label.clamp_min(0)[:, None], moved)


def loss(config: Config) -> Loss:
    """Cross-entropy with the margin, and how far embeddings are from their centres, in degrees."""

    def margin(output: Output, batch: Batch) -> dict[str, Tensor]:
        cosine, label = output["cosine"], batch["label"]
        logits = margin_logits(cosine, label, scale=config.scale, m1=config.m1, m2=config.m2, m3=config.m3)
        with torch.no_grad():
            angle = cosine.gather(1, label.clamp_min(0)[:, None]).clamp(-1, 1).acos().rad2deg().mean()
        return {"loss": F.cross_entropy(logits, label, ignore_index=-1), "angle": angle}

    return margin


VARIANTS = {
    "r18": Config(blocks=(2, 2, 2, 2)),
    "r34": Config(blocks=(3, 4, 6, 3)),
    "r50": Config(),
    "r100": Config(blocks=(3, 13, 30, 3)),
    "small": Config(blocks=(1, 1, 1, 1), width=16, embedding=64, scale=16.0, image_size=None),
    "test": Config(blocks=(1, 1, 1, 1), width=4, embedding=8, scale=16.0, image_size=32),
}


def recipe(config: Config) -> Recipe:
    """The paper's training on MS1MV2: 180,000 steps of 512 faces, mirrored or not; the small variants are trained in minutes."""
    mirror = View(area=(1.0, 1.0), aspect=(1.0, 1.0), jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0)
    if config.width < 64:
        return Recipe(lr=3e-3, weight_decay=1e-3, batch_size=64, patch=128, clip=5.0, augment=mirror)
    return Recipe(
        optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="step", decay_at=(100 / 180, 160 / 180), warmup=0.0,
        batch_size=512, patch=112, clip=5.0, augment=mirror,
    )  # fmt: skip


PAPER = Paper(variants=VARIANTS, build=ArcFace, recipe=recipe, auto=("small", "r18"), loss=loss)
