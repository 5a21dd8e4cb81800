"""One contract per task: what a sample is, what a network returns, default loss, metrics, picture, writer."""

from __future__ import annotations

import importlib
from typing import Any

_TASKS = {"segmentation": ("paperworks.tasks.segmentation", "Segmentation")}
"""Task name -> where its contract lives."""

DEFAULT_PACKS = {"segmentation": "pack:cardiac_mr"}
"""The data on which a task's papers show that they are usable."""


def task(name: str) -> Any:
    """The class of a task's contract: ``task("segmentation")(source)`` opens a data set."""
    where, what = _TASKS[name]
    return getattr(importlib.import_module(where), what)
