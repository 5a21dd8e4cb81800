"""Papers by name, and how little it takes to list them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import paperworks
from paperworks import papers
from paperworks.errors import InputError


def test_unknown_name_suggests_near_ones():
    known = next(iter(papers.cards()))
    with pytest.raises(InputError, match=f"{known}x.*did you mean.*{known}"):
        papers.card(f"{known}x")


def test_unknown_name_that_is_near_nothing_points_to_the_list():
    with pytest.raises(InputError, match="'qqqqqq'; `paperworks list`"):
        papers.card("qqqqqq")


@pytest.mark.parametrize("reach", [papers.module, papers.paper, papers.claim])
def test_every_way_in_refuses_unknown_names(reach):
    with pytest.raises(InputError, match="no paper is called"):
        reach("qqqqqq")


def test_cards_are_read_once_and_lie_where_they_say():
    assert papers.cards() is papers.cards()
    for name, card in papers.cards().items():
        assert papers.card(name) is card
        assert card.folder == papers.ROOT / card.section / name


def test_cards_come_in_the_order_of_section_and_year():
    cards = list(papers.cards().values())
    assert cards == sorted(cards, key=lambda c: (c.section, c.year))


def test_unknown_method_names_those_there_are():
    offers = sorted(m for card in papers.cards().values() for m in card.methods)
    with pytest.raises(InputError, match=", ".join(offers) or "none"):
        papers.method("qqqqqq")


def test_methods_are_found_by_name():
    for card in papers.cards().values():
        for name in card.methods:
            assert papers.method(name) is papers.module(card.id).METHODS[name]


def test_listing_papers_imports_nothing_heavy():
    heavy = ("torch", "torchvision", "lightning", "numpy", "matplotlib", "scipy")
    code = (
        "import sys, paperworks.papers, paperworks.cli.commands; assert paperworks.papers.cards();"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_face():
    assert paperworks.list is papers.cards and paperworks.card is papers.card
    assert set(paperworks._API) <= set(dir(paperworks))
    with pytest.raises(AttributeError, match="qqqqqq"):
        _ = paperworks.qqqqqq
