"""Deformable convolution against torchvision, the official RoI kernel and loops, and what its relatives promise."""

from __future__ import annotations

import itertools
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from scipy.ndimage import map_coordinates
from torch import nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.ops import deform_conv2d, roi_align

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext import convnext
from paperworks.papers.backbones.vit import vit
from paperworks.papers.layers.deformable_conv.deformable_conv import (
    LAYERS,
    VARIANTS,
    ActiveConv,
    AffineConv,
    DeformableConv,
    DeformableNet,
    DeformablePSRoIPool,
    DeformableRoIPool,
    DynamicConv,
    Sampling,
    Warped,
    effective_dilation,
    fitting,
    observed,
    places,
    put,
    radius,
    receptive_field,
    recipe,
    roi_pool,
    sampled,
    sampling_places,
    warped,
)
from paperworks.tasks.operations import flop_counter
from peers import check_pyramid, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "deformable_conv.json").read_text())
KNOWN = {"r101": 0, "r101+1": 82_962, "r101+2": 165_924, "r101+3": 248_886, "r101+6": 373_356, "r101+3_g4": 995_544}
"""Parameters beyond torchvision's ResNet-101: 18 (9 D + 1) G for each convolution of D channels."""
CONVOLUTIONS = {"plain": {}, "strided": {"stride": 2}, "dilated": {"padding": 2, "dilation": 2}, "grouped": {"groups": 4}, "five": {"kernel_size": 5}}  # fmt: skip


def conv(width: int = 8, outputs: int = 12, **settings) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(width, outputs, **({"kernel_size": 3, "padding": 1} | settings))


def moved(layer: DeformableConv) -> DeformableConv:
    """Offsets of a cell or two."""
    torch.manual_seed(1)
    layer.offset.weight.normal_(0, 0.15)
    layer.offset.bias.normal_()
    return layer


def built(name: str, side: int = 224, classes: int = 1000) -> DeformableNet:
    torch.manual_seed(0)
    return DeformableNet(3, classes, side, VARIANTS[name]).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds(name):
    """The paper states no multiply-adds: regular places and torchvision's count, and the convolution of the offsets."""
    with torch.device("meta"):
        net, plain = built(name), torchvision.models.resnet101(replace_stride_with_dilation=[False, False, True])
        image, operations = torch.zeros(1, 3, 224, 224), []
        for network in (net, plain):
            with flop_counter() as counter:
                network(image)
            operations.append(counter.get_total_flops() / 2)
    extra = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == KNOWN[name]
    layers = [m for m in net.modules() if isinstance(m, DeformableConv)]
    assert operations[0] - operations[1] == sum(m.offset.weight.numel() for m in layers) * 14 * 14


def test_every_variant_is_counted_here():
    assert set(KNOWN) | {"small", "small_regular", "test"} == set(VARIANTS)


def test_deformable_convolutions_are_the_last_3x3_ones():
    net = built("small", 32, 10)
    found = [name for name, m in net.named_modules() if isinstance(m, DeformableConv)]
    assert found == ["body.layer4.0.conv2", "body.layer4.1.conv1", "body.layer4.1.conv2"]
    with torch.device("meta"):
        found = [name for name, m in built("r101+6").named_modules() if isinstance(m, DeformableConv)]
    assert found == [*(f"body.layer3.{i}.conv2" for i in (20, 21, 22)), *(f"body.layer4.{i}.conv2" for i in (0, 1, 2))]


# --- Other implementations


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_torchvisions(evidence, name, groups):
    base = conv(**CONVOLUTIONS[name])
    layer = moved(DeformableConv(base, groups))
    x = torch.randn(2, 8, 9, 13)
    kept = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    theirs = deform_conv2d(x, layer.offset(x), base.weight, base.bias, **kept)
    error = relative(layer(x), theirs)
    assert error < TOLERANCE
    assert relative(base(x), theirs) > 0.1
    layer.offset.bias[3] += 0.05  # an offset that is perturbed is seen
    assert relative(layer(x), theirs) > TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} deform_conv2d, {name}, {groups} groups of offsets", error=error)


def test_gradients_equal_torchvisions(evidence):
    layer = moved(DeformableConv(conv()))
    x = torch.randn(2, 8, 7, 7)
    with torch.enable_grad():
        x.requires_grad_()
        offsets = layer.offset(x).detach().requires_grad_()
        wanted = (x, offsets, layer.conv.weight)
        values = sampled(x, places(layer.conv, offsets))
        ours = (layer.conv.weight.flatten(1) @ values.flatten(1, 2).flatten(2)).square().sum()
        theirs = deform_conv2d(x, offsets, layer.conv.weight, padding=1).square().sum()
        pairs = list(zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted)))
    error = max(relative(a, b) for a, b in pairs)
    assert error < TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} deform_conv2d, gradients of input, offsets and weights", error=error)


def test_network_equals_torchvisions_resnet(evidence):
    """At zero offsets, with converted weights."""
    peer = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    net = DeformableNet(3, 1000, 224, type(VARIANTS["r101"])(depth=50)).eval()
    torch.manual_seed(1)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.normal_(1, 0.2)
            module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    state = {k.replace("fc.", "head.") if k.startswith("fc.") else f"body.{k}": v for k, v in peer.eval().state_dict().items()}
    for i in range(3):  # torchvision dilates layer4 from the second unit on only
        peer.layer4[i].conv2.dilation = peer.layer4[i].conv2.padding = (2, 2)
        state[f"body.layer4.{i}.conv2.conv.weight"] = state.pop(f"body.layer4.{i}.conv2.weight")
    net.load_state_dict(net.state_dict() | state)
    assert set(net.state_dict()) - set(state) == {f"body.layer4.{i}.conv2.offset.{p}" for i in range(3) for p in ("weight", "bias")}
    image = torch.randn(1, 3, 96, 96)
    theirs = peer(image)
    error = relative(net(image)["logits"], theirs)
    assert error < TOLERANCE
    net.body.layer4[1].conv2.offset.bias[0] = 0.2
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} resnet50, res5 at stride 16, offsets at zero", error=error)


@pytest.mark.parametrize("name", FIXTURE["outputs"])
def test_roi_pooling_equals_the_official_kernel(evidence, name):
    s, recorded = FIXTURE["settings"], torch.tensor(FIXTURE["outputs"][name])
    features, boxes, offsets = map(
        torch.from_numpy, runpy.run_path(str(FIXTURES / "deformable_conv_record.py"))["inputs"]("sensitive" in name)
    )
    kept = {k: s[k] for k in ("side", "scale", "samples", "gamma")} | {"sensitive": "sensitive" in name}
    found = roi_pool(features, boxes, None if name == "plain" else offsets, **kept)
    error = relative(found.flatten(), recorded)
    assert error < TOLERANCE
    assert relative(roi_pool(features, boxes, 1.01 * offsets, **kept).flatten(), recorded) > TOLERANCE
    evidence.fidelity(
        against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]} deformable_psroi_pooling.cu on the CPU, {name}", error=error
    )


def test_roi_pooling_without_offsets_is_roi_align_with_samples_at_corners(evidence):
    """torchvision's samples lie in the middles of their parts: a shift by half a part."""
    features, side, samples = torch.randn(1, 5, 20, 20), 7, 4
    box = torch.tensor([[0.0, 48, 64, 223, 207]])
    half = (box[:, 3:] + 1 - box[:, 1:3]) / (2 * side * samples)
    theirs = roi_align(features, box + torch.cat([torch.zeros(1, 1), -half, 1 - half], 1), side, 1 / 16, samples, aligned=True)
    error = relative(roi_pool(features, box), theirs)
    assert error < TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} roi_align with shifted boxes, offsets at zero", error=error)


# --- Mechanisms


def test_equation_2_by_a_loop(evidence):
    base = conv(4, 3, stride=2, dilation=2, padding=2).double()
    layer = moved(DeformableConv(base, 2).double())
    x = torch.randn(1, 4, 7, 8, dtype=torch.float64)
    offsets, found = layer.offset(x).unflatten(1, (2, 9, 2))[0], layer(x)[0]
    expected = torch.zeros_like(found)
    for i, j in itertools.product(range(found.shape[1]), range(found.shape[2])):
        for n in range(9):
            for d in range(4):
                dy, dx = offsets[d // 2, n, :, i, j]
                at = [[2 * i - 2 + 2 * (n // 3) + float(dy)], [2 * j - 2 + 2 * (n % 3) + float(dx)]]
                value = map_coordinates(F.pad(x[0, d], (9,) * 4).numpy(), [[a[0] + 9] for a in at], order=1)[0]
                expected[:, i, j] += base.weight[:, d, n // 3, n % 3] * value
    torch.testing.assert_close(found, expected + base.bias[:, None, None])
    evidence.property(
        "eq. 2 with stride, dilation and two groups by a loop over cells, places and channels; scipy interpolates",
        "公式 (2)，含步长、空洞和两组偏移：与逐格、逐采样点、逐通道的循环一致，插值用 scipy",
    )


def test_offsets_get_gradients_by_finite_differences(evidence):
    base = conv(2, 2).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    offsets = (torch.rand(1, 18, 5, 5, dtype=torch.float64) * 0.8 + 0.1) * (torch.randint(0, 2, (1, 18, 5, 5)) * 2 - 1)  # off the cells
    with torch.enable_grad():
        assert torch.autograd.gradcheck(lambda x, o: sampled(x, places(base, o)), (x.requires_grad_(), offsets.requires_grad_()))
    evidence.property(
        "gradients of the input and of the offsets equal finite differences in double precision",
        "双精度下，输入与偏移的梯度与有限差分相等",
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("by", ["deformable", "active", "dynamic"])
def test_new_layers_compute_what_the_convolution_did(name, by):
    base = conv(**CONVOLUTIONS[name])
    x = torch.randn(2, 8, 9, 10)
    layer = put(nn.Sequential(base), Sampling(by=by))
    assert relative(layer(x), base(x)) < 1e-5


def test_dilation_and_active_convolution_are_special_cases(evidence):
    """Section 2.3: offsets that do not depend on the input."""
    base, x = conv(), torch.randn(2, 8, 9, 10)
    layer = DeformableConv(base)
    regular = torch.tensor([[y, x] for y in (-1.0, 0, 1) for x in (-1.0, 0, 1)])
    layer.offset.bias.copy_(regular.flatten())
    dilated = F.conv2d(x, base.weight, base.bias, padding=2, dilation=2)
    torch.testing.assert_close(layer(x), dilated, rtol=1e-4, atol=1e-5)
    assert torch.allclose(effective_dilation(base, places(base, layer.offsets(x))), torch.tensor(2.0))
    active = ActiveConv(base)
    active.offset["shared"].normal_()
    layer.offset.bias.copy_(active.offset["shared"])
    torch.testing.assert_close(active(x), layer(x))
    evidence.property(
        "dilated convolution and active convolution are deformable convolutions whose offsets are constant",
        "空洞卷积和主动卷积就是偏移恒定的可变形卷积",
    )


def test_offsets_follow_the_input_only_where_they_should(evidence):
    x = torch.randn(1, 8, 9, 9)
    other = x.clone()
    other[..., 4:] += 1
    layer, active, affine = moved(DeformableConv(conv())), ActiveConv(conv()), AffineConv(conv())
    active.offset["shared"].normal_()
    different = (layer.offsets(x) != layer.offsets(other)).any(1)[0]
    assert not different[:, :3].any()
    assert different[:, 4:].all()
    assert torch.equal(active.offsets(x), active.offsets(other))
    affine.localise[2].weight.normal_(0, 0.02)
    assert (affine(x) != affine(other))[..., :3].any()  # one map for the whole image
    evidence.property(
        "offsets: local and from the input (deformable), constant (active), global and from the input (affine)",
        "偏移：局部且取决于输入（可变形），恒定（主动），全局且取决于输入（仿射）",
    )


def test_spatial_transformer_warps_as_a_whole(evidence):
    layer, x = AffineConv(conv()), torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(layer(x), layer.conv(x), rtol=1e-4, atol=1e-4)
    layer.localise[2].bias.copy_(torch.tensor([0.0, -1, 0, 1, 0, 0]))  # a quarter turn
    torch.testing.assert_close(layer(x), layer.conv(x.rot90(1, (2, 3))), rtol=1e-4, atol=1e-4)
    evidence.property(
        "affine layer: the identity at first; a quarter turn of the map is torch.rot90",
        "仿射层：起初是恒等映射；把特征图转四分之一圈就是 torch.rot90",
    )


def test_dynamic_filters_change_weights_at_fixed_places(evidence):
    layer, x = DynamicConv(conv()), torch.randn(1, 8, 6, 6)
    layer.factor.weight.normal_(0, 0.2)
    factors, base = 1 + layer.factor(x), layer.conv
    i, j = 3, 2
    weights = base.weight * factors[0, :, i, j].view(3, 3)
    expected = (weights * x[0, :, i - 1 : i + 2, j - 1 : j + 2]).sum((1, 2, 3)) + base.bias
    torch.testing.assert_close(layer(x)[0, :, i, j], expected, rtol=1e-4, atol=1e-5)
    evidence.property(
        "dynamic filters: a cell's own factor for each of the nine weights; by hand at one cell",
        "动态滤波器：每个格子对九个权重各有自己的系数；在一个格子上手算核对",
    )


def test_box_offsets_are_relative_to_the_box(evidence):
    """Eq. 5: gamma (w, h) times the offset; the same offset moves a box twice as large twice as far."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    offsets = torch.zeros(1, 1, 2, 7, 7)
    offsets[:, :, 0] = 1.0
    for cells in (10, 20):
        box = torch.tensor([[0.0, 160, 160, 160 + 16 * cells - 1, 160 + 16 * cells - 1]])
        shift = roi_pool(ramp, box, offsets) - roi_pool(ramp, box)
        torch.testing.assert_close(shift, torch.full_like(shift, 0.1 * cells))
    offsets[:, :, 0, 2, 3] = 0
    still = (roi_pool(ramp, box, offsets) == roi_pool(ramp, box))[0, 0]
    assert still.nonzero().tolist() == [[2, 3]]
    evidence.property("RoI offsets: 0.1 of the box's width a unit, each bin on its own", "RoI 偏移：一个单位是框宽的 0.1，各小格互不影响")


def test_deformable_pooling_modules(evidence):
    features, boxes = torch.randn(2, 6, 16, 16), torch.tensor([[0.0, 16, 16, 160, 120], [1, 40, 30, 220, 200]])
    plain, sensitive = DeformableRoIPool(6), DeformablePSRoIPool(6, classes=4)
    torch.testing.assert_close(plain(features, boxes), roi_pool(features, boxes))
    assert (sum(p.numel() for p in plain.offset.parameters()), sensitive.offset.out_channels) == ((6 * 49 + 1) * 98, 2 * 49 * 4)
    score = roi_pool(sensitive.score(features), boxes, sensitive=True)
    torch.testing.assert_close(sensitive(features, boxes), score)
    sensitive.offset.bias.view(4, 2, 49)[2] = 1.5  # one class moves
    changed = (sensitive(features, boxes) - score).abs().flatten(2).amax((0, 2)) > 1e-3
    assert changed.tolist() == [False, False, True, False]
    with torch.enable_grad():
        for module in (plain, sensitive):
            module(features, boxes).square().sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in module.offset.parameters())
    evidence.property(
        "RoI modules: ordinary pooling at first; each class moves its own bins; gradients reach the offsets' layers",
        "RoI 模块：起初就是普通池化；每个类别移动自己的小格；梯度能传到偏移层",
    )


# --- What the paper looks at


def test_sampling_places_through_three_layers(evidence):
    net = built("small", 32, 10)
    found = sampling_places(net, torch.randn(1, 3, 32, 32), (4, 4))
    assert found.shape == (729, 2)
    assert sorted({tuple(p) for p in found.tolist()}) == [(y, x) for y in range(-2, 11, 2) for x in range(-2, 11, 2)]  # a regular 7x7
    last = net.body.layer4[1].conv2
    last.offset.bias.copy_(torch.tensor([3.0, 0] * 9))
    shifted = sampling_places(net, torch.randn(1, 3, 32, 32), (4, 4), levels=1)
    torch.testing.assert_close(shifted.mean(0), torch.tensor([7.0, 4.0]))
    evidence.property(
        "sampling places: 729 through three layers, a regular grid at zero offsets, moved by the offsets",
        "采样点：追溯三层共 729 个；偏移为零时是规则网格，随偏移而移动",
    )


def test_effective_dilation_counts_neighbours():
    base = conv()
    grid = places(base, torch.zeros(1, 18, 5, 5))
    assert torch.allclose(effective_dilation(base, grid), torch.ones(5, 5))
    offsets = torch.zeros(1, 9, 2, 5, 5)
    offsets[:, 4, 0] = 1.0  # the middle one moves onto its neighbour below: distances 0, 2, sqrt 2, sqrt 2 in place of four ones
    spread = effective_dilation(base, places(base, offsets.flatten(1, 2)))
    assert torch.allclose(spread, torch.tensor((8 + 0 + 2 + 2 * math.sqrt(2)) / 12))
    assert len(observed(built("small", 32, 10), torch.zeros(1, 3, 32, 32))) == 3


def test_receptive_field_is_measured(evidence):
    line = torch.zeros(9, 9)
    line[4, 2] = line[4, 6] = 1
    assert radius(line) == pytest.approx(2)
    layer = nn.Sequential(conv(3, 4), DeformableConv(conv(4, 4)))
    layer.pyramid = lambda x: [layer(x)]
    image = torch.randn(1, 3, 21, 21)
    with torch.enable_grad():
        before = receptive_field(layer, image)
    with torch.no_grad():
        layer[1].offset.bias.copy_(2 * torch.tensor([[y, x] for y in (-1.0, 0, 1) for x in (-1.0, 0, 1)]).flatten())
    with torch.enable_grad():
        after = receptive_field(layer, image)
    assert (before > 0).sum() == 25
    assert radius(after) > 1.5 * radius(before)
    evidence.property(
        "effective receptive field by gradients: 5x5 for two regular layers, wider with outward offsets",
        "用梯度测得的有效感受野：两个普通层为 5x5，偏移向外时更大",
    )


# --- In other networks


@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_a_convnext(evidence, name):
    torch.manual_seed(0)
    host = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"]).eval()
    image = torch.randn(2, 3, 32, 32)
    before = host(image)["logits"]
    host = LAYERS[name].put(host, LAYERS[name].config)
    kinds = DeformableConv | AffineConv | DynamicConv
    assert [key for key, m in host.named_modules() if isinstance(m, kinds)] == [f"stages.{i}.depthwise" for i in ("2.0", "2.1", "3.0")]
    torch.testing.assert_close(host(image)["logits"], before, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        host(image)["logits"].square().sum().backward()
    assert all(p.grad is not None for p in host.parameters())
    evidence.property(
        f"{name}: in a ConvNeXt the last three depthwise convolutions, at first without a change of the outputs",
        f"{name}：替换 ConvNeXt 最后三个深度卷积，起初输出不变",
    )


def test_which_convolutions_fit():
    network = nn.Sequential(conv(), conv(12, 8, kernel_size=1), conv(padding_mode="reflect"), conv(kernel_size=2), conv(padding="same"))
    assert fitting(network) == [network[0]]
    replaced = put(nn.Sequential(conv(), conv(12, 8), conv()), Sampling(last=None, by="regular", dilation=3))
    assert [(m.dilation, m.padding) for m in replaced] == [((3, 3), (3, 3))] * 3
    with pytest.raises(InputError, match="no place"):
        put(vit.ViT(3, 5, 32, vit.VARIANTS["test"]), Sampling())
    with pytest.raises(InputError, match="groups=3"):
        put(nn.Sequential(conv()), Sampling(groups=3))
    with pytest.raises(InputError, match="last=0"):
        put(nn.Sequential(conv()), Sampling(last=0))


def test_exported_layer_computes_the_same():
    layer, x = moved(DeformableConv(conv())), torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(("name", "side", "strides"), [("r101+3", 224, (4, 8, 16, 16)), ("small", 32, (1, 2, 4, 4))])
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(name, side)
        check_pyramid(net, side)
    assert net.strides == strides


# --- Training


def test_recipe_and_augmentation():
    assert recipe(VARIANTS["r101+3"]).optimizer == "sgd"
    assert recipe(VARIANTS["small"]) == recipe(VARIANTS["small_regular"])
    image = tv_tensors.Image(torch.rand(1, 20, 24))
    views = [Warped()({"image": image}, (16, 16), torch.Generator().manual_seed(seed))["image"] for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert views[0].shape == (1, 16, 16)
    still = Warped(flip=False, rotate=0, scale=(1, 1))({"image": image}, (20, 24), torch.Generator().manual_seed(0))["image"]
    torch.testing.assert_close(still.as_subclass(torch.Tensor), image.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-4)
    square = torch.rand(1, 9, 9)
    torch.testing.assert_close(warped(square, (9, 9), math.pi / 2, 1.0, 0.0), square.rot90(1, (1, 2)), rtol=1e-4, atol=1e-4)
    magnified = warped(square, (9, 9), 0.0, 3.0, 0.0)
    torch.testing.assert_close(magnified[:, 1::3, 1::3], square[:, 3:6, 3:6], rtol=1e-4, atol=1e-4)
