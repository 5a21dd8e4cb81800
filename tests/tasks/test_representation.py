"""Embeddings judged, drawn and written."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from paperworks.data.views import TwoViews, View
from paperworks.errors import InputError
from paperworks.tasks.base import Grid, Recipe
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.representation import Representation, RepresentationScores, linear_probe, nearest_vote


def paint(path: Path, hue: int, seed: int) -> None:
    """A noisy picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.array([[230, 40, 40], [40, 230, 40], [40, 40, 230], [200, 200, 30]][hue])
    noise = np.random.default_rng(seed).normal(0, 12, (20, 24, 3))
    PIL.Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Three classes that the mean colour tells apart."""
    root = tmp_path_factory.mktemp("colours")
    for hue, name in enumerate(("red", "green", "blue")):
        for i in range(8):
            paint(root / ("train" if i < 5 else "val") / name / f"{i}.png", hue, 10 * hue + i)
    return root


@pytest.fixture(scope="module")
def data(colours) -> Representation:
    return Representation(colours)


class Mean(nn.Module):
    """The mean colour, as a network."""

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)

    def forward(self, image: Tensor, view: Tensor | None = None) -> dict[str, Tensor]:
        assert image.shape[2:] == (self.grid.fixed, self.grid.fixed)
        return {"embedding": image.mean((2, 3))}


def predictor(data: Representation):
    deployed = data.deploy(Mean(), data.spec).eval()
    return data.predictor(deployed, data.spec, deployed.grid)


def test_reads_class_folders(data):
    assert data.spec.classes == ("blue", "green", "red") and data.spec.size == (20, 24)
    assert data.labelled and data.closed
    sample = data.sample(data.train[0])
    assert sample["image"].shape == (3, 20, 24) and int(sample["label"]) == 0
    assert len(data.train) == 15 and len(data.val) == 9


def test_training_samples_have_one_or_two_views(data):
    random = torch.Generator().manual_seed(0)
    two = data.training_sample(data.train[0], Recipe(augment=TwoViews()), Grid(fixed=16), random)
    assert two["image"].shape == two["view"].shape == (3, 16, 16) and not torch.equal(two["image"], two["view"])
    one = data.training_sample(data.train[0], Recipe(augment=View()), Grid(fixed=16), random)
    assert torch.equal(one["image"], one["view"])
    batch = data.collate([one, two])
    assert batch["view"].shape == (2, 3, 16, 16) and batch["label"].shape == (2,)


def test_a_good_embedding_is_perfect(data):
    metrics, rows = data.evaluate(predictor(data))
    assert metrics == {"retrieval": 1.0, "knn": 1.0, "linear": 1.0, "auc": 1.0, "eer": 0.0, "tar": 1.0}
    assert [row["name"] for row in rows] == [item.name for item in data.val]
    assert all(row["retrieval"] == row["knn"] == row["linear"] == 1 for row in rows)


def test_a_look_at_some_items_takes_no_training_images(data):
    calls = []
    embed = predictor(data)
    metrics, _ = data.evaluate(lambda image: calls.append(1) or embed(image), data.val[::2])
    assert len(calls) == 5 and "knn" not in metrics and metrics["retrieval"] > 0


def test_chance_is_chance():
    scores, random = RepresentationScores(), torch.Generator().manual_seed(0)
    for i in range(300):
        scores.update(torch.randn(16, generator=random), {"label": torch.tensor(i % 4), "name": str(i)})
    metrics = scores.compute()
    assert abs(metrics["retrieval"] - 0.25) < 0.08 and abs(metrics["auc"] - 0.5) < 0.02 and abs(metrics["eer"] - 0.5) < 0.02
    assert metrics["tar"] < 0.03


def test_metrics_by_hand():
    """Four directions in the plane: angles 0, 10, 30 and 35 degrees, classes a, b, a, b."""
    scores = RepresentationScores()
    for i, angle in enumerate((0.0, 10.0, 30.0, 35.0)):
        a = torch.deg2rad(torch.tensor(angle))
        scores.update(torch.stack([a.cos(), a.sin()]) * (i + 1), {"label": torch.tensor(i % 2), "name": str(i)})
    metrics = scores.compute()
    assert metrics["retrieval"] == 0.0  # 10 is nearest to 0, and 35 to 30
    # same: 30 and 25 degrees apart; different: 10, 35, 20, 5. A same pair is nearer than a different one in 2 of 8 cases.
    assert metrics["auc"] == pytest.approx(2 / 8)
    assert [row["retrieval"] for row in scores.per_item()] == [0.0] * 4


def test_copies_are_judged_with_their_images_however_many_there_are():
    """Without labels the only pair of one class are an image and the copy that follows it. At even steps none of 1,000 would be met."""
    scores = RepresentationScores()
    for i, direction in enumerate(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))):
        for name in (f"{i}", f"{i} (copy)"):
            scores.update(direction, {"label": torch.tensor(i), "name": name})
    found = scores.compute()
    assert found["auc"] > 0.999 and found["eer"] < 1e-3 and found["tar"] == 1


def test_the_only_one_of_its_class_has_no_neighbour():
    scores = RepresentationScores()
    for i, label in enumerate((0, 0, 1)):
        scores.update(torch.eye(3)[i] + 0.1, {"label": torch.tensor(label), "name": str(i)})
    metrics, last = scores.compute(), scores.per_item()[2]["retrieval"]
    assert np.isnan(last) and 0 <= metrics["retrieval"] <= 1


def test_probe_and_vote():
    random = torch.Generator().manual_seed(0)
    label = torch.arange(90) % 3
    x = torch.randn(90, 5, generator=random) * torch.tensor([1.0, 1, 1, 1, 50])
    x[:, 0] += 6.0 * (label == 0)
    x[:, 1] += 6.0 * (label == 1)
    assert (linear_probe(x[:60], label[:60], x[60:]) == label[60:]).float().mean() > 0.9, "scales do not matter to the probe"
    assert torch.equal(linear_probe(x[:60], label[:60], x[60:]), linear_probe(x[:60], label[:60], x[60:]))
    with torch.inference_mode():
        assert len(linear_probe(x[:60].clone(), label[:60], x[60:])) == 30
    bank = torch.tensor([[1.0, 0.0], [0.95, 0.1], [0.95, -0.1], [0.0, 1.0]])
    query = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert nearest_vote(bank, torch.tensor([0, 1, 1, 2]), query).tolist() == [1, 2], "two that are near outvote the nearest"
    assert nearest_vote(bank, torch.tensor([0, 1, 2, 3]), query).tolist() == [0, 3]


def test_strangers(tmp_path):
    """Classes of validation that training does not have: pairs are judged, a classifier is not."""
    for hue, name in enumerate(("b", "d", "a", "c")):
        for i in range(4):
            paint(tmp_path / ("train" if hue < 2 else "val") / name / f"{i}.png", hue, 10 * hue + i)
    data = Representation(tmp_path)
    assert data.spec.classes == ("b", "d") and data.labelled and not data.closed
    assert {int(data.sample(i)["label"]) for i in data.train} == {0, 1} and {int(data.sample(i)["label"]) for i in data.val} == {2, 3}
    metrics, _ = data.evaluate(predictor(data))
    assert metrics["auc"] == 1 and "knn" not in metrics


def test_no_labels(tmp_path):
    for i in range(12):
        paint(tmp_path / f"{i:02d}.png", i % 4, i)
    data = Representation(tmp_path)
    assert data.spec.classes == () and not data.labelled
    assert int(data.sample(data.train[0])["label"]) == -1
    pixels = data.baselines()["pixels"]
    metrics, rows = data.evaluate(pixels)
    assert set(metrics) == {"retrieval", "auc", "eer", "tar"} and [r["name"] for r in rows] == [i.name for i in data.val]
    assert data.legend() == []
    sample = data.sample(data.val[0])
    assert data.drawn(sample, pixels(data.given(sample)))["neighbours"].shape[2] == 3


def test_baselines(data):
    baselines = data.baselines()
    image = data.given(data.sample(data.val[0]))
    for predict in baselines.values():
        assert predict(image).ndim == 1
        assert data.evaluate(predict)[0]["retrieval"] > 0.6
    assert torch.equal(baselines["random"](image), data.baselines()["random"](image))


def test_draws_neighbours_of_the_class(data, tmp_path):
    sample = data.sample(data.val[0])
    picture = data.drawn(sample, predictor(data)(data.given(sample)))["neighbours"]
    assert picture.shape == (240, 240, 3)
    frames = [tuple(int(v) for v in picture[80 * (i // 3) + 4, 80 * (i % 3) + 40]) for i in range(8)]
    assert frames[:2] == [(0, 158, 115)] * 2 and frames[2:] == [(213, 94, 0)] * 6
    data.picture(predictor(data), data.val[:2], tmp_path / "sheet.png")
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 400


def test_other_channels_are_refused_other_classes_are_not(data):
    data.check(Representation.plain_spec(3, 7))
    with pytest.raises(InputError, match="channels"):
        data.check(Representation.plain_spec(1, 3))


def model(data: Representation) -> Model:
    deployed = data.deploy(Mean(), data.spec).eval()
    return Model(source=Path("run"), spec=data.spec, grid=deployed.grid, forward=deployed)


def test_writes_embeddings(data, colours, tmp_path):
    written = data.predict_files(model(data), [colours / "val"], tmp_path / "out", Options())
    assert [p.name for p in written] == ["embeddings.npz", "embeddings.csv", "neighbours.png"]
    with np.load(written[0]) as found:
        names, embedding = found["name"], found["embedding"]
    assert len(names) == 9 and embedding.shape == (9, 3) and embedding.dtype == np.float32
    first = data.val[0]
    row = next(i for i, n in enumerate(names) if n.endswith(first.name))
    np.testing.assert_allclose(embedding[row], predictor(data)(data.given(data.sample(first))), rtol=1e-5)
    with written[1].open() as f:
        rows = list(csv.reader(f))
    assert [r[0] for r in rows] == names.tolist() and np.allclose(np.array([r[1:] for r in rows], float), embedding, rtol=1e-4)
    with PIL.Image.open(written[2]) as sheet:
        assert sheet.height > 9 * 100
    assert data.predict_files(model(data), [colours / "val"], tmp_path / "out", Options(resume=True)) == []
    with pytest.raises(InputError, match="--probabilities"):
        data.predict_files(model(data), [colours / "val"], tmp_path / "other", Options(probabilities=True))


def test_writes_embeddings_of_arrays(data, tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (6, 20, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=x[:3], y_train=np.array(["a", "b", "b"]), x_val=x[3:], y_val=np.array(["a", "c", "c"]))
    opened = Representation(tmp_path)
    files = opened.files(opened.val)
    assert files == [tmp_path / "set.npz"]
    with np.load(data.predict_files(model(data), files, tmp_path / "out", Options())[0]) as found:
        assert found["embedding"].shape == (6, 3) and "x_train/0" in found["name"][0]


def test_a_broken_file_is_named(data, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken"):
        data.predict_files(model(data), [tmp_path / "broken.png"], tmp_path / "out", Options())


def test_too_few_images(tmp_path):
    paint(tmp_path / "only.png", 0, 0)
    with pytest.raises(InputError, match="add images"):
        Representation(tmp_path)


def test_linear_probe_takes_what_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        bank, label = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
    assert torch.equal(linear_probe(bank, label, torch.eye(4)), torch.arange(4))
