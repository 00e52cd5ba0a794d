"""The picture of a run: what is drawn is what the records say."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from wdat.records import Record
from wdat.reporting.frame import sections, to_frame
from wdat.reporting.plots import (
    accuracy_against_budget,
    accuracy_against_effort,
    accuracy_curves,
    on_curve,
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


def section_of(*records):
    return sections(to_frame(records))[0]


def points_of(axes):
    """Accuracies drawn as points, by label: rounded (budget, accuracy), the budgets without their offset."""
    found = {}
    for container in axes.containers:
        if container.get_label() and not container.get_label().startswith("_"):
            x, y = container.lines[0].get_data()
            found[container.get_label()] = [(round(float(a), 2), round(float(b), 6)) for a, b in zip(x, y, strict=True)]
    return found


def curves_of(axes):
    """Lines, by label."""
    return {line.get_label(): np.array(line.get_xydata()) for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_attacks_at_single_budgets_are_points_and_no_lines():
    axes = accuracy_curves(section_of(*RECORDS)).axes[0]
    found = points_of(axes)
    assert set(found) == {"clean, before", "clean, after", "PGD (CE), pointwise, before", "W-PGD (CE), W₂, before",
                          "W-PGD (CE), W₂, after"}  # fmt: skip
    assert [y for _, y in found["W-PGD (CE), W₂, before"]] == [70, 50, 10]
    assert [x for x, _ in found["W-PGD (CE), W₂, before"]] == pytest.approx([0.05, 0.1, 0.2], abs=0.02)
    assert found["clean, after"] == [(0, 85)], "the latest counts"
    assert not curves_of(axes)


def test_clean_accuracy_stands_at_zero_and_no_point_is_outside_of_the_axes():
    """Also before and after training, where points at one budget are drawn side by side."""
    axes = accuracy_curves(section_of(*RECORDS)).axes[0]
    drawn = {c.get_label(): c[0].get_xdata() for c in axes.containers}
    assert [list(x) for label, x in drawn.items() if label.startswith("clean")] == [[0.0], [0.0]]
    low, high = axes.get_xlim()
    assert all(low < x < high for points in drawn.values() for x in points)


def test_intervals_are_those_of_the_records():
    axes = accuracy_curves(section_of(*RECORDS[:2])).axes[0]
    (bars,) = [c for c in axes.containers if c.get_label().startswith("W-PGD")]
    (segment,) = bars.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([40, 55])


def test_points_that_no_picture_can_tell_apart_are_said_in_the_legend():
    near = replace(record("evaluate", "pgd", 0.1, 0.502), p=math.inf)
    both = section_of(record("evaluate", "none", 0, 0.9), record("evaluate", "wpgd", 0.1, 0.5), near)
    assert set(points_of(accuracy_curves(both).axes[0])) == {"clean", "W-PGD (CE), W₂ ≈ PGD (CE), pointwise"}


def test_the_axes_name_their_units_and_the_title_what_was_measured():
    axes = accuracy_curves(section_of(*RECORDS)).axes[0]
    assert axes.get_xlabel() == "budget δ in pixel units, l∞"
    assert axes.get_ylabel() == "accuracy in percent"
    assert axes.get_ylim() == (0, 100)
    assert axes.get_title(loc="left") == "net on digits, 100 test images"
    typed = section_of(record("evaluate", "wpgd", 8 / 255, 0.5))
    assert accuracy_curves(typed).axes[0].get_xlabel() == "budget δ in 1/255, l∞"


def test_the_picture_of_a_run_is_written(tmp_path):
    odd = [replace(r, network="a$\\frac$", attack=r.attack if r.attack == "none" else "$x^$") for r in RECORDS]
    for number, records in enumerate([RECORDS, odd, [], RECORDS[5:6]]):
        path = tmp_path / "deep" / f"{number}.png"
        accuracy_against_budget(records, path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert min(image.imread(path).shape[:2]) >= 400


KNAPSACK = replace(
    record("evaluate", "knapsack", 0.1, 0.5),
    details={"curve": [[0.0, 0.9], [0.1, 0.5], [0.2, 0.0]], "effort": [[10, 0.7], [20, 0.5]], "critical_distance": 0.3,
             "histogram": {"edges": [0.0, 0.2, 0.4], "counts": [60.0, 40.0]}},
)  # fmt: skip


CLEAN = record("evaluate", "none", 0.0, 0.9)


@pytest.mark.parametrize(("p", "halfway"), [(2.0, 0.5 * (0.5 + 0.0)), (1.0, 0.25), (math.inf, 0.5)])
def test_the_knapsacks_curve_is_linear_in_the_power_of_the_budget(p, halfway):
    between = 0.15 if p != 2 else math.sqrt((0.1**2 + 0.2**2) / 2)
    curve = KNAPSACK.details["curve"]
    assert on_curve(curve, p, np.array([0.0, 0.1, between, 0.2, 5.0])).tolist() == pytest.approx(
        [0.9, 0.5, halfway, 0, 0]
    )


def test_the_knapsacks_curve_is_whole():
    (section,) = sections(to_frame([CLEAN, KNAPSACK]))
    (line,) = curves_of(accuracy_curves(section).axes[0]).values()
    assert line[0].tolist() == [0, 90]
    assert line[-1, 0] == pytest.approx(0.12)
    assert np.interp(0.1, line[:, 0], line[:, 1]) == pytest.approx(50, abs=0.2)


def test_certified_radii_and_the_knapsack_are_the_ends_of_a_band():
    lower = replace(KNAPSACK, attack="certified", details={"bound": "lower", "curve": [[0.0, 0.9], [0.05, 0.1]]})
    axes = accuracy_curves(section_of(CLEAN, KNAPSACK, lower)).axes[0]
    (band,) = [c for c in axes.collections if str(c.get_label()).startswith("between")]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((10, 90))
    assert set(curves_of(axes)) == {"knapsack, W₂", "certified, W₂, lower bound"}


def test_the_estimate_is_named_one_and_not_drawn_at_zero():
    clean = replace(CLEAN, upsilon=2.0, loss_misclassified=2.0)
    found = points_of(accuracy_curves(section_of(clean, record("evaluate", "wpgd", 0.1, 0.5))).axes[0])
    assert [y for _, y in found["first-order estimate, CE"]] == [72]
    worse = replace(record("evaluate", "wpgd", 0.1, 0.5), loss_mean=9.0)
    assert "first-order estimate, CE" not in points_of(accuracy_curves(section_of(clean, worse)).axes[0])


def test_a_figure_is_drawn_on_the_users_axes():
    figure = Figure()
    axes = figure.add_subplot()
    assert accuracy_curves(section_of(CLEAN, KNAPSACK), axes) is figure
    assert axes.get_lines()


@pytest.mark.long
def test_a_notebooks_backend_does_not_matter():
    program = "import wdat.reporting.plots as p, os; assert os.environ['MPLBACKEND'] == 'module://no_such_backend'"
    environment = {**os.environ, "MPLBACKEND": "module://no_such_backend"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_effort_is_drawn_as_recorded():
    assert accuracy_against_effort(to_frame([RECORDS[1]])) is None
    (line,) = accuracy_against_effort(to_frame([KNAPSACK])).axes[0].get_lines()
    assert np.round(line.get_xydata(), 6).tolist() == [[10, 70], [20, 50]]


def test_histograms_keep_the_number_of_images():
    assert radius_histogram(to_frame([RECORDS[1]])) is None
    axes = radius_histogram(to_frame([KNAPSACK])).axes[0]
    heights, edges, _ = axes.patches[0].get_data()
    assert (heights * np.diff(edges)).sum() == pytest.approx(100)
    assert "d* = 0.3" in [line.get_label() for line in axes.get_lines()]


def test_svg_is_the_same_each_time_and_names_no_date(tmp_path):
    first, second = (to_svg(radius_histogram(to_frame([KNAPSACK])), "a-", 'x "<y>') for _ in range(2))
    assert first == second
    assert first.startswith('<svg role="img" aria-label="x &quot;&lt;y&gt;"')
    assert "<metadata" not in first
    assert ">distance moved" in first, "text is text"
    assert all(name.startswith("a-") for name in re.findall(r'\sid="([^"]*)"', first))
    for ending in ("svg", "png"):
        for name in "ab":
            save(radius_histogram(to_frame([KNAPSACK])), tmp_path / "deep" / f"{name}.{ending}")
        assert (tmp_path / f"deep/a.{ending}").read_bytes() == (tmp_path / f"deep/b.{ending}").read_bytes()
