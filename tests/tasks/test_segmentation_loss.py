"""The soft Dice that the default loss of segmentation uses."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from paperworks.tasks.segmentation import soft_dice


def guess(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(labels, classes).movedim(-1, 1).float()


def test_the_class_that_fills_most_is_left_out_whatever_its_number() -> None:
    thin = torch.zeros(1, 8, 8, dtype=torch.long)
    thin[:, 3] = 1
    for target in (thin, 1 - thin):
        empty = torch.full_like(target, int(target.mode().values.mode().values))
        assert float(soft_dice(guess(target, 2), target)) == 1
        assert float(soft_dice(guess(empty, 2), target, smooth=0.0)) == 0, "nothing of the thin class was found"


def test_mean_over_the_other_classes_by_hand() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[0, 0, :2], target[0, 1, :2] = 1, 2
    found = target.clone()
    found[0, 0, 1] = 0  # half of class 1 is missed: Dice 2*1/(1+2)
    torch.testing.assert_close(soft_dice(guess(found, 3), target, smooth=0.0), torch.tensor((2 / 3 + 1) / 2))


def test_ignored_pixels_do_not_count() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[0, 0], target[0, 3] = 1, 255
    wrong = guess(torch.where(target == 255, 1, target), 2)
    assert float(soft_dice(wrong, target)) == 1
