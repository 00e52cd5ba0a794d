"""Shapes of the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wdat.errors import SettingError
from wdat.schedules import Constant, Cosine, Steps

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
