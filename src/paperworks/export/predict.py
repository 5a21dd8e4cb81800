"""Trained networks ready for use, whatever file they come from, and predictions for files and folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paperworks import papers
from paperworks.errors import InputError
from paperworks.export.onnx import load_onnx
from paperworks.nn.fuse import fast
from paperworks.tasks import task
from paperworks.tasks.base import Refiner, grid_of, override
from paperworks.tasks.contract import Model, Options, channels_last
from paperworks.train.run import Run, read_spec


def load_model(source: str | Path) -> Model:
    """A run folder or an exported ``.onnx`` file.

    Raises:
        InputError: it is neither, or it is broken.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        exported = load_onnx(path)
        return Model(path, read_spec(json.loads(exported.spec_json)), exported.grid, exported)
    if not path.is_dir():
        raise InputError(f"{path} is neither a run folder nor an .onnx file" + ("" if path.exists() else " (it does not exist)"))
    run = Run.load(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = run.network()
    deployed = fast(task(run.spec.task).deploy(network, run.spec)).to(device)
    return Model(path, run.spec, grid_of(network), lambda given: deployed(channels_last(given.to(device))))


def build_refiner(name: str, settings: Mapping[str, Any]) -> Refiner:
    """An inference method with its defaults changed by ``settings``.

    Raises:
        InputError: no such method or setting.
    """
    method = papers.method(name)
    try:
        (config,) = override(settings, method.config)
    except ValueError as error:
        raise InputError(f"--set: {error}") from None
    return method.build(config)


def predict_files(
    model: Model,
    inputs: Sequence[str | Path],
    out: str | Path,
    options: Options | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the model's predictions for files and folders as its task does it.

    Args:
        model: what predicts.
        inputs: files, and folders that are searched; folders keep their structure in ``out``.
        out: where the predictions go.
        options: what else is asked for.
        progress: is told (done, total).

    Returns:
        The files that were written.

    Raises:
        InputError: an input is missing or broken, or the task cannot do what is asked. What was written before stays.
    """
    return task(model.spec.task).predict_files(model, inputs, out, options or Options(), progress=progress)


def predict(model: str | Path, inputs: Sequence[str | Path], out: str | Path, **options: Any) -> list[Path]:
    """Predict files with a run folder or an exported file; ``paperworks predict`` for Python.

    Args:
        model: a run folder or an ``.onnx`` file.
        inputs: files and folders.
        out: where the predictions go.
        **options: fields of ``tasks.contract.Options``.

    Returns:
        The files that were written.
    """
    return predict_files(load_model(model), inputs, out, Options(**options))
