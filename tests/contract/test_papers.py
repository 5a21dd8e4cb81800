"""What every architecture promises: gradients, any size, any channels and classes, the same numbers again."""

from __future__ import annotations

import pytest
import torch

from paperworks.tasks.segmentation import Deployed, predictor
from paperworks.train.run import load_weights, save_weights


def test_every_parameter_learns(subject):
    """Over a few initial weights, as a ReLU of a network of two features may be dead in one. A bias before a batch norm may learn nothing."""
    for ndim in subject.card.ndim:
        moved: set[str] = set()
        for seed in range(3):
            network = subject.network(ndim=ndim, seed=seed).train()
            batch = subject.batch(network, ndim=ndim, size=32 if ndim == 2 else 16)
            terms = subject.loss(network(batch["image"]), batch)
            assert all(t.ndim == 0 and torch.isfinite(t) for t in terms.values())
            terms["loss"].backward()
            for name, p in network.named_parameters():
                assert p.grad is not None, f"no gradient reaches {name}"
                assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"
                if p.grad.any() or name.endswith("bias"):
                    moved.add(name)
        idle = {name for name, _ in network.named_parameters()} - moved
        assert not idle, f"the gradient is zero everywhere in {sorted(idle)}"


def test_loss_takes_ignored_and_missing_classes(subject):
    """Pixels that nobody labelled, and a crop in which only the background is seen."""
    network = subject.network().train()
    batch = subject.batch(network)
    batch["mask"].fill_(0)[:, ::2] = 255
    batch["instances"].fill_(0)
    output = network(batch["image"])
    loss = subject.loss(output, batch)["loss"]
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_ignored_pixels_do_not_count(subject):
    network = subject.network().eval()
    batch = subject.batch(network)
    ignored = torch.zeros_like(batch["mask"], dtype=torch.bool)
    ignored[:, :, ::3] = True
    batch["mask"][ignored] = 255
    output = network(batch["image"])
    before = subject.loss(output, batch)["loss"]
    margin = network.grid.margin
    inner = ignored[:, margin : ignored.shape[1] - margin, margin : ignored.shape[2] - margin]
    changed = {**output, "logits": torch.where(inner[:, None], output["logits"].flip(1) + 3, output["logits"])}
    others = {key: value for key, value in output.items() if key != "logits" and value.shape == output["logits"].shape}
    changed |= {key: torch.where(inner[:, None], value.flip(1) + 3, value) for key, value in others.items()}
    torch.testing.assert_close(subject.loss(changed, batch)["loss"], before)


@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (2, 5), (3, 2), (4, 5)])
def test_channels_and_classes(subject, channels, classes):
    network = subject.filled(channels, classes)
    image = subject.batch(network, channels, classes)["image"]
    logits = network(image)["logits"]
    side = image.shape[2] - 2 * network.grid.margin
    assert logits.shape == (2, classes, side, side)
    assert torch.isfinite(logits).all()
    assert logits.std() > 1e-3


def test_sides_of_the_grid_are_what_it_says(subject):
    """The smallest valid sides and unequal ones; the output lies where the grid says."""
    network = subject.filled()
    grid = network.grid
    for need in ((1, 1), (grid.multiple + 1, 3 * grid.multiple)):
        height, width = (grid.fit(n) for n in need)
        logits = network(torch.randn(1, 1, height, width))["logits"]
        assert logits.shape[2:] == (height - 2 * grid.margin, width - 2 * grid.margin)
        assert all(out >= n for out, n in zip(logits.shape[2:], need))


@pytest.mark.parametrize(("size", "window"), [((37, 53), 1024), ((64, 64), 1024), ((131, 70), 1024), ((131, 70), 64), ((1, 5), 1024)])
def test_images_of_any_size(subject, size, window):
    network, spec = subject.filled(3, 4), subject.spec(3, 4)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    predict = predictor(Deployed(network, spec).eval(), spec, network.grid, window=window)
    probabilities = predict(image)
    assert probabilities.shape == (4, *size)
    assert torch.isfinite(probabilities).all() and probabilities.min() >= 0
    torch.testing.assert_close(probabilities.sum(0), torch.ones(size), rtol=0, atol=1e-4)


def test_an_image_does_not_see_its_neighbours(subject, relative_error):
    network = subject.filled()
    images = subject.batch(network, batch=3)["image"]
    together = network(images)["logits"]
    alone = torch.cat([network(image[None])["logits"] for image in images])
    assert relative_error(alone, together) < 1e-5


def test_same_seed_same_network(subject):
    first, second, other = subject.network(seed=1), subject.network(seed=1), subject.network(seed=2)
    state = first.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in second.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in other.state_dict().items())
    batch = subject.batch(first)
    losses = []
    for network in (first, second):
        torch.manual_seed(3)
        losses.append(subject.loss(network.train()(batch["image"]), batch)["loss"])
    assert torch.equal(*losses)


def test_evaluation_has_no_chance_and_leaves_no_trace(subject):
    network = subject.filled()
    image = subject.batch(network)["image"]
    kept = image.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(network(image)["logits"])
    assert torch.equal(*outputs)
    assert torch.equal(image, kept), "the network writes into its input"
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_weights_come_back_from_the_disk(subject, tmp_path):
    network, other = subject.filled(), subject.network(seed=5).eval()
    image = subject.batch(network)["image"]
    save_weights(network, tmp_path / "model.safetensors")
    assert not torch.equal(other(image)["logits"], network(image)["logits"])
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(other(image)["logits"], network(image)["logits"])


def test_memory_format_changes_nothing(subject, relative_error):
    network = subject.filled()
    image = subject.batch(network)["image"]
    plain = network(image)["logits"]
    swapped = network.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))["logits"]
    assert relative_error(swapped, plain) < 1e-5


def test_head_parameters_are_some_of_the_parameters(subject):
    network = subject.network()
    if hasattr(network, "head_parameters"):
        own = {id(p) for p in network.parameters()}
        head = {id(p) for p in network.head_parameters()}
        assert head and head < own
