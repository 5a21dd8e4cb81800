"""Which files are predicted, and where to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from paperworks.errors import InputError


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
    for given in map(Path, inputs):
        if given.is_dir() and not accepts(given):
            found = sorted(p for p in given.rglob("*") if accepts(p) and not p.name.startswith("."))
            if not found:
                raise InputError(f"{given} holds no files that can be predicted; give files or a folder of them")
            relative = [(p, p.relative_to(given)) for p in found]
        elif given.exists():
            relative = [(given, Path(given.name))]
        else:
            raise InputError(f"{given} does not exist; give files or folders")
        for source, name in relative:
            output = out / target(name)
            if output in jobs and jobs[output] != source:
                raise InputError(f"{source} and {jobs[output]} would both be written to {output}; predict them into two folders")
            if output.exists() and output.samefile(source):
                raise InputError(f"{output} is the input itself; take another --out")
            jobs[output] = source
    return [(source, output) for output, source in jobs.items()]
