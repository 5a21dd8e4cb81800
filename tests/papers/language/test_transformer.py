"""The Transformer against torch's own, with the weights copied, and its mechanisms one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.bpe import BEGIN, END, PAD
from paperworks.papers.language.transformer.transformer import PAPER, VARIANTS, Config, PositionalEncoding, Transformer, attention, build
from paperworks.tasks.translation import Translation, beam_search, greedy
from paperworks.train.engine import schedule
from peers import relative

CONFIG = Config(layers=2, d_model=48, d_ff=96, heads=4, dropout=0.1)


@torch.no_grad()
def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with norms and biases that show when they are forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if "norm" in name or name.endswith("bias"):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return network.eval()


def ours(config: Config = CONFIG, symbols: int = 30, size: tuple[int, int] = (12, 9)) -> Transformer:
    torch.manual_seed(0)
    return shaken(Transformer(config, symbols, size))  # pyright: ignore[reportReturnType]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Sources of two lengths and what is written."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(4, 30, (3, 12), generator=generator)
    source[:, -1] = END
    source[1, 7], source[1, 8:] = END, PAD
    target_in = torch.randint(4, 30, (3, 9), generator=generator)
    target_in[:, 0] = BEGIN
    return source, target_in


# Against torch


@torch.no_grad()
def peer_of(network: Transformer, config: Config) -> nn.Transformer:
    """torch.nn.Transformer with our weights. It has a norm behind either stack and biases in attention, which the paper has not."""
    d, h, ff = config.d_model, config.heads, config.d_ff
    kinds = {
        "d_model": d,
        "nhead": h,
        "dim_feedforward": ff,
        "dropout": 0.1,
        "batch_first": True,
        "norm_first": False,
        "layer_norm_eps": 1e-6,
    }
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**kinds), config.layers, norm=None, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**kinds), config.layers, norm=None)
    peer = nn.Transformer(d, h, batch_first=True, custom_encoder=encoder, custom_decoder=decoder).eval()

    def copy_attention(theirs: nn.MultiheadAttention, mine: nn.Module) -> None:
        theirs.in_proj_weight.copy_(torch.cat([mine.query.weight, mine.key.weight, mine.value.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(mine.output.weight)
        theirs.out_proj.bias.zero_()

    for stack, layers in ((encoder, network.encoder), (decoder, network.decoder)):
        for theirs, mine in zip(stack.layers, layers, strict=True):
            copy_attention(theirs.self_attn, mine.self_attention)
            if stack is decoder:
                copy_attention(theirs.multihead_attn, mine.cross_attention)
            theirs.linear1.load_state_dict(mine.feed_forward.inner.state_dict())
            theirs.linear2.load_state_dict(mine.feed_forward.outer.state_dict())
            for i, part in enumerate(mine.add_norms, start=1):
                getattr(theirs, f"norm{i}").load_state_dict(part.norm.state_dict())
    return peer


def run_peer(peer: nn.Transformer, network: Transformer, source: Tensor, target_in: Tensor) -> Tensor:
    d = network.embedding.embedding_dim

    def embed(symbols: Tensor) -> Tensor:
        """Section 3.5 in another spelling: a loop over dimensions."""
        x = network.embedding.weight[symbols] * d**0.5
        for i in range(d):
            angle = torch.arange(symbols.shape[1]) / 10_000 ** (2 * (i // 2) / d)
            x[..., i] += angle.sin() if i % 2 == 0 else angle.cos()
        return x

    causal = nn.Transformer.generate_square_subsequent_mask(target_in.shape[1])
    padding = torch.zeros(source.shape).masked_fill(source == PAD, -torch.inf)
    found = peer(embed(source), embed(target_in), tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    return found @ network.embedding.weight.T


@torch.no_grad()
def test_equals_torch(batch, evidence):
    source, target_in = batch
    network = ours()
    peer = peer_of(network, CONFIG)
    expected = run_peer(peer, network, source, target_in)
    error = relative(network(source, target_in)["logits"], expected)
    assert error < 1e-5
    evidence.fidelity(f"torch {torch.__version__.split('+')[0]} nn.Transformer without its two last norms", error)
    for name in ("encoder.0.self_attention.key.weight", "decoder.1.cross_attention.output.weight", "decoder.0.feed_forward.inner.bias"):
        weight = network.get_parameter(name)
        kept = weight.clone()
        weight.mul_(1.05)
        assert relative(network(source, target_in)["logits"], expected) > 1e-4, name
        weight.copy_(kept)


def test_attention_equals_torch(evidence):
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[..., 0] = True
    found, weights = attention(q, k, v, mask)
    error = relative(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert error < 1e-5 and torch.allclose(weights.sum(-1), torch.ones(2, 3, 5))
    assert not weights.masked_select(~mask.expand_as(weights)).any()
    evidence.fidelity("torch F.scaled_dot_product_attention", error)


def test_parameters(evidence):
    """The paper rounds to 65 and 213 millions."""
    for name, total, core, layers in (("base", 63_045_632, 44_140_544, 18), ("big", 214_171_648, 176_361_472, 18)):
        config = VARIANTS[name]
        with torch.device("meta"):
            network = build(Translation.plain_spec(1, 37_000), config)
            peer = nn.Transformer(config.d_model, config.heads, dim_feedforward=config.d_ff, batch_first=True)
        assert sum(p.numel() for p in network.parameters()) == total
        assert sum(p.numel() for p in peer.parameters()) == core
        # torch's own, less two norms and the four biases of eighteen attentions, and one matrix of embeddings
        assert core - 4 * config.d_model - layers * 4 * config.d_model + 37_000 * config.d_model == total
        assert abs(total / 1e6 - {"base": 65, "big": 213}[name]) < 2.5
    evidence.property(
        "63,045,632 (base) and 214,171,648 (big) parameters with 37,000 shared symbols and no biases in attention",
        "37,000 个共用符号、注意力不带偏置时，参数量为 63,045,632（base）与 214,171,648（big）",
    )


# Mechanisms


def test_scores_have_variance_one(evidence):
    """Footnote 4: products of d_k independent components have variance d_k, and a softmax of such scores has no gradient left."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(400, 512, generator=generator) for _ in range(2))
    raw = q @ k.T
    assert float(raw.var()) == pytest.approx(512, rel=0.05)

    def gradient(scores: Tensor) -> float:
        p = scores.softmax(-1)
        return float((p * (1 - p)).sum(-1).mean())  # the diagonal of the softmax's Jacobian

    scaled = raw / math.sqrt(512)
    assert float(scaled.var()) == pytest.approx(1, rel=0.05) and gradient(scaled) > 0.9 > 0.3 > gradient(raw)
    mask = torch.ones(1, 1, 400, 400, dtype=torch.bool)
    assert torch.allclose(attention(q[None, None], k[None, None], k[None, None], mask)[1][0, 0], scaled.softmax(-1), atol=1e-6)
    evidence.property(
        "scores are divided by the root of d_k: variance 1 and a living softmax at d_k = 512, where raw products saturate",
        "得分除以根号 d_k：d_k = 512 时方差为 1，softmax 仍有梯度，而不缩放的点积已饱和",
    )


@torch.no_grad()
def test_a_symbol_depends_on_those_before_it_only(batch, evidence):
    source, target_in = batch
    network = ours()
    before = network(source, target_in)["logits"]
    for t in (1, 4, 8):
        other = target_in.clone()
        other[:, t:] = (other[:, t:] - 3) % 26 + 4
        after = network(source, other)["logits"]
        assert torch.equal(before[:, :t], after[:, :t]) or relative(after[:, :t], before[:, :t]) < 1e-6
        assert relative(after[:, t], before[:, t]) > 1e-3
    evidence.property(
        "causal: logits at t do not depend on later symbols, and do on the one at t",
        "因果性：t 处的 logits 与之后的符号无关，与 t 处的符号有关",
    )


@torch.no_grad()
def test_order_comes_from_the_positional_encoding_alone(batch, evidence):
    source = batch[0][[0, 2]]
    network = ours()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    with_order = network.encode(source)[0]
    assert relative(network.encode(source[:, order])[0], with_order[:, order]) > 0.1
    network.position = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    network.embed = lambda symbols, start=0: network.embedding(symbols)  # type: ignore[method-assign]
    assert relative(network.encode(source[:, order])[0], network.encode(source)[0][:, order]) < 1e-5
    evidence.property(
        "without positional encoding the encoder is equivariant to any order of its input",
        "去掉位置编码后，编码器对输入的任何次序等变",
    )


@torch.no_grad()
def test_written_step_by_step_or_at_once(batch, evidence):
    source, target_in = batch
    network = ours()
    state, found = network.begin(source), []
    for symbol in target_in.T:
        logits, state = network.step(symbol, state)
        found.append(logits)
    assert relative(torch.stack(found, 1), network(source, target_in)["logits"]) < 1e-5
    written = greedy(network, source)
    again = network(source)["logits"]
    assert torch.equal(again.argmax(2)[:, :-1], written[:, 1:])
    evidence.property(
        "steps with kept keys and values give the logits of the whole sequence at once",
        "缓存 key 和 value 的逐步解码，与整个序列一次算出的 logits 相同",
    )


@torch.no_grad()
def test_padding_changes_nothing(batch):
    source, target_in = batch
    network = ours()
    alone = network(source[1:2, :8], target_in[1:2])
    together = network(source, target_in)
    assert relative(together["logits"][1], alone["logits"][0]) < 1e-5
    assert not together["attention"][1, :, 8:].any() and torch.allclose(together["attention"].sum(2), torch.ones(3, 9))
    for whole, short in zip(beam_search(network, source), beam_search(network, source[:, :12])):
        assert torch.equal(whole, short)


@torch.no_grad()
def test_the_norm_comes_after_the_sum(batch, evidence):
    """Pre-norm, which most open code has, would leave a sum that grows from layer to layer, and a norm behind the stack."""
    torch.manual_seed(0)
    network = Transformer(CONFIG, 30, (12, 9)).eval()
    memory = network.encode(batch[0])[0]
    assert float(memory.mean(2).abs().max()) < 1e-5 and torch.allclose(memory.var(2, unbiased=False), torch.ones(3, 12), atol=1e-3)
    x = network.embed(batch[0])
    layer = network.encoder[0]
    mask = (batch[0] != PAD)[:, None, None]
    first = F.layer_norm(x + layer.self_attention(x, *layer.self_attention.remember(x), mask)[0], (48,), eps=1e-6)
    expected = F.layer_norm(first + layer.feed_forward(first), (48,), eps=1e-6)
    assert relative(layer(x, mask), expected) < 1e-6
    evidence.property(
        "post-norm: every layer's output is LayerNorm(x + Sublayer(x)), and no further norm follows the stacks",
        "post-norm：每层的输出为 LayerNorm(x + Sublayer(x))，堆叠之后不再有归一化",
    )


def test_sinusoids(evidence):
    encoding = PositionalEncoding(16)(torch.zeros(1, 50, 16))[0]
    for pos, i in ((0, 0), (3, 0), (17, 2), (49, 7)):
        assert float(encoding[pos, 2 * i]) == pytest.approx(math.sin(pos / 10_000 ** (2 * i / 16)), abs=1e-5)
        assert float(encoding[pos, 2 * i + 1]) == pytest.approx(math.cos(pos / 10_000 ** (2 * i / 16)), abs=1e-5)
    # section 3.5: for any offset PE(pos + k) is a linear function of PE(pos), the same everywhere
    linear = torch.linalg.lstsq(encoding[:40].double(), encoding[5:45].double()).solution
    assert relative(encoding[:45].double() @ linear, encoding[5:50].double()) < 1e-4
    assert torch.equal(PositionalEncoding(16)(torch.zeros(1, 5, 16), 45)[0], encoding[45:])
    evidence.property(
        "sinusoids are interleaved as in section 3.5, and an offset is one linear map everywhere",
        "正弦编码按 3.5 节交错排列，同一偏移在任何位置都是同一个线性变换",
    )


def test_one_matrix_times_the_root_of_its_width(evidence):
    torch.manual_seed(0)
    network = Transformer(Config(dropout=0.0, layers=1), 500, (8, 8)).eval()
    assert sum(p.shape[0] == 500 for p in network.parameters()) == 1
    symbols = torch.arange(500)[None]
    embedded = network.embed(symbols) - network.position(torch.zeros(1, 500, 512))
    assert torch.allclose(embedded[0], network.embedding.weight * 512**0.5, atol=1e-5)
    assert float(embedded.detach().var()) == pytest.approx(1, rel=0.02)
    evidence.property(
        "source, target and softmax share one matrix; embeddings are multiplied by the root of d_model",
        "源语言、目标语言与 softmax 共用一个矩阵；嵌入乘以根号 d_model",
    )


def test_dropout_is_where_section_5_4_puts_it():
    network = Transformer(Config(layers=2, d_model=16, d_ff=32, heads=2, dropout=0.1), 30, (8, 8))
    places = [name for name, part in network.named_modules() if isinstance(part, nn.Dropout)]
    assert len(places) == 1 + 2 * 2 + 2 * 3 and all(name == "dropout" or "add_norms" in name for name in places)


def test_label_smoothing(evidence):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[4, 3, PAD], [1, 4, 3]])
    found = PAPER.loss(VARIANTS["base"])({"logits": logits}, {"target": target})["loss"]
    log_p = logits.log_softmax(2)
    terms = [
        -sum((0.9 * (s == t) + 0.1 / 5) * float(log_p[b, i, s]) for s in range(5))
        for b, row in enumerate(target.tolist())
        for i, t in enumerate(row)
        if t != PAD
    ]
    assert float(found) == pytest.approx(sum(terms) / 5, rel=1e-5)
    evidence.property("label smoothing 0.1 on symbols that are no padding", "标签平滑 0.1，只作用于非填充的符号")


@pytest.mark.parametrize(("variant", "steps"), [("base", 100_000), ("big", 300_000)])
def test_learning_rate_of_equation_3(variant, steps, evidence):
    config = VARIANTS[variant]
    recipe = PAPER.recipe(config)
    for n in (1, 10, 3999, 4000, 4001, 40_000, steps):
        expected = config.d_model**-0.5 * min(n**-0.5, n * 4000**-1.5)
        assert recipe.lr * schedule(recipe, n - 1, steps) == pytest.approx(expected, rel=1e-6)
    assert (recipe.optimizer, recipe.momentum, recipe.beta2, recipe.eps, recipe.clip) == ("adam", 0.9, 0.98, 1e-9, None)
    evidence.property(
        f"{variant}: eq. 3 with 4,000 steps of warm-up over {steps:,} steps, Adam(0.9, 0.98, 1e-9)",
        f"{variant}：式 3，{steps:,} 步中预热 4,000 步，Adam(0.9, 0.98, 1e-9)",
    )
