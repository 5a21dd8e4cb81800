"""Images with sentences, and with boxes where there are any: CSV tables and COCO files.

``captions.csv`` (or any other CSV of this kind) has a line for each sentence with the columns file and caption; number and split may be there.
A COCO file has ``annotations`` with ``caption``. Images lie beside the file, in ``images``, or in a folder called as the file.

Boxes of things that are in the images are read from ``boxes.csv`` (the columns of :mod:`paperworks.data.boxes`, and ``attribute``, a word such as
a colour) or from COCO files of objects. An image that they do not name is one without objects.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from paperworks.data import splits
from paperworks.data.boxes import BoxItem, Object, Written, decoded, examined, open_boxes
from paperworks.data.collection import Collection, Memory
from paperworks.data.fingerprint import Scan, summarise
from paperworks.data.labels import read_json
from paperworks.data.layouts import SPLITS, Item, Problem, is_hidden
from paperworks.data.packs import source_path
from paperworks.data.sheets import columns, records
from paperworks.errors import InputError

FILE = ("file", "filename", "file_name", "image", "image_name", "path")
CAPTION = ("caption", "captions", "sentence", "description")
MEMORY = 1 << 30
"""Bytes of decoded images that a data set keeps."""


@dataclass(frozen=True, kw_only=True)
class CaptionItem(BoxItem):
    """An image with what is said of it."""

    captions: tuple[str, ...] = ()
    attributes: tuple[int, ...] = ()
    """Of each object its attribute's index, -1 where it has none."""


@dataclass(frozen=True, kw_only=True)
class Captioned(Collection[CaptionItem]):
    """Images with sentences."""

    classes: tuple[str, ...]
    """Of the boxes; empty where there are none."""
    attributes: tuple[str, ...]
    _once: Memory = field(repr=False)

    def image(self, item: CaptionItem) -> Float[Tensor, "C H W"]:
        """The image as float32 in [0, 1], with the channels that the whole set has."""
        return self.unit(decoded(item, self._once))

    def describe(self) -> dict[str, Any]:
        """Everything that a person wants to know before training, as plain values for JSON."""
        counts = [len(i.captions) for i in self.items]
        objects = Counter(o.label for i in self.items for o in i.objects)
        return self.facts(
            task="captions",
            captions={"all": sum(counts), "min": min(counts), "max": max(counts)},
            classes=[
                {"name": name, "share": round(objects[k] / max(objects.total(), 1), 6), "objects": objects[k]}
                for k, name in enumerate(self.classes)
            ],
            attributes=list(self.attributes),
        )


@dataclass
class _Said:
    """What the files say before any image was looked at."""

    layout: str
    files: list[Path]
    images: dict[Path, Item] = field(default_factory=dict)
    captions: dict[Path, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: Path, written: str, caption: str, split: str | None) -> None:
        if file not in self.images:
            name = str(PurePosixPath(written.replace("\\", "/")).with_suffix(""))
            known = {i.name for i in self.images.values()} if split else ()
            self.images[file] = Item(name=f"{split}/{name}" if name in known else name, images=(file,), split=split)
        self.captions[file].append(" ".join(caption.split()))


def looks_like_captions(path: Path) -> bool:
    """A CSV whose first line has file and caption, or a JSON file whose name speaks of captions."""
    return bool(_tables(path) or _notes(path))


def open_captions(source: str | Path, *, progress: Callable[[int, int], None] | None = None, memory: int = MEMORY) -> Captioned:
    """Open images with sentences: a folder, a CSV or COCO file, ``pack:NAME``. Every image is read once, in a few threads.

    Raises:
        InputError: the place does not exist, holds no sentences, or nothing usable is left.
    """
    path = source_path(source)
    root = path if path.is_dir() else path.parent
    said = _said(path)
    objects, classes, attributes, box_files = _objects(root, said, progress)
    once = Memory(memory)
    images = list(said.images.values())
    if len({i.name for i in images}) < len(images):  # folders that differ in nothing but the files' endings
        images = [dataclasses.replace(i, name=i.images[0].relative_to(root).as_posix()) for i in images]
    scans = examined(root, Written(said.layout, [*said.files, *box_files], images=images), once, progress)
    problems, items = list(said.problems), []
    good = [s for s in scans.values() if isinstance(s, Scan)]
    kind = Counter(s.dtype for s in good).most_common(1)[0][0] if good else ""
    channels = Counter(s.channels for s in good)
    wanted = {2: 1, 4: 3}.get(max(channels), max(channels)) if len(channels) > 1 else max(channels, default=0)
    for item in images:
        file, scan = item.images[0], scans[item.name]
        if isinstance(scan, InputError):
            what, _, fix = str(scan).removeprefix(str(file)).lstrip(" :").rpartition("; ")
            problems.append(Problem(file, what, fix))
        elif scan.dtype != kind:
            problems.append(Problem(file, f"is {scan.dtype} where most images are {kind}", "save all alike"))
        else:
            things = objects.get(file, [])
            items.append(
                CaptionItem(
                    name=item.name,
                    images=item.images,
                    split=item.split,
                    size=cast(tuple[int, int], tuple(scan.size)),
                    objects=tuple(o for o, _ in things),
                    captions=tuple(said.captions[file]),
                    attributes=tuple(a for _, a in things),
                )
            )
    usable, more = splits.assign(items, root, {i.name for i in images} - {i.name for i in items}) if items else ([], [])
    problems += more
    if not usable:
        reason = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        raise InputError(f"{path} holds nothing usable{reason}")
    contents = json.dumps([[i.name, i.captions, i.objects, i.attributes] for i in sorted(items, key=lambda i: i.name)])
    return Captioned(
        source=str(source),
        root=root,
        layout=said.layout,
        items=tuple(sorted(cast(list[CaptionItem], usable), key=lambda i: i.name)),
        classes=tuple(classes),
        attributes=tuple(attributes),
        problems=tuple(problems),
        fingerprint=summarise([cast(Scan, scans[i.name]) for i in usable], wanted, None, json.dumps([classes, attributes]) + contents),
        _once=once,
    )


# --- sentences -----------------------------------------------------------------------------------------------------------------------------


def _tables(path: Path) -> list[Path]:
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path] if path.suffix.lower() == ".csv" else []
    return [p for p in files if columns(p, FILE, CAPTION) is not None and not is_hidden(p, p.parent)]


def _notes(path: Path) -> list[Path]:
    files = sorted([*path.glob("*.json"), *path.glob("*/*.json")]) if path.is_dir() else [path] if path.suffix.lower() == ".json" else []
    return [p for p in files if "caption" in p.stem.lower() and not is_hidden(p, p.parent)]


def _said(path: Path) -> _Said:
    if tables := _tables(path):
        return _from_tables(tables)
    notes = [path] if path.is_file() and path.suffix.lower() == ".json" else _notes(path)
    if notes:
        return _from_notes(notes)
    if path.is_file():
        raise InputError(f"{path} is no table of captions; write file,caption[,split] into its first line, or give COCO's JSON")
    raise InputError(f"{path} holds no captions; put captions.csv (file,caption) or COCO's captions JSON beside the images")


def _split_of(path: Path) -> str | None:
    """captions_train2017.json -> train."""
    words = "".join(c if c.isalpha() else " " for c in path.stem.lower()).split()
    return next((SPLITS[w] for w in (*words, path.parent.name.lower()) if w in SPLITS), None)


def _image(table: Path, written: str) -> Path | None:
    """Where an image lies: beside the table, in ``images`` or in a folder called as the table, also one level up."""
    written = written.replace("\\", "/")
    stem = table.stem.removeprefix("captions_").removeprefix("instances_")
    folders = [base / sub for base in (table.parent, table.parent.parent) for sub in ("", "images", stem, f"images/{stem}")]
    return next((f / written for f in folders if written and (f / written).is_file()), None)


def _from_tables(files: list[Path]) -> _Said:
    out = _Said("CSV", files)
    for path in files:
        file, caption = cast(tuple[str, str], columns(path, FILE, CAPTION))
        missing = set()
        for number, row in enumerate(records(path), start=2):
            written, sentence, split = row.get(file, ""), row.get(caption, ""), row.get("split", "").lower()
            image = _image(path, written)
            if image is None:
                if written not in missing:
                    out.problems.append(Problem(path, f"names {written!r} in line {number}, which is not there", "correct or remove it"))
                missing.add(written)
            elif not sentence:
                out.problems.append(Problem(path, f"has no caption in line {number}", "write one or remove the line"))
            elif split and split not in SPLITS:
                out.problems.append(Problem(path, f"has the split {split!r} in line {number}", "write train, val or test"))
            else:
                out.add(image, written, sentence, SPLITS.get(split) or (_split_of(path) if len(files) > 1 else None))
    return out


def _from_notes(files: list[Path]) -> _Said:
    out = _Said("COCO", files)
    for path in files:
        content = read_json(path)
        try:
            names = {i["id"]: str(i["file_name"]) for i in content["images"]}
            notes = [(a["image_id"], a["caption"]) for a in content["annotations"]]
        except (KeyError, TypeError):
            raise InputError(
                f"{path} is no COCO file of captions ('images' with file_name, 'annotations' with image_id and caption); export it again"
            ) from None
        found = {number: _image(path, name) for number, name in names.items()}
        for number in sorted((n for n, image in found.items() if image is None), key=str):
            out.problems.append(Problem(path, f"names {names[number]!r}, which is not there", "put it beside the file or into 'images'"))
        strange = {number for number, _ in notes} - set(names)
        out.problems += [
            Problem(path, f"has captions of image {n}, which it does not list", "remove them") for n in sorted(strange, key=str)
        ]
        for number, caption in notes:
            if number in strange or (image := found[number]) is None:
                continue
            if not isinstance(caption, str) or not caption.strip():
                out.problems.append(Problem(path, f"has no text in a caption of {names[number]!r}", "write one or remove the entry"))
            else:
                out.add(image, names[number], caption, _split_of(path) if len(files) > 1 else None)
    return out


# --- boxes -----------------------------------------------------------------------------------------------------------------------------------


def _objects(
    root: Path, said: _Said, progress: Callable[[int, int], None] | None
) -> tuple[dict[Path, list[tuple[Object, int]]], list[str], list[str], list[Path]]:
    """Of each image its objects with their attributes; names of classes and attributes; the files that say so."""
    table = root / "boxes.csv"
    files = (
        [table] if table.is_file() else [p for p in sorted([*root.glob("*.json"), *root.glob("*/*.json")]) if "instances" in p.stem.lower()]
    )
    opened = [open_boxes(file, progress=progress) for file in files]
    for problem in (p for boxes in opened for p in boxes.problems):
        said.problems.append(problem)
        said.images.pop(problem.path, None)  # without a box that cannot be read, its object would be taught as background
    classes = sorted({name for boxes in opened for name in boxes.classes})
    words = _attributes(table) if table.is_file() else {}
    attributes = sorted({word for of_image in words.values() for word in of_image if word})
    out: dict[Path, list[tuple[Object, int]]] = {}
    for boxes in opened:
        for item in boxes.items:
            things = [o._replace(label=classes.index(boxes.classes[o.label])) for o in item.objects]
            of_image = words.get(item.images[0], [""] * len(things))
            out[item.images[0]] = [(o, attributes.index(a) if a else -1) for o, a in zip(things, of_image, strict=True)]
    return out, classes, attributes, files


def _attributes(table: Path) -> dict[Path, list[str]]:
    """Of each image the attributes of its boxes, in the order of the lines."""
    out: dict[Path, list[str]] = defaultdict(list)
    for row in records(table):
        written = next((row[name] for name in FILE if name in row), "")
        image = _image(table, written)
        if image is not None and any(value for key, value in row.items() if key not in FILE):
            out[image].append(row.get("attribute", ""))
    return dict(out)
