"""Boxes from COCO, Pascal VOC and CSV files: what is read, what is refused, and how samples vary."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from paperworks.data.boxes import BoxAugment, box_files, cropped, open_boxes
from paperworks.errors import InputError

NAMES = [f"im{i}" for i in range(6)]
VOC = "<annotation><filename>{file}</filename><size><width>40</width><height>30</height></size>{objects}</annotation>"
OBJECT = (
    "<object><name>{name}</name><difficult>{hard}</difficult>"
    "<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(folder / f"{name}.png")
    return tmp_path


def coco(root: Path, **changes) -> Path:
    content = {
        "images": [{"id": i, "file_name": f"{n}.png", "width": 40, "height": 30} for i, n in enumerate(NAMES)],
        "annotations": [{"id": i, "image_id": i, "category_id": 7 if i % 2 else 3, "bbox": [1, 2, 10, 20], "iscrowd": 0} for i in range(5)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    for key, value in changes.items():
        content["annotations"][int(key[1:])] |= value
    (root / "boxes.json").write_text(json.dumps(content))
    return root


def voc(root: Path, **objects: str) -> Path:
    (root / "images").rename(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for name in NAMES:
        text = objects.get(name, OBJECT.format(2, 3, 11, 22, name="dog", hard=0))
        (root / "Annotations" / f"{name}.xml").write_text(VOC.format(file=f"{name}.png", objects=text))
    return root


def table(root: Path, *lines: str, header: str = "file,xmin,ymin,xmax,ymax,class") -> Path:
    (root / "boxes.csv").write_text("\n".join([header, *lines]) + "\n")
    return root


def test_coco_boxes(images):
    data = open_boxes(coco(images))
    assert data.classes == ("dog", "cat") and data.layout == "COCO" and not data.problems
    item = next(i for i in data.items if i.name == "im1")
    assert item.objects == ((1.0, 2.0, 11.0, 22.0, 1, False),)
    assert next(i for i in data.items if i.name == "im5").objects == ()
    assert len(data.split("train")) + len(data.split("val")) == 6 and data.split("val")
    assert data.image(item).shape == (3, 30, 40) and data.image(item).min() >= 0 and data.image(item).max() <= 1
    described = data.describe()
    assert described["task"] == "detection" and [c["objects"] for c in described["classes"]] == [3, 2]
    json.dumps(described)


def test_voc_counts_from_one_and_knows_the_difficult(images):
    text = OBJECT.format(1, 1, 40, 30, name="cat", hard=1) + OBJECT.format(2.5, 3, 11, 22, name="dog", hard=0)
    data = open_boxes(voc(images, im0=text))
    assert data.classes == ("cat", "dog") and data.layout == "Pascal VOC" and not data.problems
    assert next(i for i in data.items if i.name == "im0").objects == ((0.0, 0.0, 40.0, 30.0, 0, True), (1.5, 2.0, 11.0, 22.0, 1, False))


def test_voc_splits_of_image_sets_and_of_folders(images, tmp_path):
    root = voc(images)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("im0\nim1\nim2\nim3\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("im4\nim5\n")
    assert [i.name for i in open_boxes(root).split("val")] == ["im4", "im5"]
    other = tmp_path / "roboflow"
    for k, name in enumerate(NAMES):
        folder = other / ("valid" if k > 3 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        (root / "JPEGImages" / f"{name}.png").rename(folder / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").rename(folder / f"{name}.xml")
    assert [i.name for i in open_boxes(other).split("val")] == ["im4", "im5"]


@pytest.mark.parametrize("header", ["file,xmin,ymin,xmax,ymax,class", "label,Filename,x1,y1,x2,y2,width", ""])
def test_csv_in_any_order_of_columns(images, header):
    rows = [("im0", 1, 2, 11, 22, "cat"), ("im0", 3, 3, 9, 9, "dog"), ("im1", 0, 0, 5, 5, "dog"), ("im2", 0, 0, 5, 5, "dog")]
    lines = [f"images/{n}.png,{a},{b},{x},{y},{c}" for n, a, b, x, y, c in rows] + ["images/im3.png,,,,,"]
    if "label" in header:
        lines = [f"{c},{n}.png,{a},{b},{x},{y},40" for n, a, b, x, y, c in rows]
    root = table(images, *lines, header=header) if header else images
    if not header:
        (root / "boxes.csv").write_text("\n".join(lines))
    data = open_boxes(root / "boxes.csv")
    assert data.classes == ("cat", "dog") and not data.problems
    first = next(i for i in data.items if i.name.endswith("im0"))
    assert first.objects == ((1.0, 2.0, 11.0, 22.0, 0, False), (3.0, 3.0, 9.0, 9.0, 1, False))
    assert any(i.objects == () for i in data.items) == ("label" not in header)


def test_boxes_that_stick_out_are_cut_off(images):
    data = open_boxes(coco(images, a0={"bbox": [-3, 20, 10, 20]}))
    assert not data.problems
    assert data.items[0].objects[0][:4] == (0.0, 20.0, 7.0, 30.0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bbox": [1, 2, 0, 20]}, "without extent"),
        ({"bbox": [1, 2, -4, 20]}, "without extent"),
        ({"bbox": [50, 2, 4, 20]}, "outside its 40x30 pixels"),
        ({"bbox": [1, 2, "wide", 20]}, "not four numbers"),
        ({"bbox": [1, 2, 3]}, "not four numbers"),
        ({"bbox": None}, "not four numbers"),
        ({"bbox": [1, float("nan"), 3, 4]}, "not four numbers"),
        ({"category_id": 99}, "category 99"),
    ],
)
def test_a_broken_coco_box_leaves_its_image_out(images, change, what):
    data = open_boxes(coco(images, a2=change))
    assert len(data.problems) == 1 and what in str(data.problems[0])
    assert data.problems[0].path.name == "im2.png" and data.problems[0].fix
    assert "im2" not in [i.name for i in data.items] and len(data.items) == 5


def test_outlines_serve_where_there_is_no_box(images):
    data = open_boxes(coco(images, a0={"bbox": [], "segmentation": [[4, 5, 20, 5, 20, 25]]}))
    assert data.items[0].objects[0][:4] == (4.0, 5.0, 20.0, 25.0)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (OBJECT.format(9, 3, 2, 22, name="dog", hard=0), "without extent"),
        (OBJECT.format("left", 3, 12, 22, name="dog", hard=0), "not four numbers"),
        (OBJECT.format(2, 3, 12, 22, name="", hard=0), "without a class"),
        ("<object><name>dog</name></object>", "not four numbers"),
    ],
)
def test_a_broken_voc_box_leaves_its_image_out(images, text, what):
    data = open_boxes(voc(images, im3=text))
    assert [what in str(p) for p in data.problems] == [True]
    assert data.problems[0].path.name == "im3.png" and "object 1 of im3.xml" in str(data.problems[0])


def test_broken_xml_and_missing_images_are_problems(images):
    root = voc(images)
    (root / "Annotations" / "im1.xml").write_text("<annotation><object>")
    (root / "JPEGImages" / "im2.png").unlink()
    data = open_boxes(root)
    assert sorted(p.path.name for p in data.problems) == ["im1.xml", "im2.xml"]
    assert len(data.items) == 4


def test_broken_csv_lines_are_problems_by_line(images):
    root = table(
        images, "images/im0.png,1,2,11,22,cat", "images/im1.png,1,2,eleven,22,cat", "images/gone.png,1,2,3,4,cat", "images/im2.png,1,2,3,4,dog",
        "images/im3.png,1,2,3", "images/im4.png,0,0,40,30,dog",
    )  # fmt: skip
    data = open_boxes(root)
    texts = sorted(str(p) for p in data.problems)
    assert len(texts) == 3
    assert any("im1.png" in t and "line 3" in t and "eleven" in t for t in texts)
    assert any("gone.png" in t and "line 4" in t for t in texts)
    assert any("im3.png" in t and "line 6" in t for t in texts)
    assert len(data.items) == 3


def test_broken_images_and_wrong_sizes_are_problems(images):
    (images / "images" / "im0.png").write_bytes(b"nothing")
    Image.new("RGB", (44, 30)).save(images / "images" / "im1.png")
    data = open_boxes(coco(images))
    assert sorted(p.path.name for p in data.problems) == ["im0.png", "im1.png"]
    again = open_boxes(images)  # recalled from the cache
    assert again.problems == data.problems and again.fingerprint == data.fingerprint


def test_nothing_usable_is_one_clear_line(images):
    with pytest.raises(InputError, match=r"holds no boxes; put a COCO file"):
        open_boxes(images)
    with pytest.raises(InputError, match="does not exist"):
        open_boxes(images / "nowhere")
    for name in NAMES:
        (images / "images" / f"{name}.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds nothing usable; the first of 6 problems"):
        open_boxes(coco(images))
    (images / "boxes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="neither COCO nor a CSV file with the columns"):
        open_boxes(images / "boxes.csv")


def test_grey_images_among_colour_ones(images):
    Image.new("L", (40, 30), 100).save(images / "images" / "im0.png")
    data = open_boxes(coco(images))
    assert not data.problems and data.fingerprint.channels == 3
    assert data.image(data.items[0]).shape == (3, 30, 40)


def test_what_a_folder_of_boxes_looks_like(images):
    assert not box_files(images)
    assert box_files(coco(images))
    assert not box_files(coco(images, a0={"segmentation": [[1, 1, 9, 1, 9, 9]]}))
    (images / "boxes.json").unlink()
    (images / "splits.csv").write_text("name,split\nim0,val\n")
    assert not box_files(images)
    table(images, "images/im0.png,1,2,11,22,cat")
    assert box_files(images) and box_files(images / "boxes.csv")


def test_the_fingerprint_changes_with_the_boxes(images):
    before = open_boxes(coco(images)).fingerprint.sha256
    assert open_boxes(coco(images)).fingerprint.sha256 == before
    assert open_boxes(coco(images, a0={"bbox": [2, 2, 10, 20]})).fingerprint.sha256 != before


def test_a_data_set_travels_to_other_processes(images):
    data = open_boxes(coco(images))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.image(copy.items[0]), data.image(data.items[0]))


# --- Augmentation


def scene() -> dict:
    image = torch.full((3, 60, 80), 0.1)
    image[:, 10:30, 40:60] = 0.9
    boxes = torch.tensor([[40.0, 10, 60, 30], [0, 50, 10, 60]])
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 80)),
        "labels": torch.tensor([2, 5]),
        "name": "scene",
    }


def test_crop_keeps_objects_whose_centre_it_holds():
    out = cropped(scene(), 5, 45, 40, 30)
    assert out["labels"].tolist() == [2]
    assert out["boxes"].tolist() == [[0, 5, 15, 25]]  # cut off at the left
    assert out["image"].shape == (3, 40, 30)
    assert not len(cropped(scene(), 5, 55, 40, 20)["labels"])  # its centre is outside


def test_augmentation_moves_boxes_with_their_objects():
    flips = set()
    for seed in range(30):
        out = BoxAugment(upright=False)(scene(), (64, 64), torch.Generator().manual_seed(seed))
        assert out["image"].shape == (3, 64, 64) and out["boxes"].canvas_size == (64, 64)
        assert len(out["boxes"]) == len(out["labels"])
        for label, box in zip(out["labels"].tolist(), out["boxes"].tolist()):
            if label == 2:
                grey = out["image"].mean(0)
                y, x = (grey > (grey.min() + grey.max()) / 2).nonzero().unbind(1)
                found = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
                assert (found - torch.tensor(box)).abs().max() < 2
                flips.add((box[0] < 20, box[1] < 20))
    assert len(flips) > 1


def test_augmentation_follows_its_generator_and_can_be_off():
    first, second = (BoxAugment()(scene(), (64, 64), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["boxes"], second["boxes"])
    plain = BoxAugment(flip=False, crop=1, brightness=0, contrast=0)(scene(), (60, 80), torch.Generator())
    torch.testing.assert_close(plain["image"], scene()["image"])
    assert torch.equal(plain["boxes"], scene()["boxes"])
