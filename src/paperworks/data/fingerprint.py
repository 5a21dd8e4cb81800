"""One pass over a data set: what its pixels and labels are, and which files are broken. Kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from paperworks.data.labels import IGNORE, MANY, MANY_DEEP, Coding, Values
from paperworks.errors import InputError
from paperworks.files import write_json

VERSION = 1
"""Goes up when what is measured changes, so that old caches are not read."""
_DEPTHS = (255, 1023, 4095, 16383, 65535)
_BLOCK = 1 << 22  # values that are turned into float64 at a time
_SAMPLES = 4_000_000  # float pixels of the whole set that percentiles are taken from


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a data set is, in plain numbers. Sizes are (height, width), of volumes (depth, height, width); ``mean`` and ``std`` are of
    images in [0, 1].
    """

    images: int
    channels: int
    dtype: str
    bit_depth: int
    min_size: tuple[int, ...]
    median_size: tuple[int, ...]
    max_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[float, float]
    """Raw values that become 0 and 1."""
    class_pixels: tuple[float, ...] = ()
    """Share of each class among the pixels that count."""
    class_images: tuple[int, ...] = ()
    """How many images hold each class."""
    ignored: float = 0.0
    """Share of the pixels that do not count."""
    objects: tuple[int, int, int] | None = None
    """Fewest, median and most objects in an image, where the labels tell them apart."""
    spacing: tuple[float, ...] | None = None
    """Of volumes the median."""
    sha256: str = ""
    """Over the names and contents of all images and labels, and what is said of them."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Fingerprint:
        """The inverse of ``dataclasses.asdict``, also after JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**values)


@dataclass
class Scan:
    """What one item is; summed up by ``summarise`` and ``label_statistics``."""

    size: tuple[int, ...]
    dtype: str
    bit_depth: int
    maximum: float
    total: np.ndarray
    """Per channel: sum of the raw values."""
    squares: np.ndarray
    """Per channel: sum of their squares."""
    samples: np.ndarray | None
    """Pixels x channels of a float image."""
    digest: str = ""
    """Name and hash of the files' contents."""
    values: Values | None = None
    objects: int = 0
    outside: int = 0
    """Pixels outside the region whose labels count."""
    spacing: tuple[float, ...] | None = None
    """What the file's own header says."""

    @property
    def channels(self) -> int:
        """As the file has them."""
        return len(self.total)


def is_float(dtype: str) -> bool:
    """Whether images of this type have no range of their own: floats, signed and 32-bit integers."""
    return dtype not in ("uint8", "uint16")


def scan_image(array: np.ndarray, bit_depth: int, samples: int) -> Scan:
    """Sums over one image H W C (or D H W C), in blocks along the first axis."""
    channels = array.shape[-1]
    total, squares, maximum = np.zeros(channels), np.zeros(channels), -np.inf
    rows = max(1, _BLOCK // max(1, array[0].size))
    for i in range(0, len(array), rows):
        block = np.asarray(array[i : i + rows])
        maximum = max(maximum, float(block.max()))
        block = block.reshape(-1, channels).astype(np.float64)
        total += block.sum(0)
        squares += np.einsum("nc,nc->c", block, block)
    kept = None
    if is_float(array.dtype.name):
        flat = array.reshape(-1, channels)
        kept = np.array(flat[:: max(1, len(flat) // samples)], dtype=np.float64)
    return Scan(array.shape[:-1], array.dtype.name, bit_depth, maximum, total, squares, kept)


def scan_mask(raw: np.ndarray, inside: np.ndarray | None = None, pieces: bool = True) -> Values:
    """Values and their pixels (where ``inside``); where there are many, and ``pieces`` are asked for, in how many each is."""
    counted = raw.ravel() if inside is None else raw[inside]
    if raw.dtype == np.uint8:
        counts = np.bincount(counted, minlength=256)
        present = np.flatnonzero(counts)
        found = dict(zip(present.tolist(), counts[present].tolist()))
    else:
        values, counts = np.unique(counted, return_counts=True)
        found = dict(zip(values.tolist(), counts.tolist()))
    regions = whole = 0
    if pieces and (MANY if raw.dtype == np.uint8 else MANY_DEEP) < len(found) <= 65536 and min(found) >= 0 and max(found) < 1 << 24:
        present, numbers = np.unique(raw, return_inverse=True)
        numbers = numbers.reshape(raw.shape).astype(np.int32) + int(present[0] != 0)
        for label, where in enumerate(ndimage.find_objects(numbers), start=1):
            regions += 1
            parts: Any = ndimage.label(numbers[where] == label, np.ones((3, 3)))
            whole += parts[1] == 1
    return Values(found, 8 * raw.dtype.itemsize, regions, whole)


def run(items: Sequence[Any], work: Callable[[Any], Any], progress: Callable[[int, int], None] | None) -> list[Any]:
    """``work`` on each item in a few threads; an ``InputError`` is returned in the place of the result."""
    done, lock = 0, threading.Lock()

    def one(item: Any) -> Any:
        nonlocal done
        try:
            result = work(item)
        except InputError as error:
            result = error
        if progress is not None:
            with lock:
                done += 1
                progress(done, len(items))
        return result

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, items))


def samples_per_image(images: int) -> int:
    """How many pixels of each float image go into the percentiles."""
    return max(1024, _SAMPLES // max(1, images))


def summarise(scans: Sequence[Scan], channels: int, spacing: tuple[float, ...] | None, said: str) -> Fingerprint:
    """The fingerprint of the images; ``label_statistics`` are what the labels add."""
    sizes = np.array([s.size for s in scans])
    dtype = scans[0].dtype
    if is_float(dtype):
        low, high, mean, std = _float_range(scans, channels)
    else:
        maximum = max(s.maximum for s in scans)
        low, high = 0.0, 255.0 if dtype == "uint8" else float(next(d for d in _DEPTHS if d >= maximum))
        pixels = float(sizes.prod(1).sum())
        total = np.sum([_spread(s.total, channels) for s in scans], axis=0)
        squares = np.sum([_spread(s.squares, channels) for s in scans], axis=0)
        mean = total / pixels / high
        std = np.sqrt(np.maximum(squares / pixels / high**2 - mean**2, 0))
    content = hashlib.sha256("\n".join([*sorted(s.digest for s in scans), said]).encode()).hexdigest()
    return Fingerprint(
        images=len(scans),
        channels=channels,
        dtype=dtype,
        bit_depth=max(s.bit_depth for s in scans),
        min_size=_whole(sizes.min(0)),
        median_size=_whole(np.median(sizes, 0)),
        max_size=_whole(sizes.max(0)),
        mean=tuple(float(m) for m in mean),
        std=tuple(float(s) for s in std),
        range=(low, high),
        spacing=tuple(np.median([s.spacing for s in scans if s.spacing], 0).tolist()) if scans[0].spacing else spacing,
        sha256=content,
    )


def _whole(sizes: np.ndarray) -> tuple[int, ...]:
    return tuple(int(n) for n in sizes)


def label_statistics(scans: Sequence[Scan], coding: Coding) -> dict[str, Any]:
    """The fields of the fingerprint that come from the labels."""
    pixels, images, ignored, objects = np.zeros(len(coding.names)), np.zeros(len(coding.names), int), 0, []
    for scan in scans:
        if scan.values is None:
            continue
        here = np.zeros(len(coding.names))
        for value, count in scan.values.counts.items():
            index = coding.class_of(value)
            if index == IGNORE:
                ignored += count
            else:
                here[index] += count
        pixels += here
        ignored += scan.outside
        images += here > 0
        objects.append(scan.objects)
    counted = float(pixels.sum())
    return {
        "class_pixels": tuple((pixels / max(counted, 1)).tolist()),
        "class_images": tuple(images.tolist()),
        "ignored": ignored / max(counted + ignored, 1),
        "objects": (min(objects), int(np.median(objects)), max(objects)) if coding.instances and objects else None,
    }


def _float_range(scans: Sequence[Scan], channels: int) -> tuple[float, float, np.ndarray, np.ndarray]:
    pooled = np.concatenate([_spread(s.samples.T, channels).T for s in scans if s.samples is not None])
    low, high = (float(v) for v in np.percentile(pooled, (0.5, 99.5)))
    if high <= low:
        high = low + 1.0
    scaled = np.clip((pooled - low) / (high - low), 0, 1)
    return low, high, scaled.mean(0), scaled.std(0)


def _spread(per_channel: np.ndarray, channels: int) -> np.ndarray:
    """What ``images.unit`` does with channels, done to sums: alpha is dropped, grey is repeated."""
    have = len(per_channel)
    if have in (2, 4) and have != channels:
        per_channel = per_channel[:-1]
    return np.repeat(per_channel, channels, axis=0) if len(per_channel) == 1 and channels > 1 else per_channel


def digest(files: Sequence[Path]) -> str:
    """sha256 over the contents of several files."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def cache_folder() -> Path:
    """``PAPERWORKS_CACHE``, or ``~/.cache/paperworks``."""
    return Path(os.environ.get("PAPERWORKS_CACHE") or Path.home() / ".cache" / "paperworks")


def cache_key(root: Path, files: Sequence[Path], said: str) -> str:
    """Names, sizes and times of all files, and what else the result depends on."""
    lines = [str(VERSION), str(root.resolve()), said]
    for path in sorted(set(files)):
        try:
            status = path.stat()
            lines.append(f"{path} {status.st_size} {status.st_mtime_ns}")
        except OSError:
            lines.append(f"{path} unreadable")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def load_cache(key: str) -> dict[str, Any] | None:
    """What was kept under this key, if it can be read."""
    try:
        content = json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def save_cache(key: str, content: Mapping[str, Any]) -> None:
    """Keep a result; a cache folder that cannot be written is no error."""
    try:
        write_json(cache_folder() / f"{key}.json", dict(content))
    except OSError:
        return
