"""The task of meshes from contours: files of meshes and points, geometry, the reader, scores, baselines, predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from paperworks.data.meshes import (
    Mesh,
    cut,
    edges_of,
    is_closed,
    open_meshes,
    outlines,
    read_mesh,
    read_points,
    slices_of,
    surface,
    volume,
    write_mesh,
    write_points,
)
from paperworks.errors import InputError
from paperworks.tasks import guess
from paperworks.tasks.base import Grid
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.meshes import DROPPED, Meshes, MeshScores, Vary, affine_fit, resampled, shape_model, sphere, without

CUBE = np.array([[x, y, z] for x in (0, 2) for y in (0, 3) for z in (0, 5)], float)
CUBE_FACES = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 7, 5], [4, 6, 7], [0, 5, 1], [0, 4, 5], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
)


def stretched(rng: np.random.Generator, radius: float = 30.0) -> np.ndarray:
    return sphere().vertices * radius * rng.uniform(0.7, 1.3, 3).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve stretched spheres with the points of their contours, and a template."""
    root, rng = tmp_path_factory.mktemp("spheres"), np.random.default_rng(0)
    for name in ("meshes", "points"):
        (root / name).mkdir()
    for i in range(12):
        mesh = Mesh(stretched(rng) + 5 * i, sphere().faces)
        write_mesh(root / "meshes" / f"case {i:02d}.ply", mesh)
        low, high = mesh.vertices[:, 2].min(), mesh.vertices[:, 2].max()
        write_points(root / "points" / f"case {i:02d}.csv", cut(mesh, np.linspace(low + 3, high - 3, 7), 4.0))
    write_mesh(root / "template.obj", Mesh(30 * sphere().vertices + 100, sphere().faces))
    (root / "splits.json").write_text(
        json.dumps({"train": [f"case {i:02d}" for i in range(8)], "val": [f"case {i:02d}" for i in range(8, 12)]})
    )
    return root


@pytest.fixture(scope="module")
def data(folder: Path) -> Meshes:
    return Meshes(folder)


# --- Files


@pytest.mark.parametrize("ending", ["ply", "obj"])
def test_meshes_come_back_from_files(tmp_path, ending):
    write_mesh(tmp_path / f"a.{ending}", Mesh(CUBE, CUBE_FACES))
    found = read_mesh(tmp_path / f"a.{ending}")
    assert np.allclose(found.vertices, CUBE) and np.array_equal(found.faces, CUBE_FACES)
    assert np.allclose(read_points(tmp_path / f"a.{ending}"), CUBE)


def test_text_ply_with_other_properties_and_polygons(tmp_path):
    (tmp_path / "a.ply").write_text(
        "ply\r\nformat ascii 1.0\r\ncomment of a person\r\nelement vertex 4\r\nproperty float x\r\nproperty float y\r\nproperty float z\r\n"
        "property uchar red\r\nelement face 1\r\nproperty list uchar int vertex_index\r\nend_header\r\n"
        "0 0 0 9\r\n1 0 0 9\r\n1 1 0 9\r\n0 1 0 9\r\n4 0 1 2 3\r\n"
    )
    mesh = read_mesh(tmp_path / "a.ply")
    assert mesh.vertices.tolist()[2] == [1, 1, 0] and mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]]


def test_binary_ply_of_either_order_and_double_precision(tmp_path):
    for order, word in (("<", "little"), (">", "big")):
        head = (
            f"ply\nformat binary_{word}_endian 1.0\nelement vertex 3\nproperty double x\nproperty double y\nproperty double z\n"
            "property uchar alpha\nelement face 1\nproperty list uchar uint vertex_indices\nproperty float quality\nend_header\n"
        )
        rows = b"".join(np.array([i, 2, 3], order + "f8").tobytes() + b"\x07" for i in range(3))
        face = b"\x03" + np.array([0, 1, 2], order + "u4").tobytes() + np.array([0.5], order + "f4").tobytes()
        (tmp_path / "a.ply").write_bytes(head.encode() + rows + face)
        mesh = read_mesh(tmp_path / "a.ply")
        assert mesh.vertices[:, 0].tolist() == [0, 1, 2] and mesh.faces.tolist() == [[0, 1, 2]]


def test_obj_with_textures_and_negative_indices(tmp_path):
    (tmp_path / "a.obj").write_text("# a triangle\nv 0 0 0\nv 1 0 0\nvt 0 0\nv 0 1 0\nf 1/1/1 -2//2 3\n")
    assert read_mesh(tmp_path / "a.obj").faces.tolist() == [[0, 1, 2]]


def test_points_of_text_files(tmp_path):
    (tmp_path / "a.csv").write_text("slice, z, x, y\n1, 3, 1, 2\n1, 6, 4, 5\n")
    (tmp_path / "a.xyz").write_text("1 2 3\n4 5 6 0.5\n")
    for name in ("a.csv", "a.xyz"):
        assert read_points(tmp_path / name).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "x,y,height\n1,2,3\n", "no column 'z'"),
        ("a.csv", "x,y,z\n1,2,3\n1,two,3\n", "line 3"),
        ("a.xyz", "1 2\n", "line 1"),
        ("a.xyz", "1 2 nan\n", "NaN"),
        (
            "a.ply",
            "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 0 0\n",
            "cut short",
        ),
        ("a.ply", "ply\nformat odd 1.0\nend_header\n", "no PLY"),
        ("a.obj", "hello\n", "no PLY or OBJ"),
    ],
)
def test_bad_files_are_told_in_a_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        read_points(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_meshes_need_faces_that_exist(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\n")
    with pytest.raises(InputError, match="no faces"):
        read_mesh(tmp_path / "a.obj")
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nf 1 2 7\n")
    with pytest.raises(InputError, match="face at vertex 6"):
        read_mesh(tmp_path / "a.obj")
    with pytest.raises(InputError, match="cannot be read"):
        read_mesh(tmp_path / "none.obj")


def test_outlines_of_labels_lie_in_the_patient(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((20, 24, 6), np.uint8)
    x, y = np.mgrid[:20, :24]
    labels[(x - 10) ** 2 + (y - 12) ** 2 < 36, 1:5] = 1
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([2.0, 2.0, 8.0, 1.0])), path)
    points = outlines(path)
    assert sorted(set(points[:, 2].round(3))) == [8, 16, 24, 32]
    radius = np.linalg.norm(points[:, :2] - [20, 24], axis=1)
    assert radius.min() > 9 and radius.max() < 13
    nibabel.save(nibabel.Nifti1Image(0 * labels, np.eye(4)), path)
    with pytest.raises(InputError, match="background"):
        outlines(path)


# --- Geometry


def test_volume_edges_and_closedness():
    cube = Mesh(CUBE + 7, CUBE_FACES)
    assert math.isclose(volume(cube), 30, rel_tol=1e-6)
    assert is_closed(CUBE_FACES) and not is_closed(CUBE_FACES[1:]) and len(edges_of(CUBE_FACES)) == 18
    ball = sphere(4)
    assert is_closed(ball.faces) and math.isclose(volume(ball), 4 / 3 * math.pi, rel_tol=0.02)
    assert len(ball.vertices) - len(edges_of(ball.faces)) + len(ball.faces) == 2
    assert len(surface(cube)) == 8 + 18 + 4 * 12


def test_cutting_a_ball_gives_circles():
    ball = Mesh(10 * sphere(4).vertices, sphere(4).faces)
    points = cut(ball, [-6.0, 1.0], 0.5)
    assert [len(p) for p in (slices_of(points))] == [len(points)] * 2
    for height, chosen in zip((-6.0, 1.0), slices_of(points)):
        circle = points[chosen]
        assert np.allclose(circle[:, 2], height, atol=1e-5)
        assert np.allclose(np.linalg.norm(circle[:, :2], axis=1), math.sqrt(100 - height**2), rtol=0.01)
        assert abs(chosen.sum() * 0.5 / (2 * math.pi * math.sqrt(100 - height**2)) - 1) < 0.02
    assert len(cut(ball, [20.0])) == 0
    assert len(slices_of(np.random.default_rng(0).normal(size=(50, 3)))) == 1, "a cloud has no planes"


# --- Data sets


def test_folder_is_a_population(data, folder):
    assert guess(folder) == "meshes" and Meshes.recognises(folder)
    assert len(data.train) == 8 and len(data.val) == 4 * len(DROPPED)
    assert data.spec.channels == 3 and data.spec.mean == (0.0, 0.0, 0.0)
    template = np.array(data.spec.more["template"])
    assert np.allclose(np.ptp(template, axis=0), 60, atol=1), "the template's own size, in the contours' place"
    assert np.abs(template.mean(0)).max() < 6
    found = data.describe()
    assert found["vertices"] == 66 and found["closed"] and found["slices"] == 7 and not found["problems"]


def test_arrays_are_a_population_and_are_cut_where_they_have_no_points(tmp_path):
    rng = np.random.default_rng(0)
    shapes = np.stack([stretched(rng) for _ in range(6)])
    np.savez(tmp_path / "hearts.npz", vertices=shapes, faces=sphere().faces)
    data = Meshes(tmp_path / "hearts.npz")
    points, truth = data.train[0].case.load()
    assert len(slices_of(points)) == 10 and truth.shape == (66, 3)
    near = np.linalg.norm(points[:, None] - surface(Mesh(truth, sphere().faces))[None], axis=2).min(1)
    assert near.max() < 4
    assert data.sample(data.val[0])["vertices"].shape == (66, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop("faces"), "no array 'faces'"),
        (lambda a: a.update(vertices=a["vertices"][0]), "must be"),
        (lambda a: a.update(faces=a["faces"] + 3), "faces name vertices"),
        (lambda a: a.update(names=np.array(["x"] * 6)), "different names"),
        (lambda a: a.update(points=np.zeros((4, 3))), "go together"),
        (lambda a: a.update(points=np.zeros((4, 3)), case=np.zeros(4, int)), "has no points"),
        (lambda a: a.update(template=np.zeros((5, 3))), "must correspond"),
        (lambda a: a["vertices"].__setitem__((0, 0, 0), np.nan), "NaN"),
        (lambda a: a.update(vertices=a["vertices"][:1]), "to validate"),
    ],
)
def test_bad_arrays_are_told_in_a_line(tmp_path, change, said):
    rng = np.random.default_rng(0)
    arrays = {"vertices": np.stack([stretched(rng) for _ in range(6)]), "faces": sphere().faces}
    change(arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=said):
        Meshes(tmp_path / "a.npz")


def test_bad_folders(tmp_path):
    (tmp_path / "meshes").mkdir()
    with pytest.raises(InputError, match=r"holds no \.ply or \.obj"):
        Meshes(tmp_path)
    for i in range(4):
        write_mesh(tmp_path / "meshes" / f"{i}.ply", Mesh(CUBE, CUBE_FACES) if i < 3 else sphere())
    with pytest.raises(InputError, match="must correspond"):
        for case in (p := open_meshes(tmp_path)).train + p.val:
            case.load()
    (tmp_path / "points").mkdir()
    write_points(tmp_path / "points" / "0.csv", CUBE)
    write_points(tmp_path / "points" / "1.csv", CUBE)
    write_points(tmp_path / "points" / "9.csv", CUBE)
    assert len(open_meshes(tmp_path).problems) == 3
    (tmp_path / "broken.npz").write_bytes(b"PK no")
    with pytest.raises(InputError, match="cannot be read as arrays"):
        Meshes(tmp_path / "broken.npz")


def test_missing_slices_follow_from_the_name(data):
    whole, less = data.sample(data.val[0]), data.sample(data.val[8])
    assert less["dropped"] == 4 and less["name"] == "case 08_less_4"
    count = [len(slices_of(s["points"].numpy())) for s in (whole, less)]
    assert count == [7, 3] and torch.equal(less["points"], data.sample(data.val[8])["points"])
    generator = torch.Generator().manual_seed(0)
    assert len(slices_of(without(whole["points"], 99, generator).numpy())) == 2, "two stay"


def test_training_samples_are_centred_and_turned_together(data):
    class R:
        augment = Vary(drop=3, turn=20.0)

    sample = data.training_sample(data.train[0], R, Grid(fixed=50), torch.Generator().manual_seed(2))
    assert sample["points"].shape == (3, 50) and sample["vertices"].shape == (3, 66)
    plain = data.sample(data.train[0])
    a, b = data.spec.std[0] * sample["vertices"].T.double().numpy(), plain["vertices"].double().numpy()
    turn, error = Rotation.align_vectors(a - a.mean(0), b - b.mean(0))
    assert error < 1e-3 and abs(turn.as_rotvec()[2]) > 0.01 and np.abs(turn.as_rotvec()[:2]).max() < 1e-4
    assert resampled(torch.rand(5, 3), 12, torch.Generator().manual_seed(0)).unique(dim=0).shape[0] == 5


# --- Scores and baselines


def test_scores_by_hand():
    truth = torch.from_numpy(CUBE)
    sample = {"name": "a", "vertices": truth, "dropped": 2}
    scores = MeshScores(CUBE_FACES)
    scores.update(truth + torch.tensor([0.5, 0, 0]), sample)
    found = scores.compute()
    assert math.isclose(found["vertex_error"], 0.5, rel_tol=1e-5) and found["vertex_error"] == found["vertex_error/2 slices missing"]
    assert math.isclose(found["chamfer"], 0.5, rel_tol=1e-5) and abs(found["volume_error"]) < 1e-4
    assert found["surface_distance"] < 0.5 + 1e-6 and found["hausdorff"] < 0.5 + 1e-6
    grown = MeshScores(CUBE_FACES)
    grown.update(truth * 1.1, sample)
    assert math.isclose(grown.compute()["volume_error"], 33.1, rel_tol=1e-4)
    open_mesh = MeshScores(CUBE_FACES[1:])
    open_mesh.update(truth, sample)
    assert math.isnan(open_mesh.compute()["volume_error"]) and open_mesh.per_item()[0]["vertex_error"] == 0


def test_fits_find_what_they_can_say():
    rng = np.random.default_rng(0)
    faces, mean = sphere(3).faces, 30 * sphere(3).vertices.astype(float)
    squeezed = mean * [1.15, 0.9, 1.0] + [2, 0, 1]
    points = surface(Mesh(squeezed, faces))
    before, after = (np.linalg.norm(x - squeezed, axis=1).mean() for x in (mean, affine_fit(mean, faces, hold=0.0)(points)))
    assert after < 0.4 * before, "nearest points slide along the surface, so a fit ends near and not there"
    mode = np.stack([mean[:, 0], 0 * mean[:, 0], 0 * mean[:, 0]], 1)
    shapes = np.stack([mean + 0.2 * c * mode for c in rng.normal(size=20)])
    wanted = mean + 0.3 * mode
    found = shape_model(shapes, faces)(surface(Mesh(wanted, faces))[::3])
    assert np.linalg.norm(found - wanted, axis=1).mean() < 0.3
    assert np.allclose(shape_model(shapes[:1], faces)(points), shapes[0]), "one shape has no modes"


def test_baselines_follow_the_contours(data):
    predict = data.baselines()
    sample = data.sample(data.val[0])
    for name in data.baseline_names:
        moved = predict[name](sample["points"] + 100) - predict[name](sample["points"])
        assert torch.allclose(moved, torch.tensor(100.0), atol=1e-2), name
    error = {name: data.evaluate(p)[0]["vertex_error"] for name, p in predict.items()}
    assert error["affine"] < error["template"]


# --- Predictions


def model(data: Meshes) -> Model:
    """Answers with the template, wherever it is asked."""
    template = torch.tensor(data.spec.more["template"]).T

    def forward(points: torch.Tensor) -> torch.Tensor:
        assert points.shape[1:] == (3, 40)
        return template.expand(len(points), -1, -1)

    return Model(Path("run"), data.spec, Grid(fixed=40), forward)


def test_predictions_are_meshes_where_the_points_are(data, tmp_path):
    source = data.files(data.val[:1])[0]
    assert source.suffix == ".csv" and source.name == "case 08.csv"
    written = Meshes.predict_files(model(data), [source], tmp_path, Options(overlays=True))
    assert [p.name for p in written] == ["case 08.ply"]
    mesh = read_mesh(written[0])
    assert np.allclose(mesh.vertices.mean(0), read_points(source).mean(0), atol=6)
    said = json.loads(written[0].with_suffix(".json").read_text())
    assert math.isclose(said["volume_ml"], volume(mesh) / 1000, rel_tol=1e-4) and said["slices"] == 7
    assert (tmp_path / "case 08.overlay.png").stat().st_size > 1000
    less = data.files(data.val[-1:])[0]
    assert less.name == "case 11_less_4.csv" and len(slices_of(read_points(less))) == 3


def test_predictions_refuse_what_they_cannot_mean(data, tmp_path):
    for content, said in (
        ("x,y,z\n1,2,3\n", "holds 1 points"),
        ("x,y,z\n" + "\n".join(f"{1000 * i},0,{i}" for i in range(9)), "give millimetres"),
    ):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(InputError, match=said):
            Meshes.predict_files(model(data), [tmp_path / "a.csv"], tmp_path / "out", Options())
    with pytest.raises(InputError, match="no meaning"):
        Meshes.predict_files(model(data), [data.files(data.val[:1])[0]], tmp_path / "out", Options(probabilities=True))


def test_another_template_is_refused(data):
    with pytest.raises(InputError, match="other faces"):
        data.check(Meshes._spec(CUBE, CUBE_FACES, 10.0))
    data.check(data.spec)


def test_pictures_show_both_sides_and_the_error(data):
    sample = data.sample(data.val[0])
    right = data.drawn(sample, sample["vertices"])
    wrong = data.drawn(sample, sample["vertices"] + 20)
    assert right["mesh"].shape == (200, 400, 3)
    assert (right["error"] != wrong["error"]).any()
    halves = right["mesh"][:, :200], right["mesh"][:, 200:]
    assert all((half != 255).any() for half in halves) and not np.array_equal(*halves)
