"""What a paper offers that says which unlabelled images to label next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class Chosen(NamedTuple):
    """Images to label, in the order in which they were chosen."""

    indices: list[int]
    scores: list[float]
    """What is gained by all of them up to and with each, in nats."""


Acquire = Callable[[nn.Module, Iterable[Tensor], int], Chosen]
"""(network, normalised images in batches B C S S, how many) -> those to label; indices count through the batches, which are gone through once."""


@dataclass(frozen=True)
class Acquirer:
    """A way to choose, as an entry of a module's ``ACQUIRERS``."""

    config: Any
    """Frozen dataclass with the defaults; ``--set`` changes its fields."""
    build: Callable[[Any], Acquire]
