"""Levels, staleness and verdicts follow from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from paperworks import evidence, papers
from paperworks.errors import InputError
from paperworks.study import audit as study
from paperworks.study import measure as measured
from paperworks.study.audit import audit, current_code, record_costs
from paperworks.study.measure import measure_subject
from paperworks.tasks import task

GOOD = {
    "builds": {"parameters": {}, "problems": []},
    "oracle": {"oracles": [{"against": "a peer", "relative_error": 1e-6}], "properties": []},
    "claim": {"held": False},
    "usable": {"pack": "pack:a", "value": 0.9, "baseline": 0.3, "problems": [], "export": {"relative_error": 1e-6}},
    "cost": {"latency_ms": {"eager": {"1": {"p50": 10.0}}}},
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAPERWORKS_RESULTS", str(tmp_path))
    return tmp_path


def record(name: str, **changes: dict) -> None:
    study._recorded.cache_clear()
    for level, content in (GOOD | changes).items():
        evidence.record(name, level, current_code(papers.card(name), level), content)


def test_nothing_recorded(results: Path) -> None:
    found = audit("unet")
    assert found["level"] == 0 and found["verdict"] == "watch" and len(found["missing"]) == 5 and found["claim"] is None


def test_all_recorded(results: Path) -> None:
    record("unet")
    found = audit("unet")
    assert (found["level"], found["verdict"], found["claim"], found["fidelity"]) == (4, "deployable", "not held", 1e-6)
    assert not found["missing"] and not found["stale"]


@pytest.mark.parametrize(
    ("level", "content", "reached"),
    [
        ("builds", {"problems": ["small has 3 parameters"]}, 0),
        ("oracle", {"oracles": [{"against": "a peer", "relative_error": 2e-4}], "properties": []}, 1),
        ("oracle", {"oracles": [{"against": "a peer", "relative_error": float("nan")}], "properties": []}, 1),
        ("oracle", {"oracles": [], "properties": []}, 1),
        ("usable", GOOD["usable"] | {"problems": ["predicted 7 of 8 files"]}, 3),
    ],
)
def test_a_level_counts_only_on_those_below(level: str, content: dict, reached: int, results: Path) -> None:
    record("unet", **{level: content})
    assert audit("unet")["level"] == reached and audit("unet")["missing"]


@pytest.mark.parametrize(
    ("level", "content", "verdict"),
    [
        ("usable", GOOD["usable"] | {"value": 0.2}, "watch"),
        ("usable", GOOD["usable"] | {"export": None}, "buildable"),
        ("cost", {"latency_ms": {"eager": {"1": {"p50": 5000.0}}}}, "buildable"),
    ],
)
def test_verdicts(level: str, content: dict, verdict: str, results: Path) -> None:
    record("unet", **{level: content})
    assert audit("unet")["verdict"] == verdict


def test_far_behind_the_best_is_not_deployable(results: Path) -> None:
    record("unet")
    record("unetpp", usable=GOOD["usable"] | {"value": 0.5})
    assert audit("unet")["verdict"] == "deployable" and audit("unetpp")["verdict"] == "buildable"


def test_other_code_is_stale(results: Path) -> None:
    record("unet")
    evidence.record("unet", "claim", "0123456789abcdef", GOOD["claim"])
    assert audit("unet")["stale_evidence"] == ["claim"] and audit("unet")["level"] == 4


def test_what_explains_is_shown_on_a_network_of_another_paper(results: Path) -> None:
    """A tool has no value of its own: it is deployable at level 4 when it is quick."""
    tools = [card.id for card in papers.cards().values() if card.explainers and not card.variants]
    assert tools
    for name in tools:
        assert study.check_builds(name) == ({}, [])
        usable = {"pack": "pack:a", "shown_with": papers.card(name).shown_with, "files": 8, "problems": []}
        record(name, usable=usable)
        assert audit(name)["level"] == 4 and audit(name)["verdict"] == "deployable"
        record(name, usable=usable, cost={"latency_ms": {"explain": {"1": {"p50": 5000.0}}}})
        assert audit(name)["verdict"] == "buildable"


def test_costs_measured_again(results: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usable, card = GOOD["usable"] | {"pack": str(blobs), "variant": "test"}, papers.card("unet")
    real = measure_subject("unet", variant="test", spec=task("segmentation")(blobs).spec, seconds=0.01)
    record("unet", usable=usable, cost=real | {"latency_ms": {}})
    found = record_costs("unet", seconds=0.01)
    kept = evidence.read("unet", "cost")
    assert kept is not None and kept["latency_ms"] == found["latency_ms"] != {} and kept["variant"] == "test"
    assert kept["code"] == current_code(card, "usable") and kept["size"] == list(task("segmentation")(blobs).spec.size)
    monkeypatch.setattr(measured, "measure_subject", lambda *_, **__: {"paper": "unet"} | real | {"flops": 1})
    with pytest.raises(InputError, match="unet: flops depend on what was trained"):
        record_costs("unet")
    monkeypatch.setattr(study, "current_code", lambda card, level: "another")
    with pytest.raises(InputError, match="not recorded with today's code; run `paperworks audit unet --record`"):
        record_costs("unet", seconds=0.01)


def test_costs_of_what_is_no_network(results: Path) -> None:
    record("grad_cam", usable=GOOD["usable"] | {"variant": "none"})
    with pytest.raises(InputError, match="grad_cam is no network"):
        record_costs("grad_cam")
