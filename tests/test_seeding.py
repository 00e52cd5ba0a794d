"""Streams are functions of their keys alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from sampled import product
from scipy import stats

from benchmarks.pretended import accelerator, device_tensor
from wdat.seeding import PURPOSES, generator, normal, uniform, words


def _draw(*keys):
    return tuple(torch.rand(4, generator=generator(*keys)).tolist())


def test_equal_keys_give_equal_streams_and_others_differ():
    keys = [(seed, purpose, step) for seed, purpose, step in itertools.product((0, 1), PURPOSES, (0, 1))]
    keys += [(0, "noise", 1, 1), (0, "noise", 0, 1), (0, "noise", 2)]
    draws = [_draw(*k) for k in keys]
    assert draws == [_draw(*k) for k in keys]
    assert len(set(draws)) == len(keys)


def test_a_key_of_zero_is_a_key():
    """`SeedSequence` pads its words with zeros, so (seed, purpose) and (seed, purpose, 0) need telling apart."""
    assert _draw(0, "init") != _draw(0, "init", 0)


def test_large_seeds_share_no_stream_with_other_purposes():
    """Seeds of 2^32 and more become two words, the second of which must not be read as a purpose."""
    assert _draw(2**32, "noise") != _draw(0, PURPOSES[1], PURPOSES.index("noise"))


def test_streams_neither_read_nor_move_the_global_one():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = _draw(3, "order", 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert _draw(3, "order", 7) == first


def test_streams_stay_what_they_were():
    """A change here changes every published run; purposes are only ever appended."""
    assert PURPOSES[:7] == ("split", "order", "augment", "noise", "subsample", "init", "pass")
    assert generator(0, "noise", 3).initial_seed() == 14775400106926915893


@pytest.mark.parametrize("keys", [(0, "coffee"), (-1, "noise"), (0, "noise", -1)])
def test_unknown_purposes_and_negative_keys_are_refused(keys):
    with pytest.raises(ValueError):  # noqa: PT011 (a defect of the caller, not of a setting)
        generator(*keys)


def split_mix(key, number):
    """The n-th word of SplitMix64, in whole numbers."""
    mask = 2**64 - 1
    z = (key + number * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, 14775400106926915893])
def test_words_are_those_of_splitmix(key):
    rows = torch.tensor([0, 7, 2**40])
    found = words(key, rows, 3).tolist()
    wanted = [[split_mix(key, row * 3 + column + 1) for column in range(3)] for row in rows.tolist()]
    assert [[word % 2**64 for word in row] for row in found] == wanted
    assert split_mix(1234567, 1) == 6457827717110365317, "the published first word of this seed"


def test_a_row_is_drawn_the_same_alone_and_among_others():
    everyone = normal(3, "noise", 5, torch.arange(10), 7)
    assert torch.equal(normal(3, "noise", 5, torch.tensor([8, 2]), 7), everyone[[8, 2]])
    numbers = uniform(3, "radii", 5, torch.arange(10))
    assert torch.equal(uniform(3, "radii", 5, torch.tensor([8, 2])), numbers[[8, 2]])
    assert everyone.unique().numel() > 65
    assert not torch.equal(normal(3, "noise", 6, torch.arange(10), 7), everyone)


def test_numbers_are_drawn_on_the_device_and_the_same():
    rows = torch.arange(5)
    with accelerator() as counts:
        normal(0, "noise", 0, device_tensor(rows), 1)  # the table
        counts.clear()
        for draw in (lambda r: normal(1, "noise", 2, r, 9), lambda r: uniform(1, "radii", 2, r)):
            found = draw(device_tensor(rows))
            assert torch.equal(found.raw, draw(rows))
        assert counts.waits.total() == 0


def test_normal_numbers_are_normal():
    """200,000 numbers; bounds at five standard errors."""
    x = normal(0, "noise", 0, torch.arange(200), 1000).double().flatten()
    n = len(x)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (x**power).mean() == pytest.approx(moment, abs=5 * (variance / n) ** 0.5)
    assert (x[:-1] * x[1:]).mean() == pytest.approx(0, abs=5 / n**0.5)
    assert (x[::1000] * x[1::1000]).mean() == pytest.approx(0, abs=5 / 200**0.5)
    assert 3.5 < x.abs().max() < 4.4


@pytest.mark.parametrize(("purpose", "step"), product(["noise", "radii"], [0, 1, 2**31], every=5))
def test_neither_differs_from_its_distribution_by_kolmogorov_and_smirnov(purpose, step):
    """At 200,000 numbers each; a shift by 0.02 is found."""
    drawn = normal(5, purpose, step, torch.arange(200), 1000).double().flatten().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert stats.kstest(drawn + 0.02, "norm").pvalue < 1e-4, "the test can fail"
    drawn = uniform(5, purpose, step, torch.arange(200_000)).double().numpy()
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4
    assert stats.kstest(drawn**1.02, "uniform").pvalue < 1e-4


def test_uniform_numbers_are_uniform():
    u = uniform(0, "radii", 0, torch.arange(100_000)).double()
    assert (u.min() >= 0, u.max() < 1) == (True, True)
    assert u.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / 1e5) ** 0.5)
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() == pytest.approx(99, abs=5 * (2 * 99) ** 0.5)
