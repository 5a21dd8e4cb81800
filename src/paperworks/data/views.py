"""Two views of one image, as the methods that learn without labels want them: the same thing, looked at twice by chance.

The parts and their order are those of Chen et al., *SimCLR* (2020), appendix A: crop and resize, mirror, colour distortion (in random
order, then grey), blur. B C H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True, kw_only=True)
class View:
    """How one view is drawn; calling it makes a training sample of one view. Zero turns a part off."""

    area: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image that the crop covers."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height of the crop."""
    flip: float = 0.5
    """Chance of a mirror image (left and right change places)."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Brightness, contrast and saturation are multiplied by 1 less to 1 plus this; the hue turns by this share of the circle at most.
    Saturation and hue need three channels; with any number but three, brightness and contrast vary from channel to channel alike."""
    jitter_chance: float = 0.8
    grey: float = 0.2
    """Chance of losing all colour, where there are three channels."""
    blur: float = 0.0
    """Chance of a Gaussian blur, whose kernel is a tenth of the side."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""

    def __call__(self, sample: dict[str, Any], patch: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """A view of ``sample["image"]`` (C H W in [0, 1]) in its place; the rest is passed on.

        Args:
            sample: with the image.
            patch: height and width of the view.
            generator: the only source of chance.
        """
        return sample | {"image": tv_tensors.Image(self.of(sample["image"].as_subclass(Tensor), patch, generator))}

    def of(self, image: Float[Tensor, "C H W"], patch: Sequence[int], generator: torch.Generator) -> Float[Tensor, "C h w"]:
        """The view of one image."""

        def chance(probability: float) -> bool:
            return float(torch.rand((), generator=generator)) < probability

        def between(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        image = F.resized_crop_image(image, *self.crop(image.shape[1:], between), size=list(patch))
        if chance(self.flip):
            image = image.flip(-1)
        colours = len(image) == 3
        if chance(self.jitter_chance):
            planes = image if colours else image[:, None]
            for part in torch.randperm(4, generator=generator).tolist():
                amount = between(-1, 1) * self.jitter[part]
                if amount and (colours or part < 2):
                    planes = PARTS[part](planes, amount if part == 3 else 1 + amount)
            image = planes.view(image.shape)
        if colours and chance(self.grey):
            image = F.rgb_to_grayscale_image(image, 3)
        if chance(self.blur):
            image = F.gaussian_blur_image(image, [2 * (max(patch) // 20) + 1] * 2, [between(*self.sigma)] * 2)
        return image

    def crop(self, size: Sequence[int], between: Callable[[float, float], float]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part of an image of this height and width.

        Area and aspect (the latter evenly in the logarithm) are drawn up to ten times until the part fits; then it is as much of the
        whole image as the aspect allows.
        """
        for _ in range(10):
            area = between(*self.area) * size[0] * size[1]
            aspect = math.exp(between(*map(math.log, self.aspect)))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height <= size[0] and 0 < width <= size[1]:
                return int(between(0, size[0] - height + 1)), int(between(0, size[1] - width + 1)), height, width
        height, width = min(size[0], round(size[1] / self.aspect[0])), min(size[1], round(size[0] * self.aspect[1]))
        return (size[0] - height) // 2, (size[1] - width) // 2, height, width


PARTS = (F.adjust_brightness_image, F.adjust_contrast_image, F.adjust_saturation_image, F.adjust_hue_image)
"""In the order of ``View.jitter``."""


@dataclass(frozen=True, kw_only=True)
class TwoViews(View):
    """Calling it makes a training sample of two views of its image, ``image`` and ``view``, drawn independently."""

    def __call__(self, sample: dict[str, Any], patch: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """As :meth:`View.__call__`, twice."""
        return super().__call__(sample, patch, generator) | {"view": super().__call__(sample, patch, generator)["image"]}
