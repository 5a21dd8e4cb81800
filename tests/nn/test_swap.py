"""Putting one module in the place of others."""

import pytest
import torch
from torch import nn

from paperworks.errors import InputError
from paperworks.nn.swap import swapped


class Held(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_every_fitting_place_is_taken_once_and_what_is_made_is_left_alone():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    x = torch.rand(3, 2)
    first, last = network[0], network[1][1]
    expected = 2 * last(torch.relu(2 * first(x)))
    assert swapped(network, linear, Held) is network
    assert torch.equal(network(x), expected)


def test_a_shared_module_stays_shared():
    shared = nn.Linear(2, 2)
    network = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    swapped(network, linear, Held)
    assert network["a"] is network["b"][0]


def test_no_place():
    with pytest.raises(InputError, match="no place"):
        swapped(nn.Sequential(nn.ReLU()), linear, Held)
