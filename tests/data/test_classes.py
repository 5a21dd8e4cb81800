"""Images with labels in the layouts that people have."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paperworks import tasks
from paperworks.data.classes import looks_like_classes, open_classes
from paperworks.errors import InputError


def save(path: Path, value: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for label, value in (("ant", 10), ("bee", 200)):
        for i in range(10):
            save(tmp_path / label / f"{i}.png", value + i)
    return tmp_path


def test_class_folders_are_split_by_hash(folders: Path) -> None:
    found = open_classes(folders)
    assert found.classes == ("ant", "bee") and found.layout == "class folders"
    assert len(found.train) + len(found.val) == 20 and found.val and found.train
    assert all(found.classes[i.label or 0] == i.path.parent.name for i in found.items)
    assert {i.name for i in open_classes(folders).val} == {i.name for i in found.val}
    image = found.unit(found.image(found.items[0]))
    assert image.shape == (3, 10, 12) and image.max() <= 1
    assert tasks.guess(folders) == "classification"


def test_folders_of_splits(tmp_path: Path) -> None:
    for split, n in (("train", 3), ("val", 2), ("test", 1)):
        for label in ("a", "b"):
            for i in range(n):
                save(tmp_path / split / label / f"{split}{i}.png", i)
    found = open_classes(tmp_path)
    assert [len(found.split(s)) for s in ("train", "val", "test")] == [6, 4, 2]
    assert found.describe()["splits"] == {"train": 6, "val": 4, "test": 2}


def test_a_table_names_files_labels_and_splits(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "images" / f"{i}.png", i)
    with (tmp_path / "labels.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["filename", "species", "split"])
        writer.writerows([[f"{i}.png", "10" if i % 2 else "9", "val" if i < 2 else "train"] for i in range(6)])
        writer.writerows([["gone.png", "9", "train"], ["0.png", "", "elsewhere"]])
    found = open_classes(tmp_path)
    assert found.classes == ("9", "10"), "numbers are sorted by value"
    assert (len(found.train), len(found.val)) == (4, 2)
    assert [p.what for p in found.problems] == ["row 8 names 'gone.png', which is not there", "row 9 has the split 'elsewhere'"]
    assert len(open_classes(tmp_path / "labels.csv").items) == 6 and looks_like_classes(tmp_path / "labels.csv")


def test_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (8, 6, 7), np.uint8)
    np.savez(tmp_path / "digits.npz", x_train=x, y_train=np.arange(8) % 3, x_val=x[:3], y_val=np.arange(3))
    found = open_classes(tmp_path)
    assert found.classes == ("0", "1", "2") and (len(found.train), len(found.val)) == (8, 3)
    assert (found.image(found.train[5])[..., 0] == x[5]).all() and found.train[5].label == 2
    np.savez(tmp_path / "digits.npz", x_train=x, y_train=np.arange(7))
    with pytest.raises(InputError, match="8 images and"):
        open_classes(tmp_path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "digits.npz", x_train=np.array([{"a": 1}], dtype=object), y_train=np.zeros(1))
    with pytest.raises(InputError, match=r"digits\.npz cannot be read"):
        open_classes(tmp_path)


def test_broken_and_odd_images_are_left_out(folders: Path) -> None:
    (folders / "ant" / "0.png").write_bytes(b"no picture")
    save(folders / "bee" / "grey.png", 7, mode="L")
    found = open_classes(folders)
    assert [p.path.name for p in found.problems] == ["0.png"] and len(found.items) == 20
    assert found.unit(found.image(next(i for i in found.items if i.name.endswith("grey.png")))).shape[0] == 3
    assert [p.path.name for p in open_classes(folders).problems] == ["0.png"], "the same from the cache"


def test_grey_sets_stay_grey(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(4):
            save(tmp_path / label / f"{i}.png", i, mode="L")
    assert open_classes(tmp_path).fingerprint.channels == 1


def test_images_without_labels(tmp_path: Path) -> None:
    for i in range(5):
        save(tmp_path / f"{i}.png", i)
    with pytest.raises(InputError, match="holds no classes"):
        open_classes(tmp_path)
    found = open_classes(tmp_path, labelled=False)
    assert len(found.items) == 5 and found.classes == () and all(i.label is None for i in found.items)


def test_split_file(folders: Path) -> None:
    names = [str(p.relative_to(folders)) for p in sorted(folders.rglob("*.png"))]
    (folders / "splits.json").write_text(json.dumps({"train": names[::2], "val": names[1::2]}))
    assert [i.name for i in open_classes(folders).val] == names[1::2]


def test_masks_are_no_classes(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        save(tmp_path / folder / "0.png")
    assert not looks_like_classes(tmp_path)


def test_people_in_a_folder_of_images(tmp_path: Path) -> None:
    for person in ("s1", "s2"):
        save(tmp_path / "images" / person / "0.png")
        save(tmp_path / "images" / person / "1.png")
    assert open_classes(tmp_path).classes == ("s1", "s2")
