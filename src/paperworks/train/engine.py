"""Training, on Lightning Fabric.

Step s takes the samples at positions s*B ... (s+1)*B - 1 of an endless sequence whose order and augmentation follow from the seed alone, and draws
its dropout from (seed, s). A resumed run therefore needs the weights, the optimiser's state and s, and ends with the numbers of one never stopped.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from paperworks import __version__, papers
from paperworks.errors import InputError
from paperworks.files import atomic, occupied, sweep
from paperworks.tasks import task
from paperworks.tasks.base import Batch, Grid, Loss, Paper, Recipe, Sample, Spec, grid_of
from paperworks.tasks.contract import Predict, Task, channels_last, normalise
from paperworks.tasks.environment import hardware, versions
from paperworks.train.budget import Budget, Plan, plan
from paperworks.train.pretrained import encoder_spec, load_encoder, load_pretrained, pretrained_spec
from paperworks.train.run import FORMAT, Request, Run, blamed, check_state, configure, save_weights

log = logging.getLogger("paperworks")

CHECKPOINT_SECONDS = 20.0
"""How much work a kill may cost."""
PROBE_STEPS = 6


class Interrupted(Exception):
    """A signal asked the training to stop; everything is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@runtime_checkable
class Listener(Protocol):
    """What follows a training: a progress bar, a test, nothing."""

    def start(self, plan: Plan, step: int) -> None:
        """The plan is made; training goes on at ``step``."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done."""

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """The validation images were looked at."""

    def tried(self, done: int, count: int, value: float) -> None:
        """Of ``count`` candidates of a search, ``done`` are trained; the last is worth ``value``."""

    def searched(self, done: int, steps: int) -> None:
        """Of the ``steps`` of the one network that a search trains, ``done`` are done."""


class Silent:
    """A listener that says nothing; a base for those that listen to some things only."""

    def start(self, plan: Plan, step: int) -> None:
        """Nothing."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def tried(self, done: int, count: int, value: float) -> None:
        """Nothing."""

    def searched(self, done: int, steps: int) -> None:
        """Nothing."""


class Positions(Dataset[Sample]):
    """The endless sequence of augmented training samples; item p follows from (seed, p) alone."""

    def __init__(
        self, data: Task, recipe: Recipe, grid: Grid, prepare: Callable[[Sample], Sample] | None, seed: int, limit: int | None
    ) -> None:
        self.data, self.recipe, self.grid, self.prepare, self.seed = data, recipe, grid, prepare, seed
        self.items = data.train[:limit]
        self.order = -1, torch.empty(0)
        """The last epoch that was asked for, and the items' order in it."""

    def __getitem__(self, position: int) -> Sample:
        epoch, index = divmod(position, len(self.items))
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = epoch, torch.randperm(len(self.items), generator=generator)
        return self.sample(self.items[int(self.order[1][index])], position)

    def sample(self, item: Any, position: int) -> Sample:
        """The augmented training sample of an item at a position."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + position) * 2 + 1)
        sample = self.data.training_sample(item, self.recipe, self.grid, generator)
        return self.prepare(sample) if self.prepare else sample


def batches(dataset: Positions, size: int, first: int, last: int, rank: int, world: int, workers: int) -> Iterator[Batch]:
    """Batches of the steps ``first`` ... ``last`` - 1; each process takes its share of every step."""
    return _loaded(dataset, [[(step * world + rank) * size + i for i in range(size)] for step in range(first, last)], workers)


def once(dataset: Positions, size: int, workers: int) -> Iterator[Batch]:
    """Every training sample once, in batches of which the last may be smaller."""
    count = len(dataset.items)
    return _loaded(dataset, [list(range(first, min(first + size, count))) for first in range(0, count, size)], workers)


def _loaded(dataset: Positions, positions: list[list[int]], workers: int) -> Iterator[Batch]:
    collate = dataset.data.collate
    return iter(DataLoader(dataset, batch_sampler=positions, num_workers=workers, collate_fn=collate, persistent_workers=False))


@dataclass
class Learner:
    """A network with everything that a training step needs."""

    network: nn.Module
    task: type[Task]
    loss: Loss
    recipe: Recipe
    spec: Spec
    """What the network was built for."""
    mean: Tensor
    std: Tensor
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    """Moving average of the state, or None."""
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a person asked for; named where the first step fails."""
    best: dict[str, Any] | None = None
    """Lowest loss on validation items so far, with its step and weights."""

    def step(self, fabric: Any, batch: Batch, step: int, steps: int, rank: int = 0) -> dict[str, Tensor]:
        """One update. Terms of the loss come back detached."""
        for group, factor in zip(self.optimizer.param_groups, self._factors()):
            group["lr"] = self.recipe.lr * factor * schedule(self.recipe, step, steps)
        torch.manual_seed((self.seed * 1_000_003 + step) * 1009 + rank)
        self.network.train()
        for module in self.network.modules():
            if hasattr(module, "advance"):
                module.advance(step / steps)  # type: ignore[operator]
        self.optimizer.zero_grad(set_to_none=True)
        with blamed({} if step else self.settings, type(bare(self.network)).__name__):
            terms = self._terms(self._normalised(batch))
        fabric.backward(terms["loss"])
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimizer.step()
        if self.average is not None:
            self._track(step)
        return {k: v.detach() for k, v in terms.items()}

    def solve(self, solver: Callable[[nn.Module, Iterable[Batch]], None], seen: Callable[[], Iterator[Batch]]) -> dict[str, Tensor]:
        """Set all weights at once. The terms of the loss that is left come back, averaged over the samples.

        Args:
            solver: sets a network's weights from batches.
            seen: begins a pass over the training samples; it is taken twice.
        """
        torch.manual_seed(self.seed * 1_000_003)
        self.network.train()
        with blamed(self.settings, type(bare(self.network)).__name__):
            solver(bare(self.network), map(self._normalised, seen()))
        sums: dict[str, Tensor] = {}
        count = 0
        with torch.no_grad():
            for batch in map(self._normalised, seen()):
                size = len(batch[self.task.inputs[0]])
                for name, term in self._terms(batch).items():
                    sums[name] = sums.get(name, 0) + term * size
                count += size
        return {name: total / count for name, total in sums.items()}

    def _normalised(self, batch: Batch) -> Batch:
        return batch | {name: channels_last(normalise(batch[name], self.mean, self.std)) for name in self.task.images}

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.task.forward(self.network, batch), batch)

    def _factors(self) -> list[float]:
        return [g["factor"] for g in self.optimizer.param_groups]

    def _track(self, step: int) -> None:
        """Exponential moving average, faster in the first steps so that it forgets the initial weights."""
        decay = min(self.recipe.average, (1 + step) / (10 + step))
        assert self.average is not None
        state = bare(self.network).state_dict()
        with torch.no_grad():
            for name, mean in self.average.items():
                if mean.is_floating_point():
                    mean.lerp_(state[name], 1 - decay)
                else:
                    mean.copy_(state[name])

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network in evaluation mode with the weights that predictions use."""
        network = bare(self.network)
        if self.average is None:
            network.eval()
            yield network
            return
        own = {k: v.clone() for k, v in network.state_dict().items()}
        network.load_state_dict(self.average)
        network.eval()
        try:
            yield network
        finally:
            network.load_state_dict(own)

    def remember(self, loss: float, step: int) -> None:
        """Keep today's weights if they are the best so far."""
        if self.best is None or loss < self.best["loss"]:
            with self.averaged() as network:
                self.best = {"loss": loss, "step": step, "weights": {k: v.clone() for k, v in network.state_dict().items()}}

    def recall(self) -> None:
        """Go back to the best weights."""
        if self.best is not None:
            bare(self.network).load_state_dict(self.best["weights"])
            self.average = None

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the step."""
        return {
            "network": bare(self.network).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "best": self.best,
        }


def bare(network: nn.Module) -> nn.Module:
    """The module inside Fabric's and DDP's wrappers."""
    while hasattr(network, "module") or hasattr(network, "_forward_module"):
        network = network.module if hasattr(network, "module") else network._forward_module  # type: ignore[assignment]
    return network


def schedule(recipe: Recipe, step: int, steps: int) -> float:
    """Factor on the learning rate at a step of a planned number of steps."""
    done = step / max(steps, 1)
    if recipe.warmup and done < recipe.warmup:
        return (step + 1) / math.ceil(recipe.warmup * steps)
    progress = (done - recipe.warmup) / (1 - recipe.warmup) if recipe.warmup < 1 else 1.0
    match recipe.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "poly":
            return (1 - progress) ** 0.9
        case "step":
            return 0.1 ** sum(done >= at for at in recipe.decay_at)
        case "inverse_sqrt":
            return math.sqrt(max(math.ceil(recipe.warmup * steps), 1) / (step + 1))


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; biases, norms and other vectors are not decayed, head parameters have their own rate."""
    head = {id(p) for p in network.head_parameters()} if hasattr(network, "head_parameters") else set()  # type: ignore[operator]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            factor = next((f for start, f in recipe.rates.items() if name.startswith(start)), 1.0)
            groups.setdefault((recipe.head_lr if id(p) in head else factor, p.ndim > 1), []).append(p)
    params = [
        {"params": ps, "factor": factor, "weight_decay": recipe.weight_decay if decayed else 0.0}
        for (factor, decayed), ps in groups.items()
    ]
    match recipe.optimizer:
        case "sgd":
            return torch.optim.SGD(params, lr=recipe.lr, momentum=recipe.momentum)
        case "adam":
            return torch.optim.Adam(params, lr=recipe.lr, betas=(recipe.momentum, recipe.beta2), eps=recipe.eps)
        case "adamw":
            return torch.optim.AdamW(params, lr=recipe.lr, betas=(recipe.momentum, recipe.beta2), eps=recipe.eps)
        case "adadelta":
            return torch.optim.Adadelta(params, lr=recipe.lr)


def precision(asked: str) -> Literal["32-true", "bf16-mixed"]:
    """Fabric's name of the precision; ``auto`` takes bfloat16 where the hardware computes in it."""
    if asked != "auto":
        return "bf16-mixed" if asked == "bf16" else "32-true"
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def make_fabric(request: Request) -> Any:
    """Lightning's Fabric for the request's devices, nodes and precision."""
    from lightning.fabric import Fabric

    for chatty in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    strategy = "ddp" if request.devices * request.nodes > 1 else "auto"
    return Fabric(
        accelerator=accelerator, devices=request.devices, num_nodes=request.nodes, strategy=strategy, precision=precision(request.precision)
    )


def fit(
    request: Request,
    out: str | Path,
    *,
    data: Task | None = None,
    resume: bool = False,
    workers: int = 0,
    listener: Listener | None = None,
) -> Run:
    """Train a paper and leave a run folder.

    Args:
        request: what to train.
        out: the run folder; must not hold a run unless ``resume``.
        data: the opened data set, when the caller has it already.
        resume: go on with the run in ``out``; a finished one is returned as it is.
        workers: processes that read and augment; 0 does it in this one.
        listener: is told of each step.

    Raises:
        InputError: the request or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; the run is saved and can be resumed.
    """
    out, listener = Path(out), listener or Silent()
    data = data or task(papers.card(request.paper).task)(request.data)
    run = _open_run(request, out, data, resume)
    if run.finished:
        return run
    fabric = make_fabric(request)
    fabric.launch()
    with _log_file(out), _signals() as caught:
        return _train(fabric, run, data, workers, listener, caught)


def _open_run(request: Request, out: Path, data: Task, resume: bool) -> Run:
    asked = asdict(request) | {"settings": dict(request.settings), "budget": dict(request.budget)}
    asked = json.loads(json.dumps(asked))  # as it comes back from run.json: a tuple is a list there
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    until = time.monotonic() + 60
    while rank and not (out / "run.json").exists() and time.monotonic() < until:
        time.sleep(0.1)  # the first process makes the folder
    if (out / "run.json").exists() and (resume or rank):
        if not rank:
            sweep(out)
        run = Run.load(out)
        for key, value in asked.items():
            if run.record["request"].get(key) != value:
                raise InputError(
                    f"{out}: the run was started with {key} = {run.record['request'].get(key)!r}, not {value!r}; ask for the same or take another --out"
                )
        if run.record["data"]["sha256"] != data.sha256:
            raise InputError(f"{out}: the data in {request.data} changed since the run began; take another --out")
        return run
    if occupied(out, but="search"):
        raise InputError(
            f"{out} is not empty; take another --out" + (", or --resume to go on with it" if (out / "run.json").exists() else "")
        )
    configure(request.paper, request.variant, request.settings)
    if data.spec.ndim not in (known := papers.card(request.paper).ndim):
        raise InputError(
            f"{request.paper} takes {' and '.join('volumes' if n == 3 else 'images' for n in known)}, and {data.source} holds "
            f"{'volumes' if data.spec.ndim == 3 else 'images'}; `paperworks list --task {data.name}` names the papers there are"
        )
    record = {
        "format": FORMAT,
        "request": asked,
        "state": "running",
        "spec": asdict(_spec(request, data.spec)),
        "data": {
            "source": str(request.data),
            "sha256": data.sha256,
            "train": [i.name for i in data.train],
            "val": [i.name for i in data.val],
        },
        "versions": {"paperworks": __version__, **versions()},
        "hardware": hardware(),
    }
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, record)
    run.save()
    return run


def _spec(request: Request, spec: Spec) -> Spec:
    """What the network is built for: the data's spec, seen as the weights that it starts from expect."""
    if request.pretrained and request.encoder:
        raise InputError("--pretrained and --encoder both say where to start from; leave one out")
    if request.pretrained:
        return pretrained_spec(request.paper, request.variant, spec)
    return encoder_spec(Run.load(request.encoder), spec) if request.encoder else spec


def _train(fabric: Any, run: Run, data: Task, workers: int, listener: Listener, caught: list[int]) -> Run:
    request = run.request
    started = time.perf_counter()
    paper, config, recipe = configure(request.paper, request.variant, request.settings)
    learner = make_learner(fabric, request, paper, config, recipe, data, run.spec)
    grid = grid_of(bare(learner.network))
    dataset = Positions(data, recipe, grid, paper.prepare(config) if paper.prepare else None, request.seed, request.limit)
    world, rank = fabric.world_size, fabric.global_rank
    solver = paper.solve(config) if paper.solve else None
    samples_a_step = len(dataset.items) if solver else recipe.batch_size * world
    if (saved := _read_checkpoint(run.folder, learner)) is not None:
        step, rows, spent = saved["step"], saved["rows"], saved["seconds"]
        the_plan = Plan(**run.record["plan"])
    else:
        step, rows, spent = 0, [], 0.0
        if "plan" in run.record:
            the_plan = Plan(**run.record["plan"])
        elif solver:
            the_plan = Plan(steps=1, validate_every=1)
        else:
            budget = Budget(**request.budget)
            seconds = probe(fabric, learner, dataset, world, rank) if budget.seconds is not None else None
            look_seconds = (
                _timed(lambda: _look(learner, data, limit=4)) / 4 * min(data.look_at, len(data.val)) if budget.seconds is not None else 0.0
            )
            the_plan = plan(
                budget,
                samples=len(dataset.items),
                batch=recipe.batch_size * world,
                step=seconds,
                validation=look_seconds,
                spent=time.perf_counter() - started,
            )
            the_plan = fabric.broadcast(the_plan)
        run.record["plan"] = asdict(the_plan)
        run.save()
    parameters = sum(p.numel() for p in bare(learner.network).parameters())
    log.info(
        "%s %s, %s parameters, %d steps of %d samples, %s",
        request.paper,
        request.variant,
        f"{parameters:,}",
        the_plan.steps,
        samples_a_step,
        fabric._precision.precision,
    )
    listener.start(the_plan, step)
    writer = _tensorboard(run.folder, step) if rank == 0 else None
    began, last_saved = time.perf_counter() - spent, time.perf_counter()

    def taken() -> Iterator[dict[str, Tensor]]:
        """The terms of the loss at each step that is left."""
        if solver is None:
            for at, batch in enumerate(batches(dataset, recipe.batch_size, step, the_plan.steps, rank, world, workers), start=step):
                yield learner.step(fabric, fabric.to_device(batch), at, the_plan.steps, rank)
        elif step < the_plan.steps:
            yield learner.solve(solver, lambda: map(fabric.to_device, once(dataset, recipe.batch_size, workers)))

    for terms in taken():
        step += 1
        last = step == the_plan.steps
        look = step % the_plan.validate_every == 0
        values = {k: float(v) for k, v in terms.items()}
        if not math.isfinite(values["loss"]):
            raise InputError(f"{run.folder}: the loss became {values['loss']} at step {step}; try a lower --set lr={recipe.lr / 3:.1g}")
        row: dict[str, Any] = {
            "step": step,
            "seconds": round(time.perf_counter() - began, 3),
            "lr": learner.optimizer.param_groups[0]["lr"],
            **values,
        }
        listener.step(step, values)
        if recipe.keep == "best" and (look or last):
            row["val_loss"] = held_out_loss(learner, data, dataset)
            learner.remember(row["val_loss"], step)
        if look and not last and rank == 0:
            looked = _look(learner, data, pictures=run.folder / "pictures" / f"step_{step:06d}.png")
            row |= {f"val_{k}": v for k, v in looked.items()}
            listener.look(step, looked)
        rows.append(row)
        if writer:
            for key, value in row.items():
                if key not in ("step", "seconds"):
                    writer.add_scalar(key, value, step)
        if rank == 0 and (caught or last or time.perf_counter() - last_saved > CHECKPOINT_SECONDS):
            _write_checkpoint(run.folder, learner, step, rows, time.perf_counter() - began)
            last_saved = time.perf_counter()
        if caught:
            raise Interrupted(caught[0])
    seconds = time.perf_counter() - began
    if writer:
        writer.close()
    learner.recall()
    if rank == 0:
        with learner.averaged() as network:
            save_weights(network, run.folder / "model.safetensors")
            metrics, per_item = data.evaluate(predictor(network, learner.spec, data))
        _draw(learner, data, run.folder / "pictures" / "final.png")
        run.record |= {
            "state": "finished",
            "steps": step,
            "kept_step": learner.best["step"] if learner.best else step,
            "seconds": round(seconds, 2),
            "samples_per_second": round(step * samples_a_step / seconds, 2),
            "parameters": parameters,
            "precision": str(fabric._precision.precision),
            "recipe": asdict(recipe),
            "config": asdict(config),
            "metrics": metrics,
            "per_item": per_item,
        }
        run.save()
        log.info("finished: %s", ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if "/" not in k))
    fabric.barrier()
    return run


def make_learner(fabric: Any, request: Request, paper: Paper, config: Any, recipe: Recipe, data: Task, spec: Spec) -> Learner:
    """Build network and optimiser on Fabric's device, initialised from the seed or with the published weights."""
    torch.manual_seed(request.seed)
    with blamed(request.settings, request.paper):
        network = paper.build(spec, config)
    if request.pretrained:
        load_pretrained(network, request.paper, request.variant, len(spec.classes), request.settings)
    if request.encoder:
        load_encoder(network, Run.load(request.encoder))
    flat = spec.ndim == 2 and not grid_of(network).frames
    network = network.to(memory_format=torch.channels_last if flat else torch.channels_last_3d)
    with blamed(request.settings, request.paper):
        optimizer = build_optimizer(network, recipe)
    average = {k: v.clone() for k, v in network.state_dict().items()} if recipe.average and not paper.solve else None
    network, optimizer = fabric.setup(network, optimizer)
    device = fabric.device
    if average:
        average = {k: v.to(device) for k, v in average.items()}
    mean, std = (torch.tensor(v, device=device) for v in (spec.mean, spec.std))
    return Learner(
        network, type(data), data.loss_of(paper, config), recipe, spec, mean, std, optimizer, average, request.seed, request.settings
    )


def probe(fabric: Any, learner: Learner, dataset: Positions, world: int = 1, rank: int = 0, steps: int = PROBE_STEPS) -> float:
    """Seconds of a training step, reading and augmentation included; the learner is left as it was."""
    state = copy.deepcopy(learner.state())
    times = []
    clock = time.perf_counter()
    for step, batch in enumerate(batches(dataset, learner.recipe.batch_size, 0, steps, rank, world, 0)):
        batch = fabric.to_device(batch)
        learner.step(fabric, batch, step, 10**6, rank)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        times.append(now - clock)
        clock = now
    _restore(learner, state)
    settled = sorted(times[2:]) or times
    return settled[len(settled) // 2]


def _timed(call: Callable[[], Any]) -> float:
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _look(learner: Learner, data: Task, *, limit: int | None = None, pictures: Path | None = None) -> dict[str, float]:
    """Metrics on some items of the validation split, spread over it."""
    limit = limit or data.look_at
    items = data.val[:: max(1, len(data.val) // limit)][:limit]
    with learner.averaged() as network:
        predict = predictor(network, learner.spec, data)
        metrics, _ = data.evaluate(predict, items)
        if pictures:
            data.picture(predict, items[:4], pictures)
    return {k: v for k, v in metrics.items() if "/" not in k}


@torch.no_grad()
def held_out_loss(learner: Learner, data: Task, dataset: Positions) -> float:
    """Mean loss of the weights that predictions use, on training samples made of some validation items, always the same."""
    items = data.val[:: max(1, len(data.val) // data.look_at)][: data.look_at]
    size, losses = learner.recipe.batch_size, []
    with learner.averaged() as network:
        for first in range(0, len(items), size):
            samples = [dataset.sample(item, first + i) for i, item in enumerate(items[first : first + size])]
            batch = {k: v.to(learner.mean.device) if isinstance(v, Tensor) else v for k, v in data.collate(samples).items()}
            batch |= {name: normalise(batch[name], learner.mean, learner.std) for name in data.images}
            losses += [float(learner.loss(data.forward(network, batch), batch)["loss"])] * len(samples)
    return sum(losses) / len(losses)


def predictor(network: nn.Module, spec: Spec, data: Task) -> Predict:
    """What predicts with a network on the device where it is."""
    device = next(network.parameters()).device
    deployed = data.deploy(network, spec).to(device).eval()
    return data.predictor(lambda given: deployed(given.to(device)), spec, grid_of(network))


def _draw(learner: Learner, data: Task, path: Path) -> None:
    with learner.averaged() as network:
        predict = predictor(network, learner.spec, data)
        data.picture(predict, data.val[:: max(1, len(data.val) // 8)][:8], path)


# Checkpoints


def _write_checkpoint(folder: Path, learner: Learner, step: int, rows: list[dict[str, Any]], seconds: float) -> None:
    """``checkpoints/last.pt`` and ``metrics.csv``, each written aside, synced and renamed; the checkpoint before stays as ``previous.pt``."""
    path = folder / "checkpoints" / "last.pt"
    with atomic(path) as temporary:
        torch.save({"step": step, "rows": rows, "seconds": seconds, **learner.state()}, temporary)
        if path.exists():
            path.replace(path.with_name("previous.pt"))
    with atomic(folder / "metrics.csv") as temporary, temporary.open("w", newline="") as f:
        sheet = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        sheet.writeheader()
        sheet.writerows(rows)


def _read_checkpoint(folder: Path, learner: Learner) -> dict[str, Any] | None:
    """The last checkpoint that can be read, put into the learner; None when there is none."""
    for name in ("last.pt", "previous.pt"):
        path = folder / "checkpoints" / name
        if not path.exists():
            continue
        try:
            saved = torch.load(path, weights_only=True, map_location=learner.mean.device)
        except Exception as error:
            log.warning("%s cannot be read (%s); taking the one before", path, type(error).__name__)
            continue
        check_state(bare(learner.network), saved["network"], path)
        _restore(learner, saved)
        return saved
    if (folder / "checkpoints" / "last.pt").exists():
        raise InputError(f"{folder}/checkpoints: no checkpoint can be read; delete the folder's checkpoints to start again")
    return None


def _restore(learner: Learner, state: Mapping[str, Any]) -> None:
    bare(learner.network).load_state_dict(state["network"])
    learner.optimizer.load_state_dict(state["optimizer"])
    if learner.average is not None:
        for name, value in state["average"].items():
            learner.average[name].copy_(value)
    learner.best = state["best"]


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted, and acted upon after the step; a second one acts at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    """A run's log is written whatever some library has done to logging in this process."""
    silenced, log.disabled = logging.root.manager.disable, False
    logging.disable(logging.NOTSET)
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        logging.disable(silenced)
