"""Claim: after training, large kernels see further than three times as many layers of small ones (section 5, figure 1).

``paperworks claim replknet``: nine runs of 100 steps on photographs of 32 pixels, about three minutes on one core. The arms are nets of one
stage of stride 2: four pairs of blocks with kernels of 13x13 (``large``), four with 3x3 (``small``), and twelve with 3x3 (``deep``). As in the
paper, the field is measured on images four times as large as those of the training, so that their border is no limit: the square around
the middle that holds half of the heat, as a part of the image, over 20 validation images.

It can fail: shortcuts make every network partly shallow, and the parallel 5x5 kernels may do all the work, as nothing forces a
network to look far on photographs that one thing fills. Accuracy is recorded beside it and not judged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from paperworks.papers.backbones.replknet.replknet import area_ratio, effective_receptive_field, heat
from paperworks.tasks.claim import Claim, Lab, Results
from paperworks.tasks.contract import normalise

STEPS, IMAGES, ENLARGED = 100, 20, 4
ARMS: dict[str, dict[str, Any]] = {
    "large": {"kernels": (13,), "layers": (4,)},
    "small": {"kernels": (3,), "layers": (4,), "small_kernel": None},
    "deep": {"kernels": (3,), "layers": (12,), "small_kernel": None},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network; how far it sees, and its accuracy."""
    trained = lab.fit(variant="small", steps=STEPS, widths=(24,), stem_stride=2, **ARMS[arm])
    images = torch.stack([sample["image"].as_subclass(torch.Tensor) for sample in lab.validation[:IMAGES]])
    images = F.interpolate(images, scale_factor=ENLARGED, mode="bicubic", antialias=True)
    spec = lab.data.spec
    images = normalise(images, torch.tensor(spec.mean), torch.tensor(spec.std))
    network: Any = trained.network
    seen = heat(effective_receptive_field(lambda x: network.pyramid(x)[-1], images))
    areas = {f"area_{round(100 * share)}": area_ratio(seen, share) for share in (0.2, 0.3, 0.5, 0.99)}
    return {**areas, "top1": lab.evaluate(trained.predict)["top1"]}


def holds(results: Results) -> bool:
    """In every seed the square of the large kernels is at least twice that of the deep net, and larger than that of the shallow one."""
    area = {arm: metrics["area_50"] for arm, metrics in results.items()}
    return all(large >= 2 * deep and large > small for large, small, deep in zip(area["large"], area["small"], area["deep"]))


CLAIM = Claim(
    data="pack:cifar10_subset",
    arms=tuple(ARMS),
    control="deep",
    metric="area_50",
    run=run,
    holds=holds,
    rule=(
        "In each of three seeds, the square that holds half of the effective receptive field's heat is, with 13x13 kernels, at least twice as "
        "large as with 3x3 kernels at three times the depth, and larger than with 3x3 kernels at the same depth.",
        "三个随机种子中的每一个：含一半有效感受野热度的中心方块，13x13 核的面积至少是三倍深的 3x3 网络的两倍，也大于同样深的 3x3 网络。",
    ),
    minutes=3.0,
)
