"""What is broken is found before anything trains, by file name, and the rest can be used."""

from __future__ import annotations

import io
import json
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from paperworks.data import open_folder, read_header, read_image, read_mask
from paperworks.errors import InputError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)


def encoded(kind, array=NOISE, **options):
    out = io.BytesIO()
    if kind == "TIFF":
        tifffile.imwrite(out, array, **options)
    elif array.dtype == np.uint16:
        return imagecodecs.png_encode(array)
    else:
        Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


def half(data):
    return data[: len(data) // 2]


def bomb():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def flipped(data):
    """A bit of the compressed pixels turned over."""
    at = data.index(b"IDAT") + 40
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


FLOATS = np.ones((12, 10), np.float32)
BROKEN = {
    "empty": b"",
    "one byte": b"\x89",
    "text": b"this is no picture",
    "html": b"<!DOCTYPE html><html>404 not found</html>",
    "signature only": b"\x89PNG\r\n\x1a\n",
    "half a PNG": half(encoded("PNG")),
    "half a palette PNG": half(encoded("PNG", RNG.integers(0, 255, (40, 40), dtype=np.uint8))[:-12]),
    "half a 16-bit PNG": half(encoded("PNG", NOISE.astype(np.uint16) * 256)),
    "a damaged PNG": flipped(encoded("PNG")),
    "half a JPEG": half(encoded("JPEG")),
    "a JPEG without its end": encoded("JPEG")[:-2],
    "half a TIFF": half(encoded("TIFF")),
    "half a packed TIFF": half(encoded("TIFF", compression="zlib")),
    "a TIFF's first bytes": encoded("TIFF")[:8],
    "a TIFF that points nowhere": b"II*\0\xff\xff\xff\x7f",
    "half a BMP": half(encoded("BMP")),
    "half a GIF": half(encoded("GIF")),
    "a bomb": bomb(),
    "a volume": encoded("TIFF", np.zeros((4, 12, 10), np.uint8), photometric="minisblack"),
    "NaN": encoded("TIFF", np.where(np.eye(12, 10) > 0, np.nan, FLOATS)),
    "infinity": encoded("TIFF", np.where(np.eye(12, 10) > 0, np.inf, FLOATS)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_image_is_one_line_that_names_it(tmp_path, what):
    path = tmp_path / "broken.png"
    path.write_bytes(BROKEN[what])
    for read in (read_image, read_mask):
        with pytest.raises(InputError) as caught:
            read(path)
        line = str(caught.value)
        assert line.startswith(str(path)) and "\n" not in line and "; " in line and len(line) < len(str(path)) + 250


@pytest.mark.parametrize("what", [*BROKEN, "folder", "link"])
@pytest.mark.parametrize("role", ["images", "masks"])
def test_a_broken_file_is_listed_and_the_rest_is_used(pairs, role, what):
    path = pairs / role / "c.png"
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(pairs / "nowhere.png")
    else:
        path.write_bytes(BROKEN[what])
    folder = open_folder(pairs)
    assert [i.name for i in folder.items] == list("abdef")
    assert [p.path for p in folder.problems] == [path] and folder.problems[0].what and folder.problems[0].fix
    for item in folder.items:
        folder.image(item), folder.mask(item)


@pytest.mark.parametrize("read", [read_header, read_image, read_mask])
def test_a_path_that_is_no_file(tmp_path, read):
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "missing.png", tmp_path / "link.png"):
        with pytest.raises(InputError, match=str(path)):
            read(path)


def test_permission(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr("paperworks.data.images._magic", refuse)
    with pytest.raises(InputError, match=r"a\.png may not be read"):
        read_image(tmp_path / "a.png")


def problems(root):
    folder = open_folder(root)
    return folder, [(p.path.relative_to(root).as_posix(), p.what) for p in folder.problems]


def test_a_mask_of_another_size(pairs, save):
    save(pairs / "masks" / "c.png", np.zeros((12, 11), np.uint8))
    folder, found = problems(pairs)
    assert found == [("masks/c.png", "is 11x12 and its image 10x12")] and len(folder.items) == 5


def test_a_mask_drawn_on_the_picture_before_it_was_turned_upright(pairs):
    exif = Image.Exif()
    exif[0x0112] = 6
    (pairs / "images" / "c.png").unlink()
    Image.fromarray(NOISE).save(pairs / "images" / "c.jpg", exif=exif)
    _, found = problems(pairs)
    assert found == [("masks/c.png", "is 10x12 and its image 12x10 (after its EXIF orientation)")]


def test_labels_beyond_the_named_classes(pairs, save):
    mask = np.zeros((12, 10), np.uint8)
    for name in "abcdef":
        save(pairs / "masks" / f"{name}.png", mask + (name in "ab"))
    mask[0, :2] = 7, 9
    save(pairs / "masks" / "c.png", mask)
    (pairs / "classes.txt").write_text("background\ncell\n")
    folder, found = problems(pairs)
    assert [p for p, _ in found] == ["masks/c.png"] and "labels 7, 9" in found[0][1] and "background, cell" in found[0][1]
    assert len(folder.items) == 5


def test_negative_labels(pairs, save):
    (pairs / "masks" / "c.png").unlink()
    save(pairs / "masks" / "c.tif", np.full((12, 10), -1, np.int32))
    _, found = problems(pairs)
    assert [p for p, _ in found] == ["masks/c.tif"] and "labels -1" in found[0][1]


def test_a_mask_that_was_resampled(pairs, save):
    save(pairs / "masks" / "c.png", NOISE[..., 0])
    folder, found = problems(pairs)
    assert [p for p, _ in found] == ["masks/c.png"] and folder.class_names == ("background", "foreground")


def test_missing_and_lonely_masks(pairs):
    (pairs / "masks" / "c.png").rename(pairs / "masks" / "z.png")
    folder, found = problems(pairs)
    assert found == [("masks/z.png", "is a mask without an image"), ("images/c.png", "has no mask")]
    assert [i.name for i in folder.unlabelled] == ["c"]


def test_duplicate_images_and_masks(pairs, save):
    save(pairs / "images" / "c.jpg", NOISE)
    save(pairs / "masks" / "d.tif", np.zeros((12, 10), np.uint8))
    folder, found = problems(pairs)
    assert ("images/c.png", "has the same name as c.jpg") in found
    assert ("masks/d.tif", "is a second mask of d.png beside d.png") in found and len(found) == 2
    assert [i.name for i in folder.items] == list("abef")


def test_images_of_another_type_than_the_rest(pairs, save):
    save(pairs / "images" / "c.png", NOISE.astype(np.uint16))
    _, found = problems(pairs)
    assert found == [("images/c.png", "is uint16 where most images are uint8")]


def test_channels_that_do_not_agree(tmp_path, save):
    for name, channels in (("a", 5), ("b", 5), ("c", 6)):
        tiff = tmp_path / "images" / f"{name}.tif"
        tiff.parent.mkdir(exist_ok=True)
        tifffile.imwrite(tiff, np.zeros((12, 10, channels), np.uint8), photometric="minisblack", planarconfig="contig")
        save(tmp_path / "masks" / f"{name}.png", np.eye(12, 10, dtype=np.uint8))
    folder, found = problems(tmp_path)
    assert folder.fingerprint.channels == 5 and found == [("images/c.tif", "has 6 channels where most images have 5")]


def test_nnunet_problems(tmp_path, save):
    for name in ("a_0000", "a_0001", "b_0000", "c", "d_0000", "d_0001"):
        save(tmp_path / "imagesTr" / f"{name}.png", NOISE[..., 0])
    for name in "abe":
        save(tmp_path / "labelsTr" / f"{name}.png", np.eye(12, 10, dtype=np.uint8))
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "x", "1": "y"}, "labels": {"background": 0, "line": 1}}')
    folder, found = problems(tmp_path)
    assert [i.name for i in folder.items] == ["a"]
    assert {p for p, _ in found} >= {"imagesTr/c.png", "imagesTr/b_0000.png", "imagesTr/d_0000.png", "labelsTr/e.png"}


def test_channel_files_that_differ(tmp_path, save):
    for name in "ab":
        save(tmp_path / "imagesTr" / f"{name}_0000.png", NOISE[..., 0])
        save(tmp_path / "imagesTr" / f"{name}_0001.png", NOISE[: 12 if name == "a" else 8, :, 0])
        save(tmp_path / "labelsTr" / f"{name}.png", np.eye(12, 10, dtype=np.uint8))
    _, found = problems(tmp_path)
    assert found[0] == ("imagesTr/b_0001.png", "differs in size or type from b_0000.png")


# --- nothing usable is left --------------------------------------------------------------------------------------------------------------


def test_path_missing(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        open_folder(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    for labelled in (True, False):
        with pytest.raises(InputError, match="holds no images"):
            open_folder(tmp_path, labelled=labelled)


def test_folder_without_masks(pairs):
    for mask in (pairs / "masks").iterdir():
        mask.unlink()
    with pytest.raises(InputError, match=r"6 images and no masks; put masks"):
        open_folder(pairs)


def test_a_file_where_a_folder_is_expected(pairs):
    with pytest.raises(InputError, match="give the folder"):
        open_folder(pairs / "images" / "a.png")
    (pairs / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="give the folder"):
        open_folder(pairs / "notes.txt", labelled=False)


def test_everything_broken(tmp_path, save):
    save(tmp_path / "masks" / "a.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"nothing usable; the first of 1 problems: .*a\.png is empty"):
        open_folder(tmp_path)


def test_photographs_as_masks(tmp_path, save):
    photograph = RNG.integers(0, 200, (64, 64, 3), dtype=np.uint8)
    for name in "ab":
        save(tmp_path / "images" / f"{name}.png", photograph)
        save(tmp_path / "masks" / f"{name}.png", photograph[..., 0])
    with pytest.raises(InputError, match="200 different values, as pictures do"):
        open_folder(tmp_path)
    for name in "ab":
        save(tmp_path / "masks" / f"{name}.png", photograph)
    with pytest.raises(InputError, match="colours, as pictures do"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("paperworks.json", '{"classes": ["a",', "not valid JSON .line 1"),
        ("paperworks.json", "[]", "must be an object"),
        ("paperworks.json", '{"clases": ["a"]}', "unknown key 'clases'; did you mean 'classes'"),
        ("paperworks.json", '{"classes": "cell"}', "'classes' must be a list of names"),
        ("paperworks.json", '{"classes": ["a", "a"]}', "the same name"),
        ("paperworks.json", '{"ignore": "255"}', "'ignore' must be"),
        ("paperworks.json", '{"masks": "boxes"}', "'masks' must be"),
        ("paperworks.json", '{"spacing": [1]}', "'spacing' must be two"),
        ("paperworks.json", '{"classes": ["a", "b"], "colors": [[0, 0, 0]]}', "'colors' must be one"),
        ("paperworks.json", '{"labels": 3}', "'labels' must be the name"),
        ("paperworks.json", '{"channels": ["DAPI"]}', "1 channels are named .DAPI. and the images have 3"),
        ("paperworks.json", '{"masks": "instances", "classes": ["a", "b", "c"]}', "one class, and 3 classes are named"),
        ("classes.json", '{"a": 0, "b": 2}', "without gaps"),
        ("classes.json", '{"a": "x"}', "must map names to numbers"),
        ("classes.json", "3", "'classes' must be a list"),
    ],
)
def test_settings_that_cannot_be_understood(pairs, file, text, message):
    (pairs / file).write_text(text)
    with pytest.raises(InputError, match=message):
        open_folder(pairs)


# --- COCO --------------------------------------------------------------------------------------------------------------------------------


def coco(root, save, **changes):
    for name in "ab":
        save(root / "images" / f"{name}.png", NOISE)
    content = {
        "images": [{"id": i, "file_name": f"{n}.png", "height": 12, "width": 10} for i, n in enumerate("ab")],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 6, 1, 6, 6]], "iscrowd": 0}
            for i in range(2)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    for where, value in changes.items():
        part, _, field = where.partition("__")
        content[part][-1][field] = value
    (root / "annotations.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations__category_id": 9}, "has the category 9, which annotations.json does not list"),
        ({"annotations__segmentation": [[1, 1, 6]]}, "polygon without three corners"),
        ({"annotations__segmentation": [[1, 1, 6, 1, 6, 1e9]]}, "corners far outside"),
        ({"annotations__segmentation": [[1, 1, 6, 1, 6, "x"]]}, "cannot be read"),
        ({"annotations__segmentation": {"size": [5, 5], "counts": "x"}}, "is [5, 5] large and its image [12, 10]"),
        ({"annotations__segmentation": {"size": [12, 10], "counts": [1, 2]}}, "do not add up"),
        ({"annotations__segmentation": {"size": [12, 10], "counts": [1.5, 118.5]}}, "do not add up"),
        ({"annotations__segmentation": {"size": [12, 10], "counts": [-5, 125]}}, "do not add up"),
        ({"annotations__segmentation": {"size": [12, 10], "counts": "PPPPPP"}}, "do not add up"),
        ({"annotations__segmentation": {"size": [12, 10], "counts": "0" * 1000}}, "do not add up"),
        ({"annotations__segmentation": {"size": [12, 10], "counts": "\ud800"}}, "cannot be read"),
        ({"annotations__segmentation": [[1, 1, 6, 1, 6, 10**400]]}, "cannot be read"),
        ({"annotations__segmentation": {"size": [12, 10], "counts": None}}, "has an outline"),
        ({"annotations__segmentation": {"counts": [120]}}, "cannot be read"),
        ({"annotations__segmentation": None}, "has a box and no outline"),
        ({"annotations__image_id": 5}, "annotations of image 5, which it does not list"),
        ({"images__height": 99}, "is 10x12 and annotations.json says 10x99"),
        ({"images__file_name": "nowhere.png"}, "names 'nowhere.png', which is not there"),
        ({"images__id": 0}, "twice"),
    ],
)
def test_coco_problems(tmp_path, save, changes, message):
    folder = open_folder(coco(tmp_path, save, **changes))
    assert message in " | ".join(str(p) for p in folder.problems)
    assert "a" in [i.name for i in folder.items]
    for item in folder.items:
        folder.mask(item)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"annotations\.json is not valid JSON .line 1"),
        ('{"images": {}, "annotations": []}', "'images' must be a list"),
        ('{"images": [{"id": 1}], "annotations": []}', "entry 0 of 'images' has no 'file_name'"),
        ('{"images": [{"id": 1, "file_name": "a.png", "width": "x", "height": 2}], "annotations": []}', "has 'x' as 'width'"),
        ('{"images": [], "annotations": [{"image_id": [1], "category_id": 1}]}', "has .1. as 'image_id'"),
        ('{"images": [], "annotations": [{"image_id": 1}]}', "entry 0 of 'annotations' has no 'category_id'"),
    ],
)
def test_coco_files_that_cannot_be_understood(tmp_path, save, text, message):
    coco(tmp_path, save)
    (tmp_path / "annotations.json").write_text(text)
    for source in (tmp_path, tmp_path / "annotations.json"):
        with pytest.raises(InputError, match=message):
            open_folder(source)


def test_a_json_file_that_is_not_coco(tmp_path, save):
    coco(tmp_path, save)
    (tmp_path / "annotations.json").write_text('{"hello": 1}')
    with pytest.raises(InputError, match="is not COCO"):
        open_folder(tmp_path / "annotations.json")
