"""Why a trained network answered as it did: a picture for every image, by whatever a paper offers for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from paperworks import papers
from paperworks.errors import InputError
from paperworks.files import atomic, write_json
from paperworks.tasks import task
from paperworks.tasks.base import grid_of, override
from paperworks.tasks.contract import Deployed
from paperworks.tasks.drawing import display, panel
from paperworks.tasks.explain import Explain, heat_overlay, scaled
from paperworks.tasks.files import find_jobs, read_unit
from paperworks.train.run import Run


def build_explainer(kind: str, name: str | None = None, settings: Mapping[str, Any] | None = None) -> Explain:
    """What explains a task's networks (default: the first there is), with its defaults changed by ``settings``.

    Raises:
        InputError: nothing of that name for the task, or no such setting.
    """
    offers = papers.explainers(kind)
    if not offers:
        raise InputError(f"no paper explains networks for {kind}")
    explainer = papers.explainer(kind, name or next(iter(offers)))
    try:
        (config,) = override(settings or {}, explainer.config)
    except ValueError as error:
        raise InputError(f"--set: {error}") from None
    return explainer.build(config)


def explain_files(
    source: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Write a picture for every image: what the network saw of it, and for each class where it sees that class.

    Args:
        source: a run folder; gradients are needed, which an exported file does not give.
        inputs: images, and folders that are searched; folders keep their structure in ``out``.
        out: where ``NAME.explained.png`` and ``explanations.json`` go.
        name: of what explains; default: the first that a paper offers for the run's task.
        settings: changes of its configuration.
        classes: those to be explained; default: the most probable one of each image.
        progress: is told (done, total).

    Returns:
        What ``explanations.json`` holds, an entry an image: ``file``, ``picture``, the probability of every class, and of each explained
        class the place where its map is highest (``peak``, x and y as shares of what the network saw; null for a map without heat).

    Raises:
        InputError: no run, an unknown class or setting, or a broken image. What was written before stays.
    """
    if Path(source).is_file():
        raise InputError(f"{source} is a file; explanations need gradients, which only the run folder's network gives")
    run = Run.load(source)
    spec, kind = run.spec, task(run.spec.task)
    explain = build_explainer(spec.task, name, settings)
    unknown = [c for c in classes if c not in spec.classes]
    if unknown:
        raise InputError(f"--classes {', '.join(unknown)}: the network knows {', '.join(spec.classes)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deployed = kind.deploy(run.network().eval(), spec).to(device).eval()
    jobs = find_jobs(inputs, Path(out), kind.accepts, lambda path: path.with_suffix(".explained.png"))
    found: list[dict[str, Any]] = []
    try:
        for i, (file, picture) in enumerate(jobs):
            image = kind.network_input(read_unit(file, spec), grid_of(deployed.network))
            probabilities, maps = _explained(deployed, explain, image.to(device), [spec.classes.index(c) for c in classes])
            titles = [f"{spec.classes[c]} {100 * float(probabilities[c]):.0f} %" for c in maps]
            views = [display(image), *(heat_overlay(image, heat) for heat in maps.values())]
            picture.parent.mkdir(parents=True, exist_ok=True)
            with atomic(picture) as temporary:
                PIL.Image.fromarray(panel(views, [file.name, *titles], side=max(224, *image.shape[1:]))).save(temporary, format="PNG")
            found.append(
                {
                    "file": str(file),
                    "picture": str(picture),
                    "probabilities": {name: float(p) for name, p in zip(spec.classes, probabilities)},
                    "explained": [{"class": spec.classes[c], "peak": _peak(heat)} for c, heat in maps.items()],
                }
            )
            if progress:
                progress(i + 1, len(jobs))
    finally:
        if found:
            write_json(Path(out) / "explanations.json", found)
    return found


def _explained(deployed: Deployed, explain: Explain, image: Tensor, classes: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Probabilities K, and for each class a map H W in [0, 1]; without classes, for the most probable one."""
    with torch.inference_mode():
        probabilities = deployed(image[None])[0].float().cpu()
    chosen = classes or [int(probabilities.argmax())]
    given = deployed.normalised(image[None])
    return probabilities, {c: scaled(explain(deployed.network, given, c))[0].cpu() for c in chosen}


def _peak(heat: Tensor) -> tuple[float, float] | None:
    if not heat.any():
        return None
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return (column + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0]
