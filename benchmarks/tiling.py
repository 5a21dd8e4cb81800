"""Tiled prediction of large images and of a volume: time and memory, ours against MONAI's sliding_window_inference.

Each prediction is made in a process of its own, whose growth of peak resident memory over a tiny prediction is reported; arms take turns. The same weights, windows of 512
pixels (of volumes 128 voxels a side) and MONAI's default overlap of a quarter:

- ``unet``: U-Net ``small`` on 4096 x 4096, where the network is what takes the time. MONAI's arm calls it as it was trained, ours as ``paperworks predict``
  does (batch norms folded, channels last); ``bf16`` is ``predict --precision bf16``.
- ``convolutions``: two of them, on 4096 x 4096 and on 16384 x 16384 pixels, where the network is small beside the image, and memory counts most.
- ``volume``: two convolutions on 300 x 512 x 512 voxels.

Images are raw TIFF files on disk, of which ours reads rows; the classes are written into a TIFF file by all. ``--only`` measures these networks again and keeps what is recorded of the others.

    python benchmarks/tiling.py [--only unet,convolutions,volume] [--rounds 2] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

import paperworks
from harness import RESULTS, record, summary, table
from paperworks.data.tiff import TiffRows, write_tiff
from paperworks.export.predict import Bfloat16
from paperworks.nn.fuse import fast
from paperworks.tasks.base import Grid
from paperworks.tasks.contract import channels_last
from paperworks.tasks.tiling import predict_slabs

OVERLAP, CLASSES = 0.25, 3


@dataclass(frozen=True)
class Work:
    """What is predicted: sides of the image or volume, by which network, how often at most."""

    network: str
    size: tuple[int, ...]
    rounds: int = 100

    @property
    def window(self) -> int:
        """Side of the windows."""
        return 512 if len(self.size) == 2 else 128


WORKS = (
    Work("unet", (4096, 4096)),
    Work("convolutions", (4096, 4096)),
    Work("convolutions", (16384, 16384), rounds=2),
    Work("volume", (300, 512, 512)),
)


class Softmaxed(nn.Module):
    """Probabilities of a network of ours, as its task deploys it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """B C h w -> B K h w."""
        return self.network(image)["logits"].softmax(1)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "unet":
        return Softmaxed(paperworks.create("unet", variant="small", channels=1, classes=CLASSES, size=(512, 512))).eval()
    conv = nn.Conv3d if name == "volume" else nn.Conv2d
    return nn.Sequential(conv(1, 8, 3, padding=1), nn.ReLU(), conv(8, CLASSES, 3, padding=1), nn.Softmax(1)).eval()


def unit(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.astype(np.float32) / 65535)


def predict(arm: str, work: Work, source: Path, target: Path, size: tuple[int, ...]) -> None:
    net = network(work.network)
    forward: Callable[[Tensor], Tensor] = net
    if arm != "monai":
        deployed = Bfloat16(fast(net), print) if arm == "paperworks/bf16" else fast(net)
        forward = lambda image: deployed(channels_last(image))  # noqa: E731
    if len(size) == 3:
        volume = np.memmap(source, np.uint16, "r", shape=size)
        parts = tiled(arm, forward, lambda a, b: unit(volume[a:b])[None], size, work.window)
        out = np.memmap(target, np.uint8, "w+", shape=size)
        at = 0
        for part in parts:
            out[at : at + len(part)] = part
            at += len(part)
        return
    with TiffRows(source) as rows:
        parts = tiled(arm, forward, lambda a, b: unit(rows(a, b)).permute(2, 0, 1), size, work.window)
        write_tiff(target, parts, *size, np.uint8)


def tiled(
    arm: str, forward: Callable[[Tensor], Tensor], read: Callable[[int, int], Tensor], size: tuple[int, ...], window: int
) -> Iterator:
    """The classes, slab by slab; MONAI's come at once."""
    if arm == "monai":
        from monai.inferers.utils import sliding_window_inference  # only this arm pays for its import

        with torch.inference_mode():
            image = read(0, size[0])[None]
            yield (
                sliding_window_inference(image, (window,) * len(size), 1, forward, overlap=OVERLAP, mode="gaussian")[0]
                .argmax(0)
                .byte()
                .numpy()
            )
        return
    for slab in predict_slabs(forward, read, size, Grid(16), window=window, overlap=OVERLAP):
        yield slab.argmax(0).byte().numpy()


def written(path: Path, size: tuple[int, ...]) -> None:
    """Noise, in pieces."""
    rng = np.random.default_rng(0)
    if len(size) == 3:
        out = np.memmap(path, np.uint16, "w+", shape=size)
        for plane in out:
            plane[:] = rng.integers(0, 65535, size[1:], np.uint16)
    else:
        pieces = (rng.integers(0, 65535, (1, size[1]), np.uint16) for _ in range(size[0]))
        tifffile.imwrite(path, pieces, shape=size, dtype=np.uint16, rowsperstrip=1)


def child(arm: str, work: Work, folder: Path) -> None:
    """Print seconds and the growth of the peak memory in MiB over that of a tiny prediction."""
    side = 64
    predict(arm, work, folder / "tiny", folder / "out.tif", (side,) * len(work.size))
    kib = 1 if sys.platform != "darwin" else 1 / 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
    start = time.perf_counter()
    predict(arm, work, folder / "image", folder / "out.tif", work.size)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib - before) / 1024]))


def measured(work: Work, rounds: int) -> list[dict]:
    """A row for each arm."""
    arms = ("paperworks", *(("paperworks/bf16",) if work.network == "unet" else ()), "monai")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    memory: dict[str, list[float]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as name:
        written(Path(name) / "tiny", (64,) * len(work.size))
        written(Path(name) / "image", work.size)
        for _ in range(min(rounds, work.rounds)):
            for arm in arms:
                command = [sys.executable, __file__, "--child", arm, str(WORKS.index(work)), name]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                taken, grown = json.loads(printed.splitlines()[-1])
                seconds[arm].append(taken)
                memory[arm].append(grown)
    size = " x ".join(map(str, work.size))
    found = summary(seconds, "paperworks")
    return [{"network": work.network, "size": size, "arm": arm, "peak_mib": max(memory[arm])} | found[arm] for arm in arms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks, separated by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("ARM", "WORK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        arm, number, folder = options.child
        child(arm, WORKS[int(number)], Path(folder))
        return
    path = (options.out or RESULTS) / "tiling.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if options.only and path.exists() else []
    rows = [row for row in earlier if row["network"] not in options.only.split(",")]
    for work in WORKS:
        if not options.only or work.network in options.only.split(","):
            rows += measured(work, options.rounds)
            print(table([row for row in rows if row["network"] == work.network]), flush=True)
    print(table(rows))
    facts = {"overlap": OVERLAP, "threads": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))}
    print(record("tiling", rows, options.out, ("monai", "tifffile"), **facts))


if __name__ == "__main__":
    main()
