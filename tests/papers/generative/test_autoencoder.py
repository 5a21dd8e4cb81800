"""The deep autoencoder against MONAI's perceptron, its Boltzmann machines against sums over all their states, its linear form against PCA."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import monai
import numpy as np
import pytest
import torch
from monai.networks.nets import FullyConnectedNet
from scipy.linalg import subspace_angles
from torch.nn import functional as F

from paperworks.papers.generative.autoencoder.autoencoder import VARIANTS, Autoencoder, Config, cross_entropy, free_energy
from peers import relative

TOLERANCE = 1e-4
SMALL = Config(widths=(14, 10), code=3)


def network(config: Config = SMALL, channels: int = 1, side: int = 8, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(channels, side, config)


def images(n: int = 6, channels: int = 1, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_parameter_count_of_the_paper():
    with torch.device("meta"):
        net = Autoencoder(1, 28, VARIANTS["paper"])
    assert sum(p.numel() for p in net.parameters()) == 2_837_314
    assert [layer.out_features for layer in (*net.encoder, *net.decoder)] == [1000, 500, 250, 30, 250, 500, 1000, 784]


@pytest.mark.parametrize(("units", "act"), [("logistic", "sigmoid"), ("relu", "relu")])
def test_outputs_equal_two_perceptrons(evidence, units, act):
    config = Config(widths=(60, 40, 20), code=7, units=units)
    net = network(config, channels=3).eval()
    peers = FullyConnectedNet(192, 7, [60, 40, 20], act=act), FullyConnectedNet(7, 192, [20, 40, 60], act=act)
    with torch.inference_mode():
        for p in net.parameters():
            p.normal_(std=0.3)
        for layers, peer in zip((net.encoder, net.decoder), peers):
            for ours, theirs in zip(layers.parameters(), peer.parameters(), strict=True):
                theirs.copy_(ours)
        image = images(channels=3)
        code = peers[0](image)
        out = net(image)
        error = max(relative(out["code"], code), relative(out["reconstruction"], peers[1](code).sigmoid().view_as(image)))
        assert error < TOLERANCE
        net.decoder[1].weight[3] *= 1.05
        assert relative(net(image)["logits"], peers[1](code).view_as(image)) > TOLERANCE
    evidence.fidelity(against=f"MONAI {monai.__version__} FullyConnectedNet, encoder and decoder, {units} units", error=error)


def test_code_is_linear(evidence):
    net = network().eval()
    image, other = images(1), images(1, seed=1)
    with torch.inference_mode():
        last = net.encoder[-1]
        hidden = []
        last.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        codes = torch.stack([net.encode(image), net.encode(other)])
        torch.testing.assert_close(codes[0] - codes[1], (hidden[0] - hidden[1]) @ last.weight.T)
        code = torch.randn(4, 3)
        first = net.decoder[0]
        torch.testing.assert_close(net.decode(code), decoded(net, first(code)))
    assert codes.min() < 0
    evidence.property("the code layer has no non-linearity on either side", "编码层两侧都没有非线性")


def decoded(net: Autoencoder, x: torch.Tensor) -> torch.Tensor:
    for layer in net.decoder[1:]:
        x = layer(x.sigmoid())
    return x.sigmoid().view(-1, *net.shape)


# --- Restricted Boltzmann machines


def test_free_energy_is_minus_log_of_the_sum_over_hidden_states(evidence):
    torch.manual_seed(0)
    weight, b, c, v = torch.randn(5, 4), torch.randn(4), torch.randn(5), torch.rand(3, 4)
    states = torch.tensor(list(product((0.0, 1.0), repeat=5)))
    energy = -(v @ b)[:, None] - states @ c - v @ weight.T @ states.T  # E(v, h) for all 32 h
    torch.testing.assert_close(free_energy(v, b, v @ weight.T + c, gaussian=False), -(-energy).logsumexp(1))
    # Gaussian hidden units: E(v, h) = h^2 / 2 - v b - h (c + W v), integrated on a grid; the constant sqrt(2 pi) is left out
    one = v @ weight[:1].T + c[:1]
    h = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    integral = torch.trapezoid((-(h**2) / 2 + one.double() * h).exp(), h) / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(free_energy(v, b, one, gaussian=True), (-(v @ b).double() - integral.log()).float())
    evidence.property(
        "free energy: minus the logarithm of the sum (code layer: integral) over all hidden states",
        "自由能：对全部隐状态求和（编码层为积分），取对数的负值",
    )


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gradient_is_contrastive_divergence(evidence, layer):
    net = network()
    for p in net.parameters():
        p.data.normal_(std=0.4)
    image = images()
    torch.manual_seed(7)
    net.divergence(image, layer).backward()
    up, down = net.encoder[layer], net.decoder[-1 - layer]
    with torch.no_grad():
        v0 = image.flatten(1)
        for below in net.encoder[:layer]:
            v0 = below(v0).sigmoid()
        torch.manual_seed(7)
        if layer == 2:
            h0 = up(v0)
            v1 = ((h0 + torch.randn_like(h0)) @ up.weight + down.bias).sigmoid()
            h1 = up(v1)
        else:
            h0 = up(v0).sigmoid()
            v1 = (torch.bernoulli(h0) @ up.weight + down.bias).sigmoid()
            h1 = up(v1).sigmoid()
        n = len(v0)
        torch.testing.assert_close(up.weight.grad, -(h0.T @ v0 - h1.T @ v1) / n)
        torch.testing.assert_close(up.bias.grad, -(h0 - h1).mean(0))
        torch.testing.assert_close(down.bias.grad, -(v0 - v1).mean(0))
    own = {id(up.weight), id(up.bias), id(down.bias)}
    assert all((p.grad is not None) == (id(p) in own) for p in net.parameters())
    evidence.property(
        f"layer {layer + 1}: the gradient is <v h> of the reconstruction less that of the data, and no other layer learns",
        f"第 {layer + 1} 层：梯度等于重建的 <v h> 减去数据的 <v h>，其他层不学习",
    )


def test_layers_take_turns_and_are_unrolled(evidence):
    net = network(replace(SMALL, pretrain=2)).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    image = images()
    learnt = []
    for _ in range(7):
        output = net(image)
        terms = cross_entropy(output, {"image": image})
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        learnt.append([p.grad is not None for p in net.encoder.parameters()][::2])
        pretraining = "divergence" in output
        assert torch.equal(terms["loss"], output["divergence"] if pretraining else terms["cross_entropy"])
        if not pretraining:
            for up, down in zip(net.encoder, reversed(net.decoder)):
                torch.testing.assert_close(down.weight, up.weight.T, rtol=0, atol=0)  # as fine-tuning begins
            assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    alone = [[i == layer for i in range(3)] for layer in (0, 0, 1, 1, 2, 2)]
    assert learnt == [*alone, [True] * 3]
    net(image)
    assert not torch.equal(net.decoder[0].weight, net.encoder[-1].weight.T), "fine-tuning unties the weights"
    evidence.property(
        "layers are pre-trained one after another; the decoder starts as their transposes and is then free",
        "各层依次预训练；解码器以编码器各层的转置开始，之后各自更新",
    )


def test_pretraining_starts_fine_tuning_lower(evidence):
    """On patterns of four bits of chance; averaged over three seeds, after the same number of steps of fine-tuning."""
    rows = torch.tensor(list(product((0.0, 1.0), repeat=4)))
    image = rows.repeat_interleave(16, 1).view(16, 1, 8, 8)
    losses = {0: [], 60: []}
    for pretrain, seed in product(losses, range(3)):
        net = network(Config(widths=(24, 16), code=4, pretrain=pretrain), seed=seed).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(3 * pretrain + 10):
            optimizer.zero_grad()
            terms = cross_entropy(net(image), {"image": image})
            terms["loss"].backward()
            optimizer.step()
        losses[pretrain].append(terms["cross_entropy"].item())
    assert np.mean(losses[60]) < 0.8 * np.mean(losses[0])
    evidence.property(
        "after ten steps of fine-tuning a pre-trained stack is ahead of one from random weights",
        "微调十步之后，预训练过的网络优于从随机权重出发的网络",
    )


# --- PCA


def test_linear_autoencoder_spans_the_principal_subspace(evidence):
    """No hidden layer, linear output, squared error, centred data: the same error and the same plane as PCA."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(200, 16)) * np.linspace(3, 0.5, 16) @ np.linalg.qr(rng.normal(size=(16, 16)))[0]
    data -= data.mean(0)
    x = torch.from_numpy(data).float().view(-1, 1, 4, 4)
    net = network(Config(widths=(), code=3), side=4)
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-8, tolerance_change=1e-12
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (net.logits(net.encode(x)) - x).square().flatten(1).sum(1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    values, directions = np.linalg.svd(data, full_matrices=False)[1:]
    angle = float(subspace_angles(net.decoder[0].weight.detach().numpy(), directions[:3].T).max())
    assert angle < 1e-2
    assert closure().item() == pytest.approx((values[3:] ** 2).sum() / len(data), rel=1e-4)
    evidence.property(
        "without hidden layers and with squared error it is PCA: equal subspace and equal error",
        "没有隐层、用平方误差时就是 PCA：子空间相同，误差相同",
    )


def test_loss_is_summed_over_pixels():
    image, logits = images(2), torch.randn(2, 1, 8, 8)
    y = logits.sigmoid()
    by_hand = -(image * y.log() + (1 - image) * (1 - y).log()).sum() / 2
    torch.testing.assert_close(cross_entropy({"logits": logits}, {"image": image})["loss"], by_hand)
    torch.testing.assert_close(by_hand, F.binary_cross_entropy(y, image, reduction="sum") / 2)
