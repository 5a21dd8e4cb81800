"""Trained ASTERs: the names of the port ayumiymk/aster.pytorch mapped to ours.

Its checkpoint is handed out from a cloud drive by hand, so nothing is fetched: ``paperworks.convert("aster", state, source="aster.pytorch")``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.reading.aster.aster import Config
from paperworks.tasks.base import Published

State = Mapping[str, Tensor]
RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^module\.", ""),  # of a training on several devices
    (r"^stn_head\.stn_convnet\.(\d+)\.([01])\.", lambda m: f"rectifier.convolutions.{2 * int(m[1]) + int(m[2])}."),
    (r"^stn_head\.stn_", "rectifier."),
    (r"^encoder\.layer0\.", "encoder.stem."),
    (r"^encoder\.layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}."),
    (r"\.downsample\.", ".shortcut."),
    (r"^encoder\.rnn\.(\w+)_l(\d)", r"encoder.context.\2.rnn.\1_l0"),
    (r"^decoder\.decoder\.", "decoders.0."),
    (r"\.attention_unit\.sEmbed\.", ".query."),
    (r"\.attention_unit\.xEmbed\.", ".key."),
    (r"\.attention_unit\.wEmbed\.", ".score."),
    (r"\.tgt_embedding\.", ".embedding."),
    (r"\.gru\.(\w+)_l0$", r".cell.\1"),
    (r"\.fc\.", ".output."),
)


def ported(state: State, config: Config) -> dict[str, Tensor]:
    """The port's state dict under our names; the constants of its spline are left out, as ours follow from the configuration."""
    kept = {name: value for name, value in state.items() if not re.match(r"(module\.)?tps\.", name)}
    return {reduce(lambda key, rule: re.sub(*rule, key), RULES, name): value for name, value in kept.items()}


SOURCES = {"aster.pytorch": ported}
PUBLISHED: Mapping[str, Published] = {}
