"""The numbers of today's code, so that a change that was meant to change nothing can show it (record with ``pytest --record``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from paperworks.files import write_json
from paperworks.train.engine import Learner, build_optimizer, collate

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
        error = float((now - then).norm() / then.norm()) if key == "logits" else float(((now - then) / then).abs().max())
        assert error < tolerance, f"{key} moved by {error:.1e}; if that is meant, say so in the change and record again"

    return compare


def test_outputs(subject, golden, wave):
    network = subject.filled(channels=2, classes=3)
    side = network.grid.fit(48)
    image = wave("image", (2, 2, side, side)).float()
    with torch.no_grad():
        logits = network(image)["logits"].flatten()
    assert logits.std() > 1e-2, "outputs are too small to tell anything"
    golden("logits", logits[:: len(logits) // SAMPLES].tolist(), tolerance=1e-4)


def test_loss_curve(subject, golden, fill, wave):
    network = subject.network(classes=2)
    fill(network)
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # its random numbers may change from version to version of torch
    batch = collate([prepared(subject, discs(network.grid.fit(48), number, wave)) for number in range(4)])
    recipe = subject.paper.recipe(subject.config)
    shape = (1, 1, 1, 1)
    learner = Learner(
        network,
        subject.loss,
        recipe,
        torch.full(shape, 0.5),
        torch.full(shape, 0.25),
        build_optimizer(network, recipe),
        average=None,
        seed=0,
    )
    losses = [float(learner.step(Backward, dict(batch), step, STEPS)["loss"]) for step in range(STEPS)]
    assert losses[-1] < losses[0], "twenty steps on four images taught nothing"
    golden("losses", losses, tolerance=1e-3)


class Backward:
    """All that a step asks of Lightning's Fabric."""

    @staticmethod
    def backward(loss: torch.Tensor) -> None:
        loss.backward()


def discs(side: int, number: int, wave) -> dict:
    """Two bright discs on a dark, uneven ground."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    instances = torch.zeros(side, side, dtype=torch.int32)
    for label, (y, x, radius) in enumerate([(0.4, 0.3 + 0.05 * number, 0.14), (0.6 - 0.04 * number, 0.66, 0.17)], start=1):
        instances[(row - y * side) ** 2 + (column - x * side) ** 2 < (radius * side) ** 2] = label
    image = 0.3 + 0.4 * (instances > 0) + 0.1 * wave(f"image {number}", (side, side))
    return {"image": image[None].float(), "mask": (instances > 0).long(), "instances": instances, "name": f"discs {number}"}


def prepared(subject, sample: dict) -> dict:
    from torchvision import tv_tensors

    sample = sample | {
        "image": tv_tensors.Image(sample["image"]),
        "mask": tv_tensors.Mask(sample["mask"]),
        "instances": tv_tensors.Mask(sample["instances"]),
    }
    return subject.paper.prepare(subject.config)(sample) if subject.paper.prepare else sample
