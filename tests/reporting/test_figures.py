"""Figures derived from records, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from wdat.records import Record
from wdat.reporting.figures import (
    budget_name,
    first_order_estimate,
    groups,
    in_words,
    ratio,
    special_cases,
    summary_rows,
)

CLEAN = Record(
    stage="evaluate", network="net", checkpoint="", data="digits", split="test", attack="none", options={}, loss="ce",
    p=2.0, norm="linf", delta=0.0, n=100, set_size=100, accuracy=0.8, accuracy_low=0.7, accuracy_high=0.9,
    loss_mean=1.0, distance=0.0, seconds=0.0, seed=0, device="cpu", upsilon=10.0, loss_misclassified=3.0,
)  # fmt: skip


def attacked(attack="wpgd", delta=0.05, accuracy=0.4, **changes):
    base = replace(CLEAN, attack=attack, delta=delta, accuracy=accuracy, upsilon=None, loss_misclassified=None)
    return replace(base, **{"loss_mean": 1.2, **changes})


def test_estimate_is_the_closed_form():
    # V(0) + δΥ = 1.5 exceeds the attack's 1.2; R^l = (3 − 1.5)/(3 − 1).
    assert first_order_estimate(CLEAN, [attacked()], 0.05) == pytest.approx(0.8 * 0.75)
    assert first_order_estimate(CLEAN, [attacked(loss_mean=2.5)], 0.05) == pytest.approx(0.8 * 0.25)
    assert first_order_estimate(CLEAN, [], 0.0) == pytest.approx(0.8)


def test_estimate_is_never_negative():
    assert first_order_estimate(CLEAN, [attacked(loss_mean=9.0)], 0.05) == 0.0


def test_redlr_has_no_loss_where_the_network_errs():
    redlr = replace(CLEAN, loss="redlr", loss_mean=-0.5, loss_misclassified=0.0, upsilon=4.0)
    assert first_order_estimate(redlr, [], 0.05) == pytest.approx(0.8 * 0.3 / 0.5)


@pytest.mark.parametrize(
    "other", [{"loss": "dlr"}, {"p": math.inf}, {"norm": "l2"}, {"delta": 0.1}, {"stage": "after"}]
)
def test_estimate_passes_over_other_threats(other):
    assert first_order_estimate(CLEAN, [attacked(**{"loss_mean": 2.5, **other})], 0.05) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "changes",
    [{"loss_misclassified": None}, {"loss_misclassified": 1.0}, {"loss_misclassified": 0.5}, {"loss_mean": None}],
)
def test_estimate_is_null_where_it_means_nothing(changes):
    assert first_order_estimate(replace(CLEAN, **changes), [attacked()], 0.05) is None


def test_estimate_without_a_sensitivity_needs_an_attack():
    blind = replace(CLEAN, upsilon=None)
    assert first_order_estimate(blind, [], 0.05) is None
    assert first_order_estimate(blind, [attacked()], 0.05) == pytest.approx(0.8 * 0.9)


def test_ratio():
    assert ratio(attacked(), CLEAN) == pytest.approx(0.5)
    assert ratio(attacked(), replace(CLEAN, accuracy=0.0)) is None


def test_pointwise_attacks_belong_to_every_order():
    pgd = attacked("pgd", p=math.inf)
    found = groups([CLEAN, replace(CLEAN, p=3.0), pgd, attacked()])
    assert [(g.p, len(g.records)) for g in found] == [(2.0, 3), (3.0, 2)]
    assert [g.p for g in groups([pgd])] == [math.inf]


def test_what_may_not_be_compared_is_apart():
    others = [{"norm": "l2"}, {"data": "x"}, {"network": "b"}, {"checkpoint": "f"}, {"n": 7}, {"seed": 1}, {"p": 1.5}]
    assert len(groups([CLEAN, *(replace(CLEAN, **o) for o in others)])) == 8
    before, after = replace(CLEAN, stage="before"), replace(CLEAN, stage="after", checkpoint="best.ckpt")
    (run,) = groups([after, before, replace(CLEAN, stage="epoch", split="test")])
    assert run.stages == ["before", "after"]


def test_the_latest_of_equal_records_counts():
    (group,) = groups([CLEAN, attacked(accuracy=0.1), attacked(accuracy=0.3), attacked(options={"steps": 7})])
    assert [r.accuracy for r in group.attacked("evaluate", 0.05)] == [0.3, 0.4]


def test_budgets_that_differ_by_rounding_are_one():
    (group,) = groups([CLEAN, attacked(delta=0.1 + 0.2), attacked("wfgsm", delta=0.3)])
    assert group.deltas == [0.3]
    assert len(group.attacked(delta=0.3)) == 2


def test_rows_say_what_they_are():
    certified = attacked("certified", accuracy=0.2, loss="0-1", details={"bound": "lower", "critical_distance": 0.1})
    rows = summary_rows([CLEAN, attacked(), attacked("pgd", p=math.inf), certified])
    kinds = {(r["attack"], r["kind"], r["bound"], r["interval"]) for r in rows}
    assert kinds == {
        ("none", "clean", "exact", "images"),
        ("wpgd", "W_2", "upper", "conditional"),
        ("pgd", "pointwise", "upper", "images"),
        ("certified", "W_2", "lower", "solved anew"),
        ("A·R^l", "first-order estimate", "estimate", None),
    }
    assert {frozenset(r) for r in rows} == {frozenset(rows[0])}, "every row has the same keys"
    assert next(r for r in rows if r["attack"] == "wpgd")["ratio"] == pytest.approx(0.5)


def test_words_state_bounds_as_bounds():
    knapsack = attacked("knapsack", accuracy=0.29, loss="0-1", details={"bound": "upper", "critical_distance": 0.1})
    (group,) = groups([CLEAN, attacked(accuracy=0.446), knapsack])
    first, second = (text.replace("\N{NO-BREAK SPACE}", " ") for text in in_words(group, "evaluate"))
    assert first == "Of 100 images 80.0 % are classified correctly."
    assert "W-PGD (ce), with one W_2 budget for all, leaves 44.6 %" in second
    assert "divides the W_2 budget optimally leaves at most 29.0 %" in second
    assert second.endswith("So adversarial accuracy A_δ is at most 29.0 %.")


@pytest.mark.parametrize("certified", [0.2, 0.5])
def test_a_lower_bound_above_an_upper_one_is_a_contradiction(certified):
    lower = attacked("certified", accuracy=certified, details={"bound": "lower"})
    (group,) = groups([CLEAN, attacked(), lower])
    assert ("contradiction" in in_words(group, "evaluate")[1]) == (certified > 0.4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accuracy": 0.0}, "misclassifies every image"),
        ({"accuracy": 1.0, "loss_misclassified": None}, "misclassifies nothing"),
        ({"loss_misclassified": 0.5}, "W(0) ≤ V(0)"),
        ({"upsilon": 0.0}, "Υ = 0 under ce: no image's loss changes to first order, as with constant logits"),
        ({"upsilon": None}, "no finite Υ"),
    ],
)
def test_special_cases_are_explained(changes, words):
    (group,) = groups([replace(CLEAN, **changes)])
    (note,) = special_cases(group)
    assert words in note


def test_ordinary_results_need_no_note():
    (group,) = groups([CLEAN, attacked()])
    assert special_cases(group) == []
    (group,) = groups([CLEAN, attacked(dropped=3), attacked("wfgsm", set_size=900)])
    assert len(special_cases(group)) == 2


def test_budgets_are_written_as_people_do():
    assert budget_name(8 / 255, "linf") == "8/255"
    assert budget_name(0.5, "l2") == "0.5"
    assert budget_name(None, "l2") == "–"
