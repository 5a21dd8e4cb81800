"""Spiking networks against numbers of spikingjelly, closed forms of the neuron, and the counting of its operations."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.backbones.spiking.spiking import (
    AC,
    LIF,
    MAC,
    VARIANTS,
    Config,
    SpikingNet,
    matching_loss,
    operations,
    recall,
    seen_from,
    spike,
)
from peers import relative

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "spiking.json").read_text())
RECORD = runpy.run_path(str(FIXTURES / "spiking_record.py"))
LITTLE = Config(channels=(6, 8), kernel=3, padding=1, time_steps=6, image_size=8)


def built(config: Config, channels: int = 2, classes: int = 5, mean: float = 0.3, std: float = 0.5) -> SpikingNet:
    torch.manual_seed(0)
    return SpikingNet(channels, classes, config.image_size or 32, config, (mean,) * channels, (std,) * channels).eval()


def lively(net: nn.Module) -> nn.Module:
    """Weights so large that most neurons fire now and then, norms with something to say."""
    torch.manual_seed(1)
    for name, value in net.named_parameters():
        if value.ndim > 1:
            nn.init.normal_(value, 0, 2.5 / (value.numel() / len(value)) ** 0.5)
        else:
            nn.init.normal_(value, float(name.endswith("weight")), 0.2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


# --- The neuron


@pytest.mark.parametrize("kind", FIXTURE["neurons"])
def test_neurons_equal_spikingjellys(evidence, kind):
    """Spikes exactly, gradients through time to rounding."""
    settings, surrogate = RECORD["NEURONS"][kind.split(" | ")[0]], kind.split(" | ")[1]
    sharpness = RECORD["SURROGATES"][surrogate][1]
    config = Config(
        tau=settings["tau"],
        decay_input=settings["decay_input"],
        threshold=settings["v_threshold"],
        reset="soft" if settings["v_reset"] is None else "hard",
        detach_reset=settings["detach_reset"],
        surrogate=surrogate,
        sharpness=sharpness,
    )
    x = RECORD["current"]().requires_grad_()
    spikes = LIF(config)(x)
    (spikes * RECORD["draw"]("importance", tuple(x.shape))).sum().backward()
    golden = FIXTURE["neurons"][kind]
    assert 0 < sum(golden["spikes"]) < x.numel()
    assert spikes.int().flatten().tolist() == golden["spikes"]
    theirs = torch.tensor(golden["gradient"]).view_as(x)
    error = relative(x.grad, theirs)
    assert error < TOLERANCE
    y = x.detach().clone().requires_grad_()
    (LIF(replace(config, tau=1.05 * config.tau))(y) * RECORD["draw"]("importance", tuple(x.shape))).sum().backward()
    assert relative(y.grad, theirs) > TOLERANCE
    evidence.fidelity(against=f"spikingjelly {FIXTURE['version']} LIFNode, {kind}: spikes exact, gradient", error=error)


def test_a_network_equals_one_of_spikingjellys_neurons(evidence):
    net, draw = built(LITTLE), RECORD["draw"]
    names = {"currents.0.0": "first", "currents.1.0": "second", "head": "head"}
    ours = {name: names[name.rpartition(".")[0]] + "." + name.rpartition(".")[2] for name, _ in net.named_parameters()}
    net.load_state_dict({name: draw(theirs, RECORD["SHAPES"][theirs]) for name, theirs in ours.items()})
    image, golden = draw("image", (2, 2, 8, 8)), FIXTURE["network"]
    with torch.inference_mode():
        activity, logits = net.activity(image), net(image)["logits"].flatten()
    assert [float(signal.sum()) for signal in activity[1:]] == golden["spikes"]
    theirs = torch.tensor(golden["logits"])
    error = relative(logits, theirs)
    assert error < TOLERANCE
    with torch.inference_mode():
        net.currents[1][0].weight[2] *= 1.2
        assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    evidence.fidelity(against=f"spikingjelly {FIXTURE['version']} LIFNode in a network of two convolutions, direct coding", error=error)


def test_rate_of_an_integrator_in_closed_form(evidence):
    """No leak, soft reset, constant current c in [0, 1]: floor(cT) spikes."""
    c = torch.arange(0, 17) / 16  # binary fractions, so that sums are exact
    spikes = LIF(Config(tau=math.inf, decay_input=False, reset="soft"))(c.expand(25, 17))
    assert spikes.sum(0).tolist() == [math.floor(25 * float(x)) for x in c]
    leaky = LIF(Config(tau=4.0, decay_input=False, reset="soft"))(c.expand(25, 17))
    assert leaky.sum(0).tolist() != spikes.sum(0).tolist()
    evidence.property(
        "integrate-and-fire with soft reset: a constant current c gives exactly floor(cT) spikes; a leak loses some",
        "软重置的积分发放神经元：恒定电流 c 恰好给出 floor(cT) 个脉冲；有泄漏时会少一些",
    )


def test_first_spike_of_a_leaky_neuron_in_closed_form(evidence):
    """Below its threshold V = c (1 - (1 - 1/tau)^t): it fires at the first t where that reaches 1, and never for c < 1."""
    for c in (0.9, 1.1, 1.5, 2.5):
        spikes = LIF(Config(tau=3.0))(torch.full((60, 1), c))
        expected = next((t for t in range(60) if c * (1 - (2 / 3) ** (t + 1)) >= 1), None)
        found = spikes.flatten().nonzero().flatten().tolist()
        assert found[:1] == ([] if expected is None else [expected])
        if expected is not None:
            assert found == list(range(expected, 60, expected + 1))  # hard reset: as new
    evidence.property("leaky neuron: time of the first spike and period in closed form", "带泄漏的神经元：首个脉冲的时刻与周期符合闭式解")


@pytest.mark.parametrize("surrogate", ["atan", "fast_sigmoid", "rectangle", "none"])
def test_step_forward_surrogate_backward(evidence, surrogate):
    x = torch.linspace(-2, 2, 41).requires_grad_()
    y = spike(x, surrogate, 1.7)
    assert y.tolist() == [float(v >= 0) for v in x]
    if surrogate == "none":
        assert not y.requires_grad
        return
    y.sum().backward()
    a, d = 1.7, x.detach()
    expected = {
        "atan": a / 2 / (1 + (math.pi / 2 * a * d) ** 2),
        "fast_sigmoid": 1 / (1 + a * d.abs()) ** 2,
        "rectangle": a * (d.abs() < 1 / (2 * a)),
    }[surrogate]
    torch.testing.assert_close(x.grad, expected.float())
    evidence.property(
        f"{surrogate}: forward the step of exact zeros and ones, backward the stated derivative",
        f"{surrogate}：前向是严格取 0 和 1 的阶跃，反向是所写的导数",
    )


def test_gradient_through_three_steps_by_hand(evidence):
    """d s3 / d x1 is the surrogate at step 3 times what is left of x1 by then: decay twice, and nothing if it fired between."""
    config = Config(tau=2.0, surrogate="fast_sigmoid", sharpness=3.0)
    x = torch.tensor([0.6, 0.9, 1.1], requires_grad=True)
    spikes = LIF(config)(x[:, None])
    spikes[2].sum().backward()
    h = [0.3, 0.6, 0.85]
    assert not spikes.any()
    outer = 1 / (1 + 3 * abs(h[2] - 1)) ** 2
    torch.testing.assert_close(x.grad, outer * torch.tensor([0.125, 0.25, 0.5]))
    y = torch.tensor([0.6, 2.9, 1.1], requires_grad=True)  # fires at step 2: what came before is forgotten
    spikes = LIF(config)(y[:, None])
    spikes[2].sum().backward()
    assert spikes.flatten().tolist() == [0, 1, 0]
    assert y.grad[:2].tolist() == [0, 0]
    assert y.grad[2] > 0
    evidence.property("gradient of a chain of three steps by hand; a hard reset cuts it", "三步链的梯度与手算相等；硬重置会切断它")


def test_membranes_start_at_zero_for_every_image():
    neurons = LIF(Config())
    x = torch.full((3, 1), 1.9)
    assert torch.equal(neurons(x), neurons(x))


# --- The network


@pytest.mark.parametrize(("name", "parameters"), [("mlp", 79_510), ("conv", 29_826)])
def test_known_networks(name, parameters):
    """784-100-10 and 12C5-P2-64C5-P2-1024FC10 on digits."""
    net = built(VARIANTS[name], channels=1, classes=10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net(torch.zeros(2, 1, 28, 28))["logits"].shape == (2, 10)


def test_what_neurons_send_is_zero_or_one(evidence):
    net = lively(built(replace(LITTLE, norm=True)))
    signals = net.activity(torch.randn(4, 2, 8, 8))[1:]
    assert [s.shape for s in signals] == [(6, 4, 6, 4, 4), (6, 4, 8, 2, 2)]
    for signal in signals:
        assert set(signal.unique().tolist()) == {0.0, 1.0}
        assert 0.02 < signal.mean() < 0.8
        assert not torch.equal(signal[0], signal[-1])
    evidence.property(
        "between layers there are zeros and ones only, and they change from step to step",
        "层与层之间只有 0 和 1，而且随时间步变化",
    )


def test_gradients_reach_the_first_layer_through_the_surrogate_alone(evidence):
    for surrogate, reached in (("atan", True), ("none", False)):
        net = lively(built(replace(LITTLE, surrogate=surrogate, norm=True))).train()
        net(torch.randn(4, 2, 8, 8))["logits"].square().sum().backward()
        weights = [p for layer in net.currents for p in layer.parameters()]
        assert all(p.grad is not None and bool(p.grad.any()) for p in weights) is reached
    evidence.property(
        "with the true derivative no hidden weight gets a gradient; with the surrogate each does",
        "用真实的导数，隐层权重都得不到梯度；用替代梯度，每个都能得到",
    )


def test_rate_coding(evidence):
    config = replace(LITTLE, coding="rate", time_steps=4000, channels=(1,))
    net = built(config, channels=1)
    pixels = torch.rand(1, 1, 8, 8)
    image = (pixels - 0.3) / 0.5
    for training in (True, False):
        spikes = net.train(training).encoded(image)
        assert set(spikes.unique().tolist()) == {0.0, 1.0}
        assert float((spikes.mean(0) - pixels).abs().max()) < 0.05
    first, second = (net.train().encoded(image) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(net.eval().encoded(image), net.encoded(image))
    assert net.encoded(torch.full((1, 1, 8, 8), -9.0)).sum() == 0
    evidence.property(
        "rate coding: a pixel spikes with a chance of its brightness; chance in training, one fixed draw in evaluation",
        "频率编码：像素以其亮度为概率发放；训练时随机抽取，评估时用一次固定的抽样",
    )


def test_relu_is_the_conventional_twin():
    config = replace(LITTLE, neuron="relu", norm=True)
    net = lively(built(config))
    image = torch.randn(3, 2, 8, 8)
    x = image
    for layer in net.currents:
        x = F.relu(F.max_pool2d(layer[1](layer[0](x)), 2))
    torch.testing.assert_close(net(image)["logits"], net.head(x.flatten(1)))
    assert set(net.state_dict()) == set(built(replace(config, neuron="lif")).state_dict())


def test_backbone():
    net = built(VARIANTS["small"], channels=3)
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        features = net.pyramid(image)
    assert [tuple(f.shape) for f in features] == [(2, w, 32 // s, 32 // s) for w, s in zip(net.widths, net.strides)]
    assert net.embed(image).shape == (2, net.embedding)
    torch.testing.assert_close(features[-1].flatten(1), net.embed(image))
    assert all(0 <= float(f.min()) <= float(f.max()) <= 1 for f in features)


def test_images_that_are_too_small():
    with pytest.raises(InputError, match="too small"):
        built(replace(VARIANTS["conv"], image_size=12))


# --- Operations


def test_operations_of_the_conventional_twin_are_its_multiply_adds(evidence):
    net = built(replace(VARIANTS["conv"], neuron="relu"), channels=1, classes=10).eval()
    image = torch.randn(3, 1, 28, 28)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net(image)
    found = operations(net, image)
    assert found["multiply_adds"] == counter.get_total_flops() / 2 / 3
    assert found["additions"] == 0
    assert found["nanojoules"] == pytest.approx(found["multiply_adds"] * MAC / 1e3)
    evidence.property("operations of the twin with ReLU equal the counted multiply-adds", "ReLU 版本的操作数等于计数得到的乘加次数")


@pytest.mark.parametrize("coding", ["direct", "rate"])
def test_additions_are_counted_spike_by_spike(evidence, coding):
    net = lively(built(replace(LITTLE, coding=coding)))
    image = 0.4 * torch.randn(2, 2, 8, 8)
    with torch.inference_mode():
        signals, found = net.activity(image), operations(net, image)
    additions = 0.0
    for conv, signal in zip((net.currents[0][0], net.currents[1][0]), signals):
        for t, b, c, y, x in signal.nonzero().tolist() if len(signal) > 1 else []:
            del t, b, c
            height = min(y + 1, signal.shape[3] - 1) - max(y - 1, 0) + 1
            width = min(x + 1, signal.shape[4] - 1) - max(x - 1, 0) + 1
            additions += height * width * conv.out_channels  # the cells that see this place
    additions += float(signals[2].sum()) * 5
    multiply = 0 if coding == "rate" else 2 * (3 * 8 - 2) ** 2 * 2 * 6  # at borders a kernel sees 2 of 3 rows
    assert found["additions"] == additions / 2 > 0
    assert found["multiply_adds"] == multiply / 2
    assert found["nanojoules"] == pytest.approx((MAC * multiply + AC * additions) / 2e3)
    evidence.property(
        f"{coding} coding: additions counted spike by spike and cell by cell; a constant first current is multiplied once",
        f"{coding} 编码：加法逐个脉冲、逐个格子数出；恒定的首层电流只乘一次",
    )


# --- Matching


def test_view_without_turn_and_tilt_is_the_image():
    image = torch.rand(3, 2, 9, 9)
    torch.testing.assert_close(seen_from(image, torch.Generator().manual_seed(0), 0.0, 0.0), image, rtol=0, atol=1e-5)


def test_views_turn_and_tilt():
    image = torch.zeros(400, 1, 41, 41)
    image[:, :, 20, 35] = 1  # to the right of the middle
    seen = seen_from(image, torch.Generator().manual_seed(0), turn=30.0, tilt=0.0)[:, 0].flatten(1).argmax(1)
    angle = torch.rad2deg(torch.atan2(seen // 41 - 20.0, seen % 41 - 20.0))
    assert -33 < float(angle.min()) < -25
    assert 25 < float(angle.max()) < 33
    tilted = seen_from(image, torch.Generator().manual_seed(0), turn=0.0, tilt=0.3)[:, 0].flatten(1).argmax(1)
    assert (tilted // 41 == 20).all()
    assert int((tilted % 41).min()) < 34 < 36 < int((tilted % 41).max())
    again = seen_from(image, torch.Generator().manual_seed(0), turn=30.0, tilt=0.0)[:, 0].flatten(1).argmax(1)
    assert torch.equal(again, seen)


def test_matching(evidence):
    rows = F.normalize(torch.randn(6, 9))
    assert recall(rows, 3 * rows) == 1
    assert recall(rows, rows.roll(1, 0)) == 0
    assert recall(torch.ones(6, 9), torch.ones(6, 9)) == 0  # encoders that say the same of everything match nothing
    swapped = rows[[1, 0, 2, 3, 4, 5]]
    assert recall(rows, swapped) == pytest.approx(4 / 6)
    likeness = rows @ swapped.T / 0.1
    by_hand = -(likeness.log_softmax(1).diagonal().mean() + likeness.T.log_softmax(1).diagonal().mean()) / 2
    torch.testing.assert_close(matching_loss(5 * rows, swapped), by_hand)
    evidence.property(
        "matching: both-way cross-entropy over partners by hand; recall loses ties",
        "匹配：对各自另一半的双向交叉熵与手算相等；得分并列时 recall 不算命中",
    )
