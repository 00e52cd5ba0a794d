"""The sections of a report on one network, set of images, norm and order: words, tables, figures, examples."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from wdat.records import Record
from wdat.reporting import figures, plots
from wdat.reporting.epochs import accuracy_over_epochs
from wdat.reporting.page import accuracy, number, order, picture, rich, share, table

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
Cells = list[str]


def heading(g: figures.Group, found: Sequence[figures.Group]) -> str:
    """Names a group by what tells it from the others, checkpoint and seed only where they are needed."""
    parts = [g.network, f"{g.data} {g.split}", f"{g.n} images", g.norm]
    parts += [f"checkpoint {g.checkpoint or 'none'}"] if len({x.checkpoint for x in found}) > 1 else []
    parts += [f"seed {g.seed}"] if len({x.seed for x in found}) > 1 else []
    return f"{escape(', '.join(parts))}, {order(g.p)}"


def section(g: figures.Group, prefix: str) -> str:
    """Everything on a group; `prefix` tells the identifiers of its figures from others'."""
    parts = []
    for stage in g.stages:
        said = [rich(text) for text in figures.in_words(g, stage)] or ["No clean images were scored."]
        when = "" if stage == "evaluate" else f"<b>{stage.capitalize()} training.</b> "
        items = "".join(f"<li>{text}</li>" for text in said[1:])
        parts.append(f"<p>{when}{said[0]}</p>" + (f"<ul>{items}</ul>" if items else ""))
    parts += [f'<p class="note">{rich(note)}</p>' for note in figures.special_cases(g)]
    parts += [_clean_table(g), *(_attack_table(g, delta) for delta in g.deltas), _knapsack_table(g)]
    parts += [_figures(g, prefix), _examples(g)]
    return "\n".join(p for p in parts if p)


def training_section(records: Sequence[Record], prefix: str) -> str:
    """The figure of a run's epochs, and their last figures in words."""
    last = max(r.epoch or 0 for r in records)
    ends = {(r.attack, r.loss, r.p, r.delta): r for r in records if r.epoch == last}
    said = "; ".join(
        f"{'clean' if r.attack == 'none' else f'{figures.attack_name(r)} at {figures.budget_name(r.delta, r.norm)}'} "
        f"{figures.percent(r.accuracy)}"
        for r in ends.values()
    )
    about = f"After epoch {last}, on {records[0].n} images ({records[0].split}): {said}."
    words = "Accuracy after each epoch, with 95 % intervals over images. These images may have chosen the checkpoint."
    return f"<p>{escape(about)}</p>\n{picture(accuracy_over_epochs(records), prefix, words)}"


def _clean_table(g: figures.Group) -> str:
    rows = []
    for r in (r for r in g.records if r.attack == "none"):
        cells = [escape(r.loss), accuracy(r), *map(number, (r.loss_mean, r.loss_misclassified, r.upsilon))]
        rows.append((([r.stage] if g.stages != ["evaluate"] else []) + cells, ""))
    head = ["loss", "A, %", "V(0)", "W(0)", "Υ"]
    return table("Clean images", (["stage"] if g.stages != ["evaluate"] else []) + head, rows) if rows else ""


def _attack_table(g: figures.Group, delta: float) -> str:
    """One budget: a row an attack and loss, stages side by side, the lowest accuracy of the last stage in bold."""
    stages, pair = g.stages, _pair(g)
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in g.attacked(delta=delta):
        options = json.dumps(r.options, sort_keys=True, default=str)
        rows.setdefault((r.attack, r.loss, r.p, options), {})[r.stage] = r
    lowest = min((r.accuracy for r in g.attacked(stages[-1], delta) if figures.bound_of(r) == "upper"), default=None)
    of = {stage: "" if stages == ["evaluate"] else f" {stage}" for stage in stages}
    head = ["attack", "kind", *(f"accuracy{of[s]}, %" for s in stages), *(["change"] if pair else [])]
    head += [f"R<sub>δ</sub>{of[s]}" for s in stages] + [f"distance{of[stages[-1]]}", "seconds"]
    body = []
    for key, found in rows.items():
        last = found.get(stages[-1])
        best = last is not None and last.accuracy == lowest != 0
        body.append((_attack_cells(g, key, found, list(rows)), "best" if best else ""))
    return table(f"Under attack, δ = {figures.budget_name(delta, g.norm)}", head, body + _estimates(g, delta))


def _pair(g: figures.Group) -> bool:
    return {"before", "after"} <= set(g.stages)


def _attack_cells(
    g: figures.Group, key: tuple[Any, ...], found: Mapping[str, Record], rows: Sequence[tuple[Any, ...]]
) -> Cells:
    """One attack, named by what tells it from the others."""
    attack, loss, p, options = key
    used = found.get(g.stages[-1])
    bound = " <small>(lower bound)</small>" if figures.bound_of(used or next(iter(found.values()))) == "lower" else ""
    own, rivals = json.loads(options), [json.loads(other[3]) for other in rows if other[:3] == key[:3]]
    differing = [f"{k}={own[k]}" for k in sorted(own) if any(o.get(k) != own[k] for o in rivals)]
    cells = [f"{escape(attack)} <small>{escape(', '.join([loss, *differing]))}</small>{bound}", order(p)]
    cells += [accuracy(found.get(s)) for s in g.stages]
    if _pair(g):
        both = "before" in found and "after" in found
        cells.append(f"{100 * (found['after'].accuracy - found['before'].accuracy):+.1f}" if both else "–")
    for s in g.stages:
        clean = g.clean(s, loss)
        cells.append(share(figures.ratio(found[s], clean)) if s in found and clean else "–")
    return cells + ([figures.budget_name(used.distance, g.norm), f"{used.seconds:.1f}"] if used else ["–", "–"])


def _estimates(g: figures.Group, delta: float) -> list[tuple[Cells, str]]:
    """The first-order estimates at one budget, a row a loss."""
    guesses: dict[str, dict[str, float]] = {}
    for s in g.stages:
        for loss, at, value in g.estimates(s):
            if at == delta:
                guesses.setdefault(loss, {})[s] = value
    rows = []
    for loss, values in guesses.items():
        cells = [f"{figures.ESTIMATE} (not a bound) <small>A·R<sup>l</sup>, {escape(loss)}</small>", order(g.p)]
        cells += [f"{100 * values[s]:.1f}" if s in values else "–" for s in g.stages] + (["–"] if _pair(g) else [])
        for s in g.stages:
            clean = g.clean(s, loss)
            cells.append(share(values[s] / clean.accuracy) if s in values and clean and clean.accuracy else "–")
        rows.append(([*cells, "–", "–"], "guess"))
    return rows


def _knapsack_table(g: figures.Group) -> str:
    rows = []
    for r in g.attacked():
        d = r.details
        if "critical_distance" not in d:
            continue
        whole = d.get("materialised") or {}
        left, side = whole.get("accuracy"), "least" if figures.bound_of(r) == "lower" else "most"
        lengths = [figures.budget_name(v, g.norm) for v in (r.delta, d["critical_distance"], whole.get("distance"))]
        stage = "" if r.stage == "evaluate" else f" <small>{r.stage}</small>"
        cells = [escape(r.attack) + stage, order(r.p), lengths[0], f"at {side} {accuracy(r)}", lengths[1]]
        cells += [escape(str(d.get("moved", "–"))), "–" if left is None else figures.percent(left), lengths[2]]
        rows.append((cells, ""))
    head = ["knapsack", "kind", "δ", "accuracy, %", "d*", "images moved", "whole images only", "their distance"]
    return table("Optimal division of the budget", head, rows) if rows else ""


def _figures(g: figures.Group, prefix: str) -> str:
    drawn: list[tuple[Figure | None, str]] = []
    if g.attacked():
        words = "Accuracy against budget, with 95 % intervals. Straight pieces only join measured points. "
        drawn.append((plots.accuracy_curves(g), words + "Dotted: the first-order estimate, not a bound."))
    for delta in g.deltas:
        here = sorted(g.attacked(g.stages[-1], delta), key=lambda r: -r.accuracy)
        chosen = {r.attack: r for r in here if r.p == g.p and r.attack in ("wpgd", "knapsack")}
        words = f"How far images were moved, δ = {figures.budget_name(delta, g.norm)}; d* is the largest distance that "
        words += "the knapsack pays for. Heights are densities, on a logarithmic scale."
        drawn.append((plots.radius_histogram(list(chosen.values())), words))
    words = "What the knapsack leaves, against the effort of its search. Still falling means that it isn't done."
    drawn.append((plots.accuracy_against_effort([r for r in g.attacked() if r.p == g.p]), words))
    kept = [(figure, words) for figure, words in drawn if figure]
    cards = [picture(figure, f"{prefix}{i}-", words) for i, (figure, words) in enumerate(kept)]
    return f'<h3>Figures</h3><div class="figures">{"".join(cards)}</div>' if cards else ""


def _examples(g: figures.Group) -> str:
    """Images moved furthest by the strongest gradient attack and by the knapsack, at the largest budget."""
    having = [r for r in g.attacked(g.stages[-1]) if r.details.get("examples") and r.p == g.p]
    strongest = sorted(having, key=lambda r: (-r.delta, r.accuracy))
    picked = {r.attack == "knapsack": r for r in reversed(strongest)}
    parts = []
    for r in picked.values():
        cards = []
        for e in r.details["examples"]:
            pictures = "".join(_picture(e.get(k), k) for k in ("image", "moved", "change"))
            verdict = f"{e.get('label')} → {e.get('prediction')}, moved {figures.budget_name(e.get('radius'), r.norm)}"
            cards.append(f"<figure><div>{pictures}</div><figcaption>{escape(verdict)}</figcaption></figure>")
        name, delta = escape(figures.attack_name(r)), figures.budget_name(r.delta, r.norm)
        parts.append(f"<h3>Images that {name} moved furthest, δ = {delta}</h3>"
                     "<p class='soft'>Image, moved image, change (amplified to full contrast, each by its own factor); "
                     f"class before and after.</p><div class='grid'>{''.join(cards)}</div>")  # fmt: skip
    return "".join(parts)


def _picture(data: object, what: str) -> str:
    """A picture from base64 text; nothing where the text is anything but a PNG file."""
    try:
        content = base64.b64decode(str(data), validate=True)
    except (binascii.Error, ValueError):
        return ""
    written = base64.b64encode(content).decode()
    return f'<img alt="{what}" src="data:image/png;base64,{written}">' if content.startswith(PNG) else ""
