"""Bottom-up and top-down attention: counts, the published step, the mechanisms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from paperworks.papers.language.bottom_up_top_down.bottom_up_top_down import (
    NEVER,
    PAPER,
    VARIANTS,
    Config,
    GatedTanh,
    QuestionAnswering,
    TopDown,
    UpDown,
    loss,
)
from paperworks.tasks.captions import END, UNKNOWN, Captions
from peers import relative

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "bottom_up_top_down.json").read_text())
TEST: Config = VARIANTS["test"]


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(zlib.crc32(name.encode()) % 1000 + 0.7 * index**2).view(shape)


def top_down(words: int = 9, features: int = 6, seed: int = 0) -> TopDown:
    torch.manual_seed(seed)
    return TopDown(features, words, dataclasses.replace(TEST, std=0.6)).eval()


def noise(net: TopDown, batch: int = 2, regions: int = 5, real: tuple[int, ...] = (5, 3)):
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(batch, regions, net.w_va.in_features, generator=generator)
    mask = torch.arange(regions) < torch.tensor(real)[:, None]
    return v, mask, net.regions(v, mask)


# --- Sizes


def test_parameters_of_the_released_captioner(evidence):
    with torch.device("meta"):
        net = TopDown(2048, 10_010, Config())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert counts == {
        "w_e": 10_010_000, "attention_lstm": 20_196_000, "w_va": 1_048_576, "w_ha": 512_000, "w_a": 512, "language_lstm": 16_196_000,
        "w_p": 10_020_010,
    }  # fmt: skip
    assert sum(counts.values()) == 57_983_098
    evidence.property(
        "57,983,098 weights for 10,010 words, part by part as in the released prototxt",
        "10,010 个词时共 57,983,098 个权重，各部分与公开的 prototxt 一致",
    )


def test_parameters_of_the_detector():
    """Against torchvision's ResNet-101 and the sizes in the released prototxt: 12 anchors, 1601 classes, embedding 256, fc_attr 512, 401 attributes."""
    from torchvision.models import resnet101

    spec = Captions.plain_spec(3, 1600)
    spec = dataclasses.replace(spec, more={**spec.more, "attributes": tuple(map(str, range(400)))})
    with torch.device("meta"):
        detector = UpDown(spec, Config()).detector
        trunk = resnet101(num_classes=1)

    def count(*parts: torch.nn.Module) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    assert count(detector.stages, detector.last) == count(trunk) - count(trunk.fc)
    assert count(detector.rpn) == (1024 * 9 + 1) * 1024 + 1025 * 12 * 6
    assert count(detector.cls) == 2049 * 1601 and count(detector.reg) == 2049 * 6404
    assert count(detector.class_embedding) == 1601 * 256 and count(detector.fc_attr) == (2048 + 256 + 1) * 512
    assert count(detector.attr) == 513 * 401


# --- Top-down


def peer(weight_off: float = 0.0) -> tuple[Tensor, Tensor]:
    """Our steps with the weights of the recorded ones, and theirs."""
    cells, embedding, hidden = 6, 7, 5
    net = TopDown(cells, 4, dataclasses.replace(TEST, cells_lstm=cells, embedding=embedding, attention=hidden)).double().eval()
    with torch.no_grad():
        for ours, theirs, inputs in ((net.attention_lstm, "att_lstm", 2 * cells + embedding), (net.language_lstm, "lang_lstm", 2 * cells)):
            both = wave(f"{theirs}.weight_ih", (4 * cells, inputs)), wave(f"{theirs}.weight_hh", (4 * cells, cells))
            ours.gates.weight.copy_(torch.cat(both, 1))
            ours.gates.bias.copy_(wave(f"{theirs}.bias_ih", (4 * cells,)))
        net.w_ha.weight.copy_(wave("attention.h2att.weight", (hidden, cells)))
        net.w_a.weight.copy_(wave("attention.alpha_net.weight", (1, hidden)) + weight_off)
        net.w_va.weight.copy_(wave("ctx2att.weight", (hidden, cells)))
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]) > 0
        regions = net.regions(wave("v", (3, 4, cells)), mask)
        state, found = net.start(regions), []
        for t in range(len(RECORDED["h2"])):
            net.w_e.weight[:3] = wave(f"word {t}", (3, embedding))
            h2, _, state = net.step(torch.arange(3), state, regions)
            found.append(h2)
    return torch.stack(found), torch.tensor(RECORDED["h2"], dtype=torch.float64)


def test_steps_of_another_implementation(evidence):
    error = relative(*peer())
    assert error < 1e-6
    assert relative(*peer(weight_off=0.2)) > 1e-4
    evidence.fidelity(against="ruotianluo/ImageCaptioning.pytorch 4c48a33 UpDownCore", error=error)


def test_step_by_hand(evidence):
    """Equations 2 to 7 in numpy, with raw features wider than the cells."""
    net = top_down(features=7)
    v, _, regions = noise(net)
    words = torch.tensor([3, 5])
    state = tuple(torch.randn(2, net.cells, generator=torch.Generator().manual_seed(i)) for i in range(4))
    with torch.no_grad():
        h2, alpha, _ = net.step(words, state, regions)  # pyright: ignore[reportArgumentType]
        logits = net.w_p(h2)
    w = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    s1, m1, s2, m2 = (x.double().numpy() for x in state)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def lstm(name, x, h, c):
        i, f, g, o = np.split(w[f"{name}.gates.weight"] @ np.concatenate([x, h]) + w[f"{name}.gates.bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    expected, weights = [], np.zeros((2, 5))
    for b, k in enumerate((5, 3)):
        of_image = v[b, :k].double().numpy()
        x1 = np.concatenate([s2[b], of_image.mean(0), w["w_e.weight"][words[b]]])
        h1, _ = lstm("attention_lstm", x1, s1[b], m1[b])
        a = np.array([w["w_a.weight"][0] @ np.tanh(w["w_va.weight"] @ v_i + w["w_ha.weight"] @ h1) for v_i in of_image])
        weights[b, :k] = np.exp(a) / np.exp(a).sum()
        h, _ = lstm("language_lstm", np.concatenate([weights[b, :k] @ of_image, h1]), s2[b], m2[b])
        expected.append(w["w_p.weight"] @ h + w["w_p.bias"])
    error = relative(logits.double(), torch.tensor(np.stack(expected)))
    assert error < 1e-5 and relative(alpha.double(), torch.tensor(weights)) < 1e-5
    evidence.fidelity(against="equations 2 to 7 in numpy", error=error)


def test_order_and_padding_of_regions_mean_nothing(evidence):
    net = top_down()
    v, mask, regions = noise(net)
    words = torch.randint(0, 9, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = net(regions, words)
        order = torch.tensor([4, 2, 0, 3, 1])
        assert relative(net(net.regions(v[:, order], mask[:, order]), words), plain) < 1e-5
        other = torch.where(mask[..., None], v, 1e3)
        assert torch.equal(net(net.regions(other, mask), words), plain)
        more = net.regions(F.pad(v, (0, 0, 0, 2), value=7.0), F.pad(mask, (0, 2)))
        assert relative(net(more, words), plain) < 1e-5
        assert relative(net(net.regions(v, torch.ones_like(mask)), words), plain) > 1e-2
    evidence.property(
        "permuting regions leaves captions as they are; regions beyond an image's number have no part in attention or mean",
        "打乱区域次序，描述不变；超出一幅图区域数的行不参与注意力与均值",
    )


def test_forget_gates_begin_open_and_the_word_before_is_seen():
    net = top_down()
    assert (net.attention_lstm.gates.bias.view(4, -1)[1] == 1).all() and net.attention_lstm.gates.bias.count_nonzero() == net.cells
    _, _, regions = noise(net)
    words = torch.randint(2, 9, (2, 1, 4), generator=torch.Generator().manual_seed(0))
    later = words.clone()
    later[0, 0, 2] = END
    with torch.no_grad():
        first, second = net(regions, words), net(regions, later)
    assert torch.equal(first[:, :, :3], second[:, :, :3]), "a word is not seen before it is said"
    assert not torch.equal(first[0, :, 3], second[0, :, 3]) and torch.equal(first[1], second[1])


def every(net: TopDown, regions, length: int) -> list[tuple[float, tuple[int, ...]]]:
    """All captions of the first image that a search may find, with their log-probabilities."""
    out = []
    vocabulary = range(net.w_p.out_features)
    for words in itertools.product(vocabulary, repeat=length):
        ended = words.index(END) if END in words else length
        if (
            ended == 0
            or UNKNOWN in words
            or any(w != END for w in words[ended:])
            or any(a == b for a, b in itertools.pairwise(words[:ended]))
        ):
            continue
        logp = net(regions, torch.tensor(words)[None, None].expand(len(regions.mean), 1, -1))[0, 0].log_softmax(1)
        out.append((float(sum(logp[t, w] for t, w in enumerate(words[: ended + 1]))), words))
    return sorted(out, reverse=True)


@torch.no_grad()
def test_beam_search_finds_the_best(evidence):
    """A beam as wide as the tree is exhaustive search; five find something as good as greedy or better."""
    for seed in range(3):
        net = top_down(words=5, seed=seed)
        _, _, regions = noise(net)
        best = every(net, regions, 3)
        wide = net.search(regions, 30, 3)
        total = wide["logp"][0].sum(1)
        for (score, words), found, said in zip(best[:10], total.tolist(), wide["words"][0].tolist()):
            assert found == pytest.approx(score, abs=1e-4) and tuple(said) == words
        greedy, five = (net.search(regions, width, 3)["logp"][:, 0].sum(1) for width in (1, 5))
        assert (five >= greedy - 1e-5).all()
        alone = net.search(net.regions(regions.v[1:], regions.mask[1:]), 5, 3)
        together = net.search(regions, 5, 3)
        assert torch.equal(alone["words"][0], together["words"][1]) and relative(alone["attention"][0], together["attention"][1]) < 1e-5
    evidence.property(
        "beam search equals exhaustive search where the beam holds the whole tree; no word twice in a row; ends cost nothing more",
        "束容得下整棵树时，束搜索等于穷举；同一个词不连续出现两次；结束之后不再增加代价",
    )


def test_attention_sums_to_one_over_real_regions():
    net = top_down()
    _, mask, regions = noise(net)
    with torch.no_grad():
        alpha = net.search(regions, 2, 4)["attention"]
    assert torch.allclose(alpha.sum(3), torch.ones(())) and (alpha[1][..., ~mask[1]] == 0).all()


# --- Bottom-up


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = UpDown(Captions.plain_spec(3, 3), dataclasses.replace(TEST, least=4, most=8, after=(12, 10))).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    torch.nn.init.normal_(net.detector.cls.weight, std=4.0)
    return net


@torch.no_grad()
def test_regions_are_those_of_the_official_rule(network, evidence):
    """Per-class suppression, the threshold, between the least and the most: a loop over classes as the paper describes it."""
    detector, side = network.detector, 64
    image = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    maps = [detector.stages(image)]
    proposals, valid = detector._propose(*detector.rpn(maps), detector._anchors(maps, side), side)
    counts = set()
    for least, most, confidence in ((4, 8, 0.6), (1, 8, 0.9), (6, 8, 0.999), (1, 3, 0.2)):
        detector.own = dataclasses.replace(network.config, least=least, most=most, confidence=confidence)
        v, mask, boxes = detector.detected(image)
        for b in range(3):
            real = proposals[b][valid[b]]
            pooled = detector.pooled(maps[0][b : b + 1], [real])
            scores = detector.cls(pooled).softmax(1)
            best = torch.zeros(len(real))
            for k in range(1, scores.shape[1]):
                kept = nms(real, scores[:, k], 0.3)
                best[kept] = torch.maximum(best[kept], scores[kept, k])
            chosen = (best > confidence).nonzero()[:, 0]
            order = best.argsort(descending=True)
            chosen = order[:least] if len(chosen) < least else order[:most] if len(chosen) > most else chosen
            ours = {tuple(round(x, 3) for x in box) for box in boxes[b][mask[b]].tolist()}
            theirs = {tuple(round(x, 3) for x in box) for box in real[chosen].tolist()}
            counts.add(len(chosen))
            assert ours == theirs
            where = [real.tolist().index(box) for box in boxes[b][mask[b]].tolist()]
            assert relative(v[b][mask[b]], pooled[where]) < 1e-4
    detector.own = network.config
    assert len(counts) > 2, "the adaptive number varies"
    evidence.property(
        "regions: suppression in each class, any class above the threshold, at least and at most so many; features of the proposals",
        "区域：在每个类别内抑制，任一类别超过阈值即可，数量有下限和上限；特征取自候选框",
    )


def test_grid_is_the_last_map(network):
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v, mask, boxes = network.detector.gridded(image)
        last = network.detector.last(network.detector.stages(image))
    assert v.shape == (2, 9, network.detector.features) and mask.all()
    resized = F.interpolate(last, (3, 3), mode="bilinear")
    assert torch.equal(v[1, 5], resized[1, :, 1, 2]) and boxes[0, 5].tolist() == pytest.approx([128 / 3, 64 / 3, 64, 128 / 3])


def test_attributes_are_asked_of_objects_only(network, evidence):
    batch = Captions.plain_batch(network, Captions.plain_spec(3, 3))
    torch.manual_seed(0)
    out = network.detector(batch["image"], batch["boxes"], batch["labels"], batch["attributes"])
    of_objects = out["region_label"] > 0
    assert len(out["attribute_label"]) == int(of_objects.sum()) >= 4
    assert set(out["attribute_label"].tolist()) <= set((batch["attributes"] + 1).flatten().tolist())
    before = out["attribute_logits"].detach()
    with torch.no_grad():
        network.detector.class_embedding.weight[1:] += 1
        torch.manual_seed(0)
        after = network.detector(batch["image"], batch["boxes"], batch["labels"], batch["attributes"])["attribute_logits"]
        network.detector.class_embedding.weight[1:] -= 1
    assert relative(after, before) > 1e-3
    evidence.property(
        "attribute head: pooled feature beside an embedding of the true class, objects only",
        "属性头：池化特征与真实类别的嵌入拼接，只用于物体",
    )


def test_captions_leave_the_detector_alone():
    torch.manual_seed(0)
    spec = Captions.plain_spec(1, 3)
    net = UpDown(spec, TEST).train()
    batch = Captions.plain_batch(net, spec)
    terms = loss(TEST)(Captions.forward(net, batch), batch)
    terms["words"].backward()
    assert all(p.grad is None for p in net.detector.parameters()) and all(p.grad is not None for p in net.top_down.parameters())
    assert net.detector.training and int(net.steps) == 1
    assert {"detector", "attribute", "words", "loss"} == set(terms)
    values = {key: float(value.detach()) for key, value in terms.items()}
    assert values["loss"] == pytest.approx(values["detector"] + values["attribute"] + values["words"], rel=1e-5)


def test_without_boxes_the_grid_learns_from_captions():
    torch.manual_seed(0)
    spec = dataclasses.replace(Captions.plain_spec(1, 0), classes=())
    net = UpDown(spec, TEST).train()
    assert not hasattr(net.detector, "rpn")
    batch = Captions.plain_batch(net, spec)
    terms = loss(TEST)(Captions.forward(net, batch), batch)
    terms["loss"].backward()
    assert set(terms) == {"loss", "words"} and all(p.grad is not None and p.grad.any() for p in net.detector.parameters())
    assert net.eval()(batch["image"])["boxes"].shape == (2, 9, 4)


# --- Self-critical training


@pytest.mark.parametrize("explore", ["policy", "beam"])
def test_reward_rises(explore, evidence):
    """Two images with three captions each, and a reward for the first of them alone; only the captioner learns."""
    torch.manual_seed(0)
    spec = dataclasses.replace(Captions.plain_spec(1, 0), classes=())
    config = dataclasses.replace(TEST, cross_entropy=20, explore=explore, beam=5)
    net = UpDown(spec, config).train().requires_grad_(False)
    net.top_down.requires_grad_(True)
    batch = Captions.plain_batch(net, spec)
    batch["reward"] = [type(r)(r.corpus, r.words, r.references[:1]) for r in batch["reward"]]
    optimizer, rewards = torch.optim.Adam(net.top_down.parameters(), 0.02), []
    for _ in range(60):
        terms = loss(config)(Captions.forward(net, batch), batch)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        rewards += [float(terms["reward"])] if "reward" in terms else []
    assert len(rewards) == 40 and np.mean(rewards[-5:]) > 1.5 * np.mean(rewards[:5])
    evidence.property(f"self-critical steps raise CIDEr-D ({explore})", f"自批判训练提高 CIDEr-D（{explore}）")


def test_self_critical_loss_by_hand():
    """-(r - r_greedy) times the log-probability of the words up to the first end."""
    torch.manual_seed(0)
    spec = dataclasses.replace(Captions.plain_spec(1, 0), classes=())
    config = dataclasses.replace(TEST, cross_entropy=1, explore="policy", beam=2)
    net = UpDown(spec, config).train()
    batch = Captions.plain_batch(net, spec)
    assert "logits" in Captions.forward(net, batch), "the first step is one of cross-entropy"
    out = Captions.forward(net, batch)
    terms = loss(config)(out, batch)
    with torch.no_grad():
        regions, _ = net.look(batch["image"])
        logits = net.top_down(regions, out["sampled"])
    terms = {key: value.detach() for key, value in terms.items()}
    expected = 0.0
    for b, reward in enumerate(batch["reward"]):
        greedy = reward(out["greedy"][b].tolist())
        for s, sentence in enumerate(out["sampled"][b].tolist()):
            upto = sentence.index(END) + 1 if END in sentence else len(sentence)
            assert all(w == END for w in sentence[upto:])
            logp = sum(float(logits[b, s, t].log_softmax(0)[w]) for t, w in enumerate(sentence[:upto]))
            assert logp == pytest.approx(float(out["sampled_logp"].detach()[b, s]), rel=1e-3)
            expected -= (reward(sentence) - greedy) * logp / 4
    assert float(terms["policy"]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert terms["loss"] == terms["policy"]


def test_the_paper_says_when_rewards_begin():
    assert VARIANTS["resnet101"].cross_entropy == 60_000 and VARIANTS["resnet101"].explore == "beam" and VARIANTS["resnet101"].beam == 5
    assert VARIANTS["small"].cross_entropy is None and VARIANTS["small_cider"].cross_entropy is not None
    assert PAPER.recipe(VARIANTS["resnet101"]).lr == 0.01


# --- Questions


@torch.no_grad()
def test_questions(evidence):
    torch.manual_seed(0)
    net = QuestionAnswering(6, 20, 7, hidden=5, embedding=4).eval()
    v, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]) > 0
    question = torch.randint(0, 20, (2, 3))
    scores, alpha = net(v, mask, question)
    assert scores.shape == (2, 7) and torch.allclose(alpha.sum(1), torch.ones(2)) and (alpha[1, 2:] == 0).all()
    order = [2, 0, 3, 1]
    again, turned = net(v[:, order], mask[:, order], question)
    assert relative(again, scores) < 1e-5 and torch.allclose(turned, alpha[:, order])
    gate = GatedTanh(3, 2)
    x = torch.randn(4, 3)
    by_hand = (x @ gate.value.weight.T + gate.value.bias).tanh() / (1 + (-(x @ gate.gate.weight.T + gate.gate.bias)).exp())
    assert torch.allclose(gate(x), by_hand, atol=1e-6)
    q = net.gru(net.embedding(question))[1][0]
    a = torch.stack([net.w_a(net.f_a(torch.cat([v[:, i], q], 1)))[:, 0] for i in range(4)], 1).masked_fill(~mask, NEVER)
    h = net.f_q(q) * net.f_v((a.softmax(1)[..., None] * v).sum(1))
    assert torch.allclose(net.w_o(net.f_o(h)), scores, atol=1e-6)
    evidence.property(
        "question head: gated tanh, one pass of attention over masked regions, product of question and image",
        "问答头：门控 tanh，对带掩码的区域做一次注意力，问题与图像相乘",
    )
