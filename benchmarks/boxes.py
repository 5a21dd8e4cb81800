"""Assigning true boxes to anchors, and non-maximum suppression by class: ours against torchvision's, in turns in one process, after a check that both say the same.

``ratio`` is ours / theirs: below 1, ours is faster.

    python benchmarks/boxes.py [--seconds 2] [--out DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.ops import batched_nms, box_iou

from harness import record, summary, table
from paperworks.nn.boxes import match, suppress
from paperworks.papers.detection.ssd.ssd import assign
from paperworks.tasks.environment import interleaved

SIDE = 300.0


def boxes(count: int, seed: int) -> Tensor:
    """Boxes of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    centre = SIDE * torch.rand(count, 2, generator=generator)
    half = (8 + 60 * torch.rand(count, 2, generator=generator)) / 2
    return torch.cat([centre - half, centre + half], 1)


def works() -> dict[tuple[str, str], tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """What is timed, in English and Chinese: ours and theirs, with the same outcome."""
    anchors, few = boxes(8732, 0), boxes(20, 1)
    labels = torch.arange(20) % 5
    iou = box_iou(few, anchors)
    rpn, ssd = Matcher(0.7, 0.3), SSDMatcher(0.5)
    found = {}
    found["assignment, 20 objects to 8732 anchors", "匹配，20 个目标与 8732 个锚框"] = (lambda: match(iou, 0.7, 0.3), lambda: rpn(iou))
    # torchvision's matcher is given the overlaps and leaves classes and coding to its caller; ours is timed with both.
    found["SSD's assignment, 20 objects to 8732 default boxes", "SSD 的匹配，20 个目标与 8732 个默认框"] = (
        lambda: assign(anchors, few, labels)[0],
        lambda: (1 + labels[m := ssd(box_iou(few, anchors))]).where(m >= 0, 0),
    )
    for count in (400, 4000):
        many, scores, groups = boxes(count, 2), torch.rand(count, generator=torch.Generator().manual_seed(3)), torch.arange(count) % 5
        found[f"suppression, {count} boxes in 5 classes", f"非极大值抑制，{count} 个框，5 类"] = (
            lambda many=many, scores=scores, groups=groups: suppress(many, scores, groups, 0.5).nonzero().squeeze(1),
            lambda many=many, scores=scores, groups=groups: batched_nms(many, scores, groups, 0.5).sort().values,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for (what, zh), (ours, theirs) in works().items():
        assert torch.equal(ours(), theirs()), f"{what}: torchvision says something else"
        timed = summary(interleaved({"paperworks": ours, "torchvision": theirs}, seconds=options.seconds), "paperworks")
        times = {name: 1e3 * timed[arm]["seconds"] for name, arm in (("ours_ms", "paperworks"), ("theirs_ms", "torchvision"))}
        rows.append({"what": what, "zh": zh, **times, "ratio": 1 / timed["torchvision"]["times_ours"]})
    print(table(rows))
    print(record("boxes", rows, options.out, ("torchvision",), threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
