"""The picture of a run: what is drawn is what the records say."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from wdat.records import Record
from wdat.reporting.figures import groups
from wdat.reporting.plots import (
    accuracy_against_budget,
    accuracy_against_effort,
    accuracy_curves,
    radius_histogram,
    save,
    to_svg,
)


def record(stage, attack, delta, accuracy, split="test", p=2.0):
    return Record(
        stage=stage, network="net", checkpoint="", data="digits", split=split, attack=attack, options={}, loss="ce",
        p=p, norm="linf", delta=delta, n=100, set_size=100, accuracy=accuracy, accuracy_low=accuracy - 0.1,
        accuracy_high=accuracy + 0.05, loss_mean=1.0, distance=delta, seconds=0.0, seed=0, device="cpu",
    )  # fmt: skip


RECORDS = [
    record("before", "none", 0.0, 0.9),
    record("before", "wpgd", 0.1, 0.5),  # budgets out of order, as a run writes them
    record("before", "wpgd", 0.05, 0.7),
    record("before", "wpgd", 0.2, 0.1),
    record("before", "pgd", 0.1, 0.6, p=math.inf),
    record("epoch", "wpgd", 0.1, 0.33, split="val"),
    record("after", "none", 0.0, 0.8),
    record("after", "wpgd", 0.1, 0.44),
    record("after", "none", 0.0, 0.85),  # measured again, after a resume
    record("after", "wpgd", 0.1, 0.55),
]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(records)` gives the axes and the file."""
    kept = []
    save = Figure.savefig

    def savefig(self, *others, **options):
        kept.append(self)
        return save(self, *others, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(records):
        accuracy_against_budget(records, tmp_path / "deep" / "curve.png")
        return kept[-1].axes[0], tmp_path / "deep" / "curve.png"

    return draw


def test_names_from_records_are_no_mathematics(drawn):
    odd = [replace(r, network="a$\\frac$", attack=r.attack if r.attack == "none" else "$x^$") for r in RECORDS]
    _, path = drawn(odd)
    assert path.exists()


def test_lines_are_the_records(drawn):
    axes, _ = drawn(RECORDS)
    lines = {line.get_label(): np.round(line.get_xydata(), 6).tolist() for line in axes.get_lines()}
    lines.pop("after: pgd (W_2)", None)  # the next test
    assert lines == {
        "before: pgd (pointwise)": [[0, 90], [25.5, 60]],
        "before: wpgd (W_2)": [[0, 90], [12.75, 70], [25.5, 50], [51, 10]],
        "after: wpgd (W_2)": [[0, 85], [25.5, 55]],
    }


def test_a_line_needs_a_point_under_its_attack(drawn):
    """An attack without a record of that stage has no order to name, and a lone clean point is no curve."""
    axes, _ = drawn(RECORDS)
    assert not [line for line in axes.get_lines() if len(line.get_xydata()) < 2]


def test_bands_are_the_intervals(drawn):
    axes, _ = drawn(RECORDS[:4])
    (band,) = axes.collections
    corners = {tuple(np.round(c, 6)) for c in band.get_paths()[0].vertices}
    assert {(0, 80), (0, 95), (25.5, 40), (25.5, 55), (51, 0), (51, 15)} <= corners


def test_the_axes_name_their_units(drawn):
    axes, _ = drawn(RECORDS)
    assert "1/255" in axes.get_xlabel()
    assert "linf" in axes.get_xlabel()
    assert "percent" in axes.get_ylabel()
    assert axes.get_ylim() == (0, 100)
    assert axes.get_title(loc="left") == "net on digits, 100 test images"


def test_the_file_is_a_picture(drawn):
    _, path = drawn(RECORDS)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 600
    _, blank = drawn([])
    assert np.abs(pixels - image.imread(blank)).max() > 0.3, "lines leave a trace"


def test_without_records_the_axes_are_empty(drawn):
    axes, path = drawn([RECORDS[5]])
    assert axes.get_lines() == []
    assert path.exists()


KNAPSACK = replace(
    record("evaluate", "knapsack", 0.1, 0.5),
    details={"curve": [[0.0, 0.9], [0.1, 0.5], [0.2, 0.0]], "effort": [[10, 0.7], [20, 0.5]], "critical_distance": 0.3,
             "histogram": {"edges": [0.0, 0.2, 0.4], "counts": [60.0, 40.0]}},
)  # fmt: skip


def lines_of(figure):
    return {line.get_label(): np.round(line.get_xydata(), 6) for line in figure.axes[0].get_lines()}


def curves(*records):
    (group,) = groups([record("evaluate", "none", 0.0, 0.9), *records])
    return lines_of(accuracy_curves(group))


def test_the_knapsack_is_linear_in_the_power_of_the_budget():
    line = curves(KNAPSACK)["knapsack (W_2)"]
    assert line[[0, 8, 16]].tolist() == [[0, 90], [25.5, 50], [51, 0]]
    halfway = line[12]
    assert halfway == pytest.approx([255 * math.sqrt((0.1**2 + 0.2**2) / 2), 25], abs=1e-4)


def test_the_pointwise_knapsack_is_a_staircase():
    (group,) = groups([record("evaluate", "none", 0.0, 0.9, p=math.inf), replace(KNAPSACK, p=math.inf)])
    (line,) = [x for x in accuracy_curves(group).axes[0].get_lines() if x.get_label().startswith("knapsack")]
    assert line.get_drawstyle() == "steps-post"


def test_attacks_start_at_the_clean_accuracy():
    line = curves(record("evaluate", "wpgd", 0.2, 0.1), record("evaluate", "wpgd", 0.1, 0.5))["wpgd ce (W_2)"]
    assert line.tolist() == [[0, 90], [25.5, 50], [51, 10]]


def test_the_estimate_is_named_one():
    clean = replace(record("evaluate", "none", 0.0, 0.9), upsilon=2.0, loss_misclassified=2.0)
    (group,) = groups([clean, record("evaluate", "wpgd", 0.1, 0.5)])
    assert lines_of(accuracy_curves(group))["first-order estimate, ce"].tolist() == [[0, 90], [25.5, 72]]


def test_an_evaluation_alone_is_drawn_too(drawn):
    axes, _ = drawn(
        [record("evaluate", "none", 0.0, 0.9, split="val"), record("evaluate", "wpgd", 0.1, 0.5, split="val")]
    )
    assert axes.get_lines()[0].get_label() == "wpgd ce (W_2)"


def test_effort_is_drawn_as_recorded():
    assert accuracy_against_effort([RECORDS[1]]) is None
    assert lines_of(accuracy_against_effort([KNAPSACK]))["W_2, δ = 25.5/255"].tolist() == [[10, 70], [20, 50]]


def test_histograms_keep_the_number_of_images():
    assert radius_histogram([RECORDS[1]]) is None
    axes = radius_histogram([KNAPSACK]).axes[0]
    heights, edges, _ = axes.patches[0].get_data()
    assert (heights * np.diff(edges)).sum() == pytest.approx(100)
    assert "d* = 76.5/255" in [line.get_label() for line in axes.get_lines()]


def test_svg_is_the_same_each_time_and_names_no_date(tmp_path):
    first, second = (to_svg(radius_histogram([KNAPSACK]), "a-", 'x "<y>') for _ in range(2))
    assert first == second
    assert first.startswith('<svg role="img" aria-label="x &quot;&lt;y&gt;"')
    assert "<metadata" not in first
    assert ">distance moved" in first, "text is text"
    assert all(name.startswith("a-") for name in re.findall(r'\sid="([^"]*)"', first))
    for ending in ("svg", "png"):
        for name in "ab":
            save(radius_histogram([KNAPSACK]), tmp_path / "deep" / f"{name}.{ending}")
        assert (tmp_path / f"deep/a.{ending}").read_bytes() == (tmp_path / f"deep/b.{ending}").read_bytes()
