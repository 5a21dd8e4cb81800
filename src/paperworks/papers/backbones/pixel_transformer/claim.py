"""Claim: the smaller the patch, the better, down to single pixels; and a fixed shuffle of the pixels does not matter to single pixels.

``paperworks claim pixel_transformer``: fifteen runs on handwritten digits brought down to 8 x 8 pixels, about four minutes on one core. One encoder
(2 layers, width 64), 300 steps; only the patch differs: 1, 2 or 4 pixels. Then 256 swaps of pixels, the same for all images, before the
network of pixels and before that of patches of 4. Steps are equal, as the paper's epochs are; the multiply-adds are reported beside the
accuracy, so that nobody takes that for equal cost.

It can fail: 5,000 digits are few, 300 steps very short, and what a patch knows for nothing (its pixels belong together) may be worth more than
the finer tokens. The size of the images, the steps and the network were chosen by their running time alone.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from paperworks.papers.backbones.pixel_transformer.pixel_transformer import VARIANTS, multiply_adds
from paperworks.tasks.claim import Claim, Lab, Results

SIDE = 8
STEPS = 300
SIZE = {"layers": 2, "image_size": SIDE}
SWAPS = 256
ARMS = {
    "pixel": {"patch": 1},
    "patch2": {"patch": 2},
    "patch4": {"patch": 4},
    "pixel_shuffled": {"patch": 1, "swaps": SWAPS},
    "patch4_shuffled": {"patch": 4, "swaps": SWAPS},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network: its accuracy, and the multiply-adds of one image in millions."""
    trained = lab.fit(variant="small", steps=STEPS, **SIZE, **ARMS[arm], **{"augment.flip": 0.0})  # pyright: ignore[reportArgumentType]
    config = replace(VARIANTS["small"], **SIZE, **ARMS[arm])
    cost = multiply_adds(config, SIDE, lab.data.spec.channels, len(lab.data.spec.classes))
    return {"top1": lab.evaluate(trained.predict)["top1"], "mega_multiply_adds": cost / 1e6}


def holds(results: Results) -> bool:
    """Averaged over the seeds, accuracy rises as the patch shrinks, and shuffling costs pixels less than patches of 4."""
    top1 = {arm: fmean(metrics["top1"]) for arm, metrics in results.items()}
    rises = top1["pixel"] > top1["patch2"] > top1["patch4"]
    return rises and top1["pixel"] - top1["pixel_shuffled"] < top1["patch4"] - top1["patch4_shuffled"]


CLAIM = Claim(
    data="pack:mnist_subset",
    arms=tuple(ARMS),
    control="patch4",
    metric="top1",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds and at equal steps, accuracy rises from patches of 4 to patches of 2 to single pixels, and a fixed shuffle of the "
        "pixels costs single pixels less accuracy than patches of 4.",
        "按随机种子取平均、步数相同：小块边长从 4 到 2 再到单个像素，准确率依次上升；而且固定地打乱像素，单像素损失的准确率比边长 4 的小块少。",
    ),
    minutes=5.0,
)
