"""Shared by all tests: the folder of real networks, and processes simulated by threads."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from wdat.distributed import Processes

hypothesis.settings.register_profile("wdat", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("wdat")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `zoo` or `long`, unless -m speaks of it: each takes minutes."""
    quiet = [mark for mark in ("zoo", "long") if mark not in config.option.markexpr]
    if quiet:
        left = [item for item in items if any(item.get_closest_marker(mark) for mark in quiet)]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True, scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is written into the user's own files."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real networks and images, which is no part of the project."""
    folder = Path(os.environ.get("WDAT_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with real networks and images (WDAT_SHARED)")
    return folder


class Threads(Processes):
    """One of several threads that stand for processes; each reduction is a meeting of all of them."""

    def __init__(self, rank: int, world_size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._slots, self._barrier = rank, world_size, slots, barrier

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(20)
        values = list(self._slots)
        self._barrier.wait(20)
        return values

    def sum(self, values: Any) -> list[float]:
        parts = self._exchange(("sum", list(values)))
        assert {(kind, len(part)) for kind, part in parts} == {("sum", len(parts[0][1]))}, "calls out of step"
        return [math.fsum(column) for column in zip(*(part for _, part in parts), strict=True)]

    def max(self, value: float) -> float:
        parts = self._exchange(("max", value))
        assert {kind for kind, _ in parts} == {"max"}, "calls out of step"
        return max(part for _, part in parts)

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat(self._exchange(values))


@pytest.fixture
def together() -> Callable[..., list[Any]]:
    """`together(world_size, function)` runs `function(processes)` on each simulated process; results by rank."""

    def run(world_size: int, function: Callable[[Processes], Any]) -> list[Any]:
        barrier, slots = threading.Barrier(world_size), [None] * world_size

        def one(rank: int) -> Any:
            try:
                return function(Threads(rank, world_size, slots, barrier))
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(one, range(world_size)))

    return run
