"""ImageNet weights: those of the authors as timm publishes them, and torchvision's own.

The authors' (timm's ``tf_efficientnet_*``) belong to the variants as they are. Others were trained with symmetric padding and need
``same=False``: torchvision's (``eps=1e-5`` for B0 to B4, 1e-3 for B5 to B7) and timm's ``efficientnet_*`` (``eps=1e-5``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from paperworks.papers.backbones.efficientnet.efficientnet import Config, repeats_of
from paperworks.tasks.base import Published

PARTS = {
    # ours: (timm's where the block expands, where it does not; torchvision's where it expands, where it does not)
    "expand.0": ("conv_pw", "", "block.0.0", ""),
    "expand.1": ("bn1", "", "block.0.1", ""),
    "depthwise.0": ("conv_dw", "conv_dw", "block.1.0", "block.0.0"),
    "depthwise.1": ("bn2", "bn1", "block.1.1", "block.0.1"),
    "se.squeeze": ("se.conv_reduce", "se.conv_reduce", "block.2.fc1", "block.1.fc1"),
    "se.excite": ("se.conv_expand", "se.conv_expand", "block.2.fc2", "block.1.fc2"),
    "project.0": ("conv_pwl", "conv_pw", "block.3.0", "block.2.0"),
    "project.1": ("bn3", "bn2", "block.3.1", "block.2.1"),
}


def layers(config: Config) -> Iterator[tuple[str, str, str]]:
    """Our name of each layer, timm's and torchvision's."""
    last = len(config.stages) + 1
    yield from (("stem.0", "conv_stem", "features.0.0"), ("stem.1", "bn1", "features.0.1"))
    for i, stage in enumerate(config.stages):
        for j in range(repeats_of(stage.repeats, config.depth)):
            plain = stage.ratio == 1
            for ours, names in PARTS.items():
                timm, torchvision = names[plain], names[2 + plain]
                if timm:
                    yield f"stages.{i}.{j}.{ours}", f"blocks.{i}.{j}.{timm}", f"features.{i + 1}.{j}.{torchvision}"
    yield from (("head.0", "conv_head", f"features.{last}.0"), ("head.1", "bn2", f"features.{last}.1"))
    yield "classifier", "classifier", "classifier.1"


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The entries of ``state``, each under our name of its layer."""
    parts = {key: key.rpartition(".") for key in state}
    return {f"{names[layer]}.{kind}": state[key] for key, (layer, _, kind) in parts.items()}


def from_timm(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our state dict from that of timm's ``tf_efficientnet_*`` or ``efficientnet_*``."""
    return renamed(state, {timm: ours for ours, timm, _ in layers(config)})


def from_torchvision(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our state dict from that of torchvision's ``efficientnet_*``."""
    return renamed(state, {torchvision: ours for ours, _, torchvision in layers(config)})


SOURCES = {"timm": from_timm, "torchvision": from_torchvision}

PUBLISHED = {
    f"b{i}": Published(source="timm", repo=f"timm/tf_efficientnet_b{i}.aa_in1k", licence="Apache-2.0 (the authors', converted by timm)")
    for i in range(8)
}
