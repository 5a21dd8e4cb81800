"""ASTER against numbers of the port, scipy's spline, and its parts by hand."""

from __future__ import annotations

import itertools
import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.papers.reading.aster.aster import (
    VARIANTS,
    Decoder,
    Encoder,
    Rectifier,
    Unit,
    build,
    edge_points,
    kernel,
    loss,
    recipe,
    spline_basis,
    turned,
)
from paperworks.papers.reading.aster.weights import SOURCES
from paperworks.tasks.reading import TextReading, encoded

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "aster.json").read_text())
SPEC = TextReading.plain_spec(3, 94)
LITTLE = replace(VARIANTS["test"], units="original")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.flatten() - expected.flatten()).norm() / expected.norm())


# --- Against the port


@pytest.fixture(scope="module")
def record():
    return runpy.run_path(str(FIXTURES / "aster_record.py"))


@pytest.fixture(scope="module")
def ported(record):
    """Ours with the port's weights, which follow from their names."""
    two_lines = torch.from_numpy(edge_points(20, 0.01)).flatten().float()
    state = {}
    for name, shape in FIXTURE["shapes"].items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("stn_fc2.bias"):
            state[name] = two_lines + 0.03 * record["draw"](name, tuple(shape))
        else:
            state[name] = record["draw"](name, tuple(shape))
    net = build(SPEC, VARIANTS["port"])
    net.load_state_dict(SOURCES["aster.pytorch"](state, VARIANTS["port"]))
    return net.eval()


@pytest.fixture(scope="module")
def image(record):
    return F.interpolate(record["draw"]("image", (2, 3, 8, 32)), record["INPUT"][2:], mode="bilinear", align_corners=True)


def test_parameters_are_those_of_the_port():
    with torch.device("meta"):
        net = build(SPEC, VARIANTS["port"])
    parts = {"rectifier": net.rectifier, "encoder": net.encoder, "decoder": net.decoders}
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()} == FIXTURE["parameters"]
    assert FIXTURE["parameters"] == {"rectifier": 1_854_760, "encoder": 16_148_704, "decoder": 2_988_130}


def test_outputs_equal_the_ports(ported, image, record, evidence):
    points = ported.rectifier.locate(image)
    straight, _ = ported.rectifier(image)
    features = ported.encoder(straight)
    logits = ported.decoders[0](features, torch.tensor(record["TARGET"]))
    found = {
        "points": points,
        "straight": straight[:, :, ::5, ::7],
        "features": features[:, ::4, ::16],
        "logits": logits[:, :, ::4],
    }
    errors = {key: relative(value, torch.tensor(FIXTURE[key])) for key, value in found.items()}
    assert max(errors.values()) < TOLERANCE, errors
    evidence.fidelity(against=f"ayumiymk/aster.pytorch {FIXTURE['commit'][:7]}", error=max(errors.values()))
    two_lines = torch.from_numpy(edge_points(20, 0.01)).float()
    assert relative(points, two_lines.expand(2, -1, -1)) > 0.01, "the points of the fixture would not tell a wrong localisation"


def test_a_perturbed_weight_is_seen(ported, image, record):
    weight = ported.encoder.stages[2][0].shortcut[0].weight
    weight[3, 5] *= 1.5
    logits = ported(image, torch.tensor(record["TARGET"]))["logits"][:, :, ::4]
    weight[3, 5] /= 1.5
    assert relative(logits, torch.tensor(FIXTURE["logits"])) > TOLERANCE


def test_a_beam_of_one_is_the_ports_greedy_decoding(ported, image, record):
    steps = record["STEPS"]
    characters, likelihoods = ported.decoders[0].search(ported.encoder(ported.rectifier(image)[0]), steps, 1)
    assert characters.tolist() == FIXTURE["greedy"]
    assert relative(likelihoods.exp(), torch.tensor(FIXTURE["sure"])) < TOLERANCE


# --- Rectification


def test_spline_equals_scipys(evidence):
    rng = np.random.default_rng(0)
    targets, places = edge_points(20, 0.05), rng.uniform(0, 1, (300, 2))
    sources = targets + rng.normal(0, 0.1, targets.shape)
    expected = RBFInterpolator(targets, sources, kernel="thin_plate_spline", degree=1)(places)
    found = spline_basis(targets, places) @ sources
    error = relative(torch.from_numpy(found), torch.from_numpy(expected))
    assert error < 1e-8
    evidence.fidelity(against="scipy RBFInterpolator thin_plate_spline", error=error)
    halved = spline_basis(targets, places) @ (sources + rng.normal(0, 0.01, targets.shape))
    assert relative(torch.from_numpy(halved), torch.from_numpy(expected)) > TOLERANCE


def test_kernel_is_zero_where_points_meet():
    points = np.array([[0.1, 0.2], [0.7, 0.2]])
    expected = 0.5 * 0.36 * np.log(0.36)
    assert kernel(points, points) == pytest.approx(np.array([[0, expected], [expected, 0]]))


def test_an_affine_move_of_the_points_is_an_affine_warp(evidence):
    """The spline bends only where the points do: translation, scale and slant of all of them give no curvature."""
    targets, places = edge_points(20, 0.05), np.random.default_rng(1).uniform(0, 1, (50, 2))
    matrix, shift = np.array([[0.8, 0.1], [-0.2, 0.6]]), np.array([0.05, 0.2])
    assert spline_basis(targets, places) @ (targets @ matrix.T + shift) == pytest.approx(places @ matrix.T + shift, abs=1e-9)
    evidence.property("control points that move affinely give an affine warp", "控制点做仿射移动，得到仿射变形")


def test_rectifier_starts_with_two_lines_and_a_bent_word_comes_out_straight(evidence):
    config = replace(VARIANTS["small"], size=(40, 120), straight=(24, 72), margin=0.05)
    rectifier = Rectifier(1, config).eval()
    picture = torch.rand(2, 1, 40, 120)
    assert torch.equal(rectifier.locate(picture), rectifier.fc2.bias.view(1, -1, 2).expand(2, -1, -1)), "weights are zero at the start"
    x, y = torch.linspace(0, 1, 120), torch.linspace(0, 1, 40)[:, None]
    upper = 0.1 + 0.4 * (2 * x - 1) ** 2  # an arc, letters from it to 0.4 below
    across = (y - upper) / 0.4
    bent = torch.where((across >= 0) & (across <= 1), across, 0.5)[None, None]  # how far down within the letters
    at = torch.from_numpy(edge_points(20, 0.05)[:10, 0])
    arc = 0.1 + 0.4 * (2 * at - 1) ** 2
    edges = torch.stack([at.repeat(2), torch.cat([arc + 0.05 * 0.4, arc + 0.95 * 0.4])], 1)
    rectifier.fc2.bias.copy_(edges.flatten().float())
    straight, points = rectifier(bent)
    assert points[0].flatten().tolist() == pytest.approx(edges.flatten().tolist(), abs=1e-6)
    expected = torch.linspace(0, 1, 24)[:, None].expand(24, 72)
    assert float((straight[0, 0] - expected)[3:-3, 5:-5].abs().mean()) < 0.05  # the spline is not the arc's exact inverse between the edges
    assert float((F.interpolate(bent, (24, 72)) - expected)[0, 0, 3:-3, 5:-5].abs().mean()) > 0.15
    evidence.property(
        "points on the edges of a bent word make it straight; at the start they lie on two lines for every picture",
        "控制点落在弯曲文字的边缘上就能把它拉直；起初对任何图像都在两条直线上",
    )


def test_gradients_of_reading_reach_the_points():
    with torch.enable_grad():
        net = build(TextReading.plain_spec(1, 3), VARIANTS["test"])
        batch = TextReading.plain_batch(net, TextReading.plain_spec(1, 3))
        loss(net(batch["image"], batch["target"]), batch)["loss"].backward()
        assert net.rectifier.fc2.bias.grad.abs().min() > 0


# --- Encoder


def test_units_are_those_of_each_code():
    x = torch.rand(1, 8, 8, 12)
    for units, side in (("port", 1), ("original", 3)):
        first, later = Unit(8, 12, (2, 1), units).eval(), Unit(12, 12, None, units)
        assert first.conv1.kernel_size == first.shortcut[0].kernel_size == (side, side) and later.conv1.kernel_size == (1, 1)
        assert first(x).shape == (1, 12, 4, 12)
        shortcut = first.shortcut(x)
        assert (shortcut.min() >= 0) == (units == "original"), "only the original's shortcut has a ReLU"


@pytest.mark.parametrize("name", ["port", "original"])
def test_encoder_leaves_one_row(name):
    with torch.device("meta"):
        encoder = Encoder(3, VARIANTS[name])
        assert encoder(torch.zeros(1, 3, 32, 100)).shape == (1, 25, 512 if name == "port" else 256)
        assert sum(isinstance(m, Unit) for m in encoder.modules()) == 22  # 2 x 22 convolutions and the stem: 45 layers


# --- Decoder


def little(units: str, characters: int = 4) -> tuple[Decoder, Tensor]:
    torch.manual_seed(1)
    config = replace(VARIANTS["test"], units=units)
    decoder = Decoder(6, characters, config).eval()
    for weight in decoder.parameters():
        nn.init.normal_(weight, std=1.0)
    return decoder, torch.randn(3, 5, 6)


@pytest.mark.parametrize("units", ["port", "original"])
def test_attention_by_hand(units):
    """Equations 6 to 9 with loops, and the cell of torch."""
    decoder, features = little(units)
    state, previous = decoder.begin(features)
    logits, after = decoder.step(features, decoder.key(features), state + 0.3, previous)
    for b in range(3):
        s = torch.full((decoder.state,), 0.3)
        energy = [decoder.score(torch.tanh(decoder.query(s) + decoder.key(h))) for h in features[b]]
        alpha = torch.stack(energy).flatten().exp() / torch.stack(energy).exp().sum()
        glimpse = sum(a * h for a, h in zip(alpha, features[b]))
        symbol = torch.eye(decoder.outputs)[decoder.start] if units == "original" else decoder.embedding.weight[-1]
        given = torch.cat([symbol, glimpse])[None]
        memory = decoder.cell(given, (s[None], s[None]) if units == "original" else s[None])
        output = memory[0] if units == "original" else memory
        assert torch.allclose(after[b, : decoder.state], output[0], atol=1e-5)
        assert torch.allclose(logits[b], decoder.output(output)[0], atol=1e-4)


def test_beam_search_finds_the_most_probable_text(evidence):
    """A beam as wide as there are texts is exhaustive; a narrow one is never better, and greedy decoding is not always as good."""
    decoder, features = little("original", characters=2)
    steps, symbols = 3, range(decoder.outputs)
    texts = {
        tuple((*t[: t.index(2) + 1], *(2,) * (steps - t.index(2) - 1)) if 2 in t else t) for t in itertools.product(symbols, repeat=steps)
    }
    every = torch.tensor(sorted(texts))
    scores = []
    for b in range(3):
        logits = decoder(features[b : b + 1].expand(len(every), -1, -1), every).log_softmax(2)
        each = logits.gather(2, every[..., None])[..., 0]
        after_end = torch.cat([torch.zeros(len(every), 1, dtype=torch.bool), (every == 2).cumsum(1)[:, :-1] > 0], 1)
        scores.append(each.masked_fill(after_end, 0).sum(1))
    best = torch.stack(scores).max(1)
    characters, likelihoods = decoder.search(features, steps, len(every))
    assert torch.equal(characters, every[best.indices])
    assert torch.allclose(likelihoods.sum(1), best.values, atol=1e-4)
    totals = [decoder.search(features, steps, beam)[1].sum(1) for beam in (1, 3)]
    assert (torch.stack(totals) <= best.values + 1e-4).all()
    evidence.property(
        "beam search as wide as the set of texts finds the most probable one, found by brute force",
        "束宽等于全部文本的个数时，束搜索找到概率最大的文本，与穷举一致",
    )


def test_likelihoods_are_those_of_the_text_said():
    decoder, features = little("port")
    characters, likelihoods = decoder.search(features, 6, 3)
    logits = decoder(features, characters).log_softmax(2).gather(2, characters[..., None])[..., 0]
    ended = torch.cat([torch.zeros(3, 1, dtype=torch.bool), (characters == 4).cumsum(1)[:, :-1] > 0], 1)
    assert torch.allclose(likelihoods, logits.masked_fill(ended, 0), atol=1e-4)


def test_backward_reader_is_taught_and_heard_in_reverse(evidence):
    target = torch.tensor([[0, 1, 2, 4, -1, -1], [3, 4, -1, -1, -1, -1], [2, 1, 0, 1, 3, 4]])
    back = target.gather(1, turned(target, 4))
    assert back.tolist() == [[2, 1, 0, 4, -1, -1], [3, 4, -1, -1, -1, -1], [3, 1, 0, 1, 2, 4]]
    unended = torch.tensor([[1, 2, 3]])
    assert unended.gather(1, turned(unended, 4)).tolist() == [[3, 2, 1]]
    net = build(TextReading.plain_spec(1, 3), LITTLE).eval()
    features = torch.randn(8, 4, net.encoder.width)
    both = net.read(features)
    each = [decoder.search(features, net.steps, net.beam) for decoder in net.decoders]
    for b in range(8):
        forward, backward = ((c[b], p[b]) for c, p in each)
        if float(forward[1].sum()) >= float(backward[1].sum()):
            assert torch.equal(both["characters"][b], forward[0])
        else:
            said = [c for c in backward[0].tolist() if c != 3]
            assert [c for c in both["characters"][b].tolist() if c != 3] == said[::-1]
    evidence.property(
        "the second decoder reads from right to left, and the likelier of both texts is taken",
        "第二个解码器从右往左读，取两个结果中似然更高的",
    )


def test_loss_is_the_mean_of_both_directions():
    net = build(TextReading.plain_spec(1, 3), LITTLE).eval()
    batch = TextReading.plain_batch(net, TextReading.plain_spec(1, 3), batch=3)
    output = net(batch["image"], batch["target"])
    terms = loss(output, batch)
    by_hand = []
    for b, text in enumerate(batch["text"]):
        for key, word in (("logits", text), ("backward", text[::-1])):
            truth = encoded(word, "012")
            by_hand.append(-sum(output[key][b, t].log_softmax(0)[c] for t, c in enumerate(truth)))
    assert float(terms["loss"]) == pytest.approx(float(sum(by_hand)) / 2 / 3, rel=1e-5)
    assert float(terms["loss"]) == pytest.approx((float(terms["forward"]) + float(terms["backward"])) / 2, rel=1e-6)


def test_original_starts_with_open_forget_gates_and_orthogonal_states():
    decoder = Decoder(6, 4, LITTLE)
    size = decoder.state
    assert decoder.cell.bias_ih.view(4, size).sum(1).tolist() == [0, size, 0, 0] and not decoder.cell.bias_hh.any()
    gate = decoder.cell.weight_hh
    assert torch.allclose(gate.T @ gate, torch.eye(size), atol=1e-5)


def test_recipes():
    paper = recipe(VARIANTS["original"])
    assert (paper.optimizer, paper.lr, paper.schedule, paper.decay_at) == ("adadelta", 1.0, "step", (1 / 2, 2 / 3, 5 / 6))
    assert paper.augment.arc == 0 and recipe(VARIANTS["small"]).optimizer == "adam"
