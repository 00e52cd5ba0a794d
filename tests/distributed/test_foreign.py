"""The callback in a LightningModule of someone else, with Lightning's own sampler, which repeats images."""

from __future__ import annotations

from pathlib import Path

import pytest

FOREIGN = Path(__file__).with_name("foreign.py")


@pytest.mark.long
def test_two_processes_log_what_one_does(results, weights, tmp_path):
    (alone,) = results(FOREIGN, weights, tmp_path / "alone.json", world=1)
    first, second = results(FOREIGN, weights, tmp_path / "both.json", world=2)
    assert first == second
    assert alone["n"] == first["n"] == 61, "the repeated image is counted once"
    assert 0 < alone["val/acc_knapsack"] <= alone["val/acc_wpgd"] < alone["val/acc_clean"]
    loss = "val/loss"  # Lightning's own, of all 62
    assert {k: v for k, v in first.items() if k != loss} == pytest.approx(
        {k: v for k, v in alone.items() if k != loss}, rel=1e-6
    )
