"""Claim: at equal cost, residual Inception modules learn faster than pure ones (section 5, figures 23 to 26).

``paperworks claim inception_v4``: eight runs of 120 steps on photographs of 32 pixels, about four minutes on one core. ``residual`` is
``small_resnet``, ``pure`` is ``small``: Inception-ResNet-v2 and Inception-v4 at a fifth of their width, with 39.0 and 38.6 million multiply-adds and
660,102 and 650,335 parameters. Measured is the log-loss on 300 training photographs, unaugmented, after the same few steps: how far the
training has come. Accuracy on validation is recorded beside it, as the paper finds it about equal in the end.

It can fail: the pure net has four modules in a row, the residual one eight, and the paper's nets are three times as deep; batch norm alone may train
either with ease.
"""

from __future__ import annotations

from statistics import fmean, stdev

import torch

from paperworks.tasks.claim import Claim, Lab, Results

STEPS, LOOKED_AT = 120, 300
ARMS = {"residual": "small_resnet", "pure": "small"}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network; how far it has come, and its accuracy."""
    trained = lab.fit(variant=ARMS[arm], steps=STEPS)
    looked_at = lab.training[:: max(1, len(lab.training) // LOOKED_AT)]
    surprise = [
        -float(trained.predict(sample["image"].as_subclass(torch.Tensor))[int(sample["label"])].clamp_min(1e-12).log())
        for sample in looked_at
    ]
    scores = lab.evaluate(trained.predict)
    return {"training_loss": fmean(surprise), "top1": scores["top1"], "nll": scores["nll"]}


def holds(results: Results) -> bool:
    """The mean of the seeds' differences in training loss is more than two of its standard errors below zero."""
    gains = [pure - residual for residual, pure in zip(results["residual"]["training_loss"], results["pure"]["training_loss"])]
    return fmean(gains) > 2 * stdev(gains) / len(gains) ** 0.5


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="pure",
    metric="training_loss",
    run=run,
    holds=holds,
    rule=(
        "With four paired seeds, the mean reduction of the training loss after 120 steps by residual modules, at equal multiply-adds, is larger "
        "than two standard errors of that mean.",
        "四个配对的随机种子下，乘加次数相同时，残差模块在 120 步后训练损失的平均降幅，大于该均值标准误的两倍。",
    ),
    seeds=(0, 1, 2, 3),
    minutes=4.0,
)
