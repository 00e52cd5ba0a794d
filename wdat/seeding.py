"""Randomness as a function of numbered keys, never of the process that draws it.

Every draw in training is made for the *global* batch from (seed, purpose, step); a process then takes the rows of
its own images, or draws these alone where they are needed (`uniform` and `normal`). One process and many therefore
see the same noise, and a resumed run the same as an uninterrupted one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

PURPOSES = (
    "split", "order", "augment", "noise", "subsample", "init", "pass", "dropout", "search", "radii", "pool", "strata",
    "smoothing", "limit", "test",
)  # fmt: skip


def generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A CPU generator for one purpose and one position in the run.

    Args:
        seed: The seed of the run, 0 included.
        purpose: One of `PURPOSES`; different purposes never share a stream.
        keys: Further non-negative numbers, such as the epoch or the step.

    Returns:
        A freshly seeded `torch.Generator`; equal arguments give equal streams.
    """
    key = (PURPOSES.index(purpose), *keys)  # apart from the seed, so that no seed reads as a purpose
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


LEVELS = 2**16  # of a normal number
_INCREMENT, _FACTORS, _MASK = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), 2**64 - 1


def words(key: int, rows: Tensor, width: int) -> Tensor:
    """Random 64-bit words as a function of a key and a place, drawn where `rows` is, and the same on any device.

    They are SplitMix64's (Steele et al. 2014), whose n-th word needs no earlier one.

    Args:
        key: 64 bits, such as the initial seed of a `generator`.
        rows: (B,), int64: row r has the words r·width to (r + 1)·width.
        width: Words in a row.

    Returns:
        (B, width), int64.
    """
    place = rows[:, None] * width + torch.arange(1, width + 1, device=rows.device)
    z = place.mul_(_signed(_INCREMENT)).add_(_signed(key))
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    return z.bitwise_xor_(_shifted(z, 31))


def uniform(seed: int, purpose: str, step: int, rows: Tensor) -> Tensor:
    """A number in [0, 1) for each row (B,), float32, a multiple of 2^-24; where `rows` is."""
    return _shifted(words(_key(seed, purpose, step), rows, 1).squeeze(1), 40).float() * 2.0**-24


def normal(seed: int, purpose: str, step: int, rows: Tensor, count: int) -> Tensor:
    """Standard normal numbers (B, count), float32, `count` for each row (B,); where `rows` is.

    Each is one of the `LEVELS` quantiles of the distribution, all equally likely, from a table: so they are the same on
    any device, which functions such as the logarithm aren't.
    """
    quarters = words(_key(seed, purpose, step), rows, -(-count // 4)).view(torch.uint16)[:, :count]
    level = quarters.int()
    return _quantiles(rows.device).index_select(0, level.flatten()).view(level.shape)


def _key(seed: int, purpose: str, step: int) -> int:
    return generator(seed, purpose, step).initial_seed()


def _signed(word: int) -> int:
    """The same 64 bits as an int64."""
    word &= _MASK
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, where int64 would bring in the sign."""
    return (words >> bits).bitwise_and_(2 ** (64 - bits) - 1)


@cache
def _quantiles(device: torch.device) -> Tensor:
    middle = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    found: Tensor = torch.special.ndtri(middle).float().to(device)
    return found
