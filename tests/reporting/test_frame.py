"""Records as a DataFrame, and the figures derived from it, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

import wdat
from wdat.errors import SettingError
from wdat.records import Record, read, write
from wdat.reporting.frame import first_order_estimate, load_records, order_name, sections, to_frame
from wdat.reporting.results import answer, attacks, notes

RESULTS = Path(__file__).parents[2] / "results"
CLEAN = Record(
    stage="evaluate", network="net", checkpoint="", data="digits", split="test", attack="none", options={}, loss="ce",
    p=2.0, norm="linf", delta=0.0, n=100, set_size=100, accuracy=0.8, accuracy_low=0.7, accuracy_high=0.9,
    loss_mean=1.0, distance=0.0, seconds=0.0, seed=0, device="cpu", upsilon=10.0, loss_misclassified=3.0,
)  # fmt: skip


def attacked(attack="wpgd", delta=0.05, accuracy=0.4, **changes):
    base = replace(CLEAN, attack=attack, delta=delta, accuracy=accuracy, upsilon=None, loss_misclassified=None)
    return replace(base, **{"loss_mean": 1.2, **changes})


def estimate(clean, others, delta):
    frame = to_frame([clean, *others])
    return first_order_estimate(frame.iloc[0], frame.iloc[1:], delta)


def test_estimate_is_the_closed_form():
    # V(0) + δΥ = 1.5 exceeds the attack's 1.2; R^l = (3 − 1.5)/(3 − 1).
    assert estimate(CLEAN, [attacked()], 0.05) == pytest.approx(0.8 * 0.75)
    assert estimate(CLEAN, [attacked(loss_mean=2.5)], 0.05) == pytest.approx(0.8 * 0.25)
    assert estimate(CLEAN, [], 0.0) == pytest.approx(0.8)


def test_estimate_is_never_negative():
    assert estimate(CLEAN, [attacked(loss_mean=9.0)], 0.05) == 0.0


def test_redlr_has_no_loss_where_the_network_errs():
    redlr = replace(CLEAN, loss="redlr", loss_mean=-0.5, loss_misclassified=0.0, upsilon=4.0)
    assert estimate(redlr, [], 0.05) == pytest.approx(0.8 * 0.3 / 0.5)


@pytest.mark.parametrize(
    "other", [{"loss": "dlr"}, {"p": math.inf}, {"norm": "l2"}, {"delta": 0.1}, {"stage": "after"}]
)
def test_estimate_passes_over_other_threats(other):
    assert estimate(CLEAN, [attacked(**{"loss_mean": 2.5, **other})], 0.05) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "changes",
    [{"loss_misclassified": None}, {"loss_misclassified": 1.0}, {"loss_misclassified": 0.5}, {"loss_mean": None}],
)
def test_estimate_is_null_where_it_means_nothing(changes):
    assert estimate(replace(CLEAN, **changes), [attacked()], 0.05) is None


def test_estimate_without_a_sensitivity_needs_an_attack():
    blind = replace(CLEAN, upsilon=None)
    assert estimate(blind, [], 0.05) is None
    assert estimate(blind, [attacked()], 0.05) == pytest.approx(0.8 * 0.9)


def test_ratio():
    assert to_frame([CLEAN, attacked()])["ratio"].tolist() == pytest.approx([1, 0.5])
    assert to_frame([replace(CLEAN, accuracy=0.0), attacked()])["ratio"].isna().all()
    assert to_frame([CLEAN, attacked(stage="after")])["ratio"].isna().tolist() == [False, True]


def test_pointwise_attacks_belong_to_every_order():
    pgd = attacked("pgd", p=math.inf)
    found = sections(to_frame([CLEAN, replace(CLEAN, p=3.0), pgd, attacked()]))
    assert [(s.p, len(s.rows)) for s in found] == [(2.0, 3), (3.0, 2)]
    assert [s.p for s in sections(to_frame([pgd]))] == [math.inf]


def test_what_may_not_be_compared_is_apart():
    others = [{"norm": "l2"}, {"data": "x"}, {"network": "b"}, {"checkpoint": "f"}, {"n": 7}, {"seed": 1}, {"p": 1.5}]
    assert len(sections(to_frame([CLEAN, *(replace(CLEAN, **o) for o in others)]))) == 8
    before, after = replace(CLEAN, stage="before"), replace(CLEAN, stage="after", checkpoint="best.ckpt")
    (run,) = sections(to_frame([after, before, replace(CLEAN, stage="epoch", split="test")]))
    assert run.stages == ["before", "after"]


def test_the_latest_of_equal_records_counts():
    frame = to_frame([CLEAN, attacked(accuracy=0.1), attacked(accuracy=0.3), attacked(options={"steps": 7})])
    assert frame["accuracy"].tolist() == [0.8, 0.3, 0.4]


def test_budgets_that_differ_by_rounding_are_one():
    (section,) = sections(to_frame([CLEAN, attacked(delta=0.1 + 0.2), attacked("wfgsm", delta=0.3)]))
    assert section.deltas == [0.1 + 0.2]
    assert to_frame([attacked(delta=8 / 255)])["delta"].tolist() == [8 / 255], "what was typed is found"


def test_rows_say_what_they_are():
    certified = attacked("certified", accuracy=0.2, loss="0-1", details={"bound": "lower", "critical_distance": 0.1})
    frame = to_frame([CLEAN, attacked(loss="redlr"), attacked("pgd", p=math.inf), certified])
    columns = ["name", "threat", "budget", "bound", "interval"]
    assert frame[columns].to_numpy().tolist() == [
        ["clean", "", "", "exact", "images"],
        ["W-PGD (ReDLR)", "W₂", "0.05", "upper", "conditional"],
        ["PGD (CE)", "pointwise", "0.05", "upper", "images"],
        ["certified", "W₂", "0.05", "lower", "solved anew"],
    ]
    assert [order_name(p) for p in (1.0, 12.0, 1.5)] == ["W₁", "W₁₂", "W_1.5"]


def test_the_frame_has_every_committed_record():
    for file in sorted(RESULTS.glob("*/*.json")):
        records = load_records(file)
        frame = wdat.to_frame(records)
        assert frame["accuracy"].tolist() == [r.accuracy for r in records]
        assert set(frame["budget"][frame["norm"] == "l2"]) <= {"", "0.25"}
    assert to_frame([]).empty


def test_loading_records_names_what_is_missing(tmp_path):
    write(tmp_path / "records.json", [CLEAN])
    assert (
        wdat.load_records(tmp_path) == wdat.load_records(tmp_path / "records.json") == read(tmp_path / "records.json")
    )
    with pytest.raises(SettingError, match="holds no records"):
        wdat.load_records(tmp_path / "other")


def section_of(*records):
    (found,) = sections(to_frame(records))
    return found


def test_the_answer_has_the_strongest_attack_of_each_kind():
    knapsack = attacked("knapsack", accuracy=0.29, loss="0-1", details={"bound": "upper", "critical_distance": 0.1})
    lower = attacked("certified", accuracy=0.1, loss="0-1", details={"bound": "lower"})
    weaker = [attacked("pgd", p=math.inf, accuracy=0.6), attacked(accuracy=0.5)]
    strong = [attacked("pgd", p=math.inf, accuracy=0.55, loss="redlr"), attacked(accuracy=0.446, loss="redlr")]
    cells = answer(section_of(CLEAN, *weaker, *strong, knapsack, lower)).cells
    assert list(cells.columns) == ["δ", "clean", "PGD (ReDLR), pointwise", "W-PGD (ReDLR), W₂", "knapsack, W₂",
                                   "certified, W₂"]  # fmt: skip
    assert [cell.split(" [")[0] for cell in cells.iloc[0]] == ["0.05", "80.0", "55.0", "44.6", "29.0", "10.0"]
    assert answer(section_of(CLEAN)) is None


def test_the_answer_shows_before_and_after():
    both = [replace(r, stage=stage, accuracy=r.accuracy + more)
            for stage, more in (("before", 0.0), ("after", 0.1)) for r in (CLEAN, attacked())]  # fmt: skip
    cells = answer(section_of(*both)).cells
    assert cells.iloc[0].map(lambda cell: cell.split(" [")[0]).tolist() == ["0.05", "80.0 → 90.0", "40.0 → 50.0"]


def test_estimates_stand_among_the_attacks_and_the_lowest_is_marked():
    grid = attacks(section_of(CLEAN, attacked(), attacked("wfgsm", accuracy=0.3)))
    assert [grid.cells["attack"][i] for i, _ in grid.best] == ["W-FGSM (CE)"]
    assert grid.cells["accuracy, %"][2] == "60.0"
    assert grid.cells["attack"][2] == "first-order estimate (CE), not a bound"


@pytest.mark.parametrize("certified", [0.2, 0.5])
def test_a_lower_bound_above_an_upper_one_is_a_contradiction(certified):
    lower = attacked("certified", accuracy=certified, details={"bound": "lower"})
    found = notes(section_of(CLEAN, attacked(), lower))
    assert any("contradiction" in note for note in found) == (certified > 0.4)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_knapsack_above_another_attack_is_a_failed_search(p):
    knapsack = attacked("knapsack", accuracy=0.5, loss="0-1", details={"bound": "upper"})
    said = notes(section_of(CLEAN, attacked("autoattack", accuracy=0.4, p=p), knapsack))
    assert any("AutoAttack" in note and "search found too little" in note for note in said)
    assert not notes(section_of(CLEAN, attacked("autoattack", accuracy=0.5, p=p), knapsack))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accuracy": 0.0}, "misclassifies every image"),
        ({"accuracy": 1.0, "loss_misclassified": None}, "misclassifies nothing"),
        ({"loss_misclassified": 0.5}, "W(0) ≤ V(0)"),
        ({"upsilon": 0.0}, "Υ = 0 under CE: no image's loss changes to first order, as with constant logits"),
        ({"upsilon": None}, "no finite Υ"),
    ],
)
def test_special_cases_are_explained(changes, words):
    (note,) = notes(section_of(replace(CLEAN, **changes)))
    assert words in note


def test_ordinary_results_need_no_note():
    assert notes(section_of(CLEAN, attacked())) == []
    assert len(notes(section_of(CLEAN, attacked(dropped=3), attacked("wfgsm", set_size=900)))) == 2
