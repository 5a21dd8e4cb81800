"""Translation: subwords, readers and what they refuse, search against brute force, scores worked out by hand, baselines, files."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paperworks.data.bpe import BEGIN, END, PAD, SPECIALS, Subwords, learn, normalised, pieces
from paperworks.data.pairs import looks_like_pairs, open_pairs
from paperworks.errors import InputError
from paperworks.tasks.base import Grid, Spec
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.translation import Nearest, Translated, Translation, attention_map, beam_search, greedy, written

# Subwords


def test_a_text_comes_back() -> None:
    texts = ["Don't  panic: it is 1 a.m.", "你好。 中文 and English 混排 x", "naïve naïve ▁ß", "", "a"]
    subwords = learn(texts * 3, most=60)
    assert [subwords.decode(subwords.encode(t)) for t in texts] == [normalised(t) for t in texts]
    assert normalised("你好 。 中文 x y") == "你好。中文x y" and normalised("nai\u0308ve") == "naïve"
    again = Subwords.read(json.loads(json.dumps(subwords.plain())))
    assert again.encode(texts[0]) == subwords.encode(texts[0])
    assert subwords.decode([*subwords.encode("a"), END, *subwords.encode("panic")]) == "a"
    assert subwords.decode(subwords.encode("a Z")) == "a \ufffd"


def test_pieces() -> None:
    assert list(pieces("twenty-one 中文 3x")) == ["▁twenty", "-", "one", "中", "文", "3x"]


def test_merges_of_the_paper() -> None:
    """The example of Sennrich et al. 2016, algorithm 1: low 5, lower 2, newest 6, widest 3 (their words end in a sign, ours begin with one)."""
    words = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    letters = len(SPECIALS) + len({"▁", *"lowernewestwidest"})
    subwords = learn([" ".join(words)], most=letters + 4)
    # es 9, est 9 and lo 7 as theirs; then ow/low 7
    assert subwords.merges[:2] == (("e", "s"), ("es", "t"))
    assert {"".join(m) for m in subwords.merges[2:]} <= {"lo", "low", "▁l", "▁lo", "ow", "we"}


def test_merging_is_exact_on_any_text() -> None:
    """Counting pairs anew after each merge gives the same merges as keeping count."""
    text = "the thin thinker thought that the other thing is thus there and then the rather thick theme " + "banana bandana aaaa aaa " * 2
    quick = learn([text], most=90)
    words = [list(p) for p in pieces(text)]
    index = {t: i for i, t in enumerate([*SPECIALS, *sorted({c for w in words for c in w})])}
    for pair in quick.merges:
        counts: dict[tuple[str, str], int] = {}
        for w in words:
            for p in itertools.pairwise(w):
                counts[p] = counts.get(p, 0) + 1
        best = min(counts, key=lambda p: (-counts[p], index[p[0]], index[p[1]]))
        assert pair == best and counts[best] >= 2
        index.setdefault("".join(pair), len(index))
        for i, w in enumerate(words):
            joined, rest = [], w
            while rest:
                take = 2 if tuple(rest[:2]) == pair else 1
                joined.append("".join(rest[:take]))
                rest = rest[take:]
            words[i] = joined
    assert (
        len(quick.merges) > 10
        and max(sum(p == q for w in words for q in itertools.pairwise(w)) for w in words for p in itertools.pairwise(w)) == 1
    )


def test_equal_to_the_tokenizers_library() -> None:
    """Recorded by record_tokenizers.py: symbols and spelling of the pack by Hugging Face's trainer."""
    fixture = json.loads(Path(__file__).with_name("tokenizers_numbers.json").read_text(encoding="utf-8"))
    data = open_pairs("pack:numbers_en_zh")
    subwords = learn([t for p in data.split("train") for t in (p.source, p.target)], most=fixture["most"])
    assert set(subwords.tokens) - set(SPECIALS) == set(fixture["tokens"])
    assert [list(m) for m in subwords.merges] == fixture["merges"]
    for text, symbols in fixture["spelt"].items():
        assert [subwords.tokens[i] for i in subwords.encode(text)] == symbols


# Readers


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows(n: int, split: bool = False) -> str:
    return "".join(f"word{i} is {i}\tmot{i} est {i}{chr(9) + ('val' if i % 5 == 0 else 'train') if split else ''}\n" for i in range(n))


def test_readers_agree(tmp_path: Path) -> None:
    write(tmp_path / "a" / "pairs.tsv", "source\ttarget\tsplit\n" + rows(20, split=True))
    pairs = open_pairs(tmp_path / "a").items
    write(tmp_path / "b.csv", "Split,tgt,src\n" + "".join(f'{p.split},"{p.target}",{p.source}\n' for p in pairs))
    write(tmp_path / "c.jsonl", "\n".join(json.dumps({"source": p.source, "target": p.target, "split": p.split}) for p in pairs))
    for split in ("train", "val"):
        for side in ("src", "tgt"):
            name = {"src": "source", "tgt": "target"}[side]
            write(tmp_path / "d" / f"{split}.{side}", "".join(f"{getattr(p, name)}\n" for p in pairs if p.split == split))
    kept = sorted((p.source, p.target, p.split) for p in pairs)
    for other in ("b.csv", "c.jsonl", "d"):
        assert sorted((p.source, p.target, p.split) for p in open_pairs(tmp_path / other).items) == kept
    assert [looks_like_pairs(tmp_path / n) for n in ("a", "a/pairs.tsv", "b.csv", "d", ".")] == [True, True, False, True, False]


def test_split_by_hash_keeps_equal_sources_together(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.tsv", "source\ttarget\n" + rows(40) + rows(40).replace("mot", "nom"))
    data = open_pairs(path)
    assert len(data.split("val")) == 8
    assert not {p.source for p in data.split("val")} & {p.source for p in data.split("train")}


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    held = "word0 is 0\tune autre\ttrain\n\tleer\ttrain\nleer\t\ttrain\n"
    data = open_pairs(write(tmp_path / "pairs.tsv", "source\ttarget\tsplit\n" + rows(10, split=True) + held))
    assert len(data.items) == 10 and len(data.problems) == 3
    assert "held out" in str(data.problems[-1]) and "pairs.tsv:12" in str(data.problems[-1])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs.tsv", "source\tzh\na\tb\n", "no column target"),
        ("pairs.tsv", "source\ttarget\tsplit\na\tb\tholdout\n", "row 2: 'holdout' is no split"),
        ("pairs.tsv", "", "is empty"),
        ("pairs.tsv", "source\ttarget\n\t\n", "holds no pair"),
        ("pairs.csv", 'source,target\n"a,b\n', "cannot be read as CSV"),
        ("pairs.jsonl", '{"source": "a", "target": "b"}\nnone\n', "line 2 is no JSON"),
        ("pairs.jsonl", '["a", "b"]\n', "line 1 is no object"),
        ("pairs.docx", "a", "no table of pairs"),
        ("train.src", "a\nb\n", "train.tgt"),
    ],
)
def test_bad_files_end_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path / name, text)
    with pytest.raises(InputError, match=message) as caught:
        open_pairs(tmp_path if name == "train.src" else tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write(tmp_path / "train.src", "a\nb\n")
    write(tmp_path / "train.tgt", "a\n")
    with pytest.raises(InputError, match=r"2 lines and train\.tgt has 1"):
        open_pairs(tmp_path)
    with pytest.raises(InputError, match="1 training and 0 validation"):
        Translation(write(tmp_path / "one.tsv", "source\ttarget\na\tb\n"))
    (tmp_path / "latin.tsv").write_bytes("source\ttarget\nä\tb\n".encode("latin-1"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        open_pairs(tmp_path / "latin.tsv")


def test_long_pairs_are_left_out(tmp_path: Path) -> None:
    text = "source\ttarget\tsplit\n" + rows(20, split=True) + f"{'- ' * 300}\tlong\ttrain\n"
    data = Translation(write(tmp_path / "pairs.tsv", text))
    assert len(data.train) == 16 and data.describe()["problems"][0]["what"].startswith("has 1 pairs of 256")


# Search


class Table(nn.Module):
    """What follows is in a table; it depends on the sum of the last two symbols and on the source's first."""

    def __init__(self, symbols: int, longest: int) -> None:
        super().__init__()
        self.longest, self.grid = longest, Grid(fixed=4)
        self.register_buffer("table", 2 * torch.randn(symbols, symbols, symbols, generator=torch.Generator().manual_seed(3)))

    def begin(self, source: Tensor) -> list[Tensor]:
        return [source[:, 0], torch.full_like(source[:, 0], PAD)]

    def step(self, symbol: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.table[state[0], (state[1] + symbol) % 8], [state[0], symbol]


def likelihood(network: Table, first: int, text: tuple[int, ...]) -> float:
    total, before, symbol = 0.0, PAD, BEGIN
    for follow in text:
        total += float(network.table[first, (before + symbol) % 8].log_softmax(0)[follow])
        before, symbol = symbol, follow
    return total


def test_beam_search_against_all_texts() -> None:
    """With a beam as wide as there are texts it finds the best of all, by the penalised score; a batch does not mix."""
    network = Table(8, longest=3)
    source = torch.tensor([[5, 3, 0, 0], [6, 3, 0, 0], [1, 3, 0, 0]])
    symbols, score = beam_search(network, source, beams=64)
    for row, first in enumerate(source[:, 0].tolist()):
        texts = [(*t, END) for n in range(3) for t in itertools.product([s for s in range(8) if s != END], repeat=n)]
        best = max(texts, key=lambda t: likelihood(network, first, t) / ((5 + len(t)) / 6) ** 0.6)
        assert symbols[row].tolist() == [*best, *[PAD] * (3 - len(best))]
        assert float(score[row]) == pytest.approx(likelihood(network, first, best) / ((5 + len(best)) / 6) ** 0.6, abs=1e-5)


def test_greedy_is_a_beam_of_one_hypothesis_without_penalty() -> None:
    network = Table(8, longest=6)
    source = torch.tensor([[i, 3, 0, 0] for i in range(8)])
    found = greedy(network, source)
    assert (found[:, 0] == BEGIN).all()
    for row, symbols in enumerate(beam_search(network, source, beams=1, alpha=0.0)[0].tolist()):
        length = symbols.index(END) if END in symbols else 5
        assert found[row, 1 : 1 + length].tolist() == symbols[:length]


def test_a_text_that_never_ends_is_given_as_it_is() -> None:
    network = Table(8, longest=4)
    network.table[..., END] = -torch.inf
    symbols, score = beam_search(network, torch.tensor([[5, 3, 0, 0]]))
    assert END not in symbols and math.isfinite(float(score))


# Scores, baselines, pictures


def judged(truth: list[str], found: list[str], by_letters: bool) -> tuple[dict[str, float], list[dict[str, float]]]:
    from paperworks.tasks.translation import TranslationScores

    scores = TranslationScores(by_letters)
    for i, (t, f) in enumerate(zip(truth, found)):
        scores.update(Translated(f), {"truth": t, "name": str(i)})
    return scores.compute(), scores.per_item()


def test_scores_by_hand() -> None:
    found, each = judged(["一二三四五六", "七"], ["一二三四六", "七"], by_letters=True)
    assert found["exact"] == 0.5 and each[0]["exact"] == 0 and each[1]["exact"] == 1
    assert found["cer"] == pytest.approx(1 / 7)
    # 6 of 6 letters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; 6 letters where 7 were wanted
    expected = 100 * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 7 / 6)
    assert found["bleu"] == pytest.approx(expected, rel=1e-5)
    assert each[1]["bleu"] == pytest.approx(100) and each[0]["cer"] == pytest.approx(1 / 6)
    words, _ = judged(["the cat sat on the mat ."], ["the cat sat on the mat."], by_letters=False)
    assert words["bleu"] == pytest.approx(100) and words["exact"] == 0
    assert judged(["五", "六百"], ["五", "六百"], by_letters=True)[0]["bleu"] == pytest.approx(100)  # no four letters in a row anywhere
    empty, _ = judged(["a b c d"], [""], by_letters=False)
    assert empty["bleu"] == 0 and empty["cer"] == 1


def test_nearest() -> None:
    nearest = Nearest([[5, 6, 7, 8], [8, 7, 6, 5], [5, 5, 5], [9]])
    assert [nearest(s) for s in ([5, 6, 7], [7, 6, 5], [5, 5], [9, 9], [6, 7, 8, 9])] == [0, 1, 2, 3, 0]
    assert nearest([99]) == 0


def test_baselines_of_the_pack() -> None:
    data = Translation("pack:numbers_en_zh")
    assert len(data.subwords.tokens) == 130 and data.spec.size == (18, 16)
    values = {name: data.evaluate(predict, data.val[:60])[0] for name, predict in data.baselines().items()}
    assert values["nearest"]["bleu"] > 3 * values["common"]["bleu"] and values["nearest"]["exact"] < 0.05


def test_pictures() -> None:
    plain, marked = written("ab cd"), written("ab cd", "ab xcd")
    assert plain.shape[1] == marked.shape[1] == 240 and not (plain == (213, 94, 0)).all(2).any() and (marked == (213, 94, 0)).all(2).any()
    assert written("word " * 40).shape[0] > 5 * written("word").shape[0] > 0
    assert written("x" * 200).shape[0] > 100
    looked = attention_map(Translated("二", -0.1, ("二", "</s>"), torch.eye(2)), ["▁two", "</s>"])
    assert looked.shape[2] == 3 and (looked < 100).any()


# Files


class Copier(nn.Module):
    """Writes what it reads, without doubt."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.symbols, (length, self.longest) = len(spec.more["tokens"]), spec.size
        self.grid = Grid(fixed=length)

    def begin(self, source: Tensor) -> list[Tensor]:
        return [source, torch.zeros_like(source[:, 0])]

    def step(self, symbol: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        follow = state[0].gather(1, state[1][:, None].clamp(max=state[0].shape[1] - 1))[:, 0]
        return 20.0 * nn.functional.one_hot(follow, self.symbols), [state[0], state[1] + 1]

    def forward(self, source: Tensor, target_in: Tensor) -> dict[str, Tensor]:
        return {"attention": torch.eye(target_in.shape[1], source.shape[1]).expand(len(source), -1, -1)}


def copier() -> Model:
    subwords = learn(["one two three four five six seven eight nine ten"] * 9, most=60)
    spec = Translation._spec(subwords, (16, 16))
    deployed = Translation.deploy(Copier(spec), spec).eval()
    return Model(Path("copier"), spec, deployed.grid, deployed)


def test_files(tmp_path: Path) -> None:
    model = copier()
    lines = [f"one {'two ' * (i % 3)}ten" for i in range(40)]
    source = write(tmp_path / "in" / "lines.txt", "\n".join([*lines[:3], "", *lines[3:]]))
    write(tmp_path / "in" / "notes.md", "no")
    found = Translation.predict_files(model, [tmp_path / "in"], tmp_path / "out", Options(overlays=True))
    assert found == [tmp_path / "out" / "lines.txt"]
    assert found[0].read_text(encoding="utf-8") == source.read_text(encoding="utf-8") + "\n"
    with (tmp_path / "out" / "lines.tsv").open(encoding="utf-8", newline="") as f:
        table = list(csv.DictReader(f, delimiter="\t"))
    assert len(table) == 40 and table[3]["line"] == "5" and table[3]["translation"] == lines[3]
    assert (tmp_path / "out" / "lines.overlay.png").stat().st_size > 1000
    predict = Translation.predictor(model.forward, model.spec, model.grid)
    given = torch.tensor([*Subwords.read(model.spec.more).encode("six ten"), END])
    prediction = predict(given)
    assert prediction.text == "six ten" and prediction.symbols[-1] == "</s>"
    assert prediction.attention is not None and prediction.attention.shape == (len(given), len(given))


def test_files_that_cannot_be_translated(tmp_path: Path) -> None:
    model = copier()
    for text, message in (("\n \n", "holds no text"), ("one\n" + "x " * 30, "line 2: a text of")):
        with pytest.raises(InputError, match=message):
            Translation.predict_files(model, [write(tmp_path / "lines.txt", text)], tmp_path / "out", Options())
    with pytest.raises(InputError, match="no meaning for translation"):
        Translation.predict_files(model, [write(tmp_path / "lines.txt", "one")], tmp_path / "out", Options(probabilities=True))


def test_other_pairs_are_spelt_as_the_model_spells(tmp_path: Path) -> None:
    other = Translation(write(tmp_path / "pairs.tsv", "source\ttarget\tsplit\n" + rows(20, split=True)))
    model = copier()
    other.check(model.spec)
    source = other.sample(other.val[0])["source"]
    assert source.tolist() == [*Subwords.read(model.spec.more).encode(other.val[0].source), END]
