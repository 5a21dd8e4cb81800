import json
import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.export.onnx import ExportError, export_onnx, load_onnx, quantize
from paperworks.tasks.base import Grid

NAMES = {"paper": "some_paper", "variant": "small", "licence": "CC0-1.0"}
GRID = Grid(4)
SPEC = json.dumps({"task": "segmentation", "channels": 2, "classes": ["a", "b", "c"]})


class Net(nn.Module):
    """What the archive's networks are made of: strided, dilated and transposed convolutions, norms, poolings, both bilinear conventions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=2), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(40, 3, 1)

    def forward(self, image):
        fine = self.down((image - 0.5) / 0.25)
        coarse = self.deep(F.max_pool2d(fine, 2))
        merged = [
            fine,
            F.interpolate(self.up(coarse), scale_factor=2, mode="bilinear", align_corners=True),
            F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False),
            F.interpolate(coarse, scale_factor=4.0, mode="nearest"),
            F.adaptive_avg_pool2d(coarse, 1).expand_as(fine),
        ]
        return (self.head(torch.cat(merged, 1)) * 4).softmax(1)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2))
        self.up = nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, image):
        x = self.down(image)
        x = torch.cat([self.up(x), F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)], 1)
        return self.head(x).softmax(1)


class Valid(nn.Module):
    """Output three pixels smaller on each side, sides of 4 k + 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(8, 2, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, image):
        a = self.a(image)  # - 2
        up = self.up(self.b(F.max_pool2d(a, 2)))  # - 4
        cut = (a.shape[2] - up.shape[2]) // 2
        skip = a[:, :, cut : cut + up.shape[2], cut : cut + up.shape[3]]
        return self.c(torch.cat([skip, up], 1)).softmax(1)


class Noisy(nn.Module):
    def forward(self, image):
        return image + 0.01 * torch.rand_like(image)


class Branching(nn.Module):
    def forward(self, image):
        return image * 2 if image.mean() > 0.5 else image


class Fixed(nn.Module):
    """Works for one size only."""

    def forward(self, image):
        return image + torch.zeros(24, 28)


class Picky(nn.Module):
    """Fails on sizes that its grid allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 9)

    def forward(self, image):
        return self.conv(image)


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                tensor.data.uniform_(0.3, 2.0, generator=generator)
    return module


def images(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(shape, generator=generator) for shape in shapes]


def export(module: nn.Module, path, samples, grid=GRID):
    return export_onnx(module, path, outputs=("probabilities",), samples=samples, grid=grid, spec_json=SPEC, names=NAMES)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Net())


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    net.train()  # the export must not depend on it, nor change it
    report = export(net, path, images((2, 37, 53), (2, 90, 41)))
    assert net.training
    return path, report


def test_report(exported):
    path, report = exported
    assert report.relative_error < 1e-5 and report.max_abs_error < 1e-5
    assert report.bytes == path.stat().st_size
    assert list(path.parent.iterdir()) == [path]
    shapes = [c.shape for c in report.comparisons]
    assert (1, 2, 40, 56) in shapes and (1, 2, 92, 44) in shapes and (1, 2, 4, 4) in shapes  # whole samples, the smallest
    assert any(b == 2 for b, *_ in shapes)
    model = onnx.load(path)
    assert {o.version for o in model.opset_import if o.domain == ""} == {report.opset}
    assert not any(n.op_type in ("BatchNormalization", "Dropout") for n in model.graph.node)


def test_any_valid_size_and_batch(exported, net):
    predictor = load_onnx(exported[0])
    for shape in ((1, 2, 8, 132), (3, 2, 64, 64), (5, 2, 4, 8)):
        (image,) = images(shape)
        with torch.inference_mode():
            expected = net.eval()(image)
        found = predictor(image)
        assert expected.std() > 0.05  # nearly uniform probabilities would agree with anything
        assert (found - expected).norm() / expected.norm() < 1e-5


def test_metadata_travels(exported):
    predictor = load_onnx(exported[0], threads=2)
    assert predictor.grid == Grid(4)
    assert predictor.spec_json == SPEC
    assert predictor.metadata.items() >= NAMES.items()
    assert predictor.metadata["precision"] == "float32" and "version" in predictor.metadata
    assert predictor.session.get_session_options().intra_op_num_threads == 2


def test_volumes_and_nothing_is_printed_or_logged(tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO):
        report = export(randomised(Volume()), tmp_path / "v.onnx", images((1, 9, 12, 15)), Grid(2))
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert report.relative_error < 1e-5
    assert load_onnx(tmp_path / "v.onnx")(torch.rand(1, 1, 4, 6, 8)).shape == (1, 2, 4, 6, 8)


def test_valid_convolutions(tmp_path):
    grid = Grid(2, offset=2, margin=4)
    report = export(Valid(), tmp_path / "v.onnx", images((1, 20, 31)), grid)
    assert report.relative_error < 1e-5
    predictor = load_onnx(tmp_path / "v.onnx")
    assert predictor.grid == grid
    assert predictor(torch.rand(1, 1, 24, 38)).shape == (1, 2, 16, 30)


def test_a_file_that_differs_is_not_written(tmp_path):
    with pytest.raises(ExportError, match=r"differs from the original: relative error \d\.\de-\d+") as caught:
        export(Noisy(), tmp_path / "x.onnx", images((2, 20, 20)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "message"), [(Branching(), "export Branching"), (Fixed(), "export Fixed"), (Picky(), r"\(1, 2, 4, 4\)")]
)
def test_what_cannot_be_exported_says_so_in_one_line(module, message, tmp_path, capfd):
    with pytest.raises(ExportError, match=message) as caught:
        export(module, tmp_path / "x.onnx", images((2, 24, 24)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# Files from elsewhere


def changed(source, path, change):
    model = onnx.load(source)
    change(model)
    path.write_bytes(model.SerializeToString())


def drop_metadata(model):
    del model.metadata_props[:]


def set_property(key, value):
    def change(model):
        for prop in model.metadata_props:
            if prop.key == f"paperworks.{key}":
                prop.value = value

    return change


def make_external(tensor):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret.bin")


def external_weight(model):
    make_external(model.graph.initializer[0])


def external_in_a_branch(model):
    tensor = helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    make_external(tensor)
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["o"], value=tensor)], "b", [], [helper.make_tensor_value_info("o", TensorProto.FLOAT, [1])]
    )
    model.graph.node.append(helper.make_node("If", ["c"], ["unused"], then_branch=branch, else_branch=branch))


def external_in_a_function(model):
    tensor = helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    make_external(tensor)
    node = helper.make_node("Constant", [], ["o"], value=tensor)
    model.functions.append(helper.make_function("own", "f", [], ["o"], [node], [helper.make_opsetid("", 20)]))


def other_output(model):
    model.graph.output[0].name = "something"


HOSTILE = {
    "without our metadata": (drop_metadata, "lacks the description"),
    "no JSON": (set_property("grid", "{"), "lacks the description"),
    "a grid of nothing": (set_property("grid", '{"multiple": 0}'), "lacks the description"),
    "a grid of words": (set_property("grid", '{"multiple": "many"}'), "lacks the description"),
    "a grid with other fields": (set_property("grid", '{"cells": 3}'), "lacks the description"),
    "a spec that is a list": (set_property("spec", "[]"), "lacks the description"),
    "external weights": (external_weight, "weights in other files"),
    "external weights in a branch": (external_in_a_branch, "weights in other files"),
    "external weights in a function": (external_in_a_function, "weights in other files"),
    "broken graph": (other_output, "cannot be run"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(name, exported, tmp_path):
    change, message = HOSTILE[name]
    path = tmp_path / "model.onnx"
    (tmp_path.parent / "secret.bin").write_bytes(np.zeros(10_000, np.float32).tobytes())
    changed(exported[0], path, change)
    refuse(path, message)


def test_files_that_are_no_models_are_refused(exported, tmp_path):
    path = tmp_path / "model.onnx"
    refuse(path, "No such file")
    refuse(tmp_path, "cannot be read")
    for content in (b"", b"hello, this is no model\n" * 20, bytes(range(256)) * 10):
        path.write_bytes(content)
        refuse(path, "no ONNX file|lacks the description")
    whole = exported[0].read_bytes()
    for length in (10, len(whole) // 3, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:length])
        refuse(path, "no ONNX file|lacks the description")


def test_another_models_interface_is_refused(exported, tmp_path):
    model = onnx.load(exported[0])
    for node in model.graph.node:
        node.input[:] = ["picture" if i == "image" else i for i in node.input]
    model.graph.input[0].name = "picture"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refuse(tmp_path / "m.onnx", "does not take 'image'")


def refuse(path, message):
    with pytest.raises(InputError, match=message) as caught:
        load_onnx(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# int8


@pytest.fixture(scope="module")
def quantised(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "net.int8.onnx"
    (probe,) = images((1, 2, 32, 48))

    def evaluate(predictor):
        return {"mean": float(predictor(probe)[:, 0].mean()), "int8": float(predictor.metadata["precision"] == "int8")}

    return path, quantize(exported[0], path, calibration_images=images((2, 37, 53), (2, 30, 64), (2, 16, 16)), evaluate=evaluate)


def test_int8_report(quantised, exported):
    path, report = quantised
    assert report.bytes == {"fp32": exported[0].stat().st_size, "int8": path.stat().st_size}
    assert [report.quality[k]["int8"] for k in ("fp32", "int8")] == [0.0, 1.0]
    assert report.quality["int8"]["mean"] == pytest.approx(report.quality["fp32"]["mean"], abs=0.02)
    assert report.latency_ms["int8"]["n"] >= 5 and report.speedup > 0


def test_int8_is_near_and_keeps_metadata(quantised, exported):
    original, int8 = load_onnx(exported[0]), load_onnx(quantised[0])
    (image,) = images((2, 2, 40, 24))
    difference = (int8(image) - original(image)).norm() / original(image).norm()
    assert 1e-4 < difference < 0.1  # rounded to 8 bits, and not more
    assert int8.metadata == original.metadata | {"precision": "int8"}


def test_int8_spares_the_ends(quantised):
    model = onnx.load(quantised[0])
    producer = {o: n for n in model.graph.node for o in n.output}
    constants = {i.name for i in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose")]
    weights_int8 = [n.input[1] in producer and producer[n.input[1]].op_type == "DequantizeLinear" for n in convolutions]
    assert weights_int8 == [True] * (len(convolutions) - 1) + [False] and convolutions[-1].input[1] in constants
    assert producer[model.graph.output[0].name].op_type == "Softmax"
    per_channel = [i for i in model.graph.initializer if i.data_type == TensorProto.INT8 and len(i.dims) == 4]
    scales = {i.name: list(i.dims) for i in model.graph.initializer}
    assert len(per_channel) == 3 and all(
        scales[n.input[1]][0] > 1
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in {i.name for i in per_channel}
    )


def test_int8_of_int8_is_refused(quantised, tmp_path):
    with pytest.raises(InputError, match="quantised already"):
        quantize(quantised[0], tmp_path / "x.onnx", calibration_images=images((2, 16, 16)), evaluate=lambda p: {})
    assert list(tmp_path.iterdir()) == []
