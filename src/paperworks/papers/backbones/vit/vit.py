"""Vision Transformer: an image is a sequence of flattened patches, and a plain Transformer encoder reads it.

Dosovitskiy, Beyer, Kolesnikov, Weissenborn, Zhai, Unterthiner, Dehghani, Minderer, Heigold, Gelly, Uszkoreit and Houlsby, "An Image is
Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021 (arXiv 2010.11929).

Nothing in the network knows that images are two-dimensional but the cutting into patches; everything else, where a patch lies included, is
learned. With little data that is a handicap against ResNets, with tens of millions of images it is none.

As in the official code (google-research/vision_transformer): LayerNorm with an epsilon of 1e-6, position embeddings from N(0, 0.02), a
class token from zero, Xavier weights, biases in the projections, SAME padding and weight standardisation in the hybrids' ResNet. Different
from it: the exact GELU (JAX's ``gelu`` is the tanh approximation; timm and torchvision run the released weights with the exact one), position
embeddings are interpolated whenever an image of another size comes, not only when weights are loaded, and the last layer of the
pre-training head starts near zero, not at it.

Shapes: B batch, C image channels, K classes, H W pixels, P side of a patch, h w patches of a column and row, N = h w, D width, L layers,
A attention heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isqrt

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.views import View
from paperworks.tasks.base import Grid, Output, Paper, Recipe
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """A row of table 1."""

    layers: int = 12
    width: int = 768
    """D. The MLPs are four times as wide."""
    heads: int = 12
    patch: int | None = 16
    """P, or the cells of a patch where a ResNet comes first; None takes an eighth of the image's side."""
    resnet: tuple[int, ...] = ()
    """Units of each stage of the ResNet whose feature map a hybrid cuts into patches."""
    dropout: float = 0.0
    """After every dense layer but those of queries, keys and values, and after the position embeddings (appendix B.1)."""
    pretraining: bool = False
    """The head: with a hidden layer of tanh units, as in pre-training, or a single linear layer that starts at zero, as in fine-tuning."""
    image_size: int | None = 224
    """Side of the images; None takes it from the data."""


class MSA(nn.Module):
    """Multi-head self-attention, appendix A."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # U_qkv of all heads, eq. 5
        self.out = nn.Linear(width, width)  # U_msa, eq. 8

    def split(self, z: Float[Tensor, "B N D"]) -> Tensor:
        """Queries, keys and values of each head, 3 B A N D/A."""
        return rearrange(self.qkv(z), "b n (three a d) -> three b a n d", three=3, a=self.heads)

    def attention(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B A N N"]:
        """What ``forward`` computes on the way, eq. 6: the weight of each token (last axis) for each."""
        q, k, _ = self.split(z)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Eqs. 6 to 8."""
        q, k, v = self.split(z)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b a n d -> b n (a d)"))


class Layer(nn.Module):
    """A layer of the encoder (figure 1, right): LayerNorm before, residual connection after each block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.msa = MSA(width, heads)
        self.hidden, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def mlp(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Two layers with a GELU."""
        return self.dropout(self.output(self.dropout(F.gelu(self.hidden(z)))))

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Eqs. 2 and 3."""
        z = self.dropout(self.msa(self.norm1(z))) + z
        return self.mlp(self.norm2(z)) + z


class StdConv(nn.Conv2d):
    """Without bias; each filter is brought to mean 0 and standard deviation 1, and the input padded as TensorFlow's SAME."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Standardise, pad, convolve."""
        std, mean = torch.std_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return F.conv2d(same(input, self.kernel_size[0], self.stride[0]), (self.weight - mean) / (std + 1e-5), stride=self.stride)


def same(x: Float[Tensor, "B C H W"], kernel: int, stride: int) -> Float[Tensor, "B C H2 W2"]:
    """Zeros around ``x`` so that a stride of s leaves ceil(n / s) of n pixels; an odd zero goes behind."""
    missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
    return F.pad(x, [pad for m in missing for pad in (m // 2, m - m // 2)])


class Unit(nn.Module):
    """A bottleneck of the hybrids' ResNet, with GroupNorm in place of BatchNorm (section 4.1, "ResNet (BiT)")."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = StdConv(inputs, width, 1), nn.GroupNorm(32, width, eps=1e-6)
        self.conv2, self.norm2 = StdConv(width, width, 3, stride), nn.GroupNorm(32, width, eps=1e-6)
        self.conv3, self.norm3 = StdConv(width, 4 * width, 1), nn.GroupNorm(32, 4 * width, eps=1e-6)
        nn.init.zeros_(self.norm3.weight)  # a unit starts as its shortcut
        self.shortcut = nn.Identity()
        if inputs != 4 * width:
            self.shortcut = nn.Sequential(StdConv(inputs, 4 * width, 1, stride), nn.GroupNorm(32, 4 * width, eps=1e-6))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h2 w2"]:
        """Relu of the shortcut plus what the convolutions add to it."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.shortcut(x) + self.norm3(self.conv3(y)))


class HybridResNet(nn.Module):
    """Stages of 4 and, from the second on, twice the stride of the one before: a feature map of stride 4 x 2^(stages - 1)."""

    def __init__(self, channels: int, units: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.norm = StdConv(channels, 64, 7, 2), nn.GroupNorm(32, 64, eps=1e-6)
        stages, inputs = [], 64
        for i, count in enumerate(units):
            width = 64 * 2**i
            stages += [Unit(inputs, width, 1 if i == 0 else 2), *(Unit(4 * width, width, 1) for _ in range(count - 1))]
            inputs = 4 * width
        self.units = nn.Sequential(*stages)
        self.stride, self.width = 4 * 2 ** (len(units) - 1), inputs

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F h w"]:
        """Root, max pooling, stages."""
        x = F.relu(self.norm(self.conv(image)))
        return self.units(F.max_pool2d(same(x, 3, 2), 3, 2))  # zeros around are as good as -inf after a relu


class ViT(nn.Module):
    """Figure 1.

    Attributes:
        widths: channels of the one map of features.
        strides: input pixels from one of its cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        width, patch = config.width, int(config.patch or image_size // 8)
        self.resnet = HybridResNet(channels, config.resnet) if config.resnet else None
        stride, inputs = (self.resnet.stride, self.resnet.width) if self.resnet else (1, channels)
        self.grid = Grid(fixed=image_size)
        self.strides, self.widths, self.embedding = (stride * patch,), (width,), width

        self.patches = nn.Conv2d(inputs, width, patch, stride=patch)  # E: the same as a linear map of flattened patches
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (image_size // self.strides[0]) ** 2 + 1, width))  # E_pos
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.Sequential(*(Layer(width, config.heads, config.dropout) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        hidden = (nn.Linear(width, width), nn.Tanh()) if config.pretraining else ()
        last = nn.Linear(width, classes)
        self.head = nn.Sequential(*hidden, last)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.patches.weight, std=(inputs * patch**2) ** -0.5)
        nn.init.zeros_(self.patches.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(last.bias)
        if config.pretraining:
            nn.init.normal_(last.weight, std=0.02)
        else:
            nn.init.zeros_(last.weight)  # section 3.2

    def embedded(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Eq. 1: the class token and the patches, with their positions."""
        x = self.patches(image if self.resnet is None else self.resnet(image))
        h, w = x.shape[2:]
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), rearrange(x, "b d h w -> b (h w) d")], 1)
        return self.dropout(tokens + resized(self.positions, h, w))

    def encode(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """The encoder's output, normalised: the class token's is the first."""
        return self.norm(self.layers(self.embedded(image)))

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The patches' outputs as a map, B D h w: a ViT has one resolution."""
        return [rearrange(self.encode(image)[:, 1:], "b (h w) d -> b d h w", h=image.shape[2] // self.strides[0])]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Eq. 4: y, the class token's output."""
        return self.encode(image)[:, 0]

    def forward(self, image: Float[Tensor, "B C H W"]) -> Output:
        """``logits``, B K."""
        return {"logits": self.head(self.embed(image))}

    def attention(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "L B A N N"]:
        """Attention weights of every layer and head, for looking at."""
        z, weights = self.embedded(image), []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            weights.append(layer.msa.attention(layer.norm1(z)))
            z = layer(z)
        return torch.stack(weights)

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def resized(positions: Float[Tensor, "1 M D"], h: int, w: int) -> Float[Tensor, "1 N D"]:
    """Position embeddings for a grid of h w patches, interpolated in 2-D where it is another one (section 3.2).

    The class token's stays. As officially (``scipy.ndimage.zoom`` of order 1), the outermost patches keep theirs: ``align_corners``.
    """
    token, patches = positions[:, :1], positions[:, 1:]
    side = isqrt(patches.shape[1])
    if (h, w) == (side, side):
        return positions
    grid = rearrange(patches, "b (h w) d -> b d h w", h=side)
    grid = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=True)
    return torch.cat([token, rearrange(grid, "b d h w -> b (h w) d")], 1)


def rollout(attention: Float[Tensor, "L B A N N"]) -> Float[Tensor, "B N"]:
    """How much of the class token's output each token is, over all layers (appendix D.8, figure 6; Abnar and Zuidema 2020).

    Heads are averaged, half of each layer is its residual connection, and the layers' matrices are multiplied.
    """
    mixed = (attention.mean(2) + torch.eye(attention.shape[-1], device=attention.device)) / 2  # L B N N
    total = mixed[0]
    for layer in mixed[1:]:
        total = layer @ total
    return total[:, 0]


def attention_distance(attention: Float[Tensor, "L B A N N"], stride: int) -> Float[Tensor, "L A"]:
    """Mean distance in pixels from a patch to what it attends to, by layer and head (appendix D.7, figure 7): a head's receptive field."""
    patches = attention[..., 1:, 1:]
    side = isqrt(patches.shape[-1])
    place = torch.cartesian_prod(*[torch.arange(side, dtype=attention.dtype, device=attention.device)] * 2)  # N 2
    weights = patches / patches.sum(-1, keepdim=True)
    return stride * (weights * torch.cdist(place, place)).sum(-1).mean((1, 3))


LARGE = Config(layers=24, width=1024, heads=16)
STAGES_3 = (3, 4, 9)
"""The fourth stage's units are moved to the third: a stride of 16, and four times as many patches (section 4.1)."""
STAGES_4 = (3, 4, 6, 3)
"""ResNet-50 as it is: a stride of 32."""
VARIANTS = {
    "b/16": Config(),
    "b/32": Config(patch=32),
    "l/16": LARGE,
    "l/32": replace(LARGE, patch=32),
    "h/14": Config(layers=32, width=1280, heads=16, patch=14),
    "r50+b/16": Config(patch=1, resnet=STAGES_3),
    "r50+b/32": Config(patch=1, resnet=STAGES_4),
    "r50+l/16": replace(LARGE, patch=1, resnet=STAGES_3),
    "r50+l/32": replace(LARGE, patch=1, resnet=STAGES_4),
    "s/16": Config(width=384, heads=6),
    "ti/16": Config(width=192, heads=3),
    "small": Config(layers=4, width=96, heads=3, patch=None, pretraining=True, image_size=None),
    "test": Config(layers=2, width=16, heads=2, patch=None, pretraining=True, image_size=None),
}


def recipe(config: Config) -> Recipe:
    """Fine-tuning (table 4), pre-training on ImageNet alone (table 3), learning rates in proportion to the batch; a laptop's own."""
    if config.image_size is None:
        view = View(area=(0.5, 1.0), jitter_chance=0, grey=0)
        return Recipe(lr=1e-3, weight_decay=0.1, warmup=0.1, batch_size=50, average=0.98, augment=view)
    view, side = View(area=(0.05, 1.0), jitter_chance=0, grey=0), config.image_size
    if config.pretraining:
        return Recipe(lr=3e-3 * 256 / 4096, weight_decay=0.3, warmup=0.1, batch_size=256, patch=side, augment=view)
    return Recipe(optimizer="sgd", lr=0.03 * 64 / 512, warmup=0.025, batch_size=64, patch=side, augment=view)


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: ViT(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config),
    recipe=recipe,
    auto=("small", "s/16"),
)
