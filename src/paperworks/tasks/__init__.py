"""One contract per task: what a sample is, what a network returns, default loss, metrics, picture, writer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paperworks.errors import InputError

if TYPE_CHECKING:
    from paperworks.tasks.contract import Task


class Home(NamedTuple):
    """What can be said of a task without importing it, which takes seconds."""

    module: str
    contract: str
    good_from: float | None = None
    """From this value of its metric on people would use a network (docs/verdicts.md); None where the metric has no such place."""


_TASKS = {
    "segmentation": Home("paperworks.tasks.segmentation", "Segmentation", 0.8),
    "classification": Home("paperworks.tasks.classification", "Classification", 0.8),
    "video": Home("paperworks.tasks.video", "Video", 0.8),
    "generation": Home("paperworks.tasks.generation", "Generation", 25.0),
    "detection": Home("paperworks.tasks.detection", "Detection", 0.4),
    "representation": Home("paperworks.tasks.representation", "Representation", 0.7),
    "restoration": Home("paperworks.tasks.restoration", "Restoration", 25.0),
    "recommendation": Home("paperworks.tasks.recommendation", "Recommendation"),
    "reading": Home("paperworks.tasks.reading", "TextReading", 0.8),
    "contours": Home("paperworks.tasks.contours", "Contours", 0.8),
    "meshes": Home("paperworks.tasks.meshes", "Meshes"),
    "captions": Home("paperworks.tasks.captions", "Captions", 5.0),
    "documents": Home("paperworks.tasks.documents", "Documents", 0.7),
    "translation": Home("paperworks.tasks.translation", "Translation", 30.0),
}


def task(name: str) -> type[Task]:
    """The class of a task's contract: ``task("segmentation")(source)`` opens a data set.

    Raises:
        InputError: there is no such task.
    """
    if name not in _TASKS:
        raise InputError(f"no task is called {name!r}; there are: {', '.join(_TASKS)}")
    home = _TASKS[name]
    return getattr(importlib.import_module(home.module), home.contract)


def good_enough(name: str, value: float) -> bool:
    """Whether people would use a network that reaches this value of the task's metric; True where nobody can say."""
    floor = _TASKS[name].good_from
    return floor is None or value >= floor


def guess(path: Path) -> str:
    """The task that a folder or file looks like; the last resort is the first task there is."""
    return next((name for name in reversed(_TASKS) if task(name).recognises(path)), next(iter(_TASKS)))
