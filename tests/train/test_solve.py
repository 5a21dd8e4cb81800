"""Papers that solve for their weights: one step that sees every training sample once, and everything else as for the others."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paperworks import papers
from paperworks.study.compare import compare
from paperworks.tasks.base import Batch, Grid, Paper, Recipe
from paperworks.tasks.segmentation import Segmentation
from paperworks.train import engine
from paperworks.train.api import fit
from paperworks.train.engine import Interrupted, Positions, Silent, once
from paperworks.train.run import Run


class Constant(nn.Module):
    """The same logits everywhere: the shares of the classes that it has seen."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.grid = Grid()
        self.shares = nn.Parameter(torch.zeros(classes))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.shares.log_softmax(0).view(1, -1, 1, 1).expand(len(image), -1, *image.shape[2:])}


class Solver:
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, config):
        def solve(network: nn.Module, batches) -> None:
            self.batches = list(batches)
            masks = torch.cat([batch["mask"].flatten() for batch in self.batches])
            with torch.no_grad():
                network.shares.copy_(torch.bincount(masks, minlength=2).float().log())

        return solve


@pytest.fixture
def solver(monkeypatch: pytest.MonkeyPatch) -> Solver:
    """A paper of the archive is another one during a test: it counts pixels."""
    found = Solver()
    config = papers.paper("unet").variants["test"]
    paper = Paper(
        variants={"test": config, "small": config},
        build=lambda spec, config: Constant(len(spec.classes)),
        recipe=lambda config: Recipe(batch_size=3, patch=48),
        auto=("test", "small"),
        solve=found,
    )
    monkeypatch.setattr(papers.module("unet"), "PAPER", paper)
    return found


def train(data: Path, out: Path, **options) -> Run:
    return fit("unet", data, out, **({"variant": "test", "budget": "90s", "precision": "fp32"} | options))


def test_every_sample_once(blobs: Path) -> None:
    dataset = Positions(Segmentation(blobs), Recipe(patch=48), Grid(), None, 0, None)
    found = list(once(dataset, 3, 0))
    assert [len(batch["name"]) for batch in found] == [3, 3, 2]
    assert sorted(name for batch in found for name in batch["name"]) == sorted(item.name for item in dataset.items)


def test_run_of_one_step(blobs: Path, tmp_path: Path, solver: Solver) -> None:
    run = train(blobs, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["state"] == "finished" and record["plan"]["steps"] == record["steps"] == 1
    assert record["samples_per_second"] > 0 and "1 steps of 8 samples" in (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 2
    assert (tmp_path / "run" / "pictures" / "final.png").exists()
    # The weights are the solver's, the images it saw are normalised, and the loss is what is left of it.
    pixels = torch.cat([batch["mask"].flatten() for batch in solver.batches])
    shares = torch.bincount(pixels, minlength=2).double()
    torch.testing.assert_close(load_file(tmp_path / "run" / "model.safetensors")["shares"], shares.float().log())
    assert abs(torch.cat([batch["image"] for batch in solver.batches]).mean()) < 0.5
    row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    logged = dict(zip(row[0].split(","), map(float, row[1].split(","))))
    assert logged["step"] == 1 and logged["loss"] > 0
    assert run.network().shares.argmax() == shares.argmax()


def test_limit_and_seed(blobs: Path, tmp_path: Path, solver: Solver) -> None:
    train(blobs, tmp_path / "few", limit=4)
    assert sum(len(batch["name"]) for batch in solver.batches) == 4
    train(blobs, tmp_path / "a", settings={"average": 0.9})
    train(blobs, tmp_path / "b")
    assert torch.equal(*(load_file(tmp_path / name / "model.safetensors")["shares"] for name in "ab")), "there is nothing to average"


def test_first_of_the_variants_is_taken_without_measuring(
    blobs: Path, tmp_path: Path, solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "probe", None)
    assert train(blobs, tmp_path / "run", variant="auto").request.variant == "test"


class Stop(Silent):
    """Does something after the step."""

    def __init__(self, act) -> None:
        self.act = act

    def step(self, step, values) -> None:
        self.act()


def test_interrupted_and_resumed(blobs: Path, tmp_path: Path, solver: Solver) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(blobs, out, listener=Stop(lambda: os.kill(os.getpid(), signal.SIGINT)))
    solver.batches = []
    assert train(blobs, out, resume=True).finished and not solver.batches, "what is solved is not solved again"


def test_killed_before_the_end_begins_again(blobs: Path, tmp_path: Path, solver: Solver) -> None:
    def crash() -> None:
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="power"):
        train(blobs, tmp_path / "run", listener=Stop(crash))
    assert train(blobs, tmp_path / "run", resume=True).record["steps"] == 1
    train(blobs, tmp_path / "other")
    assert torch.equal(*(load_file(tmp_path / name / "model.safetensors")["shares"] for name in ("run", "other")))


def test_compared_with_others(blobs: Path, tmp_path: Path, solver: Solver) -> None:
    result = compare(blobs, ["unet"], tmp_path / "out", steps=5, variant="test", costs=False)
    (row, *_) = result["rows"]
    assert row["status"] == "ok" and row["cost"]["steps"] == 1 and row["curves"]["step"] == [1.0]
    assert (tmp_path / "out" / "report.html").exists()


def test_papers_learn_by_steps_unless_they_say_otherwise() -> None:
    assert {f.name: f.default for f in dataclasses.fields(Paper)}["solve"] is None
