"""What the benchmarks share: arms that take turns, a table, a record of the numbers and of what they depend on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paperworks.files import write_json
from paperworks.tasks.environment import hardware, versions

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


def summary(seconds: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, float]]:
    """Median and quartiles of each arm, and how many times as long as ours it takes: the median of the ratios round by round."""
    out = {}
    for name, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(theirs / mine for theirs, mine in zip(values, seconds[ours]))
        out[name] = {"seconds": statistics.median(values), "q1": low, "q3": high, "times_ours": ratio, "n": len(values)}
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text, floats to four digits."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [head] + [[f"{row[k]:.4g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in head] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in cells)


def record(name: str, rows: Sequence[Mapping[str, Any]], out: Path | None, peers: Sequence[str], **facts: Any) -> Path:
    """Write ``results/benchmarks/<name>.json`` (or into ``out``): rows, facts, machine, versions of ours and of the peers."""
    path = (out or RESULTS) / f"{name}.json"
    found = versions() | {peer: version(peer) for peer in peers}
    write_json(path, {"rows": rows, **facts, "hardware": hardware(), "versions": found, "date": time.strftime("%Y-%m-%d")})
    return path
