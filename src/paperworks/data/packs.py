"""Small real data sets by name: ``pack:NAME`` is the folder ``packs/NAME`` of the repository, or of the folder in ``PAPERWORKS_PACKS``."""

from __future__ import annotations

import hashlib
import os
from difflib import get_close_matches
from pathlib import Path

from paperworks.errors import InputError

PREFIX = "pack:"


def pack_folders() -> tuple[Path, ...]:
    """Where packs lie: the folder named by ``PAPERWORKS_PACKS`` first, then ``packs`` beside the source tree or the working folder."""
    places = [Path(os.environ["PAPERWORKS_PACKS"])] if os.environ.get("PAPERWORKS_PACKS") else []
    for start in (Path(__file__).resolve(), Path.cwd() / "here"):
        place = next((p / "packs" for p in start.parents if (p / "packs").is_dir() and (p / "pyproject.toml").is_file()), None)
        if place is not None and place not in places:
            places.append(place)
    return tuple(places)


def available_packs() -> dict[str, Path]:
    """Every pack that is here, by name."""
    found: dict[str, Path] = {}
    for place in pack_folders():
        if place.is_dir():
            for folder in sorted(place.iterdir()):
                if (folder / "README.md").is_file():
                    found.setdefault(folder.name, folder)
    return dict(sorted(found.items()))


def pack_path(source: str) -> Path:
    """The folder of ``pack:NAME`` or ``NAME``.

    Raises:
        InputError: there is no such pack.
    """
    name = source.removeprefix(PREFIX)
    packs = available_packs()
    if name not in packs:
        near = get_close_matches(name, packs, 1)
        hint = f"did you mean pack:{near[0]}" if near else f"there are: {', '.join(packs) or 'none'}"
        raise InputError(f"no pack is called {name!r}; {hint} (PAPERWORKS_PACKS may name a folder with more)")
    return packs[name]


def source_path(source: str | Path) -> Path:
    """The folder or file of a source as a person names it: a path or ``pack:NAME``.

    Raises:
        InputError: it does not exist.
    """
    path = pack_path(str(source)) if str(source).startswith(PREFIX) else Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; check the name")
    return path


def verify_pack(name: str) -> int:
    """Compare every file of a pack with its ``SHA256SUMS``. Returns how many files were compared.

    Raises:
        InputError: a file is missing, differs, or is not listed; or there is no list.
    """
    root = pack_path(name)
    sums = root / "SHA256SUMS"
    if not sums.is_file():
        raise InputError(f"{sums} does not exist; fetch the pack again")
    listed = {}
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, file = line.partition("  ")
        listed[file] = digest
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    if odd := sorted(present ^ set(listed)):
        raise InputError(f"{root / odd[0]} is {'not in SHA256SUMS' if odd[0] in present else 'missing'}; fetch the pack again")
    for file, digest in listed.items():
        with (root / file).open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                raise InputError(f"{root / file} is not the file that the pack was made with; fetch the pack again")
    return len(listed)
