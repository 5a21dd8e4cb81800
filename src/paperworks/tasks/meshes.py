"""Meshes from sparse contours: a template of fixed vertices and faces takes the shape that outlines on a few parallel slices tell of.

A sample is ``points`` (M 3, millimetres, any number), ``vertices`` (n 3, the true places of the template's vertices), ``faces`` (F 3) and
``dropped``: how many slices were left out. In a batch points and vertices stand as B 3 N, coordinates as channels, less the mean of the contour points and over the spec's ``std``;
N is the network's own (``Grid(fixed=N)``): a random subset, or repetitions. That ``std`` is the length that becomes 1, and ``more``
has the template and its faces. A network returns ``vertices`` (B 3 n); a prediction is n 3 in the millimetres and the place of the given points.

Every validation shape is asked for three times: with all its contours, and with two and four slices missing.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from jaxtyping import Float
from scipy import sparse
from scipy.spatial import KDTree
from torch import Tensor, nn

from paperworks.data.meshes import (
    POINT_SUFFIXES,
    Case,
    Mesh,
    Population,
    edges_of,
    is_closed,
    looks_like_meshes,
    open_meshes,
    read_points,
    slices_of,
    surface,
    volume,
    write_mesh,
    write_points,
)
from paperworks.data.nifti import is_volume, stem
from paperworks.errors import InputError
from paperworks.files import atomic, write_json
from paperworks.tasks.base import Batch, Grid, Output, Recipe, Sample, Spec, grid_of
from paperworks.tasks.contract import Deployed, Model, Options, Predict, Progress, Task, mean_of
from paperworks.tasks.drawing import Picture, panel

DROPPED = (0, 2, 4)
"""Slices left out of a validation shape."""
MODES = 10
"""Principal components of the shape model that is fitted as a baseline."""
WORST = 8.0
"""Error in millimetres from which on it is drawn in the darkest colour."""


@dataclass(frozen=True, kw_only=True)
class Vary:
    """Training contours: some slices are left out, and the whole is turned within their plane."""

    drop: int = 4
    """Slices left out, at most; how many is drawn evenly from 0 on, and two stay."""
    turn: float = 0.0
    """Standard deviation of the turn in degrees."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """The sample with fewer slices, turned about the vertical axis."""
        count = int(torch.randint(self.drop + 1, (), generator=generator))
        angle = math.radians(self.turn) * float(torch.randn((), generator=generator))
        c, s = math.cos(angle), math.sin(angle)
        turned = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T
        points = without(sample["points"], count, generator)
        return sample | {"points": points @ turned, "vertices": sample["vertices"] @ turned}


@dataclass(frozen=True)
class MeshItem:
    """A shape, with some of its slices left out."""

    case: Case
    dropped: int = 0

    @property
    def name(self) -> str:
        """The shape's, and how many slices are missing."""
        return f"{self.case.name}_less_{self.dropped}" if self.dropped else self.case.name


def without(points: Float[Tensor, "M 3"], count: int, generator: torch.Generator) -> Float[Tensor, "m 3"]:
    """The points less those on ``count`` slices drawn by chance; two slices stay."""
    slices = slices_of(points.numpy())
    count = min(count, len(slices) - 2)
    if count <= 0:
        return points
    kept = torch.randperm(len(slices), generator=generator)[count:]
    return points[torch.from_numpy(np.any([slices[int(k)] for k in kept], axis=0))]


def resampled(points: Float[Tensor, "M 3"], number: int, generator: torch.Generator) -> Float[Tensor, "N 3"]:
    """Exactly ``number`` points: a random subset, or all of them and some more than once."""
    order = torch.randperm(len(points), generator=generator)
    if number > len(points):
        order = torch.cat([order, torch.randint(len(points), (number - len(points),), generator=generator)])
    return points[order[:number]]


class MeshScores:
    """How far predicted meshes are from the true ones."""

    def __init__(self, faces: np.ndarray) -> None:
        self.faces, self.closed = faces, is_closed(faces)
        self.rows: list[dict[str, Any]] = []

    def update(self, prediction: Float[Tensor, "n 3"], sample: Sample) -> None:
        """Count one shape."""
        found, truth = prediction.detach().cpu().double().numpy(), sample["vertices"].double().numpy()
        apart = (KDTree(truth).query(found)[0], KDTree(found).query(truth)[0])
        ours, theirs = Mesh(found, self.faces), Mesh(truth, self.faces)
        one, other = surface(ours), surface(theirs)
        between = (KDTree(other).query(one)[0], KDTree(one).query(other)[0])
        self.rows.append(
            {
                "name": sample["name"],
                "dropped": sample["dropped"],
                "vertex_error": float(np.linalg.norm(found - truth, axis=1).mean()),
                "chamfer": float(apart[0].mean() + apart[1].mean()) / 2,
                "surface_distance": float(between[0].mean() + between[1].mean()) / 2,
                "hausdorff": float(max(between[0].max(), between[1].max())),
                "volume_error": 100 * abs(volume(ours) / volume(theirs) - 1) if self.closed else math.nan,
            }
        )

    def compute(self) -> dict[str, float]:
        """Means over the shapes; those of the vertex error also by the number of missing slices."""
        means = {name: mean_of(self.rows, name) for name in Meshes.metric_names}
        for count in sorted({row["dropped"] for row in self.rows}):
            means[f"vertex_error/{count} slices missing"] = mean_of([r for r in self.rows if r["dropped"] == count], "vertex_error")
        return means

    def per_item(self) -> list[dict[str, Any]]:
        """The scores of each shape."""
        return self.rows


class Rebuilt(Deployed):
    """Centred points B 3 N in millimetres -> vertices B 3 n in the same frame."""

    def finish(self, output: Output) -> Tensor:
        """The last vertices, as long as they are."""
        return output["vertices"] * self.std.view(1, -1, 1)


class Meshes(Task):
    """A population of meshes in correspondence, each with the contours from which it is to be rebuilt."""

    name = "meshes"
    noun = ("case", "cases", "样例")
    noun = ("shape", "shapes", "形状")
    pack = "pack:ventricles"
    metric = "vertex_error"
    higher_is_better = False
    metric_names = {
        "vertex_error": ("Vertex error (mm)", "顶点误差（mm）", -1),
        "chamfer": ("Chamfer distance (mm)", "Chamfer 距离（mm）", -1),
        "surface_distance": ("Mean surface distance (mm)", "平均表面距离（mm）", -1),
        "hausdorff": ("Hausdorff distance (mm)", "Hausdorff 距离（mm）", -1),
        "volume_error": ("Volume error (%)", "体积误差（%）", -1),
    }
    explained = {
        "vertex_error": (
            "Distance between a predicted vertex and the true place of the same vertex, mean over vertices; sliding along the surface counts.",
            "预测顶点与同一编号真实顶点之间的距离，按顶点平均；沿表面滑动也算误差。",
        ),
        "chamfer": (
            "Distance to the nearest vertex of the other mesh, mean of both directions.",
            "到另一网格最近顶点的距离，两个方向取平均。",
        ),
        "surface_distance": (
            "Distance to the nearest of points that cover the other surface, mean of both directions; sliding along it does not count.",
            "到覆盖另一表面的密集点中最近一个的距离，两个方向取平均；沿表面滑动不算误差。",
        ),
        "hausdorff": ("The largest of these distances.", "上述距离中的最大值。"),
        "volume_error": (
            "Difference of the enclosed volumes in percent of the true one; closed meshes only.",
            "所围体积之差占真实体积的百分比；仅对闭合网格。",
        ),
    }
    baseline_names = {
        "pca": (f"Shape model of {MODES} modes, fitted", f"{MODES} 个模态的形状模型拟合"),
        "affine": ("Mean shape, affine fit", "平均形状的仿射拟合"),
        "template": ("Mean shape", "平均形状"),
    }
    views = {"mesh": ("mesh", "网格"), "error": ("error", "误差")}
    inputs = ("points",)
    images = ()
    output = "vertices"
    outputs = ("vertices",)
    suffix = ".ply"

    def __init__(self, source: str | Path, *, progress: Progress | None = None) -> None:
        """Open a folder of meshes and contours, an ``.npz`` file of arrays, or ``pack:NAME``.

        Raises:
            InputError: there is nothing to learn from, or the meshes do not correspond.
        """
        self.population: Population = open_meshes(source)
        self.source, cases = self.population.source, self.population
        self.train: Sequence[Any] = [MeshItem(case) for case in cases.train]
        shapes, largest, self.slices = [], 0.0, 0
        for i, case in enumerate(cases.train):
            points, truth = case.load()
            centre = points.mean(0)
            shapes.append(truth - centre)
            largest = max(largest, float(np.abs(points - centre).max()), float(np.abs(truth - centre).max()))
            self.slices = max(self.slices, len(slices_of(points)))
            if progress:
                progress(i + 1, len(cases.train))
        self.val: Sequence[Any] = [MeshItem(case, count) for count in DROPPED if not count or self.slices > 2 for case in cases.val]
        self.sha256 = hashlib.sha256(f"{cases.sha256} {DROPPED}".encode()).hexdigest()
        mean = np.mean(shapes, 0)
        template = mean if cases.template is None else cases.template - cases.template.mean(0) + mean.mean(0)
        self.spec = self._spec(template, cases.faces, math.ceil(1.2 * largest))

    @classmethod
    def _spec(cls, template: np.ndarray, faces: np.ndarray, length: float) -> Spec:
        sides = tuple(max(round(float(side)), 1) for side in np.ptp(template, axis=0)[::-1])
        more = {"template": np.round(template, 4).tolist(), "faces": faces.tolist()}
        return Spec(task=cls.name, channels=3, classes=(), size=sides, mean=(0.0,) * 3, std=(float(length),) * 3, more=more)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder ``meshes``, a file ``meshes.npz``, or a template."""
        return looks_like_meshes(path)

    def describe(self) -> dict[str, Any]:
        """Shapes, slices and what is wrong with them."""
        return {
            "task": self.name,
            "source": self.source,
            "items": len(self.train) + len(self.val),
            "shapes": len(self.population.train) + len(self.population.val),
            "splits": {"train": len(self.train), "val": len(self.val)},
            "classes": [],
            "vertices": len(self.spec.more["template"]),
            "faces": len(self.population.faces),
            "closed": is_closed(self.population.faces),
            "slices": self.slices,
            "size_mm": list(self.spec.size),
            "problems": [str(problem) for problem in self.population.problems],
        }

    def check(self, spec: Spec) -> None:
        """Refuse shapes whose vertices are not those of the trained template.

        Raises:
            InputError: other faces.
        """
        if self.spec.more["faces"] != [list(face) for face in spec.more["faces"]]:
            raise InputError(
                f"{self.source} has other faces than the template the model was trained with; give meshes that correspond to it"
            )

    # Training

    def sample(self, item: MeshItem) -> Sample:
        """A shape and its contours; which slices are missing follows from the name."""
        points, truth = item.case.load()
        seed = int.from_bytes(hashlib.sha256(item.name.encode()).digest()[:4], "big")
        return {
            "points": without(torch.from_numpy(points), item.dropped, torch.Generator().manual_seed(seed)),
            "vertices": torch.from_numpy(truth),
            "faces": torch.from_numpy(self.population.faces),
            "dropped": item.dropped,
            "name": item.name,
        }

    def training_sample(self, item: MeshItem, recipe: Recipe, grid: Grid, generator: torch.Generator) -> Sample:
        """Points and vertices as B 3 N wants them, less the mean of the contours that stayed."""
        sample = recipe.augment(self.sample(item), (grid.fixed,), generator)
        points, centre = sample["points"], sample["points"].mean(0)
        return {
            "points": (resampled(points, grid.fixed, generator) - centre).T.contiguous() / self.spec.std[0],
            "vertices": (sample["vertices"] - centre).T.contiguous() / self.spec.std[0],
            "faces": sample["faces"],
            "name": sample["name"],
        }

    # Use

    @classmethod
    def deploy(cls, network: nn.Module, spec: Spec) -> Rebuilt:
        """Millimetres in and out."""
        return Rebuilt(network, spec)

    def given(self, sample: Sample) -> Tensor:
        """The contour points."""
        return sample["points"]

    @classmethod
    def network_input(cls, given: Float[Tensor, "M 3"], grid: Grid) -> Float[Tensor, "3 N"]:
        """As many points as the network takes, less their mean: always the same ones."""
        return (resampled(given, grid.fixed, torch.Generator().manual_seed(0)) - given.mean(0)).T.contiguous()

    @classmethod
    def predictor(
        cls, deployed: Callable[[Tensor], Tensor], spec: Spec, grid: Grid, *, window: int = 1024, overlap: float = 0.25
    ) -> Predict:
        """A function from contour points in millimetres, any number anywhere, to the vertices of the mesh there."""

        def predict(given: Float[Tensor, "M 3"]) -> Float[Tensor, "n 3"]:
            with torch.inference_mode():
                vertices = deployed(cls.network_input(given, grid)[None])[0]
            return vertices.float().cpu().T + given.mean(0)

        return predict

    def scores(self) -> MeshScores:
        """An accumulator of the task's metrics."""
        return MeshScores(self.population.faces)

    def baselines(self) -> dict[str, Predict]:
        """The mean of the training shapes where the contours are; this with the affine map that fits them; a shape model that fits them."""
        samples = [self.sample(MeshItem(item.case, count)) for item in self.train for count in (DROPPED if self.slices > 2 else (0,))]
        shapes = np.stack([(s["vertices"] - s["points"].mean(0)).double().numpy() for s in samples])
        fits = {"pca": shape_model(shapes, self.population.faces), "affine": affine_fit(shapes.mean(0), self.population.faces)}

        def placed(fit: Callable[[np.ndarray], np.ndarray]) -> Predict:
            def predict(points: Float[Tensor, "M 3"]) -> Float[Tensor, "n 3"]:
                centre = points.mean(0)
                return torch.from_numpy(fit((points - centre).double().numpy())).float() + centre

            return predict

        return {name: placed(fit) for name, fit in {**fits, "template": lambda points: shapes.mean(0)}.items()}

    # Pictures

    def shown(self, sample: Sample) -> dict[str, Picture]:
        """The contours, and the true mesh with them."""
        box, faces = _box(sample), self.population.faces
        truth = sample["vertices"].numpy()
        return {"input": rendered(None, faces, sample["points"], box), "truth": rendered(truth, faces, sample["points"], box)}

    def drawn(self, sample: Sample, prediction: Float[Tensor, "n 3"]) -> dict[str, Picture]:
        """The mesh with the contours, and the mesh coloured by how far each vertex is from its true place."""
        box, faces, found = _box(sample), self.population.faces, prediction.detach().cpu().numpy()
        error = np.linalg.norm(found - sample["vertices"].numpy(), axis=1)
        return {"mesh": rendered(found, faces, sample["points"], box), "error": rendered(found, faces, None, box, error)}

    def legend(self) -> list[dict[str, Any]]:
        """What the colours of an error mean."""
        return [
            {"colour": _heat(0.0), "en": "0 mm", "zh": "0 毫米", "view": "error"},
            {"colour": _heat(0.5), "en": f"{WORST / 2:.0f} mm", "zh": f"{WORST / 2:.0f} 毫米", "view": "error"},
            {"colour": _heat(1.0), "en": f"{WORST:.0f} mm and more", "zh": f"{WORST:.0f} 毫米及以上", "view": "error"},
        ]

    # Files

    def files(self, items: Sequence[MeshItem]) -> list[Path]:
        """The files of their points; where there are none, or slices are left out, they are written to a temporary folder first."""
        folder = Path(tempfile.gettempdir()) / f"paperworks_{self.sha256[:12]}"
        found = []
        for item in items:
            if item.case.points is not None and not item.dropped:
                found.append(item.case.points)
                continue
            found.append(folder / f"{item.name.replace('/', '_')}.csv")
            write_points(found[-1], self.sample(item)["points"].numpy())
        return found

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Points, meshes whose vertices are points, and label volumes."""
        return path.suffix.lower() in POINT_SUFFIXES or is_volume(path)

    @classmethod
    def target(cls, name: Path) -> Path:
        """The name of the points with the ending of a mesh."""
        return name.with_name(stem(name) + cls.suffix)

    @classmethod
    def predict_file(cls, model: Model, source: Path, target: Path, options: Options) -> None:
        """Write the mesh (PLY) and beside it, as JSON, its volume and how well it fits the points; with ``overlays`` also a picture."""
        options.refuse(cls.name, "refine", "probabilities")
        points = torch.from_numpy(np.asarray(read_points(source), np.float32))
        if len(points) < 4:
            raise InputError(f"{source} holds {len(points)} points; a shape needs contours on two slices at least")
        reach = float((points - points.mean(0)).abs().max())
        if reach > 2 * model.spec.std[0]:
            raise InputError(
                f"{source} reaches {reach:.0f} from its middle where the model knows shapes within {model.spec.std[0]:.0f} mm; give millimetres"
            )
        vertices = cls.predictor(model.forward, model.spec, model.grid)(points)
        mesh = Mesh(vertices.numpy(), np.array(model.spec.more["faces"]))
        fit = KDTree(surface(mesh)).query(points.numpy())[0]
        write_mesh(target, mesh)
        write_json(
            target.with_suffix(".json"),
            {
                "points": len(points),
                "slices": len(slices_of(points.numpy())),
                "volume_ml": volume(mesh) / 1000 if is_closed(mesh.faces) else None,
                "distance_of_points_mm": {"mean": float(fit.mean()), "largest": float(fit.max())},
                "centre_mm": [float(c) for c in vertices.mean(0)],
            },
        )
        if options.overlays:
            box = _box({"points": points, "vertices": vertices})
            pictures = [rendered(None, mesh.faces, points, box), rendered(mesh.vertices, mesh.faces, points, box)]
            with atomic(target.with_name(target.stem + ".overlay.png")) as temporary:
                PIL.Image.fromarray(panel(pictures, ["contours", "mesh"])).save(temporary)

    # Data that do not exist

    @classmethod
    def plain_spec(cls, channels: int = 3, classes: int = 2, ndim: int = 2, size: tuple[int, ...] | None = None) -> Spec:
        """A sphere of 66 vertices; its radius is half the length that becomes 1, and that is 1."""
        mesh = sphere()
        return cls._spec(mesh.vertices / 2, mesh.faces, 1.0)

    @classmethod
    def example(cls, spec: Spec, grid: Grid, *, size: Sequence[int] | None = None, batch: int = 1, seed: int = 0) -> Tensor:
        """Points of noise in a cube: B 3 N, whatever the size."""
        noise = torch.rand(batch, 3, grid.fixed, generator=torch.Generator().manual_seed(seed))
        return (2 * noise - 1) * 0.6 * spec.std[0]

    @classmethod
    def plain_batch(cls, network: nn.Module, spec: Spec, *, size: int = 48, batch: int = 2, seed: int = 0) -> Batch:
        """Stretched templates, and noisy points on them."""
        generator = torch.Generator().manual_seed(seed)
        template = torch.tensor(spec.more["template"]).T / spec.std[0]  # 3 n
        vertices = template * (0.7 + 0.6 * torch.rand(batch, 3, 1, generator=generator))
        chosen = torch.randint(template.shape[1], (grid_of(network).fixed,), generator=generator)
        points = vertices[:, :, chosen] + 0.02 * torch.randn(batch, 3, len(chosen), generator=generator)
        faces = torch.tensor(spec.more["faces"])
        return {"points": points, "vertices": vertices, "faces": faces.expand(batch, -1, -1), "name": [f"noise {i}" for i in range(batch)]}


def sphere(subdivisions: int = 2) -> Mesh:
    """An octahedron whose faces are cut into four, again and again, and pushed out to radius 1."""
    vertices = np.concatenate([np.eye(3), -np.eye(3)])
    faces = np.array([[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]])
    for _ in range(subdivisions):
        edges = edges_of(faces)
        place = {tuple(edge): len(vertices) + i for i, edge in enumerate(edges.tolist())}
        middles = vertices[edges].mean(1)
        vertices = np.concatenate([vertices, middles / np.linalg.norm(middles, axis=1, keepdims=True)])
        mid = np.array(
            [[place[min(f[i], f[i - 2]), max(f[i], f[i - 2])] for i in range(3)] for f in faces.tolist()]
        )  # opposite the next corner
        faces = np.concatenate([np.stack([faces[:, i], mid[:, i], mid[:, i - 1]], 1) for i in range(3)] + [mid])
    return Mesh(vertices.astype(np.float32), faces)


# Baselines


def _covering(vertices: int, faces: np.ndarray) -> sparse.csr_array:
    """Vertices, middles of edges and of faces, as a matrix on the vertices."""
    parts = [np.arange(vertices)[:, None], edges_of(faces), faces]
    blocks = []
    for part in parts:
        rows = np.repeat(np.arange(len(part)), part.shape[1])
        blocks.append(sparse.csr_array((np.full(part.size, 1 / part.shape[1]), (rows, part.ravel())), (len(part), vertices)))
    return sparse.csr_array(sparse.vstack(blocks))


def affine_fit(
    mean: Float[np.ndarray, "n 3"], faces: np.ndarray, rounds: int = 20, hold: float = 0.05
) -> Callable[[np.ndarray], np.ndarray]:
    """Iterative closest points with an affine map of the mean shape, held near the identity by ``hold`` times the number of points."""
    covering = _covering(len(mean), faces) @ mean
    inertia = np.diag(np.append(covering.var(0), 1.0))
    still = np.eye(4)[:, :3]

    def fit(points: np.ndarray) -> np.ndarray:
        turn = still
        for _ in range(rounds):
            nearest = KDTree(covering @ turn[:3] + turn[3]).query(points)[1]
            source = np.c_[covering[nearest], np.ones(len(points))]
            weight = hold * len(points) * inertia
            turn = np.linalg.solve(source.T @ source + weight, source.T @ points + weight @ still)
        return mean @ turn[:3] + turn[3]

    return fit


def shape_model(
    shapes: Float[np.ndarray, "K n 3"], faces: np.ndarray, modes: int = MODES, noise: float = 1.5, rounds: int = 15
) -> Callable[[np.ndarray], np.ndarray]:
    """A statistical shape model: mean + P b with the first principal components P.

    b is fitted to the points that are nearest at the moment, by least squares with the prior that b has the variances of the training shapes and
    a point the deviation ``noise`` in millimetres; and again from the shape that results.
    """
    mean = shapes.mean(0)
    _, singular, basis = np.linalg.svd((shapes - mean).reshape(len(shapes), -1), full_matrices=False)
    modes = min(modes, int((singular > 1e-9 * singular[0]).sum())) if singular[0] > 0 else 0
    variance = singular[:modes] ** 2 / len(shapes)
    if not modes:
        return lambda points: mean
    basis = basis[:modes].reshape(modes, *mean.shape)
    covering = _covering(len(mean), faces)
    covered = np.stack([covering @ mode for mode in basis])

    def fit(points: np.ndarray) -> np.ndarray:
        b, centre = np.zeros(modes), covering @ mean
        for _ in range(rounds):
            nearest = KDTree(centre + np.tensordot(b, covered, 1)).query(points)[1]
            design = covered[:, nearest].reshape(modes, -1)
            b = np.linalg.solve(design @ design.T + noise**2 * np.diag(1 / variance), design @ (points - centre[nearest]).ravel())
        return mean + np.tensordot(b, basis, 1)

    return fit


# Pictures

_VIEWS = ((20.0, 25.0), (110.0, 60.0))
"""Turn about the vertical axis and tilt of the two looks, degrees."""


def _box(sample: Sample) -> tuple[np.ndarray, float]:
    """Middle and half the longest side of what is to be seen."""
    seen = torch.cat([sample["points"], sample["vertices"]]).numpy()
    low, high = seen.min(0), seen.max(0)
    return (low + high) / 2, float((high - low).max()) / 2


def _heat(share: float) -> tuple[int, int, int]:
    """White, orange, dark red."""
    stops = np.array([[245, 245, 245], [240, 150, 40], [110, 0, 20]])
    at = min(max(share, 0.0), 1.0) * 2
    low = min(int(at), 1)
    colour = stops[low] + (at - low) * (stops[low + 1] - stops[low])
    return (int(colour[0]), int(colour[1]), int(colour[2]))


def rendered(
    vertices: Float[np.ndarray, "n 3"] | None,
    faces: np.ndarray,
    points: Tensor | None,
    box: tuple[np.ndarray, float],
    error: Float[np.ndarray, " n"] | None = None,
    side: int = 200,
) -> Picture:
    """A mesh from two sides, the far triangles first; points are dots, and those behind the mesh are hidden by it."""
    middle, half = box
    sheet = PIL.Image.new("RGB", (2 * side, side), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    light = np.array([0.3, -0.4, 0.85])
    for look, (turn, tilt) in enumerate(_VIEWS):
        a, b = math.radians(turn), math.radians(tilt)
        right = np.array([math.cos(a), math.sin(a), 0.0])
        towards = np.array([math.sin(a) * math.cos(b), -math.cos(a) * math.cos(b), math.sin(b)])
        camera = np.stack([right, np.cross(towards, right), towards])  # right, up, towards the eye

        def seen(places: np.ndarray, camera: np.ndarray = camera, look: int = look) -> np.ndarray:
            x, y, depth = camera @ ((places - middle) / (1.6 * half)).T
            return np.stack([(x + 0.5 + look) * side, (0.5 - y) * side, depth], 1)

        things: list[tuple[float, Callable[[], None]]] = []
        if vertices is not None:
            corners, normal = seen(vertices)[faces], np.cross(*np.moveaxis(np.diff(vertices[faces], axis=1), 1, 0))
            normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
            shade = 0.55 + 0.45 * np.abs(normal @ (camera.T @ light))
            for i, corner in enumerate(corners):
                base = np.array((150, 185, 215) if error is None else _heat(float(error[faces[i]].mean()) / WORST))
                fill = tuple(int(c) for c in base * shade[i])
                flat = [(float(x), float(y)) for x, y in corner[:, :2]]
                things.append((float(corner[:, 2].mean()), lambda flat=flat, fill=fill: draw.polygon(flat, fill=fill)))
        for x, y, depth in seen(points.numpy()) if points is not None else ():
            spot = (float(x) - 1, float(y) - 1, float(x) + 1, float(y) + 1)
            things.append((float(depth) + 0.02, lambda spot=spot: draw.ellipse(spot, fill=(200, 40, 30))))
        for _, paint in sorted(things, key=lambda thing: thing[0]):
            paint()
    return np.array(sheet)
