"""Mobile-Former against numbers of the released code, and its parts by hand and against torch's attention."""

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
from paperworks.papers.backbones.mobileformer.claim import ARMS
from paperworks.papers.backbones.mobileformer.mobileformer import (
    VARIANTS,
    Block,
    Bottleneck,
    Config,
    Downsampling,
    DynamicReLU,
    FixedReLU,
    Former,
    FormerToMobile,
    Lite,
    MobileFormer,
    MobileToFormer,
    attended,
    recipe,
)
from paperworks.papers.backbones.mobileformer.weights import SOURCES
from peers import check_pyramid, macs, randomised, relative

pytestmark = pytest.mark.usefixtures("no_gradients")

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "mobileformer.json").read_text())
KNOWN = {
    "508m": (13_976_976, 508),
    "294m": (11_422_648, 294),
    "214m": (9_425_920, 214),
    "151m": (7_595_828, 151),
    "96m": (4_585_252, 96),
    "52m": (3_469_092, 52),
    "26m": (3_232_788, 26),
}
"""Parameters of the released code, and the 10^6 multiply-adds that name the sizes."""
LITTLE = Config(
    stem=4, blocks=((2, 4, 1), (3, 8, 2), (2, 8, 1), (2, 12, 2)), tokens=3, token_width=16, hidden=24, stem_stride=1, image_size=32
)


def built(config: Config, side: int = 32, classes: int = 10) -> MobileFormer:
    torch.manual_seed(0)
    return MobileFormer(3, classes, side, config).eval()


# --- Sizes


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_and_multiply_adds_are_the_papers(name):
    """The names of the sizes are met where BatchNorm is counted too, as two operations a number; without it the figure is 2 to 9 % smaller."""
    normed = []
    with torch.device("meta"):
        net = built(VARIANTS[name], 224, classes=1000)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda _, given, out: normed.append(out.numel()))
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 224, 224))
    parameters, millions = KNOWN[name]
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert counter.get_total_flops() / 2e6 + 2 * sum(normed) / 1e6 == pytest.approx(millions, rel=0.01)


def test_every_variant_is_counted_here():
    assert set(KNOWN) | {"small", "test"} == set(VARIANTS)


def test_arms_of_the_claim_cost_the_same():
    costs = {}
    for arm, settings in ARMS.items():
        with torch.device("meta"):
            net = built(replace(VARIANTS["small"], stem=8, token_width=48, hidden=192, **settings))
        costs[arm] = (sum(p.numel() for p in net.parameters()), round(macs(net, 32) / 1e6, 1))
    assert costs["mobile_former"] == (178_562, 3.6)
    assert costs["mobile"] == (76_802, 3.8)


# --- Other implementations


@pytest.mark.parametrize("name", FIXTURE["networks"])
def test_outputs_equal_the_released_code(evidence, name):
    draw = runpy.run_path(str(FIXTURES / "mobileformer_record.py"))["draw"]
    settings, golden = FIXTURE["settings"][name], FIXTURE["networks"][name]
    config = Config(
        stem=settings["stem_chs"],
        blocks=tuple((expansion, width, stride) for _, expansion, width, _, stride, _ in settings["block_args"]),
        tokens=settings["token_num"],
        token_width=settings["token_dim"],
        hidden=settings["num_features"],
        groups=settings["group_num"],
    )
    net = built(config, 64, classes=7)
    released = {key: draw(key, tuple(shape)) for key, shape in golden["shapes"].items()}
    net.load_state_dict(SOURCES["official"]({"state_dict": released}, config))
    image, theirs = draw("image", tuple(FIXTURE["input"])), torch.tensor(golden["logits"])
    error = relative(net(image)["logits"].flatten(), theirs)
    assert error < TOLERANCE
    net.blocks[1].to_mobile.value.weight *= 1.1  # a perturbed weight is seen
    assert relative(net(image)["logits"].flatten(), theirs) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}", error=error)


def peer_of(queries: nn.Linear | None, keys: nn.Linear | None, values: nn.Linear | None, width: int, heads: int) -> nn.MultiheadAttention:
    """torch's attention with these projections, and the identity where there is none; its output is not projected."""
    peer = nn.MultiheadAttention(width, heads, batch_first=True)
    parts = [p or nn.Linear(width, width) for p in (queries, keys, values)]
    for part, given in zip(parts, (queries, keys, values)):
        if given is None:
            nn.init.eye_(part.weight)
            nn.init.zeros_(part.bias)
    peer.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
    peer.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    nn.init.eye_(peer.out_proj.weight)
    nn.init.zeros_(peer.out_proj.bias)
    return peer.eval()


def test_bridges_are_attention_that_projects_the_tokens_side_alone(evidence):
    x, z = torch.randn(2, 16, 3, 5), torch.randn(2, 4, 16)
    cells = x.flatten(2).mT

    there = randomised(MobileToFormer(16, 16))
    peer = peer_of(None, None, None, 16, 2)
    seen = peer(there.query(z), cells, cells)[0]
    gate = 2 * (there.gate(z) + 3).clamp(0, 6) / 6
    expected = F.layer_norm(z + there.out(gate * seen), (16,), there.norm.weight, there.norm.bias)
    error = relative(there(x, z), expected)

    back = randomised(FormerToMobile(16, 16))
    told = peer(cells, back.key(z), back.value(z))[0]
    error = max(error, relative(back(x, z), x + told.mT.reshape(x.shape)))

    former = randomised(Former(16))
    attention = peer_of(former.query, None, None, 16, 4)
    y = former.norm1(z + former.out(attention(z, z, z)[0]))
    error = max(error, relative(former(z), former.norm2(y + former.mlp(y))))
    assert error < TOLERANCE
    evidence.fidelity(against="torch.nn.MultiheadAttention with identity projections: both bridges and the Former", error=error)


# --- Mechanisms


def test_dynamic_relu_is_the_larger_of_two_lines_of_the_first_token(evidence):
    relu = randomised(DynamicReLU(5, 16))
    x, z = torch.randn(3, 5, 4, 4), torch.randn(3, 6, 16)
    hidden = relu.slopes[0](z[:, 0]).clamp_min(0)
    sigmoid = (relu.slopes[2](hidden) + 3).clamp(0, 6) / 6
    a1, a2 = 2 * (sigmoid[:, :5] - 0.5) + 1, 2 * (sigmoid[:, 5:] - 0.5)
    expected = torch.maximum(a1[:, :, None, None] * x, a2[:, :, None, None] * x)
    torch.testing.assert_close(relu(x, z), expected)
    other = z.clone()
    other[:, 1:] += 1
    assert torch.equal(relu(x, z), relu(x, other))  # the other tokens do not matter
    other[:, 0] += 1
    assert not torch.equal(relu(x, z), relu(x, other))
    for part in (relu.slopes[0], relu.slopes[2]):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    torch.testing.assert_close(relu(x, z), F.relu(x))  # slopes of 1 and 0
    evidence.property(
        "dynamic ReLU: max of two lines, slopes from the first token alone; with slopes 1 and 0 the ReLU",
        "动态 ReLU：取两条直线中较大的一条，斜率只由第一个 token 决定；斜率为 1 和 0 时就是 ReLU",
    )


def test_block_goes_to_the_former_through_mobile_and_back(evidence):
    block = randomised(Block(8, 12, 3, 2, LITTLE))
    x, z = torch.randn(2, 8, 8, 8), torch.randn(2, 3, 16)
    tokens = block.former(block.to_former(x, z))  # of the block's input
    features = block.mobile(x, tokens)  # with the new tokens
    y, w = block(x, z)
    torch.testing.assert_close(y, block.to_mobile(features, tokens))
    torch.testing.assert_close(w, tokens)
    assert y.shape == (2, 12, 4, 4)
    evidence.property(
        "block: Mobile to Former on its input, Former, Mobile with the new tokens, Former to Mobile on its output",
        "块：Mobile → Former 看块的输入，Former，Mobile 使用新的 token，Former → Mobile 作用于 Mobile 的输出",
    )


def test_what_is_global_reaches_every_cell_through_the_tokens_only(evidence):
    """One pixel of the image changes; without the Former the far corner does not notice in the first blocks, with it it does."""
    image = torch.randn(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, 0, 0] += 1
    config = replace(LITTLE, blocks=((2, 4, 1), (3, 8, 2), (2, 8, 1)))
    for former, heard in ((True, True), (False, False)):
        net = randomised(built(replace(config, former=former)))
        corner = (net.pyramid(changed)[-1] - net.pyramid(image)[-1])[0, :, -1, -1]
        assert bool(corner.abs().max() > 0) is heard
    evidence.property(
        "the tokens carry a change of one pixel to the farthest cell; Mobile alone does not",
        "改动一个像素，经由 token 能传到最远的格子；只有 Mobile 时传不到",
    )


def test_mobile_blocks_by_hand():
    bottleneck = randomised(Bottleneck(6, 6, 3, replace(LITTLE, dynamic=False)))
    x, z = torch.randn(2, 6, 5, 5), torch.randn(2, 3, 16)
    y = F.relu6(bottleneck.expand(x))
    y = bottleneck.project(F.relu6(bottleneck.depthwise(y)))
    torch.testing.assert_close(bottleneck(x, z), x + y)
    assert bottleneck.depthwise[0].groups == 18
    down = randomised(Downsampling(6, 8, 3, replace(LITTLE, dynamic=False)))
    u = down.narrow(F.relu6(down.stride(x)))
    torch.testing.assert_close(down(x, z), u + down.project(F.relu6(down.expand(u))))
    assert (down.stride[0].out_channels, down.expand[0].out_channels) == (18, 32)
    lite = randomised(Lite(4, 4, 2, 1, LITTLE))
    picture = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(lite(picture), picture + lite.project(lite.depthwise(picture)))


def test_tokens_start_the_same_for_every_image_and_end_different():
    net = randomised(built(LITTLE))
    image = torch.randn(2, 3, 32, 32)
    assert net.tokens.shape == (3, 16)
    _, z = net.run(image)
    assert z.shape == (2, 3, 16)
    assert not torch.allclose(z[0], z[1])


def test_what_is_taken_away_is_gone():
    alone = built(replace(LITTLE, former=False))
    assert not [name for name, _ in alone.named_parameters() if "token" in name or "former" in name or "slopes" in name]
    assert alone(torch.randn(2, 3, 32, 32))["logits"].shape == (2, 10)
    one_way = built(replace(LITTLE, former_to_mobile=False))
    assert not [name for name, _ in one_way.named_parameters() if "to_mobile" in name]
    assert [type(m.relu1) for m in built(replace(LITTLE, dynamic=False)).modules() if isinstance(m, Bottleneck | Downsampling)] == [
        FixedReLU
    ] * 3


def test_where_tokens_look(evidence):
    net, image = randomised(built(LITTLE)), torch.randn(2, 3, 32, 32)
    maps = attended(net, image)
    assert [tuple(m.shape) for m in maps] == [(2, 2, 3, 32, 32), (2, 2, 3, 16, 16), (2, 2, 3, 16, 16), (2, 2, 3, 8, 8)]
    for weights in maps:
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 2, 3))
    last, given = net.to_former, []
    hook = last.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    _, after = net.run(image)
    hook.remove()
    (x, z), weights = given[0], maps[-1].flatten(3)  # what was found with these weights is what the bridge gave
    seen = (weights @ x.flatten(2).unflatten(1, (2, -1)).mT).transpose(1, 2).flatten(2)
    torch.testing.assert_close(last.norm(z + last.out(2 * F.hardsigmoid(last.gate(z)) * seen)), after)
    evidence.property("attention maps of every bridge sum to one over the cells", "每座桥的注意力图在各格子上之和为一")


def test_first_weights():
    net = built(VARIANTS["96m"], 224)
    block = net.blocks[4]
    assert float(block.to_former.query.weight.std()) == pytest.approx(0.01, rel=0.05)
    assert not block.former.out.bias.any()
    assert float(block.mobile.expand[0].weight.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.1)
    x, z = torch.randn(1, 256, 3, 3), net.tokens[None]
    torch.testing.assert_close(block.mobile.relu1(x, z), F.relu(x), rtol=0.05, atol=0.1)  # nearly a ReLU


@pytest.mark.parametrize(
    ("name", "side", "widths", "strides"),
    [("294m", 224, (16, 24, 48, 128, 192), (2, 4, 8, 16, 32)), ("52m", 224, (12, 24, 64, 96), (4, 8, 16, 32)),
     ("small", 32, (12, 16, 32, 64), (1, 2, 4, 8)), ("small", 128, (12, 16, 32, 64), (2, 4, 8, 16))],
)  # fmt: skip
def test_pyramid(name, side, widths, strides):
    with torch.device("meta"):
        net = built(VARIANTS[name], side)
        check_pyramid(net, side)
    assert (net.widths, net.strides) == (widths, strides)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"token_width": 18}, "do not divide tokens of 18"), ({"groups": 3}, "a width of 4 does not divide among 2 heads and among 3 groups")],
)
def test_settings_that_make_no_network(setting, message):
    with pytest.raises(InputError, match=message):
        built(replace(LITTLE, **setting))


def test_recipe_is_that_of_the_released_commands():
    decays = {name: recipe(config).weight_decay for name, config in VARIANTS.items() if config.image_size}
    assert decays == {"508m": 0.2, "294m": 0.2, "214m": 0.15, "151m": 0.1, "96m": 0.1, "52m": 0.1, "26m": 0.08}
    large = recipe(VARIANTS["508m"])
    assert large.lr / large.batch_size == pytest.approx(1e-3 / 1024)
    assert (large.optimizer, large.clip, large.augment.erase) == ("adamw", None, 0.2)
