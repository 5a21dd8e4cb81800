"""One contract per task: what a sample is, what a network returns, default loss, metrics, picture, writer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from paperworks.errors import InputError

if TYPE_CHECKING:
    from paperworks.tasks.contract import Task

_TASKS = {
    "segmentation": ("paperworks.tasks.segmentation", "Segmentation"),
    "classification": ("paperworks.tasks.classification", "Classification"),
    "video": ("paperworks.tasks.video", "Video"),
    "generation": ("paperworks.tasks.generation", "Generation"),
    "detection": ("paperworks.tasks.detection", "Detection"),
    "representation": ("paperworks.tasks.representation", "Representation"),
    "restoration": ("paperworks.tasks.restoration", "Restoration"),
    "recommendation": ("paperworks.tasks.recommendation", "Recommendation"),
    "reading": ("paperworks.tasks.reading", "TextReading"),
    "contours": ("paperworks.tasks.contours", "Contours"),
    "captions": ("paperworks.tasks.captions", "Captions"),
    "documents": ("paperworks.tasks.documents", "Documents"),
    "translation": ("paperworks.tasks.translation", "Translation"),
}
"""Task name -> where its contract lives."""


def task(name: str) -> type[Task]:
    """The class of a task's contract: ``task("segmentation")(source)`` opens a data set.

    Raises:
        InputError: there is no such task.
    """
    if name not in _TASKS:
        raise InputError(f"no task is called {name!r}; there are: {', '.join(_TASKS)}")
    where, what = _TASKS[name]
    return getattr(importlib.import_module(where), what)


def guess(path: Path) -> str:
    """The task that a folder or file looks like; the last resort is the first task there is."""
    return next((name for name in reversed(_TASKS) if task(name).recognises(path)), next(iter(_TASKS)))
