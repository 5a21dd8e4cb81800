"""Runs a function in two processes that meet over gloo."""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed


def in_two_processes(function: Callable[[int], dict[str, torch.Tensor]], folder: Path) -> list[dict[str, torch.Tensor]]:
    """``function(rank)`` for ranks 0 and 1 at once; what they return.

    The processes are forked, so that nothing has to be imported again, and compute in one thread, which a fork does not disturb.
    """
    started = [multiprocessing.get_context("fork").Process(target=_part, args=(function, rank, folder)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        for process in started:
            process.start()
    for process in started:
        process.join(100)
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, errors[0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _part(function: Callable[[int], dict[str, torch.Tensor]], rank: int, folder: Path) -> None:
    try:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        torch.save({name: value.detach() for name, value in function(rank).items()}, folder / f"{rank}.pt")
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
