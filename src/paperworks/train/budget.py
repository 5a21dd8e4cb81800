"""How long to train: steps, epochs or a time, and the plan that is made of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from paperworks.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Exactly one of the three is set."""

    seconds: float | None = None
    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.seconds, self.steps, self.epochs) if v is not None]
        if len(given) != 1:
            raise InputError("give one of --budget, --epochs and --steps")
        if given[0] <= 0:
            raise InputError(f"a budget of {given[0]} trains nothing; give a number above 0")

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:g} s"
        return f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``10m``, ``1.5h``, ``1h30m`` or a bare number of seconds.

    Raises:
        InputError: the text is no duration.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip().lower())
    try:
        parts = [float(p) for p in match.groups(default="0")] if match and text.strip() else None
    except ValueError:
        parts = None
    if parts is None or not (seconds := parts[0] * 3600 + parts[1] * 60 + parts[2]):
        raise InputError(f"--budget {text!r} is no duration above zero; write 90s, 10m or 1h30m")
    return seconds


@dataclass(frozen=True)
class Plan:
    """What the budget came to. It is made once and kept with the run, so that a resumed run does what was planned."""

    steps: int
    validate_every: int
    seconds_per_step: float | None = None


def plan(budget: Budget, *, samples: int, batch: int, step: float | None, validation: float, spent: float, validations: int = 8) -> Plan:
    """Fit the number of steps to the budget.

    Args:
        budget: what was asked for.
        samples: training samples in an epoch.
        batch: samples in a step, over all processes.
        step: measured seconds of a training step; needed for a budget in time.
        validation: measured seconds of one look at the validation images.
        spent: seconds of the budget that are gone already.
        validations: looks at the validation images, about.
    """
    if budget.steps is not None:
        steps = budget.steps
    elif budget.epochs is not None:
        steps = math.ceil(budget.epochs * samples / batch)
    else:
        assert budget.seconds is not None and step is not None
        # A tenth of a time budget at most goes into looking.
        validations = max(1, min(validations, int(0.1 * budget.seconds / max(validation, 1e-6))))
        left = budget.seconds - spent - validations * validation
        steps = max(1, int(left / step))
    return Plan(steps, max(1, math.ceil(steps / validations)), step)
