"""Tables of text made from records, and their forms: terminal, Markdown, LaTeX, CSV. No name in a record is markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from wdat.records import Record, budget_name
from wdat.reporting.compare import CHANGE, DIFFERENCE, FINAL, MEASUREMENT, ROW, Comparison
from wdat.reporting.frame import loss_name, paired, percent, title_of, to_frame
from wdat.terminal import printable

NUMBERS = ("n", "seeds", "before", "after", "evaluate", "accuracy", CHANGE, DIFFERENCE, "distance", "seconds")
WIDEST = 6  # measurements that may stand side by side


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes:
        cells: Rows and columns; every cell is text.
        title: What all rows share.
        notes: What the figures are, a sentence or two each.
        best: (row, column) of the cells to be marked.
        numbers: Columns that are aligned to the right.
    """

    cells: pd.DataFrame
    title: str = ""
    notes: tuple[str, ...] = ()
    best: frozenset[tuple[int, str]] = frozenset()
    numbers: tuple[str, ...] = NUMBERS

    def __rich__(self) -> Table:
        """The table for a terminal, as `console.print` shows it."""
        head = "\n".join([*self.notes[:1], *([self.title] if self.title else [])])
        table = Table(title=Text(printable(head)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                      padding=(0, 1, 0, 0))  # fmt: skip
        for column in self.cells.columns:
            right = column in self.numbers
            table.add_column(Text(printable(column)), justify="right" if right else "left")
        for i, row in enumerate(self.cells.itertuples(index=False)):
            marks = ["bold" if (i, column) in self.best else "" for column in self.cells.columns]
            table.add_row(*(Text(printable(cell), style=mark) for cell, mark in zip(row, marks, strict=True)))
        return table


def interval(mean: Any, low: Any, high: Any, sign: str = "", *, digits: int = 2) -> str:
    """A figure in percent with its interval, where it has one; a dash for none."""
    if pd.isna(mean):
        return "–"
    ends = "" if pd.isna(low) or pd.isna(high) else f" [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
    return f"{100 * mean:{sign}.{digits}f}{ends}"


def collected(comparison: Comparison, layout: str = "auto") -> Grid:
    """The table of a comparison, without columns in which all rows agree: the title has these.

    Args:
        comparison: Of any number of runs.
        layout: `long`, a row a measurement and arm; `wide`, a row an arm and a column a measurement; `auto` takes the
            latter for several arms, at most `WIDEST` measurements and no baseline.
    """
    figures = comparison.figures.assign(who=comparison.figures["arm"] + "\0" + comparison.figures["network"])
    several = figures["who"].nunique() > 1
    few = len(figures[MEASUREMENT].drop_duplicates()) <= WIDEST
    wide = layout == "wide" or (layout == "auto" and several and few and not comparison.baseline)
    return (_wide if wide else _long)(comparison, figures)


def _long(comparison: Comparison, figures: pd.DataFrame) -> Grid:
    about = _about(figures)
    order = [*comparison.stages, *([CHANGE] if (figures["figure"] == CHANGE).any() else [])]
    order += [DIFFERENCE] if comparison.baseline else []
    rows = figures[ROW].drop_duplicates()
    cells, means = about.loc[rows.index].reset_index(drop=True), {}
    numbered = {tuple(row): i for i, row in enumerate(rows.itertuples(index=False))}
    at = [numbered[tuple(row)] for row in figures[ROW].itertuples(index=False)]
    for name in order:
        cells[name] = "–"
    for i, r in zip(at, figures.itertuples(), strict=True):
        cells.loc[i, r.figure] = _figure(r, about.loc[rows.index[i], "seeds"])
        means[i, r.figure] = r.mean
    if comparison.baseline:
        of = rows["arm"].eq(comparison.baseline) | rows["network"].eq(comparison.baseline)
        cells.loc[of.to_numpy(), DIFFERENCE] = "baseline"
    best = set()
    for _, block in rows.reset_index(drop=True).groupby(MEASUREMENT, sort=False, dropna=False):
        for stage in comparison.stages:
            here = {i: means[i, stage] for i in block.index if (i, stage) in means}
            best |= {(i, stage) for i, mean in here.items() if len(here) > 1 and mean == max(here.values())}
    return _without_constants(cells, list(about.columns), comparison, best, "attack")


def _wide(comparison: Comparison, figures: pd.DataFrame) -> Grid:
    found = figures[figures["figure"].isin(FINAL)]
    found = found.sort_values("figure", key=lambda own: own.map(FINAL.index), kind="stable")
    found = found.drop_duplicates(ROW).sort_index()
    about = _about(found)
    columns = about.apply(
        lambda row: ", ".join(v for v in row[["attack", "threat", "budget", "settings"]] if v), axis=1
    )
    shared = [c for c in ("threat", "budget") if about[c][found["attack"] != "none"].nunique() == 1]
    columns = columns if not shared else about.apply(
        lambda row: ", ".join(v for k, v in row[["attack", "threat", "budget", "settings"]].items()
                              if v and k not in shared), axis=1,
    )  # fmt: skip
    who = ["arm", "network", "data", "n", "seeds"]
    kept = about[who].assign(column=columns, text=[_figure(r, "") for r in found.itertuples()], mean=found["mean"])
    text, mean = (
        kept.pivot_table(index=who, columns="column", values=v, aggfunc="last", sort=False) for v in ("text", "mean")
    )
    order = list(dict.fromkeys(columns))
    cells = text[order].fillna("–").reset_index()
    tops = mean.max() if len(cells) > 1 else mean.max() + 1
    best = {(i, c) for c in order for i, own in enumerate(mean[c]) if own == tops[c]}
    title = [about[c][found["attack"] != "none"].iloc[0] for c in shared]
    grid = _without_constants(cells, who, comparison, best, "arm", title)
    return Grid(grid.cells, grid.title, grid.notes, grid.best, (*NUMBERS, *order))


def _about(figures: pd.DataFrame) -> pd.DataFrame:
    """What rows are of, as text; attacks with differing settings are told apart by these."""
    one = figures["norm"][figures["attack"] != "none"].nunique() < 2
    budget = figures["budget"] if one else figures["norm"].str.cat(figures["budget"], sep=" ").str.strip()
    seeds = figures.groupby(ROW, dropna=False)["seeds"].transform(
        lambda own: [tuple(sorted(set().union(*own)))] * len(own)
    )
    same = [c for c in MEASUREMENT if c != "options"]
    options = figures.groupby(same, dropna=False)["options"].transform(_common)
    settings = [", ".join(o for o in own.split(", ") if o not in common.split(", "))
                for own, common in zip(figures["options"], options, strict=True)]  # fmt: skip
    return pd.DataFrame(
        {"arm": figures["arm"], "network": figures["network"], "data": figures["data"] + " " + figures["split"],
         "n": figures["n"].astype(str), "seeds": [", ".join(map(str, s)) for s in seeds], "attack": figures["name"],
         "threat": figures["threat"], "budget": budget, "settings": settings}
    )  # fmt: skip


def _common(options: pd.Series) -> str:
    shared = set.intersection(*(set(own.split(", ")) for own in options))
    return ", ".join(sorted(shared))


def _figure(r: Any, seeds: str) -> str:
    """One figure over seeds; accuracies stay in [0, 1], and what fewer seeds have than the row says so."""
    mean, low, high, figure, count = (getattr(r, k) for k in ("mean", "low", "high", "figure", "count"))
    signed = figure in (CHANGE, DIFFERENCE)
    text = interval(mean, low if signed else max(low, 0), high if signed else min(high, 1), "+" if signed else "")
    return text + (f" ({count} seeds)" if seeds and count < len(seeds.split(", ")) and count > 1 else "")


def _without_constants(
    cells: pd.DataFrame, about: Sequence[str], comparison: Comparison, best: set[tuple[int, str]], name: str,
    title: Sequence[str] = (),
) -> Grid:  # fmt: skip
    """The table without columns that say the same in every row; one that names the rows stays."""
    shared = [c for c in about if cells[c].nunique() == 1]
    kept = [c for c in cells.columns if c not in shared]
    kept = kept if set(kept) & set(about) or name not in cells else [name, *kept]
    words = {"n": "{} images", "seeds": "seeds {}" if ", " in str(cells.get("seeds", [""])[0]) else "seed {}"}
    norm = comparison.figures["norm"][comparison.figures["attack"] != "none"].unique()
    told = [c for c in shared if c not in kept and cells[c].iloc[0] and not (c == "arm" and len(comparison.arms) == 1)]
    said = [words.get(c, "{}").format(cells[c].iloc[0]) for c in told]
    said += [*title, *(norm if len(norm) == 1 else ())]
    return Grid(cells[kept], ", ".join(said), tuple(_notes(comparison)), frozenset(best))


def _notes(comparison: Comparison) -> list[str]:
    one = (comparison.figures["count"] == 1).all()
    of = "the mean over seeds with its 95 % t-interval; of one seed the bootstrap interval over images"
    said = ["Accuracy in percent" + (" with its 95 % bootstrap interval over images." if one else f": {of}.")]
    if (comparison.figures["figure"] == CHANGE).any():
        said.append("change: after − before, paired by seed, on equally many images.")
    if comparison.baseline:
        said.append(
            f"minus baseline: differences to {comparison.baseline} in points, paired by seed on the same images, with "
            "95 % t-intervals over seeds. They say how far training seeds scatter, not how other images would, and "
            "aren't corrected for the number of comparisons."
        )
    return [*said, *comparison.notes]


def before_after(records: Sequence[Record], attacks: Sequence[str] | None = None, delta: float | None = None) -> Grid:
    """Accuracies on the test set before and after training, clean and under each attack, and Υ.

    Args:
        records: Those of the run.
        attacks: Names of the attacks to show; None for all.
        delta: Their budget in pixel units; None for all.
    """
    frame = to_frame(records)
    frame = frame[frame["stage"].isin(["before", "after"]) & (frame["split"] == "test")]
    clean = frame["attack"] == "none"
    if attacks is not None:
        frame = frame[clean | frame["attack"].isin(attacks)]
    if delta is not None:
        frame = frame[(frame["attack"] == "none") | ((frame["delta"] - delta).abs() <= 1e-9 * delta)]
    rows = []
    for r in paired(frame).itertuples():
        cells = [interval(r.before, r.before_low, r.before_high), interval(r.after, r.after_low, r.after_high)]
        rows.append([r.attack, f"{r.threat} {r.budget}".strip(), *cells, interval(r.change, None, None, "+")])
    for loss, own in frame[frame["attack"] == "none"].groupby("loss", sort=False):
        values = own.dropna(subset="upsilon").drop_duplicates("stage", keep="last").set_index("stage")["upsilon"]
        texts = [f"{values[stage]:.2f}" if stage in values else "–" for stage in ("before", "after")]
        change = f"{values['after'] - values['before']:+.2f}" if len(values) == 2 else "–"
        rows.append([f"Υ ({loss_name(loss)})", "", *texts, change])
    cells = pd.DataFrame(rows, columns=["", "budget", "before", "after", CHANGE])
    return Grid(cells, _title(frame), ("Accuracy in percent [95 % interval]",))


def evaluation_table(records: Sequence[Record]) -> Grid:
    """Accuracy with 95 % intervals, one row for each attack, loss and budget."""
    frame = to_frame(records)
    several = frame["network"].nunique() > 1
    rows = [
        {
            **({"network": r.network} if several else {}),
            "attack": f"clean ({loss_name(r.loss)})" if r.attack == "none" else f"{r.name}{_bound(r)}",
            "threat": r.threat, "budget": r.budget,
            "accuracy": interval(r.accuracy, r.accuracy_low, r.accuracy_high),
            "distance": budget_name(r.distance, r.norm, r.delta) if r.attack != "none" else "",
            "Υ": f"{r.upsilon:.4g}" if r.attack == "none" and pd.notna(r.upsilon) else "",
            "seconds": f"{r.seconds:.1f}",
        }
        for r in frame.sort_values("delta", kind="stable").itertuples()
    ]  # fmt: skip
    return Grid(pd.DataFrame(rows), _title(frame), ("Accuracy in percent [95 % interval]",))


def _bound(r: Any) -> str:
    return {"upper": " ≤", "lower": " ≥"}.get(str(r.details.get("bound")), "")


def _title(frame: pd.DataFrame) -> str:
    return "" if frame.empty else f"{title_of(frame)}, {frame['norm'].iloc[-1]}"


def in_a_line(records: Sequence[Record]) -> str:
    """One line on one stage: accuracy clean and under each attack."""
    frame = to_frame(records)
    return ", ".join(f"{r.name} {percent(r.accuracy)} %" for r in frame.itertuples())


def to_markdown(grid: Grid) -> str:
    """The table, with its title above and its notes below."""
    below = "\n".join(f"- {literal(note)}" for note in grid.notes)
    above = f"{literal(grid.title)}\n\n" if grid.title else ""
    return f"{above}{markdown(grid)}\n" + (f"\n{below}\n" if below else "")


def markdown(grid: Grid) -> str:
    """The table alone."""
    columns = list(grid.cells.columns)
    ruler = ["---:" if column in grid.numbers else "---" for column in columns]
    lines = [[literal(column) for column in columns], ruler]
    for i, row in enumerate(grid.cells.itertuples(index=False)):
        cells = [literal(cell) for cell in row]
        lines.append([f"**{c}**" if (i, column) in grid.best else c for c, column in zip(cells, columns, strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def literal(text: str) -> str:
    """Text in a cell of a Markdown table: it ends no cell, and makes no HTML, no link and no emphasis."""
    one_line = " ".join(printable(text).split("\n"))
    return re.sub(r"([|*`\\]|\](?=\())", r"\\\1", one_line).replace("<", "&lt;")


def to_csv(comparison: Comparison) -> str:
    """One line a row and figure: raw numbers, accuracies in [0, 1], empty where a figure doesn't exist."""
    figures = comparison.figures.assign(baseline=comparison.baseline)
    for column in ("seeds", "values"):
        figures[column] = figures[column].map(lambda own: " ".join(map(str, own)))
    figures = figures.map(lambda value: _cell(value) if isinstance(value, str) else value)
    return str(figures.to_csv(index=False, lineterminator="\n"))


def _cell(value: str) -> str:
    """Text that begins no formula in a spreadsheet."""
    text = printable(value).replace("\n", " ")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def to_latex(grid: Grid) -> str:
    """A table for LaTeX with the packages booktabs and graphicx; it is scaled down where it is wider than a column."""
    cells = pd.DataFrame(
        [
            [_tex_cell(cell, (i, column) in grid.best) for column, cell in zip(grid.cells.columns, row, strict=True)]
            for i, row in enumerate(grid.cells.itertuples(index=False))
        ],
        columns=[latex(column) for column in grid.cells.columns],
    )
    align = "".join("r" if column in grid.numbers else "l" for column in grid.cells.columns)
    body = cells.style.hide(axis="index").to_latex(hrules=True, column_format=align).rstrip()
    caption = " ".join(latex(text) for text in ([f"{grid.title}."] if grid.title else []) + list(grid.notes))
    return (
        "% Needs \\usepackage{booktabs} and \\usepackage{graphicx}; made by wdat collect.\n"
        f"\\begin{{table}}\n\\centering\\small\\setlength{{\\tabcolsep}}{{4pt}}\n\\caption{{{caption}}}\n"
        "\\label{tab:wdat}\n\\resizebox{\\ifdim\\width>\\columnwidth\\columnwidth\\else\\width\\fi}{!}{%\n"
        f"{body}}}\n\\end{{table}}\n"
    )


def _tex_cell(text: str, best: bool) -> str:
    """A cell; a minus before a figure is one, and intervals are small."""
    figure, bracket, rest = re.sub(r"(?<![\w.-])-(?=\d)", "−", text).partition(" [")
    shown = latex(figure)
    shown = f"\\textbf{{{shown}}}" if best else shown
    return shown + (f" {{\\scriptsize {latex('[' + rest)}}}" if bracket else "")


TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "[": "{[}", "]": "{]}", "`": r"\textasciigrave{}",
    "±": r"$\pm$", "−": "$-$", "–": "--", "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$", "∞": r"$\infty$",
    "δ": r"$\delta$", "κ": r"$\kappa$", "Υ": r"$\Upsilon$", "…": r"\ldots{}", "\N{NO-BREAK SPACE}": "~",
    **{chr(0x2080 + digit): f"$_{digit}$" for digit in range(10)},
}  # fmt: skip


def latex(text: str) -> str:
    r"""Text as LaTeX prints it; characters that its fonts lack as their code.

    Example:
        >>> print(latex("50 % of a_b & −1 in W₂"))
        50 \% of a\_b \& $-$1 in W$_2$
    """
    return "".join(TEX.get(c, c if c.isascii() or "\u00c0" <= c <= "\u017f" else f"U+{ord(c):04X}")
                   for c in printable(text).replace("\n", " "))  # fmt: skip


WRITERS: dict[str, Callable[[Comparison, str], str]] = {
    "markdown": lambda comparison, layout: to_markdown(collected(comparison, layout)),
    "csv": lambda comparison, layout: to_csv(comparison),
    "latex": lambda comparison, layout: to_latex(collected(comparison, layout)),
}
