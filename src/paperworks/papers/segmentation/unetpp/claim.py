"""Claim: with deep supervision UNet++ can be cut after training; without it the same cut destroys it.

``paperworks claim unetpp``: nine runs of 150 steps on crowded nuclei, about ten minutes on two cores. ``deep`` has a head on each node of the
top row, ``plain`` one head on the last; both are trained with the same steps and batches, then cut to L^4 ... L^1 and scored with the one head
that is left. A cut of ``plain`` puts its only head on a node that it was never trained on: the tensors fit, so nothing fails loudly.

``unet`` is reported beside them and not judged: the wide U-Net of the paper's capacity control, with more parameters than the whole of
UNet++. Its own labels keep touching nuclei apart by a line of background, which costs it a little of the overlap measured here.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 150
DEPTHS = (4, 3, 2, 1)
WIDE = (9, 18, 36, 72, 144)


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train (once for all cuts), cut, score, and time an image of 256 x 256."""
    kind, _, depth = arm.partition("_")
    if kind == "unet":
        trained = lab.fit("unet", variant="tiny", steps=STEPS, patch=128, widths=WIDE)
        network = trained.network
    else:
        trained = lab.fit(variant="tiny", steps=STEPS, patch=128, deep_supervision=kind == "deep")
        network = trained.network.prune(int(depth))  # type: ignore[operator]
    scores = lab.evaluate(lambda image: trained.predict(image, network))
    image = lab.validation[0]["image"]
    return {
        "iou": scores["iou"],
        "dice": scores["dice"],
        "parameters": float(sum(p.numel() for p in network.parameters())),
        "seconds": lab.seconds(lambda: trained.predict(image, network)),
    }


def holds(results: Results) -> bool:
    """Little is lost with deep supervision, much without."""
    iou = {arm: fmean(metrics["iou"]) for arm, metrics in results.items()}
    gradual = iou["deep_4"] - iou["deep_3"] <= 0.03 and iou["deep_4"] - iou["deep_2"] <= 0.06
    collapse = all(iou["plain_4"] - iou[f"plain_{depth}"] >= 0.2 for depth in (3, 2))
    return gradual and collapse


CLAIM = Claim(
    data="pack:nuclei",
    arms=(*(f"{kind}_{depth}" for kind in ("deep", "plain") for depth in DEPTHS), "unet"),
    control="plain_3",
    metric="iou",
    run=run,
    holds=holds,
    rule=(
        "IoU of the nuclei, averaged over the seeds: with deep supervision cutting L^4 to L^3 costs at most 0.03 and to L^2 at most 0.06; "
        "without it either cut costs at least 0.20.",
        "细胞核的 IoU，按随机种子取平均：有深监督时，从 L^4 剪到 L^3 至多损失 0.03，剪到 L^2 至多损失 0.06；没有深监督时，两种剪法都至少损失 0.20。",
    ),
    minutes=10.0,
)
