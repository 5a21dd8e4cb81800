"""Texts as sequences of subwords: byte-pair encoding, learnt from texts (Sennrich et al. 2016, arXiv:1508.07909).

A text is cut at spaces into words and within them into runs of letters and digits, and single other signs. Each piece is spelt letter by letter;
then the two neighbouring symbols that are seen most often are merged everywhere, again and again. A piece that begins a word begins with ▁,
so that a text comes back from its symbols. An ideograph is a piece of its own and never merged; it has no ▁, as there are no spaces around it.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
PAD, UNKNOWN, BEGIN, END = range(len(SPECIALS))
"""Fills up a batch; a letter that was never seen; before the first and after the last symbol."""
SPACE = "▁"
LARGEST = 37_000
"""Symbols, at most: as many as "Attention Is All You Need" had for English and German."""
LETTERS = 100
"""Letters of text for each symbol, at least: a symbol that is hardly ever seen cannot be learnt."""
_IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3007\U00020000-\U0003ffff"
_PIECES = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+|[^\w\s]")
_BESIDE = re.compile(rf" (?=[{_IDEOGRAPH}])|(?<=[{_IDEOGRAPH}]) ")


def normalised(text: str) -> str:
    """One space between words, none beside an ideograph, composed letters (NFC): what a text is compared as."""
    return _BESIDE.sub("", " ".join(unicodedata.normalize("NFC", text).replace(SPACE, "_").split()))


def pieces(text: str) -> Iterator[str]:
    """What merging never crosses."""
    for word in normalised(text).split(" "):
        for i, match in enumerate(_PIECES.finditer(word)):
            piece = match[0]
            yield piece if i or re.match(f"[{_IDEOGRAPH}]", piece) else SPACE + piece


class Subwords:
    """Texts <-> indices of symbols. ``tokens`` are the specials, the letters, and what each of ``merges`` made, in this order."""

    def __init__(self, tokens: Sequence[str], merges: Iterable[Sequence[str]]) -> None:
        self.tokens = tuple(tokens)
        self.merges = tuple((first, second) for first, second in merges)
        self._known: dict[str, list[int]] = {}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Subwords:
        """From what ``plain`` gave, perhaps by way of JSON."""
        return cls(plain["tokens"], plain["merges"])

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {"tokens": list(self.tokens), "merges": [list(pair) for pair in self.merges]}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def _rank(self) -> dict[tuple[str, str], int]:
        return {pair: i for i, pair in enumerate(self.merges)}

    def encode(self, text: str) -> list[int]:
        """Indices of a text's symbols, without the specials that begin and end it."""
        return [i for piece in pieces(text) for i in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        if piece not in self._known:
            symbols = list(piece)
            while len(symbols) > 1:  # the merge that was learnt first goes first
                rank, pair = min((self._rank.get(pair, len(self.merges)), pair) for pair in pairwise(symbols))
                if rank == len(self.merges):
                    break
                symbols = merged(symbols, pair)
            self._known[piece] = [self._index.get(symbol, UNKNOWN) for symbol in symbols]
        return self._known[piece]

    def decode(self, indices: Iterable[int]) -> str:
        """The text of symbols up to the first that ends it."""
        found = []
        for i in indices:
            if i == END:
                break
            if i not in (PAD, BEGIN):
                found.append("\ufffd" if i == UNKNOWN else self.tokens[i])
        return normalised("".join(found).replace(SPACE, " "))


def merged(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with each occurrence of the pair, from the left, made one."""
    out: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def learn(texts: Iterable[str], most: int | None = None) -> Subwords:
    """Learn symbols from texts: all of their letters, and merges until there are ``most`` symbols or no pair is seen twice.

    Of pairs seen equally often the one whose symbols were known first is merged.

    Args:
        texts: of both languages, where they shall share their symbols.
        most: symbols, specials included; default: one for each hundred letters of text, at most 37,000.
    """
    counts = Counter(piece for text in texts for piece in pieces(text))
    most = most or min(LARGEST, sum(len(piece) * n for piece, n in counts.items()) // LETTERS)
    tokens = [*SPECIALS, *sorted({letter for piece in counts for letter in piece})]
    index = {token: i for i, token in enumerate(tokens)}
    words = [list(piece) for piece in counts]
    times = list(counts.values())
    pairs: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for w, symbols in enumerate(words):
        for pair in pairwise(symbols):
            pairs[pair] += times[w]
            where[pair].add(w)

    def entry(pair: tuple[str, str]) -> tuple[int, int, int, tuple[str, str]]:
        return -pairs[pair], index[pair[0]], index[pair[1]], pair

    heap = [entry(pair) for pair in pairs]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while heap and len(tokens) < most:
        count, _, _, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # it was counted again since; that entry is in the heap too
        if -count < 2:
            break
        merges.append(pair)
        if (token := "".join(pair)) not in index:
            index[token] = len(tokens)
            tokens.append(token)
        touched: set[tuple[str, str]] = set()
        for w in list(where[pair]):
            old, words[w] = words[w], merged(words[w], pair)
            for sign, symbols in ((-1, old), (1, words[w])):
                for other in pairwise(symbols):
                    pairs[other] += sign * times[w]
                    touched.add(other)
            for other in pairwise(old):
                where[other].discard(w)
            for other in pairwise(words[w]):
                where[other].add(w)
        for other in touched:
            if pairs[other] > 0:
                heapq.heappush(heap, entry(other))
    return Subwords(tokens, merges)
