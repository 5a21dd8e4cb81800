"""Bilinear CNN: two feature extractors are multiplied at every place, and the products are summed over all places.

Lin, RoyChowdhury and Maji, "Bilinear CNN Models for Fine-grained Visual Recognition", ICCV 2015 (arXiv 1504.07889); TPAMI 2017 as "Bilinear
Convolutional Neural Networks for Fine-grained Visual Recognition".

The sum of outer products is an image descriptor without order, as those of textures are, that says which features occur together; all of it
is differentiable. With one shared extractor it is the Gram matrix.

As in the paper: features of VGG-16 ("D") and VGG-M ("M") after the ReLU of their last convolution, signed square root, length one, a linear
classifier; first the classifier is trained alone, then everything. Different from the official code (cvl-umass/bilinear-cnn, MatConvNet):
the mean over places in place of the sum (the length takes the factor away again), 1e-5 under the root, whose gradient at 0 is
infinite; the softmax classifier stays at the end, where the paper trains support vector machines. ``small`` is a VGG with batch norm, less
deep, for images of few places.

Shapes: B batch, C image channels, K classes, h w cells, N = h w places, P Q channels of the two streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.nn.conv import he_init
from paperworks.nn.vgg import VGG
from paperworks.papers.layers.learn_to_pay_attention.learn_to_pay_attention import headless
from paperworks.tasks.base import Grid, Layer, Output, Paper, Recipe, Spec, grid_of
from paperworks.tasks.classification import image_side

EPS = 1e-5
"""Under the square root."""


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How two maps become one vector."""

    project: int = 0
    """Channels that the second stream is brought down to by a 1x1 convolution (section 4.4 of the TPAMI paper, by PCA); 0 leaves it."""
    normalise: bool = True
    """Signed square root and length one (section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Two streams and the pooling of their products."""

    first: Literal["D", "M"] = "D"
    second: Literal["same", "D", "M", "one"] = "same"
    """``same`` shares the first one's weights (symmetric); ``one`` is the constant 1, which leaves ordinary average pooling."""
    pooling: Pooling = Pooling()
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Of D's blocks; the last one named is pooled."""
    norm: bool = False
    """A batch norm after each of D's convolutions, for training from nothing."""
    alone: float = 0.0
    """Share of the training in which the classifier learns alone; for streams with trained weights (section 3.3 trains in two steps)."""
    image_size: int | None = 448
    """Side of the images; None takes it from the data."""


class D(nn.Module):
    """VGG-16's blocks, as many as there are widths, without the pooling behind the last."""

    def __init__(self, channels: int, widths: Sequence[int], norm: bool) -> None:
        super().__init__()
        if not 1 <= len(widths) <= 5:
            raise InputError(f"widths={','.join(map(str, widths))}: VGG-16 has five blocks")
        missing = 5 - len(widths)
        vgg = VGG(channels, (*widths, *[widths[-1]] * missing), norm=norm)
        self.pool, self.blocks = vgg.pool, vgg.blocks[: len(widths)]
        self.widths, self.strides = tuple(widths), vgg.strides[: len(widths)]

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each block gives; the last is relu5_3."""
        features, x = [], image
        for i, block in enumerate(self.blocks):
            x = block(self.pool(x) if i else x)
            features.append(x)
        return features


class M(nn.Module):
    """VGG-M (Chatfield et al. 2014): five convolutions with large strides; relu5 has 512 channels at a stride of 16."""

    widths, strides = (96, 256, 512), (4, 16, 16)

    def __init__(self, channels: int) -> None:
        super().__init__()

        def shrink() -> list[nn.Module]:
            norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # torch divides alpha by the size
            return [nn.ReLU(inplace=True), norm, nn.MaxPool2d(3, 2, ceil_mode=True)]

        self.conv1 = nn.Sequential(nn.Conv2d(channels, 96, 7, 2), *shrink())
        self.conv2 = nn.Sequential(nn.Conv2d(96, 256, 5, 2, 1), *shrink())
        rest = [layer for inputs in (256, 512, 512) for layer in (nn.Conv2d(inputs, 512, 3, padding=1), nn.ReLU(inplace=True))]
        self.conv3 = nn.Sequential(*rest)
        he_init(self)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Behind the two poolings, and relu5."""
        first = self.conv1(image)
        second = self.conv2(first)
        return [first, second, self.conv3(second)]


def bilinear(a: Float[Tensor, "B P h w"], b: Float[Tensor, "B Q h w"]) -> Float[Tensor, "B P Q"]:
    """Eqs. 1 and 2: the outer products a_l b_l', averaged over the places l that both maps have.

    Of two maps of 27 and 28 rows the last row is ignored, and so of columns.
    """
    h, w = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return a[:, :, :h, :w].flatten(2) @ b[:, :, :h, :w].flatten(2).mT / (h * w)


def signed_root(x: Tensor) -> Tensor:
    """Sign of x times the square root of its size; what is 0 stays 0 and gets no gradient."""
    return x.sign() * (x.abs() + EPS).sqrt()


class BilinearPooling(nn.Module):
    """From two maps to the vector that is classified."""

    def __init__(self, first: int, second: int, config: Pooling) -> None:
        super().__init__()
        self.project = nn.Conv2d(second, config.project, 1, bias=False) if config.project else nn.Identity()
        self.normalise = config.normalise
        self.embedding = first * (config.project or second)

    def forward(self, a: Float[Tensor, "B P h w"], b: Float[Tensor, "B R h w"]) -> Float[Tensor, "B F"]:
        """The products, their signed roots, length one."""
        x = bilinear(a, self.project(b)).flatten(1)
        return F.normalize(signed_root(x), dim=1) if self.normalise else x


class BilinearCNN(nn.Module):
    """Figure 2.

    Attributes:
        widths: channels of the first stream's maps.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(
        self, first: nn.Module, second: nn.Module | None, side: int, classes: int, pooling: Pooling, *, alone: float = 0.0
    ) -> None:
        super().__init__()
        self.grid = Grid(fixed=side)
        self.first, self.second, self.alone = first, second, alone
        self.widths: tuple[int, ...] = tuple(first.widths)  # pyright: ignore[reportArgumentType]
        self.strides: tuple[int, ...] = tuple(first.strides)  # pyright: ignore[reportArgumentType]
        width = self.widths[-1] if second is None else int(second.widths[-1])  # pyright: ignore[reportIndexIssue, reportArgumentType]
        self.pooling = BilinearPooling(self.widths[-1], width, pooling)
        self.embedding = self.pooling.embedding
        self.head = nn.Linear(self.embedding, classes)

    def advance(self, share: float) -> None:
        """Section 3.3: the classifier alone for the first ``alone`` of the training, then everything."""
        for stream in (self.first, self.second):
            if stream is not None:
                stream.requires_grad_(share >= self.alone)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The first stream's maps, of ``widths`` channels at ``strides``."""
        return self.first.pyramid(image)  # pyright: ignore[reportCallIssue]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The bilinear descriptor."""
        a = self.pyramid(image)[-1]
        return self.pooling(a, a if self.second is None else self.second.pyramid(image)[-1])  # pyright: ignore[reportCallIssue]

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


class One(nn.Module):
    """A stream of one feature that is 1 everywhere: bilinear pooling with it is average pooling."""

    widths = (1,)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """One map, as large as any."""
        return [torch.ones_like(image[:, :1])]


def build(spec: Spec, config: Config) -> BilinearCNN:
    """The network for a data set."""

    def stream(name: str) -> nn.Module | None:
        if name == "D":
            return D(spec.channels, config.widths, config.norm)
        return {"M": lambda: M(spec.channels), "one": One, "same": lambda: None}[name]()

    first = stream(config.first)
    assert first is not None
    side = int(config.image_size or image_side(spec))
    return BilinearCNN(first, stream(config.second), side, len(spec.classes), config.pooling, alone=config.alone)


def put(network: nn.Module, config: Pooling) -> BilinearCNN:
    """Bilinear pooling of a backbone's last map with itself, in its classifier's place.

    Raises:
        InputError: it is no backbone, or has no classifier that can be told from the rest.
    """
    classes = headless(network)
    return BilinearCNN(network, None, grid_of(network).fixed, classes, config)


VARIANTS = {
    "d_d": Config(alone=0.5),
    "m_m": Config(first="M", alone=0.5),
    "d_m": Config(second="M", alone=0.5),
    "d_d_512x64": Config(pooling=Pooling(project=64), alone=0.5),
    "small": Config(widths=(24, 48, 96, 96), norm=True, image_size=None),
    "test": Config(widths=(4, 6, 8), norm=True, image_size=None),
}


def recipe(config: Config) -> Recipe:
    """Fine-tuning of trained streams with flips alone; a laptop's own for small images, from nothing."""
    if config.image_size is None:
        view = View(area=(0.5, 1.0), jitter_chance=0, grey=0)
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=view)
    view = View(area=(1.0, 1.0), aspect=(1.0, 1.0), jitter_chance=0, grey=0)
    return Recipe(
        optimizer="sgd",
        lr=1e-3,
        weight_decay=5e-4,
        schedule="constant",
        batch_size=16,
        patch=config.image_size,
        head_lr=1000.0,
        augment=view,
    )


LAYERS = {"bilinear_pooling": Layer("head", Pooling(project=64), put)}
PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "d_d"))
