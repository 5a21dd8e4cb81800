"""NIfTI volumes: voxels in one orientation, and where they lie in the patient.

However a file stores its axes, the arrays here are D H W in the orientation S P L: slices run from feet to head, rows from front to back,
columns from the patient's right to left, as an axial slice is looked at. Oblique volumes take the nearest such order; nothing is
interpolated. What is written goes back into the axes and the affine of the file that it belongs to.

nibabel (extra ``medical``) reads the files, and is imported when the first one is met.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Num, Shaped

from paperworks.data.images import IMAGE_SUFFIXES, guarded, read_image, read_mask
from paperworks.errors import InputError
from paperworks.files import atomic

VOLUME_SUFFIXES = (".nii", ".nii.gz")
MAX_VOXELS = 1_000_000_000
"""Voxels beyond which a file is refused by its header."""


@dataclass(frozen=True)
class Geometry:
    """What a volume's header says, in the order of the arrays (D H W)."""

    size: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float]
    """Millimetres from voxel to voxel."""
    affine: Float[np.ndarray, "4 4"]
    """Index (d, h, w, 1) -> position in millimetres (right, front, up, 1)."""
    bit_depth: int

    def apart(self, other: Geometry) -> float:
        """Millimetres between the corners of two volumes of one size, where they are farthest apart."""
        corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in self.size), 1]
        return float(np.linalg.norm((corners @ (self.affine - other.affine).T)[:, :3], axis=1).max())


def is_volume(path: Path) -> bool:
    """Whether a file is NIfTI, by its name."""
    return path.name.lower().endswith(VOLUME_SUFFIXES)


def stem(path: Path) -> str:
    """The name of an image or a volume without what says its format: a.nii.gz -> a."""
    ending = next((e for e in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(e)), path.suffix)
    return path.name[: len(path.name) - len(ending)]


def is_readable(path: Path) -> bool:
    """Whether a file is one of the formats that are read here, by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES or is_volume(path)


def read_geometry(path: Path) -> Geometry:
    """Size and place of a volume from its header only.

    Raises:
        InputError: the file cannot be read, is no volume, or nibabel is missing.
    """
    return guarded(path, lambda: _geometry(_open(path)))


def read_volume(path: Path) -> Num[np.ndarray, "D H W C"]:
    """Voxels with the channels last: 8 bits as they are, all else as float32 (intensities of scanners have no full scale).

    The header's slope and intercept are applied. The fourth and fifth axis of a file are channels.

    Raises:
        InputError: as ``read_geometry``, or a voxel is NaN or infinite.
    """
    array = guarded(path, lambda: _voxels(path))
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{path} has NaN or infinite voxels; replace them by numbers and save the file again")
    return array


def read_labels(path: Path) -> Integer[np.ndarray, "D H W"]:
    """Labels as they are in the file, in 8 bits where they fit.

    Raises:
        InputError: as ``read_geometry``; also labels that are not whole numbers, and files of several channels.
    """
    array = guarded(path, lambda: _voxels(path))
    if array.shape[3] != 1:
        raise InputError(f"{path} holds {array.shape[3]} channels where one volume of labels is expected; save it as one")
    array = array[..., 0]
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if not np.array_equal(whole, array):  # NaN is not equal to itself
            raise InputError(f"{path} has labels that are not whole numbers; save them as integers")
        array = whole.astype(np.int32)
    return array.astype(np.uint8) if array.min() >= 0 and array.max() <= 255 else array


def write_volume(path: Path, array: Shaped[np.ndarray, "D H W *C"], like: Path) -> None:
    """Write voxels (labels D H W, or D H W C) as NIfTI with the axes, the affine and the units of the volume ``like``."""
    image = _open(like)
    from nibabel import orientations

    back = orientations.ornt_transform(orientations.axcodes2ornt("LPS"), orientations.io_orientation(image.affine))
    voxels = orientations.apply_orientation(array.swapaxes(0, 2), back)
    header = image.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    data = type(image)(voxels, image.affine, header).to_bytes()
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix.lower() == ".gz" else data)


def read_array(path: Path) -> Shaped[np.ndarray, "*size C"]:
    """An image H W C or a volume D H W C, whichever the file is."""
    return read_volume(path) if is_volume(path) else read_image(path)


def read_mask_or_labels(path: Path) -> Integer[np.ndarray, "*size"]:
    """A mask H W or labels D H W, whichever the file is."""
    return read_labels(path) if is_volume(path) else read_mask(path)


def _open(path: Path) -> Any:
    """Header only; the voxels are read when they are asked for."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
    except ImportError:
        raise InputError(f"{path} is NIfTI, which needs nibabel; install it with: pip install 'paperworks[medical]'") from None
    if path.is_dir():
        raise IsADirectoryError(path)
    try:
        loaded = nibabel.load(path)
    except ImageFileError:
        raise InputError(f"{path} is empty, damaged or no NIfTI volume; copy or export it again") from None
    image: Any = loaded
    if not isinstance(loaded, nibabel.Nifti1Image):
        raise InputError(f"{path} is no NIfTI volume of one file ({type(image).__name__}); convert it to .nii.gz")
    if image.ndim < 3 or image.get_data_dtype().fields is not None:
        raise InputError(f"{path} holds a picture (shape {image.shape}, {image.get_data_dtype()}); give a volume of numbers")
    if not all(image.shape) or np.prod(image.shape, dtype=float) > MAX_VOXELS:
        raise InputError(f"{path} says its shape is {image.shape}, which is nothing or more than {MAX_VOXELS:,} voxels; cut it into parts")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise InputError(f"{path} has an affine that says nothing of where its voxels are; export it again")
    return image


def _turn(image: Any) -> np.ndarray:
    """Nibabel's description of how the file's axes become L P S."""
    from nibabel import orientations

    return orientations.ornt_transform(orientations.io_orientation(image.affine), orientations.axcodes2ornt("LPS"))


def _geometry(image: Any) -> Geometry:
    from nibabel import orientations

    turn = _turn(image)
    affine = image.affine @ orientations.inv_ornt_aff(turn, image.shape[:3])  # index (w, h, d, 1) -> position
    affine = affine[:, [2, 1, 0, 3]]
    lengths = [image.shape[int(axis)] for axis in np.argsort(turn[:, 0])]
    depth, height, width = (float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
    return Geometry(
        size=(lengths[2], lengths[1], lengths[0]),
        channels=int(np.prod(image.shape[3:], dtype=int)),
        spacing=(depth, height, width),
        affine=affine,
        bit_depth=8 * image.get_data_dtype().itemsize,
    )


def _voxels(path: Path) -> np.ndarray:
    """D H W C in the file's own type, or what slope and intercept make of it."""
    image = _open(path)
    from nibabel import orientations

    array = np.asanyarray(image.dataobj)
    array = orientations.apply_orientation(array.reshape(*array.shape[:3], -1), _turn(image))
    return np.ascontiguousarray(array.transpose(2, 1, 0, 3))
