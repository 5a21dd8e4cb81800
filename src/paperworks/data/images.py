"""One image or mask file -> one array, nothing lost on the way.

Whatever is wrong with a file (empty, cut short, not an image, too large, not readable, NaN inside) is an ``InputError`` that names it.
The kind of a file is read from its first bytes, not from its suffix. PNG, JPEG, TIFF, BMP, GIF, WebP and PBM/PGM/PPM are read.
"""

from __future__ import annotations

import logging
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageOps

from paperworks.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pbm", ".pgm", ".ppm"})
MAX_DECODED = 200_000_000
"""Pixels (height x width) beyond which a file that must be decoded in memory is refused. Formats read by Pillow stop at its own 179 million."""
MAX_MAPPED = 1_000_000_000
"""Pixels beyond which an uncompressed TIFF, which is mapped into memory and not loaded, is refused."""
COLOUR = 1 << 24
"""Added to 0xRRGGBB in what ``read_mask`` returns for colour-coded masks, so that colours and label numbers cannot be confused."""

_MAP_FROM = 64 << 20  # bytes from which a TIFF is mapped: below, one read is faster than page faults
_PIL_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_PNG_PALETTE = 3
_ORIENTATION = 0x0112
_FILTERS = threading.Lock()  # the filters of warnings belong to the process, and files are read by several threads

# tifffile reports damaged tags to its log before it raises; what it raises is what we report.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a file says of itself before any pixel is decoded. ``width`` and ``height`` are those after a JPEG's EXIF orientation."""

    width: int
    height: int
    channels: int
    dtype: str
    """numpy name of the array that ``read_image`` gives."""
    bit_depth: int
    """Bits per channel in the file."""
    frames: int = 1
    orientation: int = 1
    """EXIF orientation of a JPEG, 1 (upright) to 8; ``read_image`` turns the image upright."""


def read_header(path: str | Path) -> Header:
    """Size and type of an image file from its header only.

    Raises:
        InputError: the file cannot be read or is not an image.
    """
    path = Path(path)
    return guarded(path, lambda: _header(path, _magic(path)))


def read_image(path: str | Path, max_pixels: int | None = None) -> np.ndarray:
    """Decode an image as H W C in the file's own type: 8 or 16 bits stay what they are, and so do 1 to 4 channels.

    Palettes become RGB, one-bit images 0 and 255, CMYK becomes RGB; a JPEG is turned upright as its EXIF orientation says. Large
    uncompressed TIFFs come as a read-only memory map.

    Args:
        path: the file.
        max_pixels: height x width beyond which the file is refused by its header; default ``MAX_DECODED``, for mapped TIFFs ``MAX_MAPPED``.

    Raises:
        InputError: the file cannot be read, is damaged, too large, a stack of several frames, or has NaN or infinite pixels.
    """
    path = Path(path)
    array = guarded(path, lambda: _decode_image(path, max_pixels))
    if array.dtype.kind == "f" and not _finite(array):
        raise InputError(f"{path} has NaN or infinite pixels; replace them by numbers and save the file again")
    return array


def read_mask(path: str | Path, max_pixels: int | None = None) -> np.ndarray:
    """Decode a label file as H W integers, the numbers as they are in the file: palette indices, 1-bit (0, 1) to 32-bit labels.

    An RGB file whose channels are equal gives one of them; a truly coloured one gives ``COLOUR + 0xRRGGBB`` (uint32). Alpha is ignored.
    A JPEG blurs labels: one that is black and white is thresholded at 128, any other is refused.

    Raises:
        InputError: as ``read_image``; also non-integral float labels and JPEG masks with more than two values.
    """
    path = Path(path)
    array = guarded(path, lambda: _decode_mask(path, max_pixels))
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if not _finite(array) or not np.array_equal(whole, array):
            raise InputError(f"{path} has labels that are not whole numbers; save the mask as integers")
        array = whole.astype(np.int32)
    if array.ndim == 3:
        array = _one_channel(array)
    if _magic(path) == "JPEG":
        if np.mean((array > 48) & (array < 208)) > 0.02 or array.max() >= COLOUR:
            raise InputError(f"{path} is a JPEG, which blurs labels into each other; save the mask as PNG")
        array = (array >= 128).astype(np.uint8) * np.uint8(255)
    return array


def unit(array: np.ndarray, value_range: tuple[float, float], channels: int) -> Float[Tensor, "C *size"]:
    """Raw image H W C (or volume D H W C) -> float32 C H W in [0, 1] with ``channels`` channels.

    ``value_range`` are the raw values that become 0 and 1; what lies outside is clipped. Grey becomes RGB by repetition, alpha is dropped
    where it is not asked for, and RGB with three equal channels becomes grey.

    Raises:
        InputError: the image has channels of another kind.
    """
    import torch

    array = _fit_channels(array, channels)
    low, high = value_range
    scaled = np.array(np.moveaxis(array, -1, 0), dtype=np.float32, order="C")  # a copy: the array may be kept by others
    scaled -= np.float32(low)
    scaled /= np.float32(high - low)
    return torch.from_numpy(scaled).clamp_(0, 1)


def _fit_channels(array: np.ndarray, channels: int) -> np.ndarray:
    have = array.shape[-1]
    if have == channels:
        return array
    if have in (2, 4) and channels in (1, 3):  # the last one is alpha
        return _fit_channels(array[..., :-1], channels)
    if have == 1:
        return np.repeat(array, channels, axis=-1)
    if channels == 1 and have == 3 and (array[..., 0] == array[..., 1]).all() and (array[..., 0] == array[..., 2]).all():
        return array[..., :1]
    raise InputError(f"an image has {have} channels where {channels} are expected; convert it to {channels}")


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------


def guarded(path: Path, read: Callable[[], T]) -> T:
    """Run ``read``; whatever a decoder raises becomes one line that names the file."""
    try:
        return read()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the name (a link may point nowhere)") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder where an image file is expected; move it away") from None
    except PermissionError:
        raise InputError(f"{path} may not be read; change its permissions") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; cut it into parts or save it as TIFF") from None
    except MemoryError:
        raise InputError(f"{path} does not fit into memory; cut it into parts or save it as uncompressed TIFF") from None
    except Exception as error:  # decoders raise whatever they like, from struct.error to zlib.error
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is damaged or cut short ({reason}); copy or export it again") from error


def _magic(path: Path) -> str:
    if path.is_dir():
        raise IsADirectoryError(path)
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise InputError(f"{path} is empty (0 bytes); copy or export it again")
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if (
        start.startswith((b"BM", b"GIF8"))
        or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")
        or start[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
    ):
        return "other"
    raise InputError(f"{path} is not an image (no PNG, JPEG, TIFF, BMP, GIF, WebP or PNM); remove it or save it as PNG")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep a library's warnings to ourselves; one thread at a time, so only around what is short."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_pixels(path: Path, height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise InputError(
            f"{path} says it has {width}x{height} pixels, more than the {limit} allowed; cut it into parts or raise max_pixels"
        )
    if height < 1 or width < 1:
        raise InputError(f"{path} has no pixels ({width}x{height}); export it again")


def _one_frame(path: Path, frames: int) -> None:
    if frames != 1:
        raise InputError(f"{path} holds {frames} frames where one image is expected; save each frame as a file of its own")


def _finite(array: np.ndarray) -> bool:
    rows = max(1, (1 << 22) // max(1, array[0].size))
    return all(np.isfinite(array[i : i + rows]).all() for i in range(0, len(array), rows))


# --- headers -----------------------------------------------------------------------------------------------------------------------


def _header(path: Path, kind: str) -> Header:
    if kind == "PNG":
        return _png_header(path)[0]
    if kind == "TIFF":
        with tifffile.TiffFile(path) as tiff:
            return _tiff_layout(tiff)[0]
    with _open(path) as image:
        orientation = image.getexif().get(_ORIENTATION, 1) if kind == "JPEG" else 1
        width, height = image.size if orientation < 5 else image.size[::-1]
        sixteen = image.mode.startswith("I")
        depth = 1 if image.mode == "1" else 16 if sixteen else 8
        channels = {"L": 1, "1": 1, "I": 1, "LA": 2, "RGBA": 4}.get(image.mode, 1 if sixteen else 3)
        return Header(width, height, channels, "uint16" if sixteen else "uint8", depth, getattr(image, "n_frames", 1), orientation)


def _png_header(path: Path) -> tuple[Header, int]:
    """The header and the colour type, which tells palettes (3) from the rest."""
    with path.open("rb") as file:
        start = file.read(26)
    if start[12:16] != b"IHDR":
        raise InputError(f"{path} is damaged (a PNG without its header); copy or export it again")
    width, height, depth, colour = struct.unpack(">IIBB", start[16:26])
    if colour not in _PNG_CHANNELS:
        raise InputError(f"{path} is damaged (PNG colour type {colour}); copy or export it again")
    return Header(width, height, _PNG_CHANNELS[colour], "uint16" if depth == 16 else "uint8", depth), colour


def _tiff_layout(tiff: tifffile.TiffFile) -> tuple[Header, str]:
    """The header and the axes of the first series without those of length one: YX, YXS, SYX, CYX, or longer for a stack."""
    series, page = tiff.series[0], tiff.series[0].keyframe
    axes = "".join(a for a, n in zip(series.axes, series.shape) if n > 1 or a in "YX")
    lengths = dict(zip(series.axes, series.shape))
    colours = int(np.prod([lengths[a] for a in axes if a in "SC"], dtype=int))
    frames = int(np.prod([lengths[a] for a in axes if a not in "YXSC"], dtype=int))
    channels = 3 if page.photometric == tifffile.PHOTOMETRIC.PALETTE else colours
    dtype = "uint8" if page.dtype is None or page.dtype.kind == "b" or page.photometric == tifffile.PHOTOMETRIC.PALETTE else page.dtype.name
    bits = page.bitspersample if isinstance(page.bitspersample, int) else page.bitspersample[0]
    return Header(lengths["X"], lengths["Y"], channels, dtype, bits, frames), axes


def _open(path: Path) -> Image.Image:
    """Open with Pillow, header only. What it would only warn about is our own limit's business."""
    with quietly():
        try:
            image = Image.open(path, formats=_PIL_FORMATS)
            image.getexif()
        except Image.UnidentifiedImageError:
            raise InputError(f"{path} is damaged or not an image; copy or export it again") from None
    return image


# --- pixels ------------------------------------------------------------------------------------------------------------------------


def _decode_image(path: Path, max_pixels: int | None) -> np.ndarray:
    kind = _magic(path)
    if kind == "TIFF":
        array, palette = _decode_tiff(path, max_pixels)
        if palette is not None:
            return palette[array[:, :, 0]]
        return array * np.uint8(255) if array.dtype == bool else array
    header = _header(path, kind)
    _check_pixels(path, header.height, header.width, max_pixels or MAX_DECODED)
    _one_frame(path, header.frames)
    if kind == "PNG" and _png_header(path)[1] != _PNG_PALETTE and header.bit_depth >= 8:
        return _channels_last(imagecodecs.png_decode(path.read_bytes()))
    with _open(path) as image:
        if kind == "JPEG":
            image.load()  # before the transposition, so that a cut file is noticed as such
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _channels_last(np.asarray(image).astype(np.uint16))
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            # Palettes with transparency go by way of RGBA: Pillow warns about the direct one.
            image = (
                image.convert("L")
                if image.mode == "1"
                else image.convert("RGBA").convert("RGB")
                if image.mode == "P"
                else image.convert("RGB")
            )
        return _channels_last(np.array(image))


def _decode_mask(path: Path, max_pixels: int | None) -> np.ndarray:
    """H W or H W C, palette indices and low bit depths as the numbers that are in the file."""
    kind = _magic(path)
    if kind == "TIFF":
        array, _ = _decode_tiff(path, max_pixels)
        return array.astype(np.uint8) if array.dtype == bool else array
    header = _header(path, kind)
    _check_pixels(path, header.height, header.width, max_pixels or MAX_DECODED)
    _one_frame(path, header.frames)
    if kind == "PNG" and header.bit_depth >= 8 and _png_header(path)[1] != _PNG_PALETTE:
        return imagecodecs.png_decode(path.read_bytes())
    with _open(path) as image:
        image.load()
        if image.mode in ("P", "L", "1"):
            array = np.array(image, dtype=np.uint8)
            if image.mode == "L" and header.bit_depth in (2, 4):
                array //= 255 // (2**header.bit_depth - 1)  # Pillow stretches 0..3 and 0..15 to 0..255
            return array
        return np.array(image if image.mode in ("RGB", "RGBA", "LA", "I") else image.convert("RGB"))


def _decode_tiff(path: Path, max_pixels: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """H W C, and the RGB of each palette index where there is a palette."""
    with tifffile.TiffFile(path) as tiff:
        header, axes = _tiff_layout(tiff)
        series, page = tiff.series[0], tiff.series[0].keyframe
        _one_frame(path, header.frames)
        mapped = series.dataoffset is not None and page.is_memmappable and series.nbytes >= _MAP_FROM
        _check_pixels(path, header.height, header.width, max_pixels or (MAX_MAPPED if mapped else MAX_DECODED))
        array = tifffile.memmap(path, mode="r") if mapped else series.asarray()
        colours = page.colormap if page.photometric == tifffile.PHOTOMETRIC.PALETTE else None
        palette = None if colours is None else np.moveaxis(colours >> 8, 0, -1).astype(np.uint8)
    array = array.reshape([n for a, n in zip(series.axes, series.shape) if n > 1 or a in "YX"])
    if axes[-2:] == "YX" and len(axes) == 3:  # planes: S Y X or C Y X
        array = np.moveaxis(array, 0, -1)
    elif len(axes) > 3:
        raise InputError(f"{path} has the axes {axes}; save it as one image of height, width and channels")
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
        array = ~array
    return _channels_last(array), palette


def _channels_last(array: np.ndarray) -> np.ndarray:
    return array[:, :, None] if array.ndim == 2 else array


def _one_channel(array: np.ndarray) -> np.ndarray:
    if array.shape[2] in (2, 4):
        array = array[:, :, :-1]
    first = array[:, :, 0]
    if all(np.array_equal(first, array[:, :, c]) for c in range(1, array.shape[2])):
        return np.ascontiguousarray(first)
    if array.dtype != np.uint8 or array.shape[2] != 3:
        raise InputError("a colour-coded mask must be 8-bit RGB; save it as such")
    red, green, blue = (array[:, :, c].astype(np.uint32) for c in range(3))
    return COLOUR + (red << 16 | green << 8 | blue)
