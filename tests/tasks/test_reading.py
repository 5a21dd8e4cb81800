"""The task of reading: tables and pages of words, scores by hand, baselines, warps, files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from paperworks.data.words import crop, looks_like_words, open_words
from paperworks.errors import InputError
from paperworks.tasks import guess, task
from paperworks.tasks.base import Grid, Recipe
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.reading import (
    CHARACTERS,
    Reader,
    Reading,
    ReadingScores,
    TextReading,
    Vary,
    decoded,
    edges,
    encoded,
    places,
    plain,
    sampled,
    sequence_loss,
    stretched,
)
from paperworks.train.engine import build_optimizer

WORDS = ("Ox", "12.50", "to", "Ox", "a,b", "7", "Ox", "zz")


def word(text: str, path: Path, size: tuple[int, int] = (60, 20), light: int = 255) -> None:
    image = Image.new("L", size, light)
    ImageDraw.Draw(image).text((3, 2), text, 0, ImageFont.load_default(14))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    root = tmp_path / "table"
    rows = [["file", "text", "split"]]
    for i, text in enumerate(WORDS):
        word(text, root / f"{i}.png", light=255 - 5 * i)
        rows.append([f"{i}.png", text, "val" if i in (3, 5) else "train"])
    write(root / "labels.csv", rows)
    return root


def write(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)


class Fixed(nn.Module):
    """Says ``7``, then the end, and is 0.9 and 0.5 sure."""

    grid = Grid(fixed=16, width=48)

    def forward(self, image: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        said = torch.tensor([[0, 2, 2]]).expand(len(image), -1)
        return {"characters": said, "likelihoods": torch.tensor([[0.9, 0.5, 1.0]]).log().expand(len(image), -1)}


# --- What a data set is


def test_table(table):
    data = TextReading(table)
    assert guess(table) == "reading" and task("reading") is TextReading
    assert [i.text for i in data.train] == ["Ox", "12.50", "to", "a,b", "Ox", "zz"] and [i.text for i in data.val] == ["Ox", "7"]
    assert data.spec.classes == tuple(sorted(set("".join(i.text for i in data.train)))), "the alphabet is that of the training texts"
    assert data.spec.more == {"longest": 5} and data.spec.channels == 1 and data.spec.size == (20, 60)
    found = data.describe()
    assert found["lengths"] == {"min": 1, "median": 2, "max": 5} and found["texts"] == 6 and not found["problems"]
    assert {"name": "x", "share": pytest.approx(3 / 19, abs=1e-5), "images": 3} in found["classes"]
    assert data.sample(data.val[1])["text"] == "7"
    data.check(TextReading.plain_spec(1, 94))
    with pytest.raises(InputError, match="channels 1 where the model was trained on 3"):
        data.check(TextReading.plain_spec(3, 94))


def test_fingerprint_follows_texts_and_pictures(table):
    before = TextReading(table).sha256
    assert TextReading(table).sha256 == before
    rows = list(csv.reader((table / "labels.csv").read_text(encoding="utf-8").splitlines()))
    rows[1][1] = "Oy"
    write(table / "labels.csv", rows)
    changed = TextReading(table).sha256
    word("Oy", table / "0.png", light=100)
    assert len({before, changed, TextReading(table).sha256}) == 3


def test_pages(tmp_path):
    page = np.full((80, 200), 255, np.uint8)
    page[20:40, 30:90] = np.arange(60, dtype=np.uint8) * 4
    (tmp_path / "images").mkdir()
    for name in ("one", "two"):
        Image.fromarray(page).save(tmp_path / "images" / f"{name}.png")
    quad = [30, 20, 90, 20, 90, 40, 30, 40]
    words = [{"quad": quad, "text": "abc"}, {"quad": quad, "text": ""}, {"quad": [1, 2], "text": "bad"}, {"quad": quad, "text": "x" * 30}]
    (tmp_path / "annotations.json").write_text(json.dumps({n: {"width": 200, "height": 80, "words": words} for n in ("one", "two")}))
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["one"], "val": ["two"]}))
    assert looks_like_words(tmp_path)
    data = TextReading(tmp_path)
    assert [(i.name, i.split) for i in data.folder.items] == [("one/000", "train"), ("two/000", "val")]
    what = [p.what for p in data.folder.problems]
    assert len([w for w in what if "no quadrilateral" in w]) == 2 and any("2 texts of more than 25 characters" in w for w in what)
    assert np.array_equal(data.folder.image(data.train[0])[..., 0], page[20:40, 30:90])
    (file,) = data.files(data.val)
    with Image.open(file) as image:
        assert file.suffix == ".png" and image.size == (60, 20)


def test_crops_follow_their_corners():
    y, x = np.mgrid[:50, :60].astype(np.float32)
    page = np.stack([x, y], -1)
    turned = crop(page, (10.5, 40.5, 10.5, 10.5, 30.5, 10.5, 30.5, 40.5))  # read from below upwards
    assert turned.shape == (20, 30, 2)
    assert turned[0, 0].tolist() == pytest.approx([10.5, 39.5]) and turned[19, 29].tolist() == pytest.approx([29.5, 10.5])
    slanted = crop(page, (10.5, 10.5, 40.5, 20.5, 40.5, 30.5, 10.5, 20.5))
    assert slanted.shape[0] == 10 and np.allclose(np.diff(slanted[5, :, 1]), 10 / slanted.shape[1], atol=1e-3)


def test_splits_without_a_word_are_by_hash(table):
    rows = [row[:2] for row in csv.reader((table / "labels.csv").read_text(encoding="utf-8").splitlines())]
    write(table / "labels.csv", rows)
    found = open_words(table)
    assert {i.split for i in found.items} == {"train", "val"} and found.items == open_words(table).items


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["file", "label"], ["0.png", "Ox"]], "no header with the columns file and text"),
        ([["file", "text"], ["none.png", "a"]], "holds nothing usable; the first of 1 problems"),
        ([["file", "text", "split"], ["0.png", "a", "sometimes"]], "write train, val or test"),
        ([["file", "text"], ["0.png", ""]], "has no text"),
        ([["file", "text"], ["broken.png", "a"]], r"broken\.png"),
        ([["file", "text", "split"], ["0.png", "a", "train"]], "1 training and 0 validation texts"),
    ],
)
def test_bad_tables_end_in_one_line(table, rows, message):
    (table / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    write(table / "labels.csv", rows)
    with pytest.raises(InputError, match=message) as caught:
        TextReading(table)
    assert "\n" not in str(caught.value)


def test_bad_places_end_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no labels\.csv and no annotations\.json"):
        TextReading(tmp_path)
    (tmp_path / "annotations.json").write_text('{"page": {"words": [{"text": "a"}]}}')
    with pytest.raises(InputError, match="is not understood"):
        TextReading(tmp_path)
    (tmp_path / "annotations.json").write_text('{"page": {"words": [{"quad": [0, 0, 1, 0, 1, 1, 0, 1], "text": "a"}]}}')
    with pytest.raises(InputError, match="'page', whose picture is not there"):
        TextReading(tmp_path)
    assert not looks_like_words(tmp_path / "labels.csv")


# --- Texts and numbers


def test_texts_become_indices_and_come_back():
    indices = encoded("b7b", "7ab")
    assert indices.tolist() == [2, 0, 2, 3]
    likelihoods = torch.tensor([-0.1, -0.2, -0.3, -0.4, 0.0])
    text, each = decoded(torch.tensor([2, 0, 2, 3, 3]), likelihoods, "7ab")
    assert text == "b7b" and each == pytest.approx((-0.1, -0.2, -0.3, -0.4))
    assert decoded(torch.tensor([2, 4, 0, 2, 1]), likelihoods, "7ab")[0] == "b7ba", "an output beyond the end is no character"
    assert Reading("x", (math.log(0.5), math.log(0.5))).confidence == pytest.approx(0.25) and math.isnan(Reading("x").confidence)
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 94


def test_scores_by_hand():
    scores = ReadingScores()
    for text, truth in (("Ab.1", "Ab.1"), ("ab1", "Ab.1"), ("xy", "xyz"), ("", "%")):
        scores.update(Reading(text), {"text": truth, "name": truth})
    found = scores.compute()
    assert found["accuracy"] == 1 / 4
    assert found["accuracy_plain"] == pytest.approx(2 / 3), "a truth without letters and digits does not count"
    assert found["cer"] == pytest.approx((0 + 2 + 1 + 1) / (4 + 4 + 3 + 1))
    assert [row["cer"] for row in scores.per_item()] == pytest.approx([0, 0.5, 1 / 3, 1])
    assert plain("A-b.1 ") == "ab1"


def test_loss_is_the_sum_over_characters_and_the_mean_over_texts():
    logits = torch.zeros(2, 3, 4)
    target = torch.tensor([[0, 1, 3], [3, -1, -1]])
    assert float(sequence_loss(logits, target)) == pytest.approx((3 + 1) * math.log(4) / 2)


def test_baselines(table):
    data = TextReading(table)
    found = data.baselines()
    image = data.given(data.sample(data.val[0]))
    assert found["frequent"](image).text == "Ox"
    assert found["nearest"](image * 0.5).text == "Ox", "light does not count"
    assert found["nearest"](data.given(data.sample(data.train[1]))).text == "12.50"


# --- Pictures


def test_training_samples_vary_with_the_generator_alone(table):
    data = TextReading(table)
    sample = data.sample(data.train[1])
    still = Vary()(sample, (16, 48), torch.Generator().manual_seed(0))["image"]
    assert torch.equal(still, stretched(data.given(sample), (16, 48)))
    vary = Vary(shift=0.05, scale=0.1, slant=0.2, arc=0.4, tilt=0.2, light=0.2)
    first, again, other = (vary(sample, (16, 48), torch.Generator().manual_seed(s))["image"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (1, 16, 48)
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    batch = data.collate([{"image": first, "target": encoded(t, "ab"), "text": t, "name": t} for t in ("a", "bab")])
    assert batch["target"].tolist() == [[0, 2, -1, -1], [1, 0, 1, 2]] and batch["text"] == ["a", "bab"]


def test_a_warp_puts_the_text_between_its_edges():
    rows = ((torch.arange(32) + 0.5) / 32)[:, None].expand(32, 64)[None]  # each pixel says how far down in the straight picture it was
    bent = sampled(rows, places((32, 64), 0.5, 0.3))[0]
    upper, lower = edges(64, 0.5, 0.3)
    assert float(upper.min()) == 0 and float(lower.max()) == pytest.approx(1)
    assert torch.allclose(lower - upper, (lower - upper)[0].expand(64))
    y = ((torch.arange(32) + 0.5) / 32)[:, None]
    expected = (y - upper) / (lower - upper)
    inside = (expected > 0.05) & (expected < 0.95)
    assert float((bent - expected)[inside].abs().max()) < 1e-4
    assert torch.allclose(sampled(rows, places((32, 64), 0.0, 0.0)), rows, atol=1e-5)
    assert int(edges(64, 0.5, 0.0)[0].argmax()) in (31, 32), "a positive arc sags"


def test_pictures_show_what_was_read(table):
    data = TextReading(table)
    sample = data.sample(data.val[1])
    right, wrong = (data.drawn(sample, Reading(t, (-0.1, -0.1), data.given(sample)))["reading"] for t in ("7", "1"))
    assert right.shape[1] == 240 and not np.array_equal(right, wrong)
    assert (right == (0, 128, 96)).all(2).any() and not (wrong == (0, 128, 96)).all(2).any() and (wrong == (213, 94, 0)).all(2).any()
    assert data.drawn(sample, Reading(""))["reading"].shape[2] == 3


# --- Use


def test_deployed_gives_the_picture_that_was_read():
    spec = TextReading.plain_spec(1, 2)
    image = torch.rand(1, 1, 16, 48)
    likelihoods, characters, rectified = Reader(Fixed(), spec)(image)
    assert torch.allclose(rectified, image, atol=1e-6) and characters.shape == likelihoods.shape == (1, 3)


def test_files_become_a_table(table, tmp_path):
    spec = TextReading.plain_spec(1, 2)
    network = Fixed()
    model = Model(tmp_path, spec, network.grid, TextReading.deploy(network, spec).eval())
    out = tmp_path / "out"
    (written,) = TextReading.predict_files(model, [table / "0.png", table / "5.png"], out, Options(probabilities=True, overlays=True))
    rows = list(csv.reader(written.read_text(encoding="utf-8").splitlines()))
    assert written.name == "readings.csv" and rows[0] == ["file", "text", "confidence", "probabilities"]
    assert [r[1:] for r in rows[1:]] == [["0", "0.450000", "0.9000 0.5000"]] * 2
    assert {p.name for p in out.iterdir()} == {"readings.csv", "0.card.png", "5.card.png"}
    TextReading.predict_files(model, [table], out, Options(probabilities=True, resume=True))
    assert len(list(csv.reader(written.read_text(encoding="utf-8").splitlines()))) == 9
    (table / "broken.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"broken\.png"):
        TextReading.predict_files(model, [table / "1.png", table / "broken.png"], tmp_path / "more", Options())
    assert len((tmp_path / "more" / "readings.csv").read_text().splitlines()) == 2, "what was read before stays"
    with pytest.raises(InputError, match="--window has no meaning"):
        TextReading.predict_files(model, [table], out, Options(window=64))


def test_grid_of_a_rectangle():
    grid = Grid(fixed=24, width=96)
    assert grid.sides((10, 300)) == [24, 96] and Grid(16).sides((10, 20, 40)) == [16, 32, 48] and Grid().sides(()) == []
    assert TextReading.network_input(torch.rand(1, 10, 300), grid).shape == (1, 24, 96)
    assert TextReading.example(TextReading.plain_spec(), grid, batch=2).shape == (2, 3, 24, 96)


def test_adadelta_is_an_optimiser():
    """The one that readers of the field are trained with."""
    optimiser = build_optimizer(nn.Linear(2, 2), Recipe(optimizer="adadelta", lr=1.0))
    assert isinstance(optimiser, torch.optim.Adadelta) and optimiser.defaults["lr"] == 1.0
