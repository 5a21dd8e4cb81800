"""Scores against brute force, torchmetrics, scikit-like definitions and MONAI; and what is empty, absent or ignored."""

import math
import warnings

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score, multiclass_jaccard_index

from paperworks.tasks.metrics import SegmentationScores, boundary_counts, components, hd95, object_counts

CLASSES = ("background", "cell", "wall")


def random_maps(seed: int, size=(24, 30), ignored: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (2, 6, 6), generator=g)
    predicted, mask = torch.nn.functional.interpolate(coarse[None].float(), size, mode="nearest")[0].long()
    mask = torch.where(torch.rand(size, generator=g) < ignored, 255, mask)
    return predicted, mask


@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_regions_agree_with_torchmetrics(ignored):
    scores = SegmentationScores(CLASSES)
    pairs = [random_maps(seed, ignored=ignored) for seed in range(4)]
    for i, (predicted, mask) in enumerate(pairs):
        scores.update(predicted, mask, name=str(i))
    predicted, mask = torch.cat([p for p, _ in pairs]), torch.cat([m for _, m in pairs])
    found = scores.compute()
    options = {"num_classes": 3, "ignore_index": 255, "average": "none"}
    dice, iou = multiclass_f1_score(predicted, mask, **options), multiclass_jaccard_index(predicted, mask, **options)
    for c, name in enumerate(CLASSES):
        assert math.isclose(found[f"dice/{name}"], dice[c], rel_tol=1e-5) and math.isclose(found[f"iou/{name}"], iou[c], rel_tol=1e-5)
    assert math.isclose(found["dice"], dice[1:].mean(), rel_tol=1e-5) and math.isclose(found["iou"], iou[1:].mean(), rel_tol=1e-5)
    right = multiclass_accuracy(predicted, mask, num_classes=3, ignore_index=255, average="micro")
    assert math.isclose(found["accuracy"], right, rel_tol=1e-5)
    one = SegmentationScores(CLASSES)
    one.update(*pairs[2])
    per_image = scores.per_image()
    assert [image["name"] for image in per_image] == ["0", "1", "2", "3"]
    assert per_image[2] == {"name": "2", **one.compute()}


def test_probabilities_are_taken_at_their_largest():
    predicted, mask = random_maps(1)
    a, b = SegmentationScores(CLASSES), SegmentationScores(CLASSES)
    a.update(predicted, mask)
    b.update(torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1) * 0.6 + 0.1, mask)
    assert a.compute() == b.compute()


def test_background_is_left_out_of_means_unless_there_is_none():
    predicted, mask = random_maps(3)
    scores = SegmentationScores(CLASSES, background=None)
    scores.update(predicted, mask)
    found = scores.compute()
    assert math.isclose(found["dice"], np.mean([found[f"dice/{c}"] for c in CLASSES]))


def test_ignored_pixels_count_nowhere():
    """Whatever is predicted where the mask says 255, every score is the same."""
    predicted, mask = random_maps(5)
    instances = torch.from_numpy(components(mask.numpy(), 3))  # there are some where the mask will say nothing
    mask[:, 14:] = 255
    found = []
    for fill in (0, 1, 2):
        guess = predicted.clone()
        guess[:, 14:] = fill
        scores = SegmentationScores(CLASSES, instances=True)
        scores.update(guess, mask, instances)
        found.append(scores.compute())
    known = SegmentationScores(CLASSES, instances=True)
    known.update(predicted[:, :14], mask[:, :14], instances[:, :14])
    found.append(known.compute())
    for other in found[1:]:
        assert other == pytest.approx(found[0], nan_ok=True)


def test_a_class_that_is_nowhere_is_left_out():
    mask = torch.zeros(20, 20, dtype=torch.long)
    mask[5:15, 5:15] = 1
    scores = SegmentationScores(CLASSES)
    scores.update(mask, mask)
    found = scores.compute()
    assert math.isnan(found["dice/wall"]) and math.isnan(found["boundary_f/wall"])
    assert found["dice"] == found["iou"] == found["boundary_f"] == found["accuracy"] == 1


def test_empty_prediction_and_empty_truth():
    full, empty = torch.zeros(20, 20, dtype=torch.long), torch.zeros(20, 20, dtype=torch.long)
    full[5:15, 5:15] = 1
    for predicted, mask in ((empty, full), (full, empty)):
        scores = SegmentationScores(CLASSES[:2], instances=True)
        scores.update(predicted, mask, mask)
        found = scores.compute()
        assert found["dice"] == found["iou"] == found["boundary_f"] == found["object_f1"] == 0
    scores = SegmentationScores(CLASSES[:2], instances=True)
    scores.update(empty, empty, empty)
    found = scores.compute()
    assert all(math.isnan(found[key]) for key in ("dice", "iou", "boundary_f", "object_f1")) and found["accuracy"] == 1
    scores.update(full, full, full)  # an empty image spoils nothing
    assert scores.compute()["dice"] == scores.compute()["object_f1"] == 1


def brute_boundary(region: np.ndarray, valid: np.ndarray) -> list[tuple[int, int]]:
    h, w = region.shape
    out = []
    for y in range(h):
        for x in range(w):
            if region[y, x] and valid[y, x]:
                near = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)) if 0 <= y + dy < h and 0 <= x + dx < w]
                if any(valid[n] and not region[n] for n in near):
                    out.append((y, x))
    return out


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 2.9])
def test_boundary_counts_against_brute_force(tolerance):
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = (np.kron(rng.random((5, 5)) < 0.5, np.ones((4, 5))).astype(bool) for _ in range(2))
        valid = rng.random(a.shape) < 0.9
        ours, theirs = brute_boundary(a, valid), brute_boundary(b, valid)

        def near(these, those):
            return sum(any((y - v) ** 2 + (x - u) ** 2 <= tolerance**2 for v, u in those) for y, x in these)

        assert boundary_counts(a, b, valid, tolerance) == (near(ours, theirs), len(ours), near(theirs, ours), len(theirs))


def test_boundary_score_of_a_shift():
    mask = torch.zeros(60, 60, dtype=torch.long)
    mask[20:40, 20:40] = 1
    for shift, expected in ((0, 1.0), (2, 1.0), (5, None)):
        scores = SegmentationScores(CLASSES[:2], boundary=2.0)
        scores.update(torch.roll(mask, shift, 1), mask)
        found = scores.compute()["boundary_f"]
        assert found == expected if expected is not None else found < 0.6


def test_boundary_f_is_the_harmonic_mean_of_pooled_precision_and_recall():
    scores = SegmentationScores(CLASSES[:2], boundary=1.0)
    counts = np.zeros(4)
    for seed in range(3):
        predicted, mask = (m.clamp(max=1) for m in random_maps(seed))
        scores.update(predicted, mask)
        counts += boundary_counts(predicted.numpy() == 1, mask.numpy() == 1, np.ones(mask.shape, bool), 1.0)
    p, r = counts[0] / counts[1], counts[2] / counts[3]
    assert math.isclose(scores.compute()["boundary_f"], 2 * p * r / (p + r))


def brute_objects(predicted: np.ndarray, true: np.ndarray, iou: float) -> list[int]:
    ps = [predicted == i for i in np.unique(predicted) if i]
    ts = [true == i for i in np.unique(true) if i]
    matches = sum(any((p & t).sum() > iou * (p | t).sum() for t in ts) for p in ps)
    merges = sum(max(0, sum((p & t).sum() > t.sum() / 2 for t in ts) - 1) for p in ps)
    splits = sum(max(0, sum((p & t).sum() > p.sum() / 2 for p in ps) - 1) for t in ts)
    return [matches, len(ps), len(ts), merges, splits]


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_object_counts_against_brute_force(iou):
    rng = np.random.default_rng(1)
    total = np.zeros(5)
    for _ in range(30):
        base = np.kron(rng.integers(0, 5, (3, 3)), np.ones((6, 6))).astype(int) * 7
        other = np.where(rng.random(base.shape) < 0.15, rng.integers(0, 5, base.shape), base) * 3
        other[other == 21 * rng.integers(1, 5)] = 84  # some objects become one
        found = object_counts(other, base, iou)
        assert found.tolist() == brute_objects(other, base, iou)
        total += found
    assert (total > 0).all()  # every kind of event was met


def test_merges_and_splits():
    true = np.zeros((20, 40), int)
    true[5:15, 2:12], true[5:15, 14:24], true[5:15, 26:36] = 1, 2, 3
    one = np.zeros_like(true)
    one[5:15, 2:36] = 1  # all three in one
    assert object_counts(one, true).tolist() == [0, 1, 3, 2, 0]
    assert object_counts(true, one).tolist() == [0, 3, 1, 0, 2]
    assert object_counts(true, true).tolist() == [3, 3, 3, 0, 0]
    half = np.where(np.arange(40) < 19, true, 0)  # the second object exactly halved: no match at more than a half
    assert object_counts(half, true).tolist() == [1, 2, 3, 0, 0]
    halves = np.zeros_like(true)
    halves[5:15, 7:19] = 1  # the right half of one object and the left half of the next: more than half of none
    assert object_counts(halves, true).tolist() == [0, 1, 3, 0, 0]
    with pytest.raises(ValueError, match="ambiguous"):
        object_counts(true, true, iou=0.3)


def test_objects_are_components_of_each_class():
    predicted = torch.zeros(10, 12, dtype=torch.long)
    predicted[2:8, 2:5], predicted[2:8, 5:8] = 1, 2  # two classes that touch
    predicted[8, 8] = 2  # touches at a corner only
    labels = components(predicted.numpy(), 3)
    assert labels.max() == 3 and len({labels[3, 3], labels[3, 6], labels[8, 8]}) == 3 and (labels[predicted == 0] == 0).all()
    instances = torch.zeros(10, 12, dtype=torch.int32)
    instances[2:8, 2:5], instances[2:8, 5:8] = 500, 9
    scores = SegmentationScores(CLASSES, instances=True)
    scores.update(predicted, predicted, instances)
    found = scores.compute()
    assert found["object_precision"] == 2 / 3 and found["object_recall"] == 1 and math.isclose(found["object_f1"], 0.8)
    with pytest.raises(ValueError, match=r"a\.png.*instances"):
        scores.update(predicted, predicted, None, "a.png")


@pytest.mark.parametrize("spacing", [None, (0.5, 2.0), (3.0, 1.0, 1.0)])
def test_hd95_agrees_with_monai(spacing):
    monai = pytest.importorskip("monai.metrics")
    ndim = len(spacing or (1, 1))
    rng = np.random.default_rng(2)
    for _ in range(4):
        a, b = (np.kron(rng.random((4,) * ndim) < 0.4, np.ones((5,) * ndim)).astype(bool) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = monai.compute_hausdorff_distance(
                torch.from_numpy(a)[None, None].float(),
                torch.from_numpy(b)[None, None].float(),
                include_background=True,
                percentile=95,
                spacing=spacing,
            ).item()
        assert math.isclose(hd95(a, b, spacing), expected, rel_tol=1e-5)


def test_hd95_of_nothing():
    some, none = np.eye(5, dtype=bool), np.zeros((5, 5), bool)
    assert hd95(some, some) == 0 and math.isinf(hd95(some, none)) and math.isinf(hd95(none, some)) and math.isnan(hd95(none, none))


def test_volumes_agree_with_monai():
    monai = pytest.importorskip("monai.metrics")
    spacing = (3.0, 1.0, 0.5)
    scores = SegmentationScores(CLASSES)
    pairs = [blocks(seed) for seed in range(3)]
    for i, (predicted, mask) in enumerate(pairs):
        scores.update(predicted, mask, name=str(i), spacing=spacing)
    apart = []
    for (predicted, mask), found in zip(pairs, scores.per_image(), strict=True):
        one_hot = [torch.nn.functional.one_hot(m, 3).movedim(-1, 0)[None].float() for m in (predicted, mask)]
        dice = monai.compute_dice(*one_hot, include_background=False)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distance = monai.compute_hausdorff_distance(*one_hot, include_background=False, percentile=95, spacing=spacing)[0]
        assert math.isclose(found["dice"], dice.mean(), rel_tol=1e-5) and math.isclose(found["hd95"], distance.mean(), rel_tol=1e-5)
        assert math.isclose(found["hd95/wall"], distance[1], rel_tol=1e-5) and math.isnan(found["hd95/background"])
        apart.append(distance)
    found = scores.compute()
    assert math.isclose(found["hd95/cell"], torch.stack(apart)[:, 0].mean(), rel_tol=1e-5)
    assert math.isclose(found["hd95"], torch.stack(apart).mean(), rel_tol=1e-5)


def blocks(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps of volumes that differ, of three classes in blocks of five voxels."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 3, (3, 4, 5), generator=g)
    second = torch.where(torch.rand(first.shape, generator=g) < 0.3, torch.randint(0, 3, first.shape, generator=g), first)
    large = [m.repeat_interleave(5, 0).repeat_interleave(5, 1).repeat_interleave(5, 2) for m in (first, second)]
    return large[0], large[1]


def test_a_class_that_is_missed_in_a_volume_counts_with_the_diagonal():
    predicted, mask = torch.zeros(2, 6, 8, 10, dtype=torch.long)
    mask[2:4, 2:4, 2:4] = 1
    scores = SegmentationScores(CLASSES)
    scores.update(predicted, mask, spacing=(2.0, 1.0, 1.0))
    found = scores.compute()
    assert found["hd95/cell"] == found["hd95"] == math.sqrt(12**2 + 8**2 + 10**2) and math.isnan(found["hd95/wall"])
    mask[2:4, 2:4, 2:4] = 255  # where nothing is known, nothing is missed
    scores = SegmentationScores(CLASSES)
    scores.update(predicted, mask)
    assert math.isnan(scores.compute()["hd95"])


def test_images_have_no_distances():
    scores = SegmentationScores(CLASSES)
    scores.update(*random_maps(0))
    assert not any(key.startswith("hd95") for key in scores.compute())
