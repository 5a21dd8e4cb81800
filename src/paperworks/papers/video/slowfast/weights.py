"""Trained SlowFast networks: pytorchvideo's names mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, cast

from torch import Tensor

from paperworks.papers.video.slowfast.slowfast import Config
from paperworks.tasks.base import Published

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

NAMES: Rules = (
    (r"^blocks\.(\d)\.multipathway_fusion\.", r"lateral.\1."),
    (r"^blocks\.(\d)\.multipathway_blocks\.0\.", r"slow.\1."),
    (r"^blocks\.(\d)\.multipathway_blocks\.1\.", r"fast.\1."),
    (r"^blocks\.(\d)\.(?=conv|norm|res_blocks)", r"slow.\1."),  # the Slow pathway alone
    (r"^blocks\.\d\.proj\.", "head."),
    (r"^(slow|fast)\.0\.(conv|norm)\.", lambda m: f"{m[1]}.stem.0.{['conv', 'norm'].index(m[2])}."),
    (r"^(slow|fast)\.(\d)\.res_blocks\.", lambda m: f"{m[1]}.stages.{int(m[2]) - 1}."),
    (r"\.branch1_conv\.", ".shortcut.0."),
    (r"\.branch1_norm\.", ".shortcut.1."),
    (r"\.branch2\.conv_([abc])\.", r".\1.0."),
    (r"\.branch2\.norm_([abc])\.", r".\1.1."),
    (r"^(lateral\.\d)\.conv_fast_to_slow\.", r"\1.0."),
    (r"^(lateral\.\d)\.norm\.", r"\1.1."),
)


def renamed(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A state dict of pytorchvideo, or a checkpoint that holds one, under our names."""
    inner = cast(Mapping[str, Any], state).get("model_state", state)
    return {reduce(lambda name, rule: re.sub(*rule, name), NAMES, name): value for name, value in inner.items()}


SOURCES = {"pytorchvideo": renamed}

ZOO = "https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/"
LICENCE = "Apache-2.0 (pytorchvideo's model zoo, trained on Kinetics-400; the films have terms of their own)"
FILES = {"8x8": "SLOWFAST_8x8_R50.pyth", "8x8_r101": "SLOWFAST_8x8_R101.pyth", "slow_8x8": "SLOW_8x8_R50.pyth"}
PUBLISHED = {
    name: Published(source="pytorchvideo", url=ZOO + file, licence=LICENCE, classes=400, mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225))
    for name, file in FILES.items()
}
