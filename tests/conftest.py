"""Fixtures for all tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from paperworks import evidence as store
from paperworks import papers

pytest.register_assert_rewrite("peers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", action="store_true", help="write what the tests of faithfulness measure to results/, and new golden numbers"
    )


class Evidence:
    """Collects what one paper's test module proves; written to results/<id>/oracle.json when all of it passed and --record is given."""

    def __init__(self) -> None:
        self.against: list[dict[str, object]] = []
        self.properties: list[dict[str, str]] = []

    def fidelity(self, against: str, error: float) -> None:
        """Relative error of our outputs against an independent implementation with the same weights."""
        self.against.append({"against": against, "relative_error": error})

    def property(self, en: str, zh: str) -> None:
        """A mechanism that was tested as a property, in a sentence of each language; told once, however many cases a test has."""
        if (said := {"en": en, "zh": zh}) not in self.properties:
            self.properties.append(said)


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


@pytest.fixture
def no_gradients():
    """For modules that compare numbers (``pytest.mark.usefixtures``); a test that needs gradients says ``@torch.enable_grad()``."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve grey images of bright discs on a noisy ground, with masks and a split."""
    import json

    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("blobs")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    names = [f"disc {i:02d}" for i in range(12)]
    for name in names:
        cy, cx, r = *rng.uniform(14, 34, 2), rng.uniform(6, 12)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < r**2
        image = (60 + 90 * disc + rng.normal(0, 15, disc.shape)).clip(0, 255)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(root / "masks" / f"{name}.png")
    (root / "splits.json").write_text(json.dumps({"train": names[:8], "val": names[8:]}))
    return root
