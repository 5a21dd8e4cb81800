"""``paperworks new``: what it makes, what it refuses, and that the new paper's tests fail with sentences, then pass."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from paperworks import papers
from paperworks.errors import InputError
from paperworks.study.new import make_paper

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty archive."""
    (tmp_path / "tests" / "papers").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    root = tmp_path / "src" / "paperworks" / "papers"
    root.mkdir(parents=True)
    monkeypatch.setattr(papers, "ROOT", root)
    papers.cards.cache_clear()
    yield tmp_path
    papers.cards.cache_clear()


def test_makes_every_file(checkout):
    made = [path.relative_to(checkout).as_posix() for path in make_paper("my_paper2", "segmentation", "segmentation")]
    folder = "src/paperworks/papers/segmentation"
    assert set(made) == {
        f"{folder}/__init__.py",
        *(f"{folder}/my_paper2/{name}" for name in ("__init__.py", "card.toml", "note.md", "note.zh.md", "my_paper2.py", "claim.py")),
        "tests/papers/segmentation/test_my_paper2.py",
    }
    assert {p.relative_to(checkout).as_posix() for p in checkout.rglob("*") if p.is_file()} == {"pyproject.toml", *made}
    card = papers.card("my_paper2")
    assert (card.section, card.task, card.title) == ("segmentation", "segmentation", "")
    for path in made:
        text = (checkout / path).read_text()
        assert "$" not in text
        if path.endswith(".py"):
            compile(text, path, "exec")


def test_a_section_is_begun_once(checkout):
    make_paper("first", "segmentation", "new_section")
    begun = checkout / "src/paperworks/papers/new_section/__init__.py"
    begun.write_text('"""Mine."""\n')
    assert begun not in make_paper("second", "segmentation", "new_section")
    assert begun.read_text() == '"""Mine."""\n'
    assert {"first", "second"} <= set(papers.cards())


@pytest.mark.parametrize("id", ["", "Unet", "2net", "my-paper", "a b", "../up", "a/b", "lambda", "ünet"])
def test_bad_ids(checkout, id):
    with pytest.raises(InputError, match=f"{re.escape(repr(id))} cannot be the id of a paper"):
        make_paper(id, "segmentation", "segmentation")
    with pytest.raises(InputError, match="cannot be the section"):
        make_paper("fine", "segmentation", id)
    assert not any(papers.ROOT.iterdir())


def test_unknown_task(checkout):
    with pytest.raises(InputError, match=r"no task is called 'cooking'; there are: .*segmentation"):
        make_paper("my_paper", "cooking", "segmentation")


def test_taken_ids(checkout):
    make_paper("my_paper", "segmentation", "segmentation")
    for section in ("segmentation", "other"):
        with pytest.raises(InputError, match=r"segmentation/my_paper exists"):
            make_paper("my_paper", "segmentation", section)
    test = checkout / "tests/papers/segmentation/test_another.py"
    test.touch()
    with pytest.raises(InputError, match=r"test_another\.py exists"):
        make_paper("another", "segmentation", "segmentation")
    assert not (papers.ROOT / "segmentation" / "another").exists()


def test_outside_a_checkout(checkout):
    (checkout / "pyproject.toml").unlink()
    with pytest.raises(InputError, match="not in a checkout"):
        make_paper("my_paper", "segmentation", "segmentation")


# The way of a new paper, in a copy of the repository

NETWORK = """
    def __init__(self, channels: int, classes: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, config.width, 3, padding=1), nn.ReLU(), nn.Conv2d(config.width, classes, 3, padding=1)
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        return {"logits": self.layers(image)}
"""
CARD = {
    'title = ""': 'title = "A Title"',
    'authors = ""': 'authors = "A. Author"',
    "year = 0": "year = 2020",
    'venue = ""': 'venue = "CVPR"',
    'paper = ""': 'paper = "https://example.org/paper"',
    'official = { en = "", zh = "" }\nweights = { en = "", zh = "" }': 'official = { en = "none", zh = "无" }\nweights = { en = "none", zh = "无" }',
    '\nen = ""': '\nen = "In English."',
    '\nzh = ""': '\nzh = "用中文。"',
    'en = "", zh = ""': 'en = "In English.", zh = "用中文。"',
}


@pytest.fixture
def copy(tmp_path):
    """The sources and the contract tests, with one new paper and no other."""
    ignore = shutil.ignore_patterns("__pycache__", "segmentation")
    shutil.copytree(ROOT / "src" / "paperworks", tmp_path / "src" / "paperworks", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "contract", tmp_path / "tests" / "contract", ignore=ignore)
    (tmp_path / "packs" / "cardiac_mr").mkdir(parents=True)
    (tmp_path / "packs" / "cardiac_mr" / "README.md").touch()
    for name in ("pyproject.toml", "tests/conftest.py", "tests/typechecker.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "papers").mkdir()
    done = run(tmp_path, "paperworks.cli", "new", "my_paper", "--task", "segmentation")
    assert done.returncode == 0, done.stderr
    return tmp_path


def run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import paperworks.cli, sys; sys.exit(paperworks.cli.main(sys.argv[1:]))"
    start = ["-c", code] if module == "paperworks.cli" else ["-m", module]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PAPERWORKS_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
    )


def contract(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = [f"tests/contract/test_{name}.py" for name in ("cards", "papers", "golden", "claims")]
    return run(folder, "pytest", *files, "tests/papers", "-k", "my_paper", "--tb=line", "-p", "no:cacheprovider", *arguments)


@pytest.mark.slow
def test_the_way_of_a_new_paper(copy):
    empty = contract(copy)
    assert empty.returncode == 1, "the tests of an empty paper are collected and fail" + empty.stdout + empty.stderr
    assert " error" not in empty.stdout.splitlines()[-1]
    for sentence in (
        "card.toml: title is empty",
        "card.toml: idea.en is empty",
        "card.toml: links.paper is no https address",
        "note.zh.md has",
        "my_paper: the network is not written yet; write it in src/paperworks/papers/segmentation/my_paper/my_paper.py",
        "my_paper: the rule is not written yet; write it in src/paperworks/papers/segmentation/my_paper/claim.py",
        "claim.py: the rule in English is empty",
        "copy random weights into a peer",
    ):
        assert sentence in empty.stdout, sentence

    write(copy / "src/paperworks/papers/segmentation/my_paper")
    (copy / "tests/papers/segmentation/test_my_paper.py").write_text("def test_something():\n    assert True\n")
    unrecorded = contract(copy)
    assert set(re.findall(r"FAILED (\S+)", unrecorded.stdout)) == {
        f"tests/contract/test_golden.py::test_{name}[my_paper]" for name in ("outputs", "loss_curve")
    }, unrecorded.stdout
    assert "record with: pytest tests/contract/test_golden.py -k my_paper --record" in unrecorded.stdout

    golden_tests = ("pytest", "tests/contract/test_golden.py", "-k", "my_paper", "--tb=line", "-p", "no:cacheprovider")
    recorded = run(copy, *golden_tests, "--record")
    assert recorded.returncode == 0, recorded.stdout
    golden = copy / "tests/golden/my_paper.json"
    assert set(json.loads(golden.read_text())) == {"outputs", "losses"}

    module = copy / "src/paperworks/papers/segmentation/my_paper/my_paper.py"
    module.write_text(module.read_text().replace("nn.ReLU()", "nn.ReLU6()").replace("return Recipe()", "return Recipe(lr=1.2e-3)"))
    moved = run(copy, *golden_tests)
    assert "losses moved by" in moved.stdout, moved.stdout


def write(folder: Path) -> None:
    """Fill the new paper's files as a person would."""
    text = (folder / "card.toml").read_text()
    for old, new in CARD.items():
        assert old in text
        text = text.replace(old, new)
    parameters = {name: 9 * width + width + 2 * 9 * width + 2 for name, width in (("small", 16), ("test", 4))}
    for count in parameters.values():
        text = text.replace("params = 0", f"params = {count}", 1)
    tomllib.loads(text)
    (folder / "card.toml").write_text(text)
    (folder / "note.md").write_text("It has 0.95 of what others have. " * 40)
    (folder / "note.zh.md").write_text("它达到别人的 0.95。" * 40)
    code = (folder / "my_paper.py").read_text()
    start, end = code.index("\n    def __init__"), code.index("\n\nVARIANTS")
    (folder / "my_paper.py").write_text(code[:start] + NETWORK + code[end:])
    claim = (folder / "claim.py").read_text()
    claim = claim.replace('rule=("", "")', 'rule=("Dice is higher.", "Dice 更高。")')
    claim = re.sub(r"raise InputError\(.*the rule.*\)", 'return sum(results["idea"]["dice"]) > sum(results["without"]["dice"])', claim)
    (folder / "claim.py").write_text(claim)
