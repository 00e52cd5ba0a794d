"""FAB as a source of candidates: where it lands, and that it leaves everything as it was."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wdat.attacks.fab import as_found, fab_points, plain
from wdat.gradients import undisturbed
from wdat.threat import image_norm


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targets", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_are_near_flips(problem, norm, targets, dtype):
    network, x, _ = problem(n=12, dtype=dtype)
    y = network(x).argmax(1)
    with undisturbed(network):
        found = fab_points(network, x, y, norm, 20, restarts=2, targets=targets)
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert found.min() >= 0
    assert found.max() <= 1
    moved = image_norm(found - x, norm) > 0
    assert moved.float().mean() > 0.7
    assert (network(found).argmax(1) != y)[moved].float().mean() > 0.9


def test_more_targets_and_restarts_never_land_further(problem):
    network, x, _ = problem(n=12, dtype=torch.float32)
    y = network(x).argmax(1)

    def distances(**options):
        with undisturbed(network):
            moved = image_norm(fab_points(network, x, y, "l2", 10, **options) - x, "l2")
        return torch.where(moved > 0, moved, torch.inf)

    one = distances(targets=1)
    assert (distances(targets=3) <= one).all()
    assert (distances(targets=1, restarts=3) <= one).all()
    assert_close(distances(targets=9, restarts=2), distances(targets=9, restarts=2), rtol=0, atol=0)


def test_no_images_and_images_without_a_flip(problem):
    network, x, y = problem(n=4, dtype=torch.float32)
    with undisturbed(network):
        assert fab_points(network, x[:0], y[:0], "l2", 3).shape == (0, 3, 4, 4)
    firm = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    nn.init.zeros_(firm[1].weight)
    with undisturbed(firm):
        label = firm(x).argmax(1)
        assert_close(fab_points(firm, x, label, "linf", 5), x, rtol=0, atol=0)


def test_everything_global_is_left_as_found():
    def trace(frame, event, argument):
        return None

    def disturb():
        with as_found(torch.device("cpu")):
            torch.manual_seed(5)
            np.random.seed(5)
            random.seed(5)
            sys.settrace(None)
            raise KeyError

    before = sys.gettrace()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyError):
            disturb()
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


def test_a_network_in_channels_last_gives_contiguous_gradients():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(plain(network, torch.float32)(x).sum(), x)
    assert gradient.is_contiguous()
    fixed = nn.Sequential(nn.Flatten(), nn.Flatten())
    assert plain(fixed, torch.float32)(x).dtype == torch.float32


def test_a_network_that_ignores_its_images_has_zero_gradients():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 2.0]]).expand(len(x), 2)

    x = torch.rand(2, 3, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(plain(Constant(), torch.float32)(x).sum(), x)
    assert not gradient.any()
