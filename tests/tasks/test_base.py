"""``--set``: texts become values of the right type, or a line says why not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from paperworks.tasks.base import Grid, Recipe, override


@dataclass(frozen=True)
class Config:
    side: int | None = None
    weight: float | None = None
    widths: tuple[int, ...] = (1, 2)
    norm: bool = False
    name: str = ""


def test_texts_are_read_as_the_field_says() -> None:
    given = {"side": "64", "weight": "2", "widths": "4,8", "norm": "true", "name": "7"}
    (config,) = override(given, Config())
    assert config == Config(side=64, weight=2.0, widths=(4, 8), norm=True, name="7")
    assert isinstance(config.side, int) and isinstance(config.weight, float)
    assert override({"side": "none"}, Config(side=3))[0].side is None


def test_the_first_that_has_the_field_takes_it() -> None:
    config, recipe = override({"norm": "yes", "lr": "0.5", "augment.flip": "no"}, Config(), Recipe())
    assert config.norm and recipe.lr == 0.5 and recipe.augment.flip is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": "3"}, "no setting is called 'depth'"),
        ({"side": "wide"}, "does not read"),
        ({"schedule": "zigzag"}, "is not one of cosine"),
    ],
)
def test_what_does_not_fit_is_said(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(given, Config(), Recipe())


def test_a_fixed_side_is_the_only_one() -> None:
    assert [Grid(fixed=96).fit(n) for n in (1, 96, 500)] == [96, 96, 96]
    assert [Grid(16, offset=12, margin=92).fit(n) for n in (388, 389)] == [572, 588]
