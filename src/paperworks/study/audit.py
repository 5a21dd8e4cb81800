"""The four levels of evidence, computed from recorded files; nobody writes a level by hand.

1 builds (``builds.json``), 2 faithful (``oracle.json``, written by the paper's tests), 3 claimed (``claim.json``), 4 usable (``usable.json`` and
``cost.json``). A level counts only on top of those below it. Evidence that was measured on other code than today's is shown as stale.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks import evidence, papers
from paperworks.errors import InputError
from paperworks.tasks import good_enough

if TYPE_CHECKING:
    from paperworks.tasks.base import Spec

FAITHFUL = 1e-4
"""Largest relative error of outputs against an independent implementation."""
QUICK_SECONDS = 1.0
"""A deployable paper answers for one image of its pack within this time on the recorded machine's CPU."""

GOOD_SHARE = 0.8
"""... and reaches this share of what the best paper of its task reaches on the same pack."""


def current_code(card: papers.Card, level: str) -> str:
    """Hash of the code that a piece of evidence depends on."""
    files = [card.folder / f"{card.id}.py"]
    if level == "claim":
        files.append(card.folder / "claim.py")
    return evidence.code_hash(*files)


def audit(name: str, *, stale: bool = True) -> dict[str, Any]:
    """What is proven about a paper: level, what is missing for the next, what is stale, claim, fidelity, verdict.

    ``stale=False`` does not compare the evidence with today's code, which takes a few milliseconds a paper.
    """
    card = papers.card(name)
    found = {level: evidence.read(name, level) for level in ("builds", "oracle", "claim", "usable", "cost")}
    missing = []
    if found["builds"] is None:
        missing.append("builds: never checked (paperworks audit --record)")
    elif found["builds"]["problems"]:
        missing += [f"builds: {p}" for p in found["builds"]["problems"]]
    oracle = found["oracle"] or {}
    errors = [(_number(o["relative_error"]), o["against"]) for o in oracle.get("oracles", [])]
    if found["oracle"] is None:
        missing.append("faithful: its tests were never recorded (pytest --record)")
    elif not errors and not oracle["properties"]:
        missing.append("faithful: no independent implementation and no property")
    elif any(not e < FAITHFUL for e, _ in errors):
        missing.append(f"faithful: relative error {max(errors)[0]:.1e} against {max(errors)[1]}")
    if found["claim"] is None:
        missing.append("claimed: the claim was never run (paperworks claim --record)")
    if found["usable"] is None:
        missing.append("usable: never run from data to predictions (paperworks audit --record)")
    elif found["usable"]["problems"]:
        missing += [f"usable: {p}" for p in found["usable"]["problems"]]
    if found["cost"] is None:
        missing.append("usable: costs were never measured (paperworks audit --record)")
    levels = ("builds", "faithful", "claimed", "usable")
    reached = next((i for i, level in enumerate(levels) if any(m.startswith(level) for m in missing)), 4)
    own, tried = (current_code(card, level) if stale else "" for level in ("builds", "claim"))
    outdated = [
        level
        for level, content in found.items()
        if stale and content is not None and content["code"] != (tried if level == "claim" else own)
    ]
    worst = max(errors, default=None)
    return {
        "id": name,
        "section": card.section,
        "task": card.task,
        "level": reached,
        "stale": bool(outdated),
        "stale_evidence": outdated,
        "missing": missing,
        "claim": None if found["claim"] is None else "held" if found["claim"]["held"] else "not held",
        "fidelity": worst[0] if worst else None,
        "against": worst[1] if worst else None,
        "verdict": _verdict(card, reached, found),
    }


def _number(value: float | None) -> float:
    """Infinity for the null that JSON has in place of NaN."""
    return math.inf if value is None or math.isnan(value) else value


def verdict(name: str) -> str:
    """deployable, buildable or watch (docs/verdicts.md)."""
    return audit(name, stale=False)["verdict"]


def _verdict(card: papers.Card, level: int, found: dict[str, Any]) -> str:
    if card.verdict_override:
        return card.verdict_override["verdict"]
    usable = found["usable"] or {}
    if level < 3 or not usable or ("value" in usable and not _better(usable, usable["value"], usable["baseline"])):
        return "watch"
    exported = (usable.get("export") or {}).get("relative_error", math.inf) < FAITHFUL
    latency = min(
        (form["1"]["p50"] for form in ((found["cost"] or {}).get("latency_ms") or {}).values() if form.get("1")), default=math.inf
    )
    if "value" not in usable:  # it explains what others answer
        return "deployable" if level == 4 and latency < 1000 * QUICK_SECONDS else "buildable"
    good = (
        good_enough(card.task, usable["value"])
        and _share_of_best(usable, _recorded(card.task, usable["pack"], evidence.results_root())) >= GOOD_SHARE
    )
    return "deployable" if level == 4 and good and exported and latency < 1000 * QUICK_SECONDS else "buildable"


def _better(usable: dict[str, Any], one: float, other: float) -> bool:
    return one > other if usable.get("higher_is_better", True) else one < other


def _share_of_best(usable: dict[str, Any], values: tuple[float, ...]) -> float:
    """How much of the way from the baseline to the best recorded value a paper went."""
    best = max(values) if usable.get("higher_is_better", True) else min(values)
    way = best - usable["baseline"]
    return (usable["value"] - usable["baseline"]) / way if way else 1.0


@functools.cache
def _recorded(task: str, pack: str, results: Path) -> tuple[float, ...]:
    """The values that the papers of a task reached on a pack."""
    found = (evidence.read(card.id, "usable") for card in papers.cards().values() if card.task == task)
    return tuple(r["value"] for r in found if r is not None and r["pack"] == pack)


# Level 1


def check_builds(name: str) -> tuple[dict[str, int], list[str]]:
    """Build every variant and train the ``test`` one for a step; returns parameter counts by variant and what is wrong.

    Counts are taken on the meta device, with the channels and classes that the card states for them.
    """
    import torch

    card = papers.card(name)
    if not card.variants:
        return {}, _check_explainers(card)
    paper = papers.paper(name)
    problems, counts = [], {}
    if set(card.variants) != set(paper.variants):
        problems.append(f"card.toml and VARIANTS differ: {sorted(set(card.variants) ^ set(paper.variants))}")
    for variant, config in paper.variants.items():
        stated = card.variants.get(variant, {})
        with torch.device("meta"):
            network = paper.build(stated_spec(card.task, stated), config)
        counts[variant] = sum(p.numel() for p in network.parameters())
        if counts[variant] != stated.get("params"):
            problems.append(f"{variant} has {counts[variant]:,} parameters, the card says {stated.get('params')}")
    problems += _check_step(name, paper.variants["test"])
    return counts, problems


def _check_explainers(card: papers.Card) -> list[str]:
    """Run each of a tool's offers on an untrained network."""
    import torch

    from paperworks.tasks import task

    kind, paper = task(card.task), papers.paper(card.shown_with)
    spec = kind.plain_spec(3, 3)
    torch.manual_seed(0)
    network = paper.build(spec, paper.variants["test"]).eval()
    given = kind.plain_batch(network, spec)["image"]
    problems, refused = [], 0
    for name in card.explainers:
        explainer = papers.explainer(card.task, name)
        try:
            heat = explainer.build(explainer.config)(network, given, 1)
        except InputError:  # it says that this network is not for it
            refused += 1
            continue
        if heat.shape != (len(given), *given.shape[2:]) or not torch.isfinite(heat).all() or heat.min() < 0:
            problems.append(f"{name} gives {tuple(heat.shape)} from {float(heat.min()):.3g} on for inputs {tuple(given.shape)}")
    if refused == len(card.explainers):
        problems.append(f"nothing of it works with {card.shown_with}")
    return problems


def stated_spec(name: str, stated: Mapping[str, Any]) -> Spec:
    """What a card counts the parameters of a variant for."""
    from paperworks.tasks import task

    size = tuple(stated["size"]) if "size" in stated else None
    return task(name).plain_spec(stated.get("channels", 1), stated.get("classes", 2), stated.get("ndim", 2), size)


def _check_step(name: str, config: Any) -> list[str]:
    import torch

    from paperworks.tasks import task
    from paperworks.tasks.base import grid_of

    card, paper = papers.card(name), papers.paper(name)
    kind = task(card.task)
    spec = kind.plain_spec(1, 3, getattr(config, "ndim", card.ndim[0]))
    torch.manual_seed(0)
    network = paper.build(spec, config).train()
    batch = kind.plain_batch(network, spec)
    terms = kind.loss_of(paper, config)(kind.forward(network, batch), batch)
    problems = [] if torch.isfinite(terms["loss"]) else [f"test: the loss is {float(terms['loss'])}"]
    terms["loss"].backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        problems.append(f"test: no gradient reaches {', '.join(idle[:5])}")
    network.eval()
    again = paper.build(spec, config).eval()
    again.load_state_dict(network.state_dict())
    given = kind.example(spec, grid_of(network))
    with torch.inference_mode():
        if not torch.equal(network(given)[kind.output], again(given)[kind.output]):
            problems.append("test: saved and loaded weights give other outputs")
    return problems


def record_builds(name: str) -> dict[str, Any]:
    """Check level 1 and keep the outcome in ``results/<id>/builds.json``."""
    counts, problems = check_builds(name)
    content = {"parameters": counts, "problems": problems}
    evidence.record(name, "builds", current_code(papers.card(name), "builds"), content)
    return content


# Level 4


def record_explains(name: str, out: Path, *, budget: float, listener: Any = None) -> dict[str, Any]:
    """Train the network that the card names, explain its answers for files of the pack; keep costs and a picture in ``results/``."""
    from paperworks.evidence import results_root
    from paperworks.export.explain import explain_files
    from paperworks.files import atomic
    from paperworks.tasks import task
    from paperworks.tasks.environment import hardware, versions
    from paperworks.train.api import fit

    card = papers.card(name)
    kind = task(card.task)
    data = kind(card.pack or kind.pack)
    run = fit(card.shown_with, data.source, out / "run", budget=budget, opened=data, listener=listener)
    files = data.files(data.val[:8])
    started = time.perf_counter()
    found = explain_files(run.folder, files, out / "explained", name=next(iter(card.explainers)))
    seconds = (time.perf_counter() - started) / len(files)
    code = current_code(card, "usable")
    with atomic(results_root() / name / "usable.png") as temporary:
        temporary.write_bytes(Path(found[0]["picture"]).read_bytes())
    content = {
        "pack": data.source,
        "shown_with": card.shown_with,
        "variant": run.record["request"]["variant"],
        "budget_seconds": budget,
        "files": len(found),
        "hardware": hardware(),
        "problems": [] if len(found) == len(files) else [f"explained {len(found)} of {len(files)} files"],
    }
    evidence.record(name, "usable", code, content)
    cost = {"latency_ms": {"explain": {"1": {"p50": 1000 * seconds, "n": len(files)}}}, "hardware": hardware(), "versions": versions()}
    evidence.record(name, "cost", code, {"variant": content["variant"], **cost})
    return content


def record_usable(name: str, out: Path, *, budget: float, listener: Any = None) -> dict[str, Any]:
    """Train on the task's pack, predict its validation images from files, export, predict again; keep outcome, costs and picture in ``results/``."""
    from paperworks.evidence import results_root
    from paperworks.export.onnx import export_run
    from paperworks.export.predict import load_model, predict_files
    from paperworks.files import atomic
    from paperworks.study.measure import measure
    from paperworks.tasks import task
    from paperworks.tasks.environment import hardware
    from paperworks.train.api import fit

    card = papers.card(name)
    if not card.variants:
        return record_explains(name, out, budget=budget, listener=listener)
    kind = task(card.task)
    source = card.pack or kind.pack
    data = kind(source)
    problems: list[str] = []
    run = fit(name, source, out / "run", budget=budget, opened=data, resume=(out / "run" / "run.json").exists(), listener=listener)
    value = run.record["metrics"][data.metric]
    sign = 1 if data.higher_is_better else -1
    baseline = sign * max(sign * data.evaluate(predict)[0][data.metric] for predict in data.baselines().values())
    if not sign * value > sign * baseline:
        problems.append(f"{data.metric} {value:.3f} does not beat the baseline's {baseline:.3f}")
    files = data.files(data.val[:8])
    written = predict_files(load_model(run.folder), files, out / "predictions")
    if not written or (len(written) != len(set(files)) and not kind.together):
        problems.append(f"predicted {len(written)} of {len(set(files))} files")
    export: dict[str, Any] | None = None
    if kind.outputs:
        try:
            export = export_run(run, out / "model.onnx", data=data)
            predict_files(load_model(out / "model.onnx"), files, out / "predictions_onnx")
        except Exception as error:
            problems.append(f"export: {str(error).splitlines()[0]}")
    deployed = kind.deploy(run.network(), run.spec).eval()
    cost = measure(deployed, task=kind, spec=run.spec, onnx_path=out / "model.onnx" if export else None)
    code = current_code(card, "usable")
    with atomic(results_root() / name / "usable.png") as temporary:
        temporary.write_bytes((run.folder / "pictures" / "final.png").read_bytes())
    content = {
        "pack": source,
        "variant": run.record["request"]["variant"],
        "budget_seconds": budget,
        "steps": run.record["steps"],
        "metric": data.metric,
        "higher_is_better": data.higher_is_better,
        "value": value,
        "baseline": baseline,
        "export": export,
        "hardware": hardware(),
        "problems": problems,
    }
    evidence.record(name, "usable", code, content)
    evidence.record(name, "cost", code, {"variant": content["variant"], **cost})
    return content


def record_costs(name: str, *, seconds: float = 2.0, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure on this machine what the network of level 4 costs, and keep it in ``results/<id>/cost.json``.

    Its weights are fresh, so that nothing is trained. That is only fair where they decide neither what is computed nor how it is stored, which parameters,
    operations and activations tell.

    Args:
        name: the paper.
        seconds: spent on each form at each batch size, about.
        progress: is told what is measured next.

    Raises:
        InputError: level 4 was not recorded with today's code, or the network does other work than the recorded one.
    """
    from paperworks.study.measure import measure_subject
    from paperworks.tasks import task

    card = papers.card(name)
    usable, before, code = evidence.read(name, "usable"), evidence.read(name, "cost"), current_code(card, "usable")
    again = f"run `paperworks audit {name} --record`"
    if usable is None or before is None or usable["code"] != code:
        raise InputError(f"{name}: level 4 was not recorded with today's code; {again}")
    if not card.variants:
        raise InputError(f"{name} is no network but a {card.kind}; {again}")
    data = task(card.task)(usable["pack"])
    found = measure_subject(name, variant=usable["variant"], spec=data.spec, seconds=seconds, progress=progress)
    for key in ("params", "flops", "activations"):
        if found[key] != before.get(key, found[key]):  # older records have no activations
            raise InputError(f"{name}: {key} depend on what was trained ({before[key]} recorded, {found[key]} with fresh weights); {again}")
    del found["paper"]
    found.pop("onnx", None)
    evidence.record(name, "cost", code, found)
    return found
