"""Fixtures for all tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paperworks import evidence as store
from paperworks import papers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", action="store_true", help="write what the tests of faithfulness measure to results/, and new golden numbers"
    )


class Evidence:
    """Collects what one paper's test module proves; written to results/<id>/oracle.json when all of it passed and --record is given."""

    def __init__(self) -> None:
        self.against: list[dict[str, object]] = []
        self.properties: list[str] = []

    def fidelity(self, against: str, error: float) -> None:
        """Relative error of our outputs against an independent implementation with the same weights."""
        self.against.append({"against": against, "relative_error": error})

    def property(self, statement: str) -> None:
        """A mechanism that was tested as a property."""
        self.properties.append(statement)


@pytest.fixture(scope="module")
def evidence(request: pytest.FixtureRequest):
    """What this module's tests prove about its paper (named by the file: test_<id>.py)."""
    collected = Evidence()
    failed_before = request.session.testsfailed
    yield collected
    match = re.fullmatch(r"test_(\w+)\.py", Path(str(request.node.path)).name)
    if request.config.getoption("--record") and match and request.session.testsfailed == failed_before:
        card = papers.card(match[1])
        store.record(
            card.id,
            "oracle",
            store.code_hash(card.folder / f"{card.id}.py"),
            {"oracles": collected.against, "properties": collected.properties},
        )
