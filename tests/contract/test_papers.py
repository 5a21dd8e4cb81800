"""What every network promises: gradients, loneliness in a batch, the same numbers again."""

from __future__ import annotations

import torch

from paperworks.tasks.contract import channels_last
from paperworks.train.run import load_weights, save_weights


def trainable(network):
    return [(name, p) for name, p in network.named_parameters() if p.requires_grad]


def test_every_parameter_learns(subject):
    """Over a few initial weights, as a ReLU of a network of two features may be dead in one. A bias before a batch norm may learn nothing."""
    for ndim in subject.card.ndim:
        moved: set[str] = set()
        for seed in range(3):
            network = subject.network(ndim=ndim, seed=seed).train()
            batch = subject.batch(network, ndim=ndim, size=32 if ndim == 2 else 16)
            terms = subject.loss(subject.task.forward(network, batch), batch)
            assert all(t.ndim == 0 and torch.isfinite(t) for t in terms.values())
            terms["loss"].backward()
            for name, p in trainable(network):
                assert p.grad is not None, f"no gradient reaches {name}"
                assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"
                if p.grad.any() or name.endswith("bias"):
                    moved.add(name)
        idle = {name for name, _ in trainable(network)} - moved
        assert not idle, f"the gradient is zero everywhere in {sorted(idle)}"


def test_an_item_does_not_see_its_neighbours(subject, relative_error):
    network = subject.filled()
    given = subject.given(network, batch=3)
    together = subject.output(network, given)
    alone = torch.cat([subject.output(network, one[None]) for one in given])
    assert relative_error(alone, together) < 1e-5


def test_same_seed_same_network(subject):
    first, second, other = subject.network(seed=1), subject.network(seed=1), subject.network(seed=2)
    state = first.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in second.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in other.state_dict().items())
    losses = []
    for network in (first, second):
        batch = subject.batch(first)
        torch.manual_seed(3)
        losses.append(subject.loss(subject.task.forward(network.train(), batch), batch)["loss"])
    assert torch.equal(*losses)


def test_evaluation_has_no_chance_and_leaves_no_trace(subject):
    network = subject.filled()
    given = subject.given(network)
    kept = given.clone()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(subject.output(network, given))
    assert torch.equal(*outputs)
    assert torch.equal(given, kept), "the network writes into its input"
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_weights_come_back_from_the_disk(subject, tmp_path):
    network, other = subject.filled(), subject.network(seed=5).eval()
    given = subject.given(network)
    save_weights(network, tmp_path / "model.safetensors")
    assert not torch.equal(subject.output(other, given), subject.output(network, given))
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(subject.output(other, given), subject.output(network, given))


def test_memory_format_changes_nothing(subject, relative_error):
    network = subject.filled()
    given = subject.given(network)
    plain = subject.output(network, given)
    layout = torch.channels_last if given.ndim == 4 else torch.channels_last_3d
    swapped = subject.output(network.to(memory_format=layout), channels_last(given))
    assert relative_error(swapped, plain) < 1e-5


def test_head_parameters_are_some_of_the_parameters(subject):
    network = subject.network()
    if hasattr(network, "head_parameters"):
        own = {id(p) for p in network.parameters()}
        head = {id(p) for p in network.head_parameters()}
        assert head and head < own
