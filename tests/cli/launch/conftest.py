"""Shared by the tests of several processes: the environment."""

from __future__ import annotations

import os

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from starters import TORCHRUN


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """`place(**variables)`: the environment of a process, which is nobody's at first and as it was at last."""
    old = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC", "SUBMITIT", "SLURM")) or name in (
            *TORCHRUN,
            "NODE_RANK",
            "WDAT_STARTED_BY",
        ):
            del os.environ[name]
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    yield os.environ.update
    os.environ.clear()
    os.environ.update(old)
