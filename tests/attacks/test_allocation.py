"""How one budget is divided."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch.testing import assert_close

from wdat.attacks import allocate, capped_radii, granted_share, sensitivity_radii
from wdat.distributed import ALONE
from wdat.errors import SettingError
from wdat.sensitivity import Batch, Ema, Sample, Sensitivity
from wdat.threat import ThreatModel, power_mean

positive = st.floats(1e-3, 1e3)
norms = st.lists(st.one_of(st.just(0.0), positive), min_size=1, max_size=12).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)
orders = st.sampled_from([1.2, 1.5, 2.0, 3.0, 8.0, 64.0])


def _of(values: torch.Tensor, q: float, make=Sensitivity):
    sensitivity = make()
    sensitivity.q, sensitivity.processes = q, ALONE
    sensitivity.observe(None, values)
    return sensitivity


@given(norms, orders, st.floats(1e-4, 10))
def test_sensitivity_radii_spend_the_budget_exactly(n, p, delta):
    threat = ThreatModel(p, "l2", delta)
    radii = sensitivity_radii(n, power_mean(n, threat.q), threat.q, delta)
    if n.max() == 0:
        assert float(radii.max()) == 0.0
    else:
        assert threat.length(radii) == pytest.approx(delta, rel=1e-9, abs=0)
        assert bool(((radii > 0) == (n > 0)).all()) or p < 1.3  # high powers may underflow


@given(norms, orders)
def test_sensitivity_radii_are_first_order_optimal(n, p):
    """No admissible division has a larger Σ δ_i n_i: compared with random ones, and with Hölder's bound δΥ."""
    threat = ThreatModel(p, "linf", 0.5)
    upsilon = power_mean(n, threat.q)
    gain = float((sensitivity_radii(n, upsilon, threat.q, 0.5) * n).mean())
    assert gain == pytest.approx(0.5 * upsilon, rel=1e-9)
    other = torch.rand(20, len(n), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for radii in other:
        assert float((radii * 0.5 / threat.length(radii) * n).mean()) <= gain * (1 + 1e-9) + 1e-15


def test_the_pointwise_threat_has_uniform_radii():
    n = torch.tensor([0.0, 1.0, 5.0])
    assert_close(sensitivity_radii(n, 2.0, 1.0, 0.1), torch.full((3,), 0.1))
    threat = ThreatModel(math.inf, "linf", 0.1)
    for cap in (None, 4.0):
        assert_close(allocate(n, _of(n, 1.0), threat, cap), torch.full((3,), 0.1))
    assert granted_share(n, _of(n, 1.0), threat) == 0.1


@given(norms, orders, st.floats(1, 6), st.floats(1e-3, 1))
def test_capped_radii_spend_the_budget_within_the_cap(n, p, cap, delta):
    threat = ThreatModel(p, "l2", delta)
    radii = allocate(n, _of(n, threat.q), threat, cap)
    assert float(radii.max()) <= cap * delta * (1 + 1e-6)
    affordable = cap * float((n > 0).double().mean()) ** (1 / p)
    if affordable > 1 + 1e-6:
        assert threat.length(radii) == pytest.approx(delta, rel=1e-6, abs=0)
    else:
        assert threat.length(radii) == pytest.approx(min(affordable, 1) * delta, rel=1e-5, abs=0)


@given(norms, st.sampled_from([1.5, 2.0, 3.0]), st.floats(1.05, 6))
def test_capped_radii_are_those_of_the_root(n, p, cap):
    threat = ThreatModel(p, "linf", 0.1)
    affordable = cap * float((n > 0).double().mean()) ** (1 / p)
    found = capped_radii(n, Sample(n), threat, cap * 0.1)
    if affordable < 1 - 1e-6:  # the whole budget can't be spent
        assert_close(found, torch.where(n > 0, cap * 0.1, 0.0).double())
        return
    if affordable < 1 + 1e-6:
        return

    def radii(log_c):
        return (math.exp(log_c) * n ** (threat.q - 1)).clamp_max(cap * 0.1)

    assert_close(found, radii(brentq(lambda c: threat.length(radii(c)) - 0.1, -60, 60, xtol=1e-13)), rtol=1e-6, atol=0)


@given(norms, st.lists(st.integers(1, 5), min_size=12, max_size=12), st.sampled_from([1.5, 2.0, 3.0]), st.floats(1, 6))
def test_counts_stand_for_repeated_values(n, counts, p, cap):
    counts, threat = torch.tensor(counts[: len(n)], dtype=torch.float64), ThreatModel(p, "linf", 0.1)
    found = capped_radii(n, Sample(n, counts), threat, cap * 0.1)
    repeated = Sample(n.repeat_interleave(counts.long()))
    assert_close(found, capped_radii(n, repeated, threat, cap * 0.1), rtol=1e-6, atol=0)


def test_a_loose_cap_changes_nothing():
    n = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel(2, "l2", 0.3)
    assert_close(allocate(n, _of(n, 2.0), threat, 1e6), allocate(n, _of(n, 2.0), threat, None))


def test_one_near_tie_does_not_take_the_whole_budget():
    n = torch.cat([torch.ones(99), torch.tensor([1e12])])
    threat = ThreatModel(2, "linf", 0.1)
    capped = allocate(n, _of(n, 2.0), threat, 4.0)
    assert float(capped[-1]) == pytest.approx(0.4)
    assert float(capped[0]) == pytest.approx(0.1 * ((100 - 16) / 99) ** 0.5, rel=1e-5)
    assert float(allocate(n, _of(n, 2.0), threat, None)[0]) < 1e-10


def test_a_cap_that_can_not_be_afforded_gives_what_it_can():
    n = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    radii = allocate(n, _of(n, 2.0), ThreatModel(2, "linf", 0.1), 2.0)
    assert_close(radii, torch.tensor([0.2, 0, 0, 0, 0, 0, 0, 0]))


def test_a_cap_that_can_not_be_afforded_is_kept_in_float64_too():
    n = torch.tensor([1.0, 0.0], dtype=torch.float64)
    radii = allocate(n, _of(n, 2.0), ThreatModel(2, "linf", 0.001), 1.0)
    assert float(radii[0]) == pytest.approx(0.001, rel=1e-12, abs=0)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_zero_norms_and_zero_budgets_give_zero_radii(cap):
    for n, delta in ((torch.zeros(3), 0.1), (torch.ones(3), 0.0)):
        assert_close(allocate(n, _of(n, 2.0), ThreatModel(2, "linf", delta), cap), torch.zeros(3))


@pytest.mark.parametrize("cap", [0.5, 0.0, -1.0, math.nan])
def test_a_cap_below_the_budget_is_refused(cap):
    n = torch.ones(3)
    with pytest.raises(SettingError, match="radius_max"):
        allocate(n, _of(n, 2.0), ThreatModel(2, "linf", 0.1), cap)


def test_the_cap_is_solved_on_the_whole_set_not_on_the_batch():
    n = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 6
    threat = ThreatModel(2, "linf", 0.1)
    sensitivity = _of(n, 2.0, Batch)
    parts = [allocate(part, sensitivity, threat, 2.0) for part in n.split(8)]
    assert_close(torch.cat(parts), allocate(n, sensitivity, threat, 2.0))
    assert threat.length(torch.cat(parts)) == pytest.approx(0.1)
    assert any(abs(threat.length(part) - 0.1) > 0.01 for part in parts)


def test_an_estimator_without_values_loses_what_the_cap_cuts():
    n = torch.tensor([1.0, 1.0, 1.0, 100.0], dtype=torch.float64)
    threat = ThreatModel(2, "linf", 0.1)
    ema = _of(n, 2.0, Ema)
    assert_close(allocate(n, ema, threat, 1.5), sensitivity_radii(n, ema.upsilon(), 2.0, 0.1).clamp_max(0.15))
    assert threat.length(allocate(n, ema, threat, 1.5)) < 0.1


def test_large_norms_at_an_order_near_one_do_not_overflow():
    """p = 1.005 has q − 1 = 200, and 1000^200 leaves float64."""
    n = torch.tensor([1e3, 5e2], dtype=torch.float64)
    threat = ThreatModel(1.005, "linf", 0.1)
    radii = allocate(n, _of(n, threat.q), threat, 4.0)
    assert threat.length(radii) == pytest.approx(0.1)


@given(norms, orders)
def test_the_granted_share_is_the_length_of_the_batchs_radii(n, p):
    threat = ThreatModel(p, "l2", 0.2)
    sensitivity = _of(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), threat.q)
    upsilon = sensitivity.upsilon()
    expected = 0.2 * (power_mean(n, threat.q) / upsilon) ** (threat.q / p)
    assert granted_share(n, sensitivity, threat) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_the_shares_of_the_batches_make_up_the_budget():
    n = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel(3, "linf", 0.1)
    sensitivity = _of(n, threat.q)
    shares = torch.tensor([granted_share(part, sensitivity, threat) for part in n.split(8)])
    assert threat.length(shares) == pytest.approx(0.1, rel=1e-6)
    assert granted_share(n, sensitivity, threat) == pytest.approx(0.1)


def test_radii_over_processes_are_those_of_the_whole(together):
    n = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    threat, parts = ThreatModel(2, "linf", 0.1), [n[:7], n[7:7], n[7:]]
    for cap in (None, 1.5):

        def one(processes, cap=cap):
            sensitivity = Sensitivity(2.0, processes)
            sensitivity.observe(None, parts[processes.rank])
            return allocate(parts[processes.rank], sensitivity, threat, cap)

        assert_close(torch.cat(together(3, one)), allocate(n, _of(n, 2.0), threat, cap))
