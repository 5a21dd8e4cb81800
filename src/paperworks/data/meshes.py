"""Triangle meshes and point clouds: files (PLY, OBJ, CSV, XYZ, NPZ), and what can be computed of them.

A data set is a population of one shape: every mesh has the same vertices (in the same order) and the same faces, so that vertex i of one case is
the place of vertex i of another. Ways to lay it out::

    meshes/NAME.ply|obj   points/NAME.csv|xyz|ply   [template.ply|obj]     a mesh and its contour points a case
    anything.npz          vertices (cases n 3), faces (F 3) [points (P 3), case (P), names (cases), template (n 3)]

Where there are no contour points, meshes are cut by planes of equal z. Lengths are millimetres. ``splits.json`` says what is for validation.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from paperworks.data.layouts import Item, Problem
from paperworks.data.nifti import is_volume, read_geometry, read_labels
from paperworks.data.packs import source_path
from paperworks.data.splits import assign
from paperworks.errors import InputError
from paperworks.files import atomic

MESH_SUFFIXES = (".ply", ".obj")
POINT_SUFFIXES = (".csv", ".xyz", *MESH_SUFFIXES)
SLICES = 10
"""Planes that cut a mesh which came without contours."""
LARGEST = 20_000
"""Vertices of a mesh that is learnt from; beyond that it should be decimated."""

Points = Float[np.ndarray, "_ 3"]
Faces = Int[np.ndarray, "_ 3"]


@dataclass(frozen=True)
class Mesh:
    """Vertices in millimetres and the triangles between them."""

    vertices: Points
    faces: Faces


# --- Files


def read_mesh(path: Path) -> Mesh:
    """A PLY (text or binary) or OBJ file; polygons are cut into triangles.

    Raises:
        InputError: the file is broken, has no faces, or a number is not finite.
    """
    vertices, faces = _read(path)
    if not len(faces):
        raise InputError(f"{path} has vertices and no faces; save the mesh with its triangles")
    return Mesh(vertices, faces)


def read_points(path: Path) -> Points:
    """Points of a file: CSV with columns x, y, z, lines of three numbers (XYZ), the vertices of a mesh, or outlines of the labels of a NIfTI volume.

    Raises:
        InputError: the file is broken, holds no points, lacks a column, or a number is not finite.
    """
    if is_volume(path):
        return outlines(path)
    if path.suffix.lower() in MESH_SUFFIXES:
        return _read(path)[0]
    text = _bytes(path).decode("utf-8-sig", "replace")
    rows = list(csv.reader(io.StringIO(text))) if path.suffix.lower() == ".csv" else [line.split() for line in text.splitlines()]
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise InputError(f"{path} is empty; give lines of x, y, z in millimetres")
    columns, first = [0, 1, 2], 0
    if not _is_number(rows[0][0]):
        header, first = [cell.strip().lower() for cell in rows[0]], 1
        if missing := [axis for axis in "xyz" if axis not in header]:
            raise InputError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(header)}")
        columns = [header.index(axis) for axis in "xyz"]
    values = []
    for number, row in enumerate(rows[first:], start=first + 1):
        try:
            values.append([float(row[column]) for column in columns])
        except (ValueError, IndexError):
            raise InputError(f"{path}, line {number}: {' '.join(row)[:60]!r} is no x, y, z") from None
    return _finite(np.array(values).reshape(-1, 3), path)


def write_mesh(path: Path, mesh: Mesh) -> None:
    """Write PLY (binary, single precision) or OBJ, by the ending."""
    vertices, faces = np.asarray(mesh.vertices, "<f4"), np.asarray(mesh.faces)
    if path.suffix.lower() == ".obj":
        lines = [*("v {:.6g} {:.6g} {:.6g}".format(*v) for v in vertices), *("f {} {} {}".format(*(f + 1)) for f in faces)]
        content = "\n".join(lines).encode() + b"\n"
    else:
        header = (
            f"ply\nformat binary_little_endian 1.0\ncomment millimetres\nelement vertex {len(vertices)}\nproperty float x\nproperty float y\n"
            f"property float z\nelement face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
        )
        rows = np.empty(len(faces), [("n", "u1"), ("v", "<i4", 3)])
        rows["n"], rows["v"] = 3, faces
        content = header.encode() + vertices.tobytes() + rows.tobytes()
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_points(path: Path, points: Points) -> None:
    """Write CSV with columns x, y, z."""
    with atomic(path) as temporary:
        np.savetxt(temporary, points, "%.4f", ",", header="x,y,z", comments="")


def outlines(path: Path) -> Points:
    """Outlines of each label of a NIfTI volume, slice by slice across its thickest axis, in the patient's millimetres.

    Raises:
        InputError: the file is broken, or there is nothing but background.
    """
    import contourpy

    labels, geometry = read_labels(path), read_geometry(path)
    axis = int(np.argmax(geometry.spacing))
    found = []
    for index, plane in enumerate(np.moveaxis(labels, axis, 0)):
        for value in np.unique(plane[plane > 0]):
            inside = np.pad((plane == value).astype(np.float32), 1)
            for line in contourpy.contour_generator(z=inside).lines(0.5):
                across = np.asarray(line)[:, ::-1] - 1  # rows, columns of the plane without its border
                found.append(np.insert(across, axis, index, axis=1))
    if not found:
        raise InputError(f"{path} is background everywhere; give a volume of labels (0 is background)")
    places = np.concatenate(found)
    return (np.c_[places, np.ones(len(places))] @ geometry.affine.T)[:, :3]


_PLY = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}


def _read(path: Path) -> tuple[Points, Faces]:
    content = _bytes(path)
    try:
        vertices, polygons = _read_ply(content) if content.startswith(b"ply") else _read_obj(content)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError):
        raise InputError(f"{path} is no PLY or OBJ file that can be read, or is cut short; export the mesh again") from None
    vertices = _finite(vertices, path)
    faces = np.array([(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)], np.int64).reshape(-1, 3)
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise InputError(f"{path} has a face at vertex {faces.max()} where there are {len(vertices)}; export the mesh again")
    return vertices, faces


def _read_ply(content: bytes) -> tuple[np.ndarray, list[list[int]]]:
    """Vertices and polygons; what else the file keeps of them is skipped."""
    head, _, body = content.partition(b"end_header")
    body = body.split(b"\n", 1)[1]  # a carriage return may stand before it
    form, elements = "", []
    for words in (line.split() for line in head.decode("ascii").splitlines()):
        if words[:1] == ["format"]:
            form = words[1]
        elif words[:1] == ["element"]:
            elements.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"]:
            elements[-1][2].append(words[1:])
    order = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}[form]
    tokens = np.array(body.split(), np.float64) if form == "ascii" else None
    at = 0

    def take(kind: str, count: int) -> np.ndarray:
        nonlocal at
        values = tokens[at : at + count] if tokens is not None else np.frombuffer(body, order + _PLY[kind], count, at)
        at += count if tokens is not None else values.nbytes
        if len(values) < count:
            raise ValueError(kind)
        return values

    vertices, polygons = np.empty((0, 3)), []
    for name, count, properties in elements:
        names = [p[-1] for p in properties]
        if not any(p[0] == "list" for p in properties):  # a table: all rows at once
            if tokens is not None:
                table = take("", count * len(names)).reshape(count, len(names))
                columns = dict(zip(names, table.T))
            else:
                table = np.frombuffer(body, [(p[-1], order + _PLY[p[0]]) for p in properties], count, at)
                at += table.nbytes
                columns = {column: table[column] for column in names}
            if name == "vertex":
                vertices = np.stack([columns[axis] for axis in "xyz"], 1).astype(np.float64)
            continue
        for _ in range(count):
            row = {p[-1]: take(p[2], int(take(p[1], 1)[0])) if p[0] == "list" else take(p[0], 1) for p in properties}
            if name == "face":
                polygons.append(row["vertex_indices" if "vertex_indices" in row else "vertex_index"].astype(int).tolist())
    return vertices, polygons


def _read_obj(content: bytes) -> tuple[np.ndarray, list[list[int]]]:
    """Lines ``v x y z`` and ``f a/b/c ...``; indices count from 1, or from the end where they are negative."""
    vertices, polygons = [], []
    for words in (line.split() for line in content.decode("utf-8").splitlines()):
        if words[:1] == ["v"]:
            vertices.append([float(value) for value in words[1:4]])
        elif words[:1] == ["f"]:
            corners = [int(word.split("/")[0]) for word in words[1:]]
            polygons.append([c - 1 if c > 0 else len(vertices) + c for c in corners])
    if not vertices:
        raise ValueError
    return np.array(vertices), polygons


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def _finite(values: np.ndarray, path: Path) -> Points:
    if not len(values):
        raise InputError(f"{path} holds no points")
    if not np.isfinite(values).all():
        raise InputError(f"{path} has coordinates that are NaN or infinite; correct them")
    return values.astype(np.float32)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


# --- Geometry


def edges_of(faces: Faces) -> Int[np.ndarray, "E 2"]:
    """Every edge once, the smaller index first."""
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return np.unique(np.sort(sides, axis=1), axis=0)


def volume(mesh: Mesh) -> float:
    """Enclosed volume of a closed mesh in cubic millimetres, by the divergence theorem."""
    a, b, c = np.moveaxis(mesh.vertices.astype(np.float64)[mesh.faces], 1, 0)
    return abs(float((a * np.cross(b, c)).sum())) / 6


def is_closed(faces: Faces) -> bool:
    """Whether every edge belongs to two faces, which run along it in opposite directions."""
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forward = {tuple(side) for side in sides.tolist()}
    return len(forward) == len(sides) and all((b, a) in forward for a, b in forward)


def surface(mesh: Mesh) -> Float[np.ndarray, "m 3"]:
    """Points that cover a mesh: its vertices, the middles of its edges and of its faces, and of the four parts of each face."""
    corners = mesh.vertices[mesh.faces]
    weights = np.array([[4, 1, 1], [1, 4, 1], [1, 1, 4], [2, 2, 2]], np.float32) / 6
    inner = np.einsum("pk,fkd->fpd", weights, corners).reshape(-1, 3)
    return np.concatenate([mesh.vertices, mesh.vertices[edges_of(mesh.faces)].mean(1), inner])


def cut(mesh: Mesh, heights: Sequence[float] | Float[np.ndarray, " k"], spacing: float = 3.0) -> Points:
    """Contours: where planes of equal z meet the mesh, as points about ``spacing`` apart."""
    found = []
    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    for height in heights:
        above = corners[:, :, 2] > height
        crossed = corners[above.any(1) & ~above.all(1)]
        ends = []
        for a, b in ((0, 1), (1, 2), (2, 0)):
            start, step = crossed[:, a], crossed[:, b] - crossed[:, a]
            flat = (start[:, 2] > height) == (crossed[:, b, 2] > height)  # this side is not crossed
            share = np.where(flat, np.nan, (height - start[:, 2]) / np.where(flat, 1, step[:, 2]))
            ends.append(start + share[:, None] * step)
        lines = np.stack(ends, 1)
        lines = lines[~np.isnan(lines[..., 0])].reshape(-1, 2, 3)  # two of the three sides are
        length = np.linalg.norm(lines[:, 1] - lines[:, 0], axis=1)
        along = np.concatenate([[0.0], np.cumsum(length)])
        at = np.arange(spacing / 2, along[-1], spacing)
        line = np.searchsorted(along, at, "right") - 1
        share = ((at - along[line]) / length[line])[:, None]
        found.append(lines[line, 0] * (1 - share) + lines[line, 1] * share)
    points = np.concatenate(found) if found else np.empty((0, 3))
    return points.astype(np.float32)


def slices_of(points: Points) -> list[Bool[np.ndarray, "n"]]:
    """Which points lie on each plane of equal z, from the lowest; all points on one where there are no such planes."""
    heights = np.round(points[:, 2], 2)
    found = np.unique(heights)
    return [heights == z for z in found] if 4 * len(found) <= len(points) else [np.ones(len(points), bool)]


# --- Data sets


@dataclass(frozen=True)
class Case:
    """A shape and the contour points from which it is to be rebuilt."""

    name: str
    load: Callable[[], tuple[Points, Points]]
    """Points, and the true vertices."""
    points: Path | None
    """The file of its points, where there is one."""


@dataclass
class Population:
    """A data set of meshes in correspondence."""

    source: str
    faces: Faces
    train: list[Case]
    val: list[Case]
    sha256: str
    template: Points | None = None
    """Vertices of a template, where the data have one."""
    problems: list[Problem] = field(default_factory=list)


def looks_like_meshes(path: Path) -> bool:
    """Whether a folder is laid out as a population, by names alone."""
    return path.is_dir() and ((path / "meshes").is_dir() or (path / "meshes.npz").is_file() or _template(path) is not None)


def open_meshes(source: str | Path) -> Population:
    """Open a folder or an ``.npz`` file.

    Raises:
        InputError: there are no meshes, or they do not correspond.
    """
    path = source_path(source)
    arrays = path if path.suffix == ".npz" else path / "meshes.npz" if (path / "meshes.npz").is_file() else None
    if arrays is not None:
        names, load, faces, template, problems, files = _from_arrays(arrays)
        places = dict.fromkeys(names)
    elif path.is_dir():
        places, load, faces, template, problems, files = _from_folder(path)
        names = list(places)
    else:
        raise InputError(f"{path} is neither a folder of meshes nor an .npz file with vertices and faces")
    root = arrays.parent if arrays is not None else path
    items, said = assign([Item(name=name, images=(root / name,)) for name in names], root)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    digest.update(repr([(item.name, item.split) for item in items]).encode())
    by = {split: [Case(i.name, load(i.name), places[i.name]) for i in items if i.split == split] for split in ("train", "val")}
    if not by["train"] or not by["val"]:
        raise InputError(
            f"{source}: {len(by['train'])} shapes to train on and {len(by['val'])} to validate; add some, or write splits.json"
        )
    return Population(str(source), faces, by["train"], by["val"], digest.hexdigest(), template, [*problems, *said])


def _from_arrays(path: Path) -> tuple:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as arrays ({' '.join(str(error).split())[:80]})") from None
    if missing := [key for key in ("vertices", "faces") if key not in arrays]:
        raise InputError(f"{path} has no array {missing[0]!r}; give vertices (cases, n, 3) and faces (F, 3)")
    vertices, faces = arrays["vertices"], arrays["faces"].astype(np.int64)
    if vertices.ndim != 3 or vertices.shape[2] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise InputError(f"{path}: vertices are {vertices.shape} and faces {faces.shape}; they must be (cases, n, 3) and (F, 3)")
    _check(vertices.shape[1], faces, path)
    _finite(vertices.reshape(-1, 3), path)
    names = [str(n) for n in arrays["names"]] if "names" in arrays else [f"{i:04d}" for i in range(len(vertices))]
    if len(set(names)) != len(vertices):
        raise InputError(f"{path}: {len(set(names))} different names for {len(vertices)} cases; give one to each")
    if ("points" in arrays) != ("case" in arrays) or len(arrays.get("points", ())) != len(arrays.get("case", ())):
        raise InputError(f"{path}: points (P, 3) and case (P), the index of each point's case, go together")
    if "points" in arrays:
        _finite(arrays["points"].reshape(-1, 3), path)
        if empty := sorted(set(range(len(names))) - set(arrays["case"].tolist())):
            raise InputError(f"{path}: case {names[empty[0]]!r} has no points")
    index = {name: i for i, name in enumerate(names)}

    def load(name: str) -> Callable[[], tuple[Points, Points]]:
        def read() -> tuple[Points, Points]:
            shape = vertices[index[name]].astype(np.float32)
            if "points" not in arrays:
                return _contours(Mesh(shape, faces)), shape
            return arrays["points"][arrays["case"] == index[name]].astype(np.float32), shape

        return read

    template = arrays["template"].astype(np.float32) if "template" in arrays else None
    if template is not None and template.shape != vertices.shape[1:]:
        raise InputError(f"{path}: the template is {template.shape}, a case {vertices.shape[1:]}; they must correspond")
    return names, load, faces, template, [], [path]


def _from_folder(root: Path) -> tuple:
    meshes = {p.stem: p for p in sorted((root / "meshes").glob("*")) if p.suffix.lower() in MESH_SUFFIXES}
    if not meshes:
        raise InputError(
            f"{root / 'meshes'} holds no .ply or .obj files; put the true meshes there, and their contours into {root / 'points'}"
        )
    points = {p.stem: p for p in sorted((root / "points").glob("*")) if p.suffix.lower() in POINT_SUFFIXES}
    problems = [Problem(p, "has no mesh of its name", "add it to meshes/, or remove this") for n, p in points.items() if n not in meshes]
    if points:
        problems += [Problem(p, "has no points of its name", "add them to points/") for n, p in meshes.items() if n not in points]
        meshes = {name: p for name, p in meshes.items() if name in points}
    place = _template(root)
    first = read_mesh(place if place is not None else next(iter(meshes.values())))
    _check(len(first.vertices), first.faces, root)

    def load(name: str) -> Callable[[], tuple[Points, Points]]:
        def read() -> tuple[Points, Points]:
            mesh = read_mesh(meshes[name])
            if len(mesh.vertices) != len(first.vertices):
                raise InputError(
                    f"{meshes[name]} has {len(mesh.vertices)} vertices where the others have {len(first.vertices)}; vertices must correspond"
                )
            return (read_points(points[name]) if name in points else _contours(mesh)), mesh.vertices

        return read

    files = [*meshes.values(), *points.values(), *([place] if place is not None else [])]
    found = {name: points.get(name) for name in meshes}
    return found, load, first.faces, first.vertices if place is not None else None, problems, files


def _template(root: Path) -> Path | None:
    return next((p for p in (root / f"template{suffix}" for suffix in MESH_SUFFIXES) if p.is_file()), None)


def _check(vertices: int, faces: Shaped[np.ndarray, "F 3"], path: Path) -> None:
    if not len(faces) or faces.min() < 0 or faces.max() >= vertices:
        raise InputError(f"{path}: faces name vertices from {faces.min(initial=0)} to {faces.max(initial=0)} where there are {vertices}")
    if vertices > LARGEST:
        raise InputError(f"{path}: {vertices:,} vertices are more than {LARGEST:,}; decimate the template and what corresponds to it")


def _contours(mesh: Mesh) -> Points:
    low, high = mesh.vertices[:, 2].min(), mesh.vertices[:, 2].max()
    return cut(mesh, low + (high - low) * (np.arange(SLICES) + 0.5) / SLICES, spacing=float(high - low) / 30)
