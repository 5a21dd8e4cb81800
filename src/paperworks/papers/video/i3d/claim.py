"""Claim: weights inflated from an image network are a better start than chance (section 2.4; table 3: 71.1 against 68.4).

``paperworks claim i3d``: ten runs on films of handwritten digits in motion, about three minutes on one core. Both arms train the same network
(`small`) for 80 steps on 100 films, ten of each kind of motion; the one starts from chance, the other is inflated from `small_2d`, which for 200 steps
has told the digits apart on single frames of all 400 training films. What the image network has learnt is what a thing is; what is asked for
then is how it moves.

It can fail: the ten kinds of motion need nothing of the shape of a digit, inflated kernels begin blind to the order of frames, and 80 steps may be
enough for a network of 112,354 parameters from scratch.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.papers.video.i3d.i3d import I3D, VARIANTS, build, inflate, recipe
from paperworks.tasks.base import grid_of
from paperworks.tasks.claim import Claim, Lab, Results
from paperworks.tasks.contract import normalise
from paperworks.tasks.video import Video

STEPS, IMAGE_STEPS = 80, 200
FILMS_A_CLASS = 10
BATCH, IMAGES = 16, 64


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    data: Any = lab.data
    torch.manual_seed(lab.seed)
    network = build(data.spec, VARIANTS["small"])
    if arm == "inflated":
        network.load_state_dict(inflate(image_network(data, lab.seed).state_dict(), network))
    few = [i for k in range(len(data.spec.classes)) for i in [i for i in data.train if i.label == k][:FILMS_A_CLASS]]
    train(network, films(data, few, network, lab.seed), STEPS, data)
    scores = lab.evaluate(data.predictor(data.deploy(network.eval(), data.spec), data.spec, grid_of(network)))
    return {"top1": scores["top1"], "nll": scores["nll"]}


def image_network(data: Video, seed: int) -> I3D:
    """`small_2d`, trained to tell the digits of single frames."""
    with (data.folder.root / "digits.csv").open(encoding="utf-8", newline="") as f:
        digit = {row["film"]: int(row["digit"]) for row in csv.DictReader(f)}
    network = build(data.plain_spec(data.spec.channels, 10, size=data.spec.size), VARIANTS["small_2d"])
    generator = torch.Generator().manual_seed(seed)
    reels = [(data.given(data.sample(item)), digit[item.name]) for item in data.train]

    def frames() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = [reels[i] for i in torch.randint(len(reels), (IMAGES,), generator=generator)]
            places = [int(torch.randint(len(reel), (), generator=generator)) for reel, _ in chosen]
            yield torch.stack([reel.frames([at]) for (reel, _), at in zip(chosen, places)]), torch.tensor([d for _, d in chosen])

    train(network, frames(), IMAGE_STEPS, data)
    return network


def films(data: Video, items: list[Any], network: I3D, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of varied clips, as the engine draws them."""
    generator = torch.Generator().manual_seed(seed)
    made = recipe(VARIANTS["small"])
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()[: len(items) // BATCH * BATCH]
        samples = [data.training_sample(items[i], made, network.grid, generator) for i in order]
        for i in range(0, len(samples), BATCH):
            batch = data.collate(samples[i : i + BATCH])
            yield batch["clip"], batch["label"]


def train(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, data: Video) -> None:
    """AdamW with one rise and fall of the learning rate."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    mean, std = torch.tensor(data.spec.mean), torch.tensor(data.spec.std)
    network.train()
    for _, (clip, label) in zip(range(steps), batches):
        optimizer.zero_grad()
        F.cross_entropy(network(normalise(clip, mean, std))["logits"], label).backward()
        optimizer.step()
        schedule.step()


def holds(results: Results) -> bool:
    """The mean of the seeds' gains in accuracy is more than two of its standard errors above zero."""
    gains = [inflated - scratch for inflated, scratch in zip(results["inflated"]["top1"], results["scratch"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:moving_digits",
    arms=("inflated", "scratch"),
    control="scratch",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With five paired seeds, the mean gain in accuracy of inflated weights over weights of chance is larger than two standard errors of that mean.",
        "五个配对的随机种子下，膨胀初值相对随机初值的平均准确率增益，大于该均值标准误的两倍。",
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=3.0,
)
