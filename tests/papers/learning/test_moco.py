"""MoCo against the official code (golden numbers), lightly's memory bank, and its own rules."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paperworks.errors import InputError
from paperworks.papers.learning.moco.moco import VARIANTS, Config, MoCo, info_nce, loss
from paperworks.tasks.representation import Representation
from twice import in_two_processes

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "contrast.json").read_text(encoding="utf-8"))
OFFICIAL = Config(backbone="resnet18", dim=8, queue=24, key_momentum=0.9, temperature=0.2, mlp=True, image_size=32)


def recorder():
    """The rules of inputs and weights, kept with the script that recorded the numbers."""
    spec = importlib.util.spec_from_file_location("contrast_record", FIXTURES / "contrast_record.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rule = recorder()


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def network(seed: int = 0, **changes) -> MoCo:
    torch.manual_seed(seed)
    return MoCo(Representation.plain_spec(3), replace(VARIANTS["test"], **changes)).train()


def three_steps(model: MoCo) -> Tensor:
    """Logits of three steps of SGD, with the recorder's inputs and weights."""
    with torch.no_grad():
        for branch in (model.query, model.key):
            for name, parameter in branch.named_parameters():
                name = name.removeprefix("backbone.").replace("head.", "fc.")
                parameter.copy_(rule.weight(name, tuple(parameter.shape)))
        model.queue.copy_(rule.queue())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    logits = []
    for step in range(rule.STEPS):
        output = model(*rule.views(step))
        value = loss(OFFICIAL)(output, {})["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        logits.append(output["similarity"].detach() / OFFICIAL.temperature)
        assert abs(value.item() - GOLDEN["moco"]["loss"][step]) < 1e-4
    return torch.stack(logits)


def test_three_steps_equal_the_official_code(evidence):
    """Logits depend on the momentum update, the queue and the gradients of the steps before."""
    expected = torch.tensor(GOLDEN["moco"]["logits"]).view(rule.STEPS, rule.BATCH, 1 + rule.KEYS)
    model = MoCo(Representation.plain_spec(3), OFFICIAL).train()
    found = three_steps(model)
    difference = max(error(found, expected), error(model.queue, torch.tensor(GOLDEN["moco"]["queue"]).view(rule.DIM, rule.KEYS)))
    assert difference < 1e-4
    assert int(model.pointer) == GOLDEN["moco"]["pointer"]
    evidence.fidelity(against=f"facebookresearch/moco {GOLDEN['moco']['commit'][:7]}, three training steps", error=difference)


def test_the_comparison_notices_a_slower_key_encoder(evidence):
    expected = torch.tensor(GOLDEN["moco"]["logits"]).view(rule.STEPS, rule.BATCH, 1 + rule.KEYS)
    model = MoCo(Representation.plain_spec(3), replace(OFFICIAL, key_momentum=0.95)).train()
    with pytest.raises(AssertionError):
        three_steps(model)
    model = MoCo(Representation.plain_spec(3), OFFICIAL).train()
    model.follow = lambda: None
    try:
        found = three_steps(model)
    except AssertionError:
        return
    assert error(found, expected) > 1e-4


def test_equals_lightly_with_a_memory_bank(evidence):
    q, k = (F.normalize(rule.wave(name, 6, rule.DIM), dim=1) for name in "ab")
    similarity = torch.cat([(q * k).sum(1, keepdim=True), q @ rule.queue()], 1)
    expected = torch.tensor(GOLDEN["lightly"]["info_nce"])
    difference = error(info_nce(similarity, 0.07), expected)
    assert difference < 1e-5
    evidence.fidelity(against=f"lightly {GOLDEN['lightly']['version']} NTXentLoss with a memory bank", error=difference)


@pytest.mark.parametrize(("variant", "parameters"), [("v1", 23_770_304), ("v2", 27_966_656), ("cifar", 11_234_496)])
def test_parameters_of_the_query_encoder(variant, parameters):
    with torch.device("meta"):
        model = MoCo(Representation.plain_spec(3), VARIANTS[variant])
    assert sum(p.numel() for p in model.query.parameters()) == parameters
    assert [p.shape for p in model.query.parameters()] == [p.shape for p in model.key.parameters()]
    assert model.queue.shape == (128, VARIANTS[variant].queue)


def test_keys_follow_by_momentum_only(evidence):
    model = network()
    assert all(torch.equal(q, k) for q, k in zip(model.query.parameters(), model.key.parameters()))
    with torch.no_grad():
        for p in model.query.parameters():
            p.add_(1.0)
    before = [p.clone() for p in model.key.parameters()]
    statistics = {k: v.clone() for k, v in model.key.named_buffers()}
    model.follow()
    for k, old, q in zip(model.key.parameters(), before, model.query.parameters()):
        torch.testing.assert_close(k, 0.9 * old + 0.1 * q)
    assert all(torch.equal(v, statistics[k]) for k, v in model.key.named_buffers())
    output = model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    loss(VARIANTS["test"])(output, {})["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.key.parameters())
    evidence.property(
        "the key encoder's parameters move by eq. 2 and get no gradient; its batch norm statistics are its own",
        "键编码器的参数按式 2 更新，没有梯度；批归一化统计量是它自己的",
    )


def test_queue_is_first_in_first_out(evidence):
    model = network()  # 16 keys
    model.queue.zero_()
    for step in range(1, 5):  # 5 at a time: the fourth time some come round
        model.enqueue(torch.full((5, 8), float(step)))
    assert model.queue[0].tolist() == [4.0] * 4 + [1.0] + [2.0] * 5 + [3.0] * 5 + [4.0]
    assert int(model.pointer) == 4
    model.enqueue(torch.arange(20.0)[:, None].expand(20, 8))
    assert sorted(model.queue[0].tolist()) == list(range(4, 20)), "of more keys than the queue holds the newest stay"
    evidence.property("new keys replace the oldest, and the queue begins again at its end", "新键替换最旧的键，队列到末尾后从头接着写")


def test_own_keys_are_no_negatives(evidence):
    model = network()
    before = model.queue.clone()
    image, view = torch.randn(2, 4, 3, 32, 32)
    torch.manual_seed(1)
    similarity = model(image, view)["similarity"]
    assert similarity.shape == (4, 17) and similarity.abs().max() <= 1 + 1e-5
    again = network()
    q = again.query(image)[1]
    torch.testing.assert_close(similarity[:, 1:], q @ before)
    assert not torch.equal(model.queue, before)
    torch.testing.assert_close(similarity[:, 0], (q * model.queue[:, :4].T).sum(1))
    evidence.property(
        "the positive is the own key; the batch's keys enter the queue after they were compared",
        "正样本是自己的键；当前批的键比较完才入队",
    )


def test_shuffling_changes_statistics_and_nothing_else(evidence):
    model, view = network(), torch.randn(4, 3, 32, 32)
    model.key.eval()  # statistics of the batch play no part
    torch.testing.assert_close(model.keys(view), model.key(view)[1])
    model.key.train()
    torch.manual_seed(1)
    order = torch.randperm(4)
    assert order.tolist() != sorted(order.tolist())
    torch.manual_seed(1)
    shuffled = model.keys(view)
    expected = model.key(view[order])[1][order.argsort()]
    torch.testing.assert_close(shuffled, expected)
    assert error(shuffled, model.key(view)[1]) > 1e-3
    plain = network(shuffle=False)
    torch.testing.assert_close(plain.keys(view), plain.key(view)[1])
    evidence.property(
        "shuffled keys come back in their queries' order, and other examples share their batch norm statistics",
        "打乱的键还原成查询的次序；与它们共用批归一化统计量的是别的样本",
    )


def half(rank: int) -> dict[str, Tensor]:
    """One of two processes, whose random numbers differ."""
    model, views = network(splits=1), both_views()
    torch.manual_seed(10 + rank)
    keys = model.keys(views.chunk(2)[rank])
    model.enqueue(keys)
    return {"keys": keys, "queue": model.queue, "pointer": model.pointer}


def both_views() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * torch.arange(1.0, 9).view(8, 1, 1, 1)


def test_two_processes_shuffle_over_both(tmp_path, evidence):
    """A process encodes views of both, in the order that the first drew; queues stay equal."""
    found = in_two_processes(half, tmp_path)
    views = both_views()
    torch.manual_seed(10)
    order = torch.randperm(8)
    encoded = torch.cat([network(splits=1).key(views[part])[1] for part in order.chunk(2)])
    expected = encoded[order.argsort()]
    keys = torch.cat([f["keys"] for f in found])
    torch.testing.assert_close(keys, expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat([network(splits=1).key(part)[1] for part in views.chunk(2)])
    assert error(keys, alone) > 1e-3, "without shuffling the statistics would be those of the own views"
    for f in found:
        torch.testing.assert_close(f["queue"][:, :8], keys.T)
        assert int(f["pointer"]) == 8
    assert torch.equal(found[0]["queue"], found[1]["queue"])
    evidence.property(
        "two processes: views are shuffled over both before the keys are encoded, and both queues get all keys",
        "双进程：视图在两个进程间打乱后再编码成键，两个队列都得到全部键",
    )


def test_only_the_backbone_is_used_afterwards():
    model = network().eval()
    image = torch.randn(2, 3, 32, 32)
    output = model(image)
    assert set(output) == {"embedding"}
    assert torch.equal(output["embedding"], model.encoder.embed(image))
    assert output["embedding"].shape == (2, model.encoder.embedding)


def test_wraps_the_backbone_of_another_paper():
    model = network(backbone="efficientnet/test", splits=1)
    output = model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
    loss(VARIANTS["test"])(output, {})["loss"].backward()
    assert output["embedding"].shape == (4, model.encoder.embedding)
    assert all(p.grad is not None for p in model.query.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "message"), [("efficientnet/none", "efficientnet/test"), ("resnet19", "no paper"), ("unet/test", "no embedding")]
)
def test_says_what_backbone_is_wrong(name, message):
    with pytest.raises(InputError, match=message):
        network(backbone=name)
