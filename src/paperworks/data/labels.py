"""What the numbers in the masks mean: class names and settings beside the data, and the rules where nothing is said.

The rules are written out for people in docs/data-formats.md; this is where they are realised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from paperworks.data.images import COLOUR
from paperworks.errors import InputError

IGNORE = 255
"""What ``Coding.encode`` writes where a pixel has no label that counts."""
SETTINGS = "paperworks.json"
INSTANCE_FOLDERS = frozenset({"instances", "instance", "instance_masks", "instance_labels", "instancemasks"})
VOID = frozenset({"unlabelled", "unlabeled", "void", "ignore", "ignored", "unknown", "don't care"})
"""Names of a class, not the first, that means that a pixel does not count."""

MANY = 24
"""More labels than this in 8-bit files are objects, if each is in one piece."""
MANY_DEEP = 8
"""The same for 16 and 32 bits, which nobody needs for a few classes; from here on the pieces of each label are counted."""
_CLASS_LIMIT = 64  # more different values than this, with no names given, are a picture and not labels


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a person says of a data set in ``paperworks.json``, ``classes.json`` or ``classes.txt``. None: not said."""

    classes: tuple[str, ...] | None = None
    colors: tuple[tuple[int, int, int], ...] | None = None
    """RGB of each class, for colour-coded masks."""
    ignore: tuple[int, ...] | None = None
    """Values in the files that do not count."""
    masks: str | None = None
    """``classes`` or ``instances``."""
    channels: tuple[str, ...] | None = None
    """Names of the channels."""
    spacing: tuple[float, ...] | None = None
    """Millimetres from pixel to pixel, height first."""
    images: str | None = None
    """Name of the folder with the images."""
    labels: str | None = None
    """Name of the folder with the masks."""


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: it cannot be read or is not JSON; the line is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}); correct it there") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({type(error).__name__}); check the file") from None


def read_settings(root: Path) -> Settings:
    """What the files beside the data say; ``paperworks.json`` wins over ``classes.json`` and that over ``classes.txt``.

    Raises:
        InputError: one of the files does not say what it should.
    """
    said: dict[str, Any] = {}
    if (text := root / "classes.txt").is_file():
        said["classes"] = [line.strip() for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if (path := root / "classes.json").is_file():
        said |= _classes_json(path)
    if (path := root / SETTINGS).is_file():
        own = read_json(path)
        if not isinstance(own, dict):
            raise InputError(f'{path} must be an object such as {{"classes": ["background", "cell"]}}')
        known = Settings.__dataclass_fields__
        for key in own:
            if key not in known:
                near = get_close_matches(key, known, 1)
                raise InputError(
                    f"{path} has the unknown key {key!r}; {f'did you mean {near[0]!r}' if near else 'there are: ' + ', '.join(known)}"
                )
        said |= own
    return _checked(said, root)


def _classes_json(path: Path) -> dict[str, Any]:
    """A list of names; {name: index} or {index: name}; or {"classes": list of names or of {"name", "color"}, "ignore": value}."""
    content: Any = read_json(path)
    said: dict[str, Any] = {}
    if isinstance(content, dict) and "classes" in content:
        said = {key: content[key] for key in ("ignore", "colors") if key in content}
        content = content["classes"]
    if isinstance(content, dict):
        pairs = [(v, k) if isinstance(v, int) else (k, v) for k, v in content.items()]
        try:
            content = [name for _, name in sorted((int(i), str(name)) for i, name in pairs)]
        except ValueError:
            raise InputError(f'{path} must map names to numbers, such as {{"background": 0, "cell": 1}}') from None
        if sorted(int(i) for i, _ in pairs) != list(range(len(pairs))):
            raise InputError(f"{path} must number the classes 0, 1, 2 ... without gaps")
    if isinstance(content, list) and content and all(isinstance(c, dict) and "name" in c for c in content):
        colours = [c.get("color", c.get("colour")) for c in content]
        if all(colours):
            said["colors"] = colours
        content = [c["name"] for c in content]
    return said | {"classes": content}


def _checked(said: Mapping[str, Any], root: Path) -> Settings:
    where = root / SETTINGS if (root / SETTINGS).is_file() else root / "classes.json"

    def check(fine: bool, expected: str) -> None:
        if not fine:
            raise InputError(f"{where}: {expected}")

    out: dict[str, Any] = {}
    for key in ("classes", "channels"):
        if (names := said.get(key)) is not None:
            check(isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names), f"{key!r} must be a list of names")
            out[key] = tuple(names)
    if (classes := out.get("classes")) is not None:
        check(len(set(classes)) == len(classes), "two classes have the same name")
        check(len(classes) <= IGNORE, f"there can be {IGNORE} classes, and {len(classes)} are named")
    if (ignore := said.get("ignore")) is not None:
        ignore = ignore if isinstance(ignore, list) else [ignore]
        check(all(isinstance(v, int) for v in ignore), "'ignore' must be a value of the masks, or a list of them")
        out["ignore"] = tuple(ignore)
    if (masks := said.get("masks")) is not None:
        check(masks in ("classes", "instances"), '\'masks\' must be "classes" or "instances"')
        out["masks"] = masks
    if (spacing := said.get("spacing")) is not None:
        fine = isinstance(spacing, list) and len(spacing) == 2 and all(isinstance(s, int | float) and s > 0 for s in spacing)
        check(fine, "'spacing' must be two positive numbers, height first")
        out["spacing"] = tuple(float(s) for s in spacing)
    if (colours := said.get("colors")) is not None:
        fine = isinstance(colours, list) and all(
            isinstance(c, list) and len(c) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in c) for c in colours
        )
        check(fine and len(colours) == len(out.get("classes") or colours), "'colors' must be one [red, green, blue] for each class")
        out["colors"] = tuple(tuple(c) for c in colours)
    for key in ("images", "labels"):
        if (name := said.get(key)) is not None:
            check(isinstance(name, str), f"{key!r} must be the name of a folder")
            out[key] = name
    return Settings(**out)


@dataclass(frozen=True)
class Values:
    """What one mask holds, as far as ``decide`` needs it."""

    counts: Mapping[int, int]
    """Value -> pixels."""
    bits: int
    """Bits per value in the file."""
    regions: int = 0
    """Values other than 0 whose pieces were counted (only where there are more than ``MANY`` or ``MANY_DEEP`` of them)."""
    whole: int = 0
    """Those of them that are in one piece."""


@dataclass(frozen=True)
class Coding:
    """From the values in the files to class numbers."""

    instances: bool
    names: tuple[str, ...]
    codes: tuple[tuple[int, int], ...]
    """(value in the file, class number or ``IGNORE``); for instances only the values that are no object."""
    rule: str
    """Which rule applied, in words."""

    def encode(self, raw: Integer[np.ndarray, "*size"]) -> UInt8[np.ndarray, "*size"]:
        """Class numbers; ``IGNORE`` where the value is to be ignored or not known."""
        other = 1 if self.instances else IGNORE
        return self._map(raw, other).astype(np.uint8)

    def objects(self, raw: Integer[np.ndarray, "*size"]) -> Int32[np.ndarray, "*size"]:
        """Objects numbered as in the file (colours and labels beyond 31 bits: 1, 2 ... in their order); 0 is none."""
        if raw.size and int(raw.max()) < COLOUR:
            return np.where(self.encode(raw) == 1, raw, 0).astype(np.int32)
        numbers = np.unique(raw, return_inverse=True)[1].reshape(raw.shape) + 1
        return np.where(self.encode(raw) == 1, numbers, 0).astype(np.int32)

    def unknown(self, values: Iterable[int]) -> list[int]:
        """Those values that have no meaning."""
        known = dict(self.codes)
        return [v for v in values if v < 0 or (not self.instances and v not in known)]

    def class_of(self, value: int) -> int:
        """Class number of one value."""
        return dict(self.codes).get(value, 1 if self.instances else IGNORE)

    def _map(self, raw: np.ndarray, other: int) -> np.ndarray:
        codes = dict(self.codes)
        if raw.dtype in (np.uint8, np.uint16):
            table = np.full(1 << (8 * raw.dtype.itemsize), other, np.uint8)
            for value, index in codes.items():
                if value < len(table):
                    table[value] = index
            return table[raw]
        values = np.array(sorted(codes), dtype=np.int64)
        where = np.minimum(np.searchsorted(values, raw), len(values) - 1)
        indices = np.array([codes[int(v)] for v in values], dtype=np.uint8)
        return np.where(values[where] == raw, indices[where], np.uint8(other))


def decide(masks: Sequence[Values], settings: Settings, folder: str, where: Path) -> Coding:
    """What the values of a data set's masks mean.

    Args:
        masks: what each mask holds.
        settings: what a person says of them.
        folder: name of the folder that the masks are in.
        where: the data set's root, for messages.

    Raises:
        InputError: the values look like a picture, or do not go with what is said of them.
    """
    values = sorted({v for m in masks for v in m.counts})
    ignore = set(settings.ignore or ())
    if settings.masks == "instances" or (
        settings.masks is None and (folder.lower() in INSTANCE_FOLDERS or _are_objects(masks, settings, values))
    ):
        return _instances(settings, ignore, where)
    if settings.colors or any(v >= COLOUR for v in values):
        return _colours(values, settings, ignore, where)
    if settings.classes is not None:
        return _named(values, settings.classes, ignore, settings.ignore is None)
    return _unnamed(masks, values, ignore, where)


def _are_objects(masks: Sequence[Values], settings: Settings, values: Sequence[int]) -> bool:
    """Many labels, and nearly each of them in one piece: objects."""
    if settings.classes is not None and len(settings.classes) > 2:
        return False
    limit = MANY if max((m.bits for m in masks), default=8) <= 8 else MANY_DEEP
    regions = sum(m.regions for m in masks)
    return len(values) > limit and max(values) < COLOUR and regions > 0 and sum(m.whole for m in masks) >= 0.9 * regions


def _instances(settings: Settings, ignore: set[int], where: Path) -> Coding:
    names = settings.classes or ("background", "object")
    names = ("background", *names) if len(names) == 1 else names
    if len(names) != 2:
        raise InputError(f"{where / SETTINGS}: instance masks know background and one class, and {len(names)} classes are named; name two")
    codes = {0: 0, COLOUR: 0} | dict.fromkeys(ignore, IGNORE)
    return Coding(True, names, tuple(sorted(codes.items())), "each value is an object of its own")


def _colours(values: Sequence[int], settings: Settings, ignore: set[int], where: Path) -> Coding:
    if settings.colors:
        colours = [COLOUR + (r << 16 | g << 8 | b) for r, g, b in settings.colors]
        names = settings.classes or tuple(f"#{c - COLOUR:06x}" for c in colours)
    else:
        # Grey pixels of a mask that is grey all over come as 0..255; in a colour-coded set they are colours too.
        colours = sorted({v if v >= COLOUR else COLOUR + v * 0x010101 for v in values if v not in ignore})
        if len(colours) > _CLASS_LIMIT:
            raise InputError(
                f"{where}: the masks hold {len(colours)} colours, as pictures do; save them as PNG, or list the classes' 'colors' in {SETTINGS}"
            )
        names = settings.classes or tuple("background" if c == COLOUR else f"#{c - COLOUR:06x}" for c in colours)
        if len(names) != len(colours):
            raise InputError(
                f"{where}: {len(names)} classes are named and the masks hold {len(colours)} colours; list 'colors' in {SETTINGS}"
            )
    codes = {c: i for i, c in enumerate(colours)}
    codes |= {c & 0xFF: i for c, i in list(codes.items()) if (c - COLOUR) % 0x010101 == 0}
    codes |= dict.fromkeys(ignore, IGNORE)
    return Coding(False, names, tuple(sorted(codes.items())), "each colour is a class")


def _named(values: Sequence[int], names: tuple[str, ...], ignore: set[int], default_ignore: bool) -> Coding:
    names = ("background", *names) if len(names) == 1 else names
    ignore = ignore | {i for i, n in enumerate(names) if i > 0 and n.lower() in VOID}
    seen = [v for v in values if v not in ignore]
    if len(names) == 2 and seen and set(seen) <= {0, 255}:
        return Coding(False, names, ((0, 0), (255, 1)), "0 and 255")
    steps = [b - a for a, b in pairwise(seen)]
    if len(seen) == len(names) and steps and min(steps) >= 16:
        codes = {v: i for i, v in enumerate(seen)} | dict.fromkeys(ignore, IGNORE)
        return Coding(False, names, tuple(sorted(codes.items())), "grey values in their order")
    if default_ignore and len(names) < IGNORE:
        ignore = ignore | {IGNORE}
    kept = [i for i in range(len(names)) if i not in ignore]
    codes = {v: c for c, v in enumerate(kept)} | dict.fromkeys(ignore, IGNORE)
    return Coding(False, tuple(names[i] for i in kept), tuple(sorted(codes.items())), "class numbers, named")


def _unnamed(masks: Sequence[Values], values: Sequence[int], ignore: set[int], where: Path) -> Coding:
    black_white = sum(set(m.counts) - ignore <= {0, 255} for m in masks)
    whites = any(255 in m.counts for m in masks if set(m.counts) - ignore <= {0, 255})
    ignored = tuple((v, IGNORE) for v in sorted(ignore))
    # A few masks that were resampled to greys do not change what the others are; they are problems of their own.
    if 255 not in ignore and whites and black_white >= 0.8 * len(masks):
        return Coding(False, ("background", "foreground"), ((0, 0), *ignored, (255, 1)), "0 and 255")
    seen = [v for v in values if v not in ignore and v >= 0]
    if len([v for v in seen if v != 0]) <= 1:
        one = max(seen, default=1) or 1
        return Coding(False, ("background", "foreground"), tuple(sorted({0: 0, one: 1, **dict(ignored)}.items())), f"0 and {one}")
    if len(seen) > _CLASS_LIMIT:
        raise InputError(
            f"{where}: the masks hold {len(seen)} different values, as pictures do; "
            f'if they are objects say "masks": "instances" in {SETTINGS}, if they are classes name them there'
        )
    small = [v for v in seen if v != 255]
    if _dense(small) and small[-1] <= 200:
        codes = {i: i for i in range(small[-1] + 1) if i not in ignore}
        codes = {v: c for c, v in enumerate(codes)} | {255: IGNORE} | dict(ignored)
        names = tuple("background" if v == 0 else f"class {v}" for v, c in codes.items() if c != IGNORE)
        return Coding(False, names, tuple(sorted(codes.items())), "class numbers")
    if min(b - a for a, b in pairwise(seen)) >= 16:
        codes = {v: i for i, v in enumerate(seen)} | dict(ignored)
        return Coding(
            False, tuple("background" if v == 0 else f"grey {v}" for v in seen), tuple(sorted(codes.items())), "grey values in their order"
        )
    raise InputError(
        f"{where}: cannot tell what the mask values {', '.join(map(str, seen[:6]))}{' ...' if len(seen) > 6 else ''} are; name the classes in {SETTINGS}"
    )


def _dense(values: Sequence[int]) -> bool:
    """Numbers counted up from 0 or 1, a few of which do not occur."""
    return bool(values) and values[-1] <= 2 * len(values) + 8
