"""The comparison with public attacks: its record holds what is claimed, and table and figure are made from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.minimum_norm import EFFORTS, above, main

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "results" / "minimum_norm.json"
PASSES = {("quick", "linf"): 30, ("quick", "l2"): 30, ("default", "linf"): 110, ("default", "l2"): 320}
ABOVE = {"quick": 0.9, "thorough": 0.05}  # points above the per-image best of the public attacks


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.minimum_norm", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_record_holds_what_is_claimed():
    rows = above(json.loads(RECORD.read_text()))
    ours = [row for row in rows if row["library"] == "wdat"]
    assert {(r["network"], r["norm"], r["attack"]) for r in ours} == {
        (network, norm, effort) for network in ("resnet2b", "cnn_a") for norm in ("linf", "l2") for effort in EFFORTS
    }
    for row in ours:
        case = (row["network"], row["norm"], row["attack"])
        assert row["n"] == 846
        assert row["passes"] <= PASSES.get(case[2:] + case[1:2], float("inf")), case
        assert row["above"] <= ABOVE.get(row["attack"], 0.2), case
        others = [r["accuracy"] for r in ours if (r["network"], r["norm"], r["attack"]) == case]
        assert 100 * (max(others) - min(others)) <= 0.1, "seeds agree"
        public = [r for r in rows if (r["network"], r["norm"]) == case[:2] and r["library"] != "wdat"]
        assert len(public) >= 5
        if row["attack"] != "quick":
            assert row["accuracy"] < min(r["accuracy"] for r in public), "ahead of every single public attack"


def test_table_and_figure_are_made_from_the_record(tmp_path, monkeypatch, capsys):
    shutil.copy(RECORD, tmp_path / "a.json")
    monkeypatch.setattr(sys, "argv", ["minimum_norm", "--show", "--output", str(tmp_path / "a.json")])
    main()
    out = capsys.readouterr().out
    for word in ("resnet2b", "cnn_a", "thorough", "adv-lib", "n = 846"):
        assert word in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "a.json").read_bytes() == RECORD.read_bytes()


@pytest.mark.long
def test_a_stopped_benchmark_goes_on(shared, tmp_path):
    pytest.importorskip("adv_lib.attacks", reason="pip install --no-build-isolation -e '.[benchmarks]'")
    few = ["--images", 6, "--networks", "cnn_a", "--norms", "linf", "--seeds", 0, "--output", tmp_path / "a.json"]
    few += ["--data", shared / "data/cifar10_subset.npz", "--models", shared / "models"]
    assert "quick:" in run(*few, "--only", "quick")
    first = json.loads((tmp_path / "a.json").read_text())["rows"]
    out = run(*few, "--only", "quick", "FMN 100")
    assert "quick:" not in out
    assert "FMN 100:" in out
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["rows"][:1] == first
    assert len(record["best"]["cnn_a linf 6"]) == 6
