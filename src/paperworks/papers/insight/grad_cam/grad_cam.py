"""Grad-CAM: where a network sees a class, from the gradient of the class's score, for any network and without training it again.

Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
ICCV 2017; extended in IJCV 128 (2020), which is followed here (arXiv 1610.02391).

Class activation maps (CAM) weigh the last feature maps with the classifier's weights and need a network that ends in an average and one
linear layer. The average of the score's gradient over a feature map is that weight for any network, so no other ending is needed.

Unlike the official code (Torch7), which sums the gradients, they are averaged as in equation 1: the same map once it is scaled. For
guided backpropagation ReLUs are changed where they are called, so those without a module are changed too. Maps of tokens are our addition.

Shapes: B batch, C image channels, S T sides of the image, N feature maps (the paper's k), u v their sides, Z = u v.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from paperworks.errors import InputError
from paperworks.tasks.explain import Explain, Explainer

Target = int | Callable[[Any], Tensor]
"""A class, or a function from what the network returns to the score y of each image (B): log-likelihood of a caption, some pixels' logits."""


def score(output: Any, target: Target) -> Float[Tensor, "B"]:
    """y^c, the score of a class before any softmax: behind one its gradient vanishes and mixes the classes."""
    if not isinstance(target, int):
        return target(output)
    logits = output["logits"] if isinstance(output, Mapping) else output
    return logits[:, target]


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """``hook(name, output)`` after each of the layers that returns one tensor; what it returns replaces the output."""
    handles = [
        layer.register_forward_hook(lambda _, __, out, name=name: hook(name, out) if isinstance(out, Tensor) else None)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def features_and_gradient(network: nn.Module, image: Tensor, layer: str, target: Target) -> tuple[Tensor, Tensor]:
    """A and dy/dA at a layer, one forward and one backward pass that ends at A.

    Raises:
        InputError: the network has no such layer, or does not call it exactly once.
    """
    layers = dict(network.named_modules())
    if layer not in layers:
        raise InputError(
            f"the network has no layer {layer!r}; it has: {', '.join(name for name in layers if name.count('.') < 2 and name)}"
        )
    if network.training:
        raise ValueError("put the network into evaluation mode: in training mode an image's score depends on the others and on chance")
    kept: list[Tensor] = []

    def keep(_: str, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()  # a ReLU that works in place changes the copy

    with torch.inference_mode(False), torch.enable_grad(), hooked({layer: layers[layer]}, keep):
        y = score(network(image.clone()), target)
        if len(kept) != 1:
            raise InputError(f"layer {layer!r} gave {len(kept)} maps; take one that is called once and returns one tensor")
        (gradient,) = torch.autograd.grad(y.sum(), kept)
    return kept[0].detach(), gradient


def as_maps(a: Tensor) -> Float[Tensor, "B N u v"]:
    """Feature maps as they are; tokens B L N as maps of a square, less the class token and others in front of it."""
    if a.ndim == 4:
        return a
    side = isqrt(a.shape[1])
    return rearrange(a[:, a.shape[1] - side * side :], "B (u v) N -> B N u v", u=side)


def grad_cam(a: Float[Tensor, "B N u v"], gradient: Float[Tensor, "B N u v"], counterfactual: bool = False) -> Float[Tensor, "B u v"]:
    """Equations 1 and 2. With ``counterfactual`` the places that speak against the class (section 3.3)."""
    alpha = gradient.mean((2, 3))  # equation 1: B N, the mean over Z places
    if counterfactual:
        alpha = -alpha
    return F.relu(torch.einsum("bn,bnuv->buv", alpha, a))  # equation 2: only what raises the score


def cam(a: Float[Tensor, "B N u v"], weight: Float[Tensor, "N"]) -> Float[Tensor, "B u v"]:
    """Class activation map (Zhou et al. 2016): the classifier's weights of one class. Signed; ReLU(CAM) = Z Grad-CAM (section 3.1)."""
    return torch.einsum("n,bnuv->buv", weight, a)


def explain(
    network: nn.Module, image: Float[Tensor, "B C S T"], layer: str, target: Target, counterfactual: bool = False
) -> Float[Tensor, "B S T"]:
    """The map of a target at a layer, enlarged to the image's size. Not scaled.

    Args:
        network: in evaluation mode; returns logits, or a dictionary that holds ``logits``.
        image: as the network takes it.
        layer: name of the layer in ``network.named_modules()``, usually the last one with a map.
        target: a class, or a function from the network's output to scores.
        counterfactual: show what speaks against the target.
    """
    a, gradient = features_and_gradient(network, image, layer, target)
    heat = grad_cam(as_maps(a), as_maps(gradient), counterfactual)
    return F.interpolate(heat[:, None], image.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def last_map(network: nn.Module, image: Float[Tensor, "B C S T"], target: Target) -> str:
    """The last layer that is called once and whose output is a map on which the score depends.

    The paper takes the last convolution or its ReLU; a network that pools behind it, as VGG-16 does, has that smaller map as its last. A map
    has more than one place and the image's proportions. Of transformers the layer norms are asked: behind the last attention the patches of
    a network that reads its class token only have no influence, so there it is the norm before that.

    Raises:
        InputError: there is none.
    """
    seen: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def note(name: str, output: Tensor) -> None:
        calls[name] += 1
        tokens = output.ndim == 3 and isinstance(layers[name], nn.LayerNorm) and output.shape[1] > 3
        if tokens or (output.ndim == 4 and is_map(output.shape[2:], image.shape[2:])):
            seen[name] = output

    layers = {name: layer for name, layer in network.named_modules() if name}
    with torch.inference_mode(False), torch.enable_grad(), hooked(layers, note):
        y = score(network(image.clone().requires_grad_()), target)
        gradients = torch.autograd.grad(y.sum(), list(seen.values()), allow_unused=True) if seen else ()
    found = [n for n, gradient in zip(seen, gradients) if calls[n] == 1 and gradient is not None and as_maps(gradient).any()]
    if not found:
        raise InputError("the network has no layer with a map that the score depends on; name a layer with --set layer=")
    return found[-1]


def is_map(sides: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """Whether sides are those of an image made smaller by one factor, each within a pixel, and there is more than one place."""
    factor = max(of) / max(sides)
    return min(sides) > 1 and factor >= 1 and all(abs(side - whole / factor) <= 1 for side, whole in zip(sides, of))


# Section 3.2: fine detail from guided backpropagation (Springenberg et al. 2015)


class _Guided(torch.autograd.Function):
    """A ReLU that lets a gradient pass only where the input and the gradient are positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return gradient.clamp(min=0) * (x > 0)


class GuidedReLU(TorchFunctionMode):
    """Within it every ReLU is a guided one, whether a module, a function or a method; ``count`` says how many there were."""

    RELUS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.RELUS:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return _Guided.apply(args[0] if args else (kwargs or {})["input"])


def guided_backprop(network: nn.Module, image: Float[Tensor, "B C S T"], target: Target) -> Float[Tensor, "B C S T"]:
    """The gradient of the score by the image, through guided ReLUs. Sharp, but it hardly depends on the class.

    Raises:
        InputError: the network has no ReLU, so that there is nothing to guide.
    """
    with torch.inference_mode(False), torch.enable_grad(), GuidedReLU() as guided:
        image = image.clone().requires_grad_()
        y = score(network(image), target)
        (gradient,) = torch.autograd.grad(y.sum(), image)
    if not guided.count:
        raise InputError("guided backpropagation changes ReLUs, and this network has none; explain it with Grad-CAM alone")
    return gradient


def guided_grad_cam(network: nn.Module, image: Float[Tensor, "B C S T"], layer: str, target: Target) -> Float[Tensor, "B C S T"]:
    """Guided backpropagation times the enlarged map: fine, and of the class."""
    return guided_backprop(network, image, target) * explain(network, image, layer, target)[:, None]


def box(heat: Float[Tensor, "S T"], share: float = 0.15) -> tuple[int, int, int, int]:
    """Section 4.1: the box (x, y, x, y; the far sides excluded) of the largest connected part above ``share`` of the maximum.

    A map without any heat gives the whole image.
    """
    values = heat.cpu().numpy()
    parts, count = ndimage.label(values > share * values.max())  # type: ignore[misc]
    if not count:
        return 0, 0, values.shape[1], values.shape[0]
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    rows, columns = ndimage.find_objects(parts)[largest - 1]
    return columns.start, rows.start, columns.stop, rows.stop


# What `paperworks explain` offers


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is shown of an answer."""

    layer: str = ""
    """Name of the layer; none takes the last one with a map."""
    counterfactual: bool = False
    """Show what speaks against the class."""


@dataclass(frozen=True, kw_only=True)
class GuidedConfig:
    """The same for Guided Grad-CAM."""

    layer: str = ""
    """Name of the layer; none takes the last one with a map."""


def _explain(config: Config) -> Explain:
    def run(network: nn.Module, image: Tensor, target: int) -> Tensor:
        return explain(network, image, config.layer or last_map(network, image, target), target, config.counterfactual)

    return run


def _guided(config: GuidedConfig) -> Explain:
    def run(network: nn.Module, image: Tensor, target: int) -> Tensor:
        fine = guided_grad_cam(network, image, config.layer or last_map(network, image, target), target)
        return fine.clamp(min=0).amax(1)  # what raises the score, in the channel where it does most

    return run


EXPLAINERS = {"grad_cam": Explainer(Config(), _explain), "guided_grad_cam": Explainer(GuidedConfig(), _guided)}
