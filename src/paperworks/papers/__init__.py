"""The registry: papers are reached by name, and their cards are read without importing torch."""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks.errors import InputError

if TYPE_CHECKING:
    from paperworks.tasks.acquire import Acquirer
    from paperworks.tasks.base import Layer, Method, Paper
    from paperworks.tasks.claim import Claim
    from paperworks.tasks.explain import Explainer

ROOT = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of a paper, from ``card.toml``. Texts for people are ``{"en": ..., "zh": ...}``."""

    id: str
    section: str
    folder: Path
    title: str
    authors: str
    year: int
    venue: str
    task: str
    kind: str
    idea: Mapping[str, str]
    claim: Mapping[str, str]
    name: str = ""
    """What people call it; default: the title up to its colon."""
    arxiv: str = ""
    pack: str = ""
    """The data on which the paper shows that it is usable; default: its task's."""
    shown_with: str = ""
    """The paper on whose trained network a paper without a network of its own shows that it is usable."""
    ndim: tuple[int, ...] = (2,)
    links: Mapping[str, str] = field(default_factory=dict)
    licence: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    headline: Mapping[str, str] = field(default_factory=dict)
    """What the paper reports."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """name -> params (counted with ``channels`` and ``classes``), ndim, about."""
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Inference methods that the paper's module offers to ``predict --with``."""
    explainers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Ways to show why a network answered as it did that the paper's module offers to ``explain --with``."""
    acquirers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Ways to choose images to label that the paper's module offers to ``acquire --with``."""
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Parts for networks of other papers that the paper's module offers to ``--set SLOT=NAME``; ``slot`` says where they go."""
    related: Mapping[str, Any] = field(default_factory=dict)
    verdict_override: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def cards() -> dict[str, Card]:
    """Every card of the archive, by id, in the order of section and year."""
    found = [_read(path) for path in ROOT.glob("*/*/card.toml")]
    return {card.id: card for card in sorted(found, key=lambda c: (c.section, c.year, c.id))}


def card(name: str) -> Card:
    """The card of a paper.

    Raises:
        InputError: there is no paper of that name.
    """
    known = cards()
    if name not in known:
        near = get_close_matches(name, known, 3)
        raise InputError(
            f"no paper is called {name!r}; {'did you mean ' + ' or '.join(near) if near else '`paperworks list` names them all'}"
        )
    return known[name]


def module(name: str) -> Any:
    """The paper's module, imported now."""
    entry = card(name)
    return importlib.import_module(f"paperworks.papers.{entry.section}.{name}.{name}")


def paper(name: str) -> Paper:
    """What the paper hands to the archive."""
    return module(name).PAPER


def claim(name: str) -> Claim:
    """The paper's claim as an experiment."""
    entry = card(name)
    return importlib.import_module(f"paperworks.papers.{entry.section}.{name}.claim").CLAIM


def method(name: str) -> Method:
    """An inference method, whichever paper offers it.

    Raises:
        InputError: no paper offers a method of that name.
    """
    offers = {m: entry.id for entry in cards().values() for m in entry.methods}
    if name not in offers:
        raise InputError(f"no inference method is called {name!r}; there are: {', '.join(sorted(offers)) or 'none'}")
    return module(offers[name]).METHODS[name]


def explainers(task: str) -> dict[str, str]:
    """Ways to explain the answers of a task's networks, and the paper that offers each."""
    return {name: entry.id for entry in cards().values() if entry.task == task for name in entry.explainers}


def explainer(task: str, name: str) -> Explainer:
    """A way to explain answers, whichever paper offers it.

    Raises:
        InputError: no paper offers one of that name for the task.
    """
    offers = explainers(task)
    if name not in offers:
        raise InputError(f"nothing that explains {task} is called {name!r}; there are: {', '.join(offers) or 'none'}")
    return module(offers[name]).EXPLAINERS[name]


def acquirers() -> dict[str, str]:
    """Ways to choose images to label, and the paper that offers each."""
    return {name: entry.id for entry in cards().values() for name in entry.acquirers}


def acquirer(name: str) -> Acquirer:
    """A way to choose images to label, whichever paper offers it.

    Raises:
        InputError: no paper offers one of that name.
    """
    offers = acquirers()
    if name not in offers:
        raise InputError(f"nothing that chooses images to label is called {name!r}; there are: {', '.join(sorted(offers)) or 'none'}")
    return module(offers[name]).ACQUIRERS[name]


def slots() -> dict[str, dict[str, str]]:
    """Slot -> the layers that go there, and the paper that offers each."""
    found: dict[str, dict[str, str]] = {}
    for entry in cards().values():
        for name, offer in entry.layers.items():
            found.setdefault(offer["slot"], {})[name] = entry.id
    return found


def layer(slot: str, name: str) -> Layer:
    """A layer for a slot, whichever paper offers it.

    Raises:
        InputError: no paper offers one of that name for that slot.
    """
    offers = slots().get(slot, {})
    if name not in offers:
        raise InputError(f"no layer for {slot} is called {name!r}; there are: {', '.join(sorted(offers)) or 'none'}")
    return module(offers[name]).LAYERS[name]


def _read(path: Path) -> Card:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    data["ndim"] = tuple(data.get("ndim", (2,)))
    data.setdefault("name", data["title"].split(":")[0])
    return Card(section=path.parent.parent.name, folder=path.parent, **data)
