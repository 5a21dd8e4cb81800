"""Inceptions against timm, torchvision and facenet-pytorch, and their modules by hand."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.papers.backbones.inception_v4.claim import ARMS, CLAIM
from paperworks.papers.backbones.inception_v4.inception_v4 import (
    VARIANTS,
    Config,
    ConvNorm,
    Fork,
    Inception,
    Modules,
    Residual,
    chain,
    fork,
    loss,
    recipe,
    residual,
)
from paperworks.papers.backbones.inception_v4.weights import PUBLISHED, SOURCES
from peers import check_timms, macs, randomised_norms, relative

pytestmark = pytest.mark.usefixtures("no_gradients")
randomised = partial(randomised_norms, kernels=True)

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "inception_v4.json").read_text())
RULE = runpy.run_path(str(FIXTURES / "inception_v4_record.py"))
KNOWN = {
    "v4": (42_679_816, 12.28),
    "resnet_v2": (55_843_464, 13.18),
    "v3": (23_834_568, 5.73),
    "v3_auxiliary": (27_161_264, 5.73),
    "resnet_v1": (22_756_328, None),
    "resnet_v2_figures": (32_433_928, None),
    "v1": (7_005_832, None),
}
"""Parameters, and 10^9 multiply-adds at the variant's size as timm's model cards have them. The paper gives none; GoogLeNet's 1.5 is less than
what its table's layers add up to (1.58 here)."""


def built(config: Config, side: int = 32, classes: int = 10) -> Inception:
    torch.manual_seed(0)
    return Inception(3, classes, side, config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds(name):
    side = VARIANTS[name].image_size
    with torch.device("meta"):
        net = built(VARIANTS[name], side, classes=1000)
        with FlopCounterMode(display=False) as counter:
            features = net.pyramid(torch.zeros(1, 3, side, side))
    parameters, multiply_adds = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    if multiply_adds:
        assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.01)
    # The figures' maps: 35, 17 and 8 cells a side; GoogLeNet's 28, 14 and 7.
    assert [f.shape[2] for f in features] == ([28, 14, 7] if name == "v1" else [35, 17, 8])
    assert [f.shape[1] for f in features] == list(net.widths)


def test_every_variant_of_the_papers_is_counted_here():
    assert {name for name in VARIANTS if "small" not in name and name != "test"} == set(KNOWN)


def test_arms_of_the_claim_cost_the_same():
    costs = {}
    for arm, variant in ARMS.items():
        with torch.device("meta"):
            net = built(VARIANTS[variant])
        costs[arm] = (sum(p.numel() for p in net.parameters()), round(macs(net, 32) / 1e6, 1))
    assert costs == {"residual": (660_102, 39.0), "pure": (650_335, 38.6)}


# --- Other implementations


@pytest.mark.parametrize(("name", "theirs"), [("v4", "inception_v4"), ("resnet_v2", "inception_resnet_v2"), ("v3", "inception_v3")])
def test_outputs_equal_timms(evidence, name, theirs):
    peer = randomised(timm.create_model(theirs))
    net = built(VARIANTS[name], 299, classes=1000)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), VARIANTS[name]))
    image = torch.randn(1, 3, 107, 91)
    expected = peer(image)
    error = relative(net(image)["logits"], expected)
    assert error < TOLERANCE
    if name != "v3":
        features = peer.forward_intermediates(image, intermediates_only=True)[-3:]
        error = max(error, *map(relative, net.pyramid(image), features))
        assert error < TOLERANCE
    next(m for m in net.stages[1].modules() if isinstance(m, ConvNorm))[0].weight[:, :2] *= 3  # a perturbed weight is seen
    assert relative(net(image)["logits"], expected) > TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} {theirs}", error=error)


def test_second_classifier_equals_timms(evidence):
    peer = randomised(timm.create_model("inception_v3", aux_logits=True, num_classes=7))
    net = built(VARIANTS["v3_auxiliary"], 299, classes=7)
    net.load_state_dict(SOURCES["timm"](peer.state_dict(), VARIANTS["v3_auxiliary"]))
    middle = torch.randn(2, 768, 17, 17)
    error = relative(net.auxiliary(middle), peer.AuxLogits(middle))
    assert error < TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} inception_v3, auxiliary classifier", error=error)


def test_googlenet_equals_torchvisions_with_the_papers_5x5(evidence):
    """torchvision has 3x3 where the paper has 5x5, as its authors found too late; put right here."""
    peer = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False, num_classes=7)
    for module in peer.modules():
        if hasattr(module, "branch3"):
            old = module.branch3[1].conv
            module.branch3[1].conv = nn.Conv2d(old.in_channels, old.out_channels, 5, padding=2, bias=False)
    randomised(peer)
    net = built(VARIANTS["v1"], 224, classes=7)
    net.load_state_dict(dict(zip(net.state_dict(), peer.state_dict().values(), strict=True)))
    image = torch.randn(2, 3, 64, 96)
    error = relative(net(image)["logits"], peer(image))
    assert error < TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} googlenet with the paper's 5x5 convolutions", error=error)


def test_inception_resnet_v1_equals_facenets(evidence):
    net = built(VARIANTS["resnet_v1"], 299)
    theirs = [RULE["draw"](key, tuple(shape)) for key, shape in FIXTURE["shapes"].items()]
    names = [name for name in net.state_dict() if not name.startswith("head.")]
    net.load_state_dict(dict(zip(names, theirs, strict=True)), strict=False)
    ours = net.pyramid(RULE["draw"]("image", tuple(FIXTURE["input"])))
    errors = [relative(f.mean((2, 3)).flatten()[::7], torch.tensor(golden)) for f, golden in zip(ours, FIXTURE["features"].values())]
    assert max(errors) < TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['package']} InceptionResnetV1, all three resolutions", error=max(errors))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_where_timm_says(name):
    check_timms(PUBLISHED[name])


def test_other_layers_are_refused():
    with torch.device("meta"):
        state = timm.create_model("inception_v3").state_dict()
    with pytest.raises(ValueError, match="not the layers"):
        SOURCES["timm"](state, VARIANTS["v4"])


# --- Mechanisms


def test_residual_is_scaled_linear_and_added_before_the_relu(evidence):
    module, width = residual(0.17, lambda n: (nn.Conv2d(n, 3, 1), 3), lambda n: (nn.Conv2d(n, 2, 3, padding=1), 2))(4)
    assert isinstance(module, Residual)
    assert width == 4
    x = torch.randn(2, 4, 5, 5)
    y = torch.cat([branch(x) for branch in module.branches], 1)
    y = F.conv2d(y, module.linear.weight, module.linear.bias)
    torch.testing.assert_close(module(x), (x + 0.17 * y).relu())
    assert (y < 0).any()  # neither norm nor ReLU before the sum
    bare, _ = residual(1.0, lambda n: (nn.Conv2d(n, 3, 1), 3), relu=False)(4)
    assert (bare(x) < 0).any()
    evidence.property(
        "residual: branches, a 1x1 convolution without norm or ReLU, scale, sum, ReLU",
        "残差：各分支，既无归一化也无 ReLU 的 1×1 卷积，缩放，相加，ReLU",
    )


@pytest.mark.parametrize("name", ["resnet_v1", "resnet_v2"])
def test_scales_of_the_three_resolutions(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 299)
    scales = [[m.scale for m in stage.modules() if isinstance(m, Residual)] for stage in net.stages]
    a, b, c = VARIANTS[name].blocks
    last = [0.2] * (c - 1) + [1.0] if name == "resnet_v2" else [0.2] * c
    assert scales == [[0.17] * a, [0.1] * b, last]
    relus = [m.relu for m in net.modules() if isinstance(m, Residual)]
    assert relus == [True] * (a + b + c - 1) + [name != "resnet_v2"]


def test_scaling_keeps_a_wide_module_near_its_input(evidence):
    """Section 3.3: unscaled, a stack of residual modules of 1000 filters drifts away from its input; a tenth keeps it."""
    x = torch.randn(1, 1000, 4, 4).relu()

    def drift(scale: float) -> float:
        torch.manual_seed(0)
        part = chain(*(residual(scale, lambda n: (nn.Conv2d(n, n, 1), n)) for _ in range(5)))
        module, _ = part(1000)
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=(2 / 1000) ** 0.5)
        return float((module(x) - x).norm() / x.norm())

    assert drift(1.0) > 5 > 1 > drift(0.1)
    evidence.property(
        "five residual modules of 1000 filters: unscaled they drift by more than five times their input, at a tenth by less than once",
        "五个残差模块，各 1000 个滤波器：不缩放时偏离超过输入的五倍，缩放到十分之一时不到一倍",
    )


def reach(name: str, stage: int) -> tuple[list[tuple[int, int]], int]:
    """Kernels of the second module of a small network's stage, and its branches."""
    config = replace(VARIANTS["test"], architecture=name, blocks=(2, 2, 2))
    module = built(config).stages[stage][-1]
    assert isinstance(module, Fork)
    return [m.kernel_size for m in module.modules() if isinstance(m, nn.Conv2d)], len(module)


def test_modules_from_v1_to_v3(evidence):
    """Parallel 1x1, 3x3, 5x5 with reduction; 5x5 as two 3x3 and 3x3 as 1x3 and 3x1; 1x7 and 7x1."""
    one = (1, 1)
    assert reach("v1", 1) == ([one, one, (3, 3), one, (5, 5), one], 4)
    assert reach("v2", 0) == ([one, one, (3, 3), one, (3, 3), (3, 3), one], 4)
    assert reach("v2", 1) == ([one, one, (1, 3), (3, 1), one, (3, 1), (1, 3), (3, 1), (1, 3), one], 4)
    assert reach("v3", 0) == ([one, one, (5, 5), one, (3, 3), (3, 3), one], 4)
    assert reach("v3", 1) == ([one, one, (1, 7), (7, 1), one, (7, 1), (1, 7), (7, 1), (1, 7), one], 4)
    assert reach("v3", 2) == reach("v2", 2) == ([one, one, (1, 3), (3, 1), one, (3, 3), (1, 3), (3, 1), one], 4)
    assert reach("v4", 2)[0] == [one, one, (1, 3), (3, 1), one, (3, 1), (1, 3), (1, 3), (3, 1), one]
    evidence.property(
        "modules of v1, v2, v3 and v4: kernels of every branch, in order",
        "v1、v2、v3 与 v4 的模块：每个分支的卷积核及其次序",
    )


def test_factorised_kernels_see_as_far_for_less():
    m = Modules(Config())
    full, _ = m.conv(64, 7)(64)
    split, _ = chain(m.conv(64, 1, 7), m.conv(64, 7, 1))(64)
    x = torch.zeros(1, 64, 15, 15)
    changed = x.clone()
    changed[:, :, 7, 7] = 1
    for module in (full.eval(), split.eval()):
        seen = (module(changed) != module(x)).any(1)[0].nonzero()
        assert (seen.amin(0) >= 4).all()
        assert (seen.amax(0) <= 10).all()
    assert split[0][0].weight.numel() + split[1][0].weight.numel() == full[0].weight.numel() * 2 / 7


def test_average_pooling_does_not_count_zeros_in_v4_but_in_v3():
    for name, counted in (("v4", False), ("v3", True)):
        net = built(replace(VARIANTS["test"], architecture=name))
        assert {m.count_include_pad for m in net.modules() if isinstance(m, nn.AvgPool2d)} == {counted}


def test_fork_keeps_the_order_of_its_branches():
    module, width = fork(lambda n: (nn.Identity(), n), lambda n: (nn.Conv2d(n, 5, 1), 5))(2)
    x = torch.randn(1, 2, 3, 3)
    assert width == 7
    assert torch.equal(module(x)[:, :2], x)


@pytest.mark.parametrize("name", ["small", "small_resnet", "small_v1", "small_v2", "small_v3"])
@pytest.mark.parametrize("side", [32, 96])
def test_pyramid_of_small_networks(name, side):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        features = net.pyramid(torch.zeros(1, 3, side, side))
        assert net.embed(torch.zeros(2, 3, side, side)).shape == (2, net.embedding)
    assert [tuple(f.shape) for f in features] == [(1, w, side // s, side // s) for w, s in zip(net.widths, net.strides)]


# --- Training


def test_loss_adds_the_second_classifier_in_training_alone():
    with torch.inference_mode(False):
        logits, second, label = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
        ce = [F.cross_entropy(x, label, label_smoothing=0.1) for x in (logits, second)]
        torch.testing.assert_close(loss({"logits": logits}, {"label": label})["loss"], ce[0])
        torch.testing.assert_close(loss({"logits": logits, "auxiliary": second}, {"label": label})["loss"], ce[0] + 0.4 * ce[1])
    with torch.device("meta"):
        net = built(VARIANTS["v3_auxiliary"], 299)
        assert set(net(torch.zeros(1, 3, 299, 299))) == {"logits"}
        assert set(net.train()(torch.zeros(2, 3, 299, 299))) == {"logits", "auxiliary"}
        assert len(list(net.head_parameters())) == 4


def test_recipe():
    r = recipe(VARIANTS["v4"])
    assert (r.optimizer, r.average, r.batch_size, r.patch) == ("adamw", 0.9999, 64, 299)


def test_rule_of_the_claim():
    def results(residual, pure):
        return {"residual": {"training_loss": residual}, "pure": {"training_loss": pure}}

    low, high = [1.3, 1.31, 1.3, 1.32], [1.4, 1.42, 1.41, 1.43]
    assert CLAIM.holds(results(low, high))
    assert not CLAIM.holds(results(low, low))
    assert not CLAIM.holds(results(high, low))
