"""Translation: a text becomes another text, sequence to sequence.

A sample is ``source`` (int64, L symbols and the one that ends), ``target_in`` (int64, T: the target shifted right behind the one that begins),
``target`` (int64, T), ``text`` and ``truth`` (the two texts). Both languages share the subwords that were learnt from the training pairs
(``data.bpe``); they travel in ``Spec.more``. ``Spec.size`` is the longest source and the longest target, in symbols.

While it is trained a network is called as ``network(source, target_in)`` and returns ``logits`` (B T V) and ``attention`` (B T L, of what is
written on what is read). Given the source alone it writes greedily first. To be searched it has ``begin(source)``, which gives a list of tensors
that begin with the batch axis, ``step(symbol, state)``, which gives the logits (B V) of the next symbol and the new state, and ``longest``, the
number of symbols that it writes at most.

A text is given as its symbols; a prediction is a ``Translated``: the best text that a beam search finds, with the length penalty of "Attention Is
All You Need", section 6.1. A deployed network does the search itself, so that an exported file needs nothing but the list of symbols.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Int
from PIL import ImageDraw, ImageFont
from scipy import sparse
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F
from torchmetrics.functional.text import char_error_rate, sacre_bleu_score

from paperworks.data.bpe import BEGIN, END, PAD, SPECIALS, Subwords, learn
from paperworks.data.layouts import Problem
from paperworks.data.pairs import Pair, Pairs, common, looks_like_pairs, open_pairs, read_lines
from paperworks.errors import InputError
from paperworks.files import atomic
from paperworks.tasks.base import Batch, Grid, Output, Recipe, Sample, Spec, grid_of
from paperworks.tasks.contract import Deployed, Model, Options, Progress, Task
from paperworks.tasks.drawing import Picture, panel

BEAMS, ALPHA = 4, 0.6
"""Hypotheses that are followed at once, and the exponent of the length penalty."""
LONGEST = 256
"""Symbols of a text, at most; longer pairs are left out."""
TOGETHER = 32
"""Lines of a file that are translated at once."""
DRAWN = 20
"""Lines of a file, at most, of which ``--overlays`` draws a picture."""
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "DroidSansFallback.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simsun.ttc",
    "Arial Unicode.ttf",
)
"""Fonts with ideographs on the usual systems, the first that is there is taken; without any of them ideographs are drawn as boxes."""
RIGHT, WRONG = (0, 0, 0), (213, 94, 0)
"""Colours of letters that are in the truth and of others."""


class Writer(Protocol):
    """A network that writes a symbol at a time."""

    longest: int

    def begin(self, source: Tensor) -> list[Tensor]:
        """What must be known of a source B L, as tensors that begin with the batch axis."""
        ...

    def step(self, symbol: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits B V of what follows the symbols B, and the state after them."""
        ...


def greedy(network: Writer, source: Int[Tensor, "B L"]) -> Int[Tensor, "B T"]:
    """The likeliest symbol each time, behind the one that begins: what a decoder is given to repeat it. It goes on after the end."""
    state, written = network.begin(source), [source.new_full((source.shape[0],), BEGIN)]
    for _ in range(network.longest - 1):
        logits, state = network.step(written[-1], state)
        written.append(logits.argmax(1))
    return torch.stack(written, 1)


def beam_search(
    network: Writer, source: Int[Tensor, "B L"], beams: int = BEAMS, alpha: float = ALPHA
) -> tuple[Int[Tensor, "B T"], Float[Tensor, " B"]]:
    """The ended text of the largest log P / ((5 + length) / 6)^alpha (Wu et al. 2016) among those that the beam meets, and that value.

    Hypotheses that ended leave the beam, so that ``beams`` open ones are followed to the end; where none ends within the network's longest
    text the likeliest open one is taken.
    """
    beam = Beam.start(source, beams, network.longest)
    state = [part.repeat_interleave(beams, 0) for part in network.begin(source)]
    symbol = source.new_full((len(state[0]),), BEGIN)
    for t in range(network.longest):
        logits, state = network.step(symbol, state)
        beam, row = beam.advanced(logits, t, alpha)
        state = [part[row] for part in state]
        symbol = beam.written[:, :, t].flatten()
        if beam.settled(alpha):
            break
    return beam.best(alpha)


def beam_search_at_once(
    network: nn.Module, source: Int[Tensor, "B L"], longest: int, beams: int = BEAMS, alpha: float = ALPHA
) -> tuple[Int[Tensor, "B T"], Float[Tensor, " B"]]:
    """The same search as a loop that can be exported: nothing grows, so every step runs the whole network on what is written so far."""
    beam = Beam.start(source, beams, longest)
    again = source.repeat_interleave(beams, 0)

    def step(carry: tuple[Tensor, ...], t: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        before = Beam(*carry)
        logits = network(again, shifted(before.written.flatten(0, 1)))["logits"].index_select(1, t[None])[:, 0]
        after, _ = before.advanced(logits, t, alpha)
        return tuple(part.clone() for part in after), t.clone()

    carry, _ = scan(step, tuple(beam), torch.arange(longest, device=source.device))
    return Beam(*carry).best(alpha)


class Beam(NamedTuple):
    """What a search knows: texts that are still open and the best that have ended, filled up with padding."""

    written: Int[Tensor, "B K T"]
    score: Float[Tensor, "B K"]
    """Logarithms of their probabilities."""
    ended: Int[Tensor, "B K T"]
    ended_score: Float[Tensor, "B K"]
    """The same over the length penalty, largest first."""

    @classmethod
    def start(cls, source: Int[Tensor, "B L"], beams: int, longest: int) -> Beam:
        """Nothing written; of the equal hypotheses only the first counts."""
        nothing = source.new_full((source.shape[0], beams, longest), PAD)
        score = torch.zeros_like(nothing[:, :, 0], dtype=torch.float32)
        impossible = torch.full_like(score, -torch.inf)
        return cls(
            nothing, torch.where(torch.arange(beams, device=source.device) == 0, score, impossible), nothing.clone(), impossible.clone()
        )

    def advanced(self, logits: Float[Tensor, "N V"], t: int | Tensor, alpha: float) -> tuple[Beam, Int[Tensor, " N"]]:
        """One symbol more, at place t; and the rows of the network's state that go with the hypotheses now."""
        batch, beams, longest = self.written.shape
        log_p = logits.float().log_softmax(1).view(batch, beams, -1)
        score, place = (self.score[:, :, None] + log_p).flatten(1).topk(2 * beams)  # as many as may end, and as many again
        row, symbol = place // log_p.shape[2], place % log_p.shape[2]
        here = torch.arange(longest, device=place.device) == t
        written = torch.where(here, symbol[:, :, None], _taken(self.written, row))
        ends = symbol == END
        over = torch.where(ends, score / ((6 + t) / 6) ** alpha, -torch.inf)
        ended_score, best = torch.cat([self.ended_score, over], 1).topk(beams)
        ended = _taken(torch.cat([self.ended, written], 1), best)
        score, best = torch.where(ends, -torch.inf, score).topk(beams)
        first = torch.arange(batch, device=place.device)[:, None] * beams
        return Beam(_taken(written, best), score, ended, ended_score), (first + row.gather(1, best)).flatten()

    def settled(self, alpha: float) -> bool:
        """No open text can become better than the best that has ended."""
        return bool((self.ended_score[:, 0] >= self._over(alpha)).all())

    def best(self, alpha: float) -> tuple[Int[Tensor, "B T"], Float[Tensor, " B"]]:
        """The best text and its score."""
        none = self.ended_score[:, 0] == -torch.inf
        return torch.where(none[:, None], self.written[:, 0], self.ended[:, 0]), torch.where(
            none, self._over(alpha), self.ended_score[:, 0]
        )

    def _over(self, alpha: float) -> Float[Tensor, " B"]:
        return self.score[:, 0] / ((5 + self.written.shape[2]) / 6) ** alpha


def _taken(x: Tensor, rows: Int[Tensor, "B N"]) -> Tensor:
    """Rows of B M T, B N T."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def shifted(symbols: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Symbols behind the one that begins, without the last: what a decoder sees when it writes them."""
    return torch.cat([torch.full_like(symbols[:, :1], BEGIN), symbols[:, :-1]], 1)


@dataclass(frozen=True)
class Translated:
    """A text that was written, and how."""

    text: str
    score: float = float("nan")
    """Logarithm of its probability over the length penalty; -0.1 is sure, -1 is a guess."""
    symbols: tuple[str, ...] = ()
    """What was written, one by one."""
    attention: Float[Tensor, "T L"] | None = None
    """Where the network looked for each."""


@dataclass(frozen=True, kw_only=True)
class AsTheyAre:
    """Training texts are not varied."""

    def __call__(self, sample: Sample, patch: Sequence[int], generator: torch.Generator) -> Sample:
        """The sample."""
        return sample


class Translator(Deployed):
    """Sources B L -> symbols B T, scores B, attention B T L."""

    def forward(self, source: Int[Tensor, "B L"]) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Search, and look once more at what was found."""
        if torch.compiler.is_exporting():
            symbols, score = beam_search_at_once(self.network, source, self.network.longest)  # pyright: ignore[reportArgumentType]
        else:
            symbols, score = beam_search(self.network, source)  # pyright: ignore[reportArgumentType]
        return symbols, score, self.finish(self.network(source, shifted(symbols)))

    def finish(self, output: Output) -> Tensor:
        """The attention of what is written on what is read."""
        return output["attention"]


class TranslationScores:
    """How near translations are to the texts that people wrote."""

    def __init__(self, by_letters: bool) -> None:
        self.words = "char" if by_letters else "13a"
        self.found: list[str] = []
        self.truth: list[str] = []
        self.names: list[str] = []

    def update(self, prediction: Translated, sample: Sample) -> None:
        """Count one text."""
        self.found.append(prediction.text)
        self.truth.append(sample["truth"])
        self.names.append(sample["name"])

    def _bleu(self, found: Sequence[str], truth: Sequence[str], longest: int) -> float:
        return 100 * float(sacre_bleu_score(found, [[t] for t in truth], n_gram=longest, tokenize=self.words))  # pyright: ignore[reportArgumentType]

    def _words(self) -> list[int]:
        return [len(t.replace(" ", "") if self.words == "char" else t.split()) for t in self.truth]

    def compute(self) -> dict[str, float]:
        """``exact``, corpus ``bleu``, ``cer``."""
        return {
            "bleu": self._bleu(self.found, self.truth, min(max(self._words()), 4)),
            "exact": sum(f == t for f, t in zip(self.found, self.truth)) / len(self.truth),
            "cer": float(char_error_rate(self.found, self.truth)),
        }

    def per_item(self) -> list[dict[str, Any]]:
        """The same of each text; a text of fewer than four words is judged by runs of as many as it has."""
        return [
            {"name": n, "bleu": self._bleu([f], [t], min(k, 4)), "exact": float(f == t), "cer": float(char_error_rate(f, t))}
            for n, f, t, k in zip(self.names, self.found, self.truth, self._words())
        ]


class Translation(Task):
    """Pairs of texts, seen as examples of how to translate."""

    name = "translation"
    noun = ("text", "texts", "文本")
    pack = "pack:numbers_en_zh"
    metric = "bleu"
    metric_names = {
        "bleu": ("BLEU", "BLEU", 1),
        "exact": ("Exact match", "完全正确率", 1),
        "cer": ("Character errors", "字符错误率", -1),
    }
    explained = {
        "bleu": (
            "BLEU, 0 to 100: how many runs of one to four words are those of the true text (sacreBLEU); letters instead of words where "
            "the texts have no spaces, so compare within one data set only.",
            "BLEU，0 到 100：一到四个连续词与参考译文重合的程度（sacreBLEU）；文本没有空格时按字计算，因此只能在同一数据集内比较。",
        ),
        "exact": ("Share of texts that are right to the letter.", "一字不差的文本比例。"),
        "cer": (
            "Letters to insert, delete or replace until the text is right, over the letters of the true text.",
            "把译文改对所需的增、删、替换字数，除以参考译文的字数。",
        ),
    }
    baseline_names = {"nearest": ("Target of the nearest source", "最相近原文的译文"), "common": ("Commonest target", "最常见的译文")}
    views = {"translation": ("translation", "译文"), "attention": ("attention", "注意力")}
    inputs = ("source", "target_in")
    images = ()
    outputs = ("symbols", "score", "attention")
    look_at = 16
    suffix = ".txt"

    def __init__(self, source: str | Path, *, progress: Progress | None = None) -> None:
        """Open a table of pairs, a folder, or ``pack:NAME``.

        Raises:
            InputError: there is nothing to learn from.
        """
        self.pairs: Pairs = open_pairs(source)
        self.source, self.sha256 = self.pairs.source, self.pairs.sha256
        train, val = self.pairs.split("train"), self.pairs.split("val")
        self.subwords = learn(text for pair in train for text in (pair.source, pair.target))
        self.train, self.val = self._short(train), self._short(val)
        if not self.train or not self.val:
            raise InputError(f"{source}: {len(self.train)} training and {len(self.val)} validation pairs; add pairs, or a column split")
        self.long = len(train) + len(val) - len(self.train) - len(self.val)
        sides = [[len(self.subwords.encode(getattr(p, side))) + 1 for p in (*self.train, *self.val)] for side in ("source", "target")]
        self.spec = self._spec(self.subwords, (max(sides[0]), max(sides[1])))

    def _short(self, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        return tuple(p for p in pairs if max(len(self.subwords.encode(text)) for text in (p.source, p.target)) < LONGEST)

    @classmethod
    def _spec(cls, subwords: Subwords, size: tuple[int, int]) -> Spec:
        return Spec(task=cls.name, channels=1, classes=(), size=size, mean=(), std=(), more=subwords.plain())

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Files called pairs, or train.src beside train.tgt."""
        return looks_like_pairs(path)

    def describe(self) -> dict[str, Any]:
        """What the files say of themselves, and how texts are spelt."""
        found = self.pairs.describe() | {"task": self.name, "subwords": len(self.subwords.tokens), "longest": list(self.spec.size)}
        found["splits"] |= {"train": len(self.train), "val": len(self.val)}
        if self.long:
            problem = Problem(Path(self.source), f"has {self.long} pairs of {LONGEST} symbols or more", "split them into sentences")
            found["problems"].append({"path": str(problem.path), "what": problem.what, "fix": problem.fix})
        return found

    def check(self, spec: Spec) -> None:
        """Any pairs can be measured: from now on they are spelt as the model spells."""
        self.spec, self.subwords = spec, Subwords.read(spec.more)

    def sample(self, item: Pair) -> Sample:
        """A pair as symbols."""
        source, target = self.subwords.encode(item.source), self.subwords.encode(item.target)
        return {
            "source": torch.tensor([*source, END]),
            "target_in": torch.tensor([BEGIN, *target]),
            "target": torch.tensor([*target, END]),
            "text": item.source,
            "truth": item.target,
            "name": item.name,
        }

    def training_sample(self, item: Pair, recipe: Recipe, grid: Grid, generator: torch.Generator) -> Sample:
        """A pair, varied as the recipe says."""
        return recipe.augment(self.sample(item), (grid.fixed,), generator)

    @staticmethod
    def collate(samples: list[Sample]) -> Batch:
        """Symbols are filled up to the longest of the batch; texts become lists."""
        return {
            key: nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=PAD)
            if isinstance(value, Tensor)
            else [s[key] for s in samples]
            for key, value in samples[0].items()
        }

    @staticmethod
    def loss(output: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of each symbol of the target."""
        return {"loss": F.cross_entropy(output["logits"].flatten(0, 1), batch["target"].flatten(), ignore_index=PAD)}

    @classmethod
    def deploy(cls, network: nn.Module, spec: Spec) -> Translator:
        """Beam search."""
        return Translator(network, spec)

    def given(self, sample: Sample) -> Tensor:
        """The source's symbols."""
        return sample["source"]

    @classmethod
    def network_input(cls, given: Int[Tensor, " N"], grid: Grid) -> Int[Tensor, " L"]:
        """Symbols, filled up to the network's length.

        Raises:
            InputError: there are more than the network takes.
        """
        if len(given) > grid.fixed:
            raise InputError(
                f"a text of {len(given) - 1} symbols is longer than the {grid.fixed - 1} of the longest that was learnt; split it"
            )
        return F.pad(given, (0, grid.fixed - len(given)), value=PAD)

    @classmethod
    def predictor(
        cls, deployed: Callable[[Tensor], Any], spec: Spec, grid: Grid, *, window: int = 1024, overlap: float = 0.25
    ) -> Callable[[Tensor], Translated]:
        """A function from a source's symbols to its translation."""
        subwords = Subwords.read(spec.more)
        return lambda given: _translated(deployed, subwords, grid, [given])[0]

    def scores(self) -> TranslationScores:
        """An accumulator of the task's metrics."""
        spaced = sum(" " in pair.target for pair in self.train)
        return TranslationScores(by_letters=spaced < len(self.train) / 10)

    def baselines(self) -> dict[str, Callable[[Tensor], Translated]]:
        """The commonest target, and that of the training source with the most alike runs of one to three symbols."""
        often = Translated(common([pair.target for pair in self.train]))
        nearest = Nearest([self.subwords.encode(pair.source) for pair in self.train])
        return {
            "nearest": lambda given: Translated(self.train[nearest(given.tolist()[:-1])].target),
            "common": lambda given: often,
        }

    # Pictures

    def shown(self, sample: Sample) -> dict[str, Picture]:
        """Both texts."""
        return {"input": written(sample["text"]), "truth": written(sample["truth"])}

    def drawn(self, sample: Sample, prediction: Translated) -> dict[str, Picture]:
        """The translation with its mistakes, and where the network looked while it wrote."""
        source = [self.subwords.tokens[i] for i in sample["source"].tolist()]
        return {"translation": written(prediction.text, sample["truth"]), "attention": attention_map(prediction, source)}

    def legend(self) -> list[dict[str, Any]]:
        """What the colours of the letters mean."""
        return [
            {
                "colour": WRONG,
                "en": "not in the true text at this place; _ where letters are missing",
                "zh": "参考译文此处没有的字；_ 表示缺字",
                "view": "translation",
            },
            {
                "colour": (0, 60, 130),
                "en": "read for the symbol written in this row",
                "zh": "写出该行符号时所读的位置",
                "view": "attention",
            },
        ]

    # Files

    def files(self, items: Sequence[Pair]) -> list[Path]:
        """The sources, written line by line into a temporary file."""
        text = "".join(f"{item.source}\n" for item in items)
        path = Path(tempfile.gettempdir()) / f"paperworks_{hashlib.sha256(text.encode()).hexdigest()[:12]}" / "lines.txt"
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return [path]

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Text files."""
        return path.suffix.lower() == ".txt"

    @classmethod
    def predict_file(cls, model: Model, source: Path, target: Path, options: Options) -> None:
        """Translate a file line by line; beside it a table of source, translation and score. An empty line stays empty."""
        options.refuse(cls.name, "refine", "probabilities", "window", "overlap")
        lines, subwords = read_lines(source), Subwords.read(model.spec.more)
        given = {i: torch.tensor([*subwords.encode(line), END]) for i, line in enumerate(lines) if line.strip()}
        if not given:
            raise InputError(f"{source} holds no text; write one text to a line")
        for i, symbols in given.items():
            try:
                cls.network_input(symbols, model.grid)
            except InputError as error:
                raise InputError(f"{source}, line {i + 1}: {error}") from None
        found: dict[int, Translated] = {}
        places = list(given)
        for start in range(0, len(places), TOGETHER):
            some = places[start : start + TOGETHER]
            found |= zip(some, _translated(model.forward, subwords, model.grid, [given[i] for i in some]))
        with atomic(target) as temporary:
            temporary.write_text("".join(f"{found[i].text if i in found else ''}\n" for i in range(len(lines))), encoding="utf-8")
        with atomic(target.with_suffix(".tsv")) as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
            table = csv.writer(f, delimiter="\t", lineterminator="\n")
            table.writerow(["line", "source", "translation", "score"])
            table.writerows([i + 1, lines[i], found[i].text, f"{found[i].score:.4f}"] for i in places)
        if options.overlays:
            rows = [
                panel(
                    [written(lines[i]), written(found[i].text), attention_map(found[i], [subwords.tokens[n] for n in given[i].tolist()])],
                    [f"line {i + 1}", "translation", "attention"],
                )
                for i in places[:DRAWN]
            ]
            width = max(row.shape[1] for row in rows)
            sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows])
            with atomic(target.with_name(target.stem + ".overlay.png")) as temporary:
                PIL.Image.fromarray(sheet).save(temporary)

    # Data that do not exist

    @classmethod
    def plain_spec(cls, channels: int = 3, classes: int = 2, ndim: int = 2, size: tuple[int, ...] | None = None) -> Spec:
        """A spec of no data set in particular: ``classes`` is the number of symbols, 16 or more; texts are short."""
        count = max(classes, 16)
        subwords = Subwords([*SPECIALS, *(f"{i:x}" for i in range(count - len(SPECIALS)))], [])
        first, second = size or (10, 8)
        return cls._spec(subwords, (min(first, 32), min(second, 16)))

    @classmethod
    def example(cls, spec: Spec, grid: Grid, *, size: Sequence[int] | None = None, batch: int = 1, seed: int = 0) -> Int[Tensor, "B L"]:
        """Sources of several lengths without meaning and without chance."""
        length, symbols = grid.fixed, len(spec.more["tokens"]) - len(SPECIALS)
        index = torch.arange(batch * length).view(batch, length) + 31 * seed
        source = len(SPECIALS) + (index * index * 7 + index // 3) % symbols
        last = length - 1 - (torch.arange(batch) + seed)[:, None] % (length // 2)
        place = torch.arange(length)
        return source.masked_fill(place == last, END).masked_fill(place > last, PAD)

    @classmethod
    def plain_batch(cls, network: nn.Module, spec: Spec, *, size: int = 48, batch: int = 2, seed: int = 0) -> Batch:
        """Sources without meaning, and targets that repeat their beginnings."""
        source = cls.example(spec, grid_of(network), batch=batch, seed=seed)
        longest = min(spec.size[1], source.shape[1])
        target = source[:, :longest].clone()
        return {
            "source": source,
            "target_in": shifted(target),
            "target": target,
            "text": ["noise"] * batch,
            "truth": ["noise"] * batch,
            "name": [f"noise {i}" for i in range(batch)],
        }


def _translated(deployed: Callable[[Tensor], Any], subwords: Subwords, grid: Grid, given: Sequence[Tensor]) -> list[Translated]:
    batch = torch.stack([Translation.network_input(symbols, grid) for symbols in given])
    with torch.inference_mode():
        found, score, attention = (part.cpu() for part in deployed(batch))
    out = []
    for row, symbols in enumerate(given):
        indices = found[row].tolist()
        length = indices.index(END) + 1 if END in indices else len(indices)
        names = tuple(subwords.tokens[i] for i in indices[:length])
        out.append(Translated(subwords.decode(indices), float(score[row]), names, attention[row, :length, : len(symbols)].float()))
    return out


class Nearest:
    """Finds the most similar of many sequences, by the cosine of their runs of one to three symbols, rare ones counting more."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        counted = [self._runs(s) for s in sequences]
        self.index = {run: i for i, run in enumerate(sorted({run for counts in counted for run in counts}))}
        seen = Counter(run for counts in counted for run in counts)
        self.weight = np.array([np.log((1 + len(sequences)) / (1 + seen[run])) + 1 for run in self.index])
        self.table = sparse.vstack([self._vector(counts) for counts in counted], format="csr")

    @staticmethod
    def _runs(symbols: Sequence[int]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(symbols[i : i + n]) for n in (1, 2, 3) for i in range(len(symbols) - n + 1))

    def _vector(self, counts: Counter[tuple[int, ...]]) -> sparse.csr_array:
        known = {self.index[run]: n for run, n in counts.items() if run in self.index}
        places = np.array(list(known), dtype=np.int64)
        values = np.array(list(known.values())) * self.weight[places]
        values = values / max(float(np.linalg.norm(values)), 1e-12)
        return sparse.csr_array((values, (np.zeros_like(places), places)), shape=(1, len(self.index)))

    def __call__(self, symbols: Sequence[int]) -> int:
        """Index of the most similar."""
        return int((self.table @ self._vector(self._runs(symbols)).T).toarray().argmax())


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with ideographs where the system has one."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def written(text: str, truth: str | None = None, *, width: int = 240, size: int = 18) -> Picture:
    """A text in lines; beside a truth, letters that are wrong are orange and missing ones a stroke."""
    letters: list[tuple[str, tuple[int, int, int]]] = []
    if truth is None:
        letters = [(letter, RIGHT) for letter in text]
    else:
        for kind, a, b, *_ in difflib.SequenceMatcher(a=text, b=truth, autojunk=False).get_opcodes():
            letters += [(letter, RIGHT if kind == "equal" else WRONG) for letter in text[a:b]] or [("_", WRONG)]
    face = font(size)
    places, x, y = [], 4, 4
    word = 0  # where the last word began, which moves to a new line as a whole
    for i, (letter, colour) in enumerate(letters):
        advance = int(face.getlength(letter)) + 1
        if letter == " " or ord(letter) > 0x2E80:
            word = i + 1
        if x + advance > width - 4:
            y += size + 8
            shift = places[word][1] - 4 if word < i and places[word][1] > 4 else 0
            for j in range(word, i):
                places[j] = (places[j][0], places[j][1] - shift, y, places[j][3])
            x = x - shift if shift else 4
        places.append((letter, x, y, colour))
        x += advance
    sheet = PIL.Image.new("RGB", (width, y + size + 14), "white")
    draw = ImageDraw.Draw(sheet)
    for letter, left, top, colour in places:
        draw.text((left, top), letter, colour, face)
    return np.array(sheet)


def attention_map(prediction: Translated, source: Sequence[str], *, cell: int = 18) -> Picture:
    """A row for each symbol that was written, a column for each that was read: the darker, the more of it was looked at."""
    if prediction.attention is None:
        return written("(no attention)")
    face = font(13)
    left, top = (int(max(face.getlength(s) for s in symbols)) + 8 for symbols in (prediction.symbols, source))
    rows, columns = prediction.attention.shape
    sheet = PIL.Image.new("RGB", (left + cell * columns + 1, top + cell * rows + 1), "white")
    draw = ImageDraw.Draw(sheet)
    for i, symbol in enumerate(prediction.symbols):
        draw.text((4, top + cell * i), symbol, "black", face)
    for j, symbol in enumerate(source):
        label = PIL.Image.new("RGB", (top, cell), "white")
        ImageDraw.Draw(label).text((4, 0), symbol, "black", face)
        sheet.paste(label.rotate(90, expand=True), (left + cell * j, 0))
    for i, row in enumerate(prediction.attention.clamp(0, 1).tolist()):
        for j, share in enumerate(row):
            shade = (round(255 * (1 - share)), round(255 - 195 * share), round(255 - 125 * share))
            draw.rectangle(
                (left + cell * j, top + cell * i, left + cell * (j + 1), top + cell * (i + 1)), fill=shade, outline=(225, 225, 225)
            )
    return np.array(sheet)
