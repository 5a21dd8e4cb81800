"""The candidates of a search: trained shortly on a part of the training split, valued on the rest of it, one by one or on a Ray cluster."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paperworks.errors import InputError
from paperworks.files import occupied, write_json
from paperworks.tasks.base import Paper, Recipe, Spec, grid_of
from paperworks.tasks.contract import Task
from paperworks.tasks.trials import Search, Trial
from paperworks.train.budget import Budget
from paperworks.train.cluster import on_cluster
from paperworks.train.engine import Listener, Positions, Silent, bare, batches, make_fabric, make_learner, predictor, probe
from paperworks.train.run import Request, Run, configure, load_weights, save_weights

log = logging.getLogger("paperworks")

SHARE = 0.5
"""Of the budget that goes into the search."""
HELD_OUT = 5
"""Of so many training items one values the candidates."""

Begin = Callable[[nn.Module], None]


def divided(data: Task) -> Task:
    """The data set whose training items are four fifths of ``data``'s training items, and whose validation items are the others; groups stay whole.

    Raises:
        InputError: there are too few.
    """
    groups: dict[str, list[Any]] = {}
    for item in data.train:
        groups.setdefault(getattr(item, "group", None) or item.name, []).append(item)
    if len(groups) < HELD_OUT:
        raise InputError(f"{data.source} has {len(groups)} training items that do not belong together; a search needs {HELD_OUT} or more")
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    names = list(groups)
    held_out = {names[i] for i in order[: len(groups) // HELD_OUT]}
    inner = copy.copy(data)
    inner.train = [item for name in names if name not in held_out for item in groups[name]]
    inner.val = [item for name in names if name in held_out for item in groups[name]]
    return inner


@dataclass
class Trainings:
    """Candidates of one search (the protocol ``tasks.trials.Trials``)."""

    request: Request
    """What is to be trained in the end."""
    data: Task
    """Divided."""
    steps: int
    """Of each candidate."""
    folder: Path | None = None
    """Keeps every candidate, so that an interrupted search goes on."""
    ray: str = ""
    """Address of a Ray cluster, or ``local``; empty: one after the other in this process."""
    told: Callable[[int, float], None] = lambda done, value: None
    """Is told how many candidates are done, and the value of the last."""
    stepped: Callable[[int], None] = lambda done: None
    """Is told how many steps are done where one network is trained."""
    done: int = 0

    @property
    def recipe(self) -> Recipe:
        """With what ``--set`` changes."""
        return configure(self.request.paper, self.request.variant, self.request.settings)[2]

    @property
    def seed(self) -> int:
        """Of the training that is to come."""
        return self.request.seed

    def run(
        self, candidates: Sequence[Mapping[str, Any]], *, variant: str | None = None, begin: Sequence[Begin] | None = None
    ) -> list[Trial]:
        """Train and value each; what an earlier call of the same search has kept is not trained again."""
        jobs = [
            dataclasses.replace(
                self.request,
                variant=variant or self.request.variant,
                settings={**self.request.settings, **candidate},
                budget={"seconds": None, "steps": self.steps, "epochs": None},
            )
            for candidate in candidates
        ]
        paths = [self.folder / f"{self.done + i:04d}.json" if self.folder else None for i in range(len(jobs))]
        found = [self._kept(job, path) for job, path in zip(jobs, paths)]
        missing = [i for i, trial in enumerate(found) if trial is None]
        begins = [begin[i] if begin else None for i in missing]
        for i, trial in zip(missing, self._trained([jobs[i] for i in missing], begins)):
            found[i] = trial = dataclasses.replace(trial, settings=dict(candidates[i]))
            self._keep(trial, jobs[i], paths[i])
        trials = [trial for trial in found if trial is not None]
        for trial in trials:
            self.done += 1
            self.told(self.done, trial.value)
        return trials

    def value(self, network: nn.Module) -> float:
        """The task's metric on the items that were held out."""
        return valued(network, self.data)

    def _trained(self, jobs: Sequence[Request], begins: Sequence[Begin | None]) -> Iterable[Trial]:
        if self.ray and jobs:
            return on_cluster(self.ray, train_candidate, self.data, list(zip(jobs, begins)))
        return (train_candidate(self.data, job, begin) for job, begin in zip(jobs, begins))

    def _keep(self, trial: Trial, job: Request, path: Path | None) -> None:
        if path:
            save_weights(trial.network, path.with_suffix(".safetensors"))
            facts = {"settings": dict(trial.settings), "value": trial.value, "seconds": round(trial.seconds, 2)}
            write_json(path, facts | {"job": dataclasses.asdict(job)})

    def _kept(self, job: Request, path: Path | None) -> Trial | None:
        if path is None or not path.exists():
            return None
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["job"] != json.loads(json.dumps(dataclasses.asdict(job))):
            return None  # another search: its later candidates are none of this one's
        paper, config, _ = configure(job.paper, job.variant, job.settings)
        network = paper.build(self.data.spec, config)
        load_weights(network, path.with_suffix(".safetensors"))
        return Trial(settings=facts["settings"], value=float(facts["value"]), seconds=float(facts["seconds"]), network=network.eval())


def train_candidate(data: Task, job: Request, begin: Begin | None) -> Trial:
    """Train a candidate for the steps of its budget. Where the loss is no longer finite the training ends, and the value is 0."""
    started = time.perf_counter()
    paper, config, recipe = configure(job.paper, job.variant, job.settings)
    fabric = make_fabric(job)
    learner = make_learner(fabric, job, _begun(paper, begin), config, recipe, data, data.spec)
    dataset = Positions(data, recipe, grid_of(bare(learner.network)), paper.prepare(config) if paper.prepare else None, job.seed, None)
    steps, finite = int(job.budget["steps"]), True
    for step, batch in enumerate(batches(dataset, recipe.batch_size, 0, steps, 0, 1, 0)):
        terms = learner.step(fabric, fabric.to_device(batch), step, steps)
        if not (finite := math.isfinite(float(terms["loss"]))):
            break
    with learner.averaged() as trained:
        network = copy.deepcopy(trained).cpu()
    value = valued(network, data) if finite else 0.0
    return Trial(settings=dict(job.settings), value=value, seconds=time.perf_counter() - started, network=network)


def valued(network: nn.Module, data: Task) -> float:
    """The task's metric on the validation items of ``data``; 0 where it is no number."""
    value = data.evaluate(predictor(network.eval(), data.spec, data))[0][data.metric]
    return float(value) if math.isfinite(value) else 0.0


def _begun(paper: Paper, begin: Begin | None) -> Paper:
    if begin is None:
        return paper

    def build(spec: Spec, config: Any) -> nn.Module:
        network = paper.build(spec, config)
        begin(network)
        return network

    return dataclasses.replace(paper, build=build)


def search(request: Request, data: Task, out: Path, *, resume: bool, ray: str, listener: Listener | None) -> Request:
    """The request with the settings that its paper finds for ``data``, and with what is left of its budget.

    Half of the budget goes into the candidates, which all get the same number of steps. Every candidate stays in ``out``/search, and an
    interrupted search goes on from there.

    Raises:
        InputError: the task's metric cannot steer a search, ``out`` is taken, or there are too few training items.
    """
    paper, config, _ = configure(request.paper, request.variant, request.settings)
    looking = paper.search
    if looking is None or not (count := looking.trials(config)):
        return request
    if resume and (out / "run.json").exists():
        before = Run.load(out).request
        return dataclasses.replace(request, settings={**before.settings, **request.settings}, budget=before.budget)
    if occupied(out) and not (resume and (out / "search").is_dir()):
        raise InputError(f"{out} is not empty; take another --out, or --resume to go on with the search in it")
    if request.devices * request.nodes > 1:
        raise InputError("a search runs in one process, or on a Ray cluster with --ray; leave --devices and --nodes out")
    if ray and count == 1:
        raise InputError(f"the search of {request.paper} trains one network, and a cluster would have nothing to share; leave --ray out")
    if not data.higher_is_better:
        raise InputError(f"{data.metric} is better the smaller it is; a search needs a measure that grows")
    began, inner = time.perf_counter(), divided(data)
    steps = _steps(request, looking, config, inner, count, out)
    log.info("searching: %d candidates of %d steps", count, steps)
    listener = listener or Silent()
    trainings = Trainings(
        request,
        inner,
        steps,
        out / "search",
        ray,
        told=lambda done, value: listener.tried(done, count, value),
        stepped=lambda done: listener.searched(done, steps),
    )
    found = dict(looking.find(config, trainings))
    spent = time.perf_counter() - began
    log.info("found %s in %.0f s", found, spent)
    write_json(out / "search" / "found.json", {"found": found, "candidates": trainings.done, "steps": steps, "seconds": round(spent, 1)})
    budget = {k: v * (1 - SHARE) if v is not None else None for k, v in request.budget.items()}
    if budget["steps"] is not None:
        budget["steps"] = max(1, round(budget["steps"]))
    if request.budget["seconds"] is not None:
        budget["seconds"] = max(request.budget["seconds"] - spent, request.budget["seconds"] * (1 - SHARE) / 2)
    return dataclasses.replace(request, settings={**request.settings, **found}, budget=budget)


def _steps(request: Request, looking: Search, config: Any, inner: Task, count: int, out: Path) -> int:
    """Steps of each candidate: the share of the budget, less what valuing takes, over all of them. It is kept with the search."""
    path = out / "search" / "plan.json"
    if path.exists():
        return int(json.loads(path.read_text(encoding="utf-8"))["steps"])
    budget = Budget(**request.budget)
    paper, config, recipe = configure(request.paper, request.variant, request.settings)
    if budget.seconds is None:
        epochs = budget.epochs or 0
        total = budget.steps if budget.steps is not None else math.ceil(epochs * len(inner.train) / recipe.batch_size)
        steps = max(1, int(total * SHARE / count))
    else:
        fabric = make_fabric(request)
        learner = make_learner(fabric, request, paper, config, recipe, inner, inner.spec)
        dataset = Positions(inner, recipe, grid_of(bare(learner.network)), None, request.seed, None)
        step = probe(fabric, learner, dataset, steps=4)
        started = time.perf_counter()
        valued(bare(learner.network), inner)
        steps = max(1, int((budget.seconds * SHARE / count - (time.perf_counter() - started)) / step))
    write_json(path, {"steps": steps})
    return steps
