"""paperworks: an archive of computer-vision papers in which every paper runs.

The names below are the Python face of the commands; each imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "create": "paperworks.train.api",
    "fit": "paperworks.train.api",
    "predict": "paperworks.train.api",
    "compare": "paperworks.study.compare",
    "measure": "paperworks.study.measure",
    "export": "paperworks.export.api",
    "list": "paperworks.papers",
    "card": "paperworks.papers",
}


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name if name != "list" else "cards")
    raise AttributeError(f"module 'paperworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_API]
