"""Messages that name the setting and the remedy."""

from __future__ import annotations

import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from wdat.errors import ConstraintError, RunError, SettingError, cause, quoted, unknown


def test_the_cause_is_the_first_of_its_kinds_in_the_chain():
    last, middle, first = SettingError("a"), RunError("b"), KeyError("c")
    last.__cause__, middle.__context__ = middle, first
    assert cause(last, SettingError, RunError) is last
    assert cause(last, RunError) is middle
    assert cause(last, RunError, KeyError) is middle
    assert cause(last, KeyError) is first
    assert cause(last, TypeError) is None


def test_unknown_lists_the_nearest_names_first_and_ignores_case():
    message = str(unknown("attack", "WPDG", ["fgsm", "pgd", "wpgd", "wpgd_budget"], "attack.name"))
    assert message.startswith("unknown attack 'WPDG' (attack.name): did you mean wpgd")
    assert "fgsm" not in message


def test_unknown_lists_what_there_is_where_nothing_is_near():
    message = str(unknown("loss", "zzz", ["ce", "kl"], "attack.loss"))
    assert message.endswith("known: ce, kl")


def test_unknown_shortens_long_lists_and_says_so():
    message = str(unknown("model", "?", [f"network{i:02}" for i in range(40)], "model.name"))
    assert "network11" in message
    assert "network12" not in message
    assert "40 in all" in message


def test_unknown_takes_names_that_are_no_text():
    assert "unknown norm 'None'" in str(unknown("norm", None, ["linf"], "threat.norm"))


def test_setting_errors_are_value_errors_and_constraint_errors_are_not():
    assert issubclass(SettingError, ValueError)
    assert not issubclass(ConstraintError, ValueError)


@given(st.text(alphabet="ab=[]{},~ '\"\\$()!`:*?#;&|<>üé.-/1", min_size=1))
@example("epoch=3-step=100.ckpt")
@example("it's.pt")
@example("é")
@example("null")
@example("1e3")
@example("ends with \\")
def test_what_is_quoted_is_what_hydra_reads(value):
    (word,) = shlex.split(quoted("model.checkpoint", value))
    (override,) = OverridesParser.create().parse_overrides([word])
    assert str(override.value()) == value
