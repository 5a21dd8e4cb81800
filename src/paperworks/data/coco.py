"""COCO annotation files: polygons and run lengths become masks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
from jaxtyping import Int32, UInt8
from pycocotools import mask as rle

from paperworks.data.images import quietly
from paperworks.data.labels import IGNORE, SETTINGS, Settings, read_json
from paperworks.data.layouts import SPLITS, Found, Item, Problem, is_hidden
from paperworks.errors import InputError

_NOT_COCO = frozenset({SETTINGS, "splits.json", "classes.json", "dataset.json", "splits_final.json"})
_FEW = 64  # more JSON files than this are one per image, of another tool


@dataclass
class Annotations:
    """What the annotation files of a data set say, by file and image id. Categories are sorted by id; class 0 is background."""

    names: tuple[str, ...] = ()
    sizes: dict[tuple[Path, int], tuple[int, int]] = field(default_factory=dict)
    """(height, width) as the file states it."""
    objects: dict[tuple[Path, int], list[dict[str, Any]]] = field(default_factory=dict)
    classes: dict[Path, dict[int, int]] = field(default_factory=dict)
    """Category id -> class number."""
    masks: bool = False
    """Some annotation has a polygon or run lengths; otherwise there are only boxes."""

    def draw(self, key: tuple[Path, int]) -> tuple[UInt8[np.ndarray, "H W"], Int32[np.ndarray, "H W"]]:
        """Class numbers and object numbers of one image. Small objects lie on top of large ones; crowds are ignored (255, no object).

        Raises:
            InputError: an outline or run length cannot be read.
        """
        height, width = self.sizes[key]
        classes, numbers = np.zeros((height, width), np.uint8), np.zeros((height, width), np.int32)
        drawn = [(self._region(key, o, height, width), o) for o in self.objects.get(key, ())]
        number = 0
        for region, entry in sorted(drawn, key=lambda pair: -int(pair[0].sum())):
            if entry.get("iscrowd"):
                classes[region & (numbers == 0)] = IGNORE
                continue
            number += 1
            classes[region] = self.classes[key[0]][entry["category_id"]]
            numbers[region] = number
        return classes, numbers

    def _region(self, key: tuple[Path, int], entry: dict[str, Any], height: int, width: int) -> np.ndarray:
        outline: Any = entry.get("segmentation")
        where = f"{key[0]}: annotation {entry.get('id')}"
        try:
            if isinstance(outline, list):
                outline = [outline] if outline and isinstance(outline[0], int | float) else outline
                if not outline or any(len(p) < 6 or len(p) % 2 for p in outline):
                    raise InputError(f"{where} has a polygon without three corners; draw it again or remove it")
                corners = [[float(v) for v in p] for p in outline]
                # pycocotools walks along every edge, pixel by pixel, also where it is far outside.
                if not all(abs(v) <= 10 * max(height, width) for p in corners for v in p):
                    raise InputError(f"{where} has corners far outside its image; correct or remove it")
                with quietly():  # pycocotools speaks numpy 1
                    return rle.decode(rle.merge(rle.frPyObjects(cast(Any, corners), height, width))).astype(bool)
            elif isinstance(outline, dict):
                if list(outline["size"]) != [height, width]:
                    raise InputError(f"{where} is {outline['size']} large and its image {[height, width]}; export it again")
                counts = _counts(outline["counts"]) if isinstance(outline["counts"], str) else outline["counts"]
                if not all(type(c) is int and c >= 0 for c in counts) or sum(counts) != height * width:
                    raise InputError(f"{where} has run lengths that do not add up to its size; export it again")
                return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
            else:
                raise InputError(f"{where} has a box and no outline; add one or remove it")
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise InputError(f"{where} has an outline that cannot be read ({' '.join(str(error).split())[:80]}); export it again") from None


def _counts(text: str) -> list[int]:
    """Run lengths from COCO's compressed string: five bits a character; from the fourth number on, differences to the last but one.

    Not left to pycocotools, which reads beyond its memory where a string does not add up to the image.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0  # the last character's highest bit is the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def annotation_files(root: Path) -> list[Path]:
    """JSON files in the folder or one below it that may be COCO annotations."""
    files = [p for p in sorted([*root.glob("*.json"), *root.glob("*/*.json")]) if p.name not in _NOT_COCO and not is_hidden(p, root)]
    return files if len(files) <= _FEW else []


def find(files: list[Path], settings: Settings) -> tuple[Found, Annotations] | None:
    """Read annotation files and find their images; None when none of the files is COCO.

    Raises:
        InputError: no file can be read, or images named in them lie nowhere.
    """
    found, notes, contents = Found("COCO", settings=settings, files=files), Annotations(), {}
    for path in files:
        try:
            content = read_json(path)
        except InputError as error:
            if len(files) == 1:
                raise
            found.problems.append(Problem(path, "is not valid JSON", str(error).rpartition("; ")[2]))
            continue
        if isinstance(content, dict) and {"images", "annotations"} <= set(content):
            contents[path] = content
    if not contents:
        if found.problems:
            raise InputError(str(found.problems[0]))
        return None
    for path, content in contents.items():
        _check(path, content)
    categories = {c["id"]: str(c["name"]) for content in contents.values() for c in content.get("categories", [])}
    notes.names = ("background", *(categories[i] for i in sorted(categories)))
    numbers = {category: i for i, category in enumerate(sorted(categories), start=1)}
    for path, content in contents.items():
        notes.classes[path] = numbers
        _read(path, content, len(contents) > 1, found, notes)
    return found, notes


def _check(path: Path, content: dict[str, Any]) -> None:
    wanted = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}
    for part, keys in wanted.items():
        entries = content.get(part, [])
        if not isinstance(entries, list):
            raise InputError(f"{path}: {part!r} must be a list; export it again as COCO")
        for i, entry in enumerate(entries):
            missing = [k for k in keys if not isinstance(entry, dict) or k not in entry]
            if missing:
                raise InputError(f"{path}: entry {i} of {part!r} has no {missing[0]!r}; export it again as COCO")
            wrong = [k for k in keys if not isinstance(entry[k], int if k in ("width", "height") else int | str)]
            if wrong:
                raise InputError(f"{path}: entry {i} of {part!r} has {entry[wrong[0]]!r} as {wrong[0]!r}; export it again as COCO")


def _read(path: Path, content: dict[str, Any], several: bool, found: Found, notes: Annotations) -> None:
    split = next((SPLITS[w] for w in _words(path) if w in SPLITS), None) if several else None
    of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in content["annotations"]:
        of_image[entry["image_id"]].append(entry)
    known = {i["id"] for i in content["images"]}
    for image_id in sorted(set(of_image) - known, key=str):
        found.problems.append(
            Problem(path, f"has {len(of_image[image_id])} annotations of image {image_id}, which it does not list", "remove them")
        )
    names = {i.name for i in found.items}
    for image in content["images"]:
        key = (path, image["id"])
        file = _image_file(path, str(image["file_name"]))
        if file is None:
            found.problems.append(
                Problem(path, f"names {image['file_name']!r}, which is not there", "put it beside the file or into 'images'")
            )
            continue
        name = str(PurePosixPath(str(image["file_name"]).replace("\\", "/")).with_suffix(""))
        name = f"{path.stem}/{name}" if name in names else name
        if name in names or key in notes.sizes:
            found.problems.append(Problem(path, f"lists {image['file_name']!r} or its id twice", "keep one of them"))
            continue
        wrong = next((o["category_id"] for o in of_image[image["id"]] if o["category_id"] not in notes.classes[path]), None)
        if wrong is not None:
            found.problems.append(
                Problem(file, f"has the category {wrong}, which {path.name} does not list", "add it to 'categories' or remove it")
            )
            continue
        names.add(name)
        notes.sizes[key] = (int(image["height"]), int(image["width"]))
        notes.objects[key] = of_image[image["id"]]
        notes.masks |= any(o.get("segmentation") for o in notes.objects[key])
        found.items.append(Item(name=name, images=(file,), coco=key, split=split))


def _words(path: Path) -> list[str]:
    """instances_train2017.json -> instances, train; then the folder's name."""
    words = "".join(c if c.isalpha() else " " for c in path.stem.lower()).split()
    return [*words, path.parent.name.lower()]


def _image_file(path: Path, name: str) -> Path | None:
    """Where an image lies: beside the file, in ``images`` or in a folder called as the file, also one level up."""
    name = name.replace("\\", "/")
    stem = path.stem.removeprefix("instances_")
    for base in (path.parent, path.parent.parent):
        for folder in (base, base / "images", base / stem, base / "images" / stem):
            if (folder / name).is_file():
                return folder / name
    return None
