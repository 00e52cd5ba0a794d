"""How to read a report, and how to repeat what it reports: command, commit, versions, data, seeds, devices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from wdat.records import Record
from wdat.reporting import figures
from wdat.reporting.page import order
from wdat.reporting.runs import Run

READING = (
    "reading",
    "How to read this",
    """<ul>
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
</ul>""",
)


def facts(records: Sequence[Record], command: str | None) -> dict[str, str]:
    """Everything that a repetition needs, as HTML; values that differ between records are all listed."""
    unknown = "unknown: no .hydra/overrides.yaml lies beside the records"
    return {"command": f"<pre><code>{escape(command)}</code></pre>" if command else unknown, **_measured_on(records)}


def collection_facts(runs: Sequence[Run]) -> dict[str, str]:
    """The same for many runs: the folder and the command of each, and what their records say."""
    items = []
    for run in runs:
        what = f"{run.arm or run.place}, seed {', '.join(map(str, run.seeds))}: {run.path}"
        items.append(f"{escape(what)}" + (f"<pre><code>{escape(run.command)}</code></pre>" if run.command else ""))
    said = {"runs": "<br>".join(items)}
    if not any(run.command for run in runs):
        said["command"] = "unknown: no .hydra/overrides.yaml lies beside the records"
    return said | _measured_on([r for run in runs for r in run.records])


def _measured_on(records: Sequence[Record]) -> dict[str, str]:
    values: Mapping[str, Iterable[str]] = {
        "network": (r.network for r in records),
        "checkpoint": (r.checkpoint or "the registry's own, or none" for r in records),
        "data": (f"{r.data}, {r.split}, {r.n} images" for r in records),
        "seed": (str(r.seed) for r in records),
        "device": (r.device for r in records),
        "commit": (r.commit or "unknown" for r in records),
        "versions": (", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())) for r in records),
    }
    return {name: "<br>".join(escape(v) for v in dict.fromkeys(found)) for name, found in values.items()}


def how_to_repeat(said: Mapping[str, str], records: Sequence[Record]) -> str:
    """Facts, then every attack's settings.

    Args:
        said: HTML by name.
        records: Of the attacks.
    """
    out = [f"<dt>{name}</dt><dd>{values}</dd>" for name, values in said.items()]
    attacks = [
        f"<dt>{escape(figures.attack_name(r))}, {order(r.p)}; interval: {figures.interval_of(r)}</dt>"
        f"<dd><code>{escape(_options(r))}</code></dd>"
        for r in records
        if r.attack != "none"
    ]
    return f'<dl class="facts">{"".join([*out, *dict.fromkeys(attacks)])}</dl>'


def _options(r: Record) -> str:
    """An attack's settings; its seed only where it isn't the run's."""
    kept = {k: v for k, v in r.options.items() if k != "seed" or v != r.seed}
    return json.dumps(kept, sort_keys=True, default=str)
