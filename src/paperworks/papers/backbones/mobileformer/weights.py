"""Trained Mobile-Formers: the released code's names mapped to ours.

The released weights lie on a drive that needs a browser, under no stated licence: nothing is fetched here. A file that was fetched by hand is
mapped by ``convert``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.backbones.mobileformer.mobileformer import Config
from paperworks.tasks.base import Published

State = Mapping[str, Tensor]

BRIDGE: tuple[tuple[str, str], ...] = (
    (r"local_global\.alpha\.0\.", "to_former.gate."),
    (r"local_global\.q\.", "to_former.query."),
    (r"local_global\.proj\.", "to_former.out."),
    (r"local_global\.layer_norm\.", "to_former.norm."),
    (r"global_block\.q\.", "former.query."),
    (r"global_block\.channel_mlp\.", "former.out."),
    (r"global_block\.layer_norm\.", "former.norm1."),
    (r"global_block\.ffn_norm\.", "former.norm2."),
    (r"global_block\.ffn\.", "former.mlp."),
    (r"global_local\.k\.", "to_mobile.key."),
    (r"global_local\.proj\.", "to_mobile.value."),
    (r"\.hyper1\.hyper\.", ".mobile.relu1.slopes."),
    (r"\.hyper[23]\.hyper\.", ".mobile.relu2.slopes."),
)
BOTTLENECK = {"conv1": "expand", "conv2": "depthwise", "conv3": "project"}
DOWNSAMPLING = {"conv1": "stride", "conv2": "narrow", "conv3": "expand", "conv4": "project"}


def from_official(state: State, config: Config) -> dict[str, Tensor]:
    """AAboys/MobileFormer, ``mobile_former.py``."""
    inner = state.get("state_dict", state)  # a checkpoint of its training script
    state = inner if isinstance(inner, Mapping) else state
    shift = int(config.groups > 1)  # where channels are shuffled first

    def ours(name: str) -> str:
        if found := re.match(r"features\.0\.conv\.(\d)\.(.*)", name):
            place = int(found[1])  # convolution, norm, ReLU, shuffle (or nothing), convolution, norm
            return f"lite.depthwise.{place}.{found[2]}" if place < 2 else f"lite.project.{place - 4}.{found[2]}"
        if found := re.match(r"features\.(\d+)\.(conv\d)\.(.*)", name):
            block = int(found[1])
            parts = BOTTLENECK if config.blocks[block][2] == 1 else DOWNSAMPLING
            return f"blocks.{block - 1}.mobile.{parts[found[2]]}.{found[3]}"
        if found := re.match(r"classifier\.conv\.(\d)\.(.*)", name):
            return f"expand.{int(found[1]) - 1 + shift}.{found[2]}"
        name = re.sub(r"^features\.(\d+)\.", lambda m: f"blocks.{int(m[1]) - 1}.", name)
        name = reduce(lambda text, rule: re.sub(*rule, text), BRIDGE, name)
        return name.replace("tokens.weight", "tokens").replace("classifier.fc.", "merge.").replace("classifier.classifier.", "head.")

    return {ours(name): value for name, value in state.items()}


SOURCES: Mapping[str, Callable[[State, Config], dict[str, Tensor]]] = {"official": from_official}
PUBLISHED: Mapping[str, Published] = {}
