"""Shapes of the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wdat.errors import SettingError
from wdat.training.schedulers import Constant, Cosine, OneCycle, Steps

times = st.floats(0, 1)


@given(times)
def test_constant(t):
    assert Constant()(t) == 1.0


@given(times, st.sampled_from([0.0, 0.025, 0.3]))
def test_cosine_warms_up_and_ends_at_zero(t, warmup):
    shape = Cosine(warmup)
    assert 0 <= shape(t) <= 1
    assert shape(warmup) == pytest.approx(1.0)
    assert shape(1.0) == pytest.approx(0.0, abs=1e-12)
    if t < warmup:
        assert shape(t) == pytest.approx(t / warmup)


def test_cosine_equals_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for step in range(11):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(Cosine()(step / 10), abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_cosine_ends_at_a_share_of_the_peak():
    shape = Cosine(0.2, final=0.01)
    assert [shape(t) for t in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.505, 0.01])


def torchs(epochs, warmup=0.025):
    """Rate and momentum of torch's own one-cycle in each epoch, from a peak rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, pct_start=warmup, total_steps=epochs)
    found = []
    for _ in range(epochs):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if len(found) < epochs:
            scheduler.step()
    return found


@pytest.mark.parametrize("epochs", [41, 90, 400, 2400])
@pytest.mark.parametrize("steps", [1, 7, 49])
def test_one_cycle_equals_torchs_in_each_step_of_an_epoch(epochs, steps):
    shape = OneCycle(0.025, 1 / 25, 1 / 25e4, epochs, [0.85, 0.95])
    for epoch, (rate, momentum) in enumerate(torchs(epochs)):
        for step in {0, steps - 1}:
            t = (epoch * steps + step) / (epochs * steps)
            assert shape(t) == pytest.approx(rate, rel=1e-9), epoch
            assert shape.momentum(t) == pytest.approx(momentum, rel=1e-9), epoch


@pytest.mark.parametrize("epochs", [None, 1, 40])
def test_one_cycle_changes_at_every_step_of_a_short_run(epochs):
    shape = OneCycle(0.025, 0.04, 4e-6, epochs, [0.85, 0.95])
    times = (0, 0.0125, 0.025, 0.5125, 1, 1.5)
    assert [shape(t) for t in times] == pytest.approx([0.04, 0.52, 1, 0.500002, 4e-6, 4e-6])
    assert [shape.momentum(t) for t in times] == pytest.approx([0.95, 0.9, 0.85, 0.9, 0.95, 0.95])


def test_one_cycle_may_leave_the_momentum_and_the_warm_up_out():
    shape = OneCycle(0.0, epochs=10)
    assert shape.momentum(0.3) is None
    assert (shape(0), shape(1)) == pytest.approx((1, 4e-6))


@pytest.mark.parametrize(
    "settings",
    [{"warmup": 1.0}, {"start": -0.1}, {"final": 1.5}, {"cycle_momentum": [0.9]}, {"cycle_momentum": [0.9, 1.0]}],
    ids=str,
)
def test_impossible_cycles_are_named(settings):
    with pytest.raises(SettingError, match=f"scheduler.{next(iter(settings))}"):
        OneCycle(**settings)


@pytest.mark.parametrize("final", [-0.1, 1.1, math.nan])
def test_impossible_ends_are_named(final):
    with pytest.raises(SettingError, match=r"scheduler\.final"):
        Cosine(final=final)


def test_steps_fall_at_and_after_each_milestone():
    shape = Steps([0.75, 0.9])
    assert [shape(t) for t in (0.0, 0.7499, 0.75, 0.89, 0.9, 1.0)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert Steps([])(1.0) == 1.0
    assert Steps([0.5], factor=0.5)(0.5) == 0.5


@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan])
def test_impossible_warm_ups_are_named(warmup):
    with pytest.raises(SettingError, match="warmup"):
        Cosine(warmup)


@pytest.mark.parametrize("milestones", [[1.5], [-0.1], [75]])
def test_milestones_in_epochs_are_refused(milestones):
    with pytest.raises(SettingError, match="milestones"):
        Steps(milestones)
