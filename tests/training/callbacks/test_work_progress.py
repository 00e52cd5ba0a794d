"""The progress display, with and without a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from wdat.training.callbacks import WorkProgress


def on(terminal):
    """A display that writes into `.text`."""
    display = WorkProgress()
    display.text = io.StringIO()
    display.console = Console(file=display.text, force_terminal=terminal, soft_wrap=True, highlight=False, width=100)
    return display


@pytest.mark.parametrize("terminal", [True, False])
def test_an_epoch_leaves_a_line_of_its_figures(terminal, digits, make_module, make_evaluation, make_trainer):
    display = on(terminal)
    evaluation = make_evaluation(progress=display.report)
    trainer = make_trainer(evaluation, display, max_epochs=2, enable_progress_bar=True)
    trainer.test(make_module(), digits(), verbose=False)
    assert "epoch" not in display.text.getvalue()
    trainer.fit(make_module(), digits())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", display.text.getvalue())
    shares = ", ".join(rf"{name} \d+\.\d\d %" for name in ("clean", "pointwise", "distributional"))
    for epoch in (1, 2):
        assert len(re.findall(rf"epoch {epoch}/2: loss \d+\.\d+, {shares}, Υ \d+\.\d+", plain)) == 1
    last = evaluation.records.records[-3:]
    assert f"clean {100 * last[0].accuracy:.2f} %, pointwise {100 * last[1].accuracy:.2f} %" in plain
    if not terminal:
        assert plain.count("\n") == 2, "only the lines that stay"
        assert "\x1b" not in display.text.getvalue()
    else:
        assert "pgd ce" in plain
        assert display._live is None
        assert "\x1b[?25h" in display.text.getvalue().split("\x1b[?25l")[-1], "the cursor is shown again"


@pytest.mark.parametrize("terminal", [True, False])
def test_without_validation_the_line_has_what_there_is(terminal, digits, make_module, make_trainer):
    display = on(terminal)
    make_trainer(display, limit_val_batches=0, enable_progress_bar=True).fit(make_module(), digits())
    assert re.search(r"epoch 1/1: loss \d+\.\d+\s", display.text.getvalue())


class BrokenError(Exception):
    pass


def test_the_display_stops_where_training_fails(digits, make_module, make_trainer):
    display, module = on(True), make_module()

    def fail(*others):
        raise BrokenError

    module.training_step = fail
    with pytest.raises(BrokenError):
        make_trainer(display, enable_progress_bar=True).fit(module, digits())
    assert display._live is None
    assert "\x1b[?25h" in display.text.getvalue().split("\x1b[?25l")[-1], "the cursor is shown again"


def test_reports_outside_a_run_are_nothing():
    on(True).report("pgd ce", 1, 2)


@pytest.mark.parametrize("method", ["disable", "enable"])
def test_lightning_may_switch_it_off(method):
    """`ProgressBar.setup` calls `disable` on every process but the first; a base class refuses."""
    getattr(on(True), method)()


def test_processes_other_than_the_first_show_nothing(digits, make_module, make_trainer, monkeypatch):
    display = on(True)
    trainer = make_trainer(display, enable_progress_bar=True)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    display.setup(trainer, make_module(), "fit")
    display.report("pgd ce", 1, 2)
    display.on_train_epoch_end(trainer, make_module())
    display.teardown(trainer, make_module(), "fit")
    assert display.text.getvalue() == ""
