"""CSV files as people save them: UTF-8 with or without a mark at its beginning, blanks around cells, columns in any order."""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path

from paperworks.errors import InputError


def cells(path: Path) -> list[list[str]]:
    """The cells of each line, without blanks around them.

    Raises:
        InputError: the file cannot be read as CSV.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            return [[cell.strip() for cell in row] for row in csv.reader(f)]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as CSV ({error}); save it as UTF-8 with commas") from None


def records(path: Path, *, lower: bool = True) -> list[dict[str, str]]:
    """Every line after the first that is not empty, by the names that the first gives to the columns; cells that a line lacks are empty.

    Args:
        path: of the file.
        lower: bring the names into lower case.

    Raises:
        InputError: the file cannot be read as CSV.
    """
    head, *lines = [line for line in cells(path) if line] or [[]]
    names = [name.lower() for name in head] if lower else head
    return [dict(zip(names, line + [""] * (len(head) - len(line)))) for line in lines]


def columns(path: Path, *known: Collection[str]) -> tuple[str, ...] | None:
    """In lower case the first line's name that is among each of ``known``; None if one is not there, or the file is no CSV."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            head = [cell.strip().lower() for cell in next(csv.reader(f), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    found = [next((name for name in head if name in names), None) for names in known]
    return tuple(name for name in found if name) if all(found) else None
