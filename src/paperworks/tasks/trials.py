"""Searching before training: what a paper that looks for an architecture may do, and what it hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

if TYPE_CHECKING:
    from paperworks.tasks.base import Recipe
    from paperworks.tasks.contract import Task


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate that was trained and valued."""

    settings: Mapping[str, Any]
    """What makes it different, as with ``--set``."""
    value: float
    """The task's metric on training items that were held out for it."""
    seconds: float
    network: nn.Module
    """In evaluation mode."""


@runtime_checkable
class Trials(Protocol):
    """The one way to try candidates: here one after the other, or side by side on a Ray cluster. Validation items are not touched."""

    data: Task
    """For a search that trains one network of its own: ``train`` are the items of the candidates, ``val`` those that value them."""
    steps: int
    """Training steps of each candidate; of a search that trains one network, of that."""

    @property
    def recipe(self) -> Recipe:
        """Of the training that is to come, ``--set`` included; for a search that trains one network of its own."""
        ...

    @property
    def seed(self) -> int:
        """Decides all chance of the search and of its trainings."""
        ...

    def run(
        self,
        candidates: Sequence[Mapping[str, Any]],
        *,
        variant: str | None = None,
        begin: Sequence[Callable[[nn.Module], None]] | None = None,
    ) -> list[Trial]:
        """Train each candidate for the same number of steps on four fifths of the training items and value it on the others.

        Args:
            candidates: settings of the paper, in addition to those that were asked for; plain values for JSON.
            variant: of which they are settings; default: the one that is to be trained in the end.
            begin: for each candidate what sets the weights of its fresh network in place, such as those of a network that it grew from.

        Returns:
            In the order of ``candidates``. The same seed gives the same values.
        """
        ...

    def value(self, network: nn.Module) -> float:
        """The task's metric of a network as it is, on the items that were held out."""
        ...

    def stepped(self, done: int, /) -> None:
        """Is told by a search that trains one network of its own how many of its ``steps`` are done."""
        ...


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a paper finds settings for the data at hand."""

    trials: Callable[[Any], int]
    """configuration -> how many candidates are trained; 0 where the configuration names what would be searched for."""
    find: Callable[[Any, Trials], Mapping[str, Any]]
    """configuration, trials -> the settings found, plain values for JSON."""
