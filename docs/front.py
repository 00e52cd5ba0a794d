"""Puts the tables of the README and of the leaderboard's page into them, from the committed records.

    python -m docs.front

The records are `results/leaderboard/*.json`; a table stands between two comments of its page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from wdat.reporting import leaderboard
from wdat.reporting.frame import load_records, percent, to_frame
from wdat.reporting.runs import find
from wdat.reporting.tables import interval

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "leaderboard"
DELTA = 2 / 255
NETWORKS = {  # file: how the README calls the network
    "cnn_a_cnn_a_adv": "`cnn_a`, adversarial, 2/255", "resnet2b": "`resnet2b`, adversarial, 2/255",
    "cnn_a_cifar_wide": "`cifar_wide`, certified, 2/255", "cnn_a_kw_8px": "`kw_8px`, certified, 8/255",
}  # fmt: skip


def readme() -> str:
    """A row a network: accuracy in percent, clean, under each attack, certified."""
    lines = ["| network, trained | clean | PGD | W-PGD | knapsack (at most) | certified (at least) |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, title in NETWORKS.items():
        frame = to_frame(load_records(RECORDS / f"{name}.json"))
        frame = frame[
            (frame["norm"] == "linf") & (((frame["delta"] - DELTA).abs() < 1e-9) | (frame["attack"] == "none"))
        ]
        clean = frame[frame["attack"] == "none"]["accuracy"].iloc[0]
        shared = frame[frame["p"] == 2]
        knapsack = shared[shared["attack"] == "knapsack"].iloc[0]
        ends = knapsack["accuracy"], knapsack["accuracy_low"], knapsack["accuracy_high"]
        cells = [_worst(frame[frame["attack"] == "pgd"]), _worst(shared[shared["attack"] == "wpgd"]),
                 f"**{interval(*ends, digits=1)}**".replace(" [", "** [").replace("]**", "]"),
                 percent(shared[shared["bound"] == "lower"]["accuracy"].max(), 1)]  # fmt: skip
        lines.append(f"| {title} | {percent(clean, 1)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _worst(rows: pd.DataFrame) -> str:
    return percent(rows["accuracy"].min(), 1)


def board() -> str:
    """The leaderboard, with links from its page."""
    return leaderboard.page(leaderboard.entries(find([RECORDS])), "../results/leaderboard/", {"delta": ["2/255"]})


def placed(text: str, name: str, table: str) -> str:
    """A page with a table between its comments `NAME: begin` and `NAME: end`."""
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    pattern = re.compile(rf"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.S)
    made, count = pattern.subn(lambda _: f"\n{table.strip()}\n\n", text)
    assert count == 1, f"the page has no place for {name}"
    return made


def pages() -> Iterable[tuple[Path, str]]:
    """Each page and its text with its table made anew."""
    for file, name, table in (
        (ROOT / "README.md", "networks", readme()), (ROOT / "docs" / "leaderboard.md", "leaderboard", board()),
    ):  # fmt: skip
        yield file, placed(file.read_text(encoding="utf-8"), name, table)


if __name__ == "__main__":
    for file, text in pages():
        file.write_text(text, encoding="utf-8")
        print(file)
