"""Υ and its estimators; the table has more tests of its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from wdat.distributed import ALONE
from wdat.errors import SettingError
from wdat.sensitivity import Batch, Ema, Estimator, Exact, Sensitivity, Subsample, Table
from wdat.threat import power_mean

NORMS = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4 * 10


def _begun(estimator: Estimator, q: float = 2.0, seed: int = 0, n: int = 200) -> Estimator:
    estimator.begin(n, q, seed, ALONE)
    return estimator


def _upsilon(norms, q):
    return float(norms.double().pow(q).mean() ** (1 / q))


def test_the_set_is_the_images_at_hand():
    sensitivity = Sensitivity(3.0)
    sensitivity.observe(None, NORMS)
    assert sensitivity.upsilon() == pytest.approx(_upsilon(NORMS, 3))
    sensitivity.observe(None, NORMS[:5])
    assert sensitivity.upsilon() == pytest.approx(_upsilon(NORMS[:5], 3))
    assert_close(sensitivity.sample().values, NORMS[:5])


@pytest.mark.parametrize("make", [Sensitivity, Batch, Ema, Exact, Subsample, Table])
def test_asking_before_observing_says_so(make):
    with pytest.raises(RuntimeError, match="observe"):
        make().upsilon()


@pytest.mark.parametrize("make", [Sensitivity, Batch])
def test_the_set_spans_all_processes(make, together):
    parts = [NORMS[:150], NORMS[150:150], NORMS[150:]]

    def one(processes):
        sensitivity = make()
        sensitivity.q, sensitivity.processes = 2.0, processes
        sensitivity.observe(None, parts[processes.rank])
        return sensitivity.upsilon(), sensitivity.sample().values

    for upsilon, values in together(3, one):
        assert upsilon == pytest.approx(_upsilon(NORMS, 2))
        assert_close(values, NORMS)


def test_exact_wants_the_whole_set_every_k_steps():
    exact = _begun(Exact(every=3))
    wanted = []
    for step in range(7):
        index = exact.wanted(step)
        wanted.append(index is not None)
        if index is not None:
            assert_close(index, torch.arange(200))
            exact.measured(index, NORMS + step)
        exact.observe(torch.arange(3), torch.zeros(3))  # tells nothing
        assert exact.upsilon() == pytest.approx(_upsilon(NORMS + step - step % 3, 2))
    assert wanted == [True, False, False, True, False, False, True]


def test_exact_measures_at_once_where_it_begins_between_passes():
    assert _begun(Exact(every=10)).wanted(7) is not None


def test_a_subsample_is_fresh_each_time_and_a_function_of_seed_and_step():
    subsample = _begun(Subsample(size=20, every=5))
    first = subsample.wanted(0)
    assert len(first) == 20
    assert len(first.unique()) == 20
    assert bool((first >= 0).all())
    assert bool((first < 200).all())
    subsample.measured(first, NORMS[first])
    assert [subsample.wanted(step) is None for step in range(1, 6)] == [True] * 4 + [False]
    assert not torch.equal(subsample.wanted(5), first)
    assert torch.equal(_begun(Subsample(size=20, every=5)).wanted(0), first)
    assert not torch.equal(_begun(Subsample(size=20, every=5), seed=1).wanted(0), first)


def test_a_subsample_larger_than_the_set_is_the_set():
    assert_close(_begun(Subsample(size=999)).wanted(0), torch.arange(200))


@pytest.mark.parametrize("q", [1.0, 2.0, 3.0])
def test_a_subsample_is_unbiased_for_the_power(q):
    powers = []
    for seed in range(20):
        subsample = _begun(Subsample(size=20, every=1), q, seed)
        for step in range(50):
            index = subsample.wanted(step)
            subsample.measured(index, NORMS[index])
            powers.append(subsample.upsilon() ** q)
    powers = torch.tensor(powers, dtype=torch.float64)
    error = float(powers.mean()) - float((NORMS**q).mean())
    assert abs(error) < 4 * float(powers.std()) / math.sqrt(len(powers))


def test_the_batch_is_biased_low_at_q_2():
    batch, values = _begun(Batch()), []
    for step in range(200):
        batch.observe(None, NORMS[torch.randperm(200, generator=torch.Generator().manual_seed(step))[:8]])
        values.append(batch.upsilon())
    assert sum(values) / len(values) < _upsilon(NORMS, 2)


def test_ema_follows_its_recursion_in_the_power():
    ema, power = _begun(Ema(rate=0.25), q=3.0), None
    for part in NORMS.split(50):
        ema.observe(None, part)
        fresh = float((part**3).mean())
        power = fresh if power is None else 0.75 * power + 0.25 * fresh
        assert ema.upsilon() == pytest.approx(power ** (1 / 3))
    assert ema.sample() is None


def test_ema_of_large_norms_at_an_order_near_one_does_not_overflow():
    """p = 1.005 has q = 201, and 1000^201 leaves float64."""
    ema = _begun(Ema(), q=201.0)
    ema.observe(None, torch.tensor([1e3, 1e3]))
    assert ema.upsilon() == pytest.approx(1e3)


@pytest.mark.parametrize("make", [Batch, Ema, Exact, Subsample, Table])
def test_state_survives_a_checkpoint(make, tmp_path):
    estimator = _begun(make())
    estimator.measured(torch.arange(200), NORMS)
    estimator.observe(torch.arange(50), NORMS[:50])
    torch.save(estimator.state_dict(), tmp_path / "state.pt")
    other = _begun(make())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.upsilon() == estimator.upsilon()
    for same in (estimator, other):
        same.observe(torch.arange(50, 60), NORMS[50:60])
    assert other.upsilon() == estimator.upsilon()


@pytest.mark.parametrize("make", [Batch, Ema, Exact, Subsample, Table])
def test_a_state_without_measurements_survives_too(make):
    other = _begun(make())
    other.load_state_dict(_begun(make()).state_dict())
    with pytest.raises(RuntimeError, match="observe"):
        other.upsilon()


@pytest.mark.parametrize("make", [Exact, Subsample, Table])
def test_a_resumed_estimator_keeps_the_schedule(make):
    estimator = _begun(make(every=4))
    index = estimator.wanted(0)
    estimator.measured(index, NORMS[index])
    other = _begun(make(every=4))
    other.load_state_dict(estimator.state_dict())
    assert [other.wanted(step) is None for step in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Ema(rate=0.0), "sensitivity.rate"),
        (lambda: Ema(rate=1.5), "sensitivity.rate"),
        (lambda: Exact(every=0), "sensitivity.every"),
        (lambda: Subsample(size=0), "sensitivity.size"),
        (lambda: Table(window=0), "sensitivity.window=0"),
        (lambda: Table(clip=0), "sensitivity.clip=0"),
        (lambda: Table(clip=1.5), r"sensitivity\.clip=1\.5"),
        (lambda: Table(every=0), "sensitivity.every=0"),
    ],
)
def test_impossible_settings_are_named(make, word):
    with pytest.raises(SettingError, match=word):
        make()


def test_gradients_do_not_stay_attached():
    norms = NORMS.clone().requires_grad_(True)
    for estimator in (Sensitivity(), _begun(Batch())):
        estimator.observe(None, norms)
        assert not estimator.sample().values.requires_grad
        assert isinstance(estimator.upsilon(), float)
    assert power_mean(norms, 2.0) == pytest.approx(_upsilon(NORMS, 2))
