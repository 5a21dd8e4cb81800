"""Decoding: every kind of file keeps its type, its channels and its values."""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from paperworks.data.images import COLOUR, read_header, read_image, read_mask, unit
from paperworks.errors import InputError

RNG = np.random.default_rng(0)


def png(width, height, depth, colour, rows=b"", extra=b""):
    """A PNG put together by hand, so that the header may lie."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_integers_come_back_as_they_are(tmp_path, suffix, channels, dtype):
    array = RNG.integers(0, np.iinfo(dtype).max, (7, 5, channels), dtype=dtype, endpoint=True)
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(array if channels > 1 else np.ascontiguousarray(array[..., 0])))
    else:
        tifffile.imwrite(path, array, photometric="rgb" if channels > 2 else "minisblack", planarconfig="contig" if channels > 1 else None)
    read = read_image(path)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)
    header = read_header(path)
    assert (header.width, header.height, header.channels, header.dtype, header.frames) == (5, 7, channels, dtype, 1)
    assert header.bit_depth == 8 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("options", [{"photometric": "rgb", "planarconfig": "separate"}, {"imagej": True, "metadata": {"axes": "CYX"}}])
def test_planes_of_a_tiff_become_the_last_axis(tmp_path, options):
    array = RNG.integers(0, 65536, (3, 7, 5), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), array.transpose(1, 2, 0))
    assert read_header(tmp_path / "a.tif").channels == 3


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint32"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_other_tiff_types(tmp_path, dtype, compression):
    array = RNG.normal(size=(7, 5)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, compression=compression)
    read = read_image(tmp_path / "a.tif")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read[..., 0], array)


def test_large_plain_tiff_is_mapped_and_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("paperworks.data.images._MAP_FROM", 100)
    array = RNG.integers(0, 255, (40, 30, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb")
    read = read_image(tmp_path / "a.tif")
    assert isinstance(read, np.memmap)
    np.testing.assert_array_equal(read, array)
    tifffile.imwrite(tmp_path / "b.tif", array, photometric="rgb", compression="zlib")
    assert not isinstance(read_image(tmp_path / "b.tif"), np.memmap)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".webp", ".ppm"])
def test_other_formats(tmp_path, suffix):
    array = np.full((8, 6, 3), (200, 100, 50), np.uint8)
    Image.fromarray(array).save(tmp_path / f"a{suffix}", **({"quality": 95} if suffix in (".jpg", ".webp") else {}))
    read = read_image(tmp_path / f"a{suffix}")
    assert read.shape == (8, 6, 3) and read.dtype == np.uint8
    assert np.abs(read.astype(int) - array).max() <= 6


def test_sixteen_bit_pgm(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 258, 40000))
    assert read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [258, 40000]
    assert read_header(tmp_path / "a.pgm").dtype == "uint16"


def test_the_first_bytes_say_the_format_and_not_the_suffix(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 3)


def test_cmyk_and_one_bit_images(tmp_path):
    Image.new("CMYK", (4, 3)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 3)
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "b.png")
    assert sorted(np.unique(read_image(tmp_path / "b.png"))) == [0, 255]
    assert read_header(tmp_path / "b.png").bit_depth == 1


@pytest.mark.parametrize(
    ("orientation", "turn"), [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)]
)
def test_jpeg_is_turned_upright(tmp_path, orientation, turn):
    array = np.zeros((16, 24), np.uint8)
    array[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = turn(array)
    read = read_image(tmp_path / "a.jpg")[..., 0]
    header = read_header(tmp_path / "a.jpg")
    assert (header.height, header.width, header.orientation) == (*upright.shape, orientation)
    np.testing.assert_array_equal(read > 128, upright > 128)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_palette_is_rgb_as_image_and_indices_as_mask(tmp_path, suffix):
    indices = RNG.integers(0, 4, (9, 11)).astype(np.uint8)
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.ravel().tolist())
    path = tmp_path / f"a{suffix}"
    image.save(path)
    np.testing.assert_array_equal(read_image(path), colours[indices])
    np.testing.assert_array_equal(read_mask(path), indices)
    assert read_header(path).channels == 3


def test_palette_with_transparency_does_not_warn(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize(("depth", "byte", "expected"), [(1, 0b10110000, [1, 0, 1, 1]), (2, 0b00011011, [0, 1, 2, 3])])
def test_masks_of_few_bits_keep_their_numbers(tmp_path, depth, byte, expected):
    (tmp_path / "a.png").write_bytes(png(4, 1, depth, 0, bytes([0, byte])))
    assert read_mask(tmp_path / "a.png")[0].tolist() == expected


@pytest.mark.parametrize("compression", [None, "group4"])
def test_one_bit_tiff_mask(tmp_path, compression):
    mask = RNG.random((9, 11)) > 0.5
    Image.fromarray(mask).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), mask)


@pytest.mark.parametrize(
    ("dtype", "suffix", "top"), [("uint8", ".png", 255), ("uint16", ".png", 60000), ("uint16", ".tif", 60000), ("int32", ".tif", 100000)]
)
def test_label_numbers(tmp_path, save, dtype, suffix, top):
    mask = np.array([[0, 1], [2, top]], dtype)
    np.testing.assert_array_equal(read_mask(save(tmp_path / f"a{suffix}", mask)), mask)


def test_float_mask_of_whole_numbers_only(tmp_path, save):
    assert read_mask(save(tmp_path / "a.tif", np.array([[0, 3.0]], np.float32))).tolist() == [[0, 3]]
    for bad in (0.5, np.nan):
        with pytest.raises(InputError, match=r"b\.tif.*whole numbers"):
            read_mask(save(tmp_path / "b.tif", np.array([[0, bad]], np.float32)))


def test_rgb_mask_is_grey_where_channels_agree_and_coloured_otherwise(tmp_path, save):
    grey = np.repeat(np.array([[0, 7]], np.uint8)[..., None], 3, 2)
    assert read_mask(save(tmp_path / "a.png", grey)).tolist() == [[0, 7]]
    alpha = np.dstack([grey, np.full((1, 2), 9, np.uint8)])
    assert read_mask(save(tmp_path / "b.png", alpha)).tolist() == [[0, 7]]
    colour = np.array([[[0, 0, 0], [1, 2, 3]]], np.uint8)
    assert read_mask(save(tmp_path / "c.png", colour)).tolist() == [[COLOUR, COLOUR + 0x010203]]


def test_jpeg_mask_only_where_it_is_black_and_white(tmp_path, save):
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "a.jpg", quality=90)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.jpg"), mask)
    with pytest.raises(InputError, match="JPEG, which blurs labels"):
        read_mask(save(tmp_path / "b.jpg", mask // 2))


def test_large_sizes_are_refused_from_the_header(tmp_path, save):
    (tmp_path / "bomb.png").write_bytes(png(100_000, 100_000, 8, 2))
    assert read_header(tmp_path / "bomb.png").width == 100_000
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match=r"bomb\.png.*100000x100000"):
            read(tmp_path / "bomb.png")
    save(tmp_path / "a.png", np.zeros((10, 10), np.uint8))
    assert read_image(tmp_path / "a.png", max_pixels=100).shape == (10, 10, 1)
    for path in (tmp_path / "a.png", save(tmp_path / "a.tif", np.zeros((10, 10), np.uint8))):
        with pytest.raises(InputError, match="more than the 99 allowed"):
            read_image(path, max_pixels=99)
    with pytest.raises(InputError, match=r"bomb\.bmp"):
        (tmp_path / "bomb.bmp").write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0))
        read_image(tmp_path / "bomb.bmp")


def test_pillow_guard_is_left_alone():
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3


def test_several_frames_are_no_image(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 8, 8), np.uint8), photometric="minisblack")
    Image.new("L", (4, 4)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (4, 4), 255)])
    assert read_header(tmp_path / "a.tif").frames == 5
    for name, frames in (("a.tif", 5), ("a.gif", 2)):
        with pytest.raises(InputError, match=f"holds {frames} frames"):
            read_image(tmp_path / name)


def test_unit():
    array = np.array([[[0], [51]], [[255], [102]]], np.uint8)
    image = unit(array, (0.0, 255.0), 1)
    assert image.dtype == torch.float32 and image.shape == (1, 2, 2)
    torch.testing.assert_close(image[0], torch.tensor([[0, 0.2], [1, 0.4]]))
    assert unit(np.array([[[-5.0], [20.0]]], np.float32), (0.0, 10.0), 1).flatten().tolist() == [0, 1]


def test_unit_brings_channels_in_line():
    rgba = RNG.integers(0, 256, (3, 4, 4), dtype=np.uint8)
    full = (0.0, 255.0)
    torch.testing.assert_close(unit(rgba, full, 3), unit(rgba[..., :3], full, 3))
    torch.testing.assert_close(unit(rgba[..., :1], full, 3), unit(rgba[..., :1], full, 1).expand(3, -1, -1))
    torch.testing.assert_close(unit(np.repeat(rgba[..., :1], 3, 2), full, 1), unit(rgba[..., :1], full, 1))
    with pytest.raises(InputError, match="3 channels where 1"):
        unit(rgba[..., :3], full, 1)
