"""Building and training from Python: ``paperworks.create`` and ``paperworks.fit``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paperworks import papers
from paperworks.errors import InputError
from paperworks.tasks import task
from paperworks.tasks.base import Paper, grid_of
from paperworks.tasks.contract import Task
from paperworks.tasks.operations import flop_counter
from paperworks.train.budget import Budget, parse_duration
from paperworks.train.engine import Listener, Positions, bare, make_fabric, make_learner, probe
from paperworks.train.engine import fit as train
from paperworks.train.pretrained import load_pretrained, pretrained_spec, published
from paperworks.train.run import Request, Run, configure
from paperworks.train.search import search

log = logging.getLogger("paperworks")

SEEN_ENOUGH = 20
"""``--variant auto`` takes the largest variant that sees the training set at least so many times within the budget."""


def create(
    name: str,
    *,
    variant: str,
    channels: int = 3,
    classes: int | None = None,
    size: tuple[int, ...] | None = None,
    pretrained: bool = False,
    **settings: Any,
) -> nn.Module:
    """Build a paper's network with fresh or published weights.

    Args:
        name: the paper's id.
        variant: one of the paper's named variants.
        channels: of the images.
        classes: how many; the background counts. Default: 2, or those of the published weights.
        size: a typical height and width (depth first for volumes), for networks that ask for it.
        pretrained: start from the published weights, which are fetched once. Where the classes differ the head is fresh.
        **settings: fields of the paper's configuration.

    Raises:
        InputError: there is no such paper, variant or setting, or there are no published weights.

    Example:
        >>> import paperworks
        >>> network = paperworks.create("unet", variant="small", channels=1, classes=2)
    """
    paper, config, _ = configure(name, variant, settings)
    ndim = getattr(config, "ndim", 2)
    classes = classes or (published(name, variant).classes if pretrained else 2)
    spec = task(papers.card(name).task).plain_spec(channels, classes, ndim, size or (256,) * ndim)
    network = paper.build(pretrained_spec(name, variant, spec) if pretrained else spec, config)
    if pretrained:
        load_pretrained(network, name, variant, classes, settings)
    return network


def fit(
    name: str,
    data: str | Path,
    out: str | Path,
    *,
    variant: str = "auto",
    budget: str | float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    workers: int = 0,
    devices: int = 1,
    nodes: int = 1,
    precision: str = "auto",
    limit: int | None = None,
    pretrained: bool = False,
    encoder: str | Path = "",
    ray: str = "",
    opened: Task | None = None,
    listener: Listener | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    """Train a paper on a folder of data; ``out`` becomes the run folder.

    Args:
        name: the paper's id.
        data: a folder, an annotation file or ``pack:NAME``.
        out: where the run goes.
        variant: a named one, or ``auto``: the largest that sees the data often enough within the budget.
        budget: seconds, or a text like ``90s`` or ``10m``.
        epochs: instead of a budget.
        steps: instead of a budget.
        seed: decides initial weights, order and augmentation.
        resume: go on with the run in ``out``.
        workers: processes that read and augment.
        devices: processes or GPUs on this machine.
        nodes: machines, under torchrun or SLURM.
        precision: ``auto``, ``fp32`` or ``bf16``.
        limit: train on the first so many items only.
        pretrained: start from the published weights; needs a variant that has some.
        encoder: start from what the network of this run folder has learnt to see; it must be a part of this one.
        ray: address of the Ray cluster, or ``local``, on which the candidates of a search are trained side by side.
        opened: the data set, when the caller has opened it already.
        listener: is told of each step.
        settings: fields of configuration and recipe to change.
    """
    seconds = parse_duration(budget) if isinstance(budget, str) else budget
    asked = Budget(seconds=seconds, steps=steps, epochs=epochs)
    settings = settings or {}
    if resume and variant == "auto" and (Path(out) / "run.json").exists():
        variant = Run.load(out).request.variant
    opened = opened if opened is not None else task(papers.card(name).task)(data)
    if variant == "auto":
        variant = choose_variant(name, opened, asked, settings, seed)
    request = Request(
        paper=name,
        data=str(data),
        variant=variant,
        settings=settings,
        budget={"seconds": asked.seconds, "steps": asked.steps, "epochs": asked.epochs},
        seed=seed,
        limit=limit,
        pretrained=pretrained,
        encoder=str(encoder),
        precision=precision,
        devices=devices,
        nodes=nodes,
    )
    request = search(request, opened, Path(out), resume=resume, ray=ray, listener=listener)
    return train(request, out, data=opened, resume=resume, workers=workers, listener=listener)


def choose_variant(name: str, data: Task, budget: Budget, settings: dict[str, Any], seed: int) -> str:
    """The largest of the paper's ``auto`` variants that sees the data often enough within the budget, by measured step times.

    Without a budget in time, or for a paper that solves for its weights, there is nothing to fit into, and the cheapest is taken. A variant
    is taken to cost at least twice what the one before it costs, and no less than a quarter of what its operations say: where even that
    would be too much it is not measured, since a few steps of a network for large machines may take all the memory of a small one.
    """
    candidates = papers.paper(name).auto
    if not candidates:
        raise InputError(f"{name} has no variants to choose from by itself; name one with --variant")
    if budget.seconds is None or papers.paper(name).solve:
        return candidates[0]
    request = Request(paper=name, data="", variant=candidates[0], settings=settings, budget={"steps": 1}, seed=seed)
    fabric = make_fabric(request)
    chosen, before = candidates[0], None
    for variant in candidates:
        paper, config, recipe = configure(name, variant, settings)
        work = operations(paper, config, data)
        if before and work and before[0] * work / before[1] / 4 > budget.seconds * data.share_shown(recipe) / SEEN_ENOUGH / len(data.train):
            break
        learner = make_learner(fabric, request, paper, config, recipe, data, data.spec)
        prepare = paper.prepare(config) if paper.prepare else None
        dataset = Positions(data, recipe, grid_of(bare(learner.network)), prepare, seed, None)
        seconds = probe(fabric, learner, dataset, steps=4)
        seen = budget.seconds / seconds * recipe.batch_size / len(data.train) * data.share_shown(recipe)
        if variant != chosen and seen < SEEN_ENOUGH:
            break
        chosen, before = variant, (seconds / recipe.batch_size, work) if work else None
        if seen < 2 * SEEN_ENOUGH:
            break
    return chosen


def operations(paper: Paper, config: Any, data: Task) -> int | None:
    """Floating-point operations of an evaluation of one item, counted without computing; None where they depend on what the item shows."""
    try:
        with torch.device("meta"):
            network = paper.build(data.spec, config).eval().requires_grad_(False)
        given = data.example(data.spec, grid_of(network)).to("meta")
        with torch.no_grad(), flop_counter() as counter:
            network(given)
    except Exception as error:  # whatever a network does with values that are not there
        log.debug("operations of %s are not known: %s", type(config), error)
        return None
    return counter.get_total_flops() or None
