"""Images with one label each, or none: class folders, a CSV, or arrays in an npz."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from paperworks.data import splits
from paperworks.data.collection import Collection, Memory
from paperworks.data.fingerprint import (
    Fingerprint,
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
from paperworks.data.layouts import SPLITS, Item, Problem, is_hidden
from paperworks.data.packs import source_path
from paperworks.data.sheets import columns, records
from paperworks.errors import InputError

FILE_COLUMNS = ("file", "filename", "image", "path", "name")
LABEL_COLUMNS = ("label", "class", "category", "target", "species")
ROLES = {"images", "image", "masks", "mask", "labels", "annotations", "imagestr", "labelstr", "imagests", "jpegimages"}
"""Folder names that say what the files are, not what they show."""


@dataclass(frozen=True)
class ClassItem:
    """One image with what is known of it."""

    name: str
    """Unique in the data set: the path below its root, or ``x_train/17`` for a row of an array."""
    path: Path
    label: int | None
    """Index of the class; None where nobody said."""
    split: str
    group: str | None = None
    row: tuple[str, int] | None = None
    """Array and index in an npz."""


@dataclass(frozen=True, kw_only=True)
class ClassFolder(Collection[ClassItem]):
    """Images with a class each."""

    classes: tuple[str, ...]
    """Names in alphabetical order, numbers by value; empty where there are no labels."""
    _once: Memory = field(repr=False, compare=False)
    _arrays: dict[str, np.ndarray] = field(repr=False, compare=False)

    def image(self, item: ClassItem) -> Shaped[np.ndarray, "H W C"]:
        """The image in the file's own type and range; read-only."""
        if item.row is not None:
            array = self._arrays[item.row[0]][item.row[1]]
            return array[..., None] if array.ndim == 2 else array
        return self._once(item.name, lambda: read_image(item.path))

    def describe(self) -> dict[str, Any]:
        """Everything that a person wants to know before training, as plain values for JSON."""
        counts = Counter(i.label for i in self.items if i.label is not None)
        return self.facts(
            labelled=counts.total(),
            classes=[
                {"name": name, "share": round(counts[i] / max(counts.total(), 1), 6), "images": counts[i]}
                for i, name in enumerate(self.classes)
            ],
        )


@dataclass
class _Row:
    """An image before it was looked at."""

    name: str
    path: Path
    label: str | None
    split: str | None = None
    group: str | None = None
    row: tuple[str, int] | None = None


def looks_like_classes(path: Path) -> bool:
    """Class folders, a CSV of files and labels, or an npz with ``x_train``; from names and first lines alone."""
    if path.is_file():
        return (path.suffix == ".csv" and columns(path, FILE_COLUMNS, LABEL_COLUMNS) is not None) or (
            path.suffix == ".npz" and "x_train" in _array_names(path)
        )
    if any(
        (path / name).is_file() and columns(path / name, FILE_COLUMNS, LABEL_COLUMNS) is not None for name in ("labels.csv", "train.csv")
    ):
        return True
    if any("x_train" in _array_names(file) for file in path.glob("*.npz")):
        return True
    return len(_class_folders(path)) > 1


def open_classes(source: str | Path, *, labelled: bool = True, progress: Callable[[int, int], None] | None = None) -> ClassFolder:
    """Open a data set of images with one label each.

    Understood are folders of classes (``root/CLASS/*.jpg``, ``root/train/CLASS/*.jpg``), a CSV with the columns file and label (and split,
    group), alone or as ``labels.csv`` in the folder, and an npz with ``x_train``, ``y_train`` (and ``x_val``, ``y_val``). Every
    file is read once, to find what is broken and to measure the rest; what was found is kept until a file changes.

    Args:
        source: a folder, a file or ``pack:NAME``.
        labelled: whether images without labels are of no use; otherwise a plain folder of images will do.
        progress: called with (files done, files in all).

    Raises:
        InputError: the place does not exist, cannot be understood, or nothing usable is left in it.
    """
    path = source_path(source)
    layout, rows, problems = _find(path, labelled)
    root = path if path.is_dir() else path.parent
    arrays: dict[str, np.ndarray] = {}
    if rows and rows[0].row is not None:
        arrays = _arrays(rows[0].path)
    if labelled and (bare := [r for r in rows if r.label is None]):
        problems += [Problem(r.path, "has no label", "put it into a class's folder or add its row") for r in bare]
        rows = [r for r in rows if r.label is not None]
    names = sorted({r.label for r in rows if r.label is not None}, key=_by_number)
    print_, bad = _examine(root, rows, arrays, problems, progress, json.dumps([layout, names]))
    rows = [r for r in rows if r.name not in bad]
    by_name = {r.name: r for r in rows}
    given = [Item(name=r.name, images=(r.path,), split=r.split, group=r.group) for r in rows]
    if arrays:
        items = given if any(i.split == "val" for i in given) else splits.assign(given, root / "-")[0]
    else:
        items, said = splits.assign(given, root, bad)
        problems += said
    if print_ is None or not items:
        reason = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        raise InputError(f"{path} holds nothing usable{reason}")
    index = {name: i for i, name in enumerate(names)}
    found = [
        ClassItem(i.name, by_name[i.name].path, index.get(by_name[i.name].label or ""), i.split or "train", i.group, by_name[i.name].row)
        for i in items
    ]
    return ClassFolder(
        source=str(source),
        root=root,
        layout=layout,
        items=tuple(sorted(found, key=lambda i: (i.name if i.row is None else i.row[0], i.row[1] if i.row else 0))),
        classes=tuple(names),
        problems=tuple(problems),
        fingerprint=print_,
        _once=Memory(),
        _arrays=arrays,
    )


def _by_number(name: str) -> tuple[int, float, str]:
    return (0, float(name), name) if name.replace(".", "", 1).isdigit() else (1, 0.0, name)


# --- layouts -----------------------------------------------------------------------------------------------------------------------


def _find(path: Path, labelled: bool) -> tuple[str, list[_Row], list[Problem]]:
    if path.is_file():
        if path.suffix == ".csv":
            return _from_csv(path)
        if path.suffix == ".npz":
            return "arrays", _from_arrays(path), []
        raise InputError(f"{path} is no CSV and no npz; give those, or a folder of class folders")
    for name in ("labels.csv", "train.csv"):
        if (path / name).is_file() and columns(path / name, FILE_COLUMNS, LABEL_COLUMNS) is not None:
            return _from_csv(path / name)
    for file in sorted(path.glob("*.npz")):
        if "x_train" in _array_names(file):
            return "arrays", _from_arrays(file), []
    folders = _class_folders(path)
    if len(folders) > 1 or (folders and not labelled):
        rows = [
            _Row(str(file.relative_to(path)), file, label, split)
            for folder, label, split in folders
            for file in sorted(folder.rglob("*"))
            if _is_image(file, path)
        ]
        return "class folders", rows, []
    if not labelled:
        rows = [_Row(str(file.relative_to(path)), file, None) for file in sorted(path.rglob("*")) if _is_image(file, path)]
        if rows:
            return "images", rows, []
        raise InputError(f"{path} holds no images; give a folder of images")
    raise InputError(f"{path} holds no classes; put the images into one folder a class, or give a CSV with the columns file and label")


def _is_image(file: Path, root: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not is_hidden(file, root)


def _class_folders(root: Path) -> list[tuple[Path, str, str | None]]:
    """(folder, class, split) of every folder that stands for a class."""
    found: list[tuple[Path, str, str | None]] = []
    children = _folders(root)
    splits_ = [c for c in children if c.name.lower() in SPLITS]
    if splits_ and len(splits_) == len([c for c in children if c.name.lower() not in ROLES]):
        found = [(f, f.name, SPLITS[c.name.lower()]) for c in splits_ for f in _folders(c) if f.name.lower() not in ROLES]
    elif not any(c.name.lower() in ROLES for c in children):
        found = [(c, c.name, None) for c in children]
    elif len(children) == 1:  # images/CLASS/...
        found = [(c, c.name, None) for c in _folders(children[0])]
    return [entry for entry in found if any(_is_image(f, root) for f in entry[0].rglob("*"))]


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not is_hidden(p, path))


def _from_csv(path: Path) -> tuple[str, list[_Row], list[Problem]]:
    named = columns(path, FILE_COLUMNS, LABEL_COLUMNS)
    if named is None:
        raise InputError(f"{path} has no header with the columns file and label; write file,label[,split] into its first line")
    rows: list[_Row] = []
    problems: list[Problem] = []
    for number, line in enumerate(records(path), start=2):
        written, label = line[named[0]], line[named[1]]
        file = next((p for p in (path.parent / written, path.parent / "images" / written) if written and p.is_file()), None)
        split = line.get("split", "").lower()
        if file is None:
            problems.append(Problem(path, f"row {number} names {written!r}, which is not there", "correct the name or remove the row"))
        elif any(r.path == file for r in rows[-1:]):
            problems.append(Problem(path, f"row {number} names {written!r} again", "keep one row a file"))
        elif split and split not in SPLITS:
            problems.append(Problem(path, f"row {number} has the split {split!r}", "write train, val or test"))
        else:
            rows.append(_Row(written, file, label or None, SPLITS.get(split), line.get("group") or None))
    counts = Counter(r.name for r in rows)
    problems += [Problem(path, f"names {name!r} {n} times", "keep one row a file; the first counts") for name, n in counts.items() if n > 1]
    return "table", list({r.name: r for r in reversed(rows)}.values())[::-1], problems


def _array_names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {Path(n).stem for n in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name.startswith("x_")}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); save plain arrays with numpy.savez") from None
    for name, array in arrays.items():
        if array.ndim not in (3, 4) or array.dtype.kind not in "uif":
            raise InputError(f"{path}: {name} is {array.ndim}-D of {array.dtype}; give numbers N H W or N H W C")
        array.flags.writeable = False
    return arrays


def _from_arrays(path: Path) -> list[_Row]:
    arrays = _arrays(path)
    rows = []
    with np.load(path, allow_pickle=False) as archive:
        for name, images in arrays.items():
            split = SPLITS.get(name.removeprefix("x_").lower())
            if split is None:
                continue
            labels = archive[f"y_{name.removeprefix('x_')}"] if f"y_{name.removeprefix('x_')}" in archive.files else None
            if labels is not None and labels.shape != images.shape[:1]:
                raise InputError(f"{path}: {name} has {len(images)} images and {labels.shape} labels; give one label an image")
            for i in range(len(images)):
                rows.append(_Row(f"{name}/{i}", path, None if labels is None else str(labels[i]), split, None, (name, i)))
    return rows


# --- looking through ---------------------------------------------------------------------------------------------------------------


def _examine(
    root: Path,
    rows: Sequence[_Row],
    arrays: dict[str, np.ndarray],
    problems: list[Problem],
    progress: Callable[[int, int], None] | None,
    said: str,
) -> tuple[Fingerprint | None, set[str]]:
    """The fingerprint, and names of images that cannot be used, whose problems are added."""
    if arrays:
        return _examine_arrays(rows, arrays, said), set()
    said += json.dumps([[r.name, r.label] for r in rows])
    key = cache_key(root, [r.path for r in rows], said)
    if (kept := load_cache(key)) is not None and "bad" in kept and "classes" in kept:
        problems += [Problem(Path(p), what, fix) for p, what, fix in kept["problems"]]
        return Fingerprint.from_dict(kept["classes"]) if kept["classes"] else None, set(kept["bad"])
    samples = samples_per_image(len(rows))
    results = run(rows, lambda r: _scan(r, samples), progress)
    found = [Problem(r.path, *_reason(r.path, x)) for r, x in zip(rows, results) if isinstance(x, InputError)]
    bad = {r.name for r, x in zip(rows, results) if isinstance(x, InputError)}
    scans = {r.name: (r, x) for r, x in zip(rows, results) if isinstance(x, Scan)}
    channels, odd = _alike(scans.values())
    found += odd
    bad |= {r.name for r, _ in scans.values() if any(p.path == r.path for p in odd)}
    usable = [x for r, x in scans.values() if r.name not in bad]
    print_ = summarise(usable, channels, None, said) if usable else None
    kept = [[str(p.path), p.what, p.fix] for p in found]
    save_cache(key, {"classes": dataclasses.asdict(print_) if print_ else None, "bad": sorted(bad), "problems": kept})
    problems += found
    return print_, bad


def _reason(path: Path, error: InputError) -> tuple[str, str]:
    text = str(error).removeprefix(str(path)).lstrip(": ")
    what, _, fix = text.partition("; ")
    return what, fix or "replace it"


def _scan(row: _Row, samples: int) -> Scan:
    scan = scan_image(read_image(row.path), read_header(row.path).bit_depth, samples)
    scan.digest = f"{row.name} {digest([row.path])}"
    return scan


def _alike(scans: Iterable[tuple[_Row, Scan]]) -> tuple[int, list[Problem]]:
    """The channels that the set is read with, and images that do not fit: colour wins over grey, the commonest kind over rare ones."""
    scans = list(scans)
    kinds = Counter(s.channels for _, s in scans)
    if not kinds:
        return 1, []
    plain = {k: (k - 1 if k in (2, 4) and k - 1 in kinds else k) for k in kinds}
    channels = 3 if 3 in plain.values() else Counter({plain[k]: n for k, n in kinds.items()}).most_common(1)[0][0]
    types = Counter(s.dtype for _, s in scans)
    dtype = types.most_common(1)[0][0]
    problems = []
    for row, scan in scans:
        if scan.channels not in (channels, 1) and plain[scan.channels] not in (channels, 1):
            problems.append(Problem(row.path, f"has {scan.channels} channels where most have {channels}", "convert it or remove it"))
        elif scan.dtype != dtype:
            problems.append(Problem(row.path, f"is of type {scan.dtype} where most are {dtype}", "convert it or remove it"))
    return channels, problems


def _examine_arrays(rows: Sequence[_Row], arrays: dict[str, np.ndarray], said: str) -> Fingerprint:
    scans = []
    samples = samples_per_image(len(rows))
    labels = hashlib.sha256(json.dumps([r.label for r in rows]).encode()).hexdigest()
    for name, array in arrays.items():
        images = array[..., None] if array.ndim == 3 else array
        if not np.isfinite(images).all():
            raise InputError(f"{rows[0].path}: {name} holds NaN or infinity; clean it")
        for image in images:
            scans.append(scan_image(image, 8 * image.dtype.itemsize, samples))
        scans[-1].digest = f"{name} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    return summarise(scans, scans[0].channels, None, said + labels)
