"""Every claim is an experiment that can fail, and can hold."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable

import pytest

from paperworks import papers
from paperworks.data.packs import PREFIX, pack_path
from paperworks.tasks.claim import Claim

DRAWS = 5_000


@pytest.fixture
def claim(card):
    return papers.claim(card.id)


def test_experiment_is_complete(card, claim):
    assert len(set(claim.arms)) == len(claim.arms) >= 2, f"claim.py: arms are {claim.arms}; a comparison needs two"
    assert claim.control in claim.arms, f"claim.py: the control {claim.control!r} is none of the arms {claim.arms}"
    assert claim.metric, "claim.py: metric is empty"
    assert claim.minutes > 0
    text = sys.modules[papers.claim.__module__ + f".{card.section}.{card.id}.claim"].__doc__ or ""
    assert len(set(claim.seeds)) >= 3 or "seed" in text, "claim.py: fewer than three seeds, and its docstring does not say why"
    for language, rule in zip(("English", "Chinese"), claim.rule, strict=True):
        assert rule.strip(), f"claim.py: the rule in {language} is empty"
    assert claim.rule[0].isascii() or not any("\u4e00" <= c <= "\u9fff" for c in claim.rule[0]), (
        "claim.py: the first rule is the English one"
    )
    assert any("\u4e00" <= c <= "\u9fff" for c in claim.rule[1]), "claim.py: the second rule is the Chinese one"


def test_data_is_in_the_repository(claim):
    assert claim.data.startswith(PREFIX), f"claim.py: data is {claim.data!r}; a claim runs on a pack"
    assert pack_path(claim.data).is_dir()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 100.0])
def test_claim_fails_when_all_arms_are_equal(claim, value):
    assert judge(claim, lambda arm, metric: [value] * len(claim.seeds)) is False, (
        f"claim.py: holds() is content with arms that are equal ({value} everywhere)"
    )


def test_claim_can_hold_and_fails_when_idea_and_control_change_places(claim):
    outcome = first_that_holds(claim)
    assert outcome is not None, f"claim.py: none of {DRAWS} random outcomes makes holds() true"
    idea = next(arm for arm in claim.arms if arm != claim.control)
    assert judge(claim, lambda arm, metric: outcome(idea if arm == claim.control else claim.control, metric)) is False, (
        "claim.py: holds() is content although the idea was exchanged for the control"
    )


def judge(claim: Claim, values: Callable[[str, str], list[float]]) -> bool:
    """The verdict on (arm, metric) -> values. Which metrics ``holds`` looks at is found out by what it misses."""
    metrics = {claim.metric}
    while True:
        try:
            return claim.holds({arm: {metric: values(arm, metric) for metric in sorted(metrics)} for arm in claim.arms})
        except KeyError as missing:
            name = missing.args[0]
            assert name not in metrics, f"claim.py: holds() asks for {name!r}, which is none of the arms {claim.arms}"
            metrics.add(name)


def first_that_holds(claim: Claim) -> Callable[[str, str], list[float]] | None:
    """A random outcome of which the claim holds: every metric of every arm has its level, and a small spread over the seeds."""
    for draw in range(DRAWS):

        @functools.cache
        def outcome(arm: str, metric: str, draw: int = draw) -> list[float]:
            chance = random.Random(f"{draw} {arm} {metric}")
            level = chance.random()
            return [level + 0.01 * chance.random() for _ in claim.seeds]

        if judge(claim, outcome):
            return outcome
    return None
