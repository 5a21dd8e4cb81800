"""nnFormer: parameter counts and outputs of the official networks, and each mechanism by itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import zlib
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from paperworks.papers.segmentation.nnformer.nnformer import (
    VARIANTS,
    Config,
    NNFormer,
    SkipBlock,
    VolumeAttention,
    join,
    loss,
    offsets,
    recipe,
    split,
    supervised,
)
from paperworks.tasks.segmentation import Segmentation

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "nnformer.json").read_text())
NETWORKS = {
    "synapse": (
        "nnFormer_synapse",
        (32, 64, 64),
        1,
        {"embedding_dim": 8, "num_heads": [1, 2, 4, 8], "patch_size": [2, 4, 4], "window_size": [4, 4, 4, 2]},
    ),
    "tumour": (
        "nnFormer_tumor",
        (64, 64, 64),
        2,
        {"embedding_dim": 8, "num_heads": [1, 2, 4, 8], "patch_size": [4, 4, 4], "window_size": [4, 4, 4, 2]},
    ),
}
"""Official file, crop, channels and settings of what is recorded: maps of 16, 8, 4 and 2 tokens a side, the last two in one window."""
CUBES = tuple((n, n, n) for n in (4, 4, 4, 2))
OURS = {
    "synapse": Config(dim=8, heads=(1, 2, 4, 8), decoder_heads=(1, 2, 4), patch=(2, 4, 4), windows=CUBES),
    "tumour": Config(dim=8, heads=(1, 2, 4, 8), decoder_heads=(2, 4, 8), patch=(4, 4, 4), windows=CUBES),
}


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a tensor, from nothing but its official name and its shape (RandomState's stream is frozen by numpy's promise)."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("bias"):
        z *= 0.2
    elif len(shape) == 1:
        z = 1 + 0.2 * z  # scale of a norm
    elif name != "image" and not name.endswith("bias_table"):
        z *= sqrt(1 / prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def sample(x: torch.Tensor) -> list[float]:
    """Every n-th value, about 300 in all, with n odd so that all columns are met."""
    flat = x.detach().flatten()
    return [float(f"{v:.7g}") for v in flat[:: max(flat.numel() // 300, 1) | 1]]


def relative(ours: torch.Tensor, expected: list[float]) -> float:
    difference = np.subtract(sample(ours), expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def official_name(ours: str) -> str:
    """Our name of a parameter -> the official one."""
    stem = dict(zip(("0", "2", "3", "5", "6", "8", "9"), [f"proj{p}.{n}" for p in (1, 2) for n in ("conv1", "norm1", "conv2", "norm2")]))
    ours = re.sub(r"^embedding\.10", "model_down.patch_embed.norm", ours)
    ours = re.sub(r"^embedding\.(\d)", lambda m: f"model_down.patch_embed.{stem[m[1]]}", ours)
    ours = re.sub(r"^norms\.(\d)", r"model_down.norm\1", ours)
    ours = re.sub(r"^down\.(\d)", r"model_down.layers.\1.downsample", ours).replace("downsample.conv", "downsample.reduction")
    ours = re.sub(r"^up\.(\d)\.norm", r"decoder.layers.\1.Upsample.norm", ours)
    ours = re.sub(r"^up\.(\d)\.conv", r"decoder.layers.\1.Upsample.up", ours)
    ours = re.sub(r"^expand\.(\d)", r"final.\1.up", ours)
    ours = re.sub(r"^encoder\.(\d)", r"model_down.layers.\1.blocks", ours)
    ours = re.sub(r"^decoder\.(\d)\.(\d)", r"decoder.layers.\1.blocks.\2", ours)
    ours = ours.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2").replace("attention.bias", "attn.relative_position_bias_table")
    ours = ours.replace("attention.out", "attn.proj")
    first_of_decoder = re.match(r"decoder\.layers\.\d\.blocks\.0\.", ours)
    return ours.replace("attention.project", "attn.kv" if first_of_decoder else "attn.qkv")


def spread(table: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor:
    """The official table (entries, heads) with its entries where we look for them: its index multiplies the depth by 3 n - 1."""
    places = list(itertools.product(*(range(2 * n - 1) for n in window)))
    _, h, _ = window
    return table[[d * (3 * h - 1) + i * (2 * h - 1) + j for d, i, j in places]].T


def from_official(config: Config, network: NNFormer, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    state = {}
    windows = dict(zip(("0", "1", "2", "3"), config.windows))
    for name, value in network.named_parameters():
        theirs = official_name(name)
        tensor = draw(theirs, tuple(shapes[theirs]))
        if name.endswith("attention.bias"):
            tensor = spread(tensor, windows[name.split(".")[1]])
        assert tensor.shape == value.shape, name
        state[name] = tensor
    assert len({official_name(name) for name in state}) == len(shapes)
    return state


@pytest.fixture
def network(request) -> NNFormer:
    torch.manual_seed(0)
    return NNFormer(1, 3, VARIANTS["test"]).eval()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_outputs_of_the_official_networks(name, evidence):
    _, crop, channels, _ = NETWORKS[name]
    net, golden = NNFormer(channels, 3, OURS[name]), GOLDEN["networks"][name]
    net.load_state_dict(from_official(OURS[name], net, golden["shapes"]))
    image = draw("image", (2, channels, *crop))
    answers: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for i in range(3):  # all answers, in evaluation mode
            net.expand[i].register_forward_hook(lambda module, args, result, i=i: answers.update({str(i): result}))
        assert set(net.eval()(image)) == {"logits"}
        for block in net.modules():
            block.training = block is net  # the coarser answers, without stochastic depth
        assert set(net(image)) == {"logits", "logits_1", "logits_2"}
    errors = [relative(answers[str(i)], expected) for i, expected in enumerate(golden["answers"])]
    assert max(errors) < 1e-4
    with torch.no_grad():
        net.encoder[0][1].attention.bias[0, 3] += 1  # one offset of one head
        net.eval()(image)
    assert relative(answers["0"], golden["answers"][0]) > 1e-4
    evidence.fidelity(against=f"{GOLDEN['repository']} at {GOLDEN['commit'][:7]}, {NETWORKS[name][0]}", error=max(errors))


@pytest.mark.parametrize(
    ("variant", "channels", "classes", "alone", "supervised"),
    [
        ("synapse", 1, 14, 149_538_086, 150_054_210),
        ("tumour", 4, 4, 37_606_726, 37_754_190),
        ("acdc", 1, 4, 37_160_200, 37_197_072),
    ],
)
def test_parameters_of_the_official_networks(variant, channels, classes, alone, supervised):
    for deep, expected in ((False, alone), (True, supervised)):
        with torch.device("meta"):
            net = NNFormer(channels, classes, dataclasses.replace(VARIANTS[variant], deep_supervision=deep))
        assert sum(p.numel() for p in net.parameters()) == expected


def test_split_and_join():
    x = torch.arange(2 * 4 * 6 * 8 * 3).float().view(2, 4, 6, 8, 3)
    windows = split(x, (2, 3, 4))
    assert windows.shape == (2, 8, 24, 3) and torch.equal(windows[1, 5].view(2, 3, 4, 3), x[1, 2:4, 0:3, 4:8])
    assert torch.equal(join(windows, (2, 3, 4), (4, 6, 8)), x)


def test_every_offset_has_a_bias_of_its_own():
    """The official index lets distinct offsets share entries: 115 of 343 are used in a window of 4x4x4."""
    found = offsets((2, 3, 4))
    place = list(itertools.product(range(2), range(3), range(4)))
    ways = {tuple(np.subtract(a, b)): int(found[i, j]) for i, a in enumerate(place) for j, b in enumerate(place)}
    assert sorted(ways.values()) == list(range(3 * 5 * 7))
    assert len(set(offsets((4, 4, 4)).flatten().tolist())) == 343
    assert len({d * 11 + i * 7 + j for d, i, j in itertools.product(range(7), repeat=3)}) == 115


def brute(attention: VolumeAttention, x: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
    """Token by token: who is in the same window (of the shifted grid, not wrapped), what it is asked and what it answers."""
    size, window, shift, heads = x.shape[1:4], attention.window, attention.shift, attention.heads
    tokens = list(itertools.product(*map(range, size)))
    parts = attention.project(x).chunk(3 if query is None else 2, -1)
    q, k, v = (query, *parts) if query is not None else parts
    # The first s tokens of an axis, which the shift rolls to its end, are a window of their own: windows begin at s - n, s, s + n ...
    cell = {t: tuple((i - s) // n for i, s, n in zip(t, shift, window)) for t in tokens}
    out = torch.zeros_like(x)
    for t in tokens:
        seen = [u for u in tokens if cell[u] == cell[t]]
        for h in range(heads):
            c = slice(h * x.shape[-1] // heads, (h + 1) * x.shape[-1] // heads)
            way = [[a - b + n - 1 for a, b, n in zip(t, u, window)] for u in seen]
            bias = torch.stack([attention.bias[h, (d * (2 * window[1] - 1) + i) * (2 * window[2] - 1) + j] for d, i, j in way])
            score = torch.stack([q[0, *t, c] @ k[0, *u, c] for u in seen]) * (x.shape[-1] / heads) ** -0.5 + bias
            out[0, *t, c] = score.softmax(0) @ torch.stack([v[0, *u, c] for u in seen])
    return attention.out(out)


def test_attention_by_brute_force(evidence):
    for size, kind in itertools.product([(4, 6, 4), (3, 4, 5), (2, 2, 2)], ["local", "shifted", "asked"]):
        torch.manual_seed(0)
        attention = VolumeAttention(4, 2, (2, 3, 2), shifted=kind == "shifted", asked=kind == "asked").double()
        torch.nn.init.normal_(attention.bias)
        x, query = torch.randn(2, 1, *size, 4).double()
        given = (x, query) if kind == "asked" else (x,)
        torch.testing.assert_close(attention(*given), brute(attention, *given), rtol=0, atol=1e-12)
    evidence.property(
        "LV-MSA, SLV-MSA and skip attention equal attention written out token by token, also where windows are filled up",
        "LV-MSA、SLV-MSA 和跳连注意力与逐 token 写开的注意力相等，包括窗口需要补齐的情形",
    )


def test_the_global_window_sees_all_and_the_local_one_does_not(network, evidence):
    x = torch.randn(1, 2, 2, 2, 4, requires_grad=True)
    everything = VolumeAttention(4, 1, (2, 2, 2))
    everything(x)[0, 0, 0, 0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    x = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    VolumeAttention(4, 1, (2, 2, 2), shifted=True)(x)[0, 1, 1, 1].sum().backward()
    seen = (x.grad.abs().sum(-1) > 0)[0].nonzero().tolist()
    assert seen == [list(t) for t in itertools.product((1, 2), repeat=3)]
    evidence.property(
        "one window holds the whole map where attention is global; shifted windows lie half a window further",
        "全局注意力时一个窗口容纳整张图；错开的窗口移了半个窗口",
    )


def test_skips_answer_and_do_not_ask(evidence):
    torch.manual_seed(0)
    block = SkipBlock(4, VolumeAttention(4, 1, (2, 2, 2), asked=True), 0.0).double()
    assert block.attention.project.out_features == 8  # keys and values; queries are not projected
    skip, up = torch.randn(2, 1, 2, 2, 2, 4).double()
    found = block(skip, up)
    x = skip + up + block.attention(block.norm1(skip), block.norm1(up))
    torch.testing.assert_close(found, x + block.mlp(block.norm2(x)))
    with torch.no_grad():
        block.attention.project.weight[4:] = 0  # values that say nothing leave the sum
        block.attention.project.bias[4:] = 0
        block.attention.out.bias.zero_()
    x = skip + up
    torch.testing.assert_close(block(skip, up), x + block.mlp(block.norm2(x)))
    evidence.property(
        "skip attention: queries of the decoder as they are, keys and values of the encoder, one norm, the plain sum is the residual",
        "跳连注意力：查询就是解码特征本身，键和值来自编码特征，两者共用一个归一化，残差是直接相加的和",
    )


def test_a_network_that_adds_its_skips_has_no_skip_block():
    net = NNFormer(1, 2, dataclasses.replace(VARIANTS["test"], skip_attention=False))
    assert not any(isinstance(m, SkipBlock) for m in net.modules())
    assert net(torch.randn(1, 1, 16, 32, 16))["logits"].shape == (1, 2, 16, 32, 16)


def test_shifts_and_drop_path_of_the_official_networks():
    net = NNFormer(1, 2, dataclasses.replace(VARIANTS["tumour"], dim=6))
    shifts = [[block.attention.shift for block in stage] for stage in net.encoder]
    assert shifts == [[(0, 0, 0), (2, 2, 2)]] * 2 + [[(0, 0, 0)] * 2] * 2
    rates = [round(block.drop_path.p, 3) for stage in net.encoder for block in stage]
    assert rates == [0, 0.029, 0.057, 0.086, 0.114, 0.143, 0.171, 0.2]
    assert [[round(block.drop_path.p, 2) for block in stage] for stage in net.decoder] == [[0.16, 0.2], [0.08, 0.12], [0, 0.04]]


def test_deep_supervision_weighs_each_coarser_answer_half(evidence):
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 3, (2, 8, 8, 8), generator=generator)
    mask[:, :, :, 1::2] = mask[:, :, :, ::2]
    output = {name: torch.randn(2, 3, *[8 // 2**i] * 3, generator=generator) for i, name in enumerate(("logits", "logits_1", "logits_2"))}
    found = supervised(output, {"mask": mask})["loss"]
    each = [
        Segmentation.loss({"logits": v}, {"mask": mask[:, s :: 2**i, s :: 2**i, s :: 2**i]})["loss"]
        for (i, s), v in zip(((0, 0), (1, 1), (2, 2)), output.values())
    ]
    torch.testing.assert_close(found, (4 * each[0] + 2 * each[1] + each[2]) / 7)
    batch = {"mask": mask.clone()}
    batch["mask"][0] = 255
    assert torch.isfinite(supervised(output, batch)["loss"])
    assert loss(VARIANTS["synapse"]) is supervised and loss(VARIANTS["acdc"]) is Segmentation.loss
    evidence.property(
        "deep supervision: 4/7, 2/7 and 1/7 of the losses at full, half and quarter scale",
        "深监督：原尺度、二分之一、四分之一尺度的损失权重为 4/7、2/7、1/7",
    )


def test_any_size_of_the_grid(network):
    for size in ((16, 16, 16), (16, 32, 48)):
        with torch.inference_mode():
            logits = network(torch.randn(1, 1, *size))["logits"]
        assert logits.shape == (1, 3, *size) and torch.isfinite(logits).all()


def test_recipes():
    assert recipe(VARIANTS["synapse"]).patch == 1024 and recipe(VARIANTS["synapse"]).batch_size == 2
    assert recipe(VARIANTS["acdc"]).batch_size == 4 and round(recipe(VARIANTS["acdc"]).patch ** 2, -4) == 360_000
    assert recipe(VARIANTS["small"]).optimizer == "adamw"
