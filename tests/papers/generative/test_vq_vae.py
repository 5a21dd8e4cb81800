"""The VQ-VAE against MONAI's quantiser, a second spelling of the Sonnet notebook's layers, and sums over all maps of indices."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import monai
import pytest
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch.nn import functional as F

from paperworks.papers.generative.vq_vae.vq_vae import (
    VARIANTS,
    VQVAE,
    Config,
    MaskedConv,
    PixelCNN,
    Quantizer,
    objective,
    perplexity,
)
from peers import relative

TOLERANCE = 1e-4
SMALL = Config(width=12, residual=6, blocks=2, codes=20, code_width=5, prior_width=8, prior_blocks=2)


def network(config: Config = SMALL, channels: int = 1, side: int = 16, seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    net = VQVAE(channels, side, config)
    with torch.no_grad():
        net.quantizer.started.fill_(True)
    return net


def images(n: int = 4, channels: int = 1, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def quantizers(codes: int = 20, width: int = 5) -> tuple[Quantizer, EMAQuantizer]:
    """Ours and MONAI's in the same state, in the middle of a training."""
    torch.manual_seed(1)
    ours = Quantizer(replace(SMALL, codes=codes, code_width=width, codebook="ema"))
    peer = EMAQuantizer(2, codes, width, ddp_sync=False)
    count = torch.rand(codes) * 10 + 0.1
    total = torch.randn(codes, width) * count[:, None]
    ours.e.copy_(total / count[:, None])
    ours.count.copy_(count)
    ours.total.copy_(total)
    ours.started.fill_(True)
    peer.embedding.weight.data.copy_(ours.e)
    peer.ema_cluster_size.copy_(count)
    peer.ema_w.copy_(total)
    return ours, peer


# --- Layers


def test_parameter_count_of_the_notebook():
    with torch.device("meta"):
        net = VQVAE(3, 32, VARIANTS["sonnet"])
    assert sum(p.numel() for part in (net.encoder, net.decoder) for p in part.parameters()) == 662_723
    assert net.quantizer.e.numel() == 32_768


def test_layers_equal_a_second_spelling(evidence):
    """Encoder and decoder from the description of the notebook, written with nothing but functions of the weights in their order."""
    net, image = network(channels=3).eval(), images(channels=3)
    with torch.inference_mode():
        for p in net.parameters():
            p.normal_(std=0.2)

        def spelled() -> torch.Tensor:
            weights = iter([*net.encoder.parameters(), *net.decoder.parameters()])

            def conv(x: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
                return F.conv2d(x, next(weights), next(weights), stride, padding)

            def residuals(x: torch.Tensor) -> torch.Tensor:
                for _ in range(2):
                    x = x + conv(conv(x.clamp_min(0), padding=1).clamp_min(0))
                return x.clamp_min(0)

            z = conv(conv(image - 0.5, 2, 1).clamp_min(0), 2, 1).clamp_min(0)
            z = conv(residuals(conv(z, padding=1)))
            distance = (z[:, None] - net.quantizer.e[None, :, :, None, None]).square().sum(2)
            x = net.quantizer.e[distance.argmin(1)].permute(0, 3, 1, 2)
            x = residuals(conv(x, padding=1))
            x = F.conv_transpose2d(x, next(weights), next(weights), 2, 1).clamp_min(0)
            return F.conv_transpose2d(x, next(weights), next(weights), 2, 1) + 0.5

        error = relative(net(image)["mean"], spelled())
        assert error < TOLERANCE
        expected = spelled()
        net.decoder[1][0].conv3.weight *= 1.05
        assert relative(net(image)["mean"], expected) > TOLERANCE
    evidence.property(
        "encoder, nearest vector by brute force and decoder equal a second spelling of the Sonnet notebook's layers",
        "编码器、暴力查找的最近向量和解码器，与 Sonnet 笔记本各层的另一份写法一致",
    )


# --- Quantiser


def test_quantiser_equals_monai(evidence):
    """Indices, vectors, and codebooks after three steps of the moving averages."""
    ours, peer = quantizers()
    errors = []
    for seed in range(3):
        z = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(seed))
        z_q, e, index = ours.train()(z)
        theirs, commitment, peer_index = peer.train()(z)
        assert torch.equal(index, peer_index)
        errors += [relative(z_q, theirs), relative(0.25 * F.mse_loss(z, e), commitment), relative(ours.e, peer.embedding.weight)]
    assert max(errors) < TOLERANCE
    assert relative(ours.e, quantizers()[0].e) > 100 * TOLERANCE, "three steps moved nothing"
    ours.count[0] *= 1.1
    ours.follow(z, index)
    peer(z)
    assert relative(ours.e, peer.embedding.weight) > TOLERANCE
    evidence.fidelity(against=f"MONAI {monai.__version__} EMAQuantizer, indices, vectors, three steps of the codebook", error=max(errors))


def test_gradient_goes_straight_through(evidence):
    quantizer = Quantizer(SMALL)
    z = torch.randn(2, 5, 3, 3, requires_grad=True)
    z_q, e, _ = quantizer(z)
    torch.testing.assert_close(z_q, e)
    upstream = torch.randn_like(z_q)
    z_gradient, e_gradient = torch.autograd.grad(z_q, [z, quantizer.e], upstream, allow_unused=True)
    assert torch.equal(z_gradient, upstream)
    assert e_gradient is None, "the reconstruction must not move the codebook"
    evidence.property(
        "straight-through: the encoder gets the decoder's gradient unchanged, the codebook none of it",
        "直通：编码器原样得到解码器的梯度，码本一点也得不到",
    )


def test_moving_average_without_memory_is_a_step_of_k_means(evidence):
    quantizer = Quantizer(replace(SMALL, codebook="ema", decay=0.0, codes=4))
    quantizer.started.fill_(True)
    z = torch.randn(8, 5, 4, 4)
    quantizer.e.copy_(z[0].flatten(1).T[:4])
    flat = z.movedim(1, -1).reshape(-1, 5)
    index = torch.cdist(flat, quantizer.e).argmin(1)
    means = torch.stack([flat[index == k].mean(0) for k in range(4)])
    quantizer.train()(z)
    torch.testing.assert_close(quantizer.e.detach(), means, rtol=1e-4, atol=1e-4)
    evidence.property(
        "moving averages with gamma = 0: each vector becomes the mean of what chose it (k-means)",
        "gamma = 0 的滑动平均：每个向量成为选中它的输出的均值（k-means）",
    )


def test_vectors_that_nobody_chooses_stay(evidence):
    quantizer = Quantizer(replace(SMALL, codebook="ema", decay=0.9))
    quantizer.started.fill_(True)
    quantizer.e[0] = 100
    quantizer.total[0] = 100
    for seed in range(30):
        _, _, index = quantizer.train()(torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(seed)))
        assert (index > 0).all()
    torch.testing.assert_close(quantizer.e[0], torch.full((5,), 100.0), rtol=1e-2, atol=0)
    assert quantizer.count[0] < 0.05
    evidence.property("unused vectors keep their place under the moving averages", "滑动平均下，没用到的向量留在原处")


def test_codebook_starts_at_encoder_outputs_and_evaluation_moves_nothing():
    net, image = network(replace(SMALL, codebook="ema")), images()
    net.quantizer.started.fill_(False)
    before = net.quantizer.e.clone()
    with torch.no_grad():
        net.eval()(image)
        assert torch.equal(before, net.quantizer.e) and not net.quantizer.started
        flat = net.encode(image).movedim(1, -1).reshape(-1, 5)
        net.quantizer.start(net.encode(image))
    assert torch.cdist(net.quantizer.e, flat).min(1).values.max() < 1e-3
    assert net.quantizer.started


# --- Loss


@pytest.mark.parametrize("codebook", ["loss", "ema"])
def test_each_term_moves_what_it_should(evidence, codebook):
    config = replace(SMALL, codebook=codebook)
    net, image = network(config).eval(), images()
    output = net(image)
    terms = objective(config)(output, {"image": image})
    z, e = output["z_e"], output["e"]
    by_hand = (output["mean"] - image).square().mean() / image.var() + 0.25 * (z - e).square().mean()
    by_hand = by_hand + F.nll_loss(output["prior"].log_softmax(1), output["index"])
    if codebook == "loss":
        by_hand = by_hand + (z - e).square().mean()
    torch.testing.assert_close(terms["loss"], by_hand)
    gradient = dict(zip(names := [n for n, _ in net.named_parameters()], torch.autograd.grad(
        terms["loss"], list(net.parameters()) if codebook == "loss" else [p for p in net.parameters() if p.requires_grad], retain_graph=True
    ))) if codebook == "loss" else {}  # fmt: skip
    if codebook == "loss":
        assert set(gradient) == set(names)
        pull = torch.zeros_like(net.quantizer.e)
        difference = 2 * (e - z).detach().movedim(1, -1).reshape(-1, 5) / e.numel()
        pull.index_add_(0, output["index"].flatten(), difference)
        torch.testing.assert_close(gradient["quantizer.e"], pull)
        evidence.property(
            "the codebook's gradient is the pull to what chose it, and nothing else",
            "码本的梯度就是把它拉向选中它的输出，此外什么也没有",
        )
    parts = torch.autograd.grad(terms["prior_nats"], [net.encoder[0].weight], allow_unused=True)
    assert parts == (None,), "the prior must not move the encoder"
    evidence.property(
        f"the loss is eq. 3 and the prior's cross-entropy, which moves the prior only ({codebook})",
        f"损失是式 3 加先验的交叉熵，后者只动先验（{codebook}）",
    )


def test_perplexity():
    assert float(perplexity(torch.arange(16).view(1, 4, 4), 16)) == pytest.approx(16)
    assert float(perplexity(torch.zeros(1, 4, 4, dtype=torch.long), 16)) == pytest.approx(1)
    assert float(perplexity(torch.tensor([[[0, 0, 1, 1]]]), 16)) == pytest.approx(2)


# --- Prior


def test_prior_sees_only_what_was_drawn_before(evidence):
    torch.manual_seed(0)
    prior = PixelCNN(6, 8, 2)
    embedded = torch.randn(1, 8, 5, 5, requires_grad=True)
    logits = prior.last(prior.blocks(prior.first(embedded)))
    seen = torch.zeros(25, 25)
    for place, (y, x) in enumerate(product(range(5), repeat=2)):
        (gradient,) = torch.autograd.grad(logits[0, :, y, x].sum(), embedded, retain_graph=True)
        seen[place] = gradient[0].abs().sum(0).flatten()
    assert torch.equal(seen, seen.tril(-1)), "a position sees itself or what comes after it"
    assert (seen[12] > 0).sum() == 12, "the middle position sees all before it"
    evidence.property("PixelCNN: a position depends on the earlier ones and on nothing else", "PixelCNN：一个位置只依赖在它之前的位置")


def test_masks_are_a_and_b():
    assert MaskedConv(1, 1, 3, own=False).mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert MaskedConv(1, 1, 3, own=True).mask.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_prior_sums_to_one_and_samples_follow_it(evidence):
    """All 81 maps of 2x2 indices of three values."""
    torch.manual_seed(0)
    prior = PixelCNN(3, 8, 1).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.normal_(std=0.8)
    maps = torch.tensor(list(product(range(3), repeat=4))).view(-1, 2, 2)
    with torch.inference_mode():
        nats = F.cross_entropy(prior(maps), maps, reduction="none").sum((1, 2))
        p = (-nats).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-4)
        n = 6000
        drawn = prior.sample(n, 2, 2, torch.Generator().manual_seed(0))
    place = (drawn.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    counts = torch.bincount(place, minlength=81)
    spread = (p * n * (1 - p)).sqrt()
    assert ((counts - n * p).abs() / (spread + 1)).max() < 4
    assert p.max() > 5 * p.median()
    evidence.property(
        "the prior's probabilities of all maps sum to one, and samples have these frequencies",
        "先验给所有索引图的概率之和为一，样本以这些频率出现",
    )


def test_samples_are_images_and_follow_the_generator():
    net = network().eval()
    with torch.inference_mode():
        first, again, other = (net.sample(3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (3, 1, 16, 16) and first.min() >= 0 and first.max() <= 1


def test_decode_undoes_encode_up_to_the_codebook():
    net, image = network().eval(), images()
    with torch.inference_mode():
        torch.testing.assert_close(net.decode(net.encode(image)), net(image)["reconstruction"])
        torch.testing.assert_close(net.decode_index(net.index(image)), net(image)["reconstruction"])
