"""U-Net against figure 1, independent implementations, and brute force; and what its valid convolutions promise about tiles."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import monai
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from scipy import ndimage
from torch import nn
from torchvision import tv_tensors

from paperworks.papers.segmentation.unet import unet
from paperworks.papers.segmentation.unet.unet import (
    VARIANTS,
    Config,
    Labels,
    UNet,
    border_weights,
    class_balance,
    components,
    recipe,
    touching,
    weighted_cross_entropy,
)
from paperworks.tasks.segmentation import Segmentation
from peers import relative

MILESIAL = Path(__file__).parent / "fixtures" / "unet_milesial.json"
NARROW = Config(widths=(4, 6, 8, 10, 12))  # figure 1 in all but the number of features


def network(config: Config, channels: int = 1, classes: int = 2, ndim: int = 2) -> UNet:
    """In evaluation mode, in double precision, with biases and batch norms that are far from the identity."""
    torch.manual_seed(0)
    net = UNet(channels, classes, config, ndim).double().eval()
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
        elif getattr(m, "bias", None) is not None:
            nn.init.normal_(m.bias, std=0.2)
    return net


def tensors(net: UNet) -> list[torch.Tensor]:
    """Weights and statistics in the order in which an image meets them."""
    rising = [part for pair in zip(net.up_convs, net.expanding) for part in pair]
    parts = nn.ModuleList([*net.contracting, *rising, net.head])
    return [value for name, value in parts.state_dict().items() if not name.endswith("num_batches_tracked")]


def image(*size: int) -> torch.Tensor:
    return torch.randn(1, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- Figure 1


@pytest.mark.parametrize(
    ("variant", "channels", "classes", "expected"),
    [("paper", 1, 2, 31_030_658), ("paper", 3, 2, 31_031_810), ("half", 3, 1, 7_760_097), ("same", 3, 2, 31_037_698)],
)
def test_parameter_counts(variant, channels, classes, expected):
    with torch.device("meta"):
        net = UNet(channels, classes, VARIANTS[variant])
    assert sum(p.numel() for p in net.parameters()) == expected


def test_sizes_and_crops_of_figure_1(monkeypatch, evidence):
    with torch.device("meta"):
        net = UNet(1, 2, VARIANTS["paper"])
    sides, crops = [], []
    convolutions = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for m in convolutions:
        m.register_forward_hook(lambda m, inputs, out: sides.append((out.shape[-1], out.shape[1])))
    crop = unet.centre_crop
    monkeypatch.setattr(unet, "centre_crop", lambda x, size: (crops.append((x.shape[-1], size[-1])), crop(x, size))[1])
    logits = net(torch.empty(1, 1, 572, 572, device="meta"))["logits"]

    assert logits.shape == (1, 2, 388, 388)
    assert len(convolutions) == 23
    assert sides == [
        *[(570, 64), (568, 64), (282, 128), (280, 128), (138, 256), (136, 256), (66, 512), (64, 512), (30, 1024), (28, 1024)],
        *[(56, 512), (54, 512), (52, 512), (104, 256), (102, 256), (100, 256), (200, 128), (198, 128), (196, 128)],
        *[(392, 64), (390, 64), (388, 64), (388, 2)],
    ]
    assert crops == [(64, 56), (136, 104), (280, 200), (568, 392)]
    evidence.property(
        "23 convolutions give the map sizes, features and crops of figure 1 (572 -> 388)",
        "23 个卷积层给出图 1 的特征图尺寸、通道数与裁剪（572 -> 388）",
    )


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_grid_tells_the_size_of_the_output(levels):
    net = network(Config(widths=(2,) * levels))
    side = net.grid.fit(1)
    assert net(image(side, side + net.grid.multiple))["logits"].shape[2:] == (
        side - 2 * net.grid.margin,
        side + net.grid.multiple - 2 * net.grid.margin,
    )
    if levels == 5:
        assert side == 188 and net.grid.fit(388) == 572


def functional_figure_1(net: UNet, x: torch.Tensor) -> torch.Tensor:
    """The figure once more, level by level, with nothing but functions and the network's numbers."""
    weights = iter(tensors(net))

    def conv(x):
        return F.relu(F.conv2d(x, next(weights), next(weights)))

    a = conv(conv(x))
    b = conv(conv(F.max_pool2d(a, 2)))
    c = conv(conv(F.max_pool2d(b, 2)))
    d = conv(conv(F.max_pool2d(c, 2)))
    x = conv(conv(F.max_pool2d(d, 2)))
    for skip, lost in ((d, 4), (c, 16), (b, 40), (a, 88)):
        x = F.conv_transpose2d(x, next(weights), next(weights), stride=2)
        x = conv(conv(torch.cat([skip[..., lost:-lost, lost:-lost], x], 1)))
    return F.conv2d(x, next(weights), next(weights))


def test_equals_a_second_spelling_of_figure_1(evidence):
    net = network(NARROW)
    x = image(220, 204)
    theirs = functional_figure_1(net, x)
    error = relative(net(x)["logits"], theirs)
    assert error < 1e-6
    evidence.fidelity("functional restatement of fig. 1", error)
    with torch.no_grad():
        net.up_convs[0].weight[0, 0, 0, 0] += 1
    assert relative(net(x)["logits"], theirs) > 1e-4


# --- Independent implementations of the padded network


def milesial_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """The fixture's weight rule."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 2, shape)
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape) if name.endswith("weight") else rng.normal(0, 0.2, shape)
    else:
        value = rng.normal(0, math.sqrt(2 / np.prod(shape[1:])), shape)
    return torch.from_numpy(value)


def milesial_names() -> list[str]:
    """Its tensors in the order in which an image meets them."""
    norm = ("weight", "bias", "running_mean", "running_var")
    double = [n for i in (0, 3) for n in (f"{i}.weight", *(f"{i + 1}.{part}" for part in norm))]
    names = [f"inc.double_conv.{n}" for n in double]
    for level in range(1, 5):
        names += [f"down{level}.maxpool_conv.1.double_conv.{n}" for n in double]
    for level in range(1, 5):
        names += [f"up{level}.up.weight", f"up{level}.up.bias", *(f"up{level}.conv.double_conv.{n}" for n in double)]
    return [*names, "outc.conv.weight", "outc.conv.bias"]


def test_same_equals_milesial(evidence):
    golden = json.loads(MILESIAL.read_text())
    net = UNet(3, 2, VARIANTS["same"]).eval()
    for name, value in zip(milesial_names(), tensors(net), strict=True):
        value.copy_(milesial_tensor(name, value.shape))
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 64, 48))).float()
    theirs = torch.tensor(golden["output"])
    with torch.no_grad():
        error = relative(net(x)["logits"].flatten()[::37], theirs)
        assert error < 1e-4
        evidence.fidelity(f"milesial/Pytorch-UNet {golden['commit'][:7]}", error)
        net.contracting[0][0].weight[0] *= 1.1
        assert relative(net(x)["logits"].flatten()[::37], theirs) > 1e-3


@pytest.mark.parametrize("ndim", [2, 3])
def test_same_equals_monai(ndim, evidence):
    """MONAI's last up-convolution keeps its features (as that of the released Caffe network does): equal where widths[0] == widths[1]."""
    widths = (4, 4, 8, 16, 32)
    ours = network(replace(VARIANTS["same"], widths=widths), ndim=ndim)
    theirs = BasicUNet(ndim, 1, 2, features=(*widths, 4), act=("relu", {"inplace": True}), norm="batch", bias=False).double().eval()
    state = [value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")]
    for value, mine in zip(state, tensors(ours), strict=True):
        value.copy_(mine)
    x = image(*(32, 48, 32)[:ndim])
    expected = theirs(x)
    error = relative(ours(x)["logits"], expected)
    assert error < 1e-4
    evidence.fidelity(f"MONAI BasicUNet {monai.__version__}, {ndim}-D", error)
    with torch.no_grad():
        ours.expanding[0][0].weight[0] *= 1.1
    assert relative(ours(x)["logits"], expected) > 1e-4


# --- What valid convolutions promise


def test_context_is_92_pixels(evidence):
    net, x = network(NARROW), image(300, 300)
    tile = (..., slice(48, 84), slice(48, 84))  # of the output, 16 k + 4 a side like 388; it lies at 140 to 175 of the image
    whole = net(x)["logits"][tile]
    for pixel in ((140 - 93, 150), (150, 140 - 93), (175 + 93, 150), (150, 175 + 93)):
        there = x.clone()
        there[..., *pixel] += 100
        assert torch.equal(net(there)["logits"][tile], whole)
    for pixel in ((140 - 92, 150), (150, 140 - 92), (175 + 92, 150), (150, 175 + 92)):
        there = x.clone()
        there[..., *pixel] += 100
        assert not torch.equal(net(there)["logits"][tile], whole)
    evidence.property(
        "an output tile depends on 92 pixels around it and on nothing farther",
        "一个输出块只依赖其周围 92 像素，与更远处无关",
    )


def test_tiles_fit_together_on_the_grid_of_16_only(evidence):
    net = network(replace(NARROW, widths=(2, 2, 4, 4, 4)))
    side = 956  # 388 + 384 output pixels
    x = image(572, side)
    whole = net(x)["logits"]

    def tile(start: int) -> torch.Tensor:
        return net(x[..., start : start + 572])["logits"]

    assert relative(tile(384), whole[..., 384:772]) < 1e-12
    assert relative(tile(16), whole[..., 16:404]) < 1e-12
    assert relative(tile(380), whole[..., 380:768]) > 1e-3  # 380 = 12 mod 16: what laying tiles edge to edge, 388 apart, comes to
    assert relative(tile(4), whole[..., 4:392]) > 1e-3  # 4 = 388 mod 16
    evidence.property(
        "tiles equal the whole image when they lie multiples of 16 apart, and differ when 388 = 4 mod 16 apart",
        "块与块相距 16 的倍数时与整图相等，相距 388 = 4 mod 16 时不等",
    )


def test_padded_network_has_no_such_promise():
    net = network(replace(NARROW, padding="same"))
    x = image(64, 128)
    assert relative(net(x[..., 64:])["logits"], net(x)["logits"][..., 64:]) > 1e-3


# --- Training


def test_initial_weights_are_he_gaussians():
    torch.manual_seed(0)
    net = UNet(1, 2, VARIANTS["half"])
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            seen = m.in_channels * (9 if m.kernel_size == (3, 3) else 1)  # 2x2 up-convolutions do not overlap
            tolerance = 5 / math.sqrt(2 * m.weight.numel())  # five standard errors
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / seen), rel=tolerance)
            assert not m.bias.any()


def test_dropout_at_the_end_of_the_contracting_path_in_training_only():
    net, x = network(NARROW), image(188, 188)
    dropped = []
    net.dropout.register_forward_hook(lambda m, inputs, out: dropped.append(out.shape[1]))
    assert torch.equal(net(x)["logits"], net(x)["logits"])
    assert dropped[:2] == [10, 12]
    net.train()
    assert not torch.equal(net(x)["logits"], net(x)["logits"])
    net.dropout.p = 0.0
    assert torch.equal(net(x)["logits"], net(x)["logits"])


def test_recipe_of_the_paper():
    r = recipe(VARIANTS["paper"])
    assert (r.optimizer, r.momentum, r.batch_size) == ("sgd", 0.99, 1)
    assert network(NARROW).grid.fit(r.patch) == 572
    assert (r.augment.elastic, r.augment.elastic_grid) == (10, 3)
    assert recipe(VARIANTS["small"]).optimizer == "adamw"


# --- Labels and the weight map of eq. 2


def cells(seed: int = 0, side: int = 48, count: int = 6) -> np.ndarray:
    """Discs that touch and overlap, one number each."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side]
    out = np.zeros((side, side), dtype=np.int32)
    for index in range(1, count + 1):
        r, c = rng.uniform(0, side, 2)
        out[(row - r) ** 2 + (column - c) ** 2 < rng.uniform(3, 7) ** 2] = index
    return out


def brute_force(instances: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """Eq. 2 pixel by pixel."""
    out = np.zeros(instances.shape)
    where = [np.argwhere(instances == i) for i in np.unique(instances[instances > 0])]
    for pixel in np.argwhere(instances == 0):
        distances = sorted(np.sqrt(((cell - pixel) ** 2).sum(1)).min() for cell in where)
        if len(distances) > 1:
            out[tuple(pixel)] = w0 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    return out


@pytest.mark.parametrize(("seed", "w0", "sigma"), [(0, 10.0, 5.0), (1, 10.0, 5.0), (2, 3.0, 1.5), (3, 10.0, 0.7)])
def test_border_weights_equal_brute_force(seed, w0, sigma, evidence):
    labels = cells(seed)
    labels[labels == 2] = 40  # numbers need not be consecutive
    expected = brute_force(labels, w0, sigma)
    assert expected.max() > 0.01 * w0
    assert np.abs(border_weights(labels, w0, sigma) - expected).max() < 2e-8 * w0
    assert np.abs(border_weights(labels, w0, 1.2 * sigma) - expected).max() > 1e-3 * w0
    if seed == 0:
        evidence.property("border weights equal eq. 2 computed pixel by pixel", "边界权重与逐像素计算的式 2 相等")


def test_one_cell_or_none_has_no_border_weight():
    labels = cells(count=1)
    assert labels.any()
    assert not border_weights(labels).any()
    assert not border_weights(np.zeros_like(labels)).any()


def test_border_weights_peak_between_cells(evidence):
    labels = np.zeros((40, 64), dtype=np.int32)
    labels[10:30, 10:30], labels[10:30, 32:52] = 1, 2  # two pixels apart
    weights = border_weights(labels)
    assert weights[20, 30] == weights[20, 31] == pytest.approx(10 * math.exp(-9 / 50))  # d1 + d2 = 1 + 2
    assert weights.max() == weights[20, 30]
    assert weights[20, 4] < 0.01
    assert not weights[labels > 0].any()
    moved = np.roll(labels * (labels == 2), 8, axis=1) + labels * (labels == 1)
    assert border_weights(moved).max() < weights.max() / 3
    evidence.property(
        "border weights peak between close objects and fall off with their distance",
        "边界权重在贴近的目标之间最大，随其间距增大而下降",
    )


def test_touching_instances_are_separated(evidence):
    labels = np.zeros((12, 20), dtype=np.int32)
    labels[2:10, 2:10], labels[2:10, 10:18] = 1, 2
    mask = (labels > 0).astype(np.int64)
    gap = touching(mask, labels)
    assert gap.sum() == 16 and gap[2:10, 9:11].all()
    assert ndimage.label(mask)[1] == 1
    assert ndimage.label(np.where(gap, 0, mask), np.ones((3, 3)))[1] == 2
    assert not touching(mask * labels, labels).any()  # of two classes: the mask tells them apart already
    assert not touching(np.where(labels == 2, 255, mask), labels).any()
    evidence.property("touching instances of one class are separated by background", "同类的接触实例之间以背景分开")


def test_classes_weigh_the_same():
    mask = np.zeros((10, 10), dtype=np.int64)
    mask[0, :7], mask[1:3], mask[9] = 1, 2, 255
    weights = class_balance(mask)
    sums = [weights[mask == c].sum() for c in (0, 1, 2)]
    assert sums == pytest.approx([30, 30, 30])
    assert not weights[mask == 255].any()
    assert not class_balance(np.full((4, 4), 255)).any()


def sample(labels: np.ndarray, *, instances: bool) -> dict:
    out = {
        "image": tv_tensors.Image(torch.rand(1, *labels.shape)),
        "mask": tv_tensors.Mask(torch.from_numpy((labels > 0).astype(np.int64))),
        "name": "cells",
    }
    if instances:
        out["instances"] = tv_tensors.Mask(torch.from_numpy(labels))
    return out


def test_labels_of_a_sample():
    labels = np.zeros((24, 40), dtype=np.int32)
    labels[4:20, 4:18], labels[4:20, 18:34] = 1, 2
    before = sample(labels, instances=True)
    after = Labels(VARIANTS["paper"])(before)
    mask, weight = after["mask"], after["weight"]
    assert isinstance(mask, tv_tensors.Mask) and mask.dtype == torch.int64 and after["instances"].dtype == torch.int32
    assert before["mask"].sum() - mask.sum() == 32
    assert torch.equal(mask > 0, after["instances"] > 0)
    assert weight.dtype == torch.float32 and weight.shape == mask.shape
    assert weight[12, 17] > 8 + weight[0, 39]
    plain = Labels(replace(VARIANTS["paper"], border_weight=0.0))(before)
    assert torch.equal(plain["weight"], torch.from_numpy(class_balance(mask.numpy())).float())


def test_components_stand_in_for_instances():
    labels = cells(count=4)
    labels[20, :] = 0
    parts, count = ndimage.label(labels > 0)
    assert count > 1
    after = Labels(VARIANTS["paper"])(sample(labels, instances=False))
    assert "instances" not in after
    assert torch.equal(after["mask"] > 0, torch.from_numpy(labels > 0))
    expected = class_balance((labels > 0).astype(np.int64)) + brute_force(parts, 10.0, 5.0)
    assert np.abs(after["weight"].numpy() - expected).max() < 1e-5
    two = np.array([[1, 1, 2, 2, 0, 1, 255]])
    assert components(two).tolist() == [[1, 1, 3, 3, 0, 2, 0]]


def test_without_border_weight_the_task_trains():
    config = replace(VARIANTS["paper"], border_weight=None)
    assert unet.loss(config) is Segmentation.loss
    assert unet.loss(VARIANTS["paper"]) is weighted_cross_entropy
    assert "weight" not in Labels(config)(sample(cells(), instances=True))


def test_weighted_cross_entropy_is_eq_1_on_the_centre():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, generator=g)
    mask = torch.randint(3, (2, 8, 10), generator=g)
    mask[0, 3, 3] = 255
    weight = torch.rand(2, 8, 10, generator=g)
    total = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(6):
                label = int(mask[b, i + 2, j + 2])
                if label != 255:
                    total -= float(weight[b, i + 2, j + 2]) * math.log(float(logits[b, :, i, j].softmax(0)[label]))
    found = weighted_cross_entropy({"logits": logits}, {"mask": mask, "weight": weight})["loss"]
    assert float(found) == pytest.approx(total / 48, rel=1e-5)
    even = weighted_cross_entropy({"logits": logits}, {"mask": mask, "weight": torch.ones_like(weight)})["loss"]
    assert float(even) != pytest.approx(float(found), rel=1e-2)
