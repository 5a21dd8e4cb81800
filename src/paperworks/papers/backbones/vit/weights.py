"""Trained ViTs: the names of timm and torchvision mapped to ours, position embeddings interpolated where the image's size is another one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.backbones.vit.vit import Config, resized
from paperworks.tasks.base import Published

State = Mapping[str, Tensor]
Rules = tuple[tuple[str, str], ...]

TIMM: Rules = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.backbone\.stem\.", "resnet."),
    (r"^patch_embed\.backbone\.", "resnet."),
    (r"^patch_embed\.proj\.", "patches."),
    (r"\.downsample\.conv\.", ".shortcut.0."),
    (r"\.downsample\.norm\.", ".shortcut.1."),
    (r"^blocks\.", "layers."),
    (r"\.attn\.qkv\.", ".msa.qkv."),
    (r"\.attn\.proj\.", ".msa.out."),
    (r"\.mlp\.fc1\.", ".hidden."),
    (r"\.mlp\.fc2\.", ".output."),
    (r"^head\.", "head.0."),
)
TORCHVISION: Rules = (
    (r"^encoder\.pos_embedding$", "positions"),
    (r"^conv_proj\.", "patches."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_", "layers."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".msa.qkv."),
    (r"\.self_attention\.out_proj\.", ".msa.out."),
    (r"\.mlp\.0\.", ".hidden."),
    (r"\.mlp\.3\.", ".output."),
    (r"^heads\.pre_logits\.", "head.0."),
)


def renamed(state: State, rules: Rules) -> dict[str, Tensor]:
    """The same values under the names that the rules, one after the other, make of theirs."""
    return {reduce(lambda name, rule: re.sub(*rule, name), rules, name): value for name, value in state.items()}


def fitted(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Position embeddings as long as the configuration's images ask for, where it says of what size they are."""
    if config.image_size and config.patch:
        stride = config.patch * (4 * 2 ** (len(config.resnet) - 1) if config.resnet else 1)
        side = config.image_size // stride
        state["positions"] = resized(state["positions"], side, side)
    return state


def from_timm(state: State, config: Config) -> dict[str, Tensor]:
    """``vit_*_patch*_*`` and the hybrids ``vit_*_r50_*``, whose ResNet numbers its units from stage to stage anew."""
    before = [sum(config.resnet[:i]) for i in range(len(config.resnet))]

    def count(match: re.Match[str]) -> str:
        return f"resnet.units.{before[int(match[1])] + int(match[2])}."

    named = {re.sub(r"^resnet\.stages\.(\d)\.blocks\.(\d+)\.", count, k): v for k, v in renamed(state, TIMM).items()}
    return fitted(named, config)


def from_torchvision(state: State, config: Config) -> dict[str, Tensor]:
    """``vit_b_16`` and its sisters; with ``representation_size`` where the configuration has the pre-training head."""
    return fitted(renamed(state, (*TORCHVISION, (r"^heads\.head\.", f"head.{2 if config.pretraining else 0}."))), config)


SOURCES: Mapping[str, Callable[[State, Config], dict[str, Tensor]]] = {"timm": from_timm, "torchvision": from_torchvision}

HALF = (0.5, 0.5, 0.5)
LICENCE = "Apache-2.0 (Google; ImageNet's own terms are for research)"
REPOSITORIES = {
    "b/16": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "b/32": "vit_base_patch32_224.augreg_in21k_ft_in1k",
    "l/16": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "l/32": "vit_large_patch32_384.orig_in21k_ft_in1k",
    "r50+b/16": "vit_base_r50_s16_384.orig_in21k_ft_in1k",
    "r50+l/32": "vit_large_r50_s32_224.augreg_in21k_ft_in1k",
    "s/16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "ti/16": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}
PUBLISHED = {
    name: Published(source="timm", repo=f"timm/{repo}", licence=LICENCE, mean=HALF, std=HALF) for name, repo in REPOSITORIES.items()
}
"""Trained by the authors on ImageNet-21k, converted by timm: ``orig`` in this paper, ``augreg`` in a later one (arXiv 2106.10270)."""
