"""The same work on a Ray cluster, many pieces of it at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paperworks.errors import InputError


def on_cluster(
    address: str, call: Callable[..., Any], data: Any, jobs: Sequence[tuple[Any, ...]], done: Callable[[int], None] = lambda job: None
) -> list[Any]:
    """``call(data, *job)`` for every job; what they return, in the order of the jobs.

    Every job gets a core, and a GPU where the cluster has any. ``data`` is sent to a machine once. Jobs work in the folder that this process
    works in; files that they read and write must lie on a disk that all machines see under the same path.

    Args:
        address: of the cluster, or ``local`` for one on this machine.
        call: a function of a module, so that the other machines find it.
        data: what all jobs share.
        jobs: the other arguments of each call.
        done: is told the number of each job that has ended.

    Raises:
        InputError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray; install paperworks[ray]") from None
    if not ray.is_initialized():
        try:
            ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--ray {address}: no cluster answers ({str(error).splitlines()[0]}); give HOST:PORT, auto or local") from None
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote: Any = ray.remote(max_retries=0, num_cpus=1, num_gpus=gpus)(_in_folder)  # pyright: ignore[reportCallIssue]
    shared, here = ray.put(data), Path.cwd()
    futures = [remote.remote(here, call, shared, *job) for job in jobs]
    waiting = {future: i for i, future in enumerate(futures)}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        done(waiting.pop(ready))
    return ray.get(futures)


def _in_folder(folder: Path, call: Callable[..., Any], data: Any, *job: Any) -> Any:
    """On the other machine: paths that a person gave may be relative."""
    os.chdir(folder)
    return call(data, *job)
