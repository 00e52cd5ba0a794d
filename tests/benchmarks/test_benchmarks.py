"""The benchmarks run, and the pages show what their records say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import masked, near_ties, summary
from wdat.errors import SettingError

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_tables_of_the_pages_are_made_from_the_records(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["summary", str(ROOT / "results")])
    summary.main()
    pages = {"loading a batch": "synthetic.md", "| fault |": "devices.md"}
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 6
    for table in tables:
        page = next((page for words, page in pages.items() if words in table), "cost.md")
        assert table in (ROOT / "docs" / page).read_text()


def test_the_page_on_the_method_quotes_the_record_of_near_ties():
    rows = json.loads((ROOT / "results" / "near_ties.json").read_text())["rows"]
    (row,) = [row for row in rows if (row["loss"], row["norm"]) == ("redlr", "linf")]
    said = " ".join((ROOT / "docs" / "method.md").read_text().split())
    assert f"budget of {row['n']} images" in said
    assert f"one near tie takes {100 * row['share']:.0f} %, with a radius of {row['radius']:.0f} δ" in said
    for row in rows:
        assert row["radius"] ** 2 / row["n"] == pytest.approx(row["share"], rel=1e-4)
        assert row["gap"] < 0.1 * row["median_gap"], "a near tie"


def test_the_benchmark_of_near_ties_gives_its_record(shared, tmp_path, monkeypatch):
    record = tmp_path / "near_ties.json"
    given = {"--checkpoint": shared / "models/resnet2b.pt", "--data": shared / "data/cifar10_subset.npz"}
    given["--output"] = record
    monkeypatch.setattr(sys, "argv", ["near_ties", *(str(word) for pair in given.items() for word in pair)])
    near_ties.main()
    found, committed = (json.loads(file.read_text())["rows"] for file in (record, ROOT / "results" / "near_ties.json"))
    assert [row.keys() for row in found] == [row.keys() for row in committed]
    for one, other in zip(found, committed, strict=True):
        assert one == {k: v if isinstance(v, (str, int)) else pytest.approx(v, rel=1e-3) for k, v in other.items()}


def test_the_page_on_evaluation_shows_the_record_of_masked_networks():
    record = json.loads((ROOT / "results" / "masked.json").read_text())
    page = (ROOT / "docs" / "evaluate.md").read_text()
    assert masked.markdown(record["rows"]) in page
    for row in record["rows"]:
        left = row["accuracy"]
        for effort, said in row["warned"].items():
            missed = left[effort] > left["autoattack"] + 0.5 / row["n"]
            assert missed <= bool(said), "figures that are too high are never shown in silence"


@pytest.mark.long
def test_the_benchmark_of_masked_networks(shared, tmp_path):
    record = tmp_path / "masked.json"
    given = ["--checkpoint", shared / "models/resnet2b.pt", "--data", shared / "data/cifar10_subset.npz"]
    run("masked", *given, "--images", 2, "--masks", "input rounded to 8 bits", "--output", record)
    (row,) = json.loads(record.read_text())["rows"]
    assert row["accuracy"]["quick"] == row["accuracy"]["clean"]
    assert set(row["accuracy"]) == {"clean", "quick", "default", "thorough", "autoattack"}


@pytest.mark.long
def test_the_step_benchmark(tmp_path):
    record = tmp_path / "step.json"
    few = ["--batch-size", 8, "--inner-steps", 2, "--batches", 2, "--rounds", 2]
    out = run(
        "step", "--random", "--network", "small_cnn", *few, "--grow-batch", 4, "--grow-steps", 1, "--output", record
    )
    for word in ("ratio of the time of a step", "growth", "GFLOP a step", "the whole loop", "record"):
        assert word in out
    found = json.loads(record.read_text())
    assert [row["norm"] for row in found["rows"]] == ["linf", "l2"]
    for row in found["rows"]:
        assert set(row["ratios"]) >= {"wdat, ce / trades", "wdat, redlr / trades, as usual"}
        assert all(v["min"] <= v["median"] <= v["max"] for v in row["ratios"].values())
        assert row["zero_radii"]["wdat, ce"] == 0
        assert row["zero_radii"]["wdat, redlr"] > 0.5, "fresh weights misclassify most images"
    assert found["loop"]["seconds"]["min"] > 0
    assert found["loop"]["ratio"] > 0.5
    assert found["flops"]["trades, as usual"] > found["flops"]["trades"] > found["flops"]["wdat, ce"]


@pytest.mark.long
def test_the_upsilon_benchmark(shared, tmp_path):
    record = tmp_path / "upsilon.json"
    run(
        "upsilon", "--checkpoint", shared / "models/resnet2b.pt", "--data", shared / "data/cifar10_subset.npz",
        "--rates", 0.003, "--norms", "linf", "--losses", "ce", "--steps", 24, "--images", 512, "--batch-size", 64,
        "--every", 4, "--draws", 1, "--growth-rounds", 5, "--output", record,
    )  # fmt: skip
    found = json.loads(record.read_text())
    errors = {row["estimator"]: row["upsilon"] for row in found["rows"]}
    assert set(errors) == {"table", "uncorrected table", "subsample", "ema", "batch"}
    assert errors["table"]["median"] < errors["batch"]["median"]
    assert 0 < found["rows"][0]["share_of_step"] < 0.1
    assert record.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.long
def test_the_pool_benchmark(shared, tmp_path):
    record = tmp_path / "pool.json"
    few = ["--count", 3_000_000, "--against", 5000, "--real", 1, "--rounds", 2, "--loads", 2, "--batches", 20]
    out = run(
        "pool", "--checkpoint", shared / "models/resnet2b.pt", "--data", shared / "data/cifar10_subset.npz",
        "--images", 512, "--batch-size", 16, "--inner-steps", 2, *few, "--folder", tmp_path, "--output", record,
    )  # fmt: skip
    assert "resident memory" in out
    assert [f.name for f in tmp_path.iterdir()] == ["pool.json"], "the pools are gone"
    found = json.loads(record.read_text())
    row = found["row"]
    assert row["gigabytes"] > 9 > 1 > row["gigabytes_on_disk"]
    assert len(row["memory"]) == 11
    assert all(100 < point["resident_mb"] < 3000 for point in row["memory"])
    for kind in ("loading", "step"):
        assert set(row[kind]) == {"clock", "processor"}
        assert all(0.1 < found["ratio"]["median"] < 10 for found in row[kind].values())
    assert found["disk"]["rows"] == 11
    assert all(times["min"] > 0 for times in found["disk"]["milliseconds"].values())


def test_missing_images_are_named(tmp_path, monkeypatch):
    given = ["--data", tmp_path / "no.npz", "--output", tmp_path / "record.json", "--network", "small_cnn"]
    monkeypatch.setattr(sys, "argv", ["near_ties", *map(str, given)])
    with pytest.raises(SettingError, match="--data="):
        near_ties.main()
    assert not (tmp_path / "record.json").exists()
