"""Curve-GCN: Fast Interactive Object Annotation. Ling, Gao, Kar, Chen, Fidler, CVPR 2019, arXiv:1903.06874.

All N control points of an object's outline are predicted at once: they start on a circle in the middle of the crop, and a graph network on the
closed ring moves them in three steps, each time looking at the image's features where they are now. They are a polygon's corners or the knots of a
spline; what is compared with the truth is the curve, under the best cyclic shift. A person drags a point; a second graph network moves its neighbours.

The authors' code is behind a form and was not seen. From public derivatives of it are the layers of a step (graph convolution, 6 residual pairs,
graph convolution to 32, linear to 2) and the branches (3x3 convolution to 16, fully connected). Ours: mean over the neighbours, a spline that
simply wraps around, PyTorch's first weights but for the last layer, the width of the skips (C2 to C5, no dilation), how losses are weighed.

Shapes: B batch, C image channels, S side of the crop, F features, g side of the feature grid, N control points, K samples of a curve, T steps.
Points are (x, y) as shares of the crop, clockwise as one sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperworks.data.augment import Augment
from paperworks.nn.resnet import Depth, ResNet
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe
from paperworks.tasks.contours import SAMPLES


@dataclass(frozen=True, kw_only=True)
class Config:
    """Spline-GCN of the paper by default."""

    side: int = 224
    """S of the crop."""
    depth: Depth = 50
    """Of the residual encoder."""
    width: int = 64
    """Features of its first stage, before a bottleneck's expansion."""
    stride: int = 8
    """S / g: 28 x 28 cells in the paper."""
    features: int = 128
    """F, the edge and the vertex map among them."""
    branch: int = 16
    """Features of the edge and of the vertex branch."""
    points: int = 40
    """N."""
    curve: Literal["spline", "polygon"] = "spline"
    """What the control points are: knots of a Catmull-Rom spline, or corners."""
    samples: int = 1280
    """K, points of a curve in training; a multiple of N that divides 1280."""
    iterations: int = 3
    """T, graph networks with weights of their own."""
    state: int = 128
    """Width of a graph network."""
    residuals: int = 6
    """Its residual pairs."""
    head: Literal["gcn", "fc"] = "gcn"
    """``fc``: two fully connected layers with as many parameters place all points at once. The control of our claim, not of the paper."""
    reach: int = 2
    """k: how many neighbours on each side a correction may move."""
    corrections: int = 2
    """Simulated corrections in a training step; 0 trains the automatic network alone."""
    rendering: float = 0.0
    """Weight of the differentiable accuracy loss; the paper switches it on to fine-tune."""


# --- Curves (section 3.1) ------------------------------------------------------------------------------------------------------------------


def circle(points: int, diameter: float = 0.7) -> Float[Tensor, "N 2"]:
    """Where the control points start: 70 % of the crop's height, in its middle, clockwise."""
    turn = torch.arange(points) * (2 * math.pi / points)
    return 0.5 + diameter / 2 * torch.stack([turn.cos(), turn.sin()], 1)


def catmull_rom(points: Float[Tensor, "B N 2"], each: int, alpha: float = 0.5) -> Float[Tensor, "B N*each 2"]:
    """The closed centripetal Catmull-Rom spline, ``each`` samples from every control point (included) to the next (excluded).

    Knots t_{i+1} = |p_{i+1} - p_i|^alpha + t_i are constants to the gradient. Barry and Goldman's pyramid: two points make a line, two
    lines a parabola, two parabolas the cubic. The ring is closed by wrapping, so that no control point is special.
    """
    p0, p1, p2, p3 = (points.roll(shift, 1).unsqueeze(2) for shift in (1, 0, -1, -2))  # each B N 1 2

    def gap(a: Tensor, b: Tensor) -> Tensor:
        return (b - a).detach().square().sum(-1, keepdim=True).clamp(min=1e-12).pow(alpha / 2)  # coinciding points: no division by 0

    t1 = gap(p0, p1)
    t2 = t1 + gap(p1, p2)
    t3 = t2 + gap(p2, p3)
    t = t1 + (t2 - t1) * (torch.arange(each, dtype=points.dtype, device=points.device) / each)[:, None]  # B N each 1
    a1 = ((t1 - t) * p0 + t * p1) / t1
    a2 = ((t2 - t) * p1 + (t - t1) * p2) / (t2 - t1)
    a3 = ((t3 - t) * p2 + (t - t2) * p3) / (t3 - t2)
    b1 = ((t2 - t) * a1 + t * a2) / t2
    b2 = ((t3 - t) * a2 + (t - t1) * a3) / (t3 - t1)
    return (((t2 - t) * b1 + (t - t1) * b2) / (t2 - t1)).flatten(1, 2)


def polygon(points: Float[Tensor, "B N 2"], each: int) -> Float[Tensor, "B N*each 2"]:
    """The closed polygon, sampled in the same way."""
    share = (torch.arange(each, dtype=points.dtype, device=points.device) / each)[:, None]
    return torch.lerp(points.unsqueeze(2), points.roll(-1, 1).unsqueeze(2), share).flatten(1, 2)


CURVES = {"spline": catmull_rom, "polygon": polygon}


# --- The graph network (section 3.2) -------------------------------------------------------------------------------------------------------


def ring(points: int) -> Float[Tensor, "N N"]:
    """A: each node is joined to those at distance 1 and 2 on both sides of it; rows sum to 1, so the product is a mean."""
    place = torch.arange(points)
    away = (place - place[:, None]).abs()
    away = torch.minimum(away, points - away)
    return ((away == 1) | (away == 2)) / 4


class GraphConv(nn.Module):
    """Eq. 3: w0 f_i + sum over the neighbours j of w1 f_j, with biases."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w0, self.w1 = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, nodes: Float[Tensor, "B N D"], ring: Float[Tensor, "N N"]) -> Float[Tensor, "B N E"]:
        """What each node and its neighbours say."""
        return self.w0(nodes) + self.w1(ring @ nodes)


class GraphResNet(nn.Module):
    """Eq. 3 to 5: nodes' features to a shift of each node."""

    def __init__(self, inputs: int, state: int, residuals: int, last: int = 32) -> None:
        super().__init__()
        self.first = GraphConv(inputs, state)
        self.pairs = nn.ModuleList(nn.ModuleList([GraphConv(state, state), GraphConv(state, state)]) for _ in range(residuals))
        self.last = GraphConv(state, last)
        self.shift = nn.Linear(last, 2)
        nn.init.normal_(self.shift.weight, std=0.01)  # training starts with the points where they were
        nn.init.zeros_(self.shift.bias)

    def forward(self, nodes: Float[Tensor, "B N D"], ring: Float[Tensor, "N N"]) -> Float[Tensor, "B N 2"]:
        """(dx, dy) of each node."""
        x = self.first(nodes, ring)
        for one, two in self.pairs:  # pyright: ignore[reportGeneralTypeIssues]
            x = F.relu(x + two(F.relu(one(x, ring)), ring))
        return self.shift(F.relu(self.last(x, ring)))


def at(features: Float[Tensor, "B F g g"], points: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N F"]:
    """Features at points, bilinear between the cells' centres, so that gradients reach the points too."""
    grid = (2 * points - 1).unsqueeze(2)  # B N 1 2
    return F.grid_sample(features, grid, align_corners=False, padding_mode="border").squeeze(3).transpose(1, 2)


# --- The network -----------------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Residual network with skips, as in Polygon-RNN++, and the edge and the vertex branch on top of it."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.size, wide = config.side // config.stride, config.features // 4
        self.trunk = ResNet(config.depth, channels, width=config.width)
        self.skips = nn.ModuleList(self._conv(width, wide) for width in self.trunk.widths)
        self.fuse = self._conv(4 * wide, config.features - 2)
        self.edge, self.vertex = (self._branch(config.features - 2, config.branch) for _ in range(2))

    @staticmethod
    def _conv(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def _branch(self, inputs: int, hidden: int) -> nn.Sequential:
        cells = self.size**2
        return nn.Sequential(
            nn.Conv2d(inputs, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(hidden * cells, cells),
            nn.Unflatten(1, (1, self.size, self.size)),
        )

    def forward(self, image: Float[Tensor, "B C S S"]) -> tuple[Tensor, Tensor, Tensor]:
        """Features B F g g, in which the probabilities of edges and vertices are the last two; their logits B 1 g g."""
        size = (self.size, self.size)
        skips = [
            F.interpolate(skip(level), size, mode="bilinear", align_corners=False)
            for skip, level in zip(self.skips, self.trunk.pyramid(image))
        ]
        x = self.fuse(torch.cat(skips, 1))
        edge, vertex = self.edge(x), self.vertex(x)
        return torch.cat([x, edge.sigmoid(), vertex.sigmoid()], 1), edge, vertex


class Direct(nn.Module):
    """The claim's control: no graph, no second look; two fully connected layers, with as many parameters, shift all points at once."""

    def __init__(self, config: Config, parameters: int, cells: int = 8) -> None:
        super().__init__()
        inputs, outputs = config.features * cells**2, 2 * config.points
        hidden = max(1, (parameters - outputs) // (inputs + 1 + outputs))
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(cells),
            nn.Flatten(),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
            nn.Unflatten(1, (-1, 2)),
        )

    def forward(self, features: Float[Tensor, "B F g g"]) -> Float[Tensor, "B N 2"]:
        """(dx, dy) of each point."""
        return self.layers(features)


class CurveGCN(nn.Module):
    """Figure 2, and the interactive network of section 3.4."""

    start: Tensor
    ring: Tensor

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(channels, config)
        graphs = [GraphResNet(config.features + 2, config.state, config.residuals) for _ in range(config.iterations)]
        if config.head == "gcn":
            self.gcn = nn.ModuleList(graphs)
        else:
            self.direct = Direct(config, sum(p.numel() for p in nn.ModuleList(graphs).parameters()))
        self.interactive = GraphResNet(config.features + 4, config.state, config.residuals)
        self.register_buffer("start", circle(config.points), persistent=False)
        self.register_buffer("ring", ring(config.points), persistent=False)
        self.grid = Grid(fixed=config.side)

    def forward(self, image: Float[Tensor, "B C S S"], outline: Float[Tensor, "B M 2"] | None = None) -> Output:
        """``points`` B N 2 and ``curve`` B 4N 2. While training also ``stages`` B T N 2, the points after each step, ``corrected`` B c N 2, those
        after each simulated correction, and the logits ``edge`` and ``vertex`` B 1 g g.
        """
        features, edge, vertex = self.encoder(image)
        stages = self.moved(features, self.start.expand(image.shape[0], -1, -1))
        out = {"points": stages[-1], "curve": CURVES[self.config.curve](stages[-1], 4)}
        if self.training and outline is not None:
            out |= {"stages": torch.stack(stages, 1), "edge": edge, "vertex": vertex}
            if self.config.corrections:
                out["corrected"] = self.simulated(features.detach(), stages[-1].detach(), outline)
        return out

    def moved(self, features: Float[Tensor, "B F g g"], points: Float[Tensor, "B N 2"]) -> list[Tensor]:
        """The points after each step. Nothing is detached: a step learns from where it leaves its points to the next one."""
        if self.config.head == "fc":
            return [points + self.direct(features)]
        stages = []
        for gcn in self.gcn:
            points = points + gcn(torch.cat([at(features, points), points], 2), self.ring)
            stages.append(points)
        return stages

    def drag(
        self, features: Float[Tensor, "B F g g"], points: Float[Tensor, "B N 2"], index: Int[Tensor, " B"], to: Float[Tensor, "B 2"]
    ) -> Float[Tensor, "B N 2"]:
        """A person put point ``index`` to ``to``: it stays there, its ``reach`` neighbours on each side move, all others stay.

        The nodes' features have the shift too, which is 0 for all but the dragged one. ``features`` are those of ``encoder``, computed once an image.
        """
        place = torch.arange(points.shape[1], device=points.device)
        away = (place - index[:, None]).abs()
        away = torch.minimum(away, points.shape[1] - away)[..., None]  # B N 1, along the ring
        shift = (away == 0) * (to[:, None] - points)
        points = points + shift
        moved = self.interactive(torch.cat([at(features, points), points, shift], 2), self.ring)
        return points + ((away > 0) & (away <= self.config.reach)) * moved

    def simulated(self, features: Tensor, points: Float[Tensor, "B N 2"], outline: Float[Tensor, "B M 2"]) -> Float[Tensor, "B c N 2"]:
        """An annotator who corrects the worst point again and again: the one farthest from where the best cyclic shift would have it."""
        each = self.config.samples // points.shape[1]
        truth = outline[:, :: outline.shape[1] // self.config.samples]
        target = matched(CURVES[self.config.curve](points, each), truth)[:, ::each]  # B N 2
        stages, row = [], torch.arange(len(points), device=points.device)
        for _ in range(self.config.corrections):
            worst = (target - points.detach()).abs().sum(2).argmax(1)
            points = self.drag(features, points.detach(), worst, target[row, worst])
            stages.append(points)
        return torch.stack(stages, 1)


def correct(network: CurveGCN, image: Float[Tensor, "C S S"], points: Float[Tensor, "N 2"], index: int, to: Sequence[float]) -> Tensor:
    """One correction of one object, for tools: a normalised crop, its points, which of them was dragged, and where to (shares of the crop)."""
    with torch.inference_mode():
        features = network.encoder(image[None])[0]
        return network.drag(features, points[None], torch.tensor([index]), points.new_tensor([list(to)]))[0]


# --- Losses (section 3.3) --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def best_shift(curve: Float[Tensor, "B K 2"], truth: Float[Tensor, "B K 2"]) -> Int[Tensor, " B"]:
    """The j that minimises sum_i |p_i - p'_{(j+i) mod K}|_1, of all K.

    One table of distances holds every pair; its K wrapped diagonals are the K sums. Beside a copy of itself the table is read along them
    by strides, without a loop.
    """
    batch, k, _ = curve.shape
    table = torch.cdist(curve, truth, p=1).repeat(1, 1, 2)  # B K 2K
    diagonals = table.as_strided((batch, k, k), (2 * k * k, 2 * k + 1, 1))  # [b, i, j] = table[b, i, i + j]
    return diagonals.sum(1).argmin(1)


def matched(curve: Float[Tensor, "B K 2"], truth: Float[Tensor, "B K 2"]) -> Float[Tensor, "B K 2"]:
    """The true curve, begun where it fits the predicted one best."""
    k = curve.shape[1]
    index = (best_shift(curve, truth)[:, None] + torch.arange(k, device=curve.device)) % k
    return truth.gather(1, index[..., None].expand(-1, -1, 2))


def point_matching(curve: Float[Tensor, "B K 2"], truth: Float[Tensor, "B K 2"]) -> Tensor:
    """Eq. 6, as a mean over the points; both curves run the same way round."""
    return (curve - matched(curve, truth)).abs().sum(2).mean()


def fan(corners: Float[Tensor, "N 2"], size: int) -> tuple[Tensor, Tensor]:
    """The triangles from the first corner to all edges: coverage T H W, +1 or -1 as they are turned, and barycentric coordinates T 3 H W of the pixels."""
    centre = torch.arange(size, device=corners.device) + 0.5
    y, x = torch.meshgrid(centre + 1.7e-4, centre + 2.9e-4, indexing="ij")  # off the lattice, on which shared edges like to lie
    pixel = torch.stack([x, y])  # 2 H W
    a, b, c = (v[..., None, None] for v in (corners[:1], corners[1:-1], corners[2:]))  # T 2 1 1

    def cross(u: Tensor, v: Tensor) -> Tensor:
        return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]

    twice = cross(b - a, c - a)  # T 1 1
    safe = torch.where(twice.abs() < 1e-6, 1.0, twice)
    second, third = cross(pixel - a, c - a) / safe, cross(b - a, pixel - a) / safe
    weights = torch.stack([1 - second - third, second, third], 1)
    return ((weights >= 0).all(1) & (twice.abs() >= 1e-6)) * twice.sign(), weights


class Render(torch.autograd.Function):
    """Section 3.3.2: polygons B N 2 in pixels -> their masks B H W, with gradients to first order.

    Forward: the signed coverage of a fan of triangles adds up to the mask of any simple polygon. Backward: a triangle that moves by a pixel
    changes a pixel by the difference to its neighbour; the change belongs to the three corners by the barycentric coordinates of the place
    between the two. Where the mask does not change, edges that two triangles share cancel: these places are left out.
    """

    @staticmethod
    def forward(ctx: Any, polygons: Float[Tensor, "B N 2"], size: int) -> Float[Tensor, "B H W"]:
        """One polygon after the other, as all triangles of a batch would not fit into memory."""
        ctx.save_for_backward(polygons)
        return torch.stack([fan(corners, size)[0].sum(0) for corners in polygons])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """To the corners."""
        (polygons,) = ctx.saved_tensors
        out = torch.zeros_like(polygons)
        for corners, grad, to in zip(polygons, grads[0], out):
            cover, weights = fan(corners, grad.shape[0])
            for axis, dim in enumerate((-1, -2)):  # x runs along the last dimension

                def between(values: Tensor, dim: int = dim) -> Tensor:
                    return (values.narrow(dim, 0, values.shape[dim] - 1) + values.narrow(dim, 1, values.shape[dim] - 1)) / 2

                change = cover.diff(dim=dim) * (cover.sum(0).diff(dim=dim) != 0)
                place = between(weights).clamp(0, 1)
                parts = -torch.einsum("tkhw,thw,hw->tk", place / place.sum(1, keepdim=True), change, between(grad))
                to[0, axis] += parts[:, 0].sum()
                to[1:-1, axis] += parts[:, 1]
                to[2:, axis] += parts[:, 2]
        return out, None


def accuracy(points: Float[Tensor, "B N 2"], mask: Float[Tensor, "B S S"], curve: str) -> Tensor:
    """Section 3.3.2: |mask of the prediction - true mask|_1, as a mean over pixels.

    The norm has no slope where the masks agree, and an outline is half made of such pixels: there the slope is what a change would cost.
    """
    line = CURVES[curve](points, 1 if curve == "polygon" else 4)
    found = cast(Tensor, Render.apply(line * mask.shape[1], mask.shape[1]))
    error = (found - mask).detach()
    slope = torch.where(error == 0, 1 - 2 * mask, error.sign())
    return (error.abs() + slope * (found - found.detach())).mean()


def cells(points: Float[Tensor, "B M 2"], chosen: Bool[Tensor, "B M"], size: int) -> Float[Tensor, "B 1 g g"]:
    """1 in the cells in which one of the chosen points lies."""
    place = (points.clamp(0, 1 - 1e-6) * size).long()
    out = points.new_zeros(len(points), size * size)
    return out.scatter_reduce(1, place[..., 1] * size + place[..., 0], chosen.to(out.dtype), "amax").view(-1, 1, size, size)


def loss(config: Config) -> Loss:
    """Point matching of every step and every correction, binary cross-entropy of the two branches, and the accuracy loss where it is wanted.

    Distances are in hundredths of the crop, so that all terms are of one size (ours; the paper does not say how they are weighed).
    """

    def terms(output: Output, batch: Batch) -> dict[str, Tensor]:
        outline, each = batch["outline"], config.samples // config.points
        truth = outline[:, :: SAMPLES // config.samples]

        def match(stages: Tensor) -> Tensor:
            steps = [point_matching(CURVES[config.curve](points, each), truth) for points in stages.unbind(1)]
            return 100 * torch.stack(steps).mean()

        size = output["edge"].shape[2]
        everywhere = torch.ones_like(batch["corner"])
        found = {
            "matching": match(output["stages"]),
            "edge": F.binary_cross_entropy_with_logits(output["edge"], cells(outline, everywhere, size)),
            "vertex": F.binary_cross_entropy_with_logits(output["vertex"], cells(outline, batch["corner"], size)),
        }
        if config.corrections:
            found["interactive"] = match(output["corrected"])
        if config.rendering:
            found["accuracy"] = 100 * config.rendering * accuracy(output["points"], batch["mask"], config.curve)
        return {"loss": torch.stack(list(found.values())).sum(), **found}

    return terms


VARIANTS = {
    "spline": Config(),
    "polygon": Config(curve="polygon"),
    "finetune": Config(rendering=1.0),
    "small": Config(side=64, depth=18, width=16, stride=4, features=32, branch=4, samples=80, state=64, residuals=2, corrections=1),
    "test": Config(
        side=32, depth=18, width=4, stride=4, features=8, branch=2, points=16, samples=64, iterations=2, state=8, residuals=1, corrections=1, rendering=1.0
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """Adam with a batch of 16, as the released data loader has it; the learning rate for minutes on a laptop is ours."""
    augment = Augment(rotate=180, scale=(0.85, 1.15))
    if config.depth == 50:
        return Recipe(optimizer="adam", lr=3e-5, batch_size=16, augment=augment)
    return Recipe(lr=3e-3, weight_decay=1e-4, batch_size=16, average=0.99, augment=augment)


PAPER = Paper(
    variants=VARIANTS,
    build=lambda spec, config: CurveGCN(spec.channels, config),
    recipe=recipe,
    auto=("small", "spline"),
    loss=loss,
)
