"""Agent Attention: a few agents gather from all keys for the queries, and the queries then ask the agents.

Han, Ye, Han, Xia, Pan, Wan, Song and Huang, "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024 (arXiv 2312.08874).

Two softmax attentions of n x N stand in place of one of N x N: agents A, pooled from the queries, attend to the keys; then the queries attend to
the agents. The cost is linear in the number N of tokens, and what comes out is linear attention whose feature maps are learned softmaxes.

As in the official code (LeapLabTHU/Agent-Attention), weights excepted: agents are the averages of the queries' map, the class token left out;
both products are scaled; both attentions have an agent bias made of a 7 x 7 block, rows, columns and the class token; a depthwise 3 x 3 convolution
of the values is added. Different from it: one linear layer makes queries, keys and values in the PVTs too; AgentSD (for Stable Diffusion) and
Agent-CSwin are not here; Mixup and CutMix, which mix the images of a batch, are left out, and a smaller batch takes a learning rate in proportion.

Shapes: B batch, C image channels, K classes, N tokens, n agents, h w cells of a map (N = h w, or one more with a class token), D width, A heads,
d = D / A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.nn.swap import swapped
from paperworks.papers.backbones.convnext.convnext import Varied, smoothed
from paperworks.papers.layers.agent_attention.trunks import (
    Mixer,
    Place,
    Transformer,
    Trunk,
    as_map,
    as_tokens,
    attends,
    softmax,
    tokens_of,
)
from paperworks.tasks.base import Layer, Paper, Recipe, Spec
from paperworks.tasks.classification import image_side

BLOCK = 7
"""Side of the agent bias that is resized to the map."""


@dataclass(frozen=True, kw_only=True)
class Config(Trunk):
    """A trunk, and how much of it has agents."""

    agents: tuple[int, ...] = (49,)
    """n of each stage, a square number."""
    agent_blocks: tuple[int, ...] = (12,)
    """How many blocks of each stage, from its first, have agent attention; the others keep the trunk's own."""


@dataclass(frozen=True, kw_only=True)
class Agents:
    """Agent attention as a layer of other networks. The two parts around it can be left out, as in the paper's ablation."""

    agents: int = 16
    """n, a square number."""
    bias: bool = True
    """The agent bias."""
    conv: bool = True
    """The depthwise convolution of the values."""


class AgentBias(nn.Module):
    """Where on the map each agent looks: a small block resized to h x w, a number for each row, one for each column, one for the class token."""

    def __init__(self, place: Place, agents: int) -> None:
        super().__init__()
        self.side = place.side
        self.block = nn.Parameter(torch.empty(place.heads, agents, BLOCK, BLOCK))
        self.rows = nn.Parameter(torch.empty(place.heads, agents, self.side, 1))
        self.columns = nn.Parameter(torch.empty(place.heads, agents, 1, self.side))
        self.token = nn.Parameter(torch.empty(place.heads, agents, 1)) if place.class_token else None
        for value in self.parameters():
            nn.init.trunc_normal_(value, std=0.02)

    def forward(self) -> Float[Tensor, "A n N"]:
        """The three parts' sum over the map, the class token's in front."""
        block = F.interpolate(self.block, (self.side, self.side), mode="bilinear")
        bias = (block + self.rows + self.columns).flatten(2)
        return bias if self.token is None else torch.cat([self.token, bias], 2)


class AgentAttention(nn.Module):
    """The agent attention module, in place of multi-head self-attention."""

    def __init__(self, place: Place, agents: int, *, bias: bool = True, conv: bool = True) -> None:
        super().__init__()
        side = isqrt(agents)
        if side**2 != agents or not 0 < agents <= place.side**2:
            raise InputError(f"agents={agents} is no square number between 1 and the {place.side**2} tokens of a map")
        self.heads, self.side = place.heads, side
        self.qkv, self.out = nn.Linear(place.width, 3 * place.width), nn.Linear(place.width, place.width)
        self.gather_bias = AgentBias(place, agents) if bias else None
        self.broadcast_bias = AgentBias(place, agents) if bias else None
        self.conv = nn.Conv2d(place.width, place.width, 3, padding=1, groups=place.width) if conv else None

    def split(self, z: Float[Tensor, "B N D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, agents, keys and values: B N D, B A n d, B A N d, B N D."""
        q, k, v = self.qkv(z).chunk(3, 2)
        pooled = F.adaptive_avg_pool2d(as_map(q), self.side)  # the class token is no part of any agent
        return q, rearrange(pooled, "b (a d) s t -> b a (s t) d", a=self.heads), self.headed(k), v

    def headed(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B A N d"]:
        """The heads apart."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """B_1, A n N, of agents over keys, and B_2, A N n, of queries over agents."""
        if self.gather_bias is None or self.broadcast_bias is None:
            return None, None
        return self.gather_bias(), self.broadcast_bias().mT

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """softmax(Q A^T + B_2) softmax(A K^T + B_1) V + DWC(V), both products scaled by the root of d."""
        q, agents, k, v = self.split(z)
        gather, broadcast = self.biases()
        gathered = F.scaled_dot_product_attention(agents, k, self.headed(v), attn_mask=gather)  # V_A, B A n d
        out = F.scaled_dot_product_attention(self.headed(q), agents, gathered, attn_mask=broadcast)
        out = rearrange(out, "b a n d -> b n (a d)")
        if self.conv is not None:
            local = as_tokens(self.conv(as_map(v)))
            out = out + F.pad(local, (0, 0, out.shape[1] - local.shape[1], 0))  # nothing for the class token
        return self.out(out)

    def maps(self, z: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B A n N"], Float[Tensor, "B A N n"]]:
        """Both softmaxes of ``forward``: what each agent gathers from where, and which agents each query asks."""
        q, agents, k, _ = self.split(z)
        gather, broadcast = self.biases()
        scale = k.shape[-1] ** -0.5
        first, second = scale * agents @ k.mT, scale * self.headed(q) @ agents.mT
        if gather is not None and broadcast is not None:
            first, second = first + gather, second + broadcast
        return first.softmax(-1), second.softmax(-1)

    def attention(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B A N N"]:
        """The N x N attention that the two maps amount to, of rank n at most: phi_q(Q) phi_k(K)^T of a generalised linear attention."""
        first, second = self.maps(z)
        return second @ first


def multiply_adds(tokens: int, width: int, agents: int | None = None) -> int:
    """Multiply-adds of one attention over ``tokens`` of ``width``, projections left out: softmax attention, or that of ``agents``.

    2 N^2 D against 4 n N D and 9 N D for the convolution: the lines cross where N is a little over twice the number of agents.
    """
    return 2 * tokens**2 * width if agents is None else (4 * agents + 9) * tokens * width


def mixer(config: Config) -> Mixer:
    """Agents in the first blocks of each stage, the trunk's own attention in the others."""
    own = softmax(config)

    def make(place: Place) -> nn.Module:
        return AgentAttention(place, config.agents[place.stage]) if place.block < config.agent_blocks[place.stage] else own(place)

    return make


def put(network: nn.Module, config: Agents) -> nn.Module:
    """Agent attention in place of every self-attention over the tokens of a square map; projections stay as the network made them.

    Raises:
        InputError: there is none, or it has fewer tokens than agents.
    """
    tokens = tokens_of(network)

    def make(module: nn.Module) -> nn.Module:
        n, qkv, out = tokens[module], module.qkv, getattr(module, "out", None)
        assert isinstance(qkv, nn.Linear)
        side, heads = isqrt(n), int(module.heads)  # pyright: ignore[reportArgumentType]
        place = Place(stage=0, block=0, width=qkv.in_features, heads=heads, side=side, class_token=n > side**2)
        layer = AgentAttention(place, config.agents, bias=config.bias, conv=config.conv)
        layer.qkv = qkv
        if isinstance(out, nn.Linear):
            layer.out = out
        return layer

    return swapped(network, lambda m: attends(m) and m in tokens and not isinstance(m, AgentAttention), make)


PVT = Config(
    trunk="pvt", depths=(2, 2, 2, 2), widths=(64, 128, 320, 512), heads=(1, 2, 5, 8), ratios=(8, 8, 4, 4), patch=4,
    agents=(9, 16, 49, 49), agent_blocks=(2, 2, 2, 2),
)  # fmt: skip
SWIN = Config(
    trunk="swin", depths=(2, 2, 6, 2), widths=(96, 192, 384, 768), heads=(3, 6, 12, 24), ratios=(4,) * 4, patch=4, drop_path=0.2,
    agents=(9, 16, 49, 49), agent_blocks=(2, 2, 6, 0),
)  # fmt: skip
VARIANTS: Mapping[str, Config] = {
    "deit_t": Config(drop_path=0.0),
    "deit_s": Config(widths=(384,), heads=(6,)),
    "deit_b": Config(widths=(768,), heads=(12,), agents=(81,), agent_blocks=(4,), drop_path=0.3),
    "pvt_t": PVT,
    "pvt_s": replace(PVT, depths=(3, 4, 6, 3), agent_blocks=(3, 4, 6, 3)),
    "pvt_m": replace(PVT, depths=(3, 4, 18, 3), agent_blocks=(3, 4, 18, 3), drop_path=0.3),
    "pvt_l": replace(PVT, depths=(3, 8, 27, 3), agent_blocks=(3, 8, 27, 3), drop_path=0.3),
    "swin_t": SWIN,
    "swin_s": replace(SWIN, depths=(2, 2, 18, 2), agent_blocks=(2, 2, 0, 0), drop_path=0.3),
    "swin_b": replace(
        SWIN, depths=(2, 2, 18, 2), widths=(128, 256, 512, 1024), heads=(4, 8, 16, 32), agent_blocks=(2, 2, 2, 0), drop_path=0.5
    ),
    "small": Config(
        trunk="pvt", depths=(1, 2, 2), widths=(48, 96, 192), heads=(2, 4, 8), ratios=(4,) * 3, patch=None, drop_path=0.0,
        agents=(16, 16, 16), agent_blocks=(1, 2, 2), image_size=None,
    ),
    "test": Config(
        trunk="pvt", depths=(1, 1), widths=(16, 32), heads=(2, 4), ratios=(2, 2), patch=None, drop_path=0.0,
        agents=(16, 16), agent_blocks=(1, 1), image_size=None,
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """The trunks' recipe with its learning rate of 5e-4 at a batch of 512 brought down in proportion; a laptop's own for small images."""
    if config.image_size is None:
        return Recipe(
            lr=2e-3, weight_decay=0.05, warmup=0.1, batch_size=50, average=0.98, augment=Varied(area=(0.5, 1.0), chance=0, erase=0)
        )
    pvt = config.trunk == "pvt"
    clip = (1.0 if sum(config.depths) > 16 else None) if pvt else 5.0
    return Recipe(
        lr=5e-4 * 128 / 512, weight_decay=0.05, warmup=(5 if pvt else 20) / 300, batch_size=128, patch=config.image_size, clip=clip, augment=Varied(),
    )  # fmt: skip


def build(spec: Spec, config: Config) -> Transformer:
    """The network for a data set."""
    if not len(config.agents) == len(config.agent_blocks) == len(config.depths):
        raise InputError(f"agents and agent_blocks want a number for each of the {len(config.depths)} stages")
    side = int(config.image_size or image_side(spec))
    return Transformer(spec.channels, len(spec.classes), side, config, mixer(config), class_token=config.trunk == "deit")


PAPER = Paper(variants=VARIANTS, build=build, recipe=recipe, auto=("small", "pvt_t"), loss=lambda config: smoothed)
LAYERS: Mapping[str, Layer] = {"agent_attention": Layer(slot="attention", config=Agents(), put=put)}
