"""The numbers of today's code, so that a change that was meant to change nothing can show it (record with ``pytest --record``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from paperworks.files import write_json
from paperworks.train.engine import Learner, build_optimizer

FOLDER = Path(__file__).parents[1] / "golden"
SAMPLES = 64
STEPS = 20
LARGEST = 50_000


@pytest.fixture
def golden(request, subject):
    """Compare numbers with the recorded ones, or record them."""

    def compare(key: str, found: list[float], tolerance: float) -> None:
        path = FOLDER / f"{subject.id}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if request.config.getoption("--record"):
            write_json(path, {**kept, key: [float(f"{value:.7g}") for value in found]})
            assert path.stat().st_size <= LARGEST
            return
        if key not in kept:
            pytest.fail(
                f"tests/golden/{subject.id}.json has no {key}; record with: pytest tests/contract/test_golden.py -k {subject.id} --record"
            )
        now, then = torch.tensor(found).double(), torch.tensor(kept[key]).double()
        assert now.shape == then.shape
        error = float((now - then).norm() / then.norm()) if key == "outputs" else float(((now - then) / then).abs().max())
        assert error < tolerance, f"{key} moved by {error:.1e}; if that is meant, say so in the change and record again"

    return compare


def test_outputs(subject, golden, wave):
    network = subject.filled(channels=2, classes=3)
    given = subject.given(network, channels=2)
    if given.is_floating_point():  # a task's example of indices has no chance in it
        given = (wave("image", tuple(given.shape)).float() + 1) / 2
    with torch.no_grad():
        output = subject.output(network, given).flatten()
    assert output.std() > 1e-2, "outputs are too small to tell anything"
    golden("outputs", output[:: max(1, len(output) // SAMPLES)].tolist(), tolerance=1e-4)


def test_loss_curve(subject, golden, fill):
    network = subject.network(channels=2, classes=2)
    fill(network)
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # its random numbers may change from version to version of torch
    batch = subject.batch(network, channels=2, classes=2, batch=4)
    recipe = subject.paper.recipe(subject.config)
    mean, std = torch.zeros(2), torch.ones(2)  # a plain batch is normalised
    spec = subject.spec(channels=2, classes=2)
    learner = Learner(network, subject.task, subject.loss, recipe, spec, mean, std, build_optimizer(network, recipe), average=None, seed=0)
    losses = [float(learner.step(Backward, dict(batch), step, STEPS)["loss"]) for step in range(STEPS)]
    assert losses[-1] < losses[0], "twenty steps on four samples taught nothing"
    golden("losses", losses, tolerance=1e-3)


class Backward:
    """All that a step asks of Lightning's Fabric."""

    @staticmethod
    def backward(loss: torch.Tensor) -> None:
        loss.backward()
