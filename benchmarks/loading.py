"""Reading, decoding and augmenting training images: images a second of ours against torchvision's own data set and transforms.

A folder of 500 x 375 JPEGs in two classes, RandAugment and random erasing at 224 pixels with ConvNeXt's settings, batches of 32; both sides read with the same number of workers,
in turns in one process. Ours besides makes every sample a function of (seed, position). ``ratio`` is ours / theirs: below 1, ours is faster.

    python benchmarks/loading.py [--files 320] [--rounds 5] [--out DIR]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from harness import record, summary, table
from paperworks import papers
from paperworks.tasks import task
from paperworks.tasks.base import Grid
from paperworks.train.engine import Positions, batches

SIDE, BATCH = 224, 32


def photographs(folder: Path, count: int) -> None:
    """Smooth colours with noise on them: as large as photographs of this size."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("ants", "bees")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def ours(folder: Path, workers: int) -> Callable[[int], Iterable[dict]]:
    data = task("classification")(folder)
    paper = papers.paper("convnext")
    recipe = paper.recipe(paper.variants["tiny"])
    positions = Positions(data, recipe, Grid(fixed=SIDE), None, 0, None)
    return lambda count: batches(positions, BATCH, 0, count, 0, 1, workers)


def theirs(folder: Path, workers: int) -> Callable[[int], Iterable[dict]]:
    steps = [
        v2.ToImage(),
        v2.RandomResizedCrop(SIDE, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandAugment(1, 9, num_magnitude_bins=11)], 0.5),
        v2.RandomApply([v2.RandAugment(1, 9, num_magnitude_bins=11)], 0.5),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomErasing(0.25, value="random"),
    ]
    loader = DataLoader(ImageFolder(folder, v2.Compose(steps)), BATCH, shuffle=True, drop_last=True, num_workers=workers)
    return lambda count: itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        photographs(Path(name), options.files)
        count = options.files * 4 // 5 // BATCH
        for workers in (0, 2):
            arms = {"paperworks": ours(Path(name), workers), "torchvision": theirs(Path(name), workers)}
            seconds: dict[str, list[float]] = {arm: [] for arm in arms}
            for turn in range(options.rounds + 1):
                for arm, begin in arms.items():
                    start = time.perf_counter()
                    for _ in begin(count):
                        pass
                    if turn:
                        seconds[arm].append(time.perf_counter() - start)
            for arm, numbers in summary(seconds, "paperworks").items():
                rows.append({"workers": workers, "arm": arm, "images_per_second": count * BATCH / numbers["seconds"]} | numbers)
    print(table(rows))
    print(record("loading", rows, options.out, ("torchvision",), files=options.files, batch=BATCH, side=SIDE))


if __name__ == "__main__":
    main()
