"""Pairs of texts: a table with the columns source and target (TSV, CSV), lines of JSON, or two files with the same number of lines.

A folder holds ``pairs.tsv`` (or ``.csv``, ``.jsonl``), or ``train.src`` beside ``train.tgt`` (and ``val.src``, ``val.tgt``). Where nobody says
what validation is, a hash of the source decides.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paperworks.data.bpe import normalised
from paperworks.data.layouts import SPLITS, Problem
from paperworks.data.packs import source_path
from paperworks.errors import InputError

COLUMNS = {"source": ("source", "src"), "target": ("target", "tgt", "translation")}
SUFFIXES = {".tsv": "\t", ".csv": ","}
SHARE = 0.1
"""Share of the sources that the hash puts into validation."""
SHOWN = 20
"""Problems of one kind that are named each."""


@dataclass(frozen=True)
class Pair:
    """Two texts that mean the same."""

    name: str
    """Where it stands: ``pairs.tsv:17``."""
    source: str
    target: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A data set on the disk; what could not be used is in ``problems``."""

    source: str
    layout: str
    items: tuple[Pair, ...] = field(repr=False)
    problems: tuple[Problem, ...] = field(repr=False)
    sha256: str

    def split(self, name: str) -> tuple[Pair, ...]:
        """Pairs of ``train``, ``val`` or ``test``."""
        return tuple(p for p in self.items if p.split == name)

    def describe(self) -> dict[str, Any]:
        """Everything that a person wants to know before training, as plain values for JSON."""
        return {
            "source": self.source,
            "layout": self.layout,
            "items": len(self.items),
            "splits": {s: len(self.split(s)) for s in ("train", "val", "test")},
            "letters": {
                side: {"longest": max(lengths, default=0), "mean": round(sum(lengths) / max(len(lengths), 1), 1)}
                for side in COLUMNS
                for lengths in [[len(getattr(p, side)) for p in self.items]]
            },
            "classes": [],
            "sha256": self.sha256,
            "problems": [{"path": str(p.path), "what": p.what, "fix": p.fix} for p in self.problems],
        }


def looks_like_pairs(path: Path) -> bool:
    """A table or lines of JSON called pairs, a folder with one, or ``train.src`` beside ``train.tgt``."""
    if path.is_dir():
        return _table(path) is not None or ((path / "train.src").is_file() and (path / "train.tgt").is_file())
    return path.stem.lower() == "pairs" and path.suffix.lower() in (*SUFFIXES, ".jsonl")


def open_pairs(source: str | Path) -> Pairs:
    """Open a table, lines of JSON, a folder, or ``pack:NAME``.

    Raises:
        InputError: there are no pairs in it, or it cannot be read.
    """
    path = source_path(source)
    if path.is_dir():
        table = _table(path)
        rows, problems, layout = _rows(table) if table else _beside(path)
    else:
        rows, problems, layout = _rows(path)
    kept: list[Pair] = []
    empty, twice = [], []
    for pair in rows:
        (empty if not pair.source or not pair.target else kept).append(pair)
    held_out = {p.source for p in kept if p.split in ("val", "test")}
    if not any(p.split == "val" for p in kept):
        kept = _by_hash(kept)
    else:
        twice = [p for p in kept if p.split == "train" and p.source in held_out]
        kept = [p for p in kept if not (p.split == "train" and p.source in held_out)]
    for found, what, fix in (
        (empty, "has no source or no target", "fill both or remove it"),
        (twice, "has a source that is held out too", "keep it on one side of the split; it is not trained on"),
    ):
        problems += [Problem(Path(p.name), what, fix) for p in found[:SHOWN]]
        if len(found) > SHOWN:
            problems.append(Problem(path, f"has {len(found) - SHOWN} more pairs of which one {what}", fix))
    if not kept:
        raise InputError(f"{path} holds no pair of texts; write one to a row, with the columns source and target")
    digest = hashlib.sha256(json.dumps([[p.source, p.target, p.split] for p in kept], ensure_ascii=False).encode())
    return Pairs(source=str(source), layout=layout, items=tuple(kept), problems=tuple(problems), sha256=digest.hexdigest())


def read_lines(path: Path) -> list[str]:
    """A text file's lines.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); save it as UTF-8") from None


def _table(folder: Path) -> Path | None:
    return next((p for p in (folder / f"pairs{suffix}" for suffix in (*SUFFIXES, ".jsonl")) if p.is_file()), None)


def _rows(path: Path) -> tuple[list[Pair], list[Problem], str]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows, layout = _json(path), "lines of JSON"
    elif suffix in SUFFIXES:
        try:
            # in a TSV a quotation mark is a letter like any other
            reader = csv.DictReader(
                read_lines(path), delimiter=SUFFIXES[suffix], quoting=csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL, strict=True
            )
            rows, layout = list(enumerate(reader, start=2)), "table"
        except csv.Error as error:
            raise InputError(f"{path} cannot be read as CSV ({error}); save it as UTF-8 with commas, or as TSV") from None
    else:
        raise InputError(
            f"{path} is no table of pairs; give .tsv, .csv or .jsonl with source and target, or a folder with train.src and train.tgt"
        )
    if not rows:
        raise InputError(f"{path} is empty; write one pair to a row, with the columns source and target")
    rows = [(number, {str(key).strip().lower(): value for key, value in row.items()}) for number, row in rows]
    columns = {side: next((c for c in rows[0][1] if c in names), "") for side, names in COLUMNS.items()}
    for side, column in columns.items():
        if not column:
            raise InputError(f"{path} has no column {side}; write source and target (and split, if you like) into its first line")
    pairs, problems = [], []
    for number, row in rows:
        split = str(row.get("split") or "").strip().lower()
        if split and split not in SPLITS:
            raise InputError(f"{path}, row {number}: {split!r} is no split; write train, val or test")
        texts = {side: normalised(str(row.get(column) or "")) for side, column in columns.items()}
        pairs.append(Pair(f"{path.name}:{number}", **texts, split=SPLITS.get(split, "train")))
    return pairs, problems, layout


def _json(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is no JSON ({error.msg}); write one object to a line") from None
            if not isinstance(row, dict):
                raise InputError(f'{path}, line {number} is no object; write {{"source": "...", "target": "..."}}')
            rows.append((number, row))
    return rows


def _beside(folder: Path) -> tuple[list[Pair], list[Problem], str]:
    pairs = []
    for split in ("train", "val", "test"):
        source, target = folder / f"{split}.src", folder / f"{split}.tgt"
        if not source.is_file() and not target.is_file() and split != "train":
            continue
        for file in (source, target):
            if not file.is_file():
                raise InputError(f"{folder} holds no {file.name}; give pairs.tsv with source and target, or train.src beside train.tgt")
        left, right = read_lines(source), read_lines(target)
        if len(left) != len(right):
            raise InputError(f"{source} has {len(left)} lines and {target.name} has {len(right)}; line by line they must belong together")
        pairs += [
            Pair(f"{source.name}:{i}", normalised(a), normalised(b), split)
            for i, (a, b) in enumerate(zip(left, right, strict=True), start=1)
        ]
    return pairs, [], "files side by side"


def _by_hash(pairs: Sequence[Pair]) -> list[Pair]:
    """Equal sources go to one side; each side has one source at least, where there are two."""
    free = sorted({p.source for p in pairs if p.split == "train"}, key=_draw)
    count = min(max(round(SHARE * len(free)), 1), len(free) - 1) if free else 0
    val = set(free[:count])
    return [Pair(p.name, p.source, p.target, "val") if p.split == "train" and p.source in val else p for p in pairs]


def _draw(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def common(texts: Sequence[str]) -> str:
    """The text that is there most often; of several the first."""
    return Counter(texts).most_common(1)[0][0]
