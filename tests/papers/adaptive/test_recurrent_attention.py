"""RAM against numbers of a re-implementation, its sensor pixel by pixel, and its learning rule against exact gradients."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

from paperworks.errors import InputError
from paperworks.papers.adaptive.recurrent_attention.recurrent_attention import (
    VARIANTS,
    Config,
    RecurrentAttention,
    Scattered,
    glimpsed,
    hybrid,
    recipe,
    scattered,
)

TOLERANCE = 1e-4
FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = json.loads((FIXTURES / "recurrent_attention.json").read_text())
TINY = Config(glimpse=4, scales=2, glimpses=4, hidden=8, core=16, std=0.1, image_size=20)
NAMES = {
    "sensor.fc1": "glimpse.what",
    "sensor.fc2": "glimpse.where",
    "sensor.fc3": "glimpse.from_what",
    "sensor.fc4": "glimpse.from_where",
    "rnn.i2h": "from_glimpse",
    "rnn.h2h": "from_state",
    "classifier.fc": "head",
}


def built(config: Config, side: int = 20, channels: int = 1, classes: int = 7) -> RecurrentAttention:
    torch.manual_seed(0)
    return RecurrentAttention(channels, classes, side, config).eval()


def relative(found: torch.Tensor, expected: list[float]) -> float:
    wanted = torch.tensor(expected)
    return float((found.flatten() - wanted).norm() / wanted.norm())


# --- The re-implementation


@torch.inference_mode()
@pytest.mark.parametrize("name", FIXTURE["cases"])
def test_glimpses_states_and_classes_equal_a_re_implementation(evidence, name):
    draw, case = runpy.run_path(str(FIXTURES / "recurrent_attention_record.py"))["draw"], FIXTURE["cases"][name]
    config = Config(glimpse=case["g"], scales=case["k"], glimpses=case["glimpses"], image_size=case["side"])
    net = built(config, case["side"], case["channels"])
    state = {f"{NAMES[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": draw(key, tuple(shape)) for key, shape in case["shapes"].items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"location", "baseline"}
    image = draw("image", (3, case["channels"], case["side"], case["side"]))
    locations = draw("locations", (3, case["glimpses"], 2))
    errors = [relative(glimpsed(image, locations[:, 0], case["g"], case["k"]).flatten(1)[:, ::7], case["glimpse"])]
    output = net(image, locations)
    errors.append(relative(output["state"][:, ::5], case["state"]))
    errors.append(relative(output["logits"].log_softmax(1), case["log_probabilities"]))
    assert max(errors) < TOLERANCE
    net.from_state.weight *= 1.1
    assert relative(net(image, locations)["logits"].log_softmax(1), case["log_probabilities"]) > TOLERANCE
    evidence.fidelity(against=f"{FIXTURE['repository']}@{FIXTURE['commit'][:7]}, {name}: glimpse, state, classes", error=max(errors))


def test_parameters():
    """209,677 with one linear layer for the location, as in the paper (242,317 with the re-implementation's hidden one)."""
    counts = {name: sum(p.numel() for p in built(config, 28, classes=10).parameters()) for name, config in VARIANTS.items()}
    assert counts["mnist28"] == 209_677
    assert counts["mnist28"] - 514 - 257 - 2570 + (256 * 128 + 128 + 258) + 257 + 2570 == 242_317
    assert counts["translated60"] == counts["cluttered60"] == 209_677 + 128 * (3 * 144 - 64)


# --- The sensor


def test_sensor_pixel_by_pixel(evidence):
    """Against loops: patches of 4 and 8 pixels around each location, averaged to 4 x 4, zeros outside."""
    torch.manual_seed(0)
    image = torch.randn(7, 2, 10, 14)
    location = torch.tensor([[0.0, 0], [-1, -1], [1, 1], [0.99, -0.3], [-0.5, 0.7], [0.2, 0.2], [1, -1]])
    found = glimpsed(image, location, 4, 2)
    for b, (x, y) in enumerate(location.tolist()):
        column, row = int((x + 1) / 2 * 14), int((y + 1) / 2 * 10)
        for scale in range(2):
            length = 4 * 2**scale
            patch = torch.zeros(2, length, length)
            for i in range(length):
                for j in range(length):
                    r, c = row - length // 2 + i, column - length // 2 + j
                    if 0 <= r < 10 and 0 <= c < 14:
                        patch[:, i, j] = image[b, :, r, c]
            torch.testing.assert_close(found[b, 2 * scale : 2 * scale + 2], F.avg_pool2d(patch, 2**scale))
    evidence.property(
        "sensor: x is the column and y the row, (0, 0) the centre, two scales, zeros outside; against loops",
        "传感器：x 是列、y 是行，(0, 0) 是中心，两个尺度，图外补零；与循环对照",
    )


@torch.inference_mode()
def test_cost_depends_on_glimpses_and_not_on_the_image(evidence):
    def cost(side: int, glimpses: int) -> int:
        net = built(replace(TINY, glimpses=glimpses), side)
        with FlopCounterMode(display=False) as counter:
            net(torch.randn(1, 1, side, side))
        return counter.get_total_flops()

    assert cost(20, 4) == cost(100, 4)
    assert 1.9 < cost(20, 8) / cost(20, 4) < 2.1
    evidence.property(
        "multiply-adds are the same for images of 20 and 100 pixels and grow with the number of glimpses",
        "20 与 100 像素的图像乘加次数相同；乘加次数随瞥视次数增长",
    )


@torch.inference_mode()
def test_nothing_is_seen_between_the_glimpses():
    net, image = built(replace(TINY, scales=1), 20), torch.randn(1, 1, 20, 20)
    given = torch.tensor([[[-0.8, -0.8], [0.8, -0.8], [-0.8, 0.8], [0.8, 0.8]]])
    changed = image.clone()
    changed[:, :, 6:14, 6:14] += 1
    assert torch.equal(net(image, given)["logits"], net(changed, given)["logits"])
    changed[:, :, 1, 1] += 1
    assert not torch.equal(net(image, given)["logits"], net(changed, given)["logits"])


# --- The policy


def test_locations_are_drawn_in_training_and_means_in_evaluation(evidence):
    net, image = built(TINY), torch.randn(400, 1, 20, 20)
    output = net(image)
    assert not output["locations"][:, 0].any() and not output["log_probability"].any()
    net.train()
    torch.manual_seed(1)
    output = net(image)
    first = output["locations"][:, 0]
    assert first.min() < -0.9 and first.max() > 0.9 and abs(float(first.mean())) < 0.1
    state = torch.randn(4000, 16)
    drawn, log = net.next(state)
    mean = net.location(state).tanh().detach()
    noise = (drawn - mean)[(drawn.abs() < 1).all(1)]
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    inside = (drawn.abs() < 1).all(1)
    expected = torch.distributions.Normal(mean, 0.1).log_prob(drawn).sum(1)
    torch.testing.assert_close(log[inside].detach(), expected[inside], rtol=1e-3, atol=1e-3)
    assert not drawn.requires_grad
    evidence.property(
        "Gaussian policy of fixed width around tanh of a linear layer: drawn in training, its mean in evaluation",
        "策略是以一层线性加 tanh 为均值、标准差固定的高斯：训练时采样，评估时取均值",
    )


def test_probability_is_of_the_unclamped_draw():
    net = built(TINY).train()
    nn.init.zeros_(net.location.weight)
    nn.init.constant_(net.location.bias, 10.0)  # a mean of 1
    torch.manual_seed(0)
    drawn, log = net.next(torch.randn(2000, 16))
    assert drawn.max() == 1
    at_one = torch.distributions.Normal(torch.ones(2), 0.1).log_prob(torch.ones(2)).sum()
    both = (drawn == 1).all(1)
    assert (log[both] < at_one).all() and float(both.float().mean()) == pytest.approx(0.25, abs=0.05)


def test_what_learns_from_what(evidence):
    """The policy's gradient reaches the location layer alone, the baseline's its own layer; the classification's neither."""
    net, batch = built(TINY).train(), {"label": torch.arange(7).repeat(8)}
    image = torch.randn(56, 1, 20, 20)
    parts = {"policy": {"location"}, "baseline": {"baseline"}, "classification": {"glimpse", "from_state", "from_glimpse", "head"}}
    for term, expected in parts.items():
        net.zero_grad()
        hybrid(TINY)(net(image), batch)[term].backward()
        assert {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()} == expected
    evidence.property(
        "REINFORCE reaches the location layer alone, the squared error the baseline alone, cross-entropy the rest",
        "REINFORCE 的梯度只到位置层，平方误差只到基线，交叉熵到其余部分",
    )


def test_hybrid_loss_by_hand(evidence):
    output = {
        "logits": torch.tensor([[2.0, 0, 0], [0, 0, 3]]),
        "log_probability": torch.tensor([[-0.5, -1.0], [0.3, -2.0]]),
        "baselines": torch.tensor([[0.4, 0.6], [0.5, 0.1]]),
    }
    label = torch.tensor([0, 1])
    policy = -((-0.5 * 0.6 - 1.0 * 0.4) + (0.3 * -0.5 + -2.0 * -0.1)) / 2
    baseline = (0.6**2 + 0.4**2 + 0.5**2 + 0.1**2) / 4
    terms = hybrid(Config(policy_weight=0.01))(output, {"label": label})
    assert float(terms["policy"]) == pytest.approx(policy) and float(terms["baseline"]) == pytest.approx(baseline)
    assert float(terms["loss"]) == pytest.approx(float(F.cross_entropy(output["logits"], label)) + 0.01 * policy + baseline)
    assert float(terms["reward"]) == 0.5
    evidence.property(
        "hybrid loss: cross-entropy, 0.01 of the sum over time of -log pi (R - b), squared error of the baseline",
        "混合损失：交叉熵，-log pi (R - b) 对时间求和乘 0.01，基线的平方误差",
    )


@pytest.mark.parametrize("baseline", [0.2, 0.9])
def test_reinforce_is_the_gradient_of_the_expected_reward(evidence, baseline):
    """A reward that needs the drawn location on one side of a line: its expectation, and its slope, are those of a normal distribution."""
    torch.manual_seed(0)
    net = built(replace(TINY, std=0.3)).train()
    nn.init.zeros_(net.location.weight)
    nn.init.constant_(net.location.bias, 0.1)
    locations, logs = net.next(torch.zeros(400_000, 16))
    right = (locations[:, 0] > 0.3).float()
    output = {
        "logits": F.one_hot(1 - right.long(), 2).float(),
        "log_probability": logs[:, None],
        "baselines": torch.full((400_000, 1), baseline),
    }
    hybrid(Config())(output, {"label": torch.zeros(400_000).long()})["policy"].backward()
    mean = torch.tensor(0.1).tanh()
    slope = torch.distributions.Normal(mean, 0.3).log_prob(torch.tensor(0.3)).exp() * (1 - mean**2)
    assert float(-net.location.bias.grad[0]) == pytest.approx(float(slope), rel=0.03)
    assert abs(float(net.location.bias.grad[1])) < 0.03
    evidence.property(
        "REINFORCE: 400,000 draws give the slope of the expected reward within 3 %, whatever the baseline",
        "REINFORCE：400,000 次采样给出期望奖励的斜率，误差不到 3 %，与基线取值无关",
    )


def test_the_policy_learns_to_look_where_it_pays(evidence):
    """The class is right when the second glimpse lies to the right: means move there."""
    torch.manual_seed(0)
    net = built(replace(TINY, glimpses=2, std=0.2)).train()
    optimizer, image = torch.optim.Adam(net.parameters(), 0.02), torch.zeros(64, 1, 20, 20)
    for _ in range(120):
        output = net(image)
        right = (output["locations"][:, 1, 0] > 0.4).long()
        output = {**output, "logits": F.one_hot(1 - right, 7).float() + 0 * output["logits"]}
        terms = hybrid(replace(TINY, policy_weight=1.0))(output, {"label": torch.zeros(64).long()})
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert float(net.eval()(image)["locations"][0, 1, 0].detach()) > 0.4
    evidence.property("a policy that is rewarded for looking to the right does so", "策略看向右侧得到奖励，就学会看向右侧")


# --- Data


def test_scattered_images(evidence):
    image = torch.rand(1, 28, 28) * 0.5 + 0.5
    for seed in range(5):
        canvas, middle = scattered(image, 60, 0, 8, torch.Generator().manual_seed(seed))
        column, row = ((middle + 1) * 30 - 14).round().long().tolist()
        assert torch.equal(canvas[:, row : row + 28, column : column + 28], image)
        assert float(canvas.sum()) == pytest.approx(float(image.sum()), rel=1e-5)
        cluttered, same = scattered(image, 60, 4, 8, torch.Generator().manual_seed(seed))
        assert torch.equal(same, middle)
        assert (cluttered >= canvas).all() and 0 < int((cluttered != canvas).sum()) <= 4 * 64
    sample = {"image": tv_tensors.Image(image), "label": 3}
    plain = Scattered()(sample, (28, 28), torch.Generator())
    assert torch.equal(plain["image"].as_subclass(torch.Tensor), image) and plain["label"] == 3
    moved = Scattered(share=28 / 60, clutter=4)(sample, (60, 60), torch.Generator().manual_seed(0))
    assert moved["image"].shape == (1, 60, 60)
    evidence.property(
        "translated and cluttered images: the digit whole, four pieces of 8 x 8 at most, the place known",
        "平移与带干扰的图像：数字完整，干扰最多四块 8 x 8，位置已知",
    )


def test_recipe_and_settings():
    digits, cluttered = recipe(VARIANTS["mnist28"]), recipe(VARIANTS["cluttered60"])
    assert (digits.optimizer, digits.lr, digits.batch_size) == ("adam", 3e-4, 128)
    assert digits.augment == Scattered() and cluttered.augment == Scattered(share=28 / 60, clutter=4)
    assert recipe(VARIANTS["translated60"]).augment == Scattered(share=28 / 60)
    with pytest.raises(InputError, match="even"):
        built(replace(TINY, glimpse=5))
    assert built(replace(TINY, glimpses=1))(torch.randn(2, 1, 20, 20))["log_probability"].shape == (2, 0)
    assert built(TINY).embed(torch.randn(2, 1, 20, 20)).shape == (2, 16)
