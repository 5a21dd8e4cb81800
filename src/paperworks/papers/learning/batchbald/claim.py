"""Claim: a batch chosen for what its labels say together teaches more than the best ones by themselves.

``paperworks claim batchbald``: fifteen short stories of active learning, about five minutes on one core. The pool is the paper's Repeated MNIST in
small: 300 digits, three times each with noise of its own. From 20 labels (two a class) every arm asks for ten more six times; after each a
network is trained from scratch with as many steps. Arms differ in how the ten are chosen and in nothing else; ``bald`` takes those with the largest
information by themselves, which is BatchBALD without the joint.

It can fail: with so few labels one batch of six decides much, a network trained for 150 steps is a rough posterior, and with 20 draws a
batch cannot hold more than log 20 nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.papers.learning.batchbald.batchbald import PAPER, VARIANTS, bald_batch, batchbald, posterior, predictive
from paperworks.tasks.base import Sample
from paperworks.tasks.claim import Claim, Lab, Results
from paperworks.tasks.contract import normalise

ORIGINALS, COPIES, NOISE = 300, 3, 0.1
FIRST, BATCH, ROUNDS = 2, 10, 6
STEPS, DRAWS, CONFIGURATIONS = 150, 20, 2000


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Label, train, ask, repeat; accuracy over the rounds and at their end, and distinct digits in a batch."""
    generator = torch.Generator().manual_seed(lab.seed)
    images, labels = tensors(lab, lab.training)
    order = torch.randperm(len(images), generator=generator)
    originals = order[:ORIGINALS].repeat(COPIES)
    pool, answers = images[originals], labels[originals]
    pool = pool + NOISE * torch.randn(pool.shape, generator=generator)
    rest = order[ORIGINALS:]
    start = torch.cat([rest[labels[rest] == k][:FIRST] for k in range(len(lab.data.spec.classes))])
    known, truth = images[start], labels[start]
    validation = tensors(lab, lab.validation)
    open_ = torch.ones(len(pool), dtype=torch.bool)
    accuracies, distinct = [], []
    network = trained(lab, known, truth, 0)
    for turn in range(1, ROUNDS + 1):
        candidates = open_.nonzero().flatten()
        asked = candidates[choose(arm, network, pool[candidates], generator, turn)]
        open_[asked] = False
        distinct.append(len(originals[asked].unique()))
        known, truth = torch.cat([known, pool[asked]]), torch.cat([truth, answers[asked]])
        network = trained(lab, known, truth, turn)
        accuracies.append(accuracy(network, *validation))
    return {"top1": fmean(accuracies), "last": accuracies[-1], "distinct": fmean(distinct)}


def choose(arm: str, network: nn.Module, images: Tensor, generator: torch.Generator, turn: int) -> Tensor:
    """Which ten of the images to label."""
    if arm == "random":
        return torch.randperm(len(images), generator=generator)[:BATCH]
    log_probs = posterior(network, [images], DRAWS, seed=turn)
    chosen = batchbald(log_probs, BATCH, configurations=CONFIGURATIONS, seed=turn) if arm == "batchbald" else bald_batch(log_probs, BATCH)
    return torch.tensor(chosen.indices)


def tensors(lab: Lab, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Normalised images N 1 28 28 and labels N."""
    batch = lab.data.collate(list(samples))
    return normalise(batch["image"], torch.tensor(lab.data.spec.mean), torch.tensor(lab.data.spec.std)), batch["label"]


def trained(lab: Lab, images: Tensor, labels: Tensor, turn: int) -> nn.Module:
    """A network from scratch; the engine trains on a data set's own split, so this is its loop in small."""
    torch.manual_seed(lab.seed * 100 + turn)
    network = PAPER.build(lab.data.spec, VARIANTS["small"]).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(STEPS):
        some = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[some])["logits"], labels[some]).backward()
        optimizer.step()
    return network.eval()


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Of the mean of ten draws."""
    return float((predictive(posterior(network, [images], 10)).argmax(1) == labels).float().mean())


def holds(results: Results) -> bool:
    """BatchBALD is more accurate than both others over the rounds, and its batches hold more distinct digits than BALD's."""
    mean = {arm: {name: fmean(values) for name, values in metrics.items()} for arm, metrics in results.items()}
    better = all(mean["batchbald"]["top1"] > mean[arm]["top1"] for arm in ("bald", "random"))
    return better and mean["batchbald"]["distinct"] > mean["bald"]["distinct"]


CLAIM = Claim(
    data="pack:mnist_subset",
    arms=("batchbald", "bald", "random"),
    control="bald",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds and over what is learnt after each batch of ten labels, BatchBALD's networks are more accurate than BALD's and "
        "than those of chance, and its batches hold more distinct digits than BALD's.",
        "按随机种子取平均，并对每批十个标签之后的结果取平均：BatchBALD 的网络准确率高于 BALD 和随机挑选，且其批内不同的数字多于 BALD。",
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=5.0,
)
