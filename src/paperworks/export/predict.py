"""Trained networks ready for use, whatever file they come from, and predictions for files and folders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paperworks import papers
from paperworks.errors import InputError
from paperworks.export.onnx import load_onnx
from paperworks.nn.fuse import fast
from paperworks.tasks import task
from paperworks.tasks.base import Refiner, grid_of, override
from paperworks.tasks.contract import Model, Options, channels_last
from paperworks.train.run import Run, read_spec

APART = 0.05
"""Largest relative difference between bfloat16 and float32 on the first input at which predictions in bfloat16 go on."""
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class Bfloat16(nn.Module):
    """A deployed network that computes in bfloat16 where autocast does, and compares its first outputs with those of float32.

    Convolutions and linear layers keep their weights in bfloat16, so that they are not cast in every call. What comes out is float32 again.

    Args:
        deployed: the network.
        told: is told how far the outputs on the first input are apart: norm of the difference over norm, or share of the indices that
            are others.
    """

    def __init__(self, deployed: nn.Module, told: Callable[[float], None]) -> None:
        super().__init__()
        self.whole, self.short, self.told = deployed, deepcopy(deployed).requires_grad_(False), told
        for part in self.short.modules():
            if type(part) in WEIGHTED:
                part.to(torch.bfloat16)
        self.compared = False

    def forward(self, given: Tensor) -> Any:
        """What the network gives.

        Raises:
            InputError: on the first input it is not what float32 gives.
        """
        with torch.autocast(given.device.type, torch.bfloat16):
            found = self.short(given)
        found = tuple(map(_float, found)) if isinstance(found, tuple) else _float(found)
        if not self.compared:
            apart = _apart(found, self.whole(given))
            if not apart <= APART:
                raise InputError(
                    f"in bfloat16 the outputs differ from float32's by {apart:.0%} on the first input, which is too much; "
                    "leave --precision bf16 out"
                )
            self.told(apart)
            self.compared = True
        return found


def _float(found: Tensor) -> Tensor:
    return found.float() if found.is_floating_point() else found


def _apart(found: Any, expected: Any) -> float:
    """The largest relative difference of any output; infinite where there are others in number."""
    if isinstance(found, tuple):
        return max(map(_apart, found, expected), default=0.0)
    if found.shape != expected.shape:
        return math.inf
    if not found.is_floating_point():
        return float((found != expected).float().mean()) if found.numel() else 0.0
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def load_model(
    source: str | Path, *, precision: Literal["fp32", "bf16"] = "fp32", told: Callable[[float], None] = lambda apart: None
) -> Model:
    """A run folder or an exported ``.onnx`` file.

    Args:
        source: the folder or file.
        precision: ``bf16`` takes about half the time where the processor computes in it, and gives slightly other answers.
        told: is told how far they are apart on the first input; see :class:`Bfloat16`.

    Raises:
        InputError: it is neither, it is broken, or an exported file is asked for another precision than its own.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        if precision != "fp32":
            raise InputError(f"{path} computes as it was exported; give the run folder for --precision {precision}, or export with --int8")
        exported = load_onnx(path)
        return Model(path, read_spec(json.loads(exported.spec_json)), exported.grid, exported)
    if not path.is_dir():
        raise InputError(f"{path} is neither a run folder nor an .onnx file" + ("" if path.exists() else " (it does not exist)"))
    run = Run.load(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = run.network()
    deployed = fast(task(run.spec.task).deploy(network, run.spec)).to(device)
    if precision == "bf16":
        deployed = Bfloat16(deployed, told)
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


def predict(
    model: str | Path, inputs: Sequence[str | Path], out: str | Path, *, precision: Literal["fp32", "bf16"] = "fp32", **options: Any
) -> list[Path]:
    """Predict files with a run folder or an exported file; ``paperworks predict`` for Python.

    Args:
        model: a run folder or an ``.onnx`` file.
        inputs: files and folders.
        out: where the predictions go.
        precision: ``fp32`` or ``bf16``; see :func:`load_model`.
        **options: fields of ``tasks.contract.Options``.

    Returns:
        The files that were written.
    """
    return predict_files(load_model(model, precision=precision), inputs, out, Options(**options))
