import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from paperworks.data.views import PARTS, TwoViews, View

OFF = {"flip": 0.0, "jitter_chance": 0.0, "grey": 0.0}
WHOLE = {"area": (1.0, 1.0), "aspect": (1.0, 1.0)}


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(channels: int = 3, height: int = 24, width: int = 24) -> dict:
    return {"image": torch.rand(channels, height, width, generator=source()), "label": 3, "name": "a"}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_two_views_of_any_channels(channels):
    given = sample(channels, 30, 21)
    kept = given["image"].clone()
    out = TwoViews(blur=0.5)(given, (16, 20), source())
    for name in ("image", "view"):
        view = out[name].as_subclass(Tensor)
        assert view.shape == (channels, 16, 20) and view.dtype == torch.float32
        assert view.min() >= 0 and view.max() <= 1
    assert not torch.equal(out["image"], out["view"])
    assert (out["label"], out["name"]) == (3, "a")
    assert torch.equal(given["image"], kept) and "view" not in given


def test_chance_comes_from_the_generator_only():
    augment = TwoViews(blur=0.5)
    state = torch.get_rng_state()
    first, again, other = (augment(sample(), (16, 16), source(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in ("image", "view"))


def test_one_view():
    assert "view" not in View()(sample(), (16, 16), source())


def test_nothing_asked_nothing_changed():
    given = sample()
    out = View(**OFF, **WHOLE)(given, (24, 24), source())["image"]
    assert torch.equal(out.as_subclass(Tensor), given["image"])


def test_a_whole_long_image_gives_its_central_square():
    given = sample(height=24, width=40)
    out = View(**OFF, **WHOLE)(given, (24, 24), source())["image"]
    assert torch.equal(out.as_subclass(Tensor), given["image"][:, :, 8:32])


def test_crops_have_the_areas_and_aspects_asked_for():
    view, random = View(area=(0.2, 0.6), aspect=(0.5, 2.0)), source()
    crops = torch.tensor([view.crop((100, 100), lambda a, b: a + (b - a) * float(torch.rand((), generator=random))) for _ in range(800)])
    top, left, height, width = crops.T
    assert (top >= 0).all() and (top + height <= 100).all() and (left >= 0).all() and (left + width <= 100).all()
    area, aspect = height * width / 1e4, width / height
    assert area.min() > 0.19 and area.max() < 0.61 and area.max() - area.min() > 0.35
    assert aspect.min() > 0.49 and aspect.max() < 2.05 and abs(aspect.log().mean()) < 0.06
    assert top.min() == 0 and (top + height).max() == 100


def test_mirror():
    given = sample()
    out = View(**OFF | {"flip": 1.0}, **WHOLE)(given, (24, 24), source())["image"]
    assert torch.equal(out.as_subclass(Tensor), given["image"].flip(2))


def test_grey_has_no_colour_left():
    out = View(**OFF | {"grey": 1.0}, **WHOLE)(sample(), (24, 24), source())["image"]
    assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2])


@pytest.mark.parametrize("part", range(4))
def test_each_colour_part_does_its_own(part):
    """With one part asked for, the result is torchvision's with some factor; brightness and saturation are read back from it."""
    jitter = [0.0] * 4
    jitter[part] = 0.4
    given = sample()["image"] * 0.5
    out = View(**OFF | {"jitter_chance": 1.0}, jitter=tuple(jitter), **WHOLE)({"image": given}, (24, 24), source(3))["image"].as_subclass(
        Tensor
    )
    assert (out - given).abs().max() > 0.01
    factors = torch.linspace(-0.4, 0.4, 801)
    nearest = min(float((PARTS[part](given, float(f) + (part < 3)) - out).abs().max()) for f in factors)
    assert nearest < 0.005


def test_colour_parts_come_in_any_order():
    given = sample()["image"]
    view = View(**OFF | {"jitter_chance": 1.0}, jitter=(0.8, 0.8, 0.0, 0.0), **WHOLE)
    orders = {tuple(torch.randperm(4, generator=source(seed)).tolist()) for seed in range(100)}
    assert len(orders) > 20
    assert len({float(view({"image": given}, (24, 24), source(seed))["image"].mean()) for seed in range(20)}) == 20


def test_blur_takes_a_tenth_of_the_side():
    given = torch.zeros(1, 60, 60)
    given[:, 30, 30] = 1
    out = View(**OFF, blur=1.0, sigma=(2.0, 2.0), **WHOLE)({"image": given}, (60, 60), source())["image"].as_subclass(Tensor)
    torch.testing.assert_close(out, F.gaussian_blur(given, [7, 7], [2.0, 2.0]))
    assert int((out > 0).sum()) == 49
