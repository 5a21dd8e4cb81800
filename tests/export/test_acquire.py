"""Which images to label next, from files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from paperworks import papers
from paperworks.errors import InputError
from paperworks.export.acquire import acquire_files
from paperworks.tasks.contract import normalise
from paperworks.train.api import fit
from paperworks.train.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small classifier with dropout, and a pool of six images of which each lies there three times."""
    root = tmp_path_factory.mktemp("acquire")
    state = np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 4)):
        for k, name in enumerate(("dark", "light")):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                image = state.normal(70 + 110 * k, 40, (28, 28)).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(image).save(root / "data" / split / name / f"{i}.png")
    (root / "pool").mkdir()
    for i in range(6):
        image = state.normal(125, 5 + 20 * i, (28, 28)).clip(0, 255).astype(np.uint8)
        for copy in range(3):
            PIL.Image.fromarray(image).save(root / "pool" / f"{i}_{copy}.png")
    fit("batchbald", root / "data", root / "run", variant="test", steps=8)
    return root


def test_the_batch_is_written_in_order(run, tmp_path):
    rows = acquire_files(run / "run", [run / "pool"], tmp_path / "out", size=3)
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows) and rows[0]["score"] > 0
    with (tmp_path / "out" / "acquire.csv").open(encoding="utf-8", newline="") as f:
        assert [row["file"] for row in csv.DictReader(f)] == [row["file"] for row in rows]
    with PIL.Image.open(tmp_path / "out" / "acquire.png") as picture:
        assert picture.width > 300
    assert all(row["class"] in ("dark", "light") and 0.5 <= row["probability"] <= 1 for row in rows)
    trained = Run.load(run / "run")
    images = torch.stack([torch.from_numpy(np.array(PIL.Image.open(f))) for f in sorted((run / "pool").iterdir())])[:, None] / 255
    pool = normalise(images, torch.tensor(trained.spec.mean), torch.tensor(trained.spec.std))
    method = papers.module("batchbald")
    expected = method.batchbald(method.posterior(trained.network(), [pool], 20), 3, configurations=10_000)
    assert [row["file"] for row in rows] == [str(sorted((run / "pool").iterdir())[i]) for i in expected.indices]
    assert [row["score"] for row in rows] == pytest.approx(expected.scores, abs=1e-5)
    single = acquire_files(run / "run", [run / "pool"], tmp_path / "single", size=3, name="bald")
    assert len({Path(row["file"]).name[0] for row in single}) == 1, "of a pool of copies the best by themselves are copies"
    assert acquire_files(run / "run", [run / "pool"], tmp_path / "again", size=3) == rows


def test_pools_may_hold_files_of_one_name(run, tmp_path):
    """Nothing is written beside the list, so that nothing can lie on another."""
    other = tmp_path / "other" / "0_0.png"
    other.parent.mkdir()
    other.write_bytes((run / "pool" / "5_0.png").read_bytes())
    rows = acquire_files(run / "run", [run / "pool" / "0_0.png", other.parent, other], tmp_path / "out", size=2)
    assert {row["file"] for row in rows} == {str(run / "pool" / "0_0.png"), str(other)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"size": 0}, "0 of 18 images cannot be chosen; ask for 1 to 18"),
        ({"size": 19}, "19 of 18"),
        ({"name": "best"}, "is called 'best'; there are: bald, batchbald"),
        ({"settings": {"draw": "5"}}, "no setting is called 'draw'"),
    ],
)
def test_bad_questions(run, tmp_path, given, says):
    with pytest.raises(InputError, match=says):
        acquire_files(run / "run", [run / "pool"], tmp_path, **given)


def test_a_network_without_dropout_cannot_be_asked(run, tmp_path):
    fit("convnext", run / "data", tmp_path / "run", variant="test", steps=1)
    with pytest.raises(InputError, match="no dropout"):
        acquire_files(tmp_path / "run", [run / "pool"], tmp_path / "out", size=2)
