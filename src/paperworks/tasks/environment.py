"""Where a number was measured, and how time and memory are taken there.

Imports nothing but torch, as the fresh process in which memory is measured begins here.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLEAR = Path("/proc/self/clear_refs")
"""Linux: resets the high-water mark of a process's memory."""


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide over speed and numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "lightning", "numpy", "onnx", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware() -> dict[str, Any]:
    """The machine: ``cpu`` and ``gpu`` (or None), ``cores`` that we may use, ``threads`` that torch uses, ``memory_gib``, ``system``."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    most: int = 200,
    least: int = 5,
    synchronise: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time several calls in turns, A B C A B C ..., so that whatever else happens on the machine happens to all of them alike.

    Args:
        calls: what to time, by name.
        seconds: spent on each, about, after one warm-up round.
        most: rounds at most.
        least: rounds at least, however long they take.
        synchronise: called before each reading of the clock (``torch.cuda.synchronize`` for work on a GPU).

    Returns:
        For each name its times in seconds, in the order in which they were taken.
    """
    wait = synchronise or (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - began > seconds * len(calls):
            break
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median ``p50`` and 95th percentile ``p95`` in milliseconds, and the count ``n``."""
    ordered = sorted(times)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"p50": round(1e3 * statistics.median(ordered), 3), "p95": round(1e3 * p95, 3), "n": len(ordered)}


def peak_memory(module: nn.Module, image: Tensor, *, smallest: Tensor) -> float | None:
    """MiB by which one forward pass raises the memory in use at its highest; None on a CPU without Linux.

    Args:
        module: what is run; it must be importable where it is defined.
        image: its input.
        smallest: a small input of the same kind, for a first pass whose one-time costs do not count.
    """
    if image.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            module(image)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    if not CLEAR.exists():
        return None
    # A fresh process: in this one, memory that was freed before would be used again and not be seen.
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import resident; resident()"],
        input=pickle.dumps((module, image, smallest, torch.get_num_threads())),
        capture_output=True,
    )
    if child.returncode:
        raise RuntimeError(f"measuring memory failed: {(child.stderr.decode(errors='replace').strip() or 'no message').splitlines()[-1]}")
    return json.loads(child.stdout)


def resident() -> None:
    """In the fresh process: read a module and its inputs from the parent on stdin, print the MiB that a forward pass takes."""
    module, image, smallest, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        module(smallest)
        # What the first pass freed goes back to the system, or the second would take it again without being seen (glibc's allocator).
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        # Not getrusage: its high-water mark outlives exec and begins with the parent's. Writing 5 resets the process's own.
        CLEAR.write_text("5")
        before = _status("VmRSS")
        module(image)
    print(round((_status("VmHWM") - before) / 1024, 1))


def _status(key: str) -> int:
    """A line of this process's status, KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
