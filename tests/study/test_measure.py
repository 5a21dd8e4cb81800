import json
import sys

import pytest
import torch
from torch import nn

from paperworks.errors import InputError
from paperworks.study.measure import measure, measure_subject
from paperworks.tasks.base import Grid
from paperworks.tasks.environment import hardware, interleaved, summary, versions
from paperworks.tasks.segmentation import Segmentation

FORMS = {"eager", "channels_last", "fused"}


def on(grid: Grid, *layers: nn.Module) -> nn.Sequential:
    module = nn.Sequential(*layers)
    module.grid = grid  # type: ignore[assignment]
    return module


def net() -> nn.Sequential:
    return on(
        Grid(8),
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 2, stride=2),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
    )


@pytest.fixture(scope="module")
def measured():
    told: list[str] = []
    module = net().train()
    found = measure(module, task=Segmentation, spec=Segmentation.plain_spec(2), size=(21, 30), seconds=0.02, progress=told.append)
    return found, told


def test_parameters_and_operations_by_hand(measured):
    found, _ = measured
    assert found["size"] == [21, 30] and found["input"] == [24, 32]
    pixels, quarter = 24 * 32, 12 * 16
    assert found["params"] == 8 * 2 * 9 + 2 * 8 + (4 * 8 * 4 + 4) + (4 * 3 * 4 + 3)
    # A multiplication and an addition are two: output pixels x weights that each sees x 2; each input pixel of the transposed sees 3 x 4.
    assert found["flops"] == 2 * (pixels * 8 * 2 * 9 + quarter * 4 * 8 * 4 + quarter * 4 * 3 * 4)


def test_the_record_is_plain_and_whole(measured):
    found, told = measured
    assert json.loads(json.dumps(found)) == found
    assert set(found["latency_ms"]) == FORMS
    for batches in found["latency_ms"].values():
        assert set(batches) == {"1", "8"}
        for times in batches.values():
            assert times["n"] >= 3 and 0 < times["p50"] <= times["p95"]
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert found["hardware"]["cpu"] and found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert told == ["operations", "latency, batch 1", "latency, batch 8", "memory"]


def test_memory_is_that_of_the_largest_map_and_long_batches_are_left_out():
    wide = on(Grid(), nn.Conv2d(1, 64, 1), nn.Conv2d(64, 1, 1))
    found = measure(wide, task=Segmentation, spec=Segmentation.plain_spec(1), size=(1024, 512), batches=(1, 10**9), seconds=1e-6)
    assert all(times["1"] and times[str(10**9)] is None for times in found["latency_ms"].values())
    if sys.platform == "linux":
        map_mib = 64 * 1024 * 512 * 4 / 2**20  # 128
        assert 0.9 * map_mib < found["peak_memory_mib"] < 2.5 * map_mib


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from Linux")
def test_memory_of_a_network_of_one_size():
    """Its first pass needs all that the second does: what it freed must not be taken again unseen."""
    deep = on(Grid(fixed=64), nn.Conv2d(1, 64, 1), *(nn.Conv2d(64, 64, 1) for _ in range(4)), nn.Conv2d(64, 1, 1))
    found = measure(deep, task=Segmentation, spec=Segmentation.plain_spec(1), size=(64, 64), batches=(1,), seconds=1e-6)
    map_mib = 64 * 64 * 64 * 4 / 2**20  # 1; two of them at a time
    assert 1.8 * map_mib < found["peak_memory_mib"] < 8 * map_mib


def test_a_paper_by_name():
    found = measure_subject("unet", variant="test", size=40, channels=1, classes=3, seconds=0.02)
    assert (found["paper"], found["variant"]) == ("unet", "test")
    assert set(found["latency_ms"]) == FORMS | {"onnxruntime"} and "onnx" not in found


@pytest.mark.parametrize(
    ("subject", "changes", "message"), [("no_such_paper", {}, "no_such_paper"), ("unet", {"variant": "huge"}, "'huge'")]
)
def test_what_there_is_not_is_refused(subject, changes, message):
    with pytest.raises(InputError, match=message):
        measure_subject(subject, **changes)


def test_calls_are_timed_in_turns():
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=3)
    assert calls == ["a", "b"] * 4  # a warm-up and three rounds
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    waits: list[None] = []
    interleaved({"a": lambda: None}, seconds=100, most=5, synchronise=lambda: waits.append(None))
    assert len(waits) == 2 * 5


def test_summary_of_times():
    assert summary([0.001 * i for i in range(1, 101)]) == {"p50": 50.5, "p95": 96.0, "n": 100}
    assert summary([0.002]) == {"p50": 2.0, "p95": 2.0, "n": 1}


def test_the_machine_is_named():
    here = hardware()
    assert here["cores"] >= 1 and here["cpu"] and here["threads"] == torch.get_num_threads()
    assert {"python", "torch", "numpy"} <= versions().keys()
