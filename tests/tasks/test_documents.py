"""Pages, their marks, tags and files; scores by hand; rules on a page that a person can follow."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from paperworks.data.pages import MOST, Page, Segment, Span, locate, looks_like_pages, open_pages, read_pages, reading_order
from paperworks.errors import InputError
from paperworks.tasks.base import Grid, Recipe
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.documents import BOX, LENGTH, ROWS, Documents, Value, Vary, bytes_of, encode, read_tags, same, tags_of

LINES = [
    ("KOPI AH MENG SDN BHD", 20, 10, 180, 22),
    ("NO. 7, JALAN SATU,", 30, 26, 170, 38),
    ("52100 KUALA LUMPUR", 40, 42, 160, 54),
    ("DATE: 03/04/2018", 10, 60, 120, 72),
    ("KOPI O", 10, 80, 70, 92),
    ("2.50", 150, 80, 180, 92),
    ("SUB-TOTAL", 10, 100, 90, 112),
    ("2.50", 150, 101, 180, 113),
    ("TOTAL:", 10, 120, 70, 132),
    ("2.50", 150, 119, 180, 131),
    ("CASH", 10, 140, 60, 152),
    ("12.50", 145, 140, 180, 152),
]
FIELDS = {"company": "Kopi Ah Meng  Sdn Bhd", "date": "03/04/2018", "address": "NO 7 JALAN SATU 52100 KUALA LUMPUR.", "total": "2.50"}
NAMES = tuple(FIELDS)


def words(lines: list = LINES, shift: float = 0) -> list[dict]:
    return [{"box": [x0 + shift, y0, x1 + shift, y1], "text": text} for text, x0, y0, x1, y1 in lines]


def sure_of(tags: torch.Tensor, count: int = 9) -> torch.Tensor:
    """Probabilities that know nothing but these tags."""
    return torch.nn.functional.one_hot(tags, count).float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six receipts alike but for their place on the paper, out of order, with a picture for one."""
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    content = {f"r{i}": {"width": 220, "height": 160, "words": words(LINES[::-1], i), "fields": FIELDS} for i in range(6)}
    (root / "annotations.json").write_text(json.dumps(content))
    (root / "splits.json").write_text(json.dumps({"train": ["r0", "r1", "r2", "r3"], "val": ["r4", "r5"]}))
    Image.new("RGB", (440, 320), "white").save(root / "images" / "r5.png")
    return root


@pytest.fixture
def data(folder: Path) -> Documents:
    return Documents(folder)


def test_reading_order():
    assert [s.text for s in reading_order([Segment(x0, y0, x1, y1, t) for t, x0, y0, x1, y1 in LINES[::-1]])] == [t for t, *_ in LINES]


def test_rule_of_marks(data):
    """The total is where its row begins with the word, not at the sub-total nor within 12.50; the address is two lines written otherwise."""
    page = data.train[0]
    assert page.place("total") == [Span("total", 9, 0, 4)]
    assert page.place("date") == [Span("date", 3, 6, 16)]
    assert page.place("address") == [Span("address", 1, 0, 18), Span("address", 2, 0, 18, False)]
    assert page.text("address") == "NO. 7, JALAN SATU, 52100 KUALA LUMPUR"
    assert page.place("company") == [Span("company", 0, 0, 20)]
    assert locate(page.segments, "cash", "2.50") == [Span("cash", i, 0, 4) for i in (5, 7, 9)]  # no row names it: everywhere
    assert locate(page.segments, "total", "3.50") == [] and locate(page.segments, "x", "") == []
    assert locate([Segment(0, 0, 9, 9, "RM8.20 $8.20")], "total", "$8.20") == [Span("total", 0, 7, 12)]


def test_tensor_of_a_page(data):
    page = data.train[0]
    tensor = encode(page)
    assert tensor.shape == (ROWS, 12) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:BOX, 0], torch.tensor([100.0, 16.0, 160.0, 12.0]) / 220)
    assert bytes(bytes_of(tensor)[4, :7].tolist()) == b"KOPI O\n" and not bytes_of(tensor)[4, 7:].any()
    long = Page(name="l", file=Path(), width=9, height=9, segments=(Segment(0, 0, 9, 9, "发票" * 40),))
    assert bytes(bytes_of(encode(long))[0].tolist()) == ("发票" * 40).encode()[: LENGTH - 1] + b"\n"
    tensor[BOX + 3, 4] = 0  # a zero ends a text
    assert bytes(bytes_of(tensor)[4].tolist()).rstrip(b"\0") == b"KOP"


def test_tags_there_and_back(data):
    page = data.train[0]
    tags, segments = tags_of(page, NAMES)
    assert segments.tolist() == [1, 3, 3, 2, 0, 0, 0, 0, 0, 4, 0, 0]
    assert tags[0, :3].tolist() == [1, 2, 2] and tags[3, 5:8].tolist() == [0, 3, 4]
    assert tags[1, 0] == 5 and tags[2, 0] == 6  # the second line goes on
    assert not tags[torch.arange(12), torch.tensor([len(s.text) for s in page.segments])].any()  # the line feeds
    found = read_tags(page, tags, sure_of(tags), NAMES)
    assert {k: v.text for k, v in found.items()} == {k: page.text(k) for k in NAMES}
    assert {s for v in found.values() for s in v.spans} == set(page.spans)
    chinese = Page(
        name="c", file=Path(), width=9, height=9, segments=(Segment(0, 0, 9, 9, "合计 ¥8.20 元"),), spans=(Span("total", 0, 3, 8),)
    )
    tags, _ = tags_of(chinese, ["total"])
    assert read_tags(chinese, tags, sure_of(tags, 3), ["total"])["total"] == Value("¥8.20", 1.0, chinese.spans)


def test_the_surest_place_is_the_value(data):
    page = data.train[0]
    tags = torch.zeros(12, LENGTH, dtype=torch.long)
    for row in (7, 9, 11):
        tags[row, :4] = torch.tensor([7, 8, 8, 8])
    sure = 0.6 * sure_of(tags)
    sure[11] *= 1.2
    assert read_tags(page, tags, sure, NAMES)["total"].text == "12.50"  # no number is cut
    sure[9] *= 1.3
    value = read_tags(page, tags, sure, NAMES)["total"]
    assert value.text == "2.50" and {s.segment for s in value.spans} == {7, 9} and value.confidence == pytest.approx(0.78)
    tags[:] = 0
    tags[4, 2:4] = 2  # goes on with nothing: begins
    assert read_tags(page, tags, sure_of(tags), NAMES)["company"].text == "KOPI"
    assert read_tags(page, torch.zeros_like(tags), sure_of(torch.zeros_like(tags)), NAMES) == {}


def test_a_likely_place_is_taken_where_none_is_tagged(data):
    page, tags = data.train[0], torch.zeros(12, LENGTH, dtype=torch.long)
    unsure = 0.5 * sure_of(tags)
    unsure[3, 6:16, 3], unsure[3, 6:16, 4], unsure[3, :6, 4] = 0.1, 0.3, 0.15
    unsure[5, :4, 8], unsure[9, :4, 8], unsure[9, 4:, 8] = 0.25, 0.29, 0.9  # less than likely; what lies behind a text does not count
    found = read_tags(page, tags, unsure, NAMES)
    assert found == {"date": Value("03/04/2018", pytest.approx(0.4), (Span("date", 3, 6, 16),))}


def test_scores_by_hand(data):
    """Of four fields one is right, one wrong and one missing on the first page and all right on the second; one page has no total."""
    page = data.val[0]
    scores = data.scores()
    scores.update(
        {"company": Value("KOPIAH meng SDN BHD", 1.0, (Span("company", 0, 0, 20),)), "total": Value("12.50", 1.0)}, data.sample(page)
    )
    right = {k: Value(v, 1.0, tuple(page.place(k))) for k, v in page.fields.items()}
    scores.update(right, data.sample(data.val[1]))
    found = scores.compute()
    assert found["precision"] == pytest.approx(5 / 6) and found["recall"] == pytest.approx(5 / 8)
    assert found["f1"] == pytest.approx(2 * 5 / (6 + 8)) and found["f1/total"] == pytest.approx(0.5)
    assert found["segments"] == pytest.approx((9 + 12 - 1) / 24)
    first, second = scores.per_item()
    assert first["f1"] == pytest.approx(2 / 6) and second == {"name": "r5", "f1": 1.0, "cer": 0.0, "segments": 1.0}
    assert same("D. E", "d.e") and not same("1.50", "150")


def test_rules(data):
    """On such a plain receipt a person's rules find everything."""
    baselines = data.baselines()
    assert data.evaluate(baselines["rules"])[0]["f1"] >= 0.75
    found = baselines["rules"](data.val[0])
    assert found["total"].text == "2.50" and found["date"].text == "03/04/2018" and found["company"].text == "KOPI AH MENG SDN BHD"
    assert found["address"].text == "NO. 7, JALAN SATU, 52100 KUALA LUMPUR"
    places = baselines["places"](data.val[0])
    assert places["address"].text == found["address"].text and places["date"].text == "DATE: 03/04/2018"
    assert baselines["values"](data.val[0])["total"].text == "2.50"


def test_variation_keeps_the_marks(data):
    sample = data._teachable(data.train[0])
    varied = Vary(digits=1.0, noise=0.0, drop=0.5)(sample, (0, 0), torch.Generator().manual_seed(0))
    assert varied["page"].shape[1] == len(varied["tags"]) == len(varied["segments"]) < 12
    assert varied["segments"].bincount(minlength=5)[1:].tolist() == [1, 1, 2, 1]
    row = int((varied["segments"] == 4).nonzero())
    text = bytes(bytes_of(varied["page"])[row].tolist()).rstrip(b"\0").decode()
    assert text[1] == "." and text[0].isdigit() and text != "2.50\n"
    still = Vary(digits=0.0, noise=0.0, jitter=0.0, drop=0.0)(sample, (0, 0), torch.Generator())
    assert all(torch.equal(still[k], sample[k]) for k in ("page", "tags", "segments"))


def test_batches_are_filled_up(data):
    recipe = Recipe(augment=Vary(drop=0.3))
    samples = [data.training_sample(i, recipe, Grid(), torch.Generator().manual_seed(k)) for k, i in enumerate(data.train)]
    batch = data.collate(samples)
    most = max(s["page"].shape[1] for s in samples)
    assert batch["page"].shape == (4, ROWS, most) and batch["tags"].shape == (4, most, LENGTH) and batch["segments"].shape == (4, most)
    short = min(range(4), key=lambda b: samples[b]["page"].shape[1])
    assert not batch["page"][short, :, samples[short]["page"].shape[1] :].any()


def test_tables(tmp_path, folder):
    """One table of two pages that somebody marked, one of a page whose values lie beside it."""
    root = tmp_path / "tables"
    root.mkdir()
    marks = {0: "company", 1: "address", 2: "address", 9: "total"}
    rows = [["page", "x0", "y0", "x1", "y1", "text", "field"]]
    rows += [[p, x0, y0, x1, y1, t, marks.get(i, "")] for p in ("a", "b") for i, (t, x0, y0, x1, y1) in enumerate(LINES)]
    with (root / "marked.csv").open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    with (root / "c.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["text", "y1", "x1", "y0", "x0"], *([t, y1, x1, y0, x0] for t, x0, y0, x1, y1 in LINES)])
    (root / "fields.csv").write_text("page,total,date\nc,2.50,03/04/2018\n")
    found = open_pages(root)
    assert [p.name for p in found.pages] == ["c", "a", "b"] and set(found.names) == {"company", "address", "total", "date"}
    assert found.pages[1].fields["address"] == "NO. 7, JALAN SATU, 52100 KUALA LUMPUR"
    assert found.pages[0].place("date") == [Span("date", 3, 6, 16)] and not found.problems
    assert looks_like_pages(root) and looks_like_pages(root / "c.csv") and looks_like_pages(folder)
    assert Documents.recognises(folder / "annotations.json") and not looks_like_pages(folder / "splits.json")
    (root / "fields.csv").unlink()
    (root / "fields.json").write_text(json.dumps({"c": {"total": "9.99"}}))
    found = open_pages(root)
    assert "has total '9.99' on no segment of page 'c'" in str(found.problems[0])
    assert Documents.inspect(root)["problems"]


def test_described(data):
    described = data.describe()
    json.dumps(described)
    assert described["splits"] == {"train": 4, "val": 2} and described["items"] == 6 and described["problems"] == []
    assert [c["name"] for c in described["classes"]] == list(NAMES)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("annotations.json", "{", "is not valid JSON"),
        ("annotations.json", '{"a": 3}', "holds no pages"),
        ("annotations.json", '{"a": {"words": []}}', "page 'a' holds no text"),
        ("annotations.json", '{"a": {"words": [{"box": [0, 0, 1], "text": "x"}]}}', 'word 1: give it a "quad" of 8'),
        ("annotations.json", '{"a": {"words": [{"text": "x"}]}}', 'word 1: give it a "quad" of 8'),
        ("annotations.json", '{"a": {"words": [{"box": [0, 0, 0, 5], "text": "x"}]}}', "the box has no extent"),
        ("annotations.json", '{"a": {"words": [{"box": [0, 0, NaN, 5], "text": "x"}]}}', "is not finite"),
        ("annotations.json", '{"a": {"words": [{"box": [0, 0, 1, 5], "text": "x"}], "fields": {"total": 3}}}', "put quotes"),
        ("a.csv", "x0,y0,x1,text\n1,2,3,a\n", "lacks the column 'y1'"),
        ("a.csv", "", "is empty"),
        ("a.csv", "x0,y0,x1,y1,text\n1,2,3,4,a\n1,two,3,4,a\n", "line 3: x0, y0, x1 and y1 must be numbers"),
        ("a.csv", "x0,y0,x1,y1,text\n1,2,nan,4,a\n", "line 2: a coordinate is not finite"),
    ],
)
def test_bad_input(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        open_pages(tmp_path)


def test_what_cannot_be_learned_from(tmp_path):
    with pytest.raises(InputError, match="holds no pages"):
        open_pages(tmp_path)
    many = {"a": {"words": words(LINES * (MOST // len(LINES) + 1))}}
    (tmp_path / "many.json").write_text(json.dumps(many))
    with pytest.raises(InputError, match=f"at most {MOST} fit"):
        read_pages(tmp_path / "many.json")
    (tmp_path / "many.json").write_text(json.dumps({"words": words()}))
    with pytest.raises(InputError, match="says no values"):
        Documents(tmp_path)
    (tmp_path / "fields.json").write_text(json.dumps({"many": FIELDS}))
    with pytest.raises(InputError, match=r"\d training and \d validation"):
        Documents(tmp_path)
    (tmp_path / "many.csv").write_text("x0,y0,x1,y1,text\n1,2,3,4,a\n")
    with pytest.raises(InputError, match=r"is in .* already"):
        open_pages(tmp_path)


def test_files_there_and_back(data, tmp_path):
    """A model that answers with the truth writes it, from a file of many pages and from a table."""
    truth = {p.name: tags_of(p, NAMES)[0] for p in data.train + data.val}

    def forward(page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        name = next(p.name for p in data.train + data.val if torch.equal(encode(p), page[0]))
        return truth[name][None], sure_of(truth[name])[None]

    model = Model(Path(), data.spec, Grid(), forward)
    written = Documents.predict_files(model, data.files(data.val), tmp_path / "out", Options(overlays=True))
    assert [p.name for p in written] == ["values.csv", "annotations.fields.json", *(f"r{i}.fields.png" for i in range(6))]
    with written[0].open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["page"] for r in rows] == [f"r{i}" for i in range(6)] and all(r["total"] == "2.50" for r in rows)
    found = json.loads(written[1].read_text())["r5"]
    assert found["date"]["text"] == "03/04/2018" and found["date"]["confidence"] == 1.0
    assert found["address"]["places"][1] == {"field": "address", "segment": 2, "start": 0, "end": 18, "begins": False}
    for path in written[2:]:
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    Documents.predict_file(model, data.files(data.val)[0], tmp_path / "one.json", Options())
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads(written[1].read_text())
    with pytest.raises(InputError, match="--with has no meaning"):
        Documents.predict_files(model, data.files(data.val), tmp_path / "out", Options(refine=lambda a, b: b))
    accepted = [
        name for name in ("a.csv", "a.json", "fields.csv", "splits.json", "a.fields.json", "a.txt") if Documents.accepts(Path(name))
    ]
    assert accepted == ["a.csv", "a.json"]


def test_pictures(data):
    """Pictures of pages with and without a picture of their own; what is wrong is said in red."""
    for page in data.val:
        sample = data.sample(page)
        pictures = data.shown(sample) | data.drawn(sample, {"total": Value("9.99", 0.5, (Span("total", 9, 0, 4),))})
        assert pictures["input"].shape == pictures["boxes"].shape and (pictures["input"] != pictures["boxes"]).any()
        assert (pictures["fields"] == torch.tensor([200, 0, 0]).numpy()).all(-1).any()
