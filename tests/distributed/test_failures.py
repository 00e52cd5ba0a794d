"""What goes wrong on one process is told on all, and nobody waits for one that is gone."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "failing.py"


@pytest.mark.long
def test_an_error_on_one_process_is_raised_on_both(results):
    first, second = results(WORKER, "agree", 40)
    kinds = ["SettingError", "RunError", "RunError", "SettingError", "RunError", "SettingError", "none"]
    assert [kind for kind, _ in first] == kinds
    own = ["SettingError", "KeyError", "ConstraintError", "SettingError", "ConstraintError", "SettingError", "none"]
    assert [kind for kind, _ in second] == own
    told, said = [text for _, text in first], [text for _, text in second]
    assert told[0] == f"process 1: {said[0]}"
    assert "images must lie in [0, 1]" in said[0]
    assert told[1] == "process 1: KeyError: 'gone'"
    assert told[2] == "process 1: ConstraintError: too far"
    assert told[3] == said[3]
    assert "trainer.use_distributed_sampler=false" in said[3]
    assert "too_far" in told[4]
    assert told[5] == said[5]
    assert "empty" in said[5]


@pytest.mark.parametrize(("mode", "seconds"), [("die", 200), ("hang", 4), ("ddp", 200)])
@pytest.mark.long
def test_nobody_waits_for_a_process_that_is_gone(launch, mode, seconds):
    """Neither for one that has ended nor, beyond the time limit, for one that is still there."""
    started = time.monotonic()
    first, second = launch(WORKER, mode, seconds)
    assert first.status == 0, first.err
    ((kind, text),) = json.loads(first.out)
    assert kind == "RunError"
    assert re.match(r"process 0 waited in vain for the others \([A-Z][^()/]*[^.]\): one of them has failed", text), text
    assert "timeout" in text
    assert text.endswith("; go on with resume=RUN") is (mode == "ddp")
    assert second.status == (0 if mode == "hang" else 3), second.err
    assert time.monotonic() - started < 150, "far below the limit of those that have 200 seconds"
