"""What a person reads: errors in a line, tables with the right numbers."""

from __future__ import annotations

import io
import logging
import re
import warnings

import pytest
from hydra.errors import InstantiationException
from rich.console import Console

from wdat.cli.console import before_after, figures, percent, quiet_libraries, readable_errors
from wdat.errors import ConstraintError, RunError, SettingError, Stopped
from wdat.records import Record


def status_and_text(capsys, error):
    with pytest.raises(SystemExit) as left, readable_errors():
        raise error
    out, err = capsys.readouterr()
    assert out == ""
    return left.value.code, err


def wrapped(error, *outer):
    """The error as the cause of others, innermost first."""
    for kind in outer:
        try:
            raise kind("in call to target") from error
        except Exception as found:
            error = found
    return error


@pytest.mark.parametrize("outer", [(), (InstantiationException,), (RuntimeError, InstantiationException)])
def test_a_setting_error_is_a_line_and_status_2(capsys, outer):
    status, text = status_and_text(capsys, wrapped(SettingError("threat.p=0 must be at least 1"), *outer))
    assert status == 2
    assert text == "error: threat.p=0 must be at least 1\n"


def test_an_error_raised_while_handling_a_setting_error_counts_too(capsys):
    def fail():
        try:
            raise SettingError("seed=-1 must not be negative")
        except SettingError:
            raise RuntimeError("while stopping")  # noqa: B904 (the point)

    with pytest.raises(SystemExit), readable_errors():
        fail()
    assert capsys.readouterr().err == "error: seed=-1 must not be negative\n"


def test_the_status_is_that_of_the_error_that_is_told(capsys):
    assert status_and_text(capsys, wrapped(RunError("no room"), SettingError)) == (2, "error: in call to target\n")


def test_long_messages_are_not_broken_into_lines(capsys):
    message = "data.path=" + "very/" * 100 + "long.npz: no such file"
    assert status_and_text(capsys, SettingError(message)) == (2, f"error: {message}\n")


MESSAGES = ["[0, 1]", "losses=[ce]", "[bold]", "[/]", "[link=x]", "a[b]c", "8/255", ":bomb:", "C:\\[x]", "\\", "{x}"]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_printed_as_they_are(capsys, message):
    assert status_and_text(capsys, SettingError(f"x={message} is wrong")) == (2, f"error: x={message} is wrong\n")


@pytest.mark.parametrize("error", [ValueError("a"), ConstraintError("a defect"), KeyError("x")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as found, readable_errors():
        raise error
    assert found.value is error


def test_exits_pass():
    with pytest.raises(SystemExit) as left, readable_errors():
        raise SystemExit(5)
    assert left.value.code == 5
    with readable_errors():
        pass


@pytest.mark.parametrize(
    ("stop", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped\n"),
        (
            Stopped(15, "stopped by SIGTERM; go on with resume=[run]"),
            143,
            "stopped by SIGTERM; go on with resume=[run]\n",
        ),
        (RunError("no room"), 1, "error: no room\n"),
    ],
)
def test_stops_and_failed_runs_leave_with_their_status(stop, status, said, capsys):
    with pytest.raises(SystemExit) as left, readable_errors():
        raise stop
    assert left.value.code == status
    assert capsys.readouterr().err == said


def test_a_failed_run_is_found_in_what_it_was_wrapped_in(capsys):
    with pytest.raises(SystemExit) as left, readable_errors():
        raise wrapped(RunError("no room"), ValueError)
    assert left.value.code == 1
    assert "no room" in capsys.readouterr().err


def record(stage, attack, accuracy, delta=0.1, split="test", **other):
    about = {
        "network": "net[1]", "checkpoint": "", "data": "digits", "options": {}, "loss": "ce", "norm": "linf", "n": 200,
        "set_size": 200, "loss_mean": 1.0, "distance": 0.1, "seconds": 0.1, "seed": 0, "device": "cpu", "p": 2.0,
    }  # fmt: skip
    ends = {"accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    return Record(stage=stage, attack=attack, split=split, accuracy=accuracy, delta=delta, **{**about, **ends, **other})


RECORDS = [
    record("before", "none", 0.9, 0.0, upsilon=12.346),
    record("before", "pgd", 0.5, p=float("inf")),
    record("before", "wpgd", 0.25),
    record("before", "wpgd", 0.125, delta=0.2),  # another budget
    record("epoch", "none", 0.77, 0.0, split="val"),
    record("before", "wpgd", 0.76, split="val"),
    record("after", "none", 0.875, 0.0, upsilon=3.0),
    record("after", "wpgd", 0.3125),
    record("after", "pgd", 0.5625, p=float("inf")),
]


def text_of(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def words(text, part):
    """The cells of the first line that has `part`: what stands two spaces apart."""
    line = next(line for line in text.splitlines() if part in line)
    return [cell for cell in re.split(r"[│┃]|\s{2,}", line.strip()) if cell.strip()]


def row(text, name):
    return words("\n".join(line for line in text.splitlines() if line.strip("│ ").startswith(name)), name)


def test_before_and_after():
    text = text_of(before_after(RECORDS, ["pgd", "wpgd"], 0.1))
    assert row(text, "before") == ["before", "90.00 [85.0, 95.0]", "50.00 [45.0, 55.0]", "25.00 [20.0, 30.0]", "12.35"]
    assert row(text, "after") == ["after", "87.50 [82.5, 92.5]", "56.25 [51.2, 61.3]", "31.25 [26.2, 36.2]", "3.00"]
    assert row(text, "change") == ["change", "-2.50", "+6.25", "+6.25"]
    for part in ("net[1] on digits, 200 test images", "linf", "δ = 0.1"):
        assert part in text
    assert words(text, "pgd ce") == ["clean", "pgd ce", "wpgd ce", "ce"]
    assert words(text, "distributional") == ["pointwise", "distributional W_2", "Υ"]


def test_the_latest_record_counts():
    """A resumed run is measured `after` once more."""
    text = text_of(before_after([*RECORDS, record("after", "wpgd", 0.5)], ["pgd", "wpgd"], 0.1))
    assert row(text, "change")[3] == "+25.00"


def test_what_is_missing_is_a_dash():
    text = text_of(before_after(RECORDS[:3], ["pgd", "wpgd"], 0.1))
    assert row(text, "after") == ["after", "–", "–", "–", "–"]
    assert row(text, "change")[1:4] == ["–", "–", "–"]
    assert "–" in text_of(before_after([], ["pgd", "wpgd"], 0.1))


def test_a_stage_in_a_line():
    assert figures(RECORDS[:3]) == "clean 90.00 %, pgd 50.00 %, wpgd 25.00 %"


def test_percent():
    assert [percent(v) for v in (0.0, 1.0, 0.68557, None)] == ["0.00", "100.00", "68.56", "–"]


def test_only_chosen_messages_are_silenced():
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_libraries()
            warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
            warnings.warn("wpgd: every gradient is zero (Υ = 0), so no image moves", stacklevel=1)
        assert [str(w.message) for w in caught] == ["wpgd: every gradient is zero (Υ = 0), so no image moves"]
        assert all(logging.getLogger(name).level == logging.WARNING for name in levels)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
