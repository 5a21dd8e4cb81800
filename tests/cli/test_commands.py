"""The commands as a person gives them, on a folder outside the repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from paperworks.cli import main


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict | list:
    """Run a command with --json and read what it prints; nothing else may be on stdout."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_show_audit(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ask(capsys, "list")
    assert {"id", "title", "year", "task", "level", "verdict"} <= rows[0].keys()
    assert ask(capsys, "list", "--task", "segmentation") and not ask(capsys, "list", "--task", "cooking")
    shown = ask(capsys, "show", rows[0]["id"])
    assert shown["idea"]["en"] and shown["idea"]["zh"] and shown["evidence"]["level"] in range(5)
    assert {"id", "section", "task", "level", "stale", "missing", "claim", "fidelity", "against", "verdict"} <= ask(capsys, "audit")[
        0
    ].keys()
    for language in ("en", "zh"):
        assert main(["show", rows[0]["id"], "--lang", language]) == 0
    assert shown["idea"]["zh"][:10] in capsys.readouterr().out


def test_data(blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "data", str(blobs))
    assert found["task"] == "segmentation" and found["splits"] == {"train": 8, "val": 4, "test": 0} and not found["problems"]
    assert main(["data", str(blobs)]) == 0
    assert "foreground" in capsys.readouterr().out


def test_evaluate(run: Path, exported: Path, blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = ask(capsys, "evaluate", str(run), str(blobs)), ask(capsys, "evaluate", str(exported), str(blobs))
    assert ours["metrics"]["dice"] == pytest.approx(theirs["metrics"]["dice"], abs=1e-3)
    assert set(ours["baselines"]) == {"otsu", "majority"} and len(ours["per_item"]) == 4
    recorded = json.loads((run / "run.json").read_text())["metrics"]["dice"]
    assert ours["metrics"]["dice"] == pytest.approx(recorded, abs=1e-4)


@pytest.mark.parametrize("form", ["run", "exported"])
def test_predict_folder(form: str, blobs: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(form)
    assert main(["predict", str(model), str(blobs / "images"), "--out", str(tmp_path / "out"), "--overlays", "--probabilities"]) == 0
    for image in (blobs / "images").iterdir():
        with Image.open(tmp_path / "out" / image.name) as mask:
            assert mask.mode == "P" and mask.size == (48, 48) and set(np.unique(mask)) <= {0, 1}
            labels = np.asarray(mask)
        probabilities = tifffile.imread(tmp_path / "out" / f"{image.stem}.probabilities.tif")
        assert probabilities.shape == (48, 48, 2) and np.allclose(probabilities.sum(-1, dtype=np.float32), 1, atol=2e-3)
        assert (probabilities.argmax(-1) == labels).mean() > 0.99
        with Image.open(tmp_path / "out" / f"{image.stem}.overlay.png") as overlay:
            assert overlay.size == (48, 48)


def test_run_and_export_agree(run: Path, exported: Path, blobs: Path, tmp_path: Path) -> None:
    for model, out in ((run, "a"), (exported, "b")):
        assert main(["predict", str(model), str(blobs / "images"), "--out", str(tmp_path / out)]) == 0
    for path in (tmp_path / "a").iterdir():
        with Image.open(path) as a, Image.open(tmp_path / "b" / path.name) as b:
            assert (np.asarray(a) == np.asarray(b)).mean() > 0.99


def test_predict_in_bfloat16(run: Path, exported: Path, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(blobs / "images"), "--out", str(tmp_path / "out"), "--precision"]
    assert main(["predict", str(run), *command, "bf16"]) == 0
    assert "bf16: on the first input the outputs differ from float32's by 0." in capsys.readouterr().err
    assert main(["predict", str(run), *command, "half"]) == 2 and "--precision 'half' is not one of fp32, bf16" in capsys.readouterr().err
    assert main(["predict", str(exported), *command, "bf16"]) == 2 and "computes as it was exported" in capsys.readouterr().err


def test_predict_large_tiff_by_rows(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streamed path gives what the path in memory gives."""
    from paperworks.tasks import masks

    noise = np.random.default_rng(0).integers(0, 255, (300, 170), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "large.tif", noise)
    options = ["--window", "64", "--probabilities"]
    assert main(["predict", str(run), str(tmp_path / "large.tif"), "--out", str(tmp_path / "a"), *options]) == 0
    monkeypatch.setattr(masks, "STREAMED", 1000)
    assert main(["predict", str(run), str(tmp_path / "large.tif"), "--out", str(tmp_path / "b"), *options]) == 0
    a, b = (tifffile.imread(tmp_path / out / "large.tif") for out in "ab")
    assert a.shape == noise.shape and (a == b).all()
    a, b = (tifffile.imread(tmp_path / out / "large.probabilities.tif") for out in "ab")
    assert np.allclose(a, b, atol=1e-3)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["large.probabilities.tif", "large.tif"]


def test_predict_with_refiner(run: Path, blobs: Path, tmp_path: Path) -> None:
    image = str(blobs / "images" / "disc 00.png")
    assert main(["predict", str(run), image, "--out", str(tmp_path / "out"), "--with", "dense_crf", "--set", "iterations=2"]) == 0
    assert (tmp_path / "out" / "disc 00.png").exists()


def test_predict_resume(run: Path, blobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(run), str(blobs / "images"), "--out", str(out)]) == 0
    kept, gone = out / "disc 00.png", out / "disc 01.png"
    before = kept.stat().st_mtime_ns
    gone.unlink()
    assert main(["predict", str(run), str(blobs / "images"), "--out", str(out), "--resume"]) == 0
    assert gone.exists() and kept.stat().st_mtime_ns == before


def test_predict_in_shards(run: Path, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = []
    for part in (1, 2, 3):
        assert main(["predict", str(run), str(blobs / "images"), "--out", str(tmp_path / str(part)), "--shard", f"{part}/3"]) == 0
        written.append({path.name for path in (tmp_path / str(part)).iterdir()})
    everything = {path.name for path in (blobs / "images").iterdir()}
    assert set.union(*written) == everything and sum(map(len, written)) == len(everything) and all(written)
    for wrong in ("4/3", "0/3", "half", "1/2/3"):
        assert main(["predict", str(run), str(blobs / "images"), "--out", str(tmp_path / "no"), "--shard", wrong]) == 2
        assert "2/8" in (said := capsys.readouterr().err) or "1/4" in said


def test_resume_of_a_finished_run(run: Path, blobs: Path) -> None:
    assert main(["train", "unet", str(blobs), "--variant", "test", "--steps", "3", "--set", "patch=32", "--out", str(run), "--resume"]) == 0


def test_compare(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare"
    command = ["compare", str(blobs), "--papers", "unet,unetpp", "--variant", "test", "--steps", "2", "--out", str(out)]
    first = ask(capsys, *command)
    assert [r["id"] for r in first["rows"]] == ["unet", "unetpp", "otsu", "majority"]
    for row in first["rows"]:
        assert row["status"] == "ok" and 0 <= row["metrics"]["dice"] <= 1
    assert first["rows"][0]["cost"]["latency_ms"] and first["rows"][0]["cost"]["export_error"] < 1e-4
    assert (out / "report.html").stat().st_size > 10_000 and (out / first["rows"][0]["model"]).exists()
    trained = (out / "runs" / "unet" / "model.safetensors").stat().st_mtime_ns
    assert ask(capsys, *command)["rows"][0]["metrics"] == first["rows"][0]["metrics"]
    assert (out / "runs" / "unet" / "model.safetensors").stat().st_mtime_ns == trained, "what is trained is kept"


def test_compare_survives_a_failure(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paperworks.study import compare

    real = compare.fit

    def fit(name, *args, **options):
        if name == "unetpp":
            raise ValueError("out of luck\nin two lines")
        return real(name, *args, **options)

    monkeypatch.setattr(compare, "fit", fit)
    command = ["compare", str(blobs), "--papers", "unetpp,unet", "--variant", "test", "--steps", "2", "--out", str(tmp_path / "out")]
    rows = {r["id"]: r for r in ask(capsys, *command)["rows"]}
    assert rows["unetpp"]["status"] == "failed" and rows["unetpp"]["error"] == "out of luck"
    assert rows["unet"]["status"] == "ok"
    assert "out of luck" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_measure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "measure", str(run))
    assert found["params"] > 0 and found["flops"] > 0 and found["latency_ms"]["eager"]["1"]["p50"] > 0
    assert ask(capsys, "measure", "unet", "--variant", "test", "--size", "64")["params"] > 0


@pytest.mark.parametrize("command", [["--help"], ["list"], ["train", "--help"]])
def test_nothing_heavy_is_imported(command: list[str]) -> None:
    code = f"import sys; from paperworks.cli import main; code = main({command}); heavy = {{'torch', 'numpy', 'matplotlib'}} & set(sys.modules); sys.exit(code or bool(heavy))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "command", ["data", "train", "evaluate", "predict", "compare", "claim", "measure", "export", "audit", "new", "list", "show"]
)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"paperworks {command}" in " ".join(capsys.readouterr().out.split())
