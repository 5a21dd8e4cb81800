"""The captioning task: readers, words, measures, baselines, files."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from paperworks.data.boxes import BoxAugment
from paperworks.errors import InputError
from paperworks.tasks import guess, task
from paperworks.tasks.base import Grid, Recipe
from paperworks.tasks.captions import ANSWER, END, TABLE, UNKNOWN, Captions, CaptionScores, tokens, vocabulary
from paperworks.tasks.consensus import Corpus
from paperworks.tasks.contract import Model, Options

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "captions.json").read_text())


def write(path: Path, rows: list) -> None:
    with path.open("w", newline="") as f:
        csv.writer(f).writerows(rows)


def pictures(root: Path, count: int = 8) -> list[str]:
    """Red or blue squares on grey."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = np.full((24, 32, 3), 90, np.uint8) + rng.integers(0, 9, (24, 32, 3), dtype=np.uint8)
        picture[6:16, 8 + i : 18 + i] = (250, 20, 20) if i % 2 else (20, 20, 250)
        Image.fromarray(picture).save(root / "images" / f"im{i}.png")
    return [f"im{i}.png" for i in range(count)]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    root = tmp_path_factory.mktemp("squares")
    files = pictures(root)
    colours = ["red" if i % 2 else "blue" for i in range(len(files))]
    lines = [[f, c] for f, colour in zip(files, colours) for c in (f"A {colour} square.", f"there's one {colour} square")]
    write(root / "captions.csv", [["file", "caption"], *lines])
    boxes = [[f, 8 + i, 6, 18 + i, 16, "square", colour] for i, (f, colour) in enumerate(zip(files, colours))]
    write(root / "boxes.csv", [["file", "xmin", "ymin", "xmax", "ymax", "label", "attribute"], *boxes])
    (root / "splits.json").write_text(json.dumps({"train": [f"im{i}" for i in range(6)], "val": ["im6", "im7"]}))
    return root


@pytest.fixture(scope="module")
def data(squares):
    return Captions(squares)


class Parrot(nn.Module):
    """Always says the fourth and the third word, and looks at the second of two regions."""

    grid = Grid(fixed=16)

    def forward(self, image, words=None, boxes=None, labels=None, attributes=None):
        batch = len(image)
        return {
            "words": torch.tensor([[3, 2, END, END]]).expand(batch, -1),
            "logp": torch.tensor([[-1.0, -0.5, -0.25, 0]]).expand(batch, -1) + 0 * image.mean(),
            "attention": torch.tensor([0.2, 0.8]).expand(batch, 4, 2),
            "boxes": torch.tensor([[0.0, 0, 16, 16], [4, 4, 8, 8]]).expand(batch, 2, 4),
        }


# --- Data


def test_opened(data, squares):
    assert task("captions") is Captions and guess(squares) == "captions"
    assert (len(data.train), len(data.val)) == (6, 2) and data.spec.classes == ("square",) and data.spec.size == (24, 32)
    assert data.spec.more["attributes"] == ("blue", "red") and data.spec.more["length"] == 5
    assert set(data.spec.more["words"]) == {"<end>", "<unk>", "square", "a", "blue", "red", "one", "there's"}
    sample = data.sample(data.val[1])
    assert sample["captions"] == ["A red square.", "there's one red square"]
    assert sample["attributes"].tolist() == [1] and sample["boxes"].tolist() == [[15, 6, 25, 16]]
    said = data.describe()
    assert said["captions"] == {"all": 16, "min": 2, "max": 2} and said["words"] == 8 and said["problems"] == []


def test_training_samples(data):
    recipe = Recipe(augment=BoxAugment(flip=False, crop=0.5))
    samples = [data.training_sample(i, recipe, Grid(fixed=16), torch.Generator().manual_seed(k)) for k, i in enumerate(data.train)]
    samples[0] |= {"words": samples[0]["words"][:1], "boxes": samples[0]["boxes"][:0]}
    samples[0] |= {key: samples[0][key][:0] for key in ("labels", "attributes")}
    batch = data.collate(samples)
    assert batch["image"].shape == (6, 3, 16, 16) and batch["words"].shape == (6, 2, 5)
    assert (batch["words"][0, 1] == -1).all() and (batch["labels"][0] == -1).all() and (batch["attributes"][0] == -1).all()
    assert batch["attributes"][1].tolist() == [1] or not (batch["labels"][1] >= 0).any()
    words = data.spec.more["words"]
    assert [words[i] for i in batch["words"][1, 0].tolist() if i > END] == ["a", "red", "square"] and batch["words"][1, 0, 3:].tolist() == [
        END,
        -1,
    ]
    assert data.indices("a green square")[1] == UNKNOWN
    right, wrong = data.indices("a red square"), data.indices("a blue square")
    assert batch["reward"][1](right) > batch["reward"][1](wrong) >= 0
    assert pickle.loads(pickle.dumps(batch["reward"][1]))(right) == batch["reward"][1](right), "a reader's samples find their corpus again"
    loss = data.loss({"logits": torch.zeros(6, 2, 5, 8)}, batch)["loss"]
    assert float(loss) == pytest.approx(np.log(8))


def test_coco(tmp_path):
    files = pictures(tmp_path)
    images = [{"id": i, "file_name": f, "width": 32, "height": 24} for i, f in enumerate(files)]
    notes = [{"id": k, "image_id": k % 8, "caption": f"a square of the number {k}"} for k in range(16)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    objects = [{"id": i, "image_id": i, "category_id": 5, "bbox": [8 + i, 6, 10, 10], "iscrowd": 0} for i in range(7)]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": objects, "categories": [{"id": 5, "name": "square"}]})
    )
    (tmp_path / "splits.json").write_text(json.dumps({"train": [f"im{i}" for i in range(6)], "val": ["im6", "im7"]}))
    data = Captions(tmp_path)
    assert guess(tmp_path) == "captions" and data.data.layout == "COCO" and data.spec.classes == ("square",)
    assert len(data.sample(data.val[0])["boxes"]) == 1 and len(data.sample(data.val[1])["boxes"]) == 0
    assert data.sample(data.val[1])["captions"] == ["a square of the number 7", "a square of the number 15"]


def test_splits_of_files_and_lines(tmp_path):
    files = pictures(tmp_path)
    lines = [[f, "a square", "train" if i < 5 else "val" if i < 7 else "never"] for i, f in enumerate(files)]
    write(tmp_path / "captions.csv", [["image", "sentence", "split"], *lines])
    data = Captions(tmp_path / "captions.csv")
    assert (len(data.train), len(data.val)) == (5, 2)
    assert "never" in data.describe()["problems"][0]["what"] and data.spec.classes == ()


@pytest.mark.parametrize(
    ("head", "line", "said"),
    [
        (["file", "caption"], ["missing.png", "a square"], "missing.png' in line 10, which is not there"),
        (["file", "caption"], ["im1.png", ""], "no caption in line 10"),
        (["file", "caption"], ["broken.png", "a square"], "broken.png"),
    ],
)
def test_what_is_wrong_is_left_out(tmp_path, head, line, said):
    files = pictures(tmp_path)
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    write(tmp_path / "captions.csv", [head, *([f, "a square"] for f in files), line])
    problems = Captions.inspect(tmp_path)["problems"]
    assert len(problems) == 1 and said in f"{problems[0]['path']} {problems[0]['what']}"


def test_a_box_that_cannot_be_leaves_its_image_out(tmp_path):
    files = pictures(tmp_path)
    write(tmp_path / "captions.csv", [["file", "caption"], *([f, "a square"] for f in files)])
    boxes = [[f, 2, 2, "nan" if i == 3 else 9, 9, "square"] for i, f in enumerate(files)]
    write(tmp_path / "boxes.csv", [["file", "xmin", "ymin", "xmax", "ymax", "label"], *boxes])
    found = Captions.inspect(tmp_path)
    assert found["items"] == 7 and "four numbers" in found["problems"][0]["what"]


def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(InputError, match="holds no captions"):
        Captions(tmp_path)
    write(tmp_path / "table.csv", [["file", "size"], ["a.png", "3"]])
    with pytest.raises(InputError, match="no table of captions"):
        Captions(tmp_path / "table.csv")
    (tmp_path / "captions.json").write_text('{"images": []}')
    with pytest.raises(InputError, match="no COCO file of captions"):
        Captions(tmp_path)
    (tmp_path / "captions.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Captions(tmp_path)
    files = pictures(tmp_path)
    (tmp_path / "captions.json").unlink()
    write(tmp_path / "captions.csv", [["file", "caption"], [files[0], "a square"]])
    with pytest.raises(InputError, match=r"validation images with captions"):
        Captions(tmp_path)
    write(tmp_path / "captions.csv", [["file", "caption"], *([f, "!?"] for f in files)])
    with pytest.raises(InputError, match="hold no words"):
        Captions(tmp_path)


# --- Words and measures


def test_tokens():
    assert tokens("A man's T-shirt, isn't it?  Ünal_3 ") == ["a", "man's", "t", "shirt", "isn't", "it", "ünal", "3"]
    words = vocabulary([["a", "dog"]] * 999 + [["a", "cat"]] * 4)
    assert words == ("<end>", "<unk>", "a", "dog")
    assert vocabulary([["a", "cat"]] * 2)[2:] == ("a", "cat")


@pytest.fixture(scope="module")
def recorded():
    references = [[r.split() for r in refs] for refs in RECORDED["references"]]
    return [c.split() for c in RECORDED["candidates"]], references, Corpus(references)


def test_cider_is_the_published_one(recorded):
    candidates, references, corpus = recorded
    for name in ("cider", "cider_d"):
        ours = [getattr(corpus, name)(c, refs) for c, refs in zip(candidates, references)]
        assert ours == pytest.approx(RECORDED[name], rel=1e-9, abs=1e-12), name
        assert max(ours) > 1 and min(ours) == 0


def test_bleu_is_the_published_one():
    scores = CaptionScores(Corpus([[tokens(r) for r in refs] for refs in RECORDED["references"]]))
    for i, (said, heard) in enumerate(zip(RECORDED["candidates"], RECORDED["references"])):
        if said:
            scores.update({"caption": said}, {"captions": heard, "name": str(i)})
    found = scores.compute()
    assert [found[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(RECORDED["bleu_of_nonempty"], rel=1e-5)


def test_cider_by_hand():
    """Two images, unigrams and bigrams: "a" is said of both and weighs nothing."""
    corpus = Corpus([[["a", "dog"]], [["a", "cat"]]])
    assert corpus.cider(["a", "dog"], [["a", "dog"]]) == pytest.approx(10 * 2 / 4)  # n = 3 and 4 have nothing to agree in
    assert corpus.cider(["a", "dog"], [["a", "cat"]]) == 0
    # "dog dog" against "a dog": cosine 1 of the one unigram, none of the bigrams; clipped to one of the two
    assert corpus.cider(["dog", "dog"], [["a", "dog"]]) == pytest.approx(10 / 4)
    assert corpus.cider_d(["dog", "dog"], [["a", "dog"]]) == pytest.approx(10 / 4 / 2)
    longer = ["a", "dog", "a", "a", "a"]
    assert corpus.cider_d(longer, [["a", "dog"]]) < corpus.cider(longer, [["a", "dog"]])


def test_consensus_is_what_agrees_most(recorded):
    _, references, corpus = recorded
    sentences = [r for refs in references for r in refs]
    means = [corpus.cider(s, sentences) for s in sentences]
    assert corpus.consensus(sentences) == int(np.argmax(means))


def test_baselines(data):
    baselines = data.baselines()
    red = data.given(data.sample(data.val[1]))
    assert "red" in baselines["nearest"](red)["caption"]
    assert data.evaluate(baselines["nearest"])[0]["cider_d"] > data.evaluate(baselines["consensus"])[0]["cider_d"]
    metrics, each = data.evaluate(baselines["nearest"])
    assert metrics["exact"] == 1 and {"cider_d", "cider"} <= set(each[0]) and set(metrics) == set(data.metric_names)


# --- Use


def test_predictions_and_pictures(data):
    predict = data.predictor(data.deploy(Parrot(), data.spec).eval(), data.spec, Parrot.grid)
    sample = data.sample(data.val[0])
    found = predict(data.given(sample))
    words = data.spec.more["words"]
    assert found["caption"] == f"{words[3]} {words[2]}" and found["attention"].shape == (2, 2) and found["logp"] == pytest.approx(-1.75)
    assert found["boxes"][1].tolist() == [8, 6, 16, 12], "in pixels of the image that was given"
    shown = data.shown(sample) | data.drawn(sample, found)
    assert set(shown) == {"input", "truth", "caption", "attention"}
    assert all(p.dtype == np.uint8 and p.ndim == 3 for p in shown.values())
    empty = found | {"caption": "", "words": [], "attention": found["attention"][:0]}
    assert all(p.ndim == 3 for p in data.drawn(sample, empty).values())


def test_files(data, tmp_path):
    model = Model(Path("run"), data.spec, Parrot.grid, data.deploy(Parrot(), data.spec).eval())
    files = data.files(data.val)
    written = Captions.predict_files(model, files, tmp_path, Options(overlays=True))
    assert [p.name for p in written] == [TABLE, ANSWER, "im6.overlay.png", "im7.overlay.png"] and all(p.exists() for p in written)
    with (tmp_path / TABLE).open() as f:
        rows = list(csv.DictReader(f))
    words = data.spec.more["words"]
    assert [r["file"] for r in rows] == [str(f) for f in files] and rows[0]["caption"] == f"{words[3]} {words[2]}"
    answer = json.loads((tmp_path / ANSWER).read_text())
    assert answer[0]["words"][0] == {"word": words[3], "attention": 0.8, "box": [8.0, 6.0, 16.0, 12.0]}
    again = Captions.predict_files(model, data.files(data.train[:1]) + files, tmp_path, Options(resume=True))
    assert len(again) == 2 and len(json.loads((tmp_path / ANSWER).read_text())) == 3
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.png"):
        Captions.predict_files(model, [tmp_path / "bad.png"], tmp_path / "out", Options())
    with pytest.raises(InputError, match="--probabilities has no meaning for captions"):
        Captions.predict_files(model, files, tmp_path / "out", Options(probabilities=True))
