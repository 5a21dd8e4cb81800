"""LLAE against scipy's Sylvester solver in the loop of the official demonstration, the Kronecker form, autograd and the closed form of SAE."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch
from scipy.linalg import solve_sylvester as peer
from torch import Tensor

from paperworks.papers.relation.lowrank_cold_start.lowrank_cold_start import (
    PAPER,
    VARIANTS,
    Config,
    beyond_rank,
    corrupted,
    llae,
    objective,
    solve,
    solve_sylvester,
    spectrum,
    unseen_by_attributes,
    unseen_by_features,
)
from paperworks.tasks.recommendation import Recommendation, average_precision, nearest

EXACT = Config(encoder_weight=0.3, beta=5.0, rank=2, corruption=0.0)


def drawn(d: int, k: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Behaviour d N and attributes k N, correlated and centred."""
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(k, n, generator=generator, dtype=torch.float64)
    X = torch.randn(d, k, generator=generator, dtype=torch.float64) @ S + torch.randn(d, n, generator=generator, dtype=torch.float64)
    return X - X.mean(1, keepdim=True), S - S.mean(1, keepdim=True)


def demonstration(X: np.ndarray, S: np.ndarray, Xc: np.ndarray, weight: float, beta: float, rank: int, ridge: float) -> np.ndarray:
    """The official demonstration's loop (awa_demo.m) in numpy and scipy, beta and ridge absolute."""
    k = len(S)
    first = S @ S.T + ridge * np.eye(k)
    A = first
    for _ in range(5):
        W = peer(A, weight * Xc @ Xc.T, S @ X.T + weight * S @ Xc.T)
        V = np.linalg.svd(W @ W.T)[0]
        A = first + beta * (np.eye(k) - V[:, :rank] @ V[:, :rank].T)
    return W


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("d", "n"), [(12, 40), (40, 12)], ids=["more entities than items", "more items than entities"])
def test_like_the_demonstration_solved_by_scipy(evidence, d: int, n: int) -> None:
    """With dropped entries, the same for both, and a rank below that of the attributes."""
    X, S = drawn(d, 6, n)
    config = replace(EXACT, corruption=0.2)
    scale = float(S.square().sum() / 6)
    torch.manual_seed(3)
    found = llae(X, S, config)
    torch.manual_seed(3)
    Xc = corrupted(X.T, config.corruption).T.numpy()
    given = {"weight": config.encoder_weight, "beta": config.beta * scale, "rank": 2, "ridge": config.ridge * scale}
    expected = torch.from_numpy(demonstration(X.numpy(), S.numpy(), Xc, **given))
    relative = error(found, expected)
    assert relative < 1e-8
    assert error(llae(X, S, replace(config, rank=3)), expected) > 1e-3, "another rank is another W"
    evidence.fidelity(
        against=f"scipy {scipy.__version__} solve_sylvester in the loop of lijin118/LLAE awa_demo.m, {d} items", error=relative
    )


def test_kronecker_form(evidence) -> None:
    """vec(A W + W B) = (I kron A + B^T kron I) vec W."""
    X, S = drawn(5, 3, 9)
    A, B, C = S @ S.T, 0.3 * X @ X.T, S @ X.T
    b, Q = spectrum(X)
    found = solve_sylvester(A, 0.3 * b, Q, C)
    system = torch.kron(torch.eye(5, dtype=A.dtype), A) + torch.kron(B.T.contiguous(), torch.eye(3, dtype=A.dtype))
    expected = torch.linalg.solve(system, C.T.reshape(-1)).reshape(5, 3).T
    assert error(found, expected) < 1e-10
    evidence.property(
        "The Sylvester equation's solution is that of its Kronecker form on small matrices",
        "小矩阵上，Sylvester 方程的解与其 Kronecker 形式的解相同",
    )


def test_gradient_is_zero_at_the_solution(evidence) -> None:
    X, S = drawn(12, 6, 40)
    scale = float(S.square().sum() / 6)
    U = beyond_rank(llae(X, S, replace(EXACT, iterations=4)), 2)
    W = llae(X, S, EXACT).requires_grad_()

    def value(W: Tensor) -> Tensor:
        fit = (X - W.T @ S).square().sum() + EXACT.encoder_weight * (W @ X - S).square().sum()
        return fit + EXACT.beta * scale * (W.T @ U @ W).trace() + EXACT.ridge * scale * W.square().sum()

    value(W).backward()
    near = W.grad.norm()
    other = (W.detach() * 1.01).requires_grad_()
    value(other).backward()
    assert near < 1e-9 * other.grad.norm()
    evidence.property(
        "With U fixed, autograd's gradient of the objective is zero at the solution",
        "固定 U 时，自动微分得到的目标函数梯度在解处为零",
    )


def test_loss_is_the_objective_over_the_entities(evidence) -> None:
    """After many iterations U belongs to its W. Then the loss of a batch of all entities has its minimum there, by autograd too."""
    X, S = drawn(12, 6, 40)
    config = replace(EXACT, iterations=200)
    torch.manual_seed(0)
    network = PAPER.build(Recommendation.plain_spec(6, 12), config).double()
    batch = {"behaviour": X.T + 0.4, "attributes": S.T - 0.3}
    solve(config)(network, [{key: value[:15] for key, value in batch.items()}, {key: value[15:] for key, value in batch.items()}])
    torch.testing.assert_close(network.popularity, torch.full((12,), 0.4, dtype=torch.float64))

    def loss() -> Tensor:
        return objective(config)(network(batch["attributes"], batch["behaviour"]), batch)["loss"]

    loss().backward()
    at_minimum, lowest = network.weight.grad.norm(), float(loss().detach())
    network.weight.data *= 1.01
    network.zero_grad()
    loss().backward()
    assert at_minimum < 1e-4 * network.weight.grad.norm()
    for seed in range(3):
        network.weight.data += 0.01 * torch.randn(6, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert float(loss().detach()) > lowest
    evidence.property(
        "The loss of all entities has its minimum, and no gradient, where the solver ends",
        "求解器停下之处，全部实体的损失取最小值，梯度为零",
    )


def test_sae_is_its_closed_form(evidence) -> None:
    """No low rank and nothing dropped: one equation (Kodirov et al., 2017). The rank does not matter then, nor does beta at full rank."""
    X, S = drawn(12, 6, 40)
    sae = replace(EXACT, beta=0.0, ridge=0.0)
    expected = torch.from_numpy(peer((S @ S.T).numpy(), 0.3 * (X @ X.T).numpy(), 1.3 * (S @ X.T).numpy()))
    assert error(llae(X, S, sae), expected) < 1e-10
    assert error(llae(X, S, replace(EXACT, rank=6, ridge=0.0)), expected) < 1e-10
    assert VARIANTS["sae"].beta == VARIANTS["sae"].corruption == 0.0
    evidence.property(
        "Without low rank and dropped entries it is the closed form of SAE, and a full rank takes beta out",
        "不用低秩、不丢弃条目时即 SAE 的闭式解；满秩时 beta 不起作用",
    )


def test_low_rank(evidence) -> None:
    """U picks what lies beyond the first r singular vectors; a large beta takes it out; refreshing U lowers the objective."""
    W = drawn(12, 6, 40)[0][:6]
    U = beyond_rank(W, 2)
    torch.testing.assert_close((W.T @ U @ W).trace(), torch.linalg.svdvals(W)[2:].square().sum())
    assert torch.linalg.matrix_rank(U) == 4 and torch.allclose(U @ U, U)
    X, S = drawn(12, 6, 40)
    tails = [float(torch.linalg.svdvals(llae(X, S, replace(EXACT, beta=beta)))[2:].square().sum()) for beta in (0.0, 1.0, 100.0)]
    assert tails[0] > tails[1] > tails[2] and tails[2] < 1e-2 * tails[0]

    def value(W: Tensor) -> float:
        tail = torch.linalg.svdvals(W)[2:].square().sum() * EXACT.beta * S.square().sum() / 6
        return float((X - W.T @ S).square().sum() + EXACT.encoder_weight * (W @ X - S).square().sum() + tail)

    values = [value(llae(X, S, replace(EXACT, iterations=n, ridge=0.0))) for n in range(1, 8)]
    assert values == sorted(values, reverse=True)
    evidence.property(
        "The punished part is the sum of squared singular values beyond the rank; every iteration lowers the objective",
        "被惩罚的部分是秩以外奇异值的平方和；每一轮迭代都使目标下降",
    )


def test_dropped_entries() -> None:
    """The same number in every row, and the encoder alone sees them missing."""
    torch.manual_seed(0)
    rows = corrupted(torch.ones(400, 41), 0.05)
    assert (rows == 0).sum(1).tolist() == [2] * 400 and (rows == 0).any(0).all()
    assert torch.equal(corrupted(rows, 0.0), rows)
    network = PAPER.build(Recommendation.plain_spec(3, 40), replace(EXACT, corruption=0.5))
    attributes, behaviour = torch.randn(4, 3), torch.ones(4, 40)
    trained, used = network.train()(attributes, behaviour), network.eval()(attributes, behaviour)
    assert torch.equal(trained["scores"], used["scores"]) and not torch.equal(trained["code"], used["code"])
    torch.testing.assert_close(used["code"], behaviour @ network.weight.T)
    assert set(network(attributes)) == {"scores"}


def test_scores_are_decoded_attributes_and_popularity() -> None:
    X, S = drawn(12, 6, 40)
    network = PAPER.build(Recommendation.plain_spec(6, 12), EXACT)
    solve(EXACT)(network, [{"behaviour": X.T.float() + 0.4, "attributes": S.T.float() - 0.3}])
    expected = S.T.float() @ llae(X, S, EXACT).float() + 0.4
    assert error(network(S.T.float() - 0.3)["scores"].detach(), expected) < 1e-5


def test_rank_follows_the_attributes() -> None:
    assert Config().rank_of(85) == 36 and Config().rank_of(38) == 16 and Config().rank_of(1) == 1
    assert Config(rank=10).rank_of(4) == 4


def planted(seed: int, rank: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices that follow a map of low rank from forty attributes of chance; the second half are cold."""
    generator = torch.Generator().manual_seed(seed)
    S = (torch.rand(300, 40, generator=generator) < 0.3).double()
    taste = torch.randn(40, rank, generator=generator).double() @ torch.randn(rank, 120, generator=generator).double()
    noise = 3 * torch.randn(300, 120, generator=generator).double()
    X = (S - S.mean(0)) @ taste + noise
    X = (X.topk(12, dim=1).values[:, -1:] <= X).double()
    return S[:150], X[:150], S[150:], X[150:]


def test_planted_low_rank_is_found(evidence) -> None:
    """On data of that kind, the right rank ranks better than the full one, and both better than popularity."""
    means = {}
    for name, config in {"llae": Config(rank=4, beta=10.0), "sae": VARIANTS["sae"]}.items():
        values = []
        for seed in range(3):
            S, X, new, chosen = planted(seed)
            torch.manual_seed(0)
            W = llae((X - X.mean(0)).T, (S - S.mean(0)).T, config)
            scores = (new - S.mean(0)) @ W + X.mean(0)
            values.append(sum(average_precision(s.float(), c.float()) for s, c in zip(scores, chosen)) / len(new))
            means.setdefault("popularity", []).append(sum(average_precision(X.mean(0).float(), c.float()) for c in chosen) / len(new))
        means[name] = values
    assert all(a > b for a, b in zip(means["llae"], means["sae"])) and min(means["sae"]) > max(means["popularity"])
    evidence.property(
        "On choices with a planted map of rank 4, LLAE of rank 4 ranks cold entities better than SAE, on three draws of three",
        "选择数据中植入秩为 4 的映射时，秩为 4 的 LLAE 对冷启动实体的排序优于 SAE，三次抽取都如此",
    )


def test_zero_shot_classes(evidence) -> None:
    """Classes of which no image was seen are told apart by their attributes alone, in both spaces."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.rand(30, 12, generator=generator, dtype=torch.float64)
    basis = torch.randn(12, 50, generator=generator, dtype=torch.float64)
    label = torch.arange(30).repeat_interleave(20)
    features = (classes - classes.mean(0))[label] @ basis + 0.5 * torch.randn(600, 50, generator=generator, dtype=torch.float64)
    seen = label < 20
    centre = classes[:20].mean(0)
    W = llae(features[seen].T, (classes[label[seen]] - centre).T, Config(rank=10))
    truth = label[~seen] - 20
    for scores in (unseen_by_attributes, unseen_by_features):
        found = scores(W, features[~seen], classes[20:] - centre)
        assert found.shape == (200, 10) and found.abs().max() <= 1 + 1e-9
        assert (found.argmax(1) == truth).double().mean() > 0.8
    evidence.property(
        "Zero-shot: ten unseen classes of synthetic features are recognised by their attributes, in either space",
        "零样本：合成特征的十个未见类别可凭属性识别，在两个空间中都成立",
    )


def test_nearest_neighbours_are_a_fair_peer() -> None:
    """The claim's baseline sees the same centred attributes."""
    S, X, new, _ = planted(0)
    assert nearest((S - S.mean(0)).float(), X.float())((new[0] - S.mean(0)).float()).shape == (120,)
