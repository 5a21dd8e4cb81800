"""Counts of operations and activations against counts by hand."""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from paperworks.tasks.operations import ActivationCounter, flop_counter


def test_convolution_and_linear():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    image = torch.rand(2, 3, 8, 8)
    with torch.inference_mode(), flop_counter() as flops:
        network(image)
    with torch.inference_mode(), ActivationCounter() as activations:
        network(image)
    assert flops.get_total_flops() == 2 * 2 * (8 * 16 * 27 + 5 * 128)
    assert activations.total == 2 * (8 * 16 + 5)  # the relu moves numbers too, but computes next to nothing


def test_attention_counts_on_every_device():
    for device in ("cpu", "meta"):
        q = torch.rand(1, 2, 16, 8, device=device)
        with torch.no_grad(), flop_counter() as flops:
            F.scaled_dot_product_attention(q, q, q)
        assert flops.get_total_flops() == 2 * 2 * 2 * 16 * 16 * 8, device


def test_deformable_convolution_counts_as_a_convolution():
    image, weight = torch.rand(1, 4, 6, 6), torch.rand(8, 4, 3, 3)
    offset = torch.zeros(1, 18, 6, 6)
    with torch.no_grad(), flop_counter() as deformable:
        deform_conv2d(image, offset, weight, padding=1)
    with torch.no_grad(), flop_counter() as plain:
        F.conv2d(image, weight, padding=1)
    assert deformable.get_total_flops() == plain.get_total_flops() > 0
    with torch.no_grad(), ActivationCounter() as activations:
        deform_conv2d(image, offset, weight, padding=1)
    assert activations.total == 8 * 36
