"""Augmentation of one 512 x 512 image and its mask: ours against albumentations 2.0.8 and torchvision.transforms.v2.

All mirror, rotate up to 15 degrees, scale by 0.8 to 1.25 and change brightness and contrast; with ``elastic`` they deform too: the
image linearly, the mask to the nearest pixel, beyond the border mirrored (torchvision fills, it cannot mirror). Every part but the
mirroring happens every time. The peers smooth a random vector per pixel by a Gaussian; its standard deviation is
torchvision's default of 5 pixels, which flatters them: the displacements of U-Net are far smoother, and a wider Gaussian costs them
more (torchvision's in the square of its width).

    python benchmarks/augmentation.py [--seconds 10] [--out DIR]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from harness import record, summary, table
from paperworks.data.augment import Augment
from paperworks.tasks.environment import interleaved

SIZE, SIGMA = 512, 5.0


def arms(channels: int, elastic: bool) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    pixels = rng.random((SIZE, SIZE, channels), dtype=np.float32)
    labels = rng.integers(0, 4, (SIZE, SIZE), dtype=np.uint8)
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    mask = tv_tensors.Mask(torch.from_numpy(labels).long())

    augment = Augment(elastic=10.0 if elastic else 0.0, gamma=0.0, probability=1.0)
    generator = torch.Generator().manual_seed(0)

    mirror = cv2.BORDER_REFLECT_101
    albumentations = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.Affine(scale=(0.8, 1.25), rotate=(-15, 15), border_mode=mirror, p=1),
            *([A.ElasticTransform(alpha=50, sigma=SIGMA, border_mode=mirror, p=1)] if elastic else []),
            A.RandomBrightnessContrast(0.1, 0.2, p=1),
        ],
        seed=0,
    )
    torchvision = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomAffine(15, scale=(0.8, 1.25), interpolation=v2.InterpolationMode.BILINEAR),
            *([v2.ElasticTransform(alpha=50.0, sigma=SIGMA)] if elastic else []),
            v2.ColorJitter(0.1, 0.2),
        ]
    )
    return {
        "paperworks": lambda: augment({"image": image, "mask": mask}, (SIZE, SIZE), generator),
        "albumentations": lambda: albumentations(image=pixels, mask=labels),
        "torchvision": lambda: torchvision(image, mask),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="spent on each arm of each setting")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        for channels in (1, 3):
            for elastic in (True, False):
                seconds = interleaved(arms(channels, elastic), seconds=options.seconds)
                for library, numbers in summary(seconds, "paperworks").items():
                    setting = {"threads": threads, "channels": channels, "elastic": elastic, "library": library}
                    rows.append(setting | {"images_per_second": 1 / numbers["seconds"]} | numbers)
    print(table(rows))
    print(record("augmentation", rows, options.out, ("albumentations", "opencv-python-headless"), size=SIZE, sigma=SIGMA))


if __name__ == "__main__":
    main()
