"""One table of many runs: means and deviations over seeds, paired changes, and what isn't a record."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest

from wdat.cli.collect import table
from wdat.errors import SettingError
from wdat.records import Record, write
from wdat.reporting.runs import find

BASE = Record(
    stage="before", network="net", checkpoint="", data="digits", split="test", attack="wpgd", options={}, loss="ce",
    p=2.0, norm="linf", delta=8 / 255, n=100, set_size=100, accuracy=0.5, accuracy_low=0.4, accuracy_high=0.6,
    loss_mean=1.0, distance=0.03, seconds=1.0, seed=0, device="cpu", commit=None, versions={},
)  # fmt: skip


def runs(before, after):
    made = [replace(BASE, seed=s, accuracy=a) for s, a in before.items()]
    return made + [replace(BASE, stage="after", seed=s, accuracy=a) for s, a in after.items()]


def cells(text):
    """Header and rows as lists of cells; every line has the same number of them."""
    lines = [[c.strip() for c in line.strip().strip("|").split("|")] for line in text.splitlines()]
    assert all(line.startswith("| ") and line.endswith(" |") for line in text.splitlines())
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"---"}
    return lines[0], lines[2:]


def test_mean_and_deviation_over_seeds_and_the_paired_change():
    before, after = {0: 0.50, 1: 0.52, 2: 0.57}, {0: 0.61, 1: 0.60, 2: 0.70}
    head, rows = cells(table(runs(before, after)))
    assert head == ["network", "data", "attack", "budget", "n", "seeds", "before", "after", "change"]
    changes = [100 * (after[s] - before[s]) for s in range(3)]
    wanted = ["net", "digits test", "wpgd ce, W_2", "linf 8/255", "100", "0, 1, 2"]
    wanted += [f"{100 * statistics.mean(v.values()):.2f} ± {100 * statistics.stdev(v.values()):.2f}"
               for v in (before, after)]  # fmt: skip
    assert rows == [[*wanted, f"+{statistics.mean(changes):.2f} ± {statistics.stdev(changes):.2f}"]]
    assert rows[0][6:] == ["53.00 ± 3.61", "63.67 ± 5.51", "+10.67 ± 2.52"]


def test_one_seed_has_no_deviation():
    assert cells(table(runs({0: 0.5}, {0: 0.4})))[1][0][5:] == ["0", "50.00", "40.00", "-10.00"]


def test_the_change_is_of_seeds_that_have_both():
    row = cells(table(runs({0: 0.5, 1: 0.1}, {0: 0.6, 2: 0.9})))[1][0]
    assert row[5:] == ["0, 1, 2", "30.00 ± 28.28 (n = 2)", "75.00 ± 21.21 (n = 2)", "+10.00"]
    assert cells(table(runs({0: 0.5}, {1: 0.6})))[1][0][-1] == "–"


def test_evaluations_have_their_column_and_no_change():
    head, rows = cells(table([replace(BASE, stage="evaluate")]))
    assert head[6:] == ["evaluate", "change"]
    assert rows[0][6:] == ["50.00", "–"]


def test_epochs_are_left_out():
    assert cells(table([BASE, replace(BASE, stage="epoch", split="val", epoch=1)]))[1][0][6:] == ["50.00", "–"]
    assert len(cells(table([BASE, replace(BASE, stage="epoch", split="val", epoch=1)]))[1]) == 1


@pytest.mark.parametrize(
    "change",
    [{"network": "b"}, {"data": "b"}, {"split": "val"}, {"attack": "pgd"}, {"loss": "redlr"}, {"p": math.inf},
     {"norm": "l2"}, {"delta": 0.1}],
)  # fmt: skip
def test_what_makes_a_row(change):
    rows = cells(table([BASE, replace(BASE, **change)]))[1]
    assert len(rows) == 2
    assert rows[0] != rows[1]


def test_names_of_clean_and_pointwise_rows():
    rows = cells(table([replace(BASE, attack="none", delta=0.0), replace(BASE, attack="pgd", p=math.inf)]))[1]
    assert [row[2:4] for row in rows] == [["clean (ce)", "linf"], ["pgd ce, W_inf", "linf 8/255"]]


def test_the_latest_of_equal_records_counts():
    assert cells(table([BASE, replace(BASE, accuracy=0.9)]))[1][0][6] == "90.00"


def test_different_options_are_not_one_measurement():
    """Ten and a hundred steps of one seed: neither may silently stand for the other."""
    records = [replace(BASE, options={"steps": 10}), replace(BASE, options={"steps": 100}, accuracy=0.4)]
    rows = cells(table(records))[1]
    assert len(rows) == 2
    assert rows[0][2] != rows[1][2]


def test_seeds_among_the_options_and_batch_sizes_are_one_measurement():
    records = [replace(BASE, seed=s, options={"steps": 9, "seed": s, "batch_size": 64 + s}) for s in range(3)]
    assert [row[5] for row in cells(table(records))[1]] == ["0, 1, 2"]


def test_finding_records_below_folders(tmp_path):
    write(tmp_path / "a" / "0" / "records.json", [BASE])
    write(tmp_path / "a" / "1" / "records.json", [replace(BASE, seed=1)])
    write(tmp_path / "b.json", [replace(BASE, seed=2)])
    assert [run.seeds for run in find([tmp_path / "a", tmp_path / "b.json"])] == [[0], [1], [2]]


def test_other_json_files_below_a_folder_are_no_records(tmp_path):
    write(tmp_path / "run" / "records.json", [BASE])
    (tmp_path / "run" / "wandb").mkdir()
    (tmp_path / "run" / "wandb" / "wandb-summary.json").write_text(json.dumps({"train/loss": 1.0}))
    assert [run.records for run in find([tmp_path / "run"])] == [(BASE,)]


def test_a_file_that_is_named_must_hold_records(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SettingError, match=r"a\.json isn't a list of records"):
        find([tmp_path / "a.json"])


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_records_is_named(tmp_path, make):
    place = tmp_path / "empty"
    if make:
        place.mkdir()
    with pytest.raises(SettingError, match="empty holds no records"):
        find([place])


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    write(tmp_path / "run" / "records.json", [BASE])

    def collect(*places):
        command = [sys.executable, "-m", "wdat.cli.collect", *map(str, places)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)

    good = collect(tmp_path / "run")
    assert good.returncode == 0
    grid, _, below = good.stdout.partition("\n\n")
    assert cells(grid)[1][0][6] == "50.00"
    assert below.startswith("- Accuracy in percent: mean ± standard deviation over seeds")
    for bad in (collect(), collect(tmp_path / "none"), collect(tmp_path, "--baseline", "x")):
        assert bad.returncode == 2
        assert "error:" in bad.stderr
        assert "Traceback" not in bad.stderr
