"""Scores, squares, pictures and files of classification."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from paperworks.errors import InputError
from paperworks.tasks.base import Grid
from paperworks.tasks.classification import Classification, ClassScores, bars, image_side, middle_square
from paperworks.tasks.contract import Model, Options


def test_scores_by_hand() -> None:
    scores = ClassScores(("a", "b", "c"))
    for name, label, p in (("0", 0, [0.7, 0.2, 0.1]), ("1", 0, [0.4, 0.5, 0.1]), ("2", 1, [0.1, 0.8, 0.1])):
        scores.update(torch.tensor(p), {"label": torch.tensor(label), "name": name})
    found = scores.compute()
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(0.8)) / 3, rel=1e-5)
    assert found["recall/a"] == pytest.approx(0.5) and found["recall/b"] == 1 and math.isnan(found["recall/c"])
    assert found["ece"] == pytest.approx((0.3 + 0.5 + 0.2) / 3, abs=1e-5), "each prediction is in a bin of its own"
    assert [e["top1"] for e in scores.per_item()] == [1, 0, 1]


def test_ties_are_lost() -> None:
    scores = ClassScores(tuple("abcdefg"))
    scores.update(torch.full((7,), 1 / 7), {"label": torch.tensor(3), "name": "0"})
    assert scores.compute()["top5"] == 0


def test_the_middle_square_keeps_the_shape_of_things() -> None:
    image = torch.zeros(1, 40, 80)
    image[:, 10:30, 30:50] = 1
    square = middle_square(image, 20)
    assert square.shape == (1, 20, 20)
    assert square[0, 7:13, 7:13].min() == 1 and square[0, :, :3].max() == 0
    same = torch.rand(3, 20, 20)
    assert torch.equal(middle_square(same, 20), same)


def test_side_comes_from_the_data() -> None:
    sides = {size: image_side(Classification.plain_spec(size=size)) for size in ((28, 28), (33, 90), (500, 700))}
    assert list(sides.values()) == [32, 64, 128]


def test_bars_show_the_truth() -> None:
    p = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.03, 0.02])
    assert (bars(p, "abcdef", truth=5) == (0, 158, 115)).all(-1).any(), "green is there though the class is the least probable"
    assert not (bars(p, "abcdef") == (0, 158, 115)).all(-1).any()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for label, colour in (("blue", (0, 0, 220)), ("red", (220, 0, 0))):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 12), tuple(c + i for c in colour)).save(tmp_path / "set" / label / f"{i}.png")
    return tmp_path / "set"


def test_baselines(data: Path) -> None:
    opened = Classification(data)
    found = {name: opened.evaluate(predict)[0]["top1"] for name, predict in opened.baselines().items()}
    assert found["nearest_mean"] == 1 and found["majority"] < 1
    assert set(found) == set(Classification.baseline_names)


def test_nearest_mean_of_one_image_a_class(data: Path) -> None:
    for image in data.glob("*/[1-8].png"):
        image.unlink()
    opened = Classification(data)
    assert len(opened.train) == 2
    p = opened.baselines()["nearest_mean"](opened.given(opened.sample(opened.train[0])))
    assert p.argmax() == opened.train[0].label and p.sum() == 1


def model(data: Path) -> Model:
    """Says red where there is more red than blue."""
    spec = Classification(data).spec
    return Model(data, spec, Grid(fixed=8), lambda image: torch.stack([image[:, 2].mean((1, 2)), image[:, 0].mean((1, 2))], 1).softmax(1))


def test_files(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (path,) = Classification.predict_files(model(data), [data], out, Options(probabilities=True, overlays=True))
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 20 and all(row["class"] in row["file"] for row in rows)
    assert float(rows[0]["blue"]) + float(rows[0]["red"]) == pytest.approx(1, abs=1e-5)
    assert len(list(out.rglob("*.card.png"))) == 20
    Classification.predict_files(model(data), [data], out, Options(probabilities=True, resume=True))
    assert len(list(csv.reader(path.read_text().splitlines()))) == 21
    with pytest.raises(InputError, match="--with has no meaning"):
        Classification.predict_files(model(data), [data], out, Options(refine=lambda image, p: p))


def test_a_broken_file_costs_nothing_that_was_done(data: Path, tmp_path: Path) -> None:
    (data / "red" / "9.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"9\.png"):
        Classification.predict_files(model(data), [data], tmp_path / "out", Options())
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 20


def test_one_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    (tmp_path / "val" / "only").mkdir(parents=True)
    for split in ("train", "val"):
        Image.new("RGB", (8, 8)).save(tmp_path / split / "only" / "0.png")
    with pytest.raises(InputError, match="holds"):
        Classification(tmp_path)
