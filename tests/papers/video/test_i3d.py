"""I3D against numbers of piergiaj/pytorch-i3d, and its parts by hand."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.papers.video.i3d.i3d import I3D, MODULES, VARIANTS, Config, MaxPool, Unit, build, inflate, recipe, same
from paperworks.papers.video.i3d.weights import PUBLISHED, SOURCES
from paperworks.tasks.base import Grid
from paperworks.tasks.video import Video
from peers import relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "i3d.json").read_text())
DRAW = runpy.run_path(str(FIXTURES / "slowfast_record.py"))["draw"]
ENDS = {"Conv3d_1a_7x7": "trunk.0", "Conv3d_2c_3x3": "trunk.3", **{f"Mixed_{m}": f"inception.mixed_{m}" for m in MODULES}}
NARROW = Config(frames=16, width=1 / 16, momentum=0.1, image_size=32)


def built(config: Config, channels: int = 3, classes: int = 5) -> I3D:
    torch.manual_seed(0)
    return build(Video.plain_spec(channels, classes, size=(32, 32)), config).eval()


def lively(net: I3D) -> I3D:
    """Norms with something to say, and a head that answers."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            for value, low in ((module.weight, 0.6), (module.bias, -0.2), (module.running_mean, -0.2), (module.running_var, 0.6)):
                assert value is not None
                nn.init.uniform_(value, low, low + 0.8)
    nn.init.normal_(net.head.weight)
    return net


def ends(net: I3D, clip: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the named parts give."""
    found = {}
    handles = [
        net.get_submodule(part).register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
        for name, part in ENDS.items()
    ]
    net.features(clip)
    for handle in handles:
        handle.remove()
    return found


# --- Other implementations


@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_equal_the_port(evidence, name):
    golden = FIXTURE["networks"][name]
    net = built(dataclasses.replace(VARIANTS[name], image_size=224), channels=golden["clip"][1], classes=400)
    own = net.state_dict()
    theirs = SOURCES["piergiaj"]({n: n for n in golden["names"]}, VARIANTS[name])
    assert set(theirs) == {key for key, value in own.items() if value.is_floating_point()}
    net.load_state_dict(own | {ours: DRAW(peer, tuple(own[ours].shape)) for ours, peer in theirs.items()})
    clip = DRAW("clip", tuple(golden["clip"]))
    found = ends(net, clip)
    errors = []
    for end, values in golden["ends"].items():
        assert list(found[end].shape) == values["shape"], "SAME padding of odd sizes"
        errors.append(relative(found[end].flatten()[:: max(1, found[end].numel() // 64)], torch.tensor(values["values"])))
    if golden["logits"]:
        errors.append(relative(net(clip)["logits"][0, ::5], torch.tensor(golden["logits"])))
    assert max(errors) < TOLERANCE
    assert sum(p.numel() for p in net.parameters()) == golden["parameters"]
    commit = f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}"
    evidence.fidelity(
        against=f"{commit} {name}, clip of {'x'.join(map(str, golden['clip'][2:]))}, five ends{' and logits' * bool(golden['logits'])}",
        error=max(errors),
    )
    if name == "flow":
        net.inception["mixed_3b"].branch_2[1].conv.weight[:, :, 0] *= 1.1
        values = golden["ends"]["Mixed_3c"]["values"]
        changed = ends(net, clip)["Mixed_3c"]
        assert relative(changed.flatten()[:: max(1, changed.numel() // 64)], torch.tensor(values)) > TOLERANCE


@pytest.mark.parametrize(
    ("name", "channels", "classes", "parameters"),
    [("rgb", 3, 400, 12_697_264), ("flow", 2, 400, 12_675_312), ("rgb", 3, 157, 12_448_189)],
)
def test_parameters_are_those_of_the_port(name, channels, classes, parameters):
    with torch.device("meta"):
        net = build(Video.plain_spec(channels, classes), VARIANTS[name])
    assert sum(p.numel() for p in net.parameters()) == parameters
    scales = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.BatchNorm3d))
    assert scales == 7280, "Sonnet's batch norms have no scale: 7,280 parameters fewer in the authors' checkpoints"


def test_multiply_adds():
    """111.2 G of convolutions for 64 frames of 224 pixels."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(Video.plain_spec(3, 400), VARIANTS["rgb"])(torch.zeros(1, 3, 64, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(111.2, abs=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_fit_the_card(name):
    found = PUBLISHED[name]
    assert (found.channels, found.classes) == ({"rgb": 3, "flow": 2}[name], 400)
    assert set(found.mean) == set(found.std) == {0.5}, "frames in [-1, 1]"


# --- Mechanisms


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "before", "after"), [(8, 7, 2, 2, 3), (7, 7, 2, 3, 3), (9, 2, 2, 0, 1), (8, 2, 2, 0, 0), (5, 3, 1, 1, 1)]
)
def test_padding_is_tensorflows(evidence, length, kernel, stride, before, after):
    x = torch.ones(1, 1, length, 1, 1)
    padded = same(x, (kernel, 1, 1), (stride, 1, 1)).flatten()
    assert padded.tolist() == [0] * before + [1] * length + [0] * after
    assert (len(padded) - kernel) // stride + 1 == -(-length // stride)
    evidence.property(
        "SAME padding: ceil(n / s) positions, the odd zero behind (five cases by hand)",
        "SAME 填充：ceil(n / s) 个位置，多出来的零在后面（五种情形手算）",
    )


def test_sizes_of_figure_3(evidence):
    """8 x 7 x 7 cells of 1024 channels from 64 frames of 224 pixels; time is pooled from module 4 on."""
    with torch.device("meta"):
        net = build(Video.plain_spec(3, 400), VARIANTS["rgb"])
        found = {name: tuple(x.shape[1:]) for name, x in ends(net, torch.zeros(1, 3, 64, 224, 224)).items()}
        assert net.pooled(torch.zeros(1, 3, 64, 224, 224)).shape == (1, 1024, 7, 1, 1)
    assert found["Conv3d_1a_7x7"] == (64, 32, 112, 112)
    assert found["Mixed_3b"] == (256, 32, 28, 28) and found["Mixed_3c"] == (480, 32, 28, 28)
    assert found["Mixed_4f"] == (832, 16, 14, 14) and found["Mixed_5c"] == (1024, 8, 7, 7)
    assert net.embedding == 1024
    evidence.property(
        "figure 3: channels, times and sides of every stage; no pooling over time in the first two pools",
        "图 3：各阶段的通道、时间与边长；前两个池化不缩时间",
    )


def flat_of(net: I3D, config: Config) -> I3D:
    """An image network whose weights ``net`` gets."""
    flat = lively(built(dataclasses.replace(config, flat=True, frames=1), channels=net.trunk[0].conv.in_channels))
    net.load_state_dict(inflate(flat.state_dict(), net))
    return flat


def test_a_film_that_stands_still_is_answered_as_its_frame(evidence, monkeypatch):
    """Exact where no zero beyond the ends of the film is felt: with the film's own frames there, at every position of every layer."""
    net = built(NARROW)
    flat = flat_of(net, NARROW)
    frame = torch.randn(2, 3, 1, 32, 32)
    film = frame.expand(-1, -1, 16, -1, -1)
    image = ends(flat, frame)

    def replicated(x, kernel, stride):
        padded = same(x, kernel, stride)
        time = same(x[:, :, :, :1, :1], (kernel[0], 1, 1), (stride[0], 1, 1)).shape[2]
        ahead = (time - x.shape[2]) // 2
        inside = padded[:, :, ahead : ahead + x.shape[2]]
        return F.pad(inside, (0, 0, 0, 0, ahead, time - x.shape[2] - ahead), mode="replicate")

    zeros = ends(net, film)
    monkeypatch.setattr("paperworks.papers.video.i3d.i3d.same", replicated)
    still = ends(net, film)
    for name, expected in image.items():
        assert relative(still[name], expected.expand_as(still[name])) < 1e-5, name
    assert relative(net(film)["logits"], flat(frame)["logits"]) < 1e-5
    assert relative(zeros["Mixed_5c"], image["Mixed_5c"].expand_as(zeros["Mixed_5c"])) > 1e-2, "zeros beyond the ends are felt"
    evidence.property(
        "boring video: with replicated frames beyond the ends every layer and the logits equal the image network's to 1e-5",
        "无聊视频：两端以复制的帧补齐时，每一层与 logits 等于图像网络的结果，误差小于 1e-5",
    )


def test_far_from_its_ends_zeros_are_not_felt(evidence):
    """With zeros beyond the ends: exact in the middle of a long film, and with 64 frames up to Mixed_4f, but not after it."""
    net = built(NARROW)
    flat = flat_of(net, NARROW)
    frame = torch.randn(1, 3, 1, 16, 16)
    image = ends(flat, frame)
    for frames, exact in ((64, {"Conv3d_1a_7x7", "Mixed_3c", "Mixed_4f"}), (208, set(ENDS))):
        for name, x in ends(net, frame.expand(-1, -1, frames, -1, -1)).items():
            best = min(relative(x[:, :, t], image[name][:, :, 0]) for t in range(x.shape[2]))
            if name in exact:
                assert best < 1e-5, (frames, name)
            elif name.startswith("Mixed_5"):
                assert best > 1e-4, (frames, name)
    evidence.property(
        "with zeros beyond the ends: an exact position up to Mixed_4f for 64 frames, everywhere for 208",
        "两端补零时：64 帧下到 Mixed_4f 为止有严格相等的位置，208 帧下每一层都有",
    )


def test_inflated_weights_are_copies_divided_by_their_number(evidence):
    net = built(NARROW)
    flat = flat_of(net, NARROW)
    kernel, image = net.trunk[0].conv.weight, flat.trunk[0].conv.weight
    assert kernel.shape[2] == 7
    torch.testing.assert_close(kernel.sum(2), image[:, :, 0])
    assert all(torch.equal(kernel[:, :, i], kernel[:, :, 0]) for i in range(7))
    from_images = inflate({k: v[:, :, 0] if v.ndim == 5 else v for k, v in flat.state_dict().items()}, net)
    assert torch.equal(from_images["trunk.0.conv.weight"], kernel)  # kernels of images as well
    flow = built(NARROW, channels=2, classes=7)
    taken = inflate(flat.state_dict(), flow)
    grey = torch.ones(1, 1, 1, 7, 7)
    torch.testing.assert_close(
        F.conv3d(grey.expand(1, 2, 7, 7, 7), taken["trunk.0.conv.weight"]),
        F.conv3d(grey.expand(1, 3, 1, 7, 7), image),
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.equal(taken["head.weight"], flow.state_dict()["head.weight"]), "other classes: a head of its own"
    evidence.property(
        "inflation: t equal copies divided by t; from 2-D kernels too; flow's first kernel is made so that grey answers alike",
        "膨胀：t 份相同的拷贝除以 t；二维核也可以；光流网络的第一个核取各通道的均值，缩放到灰度图的回答不变",
    )


def test_the_image_network_sees_frames_one_by_one():
    flat = lively(built(VARIANTS["small_2d"]))
    clip = torch.randn(2, 3, 4, 32, 32)
    alone = torch.stack([flat(clip[:, :, [t]])["logits"] for t in range(4)])
    # Averages over two steps of time weigh the frames at the ends half as much.
    weights = torch.tensor([1, 2, 2, 1]) / 6
    torch.testing.assert_close(flat(clip)["logits"], (weights.view(4, 1, 1) * alone).sum(0), rtol=1e-4, atol=1e-5)


def test_units_and_pools_by_hand():
    torch.manual_seed(0)
    unit, x = Unit(3, 4, (3, 3, 3), (2, 2, 2)).eval(), torch.randn(1, 3, 5, 6, 7)
    nn.init.uniform_(unit.norm.running_mean)
    y = F.conv3d(F.pad(x, (1, 1, 0, 1, 1, 1)), unit.conv.weight, stride=2)
    y = (y - unit.norm.running_mean.view(1, -1, 1, 1, 1)) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(unit(x), y.relu())
    positive = x.abs()
    torch.testing.assert_close(MaxPool((3, 3, 3), (1, 1, 1))(positive), F.max_pool3d(positive, 3, 1, 1))


# --- Use


def test_grids_and_recipes():
    long = dataclasses.replace(Video.plain_spec(3, 4, size=(90, 120)), more={"frames": 70})
    assert build(long, VARIANTS["small"]).grid == Grid(fixed=96, frames=16, step=4)
    assert build(long, VARIANTS["rgb"]).grid == Grid(fixed=224, frames=64, step=1)
    assert build(long, VARIANTS["small_2d"]).grid.frames == 1
    paper = recipe(VARIANTS["rgb"])
    assert (paper.optimizer, paper.lr, paper.momentum) == ("sgd", 0.1, 0.9)
    momenta = {
        name: {m.momentum for m in built(config).modules() if isinstance(m, nn.BatchNorm3d)}
        for name, config in VARIANTS.items()
        if name in ("small", "test")
    }
    assert momenta == {"small": {0.1}, "test": {0.1}} and Config().momentum == 0.01
