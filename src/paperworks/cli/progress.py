"""Progress on stderr, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
        console=Console(stderr=True),
        transient=False,
    )


@contextmanager
def counting(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that counts (done, total); it appears with the first count."""
    with _bars() as bars:
        row = None

        def count(done: int, total: int) -> None:
            nonlocal row
            if row is None:
                row = bars.add_task(text, total=total, values="")
            bars.update(row, completed=done, total=total)

        yield count


class TrainingBar:
    """One training's bar: steps, loss, the last look at the validation images."""

    def __init__(self, name: str, bars: Progress | None = None) -> None:
        self.name, self.own = name, bars is None
        self.bars = bars or _bars()
        self.row: Any = None
        self.searching: Any = None
        self.looked = ""

    def __enter__(self) -> TrainingBar:
        if self.own:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.own:
            self.bars.stop()

    def start(self, plan: Any, step: int) -> None:
        """The plan is made."""
        self.row = self.bars.add_task(self.name, total=plan.steps, completed=step, values="")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done."""
        self.bars.update(self.row, completed=step, values=f"loss {values['loss']:.3f} {self.looked}")

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the first metric."""
        name, value = next(iter(metrics.items()))
        self.looked = f"{name} {value:.3f}"

    def tried(self, done: int, count: int, value: float) -> None:
        """A candidate of a search is trained."""
        self._search("candidates", done, count, f"value {value:.3f}")

    def searched(self, done: int, steps: int) -> None:
        """A step of the search is done."""
        self._search("search", done, steps, "")

    def _search(self, what: str, done: int, total: int, values: str) -> None:
        if self.searching is None:
            self.searching = self.bars.add_task(f"{self.name}: {what}", total=total, values="")
        self.bars.update(self.searching, completed=done, values=values)


class ComparisonBars:
    """A bar per training, and notes between them."""

    def __init__(self) -> None:
        self.bars = _bars()

    def __enter__(self) -> ComparisonBars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def paper(self, name: str, seed: int) -> TrainingBar:
        """A training's listener."""
        return TrainingBar(name if seed == 0 else f"{name} (seed {seed})", self.bars)

    def note(self, text: str) -> None:
        """A line above the bars."""
        self.bars.console.print(text, markup=False, highlight=False)
