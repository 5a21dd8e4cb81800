"""The Python face: every name leads somewhere."""

from __future__ import annotations

import inspect

import pytest

import paperworks


@pytest.mark.parametrize("name", sorted(paperworks._API))
def test_every_name_is_a_documented_function(name: str) -> None:
    found = getattr(paperworks, name)
    assert callable(found) and inspect.getdoc(found) and name in dir(paperworks)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        paperworks.no_such_name  # noqa: B018
