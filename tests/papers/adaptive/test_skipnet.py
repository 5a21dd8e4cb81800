"""SkipNet against numbers of the official code, and its learning rules by enumeration."""

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
from paperworks.papers.adaptive.convnet_aig.convnet_aig import Block, projected
from paperworks.papers.adaptive.skipnet.claim import CLAIM
from paperworks.papers.adaptive.skipnet.skipnet import (
    IMAGENET,
    VARIANTS,
    Config,
    RecurrentGates,
    SkipNet,
    drawn,
    hybrid,
    passed,
    recipe,
    rounded,
)
from peers import check_pyramid, macs

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "skipnet.json").read_text())
MULTIPLY_ADDS = {"resnet50": 4.1, "resnet101": 7.8}
"""10^9, of the plain ResNets with every block executed; the recurrent gates add nothing that shows."""
TINY = Config(counts=(1, 2, 1), width=8)


def built(config: Config, side: int = 32, classes: int = 10) -> SkipNet:
    torch.manual_seed(0)
    return SkipNet(3, classes, side, config).eval()


def ours(official: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """The official names and shapes mapped to ours; the gate behind the last block is dropped."""
    parts = {"conv1": "branch.0", "bn1": "branch.1", "conv2": "branch.3", "bn2": "branch.4", "conv3": "branch.6", "bn3": "branch.7"}
    at = 1 if config.gate == "feedforward1" else 0
    gate = {
        "conv1": f"features.K.{at}",
        "bn1": f"features.K.{at + 1}",
        "conv2": "features.K.4",
        "bn2": "features.K.5",
        "linear_layer": "projects.K",
    }
    state = {}
    for name, value in official.items():
        if found := re.match(r"group(\d)_(layer|gate)(\d+)\.(\w+)\.(.+)", name):
            stage, kind, index, part, rest = found.groups()
            k = sum(config.counts[: int(stage) - 1]) + int(index)
            if kind == "layer":
                name = f"trunk.blocks.{k}.{parts.get(part, 'shortcut')}.{rest}"
            elif k + 1 == sum(config.counts):
                continue
            else:
                name = f"gates.{gate[part].replace('K', str(k)) if part in gate else f'embeds.{k}'}.{rest}"
                value = value.flatten(1) if part in ("1", "linear_layer") and value.ndim == 4 else value
        else:
            value = value.flatten(1) if name == "control.proj.weight" else value
            name = name.replace("control.rnn", "gates.lstm").replace("_l0", "").replace("control.proj", "gates.project")
            name = re.sub(r"^conv1", "trunk.stem.0", re.sub(r"^bn1", "trunk.stem.1", re.sub(r"^fc", "head", name)))
        state[name] = value
    return state


def images(count: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(count, 3, 32, 32) + torch.linspace(-2, 2, count)[:, None, None, None]


def lively(network: SkipNet) -> SkipNet:
    """Gates that depend on the image."""
    torch.manual_seed(3)
    for value in network.gates.parameters():
        nn.init.normal_(value, 0, 2)
    return network


# --- Sizes


@pytest.mark.parametrize("name", FIXTURE["parameters"])
def test_parameters_are_the_official_ones_less_the_last_gate(name):
    config = VARIANTS[name]
    side = config.image_size
    with torch.device("meta"):
        net = built(config, side, classes=1000 if side == 224 else 10)
    last = net.embedding
    unused = {"recurrent": 10 * last + 10, "feedforward1": 18 * last**2 + 4 * last, "feedforward2": 9 * last**2 + 2 * last}[config.gate]
    unused += 0 if config.gate == "recurrent" else 2 * last + 2
    assert sum(p.numel() for p in net.parameters()) == FIXTURE["parameters"][name] - unused
    if name in MULTIPLY_ADDS:
        assert macs(net, side) / 1e9 == pytest.approx(MULTIPLY_ADDS[name], rel=0.02)


def test_what_gates_cost(evidence):
    """Of a block's multiply-adds, in the first stage of CIFAR: 12.5 % of the paper's FFGate-II, and next to nothing of the recurrent one."""
    shares = {}
    for gate in ("recurrent", "feedforward1", "feedforward2"):
        with torch.device("meta"):
            net, x = built(Config(gate=gate)), torch.zeros(1, 16, 32, 32)
            counts = []
            for call in (lambda net=net, x=x: net.gates(0, x, None), lambda net=net, x=x: net.trunk.blocks[1].branch(x)):
                with FlopCounterMode(display=False) as counter:
                    call()
                counts.append(counter.get_total_flops())
        shares[gate] = counts[0] / counts[1]
    assert shares["recurrent"] < 0.0004
    assert shares["feedforward1"] == pytest.approx((1 / 4 + 1 / 16) / 2, rel=0.01)
    assert shares["feedforward2"] == pytest.approx(0.125, rel=0.01)
    evidence.property(
        "cost of the gates in a block's operations: 12.5 % (feed-forward II), 15.6 % (I), below 0.04 % (recurrent)",
        "门占一个块运算量的比例：12.5 %（前馈 II）、15.6 %（前馈 I）、不到 0.04 %（循环）",
    )


# --- The official code


@torch.inference_mode()
@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_and_gates_equal_the_official_code(evidence, name):
    draw = runpy.run_path(str(FIXTURES / "skipnet_record.py"))["draw"]
    golden = FIXTURE["networks"][name]
    config = Config(counts=(2, 2, 3, 2), **IMAGENET) if name == "imagenet" else Config(counts=(2, 3, 2), gate=name)
    side = int(config.image_size)
    net = built(config, side, classes=7)
    net.load_state_dict(ours({key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}, config))
    image, expected = draw("image", (4, 3, side, side)), torch.tensor(golden["logits"])
    found = net(image)
    gates = torch.tensor(golden["gates"]).T
    assert torch.equal(found["gates"][:, 1:], gates) and found["gates"][:, 0].eq(1).all()
    assert (gates != gates[0]).any()  # the images differ
    error = float((found["logits"].flatten() - expected).norm() / expected.norm())
    assert error < TOLERANCE
    net.trunk.blocks[0].branch[0].weight *= 1.1
    assert float((net(image)["logits"].flatten() - expected).norm() / expected.norm()) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}: logits and decisions", error=error)


# --- Skipping


@torch.inference_mode()
@pytest.mark.parametrize("gates", [[1, 0, 1, 0, 0], [0] * 5, [1] * 5])
def test_equation_1_and_what_is_computed(evidence, gates):
    block = Block(8, 16, 2, False, projected).eval()
    seen = []
    block.branch.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    x, gate = torch.randn(5, 8, 6, 6), torch.tensor(gates).float()
    found = passed(block, x, gate)
    assert sum(seen) == sum(gates)
    past, on = block.shortcut(x), gate[:, None, None, None] > 0
    torch.testing.assert_close(found, torch.where(on, F.relu(past + block.branch(x)), past))
    assert not on.all() or (found >= 0).all()
    if not on.any():
        assert (found < 0).any()  # no ReLU follows a shortcut alone
    evidence.property(
        f"equation 1 with gates {gates}: the block is computed for {sum(gates)} of 5 images, and no ReLU follows a shortcut alone",
        f"式 1，门为 {gates}：5 张图中有 {sum(gates)} 张计算了这个块，单独的捷径之后没有 ReLU",
    )


@torch.inference_mode()
def test_with_all_gates_open_it_is_the_plain_network():
    net, image = built(TINY), images(2)
    x = net.trunk.stem(image)
    for block in net.trunk.blocks:
        x = F.relu(block.shortcut(x) + block.branch(x))
    torch.testing.assert_close(net(image, torch.ones(2, 4))["logits"], net.head(x.mean((2, 3))))


@torch.inference_mode()
def test_multiply_adds_fall_with_what_is_executed_and_an_exported_network_gives_the_same(monkeypatch, evidence):
    net, image = lively(built(TINY)), images(8)
    output = net(image)
    assert 0.3 < float(output["gates"].mean()) < 1
    alone = []
    for one in image:
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(net(one[None])["logits"][0], output["logits"][len(alone)], atol=1e-5, rtol=1e-4)
        alone.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        net(image)
    assert counter.get_total_flops() == sum(alone)  # a batch computes what its images need
    assert len({int(g) for g in output["gates"].sum(1)}) > 1 and len(set(alone)) > 1
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with FlopCounterMode(display=False) as counter:
        written = net(image)
    assert counter.get_total_flops() > sum(alone)
    torch.testing.assert_close(written, output)
    evidence.property(
        "skipping is real: counted operations are those of executed blocks, alone and in a batch; an exported graph computes all, same outputs",
        "跳过是真的：无论单张图还是批次，统计到的运算量就是执行块的运算量；导出的图计算全部块，输出相同",
    )


def test_one_lstm_runs_over_depth_and_forgets_between_images():
    gates = RecurrentGates([4, 4])
    x = torch.randn(2, 4, 3, 3)
    p, state = gates(0, x, None)
    torch.testing.assert_close(gates(0, x, None)[0], p)
    assert not torch.allclose(gates(1, x, state)[0], gates(1, x, None)[0])
    assert 0.6 < float(p.detach().mean()) < 0.9  # open at first
    assert sum(p.numel() for p in gates.parameters()) == 880 + 11 + 2 * 50


# --- Learning


def test_pretraining_is_hard_forward_and_soft_backward(evidence):
    p = torch.tensor([0.2, 0.5, 0.6, 0.9], requires_grad=True)
    gate = rounded(p)
    torch.testing.assert_close(gate.detach(), torch.tensor([0.0, 0, 1, 1]))
    weights = torch.tensor([1.0, -2, 3, 4])
    (hard,) = torch.autograd.grad((weights * gate).sum(), p)
    (soft,) = torch.autograd.grad((weights * p).sum(), p)
    assert torch.equal(hard, soft)
    evidence.property(
        "supervised pre-training: rounded gates forward, the soft gate's gradient backward",
        "监督预训练：前向用取整的门，反向用软门的梯度",
    )


def test_decisions_are_drawn_with_their_probability():
    torch.manual_seed(0)
    p = torch.full((20_000,), 0.3, requires_grad=True)
    action, log = drawn(p)
    assert float(action.mean()) == pytest.approx(0.3, abs=0.015)
    torch.testing.assert_close(log, torch.distributions.Bernoulli(p).log_prob(action))
    assert not action.requires_grad


def test_the_expected_update_is_the_gradient_of_the_expected_objective(monkeypatch, evidence):
    """All eight paths of three gates, weighted by their probabilities: equations 2 to 5 without sampling."""
    net = lively(built(replace(TINY, alpha=2.0))).double()
    for value in net.gates.parameters():
        nn.init.normal_(value, 0, 0.5)
    net.train()
    net.advance(1.0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    config, batch = Config(alpha=2.0, policy_weight=1.0), {"label": torch.tensor([3])}
    image, parameters = images(1).double(), list(net.parameters())
    objective, estimate, total = torch.zeros(()), [torch.zeros_like(p) for p in parameters], 0.0
    for path in itertools.product((0.0, 1.0), repeat=3):
        wanted = iter(path)
        monkeypatch.setattr(torch, "bernoulli", lambda p, wanted=wanted: torch.full_like(p, next(wanted)))
        output = net(image)
        assert output["gates"][0].tolist() == [1, *path]
        probability = output["log_probability"].sum().exp()
        total += float(probability.detach())
        reward = 2.0 / 3 * (3 - sum(path))
        objective = objective + probability * (F.cross_entropy(output["logits"], batch["label"]) - reward)
        gradient = torch.autograd.grad(hybrid(config)(output, batch)["loss"], parameters, retain_graph=True, allow_unused=True)
        estimate = [e + float(probability.detach()) * (0 if g is None else g) for e, g in zip(estimate, gradient)]
    assert total == pytest.approx(1)
    exact = torch.autograd.grad(objective, parameters)
    flat, true = (torch.cat([t.flatten() for t in ts]) for ts in (estimate, exact))
    error = float((flat - true).norm() / true.norm())
    assert error < 1e-6
    evidence.fidelity(against="the gradient of the expected objective, all paths of three gates enumerated", error=error)


def test_hybrid_loss_by_hand(evidence):
    """Rewards to go, summed over the images of a batch."""
    config = Config(alpha=0.6, policy_weight=0.01)
    gates = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1]])
    logs = torch.tensor([[0.0, -0.1, -0.2, -0.3], [0, -0.4, -0.5, -0.6]])
    logits, label = torch.randn(2, 5), torch.tensor([1, 2])
    ce = F.cross_entropy(logits, label, reduction="none")
    returns = torch.tensor([[0.4, 0.2, 0.2], [0, 0, 0]]) - ce[:, None]
    policy = -(logs[:, 1:] * returns).sum()
    terms = hybrid(config)({"logits": logits, "gates": gates, "log_probability": logs}, {"label": label})
    torch.testing.assert_close(terms["loss"], ce.mean() + 0.01 * policy)
    assert float(terms["executed"]) == pytest.approx(6 / 8)
    evidence.property(
        "hybrid loss: mean cross-entropy and 0.01 of the summed -log p times rewards to go of alpha / N a skip, less the cross-entropy",
        "混合损失：平均交叉熵，加上 0.01 乘以 -log p 与回报之积的总和；回报是从该决定起的奖励（每次跳过 alpha / N）减去交叉熵",
    )


def test_phases_follow_the_share_of_the_training():
    net, label = built(replace(TINY, pretraining=0.5)).train(), {"label": torch.zeros(6).long()}
    for share, reinforced in ((0.0, False), (0.49, False), (0.5, True), (0.9, True), (0.1, False)):
        net.advance(share)
        output = net(images(6))
        assert bool(output["log_probability"].any()) == reinforced
        assert float(hybrid(TINY)(output, label)["policy"] != 0) == reinforced
    net.eval()
    net.advance(0.9)
    assert not net(images(2))["log_probability"].any()
    with pytest.raises(InputError, match="0 to 1"):
        built(replace(TINY, pretraining=2.0))


def test_rewards_shut_gates(evidence):
    """Where skipping is all that pays, reinforcement skips."""
    torch.manual_seed(0)
    config = replace(TINY, alpha=30.0, policy_weight=0.02)
    net, batch = built(config).train(), {"label": torch.arange(16) % 10}
    net.advance(1.0)
    optimizer = torch.optim.Adam(net.gates.parameters(), 0.05)
    shares = []
    for _ in range(30):
        terms = hybrid(config)(net(images(16)), batch)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        shares.append(float(terms["executed"]))
    assert sum(shares[-5:]) / 5 < 0.45 < sum(shares[:3]) / 3
    evidence.property("with a large alpha, hybrid reinforcement learning shuts the gates", "alpha 很大时，混合强化学习会把门关上")


def test_recipe_is_both_official_scripts_in_a_row():
    cifar = recipe(VARIANTS["resnet38"])
    assert (cifar.optimizer, cifar.lr, cifar.weight_decay, cifar.batch_size) == ("sgd", 0.1, 1e-4, 128)
    assert cifar.decay_at == (32 / 74, 48 / 74, 64 / 74) and VARIANTS["resnet38"].pretraining == 64 / 74
    assert recipe(VARIANTS["resnet50"]).batch_size == 256
    assert (VARIANTS["resnet38"].alpha, VARIANTS["resnet50"].alpha) == (0.1, 0.01)


@pytest.mark.parametrize(("name", "side", "strides"), [("resnet50", 224, (4, 8, 16, 32)), ("laptop", 64, (4, 8, 16))])
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert net.strides == strides


@pytest.mark.parametrize(("executed", "verdict"), [(1 / 9, False), (1.0, False), (0.5, True)])
def test_the_claim_is_not_about_networks_that_shut_or_keep_everything(executed, verdict):
    better = {"top1": [0.4, 0.41, 0.42], "executed": [executed] * 3}
    assert CLAIM.holds({"hybrid": better, "scratch": {"top1": [0.3, 0.3, 0.3], "executed": [0.5] * 3}}) is verdict
