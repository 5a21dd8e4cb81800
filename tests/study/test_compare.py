"""What a comparison recommends, and why."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from paperworks.errors import InputError
from paperworks.study.compare import SilentWatcher, _spared, compare, recommend, rungs
from paperworks.train.budget import Budget


def row(name: str, values: list[float], latency: float, kind: str = "paper", status: str = "ok") -> dict:
    return {
        "id": name,
        "name": name,
        "kind": kind,
        "status": status,
        "metrics": {"dice": sum(values) / len(values)} if values else {},
        "per_item": [{"name": str(i), "dice": v} for i, v in enumerate(values)],
        "cost": {"params": 1000, "latency_ms": {"eager": {"1": {"p50": latency}}, "onnxruntime": {"1": None}}},
    }


def table(*rows: dict) -> dict:
    return {"noun": ["image", "images", "图像"], "metric": "dice", "higher_is_better": True, "rows": list(rows)}


class Told(SilentWatcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


CLEAR = [0.9, 0.91, 0.89, 0.92]
WORSE = [0.7, 0.71, 0.69, 0.72]
NOISY = [0.95, 0.8, 0.96, 0.88]


def test_the_best_when_the_gap_is_clear() -> None:
    found = recommend(table(row("slow", CLEAR, 50), row("quick", WORSE, 1)))
    assert found is not None and found["id"] == "slow" and "0.905" in found["reason"]["en"] and "0.905" in found["reason"]["zh"]


def test_the_quicker_of_equals() -> None:
    found = recommend(table(row("slow", CLEAR, 50), row("quick", NOISY, 1)))
    assert found is not None and found["id"] == "quick" and "cannot tell apart" in found["reason"]["en"]


def test_never_worse_than_a_baseline() -> None:
    assert recommend(table(row("a", WORSE, 1), row("otsu", CLEAR, 0, kind="baseline"))) is None


def test_failures_and_missing_values_are_passed_over() -> None:
    broken = row("broken", [], 1, status="failed")
    undefined = row("undefined", [math.nan], 1)
    found = recommend(table(broken, undefined, row("a", WORSE, 1)))
    assert found is not None and found["id"] == "a"
    assert recommend(table(broken)) is None


def test_only_one_with_a_result() -> None:
    found = recommend(table(row("a", CLEAR, 1), row("left", CLEAR, 1, status="stopped")))
    assert found is not None and found["id"] == "a" and "no other paper had the same budget" in found["reason"]["en"]


@pytest.mark.parametrize(("count", "shares"), [(1, [1]), (2, [1 / 3, 1]), (3, [1 / 3, 1]), (4, [1 / 9, 1 / 3, 1]), (9, [1 / 9, 1 / 3, 1])])
def test_a_third_goes_on_to_three_times_as_much(count: int, shares: list[float]) -> None:
    assert [b.seconds for b in rungs(Budget(seconds=90), count)] == pytest.approx([90 * share for share in shares])
    assert rungs(Budget(steps=90), count) == [Budget(steps=round(90 * share)) for share in shares]
    assert [b.epochs for b in rungs(Budget(epochs=1.5), count)] == pytest.approx([1.5 * share for share in shares])


def test_who_goes_on() -> None:
    slow, equal, worse, worst = row("slow", CLEAR, 50), row("equal", NOISY, 1), row("worse", WORSE, 1), row("worst", [0.1] * 4, 1)
    failed, more = row("failed", [], 1, status="failed"), [row(f"more{i}", [0.2] * 4, 1) for i in range(3)]
    found = table(worst, worse, failed, slow, equal, *more)
    names = [r["id"] for r in found["rows"]]
    assert _spared(found, names, last=False) == ["slow", "equal"], "the third of the better third is clearly behind"
    assert _spared(found, ["worst", "worse", "failed"], last=False) == ["worse"]
    assert _spared(found, names, last=True) == ["equal"], "the cheaper of equals"
    assert _spared(found, ["failed"], last=True) == []
    low = found | {"higher_is_better": False}
    assert _spared(low, names, last=True) == ["worst"]


def test_halving(blobs: Path, tmp_path: Path) -> None:
    def run() -> dict[str, Any]:
        return compare(blobs, ["unet", "unetpp", "attention_unet"], tmp_path, variant="test", steps=6, costs=False, halving=True)

    found = run()
    papers = [r for r in found["rows"] if r["kind"] == "paper"]
    (whole,) = [r for r in papers if r["status"] == "ok"]
    assert whole["cost"]["steps"] == 6 and whole["run"] == f"runs/{whole['id']}"
    for row in papers:
        assert row is whole or (row["status"], row["cost"]["steps"], row["run"]) == ("stopped", 2, f"runs/part3/{row['id']}")
    assert set(found["pictures"][0]["rows"]) == {whole["id"]} and (found["recommended"] or whole)["id"] == whole["id"]
    assert "left after 2 steps" in (tmp_path / "report.html").read_text(encoding="utf-8") and "--halving" in found["command"]
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/model.safetensors")}
    assert len(weights) == 4 and [r["metrics"] for r in run()["rows"]] == [r["metrics"] for r in found["rows"]]
    assert {path: path.stat().st_mtime_ns for path in weights} == weights, "what is trained is kept"
    more = compare(blobs, ["unet", "unetpp", "attention_unet", "nnformer"], tmp_path, variant="test", steps=6, costs=False, halving=True)
    assert [r["status"] for r in more["rows"][:3]].count("failed") == 0, "a paper more takes a smaller part first, in a folder of its own"
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    with pytest.raises(InputError, match="holds a comparison with halving"):
        compare(blobs, ["unet"], tmp_path, variant="test", steps=6)


@pytest.mark.slow
def test_a_cluster_of_two_machines(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    names = ["unet", "unetpp"]
    here = compare(blobs, names, tmp_path / "here", variant="test", steps=2, precision="fp32", costs=False)
    told = Told()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.chdir(tmp_path)  # where the cluster's machines are not
        there = compare(
            os.path.relpath(blobs),
            names,
            "there",
            variant="test",
            steps=2,
            precision="fp32",
            costs=False,
            ray=cluster.address,
            watcher=told,
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(told.notes) == ["unet: back from the cluster", "unetpp: back from the cluster"]
    for ours, theirs in zip(here["rows"], there["rows"]):
        assert theirs["status"] == "ok" and ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-3)
