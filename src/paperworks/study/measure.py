"""What a network costs: parameters, operations, latency in each form in which it can be run, memory.

Operations are counted as ``tasks/operations.py`` says: a multiplication with its addition is two, and only matrix products, convolutions
and attentions count. Latencies of all forms are taken in turns and are those of one call on this machine, in this moment.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import papers, tasks
from paperworks.errors import InputError
from paperworks.export.onnx import ExportError, export_onnx, load_onnx
from paperworks.nn.fuse import channels_last, fast
from paperworks.tasks.base import Spec, grid_of
from paperworks.tasks.contract import Task
from paperworks.tasks.environment import hardware, interleaved, peak_memory, summary, versions
from paperworks.tasks.operations import ActivationCounter, flop_counter
from paperworks.train.run import Run, configure

SIDE = {2: 256, 3: 64}
"""Default side of an image, of a volume."""


def measure(
    module: nn.Module,
    *,
    task: type[Task],
    spec: Spec,
    size: tuple[int, ...] | None = None,
    batches: Sequence[int] = (1, 8),
    seconds: float = 2.0,
    onnx_path: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a network at one image size, on the device where its parameters are.

    Args:
        module: what the task deploys, with its ``grid``.
        task: says what an input is.
        spec: what the network was built for.
        size: sides of the input, default those of the spec; it is made a valid one, as prediction does it, and not tiled.
        batches: batch sizes to time. A batch that would take more than four times ``seconds`` a call is left out (None).
        seconds: spent on each form at each batch size, about; three calls at least.
        onnx_path: the exported network, to be timed too.
        progress: is told what is measured next.

    Returns:
        ``params``; ``flops`` and ``activations`` of one image; ``latency_ms``, form -> batch size (a text) -> ``p50``, ``p95``, ``n`` or None, where the
        forms are ``eager`` (the module as it is), ``channels_last``, ``fused`` (that and batch norms folded, what prediction uses) and
        ``onnxruntime``; ``peak_memory_mib``, by which a forward pass of one image raises the memory in use (on the CPU the resident
        set of a fresh process, known on Linux only); ``size``, ``input`` (the size after padding), ``device``, ``threads``,
        ``hardware``, ``versions``.
    """
    tell = progress or (lambda _: None)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    grid, size = grid_of(module), tuple(size or spec.size)
    image = task.example(spec, grid, size=size).to(device)
    shape = image.shape[1:]

    tell("operations")
    forms: dict[str, Callable[[Tensor], Any]] = {"eager": module.eval(), "channels_last": channels_last(module), "fused": fast(module)}
    if onnx_path is not None and device.type == "cpu":
        forms["onnxruntime"] = load_onnx(onnx_path)
    with torch.inference_mode(), flop_counter() as flops:
        module(image)
    with torch.inference_mode(), ActivationCounter() as activations:
        module(image)

    latency: dict[str, dict[str, dict[str, float] | None]] = {form: {} for form in forms}
    for batch in batches:
        tell(f"latency, batch {batch}")
        slowest = max((t["p50"] for times in latency.values() if (t := times.get("1"))), default=0.0)
        bearable = batch * slowest <= 4e3 * seconds
        able = {name: form for name, form in forms.items() if batch == 1 or name != "onnxruntime" or not task.single}
        timed = _latency(able, image.expand(batch, *shape).contiguous(), seconds) if bearable else {}
        for form in forms:
            latency[form][str(batch)] = timed.get(form)

    tell("memory")
    return {
        "params": sum(p.numel() for p in module.parameters()),
        "flops": flops.get_total_flops(),
        "activations": activations.total,
        "latency_ms": latency,
        "peak_memory_mib": peak_memory(module, image, smallest=task.example(spec, grid, size=(1,) * len(size)).to(device)),
        "size": list(size),
        "input": list(shape[1:]),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
    }


def _latency(forms: dict[str, Callable[[Tensor], Any]], images: Tensor, seconds: float) -> dict[str, dict[str, float]]:
    wait = torch.cuda.synchronize if images.is_cuda else None
    with torch.inference_mode():
        times = interleaved({name: lambda f=form: f(images) for name, form in forms.items()}, seconds=seconds, least=3, synchronise=wait)
    return {name: summary(t) for name, t in times.items()}


def measure_subject(
    subject: str,
    *,
    variant: str | None = None,
    size: int | None = None,
    channels: int = 3,
    classes: int = 2,
    spec: Spec | None = None,
    seconds: float = 2.0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a paper, with fresh weights, or a run; its ONNX form too where it exports.

    Args:
        subject: a paper's id or a run folder.
        variant: of a paper; default: the cheapest of those that ``--variant auto`` may take.
        size: sides of the image; default: those of the run's data, or 256 (64 for volumes).
        channels: of the image, for a paper.
        classes: for a paper.
        spec: what a paper's network is built for, in place of ``channels`` and ``classes``.
        seconds: spent on each form at each batch size, about.
        progress: is told what is measured next.

    Returns:
        ``paper``, ``variant`` and what :func:`measure` returns; ``onnx`` says why there is no ``onnxruntime`` where there is none.

    Raises:
        InputError: there is no such paper, variant or run, or the paper is no network.
    """
    if (Path(subject) / "run.json").exists():
        run = Run.load(subject)
        name, variant, spec, network = run.request.paper, run.request.variant, run.spec, run.network()
        sides = (size,) * spec.ndim if size else spec.size
    else:
        name = subject
        card = papers.card(name)
        if not card.variants:
            raise InputError(f"{name} is no network but a {card.kind}; measure a network, or a run that was trained with it")
        variant = variant or papers.paper(name).auto[0]
        paper, config, _ = configure(name, variant, {})
        if spec is None:
            ndim = getattr(config, "ndim", 2)
            spec = tasks.task(card.task).plain_spec(channels, classes, ndim, (size or SIDE[ndim],) * ndim)
        sides = spec.size
        network = paper.build(spec, config)
    kind = tasks.task(spec.task)
    deployed = kind.deploy(network, spec).eval()
    found: dict[str, Any] = {"paper": name, "variant": variant}
    with tempfile.TemporaryDirectory() as folder:
        exported: Path | None = Path(folder) / "model.onnx"
        if progress:
            progress("export")
        try:
            sample = kind.example(spec, deployed.grid, size=[min(n, SIDE[spec.ndim]) for n in sides])[0]
            described = json.dumps(dataclasses.asdict(spec))
            export_onnx(
                deployed,
                exported,
                outputs=kind.outputs,
                samples=[sample],
                grid=deployed.grid,
                spec_json=described,
                names={"paper": name, "variant": variant},
                single=kind.single,
            )
        except (ExportError, InputError) as error:
            exported, found["onnx"] = None, str(error)
        return found | measure(deployed, task=kind, spec=spec, size=sides, seconds=seconds, onnx_path=exported, progress=progress)
