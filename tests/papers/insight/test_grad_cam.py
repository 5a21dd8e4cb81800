"""Grad-CAM against captum and pytorch-grad-cam, against CAM by algebra, and what its parts are said to do."""

from __future__ import annotations

import json
import zlib
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.insight.grad_cam.grad_cam import (
    EXPLAINERS,
    box,
    cam,
    explain,
    features_and_gradient,
    grad_cam,
    guided_backprop,
    guided_grad_cam,
    last_map,
)
from paperworks.tasks.explain import heat_overlay, scaled

TOLERANCE = 1e-4
FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "grad_cam.json").read_text())
CASES = (("resnet18", "layer3", 96, 4), ("resnet18", "layer4", 96, 7), ("squeezenet1_1", "features.12", 96, 5))
"""torchvision network, layer, side of the image, class. SqueezeNet's ReLUs work in place, ResNet's are called several times."""


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a tensor, from nothing but its name and its shape (RandomState's stream is frozen by numpy's promise)."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        z = 0.5 + np.abs(z)
    elif name.endswith(("bias", "running_mean")):
        z *= 0.2
    elif len(shape) == 1:
        z = 1 + 0.2 * z  # scale of a batch norm
    elif name != "image":
        z *= sqrt(2 / prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def peer(name: str) -> nn.Module:
    """A network of torchvision with weights that follow from their names."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name, num_classes=10)
    network = network.to_empty(device="cpu").eval()
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                value.copy_(draw(key, tuple(value.shape)))
    return network


def sample(x: torch.Tensor) -> list[float]:
    """Every n-th value, about 300 in all, with n odd so that all columns are met."""
    flat = x.detach().flatten()
    return [float(f"{v:.7g}") for v in flat[:: max(flat.numel() // 300, 1) | 1]]


def relative(ours: torch.Tensor, expected: list[float]) -> float:
    difference = np.subtract(sample(ours), expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


class Pooled(nn.Module):
    """Convolutions, global average, one linear layer: the networks that CAM is defined for."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2, padding=1), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(8, classes)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.classifier(self.features(image).mean((2, 3)))}


# --- Other implementations


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda c: f"{c['network']} {c['layer']}")
def test_maps_equal_captum_and_pytorch_grad_cam(evidence, case):
    network, image, layer, label = peer(case["network"]), draw("image", (2, 3, case["side"], case["side"])), case["layer"], case["class"]
    heat = explain(network, image, layer, label)
    errors = {
        f"captum {FIXTURE['captum']}": relative(heat, case["captum"]),
        f"pytorch-grad-cam {FIXTURE['pytorch-grad-cam']}": relative(small_to_large(network, image, layer, label), case["pytorch-grad-cam"]),
    }
    for against, error in errors.items():
        assert error < TOLERANCE, against
        evidence.fidelity(against=f"{against}, {case['network']} {layer}", error=error)
    other = explain(network, image, layer, (label + 1) % 10)
    assert relative(other, case["captum"]) > 100 * TOLERANCE  # another class is another map


def small_to_large(network, image, layer, label):
    """pytorch-grad-cam moves each map to [0, 1] by its minimum and maximum, before and after it enlarges it with OpenCV (aligned as ours)."""
    a, gradient = features_and_gradient(network, image, layer, label)
    large = F.interpolate(moved(grad_cam(a, gradient))[:, None], image.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return moved(large)


def moved(heat):
    heat = heat - heat.amin((1, 2), keepdim=True)
    return heat / heat.amax((1, 2), keepdim=True)


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda c: f"{c['network']} {c['layer']}")
def test_guided_maps_equal_captum(evidence, case):
    network, image = peer(case["network"]), draw("image", (2, 3, case["side"], case["side"]))
    pairs = {
        "guided backprop": guided_backprop(network, image, case["class"]),
        "guided grad-cam": guided_grad_cam(network, image, case["layer"], case["class"]),
    }
    for name, ours in pairs.items():
        error = relative(ours, case[f"captum {name}"])
        assert error < TOLERANCE
        evidence.fidelity(against=f"captum {FIXTURE['captum']} {name}, {case['network']} {case['layer']}", error=error)
    image.requires_grad_()
    (plain,) = torch.autograd.grad(network(image)[:, case["class"]].sum(), image)
    assert relative(plain, case["captum guided backprop"]) > 100 * TOLERANCE


# --- CAM is the special case


def test_cam_is_the_special_case(evidence):
    """ReLU(CAM) = Z Grad-CAM, exactly, on a network that ends in an average and a linear layer."""
    network, image = Pooled().double().eval(), torch.randn(3, 2, 12, 10, dtype=torch.float64)
    for label in range(4):
        a, gradient = features_and_gradient(network, image, "features", label)
        places = a.shape[2] * a.shape[3]
        weights = network.classifier.weight[label].detach()
        torch.testing.assert_close(places * gradient.mean((2, 3)), weights.expand(3, -1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(places * grad_cam(a, gradient), cam(a, weights).clamp(min=0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scaled(grad_cam(a, gradient)), scaled(cam(a, weights).clamp(min=0)), rtol=1e-12, atol=1e-12)
    evidence.property(
        "on a globally averaged network ReLU(CAM) = Z Grad-CAM to 1e-12, and alpha = w / Z",
        "在全局平均结尾的网络上，ReLU(CAM) = Z Grad-CAM 精确到 1e-12，且 alpha = w / Z",
    )


def test_cam_itself_has_no_relu():
    """Scaling the signed map by minimum and maximum instead gives another picture."""
    network, image = Pooled().eval(), torch.randn(1, 2, 12, 12)
    with torch.no_grad():
        network.classifier.weight[1].copy_(torch.tensor([1.0, -1.0]).repeat(4))
    a, gradient = features_and_gradient(network, image, "features", 1)
    signed = cam(a, network.classifier.weight[1].detach())
    assert signed.min() < 0 < signed.max()
    assert (moved(signed) - scaled(grad_cam(a, gradient))).abs().max() > 0.05


def test_a_dense_ending_needs_no_change(evidence):
    """Equation 1 by finite differences: alpha is how much y rises when a feature map rises everywhere, over Z."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh())
    network = nn.Sequential(body, nn.Flatten(), nn.Linear(3 * 36, 8), nn.Tanh(), nn.Linear(8, 5)).double().eval()
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    a, gradient = features_and_gradient(network, image, "0", 2)
    for n in range(3):
        step = torch.zeros_like(a)
        step[:, n] = 1e-5
        with torch.no_grad():
            slope = (network[1:](a + step) - network[1:](a - step))[0, 2] / 2e-5
        torch.testing.assert_close(gradient.mean((2, 3))[0, n], slope / 36, rtol=1e-6, atol=1e-9)
    evidence.property(
        "alpha equals finite differences of the score on a network with a dense ending",
        "在带稠密结尾的网络上，alpha 等于得分的有限差分",
    )


# --- What the parts do


def test_counterfactual_shows_what_the_map_hides(evidence):
    """Of one weighted sum s, the map is ReLU(s) and the counterfactual one ReLU(-s)."""
    network, image = Pooled().eval(), torch.randn(2, 2, 16, 16)
    a, gradient = features_and_gradient(network, image, "features", 0)
    for_it, against = grad_cam(a, gradient), grad_cam(a, gradient, counterfactual=True)
    torch.testing.assert_close(for_it - against, torch.einsum("bn,bnuv->buv", gradient.mean((2, 3)), a))
    assert torch.equal(for_it * against, torch.zeros_like(for_it))
    assert for_it.any() and against.any()
    evidence.property("map and counterfactual map are the two halves of one signed sum", "热图与反事实热图是同一个带符号加权和的正负两半")


def test_a_map_points_at_what_the_class_is_made_of():
    """Detectors of bright and of dark places: each class's map is where its feature is."""
    network = Pooled(classes=2).eval()
    with torch.no_grad():
        network.features[0] = nn.Identity()
        network.features[2] = nn.Conv2d(2, 8, 1, bias=False)
        network.features[2].weight.zero_()[0, 0] = network.features[2].weight[1, 1] = 1
        network.classifier.weight.zero_()[0, 0] = network.classifier.weight[1, 1] = 1
    image = torch.zeros(1, 2, 16, 16)
    image[0, 0, 2:5, 3:6] = image[0, 1, 10:14, 9:13] = 1
    left, right = (explain(network, image, "features", c)[0] for c in (0, 1))
    assert box(left) == (3, 2, 6, 5)
    assert box(right) == (9, 10, 13, 14)
    assert not (left * right).any()


def test_target_may_be_any_score():
    network, image = Pooled().eval(), torch.randn(2, 2, 8, 8)
    expected = explain(network, image, "features", 1)
    assert torch.equal(explain(network, image, "features", lambda out: out["logits"][:, 1]), expected)
    softmax = explain(network, image, "features", lambda out: out["logits"].softmax(1)[:, 1])
    assert not torch.allclose(scaled(softmax), scaled(expected), atol=1e-2)  # behind the softmax classes mix


def test_networks_are_left_alone():
    """No hook, no gradient and no mode stays; parameters may be frozen and the caller may be in inference mode."""
    network, image = Pooled().eval(), torch.randn(1, 2, 8, 8)
    expected = explain(network, image, "features", 1)
    network.requires_grad_(False)
    with torch.inference_mode():
        heat = explain(network, torch.clone(image), "features", 1)
        guided_grad_cam(network, torch.clone(image), "features", 1)
        assert last_map(network, torch.clone(image), 1) == "features"
    assert torch.equal(heat, expected)
    assert not any(m._forward_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())
    assert not image.requires_grad


def test_relu_in_place_behind_the_layer_does_not_spoil_the_map():
    """The layer in front of an in-place ReLU: A and its gradient are those before the ReLU."""
    network, image = Pooled().eval(), torch.randn(1, 2, 8, 8)
    a, gradient = features_and_gradient(network, image, "features.2", 1)
    assert (a < 0).any()
    assert not gradient[a < 0].any()
    network.features[3].inplace = False
    plain = features_and_gradient(network, image, "features.2", 1)
    assert torch.equal(plain[0], a) and torch.equal(plain[1], gradient)


class Functional(nn.Module):
    """Every way to call a ReLU without a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, f = self.layers
        x = F.relu(b(F.relu(a(x), inplace=True)))
        x = torch.relu(d(c(x).relu()))
        return torch.relu_(f(e(x).relu_())).mean((2, 3))


def test_functional_relus_are_guided_too(evidence):
    functional, image = Functional().eval(), torch.randn(2, 2, 6, 6)
    modules = nn.Sequential(*(m for layer in functional.layers for m in (layer, nn.ReLU())), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    ours = guided_backprop(functional, image, 1)
    torch.testing.assert_close(ours, guided_backprop(modules, image, 1))
    x, kept = image, []
    for layer in functional.layers:
        kept.append((layer, pre := layer(x)))
        x = pre.relu()
    gradient = torch.zeros_like(x)
    gradient[:, 1] = 1 / 36
    for layer, pre in reversed(kept):
        gradient = gradient.clamp(min=0) * (pre > 0)  # both conditions, by hand
        gradient = F.conv_transpose2d(gradient, layer.weight, padding=1)
    torch.testing.assert_close(ours, gradient)
    evidence.property(
        "guided backpropagation by hand: passes where input and gradient are positive, also through functional ReLUs",
        "guided backpropagation 与手算相等：只在输入和梯度都为正处放行，函数式 ReLU 也是如此",
    )


def test_networks_without_relu_cannot_be_guided():
    with pytest.raises(InputError, match="ReLU"):
        guided_backprop(
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), torch.randn(1, 1, 8, 8), 0
        )


# --- Which layer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "layer4"),
        ("squeezenet1_1", "classifier.2"),
        ("densenet121", "features"),
        ("mobilenet_v2", "features"),
        ("vit_b_16", "encoder.layers.encoder_layer_11.ln_1"),
    ],
)
def test_last_map_of_common_networks(name, expected):
    torch.manual_seed(0)
    side = 224 if name == "vit_b_16" else 96
    with torch.device("meta"):
        network = torchvision.models.get_model(name, num_classes=10)
    network = network.to_empty(device="cpu").eval()
    with torch.no_grad():
        for p in (*network.parameters(), *network.buffers()):
            p.fill_(0.01) if p.ndim < 2 else p.normal_(0, 0.02)
    image = torch.randn(1, 3, side, side)
    found = last_map(network, image, 2)
    assert found == expected
    if name == "vit_b_16":
        heat = explain(network, image, found, 2)
        assert heat.shape == (1, side, side)


def test_wrong_layers_are_named():
    network, image = Pooled().eval(), torch.randn(1, 2, 8, 8)
    with pytest.raises(InputError, match=r"no layer 'body'.*features"):
        explain(network, image, "body", 0)
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Conv2d(2, 3, 3), shared, nn.Conv2d(3, 3, 3), shared, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(InputError, match="2 maps"):
        explain(twice, image, "1", 0)
    assert last_map(twice, image, 0) == "2"
    with pytest.raises(ValueError, match="evaluation mode"):
        explain(network.train(), image, "features", 0)
    with pytest.raises(InputError, match="no layer with a map"):
        last_map(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)).eval(), image, 0)


# --- Scale, boxes and pictures


def test_a_map_without_heat_stays_empty():
    heat = torch.stack([torch.zeros(4, 4), torch.arange(16.0).view(4, 4)])
    out = scaled(heat)
    assert not out[0].any()
    assert out[1].max() == 1
    assert box(heat[0]) == (0, 0, 4, 4)


def test_box_is_around_the_largest_part_above_the_share():
    heat = torch.zeros(20, 30)
    heat[3, 25] = 1.0  # the maximum, alone
    heat[10:14, 5:12] = 0.16
    heat[16:19, 0:20] = 0.14  # below 15 % of the maximum
    assert box(heat) == (5, 10, 12, 14)
    assert box(heat, share=0.5) == (25, 3, 26, 4)


def test_overlay_is_grey_where_there_is_no_heat():
    image = torch.rand(3, 6, 8)
    picture = heat_overlay(image, torch.zeros(6, 8))
    assert picture.shape == (6, 8, 3) and picture.dtype == np.uint8
    assert (picture[..., 0] == picture[..., 2]).all()
    hot = heat_overlay(image, torch.ones(6, 8))
    assert (hot[..., 0].astype(int) - hot[..., 2]).min() > 20


def test_offers_run_on_a_deployed_networks_input():
    network, image = Pooled().eval(), torch.randn(1, 2, 12, 12)
    for explainer in EXPLAINERS.values():
        heat = explainer.build(explainer.config)(network, image, 1)
        assert heat.shape == (1, 12, 12)
        assert heat.min() >= 0
