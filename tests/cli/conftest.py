"""A trained run that the command-line tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from paperworks.cli import main


@pytest.fixture(scope="session")
def run(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smallest U-Net on the discs."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "unet", str(blobs), "--variant", "test", "--steps", "3", "--set", "patch=32", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as an ONNX file."""
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert main(["export", str(run), "--out", str(out)]) == 0
    return out
