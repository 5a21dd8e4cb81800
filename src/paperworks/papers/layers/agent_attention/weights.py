"""Trained Agent-DeiTs, Agent-PVTs and Agent-Swins: the official code's names mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from paperworks.papers.layers.agent_attention.trunks import Trunk
from paperworks.tasks.base import Published

State = Mapping[str, Tensor]

TRUNKS = (
    (r"^cls_token$", "cuts.0.class_token"),
    (r"^pos_embed$", "cuts.0.positions"),
    (r"^patch_embed\.proj\.", "cuts.0.patches."),
    (r"^patch_embed\.norm\.", "cuts.0.norm."),
    (r"^pos_embed(\d)$", lambda m: f"cuts.{int(m[1]) - 1}.positions"),  # PVT
    (r"^patch_embed(\d)\.proj\.", lambda m: f"cuts.{int(m[1]) - 1}.patches."),
    (r"^patch_embed(\d)\.norm\.", lambda m: f"cuts.{int(m[1]) - 1}.norm."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"^layers\.(\d)\.downsample\.reduction\.", lambda m: f"cuts.{int(m[1]) + 1}.reduce."),  # Swin
    (r"^layers\.(\d)\.downsample\.norm\.", lambda m: f"cuts.{int(m[1]) + 1}.norm."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1."),
    (r"^blocks\.", "stages.0."),  # DeiT
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.dwc\.", ".attention.conv."),
    (r"\.attn\.relative_position_bias_table$", ".attention.positions"),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.fc1\.", ".hidden."),
    (r"\.mlp\.fc2\.", ".output."),
)
"""What the official code of Agent Attention has in common with that of others built on the same trunks."""
BIASES = {
    "an": "gather_bias.block", "ah": "gather_bias.rows", "aw": "gather_bias.columns", "ac": "gather_bias.token",
    "na": "broadcast_bias.block", "ha": "broadcast_bias.rows", "wa": "broadcast_bias.columns", "ca": "broadcast_bias.token",
}  # fmt: skip
"""Agent to number, height, width, class token, and back."""


def renamed(state: State) -> dict[str, Tensor]:
    """A trunk's weights under our names; queries' and keys' and values' projections become one, and what can be computed is left out."""
    kept = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    for name in [k for k in kept if ".attn.kv." in k]:
        query = name.replace(".kv.", ".q.")
        kept[name.replace(".kv.", ".qkv.")] = torch.cat([kept.pop(query), kept.pop(name)])
    return {reduce(lambda name, rule: re.sub(*rule, name), TRUNKS, name): value for name, value in kept.items()}


def from_official(state: State, config: Trunk) -> dict[str, Tensor]:
    """The biases of the second attention, kept there as queries over agents, are turned to agents over queries."""
    ours = {}
    for name, value in renamed(state).items():
        head, _, last = name.rpartition(".")
        kind = last.removesuffix("_bias")
        if kind in BIASES and last != kind:
            value = value if kind in ("an", "na") else value[0].movedim(-1, 1) if kind in ("ha", "wa", "ca") else value[0]
            name = f"{head}.{BIASES[kind]}"
        ours[name] = value
    return ours


SOURCES = {"official": from_official}
PUBLISHED: Mapping[str, Published] = {}
"""The authors' weights lie behind pages of a file-sharing service and without a licence: none that could be fetched by name."""
