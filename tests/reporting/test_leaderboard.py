"""The leaderboard: which figures become ends, what a submission is."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from wdat.cli import collect
from wdat.errors import SettingError
from wdat.records import Record, read, write
from wdat.reporting.leaderboard import entries, page, submission, table
from wdat.reporting.runs import Run

CLEAN = Record(
    stage="evaluate", network="net", checkpoint="weights/net_adv.pt", data="cifar10", split="test", attack="none",
    options={}, loss="ce", p=2.0, norm="linf", delta=0.0, n=100, set_size=100, accuracy=0.9, accuracy_low=0.8,
    accuracy_high=0.95, loss_mean=0.1, distance=0.0, seconds=0.1, seed=0, device="cpu", weights="a1",
)  # fmt: skip


def under(attack, p, accuracy, **changed):
    return replace(CLEAN, attack=attack, p=p, accuracy=accuracy, delta=8 / 255, loss="0-1", **changed)


MINE = (
    CLEAN, under("pgd", inf, 0.6), under("autoattack", inf, 0.55), under("wpgd", 2.0, 0.5), under("knapsack", 2.0, 0.4),
    under("certified", 2.0, 0.3, details={"bound": "lower"}), under("knapsack", 1.0, 0.2),
    under("certified", inf, 0.5, details={"bound": "lower"}), under("wpgd", 2.0, 0.1, split="val"),
    under("wpgd", 2.0, 0.1, stage="epoch", epoch=3),
)  # fmt: skip


def run(records=MINE, command="python evaluate.py", path="run/records.json"):
    return Run(Path(path), tuple(records), command, None, "")


def test_ends_are_the_best_known():
    (row,) = table(entries([run()])).cells.to_dict("records")
    assert row["network"] == "net, net_adv"
    assert (row["clean"], row["AutoAttack"]) == ("90.0", "55.0")
    assert (row["W∞"], row["W₂"], row["W₁"]) == ("[50.0, 55.0]", "[30.0, 40.0]", "≤ 20.0")


def test_weights_and_budgets_have_rows_of_their_own_the_best_first():
    better = [replace(r, weights="b2", checkpoint="", network="other") for r in MINE if r.attack != "certified"]
    better = [replace(r, accuracy=0.35) if r.p == 1 else r for r in better]
    small = under("knapsack", 2.0, 0.7)
    cells = table(entries([run(), run([*better]), run([replace(small, delta=1 / 255)])])).cells
    assert list(cells["network"]) == ["net, net_adv", "other", "net, net_adv"]
    assert list(cells["norm, δ"]) == ["linf, 1/255", "linf, 8/255", "linf, 8/255"]
    assert list(cells["W₂"]) == ["≤ 70.0", "≤ 40.0", "[30.0, 40.0]"]


def test_a_submission_carries_records_and_commands(tmp_path):
    made = submission(entries([run(command="python evaluate.py seed=0")]), tmp_path)
    assert [file.name for file in made] == ["net_net_adv.json", "leaderboard.md"]
    again = entries([run(read(made[0]), command=None)])
    assert again[0].commands == ["python evaluate.py seed=0"]
    assert page(again) == made[1].read_text()


def test_text_in_records_is_no_markup():
    shown = page(entries([run([replace(r, network="a|b](x)<i>") for r in MINE])]))
    (row,) = [line for line in shown.splitlines() if line.startswith("| a")]
    assert row.count(" | ") == 5
    assert "<i>" not in shown
    assert "](x)" not in shown.replace("\\](x)", "")


@pytest.mark.parametrize(
    ("records", "said"), [(MINE[-1:], "no record is of test images"), (MINE[:1], "nothing to rank")]
)
def test_what_gives_no_row_is_refused(records, said):
    with pytest.raises(SettingError, match=said):
        table(entries([run(records)]))


def test_collect_prints_it(tmp_path, capsys):
    write(tmp_path / "a" / "records.json", MINE)
    collect.main(["--leaderboard", str(tmp_path)])
    assert "[30.0, 40.0]" in capsys.readouterr().out
    collect.main([str(tmp_path), "--leaderboard", "--output", str(tmp_path / "out")])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_filters_and_what_lies_in_the_folder_already(tmp_path):
    submission(entries([run([replace(r, network="old", checkpoint="") for r in MINE])]), tmp_path)
    submission(entries([run()]), tmp_path)
    assert "| old | 90.0 |" in (tmp_path / "leaderboard.md").read_text()
    shown = table(entries([run([*MINE, replace(MINE[4], delta=1 / 255)])]), {"delta": ["1/255"]})
    assert len(shown.cells) == 1
    assert "linf, 1/255; 100 images; cifar10" in shown.title
