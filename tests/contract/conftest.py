"""What the contract tests share. They run over every paper of the registry and name none."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paperworks import papers
from paperworks.tasks import task
from paperworks.tasks.base import Batch, Loss, Paper, grid_of
from paperworks.tasks.contract import Task


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``card`` runs for every paper, one for ``subject`` for every network, one for ``dense`` for those that segment images."""
    cards = papers.cards()
    if "card" in metafunc.fixturenames:
        metafunc.parametrize("card", list(cards.values()), ids=list(cards))
    subjects = [Subject(name) for name, card in cards.items() if card.variants]
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize("subject", subjects, ids=[s.id for s in subjects])
    if "dense" in metafunc.fixturenames:
        found = [s for s in subjects if s.card.task == "segmentation" and 2 in s.card.ndim]
        metafunc.parametrize("dense", found, ids=[s.id for s in found])


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums on every machine, and no fight for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Subject:
    """A network's ``test`` variant in the hands of a test."""

    id: str

    @property
    def card(self) -> papers.Card:
        return papers.card(self.id)

    @property
    def paper(self) -> Paper:
        return papers.paper(self.id)

    @property
    def task(self) -> type[Task]:
        return task(self.card.task)

    @property
    def config(self) -> Any:
        return self.paper.variants["test"]

    @property
    def loss(self) -> Loss:
        return self.task.loss_of(self.paper, self.config)

    def spec(self, channels: int = 1, classes: int = 3, ndim: int | None = None) -> Any:
        return self.task.plain_spec(channels, classes, ndim or self.card.ndim[0])

    def network(self, channels: int = 1, classes: int = 3, ndim: int | None = None, seed: int = 0) -> Any:
        """As a training starts with it."""
        torch.manual_seed(seed)
        return self.paper.build(self.spec(channels, classes, ndim), self.config)

    def filled(self, channels: int = 1, classes: int = 3, ndim: int | None = None) -> Any:
        """In evaluation mode, with weights that follow from their names alone and outputs that are far from zero."""
        network = self.network(channels, classes, ndim)
        fill(network)
        return network.eval()

    def batch(
        self, network: nn.Module, channels: int = 1, classes: int = 3, ndim: int | None = None, size: int = 32, batch: int = 2
    ) -> Batch:
        return self.task.plain_batch(network, self.spec(channels, classes, ndim), size=size, batch=batch)

    def given(self, network: nn.Module, channels: int = 1, classes: int = 3, batch: int = 2) -> Any:
        """What a network in evaluation mode takes."""
        return self.task.example(self.spec(channels, classes), grid_of(network), batch=batch)

    def output(self, network: nn.Module, given: Any) -> Tensor:
        """The output that the task asks for."""
        return network(given)[self.task.output]


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1] that follow from a name and an index: sines of squares, so that they do not repeat.

    A seed would not do: torch's random numbers may change from version to version.
    """
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(zlib.crc32(name.encode()) % 1000 + 0.7 * index**2).view(shape)


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Give every parameter and every running statistic a value from its name: matrices and kernels keep the scale of what flows through."""
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        kind = name.rpartition(".")[2]
        if kind == "running_mean":
            new = 0.2 * wave(name, value.shape)
        elif kind == "running_var":
            new = 1 + 0.5 * wave(name, value.shape)
        elif not isinstance(value, nn.Parameter):
            continue
        elif value.ndim > 1:
            new = 2 * wave(name, value.shape) / math.sqrt(value.numel() / value.shape[0])
        else:
            new = 0.1 * wave(name, value.shape) + (kind != "bias")
        value.copy_(new)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(name="relative_error")
def _relative_error():
    return relative_error


@pytest.fixture(name="fill")
def _fill():
    return fill


@pytest.fixture(name="wave")
def _wave():
    return wave
