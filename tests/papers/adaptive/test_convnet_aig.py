"""ConvNet-AIG against numbers of the official code and torchvision, and its parts by hand."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

from paperworks.errors import InputError
from paperworks.papers.adaptive.convnet_aig.convnet_aig import (
    IMAGENET,
    VARIANTS,
    Block,
    Config,
    ConvNetAIG,
    Gate,
    Shifted,
    gumbel_softmax,
    projected,
    rated,
    rates_by_class,
    residual_recipe,
    targets,
)
from peers import check_pyramid, macs, relative

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "convnet_aig.json").read_text())
KNOWN = {"resnet110": (1_766_630, 0.255), "resnet50": (25_768_264, 4.1), "resnet101": (45_040_314, 7.8)}
"""Parameters of the official code, and 10^9 multiply-adds of the plain ResNets with every block executed: 0.255 of ResNet-110 with projections,
4.1 and 7.8 of ResNets with the stride on the 3x3 convolution (torchvision's figures). The paper's own figures follow from measured rates."""
TINY = Config(counts=(1, 2, 1), width=8, image_size=32)


def built(config: Config, side: int = 32, channels: int = 3, classes: int = 10) -> ConvNetAIG:
    torch.manual_seed(0)
    return ConvNetAIG(channels, classes, side, config).eval()


def ours(official: dict[str, torch.Tensor], counts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The official names and shapes mapped to ours."""
    parts = {"conv1": "branch.0", "bn1": "branch.1", "conv2": "branch.3", "bn2": "branch.4", "conv3": "branch.6", "bn3": "branch.7"}
    gate = {"fc1": "relevance.0", "fc1bn": "relevance.1", "fc2": "decide"}
    state = {}
    for name, value in official.items():
        if found := re.match(r"layer(\d)\.(\d+)\.(\w+)\.(.+)", name):
            stage, at, part, rest = found.groups()
            i = sum(counts[: int(stage) - 1]) + int(at)
            name = f"gates.{i}.{gate[part]}.{rest}" if part in gate else f"trunk.blocks.{i}.{parts.get(part, part)}.{rest}"
            value = value.flatten(1) if part in gate and value.ndim == 4 else value
        else:
            name = re.sub(r"^conv1", "trunk.stem.0", re.sub(r"^bn1", "trunk.stem.1", re.sub(r"^(linear|fc)", "head", name)))
        state[name] = value
    return state


def lively(network: nn.Module) -> nn.Module:
    """Norms as if it had been trained, and gates that depend on the image."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, Gate):
            nn.init.normal_(module.decide.weight)
            nn.init.zeros_(module.decide.bias)
    return network.eval()


def images(count: int, side: int = 32) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(count, 3, side, side) + torch.linspace(-2, 2, count)[:, None, None, None]


# --- Sizes


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_multiply_adds(name):
    config = VARIANTS[name]
    side = config.image_size or 32
    with torch.device("meta"):
        net = built(config, side, classes=1000 if side == 224 else 10)
    if name in KNOWN:
        parameters, multiply_adds = KNOWN[name]
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert macs(net, side) / 1e9 == pytest.approx(multiply_adds, rel=0.02)
        assert (
            parameters
            == FIXTURE["parameters"][{"resnet110": "ResNet110_cifar", "resnet50": "ResNet50_ImageNet"}.get(name, "ResNet101_ImageNet")]
        )
    gates = sum(p.numel() for p in net.gates.parameters())
    assert gates == sum(16 * d + 82 for d, t in zip(net.trunk.inputs, net.targets) if t < 1)


# --- Other implementations


@torch.inference_mode()
@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_and_gates_equal_the_official_code(evidence, name):
    draw = runpy.run_path(str(FIXTURES / "convnet_aig_record.py"))["draw"]
    golden = FIXTURE["networks"][name]
    config, side = (Config(counts=(2, 3, 2)), 32) if name == "cifar" else (Config(counts=(2, 2, 3, 2), **IMAGENET), 224)
    net = built(config, side, classes=7)
    net.load_state_dict(ours({key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}, config.counts))
    image = draw("image", (4, 3, side, side)) + torch.tensor([0.0, 1.0, -1.0, 3.0])[:, None, None, None]
    found, expected = net(image), torch.tensor(golden["logits"])
    gates = torch.tensor(golden["gates"]).T
    assert torch.equal(found["gates"], gates)
    assert (gates != gates[0]).any() and (gates == 0).any()  # the images differ, and something is skipped
    error = relative(found["logits"].flatten(), expected)
    assert error < TOLERANCE
    net.gates["0"].decide.bias += torch.tensor([50.0, 0.0])  # a gate that is shut is seen
    assert relative(net(image)["logits"].flatten(), expected) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}, noise taken out: logits and gates", error=error)


@torch.inference_mode()
def test_with_all_gates_open_it_is_torchvisions_resnet(evidence):
    peer = lively(torchvision.models.resnet50())
    net = built(VARIANTS["resnet50"], 224, classes=1000)
    state = ours({k.replace("downsample", "shortcut"): v for k, v in peer.state_dict().items()}, (3, 4, 6, 3))
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("gates.") for name in missing)
    image = torch.randn(1, 3, 64, 64)
    error = relative(net(image, torch.ones(1, 16))["logits"], peer(image))
    assert error < TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} resnet50, all gates open", error=error)


# --- Gumbel-softmax


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gumbel_softmax_is_torchs(evidence, temperature):
    """Same noise, same choice, same gradient."""
    found, expected = (torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    outputs = []
    for logits, draw in ((found, gumbel_softmax), (expected, lambda x, t: F.gumbel_softmax(x, t, hard=True))):
        torch.manual_seed(3)
        outputs.append(draw(logits, temperature))
        (outputs[-1] * torch.arange(100.0).view(50, 2)).sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(found.grad, expected.grad)
    assert set(outputs[0].unique().tolist()) == {0, 1} and found.grad.abs().min() > 0
    evidence.property(
        f"Gumbel-softmax, temperature {temperature}: choices and gradients equal torch.nn.functional.gumbel_softmax(hard=True)",
        f"Gumbel-softmax，温度 {temperature}：选择和梯度都等于 torch.nn.functional.gumbel_softmax(hard=True)",
    )


def test_gumbel_max_draws_from_the_softmax(evidence):
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 2.0])
    share = gumbel_softmax(logits.expand(40_000, 2)).mean(0)
    torch.testing.assert_close(share, logits.softmax(0), atol=0.01, rtol=0)
    evidence.property("Gumbel-max draws from softmax(logits): 40,000 draws", "Gumbel-max 按 softmax(logits) 采样：40,000 次抽取")


def test_the_gradient_goes_straight_through_to_the_soft_choice(evidence):
    logits = torch.randn(9, 2, requires_grad=True)
    torch.manual_seed(5)
    (hard,) = torch.autograd.grad(gumbel_softmax(logits)[:, 1].sum(), logits)
    torch.manual_seed(5)
    noise = -torch.empty(9, 2).exponential_().log()
    (soft,) = torch.autograd.grad((logits + noise).softmax(1)[:, 1].sum(), logits)
    torch.testing.assert_close(hard, soft)
    evidence.property(
        "straight-through: the hard choice has the gradient of the soft one with the same noise",
        "直通估计：同样的噪声下，硬选择的梯度等于软选择的梯度",
    )


# --- Gates and blocks


def test_gates_start_open_in_87_percent_and_draw_in_training_only(evidence):
    torch.manual_seed(0)
    gate = Gate(8)
    x = torch.randn(8000, 8, 2, 2)
    drawn = gate.train()(x)
    assert set(drawn.unique().tolist()) == {0, 1}
    assert float(drawn.detach().mean()) == pytest.approx(1 / (1 + 2.718281828 ** (0.1 - 2)), abs=0.02)
    assert gate.eval()(x).eq(1).all()  # the likelier of the two
    assert sum(p.numel() for p in gate.parameters()) == 16 * 8 + 82
    evidence.property(
        "gate: mean over cells, 16 hidden units with a norm, two logits; open with sigmoid(1.9) at first, deterministic in evaluation",
        "门：在空间上求均值，16 个隐层单元加归一化，两个 logit；开始时以 sigmoid(1.9) 的概率打开，评估时是确定的",
    )


def test_a_gate_sees_nothing_but_the_means():
    gate, x = lively(Gate(8)), torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(gate.logits(x), gate.logits(x.flatten(2)[:, :, torch.randperm(16)].unflatten(2, (4, 4))))


@torch.inference_mode()
@pytest.mark.parametrize("gates", [[1, 0, 1, 0, 0], [0] * 5, [1] * 5])
def test_blocks_are_computed_for_open_gates_alone(evidence, gates):
    """The rows that the convolutions get, and equation 3."""
    block = lively(Block(8, 16, 2, False, projected))
    seen = []
    block.branch.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    x, gate = torch.randn(5, 8, 6, 6), torch.tensor(gates).float()
    found = block(x, gate)
    assert sum(seen) == sum(gates)
    torch.testing.assert_close(found, block.shortcut(x) + gate[:, None, None, None] * block.branch(x))
    evidence.property(
        f"equation 3 with gates {gates}: the block is computed for {sum(gates)} of 5 images",
        f"公式 3，门为 {gates}：5 张图中只为 {sum(gates)} 张计算这个块",
    )


@torch.inference_mode()
def test_multiply_adds_fall_with_the_rate_of_execution(evidence):
    net = lively(built(TINY))
    costs = []
    for count in range(5):
        given = (torch.arange(4) < count).float()[None]
        with FlopCounterMode(display=False) as counter:
            net(images(1), given)
        costs.append(counter.get_total_flops())
    assert all(after - before > 0.1 * costs[-1] for before, after in pairwise(costs))
    with FlopCounterMode(display=False) as counter:
        net(images(4), torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]))
    assert counter.get_total_flops() == costs[4] + costs[2] + 2 * costs[0]
    evidence.property(
        "skipping is real: measured multiply-adds of one image and of a batch are those of the blocks whose gates are open",
        "跳过是真的：单张图和一个批次实测的乘加，都恰好是门打开的那些块的乘加",
    )


@torch.inference_mode()
def test_an_exported_network_computes_all_and_gives_the_same(monkeypatch, evidence):
    net = lively(built(TINY))
    skipping = net(images(6))
    assert 0 < float(skipping["gates"].mean()) < 1
    with FlopCounterMode(display=False) as counter:
        net(images(6))
    fewer = counter.get_total_flops()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with FlopCounterMode(display=False) as counter:
        written = net(images(6))
    assert counter.get_total_flops() > fewer
    torch.testing.assert_close(written, skipping)
    evidence.property(
        "an exported graph computes all blocks and multiplies by the gates: the same outputs",
        "导出的图计算全部块，再乘以门：输出相同",
    )


def test_training_is_the_same_sum_and_reaches_gate_and_block():
    net = built(TINY).train()
    torch.manual_seed(0)
    output = net(images(6))
    assert set(output["gates"].unique().tolist()) == {0, 1}
    rated(TINY)(output, {"label": torch.zeros(6).long()})["loss"].backward()
    for gate in net.gates.values():
        assert gate.decide.bias.grad.abs().sum() > 0


def test_closed_gates_keep_the_gradient_from_the_block():
    net = built(TINY).train()
    net(images(4), torch.zeros(4, 4))["logits"].sum().backward()
    assert not any(p.grad.any() for block in net.trunk.blocks for p in block.branch.parameters())
    assert net.trunk.blocks[1].shortcut[0].weight.grad.any()  # shortcuts are never gated


# --- Target rates


def test_rate_loss_is_equation_8(evidence):
    config = replace(TINY, target=0.5, schedule=(1, None, None, 0.8), rate_weight=2.0)
    gates = torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 1]])
    logits = torch.randn(2, 10)
    terms = rated(config)({"logits": logits, "gates": gates}, {"label": torch.tensor([3, 4])})
    rate = (0 + 0 + 0.5**2 + 0.2**2) / 4
    assert float(terms["rate"]) == pytest.approx(rate, rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(float(F.cross_entropy(logits, torch.tensor([3, 4]))) + 2 * rate, rel=1e-5)
    assert float(terms["executed"]) == pytest.approx(5 / 8)
    evidence.property(
        "target rate loss: squared distance of each block's share over the batch from its target, divided by all blocks",
        "目标执行率损失：每个块在批次上的执行比例与其目标之差的平方，除以全部块数",
    )


def test_target_rates_pull_the_gates(evidence):
    """Without labels to learn: gradient descent on the rate alone ends at the targets."""
    torch.manual_seed(0)
    gates, wanted = nn.ModuleList(Gate(4) for _ in range(3)), torch.tensor([0.2, 0.5, 0.8])
    optimizer = torch.optim.Adam(gates.parameters(), 0.05)
    for _ in range(150):
        x = torch.randn(256, 4, 1, 1)
        loss = (torch.stack([gate(x) for gate in gates], 1).mean(0) - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = torch.stack([gate(torch.randn(5000, 4, 1, 1)) for gate in gates], 1).mean(0)
    torch.testing.assert_close(shares, wanted, atol=0.07, rtol=0)
    evidence.property(
        "the rate loss alone, through the Gumbel-softmax, brings gates to targets of 0.2, 0.5 and 0.8",
        "只用执行率损失，经过 Gumbel-softmax，就把门带到 0.2、0.5 和 0.8 的目标",
    )


def test_schedules():
    net = built(replace(TINY, schedule=(1, None, 0.3, 1)))
    assert net.targets == (1, 0.6, 0.3, 1) and list(net.gates) == ["1", "2"]
    assert net(images(2))["gates"][:, [0, 3]].eq(1).all()
    with pytest.raises(InputError, match="3 target rates for 4 blocks"):
        targets(replace(TINY, schedule=(1, 1, 1)))
    with pytest.raises(InputError, match="from 0 to 1"):
        targets(replace(TINY, target=1.5))
    assert [VARIANTS[name].schedule.count(None) for name in ("resnet50_best", "resnet101_best")] == [8, 25]


@torch.inference_mode()
def test_rates_by_class():
    net = lively(built(TINY))
    label = torch.tensor([0, 0, 1, 1, 1, 3])
    rates = rates_by_class(net, images(6), label)
    gates = net(images(6))["gates"]
    assert rates.shape == (10, 4)
    torch.testing.assert_close(rates[1], gates[2:5].mean(0))
    assert rates[2].isnan().all()


# --- Backbone and training


@pytest.mark.parametrize(
    ("name", "side", "strides"),
    [("resnet50", 224, (4, 8, 16, 32)), ("laptop", 32, (2, 4, 8)), ("laptop", 96, (6, 12, 24)), ("laptop", 128, (8, 16, 32))],
)  # fmt: skip
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert net.strides == strides


def test_recipes_are_the_official_scripts():
    cifar, imagenet = residual_recipe(VARIANTS["resnet110"]), residual_recipe(VARIANTS["resnet50"])
    assert (cifar.optimizer, cifar.lr, cifar.momentum, cifar.weight_decay, cifar.batch_size) == ("sgd", 0.1, 0.9, 5e-4, 256)
    assert cifar.decay_at == (150 / 350, 250 / 350)
    assert (imagenet.weight_decay, imagenet.decay_at, imagenet.batch_size) == (1e-4, (1 / 3, 2 / 3), 256)
    assert (VARIANTS["resnet110"].rate_weight, VARIANTS["resnet50"].rate_weight) == (2, 1)


def test_augmentation_moves_and_mirrors():
    image = tv_tensors.Image(torch.rand(3, 32, 32))
    still = Shifted(shift=0, flip=0)({"image": image, "label": 1}, (32, 32), torch.Generator().manual_seed(0))
    assert torch.equal(still["image"], image) and still["label"] == 1
    assert torch.equal(Shifted(shift=0, flip=1)({"image": image}, (32, 32), torch.Generator())["image"], image.flip(2))
    views = [Shifted()({"image": image}, (32, 32), torch.Generator().manual_seed(seed))["image"] for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert Shifted()({"image": tv_tensors.Image(torch.rand(1, 50, 40))}, (64, 64), torch.Generator())["image"].shape == (1, 64, 64)
