"""The site: every link leads somewhere, both languages are there, and nothing is overwritten that is no gallery."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paperworks import papers
from paperworks.errors import InputError
from paperworks.gallery import languages, site

CHOSEN = ("unet", "grad_cam", "vae")
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """What a page links to, shows and calls by an id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unnamed: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        for name in ("href", "src"):
            if value := given.get(name):
                self.links.append(value)
        if tag == "img" and "alt" not in given:
            self.unnamed.append(str(attrs))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of three papers, one of which calls itself something hostile."""
    known = {name: papers.card(name) for name in CHOSEN}
    known["vae"] = dataclasses.replace(known["vae"], title=HOSTILE, idea={"en": HOSTILE, "zh": HOSTILE})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(papers, "cards", lambda: known)
        return site.build(tmp_path_factory.mktemp("site") / "gallery").parent


@pytest.fixture(scope="module")
def pages(gallery: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in gallery.rglob("*.html")}


def test_pages(gallery: Path, pages: dict[Path, Page]) -> None:
    names = {str(path.relative_to(gallery)) for path in pages}
    known = {papers.card(name).task for name in CHOSEN}
    tasks = {f"tasks/{name}.html" for name in known}
    compared = {f"comparisons/{name}.html" for name, result in site.comparisons().items() if result["data"]["task"] in known}
    assert names == {"index.html", "tasks.html", "evidence.html", *compared, *(f"papers/{name}.html" for name in CHOSEN), *tasks}
    assert compared < {f"comparisons/{name}.html" for name in site.comparisons()}, "those of other tasks stay out"


def test_no_link_is_dead(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links:
            if link.startswith(("http://", "https://", "data:")):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor:
                assert anchor in pages[target].ids, f"{path.name}: {link}"


def test_ids_are_unique_and_pictures_have_words(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        twice = [name for name, count in Counter(page.ids).items() if count > 1]
        assert not twice, f"{path.name}: {twice}"
        assert not page.unnamed, f"{path.name}: {page.unnamed}"


def test_nothing_of_a_card_is_obeyed(gallery: Path) -> None:
    for path in gallery.rglob("*.html"):
        assert HOSTILE not in path.read_text(encoding="utf-8"), path


def test_nothing_is_asked_of_a_network(gallery: Path, pages: dict[Path, Page]) -> None:
    for path in gallery.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'(src|<link[^>]*href)="https?:', text), path
    assert "http" not in (gallery / "assets/style.css").read_text() and "fetch(" not in (gallery / "assets/site.js").read_text()


def test_what_is_recorded_is_on_the_page(gallery: Path) -> None:
    text = (gallery / "papers/unet.html").read_text(encoding="utf-8")
    recorded = json.loads((Path("results") / "unet" / "usable.json").read_text())
    assert f"{recorded['value']:.3f}" in text and recorded["pack"] in text
    for arm in json.loads((Path("results") / "unet" / "claim.json").read_text())["arms"]:
        assert arm["name"] in text
    assert "class UNet" not in text and 'id="L-1"' in text  # in colours, not as plain text


def test_both_languages_are_complete(gallery: Path) -> None:
    for path in gallery.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert text.count('<span lang="en">') == text.count('<span lang="zh">') > 0, path
    text = (gallery / "papers/unet.html").read_text(encoding="utf-8")
    assert '<article lang="en">' in text and '<article lang="zh">' in text


def test_front_page_stays_small(gallery: Path) -> None:
    """300 kB for 160 papers."""
    text = (gallery / "index.html").read_text(encoding="utf-8")
    first = text.index("<li data-words")
    last = text.rindex("</li>")
    assert len(text[first:last].encode()) / len(CHOSEN) * 160 < 280_000


def test_both_languages_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = dataclasses.replace(papers.card("unet"), idea={"en": "It gains 12.5 points.", "zh": "提高 15.2 分。"})
    monkeypatch.setattr(papers, "cards", lambda: {"unet": card})
    with pytest.raises(InputError, match=r"unet.html: 12\.5, 15\.2 in one language"):
        site.build(tmp_path / "site")
    page = '<span lang="en">{}</span><span lang="zh">{}</span> <img alt="a" data-en-alt="a 7.5" data-zh-alt="{}">'
    languages.check(page.format("1.3 million in 64x128", "64×128，130 万", "七 7.5"), "page")
    for wrong in (("ten", "", "7.5"), ("1,024", "1024.5", "7.5"), ("same", "相同", "8.5")):
        with pytest.raises(InputError):
            languages.check(page.format(*wrong), "page")


def test_a_note_whose_picture_is_lost_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(papers.card("unet").folder, tmp_path / "unet", ignore=shutil.ignore_patterns("__pycache__"))
    card = dataclasses.replace(papers.card("unet"), folder=tmp_path / "unet")
    monkeypatch.setattr(papers, "cards", lambda: {"unet": card})
    (tmp_path / "unet/note.zh.md").write_text("# 题目\n\n![图](figures/lost.png)\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"note\.zh\.md shows figures/lost\.png"):
        site.build(tmp_path / "site")


def test_what_was_made_from_the_same_files_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = tmp_path / "results"
    shutil.copytree("results/unet", recorded / "unet")
    monkeypatch.setenv("PAPERWORKS_RESULTS", str(recorded))
    known = {"unet": papers.card("unet")}
    monkeypatch.setattr(papers, "cards", lambda: known)
    page = site.build(tmp_path / "site")
    page.write_text("kept")
    site.build(tmp_path / "site")
    assert page.read_text() == "kept"
    usable = json.loads((recorded / "unet/usable.json").read_text())
    (recorded / "unet/usable.json").write_text(json.dumps(usable | {"value": 0.5}))
    site.build(tmp_path / "site")
    assert "U-Net" in page.read_text(encoding="utf-8")
    page.write_text("cut short")
    (tmp_path / "site" / site.MARK).write_text("A gallery")  # what a build that was killed leaves
    site.build(tmp_path / "site")
    assert "U-Net" in page.read_text(encoding="utf-8")


def test_a_hundred_and_sixty_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, with all that a paper may have."""
    card, known = papers.card("unet"), {}
    picture = np.zeros((2 * site.SHEET_ROW, 60, 3), np.uint8)
    for number in range(160):
        name = f"paper{number}"
        for folder in ("papers", "results"):
            (tmp_path / folder / name).mkdir(parents=True)
        for file, text in (
            (f"{name}.py", "class Net:\n    pass\n"),
            ("claim.py", ""),
            ("note.md", "# T\n\n`Net`\n"),
            ("note.zh.md", "# 题\n\n`Net`\n"),
        ):
            (tmp_path / "papers" / name / file).write_text(text, encoding="utf-8")
        for level in ("builds", "oracle", "claim", "usable", "cost"):
            shutil.copy(f"results/unet/{level}.json", tmp_path / "results" / name)
        Image.fromarray(picture).save(tmp_path / "results" / name / "usable.png")
        known[name] = dataclasses.replace(
            card, id=name, name=f"Paper {number}", folder=tmp_path / "papers" / name, related={"built_on": ["paper0"]}
        )
    monkeypatch.setenv("PAPERWORKS_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(papers, "cards", lambda: known)
    front = site.build(tmp_path / "site")
    text = front.read_text(encoding="utf-8")
    assert text.count("<li data-words") == 160 and len(text.encode()) < 300_000
    for number in range(160):
        assert f'href="papers/paper{number}.html"' in text and (tmp_path / f"site/assets/paper{number}.webp").exists()
        page = (tmp_path / f"site/papers/paper{number}.html").read_text(encoding="utf-8")
        assert f"Paper {number} · paperworks" in page and 'href="#L-1"' in page
    assert (tmp_path / "site/evidence.html").read_text(encoding="utf-8").count("<tr>") == 161


def test_a_gallery_is_written_again_and_nothing_else(gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(papers, "cards", dict)
    site.build(gallery)
    (tmp_path / "holiday.jpg").write_text("x")
    with pytest.raises(InputError, match="no gallery; take another --out"):
        site.build(tmp_path)
