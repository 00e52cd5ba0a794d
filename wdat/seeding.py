"""Randomness as a function of numbered keys, never of the process that draws it.

Every draw in training is made for the *global* batch from (seed, purpose, step); a process then takes the rows of
its own images. One process and many therefore see the same noise, and a resumed run the same as an uninterrupted one.
"""

from __future__ import annotations

import numpy as np
import torch

PURPOSES = (
    "split", "order", "augment", "noise", "subsample", "init", "pass", "dropout", "search", "radii", "pool", "strata",
    "smoothing", "limit", "test", "augment partners", "augment patches", "pass partners", "pass patches",
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
