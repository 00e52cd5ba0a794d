"""A comparison as text: Markdown, CSV and LaTeX. No name in a record is markup in any of them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from wdat.reporting.compare import FINAL, Comparison, Row, Spread
from wdat.terminal import printable

FORMATS = ("markdown", "csv", "latex")
COLUMNS = (
    "arm", "network", "data", "split", "attack", "loss", "p", "norm", "delta", "options", "stage", "images", "seeds",
    "n", "mean", "sd", "low", "high", "accuracies", "baseline", "difference", "difference_sd", "difference_low",
    "difference_high", "pairs",
)  # fmt: skip


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns and the rows, as plain text; accuracies in percent. Arms only where they differ."""
    stages, several = comparison.stages, len(comparison.arms) > 1
    head = [*(["arm"] if several else []), "network", "data", "attack", "budget", "n", "seeds", *stages, "change"]
    head += ["minus baseline"] if comparison.baseline else []
    rows = []
    for row in comparison.rows:
        about = [row.network, f"{row.data} {row.split}", row.attack_name, row.budget, "–".join(map(str, _ends(row)))]
        line = [*([row.arm] if several else []), *about, ", ".join(map(str, row.seeds))]
        line += [_spread(row.over_seeds(s), row) for s in stages] + [_spread(row.change, row, "+")]
        line += [_difference(comparison, row)] if comparison.baseline else []
        rows.append(line)
    return head, rows


def _ends(row: Row) -> list[int]:
    return row.sizes if len(row.sizes) == 1 else [row.sizes[0], row.sizes[-1]]


def _spread(found: Spread | None, row: Row, sign: str = "") -> str:
    if found is None:
        return "–"
    text = f"{100 * found.mean:{sign}.2f}"
    text += "" if found.sd is None else f" ± {100 * found.sd:.2f}"
    few = len(found.seeds) < len(row.seeds) and not sign
    return text + (f" (n = {len(found.seeds)})" if few else "")


def _difference(comparison: Comparison, row: Row) -> str:
    if comparison.reference(row) is row:
        return "baseline"
    found = comparison.difference(row)
    if found is None:
        return "–"
    stage, d = found
    interval = "" if d.low is None or d.high is None else f" [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
    at = "" if stage == comparison_stage(comparison) else f", {stage}"
    return f"{100 * d.mean:+.2f}{interval} (n = {len(d.seeds)}{at})"


def comparison_stage(comparison: Comparison) -> str:
    """The stage at which most arms are compared."""
    return next(s for s in FINAL if s in comparison.stages)


def notes(comparison: Comparison) -> list[str]:
    """What the table's figures are, a sentence or two each."""
    said = ["Accuracy in percent: mean ± standard deviation over seeds (n − 1 in its denominator; none for one seed)."]
    if {"before", "after"} <= set(comparison.stages):
        said.append("change: after − before, paired by seed.")
    if comparison.baseline:
        said.append(
            f"minus baseline: differences to {comparison.baseline} in points, paired by seed on the same images, at "
            f"stage {comparison_stage(comparison)} unless said, with 95 % t-intervals over n seeds (n ≥ 2). They say "
            "how far training seeds scatter, not how other images would, and aren't corrected for the number of "
            "comparisons."
        )
    return [*said, *comparison.notes]


def markdown(comparison: Comparison) -> str:
    """A Markdown table alone; `notes` go below."""
    head, rows = cells(comparison)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_literal(cell) for cell in line)} |" for line in lines)


def _literal(text: str) -> str:
    """Text in a cell of a Markdown table: it ends no cell, and makes no HTML and no link."""
    one_line = " ".join(printable(text).split("\n")).replace("|", r"\|")
    return one_line.replace("<", "&lt;").replace("](", r"]\(")


def to_markdown(comparison: Comparison) -> str:
    """The table and its notes."""
    below = "\n".join(f"- {_literal(note)}" for note in notes(comparison))
    return f"{markdown(comparison)}\n\n{below}\n"


def to_csv(comparison: Comparison) -> str:
    """One line a row and stage: raw numbers, accuracies in [0, 1], empty where a figure doesn't exist.

    `low` and `high` are 95 % t-intervals of the mean over seeds; `difference` is to the baseline, of paired seeds.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in comparison.rows:
        for stage in (s for s in comparison.stages if row.records.get(s)):
            writer.writerow([_field(value) for value in _line(comparison, row, stage)])
    return out.getvalue()


def _line(comparison: Comparison, row: Row, stage: str) -> list[Any]:
    own = row.over_seeds(stage)
    assert own is not None
    found = comparison.difference(row)
    d = found[1] if found and found[0] == stage else None
    records = [row.records[stage][seed] for seed in own.seeds]
    images = "/".join(map(str, sorted({r.n for r in records})))
    about: list[Any] = [row.arm, row.network, row.data, row.split, row.attack, row.loss]
    about += [None if row.attack == "none" else "inf" if math.isinf(row.p) else row.p, row.norm, row.delta, row.options]
    figures: list[Any] = [
        stage,
        images,
        " ".join(map(str, own.seeds)),
        len(own.seeds),
        own.mean,
        own.sd,
        own.low,
        own.high,
    ]
    line = [*about, *figures, " ".join(repr(r.accuracy) for r in records), comparison.baseline]
    return [*line, d.mean, d.sd, d.low, d.high, len(d.seeds)] if d else [*line, *[None] * 5]


def _field(value: Any) -> Any:
    """Numbers as they are; text that begins no formula in a spreadsheet."""
    if not isinstance(value, str):
        return value
    text = printable(value).replace("\n", " ")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def to_latex(comparison: Comparison) -> str:
    """A table for LaTeX with the package booktabs (in two columns of text take table*)."""
    head, rows = cells(comparison)
    texts = len(head) - len(comparison.stages) - 1 - bool(comparison.baseline)
    columns = "l" * (texts - 2) + "rl" + "r" * (len(head) - texts)
    caption = " ".join(map(latex, notes(comparison)))
    lines = [
        "% Needs \\usepackage{booktabs}. Made by python -m wdat.cli.collect.",
        "\\begin{table}",
        "  \\centering\\small",
        f"  \\caption{{{caption}}}",
        "  \\label{tab:wdat}",
        f"  \\begin{{tabular}}{{{columns}}}",
        "    \\toprule",
        f"    {_tex_line(head)}",
        "    \\midrule",
        *(f"    {_tex_line(row)}" for row in rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tex_line(line: Sequence[str]) -> str:
    """Cells of a row; a minus before a figure is one."""
    return " & ".join(latex(re.sub(r"(?<![\w.-])-(?=\d)", "−", cell)) for cell in line) + r" \\"


TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "[": "{[}", "]": "{]}", "`": r"\textasciigrave{}",
    "±": r"$\pm$", "−": "$-$", "–": "--", "≥": r"$\geq$", "≤": r"$\leq$",
    "δ": r"$\delta$", "κ": r"$\kappa$", "Υ": r"$\Upsilon$", "…": r"\ldots{}", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


def latex(text: str) -> str:
    r"""Text as LaTeX prints it; characters that its fonts lack as their code.

    Example:
        >>> print(latex("50 % of a_b & −1"))
        50 \% of a\_b \& $-$1
    """
    return "".join(map(_tex, printable(text).replace("\n", " ")))


def _tex(character: str) -> str:
    if character in TEX:
        return TEX[character]
    known = character.isascii() or "\u00c0" <= character <= "\u017f"
    return character if known else f"U+{ord(character):04X}"


WRITERS: dict[str, Callable[[Comparison], str]] = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}
