"""What every data set on the disk has once it was looked through: items in splits, problems, a fingerprint; and a memory of what was decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from paperworks.data.fingerprint import Fingerprint
from paperworks.data.images import unit
from paperworks.data.layouts import Problem

SPLITS = ("train", "val", "test")


@runtime_checkable
class Entry(Protocol):
    """An item with its side of the split."""

    @property
    def split(self) -> str | None:
        """``train``, ``val`` or ``test``."""
        ...


E = TypeVar("E", bound=Entry)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Collection(Generic[E]):
    """A data set on the disk. What could not be used is in ``problems``; everything else can be read without surprises."""

    source: str
    root: Path
    layout: str
    items: tuple[E, ...] = field(repr=False)
    """Usable items, by name."""
    problems: tuple[Problem, ...] = field(repr=False)
    fingerprint: Fingerprint

    def split(self, name: str) -> tuple[E, ...]:
        """Items of ``train``, ``val`` or ``test``."""
        return tuple(i for i in self.items if i.split == name)

    @property
    def train(self) -> tuple[E, ...]:
        """Items to learn from."""
        return self.split("train")

    @property
    def val(self) -> tuple[E, ...]:
        """Items to choose and judge by."""
        return self.split("val")

    def unit(self, array: Shaped[np.ndarray, "*size c"]) -> Float[Tensor, "C *size"]:
        """An image of this data set as float32 in [0, 1], with the channels that the whole set has."""
        return unit(array, self.fingerprint.range, self.fingerprint.channels)

    def facts(self, **more: Any) -> dict[str, Any]:
        """What a person wants to know before training, as plain values for JSON; ``more`` is what the kind of data adds."""
        print_ = self.fingerprint
        return {
            "source": self.source,
            "root": str(self.root),
            "layout": self.layout,
            "items": len(self.items),
            "splits": {s: len(self.split(s)) for s in SPLITS},
            "groups": len({g for i in self.items if (g := getattr(i, "group", None))}) or None,
            "channels": print_.channels,
            "dtype": print_.dtype,
            "bit_depth": print_.bit_depth,
            "range": list(print_.range),
            "sizes": {"min": list(print_.min_size), "median": list(print_.median_size), "max": list(print_.max_size)},
            "mean": [round(m, 6) for m in print_.mean],
            "std": [round(s, 6) for s in print_.std],
            **more,
            "sha256": print_.sha256,
            "problems": [{"path": str(p.path), "what": p.what, "fix": p.fix} for p in self.problems],
        }


class Memory:
    """Keeps arrays that were read, up to a number of bytes, and makes them read-only. Safe for threads; a copy in another process starts empty."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self._start()

    def _start(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"])

    def __call__(self, key: Hashable, read: Callable[[], T]) -> T:
        """The array, or the tuple of arrays, that ``read`` gave when it was first asked for under this key."""
        if key in self._kept:
            return self._kept[key]
        value = read()
        arrays: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
        for array in arrays:
            array.flags.writeable = False
        size = sum(a.nbytes for a in arrays)
        with self._lock:
            if key not in self._kept and self._bytes + size <= self.limit and not isinstance(value, np.memmap):
                self._kept[key] = value
                self._bytes += size
        return value
