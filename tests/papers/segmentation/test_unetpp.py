"""UNet++ against the numbers of its paper, MONAI's and smp's independent implementations, and its own claims on pruning."""

from __future__ import annotations

import re
from dataclasses import replace

import monai
import pytest
import segmentation_models_pytorch as smp
import torch
from monai.networks.nets import BasicUNetPlusPlus
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from torch import nn
from torch.nn import functional as F

from paperworks.nn.conv import he_init
from paperworks.papers.segmentation.unetpp.unetpp import VARIANTS, Config, UNetPlusPlus, deep_loss, hybrid_loss, region_loss
from peers import relative

TOLERANCE = 1e-4


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise(module: nn.Module) -> None:
    """Weights at a scale that keeps the signal alive to the deepest node, and batch norms that are far from the identity."""
    he_init(module)
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
        elif isinstance(m, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and m.bias is not None:
            nn.init.normal_(m.bias, std=0.2)


def network(config: Config, channels: int = 1, classes: int = 3, ndim: int = 2) -> UNetPlusPlus:
    torch.manual_seed(0)
    net = UNetPlusPlus(channels, classes, config, ndim).eval()
    randomise(net)
    return net


# --- Parameter counts


@pytest.mark.parametrize(
    ("channels", "deep_supervision", "expected"),
    [(1, True, 9_041_700), (1, False, 9_041_601), (3, True, 9_042_276)],  # one class, as in the official Keras summary
)
def test_parameter_counts_of_the_paper(channels, deep_supervision, expected):
    with torch.device("meta"):
        net = UNetPlusPlus(channels, 1, replace(VARIANTS["paper"], deep_supervision=deep_supervision))
    assert parameters(net) == expected
    assert len(net.nodes) == 15


# --- Independent implementations


def monai_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """MONAI's state dict with our names."""
    out = {}
    for key, value in state.items():
        if head := re.fullmatch(r"final_conv_0_(\d)\.(\w+)", key):
            out[f"heads.0_{head[1]}.{head[2]}"] = value
        elif up := re.fullmatch(r"upcat_(\d_\d)\.upsample\.deconv\.(\w+)", key):
            out[f"up.{up[1]}.{up[2]}"] = value
        else:
            part = re.fullmatch(r"(?:conv|upcat)_(\d_\d)\.(?:convs\.)?conv_(\d)\.(conv|adn\.N)\.(\w+)", key)
            per_conv = 3 if any("adn.N" in k for k in state) else 2  # convolution, batch norm, ReLU
            out[f"nodes.{part[1]}.{int(part[2]) * per_conv + (part[3] == 'adn.N')}.{part[4]}"] = value
    return out


@pytest.mark.parametrize(("norm", "size"), [(True, (48, 32)), (False, (48, 32)), (True, (16, 16, 32))])
def test_all_heads_equal_monai(evidence, norm, size):
    widths = (8, 8, 16, 32, 64)  # MONAI's up-sampling halves the channels but on the top row, which fits these
    ours = network(Config(widths=widths, norm=norm, dropout=0.0), ndim=len(size))
    theirs = BasicUNetPlusPlus(
        len(size), 1, 3, (*widths, widths[0]), deep_supervision=True, act="relu", norm="batch" if norm else None, bias=not norm
    ).eval()
    randomise(theirs)
    ours.load_state_dict(monai_names(theirs.state_dict()))
    image = torch.rand(2, 1, *size)
    with torch.inference_mode():
        expected = torch.stack(theirs(image))
        error = relative(ours(image)["heads"], expected)
        assert error < TOLERANCE
        ours.up["1_2"].weight.mul_(1.02)  # a perturbed weight is seen
        assert relative(ours(image)["heads"], expected) > TOLERANCE
    evidence.fidelity(against=f"MONAI {monai.__version__} BasicUNetPlusPlus, {len(size)}-D, norm {norm}", error=error)


def test_nested_wiring_equals_smp(evidence):
    """smp names and orders everything the other way round and up-samples by repetition, which a transposed convolution can do."""
    width, depth = 6, 4
    ours = network(Config(widths=(width,) * (depth + 1), norm=True, dropout=0.0))
    decoder = UnetPlusPlusDecoder((1, *[width] * (depth + 1)), (width,) * (depth + 1), n_blocks=depth + 1).eval()
    randomise(decoder)
    with torch.no_grad():
        for up in ours.up.values():  # U: each pixel becomes a square of four
            up.weight.copy_(torch.eye(width)[:, :, None, None].expand(width, width, 2, 2))
            up.bias.zero_()
        for i in range(depth):
            for j in range(1, depth - i + 1):
                block = decoder.blocks[f"x_{depth - i - j}_{depth - 1 - i}"]  # theirs: first diagonal's number, then the row from below
                node = ours.nodes[f"{i}_{j}"]
                pieces = block.conv1[0].weight.split(width, 1)  # [up, x(i,j-1), ..., x(i,0)]: the reverse of eq. 1
                node[0].weight.copy_(torch.cat(pieces[::-1], 1))
                node[1].load_state_dict(block.conv1[1].state_dict())
                node[3].weight.copy_(block.conv2[0].weight)
                node[4].load_state_dict(block.conv2[1].state_dict())
    image = torch.rand(1, 1, 32, 48)
    top = {}
    hook = decoder.blocks[f"x_0_{depth - 1}"].register_forward_hook(lambda module, args, out: top.update(x=out))
    with torch.inference_mode():
        encoder = [image]
        for i in range(depth + 1):
            encoder.append(ours.nodes[f"{i}_0"](F.max_pool2d(encoder[-1], 2) if i else image))
        decoder(encoder)
        expected = ours.heads[f"0_{depth}"](top["x"])
        error = relative(ours(image)["heads"][-1], expected)
    hook.remove()
    assert error < TOLERANCE
    evidence.fidelity(against=f"smp {smp.__version__} UnetPlusPlusDecoder, nodes x(0,4)", error=error)


def test_dense_skips_matter():
    """Negative control of the wiring: with the dense skips cut out (only x(i,0) kept, a plain U-Net's) the answer is another one."""
    net = network(VARIANTS["tiny"])
    image = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        full = net(image)["heads"][-1]
        width = net.config.widths[0]
        net.nodes["0_4"][0].weight[:, width : 4 * width] = 0  # x(0,1), x(0,2), x(0,3)
        assert relative(net(image)["heads"][-1], full) > 0.05


# --- What the paper says of it


def test_pruned_network_is_the_head_of_the_full_one(evidence):
    net = network(VARIANTS["tiny"], channels=3)
    image = torch.rand(2, 3, 32, 48)
    sizes = []
    with torch.inference_mode():
        heads = net(image)["heads"]
        for depth in (1, 2, 3, 4):
            cut = net.prune(depth)
            assert len(cut.nodes) == (depth + 1) * (depth + 2) // 2
            assert all(sum(map(int, key.split("_"))) <= depth for key in cut.nodes)
            assert cut.grid.multiple == 2**depth
            assert torch.equal(cut(image)["heads"][0], heads[depth - 1])
            sizes.append(parameters(cut))
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == parameters(net) - 3 * (net.config.widths[0] + 1) * 3  # three heads of 3 classes are gone
    evidence.property(
        "UNet++ L^d, d = 1..4, has the nodes i + j <= d only and answers exactly as head d of the full network",
        "UNet++ L^d（d = 1..4）只有 i + j <= d 的节点，输出与完整网络的第 d 个头完全一致",
    )


def test_pruned_network_is_a_copy():
    net = network(VARIANTS["test"])
    before = net.nodes["0_0"][0].weight.clone()
    with torch.no_grad():
        net.prune(1).nodes["0_0"][0].weight.zero_()
    assert torch.equal(net.nodes["0_0"][0].weight, before)
    with pytest.raises(ValueError, match="depth 5"):
        net.prune(5)


def test_without_deep_supervision_pruning_moves_the_only_head():
    net = network(replace(VARIANTS["test"], deep_supervision=False))
    assert torch.equal(net.prune(2).heads["0_2"].weight, net.heads["0_4"].weight)


def test_logits_are_the_average_of_the_probabilities():
    net = network(VARIANTS["test"])
    with torch.inference_mode():
        out = net(torch.rand(2, 1, 32, 32))
    torch.testing.assert_close(out["logits"].softmax(1), out["heads"].softmax(2).mean(0))
    assert out["heads"].std(0).mean() > 1e-3  # and the heads do differ


def test_shallow_heads_do_not_see_the_deep_nodes(evidence):
    net = network(VARIANTS["test"]).train()
    net(torch.rand(2, 1, 32, 32))["heads"][1].square().sum().backward()  # head on x(0,2)
    seen = {key for key, node in net.nodes.items() if node[0].weight.grad is not None and node[0].weight.grad.any()}
    assert seen <= {"0_0", "1_0", "2_0", "0_1", "1_1", "0_2"}
    assert "0_2" in seen
    evidence.property("the head on x(0,d) depends on the nodes of L^d only", "x(0,d) 上的头只依赖 L^d 的节点")


def test_hybrid_loss_is_the_printed_sum(evidence):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    p, y = logits.softmax(1), F.one_hot(target, 3).movedim(-1, 1).float()
    printed = -(y * p.log() + 2 * y * p / (y**2 + p**2)).sum() / target.numel()
    torch.testing.assert_close(sum(hybrid_loss(logits, target)), printed)
    perfect = torch.stack(hybrid_loss(100 * y, target))
    torch.testing.assert_close(perfect, torch.tensor([0.0, -1.0]))
    evidence.property(
        "the hybrid loss is eq. 3 as printed, -1 at its best, and is summed over the heads",
        "混合损失与论文式 3 一致，最好时为 -1，并对各个头求和",
    )


def test_the_first_version_balances_regions(evidence):
    """Twice as many background pixels change the cross-entropy only; a perfect answer costs -1."""
    torch.manual_seed(0)
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[:, :2, :2] = 1
    y = F.one_hot(target, 2).movedim(-1, 1).float()
    entropy, dice = region_loss(100 * y, target)
    assert entropy < 1e-6 and abs(float(dice) + 1) < 1e-6
    empty = torch.stack((torch.full((1, 8, 8), 50.0), torch.zeros(1, 8, 8)), 1)  # says background everywhere
    assert float(region_loss(empty, target)[1]) == pytest.approx(-1 / 5, abs=1e-4)  # (0 + 1) / (0 + 4 + 1)
    larger = F.pad(target, (0, 8)), F.pad(empty, (0, 8), value=0.0)
    larger[1][:, 0, :, 8:] = 50.0
    torch.testing.assert_close(region_loss(larger[1], larger[0])[1], region_loss(empty, target)[1])
    assert hybrid_loss(larger[1], larger[0])[1] < hybrid_loss(empty, target)[1] - 0.01, "pixel by pixel it does not"
    evidence.property("the first version's loss balances regions, the journal's does not", "初版的损失平衡大小区域，期刊版的不平衡")


def test_loss_leaves_ignored_pixels_out():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 4, 6))
    cut = target.clone()
    cut[..., 3:] = 255
    torch.testing.assert_close(hybrid_loss(logits, cut), hybrid_loss(logits[..., :3], target[..., :3]))
    everywhere = deep_loss({"heads": logits[None]}, {"mask": torch.full_like(target, 255)})
    assert everywhere["loss"] == 0


def test_deep_loss_sums_over_the_heads():
    torch.manual_seed(0)
    head, target = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 4, 4))
    one, four = (deep_loss({"heads": head[None].expand(n, -1, -1, -1, -1)}, {"mask": target}) for n in (1, 4))
    torch.testing.assert_close(four["loss"], 4 * one["loss"])
    torch.testing.assert_close(four["loss"], four["cross_entropy"] + four["dice"])


def test_every_parameter_learns():
    net = network(VARIANTS["test"]).train()
    deep_loss(net(torch.rand(2, 1, 64, 64)), {"mask": torch.randint(0, 3, (2, 64, 64))})["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
