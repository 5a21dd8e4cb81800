"""GCNet against timm, torchvision and numbers of the official code and of mmcv, and what the blocks promise."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.spatial.distance
import timm
import torch
import torchvision
from timm.layers import GlobalContext as TimmBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.nn.resnet import ResNet
from paperworks.papers.backbones.convnext import convnext
from paperworks.papers.backbones.vit import vit
from paperworks.papers.layers.gcnet.gcnet import (
    LAYERS,
    SIMPLIFIED,
    SQUEEZE_EXCITATION,
    VARIANTS,
    Context,
    GCNet,
    GlobalContext,
    NonLocal,
    Pairwise,
    cosine_distance,
    jensen_shannon,
    put,
    query_dependence,
    query_share,
    recipe,
    units,
)
from peers import check_pyramid, randomised, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "gcnet.json").read_text())
KNOWN = {
    "r50": 25_557_032,
    "r50+nl": 27_656_744,
    "r50+snl": 26_607_657,
    "r50+gc1": 25_690_345,
    "r50+gc": 28_078_773,
    "r50+se": 28_062_632,
    "r50+gc_r4": 35_557_941,
    "r101+gc": 49_337_222,
    "r101+gc_r4": 63_510_854,
}
PAPERS_MILLIONS = {"r50": 25.56, "r50+nl": 27.66, "r50+snl": 26.61, "r50+gc1": 25.69, "r50+gc": 28.08}
PAPERS_FLOPS = {"r50": 3.86, "r50+snl": 3.86, "r50+gc1": 3.86, "r50+gc": 3.87}


def built(name: str, side: int = 224, classes: int = 1000) -> GCNet:
    torch.manual_seed(0)
    return GCNet(3, classes, side, VARIANTS[name]).eval()


def converted(state: dict[str, torch.Tensor], names: dict[str, str], target: nn.Module) -> nn.Module:
    """``target`` with another implementation's weights under our names and shapes."""
    ours = target.state_dict()
    target.load_state_dict({names[key]: value.reshape(ours[names[key]].shape) for key, value in state.items()})
    return target.eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds(name):
    with torch.device("meta"):
        net = built(name)
        for block in (m for m in net.modules() if type(m).__name__ == "Bottleneck"):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)  # the paper counts the ResNet of 2015
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 224, 224))
    count = sum(p.numel() for p in net.parameters())
    assert count == KNOWN[name]
    if name in PAPERS_MILLIONS:
        assert round(count / 1e6, 2) == PAPERS_MILLIONS[name]
    if name in PAPERS_FLOPS:
        assert counter.get_total_flops() / 2e9 == pytest.approx(PAPERS_FLOPS[name], rel=0.02)


def test_every_variant_of_the_paper_is_counted_here():
    assert set(KNOWN) | {"small", "small_nl", "test"} == set(VARIANTS)


def test_one_block_has_the_catalogues_count():
    assert [sum(p.numel() for p in GlobalContext(width, Context()).parameters()) for width in (1024, 2048)] == [133_313, 528_769]


# --- Other implementations

TIMM = {
    "conv_attn.weight": "mask.weight",
    "conv_attn.bias": "mask.bias",
    **{f"mlp_{f}.{a}.{p}": f"transform.{i}.{p}" for f in ("add", "scale") for a, i in (("fc1", 0), ("norm", 1), ("fc2", 3)) for p in ("weight", "bias")},
}  # fmt: skip


@pytest.mark.parametrize("pooling", ["attention", "average"])
@pytest.mark.parametrize("fusion", ["add", "scale"])
def test_block_equals_timms(evidence, pooling, fusion):
    peer = randomised(
        TimmBlock(64, use_attn=pooling == "attention", fuse_add=fusion == "add", fuse_scale=fusion == "scale", rd_ratio=1 / 16)
    )
    for m in peer.modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 1e-5  # the official block's; timm's default is 1e-6
    block = converted(peer.state_dict(), TIMM, GlobalContext(64, Context(pooling=pooling, fusion=fusion)))
    x = torch.randn(2, 64, 7, 9)
    error = relative(block(x) - x, peer(x) - x)
    assert error < TOLERANCE
    block.transform[0].weight[0, 0] += 0.3  # a perturbed weight is seen
    assert relative(block(x) - x, peer(x) - x) > TOLERANCE
    evidence.fidelity(against=f"timm {timm.__version__} GlobalContext, {pooling} pooling, {fusion}", error=error)


@pytest.mark.parametrize("name", FIXTURE["context"])
def test_block_equals_the_official_code(evidence, name):
    draw, golden = runpy.run_path(str(FIXTURES / "gcnet_record.py"))["draw"], FIXTURE["context"][name]
    pooling, fusion = name.split()
    names = {"conv_mask.weight": "mask.weight", "conv_mask.bias": "mask.bias"}
    names |= {f"channel_{fusion}_conv.{i}.{p}": f"transform.{i}.{p}" for i in (0, 1, 3) for p in ("weight", "bias")}
    settings = {"att": "attention", "avg": "average", "add": "add", "mul": "scale"}
    block = GlobalContext(FIXTURE["input"][1], Context(pooling=settings[pooling], fusion=settings[fusion], ratio=FIXTURE["ratio"]))
    converted({key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}, names, block)
    ours = block(draw("image", tuple(FIXTURE["input"]))).flatten()[:: FIXTURE["every"]]
    error = relative(ours, torch.tensor(golden["output"]))
    assert error < TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}", error=error)


FUNCTIONS = {"gaussian": "gaussian", "embedded_gaussian": "embedded", "dot_product": "dot", "concatenation": "concat"}


@pytest.mark.parametrize("mode", FIXTURE["non_local"])
def test_non_local_block_equals_mmcvs(evidence, mode):
    draw, golden = runpy.run_path(str(FIXTURES / "gcnet_record.py"))["draw"], FIXTURE["non_local"][mode]
    ours = {"g": "value", "theta": "query", "phi": "key", "conv_out": "out"}
    names = {f"{theirs}.conv.{p}": f"{own}.{p}" for theirs, own in ours.items() for p in ("weight", "bias")}
    names["concat_project.conv.weight"] = "pair.weight"
    block = NonLocal(FIXTURE["input"][1], Pairwise(function=FUNCTIONS[mode]))
    converted({key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}, names, block)
    found = block(draw("image", tuple(FIXTURE["input"]))).flatten()[:: FIXTURE["every"]]
    error = relative(found, torch.tensor(golden["output"]))
    assert error < TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['mmcv']} NonLocal2d, {mode}, without its scale", error=error)


def test_squeeze_excitation_is_torchvisions(evidence):
    peer = randomised(torchvision.ops.SqueezeExcitation(64, 4))
    names = {f"fc{i}.{p}": f"transform.{2 * i - 2}.{p}" for i in (1, 2) for p in ("weight", "bias")}
    block = converted(peer.state_dict(), names, GlobalContext(64, SQUEEZE_EXCITATION))
    x = torch.randn(2, 64, 7, 9)
    error = relative(block(x), peer(x))
    assert error < TOLERANCE
    evidence.fidelity(against=f"torchvision {torchvision.__version__} SqueezeExcitation", error=error)


def test_network_equals_torchvisions_resnet_with_timms_blocks(evidence):
    peer = torchvision.models.resnet50()
    for stage in (peer.layer2, peer.layer3, peer.layer4):
        for unit in stage:
            block = TimmBlock(unit.bn3.num_features, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16)
            block.mlp_add.norm.eps = 1e-5
            unit.bn3 = nn.Sequential(unit.bn3, block)
    randomised(peer)
    net, state = built("r50+gc"), {}
    for key, value in peer.state_dict().items():
        key = next((key.replace(old, new) for old, new in TIMM.items() if key.endswith("1." + old)), key)
        state[key.replace("fc.", "head.") if key.startswith("fc.") else f"body.{key}"] = value
    ours = net.state_dict()
    net.load_state_dict({key: value.reshape(ours[key].shape) for key, value in state.items()})
    image = torch.randn(1, 3, 96, 96)
    theirs = peer(image)
    error = relative(net(image)["logits"], theirs)
    assert error < TOLERANCE
    net.body.layer3[2].bn3[1].mask.weight.mul_(2)
    assert relative(net(image)["logits"], theirs) > TOLERANCE
    evidence.fidelity(
        against=f"torchvision {torchvision.__version__} resnet50 with timm {timm.__version__} GlobalContext in 13 units", error=error
    )


# --- What the blocks promise


@pytest.mark.parametrize("function", ["gaussian", "embedded", "dot", "concat"])
def test_non_local_by_hand(evidence, function):
    block = randomised(NonLocal(8, Pairwise(function=function))).double()
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    cells = x[0].flatten(1).T
    w = {n: m.weight.flatten(1) for n, m in block.named_modules() if isinstance(m, nn.Conv2d)}
    b = {n: m.bias for n, m in block.named_modules() if isinstance(m, nn.Conv2d)}
    expected = cells.clone()
    for i, here in enumerate(cells):
        q = here if function == "gaussian" else w["query"] @ here + b["query"]
        keys = [there if function == "gaussian" else w["key"] @ there + b["key"] for there in cells]
        if function == "concat":
            f = torch.stack([(block.pair.weight[0, :, 0] @ torch.cat([q, k])).clamp_min(0) for k in keys]) / len(cells)
        else:
            f = torch.stack([q @ k for k in keys])
            f = f / len(cells) if function == "dot" else f.exp() / f.exp().sum()
        gathered = sum(f[j] * (w["value"] @ there + b["value"]) for j, there in enumerate(cells))
        expected[i] += w["out"] @ gathered + b["out"]
    torch.testing.assert_close(block(x)[0].flatten(1).T, expected)
    evidence.property(
        f"non-local block, {function}: eqs. 1 and 2 by a loop over queries and keys",
        f"non-local 块，{function}：对查询和键循环，核对式 1、式 2",
    )


def test_simplified_block_is_a_non_local_block_whose_queries_are_all_the_same(evidence):
    """Eq. 3: with one query for all positions, W_z W_v moves out of the sum."""
    block, simple = randomised(NonLocal(8, Pairwise())), GlobalContext(8, SIMPLIFIED).eval()
    block.query.weight.zero_()
    x = torch.randn(2, 8, 5, 6)
    assert float(cosine_distance(block.attention(x)).max()) < 1e-6
    key, value, out = (m.weight.flatten(1) for m in (block.key, block.value, block.out))
    simple.mask.weight.copy_(block.query.bias[None] @ key)
    simple.transform[0].weight.copy_(out @ value)
    simple.transform[0].bias.copy_(out @ block.value.bias + block.out.bias)
    torch.testing.assert_close(simple(x), block(x), rtol=1e-4, atol=1e-5)
    block.query.weight.normal_(0, 1)
    assert relative(simple(x), block(x)) > 0.01
    evidence.property(
        "simplified non-local block: equal to a non-local block whose queries do not depend on the position, and only then",
        "简化 non-local 块：等于查询与位置无关的 non-local 块，并且仅在那时相等",
    )


def test_context_is_the_same_everywhere_and_any_place_can_change_it(evidence):
    block = randomised(GlobalContext(16, Context(ratio=4)))
    x = torch.randn(2, 16, 6, 7)
    added = block(x) - x
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.attention(x.flatten(2)).sum(2), torch.ones(2, 1))
    far = x.clone()
    far[:, :, 0, 0] += 1
    assert ((block(far) - block(x))[:, :, 5, 6].abs() > 1e-4).any()
    scaling = randomised(GlobalContext(16, Context(ratio=4, fusion="scale")))
    factor = scaling(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(factor), rtol=1e-4, atol=1e-5)
    evidence.property(
        "one context vector an image: added (or multiplied) alike at all positions, from all positions",
        "每张图一个上下文向量：来自所有位置，在所有位置同样相加（或相乘）",
    )


def test_transforms_differ_by_what_stands_between():
    kinds = {
        kind: [type(m).__name__ for m in GlobalContext(32, Context(transform=kind)).transform] for kind in ("bottleneck", "bare", "linear")
    }
    assert kinds == {"bottleneck": ["Linear", "LayerNorm", "ReLU", "Linear"], "bare": ["Linear", "ReLU", "Linear"], "linear": ["Linear"]}
    assert GlobalContext(32, Context()).transform[1].eps == 1e-5
    assert GlobalContext(32, Context(ratio=4)).transform[0].out_features == 8
    assert GlobalContext(8, Context(ratio=16)).transform[0].out_features == 4


@pytest.mark.parametrize("block", [GlobalContext(16, Context()), GlobalContext(16, SIMPLIFIED), NonLocal(16, Pairwise())])
def test_a_new_adding_block_is_the_identity(block):
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block(x), x)


def test_a_new_scaling_block_halves():
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(GlobalContext(16, SQUEEZE_EXCITATION)(x), x / 2)


# --- Where they stand


def test_blocks_stand_inside_all_units_of_c3_to_c5_or_once_in_c4(evidence):
    with torch.device("meta"):
        many, one = built("r50+gc"), built("r50+gc1")
    inside = [name for name, m in many.named_modules() if isinstance(m, GlobalContext)]
    assert inside == [f"body.layer{i}.{j}.bn3.1" for i, depth in ((2, 4), (3, 6), (4, 3)) for j in range(depth)]
    assert [name for name, m in one.named_modules() if isinstance(m, GlobalContext)] == ["body.layer3.5"]
    assert len(one.body.layer3) == 7
    evidence.property(
        "GC blocks: before the addition in each of the 13 units of c3 to c5; a single one before the last unit of c4",
        "GC 块：放在 c3 到 c5 全部 13 个单元的相加之前；只放一个时在 c4 最后一个单元之前",
    )


def test_inside_comes_before_the_addition_and_after_behind_it():
    x, outputs = torch.randn(1, 3, 32, 32), {}
    for place in ("inside", "after"):
        torch.manual_seed(0)
        body = ResNet(18, stem="cifar", width=8)
        assert len(units(body)) == 6
        outputs[place] = randomised(put(body, Context(place=place, ratio=4))).eval()(x)
        kinds = [type(unit).__name__ for unit in body.layer2]
        assert kinds == (["BasicBlock"] * 2 if place == "inside" else ["Sequential"] * 2)
    assert relative(outputs["inside"], outputs["after"]) > 0.01


def test_a_detectors_resnet_is_found():
    """The paper's main use: any network with a ResNet inside."""
    network = nn.ModuleDict({"backbone": nn.ModuleDict({"body": ResNet(18, width=8)}), "head": nn.Conv2d(64, 8, 3)})
    put(network, Context())
    assert sum(isinstance(m, GlobalContext) for m in network.modules()) == 6


@pytest.mark.parametrize("name", LAYERS)
def test_other_backbones_take_it_behind_their_blocks(evidence, name):
    torch.manual_seed(0)
    host = convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"]).eval()
    image = torch.randn(2, 3, 32, 32)
    before = host(image)["logits"]
    host = LAYERS[name].put(host.train(), LAYERS[name].config)
    assert host.training
    host.eval()
    places = [key for key, m in host.named_modules() if isinstance(m, GlobalContext | NonLocal)]
    assert places == ["stages.1.0.1", "stages.2.0.1", "stages.2.1.1", "stages.3.0.1"]  # not at the finest resolution
    after = host(image)["logits"]
    assert torch.allclose(before, after, atol=1e-6) == (name != "squeeze_excitation")
    for key in places:
        randomised(host.get_submodule(key))
    assert relative(host(image)["logits"], before) > 1e-3
    evidence.property(
        f"{name} in a ConvNeXt: four places, behind the blocks below the finest resolution",
        f"ConvNeXt 中的 {name}：四处，都在块之后，最细的分辨率除外",
    )


def test_host_with_context_is_exported():
    with torch.inference_mode(False), torch.no_grad():
        host = put(convnext.ConvNeXt(3, 5, 32, convnext.VARIANTS["test"]), Context(start=0.1)).eval()
        image = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(torch.export.export(host, (image,)).module()(image)["logits"], host(image)["logits"])


def test_networks_without_a_place_say_so():
    network = vit.ViT(3, 5, 32, vit.VARIANTS["test"])
    with pytest.raises(InputError, match="no place"):
        put(network, Context())
    with pytest.raises(InputError, match="ratio=0"):
        GlobalContext(8, Context(ratio=0))
    with pytest.raises(InputError, match="reduction=0"):
        NonLocal(8, Pairwise(reduction=0))


# --- What the paper measures


def test_distances_are_means_over_all_pairs(evidence):
    v = torch.rand(2, 7, 9)
    cosine = torch.tensor([[[(1 - torch.cosine_similarity(a, b, 0)) / 2 for b in one] for a in one] for one in v])
    torch.testing.assert_close(cosine_distance(v), cosine.mean((1, 2)))
    p = v / v.sum(2, keepdim=True)
    jsd = torch.tensor([[[scipy.spatial.distance.jensenshannon(a, b) ** 2 for b in one] for a in one] for one in p.double().numpy()])
    torch.testing.assert_close(jensen_shannon(p).double(), jsd.mean((1, 2)), rtol=1e-4, atol=1e-6)
    evidence.property(
        "eq. 4: cosine distance of all pairs without looking at pairs; Jensen-Shannon divergence as scipy's",
        "式 4：不逐对计算而得到所有配对的余弦距离；Jensen-Shannon 散度与 scipy 一致",
    )


def test_share_of_the_query():
    shared = torch.rand(1, 1, 9).expand(1, 7, 9).softmax(2)
    assert float(query_share(shared)) < 1e-6
    assert float(query_share(torch.eye(9)[None])) == pytest.approx(1)
    assert 0 < float(query_share((shared[0, 0] + 0.1 * torch.rand(1, 7, 9)).softmax(2))) < 1


def test_query_dependence_looks_at_every_non_local_block():
    net = randomised(GCNet(3, 10, 32, replace(VARIANTS["small_nl"], width=4)))
    image = torch.randn(3, 3, 32, 32)
    found = query_dependence(net, image)
    assert set(found) == {"input", "output", "attention", "jsd", "query_share"}
    assert all(0 < value < 1 for value in found.values())
    block = next(m for m in net.modules() if isinstance(m, NonLocal))
    block.query.weight.zero_()
    blind = query_dependence(net, image)
    assert blind["attention"] < 1e-6
    assert blind["query_share"] < 1e-6
    assert blind["input"] == pytest.approx(found["input"])
    assert query_dependence(built("test", 32, 10), image) == {}


# --- Training


def test_recipe():
    paper, laptop = recipe(VARIANTS["r50+gc"]), recipe(VARIANTS["small"])
    assert (paper.optimizer, paper.weight_decay, paper.patch) == ("sgd", 1e-4, 224)
    assert paper.lr / paper.batch_size == pytest.approx(0.1 / 256)
    assert laptop == recipe(VARIANTS["small_nl"])


@pytest.mark.parametrize(("name", "side", "strides"), [("r50+gc", 224, (4, 8, 16, 32)), ("small", 32, (1, 2, 4, 8))])
def test_pyramid(name, side, strides):
    with torch.device("meta"):
        net = built(name, side)
        check_pyramid(net, side)
    assert net.strides == strides


def test_a_little_noise_at_the_start_lets_every_weight_learn():
    assert VARIANTS["small"].block == replace(VARIANTS["r50+gc"].block, ratio=4, start=0.01)
