"""A search trains candidates on a part of the training split and hands over what it found; stopped, it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paperworks import papers
from paperworks.errors import InputError
from paperworks.tasks import task
from paperworks.tasks.trials import Search, Trials
from paperworks.train.api import fit
from paperworks.train.engine import Silent
from paperworks.train.run import Request, Run
from paperworks.train.search import Trainings, divided, train_candidate

WIDTHS = ([4, 8], [4, 8, 16], [2, 4])


class Looking:
    """Tries networks of three widths in two rounds and takes the best; can be stopped after the first."""

    def __init__(self) -> None:
        self.trials: list[Any] = []
        self.stop = False

    def find(self, config: Any, trials: Trials) -> Mapping[str, Any]:
        self.trials = trials.run([{"widths": widths} for widths in WIDTHS[:2]])
        if self.stop:
            raise KeyboardInterrupt
        self.trials += trials.run([{"widths": WIDTHS[2]}])
        return {"widths": max(self.trials, key=lambda t: t.value).settings["widths"]}


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> Looking:
    found, paper = Looking(), papers.paper("unet")
    looked = Search(trials=lambda config: 3 if len(config.widths) == 3 else 0, find=found.find)
    monkeypatch.setattr(papers, "paper", lambda name: dataclasses.replace(paper, search=looked))
    return found


def train(data: Path, out: Path, **options: Any) -> Run:
    settings = {"batch_size": 2, "patch": 32} | options.pop("settings", {})
    return fit("unet", data, out, **({"variant": "test", "steps": 18, "precision": "fp32"} | options), settings=settings)


class Told(Silent):
    def __init__(self) -> None:
        self.counts: list[tuple[int, int]] = []

    def tried(self, done: int, count: int, value: float) -> None:
        self.counts.append((done, count))


def test_half_of_the_budget_finds_what_the_other_half_trains(blobs: Path, tmp_path: Path, looking: Looking) -> None:
    told = Told()
    run = train(blobs, tmp_path / "run", listener=told)
    best = max(looking.trials, key=lambda t: t.value).settings["widths"]
    assert run.request.settings["widths"] == best
    assert run.record["steps"] == 9
    assert json.loads((tmp_path / "run/search/found.json").read_text())["steps"] == 3  # 9 steps for three candidates
    assert told.counts == [(1, 3), (2, 3), (3, 3)]
    assert len({t.value for t in looking.trials}) > 1
    assert len(run.network().contracting) == len(best)  # built with what was found


def test_candidates_do_not_see_validation_items(blobs: Path, tmp_path: Path, looking: Looking) -> None:
    data = task("segmentation")(blobs)
    inner = divided(data)
    inside = {i.name for i in (*inner.train, *inner.val)}
    assert inside == {i.name for i in data.train}
    assert not {i.name for i in inner.train} & {i.name for i in inner.val}
    assert len(inner.val) == len(data.train) // 5
    train(blobs, tmp_path / "run")
    kept = Trainings(Run.load(tmp_path / "run").request, inner, 3)
    assert kept.value(looking.trials[0].network) == pytest.approx(looking.trials[0].value)


def test_a_stopped_search_goes_on(blobs: Path, tmp_path: Path, looking: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(blobs, tmp_path / "straight")
    looking.stop = True
    with pytest.raises(KeyboardInterrupt):
        train(blobs, tmp_path / "run")
    looking.stop = False
    with pytest.raises(InputError, match="--resume to go on"):
        train(blobs, tmp_path / "run")
    trained = []
    monkeypatch.setattr("paperworks.train.search.train_candidate", lambda *job: trained.append(job) or train_candidate(*job))
    resumed = train(blobs, tmp_path / "run", resume=True)
    assert len(trained) == 1  # the third candidate
    assert resumed.record["metrics"] == straight.record["metrics"]
    assert train(blobs, tmp_path / "run", resume=True).finished
    assert len(trained) == 1


def test_what_is_named_is_not_searched_for(blobs: Path, tmp_path: Path, looking: Looking) -> None:
    run = train(blobs, tmp_path / "run", settings={"widths": [4, 8]})
    assert not looking.trials and run.record["steps"] == 18
    assert not (tmp_path / "run" / "search").exists()


def test_candidates_begin_where_they_are_told(blobs: Path) -> None:
    data = divided(task("segmentation")(blobs))
    settings = {"batch_size": 2, "patch": 32, "lr": 0}
    trainings = Trainings(Request(paper="unet", data=str(blobs), variant="test", settings=settings, budget={"steps": 1}), data, 1)

    def begin(network: nn.Module) -> None:
        with torch.no_grad():
            for value in network.parameters():
                value.fill_(0.125)

    (trial,) = trainings.run([{}], begin=[begin])
    assert all(torch.equal(p, torch.full_like(p, 0.125)) for p in trial.network.parameters())


def test_a_candidate_that_diverges_is_worth_nothing(blobs: Path) -> None:
    data = divided(task("segmentation")(blobs))
    settings = {"batch_size": 2, "patch": 32, "lr": 1e30, "clip": None, "optimizer": "sgd", "warmup": 0}
    trainings = Trainings(Request(paper="unet", data=str(blobs), variant="test", settings=settings, budget={"steps": 4}), data, 4)
    assert trainings.run([{}])[0].value == 0


def test_too_few_items(blobs: Path) -> None:
    data = task("segmentation")(blobs)
    data.train = data.train[:3]
    with pytest.raises(InputError, match="has 3 training items"):
        divided(data)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same(blobs: Path, tmp_path: Path, looking: Looking) -> None:
    ray = pytest.importorskip("ray")
    here = train(blobs, tmp_path / "here")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = train(blobs, tmp_path / "there", ray="local")
    finally:
        ray.shutdown()
    values = [
        [json.loads((tmp_path / where / f"search/{i:04d}.json").read_text())["value"] for i in range(3)] for where in ("here", "there")
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert here.request.settings["widths"] == there.request.settings["widths"]
