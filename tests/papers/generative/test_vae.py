"""The VAE against torch.distributions, MONAI's perceptron and numerical integration."""

from __future__ import annotations

from dataclasses import replace

import monai
import pytest
import torch
from monai.networks.nets import FullyConnectedNet
from torch import distributions as D

from paperworks.papers.generative.vae.vae import VAE, VARIANTS, Config, gaussian_log_density, kl_divergence, negative_bound
from peers import relative

TOLERANCE = 1e-4
SMALL = Config(width=24, latents=5)


def network(config: Config = SMALL, channels: int = 1, side: int = 8, seed: int = 0, scale: float = 0.3) -> VAE:
    """With weights that are far from their tiny first values."""
    torch.manual_seed(seed)
    net = VAE(channels, side, config)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=scale)
    return net


def images(n: int = 6, channels: int = 1, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_parameter_counts():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in VAE(1, 28, VARIANTS[name]).parameters()) for name in ("paper", "small")}
    assert counts == {"paper": 815_824, "small": 652_824}  # the second: the widths of PyTorch's own example


@pytest.mark.parametrize("decoder", ["bernoulli", "gaussian"])
def test_bound_equals_perceptrons_and_distributions(evidence, decoder):
    """Encoder and decoder as MONAI's perceptrons with the same weights, the bound by torch.distributions, z the same draws."""
    config = replace(SMALL, decoder=decoder, samples=3)
    net, image = network(config, channels=2).train(), images(channels=2)
    pixels, outputs = 128, 256 if decoder == "gaussian" else 128
    encoder, peer_decoder = FullyConnectedNet(pixels, 10, [24], act="tanh"), FullyConnectedNet(5, outputs, [24], act="tanh")
    with torch.no_grad():
        for ours, theirs in ((net.encoder, encoder), (net.decoder, peer_decoder)):
            heads = [getattr(ours, head) for head in ("mean", "log_variance", "logits") if hasattr(ours, head)]
            mine = [ours.hidden.weight, ours.hidden.bias, torch.cat([h.weight for h in heads]), torch.cat([h.bias for h in heads])]
            for value, p in zip(mine, theirs.parameters(), strict=True):
                p.copy_(value)

    def bound() -> torch.Tensor:
        torch.manual_seed(11)
        noise = torch.randn(6, 3, 5)
        mean, log_variance = encoder(image).chunk(2, 1)
        q = D.Independent(D.Normal(mean, (log_variance / 2).exp()), 1)
        p = D.Independent(D.Normal(torch.zeros(6, 5), 1.0), 1)
        total = D.kl_divergence(q, p)
        for i in range(3):
            out = peer_decoder(mean + (log_variance / 2).exp() * noise[:, i])
            if decoder == "bernoulli":
                px = D.Independent(D.Bernoulli(logits=out, validate_args=False), 1)
            else:
                m, s = out.chunk(2, 1)
                px = D.Independent(D.Normal(m.sigmoid(), (s / 2).exp()), 1)
            total = total - px.log_prob(image.flatten(1)) / 3
        return total.mean()

    def ours() -> torch.Tensor:
        torch.manual_seed(11)
        return negative_bound(config)(net(image), {"image": image})["loss"]

    error = relative(ours(), bound())
    assert error < TOLERANCE
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(f, [module.hidden.weight if hasattr(module, "hidden") else module[1][0].weight])])
                 for f, module in ((ours(), net.encoder), (bound(), encoder))]  # fmt: skip
    assert relative(*gradients) < TOLERANCE
    with torch.no_grad():
        net.decoder.hidden.weight[0] *= 1.1
    assert relative(ours(), bound()) > TOLERANCE
    evidence.fidelity(
        against=f"MONAI {monai.__version__} FullyConnectedNet and torch.distributions: the bound, {decoder} decoder", error=error
    )


def test_kl_in_closed_form_equals_sampling(evidence):
    torch.manual_seed(0)
    mean, log_variance = torch.randn(4, 3), torch.randn(4, 3)
    q, p = D.Normal(mean, (log_variance / 2).exp()), D.Normal(0.0, 1.0)
    exact = kl_divergence(mean, log_variance)
    torch.testing.assert_close(exact, D.kl_divergence(q, p).sum(1))
    z = q.sample(torch.Size([200_000]))
    sampled = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(0)
    torch.testing.assert_close(exact, sampled, rtol=0.02, atol=0.02)
    assert float(kl_divergence(torch.zeros(1, 3), torch.zeros(1, 3))) == 0
    evidence.property(
        "KL divergence in closed form: equals torch.distributions and an average over 200,000 draws",
        "KL 散度的闭式：与 torch.distributions 以及 200,000 次采样的平均一致",
    )


def test_estimators_agree_on_average_and_b_varies_less(evidence):
    net = network(scale=0.1).train()
    image = images(1).expand(20_000, 1, 8, 8)
    terms = {}
    for estimator in ("A", "B"):
        torch.manual_seed(0)
        out = net(image)
        kl = out["sampled_kl"] if estimator == "A" else kl_divergence(out["mean"], out["log_variance"])
        terms[estimator] = (kl - out["log_likelihood"]).detach()
    a, b = terms["A"], terms["B"]
    assert float((a - b).mean().abs()) < 4 * float((a - b).std()) / len(a) ** 0.5
    assert b.var() < a.var()
    evidence.property(
        "estimators A and B have one mean; B varies less (weights near their first values)",
        "估计量 A 与 B 期望相同；B 的方差更小（权重接近初值时）",
    )


def test_gradient_goes_through_the_sample(evidence):
    """d E[log p(x|z)] / d mu by the estimator equals the difference quotient of the expectation with the same noise."""
    net, image = network().train(), images(1).expand(64, 1, 8, 8)
    bias = net.encoder.mean.bias

    def expected() -> torch.Tensor:
        torch.manual_seed(3)
        return net(image)["log_likelihood"].mean()

    (gradient,) = torch.autograd.grad(expected(), bias)
    with torch.no_grad():
        step = 1e-2 * torch.ones_like(bias) * torch.tensor([1.0, -1, 1, -1, 1])
        bias += step
        up = expected()
        bias -= 2 * step
        down = expected()
    assert float(up - down) == pytest.approx(2 * float(gradient @ step), rel=1e-2)
    assert gradient.abs().min() > 1e-3
    evidence.property(
        "reparameterisation: the gradient of the encoder's mean is that of the expectation",
        "重参数化：对编码器均值的梯度就是期望的梯度",
    )


@pytest.mark.parametrize("decoder", ["bernoulli", "gaussian"])
def test_importance_weighted_estimate_reaches_the_likelihood(evidence, decoder):
    """With one latent the likelihood can be integrated on a grid."""
    net = network(Config(width=12, latents=1, decoder=decoder), side=4, scale=0.4).eval()
    image = images(3, side=4)
    with torch.inference_mode():
        for p in net.encoder.parameters():
            p *= 0.2  # q near the prior, which covers the posterior
        z = torch.linspace(-8, 8, 4001)[:, None]
        prior = D.Normal(0.0, 1.0).log_prob(z[:, 0])
        exact = []
        for x in image.flatten(1):
            out = net.decoder(z)
            exact.append((net.log_likelihood(x.expand(4001, -1), *out) + prior).logsumexp(0) + torch.log(z[1, 0] - z[0, 0]))
        exact = torch.stack(exact)
        generator = torch.Generator().manual_seed(0)
        found = net.importance_weighted(image, 4000, generator)
        bound = torch.stack([net.importance_weighted(image, 1, generator) for _ in range(500)]).mean(0)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)
    assert (bound < exact).all()
    evidence.property(
        f"the importance-weighted estimate reaches log p(x), the bound stays below it ({decoder} decoder)",
        f"重要性加权估计达到 log p(x)，下界低于它（{decoder} 解码器）",
    )


def test_wake_teaches_the_decoder_and_sleep_the_encoder(evidence):
    config = replace(SMALL, estimator="wake_sleep")
    net, image = network(config).train(), images()
    output = net(image)
    encoder, decoder = list(net.encoder.parameters()), list(net.decoder.parameters())
    wake = torch.autograd.grad(output["log_likelihood"].sum(), encoder + decoder, retain_graph=True, allow_unused=True)
    sleep = torch.autograd.grad(output["sleep"].sum(), encoder + decoder, retain_graph=True, allow_unused=True)
    assert all(g is None for g in wake[: len(encoder)]) and all(g is not None for g in wake[len(encoder) :])
    assert all(g is not None for g in sleep[: len(encoder)]) and all(g is None for g in sleep[len(encoder) :])
    terms = negative_bound(config)(output, {"image": image})
    torch.testing.assert_close(terms["loss"], -(output["log_likelihood"] + output["sleep"]).mean())
    evidence.property(
        "wake-sleep: the wake phase moves the decoder only, the sleep phase the encoder only",
        "wake-sleep：醒时只更新解码器，睡时只更新编码器",
    )


def test_reconstruction_is_of_the_mean_and_training_of_a_sample():
    net, image = network(), images()
    with torch.inference_mode():
        out = net.eval()(image)
        assert torch.equal(out["reconstruction"], net.decode(net.encode(image)))
        net.train()
        assert not torch.equal(net(image)["reconstruction"], net(image)["reconstruction"])


def test_samples_follow_the_generator():
    net = network().eval()
    with torch.inference_mode():
        first, again, other = (net.sample(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (5, 1, 8, 8) and first.min() >= 0 and first.max() <= 1


def test_log_density_is_the_gaussian():
    torch.manual_seed(0)
    x, mean, log_variance = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(gaussian_log_density(x, mean, log_variance), D.Normal(mean, (log_variance / 2).exp()).log_prob(x).sum(1))
