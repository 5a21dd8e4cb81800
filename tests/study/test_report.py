"""The report is read by a person who has no network, and who did not choose the names in it."""

import base64
import hashlib
import io
import math
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paperworks.study.charts import Curve, Point, curve_chart, front, front_chart
from paperworks.study.report import render, write_report
from paperworks.study.words import decimal, duration, si, three
from paperworks.tasks.segmentation import Segmentation

NAMES = ("U-Net", "U-Net++", "Attention U-Net", "SegFormer", "PSPNet", "DeepLab v2", "SegNet", "ENet")
DICE = (0.926, 0.931, 0.92, 0.905, 0.889, 0.917, 0.13, 0.878)
SPEED = (1.0, 2.6, 1.9, 0.7, 0.5, 0.31, 0.9, 0.12)
HOSTILE = "<script>alert(1)</script>\"'&$x_1$ 心脏"


def comparison(folder: Path, methods: int = 8, images: int = 4, hostile: bool = False, per_image: int = 102) -> dict:
    """A comparison as ``compare`` writes it: one method failed, one stopped, one with NaN, two baselines."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def picture(name: str) -> str:
        y, x = np.mgrid[:136, :136]
        grey = 90 + 60 * np.sin(x / 19) * np.cos(y / 23) + rng.normal(0, 6, (136, 136))
        rgb = np.repeat(grey[..., None], 3, 2).clip(0, 255).astype(np.uint8)
        rgb[(x - 68) ** 2 + (y - 68) ** 2 < 900] = (220, 120, 60)
        Image.fromarray(rgb).save(folder / "pictures" / f"{name}.png")
        return f"pictures/{name}.png"

    rows = []
    for i in range(methods):
        dice = DICE[i % len(DICE)]
        speed = SPEED[i % len(SPEED)]
        steps = np.arange(0, 1200, 10)
        name = NAMES[i % len(NAMES)] + ("" if i < len(NAMES) else f" {i}")
        rows.append(
            {
                "id": f"m{i}", "name": HOSTILE if hostile and i == 1 else name, "title": f"{name}: a paper", "year": 2015 + i, "kind": "paper",
                "variant": "small", "status": "ok", "error": None,
                "metrics": {"dice": dice, "iou": dice / (2 - dice), "boundary_f": dice - 0.1, "accuracy": 0.99,
                            "dice/left ventricle": dice, "dice/<b>wall</b>": dice - 0.06},
                "spread": {"dice": 0.004}, "seeds": [0, 1, 2],
                "cost": {
                    "params": int(7_762_465 * speed**2), "flops": 9.1e9 * speed, "peak_memory_mib": 812.4 / (i + 1), "train_seconds": 89.2, "steps": 1200,
                    "samples_per_second": 44.0 + i, "export_error": 2e-6,
                    "latency_ms": {"eager": {"1": {"p50": 41.0 * speed, "p95": 44.2 * speed}, "8": {"p50": 300.0 * speed, "p95": 310.0 * speed}},
                                   "onnxruntime": {"1": {"p50": 22.5 * speed, "p95": 23.0 * speed}}},
                },
                "curves": {"step": steps.tolist(), "seconds": (steps * 0.07).tolist(), "loss": (1.6 * np.exp(-steps / 200) + 0.05 + 0.02 * i).tolist(),
                           "val_step": steps[::20].tolist(), "val_metric": (dice * (1 - np.exp(-(steps[::20] + 60) / 150))).tolist()},
                "per_item": [{"name": f"SC-HF-I-{k:03d}", "dice": float(np.clip(dice + 0.1 * np.sin(k), 0, 1))} for k in range(per_image)],
                "verdict": ("deployable", "buildable", "watch")[i % 3],
                "command": f"paperworks train m{i} pack:cardiac_mr --budget 90s --seed 0", "model": f"runs/m{i}/model.safetensors", "run": f"runs/m{i}",
            }
        )  # fmt: skip
    if methods > 4:
        rows[2] |= {
            "status": "failed",
            "error": "CUDA out of memory; take --variant small",
            "metrics": {},
            "cost": {},
            "curves": None,
            "per_item": None,
        }
        rows[3] |= {"status": "stopped"}
        rows[4]["metrics"]["boundary_f"] = math.nan
        rows[4]["cost"]["latency_ms"] = None
    for name, dice in (("Otsu's threshold", 0.31), ("Majority class", 0.0)):
        rows.append(
            {
                "id": name[:4],
                "name": name,
                "kind": "baseline",
                "status": "ok",
                "metrics": {"dice": dice, "iou": dice / (2 - dice)},
                "cost": {},
            }
        )
    pictures = []
    for k in range(images):
        name = HOSTILE if hostile and k == 0 else f"SC-HF-I-{k:03d}"
        sheet = {"name": name, "input": picture(f"{k}_input"), "truth": picture(f"{k}_truth"), "rows": {}}
        for row in rows[:methods]:
            if row["status"] != "failed":
                sheet["rows"][row["id"]] = {v: picture(f"{k}_{row['id']}_{v}") for v in ("overlay", "errors")} | {"dice": 0.9 - 0.1 * k}
        pictures.append(sheet)
    return {
        "kind": "compare", "title": HOSTILE if hostile else "cardiac_mr", "command": "paperworks compare pack:cardiac_mr --papers unet,unetpp --budget 90s",
        "created": "2026-11-21T10:00:00", "budget": "90 s each", "seed": 0,
        "hardware": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_gib": 24, "gpu": None}, "versions": {"paperworks": "0.1.0", "torch": "2.14.1"},
        "data": {"source": "pack:cardiac_mr", "layout": "images and masks", "task": "segmentation", "splits": {"train": 424, "val": 102, "test": 0},
                 "classes": [{"name": "background", "share": 0.94}, {"name": "left ventricle", "share": 0.04}, {"name": "<b>wall</b>", "share": 0.02}],
                 "channels": 1, "dtype": "uint8", "sizes": {"median": [136, 136]},
                 "problems": [{"path": HOSTILE if hostile else "images/broken.png", "what": "cannot be read", "fix": "save it again"}]},
        "metric": "dice", "higher_is_better": True, "rows": rows,
        "metric_names": Segmentation.metric_names, "explained": Segmentation.explained, "views": Segmentation.views,
        "legend": [{"colour": (0, 130, 255), "en": "false alarm", "zh": "误检", "view": "errors"}, {"colour": (86, 180, 233), "en": "<b>wall</b>", "zh": "壁", "view": ""}],
        "recommended": {"id": "m0", "reason": {"en": "U-Net reaches a dice of 0.926; U-Net++ has 0.931, within two standard errors. It has 7.76 M parameters, 22.5 ms an image.",
                                               "zh": "U-Net 的 dice 为 0.926；U-Net++ 为 0.931，验证图像无法区分两者。参数量 7.76 M，每张图像 22.5 毫秒。"}},
        "pictures": pictures,
    }  # fmt: skip


def claim(held: bool | None = True) -> dict:
    arms = {
        "dice and focal loss": [0.911, 0.917, 0.905],
        "cross-entropy": [0.893, 0.899, 0.884],
        "without skip connections": [0.802, 0.815, 0.809],
    }
    return {
        "kind": "claim", "id": "unet", "title": "U-Net: Convolutional Networks for Biomedical Image Segmentation", "held": held, "metric": "dice", "metric_names": Segmentation.metric_names,
        "claim": {"en": "Skip connections make the outlines precise.", "zh": "跳跃连接使轮廓更精确。"},
        "rule": {"en": "Dice with skips is at least 0.02 higher in every seed.", "zh": "每个种子上，带跳跃连接的 Dice 至少高 0.02。"},
        "arms": [{"name": n, "control": "without" in n, "metrics": {"dice": v, "boundary_f": [x - 0.2 for x in v]}} for n, v in arms.items()],
        "seeds": [0, 1, 2], "data": "pack:cardiac_mr", "steps": 300, "seconds": 512.3, "command": "paperworks claim unet", "created": "2026-11-21T10:00:00",
        "hardware": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_gib": 24, "gpu": None}, "versions": {"paperworks": "0.1.0", "torch": "2.14.1"},
    }  # fmt: skip


VOID = {"meta", "img", "br", "input", "line", "path", "use", "rect", "link", "hr"}


class Page(HTMLParser):
    """The page's elements, and its text as a person who reads ``language`` sees it. Refuses what is not well nested."""

    def __init__(self, page: str, language: str = "en") -> None:
        super().__init__()
        self.language, self.stack, self.elements, self.words = language, [], [], []
        self.feed(page)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append((tag, dict(attrs).get("lang", "")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        hidden = any(tag in ("script", "style", "title") for tag, _ in self.stack)
        hidden |= any(lang not in ("", self.language) for tag, lang in self.stack if tag != "html")
        if not hidden and data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]


def rows_of(page: str, caption: str) -> list[str]:
    """Source of the rows of the table whose caption holds the words."""
    table = next(t for t in re.findall(r"<table.*?</table>", page, re.DOTALL) if caption in t)
    return re.findall(r"<tr.*?</tr>", table.split("<tbody>")[1], re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("compare")
    return write_report(comparison(folder), folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    return write_report(comparison(folder, hostile=True), folder).read_text(encoding="utf-8")


def test_everything_is_inside_the_file(page):
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    for tag, attrs in Page(page).elements:
        for name in {"src", "href", "action", "poster", "data", "srcset", "background"} & attrs.keys():
            assert attrs[name].startswith("data:" if tag == "img" else "#"), (tag, attrs)


def test_the_policy_lets_only_the_pages_own_script_run(page):
    (policy,) = [m["content"] for m in Page(page).all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_names_are_text(page, hostile):
    plain, bad = Page(page), Page(hostile)
    assert [tag for tag, _ in bad.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(attrs) for _, attrs in bad.elements] == [sorted(attrs) for _, attrs in plain.elements]
    assert HOSTILE in bad.text
    assert "<b>wall</b>" in bad.text
    assert any(HOSTILE in attrs["alt"] for attrs in bad.all("img"))


def test_backslashes_and_foreign_letters_reach_the_charts_as_they_are(tmp_path):
    points = [Point(r"a\1 \g<0> #010101 $\frac$ 网络", 0, 1.0, 0.5), Point("q00nn", 1, 2.0, 0.6)]
    text = Page(str(front_chart("k", ("x", "x"), ("y", "y"), 1, points, []))).text
    assert r"a\1 \g<0> #010101 $\frac$ 网络" in text
    assert "q00nn" in text


def test_both_languages_say_the_same_numbers(page):
    english, chinese = Page(page, "en"), Page(page, "zh")
    numbers = [Counter(re.findall(r"\d+(?:[.,]\d+)*", p.text)) for p in (english, chinese)]
    assert numbers[0] == numbers[1]
    assert sum(numbers[0].values()) > 1000
    assert "推荐" in chinese.text and "推荐" not in english.text
    spans = Counter(attrs.get("lang") for tag, attrs in english.elements if tag in ("span", "tspan"))
    assert spans["en"] == spans["zh"] > 100
    for _, attrs in english.elements:
        for name in attrs:
            if match := re.match("data-(en|zh)-(.*)", name):
                assert attrs[f"data-en-{match[2]}"] and attrs[f"data-zh-{match[2]}"] and attrs[match[2]] == attrs[f"data-en-{match[2]}"]


def test_main_table(page):
    rows = [Page(row).text for row in rows_of(page, "best first")]
    order = [
        "U-Net++",
        "U-Net",
        "DeepLab v2",
        "SegFormer",
        "PSPNet",
        "ENet",
        "Otsu's threshold",
        "SegNet",
        "Majority class",
        "Attention U-Net",
    ]
    assert all(row.startswith(name) for row, name in zip(rows, order, strict=True))
    by_name = dict(zip(order, rows))
    assert by_name["Attention U-Net"].endswith("✕ failed : CUDA out of memory; take --variant small")
    assert "stopped early" in by_name["SegFormer"] and "baseline" in by_name["Majority class"]
    assert "0.889 ± 0.004 0.800 – 0.990" in by_name["PSPNet"]  # its boundary F is NaN
    best = {name: re.findall(r"<b>(.*?)<span", row) for name, row in zip(order, rows_of(page, "best first"))}
    assert {name: marks for name, marks in best.items() if marks} == {
        "U-Net++": ["0.931", "0.871", "0.831"],
        "ENet": ["112 k", "1.09 G", "2.70", "102"],
    }
    assert re.search(r'data-v="1117\d\d\.0"', page)  # parameters are sorted by their number, not by "112 k"


def test_recommendation_comes_with_the_model_and_the_command(page):
    text = Page(page).text
    assert "Use U-Net (small)" in text
    assert text.index("Use U-Net (small)") < text.index("All methods")
    assert "runs/m0/model.safetensors" in text
    assert "paperworks predict runs/m0 IMAGES --out predictions" in text


def test_commands_quote_what_a_shell_would_split(tmp_path):
    result = comparison(tmp_path, images=0)
    result["rows"][0]["run"] = "my runs/u; rm -rf"
    assert "paperworks predict 'my runs/u; rm -rf' IMAGES" in Page(render(result, tmp_path)).text


@pytest.mark.parametrize("gone", ["drop", "null"])
def test_any_field_may_be_missing(tmp_path, gone):
    def without(mapping: dict, key: str) -> dict:
        return {k: v for k, v in mapping.items() if k != key} if gone == "drop" else {**mapping, key: None}

    whole = comparison(tmp_path, methods=1, images=1, per_image=3)
    first = whole["rows"][0]
    rows = [without(first, key) for key in first]
    rows += [first | {part: without(first[part], key)} for part in ("cost", "curves") for key in first[part]]
    page = Page(render({"kind": "compare", "title": "t", "metric": "dice", "recommended": {"id": "m0"}, "rows": rows}, tmp_path))
    assert page.text.count("★ recommended") >= len(rows) - 1
    for key in whole.keys() - {"kind", "title", "rows"}:
        assert "U-Net" in Page(render(without(whole, key), tmp_path)).text
    for key in whole["data"]:
        assert (
            "Majority class"
            in Page(render(whole | {"pictures": [], "rows": whole["rows"][1:], "data": without(whole["data"], key)}, tmp_path)).text
        )
    for key in claim().keys() - {"kind", "title"}:
        assert "Biomedical" in Page(render(without(claim(), key), tmp_path)).text


def test_nothing_finished(tmp_path):
    result = comparison(tmp_path, images=0)
    failed = [row | {"status": "failed", "error": f"fault {i}"} for i, row in enumerate(result["rows"][:2])]
    text = Page(render(result | {"rows": failed}, tmp_path)).text
    assert "No method is recommended" in text
    assert "fault 0" in text and "fault 1" in text
    assert "Use U-Net" not in text
    Page(render({"kind": "compare", "title": "empty", "rows": []}, tmp_path))
    with pytest.raises(ValueError, match="survey"):
        render({"kind": "survey", "title": "x"}, tmp_path)


def test_pictures(tmp_path):
    result = comparison(tmp_path, methods=2, images=1)
    noise = np.random.default_rng(0).integers(0, 255, (900, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "pictures" / "0_input.png")
    (tmp_path / "pictures" / "0_m1_errors.png").write_bytes(b"no picture")
    Image.fromarray(noise).save(tmp_path.parent / "outside.png")
    result["pictures"][0]["truth"] = "../outside.png"
    page = Page(render(result, tmp_path))
    shown = {attrs["alt"]: attrs for attrs in page.all("img") if attrs["alt"]}
    assert set(shown) == {
        "SC-HF-I-000: input",
        "U-Net, SC-HF-I-000: errors, Dice 0.900",
        "U-Net, SC-HF-I-000: predictions, Dice 0.900",
        "U-Net++, SC-HF-I-000: predictions, Dice 0.900",
    }
    large, small = shown["SC-HF-I-000: input"], shown["U-Net, SC-HF-I-000: errors, Dice 0.900"]
    assert (large["width"], large["height"]) == ("640", "411")
    with Image.open(io.BytesIO(base64.b64decode(large["src"].partition(",")[2]))) as image:
        assert image.size == (640, 411)
    file = tmp_path / "pictures" / "0_m0_errors.png"
    assert base64.b64decode(small["src"].partition(",")[2]) == file.read_bytes()
    assert all(attrs["loading"] == "lazy" for attrs in shown.values())
    assert page.text.count("no picture") == 2


def test_size_and_time(tmp_path):
    result = comparison(tmp_path, methods=10, images=6, per_image=1000)
    began = time.process_time()
    page = write_report(result, tmp_path).read_text(encoding="utf-8")
    assert time.process_time() - began < 5
    assert len(render(result | {"pictures": []}, tmp_path).encode()) < 300_000
    assert len(re.findall("data:image/", page)) == 6 * (2 + 9 * 2)
    assert len(rows_of(page, "hardest first")) == 200


def test_images_stand_hardest_first(tmp_path):
    result = comparison(tmp_path, methods=1, images=0, per_image=0)
    result["rows"][0]["per_item"] = [{"name": n, "dice": v} for n, v in (("b", 0.9), ("a", 0.2), ("c", math.nan), ("d", 0.5))]
    names = [Page(row).words[0] for row in rows_of(render(result, tmp_path), "hardest first")]
    assert names == ["a", "d", "b", "c"]


def test_front_is_what_nothing_dominates():
    rng = np.random.default_rng(0)
    for better in (1, -1):
        points = [Point(str(i), i, float(x), float(y)) for i, (x, y) in enumerate(rng.integers(1, 12, (40, 2)))]
        free = {
            (p.cost, p.quality)
            for p in points
            if not any(
                q.cost <= p.cost and better * q.quality >= better * p.quality and (q.cost, q.quality) != (p.cost, p.quality) for q in points
            )
        }
        on = front(points, better)
        assert {(p.cost, p.quality) for p in on} == free and len(on) == len(free)
        assert [p.cost for p in on] == sorted(p.cost for p in on)


def test_a_method_that_went_wrong_does_not_flatten_the_chart():
    good = [Point(f"m{i}", i, 1.0 + i, 0.9 + 0.01 * i) for i in range(5)]
    text = Page(
        str(front_chart("k", ("x", "x"), ("y", "y"), 1, [*good, Point("bad", 5, 3.0, 0.1)], [("Otsu", 0.91), ("majority", 0.0)]))
    ).text
    ticks = [float(t) for t in re.findall(r"\b0\.\d+\b", text.replace("bad 0.100", ""))]
    assert min(ticks) > 0.8
    assert "bad 0.100" in text
    assert "Otsu" in text and "majority" not in text


def test_curves_are_finite_and_thin():
    steps = list(range(5000))
    values = [math.nan if i % 7 == 0 else float(i) for i in steps]
    curve = Curve.of("c", 0, steps, values)
    assert len(curve.x) == len(curve.y) == 120
    np.testing.assert_allclose(curve.x, curve.y)
    assert curve.x.mean() == pytest.approx(2499.5, rel=0.01)
    assert curve_chart("k", ("x", "x"), ("y", "y"), [Curve.of("c", 0, [1, 2], [math.nan, None])]) is None


def test_numbers_for_the_eye():
    assert [decimal(v) for v in (0.93049, 0, -0.5, 12.3456, 12345.6, 0.00012, math.nan, None, True, "7")] == [
        "0.930", "0.000", "-0.500", "12.346", "12,346", "0.00012", "–", "–", "–", "–",
    ]  # fmt: skip
    assert [si(v) for v in (7, 999, 31_030_658, 999_999, 1234, 9.1e9, 0.5, math.inf)] == [
        "7", "999", "31.0 M", "1.00 M", "1.23 k", "9.10 G", "0.500", "–",
    ]  # fmt: skip
    assert [three(v) for v in (41, 4.418, 9.999, 310.2, 1234.5, 0.0412, 0)] == ["41.0", "4.42", "10.0", "310", "1,234", "0.0412", "0.00"]
    assert [duration(v) for v in (4.26, 89.2, 725, 12034, None)] == ["4.3 s", "89.2 s", "12 min 05 s", "3 h 21 min", "–"]


def test_claim(tmp_path):
    text = Page(render(claim(), tmp_path)).text
    assert "✓ The claim held" in text and "Skip connections make the outlines precise." in text
    assert "at least 0.02 higher in every seed" in text
    rows = [Page(row).text for row in rows_of(render(claim(), tmp_path), "Dice of each arm")]
    assert rows[0] == "dice and focal loss 0.9110 0.9170 0.9050 0.9110 ± 0.0060"
    assert rows[2].startswith("without skip connections control 0.8020")
    assert "✕ The claim did not hold at this scale" in Page(render(claim(False), tmp_path)).text
    assert "在此规模下论断不成立" in Page(render(claim(False), tmp_path), "zh").text
    assert "The claim was not judged" in Page(render(claim(None), tmp_path)).text


def test_claim_with_holes(tmp_path):
    result = claim()
    result["arms"][0]["metrics"]["dice"] = [0.9, math.nan]
    result["arms"][1]["metrics"] = {}
    rows = [Page(row).text for row in rows_of(render(result, tmp_path), "Dice of each arm")]
    assert rows[0] == "dice and focal loss 0.9000 – – 0.9000"
    assert rows[1] == "cross-entropy – – – –"


def test_the_report_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_report(claim(), tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(claim(False), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_file_name_that_is_no_text_costs_nobody_the_report(tmp_path):
    result = comparison(tmp_path, methods=1, images=0)
    result["data"]["problems"][0]["path"] = "bad\udcff.png"
    assert "bad\\udcff.png" in write_report(result, tmp_path).read_text(encoding="utf-8")
