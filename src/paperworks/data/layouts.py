"""Which files belong together: the ways in which people lay out images and masks.

A layout is found from names only, but for one case: two sibling folders of which neither name says which holds the masks.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paperworks.data.images import COLOUR
from paperworks.data.labels import SETTINGS, Settings, read_json
from paperworks.data.nifti import is_readable, is_volume, read_mask_or_labels, stem
from paperworks.errors import InputError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Folder names that are a split."""
_IMAGES = {"images", "image", "imgs", "img", "input", "inputs", "raw", "jpegimages", "photos", "frames"}
_LABELS = {
    *(
        "masks",
        "mask",
        "labels",
        "label",
        "annotations",
        "annotation",
        "gt",
        "groundtruth",
        "ground_truth",
        "segmentations",
        "segmentation",
    ),
    *("segmentationclass", "seg", "segs", "targets", "target", "instances", "instance", "instance_masks", "instance_labels"),
}
_VALID = {"fov", "roi", "valid_region"}
_UNLABELLED = {"unlabelled", "unlabeled"}
_MASK_ENDINGS = ("_masks", "_mask", "_labels", "_label", "_segmentation", "_seg", "_gt", "_instances")
_IMAGE_ENDINGS = ("_image", "_img")
_OTHER_VOLUMES = (".dcm", ".mha", ".mhd", ".nrrd", ".mgz", ".img")


_CHANNEL = re.compile(r"_\d{4}$")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image with what is known of it."""

    name: str
    """Unique in the data set: the path without extension and without the folder that holds images, ``/`` between parts."""
    images: tuple[Path, ...]
    """One file, or several whose channels are put one after another."""
    mask: Path | None = None
    valid: Path | None = None
    """A picture that is 0 where the labels do not count (outside the field of view, say)."""
    coco: tuple[Path, int] | None = None
    """Annotation file and image id."""
    split: str | None = None
    """``train``, ``val`` or ``test``."""
    group: str | None = None
    """Items of one group (a patient, a film) are never on both sides of the split."""


@dataclass(frozen=True)
class Problem:
    """Something in the data that a person should put right; what it concerns is left out."""

    path: Path
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}; {self.fix}"


@dataclass
class Found:
    """What a layout says, before any pixel is decoded."""

    layout: str
    items: list[Item] = field(default_factory=list)
    unlabelled: list[Item] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    label_folder: str = ""
    settings: Settings = field(default_factory=Settings)
    files: list[Path] = field(default_factory=list)
    """Further files that the meaning of the data depends on."""


@dataclass(frozen=True)
class _Place:
    """A folder with image files, read as words: a split, a role, and the rest of its path, which becomes part of the name."""

    path: Path
    files: tuple[Path, ...]
    split: str | None
    role: str
    """images, labels, valid, unlabelled, or empty."""
    word: str
    """The folder's name that says the role; for an unknown one its first part that is no split."""
    rest: tuple[str, ...]

    def named(self, word: str | None = None) -> list[tuple[str, Path]]:
        """(name, file) of each file; ``word`` is left out of the names."""
        rest = list(self.rest)
        if word in rest:
            rest.remove(word)
        return [("/".join([*rest, _stem(file)]), file) for file in self.files]


def find(root: Path, settings: Settings, labelled: bool = True) -> Found:
    """Find images and masks below ``root``.

    Raises:
        InputError: there are no images, or several folders could be the masks.
    """
    if (root / "imagesTr").is_dir():
        return _nnunet(root, settings)
    places = _places(root, settings)
    if not places:
        volumes = next((p for p in root.rglob("*") if p.name.lower().endswith(_OTHER_VOLUMES)), None)
        if volumes is not None:
            raise InputError(f"{volumes} is a volume of a kind that is not read here; convert it to NIfTI (.nii.gz)")
        raise InputError(f"{root} holds no images; put them into {root / 'images'} and the masks of the same names into {root / 'masks'}")
    if not labelled:
        named = [(name, file, p.split) for p in places if p.role not in ("labels", "valid") for name, file in p.named()]
        found = Found("images", settings=settings)
        images = _unique(named, found.problems)
        found.unlabelled = [Item(name=n, images=(f,), split=s) for n, (f, s) in images.items()]
        return found
    return _folders(root, places, settings)


def _stem(path: Path) -> str:
    return unicodedata.normalize("NFC", stem(path))


def is_hidden(path: Path, root: Path) -> bool:
    """Files that systems leave behind: ``._a.png``, ``__MACOSX``, ``.ipynb_checkpoints``."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)


def _places(root: Path, settings: Settings) -> list[_Place]:
    folders: dict[Path, list[Path]] = defaultdict(list)
    readable = [p for p in sorted(root.rglob("*")) if is_readable(p) and not is_hidden(p, root)]
    volumes = 2 * sum(map(is_volume, readable)) > len(readable)  # the few of the other kind are previews, or something else beside the data
    for path in readable:
        if is_volume(path) == volumes:
            folders[path.parent].append(path)
    return [_read_place(folder, files, root, settings) for folder, files in sorted(folders.items())]


def _read_place(folder: Path, files: Sequence[Path], root: Path, settings: Settings) -> _Place:
    split, role, word, rest = None, "", "", []
    for part in folder.relative_to(root).parts:
        low = part.lower()
        said = _role(part, settings)
        if said and not role:
            role, word = said, part
            continue
        if low in SPLITS and split is None:
            split = SPLITS[low]
        rest.append(part)
    if not role:
        word = next((part for part in rest if part.lower() not in SPLITS), "")
    return _Place(folder, tuple(files), split, role, word, tuple(rest))


def _role(part: str, settings: Settings) -> str:
    if settings.images is not None and part == settings.images:
        return "images"
    if settings.labels is not None and part == settings.labels:
        return "labels"
    low = part.lower()
    if low in _VALID:
        return "valid"
    if low in _UNLABELLED:
        return "unlabelled"
    if low in _IMAGES and settings.images is None:
        return "images"
    return "labels" if low in _LABELS and settings.labels is None else ""


# --- folders of images and masks -----------------------------------------------------------------------------------------------------


def _folders(root: Path, places: list[_Place], settings: Settings) -> Found:
    images = [p for p in places if p.role == "images"]
    labels = [p for p in places if p.role == "labels"]
    other = [p for p in places if p.role == ""]
    layout = "images and masks in folders"
    if not labels:
        if pairs := _same_folder(root, places, settings):
            return pairs
        if images:
            labels = _sharing(other, _names(images), root, "masks")
        else:
            images, labels = _siblings(root, other)
            layout = "two folders with the same names"
    elif not images:
        images = _sharing(other, _names(labels), root, "images")
    if len({p.word for p in labels}) > 1:
        labels = _sharing(labels, _names(images), root, "masks")

    found = Found(layout if labels else "images", settings=settings, label_folder=labels[0].word if labels else "")
    word = {p.word for p in images if not p.role}
    named_images = [(n, f, p.split) for p in images for n, f in p.named(next(iter(word), None))]
    named_masks = [(n, f, p.split) for p in labels for n, f in p.named(p.word)]
    named_valid = [(n, f, p.split) for p in places if p.role == "valid" for n, f in p.named()]
    _pair(found, named_images, named_masks, named_valid)
    more = _unique([(n, f, p.split) for p in places if p.role == "unlabelled" for n, f in p.named()], found.problems)
    taken = {i.name for i in (*found.items, *found.unlabelled)}
    found.unlabelled += [Item(name=n if n not in taken else f"unlabelled/{n}", images=(f,)) for n, (f, _) in more.items()]
    return found


def _names(places: Iterable[_Place]) -> set[str]:
    return {_bare(n) for p in places for n, _ in p.named(p.word)}


def _bare(name: str) -> str:
    """A name without the ending that says what it is: a_mask -> a."""
    ending = next((e for e in (*_MASK_ENDINGS, *_IMAGE_ENDINGS) if name.lower().endswith(e) and len(name) > len(e)), "")
    return name[: len(name) - len(ending)]


def _sharing(places: Sequence[_Place], names: set[str], root: Path, wanted: str) -> list[_Place]:
    """Of several candidates the one folder whose files have the same names."""
    words = sorted({p.word for p in places if names & _names([p])})
    if len(words) > 1:
        key = "labels" if wanted == "masks" else "images"
        listed = ", ".join(w or "." for w in words)
        raise InputError(
            f'{root}: the folders {listed} could all hold the {wanted}; say which in {root / SETTINGS}: {{"{key}": "{words[-1]}"}}'
        )
    return [p for p in places if words and p.word == words[0]]


def _siblings(root: Path, places: list[_Place]) -> tuple[list[_Place], list[_Place]]:
    """Two folders with files of the same names: the one with few values per picture holds the masks."""
    by_word: dict[str, list[_Place]] = defaultdict(list)
    for place in places:
        by_word[place.word].append(place)
    pairs = [(a, b) for a in by_word for b in by_word if a < b and _names(by_word[a]) & _names(by_word[b])]
    if not pairs:
        return places, []
    if len(pairs) > 1:
        listed = ", ".join(w or "." for w in sorted({w for pair in pairs for w in pair}))
        raise InputError(
            f'{root}: several of the folders {listed} hold the same names; say in {root / SETTINGS}: {{"images": ..., "labels": ...}}'
        )
    first, second = (by_word[w] for w in pairs[0])
    likely = [_mask_like(p) for p in (first, second)]
    if likely[0] == likely[1]:
        raise InputError(
            f'{root}: cannot tell which of {pairs[0][0]} and {pairs[0][1]} holds the masks; say in {root / SETTINGS}: {{"labels": ...}}'
        )
    return (second, first) if likely[0] else (first, second)


def _mask_like(places: Sequence[_Place]) -> bool:
    """Whether the first few pictures have few values each."""
    for file in [f for p in places for f in p.files][:4]:
        try:
            mask = read_mask_or_labels(file)
        except InputError:
            return False
        if len(np.unique(mask)) > (64 if mask.dtype != np.uint32 or mask.max() >= COLOUR else 4096):
            return False
    return True


def _same_folder(root: Path, places: list[_Place], settings: Settings) -> Found | None:
    """a.png and a_mask.png side by side."""
    images, masks = [], []
    for place in (p for p in places if p.role in ("", "images")):
        stems = {_stem(f) for f in place.files}
        for name, file in place.named():
            stem = _stem(file)
            bare = _bare(stem)
            of = [bare, *(bare + e for e in _IMAGE_ENDINGS)]
            is_mask = bare != stem and not stem.lower().endswith(_IMAGE_ENDINGS) and any(s in stems for s in of)
            (masks if is_mask else images).append((name, file, place.split))
    if not masks:
        return None
    found = Found("images and masks side by side", settings=settings)
    _pair(found, images, masks, [])
    return found


Named = list[tuple[str, Path, str | None]]


def _pair(found: Found, images: Named, masks: Named, valid: Named) -> None:
    """Put images and masks of the same name together; what is left over or double is a problem."""
    image_of = _unique(images, found.problems)
    bare_image = {_bare(name): name for name in image_of}
    mask_of: dict[str, list[Path]] = defaultdict(list)
    doubled = {name for name, _, _ in images} - set(image_of)
    for name, file, _ in masks:
        of = name if name in image_of else bare_image.get(_bare(name))
        if of is not None:
            mask_of[of].append(file)
        elif name not in doubled and _bare(name) not in doubled:
            found.problems.append(Problem(file, "is a mask without an image", "add the image or remove the mask"))
    valid_of = {bare_image.get(_bare(name), name): file for name, file, _ in valid}
    for name, (file, split) in image_of.items():
        files = mask_of.get(name, [])
        if len(files) == 1:
            found.items.append(Item(name=name, images=(file,), mask=files[0], valid=valid_of.get(name), split=split))
        elif files:
            found.problems.append(Problem(files[1], f"is a second mask of {file.name} beside {files[0].name}", "keep one of them"))
        else:
            found.unlabelled.append(Item(name=name, images=(file,), split=split))
            if masks and split != "test":
                found.problems.append(Problem(file, "has no mask", "add one of the same name, or move the image to a folder 'unlabelled'"))


def _unique(named: Named, problems: list[Problem]) -> dict[str, tuple[Path, str | None]]:
    """Name -> (file, split), without the names that several files have."""
    files: dict[str, list[tuple[Path, str | None]]] = defaultdict(list)
    for name, file, split in named:
        files[name].append((file, split))
    for several in files.values():
        for file, _ in several[1:]:
            problems.append(Problem(file, f"has the same name as {several[0][0].name}", "keep one of them or rename it"))
    return {name: several[0] for name, several in files.items() if len(several) == 1}


# --- nnU-Net -------------------------------------------------------------------------------------------------------------------------


def _nnunet(root: Path, settings: Settings) -> Found:
    """nnU-Net's raw format: imagesTr/NAME_0000.png, NAME_0001.png ... (channels), labelsTr/NAME.png, dataset.json.

    Volumes may be those of the Medical Segmentation Decathlon, whose one file a case holds all channels: imagesTr/NAME.nii.gz.
    """
    description: dict[str, Any] = read_json(root / "dataset.json") if (root / "dataset.json").is_file() else {}
    if not isinstance(description, dict):
        raise InputError(f"{root / 'dataset.json'} must be an object with 'labels' and 'channel_names'")
    channels = description.get("channel_names", description.get("modality", {}))
    found = Found("nnU-Net raw", settings=_nnunet_settings(root, description, channels, settings), label_folder="labelsTr")
    for images, labels, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        cases: dict[str, dict[int, Path]] = defaultdict(dict)
        files = [f for f in sorted((root / images).glob("*")) if is_readable(f) and not is_hidden(f, root)]
        masks: dict[str, list[Path]] = defaultdict(list)
        for file in sorted((root / labels).glob("*")):
            if is_readable(file) and not is_hidden(file, root):
                masks[_stem(file)].append(file)
        decathlon = bool(files) and all(is_volume(f) and not _CHANNEL.search(_stem(f)) for f in files)
        for file in files:
            name, _, number = (_stem(file), "", "0000") if decathlon else _stem(file).rpartition("_")
            if not name or len(number) != 4 or not number.isdigit():
                found.problems.append(Problem(file, "does not end in its channel's number", "rename it, such as NAME_0000.png"))
            elif int(number) in cases[name]:
                found.problems.append(Problem(file, f"has the same name as {cases[name][int(number)].name}", "keep one of them"))
            else:
                cases[name][int(number)] = file
        # Not the number of names in dataset.json: one RGB file may hold three of them.
        usual = Counter(map(len, cases.values())).most_common(1)[0][0] if cases else 0
        for name, numbered in cases.items():
            paths = tuple(numbered[i] for i in sorted(numbered))
            if sorted(numbered) != list(range(usual)):
                found.problems.append(
                    Problem(paths[0], f"has the channel files {sorted(numbered)} where most have {usual}", "add the missing ones")
                )
            elif len(masks[name]) == 1:
                found.items.append(Item(name=name, images=paths, mask=masks[name][0], split=split))
            elif masks[name]:
                found.problems.append(
                    Problem(masks[name][1], f"is a second mask of {name} beside {masks[name][0].name}", "keep one of them")
                )
            else:
                found.unlabelled.append(Item(name=name, images=paths, split=split))
                if split is None:
                    found.problems.append(Problem(paths[0], f"has no mask in {labels}", "add it or remove the image"))
        for name in sorted(set(masks) - set(cases)):
            found.problems += [Problem(file, "is a mask without an image", "add the image or remove the mask") for file in masks[name]]
    if not found.items and not found.unlabelled and not found.problems:
        raise InputError(f"{root / 'imagesTr'} holds no images; put NAME_0000.png there and NAME.png into labelsTr")
    return found


def _nnunet_settings(root: Path, description: dict[str, Any], channels: Any, settings: Settings) -> Settings:
    said: dict[str, Any] = {}
    labels = description.get("labels")
    if isinstance(labels, dict) and labels:
        numbers = {(k if isinstance(v, int) else v): (v if isinstance(v, int) else k) for k, v in labels.items()}
        try:
            by_number = {int(i): str(name) for name, i in numbers.items()}
        except (TypeError, ValueError):
            raise InputError(
                f"{root / 'dataset.json'}: 'labels' must map names to numbers (region-based labels are not read here)"
            ) from None
        if sorted(by_number) != list(range(len(by_number))):
            raise InputError(f"{root / 'dataset.json'}: 'labels' must be numbered 0, 1, 2 ... without gaps")
        said["classes"] = tuple(by_number[i] for i in range(len(by_number)))
    if channels:
        said["channels"] = tuple(channels.values()) if isinstance(channels, dict) else tuple(channels)
    spacing = description.get("spacing")
    if spacing is None:
        sidecar = next(iter(sorted((root / "imagesTr").glob("*.json"))), None)
        spacing = read_json(sidecar).get("spacing") if sidecar else None
    if isinstance(spacing, list) and len(spacing) >= 2 and all(isinstance(s, int | float) for s in spacing):
        said["spacing"] = tuple(float(s) for s in spacing[-2:])  # nnU-Net writes a third, meaningless one first for 2-D images
    own = {k: getattr(settings, k) for k in Settings.__dataclass_fields__ if getattr(settings, k) is not None}
    return Settings(**(said | own))
