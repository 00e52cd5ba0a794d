"""Tables: the right numbers in every cell, whatever the form."""

from __future__ import annotations

import io
import math
import re

from rich.console import Console

from wdat.records import Record
from wdat.reporting.frame import paired, to_frame
from wdat.reporting.tables import before_after, evaluation_table, in_a_line, latex


def record(stage, attack, accuracy, delta=0.1, split="test", **other):
    about = {
        "network": "net[1]", "checkpoint": "", "data": "digits", "options": {}, "loss": "ce", "norm": "linf", "n": 200,
        "set_size": 200, "loss_mean": 1.0, "distance": 0.1, "seconds": 0.1, "seed": 0, "device": "cpu", "p": 2.0,
    }  # fmt: skip
    ends = {"accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    return Record(stage=stage, attack=attack, split=split, accuracy=accuracy, delta=delta, **{**about, **ends, **other})


RECORDS = [
    record("before", "none", 0.9, 0.0, upsilon=12.346),
    record("before", "pgd", 0.5, p=math.inf),
    record("before", "wpgd", 0.25),
    record("before", "wpgd", 0.125, delta=0.2),  # another budget
    record("epoch", "none", 0.77, 0.0, split="val"),
    record("before", "wpgd", 0.76, split="val"),
    record("after", "none", 0.875, 0.0, upsilon=3.0),
    record("after", "wpgd", 0.3125),
    record("after", "pgd", 0.5625, p=math.inf),
]


def text_of(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def row(text, name):
    """The cells of the first line that begins with a name: what stands two spaces apart."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell for cell in re.split(r"\s{2,}", line.strip()) if cell]


def test_before_and_after():
    text = text_of(before_after(RECORDS, ["pgd", "wpgd"], 0.1))
    assert row(text, "clean") == ["clean", "90.00 [85.0, 95.0]", "87.50 [82.5, 92.5]", "-2.50"]
    assert row(text, "PGD (CE)") == [
        "PGD (CE)",
        "pointwise 0.1",
        "50.00 [45.0, 55.0]",
        "56.25 [51.2, 61.3]",
        "+6.25",
    ]
    assert row(text, "W-PGD")[1:] == ["W₂ 0.1", "25.00 [20.0, 30.0]", "31.25 [26.2, 36.2]", "+6.25"]
    assert row(text, "Υ") == ["Υ (CE)", "12.35", "3.00", "-9.35"]
    assert "net[1] on digits, 200 test images, linf" in text
    assert "0.2" not in text
    assert len(before_after(RECORDS).cells) == 5, "without a budget all of them"


def test_the_latest_record_counts():
    """A resumed run is measured `after` once more."""
    text = text_of(before_after([*RECORDS, record("after", "wpgd", 0.5)], ["pgd", "wpgd"], 0.1))
    assert row(text, "W-PGD")[-1] == "+25.00"


def test_what_is_missing_is_a_dash():
    text = text_of(before_after(RECORDS[:3]))
    assert row(text, "PGD")[-2:] == ["–", "–"]
    assert row(text, "Υ")[-2:] == ["–", "–"]
    assert before_after([]).cells.empty
    text_of(before_after([]))


def test_no_change_is_taken_between_different_numbers_of_images():
    few = record("after", "pgd", 0.9, p=math.inf, n=50)
    found = paired(to_frame([*RECORDS[:3], few]))
    assert found[found["attack"] == "PGD (CE)"]["images"].tolist() == [200, 50]
    assert found["change"].isna().all()


def test_an_evaluation_has_a_row_a_measurement():
    bounded = record("evaluate", "knapsack", 0.2, 8 / 255, loss="0-1", distance=7.5 / 255, details={"bound": "upper"})
    table = evaluation_table([record("evaluate", "none", 0.9, 0.0, upsilon=12.346), bounded])
    assert row(text_of(table), "clean") == ["clean (CE)", "90.00 [85.0, 95.0]", "12.35", "0.1"]
    assert row(text_of(table), "knapsack ≤")[1:] == ["W₂", "8/255", "20.00 [15.0, 25.0]", "7.5/255", "0.1"]


def test_lengths_in_l2_are_decimals():
    text = text_of(evaluation_table([record("evaluate", "wpgd", 0.2, 0.25, norm="l2", distance=0.24321)]))
    assert "255" not in text
    assert row(text, "W-PGD")[2::2] == ["0.25", "0.243"]


def test_a_stage_in_a_line():
    assert in_a_line(RECORDS[:3]) == "clean 90.00 %, PGD (CE) 50.00 %, W-PGD (CE) 25.00 %"


def test_latex_is_text():
    assert latex("\N{CJK UNIFIED IDEOGRAPH-4E2D}é") == "U+4E2Dé"
    assert latex("[x] $y$ \\input{a}") == r"{[}x{]} \$y\$ \textbackslash{}input\{a\}"
