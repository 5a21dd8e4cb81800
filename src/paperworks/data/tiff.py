"""TIFF files that are larger than memory, read and written by rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tifffile

from paperworks.errors import InputError
from paperworks.files import atomic

TILE = 512
"""Side of the tiles of the files written here."""


class TiffRows:
    """The first page of a TIFF file, by rows: ``rows(top, bottom)`` is an array (bottom - top) W C in the file's type.

    Of strips and tiles only those are decoded that the rows touch. The rare files that keep each channel in a plane of its own are
    decoded whole.

    Raises:
        InputError: the file is no TIFF file, is damaged or holds a volume.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, OSError) as error:
            raise InputError(f"{path}: cannot be read as TIFF ({error}); re-save or remove it") from None
        page = self._file.pages.first
        if page.imagedepth > 1 or page.dtype is None:
            self._file.close()
            raise InputError(f"{path}: holds no plain picture (type {page.dtype}, {page.imagedepth} slices); re-save it as one")
        self._page = page
        self.height: int = page.imagelength
        self.width: int = page.imagewidth
        self.channels: int = page.samplesperpixel
        self.dtype = np.dtype(page.dtype)
        self._planes = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and self.channels > 1
        self._high: int = self.height if self._planes else page.tilelength if page.is_tiled else min(page.rowsperstrip, self.height)
        self._bands: dict[int, np.ndarray] = {}

    def __call__(self, top: int, bottom: int) -> np.ndarray:
        """Rows ``top`` to ``bottom`` (not included), (bottom - top) W C."""
        if self._page.is_final and not self._planes and not self._page.is_tiled:
            raw = self.dtype.newbyteorder(self._file.byteorder)
            row = self.width * self.channels
            offset = self._page.dataoffsets[0] + top * row * raw.itemsize
            data = np.fromfile(self.path, raw, (bottom - top) * row, offset=offset)
            return data.reshape(bottom - top, self.width, self.channels).astype(self.dtype, copy=False)
        numbers = range(top // self._high, -(-bottom // self._high))
        try:
            self._bands = {n: self._bands[n] if n in self._bands else self._decode(n) for n in numbers}
        except (tifffile.TiffFileError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path}: is damaged between rows {top} and {bottom} ({error}); re-save or remove it") from None
        first = numbers[0] * self._high
        return np.concatenate(list(self._bands.values()))[top - first : bottom - first]

    def _decode(self, number: int) -> np.ndarray:
        """One row of tiles, or one strip: h W C."""
        page = self._page
        if self._planes:
            return np.moveaxis(page.asarray().reshape(self.channels, self.height, self.width), 0, -1)
        top = number * self._high
        band = np.zeros((min(self._high, self.height - top), self.width, self.channels), self.dtype)  # sparse files leave zeros out
        across = -(-self.width // page.tilewidth) if page.is_tiled else 1
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in (6, 7, 33007, 34892) else {}
        for index in range(number * across, (number + 1) * across):
            self._file.filehandle.seek(page.dataoffsets[index])
            encoded = self._file.filehandle.read(page.databytecounts[index])
            data, (_, _, _, left, _), _ = page.decode(encoded or None, index, **tables)
            if data is not None:
                part = data[0, : len(band), : self.width - left]
                band[: len(part), left : left + part.shape[1]] = part
        return band

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TiffRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_tiff(path: Path, rows: Iterable[np.ndarray], height: int, width: int, dtype: np.typing.DTypeLike, channels: int = 1) -> None:
    """Write a compressed, tiled TIFF file from runs of rows (h W, or h W C), from top to bottom.

    No more is held than a row of tiles and the run that is added to it. The file appears under its name when it is complete.
    """
    depth = () if channels == 1 else (channels,)
    with (
        atomic(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=height * width * channels * np.dtype(dtype).itemsize > 2**31) as file,
    ):
        file.write(
            _tiles(rows, width, np.dtype(dtype), depth),
            shape=(height, width, *depth),
            dtype=dtype,
            tile=(TILE, TILE),
            compression="zlib",
            photometric="minisblack",
            planarconfig="contig" if depth else None,
        )


def _tiles(rows: Iterable[np.ndarray], width: int, dtype: np.dtype, depth: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Cut runs of rows into tiles, filled up with zeros at the right and at the bottom."""
    held = np.empty((0, width, *depth), dtype)
    for run in rows:
        held = np.concatenate([held, run.astype(dtype, copy=False)])
        while len(held) >= TILE:
            yield from _row_of_tiles(held[:TILE])
            held = held[TILE:]
    if len(held):
        yield from _row_of_tiles(held)


def _row_of_tiles(band: np.ndarray) -> Iterator[np.ndarray]:
    for left in range(0, band.shape[1], TILE):
        part = band[:, left : left + TILE]
        yield np.pad(part, [(0, TILE - part.shape[0]), (0, TILE - part.shape[1]), *[(0, 0)] * (part.ndim - 2)])
