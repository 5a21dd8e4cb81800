"""The CRF against pytorch-crf and enumeration; edges, graph and masks by their properties."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paperworks.papers.relation.rich_documents.rich_documents import (
    VARIANTS,
    BiLSTM,
    Config,
    GraphConvolution,
    RichDocuments,
    crf_loss,
    edge_features,
    loss,
    viterbi,
)
from paperworks.tasks.documents import BOX, ROWS, Documents
from peers import relative

TINY = Config(embedding=6, width=8, dropout=0.0)
LENGTHS, TAGS = (7, 1, 4, 6, 2), 5


def wave(shape: tuple[int, ...], start: float) -> torch.Tensor:
    """The rule of the fixture's numbers."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (2 * torch.sin(start + 0.7 * index**2)).view(shape).float()


def chains() -> dict[str, torch.Tensor]:
    """Emissions, tags, mask and parameters as the fixture was recorded with."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tags = (torch.arange(mask.numel()) ** 2 % TAGS).view(mask.shape)
    start, transitions, end = (wave(s, k).requires_grad_() for k, s in enumerate(((TAGS,), (TAGS, TAGS), (TAGS,)), start=1))
    emissions = wave((*mask.shape, TAGS), 4)
    return {"emissions": emissions, "tags": tags, "mask": mask, "start": start, "transitions": transitions, "end": end}


def pages(batch: int = 2, n: int = 7, seed: int = 0) -> torch.Tensor:
    """Pages of letters of chance; the texts have unlike lengths and the last page has two segments fewer."""
    generator = torch.Generator().manual_seed(seed)
    page = torch.zeros(batch, ROWS, n)
    page[:, :BOX] = 0.1 + 0.8 * torch.rand(batch, BOX, n, generator=generator)
    for b, i in itertools.product(range(batch), range(n)):
        length = int(torch.randint(1, 12, (), generator=generator))
        page[b, BOX : BOX + length, i] = torch.randint(65, 91, (length,), generator=generator) / 255
    page[-1, :, n - 2 :] = 0
    return page


def network(config: Config = TINY, seed: int = 0) -> RichDocuments:
    torch.manual_seed(seed)
    net = RichDocuments(3, config)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.4)
    return net.eval()


def test_crf_equals_pytorch_crf(evidence):
    """Losses, their gradients and the best paths."""
    kept = json.loads((Path(__file__).parent / "fixtures" / "rich_documents.json").read_text())
    given = chains()
    found = crf_loss(**given)
    found.sum().backward()
    pairs = [(found, kept["loss"]), *((given[name].grad, kept[f"{name}_grad"]) for name in ("start", "end", "transitions"))]
    error = max(relative(ours, torch.tensor(theirs)) for ours, theirs in pairs)
    assert error < 1e-4
    del given["tags"]
    best = viterbi(**given)
    assert [row[:n].tolist() for row, n in zip(best, LENGTHS)] == kept["paths"]
    assert not best[~given["mask"]].any()
    with torch.no_grad():
        given["transitions"][1, 0] += 0.1
    assert relative(crf_loss(**given, tags=chains()["tags"]), torch.tensor(kept["loss"])) > 1e-4
    evidence.fidelity("pytorch-crf 0.7.2 (losses, gradients and paths of the CRF)", error)


def test_crf_equals_enumeration(evidence):
    """Every path of a short chain is scored by hand: their probabilities sum to one, and the best one is Viterbi's."""
    generator = torch.Generator().manual_seed(0)
    emissions, start, transitions, end = (torch.randn(s, generator=generator) for s in ((1, 5, 3), (3,), (3, 3), (3,)))
    mask = torch.tensor([[True, True, True, True, False]])
    scores = {}
    for path in itertools.product(range(3), repeat=4):
        steps = sum(float(emissions[0, k, t]) for k, t in enumerate(path)) + sum(
            float(transitions[a, b]) for a, b in itertools.pairwise(path)
        )
        scores[path] = float(start[path[0]]) + steps + float(end[path[-1]])
    normaliser = torch.tensor(list(scores.values())).logsumexp(0)
    for path, score in scores.items():
        ours = crf_loss(emissions, torch.tensor([[*path, 0]]), mask, start, transitions, end)
        assert float(ours) == pytest.approx(float(normaliser) - score, abs=1e-4)
    assert tuple(viterbi(emissions, mask, start, transitions, end)[0, :4].tolist()) == max(scores, key=scores.__getitem__)
    evidence.property(
        "the CRF's normaliser is the sum over all paths of a short chain, and Viterbi's path the best of them",
        "CRF 的归一化项是短链上所有路径之和，Viterbi 的路径是其中最优的",
    )


def test_edges(evidence):
    """The five features by hand, not symmetric, and the same on a page that was moved or scaled."""
    box = torch.tensor([[[10.0, 40.0], [20.0, 26.0], [8.0, 30.0], [2.0, 4.0]]])  # x, y, w, h of two boxes
    r = edge_features(box)
    torch.testing.assert_close(r[0, 0, 1].sinh(), torch.tensor([30.0, 6.0, 8.0, 4.0, 30.0]) / 2)
    torch.testing.assert_close(r[0, 1, 0].sinh(), torch.tensor([-30.0, -6.0, 30.0, 2.0, 8.0]) / 4)
    boxes = 0.1 + torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(0))
    moved = boxes + torch.tensor([0.3, -0.7, 0.0, 0.0])[:, None]
    torch.testing.assert_close(edge_features(moved), edge_features(boxes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edge_features(3.7 * boxes), edge_features(boxes))
    evidence.property(
        "edge features do not change when a page is moved or scaled, and are in units of the first node's height",
        "页面平移或缩放时边特征不变；边特征以第一个节点的高度为单位",
    )


def test_graph_convolution_by_loops(evidence):
    """Triplets one by one, as eqs. 2 to 5 are written, on the concatenation that the code never makes."""
    torch.manual_seed(0)
    d, n = TINY.width, 4
    layer = GraphConvolution(TINY, 5, last=False)
    t, r, nodes = torch.randn(1, n, d), torch.randn(1, n, n, 5), torch.tensor([[True, True, True, False]])
    new_t, new_r = layer(t, r, nodes)
    weight = torch.cat([layer.source.weight, layer.edge.weight, layer.target.weight], 1)
    for i in range(n):
        h = [layer.triplet((weight @ torch.cat([t[0, i], r[0, i, j], t[0, j]]) + layer.source.bias).relu()) for j in range(n)]
        a = torch.softmax(torch.stack([torch.nn.functional.leaky_relu(layer.attend(h[j]))[0] for j in range(3)]), 0)
        torch.testing.assert_close(new_t[0, i], sum(a[j] * h[j] for j in range(3)).relu(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new_r[0, i], torch.stack([layer.renew(h[j]).relu() for j in range(n)]), rtol=1e-4, atol=1e-5)
    evidence.property(
        "a graph convolution is the MLP of each concatenated triplet, weighted by attention over real neighbours, self included",
        "图卷积是每个拼接三元组的 MLP，按对真实邻居（包括自己）的注意力加权",
    )


def test_nodes_may_be_listed_in_any_order(evidence):
    net, page = network(), pages(1)
    order = torch.randperm(page.shape[2], generator=torch.Generator().manual_seed(3))
    for key in ("logits", "segments", "tags"):
        torch.testing.assert_close(net(page[..., order])[key], net(page)[key][:, order], rtol=1e-4, atol=1e-5)
    reader = network(replace(TINY, context="document"))
    assert relative(reader(page[..., order])["logits"], reader(page)["logits"][:, order]) > 1e-2  # a reader of one text minds
    evidence.property(
        "listing the segments in another order lists the results in that order; reading the page as one text does not",
        "文本段换一种次序列出，结果也按该次序列出；把整页当一段文字读则不然",
    )


@pytest.mark.parametrize("context", ["graph", "document", "segment"])
def test_padding_is_not_seen(evidence, context):
    net, page = network(replace(TINY, context=context)), pages()
    alone = net(page[1:, :, :5])
    together = net(page)
    torch.testing.assert_close(together["logits"][1:, :5], alone["logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(together["tags"][1:, :5], alone["tags"])
    dirty = page.clone()
    dirty[:, BOX + 30 :] = 0.5  # behind the zero that ends every text
    torch.testing.assert_close(net(dirty)["logits"], together["logits"])
    if context == "graph":
        evidence.property("what fills up a batch or a text is not seen", "批和文本中的填充不可见")


def test_what_reaches_a_segment(evidence):
    """The other segment's place matters with edges and its text without; alone a segment knows neither."""
    page = pages(1)
    moved, rewritten = page.clone(), page.clone()
    moved[0, 1, 4] += 0.4
    rewritten[0, BOX, 4] = 90 / 255 if page[0, BOX, 4] != 90 / 255 else 89 / 255

    def change(config: Config, other: torch.Tensor) -> float:
        net = network(config)
        with torch.no_grad():
            return float((net(other)["logits"][0, 0] - net(page)["logits"][0, 0]).abs().max())

    assert change(TINY, moved) > 1e-4 and change(TINY, rewritten) > 1e-5
    flat = replace(TINY, edge_features=False)
    assert change(flat, moved) == 0 and change(flat, rewritten) > 1e-5
    assert change(replace(TINY, context="document"), moved) == 0 and change(replace(TINY, context="document"), rewritten) > 1e-6
    assert change(replace(TINY, context="segment"), rewritten) == 0
    even = network(replace(TINY, attention=False))
    assert even.graph[0].attend is None and torch.isfinite(even(page)["logits"]).all()
    evidence.property(
        "layout reaches a segment through the edges alone, other texts through graph or reading, and nothing where it stands alone",
        "布局只经由边到达一段，其他段的文字经由图或整页读法到达；单独处理一段时什么都不到达",
    )


def test_ends_of_sequences():
    torch.manual_seed(0)
    lstm, mask = BiLSTM(5, 8), torch.arange(9) < torch.tensor([9, 4, 1, 0])[:, None]
    x = torch.randn(4, 9, 5)
    states = lstm(x, mask)
    torch.testing.assert_close(states[1:2, :4], lstm(x[1:2, :4], mask[1:2, :4]))
    assert not states[~mask].any()
    torch.testing.assert_close(BiLSTM.ends(states, mask)[1], torch.cat([states[1, 3, :4], states[1, 0, 4:]]))


def test_uncertainty(evidence):
    """sum of L / (2 s^2) + log s with s learned; at its best s^2 is the loss itself."""
    net = network().train()
    batch = Documents.plain_batch(net, Documents.plain_spec(classes=3))
    terms = loss(net(batch["page"]), batch)
    s2 = net.log_variance.exp()
    losses = torch.stack([terms["tagging"], terms["classification"]])
    torch.testing.assert_close(terms["loss"], (losses / (2 * s2) + s2.sqrt().log()).sum())
    with torch.no_grad():
        net.log_variance.copy_(losses.log())
    terms = loss(net(batch["page"]), batch)
    terms["loss"].backward()
    torch.testing.assert_close(net.log_variance.grad, torch.zeros(2), rtol=0, atol=1e-5)
    alone = network(replace(TINY, multi_task=False)).train()
    assert set(loss(alone(batch["page"]), batch)) == {"loss"}
    evidence.property(
        "tasks are weighted by learned uncertainties, which rest where the variance equals the task's loss",
        "任务按可学习的不确定性加权，方差等于该任务的损失时稳定",
    )


def test_loss_sees_real_tokens_only():
    net = network().train()
    batch = Documents.plain_batch(net, Documents.plain_spec(classes=3))
    kept = loss(net(batch["page"]), batch)["loss"]
    batch["tags"][(batch["page"][:, BOX:].transpose(1, 2) == 0)] = 2
    batch["segments"][batch["page"][:, BOX] == 0] = 1
    torch.testing.assert_close(loss(net(batch["page"]), batch)["loss"], kept)


def test_parameter_counts():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in RichDocuments(4, config).parameters()) for name, config in VARIANTS.items()}
    assert counts["small"] == 256 * 32 + 25_088 + 23_040 + 325 + 33_280 + 650 + 2 + 9 + 9 + 81 + 2_239
