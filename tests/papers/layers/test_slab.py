"""SLAB against numbers of the official networks, folding by algebra, its attention by hand, and both as layers of other networks."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paperworks.errors import InputError
from paperworks.nn.fuse import fused
from paperworks.papers.backbones.convnext.convnext import PAPER as CONVNEXT
from paperworks.papers.backbones.convnext.convnext import LayerNorm
from paperworks.papers.backbones.vit.vit import MSA
from paperworks.papers.backbones.vit.vit import PAPER as VIT
from paperworks.papers.layers.agent_attention.trunks import Place, as_map, as_tokens
from paperworks.papers.layers.slab.slab import (
    PAPER,
    VARIANTS,
    Affine,
    Config,
    Linear,
    Norm,
    PRepBN,
    RepBN,
    SimplifiedLinearAttention,
    build,
    folded,
    normalised,
    put_attention,
    put_norm,
    recipe,
)
from paperworks.papers.layers.slab.weights import PUBLISHED, SOURCES
from paperworks.tasks.classification import Classification
from peers import macs, relative, scattered, trained

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "slab.json").read_text())
SETTINGS = {
    "deit": Config(depths=(2,), widths=(12,), heads=(3,), patch=4, linear_blocks=(2,), image_size=56),
    "pvt": replace(
        VARIANTS["pvt_t"], depths=(1, 1, 2, 1), widths=(8, 16, 24, 32), heads=(1, 2, 3, 4), linear_blocks=(1, 1, 2, 1), image_size=64
    ),
    "swin": replace(
        VARIANTS["swin_t"],
        depths=(2, 2, 2),
        widths=(12, 24, 48),
        heads=(2, 3, 4),
        ratios=(4, 4, 4),
        linear_blocks=(2, 0, 0),
        image_size=112,
    ),
}
"""The little networks of the fixture."""
SPEC = Classification.plain_spec(size=(32, 32))
PLACE = Place(stage=0, block=0, width=12, heads=3, side=6, class_token=False)


def built(config: Config, classes: int = 10, side: int = 32):
    torch.manual_seed(0)
    return build(Classification.plain_spec(classes=classes, size=(side, side)), config).eval()


def official(name: str):
    """The fixture's network with its weights, and the image."""
    draw = runpy.run_path(str(FIXTURES / "slab_record.py"))["draw"]
    config, golden = SETTINGS[name], FIXTURE["networks"][name]
    net = built(replace(config, drop_path=0.0), 7)
    state = SOURCES["official"]({key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}, config)
    counters = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}
    net.load_state_dict(state | counters)
    return net, draw("image", (2, 3, config.image_size, config.image_size)), golden


# --- Sizes


@pytest.mark.parametrize("name", FIXTURE["sizes"])
def test_parameters_and_multiply_adds_are_the_official_codes(name):
    with torch.device("meta"):
        net = built(VARIANTS[name], 1000)
    parameters, multiply_adds = FIXTURE["sizes"][name]
    unused = VARIANTS[name].widths[0] if name.startswith("deit") else 0  # a class token that is never read
    assert sum(p.numel() for p in net.parameters()) == parameters - unused
    assert macs(net, 224) == pytest.approx(multiply_adds, rel=1e-3)


def test_every_variant_is_counted_here_and_as_large_as_is_known():
    assert set(FIXTURE["sizes"]) | {"small", "test"} == set(VARIANTS)
    known = {"deit_t": 6_198_401, "deit_s": 22_992_641, "swin_t": 29_216_605}
    assert {name: FIXTURE["sizes"][name][0] for name in known} == known


# --- The official code


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_equal_the_official_code(evidence, name):
    net, image, golden = official(name)
    theirs = torch.tensor(golden["logits"])
    error = relative(net(image)["logits"].flatten(), theirs)
    assert error < TOLERANCE
    net.stages[0][0].norm1.rep.eta += 0.01  # a perturbed weight is seen
    assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    where = f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, SLAB-{name.upper()}"
    evidence.fidelity(against=f"{where}, evaluation", error=error)


@pytest.mark.parametrize("name", SETTINGS)
def test_training_equals_the_official_code(evidence, name):
    """Statistics of the batch, layer norm and RepBN mixed."""
    net, image, golden = official(name)
    net.train()
    for module in net.modules():
        if isinstance(module, PRepBN):
            module.advance((1 - FIXTURE["lambda"]) * module.ramp)
    theirs = torch.tensor(golden["training"])
    error = relative(net(image)["logits"].flatten(), theirs)
    assert error < TOLERANCE
    where = f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, SLAB-{name.upper()}"
    evidence.fidelity(against=f"{where}, training with lambda {FIXTURE['lambda']}", error=error)


def test_published_weights_have_an_address():
    assert set(PUBLISHED) <= set(VARIANTS)
    assert all(p.url.startswith("https://github.com/xinghaochen/SLAB/") and p.source in SOURCES for p in PUBLISHED.values())


# --- The norm


def test_repbn_is_a_batch_norm(evidence):
    """A batch norm with weight gamma + eta sigma and bias beta + eta mu gives the same (the paper's re-parameterisation)."""
    norm = scattered(RepBN(12))
    x = 3 + 2 * torch.randn(5, 7, 12)
    sigma, plain = (norm.bn.running_var + norm.bn.eps).sqrt(), nn.BatchNorm1d(12).eval()
    plain.load_state_dict(norm.bn.state_dict())
    plain.weight.copy_(norm.bn.weight + norm.eta * sigma)
    plain.bias.copy_(norm.bn.bias + norm.eta * norm.bn.running_mean)
    torch.testing.assert_close(norm(x), plain(x.mT).mT, rtol=1e-4, atol=1e-5)
    scale, shift = norm.affine()
    torch.testing.assert_close(norm(x), scale * x + shift, rtol=1e-4, atol=1e-5)
    evidence.property(
        "RepBN in evaluation is a batch norm with weight gamma + eta sigma and bias beta + eta mu",
        "评估时 RepBN 就是一个 BatchNorm，权重为 gamma + eta sigma，偏置为 beta + eta mu",
    )


def test_repbn_takes_statistics_over_batch_and_tokens():
    norm, x = RepBN(6).train(), 3 + 2 * torch.randn(4, 9, 6)
    y = norm(x) - x
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 1), correction=0), torch.ones(6), rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.bn.running_mean, 0.1 * x.mean((0, 1)))


def test_lambda_goes_from_layer_norm_to_repbn(evidence):
    net = scattered(put_norm(nn.Sequential(nn.LayerNorm(8)), Norm(ramp=0.4)))
    norm, x = net[0], torch.randn(3, 5, 8)
    norm.train()
    batch = norm.rep(x)
    for share, weight in ((0, 1), (0.1, 0.75), (0.3, 0.25), (0.4, 0), (0.9, 0)):
        norm.advance(share)
        torch.testing.assert_close(norm(x), weight * norm.layer_norm(x) + (1 - weight) * batch, rtol=1e-4, atol=1e-5)
    norm.advance(0)  # evaluation never sees the layer norm
    norm.eval()
    torch.testing.assert_close(norm(x), norm.rep(x))
    assert relative(norm(x), norm.layer_norm(x)) > 0.1
    evidence.property(
        "PRepBN: lambda falls linearly from 1 to 0 over the ramp, then RepBN alone; evaluation takes RepBN at any time",
        "PRepBN：lambda 在过渡期内由 1 线性降到 0，之后只剩 RepBN；评估时无论何时都用 RepBN",
    )


def test_at_once_and_without_the_shortcut():
    x = torch.randn(3, 5, 8)
    plain = PRepBN(nn.LayerNorm(8), Norm(ramp=0, shortcut=False)).train()
    plain.advance(0)
    reference = nn.BatchNorm1d(8).train()
    torch.testing.assert_close(plain(x), reference(x.mT).mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_exact(evidence, bias):
    norm, linear = scattered(RepBN(12)), scattered(nn.Linear(12, 20, bias=bias))
    x = 3 + 2 * torch.randn(5, 7, 12)
    torch.testing.assert_close(folded(norm, linear)(x), linear(norm(x)), rtol=1e-4, atol=1e-5)
    evidence.property(
        f"RepBN folded into the linear layer behind it, {'with' if bias else 'without'} a bias there, gives the same",
        f"RepBN 折叠进后面的线性层（{'有' if bias else '无'}偏置），结果相同",
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_whole_network_folds(evidence, name):
    net, image, _ = official(name)
    expected = net(image)["logits"]
    small = net.merged()
    assert relative(small(image)["logits"], expected) < 1e-5
    assert not [m for m in small.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d, PRepBN))]
    assert sum(isinstance(m, Affine) for m in small.modules()) == (name != "pvt")
    assert [m for m in net.modules() if isinstance(m, PRepBN)]  # the network itself is left as it was
    wrapped = fused(nn.Sequential(net))  # what prediction and export do
    assert relative(wrapped(image)["logits"], expected) < 1e-5
    assert not [m for m in wrapped.modules() if isinstance(m, nn.BatchNorm1d)]
    for ours, theirs in zip(small.pyramid(image), net.pyramid(image)):
        assert relative(ours, theirs) < 1e-5
    evidence.property(
        f"SLAB-{name.upper()} folded: same logits and features, no norm left",
        f"SLAB-{name.upper()} 折叠后：logits 和特征相同，没有剩下的归一化层",
    )


# --- The attention


@pytest.mark.parametrize("class_token", [False, True])
def test_attention_by_hand(evidence, class_token):
    layer = scattered(SimplifiedLinearAttention(replace(PLACE, class_token=class_token), 5))
    z = torch.randn(2, 36 + class_token, 12)
    q, k, v = layer.qkv(z).chunk(3, 2)
    q, k, out = q.relu(), (k + layer.positions).relu(), torch.zeros_like(v)
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        weights = q[..., part] @ k[..., part].mT
        out[..., part] = weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v[..., part]
        local = F.conv2d(as_map(v[..., part]), layer.conv.weight, layer.conv.bias, padding=2, groups=4)  # the same for each head
        out[:, class_token:, part] += as_tokens(local)
    torch.testing.assert_close(layer(z), layer.out(out), rtol=1e-3, atol=1e-4)
    assert (layer.attention(z) >= 0).all()
    evidence.property(
        f"simplified linear attention equals explicit normalised ReLU(Q) ReLU(K)^T V, {'with' if class_token else 'without'} a class token",
        f"简化线性注意力等于显式归一化的 ReLU(Q) ReLU(K)^T V，{'有' if class_token else '没有'}类别 token",
    )


def test_order_of_the_products_changes_the_cost_alone(evidence):
    """N d^2 where there are more tokens than channels of a head, else N^2 d."""
    costs = {}
    for n in (4, 8, 16, 256, 1024):
        q, k, v = (torch.rand(1, 2, n, 8) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            out = normalised(q, k, v)
        weights = q @ k.mT
        torch.testing.assert_close(out, weights / weights.sum(-1, keepdim=True) @ v, rtol=1e-4, atol=1e-5)
        costs[n] = counter.get_total_flops() // 2 - 2 * n * 8  # without the normaliser
    assert costs[4] == 2 * 2 * 4 * 4 * 8
    assert costs[16] == 2 * 2 * 16 * 8 * 8
    assert costs[1024] == 4 * costs[256]
    evidence.property(
        "linear attention: cost grows with N above d tokens and with N^2 below, the result is the same",
        "线性注意力：token 多于 d 个时代价随 N 增长，少于时随 N^2 增长，结果相同",
    )


# --- Other networks


@torch.enable_grad()
def test_in_a_vit_it_learns(evidence):
    host = VIT.build(SPEC, VIT.variants["test"])
    net = put_norm(put_attention(host, Linear()), Norm(ramp=0.5))
    norms = [m for m in net.modules() if isinstance(m, PRepBN)]
    assert len(norms) == 5
    assert sum(isinstance(m, SimplifiedLinearAttention) for m in net.modules()) == 2
    assert not [m for m in net.modules() if isinstance(m, MSA)]
    assert norms[0].layer_norm.eps == 1e-6  # the host's own
    losses = trained(net, steps=8)
    assert losses[-1] < losses[0]
    assert norms[0].weight == 0
    batch = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = net.eval()(batch)["logits"]
        assert relative(fused(net)(batch)["logits"], expected) < 1e-5
        exported = torch.export.export(fused(net), (batch,)).module()
        torch.testing.assert_close(exported(batch)["logits"], expected, rtol=1e-4, atol=1e-5)
    evidence.property(
        "in a ViT: five norms and two attentions replaced, it trains over the ramp, folds and exports",
        "放进 ViT：替换五个归一化和两个注意力，能在过渡期内训练，能折叠，能导出",
    )


def test_in_a_convnext_the_norms_of_maps_stay():
    net = put_norm(CONVNEXT.build(SPEC, CONVNEXT.variants["test"]), Norm())
    assert sum(isinstance(m, PRepBN) for m in net.modules()) == 6
    assert [m for m in net.modules() if isinstance(m, LayerNorm)]  # these see the channels first
    assert net.eval()(torch.randn(2, 3, 32, 32))["logits"].isfinite().all()


def test_what_does_not_fit():
    with pytest.raises(InputError, match="no place that fits"):
        put_attention(CONVNEXT.build(SPEC, CONVNEXT.variants["test"]), Linear())
    with pytest.raises(InputError, match="no place that fits"):
        put_norm(nn.Sequential(nn.Linear(2, 2)), Norm())
    with pytest.raises(InputError, match="ramp=2 is no share"):
        put_norm(nn.Sequential(nn.LayerNorm(2)), Norm(ramp=2))
    with pytest.raises(InputError, match="kernel=4 is even"):
        built(replace(VARIANTS["test"], kernel=4))
    with pytest.raises(InputError, match="linear_blocks wants a number for each"):
        built(replace(VARIANTS["test"], linear_blocks=(1,)))


def test_recipe_and_ramps():
    assert VARIANTS["swin_t"].ramp == pytest.approx(60_000 / 375_000)
    assert VARIANTS["pvt_t"].ramp == pytest.approx(300_000 / 375_000)
    deit, pvt = recipe(VARIANTS["deit_s"]), recipe(VARIANTS["pvt_m"])
    assert deit.lr / deit.batch_size == pytest.approx(1e-3 / 1024)
    assert (deit.clip, pvt.clip) == (5.0, 1.0)
    assert PAPER.auto[0] == "small"
    kinds = [
        ["L" if isinstance(b.attention, SimplifiedLinearAttention) else "S" for b in stage] for stage in built(SETTINGS["swin"]).stages
    ]
    assert kinds == [["L", "L"], ["S", "S"], ["S", "S"]]
