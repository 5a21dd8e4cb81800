"""The dense CRF on one 500 x 375 image, 21 classes, 10 mean-field steps: ours against pydensecrf2 (C++, one thread).

Both have the same energy, symmetric normalisation and the same lattice; the largest difference between their answers is printed too. Ours
uses torch's threads: OMP_NUM_THREADS=1 compares one thread with one thread.

    python benchmarks/dense_crf.py [--rounds 15] [--threads N] [--out DIR]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from harness import record, summary, table
from paperworks.papers.segmentation.deeplab_crf.deeplab_crf import DenseCRFConfig, dense_crf

HEIGHT, WIDTH, CLASSES = 375, 500, 21
SETTINGS = {
    "long": DenseCRFConfig(w1=10.0, sigma_alpha=80.0, sigma_beta=13.0, w2=3.0, sigma_gamma=3.0),
    "sharp": DenseCRFConfig(w1=5.0, sigma_alpha=50.0, sigma_beta=5.0, w2=3.0, sigma_gamma=3.0),
}
"""Example values of pydensecrf's documentation, and values from the paper's ranges, which occupy more of the lattice."""


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """Blobs of several sizes, hard edges and a little noise (3 H W, whole numbers 0..255); smooth probabilities (K H W)."""
    torch.manual_seed(0)
    image = torch.full((1, 3, HEIGHT, WIDTH), 128.0)
    for side, strength in ((3, 60), (7, 40), (20, 20)):
        image += strength * F.interpolate(torch.randn(1, 3, side, side), (HEIGHT, WIDTH), mode="bicubic")
    image += 30 * image[:, :1].sub(128).sign() + 3 * torch.randn_like(image)
    energy = F.interpolate(3 * torch.randn(1, CLASSES, 24, 32), (HEIGHT, WIDTH), mode="bilinear")
    return image[0].round().clamp(0, 255), energy[0].softmax(0)


def peer(image: torch.Tensor, probabilities: torch.Tensor, config: DenseCRFConfig) -> Callable[[], torch.Tensor] | None:
    try:
        import pydensecrf.densecrf as densecrf
    except ImportError:
        return None
    unary = -probabilities.clamp(min=1e-5).log().flatten(1).numpy()
    rgb = np.ascontiguousarray(image.permute(1, 2, 0).to(torch.uint8).numpy())

    def run() -> torch.Tensor:
        crf = densecrf.DenseCRF2D(WIDTH, HEIGHT, CLASSES)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(sxy=config.sigma_gamma, compat=config.w2)
        crf.addPairwiseBilateral(sxy=config.sigma_alpha, srgb=config.sigma_beta, rgbim=rgb, compat=config.w1)
        return torch.from_numpy(np.array(crf.inference(config.iterations))).view(CLASSES, HEIGHT, WIDTH)

    return run


def take_turns(arms: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm's calls, one call of each in a round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, call in arms.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    image, probabilities = scene()
    rows = []
    for name, config in SETTINGS.items():
        refine, unit = dense_crf(config), image / 255
        arms: dict[str, Callable[[], torch.Tensor]] = {"paperworks": lambda refine=refine, unit=unit: refine(unit, probabilities)}
        theirs = peer(image, probabilities, config)
        if theirs:
            arms["pydensecrf2"] = theirs
        apart = float((arms["paperworks"]() - theirs()).abs().max()) if theirs else None
        results = summary(take_turns(arms, options.rounds), "paperworks")
        rows += [{"setting": name, "arm": arm, **values, "largest_difference": apart} for arm, values in results.items()]
    print(table(rows))
    peers = ["pydensecrf2"] if "pydensecrf2" in {row["arm"] for row in rows} else []
    what = f"dense CRF, {WIDTH} x {HEIGHT}, {CLASSES} classes, 10 steps"
    print(record("dense_crf", rows, options.out, peers, what=what, threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
