"""Which items train and which validate: what files say, what folders say, and the hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paperworks.data import Item
from paperworks.data.splits import assign
from paperworks.errors import InputError


def items(*names, **split):
    return [Item(name=n, images=(Path(f"{n}.png"),), split=split.get(n)) for n in names]


def sides(found):
    return {s: [i.name for i in found if i.split == s] for s in ("train", "val", "test")}


def test_json(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a.png", "sub/b"], "val": ["c"], "test": ["images/d.jpg"]}))
    found, problems = assign(items("a", "sub/b", "c", "sub/d"), tmp_path)
    assert sides(found) == {"train": ["a", "sub/b"], "val": ["c"], "test": ["sub/d"]} and not problems


@pytest.mark.parametrize(("said", "other"), [("val", "train"), ("train", "val")])
def test_with_one_side_named_the_rest_is_the_other(tmp_path, said, other):
    (tmp_path / "splits.json").write_text(json.dumps({said: ["b"]}))
    found, problems = assign(items("a", "b", "c"), tmp_path)
    assert sides(found)[said] == ["b"] and sides(found)[other] == ["a", "c"] and not problems


def test_what_no_split_names_is_a_problem_and_left_out(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a"], "val": ["b"]}))
    found, problems = assign(items("a", "b", "c"), tmp_path)
    assert [i.name for i in found] == ["a", "b"]
    assert [str(p.path) for p in problems] == ["c.png"] and "no split" in problems[0].what


def test_unknown_names_are_problems_but_known_broken_ones_are_not(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a", "ghost", "broken"], "val": ["b"]}))
    found, problems = assign(items("a", "b"), tmp_path, excluded=["broken"])
    assert len(found) == 2
    assert ["'ghost'" in p.what for p in problems] == [True]


def test_a_name_on_both_sides_is_held_out(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a", "b"], "val": ["b"]}))
    found, problems = assign(items("a", "b"), tmp_path)
    assert sides(found) == {"train": ["a"], "val": ["b"], "test": []} and "in train and in val" in problems[0].what


@pytest.mark.parametrize(
    "text",
    ["name,split,group\na,train,p1\nb,validation,p2\n", "group,file,split\np1,a.png,training\np2,b.png,val\n", "a,train,p1\nb,val,p2\n"],
)
@pytest.mark.parametrize("file", ["split.csv", "splits.csv"])
def test_csv(tmp_path, file, text):
    (tmp_path / file).write_text(text, encoding="utf-8-sig")
    found, problems = assign(items("a", "b"), tmp_path)
    assert [(i.split, i.group) for i in found] == [("train", "p1"), ("val", "p2")] and not problems


@pytest.mark.parametrize("groups", [{"a": "p", "b": "p", "c": "q"}, {"p": ["a", "b"], "q": ["c"]}])
def test_a_straddling_group_is_a_problem_and_its_training_items_are_left_out(tmp_path, groups):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a", "c"], "val": ["b"], "groups": groups}))
    found, problems = assign(items("a", "b", "c"), tmp_path)
    assert sides(found) == {"train": ["c"], "val": ["b"], "test": []}
    assert len(problems) == 1 and "'p' on both sides" in problems[0].what and problems[0].path == tmp_path / "splits.json"


def test_folds_of_nnunet(tmp_path):
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]))
    assert sides(assign(items("a", "b"), tmp_path)[0]) == {"train": ["a"], "val": ["b"], "test": []}


def test_folders_say_it_where_no_file_does(tmp_path):
    found, _ = assign(items("a", "b", "c", a="train", b="val", c="test"), tmp_path)
    assert sides(found) == {"train": ["a"], "val": ["b"], "test": ["c"]}
    found, _ = assign(items("a", "b", "c", "d", a="train", b="train", c="train", d="test"), tmp_path)
    assert sides(found)["test"] == ["d"] and len(sides(found)["val"]) == 1, "train without val is divided"
    found, _ = assign(items("a", "b", b="val"), tmp_path)
    assert sides(found)["train"] == ["a"], "beside val, the rest trains"


def test_hash(tmp_path):
    names = [f"image_{i}" for i in range(1000)]
    found, problems = assign(items(*names), tmp_path)
    val = set(sides(found)["val"])
    assert 160 < len(val) < 240 and not problems
    again = set(sides(assign(items(*reversed(names), "one_more"), tmp_path)[0])["val"])
    assert val - {"one_more"} == again - {"one_more"}, "more images leave the rest where they are"


@pytest.mark.parametrize("count", range(2, 8))
def test_hash_gives_each_side_something(tmp_path, count):
    for start in range(20):
        found = sides(assign(items(*(f"{start}_{i}" for i in range(count))), tmp_path)[0])
        assert found["train"] and found["val"]


def test_hash_keeps_groups_together(tmp_path):
    names = [f"p{i // 10}_{i}" for i in range(300)]
    (tmp_path / "splits.json").write_text(json.dumps({"groups": {n: n.partition("_")[0] for n in names}}))
    found, problems = assign(items(*names), tmp_path)
    of_group = {i.group: {j.split for j in found if j.group == i.group} for i in found}
    assert len(found) == 300 and not problems
    assert all(len(s) == 1 for s in of_group.values()) and {"train"} in of_group.values() and {"val"} in of_group.values()


def test_one_item_cannot_be_divided(tmp_path):
    found, problems = assign(items("a"), tmp_path)
    assert sides(found)["train"] == ["a"] and "nothing left for validation" in problems[0].what


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("splits.json", "[]", "must be an object"),
        ("splits.json", '{"training_set": []}', "unknown key 'training_set'"),
        ("splits.json", '{"train": "a"}', "must be a list"),
        ("splits.json", '{"groups": ["a"]}', "'groups' must map"),
        ("splits.json", '{"train": ["a"', "not valid JSON .line 1"),
        ("split.csv", "name,split\na,left\n", "row 1: 'left' is no split"),
    ],
)
def test_split_files_that_cannot_be_understood(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        assign(items("a"), tmp_path)
    assert file in str(caught.value)
