"""CR-NAS: its backbones against torchvision, its costs against table 1, its supernets and its search by brute force; there is no official code."""

from __future__ import annotations

import functools
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.mobilenetv2 import InvertedResidual

from paperworks.errors import InputError
from paperworks.nn.resnet import BasicBlock, Bottleneck
from paperworks.papers.backbones.replknet.replknet import area_ratio
from paperworks.papers.detection.faster_rcnn.faster_rcnn import VARIANTS as DETECTORS
from paperworks.papers.detection.faster_rcnn.faster_rcnn import FasterRCNN
from paperworks.papers.search.cr_nas.cr_nas import (
    PAPER,
    RATES,
    VARIANTS,
    Backbone,
    Config,
    CRDetector,
    Supernet,
    build,
    drawn,
    eligible,
    fixed,
    greedy,
    recipe,
    spatial,
)
from paperworks.tasks.detection import Detection
from paperworks.tasks.trials import Trial

TORCHVISION = f"torchvision {importlib.metadata.version('torchvision').split('+')[0]}"
BASELINES = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnext50": "resnext50_32x4d",
    "mobilenet_v2": "mobilenet_v2",
}
GIGA_MULTIPLY_ADDS = {"mobilenet_v2": 121.1, "resnet18": 147.7, "resnet50": 192.5, "resnet101": 257.3}
"""Table 1, the whole detector without RoIAlign on images of 800 x 1088."""
FOUND = {"scr_resnet18": "resnet18", "scr_resnet50": "resnet50", "scr_resnet101": "resnet101"}
REGIONS = 2000
"""Regions that go through the head. The paper does not say; with 2,000 all four baselines of table 1 come out."""
TINY = replace(VARIANTS["test"], stages=(), dilations=(), original=(2, 1, 1, 1), space=((1, 2), (1, 2), (1, 2), (1, 2)))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def randomised(network: nn.Module) -> nn.Module:
    """Norms far from those of the start; the last one of a block is small, or sixteen blocks explode."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    for module in network.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            (module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight.data.mul_(0.2)
    return network


def theirs_named(name: str, ours: Mapping[str, torch.Tensor], stages: Sequence[int]) -> dict[str, torch.Tensor]:
    """Our weights under torchvision's names."""
    out = {}
    for key, value in ours.items():
        part, *rest = key.split(".")
        if name == "mobilenet_v2":
            at = int(rest[0]) if part == "stem" else 2 + sum(stages[: int(rest[0])]) + int(rest[1])
            out[".".join(["features", str(at), *rest[1 if part == "stem" else 2 :]])] = value
        elif part == "stem":
            out[".".join([("conv1", "bn1")[int(rest[0])], *rest[1:]])] = value
        else:
            out[".".join([f"layer{int(rest[0]) + 1}", *rest[1:]])] = value
    return out


def their_pyramid(name: str, peer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    if name == "mobilenet_v2":
        maps = []
        for layer in peer.features[:18]:
            x = layer(x)
            maps.append(x)
        return [maps[i] for i in (3, 6, 13, 17)]
    x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(x))))
    maps = []
    for layer in (peer.layer1, peer.layer2, peer.layer3, peer.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def multiply_adds(config: Config) -> float:
    """Of backbone, pyramid, RPN and head, in thousands of millions."""
    with torch.device("meta"):
        net = CRDetector(3, 80, config).eval()
        with FlopCounterMode(display=False) as counter:
            features = net.neck(net.trunk.pyramid(torch.zeros(1, 3, 800, 1088))[config.detector.finest - 2 :])
            net.rpn(features)
            net.head(torch.zeros(REGIONS, 256, 7, 7))
    return counter.get_total_flops() / 2e9


@functools.cache
def trunk_flops(config: Config) -> int:
    """Multiply-adds of all convolutions on an image of 64 x 64."""
    count: list[int] = []
    with torch.device("meta"), torch.no_grad():
        net = Backbone(3, config).eval()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, _, out: count.append(out[0, 0].numel() * m.weight.numel()))
        net.pyramid(torch.zeros(1, 3, 64, 64))
    return sum(count)


# --- Backbones


@torch.inference_mode()
@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"resnet101"}))
def test_backbones_equal_torchvisions(evidence, name):
    config = VARIANTS[name]
    torch.manual_seed(0)
    ours = randomised(Backbone(3, config)).eval()
    peer = getattr(torchvision.models, BASELINES[name])(num_classes=2).eval()
    missing, unexpected = peer.load_state_dict(theirs_named(name, ours.state_dict(), config.counts), strict=False)
    assert not unexpected
    assert all(key.startswith(("fc.", "classifier.", "features.18.")) for key in missing)
    image = torch.randn(2, 3, 64, 96)
    expected = their_pyramid(name, peer, image)
    errors = [relative(a, b) for a, b in zip(ours.pyramid(image), expected, strict=True)]
    assert max(errors) < 1e-4
    spatial(ours.path()[-1]).weight *= 1.5
    assert relative(ours.pyramid(image)[-1], expected[-1]) > 1e-4
    evidence.fidelity(against=f"{TORCHVISION} {BASELINES[name]}: C2 to C5", error=max(errors))


@torch.inference_mode()
def test_the_detector_is_faster_rcnn(evidence):
    """With the original allocation and no dilation, what is left is Faster R-CNN, which has an evidence of its own."""
    detector = replace(DETECTORS["test"], image_size=64)
    config = replace(fixed("basic", 2, 2, 2, 2), width=detector.width, detector=detector)
    torch.manual_seed(0)
    ours, theirs = CRDetector(3, 3, config), FasterRCNN(3, 3, detector)
    randomised(ours).eval()
    torch.nn.init.normal_(ours.rpn.reg.weight, 0, 0.05)
    torch.nn.init.normal_(ours.head.cls.weight, 0, 0.1)
    trunk = theirs_named("resnet18", ours.trunk.state_dict(), config.counts)
    rest = {key: value for key, value in ours.state_dict().items() if not key.startswith("trunk.")}
    theirs.load_state_dict({f"trunk.{key}": value for key, value in trunk.items()} | rest)
    image = torch.randn(2, 3, 64, 64)
    out, expected = ours(image), theirs.eval()(image)
    error = max(relative(out[key], expected[key]) for key in ("boxes", "scores", "proposals"))
    assert error < 1e-4
    ours.trunk.dilate((1,) * 7 + (3,))
    assert relative(ours(image)["scores"], expected["scores"]) > 1e-4
    evidence.property(
        "with the original blocks and no dilation the detector gives Faster R-CNN's boxes and scores",
        "用原始的模块分配、不用空洞时，检测器给出与 Faster R-CNN 相同的框和得分",
    )


@torch.inference_mode()
@pytest.mark.parametrize("block", ["basic", "bottleneck", "mobile"])
def test_a_dilated_block_is_one_of_a_large_sparse_kernel(evidence, block):
    """Zeros between the taps of each kernel, and no dilation: the same maps, for the blocks with a stride too."""
    stages = (1, 2, 1, 1, 1, 1) if block == "mobile" else (1, 2, 1, 1)
    rates = (1, 2, 3, 3, 2, 1, 3)[: sum(stages)]
    torch.manual_seed(0)
    ours = randomised(Backbone(3, replace(fixed(block, *stages), width=8, dilations=rates))).eval()
    image = torch.randn(1, 3, 64, 64)
    found = ours.pyramid(image)
    plain = Backbone(3, replace(fixed(block, *stages), width=8)).eval()
    plain.load_state_dict(ours.state_dict())
    undilated = plain.pyramid(image)
    for block_, rate in zip(plain.path(), rates):
        conv = spatial(block_)
        large = torch.zeros(*conv.weight.shape[:2], 2 * rate + 1, 2 * rate + 1)
        large[:, :, ::rate, ::rate] = conv.weight
        conv.weight, conv.padding = nn.Parameter(large), (rate, rate)
    expected = plain.pyramid(image)
    assert [m.shape for m in found] == [m.shape for m in undilated]
    assert max(relative(a, b) for a, b in zip(found, expected)) < 1e-5
    assert relative(undilated[-1], expected[-1]) > 1e-2
    evidence.property(
        f"{block}: a dilation equals a large kernel with zeros, strided blocks included, and keeps all sizes",
        f"{block}：空洞卷积等于补零的大核，带步长的模块也一样；所有尺寸不变",
    )


def test_which_convolution_is_dilated():
    """Section 3.2.2: the second of a basic block, the centre one of a bottleneck."""
    basic, bottleneck = BasicBlock(8, 8, 1, nn.BatchNorm2d), Bottleneck(8, 2, 1, nn.BatchNorm2d)
    mobile = InvertedResidual(8, 8, 1, 6)
    assert spatial(basic) is basic.conv2
    assert spatial(bottleneck) is bottleneck.conv2
    assert spatial(mobile).groups == spatial(mobile).in_channels == 48
    backbone = Backbone(3, replace(fixed("basic", 1, 1, 1, 1), width=8, dilations=(2, 2, 2, 2)))
    assert [c.dilation[0] for block in backbone.path() for c in (block.conv1, block.conv2)] == [1, 2] * 4


# --- Costs


@pytest.mark.parametrize("name", GIGA_MULTIPLY_ADDS)
def test_multiply_adds_of_table_1(name):
    assert multiply_adds(VARIANTS[name]) == pytest.approx(GIGA_MULTIPLY_ADDS[name], rel=0.02)


@pytest.mark.parametrize("name", FOUND)
def test_reallocated_networks_cost_as_much(evidence, name):
    config, original = VARIANTS[name], VARIANTS[FOUND[name]]
    assert trunk_flops(config) == trunk_flops(original)
    assert trunk_flops(replace(config, dilations=(3,) * sum(config.stages))) == trunk_flops(original)
    assert config.stages[0] < original.stages[0]
    assert config.stages[1] < original.stages[1]
    assert config.stages[3] > original.stages[3]
    evidence.property(
        "reallocated ResNets: multiply-adds equal the original's exactly, dilated or not; table 1's figures within 2 %",
        "重新分配的 ResNet：不论有无空洞，乘加次数都与原始网络完全相等；与表 1 的数字相差不到 2 %",
    )


def test_every_eligible_allocation_costs_the_same(evidence):
    space = replace(VARIANTS["small"], original=(2, 1, 1, 2), space=((1, 2, 3),) * 4)
    assert len(eligible(space)) == 10
    assert len({trunk_flops(replace(space, stages=tau)) for tau in eligible(space)}) == 1
    evidence.property("every eligible allocation of a space has the same multiply-adds", "一个空间里所有合格分配的乘加次数都相同")


def test_the_papers_space():
    """Section 3.2: ten numbers of blocks a stage, three dilations, 3^16 for ResNet-50."""
    search = VARIANTS["search"]
    assert [len(t) for t in search.space] == [10] * 4
    assert len(RATES) ** sum(search.original) == 43_046_721
    fifty, hundred = eligible(search), eligible(replace(search, original=(3, 4, 23, 3)))
    assert {(3, 4, 6, 3), (1, 3, 5, 7)} <= set(fifty)
    assert {(3, 4, 23, 3), (2, 3, 17, 11)} <= set(hundred)
    assert all(sum(tau) == 16 for tau in fifty)
    assert len(set(fifty)) == len(fifty)


# --- Supernets


def supernet(level: str, **changes: Any) -> Supernet:
    torch.manual_seed(0)
    config = replace(TINY, supernet=level, **changes)
    network = build(Detection.plain_spec(classes=3), config)
    assert isinstance(network, Supernet)
    return network


@torch.inference_mode()
@pytest.mark.parametrize(("level", "choices"), [("stages", (2, 1, 2, 1)), ("dilations", (3, 1, 2, 1, 2))])
def test_a_path_is_a_network_of_its_own(evidence, level, choices):
    net = supernet(level)
    randomised(net).eval().decide(choices)
    setting = {"stages": choices} if level == "stages" else {"dilations": choices}
    alone = CRDetector(3, 3, replace(TINY, **setting)).eval()
    own = alone.state_dict()
    alone.load_state_dict({key: value for key, value in net.state_dict().items() if key in own})
    image = torch.randn(2, 3, 64, 64)
    out, expected = net(image), alone(image)
    assert all(torch.equal(out[key], expected[key]) for key in expected)
    evidence.property(
        "a path of either supernet equals the network of that allocation with its weights, bit by bit",
        "两个超网的任一路径，都与采用该分配和这些权重的独立网络逐位相同",
    )


def test_training_draws_paths_evenly_and_trains_only_them(evidence):
    net = supernet("stages").train()
    torch.manual_seed(0)
    paths = Counter()
    for _ in range(800):
        net.walk()
        paths[net.trunk.counts] += 1
    assert len(paths) == 16
    assert all(25 < n < 80 for n in paths.values())  # 50 expected
    batch = Detection.plain_batch(net, Detection.plain_spec(classes=3), size=64)
    sum(t.sum() for t in net(batch["image"], batch["boxes"], batch["labels"]).values() if t.is_floating_point()).backward()
    for blocks, n in zip(net.trunk.stages, net.trunk.counts):
        used = [any(p.grad is not None for p in block.parameters()) for block in blocks]
        assert used == [i < n for i in range(len(blocks))]
    rates = supernet("dilations").train()
    seen = Counter()
    for _ in range(300):
        rates.walk()
        seen.update(enumerate(spatial(block).dilation[0] for block in rates.trunk.path()))
    assert len(seen) == 15
    assert all(70 < n < 130 for n in seen.values())  # 100 expected
    evidence.property(
        "single paths drawn evenly in training: only their blocks get gradients",
        "训练时均匀抽取单条路径：只有该路径的模块得到梯度",
    )


@torch.no_grad()
def test_statistics_are_the_paths_own(evidence):
    net = supernet("stages", calibration=6).train()
    images = torch.randn(8, 3, 64, 64)
    for part in images.split(2):
        net(part, torch.zeros(2, 1, 4), torch.full((2, 1), -1))
    net.eval().decide((1, 2, 1, 2), batch=3)
    assert int(net.number) == 6
    assert torch.equal(net.seen.view(torch.float16)[:2], images[6:].half())  # the newest come first
    alone = CRDetector(3, 3, replace(TINY, stages=(1, 2, 1, 2))).trunk
    alone.load_state_dict({key: value for key, value in net.trunk.state_dict().items() if key in alone.state_dict()})
    known = net.seen.view(torch.float16).float()
    expected = torch.stack([alone.stem[0](part).mean((0, 2, 3)) for part in known.split(3)]).mean(0)
    torch.testing.assert_close(net.trunk.stem[1].running_mean, expected, rtol=1e-4, atol=1e-5)
    features, again = net.trunk.pyramid(known)[-1], net.decide((2, 2, 2, 2)).decide((1, 2, 1, 2), batch=3).trunk.pyramid(known)[-1]
    assert torch.equal(features, again)  # whatever was valued before
    evidence.property(
        "batch norms take a path's own statistics, of the last training images, before it is valued",
        "给路径估值之前，批归一化先在最近的训练图像上取该路径自己的统计量",
    )


@torch.inference_mode()
def test_open_choices_are_drawn_for_each_batch():
    """Figure 3: the first choices are made, the rest of the architecture is another one for every mini-batch; the same ones when valued again."""
    net = supernet("dilations").eval()

    def walked() -> list[tuple[int, ...]]:
        net.decide((3, 2))
        out = []
        for _ in range(20):
            net(torch.zeros(1, 3, 64, 64))
            out.append(tuple(spatial(block).dilation[0] for block in net.trunk.path()))
        return out

    paths = walked()
    assert {path[:2] for path in paths} == {(3, 2)}
    assert len({path[2:] for path in paths}) > 8
    assert walked() == paths


# --- The search


def test_greedy_search_is_algorithm_1(evidence):
    generator = torch.Generator().manual_seed(0)
    table = {o: float(torch.rand((), generator=generator)) for o in product(RATES, repeat=5)}
    calls: list[tuple[int, ...]] = []

    def value(part: tuple[int, ...]) -> float:
        """Exact mean over all ways to complete it, which the paper estimates."""
        calls.append(part)
        completions = [v for o, v in table.items() if o[: len(part)] == part]
        return sum(completions) / len(completions)

    found = greedy((RATES,) * 5, value, 3)
    assert len(calls) == len(set(calls)) == 3 + 4 * 9  # section 3.3.2: three, and then nine for each block
    by_hand: list[tuple[int, ...]] = [()]
    for _ in range(5):
        longer = sorted(((*part, o) for part in by_hand for o in RATES), key=value, reverse=True)
        by_hand = longer[:3]
    assert found == by_hand[0]
    assert greedy((RATES,) * 5, value, 243) == max(table, key=lambda o: table[o])
    additive = lambda part: sum((0.1, 0.3, 0.2)[o - 1] for o in part)  # noqa: E731
    assert greedy((RATES,) * 5, additive, 1) == (2,) * 5
    evidence.property(
        "greedy operation search: 3 + 9 (B - 1) evaluations with K = 3, the exhaustive optimum with a wide beam",
        "贪心的操作搜索：K = 3 时估值 3 + 9 (B - 1) 次，束够宽时得到穷举最优",
    )


def test_candidates():
    small = replace(VARIANTS["small"], candidates=7)
    found = drawn(small, torch.Generator().manual_seed(3))
    assert found[0] == small.original
    assert len(set(found)) == 7
    assert all(sum(tau) == 8 for tau in found)
    assert found == drawn(small, torch.Generator().manual_seed(3)) != drawn(small, torch.Generator().manual_seed(4))
    assert sorted(drawn(replace(small, candidates=1000), torch.Generator())) == sorted(eligible(small))


class Table:
    """Trials whose values are known: of late stages and of dilations in late blocks."""

    seed = 2

    def __init__(self, config: Config) -> None:
        self.config, self.asked, self.valued = config, [], []

    def run(self, candidates: Sequence[Mapping[str, Any]], *, variant: str | None = None, begin: Any = None) -> list[Trial]:
        self.asked += [(dict(c), begin is not None) for c in candidates]
        torch.manual_seed(len(self.asked))
        network = build(
            Detection.plain_spec(classes=3),
            replace(self.config, **{k: tuple(v) if k != "supernet" else v for k, v in candidates[0].items()}),
        )
        if begin is not None:
            begin[0](network)
        self.last = network
        return [Trial(settings=candidates[0], value=0.0, seconds=0, network=network.eval())]

    def value(self, network: nn.Module) -> float:
        assert isinstance(network, Supernet)
        self.valued.append(network.decided)
        if network.of_stages:
            return sum(i * n for i, n in enumerate(network.decided))
        return sum((d == 3) * (i > 2) + (d == 1) * (i <= 2) for i, d in enumerate(network.decided))


def test_find_hands_over_the_best_and_repeats_itself(evidence):
    assert PAPER.search is not None
    one, two = Table(TINY), Table(TINY)
    found = PAPER.search.find(TINY, one)
    assert found == {"stages": [1, 1, 1, 2], "dilations": [1, 1, 1, 3, 3]}
    assert found == PAPER.search.find(TINY, two)
    assert one.asked == [({"supernet": "stages"}, False), ({"stages": [1, 1, 1, 2], "supernet": "dilations"}, True)]
    assert PAPER.search.trials(TINY) == len(one.asked) == 2
    assert set(one.valued[:4]) == set(eligible(TINY)) == {(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)}
    assert PAPER.search.trials(replace(TINY, **found)) == 0
    assert all(PAPER.search.trials(config) == 0 for name, config in VARIANTS.items() if name not in ("search", "small"))
    named = Table(TINY)
    assert PAPER.search.find(replace(TINY, stages=(2, 1, 1, 1)), named)["dilations"] == [1, 1, 1, 3, 3]
    assert named.asked == [({"supernet": "dilations"}, False)]
    evidence.property(
        "a search trains two supernets, values only allocations of equal cost, and hands over the best; same seed, same network",
        "搜索训练两个超网，只给代价相等的分配估值，交出最好的一个；种子相同，网络相同",
    )


def test_the_operation_supernet_goes_on_from_the_other():
    table = Table(TINY)
    PAPER.search.find(TINY, table)
    torch.manual_seed(1)
    first = build(Detection.plain_spec(classes=3), replace(TINY, supernet="stages"))
    for key, value in table.last.named_parameters():
        assert torch.equal(value, dict(first.named_parameters())[key]), key


# --- What a person gets to see


@pytest.mark.parametrize(
    "changes", [{"stages": (1, 2)}, {"stages": (0, 2, 2, 2)}, {"dilations": (1, 2)}, {"dilations": (0,) * 5}, {"stages": (2, 2, 2, 2, 2)}]
)
def test_bad_allocations_are_refused(changes):
    with pytest.raises(InputError):
        CRDetector(3, 3, replace(TINY, **changes))


def test_the_field_of_a_map_grows_with_dilation(evidence):
    net = CRDetector(3, 3, replace(fixed("basic", 1, 1, 1, 2), width=8, detector=DETECTORS["test"])).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_()  # no path through the network cancels another
    images = torch.rand(1, 3, 320, 320)
    narrow = net.fields(images)
    net.trunk.dilate((1, 1, 1, 2, 3))
    wide = net.fields(images)
    assert len(narrow) == len(wide) == 3  # P3 to P5
    assert all(field.shape == (320, 320) for field in wide)
    assert [area_ratio(field, 0.5) for field in narrow] == sorted(area_ratio(field, 0.5) for field in narrow)
    assert area_ratio(wide[-1], 0.5) > 1.3 * area_ratio(narrow[-1], 0.5)
    evidence.property(
        "the effective receptive field of P5 grows when the last stage is dilated (figure 1)",
        "最后一个阶段加空洞后，P5 的有效感受野变大（图 1）",
    )


def test_recipe_of_section_4_1():
    full, small = recipe(VARIANTS["resnet50"]), recipe(VARIANTS["small"])
    assert (full.optimizer, full.momentum, full.weight_decay) == ("sgd", 0.9, 1e-4)
    assert full.lr / full.batch_size == 0.00125
    assert [round(13 * at) for at in full.decay_at] == [8, 11]
    assert small.optimizer == "adamw"


def test_groups_of_resnext():
    block = Backbone(3, fixed("resnext", 1, 1, 1, 1)).path()[1]
    assert (spatial(block).groups, spatial(block).in_channels, spatial(block).weight.shape[1]) == (32, 256, 8)
