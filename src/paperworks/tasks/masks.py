"""Masks for image files: any size, bounded memory, names and geometry kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from paperworks.data.images import read_header, read_image, unit
from paperworks.data.tiff import TiffRows, write_tiff
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.drawing import colour, overlay
from paperworks.tasks.tiling import predict_array, predict_slabs

STREAMED = 1 << 24
"""TIFF images of more pixels are read, predicted and written by rows."""
REFINED = 1 << 24
"""An inference method sees the image whole; larger ones are refused."""
TIFF = {".tif", ".tiff"}


def predict_file(model: Model, image: Path, mask: Path, options: Options) -> None:
    """Write the mask of an image: PNG (with a palette) or, for a TIFF, a tiled TIFF; ``NAME.probabilities.tif`` (float16, K channels) and
    ``NAME.overlay.png`` where they are asked for.

    Raises:
        InputError: the image is broken, or too large for what is asked.
    """
    header = read_header(image)
    pixels = header.width * header.height
    if options.refine and pixels > REFINED:
        raise InputError(f"{image} has {pixels:,} pixels; an inference method takes at most {REFINED:,}: predict without --with, or cut it")
    classes = len(model.spec.classes)
    if image.suffix.lower() in TIFF and pixels > STREAMED:
        if options.overlays:
            raise InputError(f"{image} is too large for an overlay picture ({pixels:,} pixels); predict it without --overlays")
        _stream(model, image, mask, options)
        return
    picture = _unit(model, image, read_image(image))
    with torch.inference_mode():
        result = predict_array(model.forward, picture, model.grid, window=options.window, overlap=options.overlap)
    if options.refine:
        result = options.refine(picture, result)
    labels = result.argmax(0).to(torch.uint8).numpy()
    if options.probabilities:
        rows = iter([result.permute(1, 2, 0).numpy()])
        write_tiff(_beside(mask, ".probabilities.tif"), rows, header.height, header.width, np.float16, classes)
    if options.overlays:
        with atomic(_beside(mask, ".overlay.png")) as temporary:
            PIL.Image.fromarray(overlay(picture, torch.from_numpy(labels), classes)).save(temporary)
    if mask.suffix == ".tif":
        write_tiff(mask, iter([labels]), header.height, header.width, np.uint8)
    else:
        coloured = PIL.Image.fromarray(labels, "L")
        coloured.putpalette([part for index in range(classes) for part in colour(index)])
        with atomic(mask) as temporary:
            coloured.save(temporary)


def _stream(model: Model, image: Path, mask: Path, options: Options) -> None:
    """Read, predict and write by rows; memory does not grow with the image's height."""
    classes = len(model.spec.classes)
    with TiffRows(image) as rows:
        slabs = predict_slabs(
            model.forward,
            lambda top, bottom: _unit(model, image, rows(top, bottom)),
            (rows.height, rows.width),
            model.grid,
            window=options.window,
            overlap=options.overlap,
        )
        if not options.probabilities:
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
