"""Write what follows from recorded results: the table of papers in README.md and README.zh.md, between the markers, and the pages of ``speed.py``.

``--check`` only looks whether the texts are up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import speed

from paperworks import evidence, papers
from paperworks.gallery.site import TASKS, VERDICTS
from paperworks.study.audit import audit

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- papers: written by `make docs` -->", "<!-- end of papers -->"
FILES = {"README.md": 0, "README.zh.md": 1}
"""Each with the place of its language in a pair of words."""
HEAD = (
    ("paper", "year", "task", "level", "claim", "fidelity", "on its pack", "verdict"),
    ("论文", "年份", "任务", "证据等级", "主张", "保真度", "在其数据包上", "结论"),
)
OUTCOMES = {"held": ("held", "成立"), "not held": ("did not hold", "未成立"), None: ("not run", "未运行")}


def table(language: int) -> str:
    """The Markdown table of all papers."""
    note = ("note.md", "note.zh.md")[language]
    rows = [HEAD[language], ("---",) * len(HEAD[language])]
    for card in papers.cards().values():
        found, usable = audit(card.id, stale=False), evidence.read(card.id, "usable")
        fidelity = (
            f"{found['fidelity']:.0e} ({found['against'].split(',')[0]})".replace("0e+00", "0") if found["fidelity"] is not None else "-"
        )
        pack = (
            f"{usable['metric']} {usable['value']:.3f} ({usable['baseline']:.3f}), {usable['budget_seconds']:g} s"
            if usable and "value" in usable
            else "-"
        )
        rows.append(
            (
                f"`{card.id}` [{card.name}](src/paperworks/papers/{card.section}/{card.id}/{note})",
                str(card.year),
                TASKS[card.task][language].lower(),
                str(found["level"]),
                OUTCOMES[found["claim"]][language],
                fidelity,
                pack,
                VERDICTS[found["verdict"]][language],
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Rewrite all files, or with --check say which is out of date."""
    texts = dict(speed.pages())
    for name, language in FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        texts[name] = f"{before}{BEGIN}\n{table(language)}\n{END}{rest.split(END)[1]}"
    outdated = [n for n, new in texts.items() if not (ROOT / n).exists() or (ROOT / n).read_text(encoding="utf-8") != new]
    if "--check" in sys.argv:
        if outdated:
            print(f"out of date: {', '.join(outdated)}; run `make docs`", file=sys.stderr)
        return bool(outdated)
    for name in outdated:
        (ROOT / name).write_text(texts[name], encoding="utf-8")
    speed.draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
