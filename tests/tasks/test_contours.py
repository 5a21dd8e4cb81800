"""Outlines, boxes, scores and files of the task of contours."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paperworks.data.augment import Augment
from paperworks.data.outlines import (
    BoxFinder,
    corners,
    largest_part,
    named_images,
    open_objects,
    outline,
    rasterised,
    read_boxes,
    resampled,
    signed_area,
)
from paperworks.errors import InputError
from paperworks.tasks.base import Grid, Recipe
from paperworks.tasks.contours import SAMPLES, Contours, ContourScores, crop, ellipse, loosened, placed, window
from paperworks.tasks.contract import Model, Options


def disc(size: tuple[int, int] = (40, 50), centre: tuple[float, float] = (24.0, 18.0), radius: float = 11.0) -> np.ndarray:
    y, x = np.indices(size) + 0.5
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


# Polygons


@pytest.mark.parametrize("seed", range(4))
def test_an_outline_rasterised_is_the_object(seed):
    """Also where the object touches the border, has holes, or parts that hang on by a corner."""
    rng = np.random.default_rng(seed)
    mask = disc() | disc(centre=(40.0, 30.0)) | (disc(centre=(2.0, 35.0)) & (rng.random((40, 50)) < 0.9))
    line = outline(mask)
    assert np.array_equal(rasterised(line, mask.shape), largest_part(mask))
    assert signed_area(line) > 0


def test_areas_of_a_square():
    mask = np.zeros((10, 12), bool)
    mask[2:6, 3:9] = True
    line = outline(mask)
    assert abs(signed_area(line) - 24) <= 0.5  # the four corners are cut
    assert line.min(0).tolist() == [3, 2] and line.max(0).tolist() == [9, 6]


def test_resampled_points_lie_at_equal_distances():
    square = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    found = resampled(square, 8)
    assert np.allclose(found, [[0, 0], [2, 0], [4, 0], [4, 2], [4, 4], [2, 4], [0, 4], [0, 2]])


def test_corners_of_a_square():
    square = resampled(np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]]), 64)
    assert np.allclose(square[corners(square, 0.05)], [[0, 0], [4, 0], [4, 4], [0, 4]])


def test_a_polygon_outside_of_the_image_covers_nothing():
    assert not rasterised(np.array([[-9.0, -9], [-5, -9], [-5, -5]]), (8, 8)).any()
    assert rasterised(np.array([[-9.0, -9], [30, -9], [30, 30], [-9, 30]]), (8, 8)).all()


# Data


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with two discs each; their masks are 0 and 255."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for i in range(6):
        mask = disc((48, 64), (16.0, 20.0), rng.uniform(7, 11)) | disc((48, 64), (46.0, 28.0), rng.uniform(7, 11))
        image = (60 + 120 * mask + rng.normal(0, 8, mask.shape)).clip(0, 255)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray((255 * mask).astype(np.uint8)).save(root / "masks" / f"{i}.png")
    (root / "splits.json").write_text(json.dumps({"train": ["0", "1", "2", "3"], "val": ["4", "5"]}))
    return root


def test_every_part_of_a_binary_mask_is_an_object(shapes):
    data = Contours(shapes)
    assert (len(data.train), len(data.val)) == (8, 4)
    sample = data.sample(data.val[0])
    assert sample["region"].sum() < 500 and sample["image"].shape == (1, 48, 64)
    assert torch.equal(sample["box"], data.sample(data.val[0])["box"]), "a box is always off in the same way"
    found = data.describe()
    assert found["items"] == 12 and found["images"] == 6 and found["classes"] == [{"name": "foreground", "objects": 12}]


@pytest.mark.parametrize("name", ["pack:nuclei", "pack:cardiac_mr"])
def test_packs_open(name):
    """Instances, and connected parts."""
    data = open_objects(name)
    item = data.split("val")[0]
    region = data.region(item)
    y, x = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    assert item.box == (x[0], y[0], x[-1] + 1, y[-1] + 1)
    assert len(data.split("train")) > 400


def test_an_instance_in_pieces_is_its_largest_piece(shapes, tmp_path):
    """Two discs with one number: the larger one, and its box."""
    for folder in ("images", "instances"):
        (tmp_path / folder).mkdir()
    mask = np.where(disc((48, 64), (16.0, 20.0), 7.0) | disc((48, 64), (46.0, 28.0), 10.0), 3, 0).astype(np.uint16)
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes((shapes / "images" / "0.png").read_bytes())
        Image.fromarray(mask).save(tmp_path / "instances" / f"{i}.png")
    data = open_objects(tmp_path)
    assert [i.box for i in data.items] == [(36, 18, 56, 38)] * 3 and data.region(data.items[0]).sum() < 330


def test_coco_polygons(shapes, tmp_path):
    """Two overlapping outlines of two classes: two objects."""
    (tmp_path / "images").mkdir()
    image = Image.open(shapes / "images" / "0.png")
    entries = []
    for i in range(4):
        image.save(tmp_path / "images" / f"{i}.png")
        for k, corner in enumerate((4, 30)):
            square = [corner, 8, corner + 20, 8, corner + 20, 30, corner, 30]
            entries.append(
                {"id": len(entries), "image_id": i, "category_id": k, "segmentation": [square], "bbox": [corner, 8, 20, 22], "iscrowd": 0}
            )
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(4)],
        "annotations": entries,
        "categories": [{"id": 0, "name": "left"}, {"id": 1, "name": "right"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    data = open_objects(tmp_path / "all.json")
    assert data.classes == ("left", "right") and [i.label for i in data.items[:2]] == [0, 1]
    assert data.items[0].box == (4, 8, 24, 30)


def test_training_samples_hold_an_outline_of_what_they_show(shapes):
    data = Contours(shapes)
    generator = torch.Generator().manual_seed(0)
    recipe = Recipe(augment=Augment(rotate=180, scale=(0.8, 1.2)))
    for item in data.train:
        sample = data.training_sample(item, recipe, Grid(fixed=32), generator)
        line = sample["outline"].double().numpy()
        assert line.shape == (SAMPLES, 2) and signed_area(line) > 0
        assert np.abs(rasterised(line * 32, (32, 32)) - sample["mask"].numpy()).mean() < 0.02
        assert 3 <= int(sample["corner"].sum()) < 80
        inside = sample["mask"] > 0
        assert sample["image"][0][inside].mean() > sample["image"][0][~inside].mean() + 0.1, "image and outline belong together"


def test_what_cannot_be_used_is_said(tmp_path, shapes):
    with pytest.raises(InputError, match="does not exist"):
        Contours(tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError):
        Contours(tmp_path)
    (tmp_path / "masks").mkdir()
    for i in range(3):
        Image.open(shapes / "images" / "0.png").save(tmp_path / "images" / f"{i}.png")
        speck = np.zeros((48, 64), np.uint8)
        speck[4:6, 4:6] = 255
        Image.fromarray(speck).save(tmp_path / "masks" / f"{i}.png")
    with pytest.raises(InputError, match="no object of 25 pixels"):
        Contours(tmp_path)


# Crops


def test_crops_and_points_agree():
    """A disc keeps its middle and its radius, also beside the border, where the crop sees nothing."""
    image = torch.from_numpy(disc(centre=(4.0, 18.0)).astype(np.float32))[None]
    box = torch.tensor([-7.0, 7, 15, 29])
    seen = crop(image, window(box), 64)
    left, _, side = window(box)
    assert side == math.ceil(22 * 1.3) and left < 0 and not seen[:, :, 1].any()
    y, x = torch.nonzero(seen[0] > 0.5, as_tuple=True)
    middle = torch.stack([(x.max() + 1.0), (y.min() + y.max() + 1.0) / 2])[None] / 64
    found = placed(middle, middle, box)["points"][0]
    assert torch.allclose(found, torch.tensor([15.0, 18.0]), atol=0.5)


def test_loose_boxes_are_off_by_a_tenth_at_the_most():
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([loosened((10, 20, 50, 40), generator) for _ in range(200)]) - torch.tensor([10.0, 20, 50, 40])
    assert found[:, ::2].abs().max() <= 4 and found[:, 1::2].abs().max() <= 2 and found[:, 0].abs().max() > 3.5


# Scores and baselines


def test_scores_of_squares():
    """A square against itself moved by two pixels: 8 of 12 columns are shared."""
    region = torch.zeros(30, 30, dtype=torch.bool)
    region[5:15, 5:15] = True
    square = torch.tensor([[5.0, 5], [15, 5], [15, 15], [5, 15]])
    sample = {"region": region, "outline": square, "label": torch.tensor(0), "name": "a"}
    scores = ContourScores(("object",))
    scores.update({"points": square, "curve": square}, sample)
    moved = square + torch.tensor([2.0, 0])
    scores.update({"points": moved, "curve": moved}, sample)
    same, off = scores.per_item()
    assert (same["iou"], same["boundary_f"]) == (1, 1) and same["hausdorff"] < 1e-6
    assert off["iou"] == pytest.approx(80 / 120) and off["hausdorff"] == pytest.approx(2)
    # Of 40 pixels: the outer side is 2 away, the inner one too but for its ends (by 2 less), of the others 2 pixels stick out, by 1 on average.
    assert off["distance"] == pytest.approx((10 * 2 + (10 * 2 - 2 * 2) + 2 * 2 * 1) / 40, abs=0.01)
    assert scores.compute()["iou"] == pytest.approx((1 + 80 / 120) / 2)


def test_scores_of_classes():
    region = torch.from_numpy(disc())
    line = torch.from_numpy(outline(region.numpy()))
    scores = ContourScores(("left", "right"))
    for label, curve in enumerate((line, line + 4)):
        sample = {"region": region, "outline": line, "label": torch.tensor(label), "name": str(label)}
        scores.update({"points": curve, "curve": curve}, sample)
    found = scores.compute()
    assert found["iou/left"] == 1 and found["iou/right"] < 0.8


def test_baselines(shapes):
    data = Contours(shapes)
    exact = {"image": torch.zeros(1, 40, 50), "box": torch.tensor([13.0, 7, 35, 29])}
    filled = rasterised(ellipse(exact)["curve"].double().numpy(), (40, 50))
    assert (filled & disc()).sum() / (filled | disc()).sum() > 0.98
    otsu, _ = data.evaluate(data.baselines()["otsu"])
    rounded, _ = data.evaluate(data.baselines()["ellipse"])
    assert otsu["iou"] > 0.85 > 0.5 < rounded["iou"]
    blank = {"image": torch.zeros(1, 40, 50), "box": torch.tensor([-3.0, -2, 60, 70])}
    assert torch.isfinite(data.baselines()["otsu"](blank)["curve"]).all()


def test_pictures(shapes):
    data = Contours(shapes)
    sample = data.sample(data.val[0])
    pictures = data.shown(sample) | data.drawn(sample, ellipse(data.given(sample)))
    assert set(pictures) == {"input", "truth", "contour", "errors"}
    assert (pictures["truth"] != pictures["input"]).any() and (pictures["contour"] == (230, 159, 0)).all(2).any()


# Boxes and files


def test_boxes_of_tables_and_coco(tmp_path):
    (tmp_path / "b.csv").write_text("\ufefffile,x0,y0,x1,y1,label\na.png,1,2,11,12,cell\na.png,3,4,20,9,\n", encoding="utf-8")
    assert read_boxes(tmp_path / "b.csv") == {"a.png": [((1, 2, 11, 12), "cell"), ((3, 4, 20, 9), "object")]}
    coco = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [{"image_id": 7, "bbox": [1, 2, 10, 10], "category_id": 1}]}
    (tmp_path / "b.json").write_text(json.dumps(coco | {"categories": [{"id": 1, "name": "cell"}]}))
    assert read_boxes(tmp_path / "b.json") == {"a.png": [((1, 2, 11, 12), "cell")]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,x0,y0,x1\na,1,2,3\n", "needs a first line with the columns file,x0,y0,x1,y1"),
        ("", "needs a first line"),
        ("file,x0,y0,x1,y1\na,1,2,3\n", "line 2: 4 cells where the first line has 5"),
        ("file,x0,y0,x1,y1\na,1,2,wide,4\n", "line 2.*not four numbers"),
        ("file,x0,y0,x1,y1\na,9,2,3,4\n", "line 2.*has no extent"),
        ("file,x0,y0,x1,y1\na,nan,2,3,4\n", "line 2.*has no extent"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, says):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        read_boxes(tmp_path / "boxes.csv")


@pytest.mark.parametrize("content", ["[]", "{}", '{"images": [], "annotations": [{"bbox": [1, 2], "image_id": 0}]}', "{"])
def test_wrong_coco_files_are_refused(tmp_path, content):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(InputError, match=r"boxes\.json"):
        read_boxes(tmp_path / "boxes.json")


def test_which_boxes_an_image_has(shapes, tmp_path):
    """Those beside it, those of its masks, or all of it."""
    image = shapes / "images" / "4.png"
    assert [label for _, label in BoxFinder()(image, (48, 64))] == ["foreground", "foreground"]
    alone = tmp_path / "alone.png"
    Image.open(image).save(alone)
    assert BoxFinder()(alone, (48, 64)) == [((0, 0, 64, 48), "object")]
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\nalone.png,5,5,20,20\nother.png,1,1,5,5\n")
    assert BoxFinder()(alone, (48, 64)) == [((5, 5, 20, 20), "object")]
    with pytest.raises(InputError, match="lies outside its 4 x 4 pixels"):
        BoxFinder()(alone, (4, 4))
    with pytest.raises(InputError, match=r"names 'other\.png', which is not there"):
        named_images(tmp_path / "boxes.csv")


@pytest.fixture
def model(shapes) -> Model:
    """Always a circle that fills 70 % of the crop."""
    turn = torch.arange(24) * (2 * math.pi / 24)
    ring = 0.5 + 0.35 * torch.stack([turn.cos(), turn.sin()], 1)
    return Model(Path("model"), Contours(shapes).spec, Grid(fixed=32), lambda given: (ring[None, ::4], ring[None]))


def test_files_round_trip(shapes, model, tmp_path):
    """Polygons of the COCO file and label images say the same, and both can be opened as data."""
    out = tmp_path / "out"
    written = Contours.predict_files(model, [shapes / "images"], out, Options(overlays=True))
    assert written[0] == out / "contours.json" and len(written) == 7
    content = json.loads((out / "contours.json").read_text())
    assert len(content["images"]) == 6 and len(content["annotations"]) == 12 and content["categories"] == [{"id": 1, "name": "foreground"}]
    with Image.open(out / "4.overlay.png") as overlay, Image.open(out / "4.png") as mask:
        assert overlay.mode == "RGB"
        labels = np.array(mask)
    number = next(i["id"] for i in content["images"] if i["file_name"] == "4.png")
    mine = [a for a in content["annotations"] if a["image_id"] == number]
    for index, entry in enumerate(mine, start=1):
        line = np.array(entry["segmentation"][0]).reshape(-1, 2)
        assert np.array_equal(rasterised(line, labels.shape), labels == index)
        assert len(entry["points"]) == 12 and entry["area"] == pytest.approx((labels == index).sum(), rel=0.1)
    (tmp_path / "again").mkdir()
    for folder, files in (("images", shapes / "images"), ("instances", out)):
        (tmp_path / "again" / folder).mkdir()
        for i in range(6):
            (tmp_path / "again" / folder / f"{i}.png").write_bytes((files / f"{i}.png").read_bytes())
    assert len(open_objects(tmp_path / "again").items) == 12


def test_files_of_boxes_are_inputs(shapes, model, tmp_path):
    (tmp_path / "images").mkdir()
    Image.open(shapes / "images" / "1.png").save(tmp_path / "images" / "1.png")
    (tmp_path / "mine.csv").write_text("file,left,top,right,bottom,label\n1.png,5,5,30,35,cell\n")
    Contours.predict_files(model, [tmp_path / "mine.csv"], tmp_path / "out", Options())
    found = json.loads((tmp_path / "out" / "contours.json").read_text())["annotations"]
    x0, y0, width, height = found[0]["bbox"]
    assert len(found) == 1 and abs(x0 + width / 2 - 17.5) < 1 and abs(y0 + height / 2 - 20) < 1
    with pytest.raises(InputError, match="--with has no meaning"):
        Contours.predict_files(model, [tmp_path / "mine.csv"], tmp_path / "out", Options(refine=lambda image, p: p))


def test_a_broken_image_is_named(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        Contours.predict_files(model, [tmp_path / "broken.png"], tmp_path / "out", Options())
