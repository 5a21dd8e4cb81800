"""Eager forward pass and training step of the archive's architectures against timm's, in turns in one process, with the same input.

Ours and the peer's have the same layers and the same number of parameters (checked); weights are fresh. ``ratio`` is
ours / theirs: below 1, ours is faster. The last lines give the geometric means.

    python benchmarks/peers.py [--only ID/VARIANT,...] [--seconds 4] [--out DIR]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

import paperworks
from harness import record, summary, table
from paperworks.tasks.environment import interleaved

PEERS = {
    "convnext/tiny": "convnext_tiny",
    "vit/s/16": "vit_small_patch16_224",
    "vit/b/16": "vit_base_patch16_224",
    "efficientnet/b0": "tf_efficientnet_b0",
    "metaformer/poolformer_s12": "poolformer_s12",
    "metaformer/convformer_s18": "convformer_s18",
    "metaformer/caformer_s18": "caformer_s18",
    "dla/34": "dla34",
    "dla/60": "dla60",
    "inception_v4/v4": "inception_v4",
    "inception_v4/resnet_v2": "inception_resnet_v2",
    "inception_v4/v3": "inception_v3",
    "nasnet/large": "nasnetalarge",
}
"""Our paper/variant -> timm's name."""
SIDES = {"inception_v4": 299, "inception_resnet_v2": 299, "inception_v3": 299, "nasnetalarge": 331}
"""Of the images, where it is not 224."""


def turns(calls: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], image: torch.Tensor, step: bool, seconds: float) -> dict[str, Any]:
    """Times of a forward pass, or of forward, loss and backward, of both networks."""
    label = torch.zeros(len(image), dtype=torch.long)

    def run(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        logits = call(image)
        if step:
            F.cross_entropy(logits, label).backward()

    with torch.inference_mode(not step):
        return summary(interleaved({name: partial(run, call) for name, call in calls.items()}, seconds=seconds), "paperworks")


def compared(ours: str, theirs: str, seconds: float) -> list[dict[str, Any]]:
    """A row for the forward pass at batch 1, and one for the training step at batch 2."""
    paper, variant = ours.split("/", 1)
    side = SIDES.get(theirs, 224)
    mine = paperworks.create(paper, variant=variant, channels=3, classes=1000, size=(side, side))
    peer = timm.create_model(theirs)
    counts = [sum(p.numel() for p in network.parameters()) for network in (mine, peer)]
    rows = []
    for step in (False, True):
        mine.train(step)
        peer.train(step)
        calls = {"paperworks": lambda image: mine(image)["logits"], "timm": peer}
        taken = turns(calls, torch.randn(2 if step else 1, 3, side, side), step, seconds)
        rows.append(
            {
                "network": ours,
                "peer": theirs,
                "what": "step" if step else "forward",
                "ours_ms": 1e3 * taken["paperworks"]["seconds"],
                "theirs_ms": 1e3 * taken["timm"]["seconds"],
                "ratio": 1 / taken["timm"]["times_ours"],
                "n": taken["timm"]["n"],
                "params_equal": counts[0] == counts[1],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="paper/variant, separated by commas")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for ours in options.only.split(",") if options.only else PEERS:
        rows += compared(ours, PEERS[ours], options.seconds)
        print(table(rows[-2:]), flush=True)
    print(table(rows))
    means = {
        what: math.exp(sum(math.log(row["ratio"]) for row in rows if row["what"] == what) / (len(rows) / 2)) for what in ("forward", "step")
    }
    print(f"geometric mean of ours / timm's: forward {means['forward']:.3f}, training step {means['step']:.3f}")
    print(record("peers", rows, options.out, ("timm",), threads=torch.get_num_threads(), geometric_mean=means))


if __name__ == "__main__":
    main()
