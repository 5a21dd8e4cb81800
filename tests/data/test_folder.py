"""Layouts, mask kinds, fingerprints: a folder as people have it opens as what it is."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torch.utils.data import DataLoader, Dataset

from paperworks.data import open_folder, read_image
from paperworks.data.coco import _counts
from paperworks.errors import InputError

RNG = np.random.default_rng(0)
SIZE = (12, 10)


def picture(channels=3, dtype="uint8"):
    array = RNG.integers(0, np.iinfo(dtype).max, (*SIZE, channels), dtype=dtype, endpoint=True)
    return array[..., 0] if channels == 1 else array


def square(value=255, dtype="uint8"):
    mask = np.zeros(SIZE, dtype)
    mask[2:6, 3:7] = value
    return mask


def names(items):
    return [i.name for i in items]


# --- layouts -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["images", "imgs", "JPEGImages"])
@pytest.mark.parametrize("labels", ["masks", "labels", "annotations", "gt", "SegmentationClass"])
def test_images_beside_masks(tmp_path, save, images, labels):
    for name in "ab":
        save(tmp_path / images / f"{name}.jpg", picture())
        save(tmp_path / labels / f"{name}.png", square())
    folder = open_folder(tmp_path)
    assert names(folder.items) == ["a", "b"] and not folder.problems
    np.testing.assert_array_equal(folder.mask(folder.items[0]), square(1))
    assert folder.class_names == ("background", "foreground") and not folder.instances


@pytest.mark.parametrize("order", ["{split}/{role}", "{role}/{split}"])
def test_split_folders_on_either_side(tmp_path, save, order):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("test", "c")):
        save(tmp_path / order.format(split=split, role="images") / f"{name}.png", picture())
        save(tmp_path / order.format(split=split, role="masks") / f"{name}.png", square())
    folder = open_folder(tmp_path)
    assert names(folder.train) == ["train/a", "train/b"] and names(folder.val) == ["val/a"] and names(folder.split("test")) == ["test/c"]


@pytest.mark.parametrize("ending", ["_mask", "_label", "_seg", "_gt"])
@pytest.mark.parametrize("image", ["", "_image"])
def test_masks_side_by_side_with_images(tmp_path, save, ending, image):
    for name in ("a", "sub/a"):
        save(tmp_path / f"{name}{image}.png", picture())
        save(tmp_path / f"{name}{ending}.png", square())
    folder = open_folder(tmp_path)
    assert names(folder.items) == [f"a{image}", f"sub/a{image}"] and not folder.problems


def test_masks_with_an_ending_in_a_folder_of_their_own(tmp_path, save):
    save(tmp_path / "images" / "a.png", picture())
    save(tmp_path / "masks" / "a_mask.png", square())
    folder = open_folder(tmp_path)
    assert folder.items[0].mask == tmp_path / "masks" / "a_mask.png"


def test_two_siblings_whatever_their_names(tmp_path, save):
    for name in ("one", "two"):
        save(tmp_path / "zz_bilder" / f"{name}.png", np.arange(120, dtype=np.uint8).reshape(SIZE))
        save(tmp_path / "aa_kreise" / f"{name}.png", square())
    folder = open_folder(tmp_path)
    assert names(folder.items) == ["one", "two"]
    assert folder.items[0].mask is not None and folder.items[0].mask.parent.name == "aa_kreise"


def test_masks_folder_beside_loose_images_and_the_other_way_round(tmp_path, save):
    save(tmp_path / "x" / "a.png", picture())
    save(tmp_path / "x" / "masks" / "a.png", square())
    assert names(open_folder(tmp_path / "x").items) == ["a"]
    save(tmp_path / "y" / "images" / "a.png", picture())
    save(tmp_path / "y" / "vessels" / "a.png", square())
    assert names(open_folder(tmp_path / "y").items) == ["a"]


def test_what_is_outside_the_field_of_view_is_ignored(tmp_path, save):
    save(tmp_path / "images" / "a.png", picture())
    save(tmp_path / "vessels" / "a.png", square())
    view = np.full(SIZE, 255, np.uint8)
    view[:, 5:] = 0
    save(tmp_path / "fov" / "a.png", view)
    folder = open_folder(tmp_path)
    mask = folder.mask(folder.items[0])
    assert (mask[:, 5:] == 255).all() and set(np.unique(mask[:, :5])) == {0, 1}
    assert folder.fingerprint.ignored == 0.5
    assert folder.fingerprint.class_pixels == pytest.approx((52 / 60, 8 / 60))


def test_candidates_for_the_masks_are_listed_and_settings_decide(tmp_path, save):
    for role in ("images", "veins", "arteries"):
        save(tmp_path / role / "a.png", picture() if role == "images" else square())
    with pytest.raises(InputError, match=r"arteries, veins could all hold the masks.*paperworks\.json"):
        open_folder(tmp_path)
    (tmp_path / "paperworks.json").write_text('{"labels": "veins"}')
    assert open_folder(tmp_path).items[0].mask == tmp_path / "veins" / "a.png"


def test_names_with_unicode_spaces_dots_and_other_extensions(tmp_path, save):
    for name in ("Zelle 1", "细胞", "a.b.c", "cafe\u0301"):
        save(tmp_path / "images" / f"{name}.JPG", picture())
    for name in ("Zelle 1", "细胞", "a.b.c", "caf\u00e9"):
        save(tmp_path / "masks" / f"{name}.tif", square())
    folder = open_folder(tmp_path)
    assert names(folder.items) == ["Zelle 1", "a.b.c", "caf\u00e9", "细胞"] and not folder.problems


def test_what_systems_leave_behind_is_passed_over(pairs):
    (pairs / "images" / "._a.png").write_bytes(b"resource fork")
    (pairs / "__MACOSX").mkdir()
    (pairs / "__MACOSX" / "a.png").write_bytes(b"")
    (pairs / "images" / "Thumbs.db").write_bytes(b"x")
    assert not open_folder(pairs).problems


def test_unlabelled_folder_is_no_problem(pairs, save):
    save(pairs / "unlabelled" / "x.png", picture())
    folder = open_folder(pairs)
    assert names(folder.unlabelled) == ["x"] and not folder.problems
    with pytest.raises(InputError, match="has no mask"):
        folder.mask(folder.unlabelled[0])


def test_images_only(tmp_path, save):
    image = save(tmp_path / "a.png", picture())
    with pytest.raises(InputError, match="holds 1 images and no masks"):
        open_folder(tmp_path)
    assert names(open_folder(tmp_path, labelled=False).unlabelled) == ["a"]
    one = open_folder(image, labelled=False)
    assert one.image(one.unlabelled[0]).shape == (*SIZE, 3) and one.task == "images"


def test_nnunet(tmp_path, save):
    for name in ("case_1", "case_2"):
        for channel in range(2):
            save(tmp_path / "imagesTr" / f"{name}_{channel:04}.png", picture(1))
        save(tmp_path / "labelsTr" / f"{name}.png", square(2))
    save(tmp_path / "imagesTs" / "case_9_0000.png", picture(1))
    save(tmp_path / "imagesTs" / "case_9_0001.png", picture(1))
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "rim": 1, "core": 2}, "spacing": [999, 0.5, 0.25]}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    folder = open_folder(tmp_path)
    assert names(folder.items) == ["case_1", "case_2"] and names(folder.unlabelled) == ["case_9"] and not folder.problems
    assert folder.class_names == ("background", "rim", "core") and folder.fingerprint.channels == 2
    assert folder.fingerprint.spacing == (0.5, 0.25) and folder.describe()["channel_names"] == ["T1", "T2"]
    image = folder.image(folder.items[0])
    np.testing.assert_array_equal(image[..., 1], read_image(tmp_path / "imagesTr" / "case_1_0001.png")[..., 0])


def test_nnunet_with_one_rgb_file_for_three_named_channels(tmp_path, save):
    for name in "ab":
        save(tmp_path / "imagesTr" / f"{name}_0000.png", picture())
        save(tmp_path / "labelsTr" / f"{name}.png", square(1))
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1}}')
    folder = open_folder(tmp_path)
    assert len(folder.items) == 2 and folder.fingerprint.channels == 3 and not folder.problems


def coco(tmp_path, save, outline, name="annotations.json", files=("a.png", "b.png"), **more):
    for file in files:
        save(tmp_path / "images" / file, picture())
    images = [{"id": i, "file_name": f, "height": SIZE[0], "width": SIZE[1]} for i, f in enumerate(files)]
    entry = {"category_id": 7, "bbox": [3, 2, 4, 4], "iscrowd": 0, **({"segmentation": outline} if outline else {}), **more}
    content = {
        "images": images,
        "annotations": [{**entry, "id": i, "image_id": i} for i in range(len(files))],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
    }
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def run_lengths(mask, compressed):
    if compressed:
        coded = rle.encode(np.asfortranarray(mask))
        return {"size": coded["size"], "counts": coded["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, flat.size]).tolist()}


@pytest.mark.parametrize(
    "outline", [[[3, 2, 7, 2, 7, 6, 3, 6]], run_lengths(square(1), True), run_lengths(square(1), False)], ids=["polygon", "rle", "counts"]
)
def test_coco(tmp_path, save, outline):
    root = coco(tmp_path, save, outline)
    for source in (root, root / "annotations.json"):
        folder = open_folder(source)
        assert folder.class_names == ("background", "ant", "cat") and folder.instances and folder.layout == "COCO"
        np.testing.assert_array_equal(folder.mask(folder.items[0]), square(2))
        np.testing.assert_array_equal(folder.instance_map(folder.items[0]), square(1))
        assert folder.fingerprint.objects == (1, 1, 1)


def test_compressed_run_lengths_are_those_of_pycocotools():
    for size in (1, 7, 200, 3000):
        for density in (0.001, 0.1, 0.9):
            mask = (RNG.random((size, 40)) < density).astype(np.uint8)
            text = run_lengths(mask, True)["counts"]
            counts = _counts(text)
            np.testing.assert_array_equal(np.repeat(np.arange(len(counts)) % 2, counts), mask.ravel(order="F"))


def test_coco_small_objects_lie_on_top_and_crowds_are_ignored(tmp_path, save):
    root = coco(tmp_path, save, [[3, 2, 7, 2, 7, 6, 3, 6]], files=("a.png",))
    content = json.loads((root / "annotations.json").read_text())
    whole = {"image_id": 0, "segmentation": [[0, 0, 10, 0, 10, 12, 0, 12]]}
    content["annotations"].append({"id": 8, "category_id": 3, "iscrowd": 0, **whole})
    (root / "annotations.json").write_text(json.dumps(content))
    folder = open_folder(root)
    np.testing.assert_array_equal(folder.mask(folder.items[0]), np.where(square(1), 2, 1))
    content["annotations"][-1] |= {"iscrowd": 1}
    (root / "annotations.json").write_text(json.dumps(content))
    folder = open_folder(root)
    np.testing.assert_array_equal(folder.mask(folder.items[0]), np.where(square(1), 2, 255))
    np.testing.assert_array_equal(folder.instance_map(folder.items[0]), square(1))


def test_coco_files_of_each_split(tmp_path, save):
    coco(tmp_path, save, [[3, 2, 7, 2, 7, 6, 3, 6]], name="train.json", files=("a.png", "b.png"))
    coco(tmp_path, save, [[3, 2, 7, 2, 7, 6, 3, 6]], name="instances_val2017.json", files=("c.png",))
    folder = open_folder(tmp_path)
    assert names(folder.train) == ["a", "b"] and names(folder.val) == ["c"]


def test_coco_with_boxes_only_is_detection(tmp_path, save):
    folder = open_folder(coco(tmp_path, save, None))
    assert folder.task == "detection" and folder.describe()["task"] == "detection"
    with pytest.raises(InputError, match="has boxes but no masks"):
        folder.mask(folder.items[0])


# --- what the values mean --------------------------------------------------------------------------------------------------------------


def masks(root, save, *arrays, folder="masks", suffix=".png"):
    for i, array in enumerate(arrays):
        save(root / "images" / f"{i}.png", np.zeros((*array.shape[:2], 3), np.uint8))
        save(root / folder / f"{i}{suffix}", array)
    return root


@pytest.mark.parametrize("value", [1, 255, 7])
def test_two_values(tmp_path, save, value):
    folder = open_folder(masks(tmp_path, save, square(value), square(0)))
    assert folder.class_names == ("background", "foreground")
    np.testing.assert_array_equal(folder.mask(folder.items[0]), square(1))
    assert not folder.mask(folder.items[1]).any()


def test_class_numbers_with_255_ignored(tmp_path, save):
    mask = square(2)
    mask[0], mask[1] = 255, 1
    folder = open_folder(masks(tmp_path, save, mask, square(0)))
    assert folder.class_names == ("background", "class 1", "class 2")
    np.testing.assert_array_equal(folder.mask(folder.items[0]), mask)
    assert folder.fingerprint.ignored == pytest.approx(10 / 240)
    assert folder.fingerprint.class_images == (2, 1, 1)


def test_grey_values_far_apart_are_classes_in_their_order(tmp_path, save):
    mask = square(128)
    mask[0] = 255
    folder = open_folder(masks(tmp_path, save, mask, square(0)))
    assert folder.class_names == ("background", "grey 128", "grey 255")
    np.testing.assert_array_equal(folder.mask(folder.items[0]), np.where(mask == 128, 1, np.where(mask == 255, 2, 0)))


def test_palette_masks(tmp_path):
    image = Image.fromarray(square(2))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    for role in ("images", "masks"):
        (tmp_path / role).mkdir()
        image.save(tmp_path / role / "a.png")
    (tmp_path / "classes.txt").write_text("background\nred\ngreen\n")
    folder = open_folder(tmp_path)
    assert folder.class_names == ("background", "red", "green")
    np.testing.assert_array_equal(folder.mask(folder.items[0]), square(2))
    assert folder.image(folder.items[0]).shape == (*SIZE, 3)


def test_colour_coded_masks(tmp_path, save):
    mask = np.zeros((*SIZE, 3), np.uint8)
    mask[:4], mask[4:6] = (255, 0, 0), (255, 255, 255)
    expected = np.zeros(SIZE, np.uint8)
    expected[:4], expected[4:6] = 1, 2
    root = masks(tmp_path, save, mask, np.zeros_like(mask), np.full_like(mask, 255))
    folder = open_folder(root)
    assert folder.class_names == ("background", "#ff0000", "#ffffff")
    np.testing.assert_array_equal(folder.mask(folder.items[0]), expected)
    assert (folder.mask(folder.items[2]) == 2).all()
    (root / "paperworks.json").write_text('{"classes": ["red", "none", "paper"], "colors": [[255, 0, 0], [0, 0, 0], [255, 255, 255]]}')
    folder = open_folder(root)
    np.testing.assert_array_equal(folder.mask(folder.items[0]), np.array([1, 0, 2])[expected])


def cells(count, dtype="uint16"):
    """``count`` squares with a number each."""
    mask = np.zeros((64, 64), dtype)
    for i in range(count):
        y, x = divmod(i, 10)
        mask[6 * y : 6 * y + 4, 6 * x : 6 * x + 4] = i + 1
    return mask


@pytest.mark.parametrize(("count", "dtype"), [(12, "uint16"), (40, "uint8")])
def test_many_labels_in_one_piece_each_are_objects(tmp_path, save, count, dtype):
    folder = open_folder(masks(tmp_path, save, cells(count, dtype), cells(3, dtype)))
    assert folder.instances and folder.class_names == ("background", "object")
    assert folder.fingerprint.objects == (3, (count + 3) // 2, count)
    np.testing.assert_array_equal(folder.mask(folder.items[0]), cells(count) > 0)
    np.testing.assert_array_equal(folder.instance_map(folder.items[0]), cells(count))
    assert folder.instance_map(folder.items[0]).dtype == np.int32


def test_many_labels_in_many_pieces_are_classes(tmp_path, save):
    folder = open_folder(masks(tmp_path, save, np.tile(cells(12), (2, 2))))
    assert not folder.instances and len(folder.class_names) == 13
    assert folder.instance_map(folder.items[0]) is None


def test_the_folder_name_or_the_settings_say_objects(tmp_path, save):
    named = open_folder(masks(tmp_path / "a", save, cells(2, "uint8"), folder="instances"))
    assert named.instances and named.fingerprint.objects == (2, 2, 2)
    root = masks(tmp_path / "b", save, cells(2, "uint8"))
    assert not open_folder(root).instances
    (root / "paperworks.json").write_text('{"masks": "instances", "classes": ["nucleus"]}')
    assert open_folder(root).instances and open_folder(root).class_names == ("background", "nucleus")
    (tmp_path / "a" / "paperworks.json").write_text('{"masks": "classes"}')
    assert not open_folder(tmp_path / "a").instances


def test_objects_in_colours_and_32_bit_numbers(tmp_path, save):
    mask = np.zeros((*SIZE, 3), np.uint8)
    mask[:3], mask[8:] = (255, 0, 0), (0, 0, 9)
    root = masks(tmp_path / "a", save, mask, folder="instances")
    folder = open_folder(root)
    found = folder.instance_map(folder.items[0])
    assert len(np.unique(found)) == 3 and not found[3:8].any() and folder.fingerprint.objects == (2, 2, 2)
    root = masks(tmp_path / "b", save, square(100_000, "int32"), folder="instances", suffix=".tif")
    folder = open_folder(root)
    np.testing.assert_array_equal(folder.instance_map(folder.items[0]), square(100_000, "int32"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.json", '["sky", "road", "car", "Unlabelled"]'),
        ("classes.json", '{"sky": 0, "road": 1, "car": 2, "void": 3}'),
        ("classes.json", '{"classes": ["sky", "road", "car"], "ignore": 3}'),
        ("classes.json", '{"0": "sky", "1": "road", "2": "car", "3": "void"}'),
        ("classes.json", '[{"name": "sky"}, {"name": "road"}, {"name": "car"}, {"name": "ignore"}]'),
        ("paperworks.json", '{"classes": ["sky", "road", "car"], "ignore": [3]}'),
        ("classes.txt", "sky\nroad\ncar\nunlabeled\n"),
    ],
)
def test_class_names_and_what_is_ignored(tmp_path, save, file, content):
    mask = square(2)
    mask[0], mask[1] = 3, 1
    root = masks(tmp_path, save, mask, square(0))
    (root / file).write_text(content)
    folder = open_folder(root)
    assert folder.class_names == ("sky", "road", "car") and not folder.problems
    np.testing.assert_array_equal(folder.mask(folder.items[0]), np.where(mask == 3, 255, mask))


def test_255_is_ignored_beside_named_classes_unless_another_value_is(tmp_path, save):
    mask = square(2)
    mask[0], mask[1] = 255, 1
    root = masks(tmp_path, save, mask, square(1))
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    folder = open_folder(root)
    np.testing.assert_array_equal(folder.mask(folder.items[0]), mask)
    (root / "paperworks.json").write_text('{"ignore": 2}')
    folder = open_folder(root)
    assert [p.path.name for p in folder.problems if "labels 255" in p.what] == ["0.png"]


def test_named_foreground_and_named_greys(tmp_path, save):
    root = masks(tmp_path, save, square(255))
    (root / "classes.txt").write_text("vessel\n")
    assert open_folder(root).class_names == ("background", "vessel")
    mask = square(128)
    mask[0] = 255
    root = masks(tmp_path / "b", save, mask)
    (root / "classes.txt").write_text("none\nrim\ncore\n")
    folder = open_folder(root)
    assert set(np.unique(folder.mask(folder.items[0]))) == {0, 1, 2}


# --- fingerprint, memory, processes ----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_unit_images(pairs):
    folder = open_folder(pairs)
    images = torch.stack([folder.unit(folder.image(i)) for i in folder.items])
    assert folder.fingerprint.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert folder.fingerprint.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist(), abs=1e-5)
    assert folder.fingerprint.class_pixels == pytest.approx((104 / 120, 16 / 120))


@pytest.mark.parametrize(("top", "expected"), [(200, 255), (700, 1023), (4095, 4095), (4096, 16383), (65535, 65535)])
def test_range_of_16_bits_is_the_smallest_depth_that_covers_it(tmp_path, save, top, expected):
    image = np.zeros(SIZE, np.uint16)
    image[0, 0] = top
    save(tmp_path / "images" / "a.png", image)
    save(tmp_path / "masks" / "a.png", square())
    folder = open_folder(tmp_path)
    assert folder.fingerprint.range == (0, expected) and folder.fingerprint.dtype == "uint16" and folder.fingerprint.bit_depth == 16
    assert folder.unit(folder.image(folder.items[0]))[0, 0, 0] == pytest.approx(top / expected)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_range_of_floats_and_signed_numbers_leaves_out_extremes(tmp_path, save, dtype):
    rng = np.random.default_rng(0)
    for name in "ab":
        image = (1000 * rng.normal(size=(80, 80))).astype(dtype)
        image[0, 0] = 30000
        save(tmp_path / "images" / f"{name}.tif", image)
        save(tmp_path / "masks" / f"{name}.png", np.tile(square(), (8, 8))[:80, :80])
    folder = open_folder(tmp_path)
    assert folder.fingerprint.range == pytest.approx((-2576, 2576), rel=0.1)
    images = torch.stack([folder.unit(folder.image(i)) for i in folder.items])
    assert folder.fingerprint.mean[0] == pytest.approx(float(images.mean()), abs=1e-4)
    assert folder.fingerprint.std[0] == pytest.approx(float(images.std()), abs=1e-4)


def test_grey_rgb_and_alpha_may_be_mixed(tmp_path, save):
    for name, channels in (("a", 1), ("b", 3), ("c", 4)):
        save(tmp_path / "images" / f"{name}.png", picture(channels))
        save(tmp_path / "masks" / f"{name}.png", square())
    folder = open_folder(tmp_path)
    images = torch.stack([folder.unit(folder.image(i)) for i in folder.items])
    assert folder.fingerprint.channels == 3 and images.shape == (3, 3, *SIZE)
    assert folder.fingerprint.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=1e-5)


def test_sizes_and_description_go_into_json(tmp_path, save):
    for i, size in enumerate([(8, 20), (10, 12), (16, 6)]):
        save(tmp_path / "images" / f"{i}.png", np.zeros(size, np.uint8))
        save(tmp_path / "masks" / f"{i}.png", np.eye(*size, dtype=np.uint8))
    (tmp_path / "paperworks.json").write_text('{"spacing": [0.5, 0.25], "channels": ["DAPI"], "classes": ["none", "line"]}')
    folder = open_folder(tmp_path)
    said = json.loads(json.dumps(folder.describe()))
    assert said["sizes"] == {"min": [8, 6], "median": [10, 12], "max": [16, 20]}
    assert said["spacing"] == [0.5, 0.25] and said["channel_names"] == ["DAPI"] and said["task"] == "segmentation"
    assert [c["name"] for c in said["classes"]] == ["none", "line"] and sum(said["splits"].values()) == said["items"] == 3


def test_progress_counts_every_file(pairs):
    calls = []
    open_folder(pairs, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]


def test_second_opening_reads_no_pixels_until_a_file_changes(pairs, save, monkeypatch):
    (pairs / "images" / "f.png").write_bytes(b"")
    first = open_folder(pairs)
    reads = []
    monkeypatch.setattr("paperworks.data.folder.read_array", lambda path: reads.append(path) or read_image(path))
    second = open_folder(pairs)
    assert not reads
    assert (second.fingerprint, second.coding, second.problems, second.items) == (
        first.fingerprint,
        first.coding,
        first.problems,
        first.items,
    )
    save(pairs / "images" / "f.png", picture())
    third = open_folder(pairs)
    assert len(reads) == 6 and not third.problems and third.fingerprint.sha256 != first.fingerprint.sha256
    (pairs / "paperworks.json").write_text('{"classes": ["a", "b"]}')
    assert open_folder(pairs).class_names == ("a", "b")


def test_contents_and_names_make_the_hash_and_the_place_does_not(pairs, tmp_path_factory, save):
    copy = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(pairs, copy)
    assert open_folder(copy).fingerprint == open_folder(pairs).fingerprint
    save(copy / "masks" / "a.png", np.roll(square(), 1))
    assert open_folder(copy).fingerprint.sha256 != open_folder(pairs).fingerprint.sha256


@pytest.mark.parametrize("content", [None, "not json", "[1]", "{}"])
def test_a_cache_that_cannot_be_used_is_no_error(pairs, own_cache, monkeypatch, content):
    if content is None:
        (own_cache / "file").write_text("")
        monkeypatch.setenv("PAPERWORKS_CACHE", str(own_cache / "file"))
        assert len(open_folder(pairs).items) == 6
    else:
        open_folder(pairs)
        for kept in own_cache.glob("*.json"):
            kept.write_text(content)
    assert len(open_folder(pairs).items) == 6


def test_arrays_are_decoded_once_and_within_the_budget(pairs, monkeypatch):
    counts = []
    monkeypatch.setattr("paperworks.data.folder.read_array", lambda path: counts.append(path) or read_image(path))
    folder = open_folder(pairs)
    for _ in range(2):
        for item in folder.items:
            folder.image(item)
    assert len(counts) == 6
    counts.clear()
    monkeypatch.setenv("PAPERWORKS_CACHE", os.devnull)
    folder = open_folder(pairs, memory=2 * (360 + 120))
    for item in folder.items:
        folder.image(item)
    assert len(counts) == 6 + 4
    with pytest.raises(ValueError, match="read-only"):
        folder.image(folder.items[0])[0] = 1


class Samples(Dataset):
    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return len(self.folder.items)

    def __getitem__(self, i):
        item = self.folder.items[i]
        return self.folder.unit(self.folder.image(item)), torch.from_numpy(self.folder.mask(item))


def test_a_folder_travels_to_workers_without_its_arrays(pairs):
    folder = open_folder(pairs)
    assert len(pickle.dumps(folder)) < 20_000
    copy = pickle.loads(pickle.dumps(folder))
    np.testing.assert_array_equal(copy.image(copy.items[0]), folder.image(folder.items[0]))
    batches = list(DataLoader(Samples(copy), batch_size=3, num_workers=1))
    assert [tuple(b[0].shape) for b in batches] == [(3, 3, *SIZE)] * 2 and batches[0][1].max() == 1
