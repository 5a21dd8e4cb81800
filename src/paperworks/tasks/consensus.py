"""How much a sentence agrees with what people said of the same image: CIDEr and CIDEr-D.

Vedantam, Zitnick and Parikh, *CIDEr: Consensus-based Image Description Evaluation*, CVPR 2015. A sentence is the n-grams (n = 1 ... 4) that it
has, each with a weight: its count times the logarithm of how rarely it is said of images (TF-IDF). CIDEr is the mean cosine to the references;
CIDEr-D counts an n-gram no more often than the reference does and damps differences of length with a Gaussian. Both are multiplied by 10, as
in the published code and in COCO's, whose "CIDEr" is CIDEr-D.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import ClassVar
from weakref import WeakValueDictionary

Words = Sequence[Hashable]
"""A sentence."""
N = 4
"""Longest n-grams that count."""
SIGMA = 6.0
"""Standard deviation, in words, of CIDEr-D's Gaussian."""
Vector = tuple[dict[tuple[Hashable, ...], float], ...]
"""For each n the weights of a sentence's n-grams, of length 1 unless all are 0."""


def ngrams(words: Words) -> tuple[Counter[tuple[Hashable, ...]], ...]:
    """Counts of the n-grams of a sentence, for n = 1 ... 4."""
    return tuple(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, N + 1))


class Corpus:
    """Sets of sentences, one set an image, and of how many images each n-gram is said.

    Args:
        references: the sentences of each image.
        name: of the data set. In another process (a reader of data, say) a corpus is a name only, so that samples may carry it.
    """

    _open: ClassVar[WeakValueDictionary[str, Corpus]] = WeakValueDictionary()

    def __init__(self, references: Sequence[Sequence[Words]], name: str = "") -> None:
        self.name = name
        self.images = len(references)
        self.frequency: Counter[tuple[Hashable, ...]] = Counter()
        for sentences in references:
            self.frequency.update({gram for words in sentences for counts in ngrams(words) for gram in counts})
        self._known: dict[tuple[Hashable, ...], tuple[Vector, list[float]]] = {}
        if name:
            self._open[name] = self

    @classmethod
    def named(cls, name: str) -> Corpus:
        """The corpus of this name, or an empty one that passes the name on."""
        return cls._open.get(name) or _Elsewhere(name)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Corpus.named, (self.name,)

    def vector(self, words: Words) -> tuple[Vector, list[float]]:
        """TF-IDF weights g_n (eq. 1) over their norm, and the norms."""
        key = tuple(words)
        if key not in self._known:
            weighed = [
                {gram: count * (math.log(self.images) - math.log(max(1, self.frequency[gram]))) for gram, count in counts.items()}
                for counts in ngrams(key)
            ]
            norms = [math.sqrt(sum(w * w for w in g.values())) for g in weighed]
            if len(self._known) > 1 << 16:
                self._known.clear()
            self._known[key] = tuple({k: w / norm for k, w in g.items()} if norm else {} for g, norm in zip(weighed, norms)), norms
        return self._known[key]

    def cider(self, candidate: Words, references: Sequence[Words]) -> float:
        """CIDEr (eq. 2 and 3), times 10."""
        g, _ = self.vector(candidate)
        total = 0.0
        for reference in references:
            h, _ = self.vector(reference)
            total += sum(w * h[n].get(gram, 0.0) for n in range(N) for gram, w in g[n].items())
        return 10 * total / (N * len(references))

    def cider_d(self, candidate: Words, references: Sequence[Words]) -> float:
        """CIDEr-D (section 7): clipped to what the reference has, and damped by the difference of lengths."""
        g, norms = self.vector(candidate)
        total = 0.0
        for reference in references:
            h, others = self.vector(reference)
            # The published code takes the number of bigrams for the length.
            difference = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
            damping = math.exp(-(difference**2) / (2 * SIGMA**2))
            for n in range(N):
                scale = others[n] / norms[n] if norms[n] else 0.0
                total += damping * sum(min(w, scale * h[n].get(gram, 0.0)) * h[n].get(gram, 0.0) for gram, w in g[n].items())
        return 10 * total / (N * len(references))

    def consensus(self, sentences: Sequence[Words]) -> int:
        """Which of the sentences has the highest mean CIDEr to all of them: the nearest to the mean of their vectors."""
        centre: tuple[Counter[tuple[Hashable, ...]], ...] = tuple(Counter() for _ in range(N))
        for words in sentences:
            for total, g in zip(centre, self.vector(words)[0]):
                total.update(g)
        near = [sum(w * centre[n][gram] for n in range(N) for gram, w in self.vector(words)[0][n].items()) for words in sentences]
        return max(range(len(near)), key=near.__getitem__)


class _Elsewhere(Corpus):
    """The name of a corpus that another process has."""

    def __init__(self, name: str) -> None:
        self.name = name
