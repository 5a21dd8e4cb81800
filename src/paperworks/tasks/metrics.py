"""How good a segmentation is: regions, boundaries and objects.

All scores of a data set are computed from counts that are summed over its images, and those of one image by the same formulas from
its own counts. A score whose denominator is zero (a class that neither the truth nor the prediction has) is nan and left out of
means; a mean of nothing is nan. Ignored pixels count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray
from scipy import ndimage
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


class SegmentationScores:
    """Scores of a data set and of each of its images.

    ``compute`` and ``per_image`` give, flat:

    - ``dice``, ``iou``, ``boundary_f``: means over the classes but the background; and each with ``/<class>`` for every class;
    - ``accuracy``: share of right pixels;
    - of volumes ``hd95`` (and with ``/<class>``): the mean over the volumes of :func:`hd95`, in millimetres where the spacing is known.
      A class that only one of truth and prediction has counts with the volume's diagonal, the largest distance there can be in it;
    - with ``instances``: ``object_f1``, ``object_precision``, ``object_recall``, ``merges``, ``splits`` of :func:`object_counts`,
      where predicted objects are the connected components of each class but the background.
    """

    def __init__(
        self, classes: Sequence[str], ignore: int = 255, boundary: float = 2.0, instances: bool = False, background: int | None = 0
    ) -> None:
        """Args:
        classes: names, in the order of the class indices.
        ignore: value of the mask where nothing is known.
        boundary: tolerance of the boundary score in pixels.
        instances: score objects too.
        background: class that the means leave out; None for data without one.
        """
        self.classes, self.ignore, self.boundary, self.instances, self.background = tuple(classes), ignore, boundary, instances, background
        self._names: list[str] = []
        self._counts: list[dict[str, ndarray]] = []

    def update(
        self,
        prediction: Float[Tensor, "K *S"] | Integer[Tensor, "*S"],
        mask: Integer[Tensor, "*S"],
        instances: Integer[Tensor, "*S"] | None = None,
        name: str = "",
        spacing: Sequence[float] | None = None,
    ) -> None:
        """Count one image (H W) or volume (D H W).

        Args:
            prediction: probabilities (or logits), or class indices.
            mask: true class indices.
            instances: true objects, 0 is background; needed if objects are scored.
            name: given back by ``per_image``.
            spacing: millimetres from voxel to voxel along each axis of a volume; default: 1.
        """
        predicted = prediction.argmax(0) if prediction.ndim > mask.ndim else prediction
        predicted, mask = predicted.cpu().long(), mask.cpu().long()
        n = len(self.classes)
        confusion = multiclass_confusion_matrix(predicted[None], mask[None], n, ignore_index=self.ignore).numpy()
        valid = (mask != self.ignore).numpy()
        guess, truth = predicted.numpy(), mask.numpy()
        counts = {
            "confusion": confusion.astype(np.float64),
            "boundary": np.array([boundary_counts(guess == c, truth == c, valid, self.boundary) for c in range(n)], np.float64),
        }
        if mask.ndim == 3:
            diagonal = float(np.linalg.norm(np.multiply(mask.shape, spacing or 1.0)))
            distances = np.array(
                [np.nan if c == self.background else hd95((guess == c) & valid, (truth == c) & valid, spacing) for c in range(n)]
            )
            counts["distances"] = np.array([np.nan_to_num(distances, nan=0.0, posinf=diagonal), ~np.isnan(distances)], np.float64)
        if self.instances:
            if instances is None:
                raise ValueError(f"{name}: objects are to be scored, but there is no map of instances")
            objects = components(np.where(valid, guess, -1), n, self.background)  # nor do ignored pixels join objects
            counts["objects"] = object_counts(objects, instances.cpu().numpy() * valid)
        self._names.append(name)
        self._counts.append(counts)

    def compute(self) -> dict[str, float]:
        """Scores over all images so far."""
        return self._scores({key: np.sum([c[key] for c in self._counts], axis=0) for key in self._counts[0]})

    def per_image(self) -> list[dict[str, float | str]]:
        """Scores of each image, with its ``name``, in the order of the updates."""
        return [{"name": name, **self._scores(counts)} for name, counts in zip(self._names, self._counts)]

    def _scores(self, counts: dict[str, ndarray]) -> dict[str, float]:
        confusion = counts["confusion"]  # true x predicted
        right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        found, ours, met, theirs = counts["boundary"].T
        precision, recall = _ratio(found, ours, 0.0), _ratio(met, theirs, 0.0)
        by_class = {
            "dice": _ratio(2 * right, true + predicted),
            "iou": _ratio(right, true + predicted - right),
            "boundary_f": np.where(ours + theirs > 0, _ratio(2 * precision * recall, precision + recall, 0.0), np.nan),
        }
        if "distances" in counts:
            by_class["hd95"] = _ratio(*counts["distances"])
        foreground = [c for c in range(len(self.classes)) if c != self.background]
        scores = {key: _mean(values[foreground]) for key, values in by_class.items()}
        scores["accuracy"] = float(_ratio(right.sum(), confusion.sum()))
        if "objects" in counts:
            both, predicted, true, merges, splits = counts["objects"]
            scores["object_f1"] = float(_ratio(2 * both, predicted + true))
            scores["object_precision"] = float(_ratio(both, predicted))
            scores["object_recall"] = float(_ratio(both, true))
            scores["merges"], scores["splits"] = float(merges), float(splits)
        for key, values in by_class.items():
            scores.update({f"{key}/{name}": float(v) for name, v in zip(self.classes, values)})
        return scores


def boundary_counts(
    predicted: Bool[ndarray, "*size"], true: Bool[ndarray, "*size"], valid: Bool[ndarray, "*size"], tolerance: float = 2.0
) -> tuple[int, int, int, int]:
    """Boundary pixels of a region: (predicted ones near a true one, predicted ones, true ones near a predicted one, true ones).

    They give the boundary F-measure of Csurka et al., *What is a good evaluation measure for semantic segmentation?* (2013): the
    first pair its precision, the second its recall. A boundary pixel is a valid pixel of the region with a valid edge neighbour
    outside it; the border of the image is none. Near is no farther than ``tolerance`` pixels (Euclidean).
    """
    where = _around(predicted | true, 1)  # a boundary pixel of one lies in the other's box or in its own
    predicted, true, valid = predicted[where], true[where], valid[where]
    ours, theirs = _boundary(predicted, valid), _boundary(true, valid)
    found, met = ours & _near(theirs, tolerance), theirs & _near(ours, tolerance)
    return int(found.sum()), int(ours.sum()), int(met.sum()), int(theirs.sum())


def _around(region: ndarray, margin: int = 0) -> tuple[slice, ...]:
    """The box that holds a region and ``margin`` pixels about it; empty if the region is."""
    axes = range(region.ndim)
    held = [np.flatnonzero(region.any(tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(max(int(i[0]) - margin, 0), int(i[-1]) + 1 + margin) if len(i) else slice(0) for i in held)


def _near(boundary: ndarray, tolerance: float) -> ndarray:
    """What is no farther from the boundary than the tolerance; nine times as fast as by a distance transform at two pixels."""
    reach = int(tolerance)
    squares = sum(np.square(axis) for axis in np.indices((2 * reach + 1,) * boundary.ndim) - reach)
    return np.asarray(ndimage.binary_dilation(boundary, squares <= tolerance**2), bool)


def _boundary(region: ndarray, valid: ndarray) -> ndarray:
    return region & valid & np.asarray(ndimage.binary_dilation(valid & ~region), bool)


def _distance(surface: ndarray, spacing: Sequence[float] | None = None) -> ndarray:
    """Of each pixel to the nearest one of the surface."""
    return np.asarray(ndimage.distance_transform_edt(~surface, sampling=spacing))


def components(classes: Integer[ndarray, "*size"], n: int, background: int | None = 0) -> Integer[ndarray, "*size"]:
    """Number the connected components (over edges, not corners) of each class from 1; 0 is background."""
    out = np.zeros(classes.shape, np.int64)
    total = 0
    for c in range(n):
        if c != background:
            labels = np.empty(classes.shape, np.int32)
            found = int(ndimage.label(classes == c, output=labels))  # pyright: ignore[reportArgumentType]
            out[labels > 0] = labels[labels > 0] + total
            total += found
    return out


def object_counts(predicted: Integer[ndarray, "*size"], true: Integer[ndarray, "*size"], iou: float = 0.5) -> Float[ndarray, " counts"]:
    """Compare two maps of objects (0 is background): (matches, predicted objects, true objects, merges, splits).

    Two objects match if the intersection over union is more than ``iou`` >= 0.5, which no object can share with two others.
    A predicted object that covers more than half of each of m true ones makes m - 1 merges; a true object that covers more than
    half of each of m predicted ones makes m - 1 splits.
    """
    if iou < 0.5:
        raise ValueError(f"below an overlap of 0.5 a match is ambiguous; iou is {iou}")
    _, p = np.unique(np.append(predicted.ravel(), 0), return_inverse=True)  # 0 is there, and becomes 0
    _, t = np.unique(np.append(true.ravel(), 0), return_inverse=True)
    p, t = p[:-1], t[:-1]
    n_p, n_t = int(p.max(initial=0)), int(t.max(initial=0))
    area_p, area_t = np.bincount(p, minlength=n_p + 1), np.bincount(t, minlength=n_t + 1)
    pairs, shared = np.unique(p[(p > 0) & (t > 0)] * (n_t + 1) + t[(p > 0) & (t > 0)], return_counts=True)
    i, j = pairs // (n_t + 1), pairs % (n_t + 1)
    matches = (shared > iou * (area_p[i] + area_t[j] - shared)).sum()
    merged = np.bincount(i[2 * shared > area_t[j]], minlength=n_p + 1)
    split = np.bincount(j[2 * shared > area_p[i]], minlength=n_t + 1)
    merges, splits = np.maximum(merged - 1, 0).sum(), np.maximum(split - 1, 0).sum()
    return np.array([matches, (area_p[1:] > 0).sum(), (area_t[1:] > 0).sum(), merges, splits], np.float64)


def hd95(predicted: Bool[ndarray, "*size"], true: Bool[ndarray, "*size"], spacing: Sequence[float] | None = None) -> float:
    """95 % Hausdorff distance between the surfaces of two regions, in units of ``spacing`` (default: pixels).

    The larger of the two directed ones, each the 95th percentile of the distances from the pixels of one surface to the other surface;
    a surface pixel is one of the region with an edge neighbour outside it or outside the image. Infinite if one region is empty,
    nan if both are.
    """
    if not predicted.any() or not true.any():
        return float("nan") if predicted.any() == true.any() else float("inf")
    where = _around(predicted | true)
    ours, theirs = (region[where] & ~np.asarray(ndimage.binary_erosion(region[where]), bool) for region in (predicted, true))
    there, back = _distance(theirs, spacing)[ours], _distance(ours, spacing)[theirs]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _ratio(part: ndarray | np.floating, whole: ndarray | np.floating, empty: float = float("nan")) -> ndarray:
    """Part / whole, and ``empty`` where the whole is zero."""
    return np.divide(part, whole, out=np.full(np.shape(whole), empty), where=np.asarray(whole) > 0)


def _mean(values: ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
