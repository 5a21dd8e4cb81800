"""Volumes: one orientation in memory, the file's own on the disk, and what a folder of them says."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from paperworks.data import open_folder
from paperworks.data.nifti import read_geometry, read_labels, read_volume, stem, write_volume
from paperworks.errors import InputError

Save = Callable[..., Path]


@pytest.fixture
def volume() -> Save:
    """volume(path, voxels x y z, affine, dtype)."""

    def volume(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, **header) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
        for key, value in header.items():
            image.header[key] = value
        nibabel.save(image, path)
        return path

    return volume


@pytest.fixture
def cases(tmp_path: Path, volume: Save) -> Path:
    """Five volumes of two sizes with a box of label 1 and one of label 2, 3 mm between slices."""
    rng = np.random.default_rng(0)
    for i, name in enumerate("abcde"):
        size = (8, 10, 6) if i < 3 else (9, 10, 7)
        labels = np.zeros(size, np.uint8)
        labels[2:5, 3:7, 2:4], labels[5:7, 3:7, 2:4] = 1, 2
        affine = np.diag([0.5, 1, 3, 1])
        volume(tmp_path / "images" / f"{name}.nii.gz", rng.integers(0, 256, size, np.uint8), affine)
        volume(tmp_path / "labels" / f"{name}.nii.gz", labels, affine)
    return tmp_path


def orientation(axes: tuple[int, ...], signs: tuple[int, ...], tilt: float = 0.0) -> np.ndarray:
    """An affine of file axes in any order and direction, spacing 0.5, 1 and 3 mm, turned by a few degrees about z."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, axes] * np.array(signs) * np.array([0.5, 1, 3])
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = 10, -20, 30
    return affine


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_every_orientation_comes_as_one_and_goes_back(tmp_path, volume, tilt):
    voxels = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
    for number, (axes, signs) in enumerate(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))):
        affine = orientation(axes, signs, tilt)
        path = volume(tmp_path / f"{number}.nii", voxels, affine)
        array, geometry = read_volume(path)[..., 0], read_geometry(path)
        assert array.shape == geometry.size and geometry.channels == 1
        # Slices go up, rows go to the back, columns to the left, each as nearly as the tilt lets them.
        assert (np.abs(geometry.affine[:3, :3]).argmax(0) == [2, 1, 0]).all()
        assert np.sign(geometry.affine[[2, 1, 0], [0, 1, 2]]).tolist() == [1, -1, -1]
        np.testing.assert_allclose(sorted(geometry.spacing), [0.5, 1, 3])
        for index in ((0, 0, 0), (1, 2, 3), tuple(n - 1 for n in array.shape)):
            position = geometry.affine @ [*index, 1]
            there = np.rint(np.linalg.inv(affine) @ position)[:3].astype(int)
            assert voxels[tuple(there)] == array[index]
        write_volume(tmp_path / "back.nii.gz", array, path)
        back = nibabel.load(tmp_path / "back.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(back.dataobj), voxels)
        np.testing.assert_allclose(back.affine, affine, atol=1e-5)
        assert back.get_data_dtype() == np.uint8 and back.header["qform_code"] == nibabel.load(path).header["qform_code"]


def test_types(tmp_path, volume):
    rng = np.random.default_rng(0)
    eight = rng.integers(0, 256, (3, 4, 5), np.uint8)
    assert read_volume(volume(tmp_path / "a.nii", eight)).dtype == np.uint8
    ct = rng.integers(-1024, 2000, (3, 4, 5), np.int16)
    found = read_volume(volume(tmp_path / "b.nii.gz", ct))
    assert found.dtype == np.float32 and found.min() == ct.min()
    image = nibabel.Nifti1Image(ct, np.eye(4))
    image.header.set_slope_inter(2, 5)
    nibabel.save(image, tmp_path / "c.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "c.nii"), 2 * found + 5)
    four = rng.random((3, 4, 5, 2)).astype(np.float32)
    assert read_volume(volume(tmp_path / "d.nii", four)).shape == (5, 4, 3, 2) and read_geometry(tmp_path / "d.nii").channels == 2
    labels = rng.integers(0, 3, (3, 4, 5)).astype(np.float64)
    assert read_labels(volume(tmp_path / "e.nii", labels)).dtype == np.uint8
    assert read_labels(volume(tmp_path / "f.nii", (labels * 200).astype(np.int16))).dtype == np.int16


def test_probabilities_are_written_with_their_classes_last(tmp_path, volume):
    like = volume(tmp_path / "a.nii", np.zeros((3, 4, 5), np.int16), orientation((1, 2, 0), (1, -1, -1)))
    values = np.random.default_rng(0).random((*read_geometry(like).size, 3)).astype(np.float32)
    write_volume(tmp_path / "p.nii.gz", values, like)
    np.testing.assert_array_equal(read_volume(tmp_path / "p.nii.gz"), values)


def test_what_is_wrong_with_a_file_is_one_line(tmp_path, volume, monkeypatch):
    with pytest.raises(InputError, match=r"none\.nii does not exist"):
        read_volume(tmp_path / "none.nii")
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "text.nii").write_text("no volume " * 100)
    good = volume(tmp_path / "good.nii.gz", np.random.default_rng(0).random((20, 20, 20)).astype(np.float32))
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:9000])
    for name in ("empty.nii.gz", "text.nii", "cut.nii.gz"):
        with pytest.raises(InputError, match=rf"{name} .*(damaged|empty).*; copy or export it again") as caught:
            read_volume(tmp_path / name)
        assert "\n" not in str(caught.value)
    nan = np.zeros((3, 3, 3), np.float32)
    nan[1, 1, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        read_volume(volume(tmp_path / "nan.nii", nan))
    with pytest.raises(InputError, match="whole numbers"):
        read_labels(volume(tmp_path / "half.nii", np.full((3, 3, 3), 0.5, np.float32)))
    with pytest.raises(InputError, match="2 channels"):
        read_labels(volume(tmp_path / "two.nii", np.zeros((3, 3, 3, 2), np.uint8)))
    with pytest.raises(InputError, match="picture"):
        read_volume(volume(tmp_path / "flat.nii", np.zeros((3, 3), np.uint8)))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(InputError, match=r"nibabel; install it with: pip install 'paperworks\[medical\]'"):
        read_volume(good)


def test_a_folder_of_volumes(cases):
    data = open_folder(cases)
    assert not data.problems and data.class_names == ("background", "class 1", "class 2") and not data.instances
    told = data.describe()
    assert told["sizes"] == {"min": [6, 10, 8], "median": [6, 10, 8], "max": [7, 10, 9]}
    assert told["spacing"] == [3.0, 1.0, 0.5] and told["task"] == "segmentation" and told["channels"] == 1
    assert [i.name for i in data.items] == list("abcde") and data.train and data.val
    item = data.items[3]
    assert data.image(item).shape == (7, 10, 9, 1) and data.mask(item).shape == (7, 10, 9) and data.spacing(item) == (3.0, 1.0, 0.5)
    picture = data.unit(data.image(item))
    assert picture.shape == (1, 7, 10, 9) and picture.max() <= 1
    everything = np.concatenate([data.image(i).ravel() for i in data.items]) / 255
    np.testing.assert_allclose([data.fingerprint.mean[0], data.fingerprint.std[0]], [everything.mean(), everything.std()], rtol=1e-6)
    # The same again from the cache.
    assert open_folder(cases).fingerprint == data.fingerprint


def test_voxels_of_image_and_labels_must_lie_on_one_another(cases, volume):
    labels = np.asanyarray(nibabel.load(cases / "labels" / "a.nii.gz").dataobj)
    volume(cases / "labels" / "a.nii.gz", labels, np.eye(4))
    volume(cases / "labels" / "b.nii.gz", labels[:-1], np.diag([0.5, 1, 3, 1]))
    # The other way round on the disk, and in the same place: nothing is wrong with it.
    volume(cases / "labels" / "c.nii.gz", labels[::-1], np.array([[-0.5, 0, 0, 3.5], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]]))
    data = open_folder(cases)
    told = {p.path.name: str(p) for p in data.problems}
    assert set(told) == {"a.nii.gz", "b.nii.gz"}
    assert "lies elsewhere than its image" in told["a.nii.gz"] and "is 6x10x7 and its image 6x10x8" in told["b.nii.gz"]
    c, d = (data.mask(next(i for i in data.items if i.name == n)) for n in "cd")
    np.testing.assert_array_equal(c, d[:6, :, 1:])


@pytest.mark.parametrize("ending", ["_0000", ""])
def test_nnunet_and_the_decathlon(tmp_path, volume, ending):
    rng = np.random.default_rng(0)
    for number in range(4):
        name = f"heart_{number:03d}"
        volume(tmp_path / "imagesTr" / f"{name}{ending}.nii.gz", rng.random((5, 6, 7)).astype(np.float32))
        labels = np.zeros((5, 6, 7), np.uint8)
        labels[1:3] = 1
        volume(tmp_path / "labelsTr" / f"{name}.nii.gz", labels)
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "left atrium"}}))
    data = open_folder(tmp_path)
    assert len(data.items) == 4 and data.class_names == ("background", "left atrium") and not data.problems
    assert data.image(data.items[0]).shape == (7, 6, 5, 1) and data.settings.channels == ("MRI",)


def test_channels_in_files_of_their_own(tmp_path, volume):
    for name, channel in itertools.product("abc", range(2)):
        volume(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz", np.full((4, 5, 6), channel, np.uint8))
    for name in "abc":
        volume(tmp_path / "labelsTr" / f"{name}.nii.gz", (np.indices((4, 5, 6))[0] > 1).astype(np.uint8))
    data = open_folder(tmp_path)
    assert data.fingerprint.channels == 2 and data.image(data.items[0])[0, 0, 0].tolist() == [0, 1]


def test_volumes_of_other_channels_are_problems(cases, volume):
    volume(cases / "images" / "b.nii.gz", np.zeros((8, 10, 6, 4), np.uint8), np.diag([0.5, 1, 3, 1]))
    data = open_folder(cases)
    assert data.fingerprint.channels == 1 and ["has 4 channels" in str(p) for p in data.problems] == [True]


def test_many_labels_in_volumes_are_classes(tmp_path, volume):
    """Organs are in one piece each too; only what is said makes objects of them."""
    voxels = np.arange(30, dtype=np.int16).reshape(5, 6, 1).repeat(4, 2)
    for name in "ab":
        volume(tmp_path / "images" / f"{name}.nii", voxels)
        volume(tmp_path / "labels" / f"{name}.nii", voxels)
    data = open_folder(tmp_path)
    assert not data.instances and len(data.class_names) == 30
    (tmp_path / "paperworks.json").write_text('{"masks": "instances"}')
    assert open_folder(tmp_path).instances


def test_the_kind_that_most_files_have_is_read(cases, save):
    save(cases / "preview.png", np.zeros((4, 4), np.uint8))
    assert len(open_folder(cases).items) == 5
    (cases / "splits.json").write_text('{"train": ["a.nii.gz", "b", "labels/c.nii.gz"], "val": ["d", "e.nii"]}')
    data = open_folder(cases)
    assert [i.name for i in data.train] == list("abc") and not data.problems


def test_other_volumes_are_named(tmp_path):
    (tmp_path / "slice.dcm").write_bytes(b"x" * 200)
    with pytest.raises(InputError, match=r"slice\.dcm is a volume of a kind that is not read here; convert it to NIfTI"):
        open_folder(tmp_path)


def test_names():
    assert [stem(Path(n)) for n in ("a.b.nii.gz", "a.nii", "A.NII.GZ", "a.tar.gz", "a.png")] == ["a.b", "a", "A", "a.tar", "a"]
