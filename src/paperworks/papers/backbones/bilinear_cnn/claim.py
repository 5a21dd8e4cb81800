"""Claim: pooled products of features tell classes apart better than pooled features (section 4: bilinear against first-order descriptors).

``paperworks claim bilinear_cnn``: six runs of 200 steps on photographs of 32 pixels, about three minutes on one core. Both arms have the same
narrow VGG with a map of 4 x 4 places at the end; ``bilinear`` pools its products with itself, ``first_order`` its products with the constant
1, which is average pooling. Signed root, length one, recipe and everything else are the same.

It can fail: the paper starts from ImageNet's features, has 784 places an image and classes that differ in details; here the features are
learnt from nothing, 16 places say little of what occurs together, and classes are as coarse as frog and lorry.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 200
SECOND = {"bilinear": "same", "first_order": "one"}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network and score it."""
    trained = lab.fit(variant="small", steps=STEPS, widths=(16, 32, 64, 64), second=SECOND[arm])
    scores = lab.evaluate(trained.predict)
    return {"top1": scores["top1"], "nll": scores["nll"]}


def holds(results: Results) -> bool:
    """More accurate for every seed, and by a point on average."""
    gains = [products - features for products, features in zip(results["bilinear"]["top1"], results["first_order"]["top1"])]
    return min(gains) > 0 and fmean(gains) > 0.01


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(SECOND),
    control="first_order",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "Bilinear pooling is more accurate than average pooling of the same features for every seed, and by more than one point on average.",
        "每个随机种子下，双线性池化都比同样特征的平均池化更准，平均高出一个百分点以上。",
    ),
    minutes=3.0,
)
