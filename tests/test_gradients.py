"""Input gradients of single images, and the guard around the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wdat.gradients import forward, input_gradients, ordinary, undisturbed
from wdat.losses import cross_entropy


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)
    )


def _images(n: int = 7):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_gradients_are_those_of_each_image_alone(batch_size):
    network, (x, y) = _network().double(), _images()
    x = x.double()
    with undisturbed(network):
        found = input_gradients(network, x, y, cross_entropy, batch_size)
        for i in range(len(x)):
            one = x[i : i + 1].clone().requires_grad_(True)
            value = nn.functional.cross_entropy(network(one), y[i : i + 1])
            value.backward()
            assert_close(found.gradient[i : i + 1], one.grad)
            assert_close(found.loss[i], value.detach())
        assert_close(found.logits, forward(network, x, 4))
    assert found.finite.all()
    assert not found.loss.requires_grad


class _Root(nn.Module):
    """A gradient that is infinite where the first pixel is zero, with a finite loss."""

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0].sqrt(), x.flatten(1).sum(1), x[:, 1, 0, 0]], 1)


def test_gradients_that_are_not_finite_become_zero_and_are_told():
    x, y = _images(4)
    x[2, 0, 0, 0] = 0.0
    found = input_gradients(_Root(), x, torch.zeros_like(y), cross_entropy, 2)
    assert found.finite.tolist() == [True, True, False, True]
    assert_close(found.gradient[2], torch.zeros(3, 6, 6))
    assert bool((found.gradient[[0, 1, 3]].flatten(1).abs().sum(1) > 0).all())
    assert bool(found.loss.isfinite().all())


def test_no_images_give_no_gradients():
    x, y = _images(0)
    network = _network()
    with undisturbed(network):
        found = input_gradients(network, x, y, cross_entropy)
        assert found.gradient.shape == x.shape
        assert forward(network, x).shape == (0, 5)


class _Counter(nn.Module):
    """Changes a buffer at every forward pass, in eval mode too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(108, 5), how
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        if self.how == "in place":
            self.seen.add_(1)
        elif self.how == "through .data":
            self.seen.data.add_(1)
        else:
            self.seen = self.seen + 1
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("how", ["in place", "through .data", "by a new tensor"])
def test_buffers_are_restored(how):
    network, (x, y) = _Counter(how), _images()
    with undisturbed(network):
        input_gradients(network, x, y, cross_entropy, 3)
        assert bool((network.seen > 0).all())
    assert_close(network.seen, torch.zeros(2))


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was_found(fails):
    network, (x, y) = _network(), _images()
    network.train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    flags = [m.training for m in network.modules()]
    wanted = [p.requires_grad for p in network.parameters()]

    class StopError(Exception):
        pass

    try:
        with undisturbed(network):
            assert not any(m.training for m in network.modules())
            assert not any(p.requires_grad for p in network.parameters())
            input_gradients(network, x, y, cross_entropy)
            if fails:
                raise StopError
    except StopError:
        pass
    assert [m.training for m in network.modules()] == flags
    assert [p.requires_grad for p in network.parameters()] == wanted
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_exist_inside_modes_without_them(mode):
    network, (x, y) = _network(), _images()
    with undisturbed(network):
        expected = input_gradients(network, x, y, cross_entropy).gradient
    with mode():
        made_here, labels = ordinary(x * 1, y * 1)
        with undisturbed(network):
            found = input_gradients(network, made_here, labels, cross_entropy).gradient
        assert not torch.is_grad_enabled()
    assert_close(found, expected)


def test_ordinary_tensors_are_not_copied_and_inference_tensors_are():
    x = torch.rand(2, requires_grad=True)
    (found,) = ordinary(x)
    assert found.data_ptr() == x.data_ptr()
    assert not found.requires_grad
    with torch.inference_mode():
        made = torch.rand(2)
    (found,) = ordinary(made)
    assert not found.is_inference()
    assert_close(found, made)
