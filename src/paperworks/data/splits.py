"""Which items are for training and which for validation: what a person says, or a hash of the names."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from paperworks.data.labels import read_json
from paperworks.data.layouts import SPLITS, Item, Problem
from paperworks.data.nifti import is_readable, stem
from paperworks.data.sheets import cells
from paperworks.errors import InputError

SHARE = 0.2
"""Share of the items, or of the groups, that the hash puts into validation."""
FILES = ("splits.json", "split.csv", "splits.csv", "splits_final.json")


def assign(items: Iterable[Item], root: Path, excluded: Iterable[str] = ()) -> tuple[list[Item], list[Problem]]:
    """Give each item its split and group.

    ``splits.json`` wins over ``split.csv`` and that over folders called train and val; where none of them says what validation is, a
    hash of the name (or of the group) decides, so that it stays what it was when images are added.

    Args:
        items: what is usable.
        root: where the files lie that say the split.
        excluded: names of items that exist but are not usable; a split file may name them.

    Returns:
        The items that are in a split, and what is wrong with what was said.

    Raises:
        InputError: a split file cannot be read.
    """
    items = list(items)
    said, groups, problems, source = _said(items, root, set(excluded))
    items = [dataclasses.replace(i, split=said.get(i.name, i.split) if said else i.split, group=groups.get(i.name, i.group)) for i in items]
    if said and source is not None:
        present = {i.split for i in items if i.name in said}
        # With one side named only, the rest is the other side.
        rest = "val" if "val" not in present and "train" in present else "train" if "train" not in present else None
        if any(i.name not in said for i in items) and rest is None:
            for item in (i for i in items if i.name not in said):
                problems.append(Problem(item.images[0], f"is in no split of {source.name}", "add it there"))
        items = [i if i.name in said else dataclasses.replace(i, split=rest) for i in items if i.name in said or rest]
    if not any(i.split == "val" for i in items):
        items = _by_hash(items)
    elif not any(i.split == "train" for i in items):
        items = [dataclasses.replace(i, split="train") if i.split is None else i for i in items]
    straddling = _straddling(items)
    for group, names in straddling.items():
        problems.append(
            Problem(
                source or root,
                f"puts the group {group!r} on both sides of the split",
                f"move it to one; {len(names)} training items of it are left out",
            )
        )
    left_out = {n for names in straddling.values() for n in names}
    items = [i for i in items if i.name not in left_out and i.split is not None]
    if items and not any(i.split == "val" for i in items):
        problems.append(Problem(root, "has nothing left for validation", "add images"))
    return items, problems


def _by_hash(items: list[Item]) -> list[Item]:
    """Split those that are not for testing; at least one item, or group, goes to each side."""
    free = [i for i in items if i.split != "test"]
    draw = {key: _draw(key) for key in sorted({i.group or i.name for i in free}, key=_draw)}
    val = {key for key, x in draw.items() if x < SHARE}
    keys = list(draw)
    val = (val | {keys[0]}) - {keys[-1]} if len(keys) > 1 else set()
    return [i if i.split == "test" else dataclasses.replace(i, split="val" if (i.group or i.name) in val else "train") for i in items]


def _draw(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _straddling(items: Iterable[Item]) -> dict[str, list[str]]:
    """Group -> names of its training items, for groups that are held out as well."""
    sides: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if item.group is not None and item.split is not None:
            sides[item.group][item.split].append(item.name)
    return {group: by["train"] for group, by in sides.items() if "train" in by and len(by) > 1}


def _said(items: list[Item], root: Path, excluded: set[str]) -> tuple[dict[str, str], dict[str, str], list[Problem], Path | None]:
    """(name -> split, name -> group, problems, the file that says so)."""
    path = next((root / f for f in FILES if (root / f).is_file()), None)
    if path is None:
        return {}, {}, [], None
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    names = _Names(items, excluded)
    said: dict[str, str] = {}
    groups: dict[str, str] = {}
    problems = []
    for written, split, group in rows:
        known = names.find(written)
        if known is None:
            problems.append(Problem(path, f"names {written!r}, which is not there", "correct the name or remove it"))
            continue
        if group:
            groups[known] = group
        if split and said.get(known, split) != split:
            problems.append(Problem(path, f"names {written!r} in {said[known]} and in {split}", "keep it in one; it is not trained on"))
            said[known] = "val" if "val" in (split, said[known]) else "test"
        elif split:
            said[known] = split
    return said, groups, problems, path


class _Names:
    """Finds the item that a person means: by its name, with or without extension, or by the last part of it where that is unique."""

    def __init__(self, items: Iterable[Item], excluded: set[str]) -> None:
        self.known = {i.name for i in items} | excluded
        last: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.known):
            last[name.rpartition("/")[2]].append(name)
        self.last = {short: full[0] for short, full in last.items() if len(full) == 1}

    def find(self, written: str) -> str | None:
        written = unicodedata.normalize("NFC", written.replace("\\", "/"))
        path = PurePosixPath(written)
        bare = str(path.with_name(stem(Path(path.name)))) if is_readable(Path(path.name)) else written
        for name in (written, bare):
            if name in self.known:
                return name
        return self.last.get(bare.rpartition("/")[2])


def _json_rows(path: Path) -> list[tuple[str, str, str]]:
    """``{"train": [...], "val": [...], "test": [...], "groups": {name: group} or {group: [names]}}``, or nnU-Net's list of folds (the first)."""
    content = read_json(path)
    if isinstance(content, list) and content:
        content = content[0]
    if not isinstance(content, dict):
        raise InputError(f'{path} must be an object such as {{"train": ["a", "b"], "val": ["c"]}}')
    rows = []
    for key, names in content.items():
        if key == "groups":
            rows += _group_rows(path, names)
        elif key.lower() not in SPLITS:
            raise InputError(f"{path} has the unknown key {key!r}; it takes train, val, test and groups")
        elif not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise InputError(f"{path}: {key!r} must be a list of names")
        else:
            rows += [(name, SPLITS[key.lower()], "") for name in names]
    return rows


def _group_rows(path: Path, groups: Any) -> list[tuple[str, str, str]]:
    if isinstance(groups, Mapping) and all(isinstance(g, str) for g in groups.values()):
        return [(name, "", group) for name, group in groups.items()]
    if isinstance(groups, Mapping) and all(isinstance(g, list) for g in groups.values()):
        return [(str(name), "", str(group)) for group, names in groups.items() for name in names]
    raise InputError(f"{path}: 'groups' must map names to groups, or groups to lists of names")


def _csv_rows(path: Path) -> list[tuple[str, str, str]]:
    """Columns name, split and optionally group, in any order; a file without a header is read as name,split[,group]."""
    lines = [row for row in cells(path) if row]
    header = [c.lower() for c in lines[0]] if lines else []
    columns = {c: i for i, c in enumerate(header)}
    name = next((columns[c] for c in ("name", "file", "filename", "image") if c in columns), None)
    if name is None:
        columns, name = {"split": 1, "group": 2}, 0
    else:
        lines = lines[1:]
    rows = []
    for number, row in enumerate(lines, start=1):

        def cell(column: str, row: list[str] = row) -> str:
            i = columns.get(column, len(row))
            return row[i] if i < len(row) else ""

        split = cell("split")
        if split and split.lower() not in SPLITS:
            raise InputError(f"{path}, row {number}: {split!r} is no split; write train, val or test")
        rows.append((row[name] if name < len(row) else "", SPLITS[split.lower()] if split else "", cell("group")))
    return rows
