"""New images from a trained generative network, and the way from one image to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from paperworks.errors import InputError
from paperworks.files import write_json
from paperworks.tasks.base import Grid, grid_of
from paperworks.tasks.files import read_unit
from paperworks.tasks.generation import Generation, frechet, save_picture
from paperworks.train.run import Run

BATCH = 64
PLANE = 16
"""Images on a side of the picture of a latent plane."""


def sample_files(
    run: str | Path,
    out: str | Path,
    *,
    n: int = 64,
    seed: int = 0,
    interpolate: tuple[str | Path, str | Path] | None = None,
    steps: int = 9,
    against: Generation | None = None,
) -> list[Path]:
    """Draw images from a trained network and write them.

    ``samples.png`` shows the first 64 of them; ``samples/`` holds each; ``samples.json`` says how they came about. A model whose latents are
    two numbers is also drawn whole, as ``plane.png``: its images at equally likely places, from quantile to quantile of the prior.

    Args:
        run: the run folder.
        out: where to.
        n: how many images; 0 with ``interpolate`` alone.
        seed: the same seed gives the same images.
        interpolate: two image files; ``interpolation.png`` shows the decoded points of the straight line between their codes.
        steps: images on that line, the two ends' reconstructions among them.
        against: a data set; the Frechet distance between its validation images and the samples is added to ``samples.json``, and that of
            as many of its training images, which is about the best that can be had.

    Returns:
        The files that were written.

    Raises:
        InputError: the run is no generative one, has no model of its codes to draw from, or an image is broken.
    """
    loaded, out = Run.load(run), Path(out)
    spec = loaded.spec
    if spec.task != Generation.name:
        raise InputError(f"{run} was trained for {spec.task}; only runs of {Generation.name} can draw new images")
    if n < 0 or steps < 2:
        raise InputError(f"--n {n} or {steps} steps make no pictures; take --n 0 or more and 2 steps or more")
    if not n and interpolate is None:
        raise InputError("--n 0 alone draws nothing; take --n 1 or more, or --interpolate A B")
    network = loaded.network()
    if n and not hasattr(network, "sample"):
        name = loaded.request.paper
        raise InputError(
            f"{run}: {name} has no model of its codes to draw from; take --n 0 with --interpolate A B, or train a paper that has one"
        )
    written: list[Path] = []
    with torch.inference_mode():
        if n:
            generator = torch.Generator().manual_seed(seed)
            images = torch.cat([network.sample(min(BATCH, n - i), generator) for i in range(0, n, BATCH)])  # pyright: ignore[reportCallIssue]
            written += [_save(image, out / "samples" / f"{i:05d}.png") for i, image in enumerate(images)]
            written.append(_save(sheet(images[:64], 8), out / "samples.png"))
            record = {"run": str(run), "paper": loaded.request.paper, "variant": loaded.request.variant, "n": n, "seed": seed}
            if against is not None:
                against.check(spec)
                record |= _distances(images, against)
            write_json(out / "samples.json", record)
            written.append(out / "samples.json")
        if interpolate is not None:
            first, last = (Generation.network_input(read_unit(Path(path), spec), grid_of(network)) for path in interpolate)
            written.append(_save(sheet(between(network, first, last, steps), steps), out / "interpolation.png"))
        if n and (plane := _plane(network, spec.channels)) is not None:
            written.append(_save(sheet(plane, PLANE), out / "plane.png"))
    return written


def between(network: torch.nn.Module, first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Decoded points of the straight line between the codes of two images C S S."""
    a, b = network.encode(torch.stack([first, last]))  # pyright: ignore[reportCallIssue]
    share = torch.linspace(0, 1, steps).view(-1, *(1,) * a.ndim)
    return network.decode(a + share * (b - a))  # pyright: ignore[reportCallIssue]


def sheet(images: Tensor, columns: int) -> Tensor:
    """Images side by side in rows, with a grey line between them, C H W."""
    rows = make_grid(images, nrow=columns, padding=1, pad_value=0.5)
    return rows[: images.shape[1]]  # one channel comes as three


def _plane(network: torch.nn.Module, channels: int) -> Tensor | None:
    side = grid_of(network).fixed
    code = network.encode(torch.zeros(1, channels, side, side))  # pyright: ignore[reportCallIssue]
    if code.shape != (1, 2):
        return None
    line = torch.special.ndtri((torch.arange(PLANE) + 0.5) / PLANE)  # quantiles of the normal distribution
    return network.decode(torch.cartesian_prod(line, line))  # pyright: ignore[reportCallIssue]


def _distances(images: Tensor, data: Generation) -> dict[str, float]:
    grid = Grid(fixed=images.shape[-1])

    def squares(items: Sequence[Any]) -> Tensor:
        return torch.stack([Generation.network_input(data.given(data.sample(item)), grid) for item in items])

    truth = squares(data.val)
    return {"frechet": frechet(truth, images), "frechet_of_training_images": frechet(truth, squares(data.train[: len(images)]))}


def _save(image: Tensor, path: Path) -> Path:
    save_picture(image, path)
    return path
