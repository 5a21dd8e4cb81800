"""What every network that segments promises besides: any size, any channels and classes, ignored pixels do not count."""

from __future__ import annotations

import pytest
import torch


def test_loss_takes_ignored_and_missing_classes(dense):
    """Pixels that nobody labelled, and a crop in which only the background is seen."""
    network = dense.network().train()
    batch = dense.batch(network)
    batch["mask"].fill_(0)[:, ::2] = 255
    batch["instances"].fill_(0)
    output = network(batch["image"])
    loss = dense.loss(output, batch)["loss"]
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_ignored_pixels_do_not_count(dense):
    network = dense.network().eval()
    batch = dense.batch(network)
    ignored = torch.zeros_like(batch["mask"], dtype=torch.bool)
    ignored[:, :, ::3] = True
    batch["mask"][ignored] = 255
    output = network(batch["image"])
    before = dense.loss(output, batch)["loss"]
    margin = network.grid.margin
    inner = ignored[:, margin : ignored.shape[1] - margin, margin : ignored.shape[2] - margin]
    changed = {**output, "logits": torch.where(inner[:, None], output["logits"].flip(1) + 3, output["logits"])}
    others = {key: value for key, value in output.items() if key != "logits" and value.shape == output["logits"].shape}
    changed |= {key: torch.where(inner[:, None], value.flip(1) + 3, value) for key, value in others.items()}
    torch.testing.assert_close(dense.loss(changed, batch)["loss"], before)


@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (2, 5), (3, 2), (4, 5)])
def test_channels_and_classes(dense, channels, classes):
    network = dense.filled(channels, classes)
    image = dense.batch(network, channels, classes)["image"]
    logits = network(image)["logits"]
    side = image.shape[2] - 2 * network.grid.margin
    assert logits.shape == (2, classes, side, side)
    assert torch.isfinite(logits).all()
    assert logits.std() > 1e-3


def test_sides_of_the_grid_are_what_it_says(dense):
    """The smallest valid sides and unequal ones; the output lies where the grid says."""
    network = dense.filled()
    grid = network.grid
    for need in ((1, 1), (grid.multiple + 1, 3 * grid.multiple)):
        height, width = (grid.fit(n) for n in need)
        logits = network(torch.randn(1, 1, height, width))["logits"]
        assert logits.shape[2:] == (height - 2 * grid.margin, width - 2 * grid.margin)
        assert all(out >= n for out, n in zip(logits.shape[2:], need))


@pytest.mark.parametrize(("size", "window"), [((37, 53), 1024), ((64, 64), 1024), ((131, 70), 1024), ((131, 70), 64), ((1, 5), 1024)])
def test_images_of_any_size(dense, size, window):
    network, spec = dense.filled(3, 4), dense.spec(3, 4)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    deployed = dense.task.deploy(network, spec).eval()
    predict = dense.task.predictor(deployed, spec, network.grid, window=window)
    probabilities = predict(image)
    assert probabilities.shape == (4, *size)
    assert torch.isfinite(probabilities).all() and probabilities.min() >= 0
    torch.testing.assert_close(probabilities.sum(0), torch.ones(size), rtol=0, atol=1e-4)
