"""The task of rebuilding and making images: squares, scores, the Frechet distance, baselines, files, samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import Tensor

from paperworks.errors import InputError
from paperworks.export.predict import load_model, predict_files
from paperworks.export.sample import between, sample_files
from paperworks.tasks import task
from paperworks.tasks.base import Grid
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.generation import (
    Generation,
    RandomFeatures,
    ReconstructionScores,
    Vary,
    frechet,
    image_side,
    principal_components,
    square,
)
from paperworks.train.engine import fit
from paperworks.train.run import Request


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four grey pictures of a bright disc, 20 rows by 26 columns, without classes."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :26]
    for number in range(24):
        cy, cx, r = rng.uniform(7, 13), rng.uniform(9, 17), rng.uniform(3, 6)
        disc = ((y - cy) ** 2 + (x - cx) ** 2 < r**2) * 220 + rng.uniform(0, 20, y.shape)
        Image.fromarray(disc.astype(np.uint8)).save(root / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def data(shapes: Path) -> Generation:
    return Generation(shapes)


def given(data: Generation, number: int = 0) -> Tensor:
    return data.given(data.sample(data.val[number]))


def opened(path: Path) -> tuple[str, tuple[int, int]]:
    with Image.open(path) as image:
        return image.mode, image.size


# --- What a data set is


def test_folder_without_classes_is_enough(data):
    assert data.spec.size == (20, 20) and data.spec.channels == 1 and data.spec.classes == ()
    assert data.spec.mean == (0.0,) and data.spec.std == (1.0,), "networks see images in [0, 1]"
    assert len(data.train) + len(data.val) == 24 and len(data.val) >= 2
    assert given(data).shape == (1, 20, 20)
    assert task("generation") is Generation
    assert data.describe()["side"] == 20


def test_arrays_are_read_and_written_as_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 256, (n, 12, 12), dtype=np.uint8) for split, n in (("train", 6), ("val", 4))}
    np.savez(tmp_path / "digits.npz", **arrays)
    data = Generation(tmp_path)
    files = data.files(data.val[:2])
    assert len(set(files)) == 2
    with Image.open(files[1]) as image:
        assert np.array_equal(np.asarray(image), arrays["x_val"][1])
    torch.testing.assert_close(given(data, 1)[0], torch.from_numpy(arrays["x_val"][1] / np.float32(255)))


def test_square_is_the_centre():
    image = torch.arange(4 * 7.0).view(1, 4, 7) / 28
    assert torch.equal(square(image, 4), image[:, :, 1:5]) or torch.equal(square(image, 4), image[:, :, 2:6])
    assert square(torch.rand(3, 50, 31), 16).shape == (3, 16, 16)
    flat = square(torch.full((1, 30, 30), 0.25), 8)
    torch.testing.assert_close(flat, torch.full((1, 8, 8), 0.25))


@pytest.mark.parametrize("size", [30, 4, 7])
def test_sides_that_networks_cannot_halve_are_refused(size):
    with pytest.raises(InputError, match=f"image_size={size}"):
        image_side(Generation.plain_spec(1), size)


def test_training_samples_have_the_networks_side_and_follow_the_generator(data):
    class R:
        augment = Vary(flip=0.5)

    seen = set()
    for seed in range(8):
        image, again = (
            data.training_sample(data.train[0], R, Grid(fixed=12), torch.Generator().manual_seed(seed))["image"] for _ in range(2)
        )
        assert image.shape == (1, 12, 12) and torch.equal(image, again)
        seen.add(image.numpy().tobytes())
    assert len(seen) == 2, "an image is either as it is or mirrored"


# --- Scores


def test_scores_by_hand(data):
    sample = data.sample(data.val[0])
    truth = sample["image"].as_subclass(Tensor)
    rebuilt = (truth + 0.1 * torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0.02, 0.98)
    scores = data.scores()
    scores.update(rebuilt, sample)
    row = scores.per_item()[0]
    mse = float(((truth - rebuilt) ** 2).mean())
    assert row["mse"] == pytest.approx(mse, rel=1e-5)
    assert row["squared_error"] == pytest.approx(mse * truth.numel(), rel=1e-5)
    assert row["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    entropy = float(-(truth * rebuilt.log() + (1 - truth) * (1 - rebuilt).log()).mean())
    assert row["cross_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert set(row) - {"name"} <= set(data.metric_names) and data.metric in row
    assert math.isnan(scores.compute()["frechet"]), "one image has no covariance"


def test_perfect_reconstruction_is_finite_and_best(data):
    metrics, rows = data.evaluate(lambda image: image)
    assert metrics["psnr"] == 100 and metrics["mse"] == 0 and metrics["frechet"] == pytest.approx(0, abs=1e-3)
    assert len(rows) == len(data.val)
    worse, _ = data.evaluate(lambda image: image.flip(2))
    assert worse["psnr"] < metrics["psnr"] and worse["frechet"] > metrics["frechet"]


def test_frechet_distance_is_that_of_the_gaussians():
    """Against scipy's matrix root."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(300, 1, 16, 16, generator=generator), torch.rand(300, 1, 16, 16, generator=generator) ** 1.5
    features = RandomFeatures(1)
    x, y = features(a).numpy(), features(b).numpy()
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * np.real(root))
    assert frechet(a, b) == pytest.approx(1000 * expected, rel=1e-2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-2)


def test_features_are_the_same_everywhere_and_see_no_flat_brightness():
    image = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    first, again = RandomFeatures(3)(image), RandomFeatures(3)(image)
    assert torch.equal(first, again) and first.shape == (1, 128) and first.dtype == torch.float64
    torch.manual_seed(1)
    assert torch.equal(RandomFeatures(3)(image), first), "the weights depend on nothing around them"


# --- Baselines


def test_principal_components_are_those_of_the_svd():
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(60, 5, generator=generator) * torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    images = (share @ torch.rand(5, 64, generator=generator) + 0.02 * torch.rand(60, 64, generator=generator)).view(60, 1, 8, 8)
    project = principal_components(images, 5)
    flat = images.flatten(1).double().numpy()
    directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:5]
    expected = flat.mean(0) + (flat[7] - flat.mean(0)) @ directions.T @ directions
    torch.testing.assert_close(project(images[7]).flatten().double(), torch.from_numpy(expected).clamp(0, 1), rtol=0, atol=2e-3)


def test_baselines_are_ordered(data):
    scores = {name: data.evaluate(predict)[0]["psnr"] for name, predict in data.baselines().items()}
    assert set(scores) == set(data.baseline_names)
    assert scores["pca"] > scores["mean"]


# --- A trained network, from the training to the picture


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A short training of each kind of network that the sampling has to tell apart."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, settings in (("vae", {"latents": 2, "image_size": 20, "lr": 0.02}), ("autoencoder", {"image_size": 20})):
        request = Request(
            paper=name, data=data.source, variant="test", settings=settings, budget={"seconds": None, "steps": 80, "epochs": None}
        )
        found[name] = fit(request, folder / name, data=data).folder
    return found


def test_files_are_rebuilt_in_their_own_size(data, runs, shapes, tmp_path):
    model = load_model(runs["vae"])
    written = predict_files(model, [shapes / "00.png"], tmp_path, Options(overlays=True))
    assert written == [tmp_path / "00.png"]
    assert opened(written[0]) == ("L", (20, 20))
    assert opened(tmp_path / "00.overlay.png")[0] == "RGB"
    with pytest.raises(InputError, match="probabilities"):
        predict_files(model, [shapes / "00.png"], tmp_path / "other", Options(probabilities=True))


def test_broken_and_wrong_files_are_named(data, runs, tmp_path):
    model = load_model(runs["vae"])
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(InputError, match=r"no\.png"):
        Generation.predict_file(model, tmp_path / "no.png", tmp_path / "out.png", Options())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match=r"colour\.png"):
        Generation.predict_file(model, tmp_path / "colour.png", tmp_path / "out.png", Options())


def test_images_of_any_size_come_back_in_theirs():
    network = lambda image: image  # noqa: E731
    spec = Generation.plain_spec(1)
    predict = Generation.predictor(network, spec, Grid(fixed=16))
    assert predict(torch.rand(1, 33, 50)).shape == (1, 33, 33)
    assert predict(torch.rand(1, 5, 9)).shape == (1, 5, 5)
    same = torch.rand(1, 16, 16)
    assert torch.equal(predict(same), same)


def test_samples_are_the_same_again_and_say_how_far_they_are(data, runs, shapes, tmp_path):
    ends = (shapes / "00.png", shapes / "01.png")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample_files(runs["vae"], tmp_path / out, n=5, seed=seed, interpolate=ends, against=data)
    read = {out: (tmp_path / out / "samples" / "00004.png").read_bytes() for out in "abc"}
    assert read["a"] == read["b"] != read["c"]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"samples", "samples.png", "samples.json", "interpolation.png", "plane.png"}
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert record["n"] == 5 and record["frechet"] > record["frechet_of_training_images"] > 0
    assert opened(tmp_path / "a" / "interpolation.png") == ("L", (9 * 21 + 1, 22))


def test_line_between_codes_has_the_reconstructions_at_its_ends(data, runs):
    from paperworks.train.run import Run

    network = Run.load(runs["autoencoder"]).network()
    first, last = given(data, 0), given(data, 1)
    with torch.inference_mode():
        line = between(network, first, last, 5)
        torch.testing.assert_close(line[[0, 4]], network(torch.stack([first, last]))["reconstruction"])


def test_what_cannot_be_drawn_is_refused(runs, shapes, tmp_path):
    with pytest.raises(InputError, match="no model of its codes"):
        sample_files(runs["autoencoder"], tmp_path / "a")
    written = sample_files(runs["autoencoder"], tmp_path / "b", n=0, interpolate=(shapes / "00.png", shapes / "01.png"))
    assert [p.name for p in written] == ["interpolation.png"]
    with pytest.raises(InputError, match="--n -1"):
        sample_files(runs["vae"], tmp_path / "c", n=-1)
    with pytest.raises(InputError, match="draws nothing"):
        sample_files(runs["vae"], tmp_path / "d", n=0)


def test_pictures(data):
    sample = data.sample(data.val[0])
    image = data.given(sample)
    drawn = data.drawn(sample, image)
    assert set(drawn) == set(data.views)
    assert (drawn["difference"] == 128).all(), "no difference is grey"
    brighter = image.clone()
    brighter[:, :5] += 0.25
    picture = data.drawn(sample, brighter)["difference"]
    assert (picture[5:] == 128).all() and (picture[:5] == 191).all(), "the same difference is the same grey in every picture"
    assert drawn["reconstruction"].shape == data.shown(sample)["input"].shape == (20, 20, 3)


def test_scores_take_predictions_of_half_precision(data):
    scores = ReconstructionScores(1)
    sample = data.sample(data.val[0])
    scores.update(sample["image"].as_subclass(Tensor).bfloat16(), sample)
    assert scores.per_item()[0]["psnr"] > 30


def test_model_is_all_that_prediction_needs(data, tmp_path, shapes):
    """An exported file gives a plain function; nothing else of the network is asked for."""
    model = Model(tmp_path, data.spec, Grid(fixed=12), lambda image: 1 - image)
    Generation.predict_file(model, shapes / "00.png", tmp_path / "out.png", Options())
    assert opened(tmp_path / "out.png") == ("L", (20, 20))
