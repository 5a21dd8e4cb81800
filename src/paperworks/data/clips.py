"""Films with one label each: class folders of video files or of folders of frames, or a table ``clips.csv``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from paperworks.data import splits
from paperworks.data.classes import ClassItem
from paperworks.data.collection import Collection
from paperworks.data.films import VIDEO_SUFFIXES, Film, frames_in, is_film, numbered, open_film
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
from paperworks.data.images import IMAGE_SUFFIXES, guarded
from paperworks.data.layouts import SPLITS, Item, Problem, is_hidden
from paperworks.data.packs import source_path
from paperworks.data.sheets import columns, records
from paperworks.errors import InputError

TABLE = "clips.csv"
CLIP_COLUMNS = ("clip", "film", "video", "file", "path", "name")
LABEL_COLUMNS = ("label", "class", "category", "action")
GROUP_COLUMNS = ("group", "sequence")
SUFFIXES = VIDEO_SUFFIXES | {".gif"}
LOOKED_AT = 8
"""Frames of each film that are decoded for the mean, the deviation and the range of a data set."""
MEMORY = 1 << 30
"""Bytes of decoded films that a ``ClipFolder`` keeps."""


class GifFilm(Film):
    """An animated GIF, read without PyAV: grey where all its pixels are, otherwise red, green and blue."""

    def __init__(self, path: Path) -> None:
        self.frames = guarded(path, lambda: _gif(path))
        super().__init__(path, numbered(len(self.frames)), self.frames.shape[1:], "uint8")

    def read(self, index: int) -> np.ndarray:
        """Recall a frame."""
        return self.frames[index]


def _gif(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)])
    return frames[..., :1] if (frames == frames[..., :1]).all() else frames


def is_clip(path: Path) -> bool:
    """A video, an animated GIF, a TIFF file with several pages, or a folder with the frames of a film."""
    if path.is_dir():
        return sum(frame.suffix.lower() != ".gif" for frame in frames_in(path)) > 1
    return path.suffix.lower() in SUFFIXES or is_film(path)


def open_clip(path: Path) -> Film:
    """Open a film of two frames or more.

    Raises:
        InputError: it cannot be read, or is one picture.
    """
    film = GifFilm(path) if path.suffix.lower() == ".gif" else open_film(path)
    if len(film) < 2:
        raise InputError(f"{path} is one picture; give a film of two frames or more")
    return film


@dataclass(frozen=True, kw_only=True)
class ClipFolder(Collection[ClassItem]):
    """Films with a class each; the fingerprint's sizes are frames, height and width."""

    classes: tuple[str, ...]
    _kept: dict[str, Film] = field(repr=False, compare=False, default_factory=dict)

    def film(self, item: ClassItem) -> Film:
        """Open a film, or recall it; those that fit into ``MEMORY`` together stay decoded."""
        if item.name in self._kept:
            return self._kept[item.name]
        film = open_clip(item.path)
        film.keep = _bytes(film)
        if sum(map(_bytes, self._kept.values())) + film.keep <= MEMORY:
            self._kept[item.name] = film
        return film

    def describe(self) -> dict[str, Any]:
        """Everything that a person wants to know before training, as plain values for JSON."""
        counts, (low, middle, high) = Counter(i.label for i in self.items), self._sizes()
        return self.facts(
            labelled=len(self.items),
            frames={"min": low[0], "median": middle[0], "max": high[0]},
            sizes={"min": low[1:], "median": middle[1:], "max": high[1:]},
            classes=[
                {"name": name, "share": round(counts[i] / len(self.items), 6), "films": counts[i]} for i, name in enumerate(self.classes)
            ],
        )

    def _sizes(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.fingerprint.min_size), list(self.fingerprint.median_size), list(self.fingerprint.max_size)


def _bytes(film: Film) -> int:
    return len(film) * int(np.prod(film.shape)) * np.dtype(film.dtype).itemsize


@dataclass
class _Row:
    """A film before it was looked at."""

    name: str
    path: Path
    label: str
    split: str | None = None
    group: str | None = None


def looks_like_clips(path: Path) -> bool:
    """``clips.csv``, or two class folders or more that hold videos or numbered frames in folders; from names and one line alone."""
    table = path / TABLE if path.is_dir() else path
    if table.name == TABLE and table.is_file():
        return columns(table, CLIP_COLUMNS, LABEL_COLUMNS) is not None
    return path.is_dir() and len({folder.name for folder, _ in _class_folders(path) if any(map(_named_like_a_clip, folder.iterdir()))}) > 1


def _named_like_a_clip(path: Path) -> bool:
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    frames = sorted(p.stem for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES - {".gif"})
    ends = [re.fullmatch(r"(.*?)(\d+)", stem) for stem in frames]
    if len(frames) < 2 or not all(ends):
        return False
    numbers = sorted(int(e[2]) for e in ends if e)
    return len({e[1] for e in ends if e}) == 1 and numbers[-1] - numbers[0] == len(numbers) - 1


def open_clips(source: str | Path, *, progress: Callable[[int, int], None] | None = None) -> ClipFolder:
    """Open a data set of films with one label each.

    Understood are class folders (``root/CLASS/film.mp4``, ``root/train/CLASS/film/001.jpg``) and a CSV with the columns clip and label (and split,
    group), as ``clips.csv`` in the folder or by itself; a clip of it is a file or a folder of frames below the table, or below ``clips`` beside it.
    Every film is opened once, to find what is broken and to measure the rest; what was found is kept until a file changes.

    Args:
        source: a folder, a CSV or ``pack:NAME``.
        progress: called with (films done, films in all).

    Raises:
        InputError: the place does not exist, cannot be understood, or nothing usable is left in it.
    """
    path = source_path(source)
    root = path if path.is_dir() else path.parent
    table = path / TABLE if path.is_dir() else path
    if table.is_file():
        layout, (rows, problems) = "table", _from_csv(table)
    else:
        layout, rows, problems = "class folders", _from_folders(path), []
    if not rows:
        raise InputError(
            str(problems[0]) if problems else f"{path} holds no films in folders named by class; give those, or {TABLE} with clip and label"
        )
    names = sorted({r.label for r in rows})
    print_, bad = _examine(root, rows, problems, progress, json.dumps([layout, names]))
    usable = {r.name: r for r in rows if r.name not in bad}
    given = [Item(name=r.name, images=(r.path,), split=r.split, group=r.group) for r in usable.values()]
    items, said = splits.assign(given, root, bad)
    problems += said
    if print_ is None or not items:
        raise InputError(f"{path} holds nothing usable; the first of {len(problems)} problems: {problems[0]}")
    found = [ClassItem(i.name, usable[i.name].path, names.index(usable[i.name].label), i.split or "train") for i in items]
    return ClipFolder(
        source=str(source),
        root=root,
        layout=layout,
        items=tuple(sorted(found, key=lambda i: i.name)),
        classes=tuple(names),
        problems=tuple(problems),
        fingerprint=print_,
    )


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not is_hidden(p, path))


def _class_folders(root: Path) -> list[tuple[Path, str | None]]:
    """(folder, split) of every folder that stands for a class."""
    split = [(c, SPLITS[c.name.lower()]) for c in _folders(root) if c.name.lower() in SPLITS]
    return [(folder, side) for place, side in split or [(root, None)] for folder in _folders(place)]


def _from_folders(root: Path) -> list[_Row]:
    if not root.is_dir():
        raise InputError(f"{root} is no table and no folder; give a folder of class folders, or {TABLE}")
    return [
        _Row(film.relative_to(root).as_posix(), film, folder.name, split)
        for folder, split in _class_folders(root)
        for film in sorted(folder.iterdir())
        if not is_hidden(film, root) and is_clip(film)
    ]


def _from_csv(path: Path) -> tuple[list[_Row], list[Problem]]:
    named = columns(path, CLIP_COLUMNS, LABEL_COLUMNS)
    if named is None:
        raise InputError(f"{path} has no header with the columns clip and label; write clip,label[,split] into its first line")
    rows: dict[str, _Row] = {}
    problems: list[Problem] = []
    for number, line in enumerate(records(path), start=2):
        name, label, split = line[named[0]], line[named[1]], line.get("split", "").lower()
        film = next((p for p in (path.parent / name, path.parent / "clips" / name) if name and p.exists()), None)
        if film is None or not is_clip(film):
            what = f"names {name!r}, which is not there" if film is None else f"names {name!r}, which is no film"
            problems.append(Problem(path, f"row {number} {what}", "correct the name or remove the row"))
        elif not label:
            problems.append(Problem(path, f"row {number} gives {name!r} no label", "write its class"))
        elif split and split not in SPLITS:
            problems.append(Problem(path, f"row {number} has the split {split!r}", "write train, val or test"))
        elif name in rows:
            problems.append(Problem(path, f"row {number} names {name!r} again", "keep one row a clip; the first counts"))
        else:
            group = next((line[c] for c in GROUP_COLUMNS if line.get(c)), None)
            rows[name] = _Row(name, film, label, SPLITS.get(split), group)
    return list(rows.values()), problems


def _examine(
    root: Path, rows: Sequence[_Row], problems: list[Problem], progress: Callable[[int, int], None] | None, said: str
) -> tuple[Fingerprint | None, set[str]]:
    """The fingerprint, and names of films that cannot be used, whose problems are added."""
    said += json.dumps([["clip", r.name, r.label] for r in rows])
    files = [p for r in rows for p in (frames_in(r.path) if r.path.is_dir() else [r.path])]
    key = cache_key(root, files, said)
    kept = load_cache(key) or {}
    if "clips" not in kept:
        samples = samples_per_image(len(rows))
        results = run(rows, lambda r: _scan(r, samples), progress)
        found = [(r, *_reason(r.path, x)) for r, x in zip(rows, results) if isinstance(x, InputError)]
        scans = [(r, x) for r, x in zip(rows, results) if isinstance(x, Scan)]
        channels, dtype = _commonest(s for _, s in scans)
        odd = [(r, s) for r, s in scans if s.dtype != dtype or s.channels not in (1, channels)]
        what = f"where most films are {dtype} with {channels}"
        found += [(r, f"is {s.dtype} with {s.channels} channels {what}", "convert it or remove it") for r, s in odd]
        alike = [s for _, s in scans if s.dtype == dtype and s.channels in (1, channels)]
        print_ = summarise(alike, channels, None, said) if alike else None
        kept = {
            "clips": dataclasses.asdict(print_) if print_ else None,
            "bad": [r.name for r, *_ in found],
            "problems": [[str(r.path), what, fix] for r, what, fix in found],
        }
        save_cache(key, kept)
    problems += [Problem(Path(p), what, fix) for p, what, fix in kept["problems"]]
    return Fingerprint.from_dict(kept["clips"]) if kept["clips"] else None, set(kept["bad"])


def _commonest(scans: Iterable[Scan]) -> tuple[int, str]:
    """Channels and type that the set is read with; colour wins over grey."""
    scans = list(scans)
    channels = Counter(s.channels for s in scans if s.channels > 1) or Counter([1])
    return channels.most_common(1)[0][0], Counter(s.dtype for s in scans).most_common(1)[0][0] if scans else ""


def _reason(path: Path, error: InputError) -> tuple[str, str]:
    what, _, fix = str(error).removeprefix(str(path)).lstrip(": ").partition("; ")
    return what, fix or "replace it"


def _scan(row: _Row, samples: int) -> Scan:
    """Size of the whole film, sums of some of its frames as if they were those of all."""
    film = open_clip(row.path)
    places = np.linspace(0, len(film) - 1, min(len(film), LOOKED_AT)).round().astype(int)
    frames = np.stack([film.frame(int(i)) for i in places])
    if not np.isfinite(frames).all():
        raise InputError(f"{row.path} has NaN or infinite pixels; replace them by numbers")
    scan = scan_image(frames, 8 * frames.itemsize, samples)
    share = len(film) / len(frames)
    name = f"{row.name} {digest(film.files())}"
    return dataclasses.replace(
        scan, size=(len(film), *frames.shape[1:3]), total=scan.total * share, squares=scan.squares * share, digest=name
    )
