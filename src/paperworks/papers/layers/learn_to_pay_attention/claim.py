"""Claim: a classifier that sees attended features of three levels, and no global vector, is more accurate (table 1: 30.62 % errors become 22.97 %).

``paperworks claim learn_to_pay_attention``: six runs of 200 steps on photographs of 32 pixels, about three minutes on one core. Both arms have
the same VGG, of an eighth of the paper's width and with one convolution in place of two or three; ``attention`` classifies the three sums
under its maps, ``plain`` the global vector. Everything else, the recipe included, is the same.

It can fail: after 200 steps the first level, one convolution after another without pooling, may hold little of a class. ``peak``
is looked at beside it: how many times more weight than its share the largest cell of each map gets; 1 would be average pooling.
"""

from __future__ import annotations

from statistics import fmean

import torch

from paperworks.papers.layers.learn_to_pay_attention.learn_to_pay_attention import Attending
from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 200
LEVELS = {"attention": 3, "plain": 0}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it; where it attends, how sharply."""
    trained = lab.fit(variant="small", steps=STEPS, width=8, **{"attend.levels": LEVELS[arm]})  # pyright: ignore[reportArgumentType]
    scores = lab.evaluate(trained.predict)
    found = {"top1": scores["top1"], "nll": scores["nll"]}
    if arm == "attention":
        assert isinstance(trained.network, Attending)
        spec, images = lab.data.spec, torch.stack([sample["image"] for sample in lab.validation[:100]])
        mean, std = (torch.tensor(value)[:, None, None] for value in (spec.mean, spec.std))
        with torch.inference_mode():
            maps = trained.network.attention((images - mean) / std)
        found |= {f"peak_{i + 1}": float((m.flatten(1).amax(1) * m[0].numel()).mean()) for i, m in enumerate(maps)}
    return found


def holds(results: Results) -> bool:
    """More accurate for every seed, and by a point on average."""
    gains = [attended - plain for attended, plain in zip(results["attention"]["top1"], results["plain"]["top1"])]
    return min(gains) > 0 and fmean(gains) > 0.01


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(LEVELS),
    control="plain",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "The network that attends is more accurate than the plain one for every seed, and by more than one point on average.",
        "每个随机种子下，带注意力的网络都比普通网络更准，平均高出一个百分点以上。",
    ),
    minutes=4.0,
)
