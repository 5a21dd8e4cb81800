"""The main job: one folder of data, several papers, the same budget each; a table, a recommendation and a trained model.

Every paper gets the same split, the same budget and seeds. What is trained is kept: the same command continues an interrupted comparison.
A paper that fails is a row with its error, not the end.

With ``halving`` (Jamieson and Talwalkar 2016, arXiv 1502.07943) the papers first get a small part of the budget, and a third of them goes on
to three times as much, until one gets all of it. Every training starts afresh with a schedule of its own length.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import shlex
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from paperworks import __version__, papers
from paperworks.errors import InputError
from paperworks.export.onnx import export_run
from paperworks.files import atomic, occupied, write_json
from paperworks.study.audit import verdict
from paperworks.study.measure import measure
from paperworks.study.report import write_report
from paperworks.study.words import three
from paperworks.tasks import task
from paperworks.tasks.base import grid_of
from paperworks.tasks.contract import Task
from paperworks.tasks.environment import hardware, versions
from paperworks.train.api import fit
from paperworks.train.budget import Budget, parse_duration
from paperworks.train.cluster import on_cluster
from paperworks.train.engine import Interrupted, Listener, Silent
from paperworks.train.run import Run

log = logging.getLogger("paperworks")

SPARED = 3
"""With halving, one in so many papers goes on, to a budget so many times as large."""
PICTURES = 6
"""Validation images that the report shows side by side, from the hardest to the easiest."""


@runtime_checkable
class Watcher(Protocol):
    """What follows a comparison."""

    def paper(self, name: str, seed: int) -> Listener:
        """A training begins."""
        ...

    def note(self, text: str) -> None:
        """A line for the person."""
        ...


class SilentWatcher:
    """Says nothing."""

    def paper(self, name: str, seed: int) -> Listener:
        """A silent listener."""
        return Silent()

    def note(self, text: str) -> None:
        """Nothing."""


def compare(
    data: str | Path,
    names: Sequence[str],
    out: str | Path,
    *,
    budget: str | float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    variant: str = "auto",
    seeds: Sequence[int] = (0,),
    precision: str = "auto",
    costs: bool = True,
    halving: bool = False,
    ray: str = "",
    opened: Task | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train every paper on the data under the same budget and write ``out/report.html`` and ``out/compare.json``.

    Args:
        data: a folder, an annotation file or ``pack:NAME``.
        names: papers of one task.
        out: the comparison's folder; one with the same request is continued.
        budget: of each paper and seed, in seconds or as ``90s``, ``10m``.
        epochs: instead of a budget.
        steps: instead of a budget.
        variant: for all papers; ``auto`` chooses by measured step times.
        seeds: one training each.
        precision: ``auto``, ``fp32`` or ``bf16``.
        costs: measure latency and memory and export each model.
        halving: give the whole budget only to the paper that is recommended after smaller ones.
        ray: address of the Ray cluster, or ``local``, on which the papers are trained side by side; its machines see ``out`` and the data
            under the same paths.
        opened: the data set, when the caller has opened it already.
        watcher: is told what goes on.

    Raises:
        InputError: the papers are not of one task, or ``out`` holds something else.
    """
    out, watcher = Path(out), watcher or SilentWatcher()
    seconds = parse_duration(budget) if isinstance(budget, str) else budget
    asked = Budget(seconds=seconds, steps=steps, epochs=epochs)
    cards = [papers.card(name) for name in names]
    if not cards or len({c.task for c in cards}) > 1:
        raise InputError(f"compare takes papers of one task; these are of {', '.join(f'{c.id}: {c.task}' for c in cards) or 'none'}")
    if len(set(names)) < len(names):
        raise InputError(f"--papers names one twice: {','.join(names)}")
    opened = opened if opened is not None else task(cards[0].task)(data)
    request = {
        "data": str(data),
        "sha256": opened.sha256,
        "budget": str(asked),
        "variant": variant,
        "precision": precision,
        "halving": halving,
    }
    _claim_folder(out, request)
    result: dict[str, Any] = {
        "kind": "compare",
        "title": Path(str(data).removeprefix("pack:")).name,
        "command": _command(data, names, asked, out, variant, seeds, halving),
        "created": datetime.now().isoformat(timespec="seconds"),
        "budget": str(asked),
        "seed": seeds[0],
        "hardware": hardware(),
        "versions": {"paperworks": __version__, **versions()},
        "data": opened.describe(),
        "noun": list(opened.noun),
        "metric": opened.metric,
        "higher_is_better": opened.higher_is_better,
        "metric_names": {key: list(names) for key, names in opened.metric_names.items()},
        "explained": {key: list(words) for key, words in opened.explained.items()},
        "views": {key: list(names) for key, names in opened.views.items()},
        "legend": opened.legend(),
        "rows": [],
        "request": request,
    }
    job = Job(str(data), out, tuple(seeds), variant, precision)
    rows = {card.id: {"id": card.id, "name": card.name, "title": card.title, "year": card.year, "kind": "paper"} for card in cards}
    left, budgets = [card.id for card in cards], rungs(asked, len(cards)) if halving else [asked]
    for rung, budget_ in enumerate(budgets):
        part = f"part{SPARED ** (len(budgets) - 1 - rung)}" if rung < len(budgets) - 1 else ""  # of the budget: 3, 9, 27
        for name, trained in _trained(left, job, part, budget_, opened, ray, watcher):
            measured = costs and rung >= len(budgets) - 2  # the last choice weighs costs
            row = _failed(name, job, trained) if isinstance(trained, str) else _row(name, job, trained, budget_, opened, measured, watcher)
            rows[name] |= {"verdict": verdict(name), **row}
            result["rows"] = [row for row in rows.values() if "status" in row]
            write_json(out / "compare.json", result)
        if part:
            left = _spared(result, left, last=rung == len(budgets) - 2)
            watcher.note(f"after {budget_} each, {', '.join(left) or 'no paper'} goes on")
            for row in rows.values():
                if row["id"] not in left and row["status"] == "ok":
                    row["status"] = "stopped"
    for name, predict in opened.baselines().items():
        metrics, per_item = opened.evaluate(predict)
        result["rows"].append(
            {
                "id": name,
                "name": opened.baseline_names[name][0],
                "name_zh": opened.baseline_names[name][1],
                "kind": "baseline",
                "status": "ok",
                "metrics": metrics,
                "per_item": per_item,
                "cost": {},
            }
        )
    result["recommended"] = recommend(result)
    result["pictures"] = _pictures(result, opened, out)
    write_json(out / "compare.json", result)
    write_report(result, out)
    return result


def _claim_folder(out: Path, request: dict[str, Any]) -> None:
    path = out / "request.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in request.items():
            if before.get(key, False) != value:
                raise InputError(f"{out} holds a comparison with {key} = {before.get(key)!r}, not {value!r}; take another --out")
    elif occupied(out):
        raise InputError(f"{out} is not empty and holds no comparison; take another --out")
    write_json(path, request)


def rungs(budget: Budget, count: int) -> list[Budget]:
    """Budgets of successive halving, smallest first: as many that of ``count`` papers one is left for the last, which is the whole budget."""
    cuts = 0
    while SPARED**cuts < count:
        cuts += 1
    shares = [SPARED ** (rung - cuts) for rung in range(cuts + 1)]
    if budget.steps is not None:
        return [Budget(steps=max(1, round(budget.steps * share))) for share in shares]
    return [Budget(seconds=budget.seconds and budget.seconds * share, epochs=budget.epochs and budget.epochs * share) for share in shares]


def _spared(result: dict[str, Any], names: Sequence[str], *, last: bool) -> list[str]:
    """The papers that go on: the better third, less those that the best is clearly ahead of; at last the cheapest of those as good as the best."""
    metric, sign = result["metric"], 1 if result["higher_is_better"] else -1
    rows = [r for r in result["rows"] if r["id"] in names and r["status"] == "ok" and math.isfinite(r["metrics"].get(metric, math.nan))]
    rows.sort(key=lambda r: -sign * r["metrics"][metric])
    if last:
        return [min((r for r in rows if r is rows[0] or _as_good(r, rows[0], metric, sign)), key=_latency)["id"]] if rows else []
    better = rows[: math.ceil(len(names) / SPARED)]
    return [r["id"] for r in better if len(_behind(r, rows[0], metric, sign)) < 2 or _as_good(r, rows[0], metric, sign) or r is rows[0]]


def _command(data: str | Path, names: Sequence[str], budget: Budget, out: Path, variant: str, seeds: Sequence[int], halving: bool) -> str:
    parts = ["paperworks compare", _quote(str(data)), "--papers", ",".join(names), _budget_option(budget), "--out", _quote(str(out))]
    parts += ["--halving"] if halving else []
    parts += ["--variant", variant] if variant != "auto" else []
    parts += ["--seeds", ",".join(map(str, seeds))] if tuple(seeds) != (0,) else []
    return " ".join(parts)


def _budget_option(budget: Budget) -> str:
    if budget.seconds is not None:
        return f"--budget {budget.seconds:g}s"
    return f"--steps {budget.steps}" if budget.steps is not None else f"--epochs {budget.epochs:g}"


def _quote(text: str) -> str:
    return shlex.quote(text)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


@dataclass(frozen=True)
class Job:
    """What is asked of every paper."""

    source: str
    out: Path
    seeds: tuple[int, ...]
    variant: str
    precision: str


def train_paper(data: Task, name: str, job: Job, part: str, budget: Budget, watcher: Watcher) -> list[Path] | str:
    """Train a paper once for each seed: the run folders, or why it failed."""
    folders: list[Path] = []
    variant = job.variant
    try:
        for seed in job.seeds:
            folder = job.out / "runs" / part / (name if seed == job.seeds[0] else f"{name}_seed{seed}")
            run = fit(
                name,
                job.source,
                folder,
                variant=variant,
                budget=budget.seconds,
                epochs=budget.epochs,
                steps=budget.steps,
                seed=seed,
                resume=(folder / "run.json").exists(),
                precision=job.precision,
                opened=data,
                listener=watcher.paper(name, seed),
            )
            variant = run.request.variant
            folders.append(folder)
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        log.warning("%s failed:\n%s", name, traceback.format_exc())
        return _one_line(error)
    return folders


def _trained(
    names: Sequence[str], job: Job, part: str, budget: Budget, data: Task, ray: str, watcher: Watcher
) -> Iterator[tuple[str, list[Path] | str]]:
    """Each paper with its run folders or its failure; one after the other here, or all at once on a cluster."""
    if ray:
        jobs = [(name, job, part, budget, SilentWatcher()) for name in names]
        yield from zip(names, on_cluster(ray, train_paper, data, jobs, lambda i: watcher.note(f"{names[i]}: back from the cluster")))
        return
    for name in names:
        found = train_paper(data, name, job, part, budget, watcher)
        if isinstance(found, str):
            watcher.note(f"{name} failed: {found}")
        yield name, found


def _failed(name: str, job: Job, error: str) -> dict[str, Any]:
    return {"status": "failed", "error": error, "metrics": {}, "command": f"paperworks train {name} {_quote(job.source)}"}


def _row(name: str, job: Job, folders: Sequence[Path], budget: Budget, data: Task, costs: bool, watcher: Watcher) -> dict[str, Any]:
    runs = [Run.load(folder) for folder in folders]
    run = runs[0]
    record = run.record
    values = {m: [_number(r.record["metrics"][m]) for r in runs] for m in record["metrics"]}
    cost = {
        "params": record["parameters"],
        "train_seconds": record["seconds"],
        "steps": record["steps"],
        "samples_per_second": record["samples_per_second"],
    }
    if costs:
        watcher.note(f"{name}: measuring cost")
        cost |= _costs(run, data)
    return {
        "variant": record["request"]["variant"],
        "status": "ok",
        "error": None,
        "metrics": {m: fmean(v) for m, v in values.items()},
        "spread": {m: stdev(v) for m, v in values.items()} if len(runs) > 1 else None,
        "seeds": list(job.seeds),
        "budget": str(budget),
        "cost": cost,
        "curves": _curves(run.folder / "metrics.csv", data.metric),
        "per_item": [{k: _number(v) if k != "name" else v for k, v in item.items()} for item in record["per_item"]],
        "command": f"paperworks train {name} {_quote(job.source)} --variant {record['request']['variant']} {_budget_option(budget)} --seed {job.seeds[0]} --out RUN",
        "model": str((run.folder / "model.safetensors").relative_to(job.out)),
        "run": str(run.folder.relative_to(job.out)),
    }


def _number(value: float | None) -> float:
    """NaN, which a run's record has as null."""
    return math.nan if value is None else value


def _costs(run: Run, data: Task) -> dict[str, Any]:
    """Latency, operations and memory of a run, measured once and kept beside it; the ONNX export is part of it, its failure is not the end."""
    path = run.folder / "cost.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    network = run.network()
    deployed = data.deploy(network, run.spec).eval()
    exported: Path | None = run.folder / "model.onnx"
    extra: dict[str, Any] = {}
    try:
        extra["export_error"] = export_run(run, run.folder / "model.onnx", data=data)["relative_error"]
    except Exception as error:
        exported = None
        extra["export_failed"] = _one_line(error)
    cost = measure(deployed, task=type(data), spec=run.spec, onnx_path=exported)
    kept = {k: cost[k] for k in ("flops", "latency_ms", "peak_memory_mib") if k in cost} | extra
    write_json(path, kept)
    return kept


def _curves(path: Path, metric: str) -> dict[str, list[float]]:
    """Loss and validation metric over steps, the loss thinned to at most 200 points by averaging neighbours."""
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    stride = max(1, math.ceil(len(rows) / 200))
    groups = [rows[i : i + stride] for i in range(0, len(rows), stride)]
    looked = [r for r in rows if r.get(f"val_{metric}")]
    return {
        "step": [float(g[-1]["step"]) for g in groups],
        "seconds": [float(g[-1]["seconds"]) for g in groups],
        "loss": [fmean(float(r["loss"]) for r in g) for g in groups],
        "val_step": [float(r["step"]) for r in looked],
        "val_seconds": [float(r["seconds"]) for r in looked],
        "val_metric": [float(r[f"val_{metric}"]) for r in looked],
    }


def recommend(result: dict[str, Any]) -> dict[str, Any] | None:
    """The cheapest of the papers that are as good as the best as far as the validation items can tell.

    As good: the mean of the paired differences per item is within two standard errors of zero. Cheapest: lowest p50 latency at batch 1
    of the quickest form, or fewest parameters where latency was not measured. No paper that a baseline beats is recommended.
    """
    metric = result["metric"]
    sign = 1 if result["higher_is_better"] else -1
    usable = [
        r for r in result["rows"] if r["kind"] == "paper" and r["status"] == "ok" and math.isfinite(r["metrics"].get(metric, math.nan))
    ]
    baseline = max(
        (sign * r["metrics"][metric] for r in result["rows"] if r["kind"] == "baseline" and math.isfinite(r["metrics"][metric])),
        default=-math.inf,
    )
    usable = [r for r in usable if sign * r["metrics"][metric] > baseline]
    if not usable:
        return None
    best = max(usable, key=lambda r: sign * r["metrics"][metric])
    equal = [r for r in usable if r is best or _as_good(r, best, metric, sign)]
    chosen = min(equal, key=_latency)
    value, top = chosen["metrics"][metric], best["metrics"][metric]
    noun = result["noun"]
    cost_en, cost_zh = _cost_words(chosen, noun)
    name_en, name_zh = result.get("metric_names", {}).get(metric, [metric, metric])[:2]
    word_en, word_zh = ("highest", "最高") if result["higher_is_better"] else ("lowest", "最低")
    if len(usable) == 1:
        en = (
            f"{chosen['name']} has {name_en} {value:.3f}, better than every baseline; no other paper had the same budget and did. {cost_en}"
        )
        zh = f"{chosen['name']} 的{name_zh}为 {value:.3f}，优于全部基线；在相同预算下没有其他论文做到这一点。{cost_zh}"
    elif chosen is best and len(equal) == 1:
        en = f"{chosen['name']} has the {word_en} {name_en}, {value:.3f}; the difference to the next is larger than two standard errors over the validation {noun[1]}. {cost_en}"
        zh = f"{chosen['name']} 的{name_zh}{word_zh}（{value:.3f}），与次优者的差距超过验证{noun[2]}上的两个标准误。{cost_zh}"
    elif chosen is best:
        others = "、".join(r["name"] for r in equal if r is not chosen)
        en = f"{chosen['name']} has the {word_en} {name_en}, {value:.3f}, and is the fastest of those that the validation {noun[1]} cannot tell apart from it ({others.replace('、', ', ')}). {cost_en}"
        zh = f"{chosen['name']} 的{name_zh}{word_zh}（{value:.3f}），并且在验证{noun[2]}无法区分优劣的方法（{others}）中速度最快。{cost_zh}"
    else:
        en = f"{chosen['name']} has {name_en} {value:.3f}; {best['name']} has {top:.3f}, which the validation {noun[1]} cannot tell apart (two standard errors), and costs more. {cost_en}"
        zh = f"{chosen['name']} 的{name_zh}为 {value:.3f}；{best['name']} 为 {top:.3f}，两者之差在验证{noun[2]}的两个标准误之内，但后者代价更高。{cost_zh}"
    return {"id": chosen["id"], "reason": {"en": en, "zh": zh}}


def _behind(row: dict[str, Any], best: dict[str, Any], metric: str, sign: int) -> list[float]:
    """By how much the row is worse than the best, item by item."""
    ours = {r["name"]: r[metric] for r in row["per_item"] if metric in r}
    theirs = {r["name"]: r[metric] for r in best["per_item"] if metric in r}
    return [sign * (theirs[n] - ours[n]) for n in ours.keys() & theirs.keys() if math.isfinite(ours[n]) and math.isfinite(theirs[n])]


def _as_good(row: dict[str, Any], best: dict[str, Any], metric: str, sign: int) -> bool:
    behind = _behind(row, best, metric, sign)
    return len(behind) > 1 and fmean(behind) < 2 * stdev(behind) / math.sqrt(len(behind))


def _latency(row: dict[str, Any]) -> float:
    forms = row["cost"].get("latency_ms") or {}
    times = [f["1"]["p50"] for f in forms.values() if f.get("1")]
    return min(times) if times else float(row["cost"]["params"])


def _cost_words(row: dict[str, Any], noun: list[str]) -> tuple[str, str]:
    cost = row["cost"]
    millions = cost["params"] / 1e6
    if not cost.get("latency_ms"):
        return f"It has {millions:.2f} M parameters.", f"参数量 {millions:.2f} M。"
    ms = _latency(row)
    return (
        f"It has {millions:.2f} M parameters and takes {three(ms)} ms per {noun[0]}.",
        f"参数量 {millions:.2f} M，每份{noun[2]} {three(ms)} 毫秒。",
    )


def _pictures(result: dict[str, Any], data: Task, out: Path) -> list[dict[str, Any]]:
    """The same validation items for every paper, from the hardest to the easiest by the papers' mean metric."""
    metric = result["metric"]
    rows = [r for r in result["rows"] if r["kind"] == "paper" and r["status"] == "ok"]
    if not rows:
        return []
    values = {r["id"]: {e["name"]: e.get(metric, math.nan) for e in r["per_item"]} for r in rows}
    mean: dict[str, float] = {}
    for item in data.val:
        known = [v for r in rows if math.isfinite(v := values[r["id"]].get(item.name, math.nan))]
        mean[item.name] = fmean(known) if known else math.inf if data.higher_is_better else -math.inf
    order = sorted(mean, key=lambda n: mean[n], reverse=not data.higher_is_better)
    chosen = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(PICTURES, len(order)))]
    items = {i.name: i for i in data.val}
    predictors = {}
    for row in rows:
        run = Run.load(out / row["run"])
        network = run.network()
        predictors[row["id"]] = data.predictor(data.deploy(network, run.spec).eval(), run.spec, grid_of(network))
    sheets = []
    for n, name in enumerate(chosen):
        sample = data.sample(items[name])
        sheet: dict[str, Any] = {"name": name, "rows": {}}
        sheet |= {key: _png(out, f"{n}_{key}", picture) for key, picture in data.shown(sample).items()}
        for row in rows:
            drawn = data.drawn(sample, predictors[row["id"]](data.given(sample)))
            sheet["rows"][row["id"]] = {view: _png(out, f"{n}_{row['id']}_{view}", picture) for view, picture in drawn.items()}
            sheet["rows"][row["id"]][metric] = values[row["id"]].get(name)
        sheets.append(sheet)
    return sheets


def _png(out: Path, stem: str, picture: np.ndarray) -> str:
    with atomic(out / "pictures" / f"{stem}.png") as temporary:
        PIL.Image.fromarray(picture).save(temporary)
    return f"pictures/{stem}.png"
