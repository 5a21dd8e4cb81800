"""Attention U-Net against numbers of its official code, and the properties that its gates are said to have."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paperworks.papers.segmentation.attention_unet.attention_unet import (
    VARIANTS,
    AttentionGate,
    AttentionUNet,
    Config,
    dice_loss,
    sorensen_dice,
)

TOLERANCE = 1e-4
FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "attention_unet.json").read_text())
SCALE_16 = (4, 8, 16, 32, 64)


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a tensor, from nothing but its official name and its shape (RandomState's stream is frozen by numpy's promise)."""
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


def official_name(ours: str) -> str:
    """Our name of a parameter or buffer -> the official one."""
    conv = {"0": "conv1.0", "1": "conv1.1", "3": "conv2.0", "4": "conv2.1"}
    ours = re.sub(r"^encoder\.4\.(\d)", lambda m: f"center.{conv[m[1]]}", ours)
    ours = re.sub(r"^encoder\.(\d)\.(\d)", lambda m: f"conv{int(m[1]) + 1}.{conv[m[2]]}", ours)
    ours = re.sub(r"^decoder\.(\d)\.(\d)", lambda m: f"up_concat{m[1]}.conv.{conv[m[2]]}", ours)
    ours = re.sub(r"^query\.", "gating.conv1.", ours)
    ours = re.sub(r"^skips\.(\d)\.gates\.(\d)", lambda m: f"attentionblock{m[1]}.gate_block_{int(m[2]) + 1}", ours)
    ours = re.sub(r"^skips\.(\d)\.combine", r"attentionblock\1.combine_gates", ours)
    ours = re.sub(r"^answers\.1\.", "dsv1.", ours)
    ours = re.sub(r"^answers\.(\d)\.", r"dsv\1.dsv.0.", ours)
    return ours.replace(".w_x.", ".theta.").replace(".w_g.", ".phi.").replace(".out.", ".W.")


def fill(module: nn.Module, prefix: str = "") -> None:
    for key, value in module.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            value.copy_(draw(official_name(prefix + key), tuple(value.shape)))


def sample(x: torch.Tensor) -> list[float]:
    """Every n-th value, about 300 in all, with n odd so that all columns are met."""
    flat = x.detach().flatten()
    return [float(f"{v:.7g}") for v in flat[:: max(flat.numel() // 300, 1) | 1]]


def relative(ours: torch.Tensor, expected: list[float]) -> float:
    difference = np.subtract(sample(ours), expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def network(config: Config, channels: int = 1, classes: int = 2, ndim: int = 2) -> AttentionUNet:
    torch.manual_seed(0)
    return AttentionUNet(channels, classes, config, ndim).eval()


# --- Parameter counts


@pytest.mark.parametrize(
    ("config", "expected"),
    [(VARIANTS["paper"], 6_214_151), (VARIANTS["paper_multi"], 6_473_322), (Config(gates=0), 5_888_004)],
)
def test_parameter_counts_of_the_official_networks(config, expected):
    with torch.device("meta"):
        net = AttentionUNet(1, 4, config, ndim=3)
    assert sum(p.numel() for p in net.parameters()) == expected


# --- The official code


@pytest.mark.parametrize(("official", "gates"), [("unet_CT_single_att_dsv_3D", 1), ("unet_CT_multi_att_dsv_3D", 2), ("unet_CT_dsv_3D", 0)])
def test_outputs_equal_the_official_network(evidence, official, gates):
    net = network(Config(widths=SCALE_16, gates=gates), classes=3, ndim=3)
    fill(net)
    image, golden = draw("image", tuple(FIXTURE["input"])), FIXTURE["networks"][official]
    with torch.inference_mode():
        out = net(image)
        assert set(out) == set(golden)
        errors = {key: relative(out[key], golden[key]) for key in golden}
        assert max(errors.values()) < TOLERANCE
        net.encoder[1][0].weight.mul_(1.02)  # a perturbed weight is seen
        assert relative(net(image)["logits"], golden["logits"]) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]} {official}, logits and alpha", error=max(errors.values()))


def test_gate_of_images_equals_the_official_one_at_odd_sizes(evidence):
    golden = FIXTURE["gate_2d"]
    gate = AttentionGate(6, 10, ndim=2).eval()
    fill(gate, "gate_2d.")
    with torch.inference_mode():
        out, alpha = gate(draw("image", tuple(golden["x"])), draw("image", tuple(golden["g"])))
    error = max(relative(out, golden["out"]), relative(alpha, golden["alpha"]))
    assert error < TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]} GridAttentionBlock2D, odd sides", error=error)


def test_a_gate_at_equal_resolution_is_another_network():
    """Negative control: the popular re-implementation with a stride of 1 in W_x does not pass as the paper's gate."""
    golden = FIXTURE["gate_2d"]
    gate = AttentionGate(6, 10, ndim=2).eval()
    fill(gate, "gate_2d.")
    x, g = draw("image", tuple(golden["x"])), draw("image", tuple(golden["g"]))
    with torch.inference_mode():
        gate.w_x.weight.copy_(gate.w_x.weight.mean((2, 3), keepdim=True).expand_as(gate.w_x.weight))
        assert relative(gate(x, g)[1], golden["alpha"]) > 100 * TOLERANCE


# --- Invariants of the gates


def test_alpha_lies_between_zero_and_one(evidence):
    net = network(Config(widths=SCALE_16, gates=2))
    fill(net)
    with torch.inference_mode():
        out = net(5 * torch.randn(2, 1, 64, 48))
    for level in (2, 3, 4):
        alpha = out[f"attention_{level}"]
        assert alpha.shape == (2, 2, 64 >> (level - 1), 48 >> (level - 1))
        assert alpha.min() > 0
        assert alpha.max() < 1
        assert alpha.std() > 1e-3
    assert out["attention_2"].sum((2, 3)).min() > 1.5  # a softmax over the positions would sum to 1
    evidence.property(
        "alpha is a sigmoid: in (0, 1) at each position, at levels 2 to 4",
        "alpha 是 sigmoid：第 2 至 4 级的每个位置都在 (0, 1) 内",
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_open_gate_passes_everything_and_shut_gate_nothing(evidence, ndim):
    gate = AttentionGate(4, 6, ndim=ndim).eval()
    x, g = torch.randn(1, 4, *[9] * ndim), torch.randn(1, 6, *[4] * ndim)
    with torch.inference_mode():
        gate.psi.weight.zero_()
        gate.psi.bias.fill_(40)
        out, alpha = gate(x, g)
        torch.testing.assert_close(alpha, torch.ones_like(alpha))
        torch.testing.assert_close(out, gate.out(x))
        gate.psi.bias.fill_(-200)
        out, alpha = gate(x, g)
        torch.testing.assert_close(out, gate.out(torch.zeros_like(x)))
    evidence.property(
        f"alpha = 1 passes the whole skip, alpha = 0 nothing of it ({ndim}-D)",
        f"alpha = 1 时跳连全部通过，alpha = 0 时全部挡住（{ndim} 维）",
    )


def test_gate_looks_at_the_coarser_level(evidence):
    """The query decides: the same skip, another g, another alpha; and alpha follows g in space."""
    gate = AttentionGate(4, 4, ndim=2).eval()
    with torch.inference_mode():
        gate.w_x.weight.zero_()
        gate.w_g.weight.fill_(1)
        gate.w_g.bias.zero_()
        gate.psi.weight.fill_(1)
        gate.psi.bias.fill_(-4)
        g = torch.zeros(1, 4, 8, 8)
        g[..., 2:4, 5:7] = 1
        _, alpha = gate(torch.randn(1, 4, 16, 16), g)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 10:14] = True
    assert alpha[0, 0][inside].min() > 0.5
    assert alpha[0, 0][~inside].mean() < 0.1
    evidence.property("alpha follows the gating signal in space, from half the resolution", "alpha 在空间上跟随只有一半分辨率的门控信号")


def test_finest_skip_is_not_gated(evidence):
    net = network(VARIANTS["test"])
    fill(net)
    image = torch.rand(1, 1, 32, 32)
    seen = []
    net.decoder["1"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        assert sorted(net.skips) == ["2", "3", "4"]
        net(image)
        finest = net.encoder[0](image)
        assert torch.equal(seen[0][:, : finest.shape[1]], finest)
    evidence.property("the finest skip is concatenated as the encoder left it", "最细的跳连按编码器的原样拼接")


def test_new_gates_are_open():
    """psi's bias of 3: a new gate lets most through; with the official 0 it does not."""
    image = torch.randn(2, 1, 64, 64)
    means = {}
    for bias in (3.0, 0.0):
        net = network(replace(VARIANTS["small"], psi_bias=bias)).train()
        with torch.inference_mode():
            means[bias] = min(float(net(image)[f"attention_{i}"].mean()) for i in (2, 3, 4))
    assert means[3.0] > 0.7
    assert means[0.0] < 0.6


def test_without_gates_there_is_no_map_and_fewer_parameters():
    """The control of the claim: the same body, nothing on the skips."""
    gated, plain = network(VARIANTS["small"]), network(replace(VARIANTS["small"], gates=0))
    with torch.inference_mode():
        assert set(plain(torch.rand(1, 1, 32, 32))) == {"logits"}
    assert {k for k in gated.state_dict() if not k.startswith(("skips", "query"))} == set(plain.state_dict())


# --- Loss and contract


def test_loss_is_the_printed_dice():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, 6), torch.randint(0, 3, (2, 4, 5, 6))
    p = logits.softmax(1)
    scores = []
    for b in range(2):
        for k in range(3):  # the background too
            t = (target[b] == k).float()
            scores.append(2 * ((p[b, k] * t).sum() + 0.01) / (p[b, k].sum() + t.sum() + 0.01))
    torch.testing.assert_close(sorensen_dice(logits, target), 1 - torch.stack(scores).mean())


def test_loss_leaves_ignored_pixels_out():
    torch.manual_seed(0)
    logits, target = torch.randn(1, 2, 6, 6), torch.randint(0, 2, (1, 6, 6))
    cut = target.clone()
    cut[..., 3:] = 255
    torch.testing.assert_close(sorensen_dice(logits, cut), sorensen_dice(logits[..., :3], target[..., :3]))


@pytest.mark.parametrize(("config", "size"), [(VARIANTS["test"], (32, 48)), (replace(VARIANTS["test"], gates=2), (16, 32, 16))])
def test_every_parameter_learns(config, size):
    net = network(config, ndim=len(size)).train()
    dice_loss(net(torch.rand(2, 1, *size)), {"mask": torch.randint(0, 2, (2, *size))})["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
