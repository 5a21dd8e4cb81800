"""Trained networks as ONNX files: one file, any valid size, checked against the original before it gets its name.

A file takes ``image`` (B C H W, float32 in [0, 1]; sides valid for its grid) and gives what its task's networks give (``probabilities`` B K h w,
say). It carries what is needed to use it elsewhere as metadata: grid, data specification, paper, variant, licence of the weights and
the paperworks version.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks import __version__, papers
from paperworks.data.augment import mirrored
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.nn.fuse import fused
from paperworks.tasks import task
from paperworks.tasks.base import Grid
from paperworks.tasks.environment import interleaved, summary

OPSET = 20
TOLERANCE = 1e-4
"""Largest relative error between the file and the original at which an export counts as done (float32)."""
CALIBRATION = 32
"""Training images, at most, that tell the ranges of activations for int8; taken at even steps."""
LONGEST = 512
"""Samples are compared up to this side; larger ones are cropped."""
PREFIX = "paperworks."
QUANTISED = ["Conv", "ConvTranspose", "MaxPool", "AveragePool", "Resize", "Concat", "Add", "Mul"]


class ExportError(RuntimeError):
    """The network cannot be exported, or the file computes something else than the network. The message is one line."""


@dataclass(frozen=True)
class Comparison:
    """The file's output beside the original's on one input."""

    shape: tuple[int, ...]
    """Of the input."""
    max_abs: float
    relative: float
    """Norm of the difference over the norm of the original's output."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares."""

    path: Path
    bytes: int
    opset: int
    comparisons: tuple[Comparison, ...]

    @property
    def relative_error(self) -> float:
        """The largest over all inputs."""
        return max(c.relative for c in self.comparisons)

    @property
    def max_abs_error(self) -> float:
        """The largest over all inputs."""
        return max(c.max_abs for c in self.comparisons)


@dataclass(frozen=True)
class QuantisedReport:
    """An int8 file beside the float32 one that it was made from."""

    path: Path
    bytes: dict[str, int]
    latency_ms: dict[str, dict[str, float]]
    quality: dict[str, dict[str, float]]

    @property
    def speedup(self) -> float:
        """Median latency of float32 over that of int8, on one calibration image, measured in turns."""
        return self.latency_ms["fp32"]["p50"] / self.latency_ms["int8"]["p50"]


def export_onnx(
    module: nn.Module,
    path: str | Path,
    *,
    outputs: Sequence[str],
    samples: Sequence[Tensor],
    grid: Grid,
    spec_json: str,
    names: Mapping[str, str],
    single: bool = False,
    opset: int = OPSET,
) -> ExportReport:
    """Write ``module`` to an ONNX file that takes any batch and every size that is valid for ``grid``.

    The file is compared with the module on the samples, on odd crops of them padded to valid sizes, on the smallest valid size and on a
    batch of two, and is renamed to ``path`` only when all of them agree.

    Args:
        module: images B C H W in [0, 1] -> a tensor or several. Its copy is put in evaluation mode on the CPU; itself it is left alone.
        path: the file, which appears whole or not at all.
        outputs: names of what the module gives, in its order.
        samples: real images C H W in [0, 1].
        grid: which sizes the module takes.
        spec_json: the data set's ``Spec`` as JSON.
        names: further metadata (paper, variant, licence of the weights ...).
        single: the file takes one image at a time, because what the module gives has no place for a batch (boxes, say).
        opset: version of the ONNX operators.

    Raises:
        ExportError: torch cannot export the module, or the file's outputs differ from the module's.
        InputError: the extra ``onnx`` is not installed.
    """
    _need_onnx()
    module = deepcopy(module).cpu().float().eval().requires_grad_(False)
    if not outputs:
        raise ExportError("networks of this task are not exported")
    samples = [_settled(image) for image in samples]
    metadata = {"version": __version__, "grid": json.dumps(dataclasses.asdict(grid)), "spec": spec_json, "precision": "float32", **names}
    program = _trace(fused(module), samples[0], grid, outputs, single, opset)
    program.model.metadata_props.update({PREFIX + key: value for key, value in metadata.items()})
    with atomic(path) as temporary:
        try:
            program.save(temporary, external_data=False)
        except ValueError as error:  # protobuf's limit of 2 GiB
            raise ExportError(f"the network does not fit into a single ONNX file: {_cause(error)}") from error
        exported = load_onnx(temporary)
        comparisons = tuple(_compare(module, exported, image) for image in _inputs(samples, grid, single))
        report = ExportReport(Path(path), temporary.stat().st_size, opset, comparisons)
        if not report.relative_error < TOLERANCE:  # NaN is no agreement either
            worst = max(comparisons, key=lambda c: math.inf if math.isnan(c.relative) else c.relative)
            raise ExportError(
                f"the exported network differs from the original: relative error {worst.relative:.1e} (at most {TOLERANCE:.0e}), "
                f"largest difference {worst.max_abs:.1e}, on an input of shape {worst.shape}"
            )
    return report


def _trace(module: nn.Module, sample: Tensor, grid: Grid, outputs: Sequence[str], single: bool, opset: int) -> torch.onnx.ONNXProgram:
    # Sides of three and more multiples, all different: a side of one at the bottom, or two equal ones, would be taken for a constant.
    sides = grid.sides([max(3 * grid.multiple, 24) + i * grid.multiple for i in range(sample.ndim - 1)])
    example = torch.rand(1 if single else 2, sample.shape[0], *sides, generator=torch.Generator().manual_seed(0))
    if not sample.is_floating_point():  # indices have a meaning, noise has none
        example = torch.stack([sample] * len(example))
    axes: dict[int, Any] = {} if single else {0: torch.export.Dim("batch", min=1)}
    for axis, name in enumerate("" if grid.fixed else "dhw"[-len(sides) :], start=2):
        axes[axis] = torch.export.Dim(name, min=1)
        if grid.multiple > 1:
            axes[axis] = grid.multiple * axes[axis]
        if grid.offset:
            axes[axis] = axes[axis] + grid.offset
    try:
        with _quiet():
            captured = torch.export.export(module, (example,), dynamic_shapes=(axes,), strict=False)
            program = torch.onnx.export(
                captured, dynamo=True, input_names=["image"], output_names=list(outputs), opset_version=opset, verbose=False
            )
    except Exception as error:  # torch.export raises whatever the module's code runs into
        raise ExportError(f"torch cannot export {type(module).__name__} with sizes left open: {_cause(error)}") from error
    assert program is not None
    return program


def _settled(given: Tensor) -> Tensor:
    """On the CPU, in single precision; indices stay what they are."""
    given = given.detach().cpu()
    return given.float() if given.is_floating_point() else given


def _inputs(samples: list[Tensor], grid: Grid, single: bool) -> Iterator[Tensor]:
    """Batches of valid sizes, made of the samples: whole, cropped to odd sizes, the smallest there is, two at once.

    Where there is one size only they are that size's corners.
    """
    for image in samples[:4]:
        yield _valid(image, [min(n, LONGEST) for n in image.shape[1:]], grid)[None]
    image = samples[0]
    odd = [min(n, LONGEST) * (2 + i) // 5 | 1 for i, n in enumerate(image.shape[1:])]
    yield _valid(image, odd, grid)[None]
    yield _valid(image, [1] * (image.ndim - 1), grid)[None]
    if single:
        return
    pair = [_valid(i, odd[::-1], grid) for i in (image, samples[-1].flip(-1))]
    yield torch.stack(pair)


def _valid(image: Tensor, sides: Sequence[int], grid: Grid) -> Tensor:
    """The image's corner of the given sides, with the mirrored surroundings that the grid asks for."""
    for axis, side in enumerate(grid.sides(sides), start=1):
        image = image.index_select(axis, mirrored(-grid.margin, side, image.shape[axis]))
    return image


@torch.inference_mode()
def _compare(module: nn.Module, exported: OnnxPredictor, image: Tensor) -> Comparison:
    try:
        expected, found = module(image), exported(image)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise ExportError(
            f"an input of shape {tuple(image.shape)}, valid for the network's grid, makes it fail: {_cause(error)}"
        ) from error
    largest = relative = 0.0
    for theirs, ours in zip(_several(expected), _several(found), strict=True):
        if ours.shape != theirs.shape:
            raise ExportError(f"the exported network gives {tuple(ours.shape)} where the original gives {tuple(theirs.shape)}")
        if theirs.numel() == 0:
            continue
        difference = ours.double() - theirs.double()
        norm = float(theirs.double().norm())
        largest = max(largest, float(difference.abs().max()))
        error = float(difference.norm()) / norm if norm else float(difference.norm())
        relative = error if math.isnan(error) else max(relative, error)
    return Comparison(tuple(image.shape), largest, relative)


def _several(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else given


class OnnxPredictor:
    """An exported network, run by onnxruntime on the CPU. Made by :func:`load_onnx`."""

    def __init__(self, session: Any, metadata: Mapping[str, str]) -> None:
        self.session = session
        self.metadata = dict(metadata)
        """What the exporter noted: ``version``, ``grid``, ``spec``, ``precision``, and the names given to :func:`export_onnx`."""
        self.grid = Grid(**json.loads(metadata["grid"]))
        self.spec_json = metadata["spec"]

    def __call__(self, image: Float[Tensor, "B C *S"]) -> Any:
        """What the network gives for images in [0, 1] of a valid size: a tensor, or a tuple of several."""
        found = self.session.run(None, {"image": np.ascontiguousarray(_settled(image).numpy())})
        tensors = tuple(torch.from_numpy(array) for array in found)
        return tensors[0] if len(tensors) == 1 else tensors


def load_onnx(path: str | Path, *, threads: int | None = None) -> OnnxPredictor:
    """Open a file that :func:`export_onnx` or :func:`quantize` wrote.

    Args:
        path: the file.
        threads: of the processor; default: as many as torch uses.

    Raises:
        InputError: the file is missing, broken, refers to other files or was not exported by paperworks; or the extra is not installed.
    """
    _need_onnx()
    import onnxruntime

    path = Path(path)
    content, metadata = _read(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4
    # Threads that spin while they wait would take the processor from torch, which cuts and blends the tiles in between.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # From the bytes that were checked, so that nothing else can be read in their place.
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path} cannot be run by onnxruntime ({_cause(error)}); export the model again") from None
    outputs = list(task(json.loads(metadata["spec"])["task"]).outputs)
    if [i.name for i in session.get_inputs()] != ["image"] or [o.name for o in session.get_outputs()] != outputs:
        raise InputError(f"{path} does not take 'image' and give {', '.join(outputs)}; export the model again with `paperworks export`")
    return OnnxPredictor(session, metadata)


def _read(path: Path) -> tuple[bytes, dict[str, str]]:
    """A checked file's content and our metadata without the prefix."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file written by `paperworks export`") from None
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError:
        raise InputError(f"{path} is no ONNX file or is cut short; export the model again with `paperworks export`") from None
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise InputError(f"{path} keeps weights in other files, which are not read; export the model again with `paperworks export`")
    metadata = {p.key.removeprefix(PREFIX): p.value for p in model.metadata_props if p.key.startswith(PREFIX)}
    try:
        grid, spec = Grid(**json.loads(metadata["grid"])), json.loads(metadata["spec"])
        if grid.multiple < 1 or grid.offset < 0 or grid.margin < 0 or grid.fixed < 0 or grid.width < 0 or not isinstance(spec, dict):
            raise ValueError
        task(spec["task"])
    except (KeyError, ValueError, TypeError):
        raise InputError(f"{path} lacks the description that `paperworks export` writes into its files; export the model with it") from None
    return content, metadata


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model proto, wherever it is: initialisers, attributes, subgraphs, functions."""

    def of_nodes(nodes: Any) -> Iterator[Any]:
        for node in nodes:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                for graph in (attribute.g, *attribute.graphs):
                    yield from of_graph(graph)

    def of_graph(graph: Any) -> Iterator[Any]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from of_nodes(graph.node)

    yield from of_graph(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)


def quantize(
    source: str | Path,
    path: str | Path,
    *,
    calibration_images: Sequence[Tensor],
    evaluate: Callable[[OnnxPredictor], dict[str, float]],
) -> QuantisedReport:
    """Make a static int8 file from an exported float32 one: weights per output channel, activations by their extremes on real images.

    The normalisation, the last convolution and the softmax stay in float32: they are cheap, and their rounding would be seen directly.

    Args:
        source: a file of :func:`export_onnx`.
        path: the int8 file, which appears whole or not at all.
        calibration_images: training images C H W in [0, 1], some dozens.
        evaluate: the quality of a predictor; it is asked for both files.

    Raises:
        InputError: ``source`` is no float32 export of ours.
        ExportError: onnxruntime cannot quantise the network.
    """
    _need_onnx()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    original = load_onnx(source)
    if original.metadata.get("precision") != "float32":
        raise InputError(f"{source} is quantised already; give the float32 file")
    images = [_valid(image.cpu().float(), [min(n, LONGEST) for n in image.shape[1:]], original.grid)[None] for image in calibration_images]
    with atomic(path) as temporary, tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        try:
            with _quiet():
                quant_pre_process(source, prepared, skip_symbolic_shape=True)
                convolutions = [node.name for node in onnx.load(prepared).graph.node if node.op_type in ("Conv", "ConvTranspose")]
                quantize_static(
                    prepared,
                    temporary,
                    _Reader(images),  # type: ignore[arg-type]  # its base class would be imported with the package
                    per_channel=True,
                    reduce_range=True,  # 7 bits of weight: on processors without VNNI sums of 8 x 8 bits overflow, and files travel
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    op_types_to_quantize=QUANTISED,
                    nodes_to_exclude=convolutions[-1:],
                )
        except Exception as error:
            raise ExportError(f"onnxruntime cannot quantise {source}: {_cause(error)}") from error
        model = onnx.load(temporary)
        onnx.helper.set_model_props(model, {PREFIX + k: v for k, v in {**original.metadata, "precision": "int8"}.items()})
        onnx.save(model, temporary)
        predictors = {"fp32": original, "int8": load_onnx(temporary)}
        times = interleaved({name: lambda p=p: p(images[0]) for name, p in predictors.items()})
        return QuantisedReport(
            Path(path),
            bytes={"fp32": Path(source).stat().st_size, "int8": temporary.stat().st_size},
            latency_ms={name: summary(t) for name, t in times.items()},
            quality={name: evaluate(p) for name, p in predictors.items()},
        )


class _Reader:
    """The calibration images, one by one, as onnxruntime asks for them."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"image": image.numpy()}


def export_run(run: Any, path: str | Path, *, data: Any, int8: bool = False) -> dict[str, Any]:
    """Export a trained run, checked on its own validation images.

    Args:
        run: a ``Run``.
        path: the file; with ``int8`` the quantised one, made from a float32 export that is checked first.
        data: the run's task, opened: its training images calibrate, its validation images compare.
        int8: quantise; quality on the validation images and latency are measured before and after.

    Returns:
        ``relative_error``, ``max_abs_error``, ``inputs`` (shapes that were compared), ``opset`` and ``bytes``; with ``int8`` also
        ``quality`` and ``latency_ms`` of ``fp32`` and ``int8``, and ``speedup``.

    Raises:
        ExportError: the network cannot be exported, or the file differs from it; nothing is left at ``path``.
        InputError: the extra ``onnx`` is not installed, or the run has no trained model.
    """
    card = papers.card(run.request.paper)
    kind = task(run.spec.task)
    deployed = kind.deploy(run.network(), run.spec)
    names = {"paper": card.id, "variant": run.request.variant, "licence": card.licence["weights"]["en"]}

    def given(items: Sequence[Any]) -> list[Tensor]:
        return [kind.network_input(data.given(data.sample(item)), deployed.grid) for item in items]

    def export(to: str | Path) -> ExportReport:
        spec_json = json.dumps(dataclasses.asdict(run.spec))
        return export_onnx(
            deployed,
            to,
            outputs=kind.outputs,
            samples=given(data.val[:4]),
            grid=deployed.grid,
            spec_json=spec_json,
            names=names,
            single=kind.single,
        )

    def described(report: ExportReport) -> dict[str, Any]:
        return {
            "relative_error": report.relative_error,
            "max_abs_error": report.max_abs_error,
            "inputs": [list(c.shape) for c in report.comparisons],
            "opset": report.opset,
            "bytes": report.bytes,
        }

    if not int8:
        return described(export(path))
    with tempfile.TemporaryDirectory() as folder:
        report = export(Path(folder) / "float32.onnx")
        quantised = quantize(
            report.path,
            path,
            calibration_images=given(data.train[:: -(-len(data.train) // CALIBRATION)]),
            evaluate=lambda p: data.evaluate(data.predictor(p, run.spec, p.grid))[0],
        )
    return described(report) | {
        "bytes": quantised.bytes,
        "quality": quantised.quality,
        "latency_ms": quantised.latency_ms,
        "speedup": quantised.speedup,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that the exporters warn, log or print gets out: it speaks of their own insides, and the comparison is what counts."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """First line of the error that began a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX files need the package {error.name}: pip install 'paperworks[onnx]'") from None
