"""CoPE against numbers of the official decoder, its positions by loops, and as a layer of other networks."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from paperworks.data.bpe import BEGIN, END, PAD, SPECIALS
from paperworks.errors import InputError
from paperworks.papers.backbones.convnext.convnext import PAPER as CONVNEXT
from paperworks.papers.backbones.vit.vit import MSA
from paperworks.papers.backbones.vit.vit import PAPER as VIT
from paperworks.papers.layers.cope import claim
from paperworks.papers.layers.cope.cope import VARIANTS, Config, Contextual, ContextualAttention, Decoder, interpolated, put, recipe
from paperworks.tasks.classification import Classification
from paperworks.tasks.translation import beam_search, beam_search_at_once, greedy
from peers import relative, scattered, trained

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "cope.json").read_text())
SETTINGS = {"cope": {}, "cope_values": {"gates": "values"}, "absolute": {"position": "absolute"}}
LITTLE = Config(layers=2, width=24, heads=3, dropout=0.0, positions=5)
RULES = (
    (r"^embed_toks\.", "embedding."),
    (r"^abs_pos_emb$", "positions"),
    (r"^core\.layers\.(\d)\.", r"layers.\1."),
    (r"\.attn\.attn\.pos_emb$", ".attention.positions"),
    (r"\.attn\.proj_out\.", ".attention.out."),
    (r"\.attn_norm\.", ".norm1."),
    (r"\.ff_norm\.", ".norm2."),
    (r"\.ff\.fc1\.", ".hidden."),
    (r"\.ff\.fc2\.", ".output."),
)
SPEC = Classification.plain_spec(size=(32, 32))


def official(name: str) -> Decoder:
    """The fixture's decoder with its weights."""
    draw = runpy.run_path(str(FIXTURES / "cope_record.py"))["draw"]
    state = {key: draw(key, tuple(shape)) for key, shape in FIXTURE["networks"][name]["shapes"].items()}
    for key in [k for k in state if ".proj_query." in k]:
        parts = [state.pop(key.replace("query", part)) for part in ("query", "key", "val")]
        state[key.replace("attn.proj_query", "attention.qkv")] = torch.cat(parts)
    ours = {reduce(lambda n, rule: re.sub(*rule, n), RULES, n): v[0] if n.endswith("pos_emb") else v for n, v in state.items()}
    net = Decoder(replace(LITTLE, **SETTINGS[name]), 13, (10, 4)).eval()
    net.load_state_dict(ours)
    return net


# --- The official code


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_equal_the_official_code(evidence, name):
    net, symbols = official(name), torch.tensor(FIXTURE["symbols"])
    theirs = torch.tensor(FIXTURE["networks"][name]["log_probabilities"]).view(2, 12, 13)

    def ours() -> torch.Tensor:
        logits, _, _ = net.read(symbols, torch.ones_like(symbols, dtype=torch.bool), net.nothing(symbols))
        return logits.log_softmax(-1)

    error = relative(ours(), theirs)
    assert error < TOLERANCE
    (net.positions.T if name == "absolute" else net.layers[0].attention.positions)[:, 1] += 0.05  # a perturbed weight is seen
    assert relative(ours(), theirs) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]} projects/cope, decoder with {name}", error=error)


def test_the_counting_decoders_are_as_large_as_officially():
    for name, parameters in FIXTURE["sizes"].items():
        net = Decoder(VARIANTS[name], 40, (500, 12))
        assert sum(p.numel() for p in net.parameters()) == parameters
    extra = Decoder(VARIANTS["counting"], 40, (500, 12)).layers[0].attention.positions
    assert tuple(extra.shape) == (64, 513)
    assert not extra.any()  # from zero


# --- Positions


@pytest.mark.parametrize("gates", ["keys", "values", "ones"])
def test_positions_and_weights_by_loops(evidence, gates):
    """p_ij = sum of g_ik for k from j to i; z between floor and ceil; softmax of both terms over the root of d."""
    layer = scattered(ContextualAttention(12, 2, 4, gates))
    x, n = torch.randn(1, 7, 12), 7
    q, k, v = layer.split(x)
    mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    weights = layer.weights(q, k, v, mask)
    places = layer.where(q, k, v, mask)
    whole = 0
    for a in range(2):
        for i in range(n):
            asked = v if gates == "values" else k
            g = [1.0 if gates == "ones" else torch.sigmoid(q[0, a, i] @ asked[0, a, j] / 6**0.5).item() for j in range(i + 1)]
            logits = []
            for j in range(i + 1):
                p = min(sum(g[j:]), 3)
                assert float(places[0, a, i, j].clamp(max=3)) == pytest.approx(p, abs=1e-5)
                low, high = int(p), min(int(p) + 1, 3)
                whole += p == low
                z = [float(q[0, a, i] @ layer.positions[:, m]) for m in (low, high)]
                logits.append((float(q[0, a, i] @ k[0, a, j]) + z[0] + (p - low) * (z[1] - z[0])) / 6**0.5)
            expected = torch.tensor(logits).softmax(0)
            torch.testing.assert_close(weights[0, a, i, : i + 1], expected, rtol=1e-3, atol=1e-5)
            assert not weights[0, a, i, i + 1 :].any()
    assert (whole == 2 * 28) == (gates == "ones")
    evidence.property(
        f"contextual positions, interpolation and weights by loops, gates from {gates}, clamped at the last",
        f"上下文位置、插值与权重和循环手算一致，门取自 {gates}，在最后一个位置截断",
    )


def test_open_gates_are_relative_positions(evidence):
    """With all gates open the logit of key j for query i depends on i - j alone; with gates of the context it does not."""
    net = scattered(Decoder(replace(LITTLE, position="relative", positions=20), 13, (10, 4)))
    assert net.layers[0].attention.gates == "ones"
    layer = net.layers[0].attention
    q = torch.randn(1, 3, 1, 8).expand(-1, -1, 9, -1)
    k, v = torch.randn(1, 3, 1, 8).expand(-1, -1, 9, -1), torch.randn(1, 3, 9, 8)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    places = layer.where(q, k, v, mask)
    offset = torch.arange(9)[:, None] - torch.arange(9)
    torch.testing.assert_close(places, (offset + 1).clamp(min=0).float().expand(1, 3, -1, -1))
    layer.gates = "values"
    assert not torch.allclose(layer.where(q, k, v, mask), places, atol=0.1)
    evidence.property("gates of one: p_ij = i - j + 1, relative position", "门全为一：p_ij = i - j + 1，即相对位置")


@torch.enable_grad()
def test_interpolation_and_its_gradient_learns(evidence):
    z = torch.randn(1, 1, 3, 6, requires_grad=True)
    p = torch.tensor([[[[0.0, 1.25, 2.0]] * 3]]).clone().requires_grad_()
    out = interpolated(z, p)
    torch.testing.assert_close(out[..., 1], 0.75 * z[..., 1] + 0.25 * z[..., 2])
    torch.testing.assert_close(out[..., ::2], z[..., [0, 2]])
    out[..., 1].sum().backward()
    torch.testing.assert_close(p.grad[..., 1], (z[..., 2] - z[..., 1]).detach())  # how gates learn
    assert not p.grad[..., ::2].any()
    far = interpolated(z, torch.full((1, 1, 3, 3), 9.5))
    torch.testing.assert_close(far, z[..., 5:].expand(-1, -1, -1, 3))
    evidence.property(
        "logits interpolated between whole positions; the gradient of a gate is the step between them; far places take the last",
        "logit 在整数位置之间插值；门的梯度是相邻两者之差；过远的位置取最后一个",
    )


def test_what_is_closed_counts_nothing(evidence):
    """Padding between source and target changes neither what is written nor where it is looked."""
    net = scattered(Decoder(LITTLE, 13, (10, 4)))
    source, target = torch.randint(len(SPECIALS), 13, (2, 5)), torch.randint(len(SPECIALS), 13, (2, 3))
    plain, padded = net(source, target), net(F.pad(source, (0, 4), value=PAD), target)
    torch.testing.assert_close(padded["logits"], plain["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded["attention"][:, :, :5], plain["attention"], rtol=1e-4, atol=1e-5)
    assert not padded["attention"][:, :, 5:].any()
    absolute = scattered(Decoder(replace(LITTLE, position="absolute"), 13, (10, 4)))
    torch.testing.assert_close(
        absolute(F.pad(source, (0, 4), value=PAD), target)["logits"], absolute(source, target)["logits"], rtol=1e-4, atol=1e-5
    )
    evidence.property(
        "padding is closed after the sigmoid: it has no position and no weight",
        "填充在 sigmoid 之后关掉：既不占位置，也没有权重",
    )


@pytest.mark.parametrize("position", ["cope", "relative", "absolute"])
def test_a_symbol_at_a_time_is_the_whole_at_once(position):
    net = scattered(Decoder(replace(LITTLE, position=position), 13, (10, 6)))
    source = torch.randint(len(SPECIALS), 13, (2, 7))
    source[1, 5:] = PAD
    written = greedy(net, source)
    assert written[:, 0].tolist() == [BEGIN] * 2
    whole, state = net(source, written)["logits"], net.begin(source)
    for t in range(written.shape[1]):
        logits, state = net.step(written[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=1e-4)
    for searched, again in zip(beam_search(net, source, 2), beam_search_at_once(net, source, net.longest, 2)):
        torch.testing.assert_close(searched[:, : again.shape[1]] if searched.ndim > 1 else searched, again, rtol=1e-4, atol=1e-4)


def test_a_token_does_not_see_what_follows():
    net = scattered(Decoder(LITTLE, 13, (10, 4)))
    source, target = torch.randint(len(SPECIALS), 13, (1, 6)), torch.randint(len(SPECIALS), 13, (1, 4))
    changed = target.clone()
    changed[:, 2] = (target[:, 2] - len(SPECIALS) + 1) % (13 - len(SPECIALS)) + len(SPECIALS)
    ours, theirs = net(source, target)["logits"], net(source, changed)["logits"]
    torch.testing.assert_close(ours[:, :2], theirs[:, :2])
    assert not torch.allclose(ours[:, 2:], theirs[:, 2:])


# --- Other networks, and the task of counting


@torch.enable_grad()
def test_in_a_vit_it_learns(evidence):
    host = VIT.build(SPEC, VIT.variants["test"])
    before = sum(p.numel() for p in host.parameters())
    net = put(host, Contextual(positions=40))
    places = [m for m in net.modules() if isinstance(m, ContextualAttention)]
    assert len(places) == 2
    assert not [m for m in net.modules() if isinstance(m, MSA)]
    assert sum(p.numel() for p in net.parameters()) == before + 2 * 8 * 40
    losses = trained(net)
    assert losses[-1] < losses[0]
    assert all(place.positions.grad is not None and place.positions.any() for place in places)
    evidence.property(
        "in a ViT: every attention replaced, positions learn from zero",
        "在 ViT 中：每个注意力都被替换，位置嵌入从零开始学习",
    )


def test_with_positions_of_zero_a_vit_stays_what_it_was(evidence):
    host = scattered(VIT.build(SPEC, VIT.variants["test"]))
    image = torch.randn(2, 3, 32, 32)
    expected = host(image)["logits"]
    torch.testing.assert_close(put(host, Contextual())(image)["logits"], expected, rtol=1e-4, atol=1e-5)
    evidence.property(
        "freshly put in, with embeddings of zero, CoPE changes nothing of a ViT's answer",
        "刚放入时嵌入为零，CoPE 不改变 ViT 的回答",
    )


def test_in_an_exported_vit():
    net = put(VIT.build(SPEC, VIT.variants["test"]), Contextual()).eval()
    exported = torch.export.export(net, (torch.zeros(2, 3, 32, 32),)).module()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(exported(image)["logits"], net(image)["logits"])


def test_what_does_not_fit():
    with pytest.raises(InputError, match="no place that fits"):
        put(CONVNEXT.build(SPEC, CONVNEXT.variants["test"]), Contextual())
    with pytest.raises(InputError, match="positions=1 leaves nothing to count"):
        put(VIT.build(SPEC, VIT.variants["test"]), Contextual(positions=1))
    with pytest.raises(InputError, match="a width of 10 is not divisible into 3 heads"):
        ContextualAttention(10, 3, 4)


def test_programs_print_what_they_count():
    source, answer = claim.draw(40, 30, (1.0, 7.0, 8.0), torch.Generator().manual_seed(0))
    for program, printed in zip(source.tolist(), answer.tolist()):
        assert program[0] == claim.SET
        assert program[-1] == END
        value = 0
        for statement in program[:-1]:
            value = 0 if statement == claim.SET else value + (statement == claim.INCREASE)
            assert value <= claim.MOST
        assert printed == claim.ANSWER + value


def test_arms_differ_in_positions_alone():
    nets = {arm: claim.network_of(arm) for arm in claim.ARMS}
    shapes = {arm: {n: p.shape for n, p in net.named_parameters() if not n.endswith("positions")} for arm, net in nets.items()}
    assert shapes["cope"] == shapes["relative"] == shapes["absolute"]
    assert nets["cope"].layers[0].attention.gates == "keys"


def test_recipe_is_the_counting_tasks():
    counting = recipe(VARIANTS["counting"])
    assert (counting.lr, counting.batch_size, counting.schedule) == (7e-5, 64, "constant")
