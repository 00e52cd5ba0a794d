"""One self-contained HTML page from records: the result in words, tables and pictures, and how to repeat it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wdat.errors import SettingError
from wdat.evaluation import figures, plots
from wdat.records import Record

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser runs and fetches nothing here
STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--soft:#5d646d;--page:#fbfbfa;--card:#fff;--line:#d9dce0;--mark:#1f5fa8;
--note:#fdf3e3}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ec;--soft:#a3abb5;--page:#15181c;--card:#1e2227;--line:#3a4048;
--mark:#86b8f0;--note:#3a2f1c}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:1rem 1rem 4rem;background:var(--page);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
overflow-wrap:anywhere}h1{font-size:1.6rem;line-height:1.2;margin:.6rem 0}h2{font-size:1.25rem;line-height:1.3;
margin:2.6rem 0 .4rem;padding-top:.9rem;border-top:1px solid var(--line)}h3{font-size:1.02rem;margin:1.6rem 0 .4rem}
p,ul,dl{margin:.5rem 0}a{color:var(--mark)}.soft,figcaption,caption{color:var(--soft);font-size:.86rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;background:var(--card);margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}caption{text-align:left;
padding:.5rem .7rem}th,td{padding:.4rem .7rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}th:first-child,td:first-child{text-align:left;
position:sticky;left:0;background:var(--card);white-space:normal;min-width:11rem}
sub,sup{line-height:0;font-size:.7em}tr.best td{font-weight:700}tr.guess td{font-style:italic}
td small{color:var(--soft);font-weight:400}.note{background:var(--note);border-radius:.5rem;padding:.5rem .8rem}
.figures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
figure{margin:.4rem 0}figure.plot{background:#fff;color:#1c1f23;border:1px solid var(--line);border-radius:.5rem;
padding:.6rem;max-width:34rem}figure.plot figcaption{color:#5d646d}figure.plot svg{display:block;width:100%;height:auto}
.grid{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}.grid figure{margin:0}
.grid div{display:flex;gap:2px}.grid img{width:calc((100% - 4px)/3);image-rendering:pixelated;border-radius:3px}
.facts{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.2rem 1rem;font-size:.9rem}.facts dt{
color:var(--soft)}.facts dd{margin:0}code{font-size:.85em;white-space:pre-wrap}
@media(max-width:32rem){.facts{grid-template-columns:1fr}.facts dd{margin-bottom:.4rem}h1{font-size:1.35rem}
body{padding:.7rem .8rem 3rem}figure.plot{padding:.3rem .1rem}figure.plot figcaption{padding:.3rem .5rem}
th,td{padding:.35rem .5rem}th:first-child,td:first-child{min-width:7.6rem}}
@media print{:root{--ink:#000;--soft:#444;--page:#fff;--card:#fff;--line:#bbb;--mark:#000;--note:#f4f4f4}
body{max-width:none;font-size:11pt}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}.scroll{overflow:visible}
table{font-size:8pt}th,td{padding:.2rem .35rem;white-space:normal}}
"""


def write_report(records: Sequence[Record], path: Path) -> None:
    """Write the page; the same records give the same bytes.

    Args:
        records: Of any number of evaluations and runs; those of stage `epoch` are left out.
        path: The HTML file.

    Raises:
        SettingError: If no record is of stage `before`, `after` or `evaluate`.
    """
    page = render(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may hold what is no text


def render(records: Sequence[Record]) -> str:
    """The page as text; raises as `write_report`."""
    found = figures.groups(records)
    if not found:
        raise SettingError("a report needs records of stage before, after or evaluate; run an evaluation first")
    networks = list(dict.fromkeys(g.network for g in found))
    title = f"Robustness of {', '.join(networks)}"
    links = [f'<li><a href="#g{i}">{_heading(g, found)}</a></li>' for i, g in enumerate(found, 1)]
    links += ['<li><a href="#reading">How to read this</a></li>', '<li><a href="#again">How to repeat it</a></li>']
    body = [f"<h1>{escape(title)}</h1>", f"<nav aria-label='Contents'><ul>{''.join(links)}</ul></nav>"]
    left_out = sum(r.stage not in figures.STAGES for r in records)
    about = f"{sum(len(g.records) for g in found)} records; intervals are at 95 %."
    about += f" {left_out} records of single epochs are left out." if left_out else ""
    body.insert(1, f'<p class="soft">{about}</p>')
    body += [_section(g, i, found) for i, g in enumerate(found, 1)]
    body += [READING, _again(found)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _heading(g: figures.Group, found: Sequence[figures.Group]) -> str:
    """Names a group by what tells it from the others, checkpoint and seed only where they are needed."""
    parts = [g.network, f"{g.data} {g.split}", f"{g.n} images", g.norm]
    parts += [f"checkpoint {g.checkpoint or 'none'}"] if len({x.checkpoint for x in found}) > 1 else []
    parts += [f"seed {g.seed}"] if len({x.seed for x in found}) > 1 else []
    return f"{escape(', '.join(parts))}, {_order(g.p)}"


def _order(p: float) -> str:
    return _rich(figures.order_name(p))


def _section(g: figures.Group, number: int, found: Sequence[figures.Group]) -> str:
    parts = [f'<h2 id="g{number}">{_heading(g, found)}</h2>']
    for stage in g.stages:
        said = [_rich(text) for text in figures.in_words(g, stage)] or ["No clean images were scored."]
        when = "" if stage == "evaluate" else f"<b>{stage.capitalize()} training.</b> "
        items = "".join(f"<li>{text}</li>" for text in said[1:])
        parts.append(f"<p>{when}{said[0]}</p>" + (f"<ul>{items}</ul>" if items else ""))
    parts += [f'<p class="note">{_rich(note)}</p>' for note in figures.special_cases(g)]
    parts += [_clean_table(g), *(_attack_table(g, delta) for delta in g.deltas), _knapsack_table(g)]
    parts += [_figures(g, f"g{number}-"), _examples(g)]
    return "\n".join(p for p in parts if p)


def _clean_table(g: figures.Group) -> str:
    rows = []
    for r in (r for r in g.records if r.attack == "none"):
        cells = [escape(r.loss), _accuracy(r), *map(_number, (r.loss_mean, r.loss_misclassified, r.upsilon))]
        rows.append((([r.stage] if g.stages != ["evaluate"] else []) + cells, ""))
    head = ["loss", "A, %", "V(0)", "W(0)", "Υ"]
    return _table("Clean images", (["stage"] if g.stages != ["evaluate"] else []) + head, rows) if rows else ""


def _attack_table(g: figures.Group, delta: float) -> str:
    """One budget: a row an attack and loss, stages side by side, the lowest accuracy of the last stage in bold."""
    stages = g.stages
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in g.attacked(delta=delta):
        options = json.dumps(r.options, sort_keys=True, default=str)
        rows.setdefault((r.attack, r.loss, r.p, options), {})[r.stage] = r
    lowest = min((r.accuracy for r in g.attacked(stages[-1], delta) if figures.bound_of(r) == "upper"), default=None)
    plain = stages == ["evaluate"]
    head = ["attack", "kind", *(f"accuracy{'' if plain else f' {s}'}, %" for s in stages)]
    pair = {"before", "after"} <= set(stages)
    head += (["change"] if pair else []) + [f"R<sub>δ</sub>{'' if plain else f' {s}'}" for s in stages]
    head += [f"distance{'' if plain else f' {stages[-1]}'}", "seconds"]
    body = []
    for (attack, loss, p, options), found in rows.items():
        last = found.get(stages[-1]) or next(iter(found.values()))
        bound = " <small>(lower bound)</small>" if figures.bound_of(last) == "lower" else ""
        own = json.loads(options)
        rivals = [json.loads(o) for a, of, order, o in rows if (a, of, order) == (attack, loss, p)]
        differing = [f"{k}={own[k]}" for k in sorted(own) if any(o.get(k) != own[k] for o in rivals)]
        what = ", ".join([loss, *differing])
        cells = [f"{escape(attack)} <small>{escape(what)}</small>{bound}", _order(p)]
        cells += [_accuracy(found.get(s)) for s in stages]
        if pair:
            both = "before" in found and "after" in found
            cells.append(f"{100 * (found['after'].accuracy - found['before'].accuracy):+.1f}" if both else "–")
        for s in stages:
            clean = g.clean(s, loss)
            cells.append(_ratio(figures.ratio(found[s], clean)) if s in found and clean else "–")
        used = found.get(stages[-1])
        cells += [figures.budget_name(used.distance, g.norm), f"{used.seconds:.1f}"] if used else ["–", "–"]
        body.append((cells, "best" if stages[-1] in found and last.accuracy == lowest != 0 else ""))
    guesses: dict[str, dict[str, float]] = {}
    for s in stages:
        for loss, at, value in g.estimates(s):
            if at == delta:
                guesses.setdefault(loss, {})[s] = value
    for loss, values in guesses.items():
        cells = [f"{figures.ESTIMATE} (not a bound) <small>A·R<sup>l</sup>, {escape(loss)}</small>", _order(g.p)]
        cells += [f"{100 * values[s]:.1f}" if s in values else "–" for s in stages] + (["–"] if pair else [])
        for s in stages:
            clean = g.clean(s, loss)
            cells.append(_ratio(values[s] / clean.accuracy) if s in values and clean and clean.accuracy else "–")
        body.append(([*cells, "–", "–"], "guess"))
    return _table(f"Under attack, δ = {figures.budget_name(delta, g.norm)}", head, body)


def _knapsack_table(g: figures.Group) -> str:
    rows = []
    for r in g.attacked():
        d = r.details
        if "critical_distance" not in d:
            continue
        whole = d.get("materialised") or {}
        share, side = whole.get("accuracy"), "least" if figures.bound_of(r) == "lower" else "most"
        lengths = [figures.budget_name(v, g.norm) for v in (r.delta, d["critical_distance"], whole.get("distance"))]
        stage = "" if r.stage == "evaluate" else f" <small>{r.stage}</small>"
        cells = [escape(r.attack) + stage, _order(r.p), lengths[0], f"at {side} {_accuracy(r)}", lengths[1]]
        cells += [escape(str(d.get("moved", "–"))), "–" if share is None else figures.percent(share), lengths[2]]
        rows.append((cells, ""))
    head = ["knapsack", "kind", "δ", "accuracy, %", "d*", "images moved", "whole images only", "their distance"]
    return _table("Optimal division of the budget", head, rows) if rows else ""


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
    cards = [
        f'<figure class="plot">{plots.to_svg(figure, f"{prefix}{i}-", words)}<figcaption>{words}</figcaption></figure>'
        for i, (figure, words) in enumerate(kept)
    ]
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


READING = """<h2 id="reading">How to read this</h2><ul>
<li>Every accuracy under an attack is an <b>upper bound</b> of adversarial accuracy A<sub>δ</sub>: a stronger attack
can only lower it. R<sub>δ</sub> is accuracy under attack over clean accuracy; it is null where the latter is 0.</li>
<li>W<sub>p</sub> attacks share one budget: the p-mean of all distances is at most δ, so that one image may move far and
another not at all. Pointwise attacks move each image by at most δ.</li>
<li>The knapsack moves first the images that are cheapest to flip, which is optimal for the distances found. Distances
that a search finds are never too small, so it too gives an upper bound. d* is the largest distance paid for.</li>
<li>A·R<sup>l</sup> is a <b>first-order estimate</b> of a lower bound, valid as δ → 0. At usual budgets it can exceed
A<sub>δ</sub>; it is not a bound. It doesn't exist where W(0) ≤ V(0) or nothing is misclassified.</li>
<li>V(0) is the mean loss on clean images, W(0) that over misclassified ones, Υ the sensitivity: how fast the worst-case
loss grows with δ. Budgets and distances are in pixel units of [0, 1].</li>
<li>Intervals are bootstrap intervals over images. For W<sub>p</sub> attacks they are <b>conditional</b> on fixed
outcomes: another sample would divide the budget differently. The knapsack is solved anew in each resample.</li>
<li>The out-of-sample guarantee of arXiv 2306.09844 is vacuous at image dimension: this page describes these
images.</li>
</ul>"""


def _again(found: Sequence[figures.Group]) -> str:
    """Everything that a repetition needs; values that differ between records are all listed."""
    records = [r for g in found for r in g.records]
    facts = {
        "network": (r.network for r in records),
        "checkpoint": (r.checkpoint or "the registry's own, or none" for r in records),
        "data": (f"{r.data}, {r.split}, {r.n} images" for r in records),
        "seed": (str(r.seed) for r in records),
        "device": (r.device for r in records),
        "commit": (r.commit or "unknown" for r in records),
        "versions": (", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())) for r in records),
    }
    distinct = {name: "<br>".join(escape(v) for v in dict.fromkeys(values)) for name, values in facts.items()}
    out = [f"<dt>{name}</dt><dd>{values}</dd>" for name, values in distinct.items()]
    attacks = [
        f"<dt>{escape(figures.attack_name(r))}, {_order(r.p)}; interval: {figures.interval_of(r)}</dt>"
        f"<dd><code>{escape(json.dumps(r.options, sort_keys=True, default=str))}</code></dd>"
        for r in records
        if r.attack != "none"
    ]
    out += list(dict.fromkeys(attacks))
    return f'<h2 id="again">How to repeat it</h2><dl class="facts">{"".join(out)}</dl>'


def _table(caption: str, head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    """A table in its own scrolling box; cells are HTML."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(f'<tr class="{kind}">{"".join(f"<td>{c}</td>" for c in cells)}</tr>' for cells, kind in rows)
    table = f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _rich(text: str) -> str:
    """Plain text as HTML, with its subscripts."""
    return re.sub(r"\b([AWR])_(δ|[\d.]+)", r"\1<sub>\2</sub>", escape(text))


def _accuracy(r: Record | None) -> str:
    if r is None:
        return "–"
    return f"{100 * r.accuracy:.1f} <small>[{100 * r.accuracy_low:.1f}, {100 * r.accuracy_high:.1f}]</small>"


def _number(value: float | None) -> str:
    return "null" if value is None or not math.isfinite(value) else f"{value + 0.0:.4g}"


def _ratio(value: float | None) -> str:
    return "null" if value is None else f"{value:.3f}"
