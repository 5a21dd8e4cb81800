"""Trained RepLKNets: the names of the official code, which mmpretrain keeps, mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.backbones.replknet.replknet import Config
from paperworks.tasks.base import Published

RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^transitions\.(\d)\.", lambda m: f"transitions.{int(m[1]) + 1}."),
    (r"\.blocks\.", "."),
    (r"\.pre(lkb|ffn)_bn\.", ".norm."),
    (r"\.large_kernel\.lkb_origin\.", ".depthwise.large."),
    (r"\.large_kernel\.small_conv\.", ".depthwise.small."),
    (r"\.pw1\.", ".expand."),
    (r"\.pw2\.", ".project."),
    (r"\.conv\.", ".0."),
    (r"\.bn\.", ".1."),
)


def official(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Of DingXiaoH/RepLKNet-pytorch, before its kernels are merged."""
    return {reduce(lambda name, rule: re.sub(*rule, name), RULES, name): value for name, value in state.items()}


def mmpretrain(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Of mmpretrain: the same with the parts of the network in front; its files may have a ``state_dict`` within."""
    inner = state.get("state_dict", state)
    assert isinstance(inner, Mapping)
    return official({re.sub(r"^backbone\.|(?<=^head\.)fc\.", "", name): value for name, value in inner.items()}, config)


SOURCES = {"official": official, "mmpretrain": mmpretrain}

LICENCE = "MIT in the authors' repository, Apache-2.0 on mmpretrain's copy; ImageNet's own terms are for research"
HOST = "https://download.openmmlab.com/mmclassification/v0/replknet/RepLKNet-"
PUBLISHED = {
    "31b": Published(source="mmpretrain", url=HOST + "31B_ImageNet-1K_224_20221024-debd6715.pth", licence=LICENCE),
    "31l": Published(source="mmpretrain", url=HOST + "31L_ImageNet-22K-to-1K_384_20221024-6f8ee74d.pth", licence=LICENCE),
    "xl": Published(
        source="mmpretrain", url=HOST + "XL_MegData73M_ImageNet1K_20221024-664f2980.pth", licence=LICENCE, mean=(0.5,) * 3, std=(0.5,) * 3
    ),
}
"""Trained by the authors, converted by mmpretrain (configs/replknet/metafile.yml)."""
