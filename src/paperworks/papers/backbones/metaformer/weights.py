"""Trained MetaFormers: the names of timm and of the two official repositories mapped to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from paperworks.papers.backbones.metaformer.metaformer import VARIANTS, Config
from paperworks.tasks.base import Published

State = Mapping[str, Tensor]
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


def branch(match: re.Match[str]) -> str:
    """``norm2`` and its like: parts of a block are lists of two."""
    kind = {"norm": "norms", "layer_scale": "scales", "res_scale": "keeps"}[match[1]]
    return f".{kind}.{int(match[2]) - 1}.{match[3]}"


BLOCK: Rules = (
    (r"\.(layer_scale|res_scale)_?(\d)(?:\.scale)?$", r".\1\2.weight"),
    (r"\.(norm|layer_scale|res_scale)(\d)\.(\w+)$", branch),
    (r"\.mlp\.fc1\.", ".branches.1.0."),
    (r"\.mlp\.act\.", ".branches.1.1."),
    (r"\.mlp\.fc2\.", ".branches.1.2."),
    (r"\.token_mixer\.pwconv1\.", ".branches.0.0."),
    (r"\.token_mixer\.act1\.", ".branches.0.1."),
    (r"\.token_mixer\.dwconv\.", ".branches.0.2."),
    (r"\.token_mixer\.pwconv2\.", ".branches.0.3."),
    (r"\.token_mixer\.random_matrix$", ".branches.0.matrix"),
    (r"\.token_mixer\.fc\.", ".branches.0."),
    (r"\.token_mixer\.qkv\.", ".branches.0.mixer.qkv."),
    (r"\.token_mixer\.proj\.", ".branches.0.mixer.out."),
)
HEAD: Rules = ((r"^head\.fc1\.", "head.0."), (r"^head\.norm\.", "head.2."), (r"^head\.fc2\.", "head.4."))
TIMM: Rules = (
    (r"^stem\.conv\.", "embeddings.0.conv."),
    (r"^stem\.norm\.", "embeddings.0.after."),
    (r"^stages\.(\d)\.downsample\.conv\.", r"embeddings.\1.conv."),
    (r"^stages\.(\d)\.downsample\.norm\.", r"embeddings.\1.before."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
    *HEAD,
    *BLOCK,
)
BASELINES: Rules = (
    (r"^downsample_layers\.(\d)\.conv\.", r"embeddings.\1.conv."),
    (r"^downsample_layers\.(\d)\.post_norm\.", r"embeddings.\1.after."),
    (r"^downsample_layers\.(\d)\.pre_norm\.", r"embeddings.\1.before."),
    *HEAD,
    *BLOCK,
)


def renamed(rules: Rules) -> Callable[[State, Config], dict[str, Tensor]]:
    """A mapping of state dicts that changes names; linear layers over channels become 1x1 convolutions."""

    def ours(state: State, config: Config) -> dict[str, Tensor]:
        names = (reduce(lambda name, rule: re.sub(*rule, name), rules, name) for name in state)
        return {name: shaped(name, value) for name, value in zip(names, state.values())}

    return ours


def shaped(name: str, value: Tensor) -> Tensor:
    """Weights of 1x1 convolutions with all their four axes."""
    pointwise = re.search(r"\.branches\.(1\.[02]|0\.[03])\.weight$", name)
    return value[:, :, None, None] if pointwise and value.ndim == 2 else value


def from_poolformer(state: State, config: Config) -> dict[str, Tensor]:
    """sail-sg/poolformer: stages, embeddings and a map of positions stand in one list, ``network``."""
    parts: dict[str, set[str]] = {}
    for name in state:
        if found := re.match(r"network\.(\d)\.(.*)", name):
            parts.setdefault(found[1], set()).add(found[2])
    renames: dict[str, str] = {r"^patch_embed\.proj\.": "embeddings.0.conv."}
    stage = 0
    for index in sorted(parts):
        if "pos_embed" in parts[index]:
            renames[rf"^network\.{index}\.pos_embed$"] = f"stages.{stage}.0.map"
        elif "proj.weight" in parts[index]:
            stage += 1
            renames[rf"^network\.{index}\.proj\."] = f"embeddings.{stage}.conv."
        else:
            shift = any(to == f"stages.{stage}.0.map" for to in renames.values())
            for block in {int(part.split(".")[0]) for part in parts[index]}:
                renames[rf"^network\.{index}\.{block}\."] = f"stages.{stage}.{block + shift}."
    named = renamed((*renames.items(), *BLOCK))(state, config)
    return {name: value[0] if name.endswith(".map") else value for name, value in named.items()}


SOURCES: Mapping[str, Callable[[State, Config], dict[str, Tensor]]] = {
    "timm": renamed(TIMM),
    "baselines": renamed(BASELINES),
    "poolformer": from_poolformer,
}

LICENCE = "Apache-2.0; ImageNet's own terms are for research"


def published(name: str) -> Published:
    """The hub keeps what timm has of both papers; the others lie with the authors."""
    family, _, size = name.partition("_")
    if family == "metaformer":
        file = name if size == "id_s12" else f"{name}_224"
        return Published(
            source="poolformer", url=f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{file}.pth.tar", licence=LICENCE
        )
    if family in ("identityformer", "randformer"):
        return Published(source="baselines", url=f"https://huggingface.co/sail/dl/resolve/main/{family}/{name}.pth", licence=LICENCE)
    return Published(source="timm", repo=f"timm/{name}.sail_in1k", licence=LICENCE)


PUBLISHED = {name: published(name) for name in VARIANTS if name not in ("small", "test")}
"""Trained by the authors on ImageNet-1K at 224 pixels."""
