"""Every network whose task is exported exports, with the sizes that its grid leaves open, and computes the same afterwards."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from paperworks.export.onnx import export_onnx, load_onnx


def lively(network: nn.Module) -> nn.Module:
    """Statistics and affine parameters of batch norms as if it had been trained, so that an error in any of them shows."""
    generator = torch.Generator().manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2.0, generator=generator)
    return network


def answers(deployed: nn.Module, kind, spec) -> bool:
    """Whether the input matters: a constant would agree with anything."""
    with torch.inference_mode():
        pair = [deployed(kind.example(spec, deployed.grid, seed=seed)) for seed in (0, 1)]
    first, second = (given if isinstance(given, torch.Tensor) else given[0] for given in pair)
    return first.shape != second.shape or float((first.float() - second.float()).abs().max()) > 1e-4


def test_exports(subject, tmp_path):
    kind = subject.task
    if not kind.outputs:
        pytest.skip("networks of this task are not exported")
    spec = subject.spec()
    candidates = (kind.deploy(network, spec).eval() for network in (lively(subject.network()), subject.filled()))
    deployed = next(c for c in candidates if answers(c, kind, spec))
    report = export_onnx(
        deployed,
        tmp_path / "model.onnx",
        outputs=kind.outputs,
        samples=[kind.example(spec, deployed.grid, size=(90, 71, 45)[: spec.ndim])[0]],
        grid=deployed.grid,
        spec_json=json.dumps(dataclasses.asdict(spec)),
        names={"paper": subject.id, "variant": "test"},
        single=kind.single,
    )
    assert report.relative_error < 1e-4
    exported = load_onnx(tmp_path / "model.onnx")
    for seed, sides in enumerate(((100, 65, 20), (40, 101, 30))):
        given = kind.example(spec, deployed.grid, size=sides[: spec.ndim], batch=1 if kind.single else 2, seed=seed)
        with torch.inference_mode():
            expected, found = deployed(given), exported(given)
        expected, found = ((t,) if isinstance(t, torch.Tensor) else t for t in (expected, found))
        assert len(expected) == len(found) == len(kind.outputs)
        for ours, theirs in zip(found, expected):
            assert ours.shape == theirs.shape
            assert (ours.double() - theirs.double()).norm() <= 1e-4 * theirs.double().norm()
