"""Trying a paper's claim: every arm with every seed, judged by the rule that the paper's ``claim.py`` states."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import __version__, evidence, papers
from paperworks.errors import InputError
from paperworks.files import occupied, write_json
from paperworks.study.report import write_report
from paperworks.tasks import task
from paperworks.tasks.base import Output, Sample, Spec
from paperworks.tasks.contract import Task
from paperworks.tasks.environment import hardware, versions
from paperworks.tasks.tiling import padded
from paperworks.train.engine import Listener, fit
from paperworks.train.run import Request
from paperworks.train.search import Trainings, divided


@dataclass
class TrainedRun:
    """A trained network in an arm's hands (the protocol ``tasks.claim.Trained``)."""

    network: nn.Module
    data: Task
    spec: Spec

    def predict(self, given: Any, network: nn.Module | None = None) -> Any:
        """The task's prediction."""
        deployed = self.data.deploy(network or self.network, self.spec).eval()
        return self.data.predictor(deployed, self.spec, deployed.grid)(given)

    def output(self, image: Tensor) -> Output:
        """Everything that the network returns for one padded image."""
        deployed = self.data.deploy(self.network, self.spec).eval()
        with torch.inference_mode():
            return self.network(deployed.normalised(padded(image, deployed.grid)[None]))


@dataclass
class Bench:
    """What an arm may do (the protocol ``tasks.claim.Lab``)."""

    paper: str
    data: Task
    source: str
    out: Path
    seed: int
    listener: Callable[[str], Listener] | None = None
    runs: list[str] = field(default_factory=list)

    @property
    def training(self) -> Sequence[Sample]:
        """Training samples without augmentation."""
        return [self.data.sample(item) for item in self.data.train]

    @property
    def validation(self) -> Sequence[Sample]:
        """Validation samples."""
        return [self.data.sample(item) for item in self.data.val]

    def fit(self, paper: str | None = None, *, variant: str, steps: int, limit: int | None = None, **settings: Any) -> TrainedRun:
        """Train once per (paper, variant, steps, limit, settings, seed); later calls find the run."""
        request = Request(
            paper=paper or self.paper,
            data=self.source,
            variant=variant,
            settings=settings,
            seed=self.seed,
            limit=limit,
            budget={"seconds": None, "steps": steps, "epochs": None},
        )
        key = hashlib.sha256(json.dumps(asdict(request), sort_keys=True).encode()).hexdigest()[:8]
        folder = self.out / "runs" / f"{request.paper}_{variant.replace('/', '-')}_seed{self.seed}_{key}"
        run = fit(
            request,
            folder,
            data=self.data,
            resume=(folder / "run.json").exists(),
            listener=self.listener(folder.name) if self.listener else None,
        )
        self.runs.append(folder.name)
        return TrainedRun(run.network(), self.data, run.spec)

    def trials(self, *, variant: str, steps: int, **settings: Any) -> Trainings:
        """What trains candidates of a search for so many steps each."""
        budget = {"seconds": None, "steps": steps, "epochs": None}
        request = Request(paper=self.paper, data=self.source, variant=variant, settings=settings, seed=self.seed, budget=budget)
        return Trainings(request, divided(self.data), steps)

    def evaluate(self, predict: Callable[[Any], Any]) -> dict[str, float]:
        """The task's metrics over the validation split."""
        return self.data.evaluate(predict)[0]

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of seven timings after a warm-up."""
        call()
        times = []
        for _ in range(7):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def claim_code(card: papers.Card) -> str:
    """Hash of the code that a claim's outcome depends on."""
    return evidence.code_hash(card.folder / f"{card.id}.py", card.folder / "claim.py")


def try_claim(
    name: str,
    out: str | Path,
    *,
    record: bool = False,
    listener: Callable[[str], Listener] | None = None,
    told: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run all arms and seeds of a paper's claim; leaves ``claim.json`` and ``report.html`` in ``out``.

    What is done already in ``out`` with the same code is not done again.

    Args:
        name: the paper.
        out: folder for runs, results and report.
        record: also keep the outcome in ``results/<id>/claim.json``.
        listener: gives the listener of a training, by its name.
        told: is told of each arm's outcome.
    """
    card, claim, out = papers.card(name), papers.claim(name), Path(out)
    code = claim_code(card)
    path = out / "arms.json"
    if occupied(out) and not path.exists():
        raise InputError(f"{out} is not empty and holds no claim; take another --out")
    done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"paper": name, "code": code, "arms": {}}
    if done["paper"] != name or done["code"] != code:
        raise InputError(f"{out} holds the claim of {done['paper']} with other code; take another --out")
    write_json(path, done)
    data = task(card.task)(claim.data)
    for seed in claim.seeds:
        for arm in claim.arms:
            key = f"{arm}/{seed}"
            if key in done["arms"]:
                continue
            bench = Bench(name, data, claim.data, out, seed, listener)
            started = time.perf_counter()
            metrics = {k: float(v) for k, v in claim.run(bench, arm).items()}
            done["arms"][key] = {"metrics": metrics, "seconds": round(time.perf_counter() - started, 1), "runs": bench.runs}
            write_json(path, done)
            if told:
                told(f"{arm}, seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if "/" not in k))
    results: dict[str, dict[str, list[float]]] = {}
    for arm in claim.arms:
        per_seed = [done["arms"][f"{arm}/{seed}"]["metrics"] for seed in claim.seeds]
        results[arm] = {m: [p[m] for p in per_seed] for m in per_seed[0]}
    outcome = {
        "kind": "claim",
        "id": name,
        "title": card.title,
        "claim": dict(card.claim),
        "rule": {"en": claim.rule[0], "zh": claim.rule[1]},
        "held": bool(claim.holds(results)),
        "metric": claim.metric,
        "metric_names": {key: list(names) for key, names in data.metric_names.items()},
        "data": claim.data,
        "arms": [{"name": arm, "control": arm == claim.control, "metrics": results[arm]} for arm in claim.arms],
        "seeds": list(claim.seeds),
        "seconds": round(sum(a["seconds"] for a in done["arms"].values()), 1),
        "hardware": hardware(),
        "versions": {"paperworks": __version__, **versions()},
        "command": f"paperworks claim {name}",
        "created": datetime.now().isoformat(timespec="seconds"),
    }
    write_json(out / "claim.json", outcome)
    write_report(outcome, out)
    if record:
        evidence.record(name, "claim", code, outcome)
    return outcome
