"""Hostile and broken input at the command line: exit code 2, one clear line, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from safetensors.numpy import save_file

from paperworks.cli import main


def png(width: int, height: int) -> bytes:
    """A PNG file that promises width x height pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *expected: str) -> str:
    """The command ends with exit code 2 and one line that holds ``expected``."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("paperworks: ")]
    assert len(lines) == 1, lines
    for part in expected:
        assert part.lower() in lines[0].lower(), lines[0]
    return lines[0]


def broken_tiff(path: Path, value: float) -> None:
    array = np.zeros((20, 20), np.float32)
    array[3, 4] = value
    tifffile.imwrite(path, array)


BROKEN_IMAGES: dict[str, Callable[[Path], object]] = {
    "zero bytes.png": lambda p: p.write_bytes(b""),
    "text.png": lambda p: p.write_text("this is no picture"),
    "truncated.png": lambda p: p.write_bytes(_encoded("PNG")[:200]),
    "truncated.jpg": lambda p: p.write_bytes(_encoded("JPEG")[:300]),
    "truncated.tif": lambda p: p.write_bytes(_encoded("TIFF")[:90]),
    "bomb.png": lambda p: p.write_bytes(png(100_000, 100_000)),
    "nan.tif": lambda p: broken_tiff(p, float("nan")),
    "infinite.tif": lambda p: broken_tiff(p, float("inf")),
    "pickle.png": lambda p: p.write_bytes(pickle.dumps({"image": 1})),
    "five channels.tif": lambda p: tifffile.imwrite(p, np.zeros((20, 20, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
    "dangling.png": lambda p: p.symlink_to(p.parent / "nowhere.png"),
}


def _encoded(kind: str) -> bytes:
    import io

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_predict_broken_image(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / name
    BROKEN_IMAGES[name](image)
    refused(capsys, ["predict", str(run), str(image), "--out", str(tmp_path / "out")], name)
    assert not list((tmp_path / "out").rglob("*.*")), "nothing half-written"


def test_training_leaves_broken_images_out(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken files among good ones are named, and the good ones are used."""
    folder = tmp_path / "données 数据"
    shutil.copytree(blobs, folder)
    (folder / "splits.json").unlink()
    (folder / "images" / "disc 00.png").write_bytes(b"")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(folder / "masks" / "disc 01.png")
    (folder / "masks" / "disc 02.png").unlink()
    capsys.readouterr()
    assert main(["data", str(folder), "--json"]) == 0
    problems = " ".join(f"{p['path']} {p['what']}" for p in json.loads(capsys.readouterr().out)["problems"])
    assert all(f"disc 0{i}" in problems for i in range(2))
    out = tmp_path / "run"
    assert main(["train", "unet", str(folder), "--variant", "test", "--steps", "1", "--set", "patch=32", "--out", str(out)]) == 0


def label_out_of_range(folder: Path) -> None:
    (folder / "paperworks.json").write_text(json.dumps({"classes": ["ground", "disc"], "masks": "classes"}))


BROKEN_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: None, "does not exist"),
    "empty": (lambda p: p.mkdir(), "empty"),
    "images only": (lambda p: (p / "images").mkdir(parents=True) or Image.new("L", (8, 8)).save(p / "images" / "a.png"), "mask"),
    "bad settings": (lambda p: p.mkdir() or (p / "paperworks.json").write_text("{"), "paperworks.json"),
    "bad coco.json": (lambda p: p.write_text("[1, 2"), "bad coco.json"),
    "a picture.txt": (lambda p: p.write_text("hello"), "a picture.txt"),
}


@pytest.mark.parametrize("name", BROKEN_DATA)
def test_train_on_broken_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = BROKEN_DATA[name]
    make(tmp_path / name)
    refused(capsys, ["train", "unet", str(tmp_path / name), "--steps", "1", "--out", str(tmp_path / "run")], expected)
    assert not (tmp_path / "run").exists()


def test_labels_out_of_range(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    shutil.copytree(blobs, folder)
    label_out_of_range(folder)
    for mask in (folder / "masks").iterdir():
        Image.fromarray(np.full((48, 48), 7, np.uint8)).save(mask)
    refused(capsys, ["train", "unet", str(folder), "--steps", "1", "--out", str(tmp_path / "run")], "7")


def broken_run(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    return folder


def state(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / "model.safetensors")


def reshape(run: Path) -> None:
    tensors = state(run)
    name = sorted(tensors)[0]
    tensors[name] = np.zeros((3, 3), np.float32)
    save_file(tensors, run / "model.safetensors")


def drop(run: Path) -> None:
    tensors = state(run)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, run / "model.safetensors")


def poison(run: Path) -> None:
    tensors = state(run)
    name = next(n for n in sorted(tensors) if tensors[n].dtype == np.float32)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, run / "model.safetensors")


class Attack:
    """Would make a folder when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


BROKEN_RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle posing as weights": (lambda r: (r / "model.safetensors").write_bytes(pickle.dumps(Attack(r / "witness"))), "safetensors"),
    "wrong shapes": (reshape, "shape"),
    "a missing tensor": (drop, "lacks"),
    "NaN weights": (poison, "NaN"),
    "no weights": (lambda r: (r / "model.safetensors").unlink(), "missing"),
    "truncated weights": (lambda r: (r / "model.safetensors").write_bytes((r / "model.safetensors").read_bytes()[:500]), "safetensors"),
    "no record": (lambda r: (r / "run.json").unlink(), "run.json"),
    "broken record": (lambda r: (r / "run.json").write_text("{"), "run.json"),
    "a record of something else": (lambda r: (r / "run.json").write_text("{}"), "run.json"),
    "an unknown paper": (lambda r: (r / "run.json").write_text((r / "run.json").read_text().replace('"unet"', '"umet"')), "umet"),
}


@pytest.mark.parametrize("name", BROKEN_RUNS)
def test_predict_with_broken_run(name: str, run: Path, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = BROKEN_RUNS[name]
    folder = broken_run(run, tmp_path)
    make(folder)
    refused(capsys, ["predict", str(folder), str(blobs / "images"), "--out", str(tmp_path / "out")], expected)
    assert not (tmp_path / "out").exists() and not (folder / "witness").exists()


WRONG_WORDS = {
    "unknown paper": (["train", "umet", "pack:nuclei"], "did you mean unet"),
    "unknown pack": (["data", "pack:nucleus"], "nucle"),
    "unknown variant": (["train", "unet", "DATA", "--variant", "gigantic", "--steps", "1", "--out", "OUT"], "gigantic"),
    "bad budget": (["train", "unet", "DATA", "--budget", "soon", "--out", "OUT"], "soon"),
    "two budgets": (["train", "unet", "DATA", "--budget", "1m", "--steps", "3", "--out", "OUT"], "one of"),
    "negative steps": (["train", "unet", "DATA", "--steps", "-3", "--out", "OUT"], "-3"),
    "bad setting": (["train", "unet", "DATA", "--steps", "1", "--set", "lr", "--out", "OUT"], "key=value"),
    "bad precision": (["train", "unet", "DATA", "--steps", "1", "--precision", "fp7", "--out", "OUT"], "fp7"),
    "no papers": (["compare", "DATA", "--papers", ",", "--out", "OUT"], "no paper"),
    "a paper twice": (["compare", "DATA", "--papers", "unet,unet", "--steps", "1", "--out", "OUT"], "twice"),
    "bad seeds": (["compare", "DATA", "--papers", "unet", "--steps", "1", "--seeds", "a,b", "--out", "OUT"], "seeds"),
    "unknown refiner": (["predict", "RUN", "DATA", "--out", "OUT", "--with", "magic"], "magic"),
    "setting without refiner": (["predict", "RUN", "DATA", "--out", "OUT", "--set", "a=1"], "--with"),
    "no such input": (["predict", "RUN", "nowhere.png", "--out", "OUT"], "nowhere.png"),
    "no such run": (["predict", "nowhere", "DATA", "--out", "OUT"], "nowhere"),
    "bad overlap": (["predict", "RUN", "DATA", "--out", "OUT", "--overlap", "1.5"], "overlap"),
    "other classes": (["evaluate", "RUN", "pack:nuclei"], "class"),
}


@pytest.mark.parametrize("name", WRONG_WORDS)
def test_wrong_words(name: str, run: Path, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = WRONG_WORDS[name]
    places = {"DATA": str(blobs), "OUT": str(tmp_path / "out"), "RUN": str(run)}
    refused(capsys, [places.get(a, a) for a in arguments], expected)
    assert not (tmp_path / "out").exists()


def test_unknown_option_and_command() -> None:
    assert main(["train", "--sideways"]) == 2
    assert main(["fly"]) == 2


def test_out_holds_something_else(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").write_text("years of work")
    for command in (["train", "unet"], ["compare", "--papers", "unet"]):
        arguments = [command[0], *command[1:2], str(blobs)] if command[0] == "train" else ["compare", str(blobs), *command[1:]]
        refused(capsys, [*arguments, "--steps", "1", "--out", str(tmp_path / "out")], "not empty")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.docx"]


def test_out_is_a_file(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, ["train", "unet", str(blobs), "--variant", "test", "--steps", "1", "--out", str(tmp_path / "file" / "run")], "folder")


def test_masks_would_overwrite_images(run: Path, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(blobs / "images", tmp_path / "images")
    before = {p.name: p.read_bytes() for p in (tmp_path / "images").iterdir()}
    refused(capsys, ["predict", str(run), str(tmp_path / "images"), "--out", str(tmp_path / "images")], "the input itself")
    assert {p.name: p.read_bytes() for p in (tmp_path / "images").iterdir()} == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_disk_refuses(code: int, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or read-only disk while weights are saved: one line, no torn file, and the run resumes when there is room again."""
    from paperworks.train import run as runs

    def full(tensors):
        raise OSError(code, os.strerror(code), "model.safetensors")

    command = ["train", "unet", str(blobs), "--variant", "test", "--steps", "2", "--set", "patch=32", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(runs.safetensors.torch, "save", full)
        refused(capsys, command, "model.safetensors")
    assert not (tmp_path / "run" / "model.safetensors").exists() and not list((tmp_path / "run").rglob("*.tmp*"))
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
