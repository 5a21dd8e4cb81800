"""What a comparison recommends, and why."""

from __future__ import annotations

import math

from paperworks.study.compare import recommend


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
