"""Claim: the attention maps of a trained non-local block hardly depend on the query (section 3.2, table 1), so one map is enough (table 2a).

``paperworks claim gcnet``: six runs of 250 steps on photographs of 32 pixels, about three minutes on one core. A ResNet-18 of an eighth of the
width gets one non-local block (embedded Gaussian) before the last unit of c4, where a map has 64 cells; a second one gets a simplified
block, with one map for all queries, in the same place. Arms: ``maps`` measures the distance between the maps of different queries,
``inputs`` that between the features at these queries, in the same trained network; ``one_map`` is the accuracy without queries.

It can fail: maps of photographs with one large object may well follow it. And since the distance between maps that are nearly uniform is
small whatever they say, the rule also looks at ``query_share``: how much of what makes the maps uneven depends on the query.
"""

from __future__ import annotations

from statistics import fmean

import torch

from paperworks.papers.layers.gcnet.gcnet import query_dependence
from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 250
NEAR = 0.25
"""Maps may be this much of the inputs' distance apart; as far as remembered, table 1 has far less for the embedded Gaussian on COCO."""


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one of the two networks, and measure what the arm is about."""
    if arm == "one_map":
        trained = lab.fit(variant="small", steps=STEPS, width=8, single=True, **{"block.transform": "linear", "block.place": "after"})  # pyright: ignore[reportArgumentType]
    else:
        trained = lab.fit(variant="small_nl", steps=STEPS, width=8)
    found = {"top1": lab.evaluate(trained.predict)["top1"]}
    if arm == "one_map":
        return found | {"distance": 0.0}
    spec, images = lab.data.spec, torch.stack([sample["image"] for sample in lab.validation[:100]])
    mean, std = (torch.tensor(value)[:, None, None] for value in (spec.mean, spec.std))
    measured = query_dependence(trained.network, (images - mean) / std)
    if arm == "inputs":
        return found | {"distance": measured["input"]}
    return found | {"distance": measured["attention"], "jsd": measured["jsd"], "query_share": measured["query_share"]}


def holds(results: Results) -> bool:
    """Near maps and a small share of the query in every seed; and one map is not clearly worse, on average."""
    maps = results["maps"]
    near = all(m < NEAR * i for m, i in zip(maps["distance"], results["inputs"]["distance"]))
    common = all(share < 0.5 for share in maps["query_share"])
    return near and common and fmean(results["one_map"]["top1"]) > fmean(maps["top1"]) - 0.02


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=("maps", "one_map", "inputs"),
    control="inputs",
    metric="distance",
    run=run,
    holds=holds,
    rule=(
        "For every seed the mean cosine distance between the attention maps of different queries is below a quarter of that between the "
        "inputs there, and less than half of what makes the maps uneven depends on the query; and with one map for all queries the mean "
        "accuracy is at most two points lower.",
        "每个随机种子下，不同查询位置的注意力图之间的平均余弦距离，小于这些位置的输入之间的四分之一；注意力图的不均匀中随查询而变的部分不到一半；"
        "并且所有查询共用一张图时，平均准确率最多低两个百分点。",
    ),
    minutes=4.0,
)
