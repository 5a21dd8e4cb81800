"""A folder for a new paper. Nothing in it pretends: its tests fail, each with a sentence that says what is to be written."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from paperworks import papers, tasks
from paperworks.errors import InputError
from paperworks.files import atomic

TEMPLATES = Path(__file__).parent / "templates" / "paper"


def make_paper(id: str, task: str, section: str) -> list[Path]:
    """Make the files of a paper from templates and return their paths.

    Args:
        id: its name everywhere: folder, module, commands. Lower case letters, digits, underscores.
        task: whose contract it keeps.
        section: of the archive; a new one is begun.

    Raises:
        InputError: the id or section is no such name or taken, there is no such task, or this is no checkout of the repository.
    """
    for what, name in (("id", id), ("section", section)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
            raise InputError(f"{name!r} cannot be the {what} of a paper: take lower case letters, digits and underscores, a letter first")
    kind = tasks.task(task)
    root = papers.ROOT.parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / "tests" / "papers").is_dir():
        raise InputError(f"{papers.ROOT} is not in a checkout of the repository; clone it, `make install`, and run `paperworks new` there")
    folder = papers.ROOT / section / id
    test = root / "tests" / "papers" / section / f"test_{id}.py"
    for path in (*papers.ROOT.glob(f"*/{id}"), test):
        if path.exists():
            raise InputError(f"{path} exists; take another id, or remove it")

    files = {folder / template.name.replace("ID", id): template for template in sorted(TEMPLATES.iterdir())}
    files = {test if path.name == f"test_{id}.py.txt" else path.with_suffix(""): template for path, template in files.items()}
    facts = {
        "id": id,
        "task": task,
        "section": section,
        "folder": folder.relative_to(root).as_posix(),
        "pack": kind.pack,
        "metric": kind.metric,
    }
    texts = {path: Template(template.read_text(encoding="utf-8")).substitute(facts) for path, template in files.items()}
    if not (beginning := folder.parent / "__init__.py").exists():
        texts = {beginning: f'"""{section.replace("_", " ").capitalize()} papers."""\n', **texts}
    for path, text in texts.items():
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    papers.cards.cache_clear()
    return list(texts)
