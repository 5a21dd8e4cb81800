"""Claim: a film is denoised by learning from its noisy frames alone, five frames know more than one, and it is the blind spot that does it.

``paperworks claim udvd``: nine short trainings on one film of particles in water, to which Gaussian noise of 5 grey values was added; the
film has grey values from 95 to 140. ``five`` and ``one`` differ in the frames that the network is given, ``five`` and ``seeing`` in the blind
spot and in nothing else: the same layers, the same loss, the same noisy targets. What a network without a blind spot can learn from them is
to copy, and then its PSNR is that of ``noisy``. Stopped early it may not have got there, so the rule can fail on either side.

``mean`` is the PSNR before the noisy pixel is put back by Bayes' rule.
"""

from __future__ import annotations

from statistics import fmean

from torch import Tensor, nn

from paperworks.papers.restoration.udvd.udvd import UDVD
from paperworks.tasks.base import Output
from paperworks.tasks.claim import Claim, Lab, Results
from paperworks.tasks.restoration import middle

STEPS = 120
SETTINGS = {"five": {}, "one": {"frames": 1}, "seeing": {"blind": False}}
MARGIN = 0.5
"""Decibels that count as a difference."""


class MeanOnly(nn.Module):
    """The network without Bayes' rule."""

    def __init__(self, network: UDVD) -> None:
        super().__init__()
        self.network, self.grid = network, network.grid

    def forward(self, image: Tensor) -> Output:
        """The mean stands for the result."""
        return {"restored": self.network(image)["mean"]}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm and score it on the held-out frames."""
    if arm == "noisy":
        scores = lab.evaluate(middle)
        return {"psnr": scores["psnr"], "ssim": scores["ssim"], "mean": scores["psnr"]}
    trained = lab.fit(variant="tiny", steps=STEPS, patch=32, **SETTINGS[arm])
    assert isinstance(trained.network, UDVD)
    scores, mean = lab.evaluate(trained.predict), MeanOnly(trained.network).eval()
    return {"psnr": scores["psnr"], "ssim": scores["ssim"], "mean": lab.evaluate(lambda given: trained.predict(given, mean))["psnr"]}


def holds(results: Results) -> bool:
    """Five frames with the blind spot are better than each of the others."""
    psnr = {arm: fmean(metrics["psnr"]) for arm, metrics in results.items()}
    return all(psnr["five"] > psnr[other] + MARGIN for other in ("one", "seeing", "noisy"))


CLAIM = Claim(
    data="pack:particles_bulk_water",
    arms=("five", "one", "seeing", "noisy"),
    control="seeing",
    metric="psnr",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, PSNR of five frames with the blind spot exceeds by more than 0.5 dB that of one frame, that of five frames "
        "without the blind spot, and that of the noisy frames.",
        "对各种子取平均，带盲点的五帧网络的 PSNR 比单帧网络、比不带盲点的五帧网络、比含噪原帧都高出 0.5 dB 以上。",
    ),
    minutes=5.0,
)
