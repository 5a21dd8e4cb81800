"""The site in a real browser: found by typing, read in both languages, code and note lead to each other, nothing bars anybody's way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from paperworks import evidence, papers
from paperworks.gallery import notes, site
from paperworks.study.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")

CHOSEN = ("unet", "vae")
PATIENCE = 120_000
"""Milliseconds that a step may take on a machine with other work."""
NOTES = """\
# 组会 2024

## U-Net 论文笔记

### 思路

镜像外推 mirrored border $x^2$，| 见图 ![结构](none.png)

| 模型 | Dice |
|---|---|
| 基线 | 0.9 |

## Segment Anything in High Quality (CVPR 2023)

提示分割

## Semantic Human Matting

抠图，比 U-Net 细
"""
PAGES = (
    "index.html",
    "tasks.html",
    "evidence.html",
    "papers/unet.html",
    "tasks/segmentation.html",
    "comparisons/cardiac_mr.html",
    "notes.html",
    "report.html",
)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of two papers, and beside it a claim's report."""
    known = {name: papers.card(name) for name in CHOSEN}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(papers, "cards", lambda: known)
        week = tmp_path_factory.mktemp("notes") / "week.md"
        week.write_text(NOTES, encoding="utf-8")
        out = site.build(tmp_path_factory.mktemp("browser") / "gallery", notes=notes.read([week])).parent
    write_report({"kind": "claim", "title": "U-Net"} | (evidence.read("unet", "claim") or {}), out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield started
        started.close()


@pytest.fixture
def show(browser: Browser, gallery: Path) -> Iterator[Any]:
    """Opens a page of the site; English, light and wide where nothing else is said."""
    contexts = []

    def opened(name: str, language: str = "en-GB", scheme: Any = "light", width: int = 1300) -> Page:
        contexts.append(browser.new_context(locale=language, color_scheme=scheme, viewport={"width": width, "height": 850}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.goto((gallery / name).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("language", "scheme", "width"), [("en-GB", "light", 1300), ("zh-CN", "dark", 390)])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_bars_the_way(show: Any, name: str, language: str, scheme: str, width: int) -> None:
    """axe finds no violation, and a phone need not scroll sideways."""
    page = show(name, language, scheme, width)
    alike = [[".source .line:nth-child(n+40)"]]  # lines of code, in which it would spend most of its time
    found = Axe().run(page, context={"include": [["html"]], "exclude": alike}, options={"resultTypes": ["violations"]})
    assert not found.response["violations"], found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_paper_is_found_and_opened(show: Any) -> None:
    page = show("index.html")
    wall = page.locator(".wall li:visible")
    assert wall.count() == len(CHOSEN)
    page.get_by_label("Search").fill("kingma 2014")
    expect(page.locator("#count")).to_have_text("1")
    expect(wall).to_have_count(1)
    page.reload()  # what was asked for stands in the address
    expect(wall).to_have_count(1)
    page.get_by_label("Search").fill("分割")  # Chinese is found on the English page too
    expect(wall.locator("b")).to_have_text("U-Net")
    page.get_by_label("Search").fill("镜像外推")  # only the group says so
    expect(wall.locator("b")).to_have_text("U-Net")
    page.get_by_label("Search").fill("no such words")
    expect(page.locator("#none")).to_be_visible()
    page.get_by_label("Search").fill("")
    page.get_by_label("Task").select_option("segmentation")
    wall.get_by_role("link").press("Enter")
    expect(page.locator("h1")).to_have_text(papers.card("unet").title)


@pytest.mark.parametrize("name", [name for name in PAGES if name != "index.html"])
def test_language_is_switched_in_place(show: Any, name: str) -> None:
    page = show(name)
    english, title = page.locator("main").inner_text(), page.title()
    page.locator("button.language").click()
    assert page.locator("html").get_attribute("lang") == "zh"
    chinese = page.locator("main").inner_text()
    hidden = page.locator('main [lang="en"]')
    assert hidden.count() and not any(e.is_visible() for e in hidden.all()[:20])
    assert any("\u4e00" <= c <= "\u9fff" for c in chinese) and chinese != english
    assert page.title() != title or name == "papers/unet.html"  # the name of a paper is the same in both
    page.reload()
    assert page.locator("html").get_attribute("lang") == "zh", "forgotten"
    page.locator("button.language").click()
    assert page.locator("main").inner_text() == english


def test_note_and_code_lead_to_each_other(show: Any) -> None:
    page = show("papers/unet.html")
    name = page.locator('article[lang="en"] a.to-code').first
    line = str(name.get_attribute("href"))
    name.click()
    page.wait_for_function("hash => location.hash === hash", arg=line)
    expect(page.locator(line)).to_be_in_viewport()
    back = page.locator('.source a.back[lang="en"]').first
    part = str(back.get_attribute("href"))
    back.click()
    page.wait_for_function("hash => location.hash === hash", arg=part)
    expect(page.locator(f'article[lang="en"] {part}')).to_be_in_viewport()


def test_keys_alone_lead_through(show: Any) -> None:
    page = show("tasks/segmentation.html")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.wait_for_function("hash => location.hash === hash", arg="#main")
    head = page.locator("th button").nth(4)
    head.press("Enter")
    assert page.locator("th").nth(4).get_attribute("aria-sort") in ("ascending", "descending")
