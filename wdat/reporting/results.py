"""The tables and notes of a report on one section: the answer, clean figures, attacks, the knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from wdat.records import budget_name
from wdat.reporting.compare import CHANGE
from wdat.reporting.frame import Section, loss_name, order_name, percent
from wdat.reporting.tables import NUMBERS, Grid, interval

ESTIMATE = "first-order estimate"
ENDS = ("accuracy", "accuracy_low", "accuracy_high")
GAP = 1e-9  # of accuracies that are equal


def answer(section: Section) -> Grid | None:
    """A row a budget: clean accuracy, the strongest attack of each kind, the certified end; None without attacks."""
    rows = section.attacked.assign(kind=lambda f: [_kind(r) for r in f.itertuples()])
    rows = rows[(rows["bound"] != "lower") | (rows["p"] == section.p)]
    best = rows.sort_values("accuracy").assign(key=rows["bound"].eq("lower"))
    best = pd.concat([best[~best["key"]], best[best["key"]].iloc[::-1]])  # the largest of the lower bounds
    best = best.drop_duplicates(["stage", "delta", "kind"]).set_index(["stage", "delta", "kind"])
    if best.empty:
        return None
    kinds = [k for k in ("pointwise", "shared budget", "knapsack", "certified") if k in best.index.levels[2]]
    names = {k: best.xs(k, level="kind")["name"].unique() for k in kinds}
    titles = {k: _column(k, names[k], section) for k in kinds}
    lines = []
    for delta in section.deltas:
        line = {"δ": budget_name(delta, section.norm), "clean": _clean_cell(section)}
        for kind in kinds:
            found = [best.loc[key] if (key := (s, delta, kind)) in best.index else None for s in section.stages]
            line[titles[kind]] = _arrow(found, len(names[kind]) > 1)
        lines.append(line)
    arrow = ", before → after training" if len(section.stages) > 1 else ""
    title = f"Accuracy in percent{arrow} [95 % interval]; under attack each is an upper bound of A_δ"
    title += ", certified a lower one" if "certified" in kinds else ""
    cells = pd.DataFrame(lines)
    return Grid(cells, title, numbers=tuple(cells.columns))


def _kind(r: Any) -> str:
    if r.bound == "lower":
        return "certified"
    if r.attack == "knapsack":
        return "knapsack" if not math.isinf(r.p) else "pointwise"
    return "pointwise" if math.isinf(r.p) else "shared budget"


def _column(kind: str, names: Any, section: Section) -> str:
    threat = {"pointwise": "pointwise", "shared budget": order_name(section.p)}.get(kind, order_name(section.p))
    if kind == "certified":
        return f"certified, {threat}"
    return f"{names[0] if len(names) == 1 else 'strongest attack'}, {threat}"


def _clean_cell(section: Section) -> str:
    return _arrow([None if f.empty else f.iloc[-1] for f in (_clean(section, s) for s in section.stages)], False)


def _clean(section: Section, stage: str) -> pd.DataFrame:
    return section.rows[(section.rows["stage"] == stage) & (section.rows["attack"] == "none")]


def _arrow(found: list[Any], named: bool) -> str:
    """Figures of the stages in order, the last with its interval."""
    if not any(r is not None for r in found):
        return "–"
    texts = [percent(None if r is None else r["accuracy"], 1) for r in found[:-1]]
    last = found[-1]
    texts.append(
        "–" if last is None else interval(last["accuracy"], last["accuracy_low"], last["accuracy_high"], digits=1)
    )
    names = dict.fromkeys(r["name"] for r in found if r is not None) if named else {}
    return " → ".join(texts) + (f" {', '.join(names)}" if names else "")


def clean(section: Section) -> Grid | None:
    """Accuracy, V(0), W(0) and Υ of clean images, a row a stage and loss."""
    rows = section.rows[section.rows["attack"] == "none"]
    if rows.empty:
        return None
    cells = pd.DataFrame(
        {"stage": rows["stage"], "loss": rows["loss"].map(loss_name),
         "A, %": [interval(r.accuracy, r.accuracy_low, r.accuracy_high, digits=1) for r in rows.itertuples()],
         "V(0)": rows["loss_mean"].map(_number), "W(0)": rows["loss_misclassified"].map(_number),
         "Υ": rows["upsilon"].map(_number)}
    )  # fmt: skip
    cells = cells if len(section.stages) > 1 else cells.drop(columns="stage")
    return Grid(cells, "Clean images", numbers=("A, %", "V(0)", "W(0)", "Υ"))


def _number(value: float | None) -> str:
    return "null" if value is None or pd.isna(value) or math.isinf(value) else f"{value + 0.0:.4g}"


def attacks(section: Section) -> Grid | None:
    """A row a budget, attack and setting, stages side by side, the lowest accuracy of each budget marked."""
    rows, stages = section.attacked, section.stages
    if rows.empty:
        return None
    when = {stage: f" {stage}" if len(stages) > 1 else "" for stage in stages}
    lines: list[tuple[float, dict[str, str]]] = []
    lowest: dict[int, tuple[float, float]] = {}
    for (delta, name, threat, bound, _), own in rows.groupby(
        ["delta", "name", "threat", "bound", "options"], sort=False
    ):
        found = {r["stage"]: r for _, r in own.iterrows()}
        last = found.get(stages[-1])
        line = {"δ": budget_name(delta, section.norm), "attack": name, "threat": threat}
        line["settings"] = _differing(own.iloc[0], rows)
        line |= _figures(found, when)
        line["distance"] = "–" if last is None else budget_name(last["distance"], section.norm, delta)
        line["seconds"] = "–" if last is None else f"{last['seconds']:.1f}"
        line["attack"] += ", lower bound" if bound == "lower" else ""
        if last is not None and bound == "upper" and last["accuracy"] > 0:
            lowest[len(lines)] = (delta, last["accuracy"])
        lines.append((delta, line))
    tops = {delta: min(a for d, a in lowest.values() if d == delta) for delta, _ in lowest.values()}
    marked = {i for i, (delta, accuracy) in lowest.items() if accuracy == tops[delta]}
    guesses: dict[tuple[float, str], dict[str, Any]] = {}
    for stage, loss, delta, value in section.estimates():
        base = section.clean(stage)
        row = {"accuracy": value, "accuracy_low": None, "accuracy_high": None, "ratio": value / base if base else None}
        guesses.setdefault((delta, loss), {})[stage] = row
    for (delta, loss), found in guesses.items():
        line = {"δ": budget_name(delta, section.norm), "attack": f"{ESTIMATE} ({loss_name(loss)}), not a bound"}
        line |= {"threat": order_name(section.p), "settings": "", **_figures(found, when)}
        lines.append((delta, {**line, "distance": "–", "seconds": "–"}))
    order = sorted(range(len(lines)), key=lambda i: lines[i][0])
    cells = pd.DataFrame([lines[i][1] for i in order])
    cells = cells.drop(columns=[c for c in ("settings",) if not cells[c].any()])
    figures = [c for c in cells.columns if c.startswith(("accuracy", "R_δ"))]
    best = frozenset((at, f"accuracy{when[stages[-1]]}, %") for at, i in enumerate(order) if i in marked)
    return Grid(cells, "Under attack", best=best, numbers=(*NUMBERS, *figures, "δ"))


def _figures(found: Mapping[str, Any], when: Mapping[str, str]) -> dict[str, str]:
    """Accuracies and R_δ of the stages, and the change where there are both; in records of equally many images."""
    line = {}
    for stage, words in when.items():
        r = found.get(stage)
        line[f"accuracy{words}, %"] = (
            "–" if r is None else interval(r["accuracy"], r["accuracy_low"], r["accuracy_high"], digits=1)
        )
    if {"before", "after"} <= set(when):
        both = {"before", "after"} <= set(found)
        line[CHANGE] = f"{100 * (found['after']['accuracy'] - found['before']['accuracy']):+.1f}" if both else "–"
    for stage, words in when.items():
        value = None if found.get(stage) is None else found[stage]["ratio"]
        line[f"R_δ{words}"] = "–" if value is None or pd.isna(value) else f"{value:.3f}"
    return line


def _differing(r: pd.Series, rows: pd.DataFrame) -> str:
    """The settings in which a row differs from others of the same attack, loss and threat."""
    rivals = rows[(rows["name"] == r["name"]) & (rows["threat"] == r["threat"])]["options"]
    shared = set.intersection(*(set(own.split(", ")) for own in rivals))
    return ", ".join(o for o in r["options"].split(", ") if o not in shared)


def knapsack(section: Section) -> Grid | None:
    """What the optimal division of the budget did, a row a budget and stage."""
    lines = []
    for r in section.attacked.itertuples():
        if "critical_distance" not in r.details:
            continue
        whole = r.details.get("materialised") or {}
        shown = [budget_name(v, r.norm, r.delta) for v in (r.details["critical_distance"], whole.get("distance"))]
        side = "at least" if r.bound == "lower" else "at most"
        lines.append(
            {"δ": r.budget, "stage": r.stage, "by": f"{r.attack}, {r.threat}",
             "accuracy, %": f"{side} {interval(r.accuracy, r.accuracy_low, r.accuracy_high, digits=1)}", "d*": shown[0],
             "images moved": str(r.details.get("moved", "–")), "whole images only": percent(whole.get("accuracy"), 1),
             "their distance": shown[1]}
        )  # fmt: skip
    if not lines:
        return None
    cells = pd.DataFrame(lines)
    cells = cells if len(section.stages) > 1 else cells.drop(columns="stage")
    return Grid(
        cells, "Optimal division of the budget", numbers=tuple(c for c in cells.columns if c not in ("stage", "by"))
    )


def notes(section: Section) -> list[str]:
    """What degenerate cases and contradictions mean, one text for each that occurs."""
    said: dict[str, list[str]] = {}
    for r in section.rows[section.rows["attack"] == "none"].itertuples():
        who, loss = "The network" if r.stage == "evaluate" else f"The network {r.stage} training", loss_name(r.loss)
        if r.accuracy == 0:
            said[f"{who} misclassifies every image: nothing is left to attack, every accuracy is 0, and R_δ and the "
                 f"{ESTIMATE} don't exist."] = []  # fmt: skip
        elif r.accuracy == 1:
            said[f"{who} misclassifies nothing here: W(0), the mean loss over misclassified images, doesn't exist, "
                 f"and so the {ESTIMATE} doesn't either."] = []  # fmt: skip
        elif r.loss_misclassified <= r.loss_mean:
            said.setdefault(f"{who} has W(0) ≤ V(0) under @: the {ESTIMATE} doesn't exist.", []).append(loss)
        if r.upsilon == 0:
            said.setdefault(f"{who} has Υ = 0 under @: no image's loss changes to first order, as with constant "
                            "logits or a saturated loss. Gradient attacks don't move the images then, and accuracy "
                            "under them says nothing about robustness.", []).append(loss)  # fmt: skip
        elif pd.isna(r.upsilon):
            said.setdefault(f"{who} has no finite Υ under @, or it wasn't measured.", []).append(loss)
    for r in section.attacked.itertuples():
        if r.dropped:
            said[f"{r.name} left out {r.dropped} of {r.set_size} images: no finite gradient."] = []
        if r.set_size != r.n:
            said[f"{r.name} shared its budget over {r.set_size} images; {r.n} are scored."] = []
    texts = [text.replace("@", ", ".join(losses)) if losses else text for text, losses in said.items()]
    return texts + _contradictions(section)


def _contradictions(section: Section) -> list[str]:
    """A lower bound above an upper one; a knapsack above another attack that its ball contains."""
    found = []
    for (_, delta), here in section.attacked.groupby(["stage", "delta"], sort=False):
        at, upper = budget_name(delta, section.norm), here[here["bound"] == "upper"]
        lower = here[(here["bound"] == "lower") & (here["p"] == section.p)]["accuracy"]
        if len(lower) and len(upper) and lower.max() > upper["accuracy"].min() + GAP:
            found.append(
                f"At δ = {at} certified accuracy is above accuracy under an attack. That is a contradiction: check "
                "that the certificates belong to this network, norm, unit and order of images."
            )
        for r in upper[upper["attack"] == "knapsack"].itertuples():
            left, unfound = r.details.get("pointwise_accuracy"), r.details.get("unfound")
            if unfound:
                found.append(
                    f"At δ = {at} the knapsack's search found no misclassified point at any distance for {unfound} of "
                    f"{r.n} images, which count as robust: more than a few mean that gradients vanish or mislead."
                )
            pointwise = upper[(upper["attack"] == "autoattack") & (upper["p"] == math.inf)]
            if left is not None and len(pointwise) and left > pointwise["accuracy"].min() + 0.5 / r.n:
                found.append(
                    f"At δ = {at} the knapsack's points leave {100 * left:.1f} % at p = ∞, and AutoAttack leaves "
                    f"{100 * pointwise['accuracy'].min():.1f} %: the search missed points, as where a network masks "
                    "its gradients, and its figures are too high. Search longer."
                )
            others = upper[(upper["p"] >= r.p) & (upper["accuracy"] < r.accuracy - GAP)]
            if len(others):
                names = ", ".join(others["name"].unique())
                found.append(
                    f"At δ = {at} {names} leaves less than the knapsack, {r.threat}, whose ball contains it: its "
                    "search found too little, as where a network masks its gradients. Search longer."
                )
    return list(dict.fromkeys(found))
