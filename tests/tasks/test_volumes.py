"""Volumes as a segmentation task: crops, windows, files in the patient's space, pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from paperworks.data.augment import Augment
from paperworks.errors import InputError
from paperworks.tasks.base import Grid, Recipe, Spec
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.segmentation import Segmentation
from paperworks.tasks.volumes import window_of

AFFINE = np.array([[0, 0, -2, 40], [0, -1, 0, 10], [0.5, 0, 0, 3], [0, 0, 0, 1.0]])
"""The file's axes run up, to the front and to the left, 0.5, 1 and 2 mm apart."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    """Six volumes (up 24, front 20, left 12) in which what is bright is class 1."""
    root = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for i in range(6):
        labels = np.zeros((24, 20, 12), np.uint8)
        labels[4 + i : 14 + i, 5:12, 3:9] = 1
        voxels = (labels * 120 + rng.integers(0, 60, labels.shape)).astype(np.int16)
        for folder, array in (("images", voxels), ("labels", labels)):
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), root / folder / f"case{i}.nii.gz")
    return root


@pytest.fixture(scope="module")
def data(cases) -> Segmentation:
    return Segmentation(cases)


def bright(image: Tensor) -> Tensor:
    """A network that knows: B 1 D H W -> B 2 D H W."""
    certain = (image > 0.55).float() * 0.8 + 0.1
    return torch.cat([1 - certain, certain], 1)


def model(spec: Spec, source: Path, grid: Grid | None = None) -> Model:
    return Model(source=source, spec=spec, grid=grid or Grid(8), forward=bright)


def test_what_a_network_is_built_for(data):
    spec = data.spec
    assert (spec.ndim, spec.size, spec.spacing, spec.channels) == (3, (24, 20, 12), (0.5, 1.0, 2.0), 1)
    sample = data.sample(data.val[0])
    assert sample["image"].shape == (1, 24, 20, 12) and sample["mask"].shape == (24, 20, 12) and sample["spacing"] == (0.5, 1.0, 2.0)


def test_training_crops_have_as_many_voxels_as_those_of_images_have_pixels(data):
    assert data.patch(Recipe(patch=256), Grid()) == (24, 20, 12)
    assert data.patch(Recipe(patch=36), Grid()) == (21, 10, 5) and data.patch(Recipe(patch=36), Grid(8)) == (24, 16, 8)
    recipe = Recipe(patch=36, augment=Augment(rotate=10, elastic=1))
    batch = data.collate([data.training_sample(item, recipe, Grid(8), torch.Generator().manual_seed(0)) for item in data.train[:2]])
    assert batch["image"].shape == (2, 1, 24, 16, 8) and batch["mask"].shape == (2, 24, 16, 8) and batch["mask"].max() == 1


def test_windows_of_volumes_have_as_many_voxels_as_those_of_images_have_pixels():
    assert window_of((500, 400), 64, None) == (64, 64)
    assert window_of((300, 512, 512), 1000, (1.0, 1.0, 1.0)) == (100, 100, 100)
    assert window_of((40, 512, 512), 1000, (4.0, 1.0, 1.0)) == (39, 158, 158)


def test_scores_pictures_and_baselines(data):
    predict = data.predictor(bright, data.spec, Grid(8), window=40, overlap=0.5)
    metrics, items = data.evaluate(predict)
    assert metrics["dice"] > 0.99 and metrics["hd95"] < 0.5 and len(items) == len(data.val) and items[0]["hd95"] < 0.5
    for baseline in data.baselines().values():
        assert data.evaluate(baseline)[0]["dice"] < 1.01
    sample = data.sample(data.val[0])
    shown, drawn = data.shown(sample), data.drawn(sample, predict(data.given(sample)))
    shapes = {picture.shape for picture in (*shown.values(), *drawn.values())}
    assert shapes == {(3 * 20 + 2, 3 * 12 + 2, 3)}  # nine slices of height 20 and width 12
    assert set(drawn) == set(data.views)


def test_predicted_files_lie_where_their_volumes_lie(data, cases, tmp_path):
    written = data.predict_files(
        model(data.spec, cases), [cases / "images"], tmp_path, Options(window=40, probabilities=True, overlays=True)
    )
    assert [p.name for p in written] == [f"case{i}.nii.gz" for i in range(6)]
    for path in written:
        found, truth = nibabel.load(path), nibabel.load(cases / "labels" / path.name)
        np.testing.assert_allclose(found.affine, AFFINE)
        assert found.get_data_dtype() == np.uint8 and (np.asanyarray(found.dataobj) == np.asanyarray(truth.dataobj)).mean() > 0.999
    probabilities = nibabel.load(tmp_path / "case2.probabilities.nii.gz")
    assert probabilities.shape == (24, 20, 12, 2) and probabilities.get_data_dtype() == np.float32
    np.testing.assert_allclose(probabilities.get_fdata().sum(-1), 1, atol=1e-5)
    with PIL.Image.open(tmp_path / "case2.overlay.png") as sheet:
        assert sheet.size == (3 * 12 + 2, 3 * 20 + 2)
    again = data.predict_files(model(data.spec, cases), [cases / "images"], tmp_path, Options(resume=True))
    assert again == []


def test_a_volume_is_worked_through_by_slabs(data, cases, tmp_path):
    seen = []

    def forward(image: Tensor) -> Tensor:
        seen.append(tuple(image.shape[2:]))
        return bright(image)

    whole = Model(source=cases, spec=data.spec, grid=Grid(), forward=forward)
    data.predict_file(whole, cases / "images" / "case0.nii.gz", tmp_path / "a.nii.gz", Options(window=20))
    assert len(seen) > 4 and {np.prod(s) <= 400 for s in seen} == {True}


def test_what_does_not_fit_is_one_line(data, cases, tmp_path):
    volume = cases / "images" / "case0.nii.gz"
    PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(InputError, match=r"flat\.png is none of the volumes that the model was trained on"):
        data.predict_files(model(data.spec, cases), [tmp_path / "flat.png"], tmp_path / "out", Options())
    flat = Segmentation.plain_spec(1, 2)
    with pytest.raises(InputError, match=r"case0\.nii\.gz is none of the images"):
        data.predict_files(model(flat, cases), [volume], tmp_path / "out", Options())
    with pytest.raises(InputError, match="inference methods take images"):
        data.predict_files(model(data.spec, cases), [volume], tmp_path / "out", Options(refine=lambda image, probabilities: probabilities))
    four = np.zeros((4, 4, 4, 4), np.float32)
    nibabel.save(nibabel.Nifti1Image(four, np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(InputError, match=r"four\.nii has 4 channels where the model was trained on 1"):
        data.predict_files(model(data.spec, cases), [tmp_path / "four.nii"], tmp_path / "out", Options())
    with pytest.raises(InputError, match="holds volumes where the model was trained on images"):
        data.check(dataclasses.replace(flat, classes=data.spec.classes))
    data.check(data.spec)
