"""What README and docs promise is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from paperworks.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "src").rglob("note*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = {
        line.split("#")[0].strip() for block in blocks for line in re.findall(r"^(?:\$ )?(paperworks [a-z]+ .*)$", block, re.MULTILINE)
    }
    for line in lines:
        command, options = line.split()[1], re.findall(r"(?<!\S)--[a-z0-9-]+", line)
        assert main([command, "--help"]) == 0, line
        described = capsys.readouterr().out
        for option in options:
            assert option in described, f"{line}: {command} has no {option}"


BLOCKS = {
    block: page for page in reversed(PAGES) for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
}
"""The blocks of both languages are the same mostly; each is run once."""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: str(BLOCKS[b].relative_to(ROOT)))
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_tables_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "tables.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readmes_say_the_same() -> None:
    """Every command and number of one stands in the other."""
    texts = [(ROOT / name).read_text(encoding="utf-8").split("<!--")[0] for name in ("README.md", "README.zh.md")]
    commands = [set(re.findall(r"^(?:paperworks|make) \S.*?(?= {2,}#|$)", text, re.MULTILINE)) for text in texts]
    assert commands[0] == commands[1] and len(commands[0]) >= 8
