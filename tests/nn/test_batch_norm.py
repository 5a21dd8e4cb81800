"""Batch normalisations by the statistics of parts of a batch, and of the batches of all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paperworks.nn import processes
from paperworks.nn.batch_norm import GlobalBatchNorm, SplitBatchNorm2d
from twice import in_two_processes


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 4, 5, generator=generator) * 2 + torch.arange(8.0).view(8, 1, 1, 1)


def varied(norm: nn.Module) -> nn.Module:
    for i, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
        tensor.data = 0.5 + 0.1 * i + 0.2 * torch.arange(3.0)
    return norm


def test_parts_of_a_batch_are_normalised_apart():
    x = batch()
    split, plain = varied(SplitBatchNorm2d(3, 4)), [varied(nn.BatchNorm2d(3)) for _ in range(4)]
    out = split(x)
    for i, norm in enumerate(plain):
        torch.testing.assert_close(out[i::4], norm(x[i::4]))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(split, name), torch.stack([getattr(norm, name) for norm in plain]).mean(0))
    assert (out - varied(nn.BatchNorm2d(3))(x)).abs().max() > 0.1
    x6 = x[:6]
    assert torch.equal(varied(SplitBatchNorm2d(3, 4))(x6), varied(SplitBatchNorm2d(3, 3))(x6)), "6 examples make 3 parts, not 4"
    again = varied(SplitBatchNorm2d(3, 4)).eval()
    torch.testing.assert_close(again(x), varied(nn.BatchNorm2d(3)).eval()(x))


def test_one_process_has_an_ordinary_batch_norm():
    x = batch()
    ours, theirs = varied(GlobalBatchNorm(3)), varied(nn.BatchNorm2d(3))
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(processes.joined(x), x) and torch.equal(processes.gathered(x), x)


def part(rank: int) -> dict[str, Tensor]:
    """One of two processes: its half of the batch, forward and backward."""
    half = batch().chunk(2)[rank].requires_grad_()
    norm = varied(GlobalBatchNorm(3))
    out = norm(half)
    everything = processes.joined(out)
    assert torch.equal(everything, processes.gathered(out))
    assert int(processes.from_first(torch.tensor(rank))) == 0
    ((everything * target()).sum() / 2).backward()  # half of what all processes have in common
    return {"out": out, "grad": half.grad, "mean": norm.running_mean, "var": norm.running_var}


def target() -> Tensor:
    return torch.sin(torch.arange(8 * 3 * 4 * 5.0).view(8, 3, 4, 5))


def test_two_processes_are_one_batch(tmp_path):
    """Outputs, running statistics and gradients equal those of one process with the whole batch."""
    found = in_two_processes(part, tmp_path)
    x, norm = batch().requires_grad_(), varied(nn.BatchNorm2d(3))
    out = norm(x)
    (out * target()).sum().backward()
    torch.testing.assert_close(torch.cat([f["out"] for f in found]), out)
    torch.testing.assert_close(torch.cat([f["grad"] for f in found]), x.grad)
    for f in found:
        torch.testing.assert_close(f["mean"], norm.running_mean)
        torch.testing.assert_close(f["var"], norm.running_var)
