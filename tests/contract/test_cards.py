"""Every card is complete, in both languages, and says what the code says; every note is there."""

from __future__ import annotations

import re

import pytest

from paperworks import evidence, papers
from paperworks.study import audit

KINDS = {"architecture", "layer", "loss", "training-method", "inference-method", "metric", "tool", "survey", "system"}
LANGUAGES = ("en", "zh")
SHORTEST = {"note.md": 900, "note.zh.md": 350}
"""Characters of a note that says something."""
CHINESE = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.,])\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]*\d)|(?<![A-Za-z0-9_.])\d+(?:\.\d+)+")
"""Numbers that one gets wrong when one writes them twice: with a decimal point or thousands separators."""


def assert_text(where: str, text: dict[str, str]) -> None:
    for language in LANGUAGES:
        assert text.get(language, "").strip(), f"card.toml: {where}.{language} is empty"
    assert CHINESE.search(text["zh"]), f"card.toml: {where}.zh is not Chinese: {text['zh']}"
    assert not CHINESE.search(text["en"]), f"card.toml: {where}.en is not English: {text['en']}"


def test_facts(card):
    assert card.id == card.folder.name, f"card.toml: id is {card.id!r}, the folder is {card.folder.name!r}"
    for field in ("title", "authors", "venue"):
        assert getattr(card, field).strip(), f"card.toml: {field} is empty"
    assert 1940 < card.year < 2100, f"card.toml: year is {card.year}"
    assert card.kind in KINDS, f"card.toml: kind {card.kind!r} is not one of {sorted(KINDS)}"
    assert not card.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}", card.arxiv), (
        f"card.toml: arxiv {card.arxiv!r} is no arXiv number"
    )
    assert card.ndim and set(card.ndim) <= {2, 3}, f"card.toml: ndim is {card.ndim}"


def test_texts(card):
    for where in ("idea", "claim", "headline"):
        assert_text(where, dict(getattr(card, where)))
    for name, variant in card.variants.items():
        assert_text(f"variants.{name}.about", variant.get("about", {}))
    for offers in ("methods", "explainers", "acquirers", "layers"):
        for name, offer in getattr(card, offers).items():
            assert_text(f"{offers}.{name}.about", offer.get("about", {}))


def test_links_and_licences(card):
    assert card.links.get("paper", "").startswith("https://"), "card.toml: links.paper is no https address"
    for name, link in card.links.items():
        assert not link or link.startswith("https://"), f"card.toml: links.{name} is no https address: {link}"
    for what in ("code", "official", "weights"):
        assert what in card.licence, f"card.toml: licence.{what} is empty; write `none` where there is nothing to license"
    for what, said in card.licence.items():
        assert said["en"].strip() and said["zh"].strip(), f"card.toml: licence.{what} says nothing"
        if re.search("[a-z]{4,} [a-z]+", said["en"]):  # more than a licence's name
            assert_text(f"licence.{what}", dict(said))


def test_verdict_override_has_a_reason(card):
    if card.verdict_override:
        assert card.verdict_override["verdict"] in ("deployable", "buildable", "watch")
        assert card.verdict_override.get("reason", "").strip(), "card.toml: verdict_override.reason is empty"


def note(card: papers.Card, name: str) -> str:
    path = card.folder / name
    assert path.is_file(), f"{path} is missing"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHORTEST)
def test_note(card, name):
    text = note(card, name)
    assert len(text) >= SHORTEST[name], f"{name} has {len(text)} characters; a note that says something has {SHORTEST[name]} or more"
    assert bool(CHINESE.search(text)) == (name == "note.zh.md"), f"{name} is in the other language"


def test_notes_mention_the_same_numbers(card):
    english, chinese = (numbers(note(card, name)) for name in SHORTEST)
    assert english == chinese, (
        f"numbers in note.md only: {sorted(english - chinese) or 'none'}; in note.zh.md only: {sorted(chinese - english) or 'none'}"
    )


def numbers(text: str) -> set[str]:
    return set(NUMBER.findall(text.replace("{,}", ",")))


def test_numbers_are_found():
    text = "31,030,658 weights; $0.92$, 7.8{,}5 no, $1{,}024.5$; widths=16,32,64,128,256; v1.2.3; smp 0.5.0。IoU为0.77，第3节 and 572x572."
    assert numbers(text) == {"31,030,658", "0.92", "7.8", "1,024.5", "0.5.0", "0.77"}


def test_code_agrees(card):
    for offers in ("methods", "explainers", "acquirers", "layers"):
        if named := getattr(card, offers):
            assert set(named) == set(getattr(papers.module(card.id), offers.upper())), f"card.toml and {offers.upper()} differ"
    if card.variants:
        paper = papers.paper(card.id)
        assert set(card.variants) == set(paper.variants), "card.toml and VARIANTS differ"
        assert "test" in paper.variants, "VARIANTS has no `test`"
        assert paper.auto and set(paper.auto) <= set(paper.variants) - {"test"}, f"auto = {paper.auto} must name variants, and not `test`"


def test_builds(card):
    """The audit's own check of level 1."""
    if card.variants:
        counts, problems = audit.check_builds(card.id)
        assert not problems, "; ".join(problems)
        assert 0 < counts["test"] < 100_000, f"the test variant has {counts['test']:,} parameters; a few thousand keep the tests fast"
        assert counts["test"] <= min(counts.values())


def test_related_papers_are_named_as_here(card):
    for relation, names in card.related.items():
        assert isinstance(names, list), f"card.toml: related.{relation} is no list"
        assert card.id not in names, f"card.toml: related.{relation} names the paper itself"


def test_recorded_evidence_is_of_this_paper(card):
    for level in ("builds", "oracle", "claim", "usable", "cost"):
        content = evidence.read(card.id, level)
        assert content is None or content["paper"] == card.id, f"results/{card.id}/{level}.json is of {content['paper']}"
