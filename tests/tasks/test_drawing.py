"""Pictures: sizes and types, and that what they are to show is there to be seen."""

import numpy as np
import pytest
import torch

from paperworks.tasks.drawing import (
    CONFUSED,
    ERRORS,
    FALSE,
    MISSED,
    PALETTE,
    colour,
    display,
    error_map,
    legend,
    montage,
    overlay,
    panel,
    places,
)


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(40, 60, dtype=torch.long)
    mask[5:20, 5:25], mask[22:38, 30:55] = 1, 2
    return image, mask


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_any_number_of_channels(channels):
    picture = display(torch.rand(channels, 20, 30))
    assert picture.shape == (20, 30, 3) and picture.dtype == np.uint8


def test_channels_become_colours():
    planes = torch.zeros(3, 10, 10)
    planes[0, :5], planes[1, 5:], planes[2, :, :5] = 1, 1, 1
    assert np.array_equal(display(planes), (planes * 255).permute(1, 2, 0).byte().numpy())
    grey = display(planes[:1])
    assert (grey[:5] == 255).all() and (grey[5:] == 0).all()
    two = display(planes[:2])
    assert tuple(two[0, 0]) == (255, 0, 255) and tuple(two[9, 9]) == (0, 255, 0)


def test_dark_images_are_stretched_and_ordinary_ones_left_alone():
    ordinary = torch.linspace(0, 1, 400).reshape(1, 20, 20)
    assert abs(display(ordinary)[..., 0].astype(float) - ordinary[0].numpy() * 255).max() <= 0.51
    dark = display(ordinary * 0.01)  # a 16-bit image of a dim sample
    assert dark.min() == 0 and dark.max() == 255
    assert (display(torch.full((1, 5, 5), 0.25)) == 64).all()


def test_colours_are_distinct_and_go_on():
    assert colour(0) == (0, 0, 0) and colour(1) == PALETTE[0]
    assert len({colour(i) for i in range(15)}) == 15


def test_overlay_tints_and_outlines():
    image, mask = scene()
    picture, bare = overlay(image, mask, 3), display(image)
    assert np.array_equal(picture[mask.numpy() == 0], bare[mask.numpy() == 0])
    assert tuple(picture[5, 10]) == colour(1) and tuple(picture[30, 30]) == colour(2)  # outlines
    inside = picture[10, 10].astype(float)
    expected = 0.65 * bare[10, 10] + 0.35 * np.array(colour(1))
    assert abs(inside - expected).max() <= 1
    mask[:4] = 255
    assert (overlay(image, mask, 3)[:4] == 128).all(-1).mean() > 0.2


def test_errors_are_visible():
    image, mask = scene()
    predicted = mask.clone()
    predicted[5:20, 5:15] = 0
    predicted[0:4, 50:58] = 1
    predicted[30:38, 30:40] = 1
    mask[39] = 255
    predicted[39] = 2
    picture = error_map(image, mask, predicted)
    assert (picture[0:4, 50:58] == FALSE).all()
    assert (picture[31:37, 31:39] == CONFUSED).all()
    hatched = (picture[6:19, 6:15] == MISSED).all(-1)
    assert 0.2 < hatched.mean() < 0.6
    right = picture[10, 20].astype(int)
    assert abs(right - 0.6 * display(image)[10, 20]).max() <= 1
    assert not any((picture[39] == c).all(-1).any() for c in (FALSE, MISSED, CONFUSED))  # ignored is never wrong


def test_panel_holds_every_picture_under_its_title():
    a, b = np.full((30, 40, 3), 10, np.uint8), np.full((20, 50, 3), 200, np.uint8)
    sheet = panel([a, b], ["first", "a title that is much longer than its picture"])
    assert sheet.shape == (20 + 12 + 30, 6 + 40 + 6 + 50 + 6, 3)
    assert np.array_equal(sheet[26:56, 6:46], a) and np.array_equal(sheet[26:46, 52:102], b)
    for left, width in ((6, 40), (52, 50)):
        head = sheet[6:26, left : left + width]
        assert (head < 128).any()
    assert (sheet[:, 102:] == 255).all()  # the long title does not run over
    assert panel([a, b], ["", ""], side=80).shape[1] == 6 + 80 + 6 + 80 + 6


def test_legend_names_the_colours():
    picture = legend(ERRORS)
    for _, rgb in ERRORS:
        assert (picture == rgb).all(-1).any()


def test_slices_that_hold_something_are_shown():
    labels = torch.zeros(30, 6, 7, dtype=torch.long)
    labels[10:21, 2, 2] = 1
    assert places(labels) == [10, 11, 12, 14, 15, 16, 18, 19, 20]
    assert places(labels, 2) == [10, 20] and places(labels[:12]) == [10, 11]
    labels[:5] = 255  # nothing is known there, which is nothing to show
    assert places(labels, 2) == [10, 20]
    assert places(torch.zeros(4, 6, 7, dtype=torch.long)) == [0, 1, 2, 3]


def test_montage_lays_slices_out_in_rows():
    volume = torch.arange(1, 6).float().view(1, 5, 1, 1).expand(2, 5, 3, 4)
    sheet = montage(volume, [0, 1, 2, 3, 4])
    assert sheet.shape == (2, 7, 14)
    assert sheet[0, 0].tolist() == [1] * 4 + [0] + [2] * 4 + [0] + [3] * 4 and sheet[0, 4].tolist() == [4] * 4 + [0] + [5] * 4 + [0] * 5
    assert (sheet[0, 3] == 0).all() and torch.equal(sheet[0], sheet[1])
    assert montage(volume[0].long(), [2]).tolist() == [[3] * 4] * 3
