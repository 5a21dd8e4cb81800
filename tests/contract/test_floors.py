"""The house: an import never goes up, and no module outside papers/ names a paper."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from paperworks import papers

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "paperworks"
ORDINARY = {"slab", "cost"}
"""Ids and methods that are words of everyday code; of these only imports count. A paper with such a name adds it here."""


def test_import_linter(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True) == 0, capsys.readouterr().out


def test_every_section_is_behind_the_registry():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    forbidden = {module for contract in contracts if contract["type"] == "forbidden" for module in contract["forbidden_modules"]}
    sections = {f"paperworks.papers.{path.parent.parent.name}" for path in SOURCE.glob("papers/*/*/card.toml")}
    assert sections <= forbidden, f"pyproject.toml, [tool.importlinter]: add {sorted(sections - forbidden)} to forbidden_modules"


def test_no_module_outside_papers_names_a_paper():
    names = {name for card in papers.cards().values() for name in (card.id, *card.methods, *card.explainers, *card.acquirers)} - ORDINARY
    assert names
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in sorted(SOURCE.rglob("*.py"))
        if "papers" not in path.relative_to(SOURCE).parts[:1]
        for line, word in words(path.read_text(encoding="utf-8"))
        if word in names
    ]
    assert not found, "papers are reached through the registry, by the name that a person gives:\n" + "\n".join(found)


def words(source: str) -> Iterator[tuple[int, str]]:
    """Names in the code and the words of its strings, with their lines.

    Sentences (strings with a space: docstrings, help, messages) are for people and may give examples.
    """
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Constant(value=str(text)) if " " not in text.strip():
                yield from ((line, word) for word in re.findall(r"\w+", text))
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Attribute(attr=name):
                yield line, name
            case ast.alias(name=name):
                yield from ((line, word) for word in name.split("."))
            case ast.ImportFrom(module=str(module)):
                yield from ((line, word) for word in module.split("."))


@pytest.mark.parametrize(
    "code",
    [
        "x = 'abc'",
        "from paperworks.papers.s.abc import abc",
        "import paperworks.papers.s.abc",
        "f('abc,other')",
        "abc = 1",
        "y.abc",
        "def f(abc): ...",
    ],
)
def test_a_name_is_noticed(code):
    assert "abc" in {word for _, word in words(code)}


def test_examples_for_people_may_name_a_paper():
    assert "abc" not in {word for _, word in words('def f():\n    """Example: paperworks train abc"""\n    g(help="as in train abc DATA")')}
