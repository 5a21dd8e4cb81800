"""``open_folder``: a folder of images and labels, looked through once, then read item by item."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, Shaped, UInt8

from paperworks.data import coco, layouts, splits
from paperworks.data.collection import Collection, Memory
from paperworks.data.fingerprint import (
    Fingerprint,
    Scan,
    cache_key,
    digest,
    label_statistics,
    load_cache,
    run,
    samples_per_image,
    save_cache,
    scan_image,
    scan_mask,
    summarise,
)
from paperworks.data.images import read_header
from paperworks.data.labels import IGNORE, SETTINGS, Coding, Settings, decide, read_settings
from paperworks.data.layouts import Found, Item, Problem
from paperworks.data.nifti import Geometry, is_readable, is_volume, read_array, read_geometry, read_mask_or_labels, stem
from paperworks.data.packs import source_path
from paperworks.errors import InputError

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""
MEMORY = 1 << 30
"""Bytes of decoded images and masks that a ``Folder`` keeps, so that several trainings decode once."""


def open_folder(source: str | Path, *, labelled: bool = True, progress: Progress | None = None, memory: int = MEMORY) -> Folder:
    """Open a data set: a folder, a COCO file, ``pack:NAME``, or with ``labelled=False`` one image.

    Every file is read once, in a few threads, to find what is broken and to measure the rest; what was found is kept in the user's
    cache folder until a file changes.

    Args:
        source: where the data are.
        labelled: whether images without masks are of no use.
        progress: called while files are looked through.
        memory: bytes of decoded arrays to keep.

    Raises:
        InputError: the place does not exist, cannot be understood, or nothing usable is left in it.
    """
    path = source_path(source)
    root = path if path.is_dir() else path.parent
    found, notes = _find(path, root, read_settings(root), labelled)
    if labelled and not found.items and not found.problems:
        raise InputError(f"{root} holds {len(found.unlabelled)} images and no masks; put masks of the same names into {root / 'masks'}")
    reader = _Reader(notes, memory)
    seen = _examine(root, found, reader, progress)
    usable = [i for i in found.items if i.name not in seen.bad]
    unlabelled = [i for i in found.unlabelled if i.name not in seen.bad]
    others = {i.name for i in (*found.items, *found.unlabelled)} - {i.name for i in usable}
    items, split_problems = splits.assign(usable, root, others) if usable else ([], [])
    problems = (*found.problems, *seen.problems, *split_problems)
    if seen.fingerprint is None or not (items or unlabelled) or (labelled and not items):
        reason = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        raise InputError(f"{root} holds nothing usable{reason}")
    return Folder(
        source=str(source),
        root=root,
        layout=found.layout,
        task="images" if not items else "detection" if notes is not None and not notes.masks else "segmentation",
        items=tuple(sorted(items, key=lambda i: i.name)),
        unlabelled=tuple(sorted(unlabelled, key=lambda i: i.name)),
        problems=problems,
        coding=seen.coding,
        fingerprint=seen.fingerprint,
        settings=found.settings,
        _reader=reader,
    )


@dataclass(frozen=True, kw_only=True)
class Folder(Collection[Item]):
    """Images or volumes with masks, polygons or boxes.

    A ``Folder`` can be sent to worker processes; the arrays that it keeps in memory stay behind.
    """

    task: str
    """``segmentation``, ``detection`` (boxes only) or ``images`` (no labels)."""
    unlabelled: tuple[Item, ...] = field(repr=False)
    """Usable images without labels."""
    coding: Coding = field(repr=False)
    settings: Settings
    _reader: _Reader = field(repr=False)
    ignore: int = IGNORE
    """Where ``mask`` says this, the pixel does not count."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, background first where there is one."""
        return self.coding.names

    @property
    def instances(self) -> bool:
        """Whether the labels tell objects of one class apart."""
        return self.coding.instances

    def image(self, item: Item) -> Shaped[np.ndarray, "*size C"]:
        """The image H W C, or the volume D H W C, in the files' own type and range; read-only."""
        return self._reader.image(item)

    def mask(self, item: Item) -> UInt8[np.ndarray, "*size"]:
        """Class numbers; 255 where the pixel does not count.

        Raises:
            InputError: the data have boxes but no masks, or the item has no labels.
        """
        raw = self._labels(item)
        mask = self.coding.encode(raw) if item.coco is None else raw.astype(np.uint8)
        if (inside := self._reader.inside(item)) is not None:
            mask[~inside] = IGNORE
        return mask

    def instance_map(self, item: Item) -> Int32[np.ndarray, "*size"] | None:
        """Objects numbered from 1, 0 elsewhere; None where the labels do not tell objects apart.

        Raises:
            InputError: as ``mask``.
        """
        raw = self._labels(item)
        if not self.instances:
            return None
        objects = self.coding.objects(raw) if item.coco is None else self._reader.drawn(item)[1].copy()
        if (inside := self._reader.inside(item)) is not None:
            objects[~inside] = 0
        return objects

    def spacing(self, item: Item) -> tuple[float, ...] | None:
        """Millimetres from pixel to pixel, in the order of the axes; None where nothing says it."""
        return read_geometry(item.images[0]).spacing if is_volume(item.images[0]) else self.fingerprint.spacing

    def describe(self) -> dict[str, Any]:
        """Everything that a person wants to know before training, as plain values for JSON."""
        print_ = self.fingerprint
        classes = [
            {"name": n, "share": round(p, 6), "images": i}
            for n, p, i in zip(self.class_names, print_.class_pixels, print_.class_images, strict=False)
        ]
        return self.facts(
            task=self.task,
            labels=("instances" if self.instances else "classes") if self.task == "segmentation" else None,
            rule=self.coding.rule,
            unlabelled=len(self.unlabelled),
            channel_names=list(self.settings.channels) if self.settings.channels else None,
            spacing=list(print_.spacing) if print_.spacing else None,
            classes=classes,
            ignored=round(print_.ignored, 6),
            objects=dict(zip(("min", "median", "max"), print_.objects)) if print_.objects else None,
        )

    def _labels(self, item: Item) -> Integer[np.ndarray, "*size"]:
        if self.task == "detection":
            raise InputError(f"{self.source} has boxes but no masks; give a data set with masks or polygons")
        if item.coco is not None:
            return self._reader.drawn(item)[0]
        if item.mask is None:
            raise InputError(f"{item.images[0]} has no mask; take one of the labelled items")
        return self._reader.raw(item)


class _Reader:
    """Decodes what belongs to an item."""

    def __init__(self, notes: coco.Annotations | None, memory: int) -> None:
        self.notes, self._once = notes, Memory(memory)

    def image(self, item: Item) -> np.ndarray:
        return self._once(("image", item.name), lambda: _stack([read_array(p) for p in item.images], item))

    def raw(self, item: Item) -> np.ndarray:
        """Values as they are in the mask file."""
        assert item.mask is not None
        path = item.mask
        return self._once(("mask", item.name), lambda: read_mask_or_labels(path))

    def inside(self, item: Item) -> np.ndarray | None:
        """True where the labels count."""
        path = item.valid
        return None if path is None else self._once(("valid", item.name), lambda: read_mask_or_labels(path) > 0)

    def drawn(self, item: Item) -> tuple[np.ndarray, np.ndarray]:
        """Class numbers and object numbers of COCO annotations."""
        assert self.notes is not None and item.coco is not None
        notes, key = self.notes, item.coco
        return self._once(("coco", item.name), lambda: notes.draw(key))


def _stack(channels: Sequence[np.ndarray], item: Item) -> np.ndarray:
    if len(channels) == 1:
        return channels[0]
    for path, array in zip(item.images, channels):
        if array.shape[:-1] != channels[0].shape[:-1] or array.dtype != channels[0].dtype:
            raise InputError(f"{path} differs in size or type from {item.images[0].name}; export the channels alike")
    return np.concatenate(channels, axis=-1)


def _find(path: Path, root: Path, settings: Settings, labelled: bool) -> tuple[Found, coco.Annotations | None]:
    if path.is_file():
        if path.suffix.lower() == ".json":
            read = coco.find([path], settings)
            if read is None:
                raise InputError(f"{path} is not COCO (an object with 'images' and 'annotations'); give the folder of the data instead")
            return read
        if is_readable(path) and not labelled:
            return Found("one image", unlabelled=[Item(name=stem(path), images=(path,))], settings=settings), None
        raise InputError(f"{path} is a file where a folder of images and masks, or a COCO file, is expected; give the folder")
    if not labelled:
        return layouts.find(root, settings, labelled=False), None
    try:
        found = layouts.find(root, settings)
    except InputError:
        if (files := coco.annotation_files(root)) and (read := coco.find(files, settings)) is not None:
            return read
        raise
    if not found.items and (files := coco.annotation_files(root)) and (read := coco.find(files, settings)) is not None:
        return read
    return found, None


# --- looking through ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Examined:
    fingerprint: Fingerprint | None
    coding: Coding
    problems: list[Problem]
    bad: set[str]
    """Names of items that cannot be used."""


def _examine(root: Path, found: Found, reader: _Reader, progress: Progress | None) -> _Examined:
    """Look through all files, or recall what was seen when they were last looked through."""
    everything = [*found.items, *found.unlabelled]
    said = json.dumps([dataclasses.asdict(found.settings), found.label_folder, found.layout])
    files = [p for i in everything for p in _files(i)]
    key = cache_key(root, [*files, *found.files], said + json.dumps([[i.name, i.mask is not None] for i in everything]))
    if (kept := load_cache(key)) is not None and (seen := _recall(kept)) is not None:
        return seen
    samples = samples_per_image(len(everything))
    results = run(everything, lambda item: _scan(item, reader, samples), progress)
    problems = [_problem(i, r) for i, r in zip(everything, results) if isinstance(r, InputError)]
    bad = {i.name for i, r in zip(everything, results) if isinstance(r, InputError)}
    scans = {i.name: r for i, r in zip(everything, results) if isinstance(r, Scan)}

    channels = _alike(root, everything, scans, problems, bad, found.settings)
    coding = _coding(root, found, reader, scans, bad)
    for item in found.items:
        if item.name in scans and item.name not in bad and (problem := _unknown_labels(item, scans[item.name], coding)):
            problems.append(problem)
            bad.add(item.name)
    labelled = [scans[i.name] for i in found.items if i.name in scans and i.name not in bad]
    measured = labelled or [scans[i.name] for i in found.unlabelled if i.name in scans and i.name not in bad]
    print_ = None
    if measured:
        said += "".join(digest([p]) for p in found.files)
        print_ = dataclasses.replace(summarise(measured, channels, found.settings.spacing, said), **label_statistics(labelled, coding))
    seen = _Examined(print_, coding, problems, bad)
    save_cache(key, _keep(seen))
    return seen


def _files(item: Item) -> list[Path]:
    return [*item.images, *(p for p in (item.mask, item.valid) if p is not None)]


def _scan(item: Item, reader: _Reader, samples: int) -> Scan:
    image = reader.image(item)
    header = read_geometry(item.images[0]) if is_volume(item.images[0]) else read_header(item.images[0])
    scan = scan_image(image, header.bit_depth, samples)
    turned = ""
    if isinstance(header, Geometry):
        scan.spacing = header.spacing
        for path in _files(item)[1:]:
            if is_volume(path) and (other := read_geometry(path)).size == header.size:
                _same_place(path, other, header)
    elif header.orientation >= 5:
        turned = " (after its EXIF orientation)"

    def same_size(array: np.ndarray, path: Path) -> None:
        if array.shape != scan.size:
            raise InputError(
                f"{path} is {_written(array.shape)} and its image {_written(scan.size)}{turned}; export the two in the same size"
            )

    inside = reader.inside(item)
    if inside is not None and item.valid is not None:
        same_size(inside, item.valid)
    if item.mask is not None:
        raw = reader.raw(item)
        same_size(raw, item.mask)
        scan.values = scan_mask(raw, inside, pieces=raw.ndim == 2)
        scan.outside = 0 if inside is None else int(inside.size - inside.sum())
    elif item.coco is not None and reader.notes is not None:
        stated = reader.notes.sizes[item.coco]
        if stated != scan.size:
            size = f"{_written(scan.size)}{turned}"
            raise InputError(
                f"{item.images[0]} is {size} and {item.coco[0].name} says {stated[1]}x{stated[0]}; annotate the file that is here"
            )
        if reader.notes.masks:
            classes, numbers = reader.drawn(item)
            scan.values, scan.objects = scan_mask(classes), int(numbers.max(initial=0))
    scan.digest = f"{item.name} {digest(_files(item))}"
    return scan


def _written(size: Sequence[int]) -> str:
    """Pictures as width x height; volumes as depth x height x width."""
    return "x".join(map(str, size if len(size) == 3 else size[::-1]))


def _same_place(path: Path, geometry: Geometry, image: Geometry) -> None:
    """Voxels of one volume lie on those of another, to half a voxel."""
    if (apart := geometry.apart(image)) > 0.5 * max(image.spacing):
        raise InputError(f"{path} lies elsewhere than its image (up to {apart:.1f} mm off); save it with the image's affine")


def _problem(item: Item, error: InputError) -> Problem:
    """An error's one line, ``FILE what; fix``, in its parts."""
    text = str(error)
    known = [*_files(item), *([item.coco[0]] if item.coco else [])]
    path = max((p for p in known if text.startswith(str(p))), key=lambda p: len(str(p)), default=known[0])
    what, _, fix = text.removeprefix(str(path)).lstrip(" :").rpartition("; ")
    return Problem(path, what, fix)


def _alike(root: Path, items: Sequence[Item], scans: dict[str, Scan], problems: list[Problem], bad: set[str], settings: Settings) -> int:
    """How many channels the set has. Images of another type than most, or whose channels cannot be brought in line, are problems."""
    if not scans:
        return 0
    dtype = Counter(s.dtype for s in scans.values()).most_common(1)[0][0]
    here = Counter(s.channels for s in scans.values() if s.dtype == dtype)
    # Grey, RGB and alpha go into each other: RGB if any has colour. Other numbers of channels do not, nor do those of volumes.
    apart = max(here) > 4 or any(len(s.size) == 3 for s in scans.values())
    channels = here.most_common(1)[0][0] if len(here) == 1 or apart else 3 if max(here) >= 3 else 1
    for item in items:
        scan = scans.get(item.name)
        if scan is None:
            continue
        if scan.dtype != dtype:
            problems.append(Problem(item.images[0], f"is {scan.dtype} where most images are {dtype}", "save all alike"))
            bad.add(item.name)
        elif scan.channels != channels and (apart or max(scan.channels, channels) > 4):
            problems.append(Problem(item.images[0], f"has {scan.channels} channels where most images have {channels}", "save all alike"))
            bad.add(item.name)
    if settings.channels is not None and len(settings.channels) != channels:
        named = f"{len(settings.channels)} channels are named ({', '.join(settings.channels)})"
        raise InputError(f"{root}: {named} and the images have {channels}; correct {SETTINGS} or dataset.json")
    return channels


def _coding(root: Path, found: Found, reader: _Reader, scans: dict[str, Scan], bad: set[str]) -> Coding:
    if reader.notes is not None:
        names = reader.notes.names
        return Coding(reader.notes.masks, names, (*((i, i) for i in range(len(names))), (IGNORE, IGNORE)), "categories by id")
    masks = [s.values for i in found.items if i.name not in bad and (s := scans.get(i.name)) and s.values]
    if not masks:
        return Coding(False, (), (), "no labels")
    coding = decide(masks, found.settings, found.label_folder, root)
    if coding.instances:
        for scan in scans.values():
            scan.objects = sum(coding.class_of(v) == 1 for v in scan.values.counts) if scan.values else 0
    return coding


def _unknown_labels(item: Item, scan: Scan, coding: Coding) -> Problem | None:
    if scan.values is None or item.mask is None:
        return None
    unknown = coding.unknown(scan.values.counts)
    if not unknown:
        return None
    listed = ", ".join(str(v) if v < 1 << 24 else f"#{v - (1 << 24):06x}" for v in sorted(unknown)[:4]) + (
        " ..." if len(unknown) > 4 else ""
    )
    known = f"{coding.rule}: {', '.join(coding.names[:6])}{' ...' if len(coding.names) > 6 else ''}"
    return Problem(
        item.mask,
        f"holds the labels {listed}, which are none of the {len(coding.names)} classes ({known})",
        f"correct it or the classes in {SETTINGS}",
    )


def _keep(seen: _Examined) -> dict[str, Any]:
    return {
        "fingerprint": dataclasses.asdict(seen.fingerprint) if seen.fingerprint else None,
        "coding": dataclasses.asdict(seen.coding),
        "problems": [[str(p.path), p.what, p.fix] for p in seen.problems],
        "bad": sorted(seen.bad),
    }


def _recall(kept: dict[str, Any]) -> _Examined | None:
    """The inverse of ``_keep``; None when a file in the cache is not one of ours."""
    try:
        coding = kept["coding"]
        return _Examined(
            Fingerprint.from_dict(kept["fingerprint"]) if kept["fingerprint"] else None,
            Coding(coding["instances"], tuple(coding["names"]), tuple((v, c) for v, c in coding["codes"]), coding["rule"]),
            [Problem(Path(path), what, fix) for path, what, fix in kept["problems"]],
            set(kept["bad"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
