"""What the tests of the data floor share: a cache folder of their own, and a way to write images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PAPERWORKS_CACHE", str(folder))
    monkeypatch.delenv("PAPERWORKS_PACKS", raising=False)
    return folder


@pytest.fixture
def save() -> Callable[..., Path]:
    """save(path, array): folders are made, the suffix says the format."""

    def save(path: Path, array: np.ndarray) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".tif", ".tiff"):
            tifffile.imwrite(path, array)
        elif array.dtype == np.uint16:
            path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(array)))
        else:
            Image.fromarray(array).save(path)
        return path

    return save


@pytest.fixture
def pairs(tmp_path: Path, save: Callable[..., Path]) -> Path:
    """A sound data set of six pairs in ``images`` and ``masks``, 12 high and 10 wide."""
    rng = np.random.default_rng(0)
    for name in "abcdef":
        save(tmp_path / "images" / f"{name}.png", rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
        mask = np.zeros((12, 10), np.uint8)
        mask[2:6, 3:7] = 255
        save(tmp_path / "masks" / f"{name}.png", mask)
    return tmp_path
