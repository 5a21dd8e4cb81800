"""Curve-GCN's mechanisms, each against another way to compute it: there is no public implementation of the authors to compare with."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from paperworks.data.outlines import rasterised, signed_area
from paperworks.papers.shape.curve_gcn.claim import CLAIM
from paperworks.papers.shape.curve_gcn.curve_gcn import (
    VARIANTS,
    CurveGCN,
    Direct,
    GraphConv,
    GraphResNet,
    Render,
    accuracy,
    at,
    best_shift,
    catmull_rom,
    cells,
    circle,
    correct,
    loss,
    matched,
    point_matching,
    polygon,
    ring,
)
from paperworks.tasks.contours import SAMPLES, Contours
from peers import relative

TEST = VARIANTS["test"]


def noisy(seed: int = 0, points: int = 12, batch: int = 2, by: float = 0.06) -> Tensor:
    """Rings that are not round, B N 2."""
    generator = torch.Generator().manual_seed(seed)
    return circle(points) + by * torch.randn(batch, points, 2, generator=generator)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def network() -> CurveGCN:
    """With weights that move points."""
    torch.manual_seed(0)
    net = CurveGCN(1, TEST)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net.eval()


# The spline


def test_spline_against_scipy(evidence):
    """A Catmull-Rom spline is the cubic Hermite spline whose tangents are those of the parabola through three knots."""
    points, each = noisy(), 7
    ours = catmull_rom(points.double(), each)
    theirs = []
    for p in points.double().numpy():
        closed = np.concatenate([p[-2:], p, p[:4]])
        t = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1) ** 0.5)])
        slope = np.diff(closed, axis=0) / np.diff(t)[:, None]
        tangent = slope[:-1] + slope[1:] - (closed[2:] - closed[:-2]) / (t[2:] - t[:-2])[:, None]
        spline = CubicHermiteSpline(t[1:-1], closed[1:-1], tangent)
        places = np.concatenate([t[i] + (t[i + 1] - t[i]) * np.arange(each) / each for i in range(2, 2 + len(p))])
        theirs.append(torch.from_numpy(spline(places)))
    error = relative(ours, torch.stack(theirs))
    assert error < 1e-9
    off = points.double().clone()
    off[0, 3, 0] += 1e-3
    assert relative(catmull_rom(off, each), torch.stack(theirs)) > 1e-4, "a moved knot shows"
    evidence.fidelity("scipy CubicHermiteSpline (closed centripetal Catmull-Rom)", error)


def test_curves_pass_through_their_points_and_have_no_seam(evidence):
    points = noisy()
    for curve in (catmull_rom, polygon):
        assert torch.allclose(curve(points, 5)[:, ::5], points, atol=1e-5)
        assert torch.allclose(curve(points.roll(3, 1), 5), curve(points, 5).roll(15, 1), atol=1e-5)
    assert torch.allclose(polygon(points, 2)[:, 1::2], (points + points.roll(-1, 1)) / 2)
    evidence.property(
        "spline and polygon pass through every control point, and turn with the ring: there is no seam",
        "样条和多边形经过每个控制点，并随环一起旋转：没有接缝",
    )


def test_knots_are_constants_to_the_gradient():
    """The spline is then linear in the points, so that the gradient of its sum is that of weights that sum to 1 at each sample."""
    points = noisy().requires_grad_()
    out = catmull_rom(points, 4)
    (gradient,) = torch.autograd.grad(out[..., 0].sum(), points)
    assert torch.allclose(gradient[..., 0].sum(1), torch.full((2,), 48.0), atol=1e-4) and not gradient[..., 1].any()
    scaled = torch.autograd.grad((catmull_rom(points, 4) * out.detach()).sum(), points)[0]
    assert torch.isclose((scaled * points).sum(), out.square().sum(), rtol=1e-4)  # Euler: linear, not only homogeneous


def test_coinciding_points_do_no_harm():
    points = noisy()
    points[:, 4] = points[:, 3]
    points.requires_grad_()
    out = catmull_rom(points, 8)
    out.square().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(points.grad).all() and out.abs().max() < 2


# Point matching


def brute(curve: Tensor, truth: Tensor) -> Tensor:
    sums = torch.stack([(curve - truth.roll(-j, 1)).abs().sum((1, 2)) for j in range(curve.shape[1])], 1)
    return sums.min(1).values / curve.shape[1]


@pytest.mark.parametrize("k", [3, 40, 128])
def test_point_matching_is_the_minimum_over_all_shifts(evidence, k):
    curve, truth = torch.rand(2, 5, k, 2, generator=torch.Generator().manual_seed(k))
    theirs = brute(curve, truth)
    for i in range(5):
        assert torch.isclose(point_matching(curve[i : i + 1], truth[i : i + 1]), theirs[i], rtol=1e-5)
    assert torch.isclose(point_matching(curve, truth), theirs.mean(), rtol=1e-5)
    if k == 128:
        evidence.property(
            "point matching loss equals the minimum over all K cyclic shifts by brute force",
            "点匹配损失等于蛮力算出的 K 种循环移位中的最小值",
        )


def test_point_matching_does_not_see_where_a_curve_begins(evidence):
    curve, truth = polygon(noisy(1), 10), polygon(noisy(2), 10)
    for shift in (1, 37, 119):
        assert torch.isclose(point_matching(curve, truth.roll(shift, 1)), point_matching(curve, truth), rtol=1e-5)
        assert torch.equal(best_shift(curve, curve.roll(shift, 1)), torch.tensor([shift, shift]))
        assert torch.equal(matched(curve, curve.roll(shift, 1)), curve)
    assert point_matching(curve, curve.flip(1)) > 0.1, "the other way round is another curve"
    evidence.property(
        "point matching loss is invariant to cyclic shifts and sees the orientation",
        "点匹配损失对循环移位不变，但能分辨方向",
    )


def test_gradient_of_point_matching():
    """Through the best shift only: the sign of each difference."""
    curve, truth = polygon(noisy(1), 3).requires_grad_(), polygon(noisy(2), 3)
    point_matching(curve, truth).backward()
    assert torch.allclose(curve.grad, (curve - matched(curve, truth)).detach().sign() / (2 * 36))


# Graph network


def test_graph_convolution_as_a_sum_over_four_neighbours(evidence):
    torch.manual_seed(0)
    layer, nodes = GraphConv(6, 5), torch.randn(3, 9, 6)
    found = layer(nodes, ring(9))
    rows = []
    for i in range(9):
        near = sum(nodes[:, (i + d) % 9] for d in (-2, -1, 1, 2)) / 4
        rows.append(nodes[:, i] @ layer.w0.weight.T + layer.w0.bias + near @ layer.w1.weight.T + layer.w1.bias)
    error = relative(found, torch.stack(rows, 1))
    assert error < 1e-5
    evidence.fidelity("eq. 3 written out node by node", error)


def test_graph_network_turns_with_its_nodes(evidence):
    torch.manual_seed(0)
    net, nodes, a = GraphResNet(6, 16, 2), torch.randn(2, 10, 6), ring(10)
    assert relative(net(nodes.roll(4, 1), a), net(nodes, a).roll(4, 1)) < 1e-5
    assert relative(net(nodes.flip(1), a), net(nodes, a).flip(1)) < 1e-5
    assert relative(net(nodes[:, torch.randperm(10)], a), net(nodes, a)) > 1e-2, "it is no set"
    evidence.property(
        "graph network is equivariant to cyclic shifts and reversal of the node order", "图网络对节点次序的循环移位和反转等变"
    )


def test_parameter_counts(evidence):
    assert count(GraphResNet(130, 128, 6)) == 438_146
    with torch.device("meta"):
        net = CurveGCN(3, VARIANTS["spline"])
    assert count(net.gcn) == 1_314_438 and count(net.interactive) == 438_146 + 2 * 2 * 128
    small = VARIANTS["small"]
    budget = sum(count(GraphResNet(small.features + 2, small.state, small.residuals)) for _ in range(3))
    control = Direct(small, budget)
    assert abs(count(control) / budget - 1) < 0.02
    evidence.property(
        "438,146 parameters a step and 1,314,438 in three, as counted from the layout of the authors' code by derivatives",
        "一步 438,146 个参数，三步 1,314,438 个，与按作者代码衍生版本的结构数出的一致",
    )


def test_features_are_bilinear_between_cells():
    """A plane is given back exactly, and its slope reaches the points."""
    y, x = torch.meshgrid((torch.arange(8) + 0.5) / 8, (torch.arange(8) + 0.5) / 8, indexing="ij")
    plane = (2 * x - 3 * y)[None, None]
    points = (0.2 + 0.6 * torch.rand(1, 5, 2)).requires_grad_()
    found = at(plane, points)
    assert torch.allclose(found[..., 0], 2 * points[..., 0] - 3 * points[..., 1], atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), points)
    assert torch.allclose(gradient, torch.tensor([2.0, -3.0]).expand(1, 5, 2), atol=1e-5)


def test_a_step_looks_where_its_points_are(network, evidence):
    """Each step sees the features at the positions that the one before left, and gradients reach these positions."""
    features = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    start = circle(16).expand(2, -1, -1).clone().requires_grad_()
    stages = network.moved(features, start)
    second = stages[0] + network.gcn[1](torch.cat([at(features, stages[0]), stages[0]], 2), network.ring)
    assert len(stages) == 2 and torch.equal(stages[1], second)
    (gradient,) = torch.autograd.grad(stages[1].sum(), start)
    assert not torch.allclose(gradient, torch.ones(()).expand_as(gradient)), "a shift of the start moves more than the start"
    turned = network.moved(features, start.roll(5, 1))[-1]
    assert relative(turned, stages[-1].roll(5, 1)) < 1e-5
    evidence.property(
        "each step samples features at its own points; the whole automatic network is equivariant to cyclic shifts of the nodes",
        "每一步在自己的点上采样特征；整个自动网络对节点次序的循环移位等变",
    )


def test_start():
    start = circle(40)
    assert torch.allclose((start - 0.5).norm(dim=1), torch.full((40,), 0.35)) and signed_area(start.double().numpy()) > 0


# Differentiable accuracy loss


def test_rendered_mask_is_the_polygon(evidence):
    """Also where the fan's triangles lie outside of a polygon that is not convex."""
    for seed in range(3):
        points = noisy(seed, points=20, batch=1, by=0.03) * 48
        mask = Render.apply(points, 48)[0]
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert (mask.numpy() != rasterised(points[0].double().numpy(), (48, 48))).sum() <= 1
    star = circle(20) * 1.0
    star[::2] = 0.5 + 0.35 * (star[::2] - 0.5)
    mask = Render.apply(star[None] * 48, 48)[0]
    assert (mask.numpy() != rasterised(star.double().numpy() * 48, (48, 48))).sum() <= 1
    evidence.property(
        "the triangle fan renders polygons as matplotlib's point-in-polygon test does, convex or not",
        "三角扇渲染多边形的结果与 matplotlib 的点在多边形内的判定一致，凸或凹都成立",
    )


def test_gradient_of_the_rendered_area(evidence):
    """With equal weights everywhere it is the derivative of the shoelace formula."""
    points = (noisy(3, points=10, batch=1, by=0.03) * 320).requires_grad_()
    Render.apply(points, 320).sum().backward()
    ahead, behind = points.detach().roll(-1, 1), points.detach().roll(1, 1)
    exact = 0.5 * torch.stack([ahead[..., 1] - behind[..., 1], behind[..., 0] - ahead[..., 0]], 2)
    assert relative(points.grad, exact) < 0.03
    evidence.property(
        "first-order gradients of the renderer: within 3 % of the derivative of the area",
        "渲染器的一阶梯度：与面积的导数相差不到 3 %",
    )


def test_gradient_of_the_accuracy_loss_by_finite_differences(evidence):
    """Against differences of the loss over two pixels either way, for every coordinate of a polygon that is off."""
    truth = torch.from_numpy(rasterised((circle(32) * 160).double().numpy(), (160, 160))).float()[None]
    points = ((0.5 + 1.15 * (circle(8) - 0.5)) + torch.tensor([0.02, -0.03]))[None].requires_grad_()
    accuracy(points, truth, "polygon").backward()
    numeric = torch.zeros_like(points)
    step = 2 / 160
    for i in range(8):
        for axis in range(2):
            moved = points.detach().clone()
            values = []
            for sign in (1, -1):
                moved[0, i, axis] = points[0, i, axis].item() + sign * step
                values.append(float(accuracy(moved, truth, "polygon")))
            numeric[0, i, axis] = (values[0] - values[1]) / (2 * step)
    assert relative(points.grad, numeric) < 0.05
    evidence.property(
        "gradients of the differentiable accuracy loss agree with finite differences of the rendered mask",
        "可微精度损失的梯度与渲染掩码的有限差分一致",
    )


def test_accuracy_loss_pulls_a_circle_onto_an_object(evidence):
    """And leaves it there: edges that triangles share must not push."""
    truth = torch.from_numpy(rasterised((0.5 + 0.7 * (circle(32) - 0.5) + 0.08).double().numpy() * 64, (64, 64))).float()[None]
    points = circle(12)[None].clone().requires_grad_()
    first = float(accuracy(points, truth, "spline").detach())
    for _ in range(100):
        (gradient,) = torch.autograd.grad(accuracy(points, truth, "spline"), points)
        points = (points - 0.05 * gradient).detach().requires_grad_()
    assert float(accuracy(points, truth, "spline").detach()) < 0.03 * first
    evidence.property(
        "gradient descent on the accuracy loss alone puts a circle onto an object and keeps it there",
        "只用精度损失做梯度下降，就能把圆贴到目标上并停在那里",
    )


def test_degenerate_polygons_have_gradients():
    points = torch.tensor([[[5.0, 5], [5, 5], [20, 5], [20, 5], [12, 5], [12, 20]]], requires_grad=True)
    Render.apply(points, 24).sum().backward()
    assert torch.isfinite(points.grad).all()


# Branches


def test_targets_of_the_branches():
    points = torch.tensor([[[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [1.4, -0.2]]])
    chosen = torch.tensor([[True, True, False, True]])
    found = cells(points, chosen, 4)
    assert found.shape == (1, 1, 4, 4) and found.nonzero()[:, 2:].tolist() == [[0, 0], [0, 3]]


# Interaction


def test_a_correction_moves_the_neighbours_only(network, evidence):
    image = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    points = noisy(0, points=16, batch=1)[0]
    found = correct(network, image, points, 15, (0.9, 0.4))
    moved = (found != points).any(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 13, 14, 15] and torch.allclose(found[15], torch.tensor([0.9, 0.4]))
    other = correct(network, image, points, 15, (0.9, 0.5))
    assert not torch.equal(other[0], found[0]), "the neighbours see the shift"
    turned = correct(network, image, points.roll(3, 0), 2, (0.9, 0.4))
    assert relative(turned, found.roll(3, 0)) < 1e-5
    evidence.property(
        "a correction leaves the dragged point where it was put, moves k = 2 neighbours on each side, and no other point",
        "一次修正让被拖动的点留在所放之处，移动两侧各 k = 2 个邻居，不动其他点",
    )


def test_simulated_corrections_take_the_worst_point(network):
    """The point that lies farthest from its place on the true curve goes there, and what is left gets smaller."""
    features = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    outline = polygon(circle(16)[None], SAMPLES // 16)
    points = circle(16)[None].clone()
    points[0, 6] += torch.tensor([0.2, 0.1])
    with torch.no_grad():
        stages = network.simulated(features, points, outline)
    assert torch.allclose(stages[0, 0, 6], circle(16)[6], atol=0.02)
    assert torch.equal(stages[0, 0, 9:], points[0, 9:])


def test_the_automatic_network_does_not_learn_from_corrections(evidence):
    """Paper: the interactive network is trained with the automatic one left as it is."""
    torch.manual_seed(0)
    net = CurveGCN(1, TEST).train()
    batch = Contours.plain_batch(net, Contours.plain_spec(1))
    output = net(batch["image"], batch["outline"])
    (100 * point_matching(catmull_rom(output["corrected"][:, 0], 4), batch["outline"][:, ::20])).backward()
    touched = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"interactive"}
    evidence.property("gradients of simulated corrections reach the interactive network only", "模拟修正的梯度只到达交互网络")


# Network


def test_a_few_steps_of_training_lower_every_term():
    torch.manual_seed(0)
    config = replace(TEST, rendering=1.0)
    net = CurveGCN(1, config).train()
    batch = Contours.plain_batch(net, Contours.plain_spec(1), batch=4)
    optimizer, terms = torch.optim.Adam(net.parameters(), 5e-3), []
    for _ in range(40):
        found = loss(config)(net(batch["image"], batch["outline"]), batch)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        terms.append({k: float(v.detach()) for k, v in found.items()})
    assert {"matching", "interactive", "edge", "vertex", "accuracy"} < set(terms[0])
    assert all(terms[-1][key] < terms[0][key] for key in ("loss", "matching", "edge", "vertex", "accuracy"))


def test_claim_counts_what_it_says():
    assert math.isclose(sum(CLAIM.seeds), 3) and CLAIM.control in CLAIM.arms
