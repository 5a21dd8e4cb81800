"""Encoders by name, for the training methods that wrap one: a ResNet, or the backbone of another paper of the archive."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from torch import nn

from paperworks import papers
from paperworks.errors import InputError
from paperworks.nn.resnet import Depth, Norm, ResNet
from paperworks.tasks.base import Spec

Stem = Literal["imagenet", "cifar"]


def encoder(name: str, spec: Spec, *, stem: Stem, width: int, zero_init_residual: bool, norm: Norm) -> nn.Module:
    """A network with ``embed(image) -> B F`` and ``embedding: int``.

    Args:
        name: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, or ``PAPER/VARIANT``.
        spec: of the data set.
        stem: of a ResNet.
        width: of a ResNet's first stage.
        zero_init_residual: of a ResNet.
        norm: of a ResNet; other networks keep their own.

    Raises:
        InputError: there is no such network, or it has no embedding.
    """
    if name.removeprefix("resnet") in ("18", "34", "50", "101"):
        return ResNet(cast(Depth, int(name.removeprefix("resnet"))), spec.channels, stem, zero_init_residual, norm, width)
    paper, _, variant = name.partition("/")
    known = papers.paper(paper).variants
    if variant not in known:
        raise InputError(f"backbone={name} names no variant of {paper}; write one of {', '.join(f'{paper}/{v}' for v in known)}")
    network = papers.paper(paper).build(replace(spec, classes=("any", "other")), known[variant])
    if not hasattr(network, "embed"):
        raise InputError(f"backbone={name} has no embedding; take a ResNet or a paper on classification")
    for parameter in network.head_parameters():  # pyright: ignore[reportCallIssue]
        parameter.requires_grad_(False)  # its classifier, for two classes as good as any, has no part in this
    return network
