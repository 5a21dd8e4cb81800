"""Networks whose weights, gradients and optimiser are sharded over two processes (FSDP) take the step of one process that has them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import paperworks
from paperworks.tasks.base import Recipe
from paperworks.train.engine import build_optimizer
from twice import in_two_processes

NAMES = ("vit", "convnext", "unet")
RECIPE = Recipe(optimizer="sgd", lr=0.1, weight_decay=0.01)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    # In evaluation mode: no chance, and no statistics of a process's own images.
    return paperworks.create(name, variant="test", channels=3, classes=4, size=(32, 32)).eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 32, 32, generator=generator), torch.randint(4, (4,), generator=generator)


def step(network: nn.Module, image: Tensor, label: Tensor) -> None:
    optimizer = build_optimizer(network, RECIPE)
    for _ in range(2):
        logits = network(image)["logits"]
        F.cross_entropy(logits.flatten(2).mean(2) if logits.ndim > 2 else logits, label).backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(rank: int) -> dict[str, Tensor]:
    """Each network after two steps on this process's half of the batch."""
    out = {}
    for name in NAMES:
        network = made(name)
        for part in network.children():
            if next(part.parameters(), None) is not None and not isinstance(part, nn.ModuleList):
                fully_shard(part)
        fully_shard(network)
        image, label = (given[2 * rank : 2 * rank + 2] for given in batch())
        step(network, image, label)
        mine = sum(p.to_local().numel() for p in network.parameters())  # type: ignore[operator]
        out[f"{name}/share"] = torch.tensor(mine / sum(p.numel() for p in network.parameters()))
        out |= {f"{name}/{key}": value.full_tensor() for key, value in network.named_parameters()}  # type: ignore[operator]
    return out


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path: Path) -> None:
    one, other = in_two_processes(sharded, tmp_path)
    for name in NAMES:
        assert 0.3 < float(one[f"{name}/share"]) < 0.7, "each process keeps a half"
        network = made(name)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        step(network, *batch())
        for key, value in network.named_parameters():
            torch.testing.assert_close(one[f"{name}/{key}"], value.detach(), rtol=1e-4, atol=1e-6)
            assert torch.equal(one[f"{name}/{key}"], other[f"{name}/{key}"])
        assert any(not torch.equal(before[key], value) for key, value in network.state_dict().items())
