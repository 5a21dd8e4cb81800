"""Eager forward pass and training step of the archive's architectures against timm's, torchvision's and MONAI's, in turns in one process.

Ours and the peer's have the same layers and the same number of parameters (checked); weights are fresh, the input is the same. ``ratio`` is
ours / theirs: below 1, ours is faster. ``predict`` is the peer's eager forward pass beside ours in the form in which ``paperworks predict`` runs it (branches
merged, batch norms folded, channels last), ``bf16`` beside ``predict --precision bf16``. The last lines give the geometric means.

    python benchmarks/peers.py [--only ID/VARIANT,...] [--seconds 2] [--out DIR]

``--only`` measures these again and keeps what is recorded of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import monai.networks.nets as monai
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import paperworks
from harness import RESULTS, record, summary, table
from paperworks.export.predict import Bfloat16
from paperworks.nn.fuse import fast
from paperworks.tasks.contract import channels_last
from paperworks.tasks.environment import interleaved

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A network of another library, and what ours needs to be the same."""

    make: Callable[[], nn.Module]
    side: int = 224
    channels: int = 3
    classes: int = 1000
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: bool = True
    """Whether a training step is compared too."""


class Heads(nn.Module):
    """torchvision's SSD without its own scaling, default boxes and suppression: what its two heads say."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.head(list(self.network.backbone(image).values()))["cls_logits"]


def basic_unet() -> nn.Module:
    """Its last up-convolution keeps its features: the same where the first two widths are equal."""
    return monai.BasicUNet(2, 1, 2, features=(*UNET, UNET[0]), act=("relu", {"inplace": True}), norm="batch", bias=False)


def basic_unetpp() -> nn.Module:
    """Likewise."""
    return monai.BasicUNetPlusPlus(
        2, 1, 2, (*UNET, UNET[0]), deep_supervision=True, act=("relu", {"inplace": True}), norm="batch", bias=False
    )


UNET = (32, 32, 64, 128, 256)
PEERS = {
    "convnext/tiny": Peer(partial(timm.create_model, "convnext_tiny")),
    "vit/s/16": Peer(partial(timm.create_model, "vit_small_patch16_224")),
    "vit/b/16": Peer(partial(timm.create_model, "vit_base_patch16_224")),
    "efficientnet/b0": Peer(partial(timm.create_model, "tf_efficientnet_b0")),
    "metaformer/poolformer_s12": Peer(partial(timm.create_model, "poolformer_s12")),
    "metaformer/convformer_s18": Peer(partial(timm.create_model, "convformer_s18")),
    "metaformer/caformer_s18": Peer(partial(timm.create_model, "caformer_s18")),
    "dla/34": Peer(partial(timm.create_model, "dla34")),
    "dla/60": Peer(partial(timm.create_model, "dla60")),
    "inception_v4/v4": Peer(partial(timm.create_model, "inception_v4"), side=299),
    "inception_v4/resnet_v2": Peer(partial(timm.create_model, "inception_resnet_v2"), side=299),
    "inception_v4/v3": Peer(partial(timm.create_model, "inception_v3"), side=299),
    "nasnet/large": Peer(partial(timm.create_model, "nasnetalarge"), side=331),
    "convnext/resnet50": Peer(torchvision.models.resnet50),
    "ssd/300": Peer(Heads, side=300, classes=90, step=False),
    "unet/same": Peer(basic_unet, side=256, channels=1, classes=2, settings={"widths": UNET}),
    "unetpp/norm": Peer(basic_unetpp, side=256, channels=1, classes=2, settings={"widths": UNET, "dropout": 0.0}),
}
"""Our paper/variant -> the network that it is measured against."""


def turns(calls: Mapping[str, Logits], image: torch.Tensor, step: bool, seconds: float) -> dict[str, Any]:
    """Times of a forward pass, or of forward, loss and backward, of both networks."""
    label = torch.zeros(len(image), dtype=torch.long)

    def run(call: Logits) -> None:
        logits = call(image)
        if step:
            F.cross_entropy(logits.flatten(2).mean(2) if logits.ndim > 2 else logits, label).backward()

    with torch.inference_mode(not step):
        return summary(interleaved({name: partial(run, call) for name, call in calls.items()}, seconds=seconds), "paperworks")


def compared(name: str, peer: Peer, seconds: float) -> list[dict[str, Any]]:
    """A row for the forward pass at batch 1, and one for the training step at batch 2."""
    paper, variant = name.split("/", 1)
    size = (peer.side, peer.side)
    mine = paperworks.create(paper, variant=variant, channels=peer.channels, classes=peer.classes, size=size, **peer.settings)
    theirs = peer.make()
    counts = [sum(p.numel() for p in network.parameters()) for network in (mine, theirs)]
    whose = getattr(theirs, "network", theirs)  # behind a wrapper of ours
    deployed = fast(mine)
    short = Bfloat16(Named(deployed), lambda apart: print(f"{name}: bfloat16 is {apart:.2%} from float32"))
    forms: dict[str, Logits] = {
        "forward": lambda image: first(mine(image)),
        "predict": lambda image: first(deployed(channels_last(image))),
        "bf16": lambda image: short(channels_last(image)),
        "step": lambda image: first(mine(image)),
    }
    rows = []
    for what, ours in forms.items():
        step = what == "step"
        if step and not peer.step:
            continue
        mine.train(step)
        theirs.train(step)
        calls = {"paperworks": ours, "peer": lambda image: first(theirs(image))}
        taken = turns(calls, torch.randn(2 if step else 1, peer.channels, *size), step, seconds)
        rows.append(
            {
                "network": name,
                "library": type(whose).__module__.split(".")[0],
                "peer": type(whose).__name__,
                "what": what,
                "ours_ms": 1e3 * taken["paperworks"]["seconds"],
                "theirs_ms": 1e3 * taken["peer"]["seconds"],
                "ratio": 1 / taken["peer"]["times_ours"],
                "n": taken["peer"]["n"],
                "params_equal": counts[0] == counts[1],
            }
        )
    return rows


class Named(nn.Module):
    """A network that gives its logits alone, as deployed ones give one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return first(self.network(image))


def first(output: Any) -> torch.Tensor:
    """The logits of what a network returns: of several heads, the last."""
    if isinstance(output, dict):
        output = output["logits"]
    return output[-1] if isinstance(output, list | tuple) else output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="paper/variant, separated by commas")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    path = (options.out or RESULTS) / "peers.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if options.only and path.exists() else []
    found = {name: [row for row in earlier if row["network"] == name] for name in PEERS}
    for ours in options.only.split(",") if options.only else PEERS:
        found[ours] = compared(ours, PEERS[ours], options.seconds)
        print(table(found[ours]), flush=True)
    rows = [row for name in PEERS for row in found[name]]
    print(table(rows))
    ratios = {what: [row["ratio"] for row in rows if row["what"] == what] for what in ("forward", "predict", "bf16", "step")}
    means = {what: statistics.geometric_mean(values) for what, values in ratios.items() if values}
    print("geometric mean of ours / theirs: " + ", ".join(f"{what} {value:.3f}" for what, value in means.items()))
    print(record("peers", rows, options.out, ("timm", "torchvision", "monai"), threads=torch.get_num_threads(), geometric_mean=means))


if __name__ == "__main__":
    main()
