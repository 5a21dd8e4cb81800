"""SlowFast: a Slow pathway that sees few frames with many channels, and a Fast one that sees many frames with few channels.

Feichtenhofer, Fan, Malik and He, "SlowFast Networks for Video Recognition", ICCV 2019 (arXiv 1812.03982).

What a thing is changes slowly, how it moves changes fast. So semantics are read from T frames that are tau apart, motion from alpha T frames with
beta (1/8) of the channels; after the stem and each stage but the last, lateral connections hand what Fast found to Slow. One clip of alpha T frames
goes in, and Slow takes its frames from it.

As in the released models (facebookresearch/SlowFast, pytorchvideo): Slow's frames are floors of even distances from the first to the last frame, not
every alpha-th one; lateral kernels of 7 frames where alpha is 4 and 5 where it is 8 (the paper's text has 5 everywhere; R101 keeps 5); the stride
of a stage on its first 3x3 convolution. Different from them: no precise batch-norm statistics after training. Variant `small`, for frames of 32 to
128 pixels, has one block in each of three stages and norms that do not start at zero, as a short training hardly leaves the identity.

Shapes: B batch, C image channels, K classes, T time, H W pixels, h w cells; D channels of Slow, E of Fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperworks.tasks.base import Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side
from paperworks.tasks.video import Jitter, frame_step


@dataclass(frozen=True, kw_only=True)
class Config:
    """Table 1 with its free numbers; the defaults are SlowFast 8x8, R50."""

    frames: int = 8
    """T: frames of the Slow pathway."""
    stride: int | None = 8
    """tau: frames of the film from one of them to the next; None takes it from the data."""
    alpha: int = 4
    """The Fast pathway sees so many times more frames."""
    fast_share: int = 8
    """1/beta: and has so many times fewer channels; 0 leaves it out (slow-only), and alpha must be 1 then."""
    lateral: int = 7
    """Frames of the kernels of the lateral connections; 0 leaves them out."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Of res2 to res5: R50."""
    width: int = 64
    """Channels of Slow's first convolution and of res2's 3x3 ones; each stage doubles them."""
    dropout: float = 0.5
    last_gamma: float = 0.0
    """Scale of a block's last norm at the start (section 4: zero, so that blocks begin as identities)."""
    image_size: int | None = 224
    """Side of the frames; None takes it from the data."""


class Unit(nn.Sequential):
    """Convolution over T, H, W without bias, and its norm."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        super().__init__(nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm3d(outputs))


class Block(nn.Module):
    """A bottleneck: 1x1x1 or 3x1x1, then 1x3x3, then 1x1x1 to four times the channels. Time is never strided (section 3.1)."""

    def __init__(self, inputs: int, inner: int, time_kernel: int, stride: int) -> None:
        super().__init__()
        self.a = Unit(inputs, inner, (time_kernel, 1, 1))
        self.b = Unit(inner, inner, (1, 3, 3), (1, stride, stride))
        self.c = Unit(inner, 4 * inner, (1, 1, 1))
        self.shortcut = Unit(inputs, 4 * inner, (1, 1, 1), (1, stride, stride)) if inputs != 4 * inner or stride > 1 else nn.Identity()

    def forward(self, x: Float[Tensor, "B D T h w"]) -> Float[Tensor, "B E T h2 w2"]:
        """The shortcut and what the convolutions add to it."""
        y = self.c(self.b(self.a(x).relu()).relu())
        return (self.shortcut(x) + y).relu()


class Pathway(nn.Module):
    """One column of table 1: stem, res2 to res5. ``widths`` are the channels that the stem and each stage end with.

    Args:
        channels: of the image.
        width: of the stem.
        blocks: of each stage.
        stem_time: frames of the first kernel.
        times: frames of the first kernel of the blocks, for each stage.
        extra: channels that lateral connections add in front of each stage, in multiples of ``width``.
    """

    def __init__(self, channels: int, width: int, blocks: tuple[int, ...], stem_time: int, times: tuple[int, ...], extra: float) -> None:
        super().__init__()
        self.widths = (width, *(4 * width * 2**i for i in range(len(blocks))))
        stem = Unit(channels, width, (stem_time, 7, 7), (1, 2, 2))
        self.stem = nn.Sequential(stem, nn.ReLU(), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        self.stages = nn.ModuleList()
        for i, (count, time) in enumerate(zip(blocks, times, strict=True)):
            inner, inputs = width * 2**i, self.widths[i] + round(extra * self.widths[i])
            first = Block(inputs, inner, time, 1 if i == 0 else 2)
            self.stages.append(nn.Sequential(first, *(Block(4 * inner, inner, time, 1) for _ in range(count - 1))))


class SlowFast(nn.Module):
    """Figure 1.

    Attributes:
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, step: int, config: Config) -> None:
        super().__init__()
        assert config.fast_share or config.alpha == 1, "slow-only sees no more frames than Slow"
        self.grid = Grid(fixed=image_size, frames=config.alpha * config.frames, step=step)
        self.frames, stages = config.frames, len(config.blocks)
        share = config.fast_share
        extra = 2 / share if share and config.lateral else 0  # section 3.3: the lateral connection has 2 beta C channels
        # "Only res4 and res5 are non-degenerate" in time: temporal kernels in earlier stages of Slow lose accuracy (section 3.4).
        times = (1,) * (stages - stages // 2) + (3,) * (stages // 2)
        self.slow = Pathway(channels, config.width, config.blocks, 1, times, extra)
        self.embedding = self.slow.widths[-1]
        self.fast: Pathway | None = None
        self.lateral = nn.ModuleList()
        if share:
            self.fast = Pathway(channels, config.width // share, config.blocks, 5, (3,) * stages, 0)
            self.embedding += self.fast.widths[-1]
            if config.lateral:  # time-strided convolution (section 3.3), after the stem and every stage but the last
                self.lateral.extend(Unit(e, 2 * e, (config.lateral, 1, 1), (config.alpha, 1, 1)) for e in self.fast.widths[:-1])
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.embedding, classes)
        self._initialise(config.last_gamma)

    def _initialise(self, last_gamma: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                nn.init.constant_(module.c[1].weight, last_gamma)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def slow_places(self, length: int) -> list[int]:
        """Which of a clip's frames Slow sees."""
        return [i * (length - 1) // max(self.frames - 1, 1) for i in range(self.frames)]

    def embed(self, clip: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B F"]:
        """Each pathway's average over time and space, Slow's first."""
        slow = self.slow.stem(clip[:, :, self.slow_places(clip.shape[2])])
        fast = self.fast.stem(clip) if self.fast is not None else None
        for i, stage in enumerate(self.slow.stages):
            if fast is not None and self.fast is not None:
                if self.lateral:
                    slow = torch.cat([slow, self.lateral[i](fast).relu()], 1)  # D + 2 E channels, T frames
                fast = self.fast.stages[i](fast)
            slow = stage(slow)
        return torch.cat([x.mean((2, 3, 4)) for x in (slow, fast) if x is not None], 1)

    def forward(self, clip: Float[Tensor, "B C T H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.dropout(self.embed(clip)))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


R101 = (3, 4, 23, 3)
SMALL = Config(
    frames=4, stride=None, alpha=4, fast_share=4, lateral=5, blocks=(1, 1, 1), width=16, dropout=0.2, last_gamma=0.5, image_size=None
)
VARIANTS: Mapping[str, Config] = {
    "4x16": Config(frames=4, stride=16, alpha=8, lateral=5),
    "8x8": Config(),
    "16x8": Config(frames=16),
    "8x8_r101": Config(blocks=R101, lateral=5),
    "slow_4x16": Config(frames=4, stride=16, alpha=1, fast_share=0),
    "slow_8x8": Config(alpha=1, fast_share=0),
    "small": SMALL,
    "test": Config(
        frames=2, stride=None, alpha=4, fast_share=4, lateral=3, blocks=(1, 1), width=8, dropout=0.2, last_gamma=0.5, image_size=32
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """Section 4: SGD, 0.1 for 64 clips, cosine, sides of 256 to 320 before the crop of 224; the small net's own for short trainings."""
    if config.image_size != 224:
        return Recipe(lr=3e-3, weight_decay=0.01, batch_size=16, augment=Jitter(scale=(1.0, 1.2), flip=0))
    return Recipe(
        optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, batch_size=64, warmup=34 / 196, patch=224, clip=None, augment=Jitter()
    )


def build(spec: Spec, config: Config) -> SlowFast:
    """The network for a data set."""
    frames = config.alpha * config.frames
    step = frame_step(spec, frames) if config.stride is None else config.stride // config.alpha
    return SlowFast(spec.channels, len(spec.classes), config.image_size or image_side(spec), step, config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "8x8"))
