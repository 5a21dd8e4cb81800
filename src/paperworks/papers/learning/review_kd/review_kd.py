"""ReviewKD: a small network learns from a large one, and its deep levels are taught by the shallow levels of the teacher too.

Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv 2104.09044).

Methods that match features match equal levels. Here what a deep level of the student knows is passed back to the shallower ones, fused there by
attention (ABF), and compared with the teacher's map of that level at several scales (HCL): each level of the teacher reviews all deeper ones of the
student. After training the student is a plain network; teacher and ABFs are not called any more.

As in the official code (dvlab-research/ReviewKD) the student's maps are those that its stages emit, the teacher's those before the last ReLU, and
the pooled vector is a level of its own. Different from it: warm-up by steps, not by epochs; no Nesterov; biases and norms are not decayed. The
teacher is no part of the saved network: it is read from its own run when a training step first needs it.

Shapes: B images, c s s an image, K classes, I M O channels of a student's map, of what is passed on, of the teacher's map, h w a map's height and width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors

from paperworks import papers
from paperworks.data.views import View
from paperworks.errors import InputError
from paperworks.nn.resnet import BasicBlock
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Sample, Spec
from paperworks.tasks.classification import image_side, middle_square

MID = 512
"""Most channels that are passed from level to level."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """ResNet-20 learns from ResNet-56 by default."""

    student: str = "resnet20"
    """``resnet20``, ``resnet8x4`` and the like of CIFAR, ``wrn_16_2`` and the like, ``resnet18``, ``resnet34``; or PAPER/VARIANT of a paper on classification."""
    teacher: str = "resnet56"
    """Likewise; empty trains the student alone, which is how teachers are made."""
    teacher_weights: str = ""
    """The teacher's run folder or safetensors file; ``random`` leaves it untrained."""
    weight: float = 0.6
    """lambda of the review; the official code has another for each pair."""
    warmup: int = 20 * 391
    """Steps in which lambda rises from 0: the official code's 20 epochs of CIFAR-100."""
    review: bool = True
    """Fuse with what deeper levels pass back; False compares equal levels only (the ablation of section 4.4)."""
    before_relu: bool = True
    """Take the teacher's maps before its stages' last ReLU. The official ImageNet code means to, but its ReLU works in place."""
    image_size: int | None = None
    """Side of the images; None takes it from the data."""


# Students and teachers: networks with ``maps`` (shallow to deep, the pooled vector last), their ``widths``, and ``answer``


class Block(BasicBlock):
    """A residual block whose last ReLU is left to others."""

    def before_relu(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O u v"]:
        """The shortcut plus what the convolutions add to it."""
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.downsample(x)


class ResNet(nn.Module):
    """He et al.'s networks of basic blocks: three stages behind a 3 x 3 convolution for CIFAR, four behind a 7 x 7 one and a pooling for ImageNet.

    Args:
        channels: of the image.
        classes: how many.
        widths: channels of the stem and of each stage.
        blocks: of each stage.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        wide = len(blocks) == 4
        self.conv1 = nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False) if wide else nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if wide else nn.Identity()
        self.stages = nn.ModuleList()
        for i, count in enumerate(blocks):
            first = Block(widths[i], widths[i + 1], 1 if i == 0 else 2, nn.BatchNorm2d)
            self.stages.append(nn.ModuleList([first, *(Block(widths[i + 1], widths[i + 1], 1, nn.BatchNorm2d) for _ in range(count - 1))]))
        self.widths = (*widths[1:], widths[-1])
        self.fc = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def maps(self, image: Float[Tensor, "B c s s"], before_relu: bool = False) -> list[Tensor]:
        """What each stage emits, or has before its last ReLU, and the pooled vector B O 1 1."""
        x = y = self.maxpool(F.relu(self.bn1(self.conv1(image))))
        found = []
        for stage in self.stages:
            for block in stage:  # pyright: ignore[reportGeneralTypeIssues]
                y = block.before_relu(x)
                x = F.relu(y)
            found.append(y if before_relu else x)
        return [*found, x.mean((2, 3), keepdim=True)]

    def answer(self, image: Tensor, maps: list[Tensor]) -> Float[Tensor, "B K"]:
        """Logits, from the maps of the image."""
        return self.fc(maps[-1].flatten(1))


class WideBlock(nn.Module):
    """A block that normalises and activates first; where shapes change the shortcut comes after that."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O u v"]:
        """The sum, not activated."""
        y = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + (x if self.shortcut is None else self.shortcut(y))


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis' network of ``depth`` 6n + 4, ``factor`` times as wide as 16, 32, 64."""

    def __init__(self, channels: int, classes: int, depth: int, factor: int) -> None:
        super().__init__()
        stages = [16 * factor, 32 * factor, 64 * factor]
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stages = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([16, *stages], stages)):
            first = WideBlock(inputs, outputs, 1 if i == 0 else 2)
            self.stages.append(nn.Sequential(first, *(WideBlock(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1))))
        self.widths = (*stages, stages[-1])
        self.bn1 = nn.BatchNorm2d(stages[-1])
        self.fc = nn.Linear(stages[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def maps(self, image: Float[Tensor, "B c s s"], before_relu: bool = False) -> list[Tensor]:
        """The sums that leave the stages, or these behind the batch norm that follows, and the pooled vector B O 1 1."""
        x, found = self.conv1(image), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        pooled = F.relu(self.bn1(x)).mean((2, 3), keepdim=True)
        if before_relu:
            norms = [self.stages[1][0].bn1, self.stages[2][0].bn1, self.bn1]  # pyright: ignore[reportIndexIssue]
            found = [norm(y) for norm, y in zip(norms, found)]
        return [*found, pooled]

    def answer(self, image: Tensor, maps: list[Tensor]) -> Float[Tensor, "B K"]:
        """Logits, from the maps of the image."""
        return self.fc(maps[-1].flatten(1))


class Backbone(nn.Module):
    """Another paper's classifier, by its pyramid; in training it runs once for the maps and once for the answer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.widths = (*network.widths, network.widths[-1])  # pyright: ignore[reportGeneralTypeIssues, reportIndexIssue]

    def maps(self, image: Float[Tensor, "B c s s"], before_relu: bool = False) -> list[Tensor]:
        """Its pyramid and the mean of the deepest map, B O 1 1; where it has ReLUs, behind them."""
        found = self.network.pyramid(image)  # pyright: ignore[reportCallIssue]
        return [*found, found[-1].mean((2, 3), keepdim=True)]

    def answer(self, image: Float[Tensor, "B c s s"], maps: list[Tensor]) -> Float[Tensor, "B K"]:
        """Logits of the image."""
        return self.network(image)["logits"]


def network(name: str, spec: Spec) -> nn.Module:
    """A student or a teacher by the name that ``Config`` describes, with fresh weights.

    Raises:
        InputError: there is none of this name, or it has no pyramid.
    """
    channels, classes = spec.channels, len(spec.classes)
    if found := re.fullmatch(r"resnet(\d+)(?:x([\d.]+))?", name):
        depth, factor = int(found[1]), float(found[2] or 1)
        if depth in (18, 34):
            return ResNet(channels, classes, (64, 64, 128, 256, 512), (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3))
        if depth >= 8 and (depth - 2) % 6 == 0:
            stem = 16 if found[2] is None else round(8 * factor)  # x4 means 64, 128, 256 behind a stem of 32
            return ResNet(channels, classes, (stem, *(round(n * factor) for n in (16, 32, 64))), ((depth - 2) // 6,) * 3)
    if (found := re.fullmatch(r"wrn_(\d+)_(\d+)", name)) and (int(found[1]) - 4) % 6 == 0:
        return WideResNet(channels, classes, int(found[1]), int(found[2]))
    paper, _, variant = name.partition("/")
    if not variant:
        raise InputError(f"no network is called {name!r}; take resnet20, resnet8x4, wrn_16_2, resnet18 or the like, or PAPER/VARIANT")
    known = papers.paper(paper).variants
    if variant not in known:
        raise InputError(f"{name} names no variant of {paper}; write one of {', '.join(f'{paper}/{v}' for v in known)}")
    other = papers.paper(paper).build(spec, known[variant])
    if not hasattr(other, "pyramid"):
        raise InputError(f"{name} has no pyramid of features; take a paper on classification")
    return Backbone(other)


def teacher(name: str, weights: str, spec: Spec) -> nn.Module:
    """A trained network that will not change any more. What is random about it follows from its name alone.

    Raises:
        InputError: the weights are not given, missing, broken, of another network or of other classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = network(name, spec)
    if weights != "random":
        _load(found, name, weights, spec)
    return found.eval().requires_grad_(False)


def _load(found: nn.Module, name: str, weights: str, spec: Spec) -> None:
    train = f"`paperworks train review_kd DATA --set student={name} --set teacher=` makes one"
    if not weights:
        raise InputError(f"a trained teacher is needed: {train}; then name its run with --set teacher_weights=RUN")
    path = Path(weights)
    if not path.exists():
        path = Path(__file__).parent / weights  # the one that comes with `small`
    if path.is_dir():
        path /= "model.safetensors"
    if not path.exists():
        raise InputError(f"teacher_weights={weights}: there is no such run or file; {train}")
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("classes")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"teacher_weights={weights} is no readable safetensors file ({error}); {train}") from None
    if path.with_name("run.json").exists():
        said = json.dumps(json.loads(path.with_name("run.json").read_text(encoding="utf-8"))["spec"]["classes"])
    if said is not None and tuple(json.loads(said)) != spec.classes:
        raise InputError(f"the teacher {weights} was trained for other classes ({said}) than these data have; {train}")
    if any(key.startswith("student.") for key in tensors):  # a run of this paper, in which the teacher was the student
        tensors = {key.removeprefix("student."): value for key, value in tensors.items() if key.startswith("student.")}
    elif isinstance(found, Backbone):
        tensors = {f"network.{key}": value for key, value in tensors.items()}
    own = found.state_dict()
    wrong = [
        key for key in sorted(own.keys() | tensors.keys()) if key not in own or key not in tensors or own[key].shape != tensors[key].shape
    ]
    if wrong:
        raise InputError(f"teacher_weights={weights} is not of {name} for these channels and classes: {wrong[0]} differs; {train}")
    found.load_state_dict(tensors)


# Section 3: the review


class ABF(nn.Module):
    """Attention-based fusion (section 3.3, figure 4 a): a student's map and what the deeper levels pass back, weighed at each place."""

    def __init__(self, inputs: int, mid: int, outputs: int, fuse: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(inputs, mid, 1, bias=False), nn.BatchNorm2d(mid))
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuse else None
        self.leave = nn.Sequential(nn.Conv2d(mid, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        for convolution in (self.enter[0], self.leave[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)  # pyright: ignore[reportArgumentType]

    def forward(
        self, x: Float[Tensor, "B I h w"], deeper: Float[Tensor, "B M u v"] | None, size: torch.Size
    ) -> tuple[Float[Tensor, "B O y z"], Float[Tensor, "B M y z"]]:
        """What is compared with the teacher's map of the height and width ``size``, and what the next shallower level gets."""
        x = self.enter(x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            own, passed = self.attention(torch.cat([x, deeper], 1)).sigmoid().split(1, 1)  # B 1 h w each
            x = own * x + passed * deeper
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.leave(x), x


def hcl(student: Float[Tensor, "B O h w"], teacher: Float[Tensor, "B O h w"]) -> Float[Tensor, ""]:
    """Hierarchical context loss (section 3.3, figure 4 b): mean squared differences of the maps and of their 4 x 4, 2 x 2 and 1 x 1 averages.

    The weights 1, 1/2, 1/4, 1/8 go to the scales that there are (those smaller than the map), and are made to sum to 1.
    """
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side))
    return loss / total


class ReviewKD(nn.Module):
    """A student; in training also a teacher and the ABFs between them (figure 3)."""

    step: Tensor

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.student = network(config.student, spec)
        self.grid = Grid(fixed=int(config.image_size or image_side(spec)))
        self.abfs = nn.ModuleList()
        if config.teacher:
            with torch.device("meta"):
                outputs = network(config.teacher, spec).widths
            levels = list(zip(reversed(self.student.widths), reversed(outputs)))[::-1]  # pyright: ignore[reportArgumentType, reportCallIssue]
            mid = min(MID, levels[-1][0])
            for i, (inputs, output) in enumerate(levels):
                self.abfs.append(ABF(inputs, mid, output, fuse=config.review and i < len(levels) - 1))
        self.register_buffer("step", torch.tensor(0))
        self._teacher: list[nn.Module] = []  # a list hides it: it is neither trained nor saved

    def forward(self, image: Float[Tensor, "B c s s"]) -> Output:
        """``logits`` B K; in training also ``student_i`` and ``teacher_i``, B O h w, for each level i, and ``warm``, the share of lambda."""
        if not self.training:
            return {"logits": self.student.answer(image, self.student.maps(image))}  # pyright: ignore[reportCallIssue]
        maps: list[Tensor] = self.student.maps(image)  # pyright: ignore[reportCallIssue]
        output: Output = {"logits": self.student.answer(image, maps)}  # pyright: ignore[reportCallIssue]
        if self.config.teacher:
            targets = self.guide(image)
            for i, (compared, target) in enumerate(zip(self.review(maps, targets), targets)):
                output |= {f"student_{i}": compared, f"teacher_{i}": target}
            output["warm"] = (self.step / self.config.warmup).clamp(max=1) if self.config.warmup else torch.ones_like(self.step)
            self.step += 1
        return output

    def guide(self, image: Float[Tensor, "B c s s"]) -> list[Tensor]:
        """The teacher's maps of the levels that the student has, from shallow to deep."""
        if not self._teacher:
            self._teacher.append(teacher(self.config.teacher, self.config.teacher_weights, self.spec).to(image.device))
        with torch.no_grad():
            return self._teacher[0].maps(image, self.config.before_relu)[-len(self.abfs) :]  # pyright: ignore[reportCallIssue]

    def review(self, maps: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
        """Equation 8: from the deepest level to the shallowest, each fused with all that is deeper."""
        compared, passed = [], None
        for abf, x, target in reversed(list(zip(self.abfs, maps[-len(self.abfs) :], targets))):
            found, passed = abf(x, passed, target.shape[2:])
            compared.append(found)
        return compared[::-1]


def loss(config: Config) -> Loss:
    """Equation 9: cross-entropy, and lambda times the sum of HCL over the levels. The teacher's answers are not used."""

    def reviewed(output: Output, batch: Batch) -> dict[str, Tensor]:
        answer = F.cross_entropy(output["logits"], batch["label"])
        levels = [key.removeprefix("student_") for key in output if key.startswith("student_")]
        if not levels:
            return {"loss": answer}
        review = torch.stack([hcl(output[f"student_{i}"], output[f"teacher_{i}"]) for i in levels]).sum()
        return {"loss": answer + config.weight * output["warm"] * review, "answer": answer, "review": review}

    return reviewed


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """The image, moved by up to ``padding`` pixels over black, and mirrored half of the time."""

    padding: int = 4

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """``sample`` with another view of its image, of the height and width of ``patch``."""
        image = F.pad(middle_square(sample["image"].as_subclass(Tensor), patch[0]), (self.padding,) * 4)
        top, left = torch.randint(2 * self.padding + 1, (2,), generator=generator).tolist()
        image = image[:, top : top + patch[0], left : left + patch[1]]
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        return sample | {"image": tv_tensors.Image(image.flip(-1) if mirrored else image)}


VARIANTS = {
    "resnet20": Config(),
    "resnet32": Config(student="resnet32", teacher="resnet110", weight=1.0),
    "resnet8x4": Config(student="resnet8x4", teacher="resnet32x4", weight=5.0),
    "wrn_16_2": Config(student="wrn_16_2", teacher="wrn_40_2", weight=5.0),
    "wrn_40_1": Config(student="wrn_40_1", teacher="wrn_40_2", weight=5.0),
    "resnet18": Config(student="resnet18", teacher="resnet34", weight=1.0, warmup=5005, before_relu=False, image_size=224),
    "small": Config(student="resnet8x0.5", teacher="resnet8x2", teacher_weights="teacher.safetensors", weight=1.0, warmup=45),
    "test": Config(student="resnet8x0.25", teacher="resnet8x0.5", teacher_weights="random", warmup=0, image_size=32),
}


def recipe(config: Config) -> Recipe:
    """The official settings for CIFAR-100 (240 epochs) and ImageNet (100); ``small`` fits a budget of minutes."""
    if config.image_size == 224:
        view = View(area=(0.08, 1.0), jitter_chance=0.0, grey=0.0)
        thirds = (0.3, 0.6, 0.9)
        return Recipe(
            optimizer="sgd",
            lr=0.1,
            weight_decay=1e-4,
            schedule="step",
            decay_at=thirds,
            warmup=0.0,
            batch_size=256,
            clip=None,
            augment=view,
        )
    if config.warmup < 1000:  # a schedule of minutes
        return Recipe(lr=5e-3, weight_decay=1e-2, batch_size=50, augment=Shifted())
    late = (150 / 240, 180 / 240, 210 / 240)
    return Recipe(
        optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="step", decay_at=late, warmup=0.0, batch_size=128, clip=None, augment=Shifted()
    )


PAPER = Paper(variants=VARIANTS, build=ReviewKD, recipe=recipe, auto=("small",), loss=loss)
