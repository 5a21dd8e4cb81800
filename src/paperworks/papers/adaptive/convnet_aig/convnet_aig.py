"""ConvNet-AIG: a residual network in which every block has a small gate that decides for each image whether the block is computed.

Veit and Belongie, "Convolutional Networks with Adaptive Inference Graphs", ECCV 2018 (arXiv 1711.11503).

A gate reads the mean of its block's input and says open or closed. In training the decision is drawn with Gumbel noise (the Gumbel-max trick)
and its gradient is that of the Gumbel-softmax; a loss on the share of the images for which a gate opens pulls it to a target rate. Nothing
but gradient descent is needed, and blocks come to work for some classes only.

As in the official code (andreasveit/convnet-aig): temperature 1, the last layer of a gate starts near zero with biases of 0.1 and 2, shortcuts
are never gated, the rate loss is divided by all blocks. Different from it: in evaluation a gate opens where its logit is the larger (there it
draws on), and a block whose gate is closed is not computed (there it is multiplied by 0). Blocks of target rate 1 have no gate, as its README advises.

Shapes: B batch, C image channels, K classes, H W pixels, D channels, h w cells, N blocks, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import Varied
from paperworks.tasks.base import Augmentation, Batch, Grid, Loss, Output, Paper, Recipe, Sample, Spec
from paperworks.tasks.classification import image_side

Shortcut = Callable[[int, int, int], nn.Module]
"""(channels before, channels after, stride) -> what carries the input past a block that changes its shape."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The residual network whose blocks are gated."""

    counts: tuple[int, ...] = (18, 18, 18)
    """Blocks of each stage; (18, 18, 18) is ResNet-110 of CIFAR."""
    width: int = 16
    """Channels of the first stage, before a bottleneck's expansion; each stage doubles it."""
    bottleneck: bool = False
    """Blocks of 1x1, 3x3 and 1x1 convolutions that end four times as wide."""
    stem: Literal["cifar", "imagenet", "laptop"] = "cifar"
    """A 3x3 convolution; a 7x7 one of stride 2 and a pooling; one that leaves 16 cells a side."""
    image_size: int | None = 32
    """Side of the images; None takes it from the data."""


@dataclass(frozen=True, kw_only=True)
class Config(Layout):
    """A residual network with gates."""

    target: float = 0.6
    """t: for which share of the images a block is to be executed."""
    schedule: tuple[float | None, ...] = ()
    """Each block's own target rate, None for ``target``; 1 leaves its gate out. Empty: all take ``target``."""
    rate_weight: float = 2.0
    """Weight of the target rate loss (2 for CIFAR, 1 for ImageNet)."""


# --- The residual network that the papers of this section share


def projected(before: int, after: int, stride: int) -> nn.Module:
    """A 1x1 convolution and its norm (option B of He et al.)."""
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


def all_computed(module: nn.Module, x: Tensor) -> bool:
    """Whether blocks are computed for all images and multiplied by their gates: in training, and wherever a graph is written down.

    A graph of ONNX or of a compiler cannot depend on the data, and on the meta device there are none.
    """
    return module.training or x.is_meta or torch.compiler.is_exporting() or torch.compiler.is_compiling()


class Block(nn.Module):
    """A residual block that is computed for some of the images."""

    def __init__(self, before: int, planes: int, stride: int, bottleneck: bool, shortcut: Shortcut) -> None:
        super().__init__()
        after = 4 * planes if bottleneck else planes
        shapes = [(before, planes, 3, stride), (planes, planes, 3, 1)]
        if bottleneck:
            shapes = [(before, planes, 1, 1), (planes, planes, 3, stride), (planes, after, 1, 1)]
        layers: list[nn.Module] = []
        for ins, outs, kernel, step in shapes:
            layers += [nn.Conv2d(ins, outs, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(outs), nn.ReLU(inplace=True)]
        self.branch = nn.Sequential(*layers[:-1])  # the last ReLU follows the sum
        self.shortcut = nn.Identity() if (before, stride) == (after, 1) else shortcut(before, after, stride)

    def forward(self, x: Float[Tensor, "B D h w"], gate: Float[Tensor, " B"]) -> Float[Tensor, "B D2 h2 w2"]:
        """Shortcut + gate F(x), before the ReLU. In evaluation F is computed for the images with an open gate alone."""
        past = self.shortcut(x)
        if all_computed(self, x):
            return past + gate[:, None, None, None] * self.branch(x)
        on = gate.nonzero().flatten()
        if len(on) == len(x):
            return past + self.branch(x)
        return past.index_add(0, on, self.branch(x[on])) if len(on) else past


class Trunk(nn.Module):
    """Stem and blocks. What passes through them is up to the network that owns it.

    Attributes:
        stem: image -> B ``inputs[0]`` h w.
        blocks: all blocks, one after the other.
        ends: the number of blocks up to the end of each stage.
        inputs: channels that each block reads.
        outputs: channels that each block gives.
        widths: channels of the stages' outputs.
        strides: input pixels from one of their cells to the next.
    """

    def __init__(self, channels: int, side: int, layout: Layout, shortcut: Shortcut = projected) -> None:
        super().__init__()
        width = layout.width
        step = {"cifar": 1, "imagenet": 2, "laptop": max(2, side // 16)}[layout.stem]
        kernel = {"cifar": 3, "imagenet": 7, "laptop": 2 * (step // 2) + 1}[layout.stem]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        if layout.stem == "imagenet":
            self.stem.append(nn.MaxPool2d(3, 2, 1))
            step = 4
        stages = [(width * 2**i, count) for i, count in enumerate(layout.counts)]
        self.widths = tuple(planes * (4 if layout.bottleneck else 1) for planes, _ in stages)
        self.strides = tuple(step * 2**i for i in range(len(stages)))
        self.ends = tuple(accumulate(layout.counts))
        self.outputs = tuple(after for after, count in zip(self.widths, layout.counts) for _ in range(count))
        self.inputs = (width, *self.outputs[:-1])
        first = {0, *self.ends}
        plan = [planes for planes, count in stages for _ in range(count)]
        self.blocks = nn.ModuleList(
            Block(before, planes, 2 if i and i in first else 1, layout.bottleneck, shortcut)
            for i, (before, planes) in enumerate(zip(self.inputs, plan))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --- The paper


def gumbel_softmax(logits: Float[Tensor, "B 2"], temperature: float = 1.0) -> Float[Tensor, "B 2"]:
    """A choice drawn from softmax(logits), one-hot, with the gradient of a soft one (section 3.3, equations 5 to 7).

    Forward: argmax(logits + G), G = -log(-log U), which is choice k with probability softmax(logits)_k. Backward: the gradient of
    softmax((logits + G) / temperature), straight through the argmax.
    """
    noise = -torch.empty_like(logits).exponential_().log()  # -log U is exponentially distributed
    soft = ((logits + noise) / temperature).softmax(1)
    hard = F.one_hot(soft.argmax(1), logits.shape[1]).to(soft.dtype)
    return hard - soft.detach() + soft


class Gate(nn.Module):
    """Whether to compute a block, from the means of its input's channels (section 3.2): about 0.04 % of the block's operations."""

    def __init__(self, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.relevance = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
        self.decide = nn.Linear(hidden, 2)  # closed, open
        nn.init.normal_(self.decide.weight, std=0.001)
        with torch.no_grad():
            self.decide.bias.copy_(torch.tensor([0.1, 2.0]))  # open in 87 % of the draws

    def logits(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 2"]:
        """Of closed and open."""
        return self.decide(self.relevance(x.mean((2, 3))))

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, " B"]:
        """z, 0 or 1: drawn in training, the likelier one in evaluation."""
        logits = self.logits(x)
        return gumbel_softmax(logits)[:, 1] if self.training else (logits[:, 1] > logits[:, 0]).to(x.dtype)


class ConvNetAIG(nn.Module):
    """A residual network with a gate in front of each block whose target rate is below 1.

    Attributes:
        targets: each block's target rate.
        widths: channels of the stages' outputs.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=image_size)
        self.targets = targets(config)
        self.trunk = Trunk(channels, image_size, config)
        self.widths, self.strides, self.embedding = self.trunk.widths, self.trunk.strides, self.trunk.widths[-1]
        self.gates = nn.ModuleDict({str(i): Gate(width) for i, width in enumerate(self.trunk.inputs) if self.targets[i] < 1})
        self.head = nn.Linear(self.embedding, classes)

    def decided(self, i: int, x: Float[Tensor, "B D h w"]) -> Float[Tensor, " B"]:
        """Which images block i is executed for; all where it has no gate."""
        return self.gates[str(i)](x) if str(i) in self.gates else x.new_ones(x.shape[0])

    def routed(
        self, image: Float[Tensor, "B C H W"], given: Float[Tensor, "B N"] | None = None
    ) -> tuple[list[Tensor], Float[Tensor, "B N"]]:
        """The outputs of all stages, and z of every image and block; ``given`` decides in place of the gates."""
        x, features, gates = self.trunk.stem(image), [], []
        for i, block in enumerate(self.trunk.blocks):
            z = self.decided(i, x) if given is None else given[:, i]
            x = F.relu(block(x, z))  # equation 3
            gates.append(z)
            if i + 1 in self.trunk.ends:
                features.append(x)
        return features, torch.stack(gates, 1)

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each stage ends with, of ``widths`` channels at ``strides``."""
        return self.routed(image)[0]

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The mean of the last stage over its cells."""
        return self.pyramid(image)[-1].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"], given: Float[Tensor, "B N"] | None = None) -> Output:
        """``logits`` (B K) and ``gates`` (B N, 0 or 1)."""
        features, gates = self.routed(image, given)
        return {"logits": self.head(features[-1].mean((2, 3))), "gates": gates}

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def targets(config: Config) -> tuple[float, ...]:
    """The target rate of each block.

    Raises:
        InputError: the schedule is not one rate a block, or a rate is no share.
    """
    count = sum(config.counts)
    schedule = config.schedule or (None,) * count
    if len(schedule) != count:
        raise InputError(f"schedule has {len(schedule)} target rates for {count} blocks; give one a block, or none")
    rates = tuple(config.target if rate is None else rate for rate in schedule)
    if not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"target rates are shares of the images, from 0 to 1; got {min(rates)} to {max(rates)}")
    return rates


def rated(config: Config) -> Loss:
    """Cross-entropy and the target rate loss (section 3.4, equation 8): the squared distance of each block's share of open gates, over the batch, from its target."""
    wanted = torch.tensor(targets(config))

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        shares = output["gates"].mean(0)
        rate = (shares - wanted.to(shares)).square().mean()  # 0 where the target is 1
        classification = F.cross_entropy(output["logits"], batch["label"])
        return {
            "loss": classification + config.rate_weight * rate,
            "classification": classification,
            "rate": rate,
            "executed": shares.mean(),
        }

    return loss


@torch.no_grad()
def rates_by_class(network: ConvNetAIG, image: Float[Tensor, "B C H W"], label: Int[Tensor, " B"]) -> Float[Tensor, "K N"]:
    """For which share of a class's images each block is executed: the paper's picture of specialisation. Rows of absent classes are NaN."""
    gates = network.eval()(image)["gates"]
    return torch.stack([gates[label == k].mean(0) for k in range(network.head.out_features)])


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """The usual augmentation of CIFAR: mirrored or not, and moved by up to an eighth of the side, with zeros coming in."""

    shift: float = 0.125
    """Largest shift as a share of the side."""
    flip: float = 0.5
    """Chance of a mirror image."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """``sample`` with another view of its image's middle square, of the height and width of ``patch``."""
        side = min(patch)
        image = v2.functional.center_crop(v2.functional.resize(sample["image"], [side], antialias=True), list(patch))
        mirrored, *place = torch.rand(3, generator=generator).tolist()
        if mirrored < self.flip:
            image = v2.functional.horizontal_flip(image)
        margin = round(self.shift * side)
        top, left = (int(p * (2 * margin + 1)) for p in place)
        image = v2.functional.crop(v2.functional.pad(image, [margin]), top, left, *patch)
        return sample | {"image": tv_tensors.Image(image)}


BEST_50 = (1, 1, 0.8, 1, None, None, None, 1, None, None, None, None, None, 1, 0.7, 1)
BEST_101 = (1,) * 8 + (None,) * 25
"""The schedules of the official README, for targets of 0.4 to 0.7 and of 0.3 and 0.5."""
IMAGENET = {"width": 64, "bottleneck": True, "stem": "imagenet", "image_size": 224, "rate_weight": 1.0}
VARIANTS: Mapping[str, Config] = {
    "resnet110": Config(),
    "resnet50": Config(counts=(3, 4, 6, 3), target=0.7, **IMAGENET),  # pyright: ignore[reportArgumentType]
    "resnet101": Config(counts=(3, 4, 23, 3), target=0.7, **IMAGENET),  # pyright: ignore[reportArgumentType]
    "resnet50_best": Config(counts=(3, 4, 6, 3), target=0.5, schedule=BEST_50, **IMAGENET),  # pyright: ignore[reportArgumentType]
    "resnet101_best": Config(counts=(3, 4, 23, 3), target=0.5, schedule=BEST_101, **IMAGENET),  # pyright: ignore[reportArgumentType]
    "laptop": Config(counts=(3, 3, 3), width=32, stem="laptop", image_size=None),
    "test": Config(counts=(1, 2, 1), width=8, stem="laptop", image_size=None),
}


def residual_recipe(layout: Layout) -> Recipe:
    """How residual networks are trained from scratch: on ImageNet, on CIFAR (the official scripts), and on a laptop."""
    if layout.image_size is None:
        return Recipe(lr=3e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Shifted())
    if layout.stem == "imagenet":
        view: Augmentation = Varied(chance=0, erase=0)
        return Recipe(
            optimizer="sgd", lr=0.1, weight_decay=1e-4, schedule="step", decay_at=(1 / 3, 2 / 3), warmup=0, batch_size=256,
            patch=layout.image_size, clip=None, augment=view,
        )  # fmt: skip
    return Recipe(
        optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="step", decay_at=(150 / 350, 250 / 350), warmup=0, batch_size=256,
        patch=layout.image_size, clip=None, augment=Shifted(),
    )  # fmt: skip


def build(spec: Spec, config: Config) -> ConvNetAIG:
    """The network for a data set."""
    return ConvNetAIG(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=residual_recipe, auto=("laptop", "resnet110"), loss=rated)
