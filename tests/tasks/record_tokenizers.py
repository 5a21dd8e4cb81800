"""Records tokenizers_numbers.json with the package tokenizers (0.23.3), which is no dependency: run by hand after a change of the pack.

The library gets the pieces that merging must not cross, already cut and marked, one to a line.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from paperworks.data.bpe import SPECIALS, learn, pieces
from paperworks.data.pairs import open_pairs

MOST = 130

data = open_pairs("pack:numbers_en_zh")
texts = [text for pair in data.split("train") for text in (pair.source, pair.target)]
tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
trainer = trainers.BpeTrainer(vocab_size=MOST, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False)
tokenizer.train_from_iterator([" ".join(pieces(text)) for text in texts], trainer)
content = json.loads(tokenizer.to_str())
some = [pair.source for pair in data.split("val")[:20]]
fixture = {
    "most": MOST,
    "tokens": sorted(set(content["model"]["vocab"]) - set(SPECIALS)),
    "merges": content["model"]["merges"],
    "spelt": {text: tokenizer.encode(" ".join(pieces(text))).tokens for text in some},
}
ours = learn(texts, MOST)
differ = [(a, tuple(b)) for a, b in zip(ours.merges, fixture["merges"]) if a != tuple(b)]
print(len(fixture["merges"]), "merges;", len(differ), "differ", differ[:3], Counter(len(m) for m in fixture["merges"]))
Path(__file__).with_name("tokenizers_numbers.json").write_text(json.dumps(fixture, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
