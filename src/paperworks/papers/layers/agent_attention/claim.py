"""Claim: agent attention in place of softmax attention makes a ViT more accurate, at a cost linear in the tokens (tables of Agent-DeiT and ablation).

``paperworks claim agent_attention``: nine runs of 200 steps on 1,500 photographs of 32 pixels, about four minutes on one core. The host is the
archive's ViT with two layers and 64 patches; the arms differ in its attention alone: softmax, 16 agents, and 16 agents without the depthwise
convolution. On ImageNet DeiT-T gains 2.7 points. The third arm says what of a gain the agents themselves make, and decides nothing.

It can fail: a map of rank 16 may lose what softmax attention of rank 64 has; with 64 tokens there is nothing to save, and 200 steps may be too few
for the biases. ``multiply_adds`` are those of both layers' attention without projections, by formula.
"""

from __future__ import annotations

from statistics import fmean, stdev

from paperworks.papers.layers.agent_attention.agent_attention import multiply_adds
from paperworks.tasks.claim import Claim, Lab, Results

STEPS, LAYERS, AGENTS = 200, 2, 16
ARMS: dict[str, dict[str, object]] = {
    "agents": {"attention": "agent_attention", "attention.agents": AGENTS},
    "softmax": {},
    "agents_without_convolution": {"attention": "agent_attention", "attention.agents": AGENTS, "attention.conv": False},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one ViT and score it; what its attention costs at 64 tokens and would cost at 4096."""
    trained = lab.fit("vit", variant="small", steps=STEPS, layers=LAYERS, **ARMS[arm])  # pyright: ignore[reportArgumentType]
    scores, agents = lab.evaluate(trained.predict), AGENTS if ARMS[arm] else None
    convolution = 9 * (arm == "agents_without_convolution")
    cost = {n: LAYERS * (multiply_adds(n, 96, agents) - convolution * n * 96) for n in (64, 4096)}
    return {"top1": scores["top1"], "nll": scores["nll"], **{f"multiply_adds_{n}": float(m) for n, m in cost.items()}}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences in accuracy is more than two of its standard errors above zero."""
    gains = [agents - softmax for agents, softmax in zip(results["agents"]["top1"], results["softmax"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="softmax",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "With three paired seeds, the mean gain in accuracy of agent over softmax attention is larger than two standard errors of that mean.",
        "三个配对的随机种子下，代理注意力相对 softmax 注意力的平均准确率增益，大于该均值标准误的两倍。",
    ),
    minutes=4.0,
)
