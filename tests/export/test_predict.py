"""Predictions in bfloat16: how far from float32's, and refused where that is too far."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paperworks import papers
from paperworks.errors import InputError
from paperworks.export.predict import APART, Bfloat16, load_model
from paperworks.nn.fuse import fast
from paperworks.tasks import task
from paperworks.train.api import fit

TASKS = ("classification", "segmentation", "restoration")
NAMES = [card.id for card in papers.cards().values() if card.task in TASKS and "test" in card.variants and card.id != "ternarynet"]
"""All but one whose numbers jump from value to value, and with them what an untrained network says."""


@pytest.mark.parametrize("name", NAMES)
def test_close_to_float32(name: str) -> None:
    card, paper = papers.card(name), papers.paper(name)
    config = paper.variants["test"]
    kind = task(card.task)
    spec = kind.plain_spec(3, 3, getattr(config, "ndim", card.ndim[0]))
    torch.manual_seed(0)
    deployed = fast(kind.deploy(paper.build(spec, config), spec))
    told: list[float] = []
    short = Bfloat16(deployed, told.append)
    given = kind.example(spec, deployed.grid)
    with torch.inference_mode():
        found, expected = short(given), deployed(given)
        assert torch.equal(short(given), found) and found.dtype == torch.float32
    assert len(told) == 1 and told[0] == pytest.approx(float((found - expected).norm() / expected.norm()), abs=1e-6)
    assert told[0] < APART
    weights = {p.dtype for m in short.short.modules() if type(m) in (nn.Conv2d, nn.Conv3d, nn.Linear) for p in m.parameters()}
    assert weights <= {torch.bfloat16} and {p.dtype for p in deployed.parameters()} == {torch.float32}


class Cancelling(nn.Module):
    """What is left of a large number is lost in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.one.weight, 1.0)
        nn.init.constant_(self.one.bias, 1000.0)

    def forward(self, image: Tensor) -> Tensor:
        return self.one(image) - 1000


class Chosen(nn.Module):
    """Indices, and as many numbers as are large."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.one.weight, 1.0)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.one(image).flatten()
        return scores.argsort(), scores[scores >= 0.5]


@torch.inference_mode()
def test_what_is_too_far_is_refused() -> None:
    told: list[float] = []
    with pytest.raises(InputError, match=r"in bfloat16 the outputs differ from float32's by .*%.*; leave --precision bf16 out"):
        Bfloat16(Cancelling(), told.append)(torch.rand(1, 1, 8, 8))
    order = torch.linspace(0, 0.9, 64).view(1, 1, 8, 8)
    with pytest.raises(InputError, match="differ"):  # by other indices
        Bfloat16(Chosen(), told.append)(order / 100 + 0.9)
    with pytest.raises(InputError, match="differ"):  # by how many there are
        Bfloat16(Chosen(), told.append)(torch.full((1, 1, 8, 8), 0.4995))
    assert not told
    few = torch.tensor([0.125, 0.5, 0.25]).view(1, 1, 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(Bfloat16(Chosen(), told.append)(few), Chosen()(few)))
    assert told == [0.0]


def test_a_run_in_bfloat16(blobs: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 2, "patch": 32}
    run = fit("unet", blobs, tmp_path / "run", variant="test", steps=2, settings=settings, precision="fp32").folder
    told: list[float] = []
    model, whole = load_model(run, precision="bf16", told=told.append), load_model(run)
    image = torch.rand(1, *[1, 32, 32])
    with torch.inference_mode():
        assert 0 < float((model.forward(image) - whole.forward(image)).abs().max()) < 0.05
    assert len(told) == 1
    with pytest.raises(InputError, match=r"model.onnx computes as it was exported"):
        load_model(tmp_path / "model.onnx", precision="bf16")
