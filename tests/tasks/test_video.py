"""Films with labels: readers, clips and crops, scores, baselines, files."""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from paperworks import tasks
from paperworks.data.clips import GifFilm, is_clip, looks_like_clips, open_clip, open_clips
from paperworks.data.packs import verify_pack
from paperworks.errors import InputError
from paperworks.tasks.base import Grid
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.video import (
    CLIPS,
    Jitter,
    Reel,
    Video,
    VideoScores,
    all_clips,
    clip_places,
    crops,
    differences,
    evenly,
    frame_step,
    resized,
)

GRID = Grid(fixed=8, frames=4, step=2)


def frames_of(colour: int, count: int = 9, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    """A bright column that moves to the right by one pixel a frame, T H W C."""
    film = np.zeros((count, *size, 3), np.uint8)
    for t in range(count):
        film[t, :, t, colour] = 200
    return film


def write_gif(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(f) for f in frames)
    first.save(path, save_all=True, append_images=rest, duration=50)


def write_folder(path: Path, frames: np.ndarray) -> None:
    path.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i + 1}.png")


def write_avi(path: Path, frames: np.ndarray) -> None:
    av: Any = importlib.import_module("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode())


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {".gif": write_gif, "": write_folder, ".avi": write_avi}


@pytest.fixture(params=list(WRITERS), ids=["gif", "folders", "avi"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(root: Path, kind: str, count: int = 5) -> Path:
    for label, colour in (("blue", 2), ("red", 0)):
        for i in range(count):
            WRITERS[kind](root / label / f"{i}{kind}", frames_of(colour))
    return root


# --- Readers


def test_class_folders(tmp_path: Path, kind: str) -> None:
    root = make(tmp_path / "set", kind)
    assert looks_like_clips(root) and tasks.guess(root) == "video"
    opened = Video(root)
    assert opened.spec.classes == ("blue", "red") and opened.spec.channels == 3 and opened.spec.size == (12, 16)
    assert opened.spec.more == {"frames": 9} and len(opened.train) + len(opened.val) == 10
    assert opened.describe()["frames"] == {"min": 9, "median": 9, "max": 9} and not opened.describe()["problems"]
    expected = np.concatenate([frames_of(2), frames_of(0)]).mean((0, 1, 2)) / 255
    assert opened.spec.mean == pytest.approx(expected, rel=0.35), "eight of nine frames are looked at"
    item = next(i for i in opened.train if i.label == 1)
    clip = opened.given(opened.sample(item)).frames([0, 8])
    assert clip.shape == (3, 2, 12, 16)
    np.testing.assert_allclose(clip.numpy(), frames_of(0)[[0, 8]].transpose(3, 0, 1, 2) / 255, atol=0.01)
    assert Video(root).sha256 == opened.sha256 and opened.files([item]) == [item.path]


def test_folders_of_splits(tmp_path: Path) -> None:
    make(tmp_path / "train", "")
    make(tmp_path / "val", "", count=2)
    opened = Video(tmp_path)
    assert (len(opened.train), len(opened.val)) == (10, 4) and opened.val[0].name == "val/blue/0"


@pytest.mark.parametrize("column", ["split", "splits.json"])
def test_a_table(tmp_path: Path, column: str) -> None:
    for i in range(6):
        write_folder(tmp_path / "clips" / f"film_{i}", frames_of(i % 3))
    split = ["train" if i < 4 else "val" for i in range(6)]
    lines = [f"film_{i},{'xy'[i % 2]}" + f",{split[i]}" * (column == "split") for i in range(6)]
    (tmp_path / "clips.csv").write_text("\n".join(["clip,label" + ",split" * (column == "split"), *lines]))
    if column != "split":
        (tmp_path / "splits.json").write_text(json.dumps({s: [f"film_{i}" for i in range(6) if split[i] == s] for s in ("train", "val")}))
    for source in (tmp_path, tmp_path / "clips.csv"):
        opened = Video(source)
        assert [i.name for i in opened.val] == ["film_4", "film_5"] and [i.label for i in opened.val] == [0, 1]
    assert tasks.guess(tmp_path) == "video"


def test_groups_stay_on_one_side(tmp_path: Path) -> None:
    for i in range(20):
        write_folder(tmp_path / f"{i}", frames_of(i % 3, count=2))
    rows = [f"{i},{'xy'[i % 2]},scene {i // 4}" for i in range(20)]
    (tmp_path / "clips.csv").write_text("\n".join(["clip,label,sequence", *rows]))
    opened = Video(tmp_path)
    assert {int(i.name) // 4 for i in opened.train}.isdisjoint({int(i.name) // 4 for i in opened.val})


def test_bad_rows_are_named(tmp_path: Path) -> None:
    for i in range(4):
        write_folder(tmp_path / f"{i}", frames_of(0))
    (tmp_path / "notes.txt").write_text("no film")
    rows = ["0,a,train", "1,b,val", "2,,train", "3,a,tomorrow", "9,a,val", "0,b,val", "notes.txt,a,val"]
    (tmp_path / "clips.csv").write_text("\n".join(["clip,label,split", *rows]))
    found = [p.what for p in open_clips(tmp_path).problems]
    assert found == [
        "row 4 gives '2' no label", "row 5 has the split 'tomorrow'", "row 6 names '9', which is not there",
        "row 7 names '0' again", "row 8 names 'notes.txt', which is no film",
    ]  # fmt: skip


def test_broken_films_are_left_out_and_named(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ".gif")
    (root / "red" / "9.gif").write_bytes(b"GIF89a, but no more")
    write_gif(root / "red" / "one.gif", frames_of(0)[:1])
    (root / "blue" / "10.mp4").write_bytes(b"no film")
    opened = Video(root)
    assert {Path(p["path"]).name for p in opened.describe()["problems"]} == {"9.gif", "one.gif", "10.mp4"}
    assert len(opened.train) + len(opened.val) == 10


def test_what_cannot_be_used_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Video(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no films in folders named by class"):
        Video(tmp_path)
    make(tmp_path / "set" / "only", ".gif", count=2)
    with pytest.raises(InputError, match="no films"):
        Video(tmp_path / "set")
    write_gif(tmp_path / "one" / "red" / "0.gif", frames_of(0))
    write_gif(tmp_path / "one" / "red" / "1.gif", frames_of(1))
    with pytest.raises(InputError, match="holds one class only"):
        Video(tmp_path / "one")
    (tmp_path / "clips.csv").write_text("film,when\na,b\n")
    with pytest.raises(InputError, match="no header with the columns clip and label"):
        Video(tmp_path / "clips.csv")
    (tmp_path / "0.txt").write_text("")
    with pytest.raises(InputError):
        Video(tmp_path / "0.txt")


def test_frames_of_different_sizes_are_named(tmp_path: Path) -> None:
    root = make(tmp_path / "set", "")
    Image.new("RGB", (5, 5)).save(root / "red" / "3" / "4.png")
    (problem,) = open_clips(root).problems
    assert "4.png" in str(problem)


def test_grey_gifs_are_grey(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", np.repeat(frames_of(0)[..., :1], 3, 3))
    assert open_clip(tmp_path / "a.gif").shape == (12, 16, 1)
    write_gif(tmp_path / "b.gif", frames_of(0))
    assert GifFilm(tmp_path / "b.gif").shape == (12, 16, 3)
    assert is_clip(tmp_path / "b.gif") and not is_clip(tmp_path), "a folder of GIFs is no film"


def test_other_sets_are_no_films(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / f"{i}.png")
    assert not looks_like_clips(tmp_path / "images")
    assert not looks_like_clips(tmp_path / "images" / "a" / "0.png")


def test_the_pack_is_whole_and_each_digit_is_on_one_side() -> None:
    assert verify_pack("moving_digits") == 520 + 4
    opened = Video(Video.pack)
    assert (len(opened.train), len(opened.val)) == (400, 120) and len(opened.spec.classes) == 10
    with (opened.folder.root / "digits.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert len({row["row of mnist.npz"] for row in rows}) == 520
    assert all((row["film"].startswith("train")) == row["row of mnist.npz"].startswith("x_train") for row in rows)


# --- Clips and crops


def test_places_of_clips() -> None:
    assert clip_places(20, GRID, 0.0) == [0, 2, 4, 6] and clip_places(20, GRID, 1.0) == [13, 15, 17, 19]
    assert clip_places(7, GRID, 0.7) == [0, 2, 4, 6]
    assert clip_places(4, GRID, 0.5) == [0, 1, 2, 3] and clip_places(2, GRID, 0.5) == [0, 0, 1, 1], "too short: spread over the film"
    assert all_clips(16, GRID) == [[0, 2, 4, 6], [9, 11, 13, 15]]
    assert len(all_clips(1000, GRID)) == CLIPS and all_clips(3, GRID) == [[0, 1, 1, 2]]
    assert evenly(9, 3) == [0, 4, 8] and evenly(5, 1) == [0]
    spec = Video.plain_spec()
    assert frame_step(spec, 4) == 4 and frame_step(spec, 32) == 1 and frame_step(spec, 1) == 8


def test_crops_cover_the_longer_side() -> None:
    clip = torch.arange(24.0).expand(3, 2, 12, 24) / 24
    found = crops(clip, 12)
    assert found.shape == (3, 3, 2, 12, 12)
    assert torch.equal(found[0], clip[..., :12]) and torch.equal(found[1], clip[..., 6:18]) and torch.equal(found[2], clip[..., 12:])
    assert crops(torch.rand(1, 2, 20, 21), 8).shape == (1, 1, 2, 8, 8), "nearly square: one crop"
    assert crops(torch.rand(1, 2, 40, 20), 8).shape == (3, 1, 2, 8, 8)
    assert resized(clip, 6).shape == (3, 2, 6, 12) and torch.equal(resized(clip, 12), clip)


def test_jitter_moves_all_frames_alike() -> None:
    still = torch.rand(3, 1, 16, 20).expand(-1, 4, -1, -1)
    sample = {"clip": still, "name": "a"}
    first, again, other = (Jitter()(sample, (8, 8), torch.Generator().manual_seed(s))["clip"] for s in (1, 1, 2))
    assert first.shape == (3, 4, 8, 8) and torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(first[:, t], first[:, 0]) for t in range(4))
    plain = Jitter(scale=(1, 1), flip=0)({"clip": still[..., :16]}, (16, 16), torch.Generator())["clip"]
    assert torch.equal(plain, still[..., :16])
    mirrored = Jitter(scale=(1, 1), flip=1)({"clip": still[..., :16]}, (16, 16), torch.Generator())["clip"]
    assert torch.equal(mirrored, still[..., :16].flip(-1))


# --- Scores, baselines, predictions


def test_scores_by_hand() -> None:
    """Two films of three views and one: the first is right by the mean, two of its views are."""
    scores = VideoScores(("a", "b"))
    scores.update(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]]), {"label": torch.tensor(0), "name": "0"})
    scores.update(torch.tensor([[0.6, 0.4]]), {"label": torch.tensor(1), "name": "1"})
    found = scores.compute()
    assert found["top1"] == 0.5 and found["clip_top1"] == pytest.approx(2 / 4)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 2, rel=1e-5)
    assert [row["clip_top1"] for row in scores.per_item()] == [pytest.approx(2 / 3), 0] and [row["top1"] for row in scores.per_item()] == [
        1,
        0,
    ]


def test_baselines(tmp_path: Path) -> None:
    for label, step in (("left", -1), ("right", 1)):
        for i in range(10):
            write_folder(tmp_path / label / str(i), frames_of(i % 3)[::step])
    opened = Video(tmp_path)
    found = {name: opened.evaluate(predict)[0]["top1"] for name, predict in opened.baselines().items()}
    assert set(found) == set(Video.baseline_names)
    assert found["differences"] == 1 and found["mean_frame"] <= 0.5, "only the order of the frames tells left from right"
    assert differences(torch.rand(2, 3, 16, 8, 8)).shape == (2, 2 * 3 * 64)


def test_views_are_averaged(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", frames_of(0, count=16, size=(8, 16)))
    seen = []

    def deployed(clips: torch.Tensor) -> torch.Tensor:
        seen.append(clips.shape)
        return torch.full((len(clips), 2), 0.5)

    reel = Reel(open_clip(tmp_path / "a"), (0, 255), 3)
    found = Video.predictor(deployed, Video.plain_spec(), GRID)(reel)
    assert seen == [(3, 3, 4, 8, 8)] * 2 and found.shape == (6, 2), "two clips of three crops"
    assert Video.network_input(reel, GRID).shape == (3, 4, 8, 8)


def model(root: Path) -> Model:
    """Says red where there is more red than blue."""
    return Model(
        root, Video(root).spec, GRID, lambda clip: torch.stack([clip[:, 2].mean((1, 2, 3)), clip[:, 0].mean((1, 2, 3))], 1).softmax(1)
    )


def test_files(tmp_path: Path, kind: str) -> None:
    root = make(tmp_path / "set", kind)
    out = tmp_path / "out"
    (path,) = Video.predict_files(model(root), [root], out, Options(probabilities=True, overlays=True))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 10 and all(row["class"] in row["file"] for row in rows)
    assert float(rows[0]["blue"]) + float(rows[0]["red"]) == pytest.approx(1, abs=1e-5)
    assert len(list(out.rglob("*.card.png"))) == 10
    alone = Video.predict_files(model(root), [root / "red" / f"0{kind}"], tmp_path / "alone", Options())
    assert "red" in alone[0].read_text().splitlines()[1]


def test_a_broken_film_is_named(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ".gif")
    found = model(root)
    (root / "red" / "4.gif").write_bytes(b"no film")
    with pytest.raises(InputError, match=r"4\.gif"):
        Video.predict_files(found, [root], tmp_path / "out", Options())
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 10
    write_gif(tmp_path / "grey.gif", np.repeat(frames_of(0)[..., :1], 3, 3))
    assert len(Video.predict_files(found, [tmp_path / "grey.gif"], tmp_path / "grey", Options())) == 1, "grey becomes colour"


def test_flow_has_two_channels(tmp_path: Path) -> None:
    """Films of optical flow, as TIFF files with two planes a frame."""
    chance = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(5):
            flow = chance.integers(0, 255, (6, 2, 8, 8), dtype=np.uint8)
            tifffile.imwrite(tmp_path / label / f"{i}.tif", flow, photometric="minisblack", metadata={"axes": "TCYX"})
    tifffile.imwrite(tmp_path / "a" / "colour.tif", np.zeros((6, 8, 8, 3), np.uint8), photometric="rgb")
    opened = Video(tmp_path)
    assert opened.spec.channels == 2 and opened.given(opened.sample(opened.train[0])).frames([0, 5]).shape == (2, 2, 8, 8)
    assert "3 channels where most films are uint8 with 2" in opened.describe()["problems"][0]["what"]
