"""What a person reads: errors in a line, tables with the right numbers."""

from __future__ import annotations

import logging
import warnings

import pytest
from hydra.errors import InstantiationException

from wdat.cli.console import quiet_libraries, readable_errors, readable_warnings
from wdat.errors import ConstraintError, RunError, SettingError, Stopped


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


def test_a_warning_is_a_line_without_code(capsys):
    with readable_warnings():
        line = warnings.formatwarning("8 of 16 images have logits\nthat are not finite", UserWarning, "file.py", 3)
    assert line == "warning: 8 of 16 images have logits that are not finite\n"
    assert "UserWarning" in warnings.formatwarning("words", UserWarning, "file.py", 3)
