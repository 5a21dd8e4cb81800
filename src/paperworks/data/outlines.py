"""Objects and their outlines: every instance (its largest part), or connected part, of masks is an object with a box and a closed polygon.

Coordinates are (x, y) in pixels from the image's corner: pixel i reaches from i to i + 1 and its centre is i + 0.5, so a box of the
whole image is 0, 0, width, height. Polygons run clockwise as one sees them (y points down) and are not closed by repeating the first point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.path import Path as Curve
from scipy import ndimage

from paperworks.data.folder import Folder, open_folder
from paperworks.data.labels import IGNORE, read_json
from paperworks.data.layouts import Item
from paperworks.data.sheets import cells
from paperworks.errors import InputError

SMALLEST = 25
"""Objects of fewer pixels are left out: their outline is that of the pixels."""
KEPT = 256
"""Label images that are kept in memory."""
IMAGE_FOLDERS = {"images", "image", "imgs", "img"}
BOX_FILES = ("boxes.csv", "boxes.json")
"""Looked for beside an image and in the folder above it."""
EDGES = (("x0", "y0", "x1", "y1"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom"))
"""Names of a box's columns."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


# --- Polygons ----------------------------------------------------------------------------------------------------------------------------


def signed_area(polygon: Float[np.ndarray, "M 2"]) -> float:
    """Shoelace formula; positive where the polygon runs clockwise as one sees it."""
    x, y = polygon.T
    return float(0.5 * np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def largest_part(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The largest connected part of a mask, its holes filled."""
    parts, count = ndimage.label(mask)  # type: ignore[misc]
    if count > 1:
        mask = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    return np.asarray(ndimage.binary_fill_holes(mask))


def outline(mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "M 2"]:
    """The outer outline of a mask's largest part, half-way between the centres of its pixels and those beside it (marching squares).

    Rasterised it gives the part back, to the pixel.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("the mask is empty")
    top, left = int(rows[0]), int(columns[0])
    return traced(largest_part(mask[top : rows[-1] + 1, left : columns[-1] + 1])) + np.array([left, top])


def traced(part: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "M 2"]:
    """``outline`` of a mask that is one part without holes."""
    lines = contourpy.contour_generator(z=np.pad(part, 1).astype(np.float64)).lines(0.5)
    line = max((np.asarray(points)[:-1] for points in lines), key=lambda points: abs(signed_area(points))) - 0.5
    return line if signed_area(line) > 0 else line[::-1].copy()


def resampled(polygon: Float[np.ndarray, "M 2"], count: int) -> Float[np.ndarray, "K 2"]:
    """``count`` points at equal distances along a closed polygon, from its first point on."""
    closed = np.concatenate([polygon, polygon[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    places = np.arange(count) * along[-1] / count
    return np.stack([np.interp(places, along, closed[:, axis]) for axis in (0, 1)], axis=1)


def rasterised(polygon: Float[np.ndarray, "M 2"], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Pixels of an image of this height and width whose centres lie inside a closed polygon (even-odd rule)."""
    mask = np.zeros(size, dtype=bool)
    low = np.clip(np.floor(polygon.min(0)).astype(int), 0, (size[1], size[0]))
    high = np.clip(np.ceil(polygon.max(0)).astype(int), 0, (size[1], size[0]))
    if (high > low).all():
        x, y = np.meshgrid(np.arange(low[0], high[0]) + 0.5, np.arange(low[1], high[1]) + 0.5)
        closed = Curve(np.concatenate([polygon, polygon[:1]]), closed=True)
        mask[low[1] : high[1], low[0] : high[0]] = closed.contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(x.shape)
    return mask


def corners(polygon: Float[np.ndarray, "M 2"], tolerance: float) -> Int[np.ndarray, " V"]:
    """Indices of the points that an annotator would have set: the polygon through them is nowhere farther than ``tolerance`` from this one.

    Douglas and Peucker's simplification, begun at the first point and the one farthest from it.
    """
    far = int(np.linalg.norm(polygon - polygon[0], axis=1).argmax())
    closed = np.concatenate([polygon, polygon[:1]])
    kept, open_ = {0, far}, [(0, far), (far, len(polygon))]
    while open_:
        first, last = open_.pop()
        if last - first < 2:
            continue
        base, chord = closed[first], closed[last] - closed[first]
        away = closed[first + 1 : last] - base
        share = np.clip(away @ chord / max(chord @ chord, 1e-12), 0, 1)
        distance = np.linalg.norm(away - share[:, None] * chord, axis=1)
        if distance.max() > tolerance:
            middle = first + 1 + int(distance.argmax())
            kept.add(middle)
            open_ += [(first, middle), (middle, last)]
    return np.array(sorted(kept))


# --- A data set of objects -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outlined:
    """One object of an image."""

    name: str
    """Its image's name, ``#`` and its number there."""
    image: Item
    number: int
    label: int
    """Index of its class; there is no background among them."""
    box: Box


@dataclass
class Objects:
    """The objects of a folder of images and masks (or of a COCO file with outlines)."""

    folder: Folder
    items: tuple[Outlined, ...] = ()
    left_out: int = 0
    """Objects of fewer than ``SMALLEST`` pixels."""
    _kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, without a background."""
        return self.folder.class_names[1:]

    def split(self, name: str) -> tuple[Outlined, ...]:
        """Objects of the images of ``train``, ``val`` or ``test``."""
        return tuple(i for i in self.items if i.image.split == name)

    def numbers(self, image: Item) -> Int[np.ndarray, "H W"]:
        """The objects of an image, numbered from 1: of every instance the largest connected part, as a closed curve has one inside.

        Where labels do not tell objects apart, the connected parts of each class.
        """
        if image.name not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[image.name] = self._numbered(image)
        return self._kept[image.name]

    def _numbered(self, image: Item) -> np.ndarray:
        told = self.folder.instance_map(image)
        if told is not None:
            return _whole(told)
        mask, total = self.folder.mask(image), 0
        numbers = np.zeros(mask.shape, np.int32)
        for label in range(1, len(self.folder.class_names)):
            parts, count = ndimage.label(mask == label)  # type: ignore[misc]
            numbers[parts > 0] = parts[parts > 0] + total
            total += count
        return numbers

    def region(self, item: Outlined) -> Bool[np.ndarray, "H W"]:
        """The object's pixels."""
        return self.numbers(item.image) == item.number


def _whole(numbers: Int[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """Instances without the parts that do not hang together with their largest one."""
    out = numbers.copy()
    for number, place in enumerate(ndimage.find_objects(numbers), start=1):
        if place is not None:
            parts, count = ndimage.label(numbers[place] == number)  # type: ignore[misc]
            if count > 1:
                out[place][(parts > 0) & (parts != 1 + np.bincount(parts.ravel())[1:].argmax())] = 0
    return out


def open_objects(source: str | Path, *, progress: Callable[[int, int], None] | None = None) -> Objects:
    """Open what ``open_folder`` opens, and list its objects.

    Raises:
        InputError: there are no masks, or volumes, or no object in any of them.
    """
    folder = open_folder(source, progress=progress)
    if folder.task != "segmentation":
        raise InputError(f"{source} has boxes and no outlines; give masks, or polygons in a COCO file")
    if len(folder.fingerprint.median_size) != 2:
        raise InputError(f"{source} holds volumes; outlines are those of objects in images")
    objects, items = Objects(folder), []
    for image in folder.items:
        numbers, mask = objects.numbers(image), folder.mask(image)
        for number, place in enumerate(ndimage.find_objects(numbers), start=1):
            if place is None:
                continue
            inside = numbers[place] == number
            if inside.sum() < SMALLEST:
                objects.left_out += 1
                continue
            y, x = place
            label = int(np.bincount(mask[place][inside & (mask[place] != IGNORE)], minlength=1).argmax())
            box = (float(x.start), float(y.start), float(x.stop), float(y.stop))
            items.append(Outlined(name=f"{image.name}#{number}", image=image, number=number, label=max(label - 1, 0), box=box))
    if not items:
        raise InputError(f"{source}: no object of {SMALLEST} pixels or more in {len(folder.items)} masks; there is nothing to outline")
    objects.items = tuple(items)
    return objects


# --- Boxes that a person gives for a prediction ----------------------------------------------------------------------------------------------


def read_boxes(path: Path) -> dict[str, list[tuple[Box, str]]]:
    """File name -> boxes and what is in them, of a CSV (``file,x0,y0,x1,y1`` and, if you like, ``label``) or a COCO file.

    Raises:
        InputError: it cannot be read, a column is missing, or a box has no extent.
    """
    rows = _csv_boxes(path) if path.suffix.lower() == ".csv" else _coco_boxes(path)
    found: dict[str, list[tuple[Box, str]]] = {}
    for where, file, values, label in rows:
        try:
            x0, y0, x1, y1 = (float(v) for v in values)
        except (TypeError, ValueError):
            raise InputError(f"{path}, {where}: {values} are not four numbers; correct the box") from None
        if not (np.isfinite([x0, y0, x1, y1]).all() and x1 - x0 >= 1 and y1 - y0 >= 1):
            raise InputError(f"{path}, {where}: the box {x0:g},{y0:g},{x1:g},{y1:g} has no extent; give left, top, right, bottom in pixels")
        found.setdefault(file.replace("\\", "/"), []).append(((x0, y0, x1, y1), label or "object"))
    return found


def _csv_boxes(path: Path) -> list[tuple[str, str, list[Any], str]]:
    table = [row for row in cells(path) if row]
    head = [name.lower() for name in table[0]] if table else []
    edges = next((names for names in EDGES if set(names) <= set(head)), None)
    if edges is None or "file" not in head:
        raise InputError(f"{path} needs a first line with the columns file,x0,y0,x1,y1 (and label, if you like); it has {','.join(head)}")
    out = []
    for number, row in enumerate(table[1:], start=2):
        if len(row) != len(head):
            raise InputError(f"{path}, line {number}: {len(row)} cells where the first line has {len(head)}; correct it")
        named = dict(zip(head, row))
        out.append((f"line {number}", named["file"], [named[edge] for edge in edges], named.get("label", "")))
    return out


def _coco_boxes(path: Path) -> list[tuple[str, str, list[Any], str]]:
    content = read_json(path)
    try:
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        names = {c["id"]: str(c["name"]) for c in content.get("categories", [])}
        out = []
        for i, entry in enumerate(content["annotations"]):
            x, y, width, height = entry["bbox"]
            out.append(
                (f"annotation {i}", files[entry["image_id"]], [x, y, x + width, y + height], names.get(entry.get("category_id"), ""))
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not COCO with boxes ({type(error).__name__}: {error}); export it again") from None
    return out


class BoxFinder:
    """Which boxes belong to an image: those of ``boxes.csv`` or ``boxes.json`` beside it, else those of the objects of its data set, where
    it lies in a folder ``images`` beside one of masks, else the whole image.
    """

    def __init__(self, given: dict[Path, list[tuple[Box, str]]] | None = None) -> None:
        self.given = given or {}
        self._files: dict[Path, dict[str, list[tuple[Box, str]]]] = {}
        self._objects: dict[Path, dict[Path, list[tuple[Box, str]]]] = {}

    def __call__(self, image: Path, size: tuple[int, int]) -> list[tuple[Box, str]]:
        """Boxes of an image of this height and width, and what is in them.

        Raises:
            InputError: a file of boxes that is there cannot be read, or a box lies outside the image.
        """
        found = self.given.get(image.resolve()) or self._beside(image) or self._masks(image)
        for box, _ in found or ():
            if box[0] >= size[1] or box[1] >= size[0] or box[2] <= 0 or box[3] <= 0:
                raise InputError(f"{image}: the box {', '.join(f'{v:g}' for v in box)} lies outside its {size[1]} x {size[0]} pixels")
        return found or [((0.0, 0.0, float(size[1]), float(size[0])), "object")]

    def _beside(self, image: Path) -> list[tuple[Box, str]] | None:
        for folder in (image.parent, image.parent.parent):
            for name in BOX_FILES:
                path = folder / name
                if path.is_file():
                    if path not in self._files:
                        self._files[path] = read_boxes(path)
                    for key in (image.relative_to(folder).as_posix(), image.name):
                        if key in self._files[path]:
                            return self._files[path][key]
        return None

    def _masks(self, image: Path) -> list[tuple[Box, str]] | None:
        if image.parent.name.lower() not in IMAGE_FOLDERS:
            return None
        root = image.parent.parent.resolve()
        if root not in self._objects:
            self._objects[root] = {}
            try:
                opened = open_objects(root)
            except InputError:
                return None
            for item in opened.items:
                self._objects[root].setdefault(item.image.images[0].resolve(), []).append((item.box, opened.classes[item.label]))
        return self._objects[root].get(image.resolve())


def named_images(path: Path) -> dict[Path, list[tuple[Box, str]]]:
    """The images that a file of boxes names, which lie beside it or in ``images`` there, with their boxes.

    Raises:
        InputError: the file cannot be read, or an image is not there.
    """
    found = {}
    for name, boxes in read_boxes(path).items():
        image = next((p for p in (path.parent / name, path.parent / "images" / name) if p.is_file()), None)
        if image is None:
            raise InputError(f"{path} names {name!r}, which is not there; put it beside the file or into 'images'")
        found[image] = boxes
    return found
