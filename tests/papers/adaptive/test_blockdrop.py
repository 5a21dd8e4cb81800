"""BlockDrop against numbers of the official code, and its learning rule by enumeration."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.papers.adaptive.blockdrop.blockdrop import IMAGENET, VARIANTS, BlockDrop, Config, Pooled, recipe, reward, self_critical

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "blockdrop.json").read_text())
TINY = Config(counts=(1, 2, 1), width=8, policy_width=4, stem="laptop")


def built(config: Config, side: int = 32, classes: int = 10) -> BlockDrop:
    torch.manual_seed(0)
    return BlockDrop(3, classes, side, config).eval()


def ours(official: dict[str, torch.Tensor], counts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The official names mapped to ours; the value head, and classifiers that nothing reads, are dropped."""
    parts = {"conv1": "branch.0", "bn1": "branch.1", "conv2": "branch.3", "bn2": "branch.4", "conv3": "branch.6", "bn3": "branch.7"}
    state = {}
    for name, value in official.items():
        network, rest = name.split(".", 1)
        prefix, each = ("policy.trunk.", (1,) * len(counts)) if network == "policy" else ("trunk.", counts)
        rest = rest.removeprefix("features.")
        if found := re.match(r"(blocks|ds)\.(\d)\.(.+)", rest):
            kind, stage, rest = found.groups()
            first = sum(each[: int(stage)])
            if kind == "blocks":
                at, part, rest = rest.split(".", 2)
                state[f"{prefix}blocks.{first + int(at)}.{parts[part]}.{rest}"] = value
            else:
                state[f"{prefix}blocks.{first}.shortcut.{rest}"] = value
        elif rest.startswith(("conv1", "bn1")):
            state[prefix + rest.replace("conv1", "stem.0").replace("bn1", "stem.1")] = value
        elif not rest.startswith("vnet"):
            state[rest.replace("logit", "policy.decide").replace("fc", "head")] = value
    return state


def images(count: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(count, 3, 32, 32) + torch.linspace(-2, 2, count)[:, None, None, None]


def lively(network: BlockDrop) -> BlockDrop:
    """A policy that depends on the image."""
    torch.manual_seed(5)
    nn.init.normal_(network.policy.decide.weight, 0, 4)
    with torch.no_grad():
        network.policy.decide.bias -= network.policy.eval()(images(8)).logit(1e-6).mean(0)
    return network


# --- Sizes


@pytest.mark.parametrize("name", FIXTURE["parameters"])
def test_parameters_are_the_official_ones_less_the_value_head(name):
    config, known = VARIANTS[name], FIXTURE["parameters"][name]
    side = int(config.image_size)
    with torch.device("meta"):
        net = built(config, side, classes=1000 if side == 224 else 10)
    assert sum(p.numel() for p in net.parameters()) == known["resnet"] + known["policy"] - known["value_head"]


def test_operations_of_the_readmes_result(evidence):
    """The official README: 16.933 of ResNet-110's 54 blocks and 1.81E+08 operations (two a multiply-add); here with all three strided blocks or none."""
    with torch.device("meta"):
        net, x = built(VARIANTS["resnet110"]), torch.zeros(1, 3, 32, 32)
        cost = {}
        calls = {"policy": lambda: net.policy(x), "stem": lambda: net.trunk.stem(x), "block": lambda: net.trunk.blocks[1].branch(x.new_zeros(1, 16, 32, 32)),
                 "strided": lambda: net.trunk.blocks[18].branch(x.new_zeros(1, 16, 32, 32)), "all": lambda: net.train()(x.repeat(2, 1, 1, 1), torch.ones(2, 54))}  # fmt: skip
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            cost[name] = counter.get_total_flops()
    most = cost["policy"] + cost["stem"] + 16.933 * cost["block"]
    least = most - 2 * (cost["block"] - cost["strided"])
    assert least < 1.81e8 < most and most / least < 1.03
    assert cost["all"] / 4e9 == pytest.approx(0.253, rel=0.02)
    assert 0.01 < cost["policy"] / (cost["all"] / 2) < 0.055
    evidence.property(
        "operations of ResNet-110 with 16.933 blocks and the policy network: the official README's 1.81E+08 is between all strided blocks and none",
        "ResNet-110 的 16.933 个块加策略网络的运算量：官方 README 的 1.81E+08 介于含全部带步长的块与一个不含之间",
    )


# --- The official code


@torch.inference_mode()
@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_and_probabilities_equal_the_official_code(evidence, name):
    draw = runpy.run_path(str(FIXTURES / "blockdrop_record.py"))["draw"]
    golden = FIXTURE["networks"][name]
    config = Config(counts=(2, 2, 3, 2), **IMAGENET) if name == "imagenet" else Config(counts=(2, 3, 2))
    side = int(config.image_size)
    net = built(config, side, classes=7)
    state = ours({key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}, config.counts)
    net.load_state_dict(state | {"decided": net.decided})
    image, expected = draw("image", (4, 3, side, side)), torch.tensor(golden["logits"])
    probabilities = torch.tensor(golden["probabilities"])
    errors = [float((net.policy(image) - probabilities).norm() / probabilities.norm())]
    found = net(image)
    assert torch.equal(found["gates"], (probabilities >= 0.5).float()) and len(found["gates"].unique(dim=0)) > 1
    errors.append(float((found["logits"].flatten() - expected).norm() / expected.norm()))
    assert max(errors) < TOLERANCE
    net.trunk.stem[0].weight *= 1.1
    assert float((net(image)["logits"].flatten() - expected).norm() / expected.norm()) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}: policy and logits", error=max(errors))


@torch.inference_mode()
def test_shortcut_without_parameters():
    x = torch.randn(2, 4, 6, 6)
    y = Pooled(4, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3) and not y[:, 4:].any()
    torch.testing.assert_close(y[:, :4], x.unflatten(2, (3, 2)).unflatten(4, (3, 2)).mean((3, 5)))
    assert not list(Pooled(4, 8, 2).parameters())


# --- Dropping


@torch.inference_mode()
def test_dropping_is_real_and_an_exported_network_gives_the_same(monkeypatch, evidence):
    net, image = lively(built(TINY)), images(8)
    output = net(image)
    assert len(output["gates"].unique(dim=0)) > 1
    alone = []
    for one in image:
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(net(one[None])["logits"][0], output["logits"][len(alone)], atol=1e-5, rtol=1e-4)
        alone.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        net(image)
    assert counter.get_total_flops() == sum(alone) and len(set(alone)) > 1
    costs = []
    for count in range(5):
        with FlopCounterMode(display=False) as counter:
            net(image[:1], (torch.arange(4) < count).float()[None])
        costs.append(counter.get_total_flops())
    assert costs == sorted(set(costs))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with FlopCounterMode(display=False) as counter:
        written = net(image)
    assert counter.get_total_flops() > sum(alone)
    torch.testing.assert_close(written, output)
    evidence.property(
        "dropping is real: counted operations are those of kept blocks, alone and in a batch; an exported graph computes all, same outputs",
        "丢弃是真的：无论单张图还是批次，统计到的运算量就是保留块的运算量；导出的图计算全部块，输出相同",
    )


@torch.inference_mode()
def test_with_all_blocks_it_is_the_plain_network(evidence):
    net, image = built(TINY), images(2)
    x = net.trunk.stem(image)
    for block in net.trunk.blocks:
        x = F.relu(block.shortcut(x) + block.branch(x))
    torch.testing.assert_close(net(image, torch.ones(2, 4))["logits"], net.head(x.mean((2, 3))))
    evidence.property("a policy of ones is the plain residual network", "策略全为一时就是普通残差网络")


# --- Learning


def test_reward_is_equation_3(evidence):
    logits = torch.eye(4)
    gates = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    found = reward(logits, torch.tensor([0, 1, 2, 0]), gates, torch.tensor(-5.0))
    torch.testing.assert_close(found, torch.tensor([0, 1 - 1 / 16, 1, -5]))
    evidence.property(
        "reward: 1 - (share of blocks)^2 where right, the penalty where wrong",
        "奖励：预测正确时为 1 - (块的占比)^2，错误时为惩罚",
    )


def test_the_expected_update_is_the_gradient_of_the_expected_reward(monkeypatch, evidence):
    """All sixteen paths of four blocks, weighted by their probabilities: the self-critical baseline changes nothing on average."""
    config = replace(TINY, entropy_weight=0.0, phases=(0.0, 1.0))
    net, label = lively(built(config)).train(), torch.tensor([3, 8])
    net.advance(0.9)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    image, parameters = images(2), list(net.policy.parameters())
    logits = torch.randn(2**4, 10, generator=torch.Generator().manual_seed(1))
    code = 2 ** torch.arange(4.0)
    monkeypatch.setattr(net, "classified", lambda image, gates: logits[(gates @ code).long()])
    label = logits[11].argmax().expand(2)  # so that some paths are right
    objective, estimate, total = torch.zeros(()), [torch.zeros_like(p) for p in parameters], 0.0
    for path in itertools.product((0.0, 1.0), repeat=4):
        monkeypatch.setattr(torch, "bernoulli", lambda p, path=path: torch.tensor(path).expand_as(p))
        output = net(image)
        assert output["gates"].tolist() == [list(path)] * 2
        probability = output["log_probability"].exp()  # of each image
        total += float(probability.detach().mean())
        earned = reward(output["logits"], label, output["gates"], torch.tensor(-1.0))
        objective = objective - (probability * earned).mean()
        advantage = self_critical(config)({**output, "log_probability": probability.detach() * output["log_probability"]}, {"label": label})
        gradient = torch.autograd.grad(advantage["loss"], parameters, retain_graph=True)
        estimate = [e + g for e, g in zip(estimate, gradient)]
    assert total == pytest.approx(1, abs=1e-5)
    flat, true = (torch.cat([t.flatten() for t in ts]) for ts in (estimate, torch.autograd.grad(objective, parameters)))
    error = float((flat - true).norm() / true.norm())
    assert true.norm() > 1e-4 and error < TOLERANCE
    evidence.fidelity(against="the gradient of the expected reward, all paths of four blocks enumerated", error=error)


def test_policy_loss_by_hand(evidence):
    output = {
        "logits": torch.tensor([[2.0, 0], [2, 0]]), "gates": torch.tensor([[1.0, 0], [1, 1]]), "log_probability": torch.tensor([-0.5, -0.7]),
        "entropy": torch.tensor([0.3, 0.5]), "critic_logits": torch.tensor([[2.0, 0], [0, 2]]), "critic_gates": torch.ones(2, 2), "penalty": torch.tensor(-1.0),
    }  # fmt: skip
    label = torch.tensor([0, 1])
    terms = self_critical(Config(entropy_weight=0.1))(output, {"label": label})
    policy = -(-0.5 * (0.75 - 0) + -0.7 * (-1 - 0)) / 2
    assert float(terms["policy"]) == pytest.approx(policy)
    assert float(terms["loss"]) == pytest.approx(float(F.cross_entropy(output["logits"], label)) + policy - 0.04, rel=1e-5)
    evidence.property(
        "policy loss: -log pi(u) (R(u) - R(likeliest u)), less the weighted entropy term",
        "策略损失：-log pi(u) (R(u) - R(最可能的 u))，减去加权的熵项",
    )


def test_probabilities_are_bounded_while_they_are_explored(monkeypatch):
    net = built(TINY).train()
    nn.init.constant_(net.policy.decide.bias, 50.0)
    seen = []
    monkeypatch.setattr(torch, "bernoulli", lambda p: (seen.append(p), torch.zeros_like(p))[1])
    output = net(images(4))
    torch.testing.assert_close(seen[0], torch.full((4, 4), 0.8))
    torch.testing.assert_close(output["log_probability"], 4 * torch.full((4,), 0.2).log(), rtol=1e-4, atol=1e-4)
    assert output["critic_gates"].eq(1).all()  # the likeliest decisions are those of s itself


def test_phases_and_curriculum(evidence):
    net, batch = built(replace(TINY, phases=(0.2, 0.6))), {"label": torch.arange(6)}
    loss, image = self_critical(TINY), images(6)
    decided = {}
    for share in (0.0, 0.19, 0.2, 0.26, 0.31, 0.36, 0.4, 0.59, 0.6, 0.99):
        net.train()
        net.advance(share)
        decided[share] = int(net.decided)
        net.zero_grad()
        state = {k: v.clone() for k, v in net.trunk.state_dict().items() if "running" in k}
        output = net(image)
        loss(output, batch)["loss"].backward()
        learns = [any(p.grad is not None and bool(p.grad.any()) for p in part.parameters()) for part in (net.trunk, net.policy)]
        moved = any(not torch.equal(v, net.trunk.state_dict()[k]) for k, v in state.items())
        assert net.phase == ("resnet" if share < 0.2 else "curriculum" if share < 0.6 else "joint")
        assert learns[0] == moved == (net.phase != "curriculum")
        assert not learns[1] if net.phase == "resnet" else True
        assert output["gates"][:, : 4 - int(net.decided)].eq(1).all()
        if net.phase != "resnet":
            assert float(output["penalty"]) == (-1 if net.phase == "curriculum" else -5)
            assert (output["entropy"] > 0).all()
    assert list(decided.values()) == [0, 0, 1, 2, 3, 4, 4, 4, 4, 4]
    with pytest.raises(InputError, match="phases"):
        built(replace(TINY, phases=(0.8, 0.4)))
    evidence.property(
        "phases: the residual network alone, the policy on one block more at a time from the last with the other fixed, both",
        "阶段：只训残差网络；残差网络固定，策略从最后一块起逐块放开；两者一起训练",
    )


def test_earlier_blocks_are_kept_in_evaluation_too():
    net = built(TINY)
    nn.init.constant_(net.policy.decide.bias, -50.0)
    net.train()
    net.advance(0.5)
    net.eval()
    kept = net(images(2))["gates"]
    assert kept.sum() == 2 * (4 - int(net.decided)) and "decided" in net.state_dict()
    again = built(TINY)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(images(2))["gates"], kept)


def test_the_policy_learns_what_pays(evidence):
    """Where a network is right whatever is dropped, everything goes; where only its first block makes it right, that one stays."""
    torch.manual_seed(0)
    config = replace(TINY, phases=(0.0, 1.0), entropy_weight=0.0)
    net, batch = built(config).train(), {"label": torch.zeros(16).long()}
    net.advance(0.9)
    nn.init.constant_(net.policy.decide.bias, 1.0)
    net.classified = lambda image, gates: F.one_hot((gates[:, 0] < 0.5).long(), 10).float()
    optimizer = torch.optim.Adam(net.policy.parameters(), 0.02)
    for _ in range(60):
        terms = self_critical(config)(net(images(16)), batch)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    s = net.policy(images(16)).mean(0).detach()
    assert s[0] > 0.6 and s[1:].max() < 0.5
    evidence.property(
        "policy gradient keeps the one block that makes predictions right and drops the others",
        "策略梯度保留让预测正确的那一块，丢掉其余的块",
    )


def test_recipe_and_pyramid():
    cifar = recipe(VARIANTS["resnet110"])
    assert (cifar.optimizer, cifar.lr, cifar.weight_decay, cifar.decay_at, cifar.batch_size) == ("adam", 1e-3, 0, (0.8,), 256)
    assert (VARIANTS["resnet110"].bound, VARIANTS["resnet110"].entropy_weight, VARIANTS["resnet110"].penalties) == (0.8, 0.1, (-1, -5))
    with torch.device("meta"):
        net = built(VARIANTS["laptop"], 64)
    assert net.strides == (4, 8, 16)
    net = built(TINY)
    assert [tuple(f.shape) for f in net.pyramid(images(2))] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
    assert net.embed(images(2)).shape == (2, net.embedding)
