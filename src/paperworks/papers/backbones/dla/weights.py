"""Trained DLAs: the names of timm and of the official code mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.backbones.dla.dla import Config
from paperworks.tasks.base import Published

RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^base_layer\.", "base."),
    (r"^level([01])\.", r"plain.\1."),
    (r"^level(\d)\.", lambda m: f"stages.{int(m[1]) - 2}.tree."),
    (r"\.tree1\.", ".left."),
    (r"\.tree1\.", ".left."),  # twice, as neighbours share a dot
    (r"\.tree2\.", ".right."),
    (r"\.tree1\.", ".left."),
    (r"\.tree2\.", ".right."),
    (r"\.project\.(\d)\.", r".left.shortcut.1.\1."),
    (r"\.root\.conv\.", ".root.merge.0."),
    (r"\.root\.bn\.", ".root.merge.1."),
    (r"\.conv(\d)\.", lambda m: f".branch.{int(m[1]) - 1}.0."),
    (r"\.bn(\d)\.", lambda m: f".branch.{int(m[1]) - 1}.1."),
    (r"^fc\.", "head."),
)


def timm(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Names alone change; the classifier is a 1x1 convolution there."""
    named = {reduce(lambda name, rule: re.sub(*rule, name), RULES, name): value for name, value in state.items()}
    return named | {"head.weight": named["head.weight"].flatten(1)}


def official(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Of ucbdrive/dla: as timm's, without the projections of deep trees, which are never used."""
    deep = tuple(f"level{i}.{'tree1.' * above}project." for i, depth in enumerate(config.depths, 2) for above in range(depth - 1))
    return timm({name: value for name, value in state.items() if not name.startswith(deep)}, config)


SOURCES = {"timm": timm, "official": official}

NAMES = {
    "34": "dla34", "46_c": "dla46_c", "60": "dla60", "102": "dla102", "169": "dla169", "x_46_c": "dla46x_c", "x_60_c": "dla60x_c",
    "x_60": "dla60x", "x_102": "dla102x", "x_102_64": "dla102x2",
}  # fmt: skip
"""timm's."""
LICENCE = "BSD-3-Clause; ImageNet's own terms are for research"
PUBLISHED = {ours: Published(source="timm", repo=f"timm/{name}.in1k", licence=LICENCE) for ours, name in NAMES.items()}
"""Trained by the authors, on timm's copy."""
