"""A sample of a test's cases for `make test`; `make test-long` runs them all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], every: int) -> list[Any]:
    """The cases of a test, of which all but each so many-th are long."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*case, marks=pytest.mark.long if i % every else ()) for i, case in enumerate(cases)]


def product(*axes: Iterable[Any], every: int) -> list[Any]:
    """Each value of one axis with each of the others, sampled; with an odd number all values of short axes come up."""
    return sampled(itertools.product(*axes), every)
