"""Every segmentation network of the archive exports with open sizes and computes the same afterwards."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from paperworks import papers
from paperworks.export.onnx import export_onnx, load_onnx
from paperworks.tasks.base import Spec
from paperworks.tasks.segmentation import Deployed

SPEC = Spec(task="segmentation", channels=1, classes=("background", "a", "b"), size=(96, 80), mean=(0.4,), std=(0.2,))
NETWORKS = [
    card.id
    for card in papers.cards().values()
    if card.task == "segmentation" and card.kind == "architecture" and card.variants["test"].get("ndim", 2) == 2
]


def lively(network: nn.Module) -> nn.Module:
    """Statistics and affine parameters of batch norms as if it had been trained, so that an error in any of them shows."""
    generator = torch.Generator().manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2.0, generator=generator)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_exports_with_open_sizes(name, tmp_path):
    torch.manual_seed(0)
    paper = papers.paper(name)
    deployed = Deployed(lively(paper.build(SPEC, paper.variants["test"])), SPEC).eval()
    report = export_onnx(
        deployed,
        tmp_path / "model.onnx",
        sample_images=[torch.rand(1, 90, 71)],
        grid=deployed.grid,
        spec_json=json.dumps(dataclasses.asdict(SPEC)),
        names={"paper": name, "variant": "test"},
    )
    assert report.relative_error < 1e-4
    predictor = load_onnx(tmp_path / "model.onnx")
    for sides in ((130, 65), (40, 101)):
        image = torch.rand(2, 1, *(deployed.grid.fit(n) for n in sides))
        with torch.inference_mode():
            expected = deployed(image)
        assert (predictor(image) - expected).norm() / expected.norm() < 1e-4
        assert expected.flatten(2).std(2).max() > 1e-4  # the image matters; a constant would agree with anything
