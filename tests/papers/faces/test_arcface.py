"""ArcFace against insightface (golden numbers), pytorch-metric-learning and algebra."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.faces.arcface.arcface import VARIANTS, ArcFace, IResNet, loss, margin_logits
from paperworks.tasks.representation import Representation

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "arcface.json").read_text(encoding="utf-8"))


def recorder():
    spec = importlib.util.spec_from_file_location("arcface_record", FIXTURES / "arcface_record.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rule = recorder()


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


@torch.no_grad()
def test_trunk_equals_insightface(evidence):
    trunk = IResNet(3, 112, VARIANTS["r18"]).eval()
    rule.fill(trunk)
    image, expected = rule.wave("image", 2, 3, 112, 112), torch.tensor(GOLDEN["insightface"]["embedding"]).view(2, 512)
    difference = error(trunk(image), expected)
    assert difference < 1e-4
    trunk.layer3[1].conv1.weight[0] *= 2
    assert error(trunk(image), expected) > 1e-4
    evidence.fidelity(against=f"insightface {rule.COMMITS['iresnet'][:7]} iresnet18", error=difference)


@pytest.mark.parametrize(("variant", "parameters"), [("r18", 24_025_600), ("r34", 34_139_328), ("r50", 43_590_848), ("r100", 65_156_160)])
def test_parameters(variant, parameters):
    with torch.device("meta"):
        trunk = IResNet(3, 112, VARIANTS[variant])
    assert sum(p.numel() for p in trunk.parameters()) == parameters


MARGINS = {"arcface": {"m2": 0.5, "m3": 0.0}, "cosface": {"m2": 0.0, "m3": 0.4}}


@pytest.mark.parametrize("name", MARGINS)
def test_margins_equal_insightface(name, evidence):
    """Logits and gradients, some of them beyond theta + m = pi."""
    cosine, label = rule.cosines()
    assert (cosine.gather(1, label[:, None]) < math.cos(math.pi - 0.5)).any()
    cosine.requires_grad_()
    logits = margin_logits(cosine, label, scale=64.0, **MARGINS[name])
    F.cross_entropy(logits / 16, label).backward()
    golden = {k: torch.tensor(v).view_as(cosine) for k, v in GOLDEN["insightface"][name].items()}
    difference = max(error(logits.detach(), golden["logits"]), error(cosine.grad, golden["gradient"]))
    assert difference < 1e-4
    evidence.fidelity(against=f"insightface {rule.COMMITS['losses'][:7]} {name} logits and gradients", error=difference)
    assert error(margin_logits(cosine.detach(), label, scale=64.0, m2=0.45), golden["logits"]) > 1e-4


@pytest.mark.parametrize("name", MARGINS)
def test_losses_equal_metric_learning(name, evidence):
    x, label = rule.wave("x", rule.BATCH, rule.SIZE).requires_grad_(), torch.arange(rule.BATCH) % rule.CLASSES
    cosine = F.linear(F.normalize(x), F.normalize(rule.wave("w", rule.CLASSES, rule.SIZE)))
    value = F.cross_entropy(margin_logits(cosine, label, scale=16.0, **MARGINS[name]), label)
    value.backward()
    golden = GOLDEN["metric_learning"][name]
    difference = max(error(value.detach(), torch.tensor(golden["loss"])), error(x.grad, torch.tensor(golden["gradient"]).view_as(x)))
    assert difference < 1e-4
    evidence.fidelity(against=f"pytorch-metric-learning {GOLDEN['metric_learning']['version']} {name}", error=difference)


def test_combined_margin_is_equation_4(evidence):
    cosine, label = rule.cosines()
    for m1, m2, m3 in ((1.35, 0.0, 0.0), (1.0, 0.3, 0.2), (0.9, 0.4, 0.15)):
        found = margin_logits(cosine, label, scale=30.0, m1=m1, m2=m2, m3=m3)
        for i, k in enumerate(label.tolist()):
            theta = math.acos(float(cosine[i, k]))
            if m1 == 1 and theta + m2 > math.pi:
                continue
            assert abs(float(found[i, k]) - 30 * (math.cos(m1 * theta + m2) - m3)) < 1e-3
        others = F.one_hot(label, rule.CLASSES) == 0
        assert torch.equal(found[others], 30 * cosine[others])
    evidence.property(
        "the combined margin cos(m1 theta + m2) - m3 moves the true class and no other",
        "组合间隔 cos(m1 theta + m2) - m3 只移动真实类别，不动其他类别",
    )


def test_no_margin_is_the_normalised_softmax(evidence):
    cosine, label = rule.cosines()
    torch.testing.assert_close(margin_logits(cosine, label, scale=16.0, m2=0.0), 16.0 * cosine)
    evidence.property("with m1 = 1, m2 = m3 = 0 the logits are s times the cosines", "m1 = 1、m2 = m3 = 0 时，logits 等于 s 乘以余弦")


def test_the_target_falls_with_the_angle(evidence):
    """From 0 to pi, beyond pi - m too, where the cosine of the moved angle would rise again."""
    theta = torch.linspace(0, math.pi, 500)
    target = margin_logits(theta.cos()[:, None], torch.zeros(500, dtype=torch.long), scale=1.0)[:, 0]
    assert (target.diff() < 1e-6).all() and target.isfinite().all()
    assert target[0] < 1 - 0.1 and abs(float(target[0]) - math.cos(0.5)) < 2e-3
    evidence.property("the target logit falls from theta = 0 to pi", "目标 logit 从 theta = 0 到 pi 单调下降")


@pytest.mark.parametrize("value", [1.0, -1.0, 1.0 - 1e-8, 1.0000001])
def test_gradients_are_finite_at_the_poles(value, evidence):
    cosine = torch.full((2, 3), value, requires_grad=True)
    for margins in ({"m2": 0.5}, {"m1": 1.35, "m2": 0.0}):
        logits = margin_logits(cosine, torch.tensor([0, 2]), scale=64.0, **margins)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 2])), cosine)
        assert logits.isfinite().all() and gradient.isfinite().all()
    evidence.property(f"logits and gradients are finite at cosine {value}", f"余弦为 {value} 时，logits 和梯度都有限")


def test_unknown_labels_do_not_count():
    model = ArcFace(Representation.plain_spec(1, 3), VARIANTS["test"]).train()
    output = model(torch.randn(4, 1, 32, 32))
    whole = loss(VARIANTS["test"])({k: v[:2] for k, v in output.items()}, {"label": torch.tensor([1, 2])})["loss"]
    some = loss(VARIANTS["test"])(output, {"label": torch.tensor([1, 2, -1, -1])})["loss"]
    torch.testing.assert_close(some, whole)


def test_needs_classes():
    with pytest.raises(InputError, match="fewer than two classes"):
        ArcFace(Representation.plain_spec(1, 1), VARIANTS["test"])


def test_the_last_scale_stays_one():
    torch.manual_seed(0)
    model = ArcFace(Representation.plain_spec(1, 3), replace(VARIANTS["test"], dropout=0.4)).train()
    assert not model.trunk.features.weight.requires_grad and (model.trunk.features.weight == 1).all()
    image = torch.randn(4, 1, 32, 32)
    assert not torch.equal(model(image)["embedding"], model(image)["embedding"]), "dropout is drawn anew"
    assert torch.equal(model.eval()(image)["embedding"], model(image)["embedding"])


def test_pulls_classes_together():
    """A few steps on two clouds: the angle to the centres falls, with the margin below that without."""
    angles = []
    for m2 in (0.0, 0.5):
        torch.manual_seed(0)
        config = replace(VARIANTS["test"], m2=m2)
        model = ArcFace(Representation.plain_spec(1, 2), config).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        label = torch.tensor([0, 1] * 8)
        image = 0.5 * torch.randn(16, 1, 32, 32) + label.view(-1, 1, 1, 1).float()
        for _ in range(40):
            terms = loss(config)(model(image), {"label": label})
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
        angles.append(float(terms["angle"]))
    assert angles[1] < angles[0] < 60
