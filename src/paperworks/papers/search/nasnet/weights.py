"""Trained NASNets: timm's names mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from paperworks.papers.search.nasnet.nasnet import Config
from paperworks.tasks.base import Published

CELL = (
    (r"conv_1x1\.conv", "squeeze.1"),
    (r"conv_1x1\.bn", "squeeze.2"),
    (r"conv_prev_1x1\.conv", "align.1"),
    (r"conv_prev_1x1\.bn", "align.2"),
    (r"path_(\d)\.conv", lambda m: f"align.1.paths.{int(m[1]) - 1}"),
    (r"final_path_bn", "align.1.norm"),
)
BRANCH = {
    "separable_1.depthwise_conv2d": 1, "separable_1.pointwise_conv2d": 2, "bn_sep_1": 3,
    "separable_2.depthwise_conv2d": 5, "separable_2.pointwise_conv2d": 6, "bn_sep_2": 7,
}  # fmt: skip
"""Places within a separable convolution."""


def timm(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Weights of ``nasnetalarge``."""
    return {_named(name, config.repeats): value for name, value in state.items()}


def _named(name: str, repeats: int) -> str:
    fixed = {"conv0.conv": "stem.0", "conv0.bn": "stem.1", "last_linear": "head"}
    for theirs, ours in fixed.items():
        if name.startswith(theirs + "."):
            return name.replace(theirs, ours, 1)
    cell, rest = name.split(".", 1)
    kind, number = cell.rsplit("_", 1)
    place = {
        "cell_stem": f"stem_cells.{number}",
        "reduction_cell": f"reductions.{number}",
        "cell": f"rows.{int(number) // repeats}.{int(number) % repeats}",
    }[kind]
    if found := re.match(r"comb_iter_(\d)_(left|right)\.(.+)\.(\w+)$", rest):
        block, side, part, leaf = found.groups()
        return f"{place}.operations.{2 * int(block) + (side == 'right')}.{BRANCH[part]}.{leaf}"
    for theirs, ours in CELL:
        rest = re.sub(theirs, ours, rest)
    return f"{place}.{rest}"


SOURCES = {"timm": timm}

LICENCE = "Apache-2.0 (TF-slim's checkpoint, converted by Cadene and timm); ImageNet's own terms are for research"
PUBLISHED = {
    "large": Published(source="timm", repo="timm/nasnetalarge.tf_in1k", licence=LICENCE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
}
"""Trained by the authors with TensorFlow."""
