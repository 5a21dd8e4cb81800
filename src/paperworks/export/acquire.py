"""Which unlabelled images to label next, by whatever a paper offers for it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from paperworks import papers
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.tasks import task
from paperworks.tasks.base import Spec, grid_of, override
from paperworks.tasks.contract import Deployed
from paperworks.tasks.drawing import display, panel
from paperworks.tasks.files import find_files, read_unit
from paperworks.train.run import Run

BATCH = 64
TASK = "classification"
"""Whose networks can be asked: the label is one of finitely many."""


def acquire_files(
    source: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    size: int = 10,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Choose the images to label next, as ``acquire.csv`` in ``out``, and ``acquire.png`` to look at.

    Args:
        source: a run folder of a classifier.
        inputs: unlabelled images, and folders that are searched.
        out: folder of the two files.
        size: how many to choose.
        name: of what chooses; default: the first that a paper offers.
        settings: changes of its configuration.
        progress: is told (done, total).

    Returns:
        The rows of ``acquire.csv``, in the order in which they were chosen: ``file``, ``score`` (what is gained by all up to this one, in nats),
        ``class`` and ``probability`` (what the network says now).

    Raises:
        InputError: no run of a classifier, a network that cannot be asked, an unknown setting, fewer images than asked for, or a broken one.
    """
    run, out = Run.load(source), Path(out)
    spec = run.spec
    if spec.task != TASK:
        raise InputError(f"{source} is a run of {spec.task}; only runs of {TASK} can be asked what to label")
    acquirer = papers.acquirer(name or next(iter(papers.acquirers())))
    try:
        (config,) = override(settings or {}, acquirer.config)
    except ValueError as error:
        raise InputError(f"--set: {error}") from None
    kind = task(spec.task)
    files = [file for file, _ in find_files(inputs, kind.accepts)]
    if not 1 <= size <= len(files):
        raise InputError(f"{size} of {len(files)} images cannot be chosen; ask for 1 to {len(files)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deployed = kind.deploy(run.network(), spec).to(device).eval()
    probabilities: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(files), BATCH):
            given = torch.stack([_read(file, spec, deployed) for file in files[first : first + BATCH]]).to(device)
            with torch.inference_mode():
                probabilities.extend(deployed(given).float().cpu())
            if progress:
                progress(min(first + BATCH, len(files)), len(files))
            yield deployed.normalised(given)

    chosen = acquirer.build(config)(deployed.network, batches(), size)
    rows = [
        {
            "file": str(files[i]),
            "score": round(score, 6),
            "class": spec.classes[int(probabilities[i].argmax())],
            "probability": round(float(probabilities[i].max()), 6),
        }
        for i, score in zip(chosen.indices, chosen.scores)
    ]
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / "acquire.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
        sheet = csv.DictWriter(f, list(rows[0]))
        sheet.writeheader()
        sheet.writerows(rows)
    shown = rows[:20]
    pictures = [display(_read(Path(row["file"]), spec, deployed)) for row in shown]
    with atomic(out / "acquire.png") as temporary:
        titles = [f"{i}. {row['class']} {100 * row['probability']:.0f} %" for i, row in enumerate(shown, start=1)]
        PIL.Image.fromarray(panel(pictures, titles, side=120)).save(temporary, format="PNG")
    return rows


def _read(file: Path, spec: Spec, deployed: Deployed) -> Tensor:
    """The image as the network sees it, C S S in [0, 1]."""
    return task(spec.task).network_input(read_unit(file, spec), grid_of(deployed.network))
