"""The tables of docs/cost.md, docs/devices.md and docs/synthetic.md, in Markdown, from the committed records.

python -m benchmarks.summary [results]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ESTIMATORS = ("table", "uncorrected table", "subsample", "ema", "batch")
COST = {
    "table": "{share:.1f} % of a step",
    "uncorrected table": "as much",
    "subsample": "1,024 images every 10 steps",
    "ema": "free",
    "batch": "free",
}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_line(head), _line(["---"] * len(head)), *map(_line, rows)])


def upsilon(record: dict[str, Any]) -> str:
    """Errors of the estimators at the record's first rate: median and maximum over the run, in percent."""
    rate = record["settings"]["rates"][0]
    rows = {(r["radii_loss"], r["norm"], r["estimator"]): r for r in record["rows"] if r["rate"] == rate}
    share = 100 * max(r["share_of_step"] for r in record["rows"] if "share_of_step" in r)
    columns = [("ce", "linf", "upsilon"), ("ce", "l2", "upsilon"), ("redlr", "linf", "c"), ("redlr", "l2", "c")]
    head = ["estimator", "Υ, CE, l∞", "Υ, CE, l2", "c, ReDLR, l∞", "c, ReDLR, l2", "cost"]
    lines = []
    for name in ESTIMATORS:
        cells = [rows[loss, norm, name][key] for loss, norm, key in columns]
        errors = [f"{100 * c['median']:.1f} / {100 * c['max']:.1f}" for c in cells]
        lines.append([f"`{name}`" if " " not in name else name, *errors, COST[name].format(share=share)])
    return _markdown(head, lines)


def step(record: dict[str, Any]) -> str:
    """Ratios of the time of a step: medians over rounds."""
    ratios = {row["norm"]: row["ratios"] for row in record["rows"]}
    zero = {row["norm"]: row["zero_radii"] for row in record["rows"]}
    lines = []
    for kind in ("wdat, ce", "wdat, redlr"):
        for other in ("trades", "trades, as usual"):
            name = f"{kind} / {other}"
            shares = ", ".join(f"{100 * zero[norm][kind]:.0f} %" for norm in ratios)
            cells = [f"{ratios[norm][name]['median']:.2f}" for norm in ratios]
            lines.append(
                [f"W-DAT, {kind[6:].replace('ce', 'CE').replace('redlr', 'ReDLR')} radii", other, *cells, shares]
            )
    return _markdown(["a step of", "against a step of", *ratios, "images with radius zero"], lines)


def attack(record: dict[str, Any]) -> str:
    """Speed of W-PGD as a share of a plain loop's."""
    cells = [f"{row['ratio']['median']:.2f}" for row in record["rows"]]
    return _line([f"`{record['settings']['network']}`", *cells])


def faults(record: dict[str, Any]) -> str:
    """What happened to runs with faults, by kind."""
    head = ["fault", "cases", "ended as if nothing had been", "hung", "stopped before the first checkpoint"]
    head += ["steps made again: median (most)", "seconds to the end: most"]
    lines = []
    for row in record["rows"]:
        lost = f"{row['lost']['median']:.0f} ({row['lost']['max']})" if row["lost"] else "–"
        counts = [str(row[key]) for key in ("cases", "equal", "hung", "nothing_saved_yet")]
        lines.append([row["kind"], *counts, lost, f"{row['seconds_to_end']['max']:.1f}"])
    return _markdown(head, lines)


def pool(record: dict[str, Any]) -> str:
    """What a batch costs with a large pool and with a small one, by the clock and by the processor."""
    sizes = (record["row"]["images"], record["settings"]["against"])
    head = ["milliseconds", *(f"{size:,} images" for size in sizes), "ratio"]
    lines = []
    for kind, said in (("loading", "loading a batch"), ("step", "a training step")):
        for name, found in record["row"][kind].items():
            cells = [f"{1000 * found[which]['median']:.1f}" for which in ("large", "small")]
            lines.append([f"{said}, by the {name}", *cells, f"{found['ratio']['median']:.2f}"])
    return _markdown(head, lines)


def waits(record: dict[str, Any]) -> str:
    """How often the host waits, and collective operations of two processes, before and after the change."""
    found = {
        label: {(r["what"], r["attack"], r["norm"], r["processes"]): r for r in rows}
        for label, rows in record["runs"].items()
    }
    head = ["waits, before → after", "linf", "l2", "two processes, linf", "l2", "collectives"]
    lines = []
    for what, attack in dict.fromkeys(key[:2] for key in found["after"]):
        cells = [f"{'evaluation' if what == 'evaluation' else 'step'}, `{attack}`"]
        for processes in (1, 2):
            for norm in ("linf", "l2"):
                pair = [found[label][what, attack, norm, processes] for label in ("before", "after")]
                cells.append(" → ".join(str(row["waits"]) for row in pair))
        lines.append([*cells, " → ".join(str(row["collectives"]) for row in pair)])
    return _markdown(head, lines)


def main() -> None:
    """Print all of them."""
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
    names = ("upsilon", "step", "attack", "faults", "pool", "waits")
    records = {name: json.loads((place / f"{name}.json").read_text()) for name in names}
    more = json.loads((place / "attack_preact_resnet18.json").read_text())
    head = ["network", *(row["norm"] for row in more["rows"])]
    print(upsilon(records["upsilon"]), step(records["step"]), sep="\n\n", end="\n\n")
    print(_line(head), _line(["---"] * len(head)), attack(records["attack"]), attack(more), sep="\n", end="\n\n")
    print(faults(records["faults"]), pool(records["pool"]), waits(records["waits"]), sep="\n\n")


if __name__ == "__main__":
    main()
