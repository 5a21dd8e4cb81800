"""Trained ConvNeXts: the names of timm, torchvision and the official code mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.backbones.convnext.convnext import Config
from paperworks.tasks.base import Published

State = Mapping[str, Tensor]
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

TIMM: Rules = (
    (r"^stem\.", "down.0."),
    (r"^stages\.(\d)\.downsample\.", r"down.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".depthwise."),
    (r"\.mlp\.fc1\.", ".expand."),
    (r"\.mlp\.fc2\.", ".project."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)
TORCHVISION: Rules = (
    (r"^features\.([0246])\.", lambda m: f"down.{int(m[1]) // 2}."),
    (r"^features\.([1357])\.", lambda m: f"stages.{int(m[1]) // 2}."),
    (r"\.block\.0\.", ".depthwise."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".expand."),
    (r"\.block\.5\.", ".project."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "norm."),
    (r"^classifier\.2\.", "head."),
)
OFFICIAL: Rules = (
    (r"^downsample_layers\.", "down."),
    (r"^stem\.", "down.0."),  # isotropic
    (r"^blocks\.", "stages.0."),  # isotropic
    (r"\.dwconv\.", ".depthwise."),
    (r"\.pwconv1\.", ".expand."),
    (r"\.pwconv2\.", ".project."),
)


def renamed(rules: Rules) -> Callable[[State, Config], dict[str, Tensor]]:
    """A mapping of state dicts that changes names alone, and takes torchvision's layer scale (D 1 1) for a vector."""

    def ours(state: State, config: Config) -> dict[str, Tensor]:
        names = (reduce(lambda name, rule: re.sub(*rule, name), rules, name) for name in state)
        return {name: value.flatten() if name.endswith(".gamma") else value for name, value in zip(names, state.values())}

    return ours


SOURCES = {"timm": renamed(TIMM), "torchvision": renamed(TORCHVISION), "official": renamed(OFFICIAL)}

LICENCE = "MIT in the authors' repository, Apache-2.0 on timm's copy; ImageNet's own terms are for research"
PUBLISHED = {
    **{
        name: Published(source="timm", repo=f"timm/convnext_{name}.fb_in1k", licence=LICENCE) for name in ("tiny", "small", "base", "large")
    },
    "xlarge": Published(source="timm", repo="timm/convnext_xlarge.fb_in22k_ft_in1k", licence=LICENCE),
}
"""Trained by the authors, converted by timm."""
