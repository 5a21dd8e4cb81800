"""Films: folders of numbered frames, multi-page TIFF files, video files; noisy ones, with clean counterparts or without.

A folder of frames is one film, and so is a file with several frames. Below the root of a data set every film is found; a folder
``noisy`` is the whole data set where there is one, and a folder ``clean`` holds counterparts of the same names. ``restoration.json`` says
what files cannot say::

    {"add": "gaussian", "sigma": 25, "seed": 0}    the films are clean: add noise of this standard deviation, in their grey values
    {"add": "poisson", "photons": 30}              the films are clean: count photons, so many where they are brightest
    {"sigma": 12}                                  the films are noisy, and the standard deviation is known
    {"stills": true}                               the files of a folder are pictures of their own, not frames of a film
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
import shutil
import tempfile
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import tifffile
import torch
from jaxtyping import Float
from torch import Tensor

from paperworks.data.fingerprint import digest
from paperworks.data.images import IMAGE_SUFFIXES, read_header, read_image
from paperworks.data.labels import read_json
from paperworks.data.layouts import SPLITS, Problem, is_hidden
from paperworks.data.packs import source_path
from paperworks.errors import InputError
from paperworks.files import atomic

SETTINGS = "restoration.json"
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
HELD_OUT = 4
"""One frame in so many, the last ones of each film, is for validation."""
KEPT_BYTES = 256 << 20
"""Decoded frames that a data set keeps."""
VIDEO_BYTES = 2 << 30
"""Largest decoded video; they are decoded whole, as their frames cannot be found one by one."""

Progress = Callable[[int, int], None]


# --- one film ------------------------------------------------------------------------------------------------------------------------


class Film(ABC):
    """Frames of one size and type. ``frame(i)`` is H W C as the file has it, but for alpha, which is left out."""

    keep = KEPT_BYTES
    """Bytes of decoded frames that are kept."""

    def __init__(self, path: Path, names: Sequence[str], shape: tuple[int, int, int], dtype: str) -> None:
        self.path, self.names, self.shape, self.dtype = path, tuple(names), shape, dtype
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.names)

    def frame(self, index: int) -> np.ndarray:
        """Read a frame, or recall it.

        Raises:
            InputError: it cannot be read.
        """
        if index not in self._kept:
            frame = self.read(index)[..., : self.shape[2]]
            if frame.shape != self.shape or frame.dtype != self.dtype:
                raise InputError(
                    f"{self.path}: frame {self.names[index]} is {frame.dtype} {frame.shape}, not {self.dtype} {self.shape}; save all alike"
                )
            if (len(self._kept) + 1) * frame.nbytes > self.keep:
                return frame
            self._kept[index] = frame
        return self._kept[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def files(self) -> list[Path]:
        """The files that it is read from."""
        return [self.path]

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Decode a frame, H W C."""


class FrameFolder(Film):
    """A folder of images in the order of their numbers, or some of them."""

    def __init__(self, path: Path, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        header = read_header(self.paths[0])
        super().__init__(path, [_stem(p) for p in paths], (header.height, header.width, _colours(header.channels)), header.dtype)

    def read(self, index: int) -> np.ndarray:
        """Decode one of the images."""
        return read_image(self.paths[index])

    def files(self) -> list[Path]:
        """The images."""
        return self.paths


class TiffFilm(Film):
    """A TIFF file with a frame on each page, or on each run of pages that are its channels."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        super().__init__(path, numbered(header.frames), (header.height, header.width, header.channels), header.dtype)

    def read(self, index: int) -> np.ndarray:
        """Decode a page, or the pages that are its channels."""
        height, width, channels = self.shape
        try:
            with tifffile.TiffFile(self.path) as file:
                series = file.series[0]
                page = None if series.is_truncated or len(series.pages) != len(self) else series.pages[index]
                frame = page.asarray() if page else series.asarray(out="memmap").reshape(len(self), -1, *series.shape[-2:])[index]
        except (tifffile.TiffFileError, OSError, ValueError, RuntimeError, IndexError) as error:
            raise InputError(f"{self.path}: frame {index} cannot be read ({' '.join(str(error).split())[:100]}); save it again") from None
        frame = np.asarray(frame).squeeze()
        if channels > 1 and frame.shape == (channels, height, width):
            frame = np.moveaxis(frame, 0, -1)
        return np.ascontiguousarray(frame.reshape(height, width, channels))


class VideoFilm(Film):
    """A video file, through PyAV: eight bits, grey where its pixels are, otherwise red, green and blue."""

    def __init__(self, path: Path) -> None:
        frames = _decoded(path)
        self.frames = frames
        super().__init__(path, numbered(len(frames)), frames[0].shape, frames[0].dtype.name)

    def read(self, index: int) -> np.ndarray:
        """Recall a frame."""
        return self.frames[index]


def _decoded(path: Path) -> list[np.ndarray]:
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise InputError(f"{path} is a video, which needs PyAV; install paperworks[video], or export its frames as PNG") from None
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                grey = frame.format.name.startswith("gray")
                array = frame.to_ndarray(format="gray" if grey else "rgb24")
                frames.append(array[..., None] if grey else array)
                if len(frames) * frames[0].nbytes > VIDEO_BYTES:
                    raise InputError(f"{path} is larger than {VIDEO_BYTES >> 30} GiB when decoded; cut it, or export its frames as PNG")
    except (av.error.FFmpegError, IndexError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}); export it again") from None
    if not frames:
        raise InputError(f"{path} holds no frames; export it again")
    return frames


def numbered(count: int) -> list[str]:
    """Names of frames that have none, of one length."""
    digits = max(3, len(str(count - 1)))
    return [f"{i:0{digits}d}" for i in range(count)]


def _colours(channels: int) -> int:
    return channels - 1 if channels in (2, 4) else channels  # PNG's alpha


def _stem(path: Path) -> str:
    return unicodedata.normalize("NFC", path.stem)


def _in_order(path: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name.lower())]


def frames_in(folder: Path) -> list[Path]:
    """The images directly in a folder, in the order of their numbers; none of a file with many frames."""
    found = sorted(
        (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()), key=_in_order
    )
    return [p for p in found if not _has_pages(p)]


def _has_pages(path: Path) -> bool:
    try:
        return path.suffix.lower() in TIFF_SUFFIXES and read_header(path).frames > 1
    except InputError:
        return False


def is_film(path: Path) -> bool:
    """A folder with images, a TIFF file with several pages, or a video."""
    if path.is_dir():
        return bool(frames_in(path))
    return path.suffix.lower() in VIDEO_SUFFIXES or _has_pages(path)


def open_film(path: Path) -> Film:
    """A folder of frames, a file of frames, or one image as a film of one frame.

    Raises:
        InputError: it cannot be read, or frames differ in size or type.
    """
    if path.is_dir():
        frames = frames_in(path)
        if not frames:
            raise InputError(f"{path} holds no frames; give a folder of numbered images, a TIFF file or a video")
        return _checked(FrameFolder(path, frames))
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoFilm(path)
    return TiffFilm(path) if _has_pages(path) else FrameFolder(path, [path])


def _checked(film: FrameFolder) -> FrameFolder:
    for path in film.paths:
        header = read_header(path)
        if (header.height, header.width, _colours(header.channels)) != film.shape or header.dtype != film.dtype:
            size = f"{header.dtype}, {header.width}x{header.height}, {header.channels} channels"
            raise InputError(f"{path} is {size}, unlike {film.paths[0].name}; save all frames of a film alike")
    return film


def write_film(film: Film, target: Path, frames: Iterable[np.ndarray]) -> None:
    """Write frames H W C as ``film`` is: a folder with the same names, one image, or a TIFF file with as many pages.

    JPEG becomes PNG and a video a TIFF file, so that nothing is lost again. What is written is there whole or not at all.
    """
    if not isinstance(film, FrameFolder):
        shape = (len(film), *_squeezed(film.shape))
        large = np.prod(shape) * np.dtype(film.dtype).itemsize > 2**31
        with atomic(target) as temporary, tifffile.TiffWriter(temporary, bigtiff=bool(large)) as file:
            pages = (frame.reshape(shape[1:]) for frame in frames)
            file.write(pages, shape=shape, dtype=film.dtype, photometric=_photometric(film.shape), compression="zlib")
    elif film.path.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            for path, frame in zip(film.paths, frames):
                _write_frame(Path(temporary) / image_target(Path(path.name)), frame)
            target.mkdir(exist_ok=True)
            for path in sorted(Path(temporary).iterdir()):
                shutil.move(path, target / path.name)
    else:
        with atomic(target) as temporary:
            _write_frame(temporary, next(iter(frames)))


def image_target(name: Path) -> Path:
    """The name under which a restored image is written."""
    return name if name.suffix.lower() in TIFF_SUFFIXES else name.with_suffix(".png")


def _write_frame(path: Path, frame: np.ndarray) -> None:
    plain = frame.reshape(_squeezed(frame.shape))
    if path.suffix.lower() in TIFF_SUFFIXES:
        tifffile.imwrite(path, plain, photometric=_photometric(frame.shape), compression="zlib")
    else:
        PIL.Image.fromarray(plain).save(path)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2] == 1 else shape


def _photometric(shape: tuple[int, ...]) -> str:
    return "rgb" if shape[2] == 3 else "minisblack"


# --- noise ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``restoration.json`` says."""

    add: Literal["gaussian", "poisson"] | None = None
    sigma: float | None = None
    """Standard deviation in grey values of the files, of noise that is added or there already."""
    photons: float | None = None
    """Photons counted where the films are brightest."""
    seed: int = 0
    stills: bool = False

    @classmethod
    def read(cls, root: Path) -> Settings:
        """From the file in ``root``, if it is there.

        Raises:
            InputError: it does not say what it should.
        """
        path = root / SETTINGS
        said = read_json(path) if path.is_file() else {}
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(said, dict) or set(said) - known:
            odd = sorted(set(said) - known) if isinstance(said, dict) else "no object"
            raise InputError(f"{path} has {odd}; it takes {', '.join(sorted(known))}")
        needs = {None: None, "gaussian": "sigma", "poisson": "photons"}
        if said.get("add") not in needs:
            raise InputError(f'{path}: "add" is {said["add"]!r}; write gaussian or poisson')
        for key in ("sigma", "photons"):
            value = said.get(key, None if key == needs[said.get("add")] else 1)
            if not isinstance(value, int | float) or value <= 0:
                raise InputError(f'{path}: "{key}" must be a number above zero')
        return cls(**said)

    def noisy(self, frame: Float[Tensor, "C H W"], width: float, film: str, index: int) -> Tensor:
        """A frame in [0, 1] with the noise that is to be added, which follows from seed, film and number; not clipped.

        Args:
            frame: the clean one.
            width: grey values from 0 to 1.
            film: its name.
            index: the frame's number.
        """
        if self.add is None:
            return frame
        chance = np.random.RandomState(zlib.crc32(f"{self.seed} {film} {index}".encode()))  # its stream is frozen by numpy's promise
        if self.add == "gaussian":
            assert self.sigma is not None  # ``read`` asked for it
            return frame + torch.from_numpy(chance.standard_normal(tuple(frame.shape)).astype(np.float32)) * (self.sigma / width)
        assert self.photons is not None
        return torch.from_numpy(chance.poisson(frame.clamp(min=0).numpy() * self.photons).astype(np.float32)) / self.photons


# --- a data set ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """An item: one frame of one film."""

    name: str
    film: int
    index: int


@dataclass
class _Values:
    """Grey values of one film: extremes, and sums over pixels per channel."""

    low: float
    high: float
    total: np.ndarray
    squares: np.ndarray
    count: int

    @classmethod
    def of(cls, film: Film) -> _Values:
        values = cls(np.inf, -np.inf, np.zeros(film.shape[2]), np.zeros(film.shape[2]), len(film) * film.shape[0] * film.shape[1])
        for name, frame in zip(film.names, map(film.frame, range(len(film)))):
            if not np.isfinite(frame).all():
                raise InputError(f"{film.path}: frame {name} has NaN or infinite pixels; replace them by numbers")
            values.low, values.high = min(values.low, float(frame.min())), max(values.high, float(frame.max()))
            values.total += frame.sum((0, 1), dtype=np.float64)
            values.squares += np.square(frame, dtype=np.float64).sum((0, 1))
        return values


class Films:
    """All films below a folder, looked through once.

    ``truths`` are clean counterparts in the order of ``films``, or None where some film has none; with added noise the films themselves.
    ``range`` are the grey values that become 0 and 1: the smallest and the largest that the films have, so that a dim film fills it too.
    """

    def __init__(self, source: str | Path, *, progress: Progress | None = None) -> None:
        """Open ``pack:NAME``, a folder, or one film.

        Raises:
            InputError: there are no films, or they cannot go together.
        """
        path = source_path(source)
        self.source, self.root = str(source), path if path.is_dir() else path.parent
        self.settings = Settings.read(self.root)
        self.problems: list[Problem] = []
        found, clean = self._found(path)
        self.films: list[Film] = []
        self.names: list[str] = []
        truths: list[Film | None] = []
        hashed = hashlib.sha256(repr(self.settings).encode())
        seen: list[_Values] = []
        for done, (name, film) in enumerate(found.items()):
            truth = clean.get(name)
            try:
                self._like_the_others(film, truth)
                film.keep = KEPT_BYTES // len(found)
                values = _Values.of(film)
                hashed.update(f"{name} {film.names} {digest(film.files())} {digest(truth.files()) if truth else ''}".encode())
            except InputError as error:
                self.problems.append(_problem(film, error))
            else:
                self.films.append(film)
                self.names.append(name)
                truths.append(truth)
                seen.append(values)
            if progress:
                progress(done + 1, len(found))
        if not self.films:
            raise InputError(str(self.problems[0]))
        self.truths = [t for t in truths if t is not None]
        if self.truths and len(self.truths) < len(self.films):
            name = self.names[truths.index(None)]
            self.problems.append(Problem(self.root / "clean", f"has nothing for {name}", "add it; until then no clean film is used"))
            self.truths = []
        if self.settings.add:
            self.truths = self.films
        self.dtype, self.channels = self.films[0].dtype, self.films[0].shape[2]
        low, high = min(v.low for v in seen), max(v.high for v in seen)
        self.range = (low, high if high > low else low + 1)
        width, count = self.range[1] - self.range[0], sum(v.count for v in seen)
        mean, square = (np.sum([getattr(v, key) for v in seen], axis=0) / count for key in ("total", "squares"))
        self.mean = tuple(float(v) for v in (mean - low) / width)
        self.std = tuple(float(v) for v in np.sqrt(np.maximum(square - mean**2, 0)) / width)
        self.train, self.val = self._split(hashed)
        self.sha256 = hashed.hexdigest()

    @property
    def sigma(self) -> float | None:
        """Standard deviation of the noise where images are in [0, 1]; None where nobody says."""
        sigma = None if self.settings.add == "poisson" else self.settings.sigma
        return None if sigma is None else sigma / (self.range[1] - self.range[0])

    def noisy(self, film: int, index: int) -> Float[Tensor, "C H W"]:
        """A frame as a network is given it, 0 to 1 and, with added noise, a little beyond."""
        clean = unit(self.films[film].frame(index), self.range)
        return self.settings.noisy(clean, self.range[1] - self.range[0], self.names[film], index)

    def window(self, film: int, index: int, radius: int) -> Float[Tensor, "TC H W"]:
        """A noisy frame between its neighbours, their channels one after another; beyond the ends of the film the outermost frame stands again."""
        last = len(self.films[film]) - 1
        return torch.cat([self.noisy(film, min(max(i, 0), last)) for i in range(index - radius, index + radius + 1)])

    def truth(self, film: int, index: int) -> Float[Tensor, "C H W"] | None:
        """The clean frame, if there is one."""
        return unit(self.truths[film].frame(index), self.range) if self.truths else None

    def _found(self, path: Path) -> tuple[dict[str, Film], dict[str, Film]]:
        """Name -> film, and name -> its clean counterpart."""
        if not path.is_dir():
            return {path.stem: open_film(path)}, {}
        noisy = path / "noisy"
        base = noisy if noisy.is_dir() else path
        clean = path / "clean"
        found = self._films(base, leave_out=clean)
        if not found:
            raise InputError(f"{base} holds no films; put numbered frames into it, or folders of frames, TIFF files or videos")
        return found, {n: f for n, f in self._films(clean).items() if n in found} if clean.is_dir() else {}

    def _films(self, base: Path, leave_out: Path | None = None) -> dict[str, Film]:
        films: dict[str, Film] = {}
        for place in sorted([base, *base.rglob("*")]):
            if is_hidden(place, base) or (leave_out and leave_out in (place, *place.parents)) or not is_film(place):
                continue
            name = place.relative_to(base).with_suffix("").as_posix() if place.is_file() else place.relative_to(base).as_posix()
            try:
                if place.is_dir() and self.settings.stills:
                    films |= {f"{name}/{_stem(p)}".removeprefix("./"): FrameFolder(p, [p]) for p in frames_in(place)}
                else:
                    films["film" if name == "." else name] = open_film(place)
            except InputError as error:
                self.problems.append(Problem(place, str(error).removeprefix(str(place)).lstrip(" :"), "it is left out"))
        if not films and self.problems:
            raise InputError(str(self.problems[0]))
        return films

    def _like_the_others(self, film: Film, truth: Film | None) -> None:
        if self.films and (film.dtype, film.shape[2]) != (self.films[0].dtype, self.films[0].shape[2]):
            first = self.films[0]
            raise InputError(
                f"{film.path} is {film.dtype} with {film.shape[2]} channels and {first.path.name} {first.dtype} with {first.shape[2]}; save all alike"
            )
        if truth and (truth.shape, truth.dtype, truth.names) != (film.shape, film.dtype, film.names):
            raise InputError(f"{truth.path} differs from {film.path} in size, type or names of frames; export the two alike")

    def _split(self, hashed: Any) -> tuple[list[Frame], list[Frame]]:
        """As ``splits.json`` says, by films or by frames; otherwise the last frames of each film are held out, and of stills the last stills."""
        items = [
            Frame(f"{self.names[f]}/{name}" if len(film) > 1 else self.names[f], f, i)
            for f, film in enumerate(self.films)
            for i, name in enumerate(film.names)
        ]
        path = self.root / "splits.json"
        if not path.is_file():
            held = [
                _is_held_out(i.film, len(self.films)) if self.settings.stills else _is_held_out(i.index, len(self.films[i.film]))
                for i in items
            ]
            return [i for i, h in zip(items, held) if not h], [i for i, h in zip(items, held) if h]
        said = read_json(path)
        hashed.update(repr(said).encode())
        split: dict[str, str] = {}
        for key, names in said.items() if isinstance(said, dict) else ():
            if key in SPLITS and isinstance(names, list):
                split |= {str(name): SPLITS[key] for name in names}
        sides = [next((split[key] for key in self._keys(item) if key in split), None) for item in items]
        train, val = ([i for i, s in zip(items, sides) if s == side] for side in ("train", "val"))
        if not train or not val:
            raise InputError(
                f'{path} leaves {len(train)} frames for training and {len(val)} for validation; write {{"train": [...], "val": [...]}} with names of films'
            )
        return train, val

    def _keys(self, item: Frame) -> list[str]:
        """What a person may call a frame: by itself or its film, in full or by the last part of the name."""
        names = [item.name, self.names[item.film]]
        return names + [name.rpartition("/")[2] for name in names]


def _is_held_out(index: int, count: int) -> bool:
    return index >= count - max(count // HELD_OUT, 1)


def _problem(film: Film, error: InputError) -> Problem:
    what, _, fix = str(error).removeprefix(str(film.path)).lstrip(" :").rpartition("; ")
    return Problem(film.path, what, fix)


def unit(frame: np.ndarray, value_range: tuple[float, float]) -> Float[Tensor, "C H W"]:
    """A frame H W C -> float32 C H W where ``value_range`` is 0 to 1; nothing is clipped."""
    low, high = value_range
    return torch.from_numpy((np.ascontiguousarray(frame.transpose(2, 0, 1)).astype(np.float32) - np.float32(low)) / np.float32(high - low))


def grey(image: Float[Tensor, "C H W"], value_range: tuple[float, float], dtype: str) -> np.ndarray:
    """The inverse of :func:`unit`: H W C in a file's type, rounded and clipped to what it holds."""
    low, high = value_range
    values = (image * (high - low) + low).permute(1, 2, 0).cpu().numpy()
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        values = np.clip(np.rint(values), limits.min, limits.max)
    return values.astype(kind)


def moving_windows(frames: Iterator[Tensor], radius: int) -> Iterator[Float[Tensor, "TC H W"]]:
    """The window around every frame of a film that is read once from the front; no more than a window is held."""
    held: list[Tensor] = []
    for frame in frames:
        held += [frame] * (1 if held else radius + 1)
        if len(held) == 2 * radius + 1:
            yield torch.cat(held)
            held.pop(0)
    for _ in range(radius if held else 0):
        held.append(held[-1])
        if len(held) == 2 * radius + 1:
            yield torch.cat(held)
            held.pop(0)
