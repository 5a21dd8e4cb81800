"""SSD: one pass, default boxes on feature maps of several resolutions, so that scale is a matter of depth.

Liu, Anguelov, Erhan, Szegedy, Reed, Fu and Berg, "SSD: Single Shot MultiBox Detector", ECCV 2016 (arXiv 1512.02325).

No proposals and no resampling: at each cell of six maps, 3x3 filters score K + 1 classes and four offsets for a few default boxes. Many
default boxes match each object, most match none; the hardest of these train the classifier, three for each match.

As in the released Caffe code where the paper leaves it open: the sizes and steps of the default boxes, the start of conv4_3's scale at 20,
offsets divided by 0.1 and 0.2. Different from it: default boxes may stick out of the image (only their width and height are limited), as
in torchvision; an image without a match adds no loss; ``small`` has batch norms and a quarter of the width.

Shapes: B batch, N default boxes, K classes, S side of the image, m maps; class 0 of the logits is background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from paperworks.data.boxes import fitted, keep
from paperworks.nn.boxes import Selection, clip, decode, encode, grid_boxes, match, of_image, rows
from paperworks.nn.vgg import VGG
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe

VARIANCES = (10.0, 10.0, 5.0, 5.0)
"""One over 0.1 for the centre and over 0.2 for the size."""
FC7 = 1
"""Place of fc7 among the maps."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An extra feature layer of figure 2: a 1x1 convolution and a 3x3 one that makes the map smaller."""

    squeeze: int
    out: int
    stride: int = 2
    padding: int = 1
    kernel: int = 3


_FOUR = (
    Layer(squeeze=256, out=512),
    Layer(squeeze=128, out=256),
    Layer(squeeze=128, out=256, stride=1, padding=0),
    Layer(squeeze=128, out=256, stride=1, padding=0),
)
_CHOICE = Selection(score=0.01, iou=0.45, candidates=400, keep=200)


@dataclass(frozen=True, kw_only=True)
class Config:
    """SSD300 for Pascal VOC."""

    image_size: int = 300
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Of VGG's five blocks."""
    fc: int = 1024
    """Channels of fc6 and fc7, which are convolutions here."""
    layers: tuple[Layer, ...] = _FOUR
    norm: bool = False
    """Batch norms in the trunk and the extra layers."""
    scales: tuple[float, ...] = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
    """s_k of each map as a share of the image's side, and one more for the last map's extra square."""
    ratios: tuple[tuple[float, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    """Width over height of each map's boxes besides the two squares; each ratio stands for its inverse too."""
    steps: tuple[float, ...] = (8, 16, 32, 64, 100, 300)
    """Pixels from one cell of a map to the next; empty: the image's side over the map's, as section 2.2 says."""
    one_map: bool = False
    """All the shapes on fc7 alone (table 3)."""
    negatives: float = 3.0
    """Negatives for each positive, the hardest ones; inf takes all."""
    selection: Selection = _CHOICE


def default_shapes(config: Config) -> list[Float[Tensor, "_ 4"]]:
    """Boxes about (0, 0) of each map, in pixels: squares of s_k and of sqrt(s_k s_(k+1)), then w = s_k sqrt(a), h = s_k / sqrt(a)."""
    out = []
    for s, following, ratios in zip(config.scales[:-1], config.scales[1:], config.ratios, strict=True):
        sides = [(s, s), (math.sqrt(s * following),) * 2]
        for a in ratios:
            w, h = s * math.sqrt(a), s / math.sqrt(a)
            sides += [(w, h), (h, w)]
        half = torch.tensor(sides).clamp(max=1) * config.image_size / 2
        out.append(torch.cat([-half, half], 1))
    return out


def conv(inputs: int, outputs: int, norm: bool, **how: Any) -> list[nn.Module]:
    """A convolution, a batch norm where asked for, a ReLU."""
    layer = nn.Conv2d(inputs, outputs, bias=not norm, **how)
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return [layer, *[nn.BatchNorm2d(outputs)] * norm, nn.ReLU(inplace=True)]


class L2Norm(nn.Module):
    """conv4_3 has another scale than what follows: each cell's features become a unit vector times a learned scale for each channel.

    The scales start at 20 for the paper's 512 channels, and for others so that a feature is as large as there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), 20 * math.sqrt(channels / 512)))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Of norm ``scale`` where all channels have the same."""
        return F.normalize(x) * self.scale.view(1, -1, 1, 1)


class SSD(nn.Module):
    """Figure 2, above."""

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        self.config, self.grid, self.selection = config, Grid(fixed=config.image_size), config.selection
        w, norm = config.widths, config.norm
        self.trunk = VGG(channels, w, norm=norm, round_up=True)
        self.fc = nn.Sequential(
            nn.MaxPool2d(3, 1, padding=1),  # pool5 no longer halves the map; fc6 is subsampled and its holes keep its field of view
            *conv(w[4], config.fc, norm, kernel_size=3, padding=6, dilation=6),
            *conv(config.fc, config.fc, norm, kernel_size=1),
        )
        self.extra = nn.ModuleList()
        widths = [w[3], config.fc]
        for layer in () if config.one_map else config.layers:
            squeeze = conv(widths[-1], layer.squeeze, norm, kernel_size=1)
            reduce = conv(layer.squeeze, layer.out, norm, kernel_size=layer.kernel, stride=layer.stride, padding=layer.padding)
            self.extra.append(nn.Sequential(*squeeze, *reduce))
            widths.append(layer.out)
        shapes = default_shapes(config)
        if config.one_map:
            widths, shapes = [widths[FC7]], [torch.cat(shapes)]
        else:
            self.l2_norm = L2Norm(widths[0])
        self.classes = classes
        self.loc = nn.ModuleList(nn.Conv2d(width, 4 * len(s), 3, padding=1) for width, s in zip(widths, shapes, strict=True))
        self.conf = nn.ModuleList(nn.Conv2d(width, (classes + 1) * len(s), 3, padding=1) for width, s in zip(widths, shapes))
        for layer in (*self.loc, *self.conf):
            nn.init.xavier_uniform_(layer.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        for i, of_map in enumerate(shapes):
            self.register_buffer(f"shapes_{i}", of_map, persistent=False)

    def forward(
        self, image: Float[Tensor, "B C S S"], boxes: Float[Tensor, "B M 4"] | None = None, labels: Int[Tensor, "B M"] | None = None
    ) -> Output:
        """Score every default box and move it.

        With ``boxes`` and ``labels`` (-1 fills up): ``logits`` B N K+1, ``t`` B N 4 and the targets ``label`` B N (0: background) and
        ``t_star`` B N 4. Without them: ``scores`` B N K and ``boxes`` B N 1 4.
        """
        maps = self._maps(image)
        defaults = self.default_boxes(maps)
        logits = torch.cat([rows(conf(x), self.classes + 1) for conf, x in zip(self.conf, maps)], 1)
        t = torch.cat([rows(loc(x), 4) for loc, x in zip(self.loc, maps)], 1)
        if boxes is None or labels is None:
            found = clip(decode(t.float(), defaults, VARIANCES), image.shape[-1])
            return {"scores": logits.float().softmax(2)[..., 1:], "boxes": found[:, :, None], "logits": logits}
        assigned = [assign(defaults, *of_image(b, k)) for b, k in zip(boxes, labels)]
        label, t_star = (torch.stack(parts) for parts in zip(*assigned))
        return {"logits": logits, "t": t, "label": label, "t_star": t_star}

    def _maps(self, image: Tensor) -> list[Tensor]:
        *_, conv4_3, conv5_3 = self.trunk.pyramid(image)
        x = self.fc(conv5_3)
        if self.config.one_map:
            return [x]
        maps = [self.l2_norm(conv4_3), x]
        for layer in self.extra:
            maps.append(x := layer(x))
        return maps

    def default_boxes(self, maps: Sequence[Tensor]) -> Float[Tensor, "N 4"]:
        """The default boxes of all maps, centred in their cells."""
        side, at = self.config.image_size, [FC7] if self.config.one_map else range(len(maps))
        steps = [self.config.steps[i] for i in at] if self.config.steps else [side / x.shape[-1] for x in maps]
        grids = [
            grid_boxes(getattr(self, f"shapes_{i}"), (x.shape[2], x.shape[3]), (step, step), 0.5)
            for i, (x, step) in enumerate(zip(maps, steps))
        ]
        return torch.cat(grids)


# --- Training (section 2.2) ------------------------------------------------------------------------------------------------------------


def assign(
    defaults: Float[Tensor, "N 4"], boxes: Float[Tensor, "G 4"], labels: Int[Tensor, " G"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, "N 4"]]:
    """Class (0: background) and coded box of each default box: every one that overlaps an object by 0.5 or more, and each object's best one."""
    if not len(boxes):
        return torch.zeros(len(defaults), dtype=torch.long, device=defaults.device), torch.zeros_like(defaults)
    iou = box_iou(boxes, defaults)
    matched = match(iou, 0.5, 0.5)
    for g, best in enumerate(iou.argmax(1)):  # of two objects with the same best box the last one has it
        matched[best] = g
    return (1 + labels[matched]).where(matched >= 0, 0), encode(boxes[matched], defaults, VARIANCES)


def hard_negatives(losses: Float[Tensor, "B N"], positive: Bool[Tensor, "B N"], ratio: float) -> Bool[Tensor, "B N"]:
    """In each image the negatives of the highest loss, ``ratio`` times as many as there are positives."""
    rank = losses.masked_fill(positive, -torch.inf).argsort(1, descending=True).argsort(1)
    return (rank < ratio * positive.sum(1, keepdim=True)) & ~positive if math.isfinite(ratio) else ~positive


def multi_box_loss(config: Config) -> Loss:
    """Eq. 1: (L_conf + L_loc) / N with N the number of matched default boxes of the batch."""

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        del batch  # the network assigned its targets itself
        label = output["label"]
        positive = label > 0
        n = positive.sum().clamp(min=1)
        cross_entropy = F.cross_entropy(output["logits"].float().transpose(1, 2), label, reduction="none")  # eq. 3
        used = positive | hard_negatives(cross_entropy.detach(), positive, config.negatives)
        confidence = (cross_entropy * used).sum() / n
        localisation = F.smooth_l1_loss(output["t"][positive].float(), output["t_star"][positive], reduction="sum") / n  # eq. 2
        return {"loss": confidence + localisation, "confidence": confidence, "localisation": localisation}

    return loss


@dataclass(frozen=True)
class SSDAugment:
    """Section 2.2, data augmentation, with section 3.6's expansion."""

    expand: float = 4.0
    """Half of the images are put on a canvas of up to this many times their sides; 1 leaves it out."""
    crop: bool = True
    """The whole image, or a patch with a smallest overlap of 0.1 to 0.9 with an object, or any patch."""
    distort: bool = True
    """Half of the images get other brightness, contrast, saturation and hue."""
    flip: bool = True

    def __call__(self, sample: dict[str, Any], patch: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Draw one variation and bring it to the size ``patch``. Objects whose centre is cut away are no longer there."""
        image: Tensor = sample["image"].as_subclass(Tensor)
        steps: list[nn.Module] = []
        if self.distort and len(image) in (1, 3):
            steps.append(v2.RandomApply([v2.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)], p=0.5))
        if self.expand > 1:
            steps.append(v2.RandomZoomOut(fill={Image: image.mean((1, 2)).tolist(), "others": 0}, side_range=(1.0, self.expand), p=0.5))
        if self.crop:
            steps.append(v2.RandomIoUCrop())
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(0.5))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            varied = sample | dict(zip(("image", "boxes"), v2.Compose(steps)(sample["image"], sample["boxes"])))
        boxes: BoundingBoxes = varied["boxes"]
        left, top, right, bottom = boxes.as_subclass(Tensor).unbind(1)
        return fitted(keep(varied, (right - left >= 1) & (bottom - top >= 1)), patch)


_LAPTOP = Config(
    image_size=192, widths=(16, 32, 64, 128, 128), fc=256, norm=True,
    layers=(Layer(squeeze=64, out=128), Layer(squeeze=32, out=64), Layer(squeeze=32, out=64)),
    scales=(0.1, 0.2, 0.43, 0.67, 0.9, 1.05), ratios=((2,), (2, 3), (2, 3), (2,), (2,)), steps=(),
    selection=Selection(score=0.05, iou=0.45),
)  # fmt: skip
VARIANTS = {
    "300": Config(),
    "512": Config(
        image_size=512, layers=(*(Layer(squeeze=n // 2, out=n) for n in (512, 256, 256, 256)), Layer(squeeze=128, out=256, stride=1, kernel=4)),
        scales=(0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05), ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        steps=(8, 16, 32, 64, 128, 256, 512),
    ),
    "small": _LAPTOP,
    "test": Config(
        image_size=64, widths=(2, 4, 4, 8, 8), fc=16, norm=True, layers=(Layer(squeeze=4, out=8), Layer(squeeze=4, out=8)),
        scales=(0.1, 0.2, 0.35, 0.75, 1.05), ratios=((2,), (2, 3), (2,), (2,)), steps=(),
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """The paper's for its own networks, which start from ImageNet's weights; minutes from nothing for the laptop's."""
    if config.norm:
        return Recipe(lr=2e-3, weight_decay=1e-2, batch_size=4, average=0.99, augment=SSDAugment(expand=1.5))
    return Recipe(
        optimizer="sgd", lr=1e-3, weight_decay=5e-4, schedule="step", decay_at=(2 / 3, 5 / 6), warmup=0.0, batch_size=32, clip=None,
        augment=SSDAugment(),
    )  # fmt: skip


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: SSD(spec.channels, len(spec.classes), config),
    recipe=recipe,
    auto=("small",),
    loss=multi_box_loss,
)
