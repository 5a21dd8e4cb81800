"""Makes the pack ``digit_scenes`` from the pack ``mnist_subset``: ``python packs/digit_scenes/make.py`` writes images, tables and checksums anew."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SIDE = 64
SCENES = {"train": 500, "val": 100}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (235, 60, 50), "green": (60, 200, 70), "blue": (80, 120, 255), "yellow": (240, 220, 60), "white": (240, 240, 240)}
OPPOSITE = {"to the left of": "to the right of", "to the right of": "to the left of", "above": "below", "below": "above"}


def backdrop(rng: np.random.Generator) -> Image.Image:
    """A dark slope of some colour with a few grey strokes on it."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    slope = (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))[..., None] * rng.uniform(0, 30, 3)
    image = Image.fromarray((rng.uniform(10, 40, 3) + slope).clip(0, 70).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        start, extent, grey = rng.integers(0, SIDE, 2), rng.integers(-8, 9, 2), int(rng.integers(60, 110))
        draw.line([*start.tolist(), *(start + extent).tolist()], fill=(grey,) * 3)
    return image


def shrunk(digit: np.ndarray, height: int) -> Image.Image:
    """The digit cut out of its frame, at this height."""
    rows, columns = np.flatnonzero(digit.max(1) > 40), np.flatnonzero(digit.max(0) > 40)
    image = Image.fromarray(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return image.resize((max(4, round(image.width * height / image.height)), height), Image.Resampling.BILINEAR)


def scene(rng: np.random.Generator, digits: list[tuple[np.ndarray, int]]) -> tuple[Image.Image, list[dict]]:
    """An image of 1 to 3 digits of different classes that do not touch; those that are left over stay in ``digits``."""
    image, things = backdrop(rng), []
    count = int(rng.integers(1, 4))
    used = set()
    for _ in range(count):
        place = next(i for i, (_, label) in enumerate(digits) if label not in used)
        digit, label = digits.pop(place)
        used.add(label)
        mask = shrunk(digit, int(rng.integers(20, 30)))
        for _ in range(200):
            x, y = int(rng.integers(1, SIDE - mask.width)), int(rng.integers(1, SIDE - mask.height))
            box = (x, y, x + mask.width, y + mask.height)
            if all(
                box[0] > t["box"][2] + 1 or box[2] < t["box"][0] - 1 or box[1] > t["box"][3] + 1 or box[3] < t["box"][1] - 1 for t in things
            ):
                colour = str(rng.choice(list(COLOURS)))
                image.paste(Image.new("RGB", mask.size, COLOURS[colour]), (x, y), mask)
                things.append({"box": box, "label": NAMES[label], "colour": colour})
                break
    return image, things


def centre(thing: dict) -> tuple[float, float]:
    """Of its box."""
    x0, y0, x1, y1 = thing["box"]
    return (x0 + x1) / 2, (y0 + y1) / 2


def relation(one: dict, other: dict) -> str:
    """Where ``one`` lies as seen from ``other``, along the axis on which they are further apart."""
    dx, dy = (a - b for a, b in zip(centre(one), centre(other)))
    if abs(dx) >= abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def said(thing: dict) -> str:
    """A red three."""
    return f"a {thing['colour']} {thing['label']}"


def captions(things: list[dict]) -> list[str]:
    """Two to five sentences: the two tallest digits and how they lie, how many there are, what is at the sides."""
    first = things[0]
    if len(things) == 1:
        return [said(first), f"there is {said(first)}", f"one digit which is {said(first)}"]
    one, other = sorted(things, key=lambda t: t["box"][1] - t["box"][3])[:2]
    how = relation(one, other)
    out = [f"{said(one)} {how} {said(other)}", f"{said(other)} {OPPOSITE[how]} {said(one)}"]
    if len(things) == 2:
        return [*out, f"two digits which are {said(one)} and {said(other)}"]
    left, right = (pick(things, key=lambda t: centre(t)[0]) for pick in (min, max))
    count = NAMES[len(things)]
    return [*out, f"{count} digits with {said(left)} on the left", f"{count} digits with {said(right)} on the right"]


def main() -> None:
    """Write everything."""
    rng = np.random.default_rng(7)
    source = np.load(HERE.parent / "mnist_subset" / "mnist.npz")
    (HERE / "images").mkdir(exist_ok=True)
    sentences, boxes, splits, number = [], [], {}, 0
    for split, scenes in SCENES.items():
        digits = list(zip(source[f"x_{split}"], source[f"y_{split}"].tolist()))
        rng.shuffle(digits)
        splits[split] = []
        for _ in range(scenes):
            image, things = scene(rng, digits)
            file = f"{number:04d}.png"
            image.save(HERE / "images" / file, optimize=True)
            sentences += [(file, k, text) for k, text in enumerate(captions(things))]
            boxes += [(file, *t["box"], t["label"], t["colour"]) for t in things]
            splits[split].append(file.removesuffix(".png"))
            number += 1
    for name, head, rows in (
        ("captions.csv", ("file", "number", "caption"), sentences),
        ("boxes.csv", ("file", "xmin", "ymin", "xmax", "ymax", "label", "attribute"), boxes),
    ):
        with (HERE / name).open("w", encoding="utf-8", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows([head, *rows])
    (HERE / "splits.json").write_text(json.dumps(splits, indent=0) + "\n")
    files = sorted(p for p in HERE.rglob("*") if p.is_file() and p.name != "SHA256SUMS" and "__pycache__" not in p.parts)
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(HERE).as_posix()}\n" for p in files]
    (HERE / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
