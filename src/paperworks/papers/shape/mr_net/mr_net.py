"""MR-Net (Chen et al., "Shape Registration with Learned Deformations for 3D Shape Reconstruction from Sparse and Incomplete Point Clouds", MedIA 2021).

A template mesh takes the shape that sparse contours tell of, in one pass. Contour points become an occupancy volume, a 3-D CNN turns it into
features, and these are read at the template's vertices; graph convolutions then say where each vertex goes. Three times in a row, features read anew.

After the released code (ccmim/MR-Net, TensorFlow 1.7), which settles what the paper's figure leaves open: outputs are coordinates, not offsets; of
the two PointNet++ layers only the sampled points reach the vertices, as occupancy, and not their learned features, which
``point_features`` adds as the figure draws them. Differing from it: features are read between floor(x) and floor(x) + 1 within the volume (floor and
ceil give 0 at whole numbers, and reach beyond the last cell), and the length that becomes 1 follows from the data (100 mm there).

Shapes: B batch, N contour points, n vertices, R side of the volume, C features. Volumes have the axes (y, x, z), as there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.meshes import edges_of
from paperworks.tasks.base import Batch, Grid, Output, Paper, Recipe, Spec
from paperworks.tasks.meshes import Vary

BLOCKS = 3
BLOCK_WEIGHTS = (0.1, 0.3, 0.6)
"""Of the mesh losses of the three blocks."""
LAPLACE_WEIGHTS = (0.1, 1.0, 1.0)
REPEATS = 4
"""Times that each occupancy stands in a vertex's features."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A variant."""

    points: int = 3000
    """Contour points that the network takes."""
    side: int = 64
    """Of the volume."""
    widths: tuple[int, int, int, int] = (64, 128, 256, 500)
    """Features of the 3-D CNN at the volume's side, and at a half, a quarter and an eighth of it."""
    sampled: tuple[int, int] = (2000, 1578)
    """Points that the two set abstraction layers keep."""
    radius: float = 0.2
    neighbours: int = 32
    mlp: tuple[int, int, int] = (32, 64, 128)
    point_features: bool = False
    """Give the learned features of the sampled points to the vertices, as the paper's figure has it. The released code computes and drops them."""
    hidden: int = 256
    pairs: int = 6
    """Pairs of graph convolutions with a skip, in each block."""
    occupied: float = 255.0
    """Value of a cell with points in it."""
    offsets: bool = False
    """Not the paper's: the last layer of a block moves vertices instead of placing them, beginning with no motion."""
    lr: float = 1e-5
    batch: int = 1


# --- Points and volumes


def cells(points: Float[Tensor, "B m 3"], side: int) -> Float[Tensor, "B m 3"]:
    """Places (x, y, z) in [-1, 1] -> places (y, x, z) in [0, R - 1]; what lies outside is moved to the border."""
    return (points * (side / 2) + side / 2).clamp(0, side - 1)[..., [1, 0, 2]]


def occupancy(points: Float[Tensor, "B m 3"], side: int) -> Float[Tensor, "B 1 R R R"]:
    """1 in cells with a point in them."""
    row, column, depth = cells(points, side).floor().long().unbind(-1)
    flat = (row * side + column) * side + depth
    return points.new_zeros(points.shape[0], side**3).scatter(1, flat, 1.0).view(-1, 1, side, side, side)


def mean_in_cells(points: Float[Tensor, "B m 3"], features: Float[Tensor, "B m C"], side: int) -> Float[Tensor, "B C R R R"]:
    """Mean feature of the points in each cell ("3D projection" of the paper's figure)."""
    row, column, depth = cells(points, side).floor().long().unbind(-1)
    flat = ((row * side + column) * side + depth)[:, None]  # B 1 m
    total = features.new_zeros(points.shape[0], features.shape[2], side**3)
    total = total.scatter_add(2, flat.expand(-1, features.shape[2], -1), features.transpose(1, 2))
    count = features.new_zeros(points.shape[0], 1, side**3).scatter_add(2, flat, torch.ones_like(flat, dtype=features.dtype))
    return (total / count.clamp(min=1)).view(points.shape[0], -1, side, side, side)


def read_at(volume: Float[Tensor, "B C r r r"], vertices: Float[Tensor, "B n 3"], side: int) -> Float[Tensor, "B n C"]:
    """Features at the vertices ("volume-to-PC mapping"): bilinear in y and x, and the next cell upwards in z."""
    r = volume.shape[2]
    row, column, depth = (cells(vertices, side) * (r / side)).unbind(-1)
    top, left = row.floor(), column.floor()
    down, along = (row - top)[:, None], (column - left)[:, None]
    rows = torch.stack([top, top, top + 1, top + 1], 1).clamp(max=r - 1)  # B 4 n: the corners around each vertex
    columns = torch.stack([left, left + 1, left, left + 1], 1).clamp(max=r - 1)
    index = ((rows * r + columns) * r + depth.ceil().clamp(max=r - 1)[:, None]).long().flatten(1)[:, None]
    corners = volume.flatten(2).gather(2, index.expand(-1, volume.shape[1], -1)).unflatten(2, (4, -1))  # B C 4 n
    weights = torch.stack([(1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along], 2)  # B 1 4 n
    return (weights * corners).sum(2).transpose(1, 2)


class VolumeCNN(nn.Module):
    """3x3x3 convolutions with ReLU: two at full side, then three at each half of it, the first of which has stride 2."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        before = 3  # the one channel three times, as the release has it
        for level, width in enumerate(widths):
            convolutions = []
            for i in range(3 if level else 2):
                halves = level > 0 and i == 0
                convolutions.append(nn.Conv3d(before, width, 3, stride=2 if halves else 1, padding=0 if halves else 1))
                before = width
            self.levels.append(nn.ModuleList(convolutions))
        for p in self.parameters():
            if p.ndim > 1:  # of He; with TFLearn's default, half of it, features of the deep levels drown in those of the first
                nn.init.kaiming_uniform_(p, nonlinearity="relu")
            else:
                nn.init.zeros_(p)

    def forward(self, volume: Float[Tensor, "B 1 R R R"]) -> list[Tensor]:
        """Features of each level: B C_i r r r with r = R, R/2, R/4, R/8."""
        x, found = volume.expand(-1, 3, -1, -1, -1), []
        for convolutions in self.levels:
            assert isinstance(convolutions, nn.ModuleList)
            for convolution in convolutions:
                # TensorFlow's SAME at stride 2 and an even side: one cell of zeros behind, none before
                x = F.relu(convolution(F.pad(x, (0, 1) * 3) if convolution.stride == (2, 2, 2) else x))
            found.append(x)
        return found


def farthest_points(points: Float[Tensor, "B m 3"], number: int) -> Int[Tensor, "B s"]:
    """Farthest point sampling: begin with the first point; add the point that is farthest from all taken so far, again and again."""
    taken, index = [], torch.zeros_like(points[:, 0, 0], dtype=torch.long)
    nearest = torch.full_like(points[..., 0], 1e10)
    for _ in range(number):
        taken.append(index)
        place = points.gather(1, index[:, None, None].expand(-1, 1, 3))
        nearest = torch.minimum(nearest, (points - place).square().sum(-1))
        index = nearest.argmax(1)
    return torch.stack(taken, 1)


def within_radius(points: Float[Tensor, "B m 3"], centres: Float[Tensor, "B s 3"], radius: float, number: int) -> Int[Tensor, "B s k"]:
    """The first ``number`` points (by index) nearer than ``radius`` to each centre; the first of them again where there are fewer."""
    apart = (centres[:, :, None] - points[:, None]).square().sum(-1)  # B s m
    order = torch.arange(points.shape[1], device=points.device)
    key = torch.where(apart < radius**2, order, points.shape[1])
    found = key.topk(min(number, points.shape[1]), dim=2, largest=False, sorted=True).values
    return torch.where(found == points.shape[1], found[..., :1], found)


class SetAbstraction(nn.Module):
    """PointNet++: sampled points, and for each the largest of what an MLP makes of its neighbours."""

    def __init__(self, features: int, config: Config, number: int) -> None:
        super().__init__()
        self.number, self.radius, self.neighbours = number, config.radius, config.neighbours
        widths = (3 + features, *config.mlp)
        self.mlp = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def sample(self, points: Float[Tensor, "B m 3"]) -> Float[Tensor, "B s 3"]:
        """Where the sampled points lie."""
        return points.gather(1, farthest_points(points, self.number)[..., None].expand(-1, -1, 3))

    def describe(self, centres: Tensor, points: Tensor, features: Tensor | None) -> Float[Tensor, "B s C"]:
        """Features of the sampled points ``centres``."""
        batch = torch.arange(points.shape[0], device=points.device)[:, None, None]
        index = within_radius(points, centres, self.radius, self.neighbours)
        x = points[batch, index] - centres[:, :, None]  # B s k 3
        if features is not None:
            x = torch.cat([x, features[batch, index]], -1)
        for layer in self.mlp:
            x = F.relu(layer(x))
        return x.amax(2)


# --- Graphs


def adjacency(faces: np.ndarray, vertices: int) -> Float[Tensor, "n n"]:
    """A_hat = D^-1/2 A D^-1/2 of the mesh's edges, without self-loops: a vertex itself has a weight matrix of its own."""
    edges = edges_of(faces)
    found = np.zeros((vertices, vertices), np.float32)
    found[edges[:, 0], edges[:, 1]] = found[edges[:, 1], edges[:, 0]] = 1
    root = np.sqrt(np.maximum(found.sum(1), 1))
    return torch.from_numpy(found / root[:, None] / root)


class GraphConvolution(nn.Module):
    """Pixel2Mesh: X' = X W_0 + A_hat X W_1 + b, and ReLU unless it is a block's last."""

    def __init__(self, before: int, after: int, last: bool = False) -> None:
        super().__init__()
        self.own, self.neighbours = nn.Linear(before, after), nn.Linear(before, after, bias=False)
        self.last = last
        for layer in (self.own, self.neighbours):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.own.bias)

    def forward(self, x: Float[Tensor, "B n C"], a_hat: Float[Tensor, "n n"]) -> Float[Tensor, "B n D"]:
        """Features of each vertex and of the vertices around it."""
        x = self.own(x) + a_hat @ self.neighbours(x)
        return x if self.last else F.relu(x)


class DeformationBlock(nn.Module):
    """14, 15 or 16 graph convolutions: in, [one without a skip], six pairs h <- (h + f(f(h))) / 2, [to half the width], to coordinates."""

    def __init__(self, features: int, config: Config, index: int) -> None:
        super().__init__()
        hidden = config.hidden
        self.first = nn.ModuleList([GraphConvolution(features, hidden)])
        if index > 0:
            self.first.append(GraphConvolution(hidden, hidden))
        self.pairs = nn.ModuleList(
            nn.ModuleList([GraphConvolution(hidden, hidden), GraphConvolution(hidden, hidden)]) for _ in range(config.pairs)
        )
        narrow = hidden // 2 if index == BLOCKS - 1 else hidden
        self.narrow = GraphConvolution(hidden, narrow) if index == BLOCKS - 1 else None
        self.coordinates = GraphConvolution(narrow, 3, last=True)
        if config.offsets:
            nn.init.zeros_(self.coordinates.own.weight)
            nn.init.zeros_(self.coordinates.neighbours.weight)

    def forward(self, x: Tensor, a_hat: Tensor) -> tuple[Float[Tensor, "B n 3"], Float[Tensor, "B n C"]]:
        """New coordinates, and the hidden features that the next block is given."""
        for layer in self.first:
            x = layer(x, a_hat)
        for one, other in self.pairs:  # pyright: ignore[reportGeneralTypeIssues]
            x = (x + other(one(x, a_hat), a_hat)) / 2
        return self.coordinates(x if self.narrow is None else self.narrow(x, a_hat), a_hat), x


# --- The network


class MRNet(nn.Module):
    """Contour points B 3 N in [-1, 1] -> vertices B 3 n. The template is part of the network and not of its weights."""

    template: Tensor
    a_hat: Tensor

    def __init__(self, template: np.ndarray, faces: np.ndarray, config: Config) -> None:
        super().__init__()
        self.config, self.grid = config, Grid(fixed=config.points)
        self.register_buffer("template", torch.from_numpy(template.astype(np.float32)), persistent=False)
        self.register_buffer("a_hat", adjacency(faces, len(template)), persistent=False)
        self.cnn = VolumeCNN(config.widths)
        learned = config.mlp[-1]
        self.abstraction = nn.ModuleList([SetAbstraction(0, config, config.sampled[0]), SetAbstraction(learned, config, config.sampled[1])])
        self.abstraction.requires_grad_(config.point_features)  # nothing they compute reaches a vertex otherwise
        features = 3 + sum(config.widths) + 3 * REPEATS + (2 * learned if config.point_features else 0)
        self.blocks = nn.ModuleList(DeformationBlock(features + (config.hidden if i else 0), config, i) for i in range(BLOCKS))

    def volumes(self, cloud: Float[Tensor, "B N 3"]) -> list[Tensor]:
        """What is read at the vertices, B C r r r each: the CNN's levels, three occupancies, and the sampled points' features."""
        side = self.config.side
        found = self.cnn(self.config.occupied * occupancy(cloud, side))
        clouds, described, features = [cloud], [], None
        for layer in self.abstraction:
            assert isinstance(layer, SetAbstraction)
            centres = layer.sample(clouds[-1])
            if self.config.point_features:
                features = layer.describe(centres, clouds[-1], features)
                described.append(mean_in_cells(centres, features, side))
            clouds.append(centres)
        return [*found, torch.cat([occupancy(points, side) for points in clouds], 1), *described]

    def forward(self, points: Float[Tensor, "B 3 N"]) -> Output:
        """``vertices`` B 3 n, those after each block (``blocks`` B 3 3 n), and the ``template`` 3 n that they began as."""
        volumes = self.volumes(points.transpose(1, 2))
        vertices = self.template.expand(points.shape[0], -1, -1)
        carried: list[Tensor] = []
        found = []
        for block in self.blocks:
            read = [read_at(volume, vertices, self.config.side) for volume in volumes]
            read[len(self.config.widths)] = read[len(self.config.widths)].repeat_interleave(REPEATS, -1)
            placed, hidden = block(torch.cat([vertices, *read, *carried], -1), self.a_hat)
            vertices = vertices + placed if self.config.offsets else placed
            carried = [hidden]
            found.append(vertices.transpose(1, 2))
        return {"vertices": found[-1], "blocks": torch.stack(found, 1), "template": self.template.T}


# --- Losses


def nearest(a: Float[Tensor, "B n 3"], b: Float[Tensor, "B m 3"]) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances a -> b and b -> a to the nearest point, and which point of a is the nearest to each of b."""
    with torch.no_grad():  # which is nearest has no gradient, how far it is has
        apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # B n m
        of_b, of_a = apart.argmin(2), apart.argmin(1)

    def squared(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return (x - y.gather(1, index[..., None].expand(-1, -1, 3))).square().sum(-1)

    return squared(a, b, of_b), squared(b, a, of_a), of_a


def vertex_normals(vertices: Float[Tensor, "B n 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, "B n 3"]:
    """Unit normals, of the faces around a vertex by their areas."""
    a, b, c = (vertices[:, faces[:, i]] for i in range(3))
    normal = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for i in range(3):
        total = total.index_add(1, faces[:, i], normal)
    return F.normalize(total, dim=-1)


def laplacian(vertices: Float[Tensor, "B n 3"], edges: Int[Tensor, "E 2"]) -> Float[Tensor, "B n 3"]:
    """A vertex less the mean of its neighbours."""
    a, b = edges.T
    total = torch.zeros_like(vertices).index_add(1, a, vertices[:, b]).index_add(1, b, vertices[:, a])
    return vertices - total / edges.flatten().bincount(minlength=vertices.shape[1])[:, None]


def mesh_losses(predicted: Float[Tensor, "B n 3"], truth: Float[Tensor, "B n 3"], normals: Tensor, edges: Tensor) -> dict[str, Tensor]:
    """The terms of one block: coordinates, Chamfer, edges, normals."""
    to_predicted, to_truth, index = nearest(truth, predicted)
    edge = predicted[:, edges[:, 0]] - predicted[:, edges[:, 1]]
    normal = normals.gather(1, index[..., None].expand(-1, -1, 3))[:, edges[:, 0]]
    return {
        "coordinates": 1000 * (truth - predicted).abs().mean(),
        "chamfer": (to_predicted.mean() + to_truth.mean()) / 2,
        "edges": edge.square().sum(-1).mean(),
        "normals": (F.normalize(normal, dim=-1) * F.normalize(edge, dim=-1)).sum(-1).abs().mean(),
    }


def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
    """Weighted over the blocks, with the change of the Laplacian between the template and each block's mesh."""
    faces = batch["faces"][0]
    edges = torch.from_numpy(edges_of(faces.cpu().numpy())).to(faces.device)
    truth = batch["vertices"].transpose(1, 2)
    normals, before = vertex_normals(truth, faces), laplacian(output["template"].T[None], edges)
    terms: dict[str, Tensor] = defaultdict(lambda: truth.new_zeros(()))
    for predicted, weight, smooth in zip(output["blocks"].transpose(2, 3).unbind(1), BLOCK_WEIGHTS, LAPLACE_WEIGHTS):
        for name, value in mesh_losses(predicted, truth, normals, edges).items():
            terms[name] = terms[name] + weight * value
        terms["laplacian"] = terms["laplacian"] + smooth * (laplacian(predicted, edges) - before).square().sum(-1).mean()
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


# --- Variants


VARIANTS: dict[str, Config] = {
    "paper": Config(),
    "figure": Config(point_features=True),
    "small": Config(
        points=512,
        side=32,
        widths=(4, 8, 16, 32),
        sampled=(96, 64),
        hidden=64,
        pairs=2,
        occupied=16.0,
        offsets=True,
        lr=3e-3,
        batch=4,
    ),
    "test": Config(
        points=64,
        side=8,
        widths=(4, 6, 8, 10),
        sampled=(24, 16),
        radius=0.5,
        neighbours=8,
        mlp=(8, 8, 8),
        point_features=True,
        hidden=16,
        pairs=2,
        lr=3e-3,
        batch=4,
    ),
}


def build(spec: Spec, config: Config) -> MRNet:
    """For the template of a data set."""
    template = np.array(spec.more["template"]) / spec.std[0]
    return MRNet(template, np.array(spec.more["faces"]), config)


def recipe(config: Config) -> Recipe:
    """Adam with the release's decay; some slices are left out of each training shape, as the release leaves all but two to five out."""
    return Recipe(
        optimizer="adam",
        lr=config.lr,
        momentum=0.9,
        weight_decay=5e-6,
        batch_size=config.batch,
        clip=None,
        schedule="cosine",
        augment=Vary(),
    )


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small",), loss=lambda config: loss)
