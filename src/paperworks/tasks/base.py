"""What a task, a paper and the engine agree on.

Shape legend, used all over the archive: B batch, C image channels, K classes, D H W depth, height, width (pixels or voxels).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from paperworks.data.augment import Augment
from paperworks.data.fingerprint import Fingerprint
from paperworks.tasks.trials import Search

Sample = dict[str, Any]
"""One example: ``image`` (tv_tensors.Image, C H W, float32 in [0, 1]), ``name`` (str) and what the task adds."""
Batch = dict[str, Any]
"""Collated samples: ``image`` B C H W (normalised by the data set's mean and std when a network sees it), ``name`` a list."""
Output = dict[str, Tensor]
"""What a network returns: the task's required key (``logits`` for segmentation) and whatever else the paper's loss needs."""
Augmentation = Callable[[Sample, Sequence[int], torch.Generator], Sample]
"""(sample, height and width of the result, the only source of chance) -> a varied sample. A frozen dataclass, so that ``--set`` reaches its fields."""
Loss = Callable[[Output, Batch], dict[str, Tensor]]
"""Named terms of a loss, each a scalar; ``loss`` is the one that is minimised."""
Refiner = Callable[[Tensor, Tensor], Tensor]
"""An inference method on dense predictions: (image C H W in [0, 1], probabilities K H W) -> probabilities K H W."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a network must know of a data set to be built for it. Plain numbers, so that it travels in ``run.json``.

    ``mean`` and ``std`` are per channel, of images in [0, 1]. ``size`` is the median height and width (depth first for volumes).
    """

    task: str
    channels: int
    classes: tuple[str, ...]
    size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[float, float] = (0.0, 255.0)
    """Raw values that become 0 and 1: the bit depth's for integer images, the data set's robust extremes for float ones."""
    spacing: tuple[float, ...] | None = None
    """Millimetres (or whatever unit the files state) from pixel to pixel, in the order of ``size``."""
    instances: bool = False
    """The labels tell objects of one class apart."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else a task's networks must know, as plain values."""

    @property
    def ndim(self) -> int:
        """2 for images, 3 for volumes."""
        return len(self.size)


def spec_of(task: str, seen: Fingerprint, classes: Sequence[str], **rest: Any) -> Spec:
    """What a network must know of images that were looked through; ``rest`` are further fields, or others in place of what was seen."""
    facts: dict[str, Any] = {
        "size": tuple(seen.median_size),
        "mean": tuple(seen.mean),
        "std": tuple(max(s, 1e-4) for s in seen.std),
        "range": (float(seen.range[0]), float(seen.range[1])),
        "spacing": tuple(seen.spacing) if seen.spacing else None,
    }
    return Spec(task=task, channels=seen.channels, classes=tuple(classes), **(facts | rest))


@dataclass(frozen=True)
class Grid:
    """Which input sizes a dense network takes and where its output lies.

    A side of length n is valid when n = multiple * k + offset (k >= 1). The output covers the input less ``margin`` pixels
    on each side. A U-Net of four poolings with padded convolutions has ``Grid(16)``; the valid one of 2015 has
    ``Grid(16, offset=12, margin=92)``. A network whose inputs have one size only has ``Grid(fixed=224)``: what is larger or
    smaller is resized. Where that is no square, ``fixed`` is the height: ``Grid(fixed=64, width=256)``.
    Inputs that are clips, C T H W, have ``frames`` too, which lie ``step`` frames apart in the film.
    """

    multiple: int = 1
    offset: int = 0
    margin: int = 0
    fixed: int = 0
    width: int = 0
    frames: int = 0
    step: int = 1

    def sides(self, lengths: Sequence[int]) -> list[int]:
        """Smallest valid sides of an input whose output covers ``lengths``; the width comes last, and the time of a clip first."""
        sides = [self.fit(length) for length in lengths]
        sides = [*sides[:-1], self.width] if self.width else sides
        return [self.frames, *sides[1:]] if self.frames else sides

    def fit(self, length: int) -> int:
        """Smallest valid input length whose output covers ``length`` pixels; the fixed one where there is one."""
        if self.fixed:
            return self.fixed
        need = max(length + 2 * self.margin - self.offset, self.multiple)
        return -(-need // self.multiple) * self.multiple + self.offset


def grid_of(network: nn.Module) -> Grid:
    """The grid that a dense network carries."""
    grid = network.grid
    assert isinstance(grid, Grid)
    return grid


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper is trained. The engine fits the schedule to the budget; everything here can be set with ``--set``."""

    optimizer: Literal["adamw", "adam", "sgd", "adadelta"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    """SGD's momentum; Adam's first beta."""
    beta2: float = 0.999
    """Adam's second beta."""
    eps: float = 1e-8
    """What Adam adds to the root of the second moment."""
    weight_decay: float = 0.0
    schedule: Literal["cosine", "poly", "step", "constant", "inverse_sqrt"] = "cosine"
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises linearly."""
    batch_size: int = 8
    patch: int = 256
    """Longest side of the training crops, in output pixels; smaller images are taken whole."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None leaves it alone."""
    average: float = 0.0
    """Decay of the exponential moving average of the weights that is kept for prediction; 0 keeps the last weights."""
    keep: Literal["last", "best"] = "last"
    """``best`` ends with the weights of the look at which the loss on validation items was lowest: early stopping. The network must return
    in evaluation mode what the loss asks for."""
    augment: Augmentation = field(default_factory=Augment)
    decay_at: tuple[float, ...] = (0.6, 0.85)
    """Shares of the steps after which schedule ``step`` divides the learning rate by ten."""
    head_lr: float = 1.0
    """Factor on the learning rate of the parameters that the network lists in ``head_parameters()``."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Factor on the learning rate of the other parameters, by the beginning of their names."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a paper's module hands to the archive, as ``PAPER``. It replaces of the task what it changes, and only that."""

    variants: Mapping[str, Any]
    """Named configurations (frozen dataclasses); ``test`` is the contract tests' one."""
    build: Callable[[Spec, Any], nn.Module]
    """(spec, configuration) -> network. A dense network carries a ``grid: Grid``."""
    recipe: Callable[[Any], Recipe]
    """configuration -> recipe."""
    auto: tuple[str, ...]
    """Variants that ``--variant auto`` may take, from the cheapest to the dearest."""
    loss: Callable[[Any], Loss] | None = None
    """configuration -> loss; None takes the task's."""
    prepare: Callable[[Any], Callable[[Sample], Sample]] | None = None
    """configuration -> what is done to each training sample after augmentation; None leaves it alone."""
    solve: Callable[[Any], Callable[[nn.Module, Iterable[Batch]], None]] | None = None
    """configuration -> what sets the network's weights from all training batches at once, where the loss has its minimum; no gradient
    steps are taken then. None: the network learns by gradient steps."""
    search: Search | None = None
    """What finds settings (an architecture) for the data at hand before the network is built."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where trained weights lie, as an entry of ``PUBLISHED`` in a paper's ``weights.py``; the module's ``SOURCES`` map their names to ours."""

    source: str
    """Key of ``SOURCES``."""
    licence: str
    repo: str = ""
    """On the Hugging Face hub."""
    url: str = ""
    """Instead of a repository: a file of a state dict."""
    file: str = "model.safetensors"
    channels: int = 3
    classes: int = 1000
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Layer:
    """A part that takes a place in networks of other papers, as an entry of a module's ``LAYERS``; ``--set attention=NAME`` puts it in."""

    slot: str
    """The place: ``attention``, ``norm``, ``conv``, ``context``, ``head``, ``position``."""
    config: Any
    """Frozen dataclass with the defaults; ``--set attention.FIELD=VALUE`` changes its fields."""
    put: Callable[[nn.Module, Any], nn.Module]
    """(a network with fresh weights, configuration) -> that network with the layer in every fitting place; InputError where none fits."""


@dataclass(frozen=True)
class Method:
    """An inference method that wraps a trained run, as an entry of a module's ``METHODS``."""

    config: Any
    """Frozen dataclass with the defaults; ``--set`` changes its fields."""
    build: Callable[[Any], Refiner]


def override(settings: Mapping[str, Any], *targets: Any) -> tuple[Any, ...]:
    """Put each setting into the first of the dataclasses ``targets`` that has a field of that name.

    Values that are strings are read as the type of the field's present value, or as its annotation says where that is None. ``augment.elastic=5`` reaches into a field.

    Raises:
        ValueError: no target has such a field, or the value does not fit it. The message names the fields there are.
    """
    out = list(targets)
    for key, value in settings.items():
        head, _, rest = key.partition(".")
        for i, target in enumerate(out):
            names = {f.name for f in dataclasses.fields(target)}
            if head not in names:
                continue
            present = getattr(target, head)
            hint = get_type_hints(type(target))[head]
            new = override({rest: value}, present)[0] if rest else _read(key, value, present, hint)
            choices = get_args(hint) if get_origin(hint) is Literal else (new,)
            if new not in choices:
                raise ValueError(f"{key}={new} is not one of {', '.join(map(str, choices))}")
            out[i] = dataclasses.replace(target, **{head: new})
            break
        else:
            known = sorted({f.name for t in targets for f in dataclasses.fields(t)})
            raise ValueError(f"no setting is called {key!r}; there are {', '.join(known)}")
    return tuple(out)


def _read(key: str, value: Any, present: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value  # a tuple that was kept as JSON
    if value.lower() in ("none", "null"):
        return None
    try:
        if isinstance(present, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if isinstance(present, int):
            return int(value)
        if isinstance(present, float):
            return float(value)
        if present is None:
            return next((kind(value) for kind in (int, float) if kind in get_args(hint)), value)
        if isinstance(present, tuple):
            kind = type(present[0]) if present else float
            return tuple(kind(v) for v in value.split(","))
    except (ValueError, KeyError):
        raise ValueError(f"{key}={value} does not read as {type(present).__name__}; its default is {present!r}") from None
    return value


def centre_crop(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The centre of the last ``len(size)`` axes; nothing is copied. An odd surplus leaves one more pixel behind the crop than before it."""
    for axis, length in enumerate(size, start=x.ndim - len(size)):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x
