"""Learn to Pay Attention against numbers of a re-implementation, and its parts by hand."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.backbones.convnext import convnext
from paperworks.papers.backbones.vit import vit
from paperworks.papers.layers.learn_to_pay_attention.learn_to_pay_attention import (
    DP,
    PC,
    VARIANTS,
    Attending,
    AttendingHead,
    Compatibility,
    Config,
    Unit,
    build,
    headless,
    put,
    recipe,
)
from paperworks.tasks import task
from peers import check_pyramid, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "learn_to_pay_attention.json").read_text())
PORT = {"plain": 19_758_756, "attending": 19_993_764}
"""Parameters of the re-implementation, whose body is the same."""


def built(config: Config, classes: int = 10, side: int = 32) -> Attending:
    torch.manual_seed(0)
    return build(task("classification").plain_spec(3, classes, 2, (side, side)), config).eval()


# --- Sizes


def counted(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in built(VARIANTS[name], 100).parameters())


def test_parameters_follow_from_the_ports():
    """The bodies are the same; what stands behind them differs by what the module's docstring and the note say."""
    assert counted("vgg") == PORT["plain"] + 2 * 512
    up, u, classifier = 256 * 512, 512, (1536 - 1280) * 100
    down, norms = 2 * 512 + 512 * 256 + 256, 2 * 1280
    assert counted("vgg_att3_concat_pc") == PORT["attending"] - up - u + 256 - classifier + down + norms
    assert counted("vgg_att3_concat_pc") - counted("vgg_att3_concat_dp") == 256 + 512 + 512  # u of each level
    assert counted("vgg_att3_indep_pc") - counted("vgg_att3_concat_pc") == 2 * 100  # biases


def test_the_resnets_body_is_resnet_164():
    with torch.device("meta"):
        body = built(VARIANTS["rn164"], 100).body
        total = sum(p.numel() for p in body.parameters())
        convolutions = sum(
            isinstance(m, nn.Conv2d) and m not in [u.shortcut for u in body.modules() if isinstance(u, Unit)] for m in body.modules()
        )
    assert convolutions + 1 == 164  # with its classifier
    assert total + 2 * 256 + 257 * 100 == pytest.approx(1.7e6, rel=0.02)


# --- Another implementation


def test_body_and_attention_equal_a_port(evidence):
    draw = runpy.run_path(str(FIXTURES / "learn_to_pay_attention_record.py"))["draw"]
    weights = {key: draw(key, tuple(shape)) for key, shape in FIXTURE["shapes"].items()}
    net = built(VARIANTS["vgg_att3_concat_pc"], 100)
    theirs = [
        key.removesuffix(".weight") for key, shape in FIXTURE["shapes"].items() if key.startswith("conv_block") and key.endswith(".weight")
    ]
    ours = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len(ours) == len(theirs) == 2 * 15
    for module, name in zip(ours, theirs):
        module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()})
    net.describe[-1].load_state_dict({"weight": weights["dense.weight"].flatten(1), "bias": weights["dense.bias"]})
    for level, name in ((1, "attn2"), (2, "attn3")):
        net.head.levels[level].u.weight.copy_(weights[f"{name}.op.weight"].flatten(1))
    maps, g = net.looked(draw("image", tuple(FIXTURE["input"])))
    found = {"conv_block3": maps[0], "conv_block4": maps[1], "conv_block5": maps[2], "dense": g}
    found |= {"attn2": net.head.levels[1](maps[1], g), "attn3": net.head.levels[2](maps[2], g)}
    errors = {}
    for name, values in FIXTURE["seen"].items():
        value = found[name].flatten()
        errors[name] = relative(value[:: FIXTURE["every"] if value.numel() > 2000 else 1], torch.tensor(values))
    assert max(errors.values()) < TOLERANCE, errors
    net.head.levels[2].u.weight[0, 0] += 1  # a perturbed weight is seen
    assert relative(net.head.levels[2](maps[2], g).flatten(), torch.tensor(FIXTURE["seen"]["attn3"])) > TOLERANCE
    evidence.fidelity(
        against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}: L1 to L3, g, attended vectors of L2 and L3", error=max(errors.values())
    )


# --- Mechanisms


def by_hand(block: Compatibility, local: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query = block.down(g)
    scores = []
    for cell in local.flatten(2).unbind(2):
        scores.append((cell * query).sum(1) if block.u is None else (cell + query) @ block.u.weight[0])
    weights = torch.stack(scores, 1).softmax(1)
    return weights, sum(weights[:, i, None] * cell for i, cell in enumerate(local.flatten(2).unbind(2)))


@pytest.mark.parametrize("function", ["parametrised", "dot"])
@pytest.mark.parametrize("globe", [6, 10])
def test_compatibility_by_hand(evidence, function, globe):
    torch.manual_seed(0)
    block = Compatibility(6, globe, function).eval()
    local, g = torch.randn(3, 6, 4, 5), torch.randn(3, globe)
    weights, expected = by_hand(block, local, g)
    torch.testing.assert_close(block.weights(local.flatten(2), g)[:, 0], weights)
    torch.testing.assert_close(block(local, g), expected)
    evidence.property(
        f"{function} compatibility: softmax over positions, convex combination of the unchanged local features, by a loop",
        f"{function} 兼容度：与循环一致，在位置上做 softmax，对原始局部特征取凸组合",
    )


def test_parametrised_maps_do_not_depend_on_g_and_those_of_the_dot_product_do(evidence):
    """u . (l + g) = u . l + u . g, and the softmax takes the second term, the same for all positions, away."""
    images, others = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    small = replace(VARIANTS["test"], width=8)
    for config, moves in ((PC, False), (DP, True)):
        net = built(replace(small, attend=config))
        own, exchanged = net.attention(images), net.attention(images, query=others)
        assert [m.shape for m in own] == [(2, 32, 32), (2, 16, 16), (2, 8, 8)]
        for m in own:
            torch.testing.assert_close(m.sum((1, 2)), torch.ones(2))
        assert any(relative(a, b) > 1e-3 for a, b in zip(own, exchanged)) == moves
    evidence.property(
        "exchanging g between images moves dot-product maps and leaves parametrised ones as they are",
        "在图像之间交换 g：点积的图会变，参数化的图不变",
    )


@torch.enable_grad()
def test_no_gradient_reaches_g_through_a_parametrised_map(evidence):
    for config, learns in ((PC, False), (DP, True)):
        net = built(replace(VARIANTS["test"], attend=config))
        net(torch.randn(4, 3, 32, 32))["logits"].square().sum().backward()
        steps = [float(p.grad.abs().max()) for name, p in net.named_parameters() if name.startswith("describe")]
        body = max(float(p.grad.abs().max()) for name, p in net.named_parameters() if name.startswith("body"))
        assert (max(steps) > 1e-5 * body) == learns
    evidence.property(
        "with the parametrised compatibility what computes g gets no gradient; with the dot product it does",
        "用参数化兼容度时，计算 g 的层得不到梯度；用点积时得到",
    )


def test_the_classifier_sees_attended_vectors_and_not_g(evidence):
    net = built(VARIANTS["small"])
    image = torch.randn(2, 3, 32, 32)
    maps, g = net.looked(image)
    vectors = [after(by_hand(level, local, g)[1]) for level, after, local in zip(net.head.levels, net.head.after, maps)]
    torch.testing.assert_close(net.embed(image), torch.cat(vectors, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(image)["logits"], net.head.classifiers[0](torch.cat(vectors, 1)), rtol=1e-4, atol=1e-5)
    assert net.head.classifiers[0].in_features == sum(local.shape[1] for local in maps) == net.embedding
    evidence.property(
        "concat: one linear classifier of BN-ReLU of each attended vector; g is not among them",
        "concat：各加权向量经 BN-ReLU 后用一个线性分类器；其中没有 g",
    )


def test_indep_averages_the_levels_probabilities(evidence):
    torch.manual_seed(0)
    head = AttendingHead((4, 6), 6, 5, replace(PC, combine="indep")).eval()
    maps, g = [torch.randn(3, 4, 5, 5), torch.randn(3, 6, 3, 3)], torch.randn(3, 6)
    each = [classify(vector).softmax(1) for classify, vector in zip(head.classifiers, head.vectors(maps, g))]
    torch.testing.assert_close(head(maps, g).softmax(1), (each[0] + each[1]) / 2)
    evidence.property("indep: probabilities of the levels' classifiers are averaged", "indep：各层次分类器的概率取平均")


def test_equal_scores_are_average_pooling(evidence):
    block = Compatibility(6, 6, "parametrised").eval()
    block.u.weight.zero_()
    local = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(block(local, torch.randn(2, 6)), local.mean((2, 3)))
    evidence.property("uniform scores equal average pooling", "分数都相同时就是平均池化")


def test_dropouts_are_the_authors():
    net = built(VARIANTS["vgg_att3_concat_pc"])
    assert [m.p for m in net.body.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert [m.p for m in net.describe.modules() if isinstance(m, nn.Dropout)] == [0.4, 0.4, 0.5]
    assert [m.p for m in net.head.after.modules() if isinstance(m, nn.Dropout)] == [0.5] * 3
    for block in net.body.blocks:
        assert isinstance(block[-1], nn.ReLU)  # nothing is dropped from what is attended


def test_unit_by_hand():
    torch.manual_seed(0)
    for inputs, outputs, stride in ((8, 8, 1), (8, 16, 2)):
        unit, x = Unit(inputs, outputs, stride).eval(), torch.randn(2, inputs, 8, 8)
        first = F.relu(unit.norm1(x))
        y = unit.conv3(F.relu(unit.norm3(unit.conv2(F.relu(unit.norm2(unit.conv1(first)))))))
        torch.testing.assert_close(unit(x), y + (unit.shortcut(first) if unit.shortcut else x))
        assert unit.conv1.stride == (stride, stride)


# --- As a layer


@pytest.mark.parametrize(("host", "count"), [("convnext", 3), ("vit", 1)])
def test_head_on_other_backbones(evidence, host, count):
    torch.manual_seed(0)
    inner = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"]) if host == "convnext" else vit.ViT(3, 5, 32, vit.VARIANTS["test"])
    net = put(inner, PC).eval()
    image = torch.randn(2, 3, 32, 32)
    assert net(image)["logits"].shape == (2, 5)
    assert len(net.attention(image)) == net.count == count
    assert net.embed(image).shape == (2, net.embedding)
    assert isinstance(inner.head, nn.Identity)
    if host == "convnext":
        torch.testing.assert_close(torch.export.export(net, (image,)).module()(image)["logits"], net(image)["logits"])
    evidence.property(
        f"an attending head on a {host}: {count} maps, the old classifier gone",
        f"{host} 上的注意力头：{count} 张图，原来的分类器已去掉",
    )


def test_hosts_that_do_not_fit_say_so():
    with pytest.raises(InputError, match="no pyramid"):
        put(nn.Linear(2, 2), PC)
    assert headless(convnext.ConvNeXt(3, 7, 32, convnext.VARIANTS["test"])) == 7
    talkative = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"])
    talkative.forward = lambda image: {"logits": image, "gates": image}
    with pytest.raises(InputError, match="more than logits: gates"):
        put(talkative, PC)
    scattered = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"])
    scattered.head_parameters = lambda: [scattered.norm.weight, scattered.head.weight]
    with pytest.raises(InputError, match="no module of its own"):
        headless(scattered)


# --- Training


@pytest.mark.parametrize(("name", "side"), [("vgg_att3_concat_pc", 32), ("rn164_att2_concat_pc", 32), ("small", 64)])
def test_pyramid(name, side):
    with torch.device("meta"):
        net = built(VARIANTS[name], side=side)
        check_pyramid(net, side)


def test_recipe():
    vgg, resnet = recipe(VARIANTS["vgg_att3_concat_pc"]), recipe(VARIANTS["rn164"])
    assert (vgg.lr, resnet.lr, vgg.weight_decay, vgg.schedule, vgg.momentum) == (1.0, 0.1, 5e-4, "step", 0.9)
    assert recipe(VARIANTS["small"]).optimizer == "adamw"
