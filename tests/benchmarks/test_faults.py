"""One case of each fault that has no test of its own; the campaign has many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_nothing_is_lost_beyond_the_last_checkpoint(tmp_path):
    record = tmp_path / "faults.json"
    counts = ["--kills=1", "--damages=1", "--nans=1", "--disks=0", "--deaths=0"]  # tests of their own hold the others
    command = [sys.executable, "-m", "benchmarks.faults", *counts, "--output", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = {case["kind"]: case for case in json.loads(record.read_text())["cases"]}
    assert set(cases) == {"kill -9", "damaged checkpoint", "NaN batch"}
    for case in cases.values():
        assert case["equal"], case
        assert not case["hung"], case
    assert cases["damaged checkpoint"]["status"] == 143
    assert "resume=" in cases["damaged checkpoint"]["said"]
    assert cases["NaN batch"]["status"] == 1
    assert "is not finite" in cases["NaN batch"]["said"]
