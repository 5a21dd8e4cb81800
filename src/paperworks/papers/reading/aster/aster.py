"""ASTER: curved and slanted text is straightened by a thin-plate spline, then read character by character with attention.

Shi, Yang, Wang, Lyu, Yao and Bai, "ASTER: An Attentional Scene Text Recognizer with Flexible Rectification", TPAMI 2019.

A small network looks at the word and says where K points along its upper and lower edge lie; a thin-plate spline carries these points to
two straight lines, and with them the picture. A residual network and two BiLSTMs turn the result into a sequence, which a recurrent
decoder reads with attention: there is no alignment to sum over as in CTC. Nobody labels the points; they follow from reading errors.

Two sets of units exist. ``original`` is the authors' (bgshih/aster): the unit that begins a stage has two strided 3x3 convolutions, an LSTM
decoder takes one-hot characters, and a second one reads from right to left. ``port`` is that of ayumiymk/aster.pytorch, whose weights are
published: 1x1 strided convolutions, a GRU decoder with embedded characters, one direction. In both a beam search of five keeps finished
texts in the beam. Different from the authors' code: both start from two lines and sample as the port does (their demo starts from a sine).

Shapes: B batch, C channels, H W pixels, h w pixels after rectification, K control points, L positions of the sequence, D features,
S numbers of a decoder's state, T characters and the end, V outputs of a decoder, N texts in the beam.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.reading import Vary, sequence_loss


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers that tell ASTERs apart."""

    units: Literal["original", "port"] = "port"
    size: tuple[int, int] = (64, 256)
    """Height and width of the input."""
    rectify: bool = True
    """Without it the reader sees the input at the size ``straight``: the paper's baseline (section 4.2)."""
    points: int = 20
    """K, half of them on either edge."""
    overview: tuple[int, int] = (32, 64)
    """Height and width at which the localisation network sees the input (section 3.1.1)."""
    locate: tuple[int, ...] = (32, 64, 128, 256, 256, 256)
    """Channels of the localisation network; poolings are between them."""
    start: float = 0.0
    """Standard deviation of the initial weights that make the points; 0 as in the paper, so that all begin on two lines."""
    margin: float = 0.05
    """Of the target points in the rectified picture, as a share of its sides."""
    straight: tuple[int, int] = (32, 100)
    """Height and width of the rectified picture."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Channels of the stages (table 1); the stem has those of the first."""
    depths: tuple[int, ...] = (3, 4, 6, 6, 3)
    strides: tuple[tuple[int, int], ...] = ((2, 2), (2, 2), (2, 1), (2, 1), (2, 1))
    hidden: int = 256
    """Units of each direction of a BiLSTM."""
    state: int = 512
    """S, units of a decoder."""
    attention: int = 512
    """Units of its attention, and in the port of a character's embedding."""
    beam: int = 5

    @property
    def directions(self) -> int:
        """Decoders: left to right, and in the original right to left too."""
        return 2 if self.units == "original" else 1


# --- Rectification (section 3.1)


def edge_points(count: int, margin: float) -> Float[ndarray, "K 2"]:
    """Places x, y of points that are evenly spread on an upper and a lower line, in [0, 1]."""
    x = np.linspace(margin, 1 - margin, count // 2)
    return np.concatenate([np.stack([x, np.full_like(x, y)], 1) for y in (margin, 1 - margin)])


def kernel(x: Float[ndarray, "M 2"], y: Float[ndarray, "K 2"]) -> Float[ndarray, "M K"]:
    """phi(r) = r^2 log r of all distances, and 0 where r is 0 (equation 4)."""
    squared = ((x[:, None] - y[None]) ** 2).sum(2)
    return 0.5 * squared * np.log(np.where(squared > 0, squared, 1))


def spline_basis(targets: Float[ndarray, "K 2"], places: Float[ndarray, "M 2"]) -> Float[ndarray, "M K"]:
    """What the source points are multiplied with to give the source of each of ``places``: a thin-plate spline is linear in them.

    The targets are fixed, so the system of K + 3 equations (equations 1 to 3) is solved once.
    """
    k = len(targets)
    affine = np.concatenate([np.ones((k, 1)), targets], 1)
    system = np.block([[kernel(targets, targets), affine], [affine.T, np.zeros((3, 3))]])
    lifted = np.concatenate([kernel(places, targets), np.ones((len(places), 1)), places], 1)
    return np.linalg.solve(system.T, lifted.T).T[:, :k]  # the last three right-hand sides are zero


class Rectifier(nn.Module):
    """Localisation network, grid generator and sampler."""

    basis: Tensor

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.overview, self.straight = config.overview, config.straight
        layers: list[nn.Module] = []
        for before, after in zip((channels, *config.locate), config.locate):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers[:-1])
        cells = [side // 2 ** (len(config.locate) - 1) for side in config.overview]
        features = 2 * config.locate[-1]
        self.fc1 = nn.Sequential(nn.Linear(config.locate[-1] * cells[0] * cells[1], features), nn.BatchNorm1d(features), nn.ReLU())
        self.fc2 = nn.Linear(features, 2 * config.points)
        for module in self.convolutions:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.fc2.weight, std=config.start)
        with torch.no_grad():
            self.fc2.bias.copy_(torch.from_numpy(edge_points(config.points, 0.01)).flatten())
        height, width = config.straight
        y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
        basis = spline_basis(edge_points(config.points, config.margin), np.stack([x.ravel(), y.ravel()], 1))
        self.register_buffer("basis", torch.from_numpy(basis).float(), persistent=False)

    def locate(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K 2"]:
        """Control points x, y on the edges of the text, in [0, 1] of width and height where they lie within the picture."""
        x = F.interpolate(image, self.overview, mode="bilinear", align_corners=True)
        x = self.fc1(self.convolutions(x).flatten(1))
        return self.fc2(0.1 * x).unflatten(1, (-1, 2))  # no activation: points may lie outside

    def forward(self, image: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B K 2"]]:
        """The straightened picture and the points."""
        points = self.locate(image)
        source = (self.basis @ points).clamp(0, 1).unflatten(1, self.straight)  # B h w 2
        return F.grid_sample(image, 2 * source - 1, mode="bilinear", align_corners=True), points


# --- Encoder (section 3.2, table 1)


class Unit(nn.Module):
    """Residual unit of a 1x1 and a 3x3 convolution; ``stride`` is given for the first of a stage."""

    def __init__(self, before: int, width: int, stride: tuple[int, int] | None, units: str) -> None:
        super().__init__()
        side = 3 if stride and units == "original" else 1
        self.conv1 = nn.Conv2d(before, width, side, stride or 1, side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, side, stride, side // 2, bias=False), nn.BatchNorm2d(width))
            if units == "original":
                self.shortcut.append(nn.ReLU())

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B d h w"]:
        """Both ways, added."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class BiLSTM(nn.Module):
    """Both directions side by side; in the original brought back to the width of one."""

    def __init__(self, width: int, hidden: int, units: str) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.width = hidden if units == "original" else 2 * hidden
        self.project = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU()) if units == "original" else nn.Identity()

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L d"]:
        """The sequence with its surroundings."""
        return self.project(self.rnn(x)[0])


class Encoder(nn.Module):
    """A residual network that halves the width twice and the height until one row is left, and two BiLSTMs."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        widths = (config.widths[0], *config.widths)
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    Unit(before, after, stride, config.units), *(Unit(after, after, None, config.units) for _ in range(depth - 1))
                )
                for before, after, depth, stride in zip(widths, widths[1:], config.depths, config.strides)
            )
        )
        first = BiLSTM(widths[-1], config.hidden, config.units)
        self.context = nn.Sequential(first, BiLSTM(first.width, config.hidden, config.units))
        self.width = first.width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Float[Tensor, "B C h w"]) -> Float[Tensor, "B L D"]:
        """A vector for each column of the last map."""
        x = self.stages(self.stem(image))  # B D 1 L
        return self.context(x[:, :, 0].transpose(1, 2))


# --- Decoder (section 3.3)


class Decoder(nn.Module):
    """A recurrent cell that looks at the sequence with attention and says the next character.

    Outputs are the alphabet, then the end. The port counts PADDING and UNKNOWN as two more and keeps a row of its embedding for the start; in
    the original the start is an output too.
    """

    def __init__(self, width: int, characters: int, config: Config) -> None:
        super().__init__()
        original = config.units == "original"
        self.end, self.state = characters, config.state
        self.outputs = characters + (2 if original else 3)
        self.query = nn.Linear(config.state, config.attention, bias=not original)  # W
        self.key = nn.Linear(width, config.attention, bias=not original)  # V
        self.score = nn.Linear(config.attention, 1, bias=not original)  # w
        if original:
            self.embedding = None
            self.start = self.outputs - 1
            self.cell: nn.RNNCellBase = nn.LSTMCell(self.outputs + width, config.state)
            nn.init.orthogonal_(self.cell.weight_hh)
            nn.init.zeros_(self.cell.bias_ih)
            nn.init.zeros_(self.cell.bias_hh)
            nn.init.ones_(self.cell.bias_ih[config.state : 2 * config.state])  # of the forget gate
        else:
            self.start = self.outputs
            self.embedding = nn.Embedding(self.outputs + 1, config.attention)
            self.cell = nn.GRUCell(config.attention + width, config.state)
        self.output = nn.Linear(config.state, self.outputs)

    def begin(self, features: Float[Tensor, "B L D"]) -> tuple[Tensor, Tensor]:
        """The state before the first character, zeros, with an LSTM's cell behind its output; and the character before it."""
        size = self.state * (2 if isinstance(self.cell, nn.LSTMCell) else 1)
        previous = torch.full((features.shape[0],), self.start, dtype=torch.long, device=features.device)
        return features.new_zeros(features.shape[0], size), previous

    def step(
        self, features: Float[Tensor, "B L D"], keys: Float[Tensor, "B L A"], state: Float[Tensor, "B s"], previous: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B s"]]:
        """Logits of the next character and the next state."""
        energy = self.score(torch.tanh(self.query(state[:, : self.state])[:, None] + keys))  # equation 7: B L 1
        glimpse = (energy.softmax(1) * features).sum(1)  # equations 8 and 9
        symbol = F.one_hot(previous, self.outputs).to(glimpse) if self.embedding is None else self.embedding(previous)
        given = torch.cat([symbol, glimpse], 1)
        if isinstance(self.cell, nn.LSTMCell):
            output, memory = self.cell(given, (state[:, : self.state], state[:, self.state :]))
            return self.output(output), torch.cat([output, memory], 1)
        state = self.cell(given, state)
        return self.output(state), state

    def forward(self, features: Float[Tensor, "B L D"], target: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of each character when those before it are given (training)."""
        keys, (state, previous), logits = self.key(features), self.begin(features), []
        for truth in target.clamp_min(0).unbind(1):
            found, state = self.step(features, keys, state, previous)
            logits.append(found)
            previous = truth
        return torch.stack(logits, 1)

    def search(self, features: Float[Tensor, "B L D"], steps: int, beam: int) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
        """The most probable of the texts in the beam, and the logarithm of each of its characters' probability.

        A text that has come to its end stays in the beam as it is.
        """
        texts = features.repeat_interleave(beam, 0)  # BN L D
        keys, (state, previous) = self.key(texts), self.begin(texts)
        total = features.new_zeros(1, beam)
        total[:, 1:] = -torch.inf  # all begin alike: one of them is enough
        total = total.expand(features.shape[0], beam)
        only_end = features.new_full((self.outputs,), -torch.inf)
        only_end[self.end] = 0.0
        over = torch.zeros_like(total, dtype=torch.bool)
        said = features.new_full((features.shape[0], beam, 0), self.end, dtype=torch.long)
        sure = features.new_zeros(features.shape[0], beam, 0)
        for _ in range(steps):
            logits, state = self.step(texts, keys, state, previous)
            each = logits.log_softmax(1).unflatten(0, (-1, beam))  # B N V
            each = torch.where(over[..., None], only_end, each)
            total, best = (total[..., None] + each).flatten(1).topk(beam, 1)
            origin, character = best // self.outputs, best % self.outputs  # B N
            over = character == self.end
            said = torch.cat([taken(said, origin), character[..., None]], 2)
            sure = torch.cat([taken(sure, origin), each.flatten(1).gather(1, best)[..., None]], 2)
            state = taken(state.unflatten(0, (-1, beam)), origin).flatten(0, 1)
            previous = character.flatten()
        return said[:, 0], sure[:, 0]


def taken(values: Shaped[Tensor, "B N s"], origin: Int[Tensor, "B N"]) -> Shaped[Tensor, "B N s"]:
    """What the texts of a beam have from those that they go on from."""
    return values.gather(1, origin[..., None].expand(-1, -1, values.shape[2]))


def turned(texts: Int[Tensor, "B T"], end: int) -> Int[Tensor, "B T"]:
    """For each text the places of its characters from the last to the first; the end, and what is behind it, stay."""
    length = ((texts >= 0) & (texts != end)).sum(1, keepdim=True)
    place = torch.arange(texts.shape[1], device=texts.device)
    return torch.where(place < length, length - 1 - place, place)


class ASTER(nn.Module):
    """Rectification, encoder, one or two decoders."""

    def __init__(self, channels: int, characters: int, longest: int, config: Config) -> None:
        super().__init__()
        self.grid = Grid(fixed=config.size[0], width=config.size[1])
        self.steps, self.beam, self.straight = longest + 1, config.beam, config.straight
        self.rectifier = Rectifier(channels, config) if config.rectify else None
        self.encoder = Encoder(channels, config)
        self.decoders = nn.ModuleList(Decoder(self.encoder.width, characters, config) for _ in range(config.directions))

    def forward(self, image: Float[Tensor, "B C H W"], target: Int[Tensor, "B T"] | None = None) -> Output:
        """With a target ``logits`` of each decoder B T V, of the second in its own order; without it ``characters`` and ``likelihoods``, B T.

        ``rectified`` (B C h w, normalised as the input) is what was read, ``points`` (B K 2) are where it came from.
        """
        straight, points = self.straightened(image)
        found = {"rectified": straight} | ({} if points is None else {"points": points})
        features = self.encoder(straight)
        return found | (self.read(features) if target is None else self.teach(features, target))

    def straightened(self, image: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B K 2"] | None]:
        """What is read and the points; without rectification the whole picture and none."""
        if self.rectifier is None:
            return F.interpolate(image, self.straight, mode="bilinear", align_corners=True), None
        return self.rectifier(image)

    def teach(self, features: Float[Tensor, "B L D"], target: Int[Tensor, "B T"]) -> Output:
        """Logits for the true characters."""
        forward, *backward = self.decoders
        found = {"logits": forward(features, target)}
        for decoder in backward:
            found["backward"] = decoder(features, target.gather(1, turned(target, decoder.end)))  # pyright: ignore[reportArgumentType]
        return found

    def read(self, features: Float[Tensor, "B L D"]) -> Output:
        """Of both directions the text with the higher likelihood (section 3.3.2)."""
        forward, *backward = self.decoders
        characters, likelihoods = forward.search(features, self.steps, self.beam)  # pyright: ignore[reportCallIssue]
        for decoder in backward:
            others, theirs = decoder.search(features, self.steps, self.beam)  # pyright: ignore[reportCallIssue]
            order = turned(others, decoder.end)  # pyright: ignore[reportArgumentType]
            better = theirs.sum(1, keepdim=True) > likelihoods.sum(1, keepdim=True)
            characters = torch.where(better, others.gather(1, order), characters)
            likelihoods = torch.where(better, theirs.gather(1, order), likelihoods)
        return {"characters": characters, "likelihoods": likelihoods}


def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Equation 12: the mean of both directions, each summed over the characters of a text."""
    target = batch["target"]
    found = {"forward": sequence_loss(output["logits"], target)}
    if "backward" in output:
        end = int(target.max())  # the end comes after all characters, and every text has one
        found["backward"] = sequence_loss(output["backward"], target.gather(1, turned(target, end)))
    return found | {"loss": torch.stack(list(found.values())).mean()}


LAPTOP = Config(
    size=(24, 96), overview=(16, 32), locate=(16, 24, 32), straight=(16, 96), widths=(16, 24, 32, 48), depths=(1, 1, 1, 1),
    strides=((2, 2), (2, 2), (2, 1), (2, 1)), hidden=48, state=64, attention=64,
)  # fmt: skip
VARIANTS: Mapping[str, Config] = {
    "original": Config(units="original", margin=0.0, state=256, attention=256),
    "port": Config(),
    "small": LAPTOP,
    "test": Config(
        size=(32, 48), points=8, overview=(8, 16), locate=(4, 8), start=0.01, straight=(16, 32), widths=(6, 8, 10, 12),
        depths=(1, 1, 1, 2), strides=((2, 2), (2, 2), (2, 1), (2, 1)), hidden=8, state=12, attention=12, beam=3,
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """Adadelta at 1.0, a tenth after 0.6, 0.8 and 1.0 of 1.2 million steps of 64 words; the small ones with Adam, on words that vary."""
    if config.widths[-1] == 512:
        return Recipe(
            optimizer="adadelta", lr=1.0, schedule="step", decay_at=(1 / 2, 2 / 3, 5 / 6), warmup=0, batch_size=64, augment=Vary()
        )
    # Adam moves every weight by about its rate, and points that run ahead of the reader fold the picture.
    return Recipe(
        optimizer="adam", lr=3e-3, rates={"rectifier": 0.1}, batch_size=16, augment=Vary(shift=0.05, scale=0.1, slant=0.2, light=0.2)
    )


def build(spec: Spec, config: Config) -> ASTER:
    """The network for an alphabet."""
    return ASTER(spec.channels, len(spec.classes), spec.more["longest"], config)


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "port"), loss=lambda config: loss)
