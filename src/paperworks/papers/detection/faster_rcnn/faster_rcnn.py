"""Faster R-CNN: a region proposal network on the detector's own feature map makes proposals nearly free.

Ren, He, Girshick and Sun, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NeurIPS 2015 (arXiv 1506.01497).

At each place of the shared feature map the RPN says for k reference boxes, the anchors, whether an object is there and how the box must be
moved; the best proposals are pooled from the same map and classified by Fast R-CNN's head. ``resnet50_fpn`` is the form that is used today:
a feature pyramid (Lin et al. 2017) with one anchor size a level, RoIAlign (He et al. 2017), one logistic score an anchor.

Different from py-faster-rcnn: trained jointly (the paper's approximate joint training), not in four alternating steps; the image is brought
to a square; boxes have no "+1" and anchors are rounded about the origin as in torchvision; the true boxes join the proposals in training.

Shapes: B batch, N anchors, P proposals, R regions of the head, K classes, F channels, S side of the image; class 0 of the head is background.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, box_iou, roi_align, roi_pool

from paperworks.data.boxes import BoxAugment
from paperworks.nn.boxes import BACKGROUND, BETWEEN, Selection, clip, decode, encode, grid_boxes, match, of_image, rows, suppress
from paperworks.nn.fpn import FeaturePyramid
from paperworks.nn.resnet import ResNet
from paperworks.nn.vgg import VGG
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe

HEAD_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Fast R-CNN's targets have the standard deviations 0.1, 0.1, 0.2, 0.2 and are divided by them; the RPN's are left alone."""
CHOICE = Selection(score=0.05, iou=0.3, candidates=300)
"""py-faster-rcnn's."""
NORMS = {"batch": nn.BatchNorm2d, "frozen": functools.partial(FrozenBatchNorm2d, eps=0.0)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The paper's VGG-16 detector; what is for the other trunks and for the pyramid is off."""

    image_size: int = 600
    """Side of the square to which images are brought (the paper scales the shorter side to 600 and keeps the aspect)."""
    trunk: Literal["vgg16", "resnet18", "resnet50"] = "vgg16"
    width: int = 64
    """Channels of the trunk's first stage."""
    norm: Literal["batch", "frozen"] = "batch"
    """Of the ResNets; ``frozen`` goes with torchvision's published weights."""
    pyramid: int = 0
    """Channels of the feature pyramid; 0 is the paper's single map."""
    finest: int = 2
    """The pyramid starts at P2, of stride 4, or higher."""
    canonical: int = 224
    """Side of a region that is pooled from P4 (FPN, eq. 1)."""
    sizes: tuple[int, ...] = (128, 256, 512)
    """Square roots of the anchors' areas; with a pyramid one for each level."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors."""
    proposals: Literal["rpn", "windows"] = "rpn"
    """Where regions come from: the RPN, or a fixed grid of sliding windows (section 4.1's one-stage rival, OverFeat's way)."""
    softmax: bool = True
    """Two scores an anchor; else one, by logistic regression (the paper's footnote)."""
    inside: bool = True
    """Anchors that cross the image's border are not trained."""
    per_position: bool = True
    """N_reg of eq. 1 is the number of places and lambda 10; else the number of sampled anchors and 1 (py-faster-rcnn)."""
    beta: float = 1.0
    """Where the smooth L1 loss turns from a parabola into a line."""
    before: tuple[int, int] = (12000, 6000)
    """Proposals of a level that go into the suppression, in training and in use."""
    after: tuple[int, int] = (2000, 300)
    """Proposals of an image that come out of it."""
    smallest: float = 16.0
    """Proposals with a shorter side are dropped."""
    regions: int = 128
    """Regions of an image that train the head, a quarter of them objects."""
    background: float = 0.1
    """Regions that overlap an object less than this are not shown to the head as background."""
    head: int = 4096
    """Features of fc6 and fc7."""
    dropout: float = 0.5
    align: bool = False
    """RoIAlign in the place of RoI pooling."""
    selection: Selection = CHOICE


# --- Regions ---------------------------------------------------------------------------------------------------------------------------


def anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> Float[Tensor, "A 4"]:
    """Boxes about (0, 0) of areas size^2 and ratios height / width, rounded to whole pixels; all sizes of the first ratio come first."""
    ratio, size = torch.tensor(ratios, dtype=torch.float32), torch.tensor(sizes, dtype=torch.float32)
    w, h = (1 / ratio.sqrt())[:, None] * size, ratio.sqrt()[:, None] * size
    return (torch.stack([-w, -h, w, h], -1).view(-1, 4) / 2).round()


def sliding_windows(side: int, shapes: Float[Tensor, "A 4"], count: int) -> Float[Tensor, "P 4"]:
    """At most ``count`` windows over an image: each shape on an even grid with steps in proportion to its sides, as densely as that allows."""
    sides = [(w, h) for w, h in (shapes[:, 2:] - shapes[:, :2]).tolist() if max(w, h) <= side]

    def places(length: float, step: float) -> int:
        return 1 + math.floor((side - length) / (length * step))

    steps = torch.logspace(-1.5, 2, 200).tolist()
    step = next(s for s in steps if sum(places(w, s) * places(h, s) for w, h in sides) <= count)
    out = []
    for w, h in sides:
        x, y = (torch.linspace(0, side - n, places(n, step)) if places(n, step) > 1 else torch.tensor([(side - n) / 2]) for n in (w, h))
        y, x = torch.meshgrid(y, x, indexing="ij")
        out.append(torch.stack([x, y, x + w, y + h], -1).view(-1, 4))
    return torch.cat(out)


def sample(label: Int[Tensor, " N"], count: int, share: float) -> Bool[Tensor, " N"]:
    """A mini-batch: ``count`` boxes at random, at most ``share`` of them positive (label > 0), the rest negative (0), as far as there are any."""
    positive, negative = (label > 0).nonzero().squeeze(1), (label == 0).nonzero().squeeze(1)
    some = positive[torch.randperm(len(positive), device=label.device)[: int(count * share)]]
    rest = negative[torch.randperm(len(negative), device=label.device)[: count - len(some)]]
    return torch.zeros_like(label, dtype=torch.bool).index_fill_(0, torch.cat([some, rest]), True)


class RPN(nn.Module):
    """Region proposal network, figure 3: a 3x3 convolution and two 1x1 siblings that slide over every map."""

    def __init__(self, width: int, anchors: int, softmax: bool) -> None:
        super().__init__()
        self.scores = 2 if softmax else 1
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.cls = nn.Conv2d(width, anchors * self.scores, 1)
        self.reg = nn.Conv2d(width, anchors * 4, 1)
        for layer in (self.conv, self.cls, self.reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: list[Tensor]) -> tuple[list[Float[Tensor, "B _"]], list[Float[Tensor, "B _ 4"]]]:
        """For each map the log-odds that an anchor holds an object, and t_x, t_y, t_w, t_h."""
        hidden = [F.relu(self.conv(f)) for f in features]
        scores = [rows(self.cls(h), self.scores) for h in hidden]
        # A softmax over two scores is a sigmoid of their difference.
        objectness = [(s[..., 1] - s[..., 0]) if self.scores == 2 else s[..., 0] for s in scores]
        return objectness, [rows(self.reg(h), 4) for h in hidden]


def label_anchors(
    anchors: Float[Tensor, "N 4"], boxes: Float[Tensor, "G 4"], side: int, inside: bool
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """1 (object), 0 (background) or -1 (not used) for each anchor, and the true box that an object's anchor belongs to (section 3.1.2)."""
    iou = box_iou(boxes, anchors)
    matched = match(iou, 0.7, 0.3)
    if len(boxes):
        best = iou.max(1, keepdim=True).values  # of each true box; ties all count, and being the best wins over being background
        matched = iou.argmax(0).where(((iou == best) & (best > 0)).any(0), matched)
    label = (matched >= 0).long() - (matched == BETWEEN).long()
    if inside:
        crossing = (anchors[:, :2] < 0).any(1) | (anchors[:, 2:] > side).any(1)
        label = label.where(~crossing, -1)
    return label, matched.clamp(min=0)


class RegionPooling(nn.Module):
    """7x7 features of each region: RoI pooling or RoIAlign, from the level of the pyramid that fits the region's size."""

    def __init__(self, align: bool, finest: int, canonical: int) -> None:
        super().__init__()
        self.pool = functools.partial(roi_align, sampling_ratio=2) if align else roi_pool
        self.finest, self.canonical = finest, canonical

    def forward(self, features: list[Tensor], regions: Float[Tensor, "R 5"], side: int) -> Float[Tensor, "R F 7 7"]:
        """``regions`` are the number of the image in the batch and a box; a map's stride follows from its side."""
        if len(features) == 1:
            return self._pooled(features[0], regions, side)
        w, h = regions[:, 3] - regions[:, 1], regions[:, 4] - regions[:, 2]
        k = (4 + torch.log2((w * h).sqrt() / self.canonical) + 1e-6).floor()  # FPN, eq. 1
        level = (k - self.finest).clamp(0, len(features) - 1)
        out = features[0].new_zeros(len(regions), features[0].shape[1], 7, 7)
        for i, feature in enumerate(features):
            at = (level == i).nonzero().squeeze(1)
            out = out.index_put((at,), self._pooled(feature, regions[at], side).to(out.dtype))
        return out

    def _pooled(self, feature: Tensor, regions: Tensor, side: int) -> Tensor:
        return self.pool(feature.float(), regions, output_size=(7, 7), spatial_scale=1 / (side // feature.shape[-1]))


class Head(nn.Module):
    """Fast R-CNN's fc6 and fc7 and its two outputs: K + 1 classes, and a box for each of them."""

    def __init__(self, width: int, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.fc6, self.fc7 = nn.Linear(width * 49, features), nn.Linear(features, features)
        self.cls, self.reg = nn.Linear(features, classes + 1), nn.Linear(features, 4 * (classes + 1))  # the background's box is never used
        self.dropout = nn.Dropout(dropout)
        for layer, std in ((self.cls, 0.01), (self.reg, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "R F 7 7"]) -> tuple[Float[Tensor, "R classes"], Float[Tensor, "R classes 4"]]:
        """Scores and coded boxes of K + 1 classes."""
        x = self.dropout(F.relu(self.fc6(x.flatten(1))))
        x = self.dropout(F.relu(self.fc7(x)))
        return self.cls(x), self.reg(x).view(len(x), -1, 4)


# --- The network -----------------------------------------------------------------------------------------------------------------------


class FasterRCNN(nn.Module):
    """Figure 2: trunk, RPN, pooling, head."""

    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        self.config, self.grid, self.selection = config, Grid(fixed=config.image_size), config.selection
        w, width = config.width, config.pyramid
        if config.trunk == "vgg16":
            self.trunk: VGG | ResNet = VGG(channels, (w, 2 * w, 4 * w, 8 * w, 8 * w))
        else:
            self.trunk = ResNet(18 if config.trunk == "resnet18" else 50, channels, norm=NORMS[config.norm], width=w)
        if width:
            self.neck = FeaturePyramid(self.trunk.widths[config.finest - 2 :], width)
            shapes = [anchor_shapes([size], config.ratios) for size in config.sizes]
        else:
            shapes = [anchor_shapes(config.sizes, config.ratios)]
        width = width or self.trunk.widths[-1]
        for i, of_level in enumerate(shapes):
            self.register_buffer(f"shapes_{i}", of_level, persistent=False)
        if config.proposals == "rpn":
            self.rpn = RPN(width, len(shapes[0]), config.softmax)
        else:
            self.register_buffer("windows", sliding_windows(config.image_size, torch.cat(shapes), config.after[1]), persistent=False)
        self.pooling = RegionPooling(config.align, config.finest, config.canonical)
        self.head = Head(width, config.head, classes, config.dropout)

    def forward(
        self, image: Float[Tensor, "B C S S"], boxes: Float[Tensor, "B M 4"] | None = None, labels: Int[Tensor, "B M"] | None = None
    ) -> Output:
        """Propose regions and classify them.

        With ``boxes`` and ``labels`` (-1 fills up) what the loss compares is returned:
        ``objectness`` B N, ``t`` B N 4, ``anchor_label`` B N (-1: not sampled) and ``t_star`` B N 4 of the RPN;
        ``logits`` R K+1, ``region_t`` R 4 (of the true class), ``region_label`` R (0: background) and ``region_t_star`` R 4 of the head.

        Without them: ``boxes`` B P K 4 and ``scores`` B P K, and what they were made of: ``proposals`` B P 4, best first.
        """
        features, side, out = self._features(image), image.shape[-1], Output()
        anchors = self._anchors(features, side)
        if self.config.proposals == "rpn":
            objectness, t = self.rpn(features)
            with torch.no_grad():  # the head's loss does not reach the RPN through the coordinates (approximate joint training)
                proposals, real = self._propose(objectness, t, anchors, side)
            out |= {"objectness": torch.cat(objectness, 1), "t": torch.cat(t, 1)}
        else:
            proposals = self.windows.expand(len(image), -1, -1)  # pyright: ignore[reportCallIssue]
            real = proposals.new_ones(proposals.shape[:2], dtype=torch.bool)
        if boxes is None or labels is None:
            return self._detect(features, proposals, real, side)
        truths = [of_image(b, k) for b, k in zip(boxes, labels)]
        if out:
            out |= self._rpn_targets(torch.cat(anchors), truths, side)
        return out | self._head_targets(features, proposals, real, truths, side)

    def _features(self, image: Tensor) -> list[Tensor]:
        maps = self.trunk.pyramid(image)
        return self.neck(maps[self.config.finest - 2 :]) if self.config.pyramid else maps[-1:]

    def _anchors(self, features: list[Tensor], side: int) -> list[Float[Tensor, "_ 4"]]:
        """Anchors of each map, centred at whole multiples of its stride."""
        strides = [(side // f.shape[2], side // f.shape[3]) for f in features]
        return [
            grid_boxes(getattr(self, f"shapes_{i}"), (f.shape[2], f.shape[3]), stride, 0.0)
            for i, (f, stride) in enumerate(zip(features, strides))
        ]

    def _propose(
        self, objectness: list[Tensor], t: list[Tensor], anchors: list[Tensor], side: int
    ) -> tuple[Float[Tensor, "B P 4"], Bool[Tensor, "B P"]]:
        """The best boxes after suppression (section 3.3), best first, and which of the rows are any."""
        before, after = (n[0] if self.training else n[1] for n in (self.config.before, self.config.after))
        boxes, scores, levels = [], [], []
        for level, (o, t_level, a) in enumerate(zip(objectness, t, anchors)):
            score, index = o.float().topk(min(before, o.shape[1]), dim=1)
            boxes.append(clip(decode(t_level.float(), a), side).gather(1, index[..., None].expand(-1, -1, 4)))
            scores.append(score)
            levels.append(torch.full_like(index, level))
        chosen, real = [], []
        for b, s, level in zip(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)):
            s = s.where(((b[:, 2:] - b[:, :2]) >= self.config.smallest).all(1), -torch.inf)
            s = s.where(suppress(b, s, level, 0.7), -torch.inf)
            best, order = s.topk(min(after, len(s)))
            real.append(best > -torch.inf)
            chosen.append(b[order] * real[-1][:, None])
        return torch.stack(chosen), torch.stack(real)

    def _regions(self, boxes: Sequence[Tensor]) -> Float[Tensor, "R 5"]:
        return torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])

    def _classified(self, features: list[Tensor], boxes: Sequence[Tensor], side: int) -> tuple[Tensor, Tensor]:
        maps = features[:-1] if self.config.pyramid else features  # P6 is for proposals alone
        return self.head(self.pooling(maps, self._regions(boxes), side))

    def _detect(self, features: list[Tensor], proposals: Tensor, real: Tensor, side: int) -> Output:
        logits, t = self._classified(features, list(proposals.unbind(0)), side)
        boxes = clip(decode(t[:, 1:].float(), proposals.reshape(-1, 1, 4), HEAD_WEIGHTS), side)
        scores = logits.float().softmax(1)[:, 1:] * real.reshape(-1, 1)
        batch, count = real.shape
        return {"boxes": boxes.view(batch, count, -1, 4), "scores": scores.view(batch, count, -1), "proposals": proposals}

    def _rpn_targets(self, anchors: Tensor, truths: list[tuple[Tensor, Tensor]], side: int) -> Output:
        labels, targets = [], []
        for boxes, _ in truths:
            label, matched = label_anchors(anchors, boxes, side, self.config.inside)
            targets.append(encode(boxes[matched], anchors) if len(boxes) else torch.zeros_like(anchors))
            labels.append(label.where(sample(label, 256, 0.5), -1))
        return {"anchor_label": torch.stack(labels), "t_star": torch.stack(targets)}

    def _head_targets(
        self, features: list[Tensor], proposals: Tensor, real: Tensor, truths: list[tuple[Tensor, Tensor]], side: int
    ) -> Output:
        regions, labels, targets = [], [], []
        for p, is_real, (boxes, classes) in zip(proposals, real, truths):
            p, is_real = torch.cat([p, boxes]), torch.cat([is_real, is_real.new_ones(len(boxes))])
            iou = box_iou(boxes, p)
            matched = match(iou, 0.5, 0.5)
            if self.config.background and len(boxes):
                matched = matched.where((matched >= 0) | (iou.amax(0) >= self.config.background), BETWEEN)
            label = torch.full_like(matched, -1).where(matched != BACKGROUND, 0)
            if len(boxes):
                label = (1 + classes[matched.clamp(min=0)]).where(matched >= 0, label)
            chosen = sample(label.where(is_real, -1), self.config.regions, 0.25)
            regions.append(p[chosen])
            labels.append(label[chosen])
            true = boxes[matched[chosen].clamp(min=0)] if len(boxes) else p[chosen]
            targets.append(encode(true, p[chosen], HEAD_WEIGHTS))
        label = torch.cat(labels)
        logits, t = self._classified(features, regions, side)
        return {
            "logits": logits,
            "region_t": t[torch.arange(len(label), device=label.device), label],
            "region_label": label,
            "region_t_star": torch.cat(targets),
        }


def multi_task_loss(config: Config) -> Loss:
    """Eq. 1 for the RPN and Fast R-CNN's for the head, summed (section 3.2: approximate joint training)."""

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        del batch  # the network assigned and sampled its targets itself
        terms = {"head_cls": F.cross_entropy(output["logits"].float(), output["region_label"])}
        terms["head_reg"] = regression(output["region_t"], output["region_t_star"], output["region_label"] > 0) / max(
            len(output["region_label"]), 1
        )
        if "objectness" in output:
            label = output["anchor_label"]
            sampled = label >= 0
            n_cls = sampled.sum().clamp(min=1)  # 256 an image
            terms["rpn_cls"] = F.binary_cross_entropy_with_logits(output["objectness"][sampled].float(), label[sampled].float())
            if config.per_position:
                anchors = len(config.ratios) * (1 if config.pyramid else len(config.sizes))
                scale = 10 / (label.numel() / anchors)  # lambda / N_reg
            else:
                scale = 1 / n_cls
            terms["rpn_reg"] = scale * regression(output["t"], output["t_star"], label > 0)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def regression(t: Tensor, t_star: Tensor, where: Tensor) -> Tensor:
        return F.smooth_l1_loss(t[where].float(), t_star[where], beta=config.beta, reduction="sum")

    return loss


_FPN = Config(
    image_size=800, trunk="resnet50", pyramid=256, sizes=(32, 64, 128, 256, 512), softmax=False, inside=False, per_position=False, beta=1 / 9,
    before=(2000, 1000), after=(2000, 1000), smallest=1e-3, regions=512, background=0.0, head=1024, dropout=0.0, align=True,
    selection=Selection(score=0.05, iou=0.5, candidates=1000),
)  # fmt: skip
_LAPTOP = replace(
    _FPN, image_size=192, trunk="resnet18", width=32, pyramid=64, finest=3, canonical=64, sizes=(16, 32, 64, 128),
    before=(300, 200), after=(200, 100), regions=64, head=256, selection=Selection(score=0.05, iou=0.5, candidates=100),
)  # fmt: skip

VARIANTS = {
    "vgg16": Config(),
    "resnet50_fpn": _FPN,
    "small": _LAPTOP,
    "test": replace(
        _LAPTOP, image_size=64, width=4, pyramid=8, sizes=(8, 16, 24, 32), before=(40, 40), after=(20, 20), regions=16, head=16
    ),
}


def recipe(config: Config) -> Recipe:
    """The paper's for its own network, which starts from ImageNet's weights; minutes from nothing for the laptop's."""
    if config.trunk == "vgg16":
        flips = BoxAugment(crop=1, brightness=0, contrast=0)
        return Recipe(
            optimizer="sgd", lr=1e-3, weight_decay=5e-4, schedule="step", decay_at=(0.75,), warmup=0.0, batch_size=1, clip=None, augment=flips,
        )  # fmt: skip
    return Recipe(lr=1e-3 if config.trunk == "resnet18" else 2e-4, weight_decay=1e-2, batch_size=4, average=0.99, augment=BoxAugment())


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: FasterRCNN(spec.channels, len(spec.classes), config),
    recipe=recipe,
    auto=("small",),
    loss=multi_task_loss,
)
