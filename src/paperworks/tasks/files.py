"""Which files are predicted, how they are read, and the table that is written of many."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from paperworks.data.images import read_image, unit
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.tasks.base import Spec


def find_files(inputs: Sequence[str | Path], accepts: Callable[[Path], bool]) -> list[tuple[Path, Path]]:
    """Files, each once, with their paths in the folders in which they were found.

    Args:
        inputs: files, and folders that are searched.
        accepts: whether a file of a searched folder counts.

    Raises:
        InputError: an input does not exist, or a folder holds nothing.
    """
    files: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir() and not accepts(given):
            found = sorted(p for p in given.rglob("*") if accepts(p) and not p.name.startswith("."))
            if not found:
                raise InputError(f"{given} holds no files that can be predicted; give files or a folder of them")
            files |= {p: p.relative_to(given) for p in found}
        elif given.exists():
            files[given] = Path(given.name)
        else:
            raise InputError(f"{given} does not exist; give files or folders")
    return list(files.items())


def find_jobs(
    inputs: Sequence[str | Path], out: Path, accepts: Callable[[Path], bool], target: Callable[[Path], Path]
) -> list[tuple[Path, Path]]:
    """(input, output) pairs.

    Args:
        inputs: files, and folders that are searched.
        out: folder of the outputs.
        accepts: whether a file of a searched folder counts.
        target: the output's path in ``out`` for an input's path in its folder.

    Raises:
        InputError: an input does not exist, a folder holds nothing, or outputs would lie on one another or on an input.
    """
    jobs: dict[Path, Path] = {}
    for source, name in find_files(inputs, accepts):
        output = out / target(name)
        if output in jobs:
            raise InputError(f"{source} and {jobs[output]} would both be written to {output}; predict them into two folders")
        if output.exists() and output.samefile(source):
            raise InputError(f"{output} is the input itself; take another --out")
        jobs[output] = source
    return [(source, output) for output, source in jobs.items()]


def read_unit(path: Path, spec: Spec) -> Float[Tensor, "C H W"]:
    """An image file as the networks of a data set expect it, in [0, 1].

    Raises:
        InputError: the file is broken or has other channels.
    """
    raw = read_image(path)
    try:
        return unit(raw, spec.range, spec.channels)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class Table:
    """Rows of a CSV file; the first cell says what a row is about."""

    def __init__(self, rows: list[list[str]]) -> None:
        self.rows = rows
        self._known = {row[0] for row in rows}

    def __contains__(self, name: str) -> bool:
        """Whether there is a row about it from before."""
        return name in self._known

    def add(self, *cells: str) -> None:
        """One more row."""
        self.rows.append([*cells])


@contextmanager
def table(path: Path, head: Sequence[str], *, resume: bool = False) -> Iterator[Table]:
    """A table that is written when the block ends, and when it ends badly too: the rows before a broken input are not lost.

    Args:
        path: the CSV file.
        head: names of the columns.
        resume: begin with the rows that are there already, where they have as many columns.
    """
    rows: list[list[str]] = []
    if resume and path.exists():
        with path.open(encoding="utf-8", newline="") as f:
            rows = [row for row in csv.reader(f) if len(row) == len(head)][1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = Table(rows)
    try:
        yield sheet
    finally:
        with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([head, *sheet.rows])
