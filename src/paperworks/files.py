"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LEFTOVER = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; synced and renamed to ``path`` when the block ends well, deleted when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def occupied(folder: Path, but: str = "") -> bool:
    """Something is in the folder that is neither called ``but`` nor a leftover of :func:`atomic`."""
    return folder.exists() and any(p.name != but and not _LEFTOVER.fullmatch(p.name) for p in folder.iterdir())


def sweep(folder: Path) -> None:
    """Delete what killed processes left of :func:`atomic` in the folder and below."""
    for path in folder.rglob(".*.tmp*"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """JSON, atomically. Paths become strings, zero-dimensional tensors and arrays numbers."""
    with atomic(path) as temporary:
        temporary.write_text(plain_json(content) + "\n", encoding="utf-8")


def plain_json(content: Any) -> str:
    """JSON text of nested dicts and lists; NaN and infinity become null, as JSON has neither."""
    return json.dumps(_finite(content), ensure_ascii=False, indent=1, default=_plain, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")
