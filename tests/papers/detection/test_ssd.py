"""SSD against torchvision with the same weights, and what it does otherwise against the paper's formulas."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import replace

import pytest
import torch
from torchvision import tv_tensors
from torchvision.models import vgg16
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG, SSDHead
from torchvision.ops import box_iou

from paperworks.papers.detection.ssd.ssd import (
    SSD,
    VARIANTS,
    Config,
    L2Norm,
    SSDAugment,
    assign,
    default_shapes,
    hard_negatives,
    multi_box_loss,
)
from paperworks.papers.detection.ssd.weights import SOURCES
from paperworks.tasks.detection import Detection
from peers import relative

TORCHVISION = f"torchvision {importlib.metadata.version('torchvision').split('+')[0]}"
CLASSES = 3
COCO = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)


def noise() -> torch.Tensor:
    return torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(1))


def expected_of(said: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return said["boxes"], said["scores"], said["labels"]


def in_order(boxes, scores, labels):
    """By score, and boxes of equal scores from left to right."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), float(boxes[i, 0])))
    return boxes[order], scores[order], labels[order]


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    peer = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    with torch.no_grad():
        for value in peer.state_dict().values():
            if value.ndim == 1:
                value.add_(0.1 * torch.randn(value.shape))
        said = [conf(x) for conf, x in zip(peer.head.classification_head.module_list, peer.backbone(noise()).values())]
        for conf, x in zip(peer.head.classification_head.module_list, said):
            conf.weight.mul_(1 / x.std())  # scores that vary and are far from 0 and 1
    config = Config(scales=COCO)
    ours = SSD(3, CLASSES, config)
    ours.load_state_dict(SOURCES["torchvision"](peer.state_dict(), config))
    return ours, peer


@pytest.fixture(scope="module")
def outputs(pair):
    """What the two say of one image: ours, and torchvision's head, default boxes and detections (its own scaling of images left out)."""
    ours, peer = (network.eval() for network in pair)
    image = noise()
    with torch.inference_mode():
        from torchvision.models.detection.image_list import ImageList

        features = list(peer.backbone(image).values())
        head = peer.head(features)
        anchors = peer.anchor_generator(ImageList(image, [(300, 300)]), features)
        return image, ours(image), head, anchors, peer.postprocess_detections(head, anchors, [(300, 300)])[0]


def test_detections_equal_torchvisions(evidence, pair, outputs):
    ours, _ = pair
    image, out, head, _, expected = outputs
    with torch.inference_mode():
        boxes, scores, labels = Detection.deploy(ours, Detection.plain_spec(classes=CLASSES)).finish(out)
        real = scores[0] > 0
        assert real.sum() == len(expected["scores"]) == 200
        mine, theirs = (in_order(*found) for found in ((boxes[0][real], scores[0][real], labels[0][real] + 1), expected_of(expected)))
        assert torch.equal(mine[2], theirs[2])
        errors = [relative(out["logits"], head["cls_logits"]), relative(mine[0], theirs[0]), relative(mine[1], theirs[1])]
        assert expected["scores"].std() > 0.003
        assert max(errors) < 1e-4
        kept = ours.fc[1].weight.clone()
        ours.fc[1].weight.mul_(1.05)  # a perturbed weight is seen
        assert relative(ours(image)["logits"], out["logits"]) > 1e-4
        ours.fc[1].weight.copy_(kept)
    evidence.fidelity(against=f"{TORCHVISION} ssd300_vgg16: logits, boxes and scores", error=max(errors))


def test_default_boxes_and_losses_equal_torchvisions(evidence, pair, outputs):
    ours, peer = pair
    image, _, head, anchors, _ = outputs
    boxes = torch.tensor([[20.0, 30, 90, 120], [100, 100, 290, 280], [200, 10, 230, 40], [60, 60, 66, 70]])
    labels = torch.tensor([0, 2, 1, 1])
    defaults = ours.default_boxes(ours._maps(image))
    assert len(defaults) == 8732
    assert relative(defaults, anchors[0]) < 1e-6
    with torch.no_grad():
        matched = peer.proposal_matcher(box_iou(boxes, anchors[0]))
        expected = peer.compute_loss([{"boxes": boxes, "labels": labels + 1}], head, anchors, [matched])
        found = multi_box_loss(ours.config)(ours.train()(image, boxes[None], labels[None]), {})
        ours.eval()
    assert (matched >= 0).sum() > 10
    errors = [
        abs(float(found[k] - expected[e])) / float(expected[e])
        for k, e in (("confidence", "classification"), ("localisation", "bbox_regression"))
    ]
    assert max(errors) < 1e-4
    evidence.fidelity(against=f"{TORCHVISION} ssd300_vgg16: default boxes, matching, hard negatives, both losses", error=max(errors))


@pytest.mark.parametrize(("variant", "classes", "expected"), [("300", 20, 26_285_486), ("300", 90, 35_641_826)])
def test_parameter_counts(variant, classes, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in SSD(3, classes, VARIANTS[variant]).parameters()) == expected


def test_ssd512_has_the_maps_boxes_and_parameters_of_the_release(evidence):
    """torchvision's extractor for 512 pixels has other strides but the same filters."""
    with torch.device("meta"):
        ours = SSD(3, 20, VARIANTS["512"])
        maps = ours._maps(torch.empty(1, 3, 512, 512))
        assert [m.shape[-1] for m in maps] == [64, 32, 16, 8, 4, 2, 1]
        extractor = SSDFeatureExtractorVGG(vgg16().features, highres=True)
        head = SSDHead([512, 1024, 512, 256, 256, 256, 256], [4, 6, 6, 6, 6, 4, 4], 21)
    assert sum(len(s) * m.shape[-1] ** 2 for s, m in zip(default_shapes(VARIANTS["512"]), maps)) == 24_564
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for part in (extractor, head) for p in part.parameters()) == 27_188_676
    evidence.property(
        "SSD512: maps of 64, 32, 16, 8, 4, 2 and 1 cells a side, 24,564 default boxes, 27,188,676 parameters for 20 classes",
        "SSD512：特征图边长为 64、32、16、8、4、2 和 1 格，24,564 个默认框，20 类时 27,188,676 个参数",
    )


def test_default_boxes_of_voc(evidence):
    """The sizes of the release: 30 to 264 pixels and the next one up to 315; ratios as the formula of section 2.2 has them."""
    shapes = default_shapes(VARIANTS["300"])
    assert [len(s) for s in shapes] == [4, 6, 6, 6, 4, 4]
    small, large = [30, 60, 111, 162, 213, 264], [60, 111, 162, 213, 264, 315]
    for s, least, most in zip(shapes, small, large):
        w, h = (s[:, 2:] - s[:, :2]).unbind(1)
        torch.testing.assert_close(w[:2], torch.tensor([least, min(math.sqrt(least * most), 300)]), atol=0.6, rtol=0)
        torch.testing.assert_close((w / h)[2:4], torch.tensor([2, 0.5]) if w.max() < 300 else (w / h)[2:4])
    peer = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=list(VARIANTS["300"].scales), steps=[8, 16, 32, 64, 100, 300]
    )
    for s, wh in zip(shapes, peer._wh_pairs):
        torch.testing.assert_close((s[:, 2:] - s[:, :2]) / 300, wh.clamp(0, 1))
    evidence.property(
        "the default boxes have the released sizes: 30 to 264 pixels of 300, and ratios 1, 2, 3 and their inverses",
        "默认框的尺寸与发布的一致：300 像素中的 30 到 264 像素，长宽比为 1、2、3 及其倒数",
    )


def test_matching_by_brute_force(evidence):
    """Every default box with an overlap of 0.5 matches, and each object has at least its best one."""
    network = SSD(3, 3, VARIANTS["test"]).eval()
    defaults = network.default_boxes(network._maps(torch.zeros(1, 3, 64, 64)))
    boxes = torch.tensor([[5.0, 5, 30, 28], [50, 50, 52.5, 52.5], [0, 0, 64, 64]])
    label, _ = assign(defaults, boxes, torch.tensor([0, 1, 2]))
    iou = box_iou(boxes, defaults)
    for n in range(len(defaults)):
        best = int(iou[:, n].argmax())
        expected = best + 1 if iou[best, n] >= 0.5 else 0
        for g in range(3):
            if int(iou[g].argmax()) == n:
                expected = g + 1
        assert label[n] == expected
    assert iou[1].max() < 0.5 and (label == 2).sum() == 1  # too small for any default box, and found all the same
    assert (label == 3).sum() > 1
    evidence.property(
        "every default box at an overlap of 0.5 matches, and each object has at least its best one",
        "IoU 达到 0.5 的默认框都算匹配，每个目标至少有其最佳默认框",
    )


def test_hard_negatives_by_brute_force(evidence):
    torch.manual_seed(0)
    losses, positive = torch.rand(3, 50), torch.rand(3, 50) < 0.1
    positive[2] = False
    for ratio in (3.0, math.inf):
        chosen = hard_negatives(losses, positive, ratio)
        for row, p, c in zip(losses, positive, chosen):
            order = [i for i in row.argsort(descending=True).tolist() if not p[i]]
            count = len(order) if ratio == math.inf else 3 * int(p.sum())
            assert set(c.nonzero().squeeze(1).tolist()) == set(order[:count])
    evidence.property(
        "of each image's negatives the hardest, three for each positive, and none of an image without a match",
        "逐图取损失最高的负样本，每个正样本配三个；没有匹配的图一个也不取",
    )


def test_l2_norm(evidence):
    """Each cell has norm 20 at the start, and each feature of 512 is about as large as in a narrow network."""
    x = 7 * torch.randn(2, 512, 3, 3)
    torch.testing.assert_close(L2Norm(512)(x).norm(dim=1), torch.full((2, 3, 3), 20.0))
    wide, narrow = L2Norm(512)(x).square().mean(), L2Norm(8)(x[:, :8]).square().mean()
    torch.testing.assert_close(wide, narrow, rtol=0.05, atol=0)
    evidence.property(
        "conv4_3 is normalised over its channels, with a learned scale that starts at 20",
        "conv4_3 在每个格点的各通道上做 L2 归一化，再乘以可学习的系数，初值为 20",
    )


def test_one_map_has_the_same_default_boxes():
    """The claim's control: as many boxes of the same shapes, all on fc7."""
    several, one = (SSD(3, 3, replace(VARIANTS["small"], image_size=128, one_map=flag)).eval() for flag in (False, True))
    image = torch.zeros(1, 3, 128, 128)
    a, b = several(image)["scores"].shape[1], one(image)["scores"].shape[1]
    assert abs(a - b) / a < 0.02
    assert len(one.loc) == 1 and not len(one.extra)
    sizes = [{tuple(s) for s in torch.cat(default_shapes(n.config)).tolist()} for n in (several, one)]
    assert sizes[0] == sizes[1]


def test_images_without_objects_have_no_loss():
    network = SSD(3, 2, VARIANTS["test"]).train()
    terms = multi_box_loss(network.config)(network(torch.randn(2, 3, 64, 64), torch.zeros(2, 1, 4), torch.full((2, 1), -1)), {})
    assert terms["loss"] == 0


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_augmentation_keeps_boxes_on_their_objects(channels):
    """A bright square on black: wherever it goes, its box goes with it."""
    image = torch.full((channels, 90, 120), 0.1)
    image[:, 30:60, 50:80] = 0.9
    sample = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([[50.0, 30, 80, 60]]), format="XYXY", canvas_size=(90, 120)),
        "labels": torch.tensor([1]),
        "name": "square",
    }
    kept = 0
    for seed in range(40):
        out = SSDAugment()(sample, (64, 64), torch.Generator().manual_seed(seed))
        assert out["image"].shape == (channels, 64, 64) and len(out["boxes"]) == len(out["labels"])
        assert out["boxes"].canvas_size == (64, 64)
        for left, top, right, bottom in out["boxes"].tolist():
            kept += 1
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            bright = out["image"].mean(0)
            bright = bright > (bright.min() + bright.max()) / 2
            if (right - left) * (bottom - top) < 3000 and bright.any():
                y, x = bright.nonzero().unbind(1)
                found = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
                assert (found - torch.tensor([left, top, right, bottom])).abs().max() < 3
    assert kept > 20
    again = [SSDAugment()(sample, (64, 64), torch.Generator().manual_seed(3))["image"] for _ in range(2)]
    assert torch.equal(*again)
