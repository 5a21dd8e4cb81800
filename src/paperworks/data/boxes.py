"""Images with boxes around objects: COCO files, folders of Pascal VOC's XML files, CSV files; and how they vary in training.

A CSV file has a line for each box: the image's file, its left, top, right and bottom edge in pixels, and the class. The columns may have
other orders and the usual other names (``filename``, ``x1``, ``label`` ...); without a header they are in this order. A line with nothing
but a file is an image without objects.

A box is left, top, right, bottom in pixels from the image's corner, so that a box of the whole image is 0, 0, width, height. VOC counts
pixels from 1 and its last one belongs to the box: 1 is taken from the left and top edges.

One box that cannot be right (no number, no extent, outside its image) leaves its image out: without the box the object would be taught as
background. Boxes that stick out of the image are cut off at its border.
"""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from paperworks.data import coco, splits
from paperworks.data.collection import Collection, Memory
from paperworks.data.fingerprint import (
    Scan,
    cache_key,
    digest,
    load_cache,
    run,
    samples_per_image,
    save_cache,
    scan_image,
    summarise,
)
from paperworks.data.images import IMAGE_SUFFIXES, read_header, read_image
from paperworks.data.labels import read_json, read_settings
from paperworks.data.layouts import SPLITS, Item, Problem, is_hidden
from paperworks.data.packs import source_path
from paperworks.data.sheets import cells
from paperworks.errors import InputError

MEMORY = 1 << 30
"""Bytes of decoded images that a data set keeps."""
COLUMNS = {
    "file": ("file", "filename", "file_name", "image", "image_path", "image_id", "path", "name"),
    "xmin": ("xmin", "x_min", "x1", "left"),
    "ymin": ("ymin", "y_min", "y1", "top"),
    "xmax": ("xmax", "x_max", "x2", "right"),
    "ymax": ("ymax", "y_max", "y2", "bottom"),
    "class": ("class", "label", "category", "class_name", "label_name"),
}
"""Column of a CSV file -> the names that people give it."""


class Object(NamedTuple):
    """A box and what is in it."""

    left: float
    top: float
    right: float
    bottom: float
    label: int
    """Index into the data set's classes."""
    crowd: bool
    """Many objects, or one that is hard to see (VOC's ``difficult``): it is not taught, and finding it is neither right nor wrong."""


@dataclass(frozen=True, kw_only=True)
class BoxItem(Item):
    """An image with its objects."""

    size: tuple[int, int] = (0, 0)
    """Height and width."""
    objects: tuple[Object, ...] = ()


class _Row(NamedTuple):
    """A box as it was written, before anything is checked."""

    where: str
    box: tuple[Any, ...]
    label: str
    crowd: bool


@dataclass
class Written:
    """What annotation files say."""

    layout: str
    files: list[Path]
    classes: list[str] = field(default_factory=list)
    """All there are, where the files list them."""
    images: list[Item] = field(default_factory=list)
    rows: dict[str, list[_Row]] = field(default_factory=lambda: defaultdict(list))
    """Name of the image -> its boxes."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name of the image -> height and width that the file states."""
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Boxes(Collection[BoxItem]):
    """Images with boxes."""

    classes: tuple[str, ...]
    _once: Memory = field(repr=False)

    def image(self, item: BoxItem) -> Float[Tensor, "C H W"]:
        """The image as float32 in [0, 1], with the channels that the whole set has."""
        return self.unit(decoded(item, self._once))

    def describe(self) -> dict[str, Any]:
        """Everything that a person wants to know before training, as plain values for JSON."""
        objects = [len(i.objects) for i in self.items]
        total = max(sum(objects), 1)
        boxes = Counter(o.label for i in self.items for o in i.objects)
        images = Counter(label for i in self.items for label in {o.label for o in i.objects})
        return self.facts(
            task="detection",
            unlabelled=0,
            classes=[
                {"name": n, "share": round(boxes[k] / total, 6), "objects": boxes[k], "images": images[k]}
                for k, n in enumerate(self.classes)
            ],
            objects={"min": min(objects), "median": int(np.median(objects)), "max": max(objects)},
        )


def decoded(item: Item, once: Memory) -> Shaped[np.ndarray, "H W C"]:
    """The item's image in the file's own type and range, read once."""
    return once(item.name, lambda: read_image(item.images[0]))


def open_boxes(source: str | Path, *, progress: Callable[[int, int], None] | None = None, memory: int = MEMORY) -> Boxes:
    """Open images with boxes: a folder, a COCO or CSV file, ``pack:NAME``. Every image is read once, in a few threads.

    Raises:
        InputError: the place does not exist, holds no boxes, or nothing usable is left.
    """
    path = source_path(source)
    root = path if path.is_dir() else path.parent
    written = _written(path, root)
    once = Memory(memory)
    scans = examined(root, written, once, progress)
    problems, items = list(written.problems), []
    classes = written.classes or sorted({row.label for rows in written.rows.values() for row in rows})
    good = [i for i in written.images if isinstance(scans[i.name], Scan)]
    kinds = Counter((cast(Scan, scans[i.name]).dtype) for i in good)
    channels = Counter(cast(Scan, scans[i.name]).channels for i in good)
    wanted = max(channels) if channels and max(channels) <= 4 else channels.most_common(1)[0][0] if channels else 0
    wanted = {2: 1, 4: 3}.get(wanted, wanted) if len(channels) > 1 else wanted
    for item in written.images:
        scan = scans[item.name]
        try:
            if isinstance(scan, InputError):
                raise scan
            if scan.dtype != kinds.most_common(1)[0][0]:
                raise InputError(f"{item.images[0]} is {scan.dtype} where most images are {kinds.most_common(1)[0][0]}; save all alike")
            if scan.channels != wanted and max(scan.channels, wanted) > 4:
                raise InputError(f"{item.images[0]} has {scan.channels} channels where most images have {wanted}; save all alike")
            items.append(_checked(item, scan, written, classes))
        except InputError as error:
            what, _, fix = str(error).removeprefix(str(item.images[0])).lstrip(" :").rpartition("; ")
            problems.append(Problem(item.images[0], what, fix))
    excluded = {i.name for i in written.images} - {i.name for i in items}
    usable, split_problems = splits.assign(items, root, excluded) if items else ([], [])
    problems += split_problems
    if not usable:
        reason = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        raise InputError(f"{root} holds nothing usable{reason}")
    said = json.dumps([classes, [[i.name, *i.objects] for i in sorted(items, key=lambda i: i.name)]])
    print_ = summarise([cast(Scan, scans[i.name]) for i in usable], wanted, None, said)
    return Boxes(
        source=str(source),
        root=root,
        layout=written.layout,
        items=tuple(sorted(cast(list[BoxItem], usable), key=lambda i: i.name)),
        classes=tuple(classes),
        problems=tuple(problems),
        fingerprint=print_,
        _once=once,
    )


def box_files(path: Path) -> bool:
    """Whether a file or folder holds boxes: XML files, CSV files with the columns, COCO files without any outline."""
    tables, notes = (_csv_files(path), coco.annotation_files(path)) if path.is_dir() else ([path], [path])
    if path.is_dir() and _voc_files(path):
        return True
    if any(p.suffix.lower() == ".csv" and _columns(p) is not None for p in tables):
        return True
    return _outlined([p for p in notes if p.suffix.lower() == ".json"]) is False


def _outlined(files: Sequence[Path]) -> bool | None:
    """Whether COCO files have outlines of objects; None if none of the files is COCO."""
    found = None
    for path in files:
        try:
            content = read_json(path)
        except InputError:
            continue
        if isinstance(content, dict) and isinstance(content.get("annotations"), list) and "images" in content:
            found = bool(found) or any(isinstance(a, dict) and a.get("segmentation") for a in content["annotations"])
    return found


# --- what the files say ------------------------------------------------------------------------------------------------------------------


def _written(path: Path, root: Path) -> Written:
    files = [path] if path.is_file() else coco.annotation_files(root)
    if path.is_dir() or path.suffix.lower() == ".json":
        if (read := coco.find(files, read_settings(root))) is not None:
            return _coco(*read)
        if path.is_file():
            raise InputError(f"{path} is not COCO (an object with 'images' and 'annotations'); give the folder of the data instead")
    if path.is_dir() and (xml := _voc_files(root)):
        return _voc(root, xml)
    if tables := [p for p in ([path] if path.is_file() else _csv_files(root)) if _columns(p) is not None]:
        return _csv(tables)
    if path.is_file():
        raise InputError(f"{path} is neither COCO nor a CSV file with the columns {', '.join(COLUMNS)}; give one of them or a folder")
    raise InputError(
        f"{root} holds no boxes; put a COCO file, Pascal VOC's XML files or a CSV file ({','.join(COLUMNS)}) beside the images"
    )


def _coco(found: Any, notes: coco.Annotations) -> Written:
    out = Written("COCO", found.files, list(notes.names[1:]), found.items, problems=found.problems)
    for item in found.items:
        out.sizes[item.name] = notes.sizes[item.coco]
        for entry in notes.objects[item.coco]:
            label = notes.names[notes.classes[item.coco[0]][entry["category_id"]]]
            out.rows[item.name].append(_Row(f"annotation {entry.get('id')}", _coco_box(entry), label, bool(entry.get("iscrowd"))))
    return out


def _coco_box(entry: dict[str, Any]) -> tuple[Any, ...]:
    box, outline = entry.get("bbox"), entry.get("segmentation")
    if isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box):
        return box[0], box[1], box[0] + box[2], box[1] + box[3]
    if not box and isinstance(outline, list) and outline and all(isinstance(p, list) and len(p) >= 6 for p in outline):
        x, y = [v for p in outline for v in p[0::2]], [v for p in outline for v in p[1::2]]
        if all(isinstance(v, int | float) for v in (*x, *y)):
            return min(x), min(y), max(x), max(y)
    return tuple(box) if isinstance(box, list) else (box,)


def _voc_files(root: Path) -> list[Path]:
    """XML files beside the images, in ``Annotations``, or so one level below (train, valid ...)."""
    return sorted(p for pattern in ("*.xml", "*/*.xml", "*/*/*.xml") for p in root.glob(pattern) if not is_hidden(p, root))


def _voc(root: Path, files: Sequence[Path]) -> Written:
    out = Written("Pascal VOC", list(files))
    short = Counter(p.stem for p in files)
    said = _image_sets(root)
    for path in files:
        name = path.stem if short[path.stem] == 1 else str(PurePosixPath(path.relative_to(root).as_posix()).with_suffix(""))
        try:
            tree = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError, ValueError) as error:
            out.problems.append(Problem(path, f"is not valid XML ({error})", "correct or remove it"))
            continue
        if tree.tag != "annotation":
            continue
        image = _beside(path, tree.findtext("filename") or "")
        if image is None:
            out.problems.append(
                Problem(
                    path,
                    f"names the image {tree.findtext('filename')!r}, which is not there",
                    "put it beside the file or into 'JPEGImages'",
                )
            )
            continue
        split = said.get(path.stem) or next((SPLITS[w.lower()] for w in path.relative_to(root).parts[:-1] if w.lower() in SPLITS), None)
        out.images.append(Item(name=unicodedata.normalize("NFC", name), images=(image,), split=split))
        for number, thing in enumerate(tree.iter("object"), start=1):
            box = tuple(thing.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
            corners = tuple(v - 1 if isinstance(v := _number(t), float) and i < 2 else v for i, t in enumerate(box))
            hard = (thing.findtext("difficult") or "0").strip() == "1"
            label = (thing.findtext("name") or "").strip()
            out.rows[out.images[-1].name].append(_Row(f"object {number} of {path.name}", corners, label, hard))
    return out


def _image_sets(root: Path) -> dict[str, str]:
    """Name -> split of VOC's ``ImageSets/Main``; the test set is for testing."""
    out: dict[str, str] = {}
    for split in ("train", "val", "test"):
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            out |= {line.split()[0]: split for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    return out


def _beside(annotation: Path, name: str) -> Path | None:
    """The image that an XML file belongs to: by the name in it, or by its own."""
    folders = [base / sub for base in (annotation.parent, annotation.parent.parent) for sub in ("", "JPEGImages", "images", "imgs")]
    named = PurePosixPath(name.replace("\\", "/")).name
    names = [named] if PurePosixPath(named).suffix.lower() in IMAGE_SUFFIXES else []
    names += [annotation.stem + suffix for s in sorted(IMAGE_SUFFIXES) for suffix in (s, s.upper())]
    return next((folder / n for n in names for folder in folders if (folder / n).is_file()), None)


def _csv_files(root: Path) -> list[Path]:
    return [p for p in sorted([*root.glob("*.csv"), *root.glob("*/*.csv")]) if p.name not in splits.FILES and not is_hidden(p, root)]


def _columns(path: Path) -> tuple[dict[str, int], bool] | None:
    """Where a file's columns are, and whether its first line names them; None if it has no boxes."""
    try:
        first = next((row for row in cells(path) if any(row)), [])
    except InputError:
        return None
    header = [c.lower() for c in first]
    places = {column: next((header.index(n) for n in names if n in header), None) for column, names in COLUMNS.items()}
    if all(place is not None for place in places.values()):
        return cast(dict[str, int], places), True
    image = bool(first) and PurePosixPath(first[0].replace("\\", "/")).suffix.lower() in IMAGE_SUFFIXES
    return (dict(zip(COLUMNS, range(6))), False) if image and len(first) == 6 else None


def _csv(files: Sequence[Path]) -> Written:
    out = Written("CSV", list(files))
    seen: dict[Path, str] = {}
    for path in files:
        columns, header = cast(tuple[dict[str, int], bool], _columns(path))
        words = "".join(c if c.isalpha() else " " for c in path.stem.lower()).split()
        split = next((SPLITS[w] for w in (*words, path.parent.name.lower()) if w in SPLITS), None) if len(files) > 1 else None
        missing = set()
        for number, row in enumerate(cells(path), start=1):
            if not any(row) or (header and number == 1):
                continue
            found = {c: row[i] if i < len(row) else "" for c, i in columns.items()}
            written = found["file"].replace("\\", "/")
            image = next(
                (
                    f
                    for base in (path.parent, path.parent.parent)
                    for sub in ("", "images")
                    if written and (f := base / sub / written).is_file()
                ),
                None,
            )
            if image is None:
                if written not in missing:
                    out.problems.append(
                        Problem(path, f"names {written!r} in line {number}, which is not there", "put it beside the file or into 'images'")
                    )
                missing.add(written)
                continue
            if image not in seen:
                name = unicodedata.normalize("NFC", str(PurePosixPath(written).with_suffix("")))
                seen[image] = f"{path.stem}/{name}" if name in seen.values() else name
                out.images.append(Item(name=seen[image], images=(image,), split=split))
            corners = [found[c] for c in ("xmin", "ymin", "xmax", "ymax")]
            if any(corners) or found["class"]:
                out.rows[seen[image]].append(
                    _Row(f"line {number} of {path.name}", tuple(_number(c) for c in corners), found["class"], False)
                )
    return out


def _number(text: str | None) -> float | str | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return text


# --- whether it can be so ---------------------------------------------------------------------------------------------------------------


def examined(root: Path, written: Written, once: Memory, progress: Callable[[int, int], None] | None) -> dict[str, Scan | InputError]:
    """Each image's sums, or what is wrong with it; recalled if no file has changed."""
    files = [i.images[0] for i in written.images]
    key = cache_key(root, [*files, *written.files], "boxes" + json.dumps([i.name for i in written.images]))
    names = [i.name for i in written.images]
    if (kept := load_cache(key)) is not None and set(kept) == set(names):
        return {name: _recalled(kept[name]) for name in names}
    samples = samples_per_image(len(files))

    def scan(item: Item) -> Scan:
        out = scan_image(decoded(item, once), read_header(item.images[0]).bit_depth, samples)
        out.digest = f"{item.name} {digest(item.images)}"
        return out

    scans = dict(zip(names, run(written.images, scan, progress)))
    save_cache(key, {name: str(s) if isinstance(s, InputError) else _kept(s) for name, s in scans.items()})
    return scans


def _kept(scan: Scan) -> dict[str, Any]:
    arrays = {k: None if (v := getattr(scan, k)) is None else np.asarray(v).tolist() for k in ("total", "squares", "samples")}
    plain = {k: getattr(scan, k) for k in ("size", "dtype", "bit_depth", "maximum", "digest")}
    return plain | arrays


def _recalled(kept: Any) -> Scan | InputError:
    if isinstance(kept, str):
        return InputError(kept)
    arrays = {k: None if kept[k] is None else np.array(kept[k], np.float64) for k in ("total", "squares", "samples")}
    return Scan(**{**kept, **arrays, "size": tuple(kept["size"])})


def _checked(item: Item, scan: Scan, written: Written, classes: Sequence[str]) -> BoxItem:
    """The item with its objects.

    Raises:
        InputError: the image has another size than the file says, or a box cannot be right.
    """
    height, width = scan.size
    file = item.images[0]
    if (stated := written.sizes.get(item.name, (height, width))) != (height, width):
        raise InputError(f"{file} is {width}x{height} and its annotations say {stated[1]}x{stated[0]}; annotate the file that is here")
    objects = []
    for row in written.rows.get(item.name, ()):
        shown = ", ".join("nothing" if v is None or v == "" else str(v) for v in row.box)
        if len(row.box) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in row.box):
            raise InputError(f"{file} has a box that is not four numbers ({row.where}: {shown}); correct or remove it")
        left, top, right, bottom = (float(v) for v in row.box)
        if not row.label:
            raise InputError(f"{file} has a box without a class ({row.where}); name it or remove it")
        if right <= left or bottom <= top:
            raise InputError(f"{file} has a box without extent ({row.where}: {shown}); correct or remove it")
        left, right = max(left, 0.0), min(right, float(width))
        top, bottom = max(top, 0.0), min(bottom, float(height))
        if right - left <= 0 or bottom - top <= 0:
            raise InputError(f"{file} has a box outside its {width}x{height} pixels ({row.where}: {shown}); correct or remove it")
        objects.append(Object(left, top, right, bottom, classes.index(row.label), row.crowd))
    plain = {f.name: getattr(item, f.name) for f in dataclasses.fields(Item)}
    return BoxItem(**plain, size=(height, width), objects=tuple(objects))


# --- how training samples vary ----------------------------------------------------------------------------------------------------------


def keep(sample: dict[str, Any], which: Tensor) -> dict[str, Any]:
    """The sample with some of its objects only."""
    out = {key: value[which] for key, value in sample.items() if key in ("labels", "crowd")}
    boxes = tv_tensors.BoundingBoxes(
        sample["boxes"].as_subclass(Tensor)[which],
        format="XYXY",
        canvas_size=sample["boxes"].canvas_size,  # pyright: ignore[reportCallIssue]
    )
    return sample | out | {"boxes": boxes}


def fitted(sample: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """Image and boxes brought to a height and width; the aspect is not kept."""
    image, boxes = (F.resize(sample[key], list(size), antialias=True) for key in ("image", "boxes"))
    return sample | {"image": image, "boxes": boxes}


@dataclass(frozen=True)
class BoxAugment:
    """Crops, mirror images and grey values for images with boxes. Calling it draws one variation."""

    flip: bool = True
    """Mirror left and right with probability 1/2."""
    upright: bool = True
    """Top and bottom stay where they are; otherwise they change places with probability 1/2 too (microscopes, satellites)."""
    crop: float = 0.7
    """Smallest share of the image's height and width that is kept; 1 takes the whole image."""
    brightness: float = 0.1
    """Largest amount that is added to or taken from all grey values."""
    contrast: float = 0.2
    """The distances from the mean grey value are multiplied by 1 - contrast to 1 + contrast."""

    def __call__(self, sample: dict[str, Any], patch: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Cut a window out of a sample and bring it to the size ``patch``. Objects whose centre it holds stay, cut off at its border."""
        amounts = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
        height, width = sample["image"].shape[1:]
        h, w = (max(1, round(n * (self.crop + (1 - self.crop) * a))) for n, a in ((height, amounts[0]), (width, amounts[1])))
        top, left = int(amounts[2] * (height - h + 1)), int(amounts[3] * (width - w + 1))
        sample = fitted(cropped(sample, top, left, h, w), patch)
        for wanted, amount, mirrored in (
            (self.flip, amounts[4], F.horizontal_flip),
            (not self.upright, amounts[5], F.vertical_flip),
        ):
            if wanted and amount < 0.5:
                sample |= {key: mirrored(sample[key]) for key in ("image", "boxes")}
        image = sample["image"].as_subclass(Tensor)
        contrast, mean = 1 + self.contrast * (2 * amounts[6] - 1), image.mean()
        image = (image - mean) * contrast + mean + self.brightness * (2 * amounts[7] - 1)
        return sample | {"image": tv_tensors.Image(image.clamp(0, 1))}


def cropped(sample: dict[str, Any], top: int, left: int, height: int, width: int) -> dict[str, Any]:
    """A window of a sample; objects whose centre it holds stay, cut off at its border."""
    boxes = sample["boxes"].as_subclass(Tensor)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    sample = keep(sample, inside)
    image, boxes = (F.crop(sample[key], top, left, height, width) for key in ("image", "boxes"))
    return sample | {"image": image, "boxes": F.clamp_bounding_boxes(boxes)}


def as_boxes(objects: Iterable[Object], size: tuple[int, int]) -> dict[str, Any]:
    """``boxes``, ``labels`` and ``crowd`` of a sample whose image has this height and width."""
    objects = list(objects)
    corners = torch.tensor([o[:4] for o in objects], dtype=torch.float32).view(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),  # pyright: ignore[reportCallIssue]
        "labels": torch.tensor([o.label for o in objects], dtype=torch.int64),
        "crowd": torch.tensor([o.crowd for o in objects], dtype=torch.bool),
    }
