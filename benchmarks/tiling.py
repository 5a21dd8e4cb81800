"""Tiled prediction of a large image by a small convolutional network: time and memory, ours against MONAI's sliding_window_inference.

Window 512, overlap 50 %, one window at a time, an image of 4096 x 4096 and one four times as high; each prediction in a process of its
own, whose peak resident memory above that of the same process without a prediction is reported. The image is a raw TIFF file on
disk. Ours comes in two forms: ``array`` keeps image and probabilities in memory as MONAI does, ``rows`` reads rows and writes the
classes into a TIFF file, which is what ``paperworks predict`` does with large files; MONAI's classes are written at the end.

    python benchmarks/tiling.py [--rounds 3] [--side 4096] [--out DIR]
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
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

from harness import record, summary, table
from paperworks.data.tiff import TiffRows, write_tiff
from paperworks.tasks.base import Grid
from paperworks.tasks.tiling import predict_array, predict_slabs

ARMS = ("paperworks/array", "paperworks/rows", "monai")
WINDOW, OVERLAP, CLASSES = 512, 0.5, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 3, padding=1), nn.Softmax(1)).eval()


def unit(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(rows.astype(np.float32) / 65535).permute(2, 0, 1)


def predict(arm: str, source: Path, target: Path) -> None:
    net = network()
    with TiffRows(source) as rows:
        height, width = rows.height, rows.width
        if arm == "paperworks/rows":
            slabs = predict_slabs(net, lambda a, b: unit(rows(a, b)), (height, width), Grid(16), window=WINDOW, overlap=OVERLAP)
            write_tiff(target, (slab.argmax(0).to(torch.uint8).numpy() for slab in slabs), height, width, np.uint8)
            return
        image = unit(rows(0, height))
    if arm == "paperworks/array":
        result = predict_array(net, image, Grid(16), window=WINDOW, overlap=OVERLAP)
    else:
        from monai.inferers.utils import sliding_window_inference  # only this arm pays for its import

        with torch.inference_mode():
            result = sliding_window_inference(image[None], (WINDOW, WINDOW), 1, net, overlap=OVERLAP, mode="gaussian")[0]
    write_tiff(target, iter([result.argmax(0).to(torch.uint8).numpy()]), height, width, np.uint8)


def child(arm: str, source: Path, target: Path) -> None:
    """Print seconds and the growth of the peak memory in MiB over that of a tiny prediction."""
    tiny = source.with_name("tiny.tif")
    predict(arm, tiny, target)
    kib = 1 if sys.platform != "darwin" else 1 / 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
    start = time.perf_counter()
    predict(arm, source, target)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib - before) / 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("ARM", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        arm, source, target = options.child
        child(arm, Path(source), Path(target))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        tifffile.imwrite(folder / "tiny.tif", rng.integers(0, 65535, (64, 64), np.uint16))
        for height in (options.side, 4 * options.side):
            source = folder / "image.tif"
            tifffile.imwrite(source, rng.integers(0, 65535, (height, options.side), np.uint16))
            seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
            memory: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for _ in range(options.rounds):
                for arm in ARMS:
                    command = [sys.executable, __file__, "--child", arm, str(source), str(folder / "out.tif")]
                    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                    taken, grown = json.loads(printed.splitlines()[-1])
                    seconds[arm].append(taken)
                    memory[arm].append(grown)
            for arm, numbers in summary(seconds, "paperworks/rows").items():
                rows.append({"height": height, "width": options.side, "arm": arm, "peak_mib": max(memory[arm])} | numbers)
    print(table(rows))
    print(
        record(
            "tiling", rows, options.out, ("monai", "tifffile"), window=WINDOW, overlap=OVERLAP, threads=os.environ.get("OMP_NUM_THREADS")
        )
    )


if __name__ == "__main__":
    main()
