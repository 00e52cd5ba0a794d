"""Shared by the tests with real processes: what they run, on small images with a network that has learnt a little."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from process_runner import run_together
from small_problems import small_digits, small_network
from torch import nn


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., list[SimpleNamespace]]:
    """`launch(script, *arguments, world=2)` runs a script in each of several processes; status, out and err of each."""
    return partial(run_together, tmp_path)


@pytest.fixture
def results(launch: Callable[..., list[SimpleNamespace]]) -> Callable[..., list[Any]]:
    """`results(script, *arguments, world=2)`: what each process printed, as JSON; all must have ended well."""

    def run(*arguments: object, **options: Any) -> list[Any]:
        found = launch(*arguments, **options)
        assert [process.status for process in found] == [0] * len(found), [process.err[-3000:] for process in found]
        return [json.loads(process.out) for process in found]

    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of small digits: 952 to train on, 845 (an odd number) to test."""
    x, y = (tensor.numpy() for tensor in small_digits())
    file = tmp_path_factory.mktemp("images") / "digits.npz"
    np.savez(file, x_train=x[845:], y_train=y[845:], x_test=x[:845], y_test=y[:845])
    return file


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of other small digits, by its own file."""
    x, y = (tensor.numpy() for tensor in small_digits())
    file = tmp_path_factory.mktemp("pool") / "pool.npz"
    np.savez(file, image=255 - x[:300], label=y[:300])
    return file


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of `networks.small_network` that have learnt the digits, but not too well."""
    x, y = small_digits()
    x = x[845:].permute(0, 3, 1, 2).double() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = small_network()
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for step in range(60):
            rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[845:][rows]).backward()
            optimizer.step()
    file = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(network.state_dict(), file)
    return file
