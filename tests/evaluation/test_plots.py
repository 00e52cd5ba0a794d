"""The picture of a run: what is drawn is what the records say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from wdat.evaluation.plots import accuracy_against_budget
from wdat.records import Record


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
