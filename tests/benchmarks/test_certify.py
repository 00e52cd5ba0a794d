"""The benchmark of both ends: its page says what its record holds, and a run goes on from its folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.certify import BEGIN, CASES, END, brackets, page, summary, useless

ROOT = Path(__file__).parents[2]


def row(**values):
    usual = {
        "case": "net", "network": "net", "norm": "linf", "p": 2.0, "delta": 1 / 255, "certified": 0.4, "attacked": 0.5,
        "n": 10, "cpu_seconds_per_image": 1.5, "unfinished": 0,
    }  # fmt: skip
    return {**usual, **values}


def test_tables():
    record = {
        "rows": [row(), row(delta=2 / 255, certified=0.0, attacked=0.25), row(p="inf"), row(p="inf", delta=2 / 255)]
    }
    assert brackets(record, "net").splitlines() == [
        "|  | 1/255 | 2/255 |",
        "| --- | --- | --- |",
        "| W_2 | 40.0 to 50.0 (10.0) | 0.0 to 25.0 (25.0) |",
        "| W_∞ | 40.0 to 50.0 (10.0) | 40.0 to 50.0 (10.0) |",
    ]
    assert useless(record).endswith("for net: W_2 at 2/255.")
    assert summary(record).splitlines()[-1] == "| net | 10 | 1.50 | 0 |"


def test_the_randomised_classifier_is_never_in_the_networks_bracket():
    record = {"rows": [row(), row(network="net, randomised, σ = 0.12", norm="l2", delta=0.1, attacked=None, case="r")]}
    assert "to" not in brackets(record, "r").splitlines()[-1]
    assert brackets(record, "r").splitlines()[-1] == "| W_2, randomised, σ = 0.12 | ≥ 40.0 |"


def test_the_page_says_what_the_record_holds():
    file = ROOT / "results" / "certify.json"
    if not file.exists():
        pytest.skip("no record of this benchmark is committed")
    text = (ROOT / "docs" / "certify.md").read_text(encoding="utf-8")
    assert page(text, json.loads(file.read_text())) == text


def test_what_is_between_the_marks_is_replaced():
    once = page(f"before {BEGIN} old {END} after", {"rows": [row()]})
    assert "old" not in once
    assert once.startswith("before")
    assert once.endswith(" after")
    assert page(once, {"rows": [row()]}) == once


def test_lower_ends_are_below_upper_ends():
    file = ROOT / "results" / "certify.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for found in rows:
        assert found["case"] in CASES
        assert found["attacked"] is None or found["certified"] <= found["attacked"]


@pytest.mark.long
def test_a_run_and_its_continuation(shared, tmp_path):
    command = [sys.executable, "-m", "benchmarks.certify", "--only", "cnn_a", "--images", "3", "--folder"]
    command += [str(tmp_path / "kept"), "--output", str(tmp_path / "record.json")]
    environment = {**os.environ, "WDAT_SHARED": str(shared)}
    found = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "record.json").read_text())["rows"])
    assert found[0] == found[1]
    assert len(found[0]) == 16
    assert {r["p"] for r in found[0]} == {1.0, 2.0, 4.0, "inf"}
    assert all(r["certified"] <= r["attacked"] and math.isfinite(r["cpu_seconds_per_image"]) for r in found[0])
