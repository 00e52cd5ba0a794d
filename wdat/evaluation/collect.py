"""Gathers the records of several runs into one table: mean ± standard deviation over seeds.

    python -m wdat.evaluation.collect DIR...

Every JSON file of records below the folders is read.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from wdat.console import printable, readable_errors
from wdat.errors import SettingError
from wdat.records import Record, read

Key = tuple[str, str, str, str, str, float, str, float, str]


def find(places: Iterable[Path]) -> list[Record]:
    """All records in files named, and in every JSON file below folders named.

    Raises:
        SettingError: If a place holds none.
    """
    found: list[Record] = []
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob("*.json"))
        before = len(found)
        for file in files:
            try:
                found += read(file)
            except SettingError:
                if place.is_file() or file.name == "records.json":
                    raise  # other JSON files below a folder, such as a logger's, are none of ours
        if len(found) == before:
            raise SettingError(f"{place} holds no records; name the folder of a run or of a multirun")
    return found


def table(records: Sequence[Record], stages: Sequence[str] = ("before", "after", "evaluate")) -> str:
    """Markdown: one row a network, data set, attack, loss and budget; accuracy in percent over seeds.

    Args:
        records: Of any number of runs; the latest of equal ones counts.
        stages: Which stages become columns, where they occur.
    """
    groups: dict[Key, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if r.stage in stages:
            key = (r.network, r.data, r.split, r.attack, r.loss, r.p, r.norm, r.delta, _options(r))
            groups[key][r.stage][r.seed] = r
    shown = Counter(key[:-1] for key in groups)
    columns = [s for s in stages if any(s in g for g in groups.values())]
    lines = ["| network | data | attack | budget | n | seeds | " + " | ".join(columns) + " | change |"]
    lines += ["| " + " | ".join(["---"] * (len(columns) + 7)) + " |"]
    for key, group in groups.items():
        network, data, split, attack, loss, p, norm, delta, options = key
        name = f"clean ({loss})" if attack == "none" else f"{attack} {loss}, W_{p:g}"
        if shown[key[:-1]] > 1:
            name += f" ({options})"
        size = f"{255 * delta:.3g}/255" if norm == "linf" else f"{delta:.3g}"
        budget = norm if attack == "none" else f"{norm} {size}"
        some = next(iter(next(iter(group.values())).values()))
        seeds = sorted(set.union(*(set(g) for g in group.values())))
        cells = [_spread([100 * r.accuracy for r in group[s].values()]) for s in columns]
        paired = sorted(set(group["before"]) & set(group["after"]))
        change = _spread([100 * (group["after"][s].accuracy - group["before"][s].accuracy) for s in paired], sign="+")
        about = [network, f"{data} {split}", name, budget, str(some.n), ", ".join(map(str, seeds))]
        lines.append("| " + " | ".join([*map(_literal, about), *cells, change]) + " |")
    return "\n".join(lines)


def _literal(text: str) -> str:
    """Text in a cell of a Markdown table: it ends no cell, and makes no HTML and no link."""
    one_line = " ".join(printable(text).split("\n")).replace("|", r"\|")
    return one_line.replace("<", "&lt;").replace("](", r"]\(")


def _options(r: Record) -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(r.options.items()) if k not in ("seed", "batch_size"))


def _spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


if __name__ == "__main__":
    with readable_errors():
        if not sys.argv[1:]:
            raise SettingError("name one or more folders of runs: python -m wdat.evaluation.collect DIR...")
        print(table(find(map(Path, sys.argv[1:]))))
