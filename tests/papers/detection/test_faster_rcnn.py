"""Faster R-CNN against torchvision with the same weights, and each mechanism by brute force."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN as Peer
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, box_iou

from paperworks.nn.boxes import BACKGROUND, encode
from paperworks.papers.detection.faster_rcnn.faster_rcnn import (
    VARIANTS,
    FasterRCNN,
    Head,
    RegionPooling,
    anchor_shapes,
    label_anchors,
    multi_task_loss,
    sample,
    sliding_windows,
)
from paperworks.papers.detection.faster_rcnn.weights import SOURCES
from paperworks.tasks.detection import Detection
from peers import relative

TORCHVISION = f"torchvision {importlib.metadata.version('torchvision').split('+')[0]}"
SIDE, CLASSES = 128, 3


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Weights and statistics far from those of the start, so that scores and boxes vary."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point() and value.ndim < 2:
                value.copy_(("weight" in name) + 0.2 * torch.randn(value.shape, generator=generator))
            elif name.endswith(("cls_logits.weight", "cls_score.weight")):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif name.endswith("bbox_pred.weight"):
                value.copy_(0.01 * torch.randn(value.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def pair():
    """torchvision's network (a shorter ResNet, as 16 blocks of random weights explode) and ours with its weights."""
    torch.manual_seed(0)
    config = replace(
        VARIANTS["resnet50_fpn"],
        image_size=SIDE,
        width=64,
        norm="frozen",
        sizes=(16, 32, 48, 64, 96),
        before=(200, 150),
        after=(100, 80),
        regions=32,
    )
    body = ResNet(Bottleneck, [3, 4, 6, 3], norm_layer=lambda n: FrozenBatchNorm2d(n, eps=0.0))
    for module in body.modules():
        if isinstance(module, Bottleneck):
            module.bn3.weight.mul_(0.2)
    sizes = tuple((s,) for s in config.sizes)
    peer = Peer(
        _resnet_fpn_extractor(body, 5), CLASSES + 1, rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=200, rpn_pre_nms_top_n_test=150, rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=80,
        box_batch_size_per_image=32, box_score_thresh=0.05,
    )  # fmt: skip
    randomised(peer)
    for module in body.modules():
        if isinstance(module, Bottleneck):
            module.bn3.weight.mul_(0.2)
    ours = FasterRCNN(3, CLASSES, config)
    ours.load_state_dict(SOURCES["torchvision"](peer.state_dict(), config))
    return ours, peer


def scene(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    corner = torch.rand(batch, 4, 2, generator=generator) * 80
    boxes = torch.cat([corner, corner + 12 + 36 * torch.rand(batch, 4, 2, generator=generator)], 2)
    labels = torch.randint(0, CLASSES, (batch, 4), generator=generator)
    labels[0, 3] = -1
    return image, boxes, labels


def peer_targets(boxes, labels):
    return [{"boxes": b[k >= 0], "labels": 1 + k[k >= 0]} for b, k in zip(boxes, labels)]


def test_detections_equal_torchvisions(evidence, pair):
    ours, peer = (network.eval() for network in pair)
    image, *_ = scene()
    with torch.inference_mode():
        out = ours(image)
        boxes, scores, labels = Detection.deploy(ours, Detection.plain_spec(classes=CLASSES)).finish(out)
        images = ImageList(image, [(SIDE, SIDE)] * 2)
        features = peer.backbone(image)
        proposals, _ = peer.rpn(images, features)
        expected, _ = peer.roi_heads(features, proposals, images.image_sizes)
        errors = []
        for i, e in enumerate(expected):
            assert len(e["scores"]) > 20
            real = scores[i] > 0
            assert torch.equal(labels[i][real] + 1, e["labels"])
            errors += [relative(boxes[i][real], e["boxes"]), relative(scores[i][real], e["scores"])]
            errors.append(relative(out["proposals"][i][: len(proposals[i])], proposals[i]))
        assert max(errors) < 1e-4
        kept = ours.head.reg.weight.clone()
        ours.head.reg.weight.mul_(1.1)  # a perturbed weight is seen
        moved, *_ = Detection.deploy(ours, Detection.plain_spec(classes=CLASSES)).finish(ours(image))
        ours.head.reg.weight.copy_(kept)
        assert relative(moved[0], boxes[0]) > 1e-4
    evidence.fidelity(against=f"{TORCHVISION} fasterrcnn_resnet50_fpn: proposals, boxes and scores", error=max(errors))


def test_losses_equal_torchvisions(evidence, pair):
    ours, peer = (network.train() for network in pair)
    image, boxes, labels = scene()
    images = ImageList(image, [(SIDE, SIDE)] * 2)
    features = peer.backbone(image)
    torch.manual_seed(5)
    proposals, rpn_losses = peer.rpn(images, features, peer_targets(boxes, labels))
    _, head_losses = peer.roi_heads(features, proposals, images.image_sizes, peer_targets(boxes, labels))
    expected = rpn_losses | head_losses
    torch.manual_seed(5)  # the same anchors and regions are drawn
    found = multi_task_loss(ours.config)(ours(image, boxes, labels), {})
    names = {"rpn_cls": "loss_objectness", "rpn_reg": "loss_rpn_box_reg", "head_cls": "loss_classifier", "head_reg": "loss_box_reg"}
    errors = {key: relative(found[key].detach(), expected[name].detach()) for key, name in names.items()}
    assert all(expected[name].detach() > 1e-3 for name in names.values())
    assert max(errors.values()) < 1e-4, errors
    torch.manual_seed(6)  # others give other losses
    other = multi_task_loss(ours.config)(ours(image, boxes, labels), {})
    assert abs(other["loss"] - found["loss"]).detach() > 1e-4
    evidence.fidelity(
        against=f"{TORCHVISION} fasterrcnn_resnet50_fpn: the four losses with the same sampled anchors", error=max(errors.values())
    )


@pytest.mark.parametrize(
    ("variant", "norm", "classes", "expected"),
    [("vgg16", "batch", 20, 137_078_239), ("resnet50_fpn", "batch", 90, 41_808_406), ("resnet50_fpn", "frozen", 90, 41_755_286)],
)
def test_parameter_counts(variant, norm, classes, expected):
    with torch.device("meta"):
        network = FasterRCNN(3, classes, replace(VARIANTS[variant], norm=norm))
    assert sum(p.numel() for p in network.parameters()) == expected


# --- Mechanisms of the paper that torchvision does otherwise


def test_nine_anchors(evidence):
    """Three areas times three ratios; the famous table of the Matlab code has the same sizes to the rounding of a base of 16 pixels."""
    shapes = anchor_shapes((128, 256, 512), (0.5, 1, 2))
    assert shapes.shape == (9, 4)
    w, h = shapes[:, 2] - shapes[:, 0], shapes[:, 3] - shapes[:, 1]
    classic = torch.tensor([[184, 96], [368, 192], [736, 384], [128, 128], [256, 256], [512, 512], [88, 176], [176, 352], [352, 704]])
    assert (torch.stack([w, h], 1) / classic - 1).abs().max() < 0.065
    torch.testing.assert_close((w * h).sqrt(), torch.tensor([128.0, 256, 512] * 3), rtol=0.01, atol=0)
    assert (shapes[:, :2] == -shapes[:, 2:]).all()
    evidence.property(
        "nine anchors: three areas, three ratios, centred, within 6.5 % of the published table of boxes",
        "九个锚框：三种面积、三种长宽比，以原点为中心，与公布的框表相差不到 6.5 %",
    )


def test_anchor_labels_by_brute_force(evidence):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(400, 2, generator=generator) * 120 - 10
    anchors = torch.cat([corner, corner + 10 + 30 * torch.rand(400, 2, generator=generator)], 1)
    boxes = torch.tensor([[20.0, 20, 45, 45], [60, 60, 75, 90], [0, 90, 5, 95]])
    label, matched = label_anchors(anchors, boxes, 100, inside=True)
    iou = box_iou(boxes, anchors)
    for n in range(400):
        a = anchors[n]
        overlap = iou[:, n]
        is_best = any(overlap[g] == iou[g].max() and overlap[g] > 0 for g in range(3))
        expected = 1 if overlap.max() >= 0.7 or is_best else 0 if overlap.max() < 0.3 else -1
        if a[0] < 0 or a[1] < 0 or a[2] > 100 or a[3] > 100:
            expected = -1
        assert label[n] == expected
        if expected == 1:
            assert matched[n] == overlap.argmax()
    assert {-1, 0, 1} == set(label.tolist())
    crossing = label_anchors(anchors, boxes, 100, inside=False)[0]
    assert (crossing != label).any()
    evidence.property(
        "an anchor is positive at an overlap of 0.7 or as the best of an object, negative below 0.3, unused where it crosses the border",
        "锚框的 IoU 不低于 0.7 或是某个目标的最佳锚框时为正，低于 0.3 为负，越过图像边界的不用",
    )


def test_two_scores_are_one_logistic_score(evidence):
    """The softmax over two scores that the paper implements has the loss of a logistic regression on their difference."""
    torch.manual_seed(0)
    scores, label = torch.randn(50, 2), torch.randint(0, 2, (50,))
    torch.testing.assert_close(
        F.cross_entropy(scores, label), F.binary_cross_entropy_with_logits(scores[:, 1] - scores[:, 0], label.float())
    )
    evidence.property("a softmax over two scores is a logistic score of their difference", "两个得分的 softmax 等于其差的逻辑回归得分")


def test_batch_of_anchors(evidence):
    label = torch.tensor([1] * 40 + [0] * 500 + [-1] * 100)
    torch.manual_seed(0)
    chosen = sample(label, 256, 0.5)
    assert [int((chosen & (label == k)).sum()) for k in (1, 0, -1)] == [40, 216, 0]
    many = sample(torch.tensor([1] * 400 + [0] * 500), 256, 0.5)
    assert [int(many[:400].sum()), int(many[400:].sum())] == [128, 128]
    assert not torch.equal(chosen, sample(label, 256, 0.5))
    evidence.property(
        "a mini-batch of 256 anchors: at most half of them positive, filled up with negatives",
        "小批量为 256 个锚框：正样本至多一半，其余用负样本补齐",
    )


def test_loss_is_eq_1(evidence):
    """N_cls the sampled anchors, N_reg the places, lambda 10, smooth L1 by the letter."""
    config = replace(VARIANTS["test"], pyramid=0, sizes=(8, 16, 32), per_position=True, beta=1.0)
    torch.manual_seed(0)
    n = 9 * 16  # nine anchors at sixteen places
    output = {
        "objectness": torch.randn(1, n), "t": 2 * torch.randn(1, n, 4), "anchor_label": torch.randint(-1, 2, (1, n)), "t_star": torch.randn(1, n, 4),
        "logits": torch.randn(6, 4), "region_t": torch.randn(6, 4), "region_label": torch.tensor([0, 1, 2, 0, 3, 0]), "region_t_star": torch.randn(6, 4),
    }  # fmt: skip
    terms = multi_task_loss(config)(output, {})
    smooth = lambda x: torch.where(x.abs() < 1, 0.5 * x**2, x.abs() - 0.5)  # noqa: E731
    p, label = torch.sigmoid(output["objectness"][0]), output["anchor_label"][0]
    cls = [-torch.log(p[i] if label[i] else 1 - p[i]) for i in range(n) if label[i] >= 0]
    reg = sum(smooth(output["t"][0, i] - output["t_star"][0, i]).sum() for i in range(n) if label[i] == 1)
    torch.testing.assert_close(terms["rpn_cls"], sum(cls) / len(cls))
    torch.testing.assert_close(terms["rpn_reg"], 10 * reg / 16)
    head = smooth(output["region_t"] - output["region_t_star"])[output["region_label"] > 0].sum() / 6
    torch.testing.assert_close(terms["head_reg"], head)
    torch.testing.assert_close(terms["loss"], sum(v for k, v in terms.items() if k != "loss"))
    evidence.property(
        "the loss is eq. 1 with N_reg the number of places and lambda 10, plus Fast R-CNN's",
        "损失是式 1（N_reg 为位置数，lambda 为 10）加上 Fast R-CNN 的损失",
    )


def test_boxes_do_not_carry_the_heads_gradient(evidence):
    torch.manual_seed(0)
    network = FasterRCNN(3, CLASSES, VARIANTS["test"]).train()
    batch = Detection.plain_batch(network, Detection.plain_spec(classes=CLASSES))
    out = network(batch["image"], batch["boxes"], batch["labels"])
    grads = torch.autograd.grad(out["logits"].sum() + out["region_t"].sum(), list(network.rpn.parameters()), allow_unused=True)
    assert all(g is None for g in grads)
    evidence.property(
        "the head's loss does not reach the RPN through the coordinates of the regions",
        "检测头的损失不会经由区域坐标传回 RPN",
    )


def test_head_sees_few_backgrounds_that_overlap_little():
    torch.manual_seed(0)
    network = FasterRCNN(3, CLASSES, replace(VARIANTS["test"], background=0.1, regions=64)).train()
    boxes = torch.tensor([[[0.0, 0, 16, 16]]])
    far, near = torch.tensor([40.0, 40, 60, 60]), torch.tensor([0.0, 0, 32, 16])
    proposals = torch.stack([far, near])[None]
    features = network._features(torch.randn(1, 3, 64, 64))
    targets = network._head_targets(features, proposals, torch.ones(1, 2, dtype=torch.bool), [(boxes[0], torch.tensor([1]))], 64)
    assert sorted(targets["region_label"].tolist()) == [2, 2]  # the near one (overlap 0.5) and the true box; the far one is not shown
    network.config = replace(network.config, background=0.0)
    targets = network._head_targets(features, proposals, torch.ones(1, 2, dtype=torch.bool), [(boxes[0], torch.tensor([1]))], 64)
    assert sorted(targets["region_label"].tolist()) == [0, 2, 2]


def test_regions_are_pooled_from_the_level_of_their_size():
    """FPN, eq. 1: k = floor(4 + log2(sqrt(wh) / 224)); maps that hold their own number show where a region was pooled."""
    features = [torch.full((1, 1, 64 // 2**i, 64 // 2**i), float(i + 2)) for i in range(4)]  # P2 to P5 of 256 pixels
    sides = torch.tensor([20.0, 111, 112, 223, 224, 250])
    regions = torch.stack([torch.zeros(6), torch.zeros(6), torch.zeros(6), sides, sides], 1)
    pooled = RegionPooling(True, 2, 224)(features, regions, 256)
    assert pooled.mean((1, 2, 3)).round().tolist() == [2, 2, 3, 3, 4, 4]


def test_region_pooling_is_the_maximum_of_each_bin():
    feature = torch.arange(14.0 * 14).view(1, 1, 14, 14)
    pooled = RegionPooling(False, 2, 224)([feature], torch.tensor([[0.0, 0, 0, 13 * 16, 13 * 16]]), 14 * 16)
    expected = F.max_pool2d(feature, 2)
    assert torch.equal(pooled, expected)


def test_vgg16_is_the_papers():
    """Stride 16, nine anchors at each place, fc6 over 7x7 of 512 features (on the meta device, which holds no numbers)."""
    with torch.device("meta"):
        network = FasterRCNN(3, 20, VARIANTS["vgg16"])
        features = network._features(torch.empty(1, 3, 600, 600))
        assert [tuple(f.shape) for f in features] == [(1, 512, 37, 37)]
        objectness, t = network.rpn(features)
    assert objectness[0].shape == (1, 37 * 37 * 9) and t[0].shape == (1, 37 * 37 * 9, 4)
    assert network.head.fc6.in_features == 512 * 49
    assert isinstance(network.head, Head)


def test_images_without_objects():
    torch.manual_seed(0)
    network = FasterRCNN(3, CLASSES, VARIANTS["test"]).train()
    out = network(torch.randn(2, 3, 64, 64), torch.zeros(2, 1, 4), torch.full((2, 1), -1))
    terms = multi_task_loss(network.config)(out, {})
    assert torch.isfinite(terms["loss"]) and terms["rpn_reg"] == 0 and terms["head_reg"] == 0
    assert (out["region_label"] == 0).all() and not (out["anchor_label"] == 1).any()


def test_windows_are_even_and_as_many_as_there_is_room_for():
    shapes = anchor_shapes((24, 48, 96, 192), (0.5, 1, 2))
    windows = sliding_windows(256, shapes, 100)
    assert 60 < len(windows) <= 100
    assert windows.min() >= 0 and windows.max() <= 256
    sizes = {tuple(s) for s in (windows[:, 2:] - windows[:, :2]).round().tolist()}
    assert len(sizes) == sum(max(s) <= 256 for s in (shapes[:, 2:] - shapes[:, :2]).tolist())
    network = FasterRCNN(3, 2, replace(VARIANTS["test"], proposals="windows"))
    assert not hasattr(network, "rpn")
    batch = Detection.plain_batch(network, Detection.plain_spec(classes=2))
    out = network.train()(batch["image"], batch["boxes"], batch["labels"])
    assert set(multi_task_loss(network.config)(out, {})) == {"loss", "head_cls", "head_reg"}


def test_targets_of_the_head_are_relative_to_the_region():
    torch.manual_seed(0)
    network = FasterRCNN(3, CLASSES, VARIANTS["test"]).train()
    truth = torch.tensor([[8.0, 8, 40, 40]])
    proposal = torch.tensor([[10.0, 6, 44, 38]])
    features = network._features(torch.randn(1, 3, 64, 64))
    targets = network._head_targets(features, proposal[None], torch.ones(1, 1, dtype=torch.bool), [(truth, torch.tensor([2]))], 64)
    at = targets["region_label"] == 3
    expected = encode(truth.expand(2, 4), torch.cat([proposal, truth]), (10.0, 10.0, 5.0, 5.0))
    torch.testing.assert_close(targets["region_t_star"][at], expected)
    assert BACKGROUND == -1
