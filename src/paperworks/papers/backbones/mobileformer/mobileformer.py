"""Mobile-Former: a MobileNet and a Transformer of a few learned tokens run side by side and talk to each other in every block.

Chen, Dai, Chen, Liu, Dong, Yuan and Liu, "Mobile-Former: Bridging MobileNet and Transformer", CVPR 2022 (arXiv 2108.05895).

Convolutions are cheap and see what is near; attention sees everything and is dear. Here at most six tokens, the same start for every image,
hold what is global. Light cross attention, with projections on the tokens' side alone, carries features to the tokens (Mobile to Former) and back
(Former to Mobile), and the first token makes the parameters of the convolutions' dynamic ReLU (Chen et al. 2020).

As in the released code (AAboys/MobileFormer), which carries the trained weights: a gate on what the tokens take from the features, the Former's
keys and values are the tokens themselves, norms after the sublayers, its head as described below. Different from it: tokens are B M d, Mixup,
which mixes the images of a batch, is left out, and small images get a stem of stride 1.

Shapes: B batch, C image channels, K classes, H W pixels, h w cells, N = h w, D channels of the features, M tokens of d numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import Varied
from paperworks.tasks.base import Grid, Output, Paper, Recipe
from paperworks.tasks.classification import image_side

HEADS = 2
"""Of both bridges (section 3.2)."""
FORMER_HEADS = 4
"""The paper speaks of two; the released code's Former never receives that number and has four."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A column of table 1 (294M), or of the appendix's table of sizes."""

    stem: int = 16
    """Channels of the first convolution."""
    blocks: tuple[tuple[int, int, int], ...] = (
        (2, 16, 1), (6, 24, 2), (4, 24, 1), (6, 48, 2), (4, 48, 1), (6, 96, 2), (4, 96, 1), (6, 128, 1), (6, 128, 1), (6, 192, 2),
        (6, 192, 1), (6, 192, 1),
    )  # fmt: skip
    """Expansion, width and stride of each; the first is the "lite bottleneck" without tokens."""
    tokens: int = 6
    """M."""
    token_width: int = 192
    """d."""
    hidden: int = 1920
    """Numbers that the classifier's last layer sees."""
    dropout: float = 0.3
    """Before that layer."""
    groups: int = 1
    """Of all 1x1 convolutions on features; with more than one, channels are shuffled between them (26M)."""
    former: bool = True
    """Without it Mobile is alone, with an ordinary ReLU (section 5.3 compares)."""
    former_to_mobile: bool = True
    """The bridge back to the features."""
    dynamic: bool = True
    """Dynamic ReLU by the first token; else ReLU6."""
    stem_stride: int | None = 2
    """None takes 1 for images below 64 pixels."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


def norm_of(conv: nn.Conv2d) -> list[nn.Module]:
    """A convolution and its BatchNorm."""
    return [conv, nn.BatchNorm2d(conv.out_channels)]


def pointwise(inputs: int, outputs: int, groups: int) -> list[nn.Module]:
    """1x1 convolution without bias, and its norm."""
    return norm_of(nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False))


def depthwise(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """3x3 convolution of each channel by itself, into one or several, and its norm."""
    return norm_of(nn.Conv2d(inputs, outputs, 3, stride, 1, groups=inputs, bias=False))


def shuffle(groups: int, config: Config) -> list[nn.Module]:
    """Channels change groups, where 1x1 convolutions have groups."""
    return [nn.ChannelShuffle(groups)] if config.groups > 1 else []


class DynamicReLU(nn.Module):
    """Of each channel the larger of two lines through zero, ``max(a1 x, a2 x)``; two layers make the slopes from the first token (section 3.3).

    At the start the slopes are about 1 and 0: a ReLU.
    """

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.slopes = nn.Sequential(nn.Linear(token_width, token_width // 4), nn.ReLU(), nn.Linear(token_width // 4, 2 * width))

    def forward(self, x: Float[Tensor, "B D h w"], z: Float[Tensor, "B M d"]) -> Float[Tensor, "B D h w"]:
        """a1 lies between 0 and 2, a2 between -1 and 1."""
        a1, a2 = (2 * F.hardsigmoid(self.slopes(z[:, 0])) - 1)[:, :, None, None].chunk(2, 1)
        return torch.maximum((a1 + 1) * x, a2 * x)


class FixedReLU(nn.ReLU6):
    """What stands there without tokens."""

    def forward(self, input: Float[Tensor, "B D h w"], z: Tensor | None = None) -> Float[Tensor, "B D h w"]:
        """Tokens do not matter."""
        return super().forward(input)


def activation(width: int, config: Config) -> nn.Module:
    """Dynamic where there are tokens."""
    return DynamicReLU(width, config.token_width) if config.former and config.dynamic else FixedReLU()


# --- The bridge and the Former


def heads(tokens: Float[Tensor, "B N D"], count: int) -> Float[Tensor, "B A N e"]:
    """The share of each head."""
    return tokens.unflatten(2, (count, -1)).transpose(1, 2)


def joined(split: Float[Tensor, "B A N e"]) -> Float[Tensor, "B N D"]:
    """The heads' shares side by side."""
    return split.transpose(1, 2).flatten(2)


class MobileToFormer(nn.Module):
    """Eq. 1: tokens look at all cells. Keys and values are the features as they are; only the tokens are projected."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.query, self.gate, self.out = nn.Linear(token_width, width), nn.Linear(token_width, width), nn.Linear(width, token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, x: Float[Tensor, "B D h w"], z: Float[Tensor, "B M d"]) -> Float[Tensor, "B M d"]:
        """Tokens that have seen the features; each channel of what they see has a gate of their own."""
        features = heads(x.flatten(2).mT, HEADS)
        seen = joined(F.scaled_dot_product_attention(heads(self.query(z), HEADS), features, features))
        return self.norm(z + self.out(2 * F.hardsigmoid(self.gate(z)) * seen))


class Former(nn.Module):
    """Self-attention among the tokens and an MLP, each followed by its norm. Keys and values are the tokens as they are."""

    def __init__(self, token_width: int) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(token_width, token_width), nn.Linear(token_width, token_width)
        self.norm1, self.norm2 = nn.LayerNorm(token_width), nn.LayerNorm(token_width)
        self.mlp = nn.Sequential(nn.Linear(token_width, 2 * token_width), nn.GELU(), nn.Linear(2 * token_width, token_width))

    def forward(self, z: Float[Tensor, "B M d"]) -> Float[Tensor, "B M d"]:
        """A Transformer block of six tokens."""
        tokens = heads(z, FORMER_HEADS)
        z = self.norm1(z + self.out(joined(F.scaled_dot_product_attention(heads(self.query(z), FORMER_HEADS), tokens, tokens))))
        return self.norm2(z + self.mlp(z))


class FormerToMobile(nn.Module):
    """Eq. 2: every cell looks at the tokens. Queries are the features as they are; keys and values are projected tokens."""

    def __init__(self, width: int, token_width: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(token_width, width), nn.Linear(token_width, width)

    def forward(self, x: Float[Tensor, "B D h w"], z: Float[Tensor, "B M d"]) -> Float[Tensor, "B D h w"]:
        """The features, and what the tokens told each cell."""
        cells = heads(x.flatten(2).mT, HEADS)
        told = F.scaled_dot_product_attention(cells, heads(self.key(z), HEADS), heads(self.value(z), HEADS))
        return x + joined(told).mT.reshape(x.shape)


# --- Mobile


class Bottleneck(nn.Module):
    """Mobile's block at one resolution: MobileNetV2's inverted bottleneck (1x1, depthwise 3x3, 1x1)."""

    def __init__(self, inputs: int, width: int, expansion: int, config: Config) -> None:
        super().__init__()
        hidden, groups = expansion * inputs, config.groups
        self.expand = nn.Sequential(*pointwise(inputs, hidden, groups), *shuffle(groups, config))
        self.depthwise = nn.Sequential(*depthwise(hidden, hidden, 1))
        self.project = nn.Sequential(*pointwise(hidden, width, groups), *shuffle(groups, config))
        self.relu1, self.relu2 = activation(hidden, config), activation(hidden, config)
        self.same = inputs == width

    def forward(self, x: Float[Tensor, "B D h w"], z: Float[Tensor, "B M d"]) -> Float[Tensor, "B E h w"]:
        """With a shortcut where the widths are the same."""
        y = self.relu1(self.expand(x), z)
        y = self.project(self.relu2(self.depthwise(y), z))
        return x + y if self.same else y


class Downsampling(nn.Module):
    """Mobile's block between resolutions: a depthwise convolution expands and strides, a second one works at the new resolution (appendix A)."""

    def __init__(self, inputs: int, width: int, expansion: int, config: Config) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.stride = nn.Sequential(*depthwise(inputs, hidden, 2), *shuffle(inputs, config))
        self.narrow = nn.Sequential(*pointwise(hidden, width, config.groups))
        self.expand = nn.Sequential(*depthwise(width, 4 * width, 1), *shuffle(width, config))
        self.project = nn.Sequential(*pointwise(4 * width, width, config.groups))
        self.relu1, self.relu2 = activation(hidden, config), activation(4 * width, config)

    def forward(self, x: Float[Tensor, "B D h w"], z: Float[Tensor, "B M d"]) -> Float[Tensor, "B E h2 w2"]:
        """The shortcut lies inside, around the second half."""
        x = self.narrow(self.relu1(self.stride(x), z))
        return x + self.project(self.relu2(self.expand(x), z))


class Block(nn.Module):
    """Figure 3: Mobile to Former, Former, Mobile, Former to Mobile."""

    def __init__(self, inputs: int, width: int, expansion: int, stride: int, config: Config) -> None:
        super().__init__()
        d, there = config.token_width, config.former
        self.to_former = MobileToFormer(inputs, d) if there else None
        self.former = Former(d) if there else None
        self.mobile = (Bottleneck if stride == 1 else Downsampling)(inputs, width, expansion, config)
        self.to_mobile = FormerToMobile(width, d) if there and config.former_to_mobile else None

    def forward(self, x: Float[Tensor, "B D h w"], z: Float[Tensor, "B M d"]) -> tuple[Tensor, Tensor]:
        """Features and tokens; Mobile's dynamic ReLU knows the tokens of this block already."""
        if self.to_former is not None and self.former is not None:
            z = self.former(self.to_former(x, z))
        x = self.mobile(x, z)
        return (x if self.to_mobile is None else self.to_mobile(x, z)), z


class Lite(nn.Module):
    """The first block, where a bridge would be dear: depthwise convolution, 1x1 convolution, no tokens."""

    def __init__(self, inputs: int, width: int, expansion: int, stride: int, config: Config) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(*depthwise(inputs, expansion * inputs, stride), nn.ReLU6(), *shuffle(inputs, config))
        self.project = nn.Sequential(*pointwise(expansion * inputs, width, config.groups))
        self.same = inputs == width and stride == 1

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E h2 w2"]:
        """With a shortcut where nothing changes its shape."""
        y = self.project(self.depthwise(x))
        return x + y if self.same else y


# --- Mobile-Former


class MobileFormer(nn.Module):
    """Figure 1.

    Attributes:
        widths: channels of the last block at each resolution.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier's last layer sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        stride, d = int(config.stem_stride or (1 if image_size < 64 else 2)), config.token_width
        if d % FORMER_HEADS:
            raise InputError(f"{FORMER_HEADS} attention heads do not divide tokens of {d} numbers; set token_width")
        for _, width, _ in config.blocks:
            if width % HEADS or width % config.groups:
                raise InputError(
                    f"a width of {width} does not divide among {HEADS} heads and among {config.groups} groups; set blocks or groups"
                )
        self.grid = Grid(fixed=image_size)
        self.tokens = nn.Parameter(torch.randn(config.tokens, d)) if config.former else None
        self.stem = nn.Sequential(*norm_of(nn.Conv2d(channels, config.stem, 3, stride, 1, bias=False)), nn.ReLU6())

        (expansion, before, first), *rows = config.blocks
        self.lite = Lite(config.stem, before, expansion, first, config)
        levels = {stride * first: before}  # stride -> width of the last block there
        self.blocks, self.steps = nn.ModuleList(), list[int]()
        stride *= first
        for expansion, width, step in rows:
            self.blocks.append(Block(before, width, expansion, step, config))
            self.steps.append(step)
            stride, before = stride * step, width
            levels[stride] = width
        self.strides, self.widths, self.embedding = tuple(levels), tuple(levels.values()), config.hidden

        self.to_former = MobileToFormer(before, d) if config.former else None
        self.expand = nn.Sequential(*shuffle(config.groups, config), *pointwise(before, 6 * before, config.groups), nn.ReLU6())
        self.merge = nn.Sequential(
            nn.Linear(6 * before + (d if config.former else 0), config.hidden), nn.BatchNorm1d(config.hidden), nn.Hardswish()
        )
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.hidden, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=(2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def run(self, image: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], Tensor]:
        """Features of each resolution, and the tokens that the last Mobile to Former leaves; without a Former, tokens are empty."""
        x = self.lite(self.stem(image))
        z = x.new_empty(0) if self.tokens is None else self.tokens.repeat(x.shape[0], 1, 1)
        features = [x]
        for block, step in zip(self.blocks, self.steps):
            x, z = block(x, z)
            if step == 1:
                features.pop()
            features.append(x)
        return features, (z if self.to_former is None else self.to_former(x, z))

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The last features of each resolution, of ``widths`` channels at ``strides``."""
        return self.run(image)[0]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Pooled features and the first token, merged by a layer."""
        features, z = self.run(image)
        pooled = F.hardswish(self.expand(features[-1]).mean((2, 3)))
        return self.merge(pooled if self.to_former is None else torch.cat([pooled, z[:, 0]], 1))

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def attended(network: MobileFormer, image: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B A M h w"]]:
    """Figure 6's picture in numbers: what each token looks at in each block's Mobile to Former, the last one included; cells sum to 1."""
    maps: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Tensor, Tensor], _: Tensor) -> None:
        x, z = given
        assert isinstance(module, MobileToFormer)
        query, keys = heads(module.query(z), HEADS), heads(x.flatten(2).mT, HEADS)
        maps.append((query @ keys.mT / keys.shape[-1] ** 0.5).softmax(-1).unflatten(-1, x.shape[2:]))

    hooks = [module.register_forward_hook(look) for module in network.modules() if isinstance(module, MobileToFormer)]
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


SMALL_BLOCKS = ((3, 12, 2), (3, 12, 1), (6, 24, 2), (3, 24, 1), (6, 48, 2), (4, 48, 1), (6, 64, 1), (6, 96, 2), (6, 96, 1))
SIZE_52M = Config(stem=8, blocks=SMALL_BLOCKS, tokens=3, token_width=128, hidden=1024, dropout=0.2)
VARIANTS: Mapping[str, Config] = {
    "508m": Config(
        stem=24,
        blocks=((2, 24, 1), (6, 40, 2), (3, 40, 1), (6, 72, 2), (3, 72, 1), (6, 128, 2), (4, 128, 1), (6, 176, 1), (6, 176, 1), (6, 240, 2),
                (6, 240, 1), (6, 240, 1)),
    ),
    "294m": Config(),
    "214m": Config(
        stem=12, hidden=1600, dropout=0.2,
        blocks=((2, 12, 1), (6, 20, 2), (3, 20, 1), (6, 40, 2), (4, 40, 1), (6, 80, 2), (4, 80, 1), (6, 112, 1), (6, 112, 1), (6, 160, 2),
                (6, 160, 1), (6, 160, 1)),
    ),
    "151m": Config(
        stem=12, hidden=1280, dropout=0.2,
        blocks=((2, 12, 1), (6, 16, 2), (3, 16, 1), (6, 32, 2), (3, 32, 1), (6, 64, 2), (4, 64, 1), (6, 88, 1), (6, 88, 1), (6, 128, 2),
                (6, 128, 1), (6, 128, 1)),
    ),
    "96m": Config(
        stem=12, hidden=1280, dropout=0.2, tokens=4, token_width=128,
        blocks=((2, 12, 1), (6, 16, 2), (6, 32, 2), (3, 32, 1), (6, 64, 2), (4, 64, 1), (6, 88, 1), (6, 128, 2), (6, 128, 1)),
    ),
    "52m": SIZE_52M,
    "26m": replace(SIZE_52M, groups=4, dropout=0.1),
    "small": Config(
        stem=12, hidden=320, dropout=0.1, tokens=4, token_width=96, stem_stride=None, image_size=None,
        blocks=((2, 12, 1), (6, 16, 2), (3, 16, 1), (6, 32, 2), (4, 32, 1), (6, 64, 2), (4, 64, 1), (6, 64, 1)),
    ),
    "test": Config(
        stem=4, hidden=64, dropout=0.1, tokens=2, token_width=16, stem_stride=None, image_size=None,
        blocks=((2, 4, 1), (3, 8, 2), (2, 8, 1), (2, 12, 2)),
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """The released code's commands: 1e-3 at a batch of 1024, brought down in proportion, weight decay by size; a laptop's own."""
    if config.image_size is None:
        return Recipe(lr=2e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0))
    decay = 0.08 if config.groups > 1 else {1920: 0.20, 1600: 0.15}.get(config.hidden, 0.10)
    return Recipe(
        lr=1e-3 * 128 / 1024, weight_decay=decay, batch_size=128, patch=config.image_size, clip=None, augment=Varied(erase=0.2),
    )  # fmt: skip


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: MobileFormer(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config),
    recipe=recipe,
    auto=("small", "294m"),
)
