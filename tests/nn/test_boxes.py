"""Parts of detectors against torchvision and by brute force."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_iou

from paperworks.nn.boxes import BACKGROUND, BETWEEN, Detect, Selection, decode, encode, grid_boxes, match, rows, suppress
from paperworks.nn.fpn import FeaturePyramid
from paperworks.nn.vgg import VGG


def some_boxes(*shape: int, side: float = 100, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * side * 0.7
    return torch.cat([corner, corner + 2 + torch.rand(*shape, 2, generator=generator) * side * 0.3], -1)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coding_is_torchvisions_and_turns_back(weights):
    boxes, anchors = some_boxes(50), some_boxes(50, seed=1)
    t = encode(boxes, anchors, weights)
    torch.testing.assert_close(t, BoxCoder(weights).encode_single(boxes, anchors))
    torch.testing.assert_close(decode(t, anchors, weights), boxes, atol=1e-3, rtol=1e-4)
    wild = 5 * torch.randn(50, 4)
    torch.testing.assert_close(decode(wild, anchors, weights), BoxCoder(weights).decode_single(wild, anchors))


def test_coding_by_hand():
    anchor, box = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[5.0, 0.0, 25.0, 20.0]])
    torch.testing.assert_close(encode(box, anchor), torch.tensor([[1.0, 0.0, 0.69314718, 0.0]]))


def test_matching_is_torchvisions():
    iou = box_iou(some_boxes(7), some_boxes(300, seed=1))
    expected = Matcher(0.5, 0.3, allow_low_quality_matches=False)(iou)
    found = match(iou, 0.5, 0.3)
    assert torch.equal(found, expected)
    assert {BACKGROUND, BETWEEN} < set(found.tolist())
    assert (match(iou[:0], 0.5, 0.3) == BACKGROUND).all()


def test_suppression_is_torchvisions_and_has_one_size():
    boxes, groups = some_boxes(400, side=60), torch.arange(400) % 3
    scores = torch.rand(400, generator=torch.Generator().manual_seed(2))
    kept = suppress(boxes, scores, groups, 0.5)
    assert kept.shape == (400,)
    assert set(kept.nonzero().squeeze(1).tolist()) == set(batched_nms(boxes, scores, groups, 0.5).tolist())
    assert 0 < kept.sum() < 400


def test_detections_by_brute_force():
    boxes, scores = some_boxes(2, 60, 1, side=40), torch.rand(2, 60, 2, generator=torch.Generator().manual_seed(3))
    found = Detect(Selection(score=0.3, iou=0.4, candidates=60, keep=120))(boxes, scores)
    for b, s, k, image_boxes, image_scores in zip(*found, boxes[:, :, 0], scores):
        left = [(float(image_scores[n, c]), n, c) for n in range(60) for c in range(2) if image_scores[n, c] > 0.3]
        expected = []
        for score, n, c in sorted(left, reverse=True):
            if all(c != other or box_iou(image_boxes[n][None], image_boxes[m][None]) <= 0.4 for _, m, other in expected):
                expected.append((score, n, c))
        expected = expected[:120]
        assert 25 < len(expected) < 120
        real = s > 0
        assert [(round(float(x), 5), int(c)) for x, c in zip(s[real], k[real])] == [(round(x, 5), c) for x, _, c in expected]
        torch.testing.assert_close(b[real], image_boxes[[n for _, n, _ in expected]])
        assert (k[~real] == -1).all()
        assert (b[~real] == 0).all()


def test_boxes_of_classes_are_their_own():
    boxes, scores = some_boxes(1, 30, 3), torch.rand(1, 30, 3)
    b, s, k = Detect(Selection(score=0.0, iou=1.0, candidates=30, keep=90))(boxes, scores)
    for box, score, label in zip(b[0], s[0], k[0]):
        n = int((scores[0, :, label] == score).nonzero())
        assert torch.equal(box, boxes[0, n, label])


def test_rows_follow_the_grid():
    """A convolution's output at a place and the boxes of that place have the same row."""
    shapes = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [-2.0, -1.0, 2.0, 1.0]])
    grid = grid_boxes(shapes, (3, 5), (8, 4), 0.5)
    maps = torch.zeros(1, 2 * 2, 3, 5)
    maps[0, 2, 1, 3] = 1.0  # first value of the second box at row 1, column 3
    row = int(rows(maps, 2)[0, :, 0].argmax())
    assert row == (1 * 5 + 3) * 2 + 1
    torch.testing.assert_close(grid[row], torch.tensor([14.0, 12, 14, 12]) + shapes[1])


@pytest.mark.parametrize("extra", [True, False])
def test_pyramid_is_torchvisions(extra):
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    torch.manual_seed(0)
    ours, peer = FeaturePyramid((4, 6, 8), 5, extra=extra), FeaturePyramidNetwork([4, 6, 8], 5, LastLevelMaxPool() if extra else None)
    for i in range(3):
        ours.lateral[i].load_state_dict(peer.inner_blocks[i][0].state_dict())
        ours.smooth[i].load_state_dict(peer.layer_blocks[i][0].state_dict())
    features = [torch.randn(2, w, s, s) for w, s in ((4, 20), (6, 10), (8, 5))]
    expected = peer({str(i): f for i, f in enumerate(features)})
    for a, b in zip(ours(features), expected.values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("round_up", "sides"), [(True, (75, 38, 19)), (False, (75, 37, 18))])
def test_vgg_is_torchvisions(round_up, sides):
    from torchvision.models import vgg16

    with torch.device("meta"):
        count = sum(p.numel() for p in vgg16().features.parameters())
        ours = VGG(round_up=round_up)
        assert sum(p.numel() for p in ours.parameters()) == count == 14_714_688
        assert tuple(f.shape[-1] for f in ours.pyramid(torch.empty(1, 3, 300, 300))[2:]) == sides
