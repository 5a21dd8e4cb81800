"""Claim: which mixer stands in the block matters less than the block (sections 3 and 4.4, table 5).

``paperworks claim metaformer``: seven networks, three seeds, 150 steps on 1,500 photographs of 32 pixels, about three minutes on one core.
Four arms differ in the token mixer alone: the identity, a frozen random matrix, pooling, attention. Three keep the pooling and take a part of
the general architecture away: the shortcuts, the norms, the channel MLP. The control is the network without shortcuts, the removal that
the paper finds the worst; the other two are run and reported, and the rule does not look at them.

The net is ``small`` with three stages of 16, 8 and 4 cells a side and 16 to 64 channels, so that pooling has neighbours to pool.

It can fail: 150 steps may be too few for attention, which then falls behind by more than what the shortcuts are worth, and four blocks may
be too shallow to need shortcuts. The paper's own order (pooling before the identity) is no part of the rule.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 150
MIXERS = ("identity", "random", "pooling", "attention")
REMOVED: dict[str, dict[str, Any]] = {
    "no_shortcut": {"residual": False},
    "no_norm": {"norm": "off"},
    "no_mlp": {"channel_mlp": False},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    settings = {"mixers": (arm,)} if arm in MIXERS else {"mixers": ("pooling",), **REMOVED[arm]}
    trained = lab.fit(variant="small", steps=STEPS, depths=(1, 2, 1), widths=(16, 32, 64), head_width=16, **settings)  # pyright: ignore[reportArgumentType]
    scores = lab.evaluate(trained.predict)
    parameters = sum(p.numel() for p in trained.network.parameters())
    return {"top1": scores["top1"], "nll": scores["nll"], "parameters": float(parameters)}


def holds(results: Results) -> bool:
    """The worst mixer is further above the network without shortcuts than the mixers lie apart, and beyond two standard errors."""
    means = {mixer: fmean(results[mixer]["top1"]) for mixer in MIXERS}
    worst = min(means, key=means.__getitem__)
    gaps = [mixed - bare for mixed, bare in zip(results[worst]["top1"], results["no_shortcut"]["top1"])]
    return fmean(gaps) > max(max(means.values()) - means[worst], 2 * stdev(gaps) / len(gaps) ** 0.5)


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=(*MIXERS, *REMOVED),
    control="no_shortcut",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "The worst of four mixers (mean accuracy of three seeds) is above the pooling network without shortcuts by more than the best mixer "
        "is above the worst, and by more than two standard errors of the paired difference.",
        "四种混合器中最差者（三个种子的平均准确率）高出无残差池化网络的幅度，大于最好与最差混合器之间的差距，也大于配对差值标准误的两倍。",
    ),
    seeds=(0, 1, 2),
    minutes=3.0,
)
