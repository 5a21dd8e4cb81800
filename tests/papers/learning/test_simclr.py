"""SimCLR against lightly, pytorch-metric-learning and the definition, in one process and in two."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.papers.learning.simclr.simclr import VARIANTS, ProjectionHead, SimCLR, distortion, loss, nt_xent, recipe
from paperworks.tasks.representation import Representation
from twice import in_two_processes

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "contrast.json").read_text(encoding="utf-8"))


def recorder():
    spec = importlib.util.spec_from_file_location("contrast_record", FIXTURES / "contrast_record.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rule = recorder()


def network() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(Representation.plain_spec(3), VARIANTS["test"]).train()


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def test_equals_lightly_and_metric_learning(evidence):
    a, b = rule.wave("a", 6, rule.DIM).requires_grad_(), rule.wave("b", 6, rule.DIM)
    for peer in ("lightly", "metric_learning"):
        found = torch.stack([nt_xent(a, b, float(t)) for t in GOLDEN[peer]["nt_xent"]]).detach()
        difference = error(found, torch.tensor(list(GOLDEN[peer]["nt_xent"].values())))
        assert difference < 1e-5
        name = {"lightly": "lightly", "metric_learning": "pytorch-metric-learning"}[peer]
        evidence.fidelity(against=f"{name} {GOLDEN[peer]['version']} NTXentLoss", error=difference)
    nt_xent(a, b, 0.5).backward()
    difference = error(a.grad, torch.tensor(GOLDEN["lightly"]["gradient"]).view(6, rule.DIM))
    assert difference < 1e-5
    evidence.fidelity(against=f"lightly {GOLDEN['lightly']['version']} NTXentLoss, gradient", error=difference)
    assert error(nt_xent(a.detach().roll(1, 0), b, 0.5), torch.tensor(GOLDEN["lightly"]["nt_xent"]["0.5"])) > 1e-3


def test_equals_the_definition(evidence):
    """Equation 1 as two loops over 2N anchors in double precision."""
    z = torch.stack([rule.wave("a", 5, 7), rule.wave("b", 5, 7)], 1).double()  # views of one image beside each other
    z = z.flatten(0, 1)
    terms = []
    for i in range(10):
        j = i ^ 1
        exp = [math.exp(float(F.cosine_similarity(z[i], z[k], dim=0)) / 0.5) for k in range(10)]
        terms.append(-math.log(exp[j] / sum(e for k, e in enumerate(exp) if k != i)))
    found = float(nt_xent(z[::2].float(), z[1::2].float(), 0.5))
    assert abs(found - sum(terms) / 10) < 1e-5 * found
    evidence.property(
        "NT-Xent equals eq. 1 summed in two loops, averaged over 2N anchors; an anchor is no negative of itself",
        "NT-Xent 等于式 1 的双重循环求和，对 2N 个锚点取平均；锚点不是自己的负样本",
    )


def test_perfect_views_leave_only_the_negatives():
    z = torch.eye(4)
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))  # 6 orthogonal others
    assert abs(float(nt_xent(z, z * 3, 0.5)) - expected) < 1e-5


def step(model: SimCLR, images: Tensor, views: Tensor) -> Tensor:
    value = loss(VARIANTS["test"])(model(images, views), {})["loss"]
    value.backward()
    return value


def batch() -> tuple[Tensor, Tensor]:
    images, noise = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return images * torch.arange(1.0, 9).view(8, 1, 1, 1), images + noise


def half(rank: int) -> dict[str, Tensor]:
    """One of two processes with half of the images."""
    model = network()
    value = step(model, *(part.chunk(2)[rank] for part in batch()))
    return {
        "loss": value.detach(),
        **{f"gradient {k}": p.grad for k, p in model.named_parameters()},
        **{f"buffer {k}": v for k, v in model.named_buffers()},
    }


def test_two_processes_are_one_batch(tmp_path, evidence):
    """Mean loss, mean gradients (as DDP takes them) and running statistics are those of one process with all images."""
    found = in_two_processes(half, tmp_path)
    model = network()
    value = step(model, *batch()).detach()
    assert error(sum(f["loss"] for f in found) / 2, value) < 1e-5
    ours = torch.cat([((found[0][k] + found[1][k]) / 2).flatten() for k in found[0] if k.startswith("gradient")])
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert error(ours, whole) < 1e-3
    for k, v in model.named_buffers():
        torch.testing.assert_close(found[1][f"buffer {k}"], v, rtol=1e-4, atol=1e-5)
    alone = network()
    step(alone, *(part.chunk(2)[0] for part in batch()))
    assert error(torch.cat([p.grad.flatten() for p in alone.parameters()]), whole) > 0.1
    evidence.property(
        "two processes give the loss, gradients and batch norm statistics of one with the whole batch",
        "双进程的损失、梯度和批归一化统计量等于单进程整批",
    )


def test_projection_head_is_the_released_one(evidence):
    with torch.device("meta"):
        head = ProjectionHead(2048, 128)
        model = SimCLR(Representation.plain_spec(3), VARIANTS["r50"])
    assert sum(p.numel() for p in head.parameters()) == 4_460_672
    assert sum(p.numel() for p in model.parameters()) == 27_968_704
    assert [n for n, _ in head.named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight"]
    evidence.property(
        "the head has the released layout: no biases, a batch norm after each layer, the last one without beta",
        "投影头与公布的布局相同：没有偏置，每层之后有批归一化，最后一个没有 beta",
    )


def test_blocks_start_as_their_shortcuts():
    torch.manual_seed(0)
    model = SimCLR(Representation.plain_spec(3), replace(VARIANTS["test"], zero_init=True))
    assert not model.encoder.layer1[0].bn2.weight.any()


def test_the_representation_is_before_the_head():
    model = network().eval()
    images = torch.randn(2, 3, 32, 32)
    output = model(images)
    assert torch.equal(output["embedding"], model.encoder.embed(images))
    assert output["projection"].shape == (2, 8)


def test_both_views_share_their_statistics():
    """The views are encoded as one batch: what the second is changes the projection of the first."""
    images, views = batch()
    first, second = (network()(images, v)["projection"] for v in (views, views * 3))
    assert error(first, second) > 1e-3


@pytest.mark.parametrize("variant", ["r50", "cifar", "small"])
def test_recipes_compose_crops_and_colour(variant):
    view = recipe(VARIANTS[variant]).augment
    assert view.area == (0.08, 1.0) and view.jitter_chance == 0.8 and view.grey == 0.2
    assert view.jitter == distortion(1.0 if variant == "r50" else 0.5)
    assert view.blur == (0.5 if variant == "r50" else 0.0)
    assert distortion(1.0) == (0.8, 0.8, 0.8, 0.2)


def test_head_normalises_with_all_processes():
    assert all(not isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network().modules())
