"""Trained SLAB-DeiTs, SLAB-PVTs and SLAB-Swins: the official code's names mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.layers.agent_attention.weights import State, renamed
from paperworks.papers.layers.slab.slab import Config
from paperworks.tasks.base import Published

NORMS = (
    (r"\b(norm\d?)\.norm1\.", r"\1.layer_norm."),
    (r"\b(norm\d?)\.norm2\.alpha$", r"\1.rep.eta"),
    (r"\b(norm\d?)\.norm2\.bn\.", r"\1.rep.bn."),
    (r"\.positional_encoding$", ".positions"),
)
UNUSED = ("cls_token", "warm", "iter", "total_step")
"""A class token that nothing reads, and counters of steps."""


def from_official(state: State, config: Config) -> dict[str, Tensor]:
    """Names changed, what is not used left out."""
    kept = {k: v for k, v in state.items() if k.rpartition(".")[2] not in UNUSED}
    return {reduce(lambda name, rule: re.sub(*rule, name), NORMS, name): value for name, value in renamed(kept).items()}


SOURCES = {"official": from_official}
LICENCE = "none stated by the authors; ImageNet's own terms are for research"
RELEASE = "https://github.com/xinghaochen/SLAB/releases/download/ckpts"
FILES = {"deit_t": "deit_tiny", "deit_s": "deit_small", "pvt_t": "pvt_tiny", "swin_t": "swin_tiny", "swin_s": "swin_small"}
PUBLISHED: Mapping[str, Published] = {
    variant: Published(source="official", url=f"{RELEASE}/slab_{name}.pth", licence=LICENCE) for variant, name in FILES.items()
}
"""Trained by the authors."""
