"""Pictures of words or lines with what they say: a table of crops, or pages with quadrilaterals.

Understood are ``labels.csv`` (any CSV will do) with the columns file and text, and maybe split, and ``annotations.json``, which has for each page
in ``images`` its words: ``{"words": [{"quad": [x1, y1, ... x4, y4], "text": "..."}]}``, corners clockwise from the top left one in pixels.
Crops of pages are made when they are asked for, and turned upright.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from scipy import ndimage

from paperworks.data import splits
from paperworks.data.collection import Collection, Memory
from paperworks.data.fingerprint import Fingerprint, Scan, cache_key, load_cache, run, samples_per_image, save_cache, scan_image, summarise
from paperworks.data.images import IMAGE_SUFFIXES, read_header, read_image
from paperworks.data.labels import read_json
from paperworks.data.layouts import SPLITS, Item, Problem
from paperworks.data.packs import source_path
from paperworks.data.sheets import columns, records
from paperworks.errors import InputError

FILE_COLUMNS = ("file", "filename", "image", "path", "name")
TEXT_COLUMNS = ("text", "transcript", "transcription", "word", "words")
TABLE, PAGES = "labels.csv", "annotations.json"
LONGEST = 25
"""Characters of the longest text that is taken; readers have so many steps and one for the end."""
MEMORY = 1 << 29
"""Bytes of decoded images that are kept."""

Quad = tuple[float, ...]
"""x1, y1 ... x4, y4 in pixels of the page, clockwise from the corner at the top left of the text."""


@dataclass(frozen=True)
class WordItem:
    """One word or line."""

    name: str
    """Unique in the data set: the file below the root, or the page and a number."""
    path: Path
    text: str
    split: str = "train"
    quad: Quad | None = None
    """Where on the page; None where the file is the crop."""


@dataclass(frozen=True, kw_only=True)
class WordFolder(Collection[WordItem]):
    """Crops with what they say."""

    _once: Memory = field(repr=False, compare=False)

    @property
    def alphabet(self) -> tuple[str, ...]:
        """Every character of the training texts, in order."""
        return tuple(sorted({c for i in self.split("train") for c in i.text}))

    def image(self, item: WordItem) -> Shaped[np.ndarray, "H W C"]:
        """The crop in the file's own type and range."""
        image = self._once(item.path, lambda: read_image(item.path))
        return image if item.quad is None else crop(image, item.quad)

    def describe(self) -> dict[str, Any]:
        """Everything that a person wants to know before training, as plain values for JSON; the classes are the characters."""
        counts, within = Counter("".join(i.text for i in self.items)), Counter(c for i in self.items for c in set(i.text))
        lengths = sorted(len(i.text) for i in self.items)
        return self.facts(
            classes=[{"name": c, "share": round(counts[c] / counts.total(), 6), "images": within[c]} for c in sorted(counts)],
            lengths={"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]},
            texts=len({i.text for i in self.items}),
        )


def looks_like_words(path: Path) -> bool:
    """A table with the columns file and text, or pages with quadrilaterals and texts."""
    if path.is_file():
        return path.suffix == ".csv" and columns(path, FILE_COLUMNS, TEXT_COLUMNS) is not None
    if (path / TABLE).is_file() and columns(path / TABLE, FILE_COLUMNS, TEXT_COLUMNS) is not None:
        return True
    if not (path / PAGES).is_file():
        return False
    with (path / PAGES).open("rb") as f:  # its beginning says enough; a COCO file of that name may be large
        beginning = f.read(4096)
    return all(word in beginning for word in (b'"words"', b'"quad"', b'"text"'))


def open_words(source: str | Path, *, progress: Callable[[int, int], None] | None = None) -> WordFolder:
    """Open a data set of words.

    Args:
        source: a folder, a CSV, an ``annotations.json`` or ``pack:NAME``.
        progress: called with (files done, files in all).

    Raises:
        InputError: the place does not exist, cannot be understood, or nothing usable is left in it.
    """
    path = source_path(source)
    file = path if path.is_file() else next((path / name for name in (TABLE, PAGES) if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path} has no {TABLE} and no {PAGES}; write a CSV with the columns file and text beside the images")
    root = file.parent
    items, problems = _from_pages(file) if file.suffix == ".json" else _from_table(file)
    if long := [i for i in items if len(i.text) > LONGEST]:
        problems.append(
            Problem(file, f"has {len(long)} texts of more than {LONGEST} characters, which are left out", "split them into words")
        )
    items = [i for i in items if len(i.text) <= LONGEST]
    print_, bad = _examine(root, items, problems, progress)
    items, said = _split([i for i in items if i.path not in bad], root, {i.name for i in items if i.path in bad})
    problems += said
    if print_ is None or not items:
        reason = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        raise InputError(f"{path} holds nothing usable{reason}")
    return WordFolder(
        source=str(source),
        root=root,
        layout="pages" if file.suffix == ".json" else "table",
        items=tuple(items),
        problems=tuple(problems),
        fingerprint=print_,
        _once=Memory(MEMORY),
    )


def crop(page: Shaped[np.ndarray, "H W C"], quad: Quad) -> Shaped[np.ndarray, "h w C"]:
    """What lies in a quadrilateral, upright, at the page's own resolution: its sides' mean lengths are the crop's."""
    corners = np.array(quad).reshape(4, 2)
    top, right, bottom, left = np.linalg.norm(np.roll(corners, -1, 0) - corners, axis=1)
    height, width = max(1, round((left + right) / 2)), max(1, round((top + bottom) / 2))
    v, u = ((np.indices((height, width)) + 0.5).T / (width, height)[::-1]).T  # centres of the crop's pixels in [0, 1]
    a, b, c, d = (corner[:, None, None] for corner in corners)
    x, y = (1 - u) * (1 - v) * a + u * (1 - v) * b + u * v * c + (1 - u) * v * d - 0.5
    planes = [ndimage.map_coordinates(plane, (y, x), order=1, mode="nearest") for plane in np.moveaxis(page, -1, 0)]
    return np.stack(planes, -1)


# --- layouts -----------------------------------------------------------------------------------------------------------------------


def _from_table(path: Path) -> tuple[list[WordItem], list[Problem]]:
    named = columns(path, FILE_COLUMNS, TEXT_COLUMNS)
    if named is None:
        raise InputError(f"{path} has no header with the columns file and text; write file,text[,split] into its first line")
    items: dict[str, WordItem] = {}
    problems: list[Problem] = []
    for number, line in enumerate(records(path), start=2):
        name, text, split = line[named[0]], line[named[1]], line.get("split", "").lower()
        file = next((p for p in (path.parent / name, path.parent / "images" / name) if name and p.is_file()), None)
        if file is None:
            problems.append(Problem(path, f"row {number} names {name!r}, which is not there", "correct the name or remove the row"))
        elif not text:
            problems.append(Problem(path, f"row {number} has no text for {name!r}", "write what it says or remove the row"))
        elif split and split not in SPLITS:
            problems.append(Problem(path, f"row {number} has the split {split!r}", "write train, val or test"))
        elif name in items:
            problems.append(Problem(path, f"row {number} names {name!r} again", "keep one row a file; the first counts"))
        else:
            items[name] = WordItem(name, file, text, SPLITS.get(split, ""))
    return list(items.values()), problems


def _is_pages(content: Any) -> bool:
    """Whether it is what ``annotations.json`` holds, from its first page that has words."""
    if not isinstance(content, dict) or not all(
        isinstance(page, dict) and isinstance(page.get("words"), list) for page in content.values()
    ):
        return False
    first = next((word for page in content.values() for word in page["words"]), None)
    return isinstance(first, dict) and {"quad", "text"} <= set(first)


def _from_pages(path: Path) -> tuple[list[WordItem], list[Problem]]:
    content = read_json(path)
    if not _is_pages(content):
        raise InputError(f'{path} is not understood; write {{"page": {{"words": [{{"quad": [x1, y1, ..., x4, y4], "text": "..."}}]}}}}')
    items: list[WordItem] = []
    problems: list[Problem] = []
    files = {
        p.stem: p for folder in (path.parent, path.parent / "images") if folder.is_dir() for p in sorted(folder.iterdir()) if _is_image(p)
    }
    for page, found in content.items():
        file = files.get(page) or files.get(Path(page).stem)
        if file is None:
            problems.append(Problem(path, f"describes the page {page!r}, whose picture is not there", "put it into images/"))
            continue
        for number, word in enumerate(found["words"]):
            quad, text = word.get("quad"), str(word.get("text") or "").strip()
            if not _is_quad(quad):
                problems.append(
                    Problem(path, f"{page}, word {number}: {quad!r} is no quadrilateral", "write eight numbers, x1, y1, ..., x4, y4")
                )
            elif text:  # what nobody could read has no text
                items.append(WordItem(f"{page}/{number:03d}", file, text, "", tuple(float(v) for v in quad)))
    return items, problems


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _is_quad(quad: Any) -> bool:
    return isinstance(quad, list) and len(quad) == 8 and all(isinstance(v, int | float) and math.isfinite(v) for v in quad)


def _split(items: list[WordItem], root: Path, bad: set[str]) -> tuple[list[WordItem], list[Problem]]:
    """Who trains and who judges. Words of a page stay together."""
    pages = {_page(i): i for i in items}
    excluded = {name.rpartition("/")[0] or name for name in bad} if any(i.quad for i in items) else bad
    given = [Item(name=name, images=(i.path,), split=i.split or None) for name, i in pages.items()]
    assigned, problems = splits.assign(given, root, excluded)
    split = {i.name: i.split for i in assigned}
    return [dataclasses.replace(i, split=split[_page(i)] or "train") for i in items if _page(i) in split], problems


def _page(item: WordItem) -> str:
    return item.name if item.quad is None else item.name.rpartition("/")[0]


# --- looking through ---------------------------------------------------------------------------------------------------------------


def _examine(
    root: Path, items: Sequence[WordItem], problems: list[Problem], progress: Callable[[int, int], None] | None
) -> tuple[Fingerprint | None, set[Path]]:
    """The fingerprint, and files that cannot be used, whose problems are added."""
    files = sorted({i.path for i in items})
    said = json.dumps([[i.name, i.text, i.quad] for i in items])
    key = cache_key(root, files, "words" + said)
    if (kept := load_cache(key)) is not None and "words" in kept:
        problems += [Problem(Path(p), what, fix) for p, what, fix in kept["problems"]]
        return Fingerprint.from_dict(kept["words"]) if kept["words"] else None, {Path(p) for p in kept["bad"]}
    samples = samples_per_image(len(items))
    of_file: dict[Path, list[WordItem]] = {}
    for item in items:
        of_file.setdefault(item.path, []).append(item)
    results = run(files, lambda file: _scan(file, of_file[file], samples), progress)
    found = [Problem(f, *_reason(f, r)) for f, r in zip(files, results) if isinstance(r, InputError)]
    scans = {f: r for f, r in zip(files, results) if not isinstance(r, InputError)}
    channels, found_odd = _alike(scans)
    found += found_odd
    bad = {p.path for p in found}
    usable = [scan for f, group in scans.items() if f not in bad for scan in group]
    print_ = summarise(usable, channels, None, said) if usable else None
    rows = [[str(p.path), p.what, p.fix] for p in found]
    save_cache(key, {"words": dataclasses.asdict(print_) if print_ else None, "bad": sorted(map(str, bad)), "problems": rows})
    problems += found
    return print_, bad


def _reason(path: Path, error: InputError) -> tuple[str, str]:
    what, _, fix = str(error).removeprefix(str(path)).lstrip(": ").partition("; ")
    return what, fix or "replace it"


def _scan(file: Path, items: Iterable[WordItem], samples: int) -> list[Scan]:
    image, depth = read_image(file), read_header(file).bit_depth
    scans = [scan_image(image if i.quad is None else crop(image, i.quad), depth, samples) for i in items]
    scans[0].digest = f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"
    return scans


def _alike(scans: dict[Path, list[Scan]]) -> tuple[int, list[Problem]]:
    """The channels that the set is read with, and images that do not fit; colour wins over grey, alpha is dropped."""
    kinds = Counter((s[0].channels, s[0].dtype) for s in scans.values())
    if not kinds:
        return 1, []
    dtype = Counter(s[0].dtype for s in scans.values()).most_common(1)[0][0]
    channels = 3 if any(c > 2 for c, _ in kinds) else 1
    odd = [f for f, s in scans.items() if s[0].dtype != dtype or s[0].channels > 4]
    return channels, [Problem(f, f"is of another type than most, which are {dtype}", "convert it or remove it") for f in odd]
