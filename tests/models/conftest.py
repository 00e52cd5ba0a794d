"""Shared by the tests of the networks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture
def shared() -> Path:
    """The folder of real networks and images, which is no part of the project."""
    folder = Path(os.environ.get("WDAT_SHARED", Path(__file__).parents[2].parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with real networks and images (WDAT_SHARED)")
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    """Three images (3, 3, 32, 32) in [0, 1]."""
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
