"""Writes ``pairs.tsv`` beside this file: numbers from 0 to 99,999,999 in English words and in Chinese numerals.

python packs/numbers_en_zh/make.py

English as the British write it (a hyphen in 21 ... 99, "and" before tens and units). Chinese with the everyday numerals 零一二三四五六七八九十百千万:

- Four digits make a section (千 百 十 and units); the upper section is followed by 万.
- A run of zeros inside a number is read as one 零, zeros at the end are not read; this holds across the border of the sections too: 10,500 is
  一万零五百, while 105,000 is 十万五千, as no thousands are missing there.
- Ten to nineteen begin with 十 where they begin the number (十五, 十二万) and with 一十 elsewhere (一百一十五, 一万零一十).
- Two is 二 everywhere; the 两 of speech is not used.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
    twenty thirty forty fifty sixty seventy eighty ninety"""
ONES, TENS = WORDS.split()[:20], ["", "", *WORDS.split()[20:]]
DIGITS = "零一二三四五六七八九"
SEED, TRAIN, VAL = 20260101, 3000, 300


def english(n: int) -> str:
    """0 ... 999,999,999."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    for unit, name in ((1_000_000, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= unit:
            rest = n % unit
            joint = " and " if rest < 100 else " "
            return f"{english(n // unit)} {name}" + (joint + english(rest) if rest else "")
    raise AssertionError


def section(n: int) -> str:
    """1 ... 9,999; a leading zero is read when it stands for missing thousands, so the caller strips it at the beginning of a number."""
    text = "".join(DIGITS[int(d)] + unit if d != "0" else "零" for d, unit in zip(f"{n:04d}", ("千", "百", "十", "")))
    return re.sub("零+", "零", text).rstrip("零")


def chinese(n: int) -> str:
    """0 ... 99,999,999."""
    if n == 0:
        return "零"
    high, low = divmod(n, 10_000)
    text = (section(high) + "万" if high else "") + (section(low) if low else "")
    return re.sub("^零?一十", "十", text).lstrip("零")


def numbers() -> tuple[list[int], list[int]]:
    """Training and validation numbers, all different. Below 100 all are for training; of the others each length is as frequent, and a digit
    is zero in three cases of ten, so that 零 is met in all its places.
    """
    chance = random.Random(SEED)
    drawn: set[int] = set()
    while len(drawn) < TRAIN + VAL - 100:
        digits = [chance.randint(1, 9), *(0 if chance.random() < 0.3 else chance.randint(1, 9) for _ in range(chance.randint(2, 7)))]
        drawn.add(int("".join(map(str, digits))))
    rest = sorted(drawn)
    chance.shuffle(rest)
    return [*range(100), *rest[VAL:]], rest[:VAL]


if __name__ == "__main__":
    train, val = numbers()
    rows = [f"{english(n)}\t{chinese(n)}\t{split}" for split, some in (("train", train), ("val", val)) for n in some]
    Path(__file__).with_name("pairs.tsv").write_text("\n".join(["source\ttarget\tsplit", *rows]) + "\n", encoding="utf-8")
