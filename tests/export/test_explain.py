"""Explanations of files by a trained run."""

import json

import numpy as np
import pytest
from PIL import Image

from paperworks import papers
from paperworks.errors import InputError
from paperworks.export.explain import build_explainer, explain_files
from paperworks.train.api import fit


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixteen small pictures of two classes: a bright square on the left or on the right."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, left in (("left", 3), ("right", 19)):
        (root / label).mkdir()
        for i in range(8):
            picture = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            picture[10:22, left : left + 10] = 220
            Image.fromarray(picture).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return fit("efficientnet", photos, tmp_path_factory.mktemp("run") / "run", variant="test", steps=2).folder


def test_a_picture_and_an_entry_for_every_image(run, photos, tmp_path):
    told = []
    found = explain_files(run, [photos], tmp_path, progress=lambda *at: told.append(at))
    assert len(found) == 16 and told[-1] == (16, 16)
    assert json.loads((tmp_path / "explanations.json").read_text()) == json.loads(json.dumps(found))
    for entry in found:
        with Image.open(entry["picture"]) as picture:
            assert picture.size[0] > 400  # what was seen and one map, side by side
        assert sum(entry["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert entry["explained"][0]["class"] == max(entry["probabilities"], key=entry["probabilities"].get)
    assert (tmp_path / "left" / "0.explained.png").exists()


def test_classes_that_are_asked_for(run, photos, tmp_path):
    (entry,) = explain_files(run, [photos / "left" / "0.png"], tmp_path, classes=["right", "left"])
    assert [e["class"] for e in entry["explained"]] == ["right", "left"]
    peaks = [e["peak"] for e in entry["explained"] if e["peak"]]
    assert peaks and all(0 < share < 1 for peak in peaks for share in peak)


def test_every_offer_of_the_registry_is_found():
    for card in papers.cards().values():
        if card.explainers:
            assert set(card.explainers) == set(papers.module(card.id).EXPLAINERS)
    assert callable(build_explainer("classification"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["middle"]}, "middle.*left, right"),
        ({"name": "crystal_ball"}, "crystal_ball.*there are"),
        ({"settings": {"colour": "red"}}, "--set.*colour"),
        ({"settings": {"layer": "nowhere"}}, "no layer 'nowhere'"),
    ],
)
def test_wrong_wishes_are_named(run, photos, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        explain_files(run, [photos / "left" / "0.png"], tmp_path, **change)


def test_only_runs_have_gradients(photos, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="gradients"):
        explain_files(tmp_path / "model.onnx", [photos], tmp_path / "out")
    with pytest.raises(InputError, match="no paper explains"):
        build_explainer("segmentation")
