"""Tiled prediction: exact where it can be, seamless elsewhere, in memory that does not grow with the height."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from paperworks.data.tiff import TiffRows, write_tiff
from paperworks.errors import InputError
from paperworks.tasks.base import Grid
from paperworks.tasks.tiling import _axis, box, padded, predict_array, predict_slabs


class Valid(nn.Module):
    """Two poolings without padding: phases matter, and the output is smaller than the input."""

    grid = Grid(4, offset=2, margin=8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.up, self.end = nn.ConvTranspose2d(4, 4, 4, stride=4), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.a(x).relu(), 2)
        x = torch.max_pool2d(self.b(x).relu(), 2)
        return self.end(self.up(self.c(x).relu()))


@pytest.fixture(scope="module")
def valid() -> nn.Module:
    torch.manual_seed(0)
    return Valid().eval()


@pytest.fixture(scope="module")
def same() -> nn.Module:
    """Receptive field of 4 pixels to either side."""
    torch.manual_seed(0)
    return nn.Sequential(*(m for i in range(4) for m in (nn.Conv2d(3 if i else 1, 3, 3, padding=1), nn.Tanh()))).eval()


def image(height: int, width: int, channels: int = 1) -> Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(5))


def test_the_valid_network_is_what_its_grid_says(valid):
    for k in (6, 9):
        n = 4 * k + 2
        assert valid(torch.zeros(1, 1, n, n)).shape[-1] == n - 2 * Valid.grid.margin


@pytest.mark.parametrize(("window", "batch"), [(1, 1), (16, 1), (23, 3), (64, 50)])
def test_without_padding_tiles_are_exact(valid, window, batch):
    """Down to the border, where both sides see the same mirror image."""
    x = image(133, 97)
    whole = predict_array(valid, x, Valid.grid, window=1000)
    with torch.inference_mode():
        mirrored = nn.functional.pad(x, (8, 30, 8, 30), mode="reflect")
        direct = valid(mirrored[None, :, : 134 + 16, : 98 + 16])[0, :, :133, :97]
    assert (whole - direct).abs().max() < 1e-6
    tiled = predict_array(valid, x, Valid.grid, window=window, batch=batch)
    assert (tiled - whole).abs().max() < 1e-6


def test_steps_off_the_grid_would_not_be_exact(valid):
    """Why origins are multiples: the same network, cut at a step that is none, disagrees with itself."""
    x = image(80, 80)
    whole = predict_array(valid, x, Valid.grid, window=1000)
    with torch.inference_mode():
        off = valid(x[None, :, 2:64, 2:64])[0]
    assert (off - whole[:, 10:56, 10:56]).abs().max() > 1e-2


def test_with_padding_tiles_are_exact_off_their_edges(same):
    x, grid = image(120, 90), Grid()
    whole = predict_array(same, x, grid, window=1000)
    assert torch.equal(whole, same(x[None])[0].detach())
    tiled = predict_array(same, x, grid, window=40, overlap=0.5, batch=4)
    rows, columns = (_axis(n, grid, 40, 0.5) for n in (120, 90))
    # Share of what reaches each pixel from windows that see all of its receptive field.
    seen = [torch.zeros(n) for n in (120, 90)]
    for axis, total in zip((rows, columns), seen):
        for o, w in zip(axis.origins, axis.weights):
            trusted = torch.ones(40)
            if o > 0:
                trusted[:4] = 0
            if o + 40 < len(total):
                trusted[-4:] = 0
            total[o : o + 40] += (w * trusted)[: len(total) - o]
    exact = (seen[0][:, None] > 0.99999) & (seen[1] > 0.99999)
    assert 0.3 < exact.float().mean() < 1
    error = (tiled - whole).abs().amax(0)
    assert error[exact].max() < 1e-5
    assert error.max() < 0.02 < (predict_array(same, x, grid, window=40, overlap=0) - whole).abs().max()  # blending is worth its price


@pytest.mark.parametrize("grid", [Grid(), Grid(16), Grid(8, offset=1), Grid(16, offset=12, margin=92), Grid(4, 2, 8)])
@pytest.mark.parametrize("length", [1, 7, 100, 388, 389, 1001])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_windows(grid, length, overlap):
    axis = _axis(length, grid, 388, overlap)
    assert (axis.input - grid.offset) % grid.multiple == 0 and axis.output == axis.input - 2 * grid.margin
    assert all(o % grid.multiple == 0 for o in axis.origins) and axis.origins[0] == 0
    total = torch.zeros(axis.origins[-1] + axis.output)
    for o, w in zip(axis.origins, axis.weights):
        total[o : o + axis.output] += w
    assert len(total) >= length and torch.allclose(total, torch.ones_like(total), atol=1e-6)
    if length <= 388:
        assert len(axis.origins) == 1
    elif grid.margin == 0:
        assert np.diff(axis.origins).max(initial=0) <= max(axis.output * (1 - overlap), grid.multiple)
    # The last window is needed, and it reaches past the end by less than a multiple.
    assert len(axis.origins) == 1 or len(total) - length < grid.multiple


def test_an_image_smaller_than_the_padding_is_mirrored_again_and_again(valid):
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return valid(x)

    x = image(3, 2)
    assert predict_array(forward, x, Valid.grid).shape == (3, 3, 2)
    expected = np.pad(x[0].numpy(), ((8, 22 - 11), (8, 18 - 10)), mode="reflect")
    np.testing.assert_array_equal(seen[0][0, 0].numpy(), expected)


def test_padded_is_what_one_window_sees():
    x, grid = image(37, 50), Grid(16, 12, 4)
    seen = []

    def forward(b: Tensor) -> Tensor:
        seen.append(b)
        return b[..., 4:-4, 4:-4]

    assert torch.allclose(predict_array(forward, x, grid), x, atol=1e-6)
    assert torch.equal(seen[0][0], padded(x, grid)) and padded(x, grid).shape == (1, 60, 60)


def test_one_pass_when_it_fits():
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x

    x = image(100, 300, 2)
    assert torch.equal(predict_array(forward, x, Grid(16), window=300), x)
    assert calls == [(1, 2, 112, 304)]
    assert torch.allclose(predict_array(forward, x, Grid(16), window=64, batch=4), x, atol=1e-6)
    assert max(c[0] for c in calls) == 4 and {c[2:] for c in calls[1:]} == {(64, 64)}


class ValidVolume(nn.Module):
    """One pooling without padding, in three axes."""

    grid = Grid(2, offset=0, margin=4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 3, 3), nn.Conv3d(3, 3, 3)
        self.up, self.end = nn.ConvTranspose3d(3, 3, 2, stride=2), nn.Conv3d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.up(self.b(torch.max_pool3d(self.a(x).relu(), 2)).relu()))


def volume(*size: int) -> Tensor:
    return torch.rand(1, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("window", "batch"), [(7, 1), ((5, 9, 100), 3), (12, 50)])
def test_windows_of_volumes_are_exact_without_padding(window, batch):
    torch.manual_seed(0)
    net, x = ValidVolume().eval(), volume(17, 23, 30)
    whole = predict_array(net, x, net.grid, window=1000)
    with torch.inference_mode():
        direct = net(nn.functional.pad(x[None], (4, 4, 4, 5, 4, 5), mode="reflect"))[0]
    assert whole.shape == (2, 17, 23, 30) and (whole - direct[:, :17, :23, :30]).abs().max() < 1e-6
    assert (predict_array(net, x, net.grid, window=window, batch=batch) - whole).abs().max() < 1e-6


def test_windows_of_volumes_blend_to_one():
    x = volume(21, 40, 33)
    calls = []

    def forward(b: Tensor) -> Tensor:
        calls.append(tuple(b.shape[2:]))
        return torch.cat([b, 1 - b], 1)

    out = predict_array(forward, x, Grid(8), window=16, overlap=0.5, batch=4)
    assert set(calls) == {(16, 16, 16)} and torch.allclose(out, torch.cat([x, 1 - x]), atol=1e-6)


def test_volumes_agree_with_monai():
    """Windows at the same places, averaged with equal weights by MONAI: equal where one window only covers a voxel, or where all agree."""
    monai = pytest.importorskip("monai.inferers")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 2, 3, padding=1)).eval()  # sees two voxels to each side
    x = volume(32, 48, 64)
    with torch.inference_mode():
        theirs = monai.sliding_window_inference(x[None], 16, 4, net, overlap=0.0)[0]
        ours = predict_array(net, x, Grid(16), window=16, overlap=0.0, batch=4)
        assert (ours - theirs).abs().max() < 1e-6
        theirs = monai.sliding_window_inference(x[None], 16, 4, net, overlap=0.5)[0]
        ours = predict_array(net, x, Grid(8), window=16, overlap=0.5, batch=4)
        whole = net(x[None])[0]
    edges = torch.stack(torch.meshgrid(*(torch.arange(n) % 8 for n in (32, 48, 64)), indexing="ij"))
    inside = ((edges >= 2) & (edges < 6)).all(0)  # no window that covers these voxels ends within two voxels of them
    assert inside.float().mean() > 0.1
    assert (ours - theirs)[:, inside].abs().max() < 1e-5 and (ours - whole)[:, inside].abs().max() < 1e-5
    assert (ours - whole).abs().mean() < (theirs - whole).abs().mean()  # smooth weights trust a window's edge less


def test_memory_does_not_grow_with_the_depth():
    def peak(depth: int) -> int:
        def read(top: int, bottom: int) -> Tensor:
            assert 0 <= top < bottom <= depth and bottom - top <= 8
            return torch.arange(top, bottom).float()[None, :, None, None].expand(1, bottom - top, 24, 20).contiguous()

        total = 0
        with LiveBytes() as live:
            for slab in predict_slabs(lambda x: x, read, (depth, 24, 20), Grid(), window=8):
                assert torch.allclose(slab[0, :, 3, 4], torch.arange(total, total + slab.shape[1]).float(), atol=1e-3)
                total += slab.shape[1]
        assert total == depth
        return live.peak

    assert peak(400) - peak(40) < 120 * (400 - 40)  # weights only; a slice of the result would be 1920 bytes


@pytest.mark.parametrize(
    ("size", "pixels", "spacing", "expected"),
    [
        ((100, 100, 100), 64**3, None, (64, 64, 64)),
        ((20, 500, 500), 64**3, None, (20, 114, 114)),
        ((35, 50, 35), 65536, None, (35, 50, 35)),
        ((80, 400, 400), 8 * 40 * 40, (5.0, 1.0, 1.0), (8, 40, 40)),
        ((4, 400, 30), 4 * 30 * 50, (5.0, 1.0, 1.0), (4, 50, 30)),
        ((3, 3, 3), 1, (1.0, 100.0, 1.0), (1, 1, 1)),
        ((1, 1, 50), 10, (9.0, 1.0, 1.0), (1, 1, 10)),
    ],
)
def test_boxes(size, pixels, spacing, expected):
    assert box(size, pixels, spacing) == expected


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive (views too), and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.now += t.nbytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(t, self._gone, t.nbytes)
        return out


def test_memory_does_not_grow_with_the_height():
    def peak(height: int) -> int:
        def read(top: int, bottom: int) -> Tensor:
            assert 0 <= top < bottom <= height and bottom - top <= 64
            return torch.arange(top, bottom).float()[None, :, None].expand(1, bottom - top, 256).contiguous()

        total = 0
        with LiveBytes() as live:
            for slab in predict_slabs(lambda x: x, read, (height, 256), Grid(), window=64):
                assert torch.allclose(slab[0, :, 0], torch.arange(total, total + slab.shape[1]).float())
                total += slab.shape[1]
        assert total == height
        return live.peak

    # Only the weights of the windows along the height grow, some doubles a row; a row of the result would be 1024 bytes.
    assert peak(6400) - peak(640) < 64 * (6400 - 640)


def test_rows_come_once_and_in_order():
    x = image(333, 50)
    slabs = list(predict_slabs(lambda b: b, lambda t, b: x[:, t:b], (333, 50), Grid(16), window=64, overlap=0.5))
    assert len(slabs) > 5 and torch.allclose(torch.cat(slabs, 1), x, atol=1e-6)


def test_a_network_that_breaks_its_promise_is_named():
    with pytest.raises(ValueError, match=r"returned .* promises"):
        predict_array(lambda x: x[..., ::2, ::2], image(32, 32), Grid(16))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"byteorder": ">"},
        {"tile": (64, 32), "compression": "deflate"},
        {"tile": (32, 32)},
        {"rowsperstrip": 17, "compression": "lzw", "predictor": True},
        {"compression": "deflate"},
        {"planarconfig": "separate"},
    ],
)
def test_tiff_rows(tmp_path: Path, dtype, layout):
    for channels in (1, 3):
        pixels = (np.random.default_rng(0).random((100, 107, channels)) * 250).astype(dtype)
        planes = channels > 1 and "planarconfig" in layout
        stored = np.moveaxis(pixels, -1, 0) if planes else pixels[..., 0] if channels == 1 else pixels
        options = layout if planes or "planarconfig" not in layout else {}
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb" if channels > 1 else "minisblack", **options)
        with TiffRows(tmp_path / "a.tif") as rows:
            assert (rows.height, rows.width, rows.channels, rows.dtype) == (100, 107, channels, dtype)
            for top, bottom in ((0, 100), (5, 6), (10, 90), (30, 70), (99, 100)):
                found = rows(top, bottom)
                assert found.dtype == dtype
                np.testing.assert_array_equal(found, pixels[top:bottom])


def test_bad_tiff_files_are_named(tmp_path: Path):
    path = tmp_path / "broken.tif"
    path.write_bytes(b"no picture at all")
    with pytest.raises(InputError, match=r"broken\.tif"):
        TiffRows(path)
    tifffile.imwrite(path, np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8), compression="deflate", rowsperstrip=10)
    data = bytearray(path.read_bytes())
    data[-15000:] = bytes(15000)
    path.write_bytes(data)
    with TiffRows(path) as rows, pytest.raises(InputError, match=r"broken\.tif.*damaged"):
        rows(150, 200)


def test_tiff_to_tiff(tmp_path: Path, valid):
    pixels = (np.random.default_rng(0).random((700, 607)) * 65535).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(128, 128), compression="deflate")

    def unit(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.astype(np.float32) / 65535).permute(2, 0, 1)

    def forward(x: Tensor) -> Tensor:
        return valid(x).softmax(1)

    with TiffRows(tmp_path / "a.tif") as rows:
        slabs = list(predict_slabs(forward, lambda a, b: unit(rows(a, b)), (rows.height, rows.width), Valid.grid, window=200))
    write_tiff(tmp_path / "m.tif", (slab.argmax(0).numpy() for slab in slabs), 700, 607, np.uint8)
    write_tiff(tmp_path / "p.tif", (slab.permute(1, 2, 0).numpy() for slab in slabs), 700, 607, np.float16, channels=3)
    expected = predict_array(forward, unit(pixels[..., None]), Valid.grid, window=1000)
    mask, probabilities = tifffile.imread(tmp_path / "m.tif"), tifffile.imread(tmp_path / "p.tif")
    assert mask.dtype == np.uint8 and probabilities.dtype == np.float16
    np.testing.assert_allclose(probabilities, expected.permute(1, 2, 0).numpy(), atol=1e-3)
    assert (mask != expected.argmax(0).numpy()).mean() < 1e-5
    with tifffile.TiffFile(tmp_path / "m.tif") as file:
        page = file.pages.first
        assert page.is_tiled and (page.tilelength, page.tilewidth) == (512, 512)
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "m.tif", "p.tif"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path):
    def rows():
        yield np.zeros((600, 20), np.uint8)
        raise RuntimeError("the network fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_tiff(tmp_path / "m.tif", rows(), 1000, 20, np.uint8)
    assert not list(tmp_path.iterdir())
