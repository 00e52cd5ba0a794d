"""The tables of the frontier study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import frontier_table
from benchmarks.frontier import ARMS, METHODS
from wdat.attacks.knapsack_allocation import solve
from wdat.errors import SettingError
from wdat.threat import ThreatModel

DELTA = 2 / 255
ROOT = Path(__file__).parents[2]


def distances(seed, scale=1.0, clean=0.7, n=400):
    rng = np.random.default_rng(seed)
    found = scale * DELTA * rng.gamma(2.0, size=n)
    found[rng.random(n) > clean] = 0
    found[:3] = np.inf
    return found


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("delta", [0.1 * DELTA, DELTA, 50 * DELTA])
def test_the_knapsack_is_that_of_the_package(p, delta):
    d = distances(0)
    assert frontier_table.knapsack(d, p, delta) == pytest.approx(
        solve(torch.from_numpy(d), ThreatModel(p, "linf", delta)).accuracy, abs=1e-12
    )


def test_a_frontier_is_a_broken_line_that_goes_on():
    line = [(60.0, 30.0), (70.0, 20.0), (64.0, 29.0)]
    found = [frontier_table.at(clean, line) for clean in (60, 62, 64, 67, 70, 72, 58)]
    assert found == pytest.approx([30, 29.5, 29, 24.5, 20, 17, 30.5])


def test_an_arm_is_compared_with_the_best_frontier_at_its_own_clean_accuracy():
    arm = {"clean": 65.0, "w2": 31.0, "w2_2": 12.0}
    low = [{"clean": 60.0, "w2": 30.0, "w2_2": 14.0}, {"clean": 70.0, "w2": 28.0, "w2_2": 8.0}]
    high = [{"clean": 60.0, "w2": 32.0, "w2_2": 10.0}, {"clean": 70.0, "w2": 28.0, "w2_2": 6.0}]
    assert frontier_table.gains(arm, [low, high]) == pytest.approx([31 - 30, 12 - 11])


def write(out, network, arm, seed, d):
    place = out / network / arm / f"seed{seed}"
    (place / "test").mkdir(parents=True)
    np.savez(place / "test/distances_linf.npz", distances=d, labels=np.zeros(len(d), dtype=np.int64))
    about = {"settings": ARMS[arm].settings, "passes_an_epoch": ARMS[arm].passes, "epochs": 5}
    (place / "arm.json").write_text(json.dumps(about))


def test_rows_gains_and_the_picture(tmp_path):
    out = tmp_path / "out"
    for seed in (0, 1):
        write(out, "resnet2b", "pgd_at-1", seed, distances(seed, clean=0.8))
        write(out, "resnet2b", "pgd_at-2", seed, distances(seed, scale=1.2, clean=0.6))
        write(out, "resnet2b", "mart-1.5", seed, distances(seed, scale=1.6, clean=0.7))
    write(out, "resnet2b", "udr-2", 0, distances(0, clean=0.95))
    found = {f"{r['method']}-{r['strength']:g}": r for r in frontier_table.rows(out)}
    assert {name: r["seeds"] for name, r in found.items()} == {
        "pgd_at-1": [0, 1], "pgd_at-2": [0, 1], "mart-1.5": [0, 1], "udr-2": [0]
    }  # fmt: skip
    gain = found["mart-1.5"]["gain"]
    assert gain["seeds"] == [0, 1]
    assert np.mean([seed["w2"] for seed in gain["by_seed"]]) == pytest.approx(gain["w2"]["mean"], abs=1e-3)
    assert 0 < gain["w2"]["low"] < gain["w2"]["mean"] < gain["w2"]["high"]
    assert found["pgd_at-1"]["gain"] is None, "it is of the reference"
    assert found["udr-2"]["gain"] is None, "no arm of the reference is as accurate"
    rows = list(found.values())
    text = frontier_table.table(rows, "resnet2b")
    assert text.count("\n") == 1 + len(rows)
    assert METHODS["mart"].says in text
    frontier_table.picture(rows, list(METHODS), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_nothing_finished_is_said(tmp_path):
    with pytest.raises(SettingError, match=r"python -m benchmarks\.frontier first"):
        frontier_table.rows(tmp_path)


@pytest.mark.parametrize("name", ["frontier", "frontier_48k", "frontier_20_epochs"])
def test_the_committed_records_make_the_tables_of_the_page(name):
    record = json.loads((ROOT / f"results/{name}.json").read_text())
    page = (ROOT / "docs/case-study.md").read_text()
    for network in {row["network"] for row in record["rows"]}:
        assert frontier_table.table(record["rows"], network) in page
    for row in record["rows"]:
        assert row["passes_an_epoch"] * row["epochs"] == record["passes"], "at equal cost"
        for seed in row["by_seed"].values():
            assert seed["w1"] <= seed["w2"] <= seed["w4"] <= seed["clean"]
            assert seed["w2_2"] <= seed["w2"]
