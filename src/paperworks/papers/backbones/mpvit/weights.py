"""Trained MPViTs: the official code's names mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.backbones.mpvit.mpvit import Config
from paperworks.tasks.base import Published

State = Mapping[str, Tensor]

RULES: tuple[tuple[str, str], ...] = (
    (r"^patch_embed_stages\.(\d)\.patch_embeds\.(\d)\.patch_conv\.", r"stages.\1.embeddings.\2."),
    (r"(\.embeddings\.\d)\.dwconv\.", r"\1.0."),
    (r"(\.embeddings\.\d)\.pwconv\.", r"\1.1."),
    (r"(\.embeddings\.\d)\.bn\.", r"\1.2."),
    (r"^mhca_stages\.(\d)\.", r"stages.\1."),
    (r"\.mhca_blks\.(\d)\.", r".encoders.\1."),
    (r"\.MHCA_layers\.", ".blocks."),
    (r"\.cpe\.proj\.", ".places."),
    (r"\.crpe\.conv_list\.", ".relative.convs."),
    (r"\.factoratt_crpe\.", ".attention."),
    (r"\.attention\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"\.InvRes\.conv1\.", ".local.expand."),
    (r"\.InvRes\.dwconv\.", ".local.depthwise."),
    (r"\.InvRes\.norm\.", ".local.norm."),
    (r"\.InvRes\.conv2\.", ".local.project."),
    (r"\.conv\.(\w+)$", r".0.\1"),
    (r"\.bn\.(\w+)$", r".1.\1"),
    (r"^cls_head\.cls\.", "head."),
)
SHARED = r"\.MHCA_layers\.\d+\.(factoratt_crpe\.)?c(r?)pe\."
"""The encodings that a path's blocks share stand in a state dict under the path, and again under each block."""


def from_official(state: State, config: Config) -> dict[str, Tensor]:
    """youngwanLEE/MPViT, ``mpvit.py``."""
    inner = state.get("model", state)  # a checkpoint of the official training script
    state = inner if isinstance(inner, Mapping) else state
    kept = {name: value for name, value in state.items() if not re.search(SHARED, name)}
    return {reduce(lambda name, rule: re.sub(*rule, name), RULES, name): value for name, value in kept.items()}


SOURCES: Mapping[str, Callable[[State, Config], dict[str, Tensor]]] = {"official": from_official}

LICENCE = "GPL-3.0 for non-commercial use, otherwise by contract with ETRI; ImageNet's own terms are for research"
LINKS = {"tiny": "1cmquqyjmaeeg1n", "xsmall": "vvpq2m474g8tvyq", "small": "y3dnmmy8h4npz7a", "base": "la8w31m0apj2830"}
PUBLISHED = {
    name: Published(source="official", url=f"https://dl.dropbox.com/s/{link}/mpvit_{name}.pth", licence=LICENCE)
    for name, link in LINKS.items()
}
"""Trained by the authors on ImageNet-1K."""
