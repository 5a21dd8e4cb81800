"""Runs a function of a test module in two processes that meet over gloo.

``python twice.py MODULE FUNCTION FOLDER`` imports the module once and forks. A fork of the test process itself would not do: it has computed
gradients before, which a forked child cannot go on with.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed


def in_two_processes(function: Callable[[int], dict[str, Tensor]], folder: Path) -> list[dict[str, Tensor]]:
    """``function(rank)`` for ranks 0 and 1 at once; what they return."""
    command = [sys.executable, __file__, str(function.__code__.co_filename), function.__name__, str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _part(function: Callable[[int], dict[str, Tensor]], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: value.detach() for name, value in function(rank).items()}, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _main(path: str, name: str, folder: Path) -> int:
    spec = importlib.util.spec_from_file_location("module_under_test", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_part, args=(getattr(module, name), rank, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return max(abs(process.exitcode or 0) for process in started)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
