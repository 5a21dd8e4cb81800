"""CSV files as people save them."""

from pathlib import Path

import pytest

from paperworks.data.sheets import cells, columns, records
from paperworks.errors import InputError


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "sheet.csv"
    path.write_bytes('\ufeffFile , Label,Note\n a.png,cat\n\n"b, c.png", dog ,x,more\n'.encode())
    return path


def test_names_in_any_case_blanks_and_a_mark(sheet):
    assert columns(sheet, {"image", "file"}, {"label"}) == ("file", "label")
    assert columns(sheet, {"file"}, {"text"}) is None
    assert records(sheet) == [{"file": "a.png", "label": "cat", "note": ""}, {"file": "b, c.png", "label": "dog", "note": "x"}]
    assert list(records(sheet, lower=False)[0]) == ["File", "Label", "Note"]


def test_lines_keep_their_numbers(sheet):
    assert cells(sheet)[2] == [] and cells(sheet)[3][0] == "b, c.png"


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    assert records(tmp_path / "empty.csv") == [] and columns(tmp_path / "empty.csv", {"file"}) is None


def test_what_is_no_csv(tmp_path):
    (tmp_path / "broken.csv").write_bytes(b"\xff\xfe\x00file")
    with pytest.raises(InputError, match=r"broken\.csv cannot be read as CSV .*; save it as UTF-8"):
        records(tmp_path / "broken.csv")
    assert columns(tmp_path / "broken.csv", {"file"}) is None
