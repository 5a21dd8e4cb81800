"""BatchBALD against batchbald_redux (numbers recorded by fixtures/batchbald_record.py), brute force and algebra."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paperworks.errors import InputError
from paperworks.papers.learning.batchbald.batchbald import (
    CONFIGURATIONS,
    VARIANTS,
    BayesianCNN,
    Joint,
    Unvaried,
    bald,
    bald_batch,
    batchbald,
    conditional_entropy,
    drawn,
    posterior,
    predictive,
)

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "batchbald.json").read_text())


def draw(seed, n, k, c, scale=1.5):
    """As in fixtures/batchbald_record.py."""
    state = np.random.RandomState(seed)
    return torch.from_numpy(state.standard_normal((n, 1, c)) + scale * state.standard_normal((n, k, c))).log_softmax(2)


def information(log_probs):
    """I(y_1 ... y_n; w) of all images given, by summing over every configuration of their labels."""
    probs = log_probs.exp()
    n, _, c = probs.shape
    joint = conditional = 0.0
    for labels in itertools.product(range(c), repeat=n):
        p = torch.stack([probs[i, :, y] for i, y in enumerate(labels)]).prod(0)  # K
        joint -= float(p.mean() * p.mean().log())
        conditional -= float((p * p.log()).mean())
    return joint - conditional


def relative(found, expected):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"seed {case['seed']}")
def test_equals_batchbald_redux(case, evidence):
    log_probs = draw(case["seed"], case["n"], case["k"], case["c"], case["scale"])
    found = batchbald(log_probs, case["size"])
    single = bald(log_probs)
    assert found.indices == case["batchbald"]["indices"]
    assert single.topk(case["size"]).indices.tolist() == case["bald"]["indices"]
    error = max(relative(found.scores, case["batchbald"]["scores"]), relative(single[case["bald"]["indices"]], case["bald"]["scores"]))
    assert error < 1e-4
    perturbed = log_probs.clone()
    perturbed[found.indices[0]] = perturbed[found.indices[0]].roll(1, 0)
    assert relative(batchbald(perturbed, case["size"]).scores, case["batchbald"]["scores"]) > 1e-4
    evidence.fidelity(against=f"BlackHC/batchbald_redux@{FIXTURE['commit'][:7]} {case['n']} images, {case['c']} classes", error=error)


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"seed {case['seed']}")
def test_sampled_entropies(case, evidence):
    probs = draw(case["seed"], case["n"], case["k"], case["c"], case["scale"]).exp()
    exact, sampled = (Joint(case["k"], CONFIGURATIONS, torch.Generator().manual_seed(0)) for _ in range(2))
    sampled.chosen = list(probs[: case["size"]])
    sampled._draw()
    for image in probs[: case["size"]]:
        exact.add(image)
    assert len(exact.given) == case["c"] ** case["size"] and abs(len(sampled.given) - CONFIGURATIONS) < case["k"]
    truth = exact.entropies(probs)
    assert relative(sampled.entropies(probs), truth) < 0.01
    assert relative(case["sampled_entropies"], truth) < 0.01, "the recorded ones are as near"
    evidence.property(
        f"sampled joint entropies of {case['size']} images with {case['c']} classes agree with exact ones within 1 %",
        f"{case['size']} 张图、{case['c']} 类的采样联合熵与精确值相差不到 1 %",
    )


@pytest.mark.parametrize(("n", "c"), [(2, 4), (3, 3), (4, 2)])
def test_information_equals_brute_force(n, c, evidence):
    log_probs = draw(n, n, 6, c)
    found = batchbald(log_probs, n)
    assert found.scores[-1] == pytest.approx(information(log_probs), rel=1e-9)
    for size in range(1, n + 1):
        assert found.scores[size - 1] == pytest.approx(information(log_probs[found.indices[:size]]), rel=1e-9)
    evidence.property(
        f"the score of {n} images with {c} classes is the mutual information summed over every configuration of their labels",
        f"{n} 张图、{c} 类的得分等于对所有标法求和得到的互信息",
    )


def test_greedy_is_within_its_bound_and_each_choice_is_the_best(evidence):
    worst = 1.0
    for seed in range(12):
        log_probs = draw(seed, 7, 4, 2, scale=2.0)
        found = batchbald(log_probs, 3)
        best = max(information(log_probs[list(some)]) for some in itertools.combinations(range(7), 3))
        worst = min(worst, found.scores[-1] / best)
        for size in range(3):
            rest = [i for i in range(7) if i not in found.indices[:size]]
            values = {i: information(log_probs[[*found.indices[:size], i]]) for i in rest}
            assert found.indices[size] == max(values, key=values.__getitem__)
    assert 1 - 1 / math.e <= worst <= 1 + 1e-9
    evidence.property(
        "greedy batches reach at least 1 - 1/e of the best batch, found by trying all",
        "贪心选出的批至少达到最优批的 1 - 1/e，最优批由枚举得到",
    )


def test_information_is_submodular_and_bounded(evidence):
    log_probs = draw(3, 30, 8, 3, scale=2.0)
    found = batchbald(log_probs, 8, configurations=3**8)
    gains = np.diff([0.0, *found.scores])
    assert (gains >= -1e-9).all() and (np.diff(gains) <= 1e-9).all()
    assert found.scores[-1] <= math.log(8) and found.scores[-1] <= float(bald(log_probs)[found.indices].sum())
    evidence.property(
        "scores never fall, gains never rise, and no batch holds more than log K nats or than its images by themselves",
        "得分从不下降，增益从不上升；任何一批的信息都不超过 log K nat，也不超过各图单独得分之和",
    )


def test_a_batch_of_one_is_balds(evidence):
    log_probs = draw(4, 20, 10, 5)
    assert batchbald(log_probs, 1).indices == [int(bald(log_probs).argmax())] == bald_batch(log_probs, 1).indices
    assert batchbald(log_probs, 1).scores == pytest.approx(bald_batch(log_probs, 1).scores)
    certain = torch.full((1, 5, 3), -100.0).index_fill(2, torch.tensor([0]), 0.0)
    noisy = torch.full((1, 5, 3), -math.log(3))
    torch.testing.assert_close(bald(torch.cat([certain, noisy])), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    evidence.property(
        "a batch of one is BALD's; images on which all draws agree tell nothing, be they sure or not",
        "批大小为一时就是 BALD；所有抽样意见一致的图不提供信息，不论是否有把握",
    )


def test_copies_are_not_chosen_twice(evidence):
    log_probs = draw(5, 12, 40, 4).repeat(5, 1, 1)  # five copies of each
    assert len({i % 12 for i in batchbald(log_probs, 5).indices}) == 5
    assert len({i % 12 for i in bald_batch(log_probs, 5).indices}) == 1
    evidence.property(
        "of a pool of copies BALD's best are one image five times, BatchBALD's five images",
        "池中有副本时，BALD 的前五名是同一张图的五个副本，BatchBALD 的是五张不同的图",
    )


def test_beyond_the_configurations_the_estimate_goes_on():
    log_probs = draw(6, 25, 10, 10)
    exact, sampled = batchbald(log_probs, 4, configurations=10**3), batchbald(log_probs, 4, configurations=999)
    assert exact.scores[:3] == sampled.scores[:3]
    assert exact.scores[3] == pytest.approx(sampled.scores[3], rel=0.03)
    assert batchbald(log_probs, 6, configurations=200, seed=1) == batchbald(log_probs, 6, configurations=200, seed=1)
    assert len(set(batchbald(log_probs, 40, configurations=200).indices)) == 25, "no more than there are"


def test_all_images_of_a_draw_share_one_mask(evidence):
    network = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Dropout2d(0.5), nn.Flatten(), nn.Dropout(0.25)).eval()
    nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
    one = torch.ones(6, 1, 5, 5)
    with torch.no_grad(), drawn(network, draw=0):
        first, again = network(one), network(one[:2])
    with torch.no_grad(), drawn(network, draw=1):
        other = network(one)
    assert torch.equal(first, first[:1].expand_as(first)) and torch.equal(first[:2], again)
    assert not torch.equal(first, other)
    channels = first[0].view(16, 25)
    assert all(value == 0 or value == pytest.approx(1 / 0.5 / 0.75) for value in first.unique().tolist())
    assert 0 < int((channels == 0).all(1).sum()) < 16, "channels go as a whole"
    assert torch.equal(network(one), one.expand(6, 16, 5, 5).flatten(1)), "nothing is left behind"
    evidence.property(
        "each draw has one mask for all images and all calls; Dropout2d drops channels",
        "每次抽样只有一个掩码，用于所有图像和所有调用；Dropout2d 按整个通道丢弃",
    )


def test_draws_average_to_the_network_and_are_reproducible():
    network = nn.Sequential(nn.Dropout(0.5), nn.Identity()).eval()
    given = torch.rand(3, 4)
    outputs = []
    for k in range(2000):
        with drawn(network, k, seed=7):
            outputs.append(network(given))
    torch.testing.assert_close(torch.stack(outputs).mean(0), given, atol=0.1, rtol=0.1)
    with pytest.raises(InputError, match="no dropout"), drawn(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), 0):
        pass


def test_posterior_does_not_depend_on_how_images_are_batched():
    torch.manual_seed(0)
    network = BayesianCNN(1, 4, VARIANTS["test"])
    images = torch.randn(7, 1, 28, 28)
    whole, parts = posterior(network, [images], 5, seed=3), posterior(network, list(images.split(3)), 5, seed=3)
    assert whole.shape == (7, 5, 4)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole.exp().sum(2), torch.ones(7, 5))
    torch.testing.assert_close(predictive(whole), whole.exp().mean(1))
    assert bald(whole).min() > 0 and conditional_entropy(whole).max() <= math.log(4) + 1e-6


@pytest.mark.parametrize(("name", "classes", "count"), [("mnist", 10, 184_586), ("emnist", 47, 1_165_871)])
def test_networks_of_the_experiments(name, classes, count, evidence):
    torch.manual_seed(0)
    network = BayesianCNN(1, classes, VARIANTS[name]).eval()
    assert sum(p.numel() for p in network.parameters()) == count
    c, k = network.convolutions, VARIANTS[name].kernel
    assert [conv.kernel_size for conv in c] == [(k, k)] * len(c)
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    first = [c[0], pool, relu]
    rest = [c[1], pool, relu] if name == "mnist" else [c[1], relu, c[2], pool, relu]
    plain = nn.Sequential(*first, *rest, nn.Flatten(), network.hidden, relu, network.classifier)
    image = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(network(image)["logits"], plain(image))
    evidence.property(f"the {name} network has {count:,} parameters", f"{name} 网络有 {count:,} 个参数")


def test_nothing_is_augmented():
    image = torch.rand(1, 28, 28)
    found = Unvaried()({"image": image, "label": 1}, (28, 28), torch.Generator())
    assert torch.equal(found["image"].as_subclass(torch.Tensor), image) and found["label"] == 1
