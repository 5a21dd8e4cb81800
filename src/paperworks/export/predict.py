"""Predictions for files and folders, by a run or by an exported file: any size, bounded memory, names and geometry kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from paperworks import papers
from paperworks.data.images import IMAGE_SUFFIXES, read_header, read_image, unit
from paperworks.data.tiff import TiffRows, write_tiff
from paperworks.errors import InputError
from paperworks.export.onnx import load_onnx
from paperworks.files import atomic
from paperworks.nn.fuse import fast
from paperworks.tasks.base import Grid, Refiner, Spec, grid_of, override
from paperworks.tasks.drawing import colour, overlay
from paperworks.tasks.segmentation import Deployed
from paperworks.tasks.tiling import predict_array, predict_slabs
from paperworks.train.run import Run, read_spec

STREAMED = 1 << 24
"""TIFF images of more pixels are read, predicted and written by rows."""
REFINED = 1 << 24
"""An inference method sees the image whole; larger ones are refused."""
TIFF = {".tif", ".tiff"}


@dataclass
class Model:
    """A trained network ready for use, whatever file it came from."""

    source: Path
    spec: Spec
    grid: Grid
    forward: Callable[[Tensor], Tensor]
    """B C h w in [0, 1] -> probabilities B K h' w'."""

    def predict(
        self, image: Float[Tensor, "C H W"], refine: Refiner | None = None, *, window: int = 1024, overlap: float = 0.25
    ) -> Float[Tensor, "K H W"]:
        """Probabilities of an image of any size."""
        probabilities = predict_array(self.forward, image, self.grid, window=window, overlap=overlap)
        return refine(image, probabilities) if refine else probabilities


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
    deployed = fast(Deployed(network, run.spec)).to(device)
    return Model(path, run.spec, grid_of(network), lambda image: deployed(image.to(device).contiguous(memory_format=torch.channels_last)))


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
    *,
    refine: Refiner | None = None,
    probabilities: bool = False,
    overlays: bool = False,
    window: int = 1024,
    overlap: float = 0.25,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a mask for every image, under the image's name: PNG (with a palette) or, for a TIFF, a tiled TIFF.

    Args:
        model: what predicts.
        inputs: images, and folders that are searched for images; folders keep their structure in ``out``.
        out: where the masks go.
        refine: an inference method.
        probabilities: also write ``NAME.probabilities.tif``, float16, K channels.
        overlays: also write ``NAME.overlay.png``.
        window: longest side of a tile.
        overlap: share of a tile that its neighbour covers too.
        resume: leave out images whose mask is there already.
        progress: is told (done, total).

    Returns:
        The masks that were written.

    Raises:
        InputError: an input is missing or broken. Masks written before stay.
    """
    if not 0 <= overlap < 1:
        raise InputError(f"--overlap {overlap} is no share from 0 to below 1")
    if window < 16:
        raise InputError(f"--window {window} is too small; take 64 or more")
    out = Path(out)
    jobs = _jobs(inputs, out)
    written = []
    for i, (image, mask) in enumerate(jobs):
        if not (resume and mask.exists()):
            _predict_file(model, image, mask, refine, probabilities, overlays, window, overlap)
            written.append(mask)
        if progress:
            progress(i + 1, len(jobs))
    return written


def _jobs(inputs: Sequence[str | Path], out: Path) -> list[tuple[Path, Path]]:
    """(image, mask) pairs; refuses masks that would lie on one another or on their image."""
    jobs: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            found = sorted(p for p in given.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and not p.name.startswith("."))
            if not found:
                raise InputError(f"{given} holds no images; give image files or a folder of them")
            relative = [(p, p.relative_to(given)) for p in found]
        elif given.exists():
            relative = [(given, Path(given.name))]
        else:
            raise InputError(f"{given} does not exist; give image files or folders")
        for image, name in relative:
            mask = (out / name).with_suffix(".tif" if image.suffix.lower() in TIFF else ".png")
            if mask in jobs and jobs[mask] != image:
                raise InputError(f"{image} and {jobs[mask]} would both be written to {mask}; predict them into two folders")
            if mask.exists() and mask.samefile(image):
                raise InputError(f"{mask} is the image itself; take another --out")
            jobs[mask] = image
    return [(image, mask) for mask, image in jobs.items()]


def _predict_file(
    model: Model, image: Path, mask: Path, refine: Refiner | None, probabilities: bool, overlays: bool, window: int, overlap: float
) -> None:
    header = read_header(image)
    mask.parent.mkdir(parents=True, exist_ok=True)
    pixels = header.width * header.height
    if refine and pixels > REFINED:
        raise InputError(f"{image} has {pixels:,} pixels; an inference method takes at most {REFINED:,}: predict without --with, or cut it")
    classes = len(model.spec.classes)
    if image.suffix.lower() in TIFF and pixels > STREAMED:
        if overlays:
            raise InputError(f"{image} is too large for an overlay picture ({pixels:,} pixels); predict it without --overlays")
        _stream(model, image, mask, probabilities, window, overlap)
        return
    picture = _unit(model, image, read_image(image))
    result = model.predict(picture, refine, window=window, overlap=overlap)
    labels = result.argmax(0).to(torch.uint8).numpy()
    if probabilities:
        rows = iter([result.permute(1, 2, 0).numpy()])
        write_tiff(_beside(mask, ".probabilities.tif"), rows, header.height, header.width, np.float16, classes)
    if overlays:
        with atomic(_beside(mask, ".overlay.png")) as temporary:
            PIL.Image.fromarray(overlay(picture, torch.from_numpy(labels), classes)).save(temporary)
    if mask.suffix == ".tif":
        write_tiff(mask, iter([labels]), header.height, header.width, np.uint8)
    else:
        coloured = PIL.Image.fromarray(labels, "L")
        coloured.putpalette([part for index in range(classes) for part in colour(index)])
        with atomic(mask) as temporary:
            coloured.save(temporary)


def _stream(model: Model, image: Path, mask: Path, probabilities: bool, window: int, overlap: float) -> None:
    """Read, predict and write by rows; memory does not grow with the image's height."""
    classes = len(model.spec.classes)
    with TiffRows(image) as rows:
        slabs = predict_slabs(
            model.forward,
            lambda top, bottom: _unit(model, image, rows(top, bottom)),
            rows.height,
            rows.width,
            model.grid,
            window=window,
            overlap=overlap,
        )
        if not probabilities:
            write_tiff(mask, (slab.argmax(0).to(torch.uint8).numpy() for slab in slabs), rows.height, rows.width, np.uint8)
            return
        with tempfile.TemporaryFile(dir=mask.parent) as kept:
            table = np.memmap(kept, np.float16, "w+", shape=(rows.height, rows.width, classes))

            def labels() -> Iterator[np.ndarray]:
                top = 0
                for slab in slabs:
                    table[top : top + slab.shape[1]] = slab.permute(1, 2, 0).numpy()
                    top += slab.shape[1]
                    yield slab.argmax(0).to(torch.uint8).numpy()

            write_tiff(mask, labels(), rows.height, rows.width, np.uint8)
            step = max(1, (64 << 20) // (rows.width * classes * 2))
            bands = (np.asarray(table[top : top + step]) for top in range(0, rows.height, step))
            write_tiff(_beside(mask, ".probabilities.tif"), bands, rows.height, rows.width, np.float16, classes)


def _unit(model: Model, image: Path, raw: np.ndarray) -> Tensor:
    try:
        return unit(raw, model.spec.range, model.spec.channels)
    except InputError as error:
        raise InputError(f"{image}: {error}") from None


def _beside(mask: Path, ending: str) -> Path:
    return mask.with_name(mask.stem + ending)
