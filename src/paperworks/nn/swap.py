"""Putting one module in the place of others."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from paperworks.errors import InputError


def swapped(network: nn.Module, fits: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """``network`` with ``make(module)`` in the place of every module inside it that ``fits``.

    What is made may hold the module that it replaces; nothing inside it is looked at again. A module that stands in several places is
    replaced by one and the same.

    Raises:
        InputError: no module fits.
    """
    made: dict[nn.Module, nn.Module] = {}

    def walk(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            if child in made or fits(child):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, name, made[child])
            else:
                walk(child)

    walk(network)
    if not made:
        raise InputError(f"{type(network).__name__} has no place that fits; `paperworks show` of the layer's paper says what it replaces")
    return network
