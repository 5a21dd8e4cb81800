"""Films in every form that people have them, and what is said when they are broken."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from paperworks.data.films import Films, frames_in, grey, is_film, moving_windows, open_film, unit, write_film
from paperworks.errors import InputError


def frames(count: int = 8, dtype: str = "uint8", channels: int = 1, seed: int = 0) -> np.ndarray:
    """T H W C."""
    top = 255 if dtype == "uint8" else 4000
    return np.random.default_rng(seed).integers(0, top, (count, 20, 24, channels)).astype(dtype)


def save(folder, stack: np.ndarray, suffix: str = ".png", start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(stack.squeeze(3) if stack.shape[3] == 1 else stack, start=start):
        path = folder / f"frame{i}{suffix}"
        tifffile.imwrite(path, frame) if suffix == ".tif" else Image.fromarray(frame).save(path)


@pytest.mark.parametrize(
    ("suffix", "dtype", "channels"), [(".png", "uint8", 1), (".png", "uint8", 3), (".png", "uint16", 1), (".tif", "float32", 1)]
)
def test_folders_of_frames_are_read_and_written_as_they_are(tmp_path, suffix, dtype, channels):
    stack = frames(12, dtype, channels)
    save(tmp_path / "film", stack, suffix)
    film = open_film(tmp_path / "film")
    assert (len(film), film.shape, film.dtype) == (12, (20, 24, channels), dtype)
    assert film.names[2] == "frame2" and film.names[-1] == "frame11"  # by number, not by letter
    assert all(np.array_equal(film.frame(i), stack[i]) for i in range(12))
    write_film(film, tmp_path / "out", iter(stack[::-1]))
    again = open_film(tmp_path / "out")
    assert (again.names, again.dtype) == (film.names, dtype)
    assert np.array_equal(again.frame(0), stack[-1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film", "out"]


@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 1), ("uint16", 1), ("float32", 1), ("uint8", 3)])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_films(tmp_path, dtype, channels, compression):
    stack = frames(7, dtype, channels)
    path = tmp_path / "film.tif"
    tifffile.imwrite(
        path, stack.squeeze(3) if channels == 1 else stack, compression=compression, photometric="rgb" if channels == 3 else "minisblack"
    )
    assert is_film(path)
    film = open_film(path)
    assert (len(film), film.shape, film.dtype) == (7, (20, 24, channels), dtype)
    assert all(np.array_equal(film.frame(i), stack[i]) for i in (6, 0, 3))
    write_film(film, tmp_path / "out.tif", iter(stack))
    again = tifffile.imread(tmp_path / "out.tif")
    assert again.dtype == dtype
    assert np.array_equal(again, stack.squeeze())


def test_one_image_is_a_film_of_one_frame(tmp_path):
    save(tmp_path, frames(1))
    film = open_film(tmp_path / "frame0.png")
    assert len(film) == 1
    write_film(film, tmp_path / "out.png", [film.frame(0)])
    assert np.array_equal(open_film(tmp_path / "out.png").frame(0), film.frame(0))


def test_jpeg_becomes_png(tmp_path):
    save(tmp_path / "a", frames(3), ".jpg")
    film = open_film(tmp_path / "a")
    write_film(film, tmp_path / "b", (film.frame(i) for i in range(3)))
    assert [p.name for p in frames_in(tmp_path / "b")] == ["frame0.png", "frame1.png", "frame2.png"]


def test_videos(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "film.mkv"
    stack = np.repeat(frames(5), 3, axis=3).repeat(4, 1).repeat(4, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = stack.shape[2], stack.shape[1], "bgr0"
        for frame in stack:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    film = open_film(path)
    assert (len(film), film.shape) == (5, (80, 96, 3))
    assert np.array_equal(film.frame(3), stack[3])
    with pytest.raises(InputError, match="cannot be read as a video"):
        (tmp_path / "bad.mp4").write_bytes(b"nothing")
        open_film(tmp_path / "bad.mp4")


def test_videos_without_pyav_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"film")
    with pytest.raises(InputError, match=r"install paperworks\[video\]"):
        open_film(tmp_path / "film.mp4")


def test_a_film_travels_to_another_process(tmp_path):
    save(tmp_path / "film", frames())
    films = Films(tmp_path)
    again = pickle.loads(pickle.dumps(films))
    assert torch.equal(again.window(0, 3, 2), films.window(0, 3, 2))


# --- data sets


def test_films_with_clean_counterparts(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "noisy" / name, frames(seed=1))
        save(tmp_path / "clean" / name, frames(seed=2))
    save(tmp_path / "somebody_elses_output", frames())
    films = Films(tmp_path)
    assert films.names == ["a", "b"]
    assert torch.equal(films.truth(1, 3), unit(frames(seed=2)[3], films.range))
    assert [i.name for i in films.val] == ["a/frame6", "a/frame7", "b/frame6", "b/frame7"]


@pytest.mark.parametrize("layout", ["frames beside clean", "tiff", "folder"])
def test_where_clean_films_may_lie(tmp_path, layout):
    if layout == "frames beside clean":
        save(tmp_path, frames(seed=1))
        save(tmp_path / "clean", frames(seed=2))
    elif layout == "folder":
        save(tmp_path / "film", frames(seed=1))
        save(tmp_path / "clean" / "film", frames(seed=2))
    else:
        (tmp_path / "clean").mkdir()
        tifffile.imwrite(tmp_path / "film.tif", frames(seed=1).squeeze(3), photometric="minisblack")
        tifffile.imwrite(tmp_path / "clean" / "film.tif", frames(seed=2).squeeze(3), photometric="minisblack")
    films = Films(tmp_path)
    assert len(films.films) == 1
    assert torch.equal(films.truth(0, 0), unit(frames(seed=2)[0], films.range))


def test_a_missing_clean_film_is_a_problem_and_a_wrong_one_too(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "noisy" / name, frames())
    save(tmp_path / "clean" / "a", frames())
    films = Films(tmp_path)
    assert films.truth(0, 0) is None
    assert "nothing for b" in str(films.problems[0])
    save(tmp_path / "clean" / "b", frames(5))
    films = Films(tmp_path)
    assert films.names == ["a"]
    assert "differs from" in str(films.problems[0])


def test_windows_repeat_the_outermost_frames(tmp_path):
    save(tmp_path, frames())
    films = Films(tmp_path)
    one = [films.noisy(0, i) for i in range(8)]
    for index, expected in [(0, (0, 0, 0, 1, 2)), (1, (0, 0, 1, 2, 3)), (4, (2, 3, 4, 5, 6)), (7, (5, 6, 7, 7, 7))]:
        assert torch.equal(films.window(0, index, 2), torch.cat([one[i] for i in expected]))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_moving_windows_are_those_of_the_data_set(tmp_path, count):
    save(tmp_path / "a", frames(count))
    save(tmp_path / "b", frames(6))
    films = Films(tmp_path)
    found = list(moving_windows((films.noisy(0, i) for i in range(count)), 2))
    assert len(found) == count
    assert all(torch.equal(w, films.window(0, i, 2)) for i, w in enumerate(found))


@pytest.mark.parametrize(("dtype", "limits"), [("uint8", (7, 250)), ("uint16", (100, 900)), ("float32", (-2.5, 8.0))])
def test_range_is_that_of_the_films_and_comes_back(tmp_path, dtype, limits):
    low, high = limits
    stack = np.random.default_rng(0).uniform(low, high, (4, 16, 16, 1)).astype(dtype)
    stack[0, 0, 0], stack[0, 0, 1] = low, high
    save(tmp_path, stack, ".tif")
    films = Films(tmp_path)
    assert films.range == limits
    image = films.noisy(0, 2)
    assert image.min() >= 0 and image.max() <= 1
    back = grey(image, films.range, dtype)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, stack[2], atol=0 if dtype != "float32" else 1e-5)
    assert grey(image + 100, (0.0, 255.0), "uint8").max() == 255  # clipped, not wrapped round


def test_added_noise_follows_from_the_seed_and_has_the_level_that_is_said(tmp_path):
    stack = np.full((6, 64, 64, 1), 100, np.uint8)
    stack[0, 0, 0], stack[0, 0, 1] = 0, 200
    save(tmp_path, stack)
    (tmp_path / "restoration.json").write_text(json.dumps({"add": "gaussian", "sigma": 10, "seed": 1}))
    films, again = Films(tmp_path), Films(tmp_path)
    assert films.sigma == pytest.approx(10 / 200)
    assert torch.equal(films.noisy(0, 3), again.noisy(0, 3))
    assert not torch.equal(films.noisy(0, 3), films.noisy(0, 4))
    noise = films.noisy(0, 3) - films.truth(0, 3)
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)
    assert abs(float(noise.mean())) < 0.003
    (tmp_path / "restoration.json").write_text(json.dumps({"add": "poisson", "photons": 50}))
    counted = Films(tmp_path)
    assert counted.sigma is None
    assert counted.sha256 != films.sha256
    noise = counted.noisy(0, 3) - counted.truth(0, 3)
    assert float(noise.std()) == pytest.approx((0.5 / 50) ** 0.5, rel=0.05)
    (tmp_path / "restoration.json").write_text(json.dumps({"sigma": 10}))
    assert Films(tmp_path).sigma == pytest.approx(0.05) and Films(tmp_path).truth(0, 0) is None


def test_stills_are_films_of_their_own(tmp_path):
    save(tmp_path / "images", frames(8))
    (tmp_path / "restoration.json").write_text(json.dumps({"stills": True, "add": "gaussian", "sigma": 10}))
    films = Films(tmp_path)
    assert len(films.films) == 8
    assert [i.name for i in films.val] == ["images/frame6", "images/frame7"]
    window = films.window(0, 0, 2)
    assert all(torch.equal(window[0], frame) for frame in window)


@pytest.mark.parametrize(
    ("said", "val"),
    [({"train": ["a"], "val": ["b"]}, ["b/frame0", "b/frame1", "b/frame2"]), ({"train": ["a", "b"], "val": ["a/frame1"]}, ["a/frame1"])],
)
def test_splits_by_film_and_by_frame(tmp_path, said, val):
    for name in ("a", "b"):
        save(tmp_path / name, frames(3))
    (tmp_path / "splits.json").write_text(json.dumps(said))
    assert [i.name for i in Films(tmp_path).val] == val


# --- what goes wrong


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"add": "salt"}, "write gaussian or poisson"),
        ({"add": "gaussian"}, '"sigma" must be a number'),
        ({"add": "poisson", "photons": -1}, '"photons" must be a number'),
        ({"noise": 3}, r"has \['noise'\]; it takes add"),
        ([1], "has no object"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, said, match):
    save(tmp_path, frames())
    (tmp_path / "restoration.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=match):
        Films(tmp_path)


def test_a_broken_film_is_left_out_and_named(tmp_path):
    save(tmp_path / "a", frames())
    save(tmp_path / "b", frames())
    (tmp_path / "b" / "frame3.png").write_bytes((tmp_path / "b" / "frame3.png").read_bytes()[:60])
    save(tmp_path / "c", frames(3))
    Image.new("L", (9, 9)).save(tmp_path / "c" / "frame1.png")
    save(tmp_path / "d", frames(dtype="uint16"))
    films = Films(tmp_path)
    assert films.names == ["a"]
    text = " | ".join(map(str, films.problems))
    assert "frame3.png" in text and "frame1.png" in text and "save all alike" in text


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda root: None, "holds no films"),
        (lambda root: save(root, np.full((3, 16, 16, 1), np.nan, np.float32), ".tif"), "NaN or infinite"),
        (lambda root: (save(root, frames()), (root / "splits.json").write_text('{"train": ["x"]}')), "0 frames for training"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, make, match):
    make(tmp_path)
    with pytest.raises(InputError, match=match):
        Films(tmp_path)


def test_a_tiff_that_was_cut_short(tmp_path):
    path = tmp_path / "film.tif"
    tifffile.imwrite(path, frames(6).squeeze(3), photometric="minisblack")
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(InputError, match=r"film\.tif"):
        Films(path)


def test_packs_of_films():
    films = Films("pack:video_fluorescence")
    assert (len(films.films[0]), films.films[0].shape, len(films.val)) == (48, (200, 198, 1), 12)
    films = Films("pack:particles_bulk_water")
    assert (len(films.train), len(films.val), films.settings.sigma) == (55, 5, 5)
