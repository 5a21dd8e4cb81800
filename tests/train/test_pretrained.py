"""Published weights come in under our names, or a clear line says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import paperworks
from paperworks import papers
from paperworks.errors import InputError
from paperworks.tasks.base import Published
from paperworks.train import pretrained


def with_weights() -> list[str]:
    return [name for name, card in papers.cards().items() if (card.folder / "weights.py").is_file()]


@pytest.mark.parametrize("name", with_weights())
def test_published_variants_are_variants_with_known_sources(name: str) -> None:
    module = pretrained._weights(name)
    variants = papers.paper(name).variants
    for variant, where in module.PUBLISHED.items():
        assert variant in variants and where.source in module.SOURCES and where.licence.strip()
        assert bool(where.repo) != bool(where.url), "one place"
        assert len(where.mean) == len(where.std) == where.channels


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A hub that holds what a timm network of random weights says."""
    import timm

    theirs = timm.create_model("convnext_tiny", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    where = Published(source="timm", repo="somebody/tiny", licence="MIT", classes=7)
    monkeypatch.setattr(pretrained, "published", lambda name, variant: where)
    monkeypatch.setattr("paperworks.train.api.published", lambda name, variant: where)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(tmp_path / file))
    return theirs.eval()


VARIANT = "tiny"


def test_pretrained_networks_answer_as_the_published_ones(hub) -> None:
    ours = paperworks.create("convnext", variant=VARIANT, pretrained=True, size=(64, 64), image_size=64).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, found = hub(image), ours(image)["logits"]
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_other_classes_have_a_fresh_head(hub) -> None:
    torch.manual_seed(0)
    ours = paperworks.create("convnext", variant=VARIANT, classes=3, pretrained=True, size=(64, 64), image_size=64)
    torch.manual_seed(0)
    fresh = paperworks.create("convnext", variant=VARIANT, classes=3, size=(64, 64), image_size=64)
    head = {id(p) for p in ours.head_parameters()}
    moved = {k for (k, p), q in zip(ours.named_parameters(), fresh.parameters()) if not torch.equal(p, q)}
    heads = {k for k, p in ours.named_parameters() if id(p) in head}
    assert moved and heads and not moved & heads


def test_what_cannot_be_is_said(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="take 3 channels, these images have 1"):
        paperworks.create("convnext", variant=VARIANT, channels=1, pretrained=True)
    with pytest.raises(InputError, match="knows no weights of 'elsewhere'"):
        paperworks.convert("convnext", {}, "elsewhere", VARIANT)

    def offline(repo: str, file: str) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(InputError, match="could not be fetched"):
        paperworks.create("convnext", variant=VARIANT, pretrained=True)


def test_papers_without_weights() -> None:
    with pytest.raises(InputError, match="no trained weights of unet are published"):
        paperworks.create("unet", variant="small", pretrained=True)


def test_an_encoder_goes_from_run_to_run(tmp_path: Path) -> None:
    """What a training method has taught a paper's backbone is where the paper goes on."""
    pack, quick = "pack:cifar10_subset", {"steps": 1, "limit": 8, "precision": "fp32"}
    settings: dict[str, Any] = {"backbone": "convnext/test", "batch_size": 4}
    method = paperworks.fit("simclr", pack, tmp_path / "method", variant="test", settings=settings, **quick)
    frozen: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "batch_size": 4, "average": 0.0}
    run = paperworks.fit("convnext", pack, tmp_path / "run", variant="test", encoder=method.folder, settings=frozen, **quick)
    taught, ours = method.network().encoder, run.network()
    assert isinstance(taught, torch.nn.Module) and run.spec.mean == method.spec.mean
    head = {id(p) for p in ours.head_parameters()}  # type: ignore[operator]
    own = {name: p for name, p in ours.named_parameters() if id(p) not in head}
    theirs = dict(taught.named_parameters())
    assert own and all(torch.equal(p, theirs[name]) for name, p in own.items())
    with pytest.raises(InputError, match="no part of this network has its"):
        paperworks.fit("vit", pack, tmp_path / "other", variant="test", encoder=method.folder, **quick)
    with pytest.raises(InputError, match="trained on 3 channels, these images have 1"):
        paperworks.fit("convnext", "pack:mnist_subset", tmp_path / "grey", variant="test", encoder=method.folder, **quick)
    with pytest.raises(InputError, match="leave one out"):
        paperworks.fit("convnext", pack, tmp_path / "both", variant="test", encoder=method.folder, pretrained=True, **quick)
