"""Pictures of segmentations: uint8 arrays H W 3, for files and reports. Of volumes some slices side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

Picture = UInt8[ndarray, "_ _ 3"]

# Okabe and Ito's colours, which people with any of the common colour blindnesses tell apart; sky blue first, black left out.
PALETTE = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178))
MISSED = (230, 159, 0)
"""Colour of truth that was not predicted."""
FALSE = (0, 130, 255)
"""Colour of what was predicted and is not there."""
CONFUSED = (204, 121, 167)
"""Colour of one class taken for another."""


def colour(index: int) -> tuple[int, int, int]:
    """Colour of a class; 0, the background, has none and is black. After seven classes the palette comes again, darker each time."""
    if index == 0:
        return (0, 0, 0)
    turn, place = divmod(index - 1, len(PALETTE))
    r, g, b = PALETTE[place]
    return (int(r * 0.7**turn), int(g * 0.7**turn), int(b * 0.7**turn))


def display(image: Float[Tensor, "C H W"]) -> Picture:
    """An image of any number of channels as people can see it.

    One channel is grey, two are magenta and green, three red, green and blue; of more the first three are shown. Images that use little
    of their range (16 bits, floats) are stretched from their 0.5th to their 99.5th percentile, all channels alike; two
    channels, which are different stains, each by itself.
    """
    planes = image.cpu().float().numpy()
    if len(planes) == 2:
        a, b = (_stretched(plane) for plane in planes)
        planes = np.stack([a, b, a])
    else:
        planes = _stretched(planes[:3] if len(planes) >= 3 else planes[:1])
        planes = np.broadcast_to(planes, (3, *planes.shape[1:]))
    return np.ascontiguousarray((planes * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _stretched(values: ndarray) -> ndarray:
    low, high = np.percentile(values, (0.5, 99.5))
    if high - low >= 0.5 or high <= low:
        return values.clip(0, 1)
    return ((values - low) / (high - low)).clip(0, 1)


def overlay(image: Float[Tensor, "C H W"], mask: Integer[Tensor, "H W"], classes: int, ignore: int = 255, opacity: float = 0.35) -> Picture:
    """The image with each class tinted and outlined in its colour; ignored pixels are hatched in grey."""
    picture, labels = display(image).astype(np.float32), mask.cpu().numpy()
    outline = _outline(labels)
    for c in range(1, classes):
        where = labels == c
        picture[where] += opacity * (np.array(colour(c)) - picture[where])
        picture[where & outline] = colour(c)
    picture[(labels == ignore) & _hatch(labels.shape)] = (128, 128, 128)
    return (picture + 0.5).astype(np.uint8)


def error_map(image: Float[Tensor, "C H W"], mask: Integer[Tensor, "H W"], predicted: Integer[Tensor, "H W"], ignore: int = 255) -> Picture:
    """The image, darkened, with what is wrong on it: missed orange and hatched, false blue, one class for another purple.

    The true outlines are drawn in white.
    """
    truth, guess = mask.cpu().numpy(), predicted.cpu().numpy()
    picture = display(image).astype(np.float32) * 0.6
    picture[_outline(np.where(truth == ignore, 0, truth))] = (255, 255, 255)
    wrong = (truth != guess) & (truth != ignore)
    missed = wrong & (guess == 0)
    picture[missed] = 0.5 * picture[missed] + 0.5 * np.array(MISSED)
    picture[missed & _hatch(truth.shape)] = MISSED
    picture[wrong & (truth == 0)] = FALSE
    picture[wrong & (truth != 0) & (guess != 0)] = CONFUSED
    return (picture + 0.5).astype(np.uint8)


def places(labels: Integer[Tensor, "D H W"], count: int = 9) -> list[int]:
    """Which slices of a volume to show: evenly spread over those that hold something, or over all where none does."""
    held = ((labels > 0) & (labels != 255)).flatten(1).any(1).nonzero().flatten()
    first, last = (int(held[0]), int(held[-1])) if len(held) else (0, len(labels) - 1)
    return np.linspace(first, last, min(count, last - first + 1)).round().astype(int).tolist()


def montage(volume: Shaped[Tensor, "*C D H W"], places: Sequence[int], gap: int = 1) -> Shaped[Tensor, "*C h w"]:
    """Slices of a volume laid out as one image, in rows from the top, as nearly square as can be; ``gap`` pixels of 0 between them."""
    columns = math.ceil(math.sqrt(len(places)))
    chosen = torch.nn.functional.pad(volume[..., list(places), :, :], (0, gap, 0, gap))
    *channels, _, height, width = chosen.shape
    sheet = chosen.new_zeros(*channels, -(-len(places) // columns) * height, columns * width)
    for i in range(len(places)):
        row, column = divmod(i, columns)
        sheet[..., row * height : (row + 1) * height, column * width : (column + 1) * width] = chosen[..., i, :, :]
    return sheet[..., : sheet.shape[-2] - gap, : sheet.shape[-1] - gap]


def panel(pictures: Sequence[Picture], titles: Sequence[str], side: int | None = None, gap: int = 6) -> Picture:
    """Pictures side by side on white, each under its title.

    Args:
        pictures: of any sizes; they are placed at their top edges.
        titles: one for each; shortened where they are wider than the picture.
        side: enlarge or reduce each picture so that its longer side has this many pixels.
        gap: between and around the pictures, in pixels.
    """
    images = [Image.fromarray(picture) for picture in pictures]
    if side:
        images = [
            im.resize(_fitted(im.size, side), Image.Resampling.NEAREST if max(im.size) < side else Image.Resampling.LANCZOS)
            for im in images
        ]
    font = ImageFont.load_default(14)
    head = 20
    sheet = Image.new("RGB", (sum(im.width + gap for im in images) + gap, max(im.height for im in images) + head + 2 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    for im, title in zip(images, titles, strict=True):
        while title and draw.textlength(title, font) > im.width:
            title = title[:-2].rstrip() + "…" if len(title) > 2 else ""
        draw.text((left, gap), title, "black", font)
        sheet.paste(im, (left, gap + head))
        left += im.width + gap
    return np.array(sheet)


def legend(entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Picture:
    """A line of coloured squares with their names; ``ERRORS`` are those of :func:`error_map`."""
    font = ImageFont.load_default(14)
    widths = [int(font.getlength(name)) + 36 for name, _ in entries]
    sheet = Image.new("RGB", (sum(widths), 20), "white")
    draw = ImageDraw.Draw(sheet)
    left = 0
    for (name, rgb), width in zip(entries, widths):
        draw.rectangle((left + 2, 3, left + 16, 17), fill=rgb, outline="black")
        draw.text((left + 22, 2), name, "black", font)
        left += width
    return np.array(sheet)


ERRORS = (("missed", MISSED), ("false", FALSE), ("wrong class", CONFUSED))


def _outline(labels: ndarray) -> ndarray:
    """Pixels beside one of a smaller label: the outline of every region lies within it, and between two there is one line."""
    low = ndimage.minimum_filter(labels, footprint=ndimage.generate_binary_structure(2, 1), mode="nearest")
    return labels > low


def _hatch(shape: tuple[int, ...]) -> ndarray:
    """Diagonal lines two pixels wide, six apart."""
    y, x = np.indices(shape, sparse=True)
    return (y + x) % 6 < 2


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    factor = side / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
