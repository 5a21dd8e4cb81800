"""Make this pack from packs/mnist_subset: `python packs/moving_digits/make.py` in the repository's root.

Each film shows one handwritten digit in one of ten kinds of motion, 16 frames of 32x32. Digit, size, angle, brightness and place are drawn
alike for all kinds, and where the film is in the middle of its motion too, so that no single frame tells the kind.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).parent
DIGITS = ROOT.parent / "mnist_subset" / "mnist.npz"
FRAMES, SIDE, LEVELS = 16, 32, 8
KINDS = ("clockwise", "counterclockwise", "down", "growing", "left", "right", "shaking", "shrinking", "swaying", "up")
"""Shaking and swaying are one motion at two speeds: to and fro along a line, with a period of 3 to 5 frames or of 9 to 14."""
PER_KIND = {"train": 40, "val": 12}


def film(kind: str, digit: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Frames T H W, in 8 levels of grey."""
    size, angle, light = chance.uniform(0.6, 0.8), chance.uniform(0, 2 * np.pi), chance.uniform(0.7, 1)
    middle, speed = SIDE / 2 - 0.5 + chance.uniform(-3, 3, 2), chance.uniform(0.6, 1.4)
    direction, phase = chance.uniform(0, 2 * np.pi), chance.uniform(0, 1)
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    path, turned, grown = np.zeros((FRAMES, 2)), np.zeros(FRAMES), np.ones(FRAMES)
    if kind in ("left", "right", "up", "down"):
        row, column = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[kind]
        path = 0.8 * speed * time[:, None] * np.array([row, column])
    elif kind in ("shaking", "swaying"):
        period = chance.uniform(3, 5) if kind == "shaking" else chance.uniform(9, 14)
        path = 3 * speed * np.sin(2 * np.pi * (time / period + phase))[:, None] * np.array([np.sin(direction), np.cos(direction)])
    elif kind in ("clockwise", "counterclockwise"):
        turned = np.deg2rad(9 * speed) * time * (1 if kind == "clockwise" else -1)
    else:
        grown = np.exp(0.05 * speed * time * (1 if kind == "growing" else -1))
    frames = np.stack([frame(digit, middle + p, angle + t, size * g) for p, t, g in zip(path, turned, grown)])
    return np.rint(frames.clip(0, 255) * light * (LEVELS - 1) / 255).astype(np.uint8)


def frame(digit: np.ndarray, centre: np.ndarray, angle: float, size: float) -> np.ndarray:
    """The digit, turned clockwise by ``angle`` and scaled by ``size``, with its middle at ``centre`` (row, column)."""
    cos, sin = np.cos(angle), np.sin(angle)
    back = np.array([[cos, -sin], [sin, cos]]) / size  # from the frame to the digit, in (row, column) with rows downward
    offset = (np.array(digit.shape) - 1) / 2 - back @ centre
    return ndimage.affine_transform(digit.astype(np.float64), back, offset, (SIDE, SIDE), order=1)


def write(path: Path, frames: np.ndarray) -> None:
    """A GIF of 8 greys, 60 ms a frame."""
    pictures = [Image.fromarray(f, "P") for f in frames]
    for picture in pictures:
        picture.putpalette([level * 255 // (LEVELS - 1) for level in range(LEVELS) for _ in "rgb"])
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=60, loop=0, optimize=False)


def main() -> None:
    """Write the films, the table of digits, splits.json and SHA256SUMS; README.md is written by hand."""
    source, chance = np.load(DIGITS), np.random.default_rng(20190502)
    rows, splits = [], {}
    for split, per_kind in PER_KIND.items():
        digits, labels = source[f"x_{split}"], source[f"y_{split}"]
        chosen = chance.permutation(len(digits))[: per_kind * len(KINDS)]  # each digit is used once
        shutil.rmtree(ROOT / split, ignore_errors=True)
        for number, place in enumerate(chosen):
            kind = KINDS[number % len(KINDS)]
            path = ROOT / split / kind / f"{number:03d}.gif"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = film(kind, digits[place], chance)
            while (frames[1:] == frames[:-1]).all((1, 2)).any():  # GIF writers merge frames that are alike
                frames = film(kind, digits[place], chance)
            write(path, frames)
            rows.append([path.relative_to(ROOT).as_posix(), kind, int(labels[place]), f"x_{split}/{place}"])
            splits.setdefault(split, []).append(path.relative_to(ROOT).as_posix())
    with (ROOT / "digits.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([["film", "kind", "digit", "row of mnist.npz"], *rows])
    (ROOT / "splits.json").write_text(json.dumps(splits, indent=0) + "\n", encoding="utf-8")
    files = sorted(p for p in ROOT.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    sums = (f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(ROOT).as_posix()}\n" for p in files)
    (ROOT / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


if __name__ == "__main__":
    main()
