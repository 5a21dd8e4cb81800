"""``compare --halving`` against training every paper on the whole budget: the same winner, in how much of the time?

    python benchmarks/halving.py [--only PACK,...] [--steps 90] [--out DIR]

The budget is in steps, so that the outcome does not hang on what else the machine does; ``time`` is the share of the steps' seconds that halving took, from the training times
that the runs themselves recorded, and ``share`` that of the steps, which no other load can change. ``missed`` says by how much halving's winner, trained on the whole
budget, is worse than the best of all papers trained on it. ``--only`` measures these packs again and keeps what is recorded of the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, record, table
from paperworks.study.compare import compare
from paperworks.train.run import Run

PACKS = {
    "cifar10_subset": ("convnext", "vit", "efficientnet", "metaformer", "mobileformer", "mpvit", "dla", "inception_v4", "replknet"),
    "mnist_subset": ("convnext", "efficientnet", "metaformer", "dla", "inception_v4", "spiking"),
    "cardiac_mr": ("unet", "unetpp", "attention_unet", "deeplab_crf"),
}


def taken(folder: Path) -> tuple[float, int]:
    """Seconds and steps of all trainings of a comparison."""
    records = [Run.load(path.parent).record for path in folder.glob("runs/**/run.json")]
    return sum(r["seconds"] for r in records), sum(r["steps"] for r in records)


def compared(pack: str, papers: Sequence[str], steps: int) -> dict[str, Any]:
    """One row: what is found with and without halving."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            halving: compare(f"pack:{pack}", papers, Path(folder) / str(halving), steps=steps, halving=halving) for halving in (False, True)
        }
        (whole_seconds, whole_steps), (seconds, part) = (taken(Path(folder) / str(halving)) for halving in found)
    metric, sign = found[True]["metric"], 1 if found[True]["higher_is_better"] else -1
    whole = [{r["id"]: r["metrics"][metric] for r in found[h]["rows"] if r["kind"] == "paper" and r["status"] == "ok"} for h in found]
    best, (chosen, value) = max(whole[0], key=lambda name: sign * whole[0][name]), next(iter(whole[1].items()))
    return {
        "pack": pack,
        "papers": len(papers),
        "steps": steps,
        "metric": metric,
        "best": best,
        "recommended": (found[False]["recommended"] or {}).get("id", ""),
        "halving": chosen,
        "value_of_best": whole[0][best],
        "value_of_halving": value,
        "missed": sign * (whole[0][best] - value),
        "whole_seconds": whole_seconds,
        "halving_seconds": seconds,
        "share": part / whole_steps,
        "time": seconds / whole_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="packs, separated by commas")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    path = (options.out or RESULTS) / "halving.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if options.only and path.exists() else []
    found = {row["pack"]: row for row in earlier}
    for pack in options.only.split(",") if options.only else PACKS:
        found[pack] = compared(pack, PACKS[pack], options.steps)
        print(table([found[pack]]), flush=True)
    rows = [found[pack] for pack in PACKS if pack in found]
    print(table(rows))
    print(record("halving", rows, options.out, ()))


if __name__ == "__main__":
    main()
