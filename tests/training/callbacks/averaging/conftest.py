"""Shared by the tests of weight averaging."""

from __future__ import annotations

import pytest
from averaged import SGD


@pytest.fixture
def make(make_module):
    """`make(**settings)` is a module that moves far enough in a few steps for its average to differ."""
    return lambda **settings: make_module(**{"optimizer": SGD, **settings})
