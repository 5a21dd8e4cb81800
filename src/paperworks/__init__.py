"""paperworks: an archive of computer-vision papers in which every paper runs.

The names below are the Python face of the commands; each imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "create": ("paperworks.train.api", "create"),
    "fit": ("paperworks.train.api", "fit"),
    "convert": ("paperworks.train.pretrained", "convert"),
    "predict": ("paperworks.export.predict", "predict"),
    "to_onnx": ("paperworks.export.onnx", "export_run"),
    "compare": ("paperworks.study.compare", "compare"),
    "measure": ("paperworks.study.measure", "measure_subject"),
    "list": ("paperworks.papers", "cards"),
    "card": ("paperworks.papers", "card"),
}


def __getattr__(name: str) -> Any:
    if name in _API:
        where, what = _API[name]
        return getattr(importlib.import_module(where), what)
    raise AttributeError(f"module 'paperworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_API]
