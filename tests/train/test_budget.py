"""Budgets and what is planned from them."""

from __future__ import annotations

import pytest

from paperworks.errors import InputError
from paperworks.train.budget import Budget, parse_duration, plan


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("90", 90), ("10m", 600), ("1.5h", 5400), ("1h30m", 5400), ("2m30s", 150)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "fast", "10 apples", "-5m", "0s", "1.2.3s", "m"])
def test_no_durations(text: str) -> None:
    with pytest.raises(InputError, match="duration"):
        parse_duration(text)


def test_one_budget_only() -> None:
    with pytest.raises(InputError):
        Budget()
    with pytest.raises(InputError):
        Budget(seconds=1, steps=1)
    with pytest.raises(InputError):
        Budget(steps=0)


def test_plans() -> None:
    assert plan(Budget(steps=7), samples=10, batch=2, step=None, validation=1, spent=0).steps == 7
    assert plan(Budget(epochs=2), samples=10, batch=4, step=None, validation=1, spent=0).steps == 5
    timed = plan(Budget(seconds=100), samples=10, batch=4, step=0.5, validation=1, spent=10)
    assert timed.steps == (100 - 10 - 8) / 0.5
    slow_look = plan(Budget(seconds=100), samples=10, batch=4, step=0.5, validation=30, spent=0)
    assert slow_look.steps == (100 - 30) / 0.5, "at least one look, whatever it costs"


def test_large_images_are_not_seen_by_their_crops(blobs) -> None:
    """A crop of half the side shows a quarter of an image of 48 x 48."""
    from paperworks.tasks.base import Recipe
    from paperworks.tasks.segmentation import Segmentation

    data = Segmentation(blobs)
    assert data.share_shown(Recipe(patch=24)) == 0.25 and data.share_shown(Recipe(patch=256)) == 1
