"""Pages of text with boxes, as text recognition gives them, and the fields that people want from them: receipts, invoices, forms.

A page is a list of segments: a box and what is written in it. Two layouts are read:

- ``annotations.json``: page -> ``width``, ``height``, ``words`` (each a ``quad`` x1, y1 ... x4, y4 or a ``box`` x0, y0, x1, y1, and its
  ``text``) and, where they are known, ``fields`` (name -> value as text). A file with ``words`` at its top is one page.
- tables (CSV): a line a segment with the columns ``x0, y0, x1, y1, text``; ``page`` where a file holds several pages (else a page is called
  as its file); ``field`` where somebody marked the segments. Values may lie beside them in ``fields.csv`` (``page`` and a column a
  field) or ``fields.json`` (page -> field -> value).

Pictures are looked for under ``images``, by the name of the page; nothing but overlays needs them. Coordinates are pixels, or whatever
unit: only their ratios count.

Where a value is known but not where it stands, one rule finds its segments (:func:`locate`).
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from paperworks.data.images import IMAGE_SUFFIXES
from paperworks.data.labels import read_json
from paperworks.data.layouts import Item, Problem, is_hidden
from paperworks.data.packs import source_path
from paperworks.data.sheets import records
from paperworks.data.splits import FILES, assign
from paperworks.errors import InputError

MOST = 256
"""Segments of a page: more make a graph of all pairs too large."""
ALIKE = 0.8
"""From this similarity (difflib's ratio of letters and digits) on, a run of segments is a value that is written otherwise."""
LONGEST = 8
"""Segments of one value."""
FIELDS = ("fields.json", "fields.csv")
COLUMNS = ("x0", "y0", "x1", "y1", "text")


class Segment(NamedTuple):
    """A box and what is written in it."""

    left: float
    top: float
    right: float
    bottom: float
    text: str


class Span(NamedTuple):
    """Characters ``start`` ... ``end`` - 1 of a segment that belong to a field."""

    field: str
    segment: int
    start: int
    end: int
    begins: bool = True
    """It begins a value; others go on with the one of the span before."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Segments in reading order, and what is known of the fields."""

    name: str
    """Unique in the data set."""
    file: Path
    """Where it was read from."""
    width: float
    height: float
    segments: tuple[Segment, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    """Field -> value."""
    spans: tuple[Span, ...] = ()
    """Where the values stand, some in several places; the spans of one place follow one another."""
    picture: Path | None = None
    split: str | None = None

    def place(self, name: str) -> list[Span]:
        """The spans of a field's first place."""
        spans = [s for s in self.spans if s.field == name]
        return spans[: next((i for i, s in enumerate(spans) if i and s.begins), len(spans))]

    def text(self, name: str) -> str:
        """What stands at a field's first place, one segment after the other."""
        return " ".join(self.segments[s.segment].text[s.start : s.end] for s in self.place(name))


@dataclass(frozen=True, kw_only=True)
class Pages:
    """A data set of pages."""

    source: str
    root: Path
    pages: tuple[Page, ...]
    """Those in a split come with it."""
    names: tuple[str, ...]
    """Of the fields, in the order in which they were met."""
    problems: tuple[Problem, ...]
    sha256: str

    def split(self, name: str) -> tuple[Page, ...]:
        """The pages of ``train``, ``val`` or ``test``."""
        return tuple(p for p in self.pages if p.split == name)


# --- reading order and marking ---------------------------------------------------------------------------------------------------------


def reading_order(segments: Sequence[Segment]) -> list[Segment]:
    """Rows from the top, each from the left. A segment is of the row above when its middle lies within that row's first segment."""
    rows: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (s.top + s.bottom, s.left)):
        if rows and (segment.top + segment.bottom) / 2 < rows[-1][0].bottom:
            rows[-1].append(segment)
        else:
            rows.append([segment])
    return [segment for row in rows for segment in sorted(row, key=lambda s: s.left)]


def beside(one: Segment, other: Segment) -> bool:
    """The middle of each lies within the height of the other."""
    return one.top < (other.top + other.bottom) / 2 < one.bottom and other.top < (one.top + one.bottom) / 2 < other.bottom


def locate(segments: Sequence[Segment], name: str, value: str) -> list[Span]:
    """Where a field's value stands on a page.

    1. Within one segment, blanks and case aside, and not inside a longer word or number. Of several places those count that have a segment
       beside them which begins with the field's name (the total is the amount beside "TOTAL:"); where there is none, those with the name in
       their row ("SUB-TOTAL"); where there is none, all of them.
    2. Or in several segments that follow one another: those whose letters and digits are most like the value's, from a ratio of 0.8 on.

    Returns:
        The spans, one for each place in the first case and for each segment of the one place in the second; none where the value is not
        found.
    """
    pattern = r"(?<!\w)(?<!\d[.,])" + r"\s*".join(map(re.escape, "".join(value.split()))) + r"(?!\w)(?![.,]\d)"
    if value[:1] and not value[0].isalnum():
        pattern = pattern.removeprefix(r"(?<!\w)(?<!\d[.,])")
    places = [
        Span(name, i, match.start(), match.end())
        for i, segment in enumerate(segments)
        for match in re.finditer(pattern, segment.text, re.IGNORECASE)
    ]
    if value and places:
        word = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)

        def rank(place: Span) -> int:
            row = [s.text for s in segments if beside(s, segments[place.segment])]
            return 0 if any(map(word.match, row)) else 1 if any(map(word.search, row)) else 2

        ranks = [rank(place) for place in places]
        return [place for place, r in zip(places, ranks) if r == min(ranks)]
    letters = [_letters(s.text) for s in segments]
    wanted, best, found = _letters(value), ALIKE, range(0)
    for start in range(len(segments)):
        for end in range(start + 1, min(start + LONGEST, len(segments)) + 1):
            run = "".join(letters[start:end])
            if len(run) > 1.3 * len(wanted):
                break
            alike = difflib.SequenceMatcher(None, run, wanted, autojunk=False)
            if alike.real_quick_ratio() > best and alike.quick_ratio() > best and (ratio := alike.ratio()) > best:
                best, found = ratio, range(start, end)
    return [Span(name, i, 0, len(segments[i].text), i == found[0]) for i in found]


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


# --- files -----------------------------------------------------------------------------------------------------------------------------


def looks_like_pages(path: Path) -> bool:
    """A JSON file of pages, a table with the columns of segments, or a folder with one of them; the first lines are looked at."""
    if path.is_dir():
        tables = sorted(p for p in path.glob("*.csv") if p.name not in (*FILES, *FIELDS))
        return looks_like_pages(path / "annotations.json") or any(map(looks_like_pages, tables[:1]))
    if not path.is_file() or path.suffix.lower() not in (".json", ".csv"):
        return False
    with path.open("rb") as f:
        head = f.read(4096).decode("utf-8-sig", errors="replace")
    if path.suffix.lower() == ".json":
        return '"words"' in head
    return set(COLUMNS) <= {c.strip().lower() for c in head.partition("\n")[0].split(",")}


def read_pages(path: Path) -> list[Page]:
    """The pages of one JSON file or table.

    Raises:
        InputError: it cannot be read, or a page in it cannot be used; the page and the segment are named.
    """
    if path.suffix.lower() == ".csv":
        return _table(path)
    content = read_json(path)
    if isinstance(content, dict) and "words" in content:
        content = {path.stem: content}
    if not isinstance(content, dict) or not all(isinstance(entry, dict) and "words" in entry for entry in content.values()):
        raise InputError(
            f'{path} holds no pages; it must be an object such as {{"page 1": {{"words": [{{"box": [...], "text": "..."}}]}}}}'
        )
    pages = []
    for name, entry in content.items():
        segments = [_word(path, name, i, word) for i, word in enumerate(entry["words"], start=1)]
        fields = entry.get("fields", {})
        if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
            raise InputError(f"{path}, page {name!r}: fields must map names to texts; put quotes around the values")
        size = entry.get("width"), entry.get("height")
        pages.append(_page(path, name, segments, {k: _clean(v) for k, v in fields.items() if _clean(v)}, size))
    return pages


def _word(path: Path, page: str, number: int, word: Any) -> Segment:
    where = f"{path}, page {page!r}, word {number}"
    try:
        numbers = [float(v) for v in (word["quad"] if "quad" in word else word["box"])]
        text = word["text"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f'{where}: give it a "quad" of 8 numbers or a "box" of 4, and a "text"') from None
    if len(numbers) not in (4, 8) or not isinstance(text, str):
        raise InputError(f'{where}: give it a "quad" of 8 numbers or a "box" of 4, and a "text"')
    return _segment(where, numbers[::2], numbers[1::2], text)


def _segment(where: str, xs: Sequence[float], ys: Sequence[float], text: str) -> Segment:
    if not all(map(math.isfinite, (*xs, *ys))):
        raise InputError(f"{where}: a coordinate is not finite; correct it")
    if max(xs) <= min(xs) or max(ys) <= min(ys):
        raise InputError(f"{where}: the box has no extent; give left, top, right and bottom")
    return Segment(min(xs), min(ys), max(xs), max(ys), _clean(text))


def _clean(text: str) -> str:
    return " ".join(text.split())


def _table(path: Path) -> list[Page]:
    rows = records(path)
    if not rows:
        raise InputError(f"{path} is empty; write a line for each segment under {','.join(COLUMNS)}")
    if lacking := [c for c in COLUMNS if c not in rows[0]]:
        raise InputError(
            f"{path} lacks the column {lacking[0]!r}; a table of segments has {', '.join(COLUMNS)} and may have page and field"
        )
    found: dict[str, list[tuple[Segment, str]]] = {}
    for number, row in enumerate(rows, start=2):
        where = f"{path}, line {number}"
        try:
            left, top, right, bottom = (float(row[c]) for c in COLUMNS[:4])
        except (ValueError, KeyError):
            raise InputError(f"{where}: x0, y0, x1 and y1 must be numbers") from None
        segment = _segment(where, (left, right), (top, bottom), row.get("text", ""))
        found.setdefault(row.get("page", "").strip() or path.stem, []).append((segment, row.get("field", "").strip()))
    pages = []
    for name, entries in found.items():
        page = _page(path, name, [segment for segment, _ in entries], {}, (None, None))
        marks = dict(entries)
        fields = [marks[s] for s in page.segments]
        spans = tuple(
            Span(field, i, 0, len(s.text), i == 0 or fields[i - 1] != field)
            for i, (s, field) in enumerate(zip(page.segments, fields))
            if field
        )
        page = replace(page, spans=spans)
        pages.append(replace(page, fields={s.field: page.text(s.field) for s in spans}))
    return pages


def _page(path: Path, name: str, segments: Sequence[Segment], fields: Mapping[str, str], size: tuple[Any, Any]) -> Page:
    written = [s for s in segments if s.text]
    if not written:
        raise InputError(f"{path}, page {name!r} holds no text; leave it out")
    if len(written) > MOST:
        raise InputError(f"{path}, page {name!r} has {len(written)} segments and at most {MOST} fit; join words to lines or cut the page")
    width, height = (float(v) if isinstance(v, (int, float)) and v > 0 else 0.0 for v in size)
    return Page(
        name=name,
        file=path,
        width=max(width, *(s.right for s in written)),
        height=max(height, *(s.bottom for s in written)),
        segments=tuple(reading_order(written)),
        fields=fields,
    )


def open_pages(source: str | Path, *, progress: Callable[[int, int], None] | None = None) -> Pages:
    """Open a folder, a file or ``pack:NAME``, mark where the values stand and say who is for training.

    Raises:
        InputError: there are no pages, or one cannot be read.
    """
    path = source_path(source)
    root = path if path.is_dir() else path.parent
    files = [path]
    if path.is_dir():
        main = path / "annotations.json"
        tables = (p for p in path.rglob("*") if p.suffix.lower() in (".csv", ".json") and p.name not in (*FILES, *FIELDS))
        files = [main] if main.is_file() else sorted(p for p in tables if not is_hidden(p, path))
    if not files:
        raise InputError(f"{path} holds no pages; put annotations.json there, or tables with {', '.join(COLUMNS)}")
    values = _values(root)
    pages: dict[str, Page] = {}
    for i, file in enumerate(files):
        for page in read_pages(file):
            if page.name in pages:
                raise InputError(f"{file}: page {page.name!r} is in {pages[page.name].file} already; give each page a name of its own")
            pages[page.name] = _marked(
                replace(page, fields={**page.fields, **values.get(page.name, {})}, picture=picture_of(root, page.name))
            )
        if progress:
            progress(i + 1, len(files))
    problems = [
        Problem(
            page.file, f"has {name} {value!r} on no segment of page {page.name!r}", "correct the text or the value; nothing is taught there"
        )
        for page in pages.values()
        for name, value in page.fields.items()
        if not any(s.field == name for s in page.spans)
    ]
    labelled = [page for page in pages.values() if page.fields]
    items, wrong = assign([Item(name=p.name, images=(p.file,)) for p in labelled], root, set(pages) - {p.name for p in labelled})
    splits = {item.name: item.split for item in items}
    names = tuple(dict.fromkeys(name for page in pages.values() for name in page.fields))
    return Pages(
        source=str(source),
        root=root,
        pages=tuple(replace(p, split=splits.get(p.name)) for p in pages.values()),
        names=names,
        problems=(*problems, *wrong),
        sha256=hashlib.sha256(
            repr([(p.name, splits.get(p.name), p.segments, p.fields, p.spans) for p in pages.values()]).encode()
        ).hexdigest(),
    )


def _marked(page: Page) -> Page:
    """With the spans of the values that nobody marked."""
    marked = {s.field for s in page.spans}
    found = [s for name, value in page.fields.items() if name not in marked for s in locate(page.segments, name, value)]
    return replace(page, spans=(*page.spans, *found))


def picture_of(root: Path, name: str) -> Path | None:
    """The picture of a page that lies below the folder of its file, where there is one."""
    places = (root / "images" / f"{name}{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
    return next((p for p in places if p.is_file()), None)


def _values(root: Path) -> dict[str, dict[str, str]]:
    """Page -> field -> value, of ``fields.json`` or ``fields.csv``."""
    path = next((root / name for name in FIELDS if (root / name).is_file()), None)
    if path is None:
        return {}
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
            raise InputError(f'{path} must be an object such as {{"page 1": {{"total": "9.30"}}}}')
        return {page: {k: _clean(str(v)) for k, v in found.items() if _clean(str(v))} for page, found in content.items()}
    rows = records(path, lower=False)
    if not rows or "page" not in rows[0]:
        raise InputError(f"{path} lacks the column 'page'; write page and a column for each field")
    return {row["page"]: {k: _clean(v) for k, v in row.items() if k and k != "page" and _clean(v)} for row in rows}
