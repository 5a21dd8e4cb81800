"""Augmentation: what each part does to known pictures, and that image and masks move together."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors

from paperworks.data.augment import Augment, field, mirrored

OFF = Augment(flip=False, rotate=0, scale=(1, 1), brightness=0, contrast=0, gamma=0, probability=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(size: tuple[int, ...], channels: int = 1) -> dict:
    g = seeded(1)
    labels = torch.randint(0, 4, size, generator=g)
    return {
        "image": tv_tensors.Image(torch.rand(channels, *size, generator=g)),
        "mask": tv_tensors.Mask(labels),
        "instances": tv_tensors.Mask((labels * 1000 + 7).int()),
        "name": "a",
    }


def blobs(size: int = 128) -> torch.Tensor:
    """Classes 0, 1, 2 as discs and stripes with long edges."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = ((y - 50) ** 2 + (x - 70) ** 2 < 30**2).long()
    return torch.where((x + 2 * y) % 90 < 30, 2, disc)


def plain(out: dict, key: str) -> torch.Tensor:
    return out[key].as_subclass(torch.Tensor)


def test_all_off_is_identity_to_the_bit():
    s = sample((40, 52), 3)
    out = OFF(s, (40, 52), seeded())
    for key in ("image", "mask", "instances"):
        assert torch.equal(plain(out, key), plain(s, key))
        assert type(out[key]) is type(s[key]) and out[key].dtype == s[key].dtype
    assert out["name"] == "a"


def test_all_off_is_a_plain_random_crop_to_the_bit():
    s = sample((40, 52), 2)
    image, seen = plain(s, "image"), set()
    for seed in range(60):
        out = OFF(s, (8, 16), seeded(seed))
        places = [(y, x) for y in range(33) for x in range(37) if torch.equal(image[:, y : y + 8, x : x + 16], plain(out, "image"))]
        assert len(places) == 1
        y, x = places[0]
        assert torch.equal(plain(out, "mask"), plain(s, "mask")[y : y + 8, x : x + 16])
        seen.add(places[0])
    ys, xs = zip(*seen)
    assert min(ys) <= 3 and max(ys) >= 29 and min(xs) <= 3 and max(xs) >= 33  # everywhere, to the last place


def test_flips_are_exact_and_independent():
    s = sample((9, 12))
    image, mask = plain(s, "image"), plain(s, "mask")
    seen = set()
    for seed in range(40):
        out = dataclasses.replace(OFF, flip=True)(s, (9, 12), seeded(seed))
        which = [d for d in ((), (1,), (2,), (1, 2)) if torch.equal(plain(out, "image"), image.flip(d))]
        assert len(which) == 1
        assert torch.equal(plain(out, "mask"), mask.flip([d - 1 for d in which[0]]))
        seen.add(which[0])
    assert len(seen) == 4


def test_a_small_image_is_mirrored_as_often_as_it_takes():
    s = sample((5, 3))
    out = OFF(s, (21, 16), seeded())
    before = [8, 7]
    after = [21 - 5 - before[0], 16 - 3 - before[1]]
    expected = np.pad(s["image"].numpy()[0], list(zip(before, after)), mode="reflect")
    np.testing.assert_array_equal(out["image"].numpy()[0], expected)
    expected = np.pad(s["mask"].numpy(), list(zip(before, after)), mode="reflect")
    np.testing.assert_array_equal(out["mask"].numpy(), expected)


def test_every_place_of_a_crop_occurs():
    s = sample((10, 8))
    image, seen = plain(s, "image"), set()
    for seed in range(100):
        out = plain(OFF(s, (8, 7), seeded(seed)), "image")
        seen |= {(y, x) for y in range(3) for x in range(2) if torch.equal(image[:, y : y + 8, x : x + 7], out)}
    assert len(seen) == 6


def test_resampling_mirrors_beyond_the_border_too():
    """At half the size an image fills the middle of the patch, and mirror images the rest."""
    profile = np.random.default_rng(0).random(21).astype(np.float32)
    s = {"image": tv_tensors.Image(torch.from_numpy(profile).expand(1, 21, 21).contiguous())}
    s["mask"] = tv_tensors.Mask(torch.arange(21).expand(21, 21).contiguous())
    out = dataclasses.replace(OFF, scale=(0.5, 0.5))(s, (21, 21), seeded())
    where = (np.arange(21) - 10) * 2 + 9.5  # the patch covers 42 pixels from -11 on
    expected = np.interp(where, np.arange(-20, 41), np.pad(profile, 20, mode="reflect"))
    np.testing.assert_allclose(plain(out, "image")[0, 5].numpy(), expected, atol=1e-5)
    folded = np.interp(where, np.arange(-20, 41), np.pad(np.arange(21.0), 20, mode="reflect"))
    assert np.abs(plain(out, "mask")[5].numpy() - folded).max() <= 0.5001


def test_mirrored_is_numpys_reflection():
    for size in (1, 2, 3, 7):
        expected = np.pad(np.arange(size), (23, 30), mode="reflect")
        np.testing.assert_array_equal(mirrored(-23, 53 + size, size).numpy(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_image_and_mask_move_by_the_same_field(seed):
    """The image is the mask: after any resampling the rounded image is the mask but for a rim about a pixel wide."""
    labels = blobs()
    s = {"image": tv_tensors.Image(labels[None].float() / 2), "mask": tv_tensors.Mask(labels)}
    a = dataclasses.replace(OFF, flip=True, rotate=180, scale=(0.6, 1.6), shift=0.1, elastic=6)
    out = a(s, (96, 112), seeded(seed))
    image, mask = plain(out, "image")[0] * 2, plain(out, "mask")
    # Away from edges of the mask the interpolation sees one class only.
    low = -F.max_pool2d(-mask[None].float(), 5, 1, 2)[0]
    inside = low == F.max_pool2d(mask[None].float(), 5, 1, 2)[0]
    assert inside.float().mean() > 0.5
    assert torch.equal(image[inside].round().long(), mask[inside])
    assert ((image[inside] - mask[inside]).abs() > 1e-4).float().mean() < 0.01  # tips of regions, thinner than a pixel
    # The mask differs from the input, so the test above compared something that moved.
    assert (mask != labels[:96, :112]).float().mean() > 0.05


def test_quarter_turn_is_exact():
    """Rotation about the middle: at 90 degrees pixels fall on pixels, so the direction and the middle show."""
    s = sample((31, 31))
    image = plain(s, "image")
    where = field((31, 31), torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.tensor([15.0, 15.0]), torch.zeros(3, 3, 2))
    y, x = where.round().long().unbind(-1)
    assert torch.equal(image[:, y, x], torch.rot90(image, -1, (1, 2)))
    assert (where - where.round()).abs().max() < 1e-5
    # The whole chain: rotations are drawn around the middle, all directions occur, and the centre pixel never moves.
    for seed in range(5):
        out = dataclasses.replace(OFF, rotate=180)(s, (31, 31), seeded(seed))
        assert abs(plain(out, "image")[0, 15, 15] - image[0, 15, 15]) < 1e-4


def test_magnification():
    """A ramp enlarged by s climbs s times more slowly."""
    ramp = torch.linspace(0, 1, 201).expand(1, 201, 201)
    s = {"image": tv_tensors.Image(ramp.contiguous()), "mask": tv_tensors.Mask(torch.zeros(201, 201, dtype=torch.long))}
    out = dataclasses.replace(OFF, scale=(2, 2))(s, (64, 64), seeded())
    step = plain(out, "image")[0].diff(dim=1)
    assert torch.allclose(step, torch.full_like(step, 1 / 400), atol=1e-5)


def test_field_interpolates_as_torch_bicubic():
    vectors = torch.randn(3, 3, 2, generator=seeded())
    d = field((37, 50), torch.eye(2), torch.zeros(2), vectors) - field((37, 50), torch.eye(2), torch.zeros(2), torch.zeros(3, 3, 2))
    expected = F.interpolate(vectors.permute(2, 0, 1)[None], (37, 50), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    assert torch.allclose(d, expected, atol=1e-4)


def test_field_is_the_affine_map():
    matrix, middle = torch.tensor([[0.5, 0.2], [-0.1, 1.5]]), torch.tensor([3.0, -4.0])
    where = field((7, 10), matrix, middle, torch.zeros(3, 3, 2))
    y, x = torch.meshgrid(torch.arange(7) - 3.0, torch.arange(10) - 4.5, indexing="ij")
    assert torch.allclose(where, torch.stack([y, x], -1) @ matrix.T + middle, atol=1e-5)


def test_elastic_displacements_have_the_stated_spread_and_are_smooth():
    """The image holds its own x coordinate, so the output minus x is the displacement; its std at the nodes is ``elastic``."""
    n, std = 65, 4.0
    ramp = torch.arange(3 * n).float().expand(1, 3 * n, 3 * n) / (3 * n)
    s = {"image": tv_tensors.Image(ramp.contiguous())}
    found = []
    for seed in range(120):
        out = dataclasses.replace(OFF, elastic=std)(s, (n, n), seeded(seed))
        where = plain(out, "image")[0] * 3 * n
        crop = dataclasses.replace(OFF, elastic=0)(s, (n, n), seeded(seed))  # the same draws, so the same place
        x = plain(crop, "image")[0] * 3 * n
        if x.min() < 5 * std or x.max() > 3 * n - 5 * std:
            continue  # so near the border the mirror image comes in
        d = where - x
        assert max(d.diff(dim=axis).abs().max() for axis in (0, 1)) < 1  # neither torn nor folded: 4 pixels' spread over 32
        found.append(d[:: n // 2, :: n // 2])
    spread = torch.stack(found)[:, 1, 1].std().item()
    assert 0.8 * std < spread < 1.2 * std
    assert math.isclose(torch.stack(found).std().item(), std, rel_tol=0.1)


def test_no_label_is_invented():
    s = sample((60, 60))
    out = dataclasses.replace(OFF, rotate=180, scale=(0.5, 2), elastic=8)(s, (64, 64), seeded())
    assert set(out["mask"].unique().tolist()) <= {0, 1, 2, 3}
    assert set(out["instances"].unique().tolist()) <= {7, 1007, 2007, 3007}
    assert out["mask"].dtype == torch.int64 and out["instances"].dtype == torch.int32
    assert torch.equal(plain(out, "instances"), (plain(out, "mask") * 1000 + 7).int())


def test_large_instance_numbers_survive():
    s = sample((20, 20))
    s["instances"] = tv_tensors.Mask(torch.full((20, 20), 2**24 - 1, dtype=torch.int32))
    out = dataclasses.replace(OFF, rotate=45)(s, (20, 20), seeded())
    assert out["instances"].unique().tolist() == [2**24 - 1]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(30, 70), (64, 64), (1, 5), (200, 17)])
def test_the_result_has_the_size_of_the_patch(channels, size):
    a = Augment(elastic=5, noise=0.1, shift=0.1, probability=0.8)
    for seed in range(4):
        out = a(sample(size, channels), (48, 33), seeded(seed))
        assert out["image"].shape == (channels, 48, 33) and out["mask"].shape == (48, 33)
        assert out["image"].dtype == torch.float32
        assert out["image"].min() >= 0 and out["image"].max() <= 1


def test_the_generator_alone_decides():
    a = Augment(elastic=5, noise=0.1, probability=1)
    s = sample((50, 50))
    torch.manual_seed(0)
    one = a(s, (32, 32), seeded(3))
    torch.manual_seed(1)
    same, other = a(s, (32, 32), seeded(3)), a(s, (32, 32), seeded(4))
    assert torch.equal(one["image"], same["image"]) and torch.equal(one["mask"], same["mask"])
    assert not torch.equal(one["image"], other["image"])


def test_one_setting_leaves_the_other_draws_alone():
    """What ``elastic`` is changes neither the crop nor the grey values: an ablation compares like with like."""
    flat = {"image": tv_tensors.Image(torch.full((1, 40, 40), 0.4)), "mask": tv_tensors.Mask(torch.zeros(40, 40, dtype=torch.long))}
    for seed in range(10):
        a, b = (Augment(elastic=e, rotate=r)(flat, (32, 32), seeded(seed)) for e, r in ((0, 0), (10, 90)))
        assert torch.allclose(plain(a, "image"), plain(b, "image"), atol=1e-6)


def test_the_sample_is_left_as_it_was():
    s = sample((50, 50))
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
    Augment(elastic=5, probability=1)(s, (50, 50), seeded())
    Augment(flip=False, rotate=0, scale=(1, 1), probability=1)(s, (50, 50), seeded())
    assert all(torch.equal(s[k], before[k]) for k in ("image", "mask", "instances"))


def test_grey_values():
    image = torch.linspace(0.2, 0.6, 100).reshape(1, 10, 10)
    s = {"image": tv_tensors.Image(image)}

    def ours(**settings):
        return plain(dataclasses.replace(OFF, **settings)(s, (10, 10), seeded(2)), "image")

    brighter = ours(brightness=0.2) - image
    assert 0 < brighter.abs().max() <= 0.2 and brighter.std() < 1e-6
    contrast = ours(contrast=0.3)
    assert abs(contrast.mean() - image.mean()) < 1e-6
    factor = (contrast.std() / image.std()).item()
    assert 0.7 <= factor <= 1.3 and abs(factor - 1) > 0.01
    power = ours(gamma=0.5).log() / image.log()
    assert power.std() < 1e-5 and math.exp(-0.5) <= power.mean() <= math.exp(0.5) and abs(power.mean() - 1) > 0.01
    noisy = ours(noise=0.05) - image
    assert 0 < noisy.std() < 0.06


def test_probability_zero_changes_nothing():
    a = Augment(flip=False, elastic=10, noise=1, shift=0.5, probability=0)
    s = sample((20, 20))
    for seed in range(5):
        assert torch.equal(a(s, (20, 20), seeded(seed))["image"], s["image"])


def test_volumes():
    s = sample((12, 20, 24))
    assert torch.equal(OFF(s, (12, 20, 24), seeded())["image"], s["image"])
    a = dataclasses.replace(OFF, flip=True, rotate=30, scale=(0.8, 1.2), elastic=2)
    s["image"] = tv_tensors.Image(plain(s, "mask")[None].float() / 4)
    out = a(s, (16, 16, 16), seeded())
    assert out["image"].shape == (1, 16, 16, 16) and out["mask"].shape == (16, 16, 16)
    vectors = torch.randn(3, 3, 3, 3, generator=seeded())
    zero = torch.zeros_like(vectors)
    d = field((9, 9, 9), torch.eye(3), torch.zeros(3), vectors) - field((9, 9, 9), torch.eye(3), torch.zeros(3), zero)
    assert torch.allclose(d[::4, ::4, ::4], vectors, atol=1e-5)
