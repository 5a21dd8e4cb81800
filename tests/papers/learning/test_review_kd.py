"""ReviewKD against the official code (numbers recorded by fixtures/review_kd_record.py) and against what its sections say."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from paperworks.errors import InputError
from paperworks.papers.learning.review_kd import review_kd
from paperworks.papers.learning.review_kd.review_kd import VARIANTS, ReviewKD, Shifted, hcl, loss, network
from paperworks.tasks.classification import Classification

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "review_kd.json").read_text())
TEST = VARIANTS["test"]


def spec(classes=10, channels=3, side=32):
    return Classification.plain_spec(channels, classes, 2, (side, side))


def draw(name, shape):
    """As in fixtures/review_kd_record.py."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        z = 1 + 0.5 * np.tanh(z)
    elif name.endswith(("bias", "running_mean")):
        z *= 0.2
    elif len(shape) == 1:
        z = 1 + 0.2 * z
    elif name != "image":
        z /= np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    return torch.from_numpy(z)


def official(name, levels):
    """Our name of a tensor -> theirs."""
    stage = "block{}.layer." if "wrn" in official.case else "layer{}."
    name = re.sub(r"stages\.(\d)\.", lambda m: stage.format(int(m[1]) + 1), name)
    name = re.sub(r"abfs\.(\d)\.", lambda m: f"abfs.{levels - 1 - int(m[1])}.", name)
    for ours, theirs in ((".enter.", ".conv1."), (".leave.", ".conv2."), (".attention.", ".att_conv.0."), (".shortcut.", ".convShortcut.")):
        name = name.replace(ours, theirs)
    return name


def filled(net, levels):
    state = {k: draw(official(k, levels), tuple(v.shape)) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    return net


def short(values, most=40):
    flat = values.detach().flatten()
    return flat[:: max(1, len(flat) // most)][:most]


def relative(found, expected):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


def pair(case, tmp_path):
    """Ours with the recorded weights, the teacher's in a file."""
    official.case = case
    classes, side, levels = (1000, 224, 5) if case == "resnet18" else (7, 32, 4)
    data = spec(classes, side=side)
    large = filled(network(VARIANTS[case].teacher, data), levels)
    save_file(large.state_dict(), tmp_path / "teacher.safetensors")
    config = replace(VARIANTS[case], teacher_weights=str(tmp_path / "teacher.safetensors"), warmup=0)
    return filled(ReviewKD(data, config), levels), draw("image", (2, 3, side, side)), config


@pytest.mark.parametrize("case", list(FIXTURE["cases"]))
def test_equals_the_official_code(case, tmp_path, evidence):
    known = FIXTURE["cases"][case]
    model, image, config = pair(case, tmp_path)
    shapes = {official(k, len(model.abfs)): list(v.shape) for k, v in model.state_dict().items() if k != "step"}
    assert shapes == known["shapes"]
    model.eval()
    with torch.no_grad():
        maps, targets = model.student.maps(image), model.guide(image)
        compared = model.review(maps, targets)
        logits = model(image)["logits"]
    error = max(
        relative(short(logits), known["logits"]),
        *(relative(short(t), k) for t, k in zip(targets, known["targets"], strict=True)),
        *(relative(short(c), k) for c, k in zip(compared, known["compared"], strict=True)),
        relative(sum(hcl(c, t) for c, t in zip(compared, targets)), known["hcl"]),
    )
    assert error < 1e-4
    if case != "resnet18":
        model.double().train()
        model._teacher[0].double()
        terms = loss(config)(model(image.double()), {"label": torch.tensor([0, 1])})
        terms["review"].backward()
        gradients = [model.student.conv1.weight.grad.norm(), model.abfs[-1].enter[0].weight.grad.norm()]
        error = max(
            error,
            relative(terms["review"].detach(), known["hcl_training"]),
            relative(torch.stack(gradients), [known["gradient_stem"], known["gradient_deepest"]]),
        )
        assert error < 1e-4
    evidence.fidelity(against=f"dvlab-research/ReviewKD@{FIXTURE['commit'][:7]} {case}", error=error)


def test_one_weight_is_enough_to_see(tmp_path):
    model, image, _ = pair("resnet20", tmp_path)
    model.eval()
    with torch.no_grad():
        model.abfs[-1].enter[0].weight[0, 0] += 0.5
        compared = model.review(model.student.maps(image), model.guide(image))
    known = FIXTURE["cases"]["resnet20"]["compared"]
    assert all(relative(short(c), k) > 1e-3 for c, k in zip(compared, known))  # of the deepest level: every level sees it


def test_the_official_imagenet_features_are_not_before_the_relu():
    assert min(FIXTURE["cases"]["resnet18"]["least_target"]) >= 0
    assert all(min(FIXTURE["cases"][case]["least_target"]) < 0 for case in ("resnet20", "resnet8x4", "wrn_16_2"))


def test_loss_of_levels_equals_the_official_one(evidence):
    for i, (side, known) in enumerate(zip((8, 4, 3, 2, 1), FIXTURE["hcl"], strict=True)):
        level = draw(f"level {i}", (2, 3, side, side))
        assert float(hcl(level, draw(f"other {i}", tuple(level.shape)))) == pytest.approx(known, rel=1e-6)
    evidence.property(
        "HCL equals the official one for maps of 8, 4, 3, 2 and 1 pixels, so the scales that a map has are chosen alike",
        "边长 8、4、3、2、1 像素的图上 HCL 都与官方一致，所以每张图用到的尺度也选得相同",
    )


def test_loss_of_levels_by_hand(evidence):
    a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    assert float(hcl(a, a)) == 0

    def mean_squares(side):
        cells = [x.unflatten(2, (side, -1)).unflatten(4, (side, -1)).mean((3, 5)) for x in (a, b)]
        return (cells[0] - cells[1]).square().mean()

    expected = (mean_squares(8) + mean_squares(4) / 2 + mean_squares(2) / 4 + mean_squares(1) / 8) / 1.875
    torch.testing.assert_close(hcl(a, b), expected)
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    assert float(hcl(left, left.flip(-1))) > 0.5, "equal means, other layout"
    evidence.property(
        "HCL is zero for equal maps, sees the layout of maps with equal means, and weighs its scales 1, 1/2, 1/4, 1/8 over their sum",
        "相同的图 HCL 为零，均值相同时看得出布局不同；各尺度权重 1、1/2、1/4、1/8，除以权重之和",
    )


@pytest.mark.parametrize(
    ("name", "student", "large", "abfs"),
    [
        ("resnet20", 278_324, 861_620, 114_278),
        ("resnet32", 472_756, 1_736_564, 114_278),
        ("resnet8x4", 1_233_540, 7_433_860, 1_808_774),
        ("wrn_16_2", 703_284, 2_255_156, 453_830),
        ("wrn_40_1", 569_780, 2_255_156, 216_006),
    ],
)
def test_parameter_counts(name, student, large, abfs):
    with torch.device("meta"):
        model, teacher = ReviewKD(spec(100), VARIANTS[name]), network(VARIANTS[name].teacher, spec(100))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.student, teacher, model.abfs)]
    assert counts == [student, large, abfs]


def influence(review):
    """Which student levels (columns) reach which compared maps (rows), from shallow to deep."""
    model = ReviewKD(spec(), replace(TEST, review=review)).train()
    image = torch.randn(2, 3, 32, 32)
    maps = [m.detach().requires_grad_() for m in model.student.maps(image)]
    compared = model.review(maps, model.guide(image))
    rows = []
    for found in compared:
        gradients = torch.autograd.grad(found.square().sum(), maps, allow_unused=True, retain_graph=True)
        rows.append([g is not None and bool(g.any()) for g in gradients])
    return rows


def test_shallow_levels_of_the_teacher_teach_deep_levels_of_the_student(evidence):
    levels = len(TEST_LEVELS)
    assert influence(review=True) == [[j >= i for j in range(levels)] for i in range(levels)]
    assert influence(review=False) == [[j == i for j in range(levels)] for i in range(levels)]
    evidence.property(
        "a level that is compared depends on the student's maps of that level and all deeper ones; on its own alone where review is off",
        "每一处比较取决于学生该层及所有更深层的特征图；关掉回顾时只取决于该层自己",
    )


TEST_LEVELS = (16, 32, 64, "pooled")


def test_fusion_weighs_each_place(evidence):
    torch.manual_seed(0)
    abf = review_kd.ABF(3, 4, 5, fuse=True).eval()
    x, deeper = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        compared, passed = abf(x, deeper, torch.Size((6, 6)))
        own = abf.enter(x)
        up = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
        weights = torch.einsum("oc,bchw->bohw", abf.attention.weight[:, :, 0, 0], torch.cat([own, up], 1)) + abf.attention.bias.view(
            1, 2, 1, 1
        )
        expected = torch.sigmoid(weights[:, :1]) * own + torch.sigmoid(weights[:, 1:]) * up
        torch.testing.assert_close(passed, expected)
        torch.testing.assert_close(compared, abf.leave(expected))
        small, handed = abf(x, deeper, torch.Size((3, 3)))
    assert small.shape == (2, 5, 3, 3) and torch.equal(handed, passed[:, :, ::2, ::2])
    evidence.property(
        "ABF is the sum of two maps under weights that differ from place to place; where the teacher's map is smaller, the resized one is passed on",
        "ABF 是两张图之和，权重因位置而异；教师的图更小时，传上去的是缩放后的图",
    )


def test_warm_up(evidence):
    model = ReviewKD(spec(), replace(TEST, warmup=4)).train()
    image, label = torch.randn(4, 3, 32, 32), {"label": torch.tensor([0, 1, 2, 3])}
    shares = []
    for _ in range(6):
        output = model(image)
        terms = loss(TEST)(output, label)
        shares.append(float(output["warm"]))
        torch.testing.assert_close(terms["loss"], terms["answer"] + TEST.weight * output["warm"] * terms["review"])
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]
    again = ReviewKD(spec(), replace(TEST, warmup=4)).train()
    again.load_state_dict(model.state_dict())
    assert float(again(image)["warm"]) == 1, "a resumed training would warm up again"
    evidence.property("lambda rises from 0 with the steps and survives saving", "lambda 随步数从 0 上升，保存再加载后保持不变")


def test_the_teacher_is_frozen_and_not_saved(evidence):
    model = ReviewKD(spec(), TEST).train()
    image = torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(image)
    teacher = model._teacher[0]
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    loss(TEST)(first, {"label": torch.arange(8)})["loss"].backward()
    optimizer.step()
    second = model(image)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert all(torch.equal(first[k], second[k]) for k in first if k.startswith("teacher_"))
    assert not torch.equal(first["student_0"], second["student_0"])
    assert not any("teacher" in name for name in model.state_dict()) and len(model.state_dict()) == len(ReviewKD(spec(), TEST).state_dict())
    evidence.property(
        "the teacher does not change while the student learns, and is no part of what is saved",
        "学生学习时教师不变，也不在保存的内容之中",
    )


def test_only_the_student_answers():
    missing = ReviewKD(spec(), replace(TEST, teacher_weights="nowhere")).eval()
    image = torch.randn(2, 3, 32, 32)
    assert list(missing(image)) == ["logits"]
    before = missing(image)["logits"]
    for p in missing.abfs.parameters():
        p.data.fill_(torch.nan)
    assert torch.equal(missing(image)["logits"], before)


def test_reading_the_teacher_disturbs_no_chance():
    torch.manual_seed(1)
    ReviewKD(spec(), TEST)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = ReviewKD(spec(), TEST).train()
    model(torch.zeros(2, 3, 32, 32))
    assert torch.equal(torch.rand(3), expected)


def test_a_student_alone_becomes_a_teacher(tmp_path):
    alone = ReviewKD(spec(), replace(TEST, student=TEST.teacher, teacher="")).train()
    assert list(alone.abfs) == [] and set(alone(torch.randn(2, 3, 32, 32))) == {"logits"}
    save_file(alone.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "run.json").write_text(json.dumps({"spec": {"classes": list(spec().classes)}}))
    taught = ReviewKD(spec(), replace(TEST, teacher_weights=str(tmp_path)))
    image = torch.randn(2, 3, 32, 32)
    for found, expected in zip(taught.guide(image), alone.student.eval().maps(image, before_relu=True), strict=True):
        torch.testing.assert_close(found, expected)
    (tmp_path / "run.json").write_text(json.dumps({"spec": {"classes": ["cat", "dog"]}}))
    with pytest.raises(InputError, match="other classes"):
        ReviewKD(spec(), replace(TEST, teacher_weights=str(tmp_path))).guide(image)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher_weights": ""}, "trained teacher is needed: .*paperworks train review_kd"),
        ({"teacher_weights": "no/such/run"}, "no such run or file"),
        ({"teacher_weights": __file__}, "no readable safetensors"),
        ({"teacher_weights": "teacher.safetensors", "teacher": "resnet8x2"}, "other classes"),
        ({"teacher": "resnet21"}, "no network is called"),
        ({"student": "efficientnet/huge"}, "names no variant of efficientnet; write one of efficientnet/b0"),
        ({"student": "nothing/small"}, "no paper is called"),
        ({"student": "unet/test"}, "has no pyramid"),
    ],
)
def test_bad_input_is_said_in_one_line(change, says):
    with pytest.raises(InputError, match=says) as caught:
        ReviewKD(spec(), replace(TEST, **change)).train()(torch.randn(2, 3, 32, 32))
    assert "\n" not in str(caught.value)


def test_another_network_than_the_file_holds(tmp_path):
    save_file(network("resnet8x0.25", spec()).state_dict(), tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=r"is not of resnet8x0\.5 for these channels and classes"):
        ReviewKD(spec(), replace(TEST, teacher_weights=str(tmp_path / "t.safetensors"))).guide(torch.randn(2, 3, 32, 32))


def test_backbones_of_other_papers():
    config = replace(TEST, student="efficientnet/test", teacher="convnext/test")
    model = ReviewKD(spec(), config).train()
    output = model(torch.randn(4, 3, 32, 32))
    terms = loss(config)(output, {"label": torch.arange(4)})
    terms["loss"].backward()
    assert terms["review"] > 0 and all(p.grad is not None for p in model.parameters())
    for i in range(len(model.abfs)):
        assert output[f"student_{i}"].shape == output[f"teacher_{i}"].shape
    assert {k: v.shape for k, v in model.eval()(torch.randn(4, 3, 32, 32)).items()} == {"logits": (4, 10)}


def test_the_teacher_that_comes_with_small_knows_its_pack():
    data = Classification("pack:cifar10_subset")
    teacher = review_kd.teacher("resnet8x2", "teacher.safetensors", data.spec)
    deployed = data.deploy(Answers(teacher), data.spec).eval()
    predict = data.predictor(deployed, data.spec, deployed.grid)
    assert data.evaluate(predict, data.val[:100])[0]["top1"] > 0.4


class Answers(torch.nn.Module):
    """A bare network as a classifier."""

    def __init__(self, net):
        super().__init__()
        self.net, self.grid = net, review_kd.Grid(fixed=32)

    def forward(self, image):
        return {"logits": self.net.answer(image, self.net.maps(image))}


def test_augmentation_shifts_and_mirrors():
    image = torch.rand(3, 32, 32)
    seen = set()
    for seed in range(40):
        found = Shifted()({"image": image}, (32, 32), torch.Generator().manual_seed(seed))["image"].as_subclass(torch.Tensor)
        assert found.shape == image.shape
        padded = torch.nn.functional.pad(image, (4,) * 4)
        places = [
            (t, left, m)
            for t in range(9)
            for left in range(9)
            for m in (False, True)
            if torch.equal(padded[:, t : t + 32, left : left + 32].flip(-1) if m else padded[:, t : t + 32, left : left + 32], found)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 30 and {m for *_, m in seen} == {False, True}
