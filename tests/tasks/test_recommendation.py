"""The task of recommending to those who have chosen nothing yet: tables, scores, baselines, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paperworks import tasks
from paperworks.data.interactions import words, years
from paperworks.errors import InputError
from paperworks.export.predict import load_model, predict_files
from paperworks.tasks.base import Grid
from paperworks.tasks.contract import Model, Options
from paperworks.tasks.recommendation import TOP, RankingScores, Recommendation, average_precision, diversified, nearest
from paperworks.train.api import fit

USERS, ITEMS = 40, 30


def write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Forty users of two kinds, whose kind decides which half of thirty products they buy; age is noise."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, USERS)
    root = tmp_path / "shop"
    root.mkdir()
    write(
        root / "users.csv",
        "userId,kind,age,member",
        *(f"u{i},{'tea|black' if kinds[i] else 'coffee'},{rng.integers(18, 80)},{i % 2}" for i in range(USERS)),
    )
    bought = [(i, j) for i in range(USERS) for j in range(ITEMS) if rng.random() < (0.6 if (j < ITEMS // 2) == bool(kinds[i]) else 0.05)]
    write(root / "ratings.csv", "user_id,productId,rating", *(f"u{i},p{j},{rng.integers(1, 6)}" for i, j in bought))
    write(root / "products.csv", "id,name,price", *(f"p{j},Product {j},{j}" for j in range(ITEMS)))
    return root


def edited(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))


def test_users_with_attributes_are_served(shop: Path) -> None:
    data = Recommendation(shop)
    assert data.tables.cold == "users" and data.spec.more["attributes"] == ["black", "coffee", "tea", "age", "member"]
    assert len(data.train) + len(data.val) == USERS and set(data.spec.classes) <= {f"p{j}" for j in range(ITEMS)}
    assert data.spec.more["titles"][0] == f"Product {data.spec.classes[0][1:]}"
    assert data.spec.std[0] == data.spec.std[4] == 1.0 < data.spec.std[3], "flags are not scaled, numbers are"
    sample = data.sample(data.train[0])
    assert sample["attributes"].shape == (5,) and sample["behaviour"].sum() == len(data.train[0].chosen)
    assert tasks.guess(shop) == "recommendation"


def test_roles_are_swapped_where_only_items_have_attributes(shop: Path) -> None:
    (shop / "users.csv").unlink()
    data = Recommendation(shop)
    assert data.tables.cold == "items" and data.spec.more["attributes"] == ["price"]
    assert all(name.startswith("u") for name in data.spec.classes)


def test_validation_entities_are_never_seen_in_training(shop: Path) -> None:
    data = Recommendation(shop)
    assert not {e.name for e in data.train} & {e.name for e in data.val}
    write(shop / "users.csv", "user,kind,split", *(f"u{i},{'ab'[i % 2]},{'val' if i < 8 else 'train'}" for i in range(USERS)))
    assert {e.name for e in Recommendation(shop).val} <= {f"u{i}" for i in range(8)}


def test_movielens() -> None:
    data = Recommendation("pack:movielens")
    described = data.describe()
    assert described["items"] == 3496 and described["choices"] <= 100_011 and "Film-Noir" in described["attributes"]
    toy_story = next(e for e in (*data.train, *data.val) if e.name == "1")
    known = {name for name, value in zip(data.spec.more["attributes"], toy_story.attributes) if value}
    assert known == {"1995-1999", "Adventure", "Animation", "Children", "Comedy", "Fantasy"}


def test_words_and_years() -> None:
    assert words("a| b c |(no genres listed)||") == {"a", "b c"}
    assert years("Toy Story (1995)") == {"1995-1999"} and years("M (1931) ") == {"1930-1934"} and years("1984") == set()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("ratings.csv", "rating", "rating,rating", "no header of two and more different names"),
        ("ratings.csv", "user_id", "who", "none of which begins with user or customer"),
        ("ratings.csv", "productId", "what", "none of which begins with item or movie"),
        ("ratings.csv", "u0,p", "u0,,p", "has 4 cells where the header has 3"),
        ("ratings.csv", "u0,p", ",p", "line 2: user_id is empty"),
        ("ratings.csv", "user_id,productId,rating\n", "user_id,productId,rating\nu0,p0,NaN\n", "rating is 'NaN' where a number must be"),
        ("users.csv", "u1,", "u0,", "userid is 'u0' for the second time"),
        ("users.csv", "kind,age,member", "kind,age,split", "the split of u0 is '0'"),
    ],
)
def test_broken_tables_end_in_one_line(shop: Path, file: str, old: str, new: str, message: str) -> None:
    edited(shop, file, old, new)
    with pytest.raises(InputError, match=message) as error:
        Recommendation(shop)
    assert file in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_said(shop: Path, tmp_path: Path) -> None:
    write(shop / "users.csv", "user,age", *(f"u{i},{'nan' if i == 3 else i}" for i in range(USERS)))
    with pytest.raises(InputError, match="age is 'nan' where a number must be"):
        Recommendation(shop)
    write(shop / "users.csv", "user,note", *(f"u{i},only {i}" for i in range(USERS)))
    with pytest.raises(InputError, match="no attributes that 5 training rows share"):
        Recommendation(shop)
    for name in ("users.csv", "products.csv"):
        (shop / name).unlink()
    with pytest.raises(InputError, match=r"no table of attributes; add users.csv"):
        Recommendation(shop)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no ratings.csv or interactions.csv"):
        Recommendation(tmp_path / "empty")
    write(shop / "users.csv", "user,kind", "u0,a", "u1,b")
    write(shop / "ratings.csv", "user,item", "u0,a")
    with pytest.raises(InputError, match="0 users have attributes and 5 choices"):
        Recommendation(shop)


def test_strangers_are_problems(shop: Path) -> None:
    with (shop / "ratings.csv").open("a") as f:
        f.write("nobody,p1,3\n")
    (problem,) = Recommendation(shop).describe()["problems"]
    assert "'nobody' first" in problem["what"]


def test_other_data_are_refused(shop: Path) -> None:
    data = Recommendation(shop)
    data.check(data.spec)
    text = (shop / "users.csv").read_text()
    edited(shop, "users.csv", "age", "years")
    with pytest.raises(InputError, match=r"differ in attributes \(age, years\)"):
        Recommendation(shop).check(data.spec)
    (shop / "users.csv").write_text(text)
    sold = (shop / "ratings.csv").read_text()
    (shop / "ratings.csv").write_text(sold.replace(",p3,", ",q3,"))
    with pytest.raises(InputError, match=r"differ in what is recommended \(p3, q3\)"):
        Recommendation(shop).check(data.spec)


# Scores


def test_scores_by_hand() -> None:
    """Hits at the places 1 and 3 of 4, and one that the list of all does not miss."""
    scores, chosen = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert average_precision(scores, chosen) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert average_precision(scores, chosen, top=1) == pytest.approx(1.0)
    assert average_precision(scores, torch.tensor([0.0, 0.0, 1.0, 1.0]), top=3) == pytest.approx((1 / 3) / 2), "of two that there are"
    table = RankingScores()
    table.update(scores, {"name": "a", "behaviour": chosen})
    found = table.compute()
    assert found["precision"] == pytest.approx(0.5) and found["hit"] == 1.0 and found["coverage"] == 1.0
    assert found["ndcg"] == pytest.approx((1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)))


def test_lists_are_cut_and_coverage_counts_who_is_in_any() -> None:
    others = 2 * TOP
    table = RankingScores()
    for name, sign in (("a", 1), ("b", 1)):
        table.update(sign * torch.arange(others).float(), {"name": name, "behaviour": torch.eye(others)[0]})
    assert table.compute()["map"] == table.compute()["hit"] == 0.0 and table.compute()["coverage"] == 0.5
    assert [row["name"] for row in table.per_item()] == ["a", "b"]


def test_nearest_neighbours_by_hand() -> None:
    predict = nearest(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), k=2)
    assert predict(torch.tensor([3.0, 0.0])).tolist() == [1.0, 0.5]


def test_baselines(shop: Path) -> None:
    data = Recommendation(shop)
    baselines = data.baselines()
    popular = torch.stack([data.sample(e)["behaviour"] for e in data.train]).mean(0)
    given = data.given(data.sample(data.val[0]))
    torch.testing.assert_close(baselines["popularity"](given), popular)
    value = {name: data.evaluate(predict)[0]["map"] for name, predict in baselines.items()}
    assert value["popularity"] < 1.0 and all(0 <= v <= 1 for v in value.values())


# Files


@pytest.fixture
def trained(shop: Path, tmp_path: Path):
    return fit("lowrank_cold_start", shop, tmp_path / "run", variant="small", steps=1)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def test_new_entities_get_lists(trained, shop: Path, tmp_path: Path) -> None:
    model = load_model(trained.folder)
    write(tmp_path / "new.csv", "id,KIND,age,member,diversity", "ann,tea|black,30,1,", "bob,coffee,60,0,0", "eve,cocoa,40,0,2.0")
    out = tmp_path / "out"
    written = predict_files(model, [tmp_path / "new.csv"], out, Options(overlays=True))
    table = rows(out / "recommendations.csv")
    assert [r["entity"] for r in table] == ["ann"] * TOP + ["bob"] * TOP + ["eve"] * TOP
    lists = {name: [r["item"] for r in table if r["entity"] == name] for name in ("ann", "bob", "eve")}
    assert all(len(set(items)) == TOP for items in lists.values())
    assert {int(item[1:]) < ITEMS // 2 for item in lists["ann"][:5]} == {True} and {
        int(item[1:]) < ITEMS // 2 for item in lists["bob"][:5]
    } == {False}
    assert table[0]["title"] == f"Product {table[0]['item'][1:]}" and [r["rank"] for r in table[:3]] == ["1", "2", "3"]
    scores = [float(r["score"]) for r in table[:TOP]]
    assert scores == sorted(scores, reverse=True)
    assert len(written) == 4
    with Image.open(written[1]) as picture:
        assert picture.size == (240, 240)
    data = Recommendation(shop)
    expected = data.predictor(model.forward, model.spec, model.grid)(torch.tensor([1.0, 0.0, 1.0, 30.0, 1.0]))
    assert expected.topk(TOP).values.tolist() == pytest.approx(scores, abs=1e-5)


def test_resumed_predictions_keep_their_rows(trained, tmp_path: Path) -> None:
    model = load_model(trained.folder)
    write(tmp_path / "new.csv", "id,kind,age,member", "ann,tea,30,1")
    predict_files(model, [tmp_path / "new.csv"], tmp_path / "out")
    write(tmp_path / "new.csv", "id,kind,age,member", "ann,coffee,30,1", "bob,coffee,30,1")
    before = rows(tmp_path / "out" / "recommendations.csv")
    predict_files(model, [tmp_path / "new.csv"], tmp_path / "out", Options(resume=True))
    after = rows(tmp_path / "out" / "recommendations.csv")
    assert after[:TOP] == before and len(after) == 2 * TOP


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("id,kind,age", "ann,tea,30"), "lacks the column 'member'"),
        (("id,kind,age,member", "ann,tea,old,1"), "age is 'old' where a number must be"),
        (("id,kind,age,member", ",tea,30,1"), "id is empty"),
        (("id,kind,age,member",), "has no rows"),
        (("id,kind,age,member,diversity", "ann,tea,30,1,much"), "diversity is 'much'"),
    ],
)
def test_bad_tables_of_new_entities(trained, tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    write(tmp_path / "new.csv", *lines)
    with pytest.raises(InputError, match=message):
        predict_files(load_model(trained.folder), [tmp_path / "new.csv"], tmp_path / "out")


def test_files_of_validation_entities_give_their_predictions(trained, shop: Path, tmp_path: Path) -> None:
    data = Recommendation(shop)
    predict_files(load_model(trained.folder), data.files(data.val[:3]), tmp_path / "out")
    found = rows(tmp_path / "out" / "recommendations.csv")
    assert list(dict.fromkeys(r["entity"] for r in found)) == [e.name for e in data.val[:3]]
    assert json.loads(json.dumps(data.spec.more)) == dict(data.spec.more), "it travels in run.json"


def test_noise_makes_lists_differ_and_none_leaves_the_ranking() -> None:
    spec = Recommendation.plain_spec(channels=6, classes=60)
    weight = torch.randn(6, 60, generator=torch.Generator().manual_seed(0))
    model = Model(Path("x"), spec, Grid(fixed=1), lambda given: given @ weight)
    attributes = torch.ones(6)
    scores, plain = diversified(model, attributes, 0.0)
    assert plain == scores.argsort(descending=True).tolist()[:TOP]
    _, one = diversified(model, attributes, 1.0, seed=1)
    _, same = diversified(model, attributes, 1.0, seed=1)
    _, other = diversified(model, attributes, 1.0, seed=2)
    assert one == same != other and len(set(one)) == TOP and set(one) != set(plain)
