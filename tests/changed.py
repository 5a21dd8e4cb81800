"""Print the test paths that belong to what changed since the last commit (or since the revision given), for ``make quick``.

A paper's files bring its own test and the contract tests; a floor's files the tests of that floor; a shared part (``nn``, ``tasks/base.py``) all papers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent


def changed(since: str) -> list[str]:
    """Paths that differ from a revision, new files included."""
    ask = [["git", "diff", "--name-only", since], ["git", "ls-files", "--others", "--exclude-standard"]]
    return [
        line
        for command in ask
        for line in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    ]


def tests_for(path: str) -> set[str]:
    """Tests that could notice a change of one file."""
    match PurePosixPath(path).parts:
        case ("src", "paperworks", "papers", section, name, *_):
            return {f"tests/papers/{section}/test_{name}.py", "tests/contract"}
        case ("src", "paperworks", "nn", *_) | ("src", "paperworks", "tasks", "base.py" | "segmentation.py"):
            return {"tests/papers", "tests/contract", "tests/tasks"}
        case ("src", "paperworks", floor, *rest) if rest:
            return {f"tests/{floor}", "tests/cli"}
        case ("src", "paperworks", _):
            return {"tests/test_evidence.py", "tests/test_registry.py", "tests/cli"}
        case ("tests", *rest) if path.endswith(".py") and rest[-1].startswith("test_"):
            return {path}
        case ("results" | "docs", *_) | ("README.md" | "README.zh.md",):
            return {"tests/test_readme.py"}
        case _:
            return set()


def main() -> None:
    """Print the paths that exist; the registry's test when nothing changed."""
    since = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    found = {test for path in changed(since) for test in tests_for(path) if (ROOT / test).exists()}
    print("\n".join(sorted(found)) or "tests/test_registry.py")


if __name__ == "__main__":
    main()
