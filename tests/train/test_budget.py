"""Budgets and what is planned from them."""

from __future__ import annotations

import pytest

from paperworks import papers
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


def test_a_network_for_large_machines_is_not_tried(blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations say enough: a few steps of it might take all the memory there is."""
    from paperworks.tasks.segmentation import Segmentation
    from paperworks.train import api

    tried = []

    def probe(fabric, learner, dataset, steps) -> float:
        tried.append(sum(p.numel() for p in learner.network.parameters()))
        return 0.1

    monkeypatch.setattr(api, "probe", probe)
    data, budget, tiny = Segmentation(blobs), Budget(seconds=100), papers.paper("unet").variants["tiny"]
    monkeypatch.setattr(api, "operations", lambda paper, config, data: 1 if config == tiny else 10**6)
    assert api.choose_variant("unet", data, budget, {}, 0) == "tiny" and len(tried) == 1
    monkeypatch.setattr(api, "operations", lambda *_: None)
    assert api.choose_variant("unet", data, budget, {}, 0) == "same" and len(tried) == 4, "measured where operations are not known"


def test_a_setting_that_fits_no_variant_is_named(blobs) -> None:
    from paperworks.tasks.segmentation import Segmentation
    from paperworks.train import api

    with pytest.raises(InputError, match=r"--set widths=\[4, -1, 4\]: unet does not run with it"):
        api.choose_variant("unet", Segmentation(blobs), Budget(seconds=5), {"widths": [4, -1, 4]}, 0)


def test_operations_are_counted_without_computing(blobs) -> None:
    from paperworks.tasks.segmentation import Segmentation
    from paperworks.train.api import operations

    paper, data = papers.paper("unet"), Segmentation(blobs)
    tiny, small = (operations(paper, paper.variants[name], data) for name in ("tiny", "small"))
    assert tiny and small and 3.5 < small / tiny < 4, "twice the width"
