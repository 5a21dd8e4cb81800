"""Evidence is tied to what the code does, not to how it is laid out or explained."""

from __future__ import annotations

import json
from datetime import date

import pytest

from paperworks import evidence

CODE = '''
"""What it is."""
import math


def area(radius, *, scale=1.0):
    """Of a disc."""
    # pi r^2
    return math.pi * radius**2 * scale


class Disc:
    """Round."""

    radius: float = 2.0
    """In pixels."""
'''


def digest(tmp_path, text: str, name: str = "a.py") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return evidence.code_hash(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# pi r^2", "# the area of a disc"),
        ("    # pi r^2\n", ""),
        ('"""Of a disc."""', '"""Of a disc,\n    in square pixels."""'),
        ('"""In pixels."""', '"""Of the image."""'),
        ("(radius, *, scale=1.0)", "(\n    radius,\n    *,\n    scale=1.0,\n)"),
        ("math.pi * radius**2 * scale", "math.pi  *  radius ** 2 * scale"),
        ("\n\nclass", "\n\n\n\nclass"),
    ],
)
def test_words_and_layout_do_not_count(tmp_path, old, new):
    assert old in CODE
    assert digest(tmp_path, CODE.replace(old, new)) == digest(tmp_path, CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("radius**2", "radius**3"),
        ("scale=1.0", "scale=2.0"),
        ("2.0\n", "2.5\n"),
        ("import math", "import cmath as math"),
        ("return", "yield"),
        ("class Disc:", "class Ring:"),
        ("    return math", "    if radius:\n        return math"),
        ("math.pi * radius**2 * scale", '"a string that is a value"'),
    ],
)
def test_code_counts(tmp_path, old, new):
    assert old in CODE
    assert digest(tmp_path, CODE.replace(old, new)) != digest(tmp_path, CODE)


def test_blocks_count(tmp_path):
    inside = "def f(x):\n    if x:\n        x = 1\n        x = 2\n"
    assert digest(tmp_path, inside) != digest(tmp_path, inside.replace("        x = 2", "    x = 2"))


def test_strings_that_are_values_count(tmp_path):
    assert digest(tmp_path, "x = 'a'\n") != digest(tmp_path, "x = 'b'\n")


def test_a_tuple_of_one_is_no_number(tmp_path):
    assert digest(tmp_path, "x = (1,)\n") != digest(tmp_path, "x = (1)\n")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in which a paper imports a shared part, which imports another, and one paper another paper."""
    monkeypatch.setattr(evidence, "PACKAGE", tmp_path)
    files = {
        "nn/conv.py": "from paperworks.nn.pad import pad\nkernel = 3\n",
        "nn/pad.py": "pad = 1\n",
        "nn/idle.py": "idle = 1\n",
        "train/engine.py": "steps = 1\n",
        "papers/s/base/base.py": "width = 1\n",
        "papers/s/one/one.py": (
            "from paperworks.nn.conv import kernel\nfrom paperworks.papers.s.base.base import width\nfrom paperworks.train.engine import steps\n"
        ),
        "papers/s/two/two.py": "from paperworks.nn import conv\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("nn/conv.py", True, True),
        ("nn/pad.py", True, True),
        ("nn/idle.py", False, False),
        ("papers/s/base/base.py", True, False),
        ("papers/s/one/one.py", True, False),
        ("train/engine.py", False, False),
    ],
)
def test_parts_that_are_imported_count(package, name, one, two):
    files = [package / "papers/s/one/one.py", package / "papers/s/two/two.py"]
    before = [evidence.code_hash(f) for f in files]
    changed = package / name
    changed.write_text(changed.read_text() + "more = 1\n")
    assert [evidence.code_hash(f) != b for f, b in zip(files, before)] == [one, two]


def test_order_of_files_does_not_count(package):
    one, two = package / "papers/s/one/one.py", package / "papers/s/two/two.py"
    assert evidence.code_hash(one, two) == evidence.code_hash(two, one) != evidence.code_hash(one)


def test_evidence_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_RESULTS", str(tmp_path / "results"))
    assert evidence.results_root() == tmp_path / "results"
    assert evidence.read("some_paper", "claim") is None
    path = evidence.record("some_paper", "claim", "abc123", {"held": True, "rule": "规则"})
    assert path == tmp_path / "results" / "some_paper" / "claim.json"
    assert evidence.read("some_paper", "claim") == {
        "paper": "some_paper",
        "code": "abc123",
        "date": date.today().isoformat(),
        "held": True,
        "rule": "规则",
    }
    assert [p.name for p in path.parent.iterdir()] == ["claim.json"]
    evidence.record("some_paper", "claim", "abc124", {"held": False})
    assert json.loads(path.read_text())["code"] == "abc124"


def test_results_lie_in_the_checkout_or_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERWORKS_RESULTS", raising=False)
    monkeypatch.setattr(evidence, "PACKAGE", tmp_path / "src" / "paperworks")
    assert str(evidence.results_root()) == "results"
    (tmp_path / "pyproject.toml").touch()
    assert evidence.results_root() == tmp_path / "results"
