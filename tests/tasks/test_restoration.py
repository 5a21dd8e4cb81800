"""The task restoration: samples, hidden pixels, scores, baselines, pictures and films that are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from paperworks.errors import InputError
from paperworks.tasks.base import Grid, Recipe
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.restoration import FilmAugment, Restoration, frames_of, hide, inside, middle, noise_level

SIDE = 32


def film(count: int = 8, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A disc that moves two pixels a frame, T H W uint8."""
    y, x = np.mgrid[:SIDE, :SIDE]
    discs = [60 + 120 * ((y - 16) ** 2 + (x - 8 - 2 * t) ** 2 < 36) for t in range(count)]
    return (np.stack(discs) + np.random.default_rng(seed).normal(0, noise, (count, SIDE, SIDE))).clip(0, 255).astype(np.uint8)


def save(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def with_truth(tmp_path) -> Restoration:
    save(tmp_path / "set" / "disc", film())
    (tmp_path / "set" / "restoration.json").write_text(json.dumps({"add": "gaussian", "sigma": 20}))
    return Restoration(tmp_path / "set")


@pytest.fixture
def without_truth(tmp_path) -> Restoration:
    save(tmp_path / "real" / "noisy", film(16, noise=20))
    return Restoration(tmp_path / "real")


def test_sample_and_spec(with_truth):
    sample = with_truth.sample(with_truth.val[0])
    assert sample["image"].shape == (5, SIDE, SIDE)
    assert sample["truth"].shape == (1, SIDE, SIDE)
    assert with_truth.spec.mean == with_truth.films.mean
    assert with_truth.spec.more["sigma"] == pytest.approx(20 / 120)
    assert with_truth.metric == "psnr"
    described = with_truth.describe()
    json.dumps(described)
    assert described["truth"] and described["splits"] == {"train": 6, "val": 2}


def test_training_samples_lie_inside_the_frame_and_follow_from_the_generator(with_truth):
    recipe = Recipe(patch=30, augment=FilmAugment())
    samples = [with_truth.training_sample(with_truth.train[3], recipe, Grid(8), torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert samples[0]["image"].shape == (5, 24, 24)
    assert torch.equal(samples[0]["image"], samples[1]["image"])
    assert not torch.equal(samples[0]["image"], samples[2]["image"])
    assert abs(float(samples[0]["truth"].mean())) < 1 and float(samples[0]["image"].std()) > 0.5  # normalised
    with pytest.raises(InputError, match="too small for this network"):
        with_truth.training_sample(with_truth.train[0], recipe, Grid(64), torch.Generator())


def test_augmentation_moves_truth_along_and_turns_time_round(with_truth):
    sample = with_truth.sample(with_truth.train[3])
    for frame in range(5):
        sample["image"][frame] = sample["truth"][0] + frame
    seen = set()
    for seed in range(24):
        out = FilmAugment()(sample, (20, 24), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(middle(out["image"]), out["truth"] + 2)
        seen.add(float((out["image"][4] - out["image"][0]).mean().round()))
    assert seen == {-4.0, 4.0}
    plain = FilmAugment(flip=False, reverse=False)(sample, (SIDE, SIDE), torch.Generator())
    assert torch.equal(plain["image"], sample["image"])


@pytest.mark.parametrize(
    ("grid", "side", "expected"),
    [(Grid(4), 30, 28), (Grid(16, offset=12, margin=92), 200, 188), (Grid(4), 3, 0), (Grid(fixed=32), 40, 32), (Grid(fixed=32), 20, 0)],
)
def test_inside(grid, side, expected):
    assert inside(grid, side) == expected


def test_scores_against_truth(with_truth):
    predict = lambda image: middle(image) * 0 + 0.5  # noqa: E731
    scores, rows = with_truth.evaluate(predict)
    errors = [float((with_truth.sample(item)["truth"] - 0.5).square().mean()) for item in with_truth.val]
    assert scores["psnr"] == pytest.approx(np.mean([-10 * np.log10(e) for e in errors]), abs=1e-3)
    assert [row["name"] for row in rows] == [item.name for item in with_truth.val]
    assert set(rows[0]) == {"name", "psnr", "ssim"}


def test_hidden_pixels_are_filled_in_all_copies_of_the_frame(without_truth):
    sample = without_truth.sample(without_truth.train[0])  # the first frame of a film stands three times in its window
    hidden = hide(sample)
    where = hidden["hidden"]
    assert where.float().mean() == pytest.approx(1 / 25, rel=0.2)
    for t in range(3):
        changed = hidden["image"][t] != sample["image"][t]
        assert changed[where].float().mean() > 0.9 and not changed[~where].any()
    assert torch.equal(hidden["image"][3:], sample["image"][3:])
    assert torch.equal(hidden["noisy"], middle(sample["image"]))


def test_copying_earns_nothing_without_truth_and_smoothing_does(without_truth):
    assert without_truth.metric == "hidden_psnr"
    values = {name: without_truth.evaluate(predict)[0]["hidden_psnr"] for name, predict in without_truth.baselines().items()}
    assert values["blur"] > values["noisy"] + 0.5
    noise = 20 / (without_truth.spec.range[1] - without_truth.spec.range[0])
    assert max(values.values()) < -20 * np.log10(noise) + 1.5  # the noise itself is the limit


def test_methods_come_in_the_order_of_their_true_errors(tmp_path):
    """The score without truth ranks as PSNR against the truth does, where nobody leans on the pixel itself."""
    clean, noisy = film(32), film(32, noise=20)
    save(tmp_path / "noisy", noisy)
    blind = Restoration(tmp_path)
    order = sorted(("temporal_mean", "blur", "blur_film"), key=lambda n: blind.evaluate(blind.baselines()[n])[0]["hidden_psnr"])
    save(tmp_path / "clean", clean)
    told = Restoration(tmp_path)
    assert told.metric == "psnr"
    assert order == sorted(order, key=lambda n: told.evaluate(told.baselines()[n])[0]["psnr"])


def test_every_baseline_beats_the_noise(with_truth):
    values = {name: with_truth.evaluate(predict)[0]["psnr"] for name, predict in with_truth.baselines().items()}
    assert set(values) == set(Restoration.baseline_names)
    assert min(values, key=lambda n: values[n]) == "noisy"


def test_noise_level_is_found():
    frame = torch.full((1, 200, 200), 0.5)
    frame[:, 50:90, 60:120] = 0.9
    assert noise_level(frame + 0.05 * torch.randn(frame.shape, generator=torch.Generator().manual_seed(0))) == pytest.approx(0.05, rel=0.05)


def test_pictures(with_truth, without_truth, tmp_path):
    for data, views in ((with_truth, {"input", "truth"}), (without_truth, {"input"})):
        sample = data.sample(data.val[0])
        shown, drawn = data.shown(sample), data.drawn(sample, middle(sample["image"]) * 0.9)
        assert set(shown) == views and set(drawn) == set(Restoration.views)
        assert all(p.dtype == np.uint8 and p.shape == (SIDE, SIDE, 3) for p in (*shown.values(), *drawn.values()))
    nothing_taken = with_truth.drawn(sample, middle(sample["image"]))["residual"]
    assert set(np.unique(nothing_taken)) == {128}
    with_truth.picture(middle, with_truth.val, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 2 * SIDE


# --- use


class Halved(nn.Module):
    """A network whose answer is known: half the middle frame plus a tenth of the frame before it."""

    grid = Grid(8)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        frames = frames_of(image)
        return {"restored": 0.5 * frames[:, 2] + 0.1 * frames[:, 1]}


def model(data: Restoration) -> Model:
    deployed = data.deploy(Halved(), data.spec)
    return Model(source=Path("run"), spec=data.spec, grid=deployed.grid, forward=deployed)


@pytest.mark.parametrize("window", [1024, 16])
def test_frames_of_any_size_are_restored_by_tiles(with_truth, window):
    image, mean = torch.rand(5, 37, 53), with_truth.spec.mean[0]
    out = with_truth.predictor(with_truth.deploy(Halved(), with_truth.spec), with_truth.spec, Grid(8), window=window)(image)
    torch.testing.assert_close(out[0], 0.5 * (image[2] - mean) + 0.1 * (image[1] - mean) + mean)


def expected(data: Restoration, stack: np.ndarray) -> np.ndarray:
    low, high = data.spec.range
    zero = low + data.spec.mean[0] * (high - low)  # what the network takes for zero
    before = stack[[0, *range(len(stack) - 1)]].astype(float)
    return np.rint(0.5 * (stack - zero) + 0.1 * (before - zero) + zero).clip(0, 255)


def test_whole_films_are_written_in_their_own_format(with_truth, tmp_path):
    stack = film(7, noise=10)
    save(tmp_path / "in" / "a", stack)
    tifffile.imwrite(tmp_path / "in" / "b.tif", stack, photometric="minisblack")
    (tmp_path / "in" / "notes.txt").write_text("not a film")
    written = Restoration.predict_files(model(with_truth), [tmp_path / "in"], tmp_path / "out", Options())
    assert sorted(p.name for p in written) == ["a", "b.tif"]
    frames = np.stack([np.array(Image.open(p)) for p in sorted((tmp_path / "out" / "a").iterdir())])
    assert frames.dtype == np.uint8 and [p.name for p in sorted((tmp_path / "out" / "a").iterdir())] == [f"{i:03d}.png" for i in range(7)]
    assert np.abs(frames - expected(with_truth, stack)).max() <= 1
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "b.tif"), frames)


def test_items_have_files_that_can_be_predicted(with_truth, tmp_path):
    files = with_truth.files(with_truth.val)
    assert len(files) == 1
    assert len(Restoration.predict_files(model(with_truth), files, tmp_path / "out", Options())) == 1


@pytest.mark.parametrize(
    ("name", "becomes"), [("a.mp4", "a.tif"), ("a.jpg", "a.png"), ("a.tif", "a.tif"), ("x/film", "x/film"), ("a.PNG", "a.png")]
)
def test_names_of_results(name, becomes):
    assert Restoration.target(Path(name)) == Path(becomes)


def test_films_of_another_kind_are_refused(with_truth, tmp_path):
    tifffile.imwrite(tmp_path / "deep.tif", film(4).astype(np.uint16), photometric="minisblack")
    with pytest.raises(InputError, match="uint16 where the model was trained on uint8"):
        Restoration.predict_files(model(with_truth), [tmp_path / "deep.tif"], tmp_path / "out", Options())
    tifffile.imwrite(tmp_path / "rgb.tif", np.repeat(film(4)[..., None], 3, 3), photometric="rgb")
    with pytest.raises(InputError, match="3 channels where the model takes 1"):
        Restoration.predict_files(model(with_truth), [tmp_path / "rgb.tif"], tmp_path / "out", Options())
    with pytest.raises(InputError, match="no meaning for restoration"):
        Restoration.predict_files(model(with_truth), with_truth.files(with_truth.val), tmp_path / "out", Options(probabilities=True))


def test_one_frame_cannot_be_trained_on(tmp_path):
    save(tmp_path / "film", film(1))
    with pytest.raises(InputError, match="one frame alone"):
        Restoration(tmp_path)


def test_loss_of_the_task_needs_truth(with_truth):
    batch = Restoration.plain_batch(Halved(), Restoration.plain_spec(3), size=20)
    assert batch["image"].shape == (2, 15, 24, 24)
    assert Restoration.loss(Halved()(batch["image"]), batch)["loss"] > 0
    del batch["truth"]
    with pytest.raises(InputError, match="clean frames"):
        Restoration.loss(Halved()(batch["image"]), batch)


def test_recognised_by_its_names(with_truth, without_truth, tmp_path):
    assert Restoration.recognises(Path(with_truth.source)) and Restoration.recognises(Path(without_truth.source))
    assert not Restoration.recognises(save(tmp_path / "images", film(2)))
