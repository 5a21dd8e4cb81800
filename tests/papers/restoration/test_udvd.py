"""UDVD against numbers of its official code, and the blind spot proven by gradients."""

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

from paperworks.papers.restoration.udvd.udvd import EPSILON, UDVD, VARIANTS, Config, likelihood, loss, posterior, recipe, solved
from paperworks.tasks.restoration import Restoration, frames_of, middle

TOLERANCE = 1e-4
FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "udvd.json").read_text())
AGAINST = f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}"
CONFIGS = {
    "five_rgb": Config(),
    "five_grey": Config(),
    "five_estimated": Config(noise="estimated"),
    "five_seeing": Config(blind=False),
    "three_rgb": Config(frames=3),
    "one_rgb": Config(frames=1),
}


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a tensor, from nothing but its official name and its shape (RandomState's stream is frozen by numpy's promise)."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1 and not name.startswith("image"):
        z *= sqrt(2 / prod(shape[1:]))
    return torch.from_numpy(z)


def official_name(ours: str, frames: int) -> str:
    """Our name of a parameter -> the official one."""
    ours = re.sub(r"\.(\d)\.conv\.", lambda m: f".conv{int(m[1]) + 1}.conv.", ours)
    ours = re.sub(r"^denoiser(\d)", {5: r"denoiser_\1", 3: "denoiser_1", 1: "unet"}[frames], ours)
    return re.sub(r"^nin_([abc])", lambda m: f"nin_{m[1].upper()}", ours).replace("noise_net", "sigma_net")


def fill(network: nn.Module, frames: int) -> None:
    for key, value in network.state_dict().items():
        value.copy_(draw(official_name(key, frames), tuple(value.shape)))


def sample(x: torch.Tensor) -> list[float]:
    """Every n-th value, about 300 in all, with n odd so that all columns are met."""
    flat = x.detach().flatten()
    return [float(f"{v:.7g}") for v in flat[:: max(flat.numel() // 300, 1) | 1]]


def relative(ours: torch.Tensor, expected: list[float]) -> float:
    difference = np.subtract(sample(ours), expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def window(image: torch.Tensor, frames: int) -> torch.Tensor:
    """The official B (T C) H W -> our window of five frames, of which the network takes those in the middle."""
    around = torch.zeros(len(image), (5 - frames) // 2 * (image.shape[1] // frames), *image.shape[2:])
    return torch.cat([around, image, around], 1)


def small(config: Config | None = None, channels: int = 1, sigma: float | None = 0.1, seed: int = 0) -> UDVD:
    torch.manual_seed(seed)
    return UDVD(channels, sigma, config or Config(width=6))


# --- The official code


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_of_the_official_networks(name):
    golden = FIXTURE["networks"][name]
    with torch.device("meta"):
        network = UDVD(golden["channels"], None if name == "five_grey" else 0.1, CONFIGS[name])
    assert sum(p.numel() for p in network.parameters()) == golden["params"]


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_the_official_network(evidence, name):
    golden, config, side = FIXTURE["networks"][name], CONFIGS[name], FIXTURE["side"]
    frames, channels = golden["frames"], golden["channels"]
    network = UDVD(channels, None if name == "five_grey" else FIXTURE["sigma"], config).eval()
    fill(network, frames)
    image = window(draw(f"image {frames} {channels}", (2, frames * channels, side, side)), frames)
    with torch.inference_mode():
        out = network(image)
        errors = {"raw": relative(torch.cat([out["mean"], out["triangle"]] if "triangle" in out else [out["mean"]], 1), golden["raw"])}
        if "restored" in golden:
            errors["posterior"] = relative(out["restored"], golden["restored"])
            value = float(likelihood(out, middle(image)))
            errors["loss"] = abs(value - golden["loss"]) / abs(golden["loss"])
        if config.noise == "estimated":
            errors["sigma"] = relative(out["sigma"], golden["sigma"])
        assert max(errors.values()) < TOLERANCE, errors
        network.denoiser2.enc2[1].conv.weight.mul_(1.02)  # a perturbed weight is seen
        assert relative(torch.cat([v for k, v in network(image).items() if k in ("mean", "triangle")], 1), golden["raw"]) > TOLERANCE
    evidence.fidelity(against=f"{AGAINST} {name}, {', '.join(errors)}", error=max(errors.values()))


# --- The blind spot


def touched(network: UDVD, size: tuple[int, int], where: tuple[int, int], key: str = "mean") -> torch.Tensor:
    """Sum over channels of |gradient| of one output pixel by the window, T H W."""
    torch.manual_seed(1)
    image = torch.randn(1, 5 * network.channels, *size, requires_grad=True)
    out = network(image)[key][0, :, where[0], where[1]].sum()
    (gradient,) = torch.autograd.grad(out, image)
    return frames_of(gradient[0]).abs().sum(1)


@pytest.mark.parametrize("size", [(24, 24), (16, 28)])
def test_blind_spot_is_exact_everywhere(evidence, size):
    """Corners, sides and middle, on squares and not: the pixel itself has no influence in any frame, each of its eight neighbours has."""
    network = small(channels=2)
    height, width = size
    for y, x in [
        (0, 0),
        (0, width - 1),
        (height - 1, 0),
        (height - 1, width - 1),
        (0, 7),
        (9, 0),
        (5, 6),
        (8, 9),
        (11, 13),
        (height - 1, 4),
    ]:
        gradient = touched(network, size, (y, x))
        assert (gradient[:, y, x] == 0).all()
        near = gradient[2, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        assert (near != 0).sum() == near.numel() - 1
    evidence.property(
        f"the mean at a pixel has zero gradient by that pixel, in all five frames, and not by its neighbours ({height}x{width}, also at borders)",
        f"某个像素的均值对该像素的梯度为零，五帧都是；对其邻居则不为零（{height}x{width}，包括边界）",
    )


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_all_frames_of_the_window_count(frames):
    gradient = touched(small(Config(width=6, frames=frames)), (24, 24), (11, 12))
    seen = gradient.flatten(1).sum(1) > 0
    assert seen.tolist() == [abs(t - 2) <= frames // 2 for t in range(5)]


def test_posterior_sees_the_pixel_and_the_control_does_too(evidence):
    assert touched(small(), (24, 24), (11, 12), key="restored")[2, 11, 12] > 0
    gradient = touched(small(Config(width=6, blind=False)), (24, 24), (11, 12))
    assert (gradient[:, 11, 12] > 0).all()
    evidence.property(
        "without the blind spot the pixel is seen in all frames; with it, Bayes' rule alone brings the noisy pixel in",
        "不带盲点时，五帧里都看得到该像素；带盲点时，只有贝叶斯公式把含噪像素放回来",
    )


def test_without_the_last_shift_the_network_sees_itself(monkeypatch):
    """The mistake that everybody makes; the test above would notice."""
    network = small()
    monkeypatch.setattr(network, "blind", False)
    assert touched(network, (24, 24), (11, 12))[2, 11, 12] > 0


def test_every_direction_is_seen():
    """One U-Net sees what lies above; four of them see the whole field."""
    gradient = touched(small(), (32, 32), (16, 16))[2]
    assert all(part.any() for part in (gradient[:12], gradient[20:], gradient[:, :12], gradient[:, 20:]))


@pytest.mark.parametrize("key", ["mean", "restored"])
def test_turning_the_film_turns_the_result(key):
    """Only with 1x1 convolutions that treat the four branches alike."""
    network = small().eval()
    with torch.no_grad():
        weight = network.nin_a.weight.unflatten(1, (4, -1)).mean(1, keepdim=True)
        network.nin_a.weight.copy_(weight.expand(-1, 4, -1, -1, -1).flatten(1, 2))
        image = torch.randn(1, 5, 16, 24)
        torch.testing.assert_close(network(image.rot90(1, (2, 3)))[key], network(image)[key].rot90(1, (2, 3)), rtol=1e-4, atol=1e-5)


def test_bias_free_network_scales(evidence):
    """No biases: a film that is twice as bright, with noise twice as strong, gives a mean that is twice as bright."""
    network = small().eval()
    image = torch.rand(1, 5, 24, 24)
    with torch.inference_mode():
        torch.testing.assert_close(network(3 * image)["mean"], 3 * network(image)["mean"])
    assert not any("bias" in name for name, _ in network.named_parameters())
    evidence.property("no bias anywhere: the mean scales with the film", "处处没有偏置：均值随视频等比缩放")


# --- Bayes' rule


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_posterior_is_that_of_the_paper(evidence, channels):
    """(S^-1 + s^-2 I)^-1 (S^-1 mu + s^-2 y) by torch.linalg, in double precision."""
    torch.manual_seed(0)
    mean, noisy = torch.randn(2, channels, 3, 4).double(), torch.randn(2, channels, 3, 4).double()
    triangle, sigma = torch.randn(2, channels * (channels + 1) // 2, 3, 4).double(), torch.tensor([0.3, 0.8]).double()
    expected = torch.empty_like(mean)
    for b in range(2):
        for y in range(3):
            for x in range(4):
                a, entries = torch.zeros(channels, channels).double(), iter(triangle[b, :, y, x])
                for row in range(channels):
                    for column in range(channels - row):
                        a[row, column] = next(entries)
                precision = torch.linalg.inv(a.T @ a + EPSILON * torch.eye(channels))
                weight = 1 / (sigma[b] ** 2 + EPSILON)
                right = precision @ mean[b, :, y, x] + weight * noisy[b, :, y, x]
                expected[b, :, y, x] = torch.linalg.solve(precision + weight * torch.eye(channels), right)
    torch.testing.assert_close(posterior(mean, triangle, noisy, sigma), expected, rtol=1e-5, atol=1e-6)
    evidence.property(
        f"the posterior mean equals the paper's formula with three inverses, {channels} channels",
        f"后验均值与论文中含三次求逆的公式相等，{channels} 个通道",
    )


def test_posterior_trusts_whom_it_should():
    mean, noisy, sigma = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor([0.1])
    sure, unsure = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 100.0)
    assert posterior(mean, sure, noisy, sigma).max() < 0.01
    assert posterior(mean, unsure, noisy, sigma).min() > 0.99


def test_elimination_and_determinant():
    torch.manual_seed(0)
    a = torch.randn(5, 4, 4).double()
    a = a @ a.mT + torch.eye(4)
    right = torch.randn(5, 4).double()
    matrix = [[a[:, i, j].view(5, 1, 1) for j in range(4)] for i in range(4)]
    x, log_det = solved(matrix, right.view(5, 4, 1, 1))
    torch.testing.assert_close(x.view(5, 4), torch.linalg.solve(a, right))
    torch.testing.assert_close(log_det.view(5), torch.logdet(a))


# --- Learning without clean frames


def test_loss_asks_for_no_truth_and_every_parameter_learns():
    for config in (VARIANTS["test"], replace(VARIANTS["test"], noise="estimated"), replace(VARIANTS["test"], frames=1)):
        network = small(config, channels=3).train()
        batch = {"image": torch.rand(2, 15, 16, 16)}
        loss(network(batch["image"]), batch)["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def test_unknown_noise_is_squared_error_without_posterior():
    network = small(sigma=None)
    batch = {"image": torch.rand(2, 5, 16, 16)}
    out = network(batch["image"])
    assert set(out) == {"restored", "mean"}
    torch.testing.assert_close(loss(out, batch)["loss"], (out["mean"] - middle(batch["image"])).square().mean())


def test_a_clean_mean_minimises_the_expected_loss(evidence):
    """Of all constant answers to noisy pixels of one clean value, the clean value has the smallest loss, with the variance that is left zero."""
    torch.manual_seed(0)
    noisy = 0.5 + 0.2 * torch.randn(1, 1, 200, 200)
    sigma = torch.tensor([0.2])

    def value(mean: float, spread: float) -> float:
        full = torch.ones_like(noisy)
        return float(likelihood({"mean": mean * full, "triangle": spread * full, "sigma": sigma}, noisy))

    best = value(0.5, 0.0)
    assert best < min(value(m, s) for m, s in [(0.45, 0.0), (0.55, 0.0), (0.5, 0.1), (0.4, 0.1)])
    evidence.property(
        "the likelihood of the noisy pixel is largest at the clean value and no spread beyond the noise",
        "含噪像素的似然在均值为干净值、除噪声外没有离散时最大",
    )


def test_recipes_and_variants():
    assert recipe(VARIANTS["paper"]).lr == 1e-4
    spec = Restoration.plain_spec(1)
    with torch.device("meta"):
        assert sum(p.numel() for p in UDVD(1, spec.more["sigma"], VARIANTS["test"]).parameters()) < 100_000
