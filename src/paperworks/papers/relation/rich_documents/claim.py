"""Claim: the graph finds fields that the reading order alone does not tell.

The same tagger is trained for as many steps on the 48 training receipts of the pack and judged on the 16 others: with the graph; as a
BiLSTM-CRF that reads the whole page as one text in reading order (the control, the paper's baseline II); with the graph but without edge
features, or without attention (the paper's ablations). The control has no nodes, and so no second task. Steps are few, so that all
arms fit into minutes; a value counts when it is the given text exactly. Sixteen receipts are few: one field is 0.016 of F1.
"""

from __future__ import annotations

from paperworks.tasks.claim import Claim, Lab, Results

ARMS = {
    "graph": {},
    "document": {"context": "document"},
    "no_edge_features": {"edge_features": False},
    "no_attention": {"attention": False},
}
STEPS = 140
MARGIN = 0.01


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Entity F1 and its parts on the validation receipts."""
    trained = lab.fit(variant="small", steps=STEPS, **ARMS[arm])
    return lab.evaluate(trained.predict)


def mean(results: Results, arm: str) -> float:
    """Of the entity F1 over the seeds."""
    values = results[arm]["f1"]
    return sum(values) / len(values)


def holds(results: Results) -> bool:
    """The graph's mean F1 is above each other arm's by more than the margin."""
    return all(mean(results, "graph") > mean(results, arm) + MARGIN for arm in ARMS if arm != "graph")


CLAIM = Claim(
    data="pack:receipts",
    arms=tuple(ARMS),
    control="document",
    metric="f1",
    run=run,
    holds=holds,
    rule=(
        "entity F1, averaged over the seeds, is higher with the graph than reading the page as one text, than without edge features and than "
        "without attention, by more than 0.01 each",
        "按种子平均的实体 F1：用图的结果高于把整页当作一段文字、高于去掉边特征、也高于去掉注意力，且各自高出 0.01 以上",
    ),
    minutes=5,
)
