"""One table of many runs: means and deviations over seeds, paired changes, and what isn't a record."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from wdat.cli.collect import filters_of, main, table
from wdat.cli.console import readable_errors
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
    lines = [[c.strip().strip("*") for c in line.strip().strip("|").split("|")] for line in text.splitlines()]
    assert all(line.startswith("| ") and line.endswith(" |") for line in text.splitlines())
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) <= {"---", "---:"}
    return lines[0], lines[2:]


def test_mean_and_interval_over_seeds_and_the_paired_change():
    before, after = {0: 0.50, 1: 0.52, 2: 0.57}, {0: 0.61, 1: 0.60, 2: 0.70}
    head, rows = cells(table(runs(before, after)))
    assert head == ["attack", "before", "after", "change"]
    assert rows == [["W-PGD (CE)", "53.00 [44.0, 62.0]", "63.67 [50.0, 77.3]", "+10.67 [+4.4, +16.9]"]]


def test_one_seed_has_the_interval_over_images():
    assert cells(table(runs({0: 0.5}, {0: 0.45})))[1] == [
        ["W-PGD (CE)", "50.00 [40.0, 60.0]", "45.00 [40.0, 60.0]", "-5.00"]
    ]


def test_the_change_is_of_seeds_that_have_both():
    (row,) = cells(table(runs({0: 0.5, 1: 0.1}, {0: 0.6, 2: 0.9})))[1]
    assert row[1].startswith("30.00 [0.0, 100.0] (2 seeds)")
    assert row[3] == "+10.00"
    assert "change" not in cells(table(runs({0: 0.5}, {1: 0.6})))[0]


def test_evaluations_have_their_column_and_no_change():
    assert cells(table([replace(BASE, stage="evaluate")]))[0] == ["attack", "evaluate"]


def test_epochs_are_left_out():
    assert cells(table([BASE, replace(BASE, stage="epoch", split="val", epoch=1)])) == cells(table([BASE]))


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
    assert [row[:3] for row in rows] == [["clean", "", ""], ["PGD (CE)", "pointwise", "8/255"]]


def test_clean_accuracy_is_one_row_whatever_the_loss():
    clean = replace(BASE, attack="none", delta=0.0)
    assert len(cells(table([clean, replace(clean, loss="redlr"), BASE]))[1]) == 2


def test_the_latest_of_equal_records_counts():
    assert cells(table([BASE, replace(BASE, accuracy=0.9)]))[1][0][1].startswith("90.00")


def test_different_options_are_not_one_measurement():
    """Ten and a hundred steps of one seed: neither may silently stand for the other."""
    records = [replace(BASE, options={"steps": 10}), replace(BASE, options={"steps": 100}, accuracy=0.4)]
    head, rows = cells(table(records))
    assert [row[head.index("settings")] for row in rows] == ["steps=10", "steps=100"]


def test_seeds_among_the_options_and_batch_sizes_are_one_measurement():
    records = [replace(BASE, seed=s, options={"steps": 9, "seed": s, "batch_size": 64 + s}) for s in range(3)]
    assert len(cells(table(records))[1]) == 1


def test_what_has_an_equals_sign_and_is_no_path_is_a_filter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    paths, filters = filters_of(["lr=0.1", "runs", "attack=pgd,wpgd", "delta=2/255"])
    assert ([str(path) for path in paths], filters) == (
        ["lr=0.1", "runs"],
        {"attack": ["pgd", "wpgd"], "delta": ["2/255"]},
    )
    for wrong in (["attack=pgd"], ["runs", "attack="], ["runs", "=x"]):
        with pytest.raises(SettingError):
            filters_of(wrong)


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


def test_from_the_command_line(tmp_path, capsys):
    write(tmp_path / "run" / "records.json", [BASE])
    main([str(tmp_path / "run")])
    title, grid, below = capsys.readouterr().out.split("\n\n")
    assert title == "net, digits test, 100 images, seed 0, W₂, 8/255, linf"
    assert cells(grid)[1] == [["W-PGD (CE)", "50.00 [40.0, 60.0]"]]
    assert below.startswith("- Accuracy in percent with its 95 % bootstrap interval over images.")
    main([str(tmp_path / "run"), "attack=wpgd", "--format", "rich"])
    assert "50.00 [40.0, 60.0]" in capsys.readouterr().out
    for bad in ([str(tmp_path / "none")], [str(tmp_path), "--baseline", "x"], [str(tmp_path), "attack=x"]):
        with pytest.raises(SystemExit) as left, readable_errors():
            main(bad)
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.long
def test_the_module_is_a_program(tmp_path):
    command = [sys.executable, "-m", "wdat.cli.collect", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
