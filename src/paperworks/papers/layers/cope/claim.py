"""Claim: who counts what the context says counts goes on counting in texts longer than any that were learnt (the counting task, section 5).

``paperworks claim cope``: nine short trainings, about four minutes of one core. A program sets a variable to 0, increases it, or does nothing, 16
statements long; the answer is what it would print. Every arm sees the same fresh programs, 64 a step, for the same steps; then it is asked
about 1,000 others of that length, and 1,000 of 32 statements with rarer increments. The arms are the same decoder with CoPE, with all of CoPE's gates
open, which is relative position, and with absolute positions. The paper has up to 512 statements, several variables and a hundred epochs.

A statement is one symbol here (officially several), the first sets the variable, and an increment of 10 does nothing. The pack is opened and
not used: programs can be drawn without end. The number of steps was chosen by one run of CoPE alone, with another seed, before any other arm was tried.
It can fail: few steps may teach nobody, and a decoder of two layers may count by other means.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperworks.data.bpe import BEGIN, END, SPECIALS
from paperworks.papers.layers.cope.cope import Config, Decoder
from paperworks.tasks.claim import Claim, Lab, Results

MOST = 10
SET, INCREASE, PASS = range(len(SPECIALS), len(SPECIALS) + 3)
ANSWER = PASS + 1
"""0; the symbols of 1 to 10 follow it."""
SHORT, LONG = 16, 32
STEPS, WARMUP, BATCH, RATE = 1000, 100, 64, 3e-3
ARMS = ("cope", "relative", "absolute")


def network_of(arm: str) -> Decoder:
    """A fresh decoder; 16 positions are enough for what is counted, and one relative position is needed for each statement."""
    positions = 16 if arm == "cope" else LONG + 3
    config = Config(layers=2, width=32, heads=2, dropout=0.0, position=arm, positions=positions)  # pyright: ignore[reportArgumentType]
    return Decoder(config, ANSWER + MOST + 1, (LONG + 1, 2))


def draw(batch: int, length: int, weights: tuple[float, float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Programs that end, and the symbols of what they print. Weights of setting, increasing and doing nothing."""
    chosen = torch.multinomial(torch.tensor(weights), batch * length, replacement=True, generator=generator).view(batch, length)
    chosen[:, 0] = 0
    value = torch.zeros(batch, dtype=torch.long)
    for t in range(length):
        increased = (chosen[:, t] == 1) & (value < MOST)
        chosen[:, t] = torch.where((chosen[:, t] == 1) & ~increased, 2, chosen[:, t])
        value = torch.where(chosen[:, t] == 0, 0, value + increased)
    return F.pad(chosen + SET, (0, 1), value=END), value + ANSWER


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one decoder; share of right answers for programs as long as those learnt, and twice as long."""
    torch.manual_seed(lab.seed)
    network, generator = network_of(arm).train(), torch.Generator().manual_seed(lab.seed)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.98))
    begin, started = torch.full((1000, 1), BEGIN), time.process_time()
    for n in range(1, STEPS + 1):
        source, answer = draw(BATCH, SHORT, (1.0, 7.0, 8.0), generator)
        optimizer.param_groups[0]["lr"] = RATE * min(n / WARMUP, (WARMUP / n) ** 0.5)
        loss = F.cross_entropy(network(source, begin[:BATCH])["logits"][:, 0], answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    seconds, right = time.process_time() - started, {}
    for name, length, weights in (("same", SHORT, (1.0, 7.0, 8.0)), ("longer", LONG, (1.0, 7.0, 24.0))):
        source, answer = draw(1000, length, weights, torch.Generator().manual_seed(1_000_000 + lab.seed))
        with torch.inference_mode():
            right[name] = float((network.eval()(source, begin)["logits"][:, 0].argmax(1) == answer).float().mean())
    return {**right, "seconds": seconds}


def holds(results: Results) -> bool:
    """With every seed CoPE is right in longer programs more often than either other arm, by ten points at least."""
    longer = {arm: found["longer"] for arm, found in results.items()}
    return all(ours >= max(others) + 0.1 for ours, *others in zip(longer["cope"], longer["relative"], longer["absolute"]))


CLAIM = Claim(
    data="pack:numbers_en_zh",
    arms=ARMS,
    control="relative",
    metric="longer",
    run=run,
    holds=holds,
    rule=(
        "With each of three seeds, after the same steps, CoPE answers at least ten points more of the programs of twice the length learnt than "
        "relative and absolute positions do.",
        "三个随机种子中的每一个，在相同步数之后，对两倍于训练长度的程序，CoPE 的正确率都比相对位置和绝对位置高至少十个百分点。",
    ),
    minutes=4.0,
)
