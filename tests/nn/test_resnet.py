"""The shared residual networks against torchvision's."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from paperworks.nn.resnet import BasicBlock, Bottleneck, Depth, ResNet


def peer(depth: int) -> nn.Module:
    """torchvision's, with norm statistics and scales that tell mistakes apart."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(f"resnet{depth}", weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.8)
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


def features(network: nn.Module, image: Tensor) -> list[Tensor]:
    names = [f"layer{i}" for i in range(1, 5)]
    extract = create_feature_extractor(network, names)
    return [extract(image)[name] for name in names]


def without_classifier(network: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_equals_torchvision(depth: Depth) -> None:
    theirs = peer(depth)
    ours = ResNet(depth).eval()
    ours.load_state_dict(without_classifier(theirs))
    image = torch.randn(2, 3, 75, 64)
    pyramid = ours.pyramid(image)
    for mine, other in zip(pyramid, features(theirs, image), strict=True):
        assert mine.shape == other.shape
        assert error(mine, other) < 1e-5
    assert tuple(f.shape[1] for f in pyramid) == ours.widths
    assert error(ours.embed(image) @ theirs.fc.weight.T + theirs.fc.bias, theirs(image)) < 1e-5

    ours.layer3[0].conv2.weight[0] *= 1.5
    assert error(ours(image), features(theirs, image)[-1]) > 1e-4


@pytest.mark.parametrize("depth", get_args(Depth))
def test_names_and_shapes_are_torchvision_s(depth: Depth) -> None:
    with torch.device("meta"):
        ours, theirs = ResNet(depth).state_dict(), without_classifier(torchvision.models.get_model(f"resnet{depth}", weights=None))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@torch.no_grad()
def test_strides(stem: str) -> None:
    network = ResNet(18, channels=1, stem=stem, width=8)
    pyramid = network.pyramid(torch.randn(2, 1, 64, 32))
    assert [tuple(f.shape) for f in pyramid] == [(2, w, 64 // s, 32 // s) for w, s in zip(network.widths, network.strides, strict=True)]
    assert network.widths == (8, 16, 32, 64)


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_zero_init_makes_blocks_their_shortcuts(depth: Depth) -> None:
    network = ResNet(depth, zero_init_residual=True, width=8)
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock | Bottleneck)]
    x = torch.rand(2, blocks[1].conv1.in_channels, 6, 6)
    assert torch.equal(blocks[1](x), x)
    ordinary = ResNet(depth, width=8).layer1[1](x)
    assert not torch.equal(ordinary, x)


def test_takes_another_norm() -> None:
    network = ResNet(18, norm=lambda n: nn.GroupNorm(4, n), width=8)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in network.modules()) == 20
