"""Claim: looking where the policy says is better than looking at random (section 4.1, translated digits).

``paperworks claim recurrent_attention``: six trainings of 400 steps on 5,000 digits of 28 pixels, which are put at random places of squares of 60
pixels, about three minutes on one core. Six glimpses of two scales, 12 and 24 pixels wide. The arms differ in where the glimpses after the first lie:

``policy``  where the learned policy says.
``random``  anywhere, in training (no weight on the policy, a standard deviation of 1) and in evaluation (uniform), which is the control.

The validation digits are put at places that are the same for all arms. The distance of the last glimpse from the digit's middle and the time
of an image alone are measured too; they are numbers, no part of the rule.

It can fail: REINFORCE learns slowly from one bit an image, 400 steps may not be enough for a policy, and six random glimpses of 24 pixels already
see most of 60 x 60 pixels.
"""

from __future__ import annotations

from statistics import fmean, stdev

import torch
from torch import Tensor

from paperworks.papers.adaptive.recurrent_attention.recurrent_attention import scattered
from paperworks.tasks.claim import Claim, Lab, Results
from paperworks.tasks.contract import normalise

STEPS, SIDE, GLIMPSES = 400, 60, 6
RANDOM = {"std": 1.0, "policy_weight": 0.0}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network on scattered digits, and let it look at the validation digits."""
    settings = RANDOM if arm == "random" else {}
    network = lab.fit(
        variant="laptop",
        steps=STEPS,
        image_size=SIDE,
        glimpse=12,
        glimpses=GLIMPSES,
        **{"augment.share": 28 / SIDE},  # pyright: ignore[reportArgumentType]
        **settings,
    ).network
    generator = torch.Generator().manual_seed(0)
    placed = [scattered(sample["image"].as_subclass(Tensor), SIDE, 0, 8, generator) for sample in lab.validation]
    spec = lab.data.spec
    image = normalise(torch.stack([canvas for canvas, _ in placed]), torch.tensor(spec.mean), torch.tensor(spec.std))
    middle, label = torch.stack([place for _, place in placed]), torch.stack([sample["label"] for sample in lab.validation])
    given = None
    if arm == "random":
        given = 2 * torch.rand(len(image), GLIMPSES, 2, generator=torch.Generator().manual_seed(lab.seed)) - 1
        given[:, 0] = 0
    with torch.inference_mode():
        output = network(image, given)
        alone = lab.seconds(lambda: network(image[:1], None if given is None else given[:1]))
    distance = (output["locations"] - middle[:, None]).norm(dim=2).mean(0)
    return {
        "top1": float((output["logits"].argmax(1) == label).float().mean()),
        "first_distance": float(distance[1]),
        "last_distance": float(distance[-1]),
        "milliseconds": 1000 * alone,
    }


def holds(results: Results) -> bool:
    """The mean gain in accuracy of the policy over random locations is more than two of its standard errors above zero."""
    gains = [policy - other for policy, other in zip(results["policy"]["top1"], results["random"]["top1"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:mnist_subset",
    arms=("policy", "random"),
    control="random",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "Over three seeds, the mean gain in accuracy of the policy's locations over random ones, in training and evaluation, is larger than two "
        "standard errors of that mean.",
        "三个随机种子下，训练和测试都按策略选位置，相对都随机选位置的平均准确率增益大于该均值标准误的两倍。",
    ),
    minutes=4.0,
)
