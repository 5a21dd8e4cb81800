"""A paper's claim as an experiment that can fail: what a paper's ``claim.py`` states and what it may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from paperworks.tasks.base import Output, Sample
from paperworks.tasks.contract import Task
from paperworks.tasks.trials import Trials

Results = Mapping[str, Mapping[str, list[float]]]
"""arm -> metric -> one value per seed, in the order of the claim's seeds."""


@runtime_checkable
class Trained(Protocol):
    """A trained network in an arm's hands."""

    network: nn.Module
    """In evaluation mode."""

    def predict(self, given: Any, network: nn.Module | None = None) -> Any:
        """The task's prediction (segmentation: probabilities K H W of an image C H W in [0, 1] of any size).

        ``network`` stands in for the trained one (a pruned copy, say).
        """
        ...

    def output(self, image: Tensor) -> Output:
        """Everything that the network returns for one image C H W in [0, 1], padded by reflection to a valid size; batch axis kept."""
        ...


@runtime_checkable
class Lab(Protocol):
    """What an arm may do. Everything in it follows from the claim's pack and the seed."""

    seed: int
    data: Task
    """The claim's pack, opened."""

    @property
    def training(self) -> Sequence[Sample]:
        """Training samples without augmentation."""
        ...

    @property
    def validation(self) -> Sequence[Sample]:
        """Validation samples, likewise."""
        ...

    def fit(self, paper: str | None = None, *, variant: str, steps: int, limit: int | None = None, **settings: Any) -> Trained:
        """Train ``paper`` (default: the claim's own) on the training split, or on its first ``limit`` items.

        The same arguments and seed give the same run, which is trained once and shared between arms.
        ``settings`` are those of ``--set``; ``**{"augment.elastic": 0}`` reaches into a field.
        """
        ...

    def trials(self, *, variant: str, steps: int, **settings: Any) -> Trials:
        """What trains candidates of a search for ``steps`` each, on four fifths of the training split, and values them on the rest."""
        ...

    def evaluate(self, predict: Callable[[Any], Any]) -> dict[str, float]:
        """The task's metrics of ``predict`` over the validation split."""
        ...

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median time of ``call`` in seconds, after a warm-up."""
        ...


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The experiment. ``run`` gives the metrics of one arm for one seed; ``holds`` judges all of them.

    ``rule`` says in words (English, Chinese) what ``holds`` computes. ``control`` is the arm in which the idea is taken out.
    """

    data: str
    arms: tuple[str, ...]
    control: str
    metric: str
    run: Callable[[Lab, str], dict[str, float]]
    holds: Callable[[Results], bool]
    rule: tuple[str, str]
    seeds: tuple[int, ...] = (0, 1, 2)
    minutes: float = 10.0
    """What all arms and seeds take on two cores, about."""
