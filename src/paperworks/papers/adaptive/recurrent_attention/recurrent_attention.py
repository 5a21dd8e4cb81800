"""RAM: a recurrent network that looks at an image through a few small glimpses and decides where to look next.

Mnih, Heess, Graves and Kavukcuoglu, "Recurrent Models of Visual Attention", NeurIPS 2014 (arXiv 1406.6247).

A glimpse is a stack of square patches around one point, each larger and coarser than the one before. A recurrent core gathers what the glimpses
showed, and a location policy says where the next one goes. What it costs depends on the number of glimpses and not on the size of the image.
Looking has no gradient: the policy learns by REINFORCE with a learned baseline, everything else by the classification's gradient (a hybrid loss).

There is no official code. Where the paper leaves things open, as the usual re-implementation (kevinzakka/recurrent-visual-attention): baseline and
location networks read the state without sending a gradient into it, REINFORCE has a weight of 0.01, the first location is uniform. Different from
it: one linear layer for the location, as in the paper; no loss on a location that no glimpse follows; in evaluation the centre first, then the means.

Shapes: B batch, C image channels, K classes, H W pixels, T glimpses, S scales, g side of a patch, F features of the core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperworks.errors import InputError
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Sample, Spec
from paperworks.tasks.classification import image_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sensor, the number of glimpses, and the sizes of the networks."""

    glimpse: int = 8
    """g: side of each patch as the network sees it."""
    scales: int = 1
    """Patches of a glimpse; each is twice as wide as the one before."""
    glimpses: int = 6
    """T."""
    hidden: int = 128
    """Units that read the glimpse, and as many that read its location."""
    core: int = 256
    """Units of the recurrent state."""
    std: float = 0.05
    """Standard deviation of a location around its mean, in half sides of the image."""
    policy_weight: float = 0.01
    """Weight of REINFORCE in the hybrid loss."""
    image_size: int | None = 28
    """Side of the images; None takes it from the data."""


def glimpsed(image: Float[Tensor, "B C H W"], location: Float[Tensor, "B 2"], side: int, scales: int) -> Float[Tensor, "B S*C g g"]:
    """The glimpse sensor rho (figure 1A): patches of side g, 2g, 4g ... around a location, averaged down to g x g; zeros beyond the image.

    A location is x and y in [-1, 1]: (0, 0) is the centre, (-1, -1) the corner at the top left.
    """
    _, _, height, width = image.shape
    batch = torch.arange(image.shape[0], device=image.device)[:, None, None]
    scale = location.new_tensor([width, height]) / 2
    pixel = ((location + 1) * scale).long()  # the patch's middle, rounded down
    patches = []
    for i in range(scales):
        length = side * 2**i
        around = F.pad(image, (length // 2,) * 4)
        steps = torch.arange(length, device=image.device)
        rows, columns = pixel[:, 1, None] + steps, pixel[:, 0, None] + steps
        patch = around.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
        patches.append(F.avg_pool2d(patch, 2**i) if i else patch)
    return torch.cat(patches, 1)


class GlimpseNetwork(nn.Module):
    """f_g (figure 1B): what is seen and where, each through a hidden layer, added up."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.side, self.scales = config.glimpse, config.scales
        self.what = nn.Linear(config.scales * channels * config.glimpse**2, config.hidden)
        self.where = nn.Linear(2, config.hidden)
        self.from_what = nn.Linear(config.hidden, config.core)
        self.from_where = nn.Linear(config.hidden, config.core)

    def forward(self, image: Float[Tensor, "B C H W"], location: Float[Tensor, "B 2"]) -> Float[Tensor, "B F"]:
        """g_t."""
        what = F.relu(self.what(glimpsed(image, location, self.side, self.scales).flatten(1)))
        return F.relu(self.from_what(what) + self.from_where(F.relu(self.where(location))))


class RecurrentAttention(nn.Module):
    """Sensor, core, location policy, classifier and baseline.

    Attributes:
        embedding: numbers that the classifier sees.
    """

    def __init__(self, channels: int, classes: int, image_size: int, config: Config) -> None:
        super().__init__()
        if config.glimpses < 1 or config.scales < 1 or config.glimpse % 2:
            raise InputError(
                f"glimpses and scales are 1 or more and the glimpse's side even; got {config.glimpses}, {config.scales} and {config.glimpse}"
            )
        self.grid = Grid(fixed=image_size)
        self.glimpses, self.std, self.embedding = config.glimpses, config.std, config.core
        self.glimpse = GlimpseNetwork(channels, config)
        self.from_state = nn.Linear(config.core, config.core)
        self.from_glimpse = nn.Linear(config.core, config.core)
        self.location = nn.Linear(config.core, 2)
        self.baseline = nn.Linear(config.core, 1)
        self.head = nn.Linear(config.core, classes)

    def look(self, image: Float[Tensor, "B C H W"], location: Float[Tensor, "B 2"], state: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """h_t = f_h(h_(t-1), g_t): one glimpse more."""
        return F.relu(self.from_state(state) + self.from_glimpse(self.glimpse(image, location)))

    def next(self, state: Float[Tensor, "B F"]) -> tuple[Float[Tensor, "B 2"], Float[Tensor, " B"]]:
        """Where to look, and in training the logarithm of its probability: a Gaussian around a mean that the state gives.

        The policy's gradient stops at the state. The probability is that of the location as it was drawn, before it is put back into the image.
        """
        mean = self.location(state.detach()).tanh()
        if not self.training:
            return mean, mean.new_zeros(mean.shape[0])
        policy = Normal(mean, self.std)
        drawn = policy.sample()
        return drawn.clamp(-1, 1), policy.log_prob(drawn).sum(1)

    def forward(self, image: Float[Tensor, "B C H W"], given: Float[Tensor, "B T 2"] | None = None) -> Output:
        """``logits`` (B K), ``locations`` (B T 2), and of the T - 1 decisions ``log_probability`` and ``baselines``.

        ``given`` are locations in place of the policy's.
        """
        state = image.new_zeros(image.shape[0], self.embedding)
        start = image.new_zeros(image.shape[0], 2)
        location = start.uniform_(-1, 1) if self.training else start
        locations, logs, baselines = [], [], []
        for t in range(self.glimpses):
            location = location if given is None else given[:, t]
            locations.append(location)
            state = self.look(image, location, state)
            if t + 1 < self.glimpses:
                baselines.append(self.baseline(state.detach())[:, 0])
                location, log = self.next(state)
                logs.append(log)
        none = image.new_zeros(image.shape[0], 0)
        return {
            "logits": self.head(state),
            "state": state,
            "locations": torch.stack(locations, 1),
            "log_probability": torch.stack(logs, 1) if logs else none,
            "baselines": torch.stack(baselines, 1) if baselines else none,
        }

    def embed(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The state after the last glimpse."""
        return self(image)["state"]

    def head_parameters(self) -> Iterable[nn.Parameter]:
        """The classifier's."""
        return self.head.parameters()


def hybrid(config: Config) -> Loss:
    """Section 3: cross-entropy for what has a gradient, REINFORCE for the locations, squared error for the baseline.

    The reward is 1 at the end where the class is right, so the return R of every decision is the same. REINFORCE (equation 4): the sum over
    time of -log pi(l_t) (R - b_t).
    """

    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        classification = F.cross_entropy(output["logits"], batch["label"])
        reward = (output["logits"].argmax(1) == batch["label"]).to(output["logits"])
        advantage = reward[:, None] - output["baselines"]
        policy = -(output["log_probability"] * advantage.detach()).sum(1).mean()
        baseline = advantage.square().sum() / max(advantage.numel(), 1)
        return {
            "loss": classification + config.policy_weight * policy + baseline,
            "classification": classification,
            "policy": policy,
            "baseline": baseline,
            "reward": reward.mean(),
        }

    return loss


def scattered(
    image: Float[Tensor, "C h w"], side: int, clutter: int, piece: int, generator: torch.Generator
) -> tuple[Float[Tensor, "C side side"], Float[Tensor, "2"]]:
    """A small image somewhere on a black square, among pieces of itself; also x and y of its middle in [-1, 1].

    The paper takes the pieces from other digits; a sample does not know of others, so they are turned and mirrored parts of its own.
    """
    _, height, width = image.shape
    canvas = image.new_zeros(len(image), side, side)
    draws = torch.rand(2 + 6 * clutter, generator=generator).tolist()

    def put(what: Tensor, y: float, x: float) -> tuple[int, int]:
        top, left = int(y * (side - what.shape[1] + 1)), int(x * (side - what.shape[2] + 1))
        place = canvas[:, top : top + what.shape[1], left : left + what.shape[2]]
        place.copy_(torch.maximum(place, what))
        return top, left

    for i in range(clutter):
        row, column, turn, mirror, y, x = draws[2 + 6 * i : 8 + 6 * i]
        top, left = int(row * (height - piece + 1)), int(column * (width - piece + 1))
        part = image[:, top : top + piece, left : left + piece].rot90(int(4 * turn), (1, 2))
        put(part.flip(2) if mirror < 0.5 else part, y, x)
    top, left = put(image, draws[0], draws[1])
    return canvas, torch.tensor([2 * (left + width / 2) / side - 1, 2 * (top + height / 2) / side - 1])


@dataclass(frozen=True, kw_only=True)
class Scattered:
    """Translated and cluttered images, as the paper makes them of digits (section 4.1). By default the image is left as it is."""

    share: float = 1.0
    """The image's side as a share of the square that it is put into: 28 / 60 in the paper."""
    clutter: int = 0
    """Pieces that distract: 4 in the paper."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """``sample`` with its image on a square of the side of ``patch``."""
        side = min(patch)
        small = round(self.share * side)
        image = v2.functional.center_crop(v2.functional.resize(sample["image"], [small], antialias=True), [small, small])
        canvas, _ = scattered(image.as_subclass(Tensor), side, self.clutter, max(1, round(small * 8 / 28)), generator)
        return sample | {"image": tv_tensors.Image(canvas)}


VARIANTS: Mapping[str, Config] = {
    "mnist28": Config(),
    "translated60": Config(glimpse=12, scales=3, image_size=60),
    "cluttered60": Config(glimpse=12, scales=3, glimpses=8, image_size=60),
    "cluttered100": Config(glimpse=12, scales=4, glimpses=8, image_size=100),
    "laptop": Config(glimpse=8, scales=2, glimpses=6, std=0.1, image_size=None),
    "test": Config(glimpse=4, scales=2, glimpses=3, hidden=8, core=12, std=0.1, image_size=None),
}


def recipe(config: Config) -> Recipe:
    """Adam at 3e-4 with batches of 128, as the re-implementation (the paper: SGD with momentum 0.9, the rate annealed); the laptop's is faster."""
    scatter = {60: Scattered(share=28 / 60, clutter=4 * (config.glimpses == 8)), 100: Scattered(share=0.28, clutter=4)}
    augment = scatter.get(config.image_size or 0, Scattered())
    if config.image_size is None:
        return Recipe(optimizer="adam", lr=3e-3, batch_size=64, average=0.98, augment=augment)
    return Recipe(
        optimizer="adam", lr=3e-4, schedule="constant", warmup=0, batch_size=128, patch=config.image_size, clip=None, augment=augment
    )


def build(spec: Spec, config: Config) -> RecurrentAttention:
    """The network for a data set."""
    return RecurrentAttention(spec.channels, len(spec.classes), int(config.image_size or image_side(spec)), config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("laptop",), loss=hybrid)
