"""The detection task: samples, measures, pictures and files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from paperworks.data.boxes import BoxAugment
from paperworks.errors import InputError
from paperworks.nn.boxes import Selection
from paperworks.tasks import guess, task
from paperworks.tasks.base import Grid, Recipe
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.detection import ANSWER, Detection, DetectionScores, assigned, found


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """Twelve images of bright squares and bright wide bars on a dark ground, as COCO."""
    root = tmp_path_factory.mktemp("discs")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, notes = [], []
    for i in range(12):
        picture = rng.normal(60, 5, (48, 64, 3))
        for k, (w, h, x, y) in enumerate(
            ((10, 10, int(rng.integers(2, 18)), int(rng.integers(2, 30))), (24, 8, 36, int(rng.integers(2, 36))))
        ):
            picture[y : y + h, x : x + w] += 120
            notes.append({"id": len(notes) + 1, "image_id": i, "category_id": k + 1, "bbox": [x, y, w, h], "iscrowd": 0})
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / "images" / f"im{i:02d}.png")
        images.append({"id": i, "file_name": f"im{i:02d}.png", "width": 64, "height": 48})
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "bar"}]
    (root / "boxes.json").write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}))
    (root / "splits.json").write_text(json.dumps({"train": [f"im{i:02d}" for i in range(8)], "val": [f"im{i:02d}" for i in range(8, 12)]}))
    return root


@pytest.fixture(scope="module")
def data(discs):
    return Detection(discs)


class Seer(nn.Module):
    """A detector that always says the same two boxes, in pixels of its 32 x 32 inputs."""

    grid, selection = Grid(fixed=32), Selection(score=0.1, iou=0.5, candidates=4, keep=3)

    def forward(self, image, boxes=None, labels=None):
        said = torch.tensor([[[[4.0, 4, 12, 20]], [[16, 0, 32, 32]], [[4, 4, 12, 19]]]]).expand(len(image), -1, -1, -1)
        scores = torch.tensor([[[0.9, 0.0], [0.0, 0.6], [0.8, 0.05]]]).expand(len(image), -1, -1)
        return {"boxes": said, "scores": scores + 0 * image.mean()}


def perfect(sample):
    return {
        "boxes": sample["boxes"].as_subclass(torch.Tensor),
        "labels": sample["labels"],
        "scores": torch.full((len(sample["labels"]),), 0.9),
    }


def test_opened(data):
    assert task("detection") is Detection
    assert data.spec.classes == ("square", "bar") and data.spec.channels == 3 and data.spec.size == (48, 64)
    assert (len(data.train), len(data.val)) == (8, 4)
    assert data.describe()["problems"] == []


def test_recognised(discs, blobs):
    assert guess(discs) == "detection"
    assert guess(blobs) == "segmentation"


def test_data_without_objects_are_refused(discs, tmp_path):
    content = json.loads((discs / "boxes.json").read_text())
    (tmp_path / "images").symlink_to(discs / "images")
    (tmp_path / "boxes.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(InputError, match="no object in any"):
        Detection(tmp_path)


def test_training_batches_are_filled_up(data):
    recipe, grid = Recipe(augment=BoxAugment()), Grid(fixed=32)
    samples = [data.training_sample(item, recipe, grid, torch.Generator().manual_seed(i)) for i, item in enumerate(data.train)]
    samples[0] |= {"labels": samples[0]["labels"][:0], "boxes": samples[0]["boxes"][:0]}
    batch = data.collate(samples)
    most = max(len(s["labels"]) for s in samples)
    assert batch["image"].shape == (8, 3, 32, 32) and batch["boxes"].shape == (8, most, 4) and batch["labels"].shape == (8, most)
    assert (batch["labels"][0] == -1).all()
    for s, boxes, labels in zip(samples, batch["boxes"], batch["labels"]):
        assert torch.equal(labels[labels >= 0], s["labels"]) and torch.equal(boxes[labels >= 0], s["boxes"].as_subclass(torch.Tensor))
    assert type(batch["boxes"]) is torch.Tensor


def test_crowds_are_not_taught_and_do_not_count(data):
    item = data.train[0]
    crowd = type(item)(**{**item.__dict__, "objects": (item.objects[0], item.objects[1]._replace(crowd=True))})
    assert len(data.training_sample(crowd, Recipe(augment=BoxAugment(crop=1)), Grid(fixed=32), torch.Generator())["labels"]) == 1
    scores, sample = data.scores(), data.sample(crowd)
    scores.update(perfect(sample), sample)
    assert scores.compute() | {"ap/bar": 0, "ap50/bar": 0} == pytest.approx(
        {"ap": 1, "ap50": 1, "f1": 1, "precision": 1, "recall": 1, "ap/square": 1, "ap50/square": 1, "ap/bar": 0, "ap50/bar": 0}
    )


# --- Measures


def test_perfect_predictions_score_one(data):
    scores = data.scores()
    for item in data.val:
        sample = data.sample(item)
        scores.update(perfect(sample), sample)
    assert all(value == pytest.approx(1) for value in scores.compute().values())
    rows = scores.per_item()
    assert [r["name"] for r in rows] == [i.name for i in data.val]
    assert all(r[key] == pytest.approx(1) for r in rows for key in Detection.metric_names)


def test_ap_is_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision

    generator = torch.Generator().manual_seed(0)
    ours, peer = DetectionScores(("a", "b", "c")), MeanAveragePrecision()
    for i in range(6):
        corner = torch.rand(8, 2, generator=generator) * 100
        truth = torch.cat([corner, corner + 20 + 30 * torch.rand(8, 2, generator=generator)], 1)
        labels = torch.randint(0, 3, (8,), generator=generator)
        guess_ = {
            "boxes": truth + 6 * torch.randn(8, 4, generator=generator),
            "labels": torch.where(torch.rand(8, generator=generator) < 0.8, labels, 0),
            "scores": torch.rand(8, generator=generator),
        }
        ours.update(guess_, {"name": str(i), "boxes": truth, "labels": labels, "crowd": torch.zeros(8, dtype=torch.bool)})
        peer.update([guess_], [{"boxes": truth, "labels": labels}])
    expected, values = peer.compute(), ours.compute()
    assert 0.1 < float(expected["map"]) < 0.9
    assert values["ap"] == pytest.approx(float(expected["map"]), abs=1e-5)
    assert values["ap50"] == pytest.approx(float(expected["map_50"]), abs=1e-5)
    assert values["ap/b"] != values["ap/c"]


def test_f1_by_hand():
    scores = DetectionScores(("a", "b"))
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    said = found(
        [
            (truth[0], 0.9, 0),
            (truth[0], 0.8, 0),  # the same object again
            (truth[1], 0.7, 0),  # of another class
            (truth[2], 0.2, 1),  # not sure enough
        ]
    )
    sample = {"name": "x", "boxes": truth, "labels": torch.tensor([0, 1, 1]), "crowd": torch.zeros(3, dtype=torch.bool)}
    assert assigned(said, truth, sample["labels"], sample["crowd"]).tolist() == [0, -1, -1, 2]
    scores.update(said, sample)
    values = scores.compute()
    assert (values["precision"], values["recall"], values["f1"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_nothing_predicted_and_nothing_there():
    scores = DetectionScores(("a",))
    empty = {
        "name": "empty",
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "crowd": torch.zeros(0, dtype=torch.bool),
    }
    scores.update(found([]), empty)
    assert all(math.isnan(v) for v in scores.compute().values())
    scores.update(
        found([]),
        empty
        | {"name": "one", "boxes": torch.tensor([[0.0, 0, 5, 5]]), "labels": torch.tensor([0]), "crowd": torch.zeros(1, dtype=torch.bool)},
    )
    values = scores.compute()
    assert (values["ap"], values["f1"], values["recall"]) == (0, 0, 0) and math.isnan(values["precision"])


def test_baselines(data):
    values = {}
    for name, predict in data.baselines().items():
        assert name in Detection.baseline_names
        metrics, rows = data.evaluate(predict)
        assert len(rows) == 4
        values[name] = metrics["ap50"]
    assert values["nothing"] == 0
    assert values["otsu"] > 0.8  # bright things on dark are what it is for
    assert values["usual"] < values["otsu"]


# --- Use


def test_predictions_are_in_pixels_of_the_image(data):
    deployed = Detection.deploy(Seer(), data.spec).eval()
    predict = Detection.predictor(deployed, data.spec, deployed.grid)
    said = predict(torch.rand(3, 48, 64))
    assert said["labels"].tolist() == [0, 1]
    torch.testing.assert_close(said["scores"], torch.tensor([0.9, 0.6]))
    torch.testing.assert_close(said["boxes"], torch.tensor([[8.0, 6, 24, 30], [32, 0, 64, 48]]))
    boxes, scores, labels = deployed(torch.rand(2, 3, 32, 32))
    assert boxes.shape == (2, 3, 4) and scores.shape == labels.shape == (2, 3)
    assert labels[0].tolist() == [0, 1, -1]


def test_files_of_many_images_become_one_coco_file(data, discs, tmp_path):
    deployed = Detection.deploy(Seer(), data.spec).eval()
    model = Model(tmp_path, data.spec, deployed.grid, deployed)
    told = []
    written = Detection.predict_files(
        model, [discs / "images"], tmp_path / "out", Options(overlays=True), progress=lambda *p: told.append(p)
    )
    assert told[-1] == (12, 12) and len(written) == 13
    content = json.loads((tmp_path / "out" / ANSWER).read_text())
    assert [i["file_name"] for i in content["images"]][:2] == ["im00.png", "im01.png"]
    assert content["categories"] == [{"id": 1, "name": "square"}, {"id": 2, "name": "bar"}]
    first = [a for a in content["annotations"] if a["image_id"] == 1]
    assert [(a["category_id"], a["bbox"], a["score"]) for a in first] == [
        (1, [8.0, 6.0, 16.0, 24.0], 0.9),
        (2, [32.0, 0.0, 32.0, 48.0], 0.6),
    ]
    with Image.open(tmp_path / "out" / "im00.overlay.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) >= 48
    again = tmp_path / "again"  # what was written can be read as a data set
    again.mkdir()
    (again / "images").symlink_to(discs / "images")
    (again / "boxes.json").write_text((tmp_path / "out" / ANSWER).read_text())
    assert Detection(again).spec.classes == data.spec.classes


def test_interrupted_predictions_go_on(data, discs, tmp_path):
    deployed = Detection.deploy(Seer(), data.spec).eval()
    seen = []

    def forward(image):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return deployed(image)

    model = Model(tmp_path, data.spec, deployed.grid, forward)
    with pytest.raises(KeyboardInterrupt):
        Detection.predict_files(model, [discs / "images"], tmp_path / "out", Options())
    assert len(json.loads((tmp_path / "out" / ANSWER).read_text())["images"]) == 5
    Detection.predict_files(model, [discs / "images"], tmp_path / "out", Options(resume=True))
    content = json.loads((tmp_path / "out" / ANSWER).read_text())
    assert len({i["file_name"] for i in content["images"]}) == 12 and len(seen) == 13
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"]) == 24


def test_files_of_another_model_are_not_continued(data, discs, tmp_path):
    deployed = Detection.deploy(Seer(), data.spec).eval()
    (tmp_path / ANSWER).write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(InputError, match="not what this model began"):
        Detection.predict_files(Model(tmp_path, data.spec, deployed.grid, deployed), [discs / "images"], tmp_path, Options(resume=True))
    with pytest.raises(InputError, match="probabilities has no meaning for detection"):
        Detection.predict_files(
            Model(tmp_path, data.spec, deployed.grid, deployed), [discs / "images"], tmp_path, Options(probabilities=True)
        )


def test_pictures(data, tmp_path):
    sample = data.sample(data.val[0])
    shown, drawn = data.shown(sample), data.drawn(sample, perfect(sample))
    assert set(shown) == {"input", "truth"} and set(drawn) == set(Detection.views)
    assert (shown["truth"] != np.kron(shown["input"], np.ones((5, 5, 1), np.uint8))).any()
    wrong = data.drawn(sample, found([(torch.tensor([1.0, 1, 30, 40]), 0.9, 0)]))["errors"]
    colours = {tuple(c) for c in wrong.reshape(-1, 3)}
    assert (0, 130, 255) in colours and (230, 159, 0) in colours  # a false alarm and what was missed
    right = {tuple(c) for c in drawn["errors"].reshape(-1, 3)}
    assert (0, 130, 255) not in right and (230, 159, 0) not in right and (255, 255, 255) in right
    data.picture(lambda image: found([]), data.val[:2], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 900
    assert all({"colour", "en", "zh"} <= set(entry) for entry in data.legend())
