"""Makes this pack: ``python make.py`` writes ``meshes.npz`` and ``splits.json`` here. Needs numpy and paperworks; the same numbers every time.

A left ventricle as a cup: an outer and an inner wall of 16 meridians, closed at the base by a rim. Every case draws sizes, wall thickness, the
bulge of the right ventricle, a bend, a twist, a local thickening or thinning and smooth waves; then it is tilted, and cut by planes 9 mm
apart as a short-axis scan cuts a heart. Each contour is shifted within its plane (breathing) and its points are disturbed (drawing).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from paperworks.data.meshes import Mesh, cut, is_closed

CASES, VALIDATION = 190, 40
MERIDIANS, OUTER, INNER = 16, 8, 6
GAP, SPACING, SHIFT, JITTER = 9.0, 5.0, 1.0, 0.5
"""Millimetres: between planes, between points, standard deviations of a contour's shift and of a point's error."""


def faces() -> np.ndarray:
    """Apex, rings up the outer wall, rings down the inner wall, inner apex."""
    found, rings = [], OUTER + INNER
    ring = lambda r, k: 1 + r * MERIDIANS + k % MERIDIANS  # noqa: E731
    last = 1 + rings * MERIDIANS
    for k in range(MERIDIANS):
        found += [(0, ring(0, k + 1), ring(0, k)), (last, ring(rings - 1, k), ring(rings - 1, k + 1))]
        for r in range(rings - 1):
            a, b, c, d = ring(r, k), ring(r, k + 1), ring(r + 1, k), ring(r + 1, k + 1)
            found += [(a, b, c), (b, d, c)]
    return np.array(found)


def waves(rng: np.random.Generator, height: np.ndarray, angle: np.ndarray, size: float) -> np.ndarray:
    """A smooth random function on the wall, with a standard deviation of about ``size``."""
    total = np.zeros_like(height)
    for m in range(4):
        for n in range(3):
            a, b = rng.normal(0, size / (1 + m + n), 2)
            total += np.cos(n * np.pi * height) * (a * np.cos(m * angle) + b * np.sin(m * angle))
    return 0.6 * total


def shape(rng: np.random.Generator) -> np.ndarray:
    """Vertices of one case in millimetres, the long axis about z."""
    up = np.concatenate([np.linspace(0, 1, OUTER + 1)[1:], np.linspace(1, 0, INNER + 1)[:-1]])
    height = np.concatenate([[0.0], np.repeat(up, MERIDIANS), [0.0]])
    angle = np.concatenate([[0.0], np.tile(2 * np.pi * np.arange(MERIDIANS) / MERIDIANS, OUTER + INNER), [0.0]])
    outside = np.arange(len(height)) <= OUTER * MERIDIANS
    length, radius = rng.normal(84, 7), rng.normal(35, 3.5)
    wall = np.clip(rng.normal(10, 2), 5.5, 15) + waves(rng, height, angle, 0.8)
    centre_h, centre_a = rng.uniform(0.2, 0.9), rng.uniform(0, 2 * np.pi)
    apart = ((height - centre_h) / 0.25) ** 2 + (2 * np.sin((angle - centre_a) / 2) / 0.8) ** 2
    wall = np.clip(wall + rng.normal(0, 2.5) * np.exp(-apart), 3.5, 18)  # an old infarct is thin, a hypertrophy thick
    polar = height * np.radians(rng.normal(108, 5))  # 0 at the apex, beyond 90 degrees the cup narrows again
    bulge = rng.normal(12, 3) * np.exp(3 * (np.cos(angle) - 1)) * np.sin(polar) ** 2 * np.exp(-(((height - 0.75) / 0.35) ** 2))
    across = radius * (1 + rng.normal(0, 0.05) * np.cos(2 * angle)) + waves(rng, height, angle, 1.0)
    across = across * np.sin(polar) + np.where(outside, bulge, -wall * np.sin(np.minimum(polar, np.pi / 2)))
    along = -length * 0.62 * np.cos(polar) + np.where(outside, 0.0, wall * np.cos(np.minimum(polar, np.pi / 2)))
    turn = angle + np.radians(rng.normal(0, 8)) * (height - 0.5)
    x, y = across * np.cos(turn), across * np.sin(turn)
    x += rng.normal(0, 5) * (height - 0.4) ** 2  # bend
    vertices = np.stack([x, y, along], 1)
    tilt, roll = np.radians(rng.normal(0, 7, 2)), np.radians(rng.normal(0, 7))
    return (vertices @ rotation(*tilt, roll).T).astype(np.float32)


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """About the three axes, one after another."""
    (a, b), (c, d), (e, f) = ((np.cos(t), np.sin(t)) for t in (x, y, z))
    about_x, about_y = np.array([[1, 0, 0], [0, a, -b], [0, b, a]]), np.array([[c, 0, d], [0, 1, 0], [-d, 0, c]])
    return np.array([[e, -f, 0], [f, e, 0], [0, 0, 1]]) @ about_y @ about_x


def contours(rng: np.random.Generator, mesh: Mesh) -> np.ndarray:
    """What a reader of the scan would draw."""
    low, high = mesh.vertices[:, 2].min(), mesh.vertices[:, 2].max()
    planes = []
    for z in np.arange(low + rng.uniform(0.15, 1) * GAP, high, GAP):
        points = cut(mesh, [z], SPACING)
        if len(points) < 6:
            continue
        points[:, :2] += rng.normal(0, SHIFT, 2) + rng.normal(0, JITTER, (len(points), 2))
        planes.append(points)
    return np.concatenate(planes)


def main() -> None:
    """Write the pack beside this file."""
    rng = np.random.default_rng(2021)
    triangles = faces()
    assert is_closed(triangles)
    vertices = np.stack([shape(rng) for _ in range(CASES)]).astype(np.float16)
    clouds = [contours(rng, Mesh(v.astype(np.float32), triangles)) for v in vertices]
    names = [f"{i:03d}" for i in range(CASES)]
    folder = Path(__file__).parent
    np.savez_compressed(
        folder / "meshes.npz",
        vertices=vertices,
        faces=triangles.astype(np.int16),
        points=np.concatenate(clouds).astype(np.float16),
        case=np.repeat(np.arange(CASES), [len(c) for c in clouds]).astype(np.int16),
        names=np.array(names),
    )
    split = {"train": names[:-VALIDATION], "val": names[-VALIDATION:]}
    (folder / "splits.json").write_text(json.dumps(split) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
