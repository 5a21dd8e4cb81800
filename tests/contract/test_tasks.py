"""What every task promises about its own pack: names in both languages, judgements, pictures, samples."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from paperworks import tasks
from paperworks.data.packs import source_path
from paperworks.errors import InputError
from paperworks.tasks import task
from paperworks.tasks.base import grid_of
from paperworks.tasks.contract import Options, Task

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module", params=list(tasks._TASKS))
def opened(request: pytest.FixtureRequest) -> Task:
    kind = task(request.param)
    return kind(kind.pack)


def test_words_in_both_languages(opened: Task) -> None:
    kind = type(opened)
    assert kind.metric in kind.metric_names and kind.metric_names[kind.metric][2] == (1 if kind.higher_is_better else -1)
    assert set(kind.explained) <= set(kind.metric_names)
    for words in (*kind.metric_names.values(), *kind.baseline_names.values(), *kind.views.values(), *kind.explained.values()):
        assert words[0].strip() and not CHINESE.search(words[0]), words
        assert CHINESE.search(words[1]) or words[1].isascii(), words


def test_description(opened: Task) -> None:
    found = opened.describe()
    assert found["task"] == opened.name and found["splits"]["train"] == len(opened.train) and found["splits"]["val"] == len(opened.val)
    assert {"source", "classes", "problems"} <= set(found)
    assert len({i.name for i in (*opened.train, *opened.val)}) == len(opened.train) + len(opened.val)
    assert re.fullmatch("[0-9a-f]{64}", opened.sha256)


def test_what_a_pack_looks_like_can_be_opened(opened: Task) -> None:
    """The same pictures may serve several tasks; ``paperworks data`` takes the one that they look like."""
    kind, items = tasks.guess(source_path(opened.pack)), [*opened.train, *opened.val]
    found = task(kind).inspect(opened.pack)
    assert found["items"] >= len(items if kind == opened.name else opened.files(items))  # several items of another task may be of one image


def test_baselines_are_judged_and_drawn(opened: Task, tmp_path: Path) -> None:
    items = opened.val[:3]
    baselines = opened.baselines()
    assert set(baselines) == set(opened.baseline_names)
    for predict in baselines.values():
        metrics, each = opened.evaluate(predict, items)
        assert {key.partition("/")[0] for key in metrics} <= set(opened.metric_names)
        assert all(isinstance(value, float) for value in metrics.values())
        assert [entry["name"] for entry in each] == [item.name for item in items]
    sample = opened.sample(items[0])
    pictures = opened.shown(sample) | opened.drawn(sample, predict(opened.given(sample)))
    assert "input" in pictures and set(opened.views) <= set(pictures)
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in pictures.values())
    opened.picture(predict, items, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 100
    for entry in opened.legend():
        assert entry["en"] and entry["zh"] and len(entry["colour"]) == 3


@functools.cache
def pack_of(name: str, pack: str) -> Task:
    return task(name)(pack)


def test_training_samples_follow_from_the_generator(subject) -> None:
    """They make a batch that the paper's network takes, after what the paper does to samples, and its loss can be learned from."""
    opened = pack_of(subject.card.task, subject.card.pack or subject.task.pack)
    paper, config = subject.paper, subject.config
    torch.manual_seed(0)
    network, recipe = paper.build(opened.spec, config).train(), paper.recipe(config)
    prepare = paper.prepare(config) if paper.prepare else lambda sample: sample

    def draw(seed: int) -> list[dict]:
        generator = torch.Generator().manual_seed(seed)
        return [prepare(opened.training_sample(item, recipe, grid_of(network), generator)) for item in opened.train[:2]]

    first, again = draw(1), draw(1)
    for a, b in zip(first, again):
        assert all(torch.equal(v, b[k]) for k, v in a.items() if isinstance(v, Tensor))
    batch = opened.collate(first)
    assert all(name in batch for name in {*opened.inputs, *opened.images})
    loss = subject.loss(opened.forward(network, batch), batch)["loss"]
    loss.backward()
    assert loss.ndim == 0 and math.isfinite(float(loss.detach()))
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_options_are_checked() -> None:
    for wrong in ({"overlap": 1.0}, {"overlap": -0.1}, {"window": 8}):
        with pytest.raises(InputError):
            Options(**wrong)
    with pytest.raises(InputError, match="--probabilities has no meaning for captions"):
        Options(probabilities=True).refuse("captions", "probabilities")
    Options().refuse("captions", "refine", "probabilities", "window")


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(InputError, match="there are: segmentation"):
        task("sculpture")
