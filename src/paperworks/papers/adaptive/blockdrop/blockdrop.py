"""BlockDrop: a small policy network looks at the image once and decides which blocks of a residual network are run.

Wu, Nagarajan, Kumar, Rennie, Davis, Grauman and Feris, "BlockDrop: Dynamic Inference Paths in Residual Networks", CVPR 2018 (arXiv 1711.08393).

All decisions are made in one step, as independent Bernoulli variables. The policy is rewarded for few blocks where the prediction is right and
punished where it is wrong, and learns by policy gradient against what its own likeliest decisions would have earned (self-critical). A curriculum
lets it decide on the last blocks first; in the end both networks are fine-tuned together.

As in the official code (Tushar-N/blockdrop): probabilities are kept between 0.2 and 0.8 while they are explored, a bonus of -s log s, a
punishment of 1 in the curriculum and of 5 in the fine-tuning, parameter-free shortcuts for CIFAR. Different from it: the residual network's own
training, the curriculum and the fine-tuning are one training (``advance``); in the fine-tuning the policy's loss is a mean too (there a sum;
with Adam it scales nothing) and the bonus is kept; the unused value head is left out; a dropped block is not computed in evaluation.

Shapes: B batch, C image channels, K classes, H W pixels, D channels, h w cells, N blocks, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.adaptive.convnet_aig.convnet_aig import Layout, Shifted, Shortcut, Trunk, projected
from paperworks.papers.adaptive.skipnet.skipnet import passed
from paperworks.papers.backbones.convnext.convnext import Varied
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config(Layout):
    """A residual network, its policy network and how the two are trained."""

    policy_width: int = 16
    """Channels of the policy network's first stage; it has one block of two convolutions a stage."""
    bound: float = 0.8
    """alpha: while they are explored, probabilities lie between 1 - alpha and alpha."""
    entropy_weight: float = 0.1
    """Weight of the bonus of -s log s."""
    penalties: tuple[float, float] = (-1.0, -5.0)
    """Reward of a wrong prediction in the curriculum and in the fine-tuning (-gamma). Where many predictions are wrong, 1 is too little: dropping pays."""
    phases: tuple[float, float] = (0.4, 0.8)
    """Shares of the training at which the curriculum and the fine-tuning begin; before, the residual network is trained by itself."""


class Pooled(nn.Module):
    """CIFAR's shortcut without parameters: the mean of the cells, and channels of zeros."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, after - before

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D2 h2 w2"]:
        """Fewer cells, more channels."""
        return F.pad(F.avg_pool2d(x, self.stride), (0, 0, 0, 0, 0, self.more))


def shortcut_of(layout: Layout) -> Shortcut:
    """Of the residual network and of its policy: with parameters on ImageNet alone."""
    return projected if layout.stem == "imagenet" else Pooled


class Policy(nn.Module):
    """f_pn (section 3.1): a residual network of one block a stage, on an image of half the side where that is large; 1 to 5 % of the operations."""

    def __init__(self, channels: int, side: int, blocks: int, config: Config) -> None:
        super().__init__()
        self.half = config.stem == "imagenet"  # pyright: ignore[reportAttributeAccessIssue]
        layout = Layout(counts=(1,) * len(config.counts), width=config.policy_width, stem=config.stem)
        self.trunk = Trunk(channels, side, layout, shortcut_of(config))
        self.decide = nn.Linear(self.trunk.widths[-1], blocks)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        """Equation 2, s: each block's probability to be kept."""
        x = self.trunk.stem(F.avg_pool2d(image, 2) if self.half else image)
        for block in self.trunk.blocks:
            x = F.relu(block.shortcut(x) + block.branch(x))  # pyright: ignore[reportCallIssue]
        return self.decide(x.mean((2, 3))).sigmoid()


class BlockDrop(nn.Module):
    """A residual network and the policy that drops its blocks.

    Attributes:
        widths: channels of the stages' outputs.
        strides: input pixels from one of their cells to the next.
        embedding: numbers that the classifier sees.
        phase: what is trained now: the residual network, the policy (``curriculum``), or both (``joint``).
    """

    decided: Tensor

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        start, end = config.phases
        if not 0 <= start <= end <= 1:
            raise InputError(f"phases are two shares of the training, the first not above the second; got {start} and {end}")
        self.config, self.grid = config, Grid(fixed=image_size)
        self.trunk = Trunk(channels, image_size, config, shortcut_of(config))
        self.widths, self.strides, self.embedding = self.trunk.widths, self.trunk.strides, self.trunk.widths[-1]
        self.blocks = len(self.trunk.blocks)
        self.policy = Policy(channels, image_size, self.blocks, config)
        self.head = nn.Linear(self.embedding, classes)
        self.phase: Literal["resnet", "curriculum", "joint"] = "joint"
        self.register_buffer("decided", torch.tensor(self.blocks))  # how many of the last blocks the policy decides on

    def advance(self, share: float) -> None:
        """The residual network by itself; the policy, on one block more at a time until half of the curriculum is over; both."""
        start, end = self.config.phases
        self.phase = "resnet" if share < start else "curriculum" if share < end else "joint"
        done = 1.0 if self.phase == "joint" else 2 * (share - start) / (end - start) if self.phase == "curriculum" else -1.0
        self.decided.fill_(min(self.blocks, int(1 + done * self.blocks)) if done >= 0 else 0)
        if self.phase == "curriculum":
            self.trunk.eval()  # fixed, with the statistics of its own training

    def kept(self, decisions: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The decisions on the last ``decided`` blocks; all blocks before them are kept."""
        free = torch.arange(self.blocks, device=decisions.device) < self.blocks - self.decided
        return torch.where(free, 1.0, decisions)

    def greedy(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        """The likeliest decisions."""
        return self.kept((self.policy(image) >= 0.5).to(image.dtype))

    def routed(self, image: Float[Tensor, "B C H W"], gates: Float[Tensor, "B N"]) -> list[Tensor]:
        """The outputs of all stages, of the blocks that are kept."""
        x, features = self.trunk.stem(image), []
        for i, block in enumerate(self.trunk.blocks):
            x = passed(block, x, gates[:, i])  # pyright: ignore[reportArgumentType]
            if i + 1 in self.trunk.ends:
                features.append(x)
        return features

    def classified(self, image: Float[Tensor, "B C H W"], gates: Float[Tensor, "B N"]) -> Float[Tensor, "B K"]:
        """Logits from the blocks that are kept."""
        return self.head(self.routed(image, gates)[-1].mean((2, 3)))

    def pyramid(self, image: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """What each stage ends with, of ``widths`` channels at ``strides``."""
        return self.routed(image, self.greedy(image))

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The mean of the last stage over its cells."""
        return self.pyramid(image)[-1].mean((2, 3))

    def forward(self, image: Float[Tensor, "B C H W"], given: Float[Tensor, "B N"] | None = None) -> Output:
        """``logits`` (B K) and ``gates`` (B N, 0 or 1); in training what the policy's loss needs as well.

        ``given`` decides in place of the policy.
        """
        if given is not None or not self.training:
            gates = self.greedy(image) if given is None else given
            return {"logits": self.classified(image, gates), "gates": gates}
        s = self.policy(image)
        if self.phase == "resnet":
            gates = torch.ones_like(s)
            return {"logits": self.classified(image, gates), "gates": gates}
        bounded = self.config.bound * s + (1 - self.config.bound) * (1 - s)  # section 3.2
        gates = self.kept(torch.bernoulli(bounded.detach()))
        free = self.kept(torch.zeros_like(s)) == 0
        chosen = torch.where(gates > 0, bounded, 1 - bounded)
        likeliest = self.kept((s >= 0.5).to(s.dtype)).detach()
        with torch.no_grad():
            critic = self.classified(image, likeliest)
        with torch.set_grad_enabled(self.phase == "joint"):
            logits = self.classified(image, gates)
        return {
            "logits": logits,
            "gates": gates,
            "log_probability": (free * chosen.log()).sum(1),
            "entropy": -(bounded * bounded.log()).sum(1),
            "critic_logits": critic,
            "critic_gates": likeliest,
            "penalty": s.new_tensor(self.config.penalties[self.phase == "joint"]),
        }

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def reward(
    logits: Float[Tensor, "B K"], label: Int[Tensor, " B"], gates: Float[Tensor, "B N"], penalty: Float[Tensor, ""]
) -> Float[Tensor, " B"]:
    """Equation 3: 1 - (share of blocks)^2 where the prediction is right, the penalty where it is wrong."""
    return torch.where(logits.argmax(1) == label, 1 - gates.mean(1).square(), penalty)


def self_critical(config: Config) -> Loss:
    """Cross-entropy along the drawn path, and the policy's gradient (equations 5 and 6): -log pi(u | x) (R(u) - R(likeliest u)).

    In the curriculum the residual network has no gradient, so that its cross-entropy is a number to look at.
    """

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        label, gates = batch["label"], output["gates"]
        classification = F.cross_entropy(output["logits"], label)
        policy = entropy = classification.new_zeros(())
        if "penalty" in output:
            earned = reward(output["logits"], label, gates, output["penalty"])
            expected = reward(output["critic_logits"], label, output["critic_gates"], output["penalty"])
            policy = -(output["log_probability"] * (earned - expected).detach()).mean()
            entropy = output["entropy"].mean()
        return {
            "loss": classification + policy - config.entropy_weight * entropy,
            "classification": classification,
            "policy": policy,
            "kept": gates.mean(),
        }

    return loss


IMAGENET = {"width": 64, "bottleneck": True, "stem": "imagenet", "image_size": 224, "policy_width": 64}
VARIANTS: Mapping[str, Config] = {
    "resnet32": Config(counts=(5, 5, 5)),
    "resnet110": Config(),
    "resnet101": Config(counts=(3, 4, 23, 3), **IMAGENET),  # pyright: ignore[reportArgumentType]
    "laptop": Config(counts=(3, 3, 3), width=32, stem="laptop", image_size=None, entropy_weight=0.01, penalties=(-5.0, -5.0)),
    "test": Config(counts=(1, 2, 1), width=8, policy_width=4, stem="laptop", image_size=None),
}


def recipe(config: Config) -> Recipe:
    """Adam, 1e-3 and for the fine-tuning 1e-4, as in the official scripts, for the residual network as well. The laptop's own for small images."""
    if config.image_size is None:
        return Recipe(lr=3e-3, weight_decay=0.05, batch_size=50, average=0.98, augment=Shifted())
    return Recipe(
        optimizer="adam", lr=1e-3, schedule="step", decay_at=(config.phases[1],), warmup=0, batch_size=256, patch=config.image_size,
        clip=None, augment=Varied(chance=0, erase=0) if config.stem == "imagenet" else Shifted(),
    )  # fmt: skip


def build(spec: Spec, config: Config) -> BlockDrop:
    """The network for a data set."""
    return BlockDrop(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("laptop", "resnet32"), loss=self_critical)
