"""Labels for volumes: NIfTI in and out, in the place where the input lies, in memory that does not grow with the probabilities' depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from paperworks.data.images import unit
from paperworks.data.nifti import read_volume, stem, write_volume
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.drawing import montage, overlay, places
from paperworks.tasks.tiling import box, predict_slabs


def window_of(size: tuple[int, ...], window: int, spacing: tuple[float, ...] | None) -> tuple[int, ...]:
    """Sides of the window for an image of ``size``: ``window`` for images; of volumes a box of as many voxels as that is pixels."""
    return box(size, window**2, spacing) if len(size) == 3 else (window,) * len(size)


def predict_file(model: Model, volume: Path, labels: Path, options: Options) -> None:
    """Write the labels of a volume, 8 bits, with the axes and the affine of the volume.

    ``NAME.probabilities.nii.gz`` (float32, the classes along the fourth axis) and ``NAME.overlay.png`` where they are asked for.

    Raises:
        InputError: the volume is broken or not of the model's kind, or what is asked for is not done with volumes.
    """
    if options.refine:
        raise InputError(f"{volume} is a volume, and the inference methods take images; predict it without --with")
    raw = read_volume(volume)
    size = raw.shape[:3]
    if raw.shape[3] != model.spec.channels:
        raise InputError(f"{volume} has {raw.shape[3]} channels where the model was trained on {model.spec.channels}; give such volumes")

    def read(top: int, bottom: int) -> Tensor:
        return unit(raw[top:bottom], model.spec.range, model.spec.channels)

    window = window_of(size, options.window, model.spec.spacing)
    slabs = predict_slabs(model.forward, read, size, model.grid, window=window, overlap=options.overlap)
    found = np.empty(size, np.uint8)
    kept = np.empty((*size, len(model.spec.classes)), np.float32) if options.probabilities else None
    for where, slab in _placed(slabs):
        found[where] = slab.argmax(0).to(torch.uint8).numpy()
        if kept is not None:
            kept[where] = slab.movedim(0, -1).numpy()
    if kept is not None:
        write_volume(labels.with_name(f"{stem(labels)}.probabilities.nii.gz"), kept, volume)
    if options.overlays:
        chosen = places(torch.from_numpy(found))
        shown = montage(torch.stack([read(d, d + 1)[:, 0] for d in chosen], 1), range(len(chosen)))
        sheet = overlay(shown, montage(torch.from_numpy(found), chosen), len(model.spec.classes))
        with atomic(labels.with_name(f"{stem(labels)}.overlay.png")) as temporary:
            PIL.Image.fromarray(sheet).save(temporary)
    write_volume(labels, found, volume)


def _placed(slabs: Iterator[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Each slab with its slices."""
    top = 0
    for slab in slabs:
        yield slice(top, top + slab.shape[1]), slab
        top += slab.shape[1]
