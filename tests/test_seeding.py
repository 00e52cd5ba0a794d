"""Streams are functions of their keys alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from wdat.seeding import PURPOSES, generator


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
