"""Claim: what one step of attention reaches, a recurrent network has to carry through a bottleneck (section 4), and order comes from the sinusoids alone.

``paperworks claim transformer``: nine short trainings, about three minutes of one core. Ten symbols of fourteen are to be written backwards. Every
arm sees the same fresh sequences, 64 a step, for the same number of steps, with the same optimiser and schedule, and writes 300 others greedily.
``lstm`` is an encoder and a decoder of two layers without attention (Sutskever et al. 2014) with as many parameters; ``no_position`` is the Transformer
without its positional encoding. The pack is opened and not used: sequences of symbols without meaning can be drawn without end.

It can fail: writing backwards is kind to an LSTM, whose last symbol read is the first to be written, and 400 steps are few for a post-norm
network. The number of steps was chosen by one run of the Transformer alone, before any other arm was tried.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.bpe import BEGIN, END, SPECIALS
from paperworks.papers.language.transformer.transformer import Config, Transformer
from paperworks.tasks.base import Output
from paperworks.tasks.claim import Claim, Lab, Results
from paperworks.tasks.translation import greedy

LENGTH, SYMBOLS = 10, 14
STEPS, WARMUP, BATCH, RATE = 400, 60, 64, 2e-3
CONFIG = Config(layers=2, d_model=64, d_ff=256, heads=4, dropout=0.0)
WIDTH = 84
"""Of the LSTM, which then has as many parameters."""


class Lstm(nn.Module):
    """The last states of the encoder are all that the decoder knows of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = LENGTH + 2
        self.embedding = nn.Embedding(len(SPECIALS) + SYMBOLS, WIDTH)
        self.encoder = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.decoder = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.output = nn.Linear(WIDTH, len(SPECIALS) + SYMBOLS)

    def forward(self, source: Tensor, target_in: Tensor) -> Output:
        """Logits B T V."""
        written, _ = self.decoder(self.embedding(target_in), self.encoder(self.embedding(source))[1])
        return {"logits": self.output(written)}

    def begin(self, source: Tensor) -> list[Tensor]:
        """The encoder's states, batch first."""
        return [part.transpose(0, 1) for part in self.encoder(self.embedding(source))[1]]

    def step(self, symbol: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits B V."""
        h, c = (part.transpose(0, 1).contiguous() for part in state)
        written, after = self.decoder(self.embedding(symbol[:, None]), (h, c))
        return self.output(written[:, 0]), [part.transpose(0, 1) for part in after]


def network_of(arm: str) -> Transformer | Lstm:
    """A fresh network."""
    if arm == "lstm":
        return Lstm()
    network = Transformer(CONFIG, len(SPECIALS) + SYMBOLS, (LENGTH + 1, LENGTH + 2))
    if arm == "no_position":
        # the same constant is added everywhere
        network.position.rate.fill_(0.0)  # pyright: ignore[reportCallIssue]
    return network


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences that end, and what is to be written."""
    symbols = torch.randint(len(SPECIALS), len(SPECIALS) + SYMBOLS, (batch, LENGTH), generator=generator)
    return F.pad(symbols, (0, 1), value=END), F.pad(symbols.flip(1), (0, 1), value=END)


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one network; share of sequences, and of symbols, that it writes correctly."""
    torch.manual_seed(lab.seed)
    network, generator = network_of(arm).train(), torch.Generator().manual_seed(lab.seed)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.98), eps=1e-9)
    started = time.process_time()
    for n in range(1, STEPS + 1):
        source, target = draw(BATCH, generator)
        optimizer.param_groups[0]["lr"] = RATE * min(n / WARMUP, (WARMUP / n) ** 0.5)
        logits = network(source, F.pad(target[:, :-1], (1, 0), value=BEGIN))["logits"]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    seconds = time.process_time() - started
    source, target = draw(300, torch.Generator().manual_seed(1_000_000 + lab.seed))
    with torch.inference_mode():
        right = greedy(network.eval(), source)[:, 1:] == target
    parameters = sum(p.numel() for p in network.parameters())
    return {
        "exact": float(right.all(1).float().mean()),
        "symbols": float(right.float().mean()),
        "parameters": float(parameters),
        "seconds": seconds,
    }


def holds(results: Results) -> bool:
    """With every seed the Transformer is right in nine of ten sequences, and each other arm in at least three of ten fewer."""
    exact = {arm: found["exact"] for arm, found in results.items()}
    return all(t >= 0.9 and max(a, b) <= t - 0.3 for t, a, b in zip(exact["transformer"], exact["lstm"], exact["no_position"]))


CLAIM = Claim(
    data="pack:numbers_en_zh",
    arms=("transformer", "lstm", "no_position"),
    control="lstm",
    metric="exact",
    run=run,
    holds=holds,
    rule=(
        "With each of three seeds, after the same 400 steps: the Transformer reverses at least 90 % of new sequences exactly, "
        "and both the LSTM and the Transformer without positions reverse a share that is smaller by 30 points or more.",
        "三个随机种子中的每一个，在相同的 400 步之后：Transformer 至少把 90% 的新序列完全正确地倒写，而 LSTM 和去掉位置编码的 Transformer 的比例都低 30 个百分点以上。",
    ),
    minutes=3.0,
)
