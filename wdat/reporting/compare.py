"""Many runs compared: accuracies over seeds, changes by training, and paired differences to a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from wdat.errors import SettingError, unknown
from wdat.reporting.frame import STAGES, to_frame
from wdat.reporting.runs import Run, contradictions
from wdat.threat import parse_budget, parse_number

MEASUREMENT = ["data", "split", "n", "norm", "delta", "attack", "name", "loss", "p", "threat", "budget", "options"]
ROW = ["arm", "network", *MEASUREMENT]
CHANGE, DIFFERENCE = "change", "minus baseline"
FINAL = ("after", "evaluate", "before")  # what arms are compared at: the first stage that both have
OF_ATTACKS = ("loss", "p", "norm", "delta", "options")  # filters by these leave clean rows alone


@dataclass(frozen=True)
class Comparison:
    """What runs found, over seeds.

    Attributes:
        figures: One line a row and figure. A row is one arm, network, data set, number of images, attack, loss, budget
            and setting of the attack (`ROW`); a `figure` is a stage, `change` (after minus before) or `minus baseline`.
            `mean`, `sd` (n − 1 in its denominator), `low`, `high` (a 95 % t-interval over seeds, or of one seed the
            bootstrap interval over images), `seeds` and `values`, in their order.
        baseline: The arm or network that the others are compared to, or `""`.
        notes: What a reader must know of single rows.
    """

    figures: pd.DataFrame
    baseline: str = ""
    notes: tuple[str, ...] = ()

    @property
    def stages(self) -> list[str]:
        """Those that occur."""
        found = set(self.figures["figure"])
        return [s for s in STAGES if s in found]

    @property
    def arms(self) -> list[str]:
        """In the order of the rows."""
        return list(self.figures["arm"].unique())


def compare(
    runs: Sequence[Run],
    stages: Sequence[str] = STAGES,
    baseline: str | None = None,
    filters: Mapping[str, Sequence[str]] | None = None,
) -> Comparison:
    """Accuracies of runs over seeds; of equal measurements of one arm and seed the latest counts.

    Args:
        runs: With their arms.
        stages: Which stages are read.
        baseline: An arm, or a network.
        filters: Values by column, as `wdat collect` takes them; rows with other values are left out.

    Raises:
        SettingError: If no record is left, or nothing is called as the baseline.
    """
    parts = [to_frame(run.records).assign(arm=run.arm) for run in runs]
    frame = pd.concat([part.drop(columns=["epoch", "details"]) for part in parts], ignore_index=True)
    frame = frame[frame["stage"].isin(stages)]
    if frame.empty:
        raise SettingError(f"no record is of stage {', '.join(stages)}; let a run finish, or name others")
    frame = filtered(frame, filters or {})
    clean = frame["attack"] == "none"  # clean accuracy is the same whatever the loss and the norm
    frame.loc[clean, ["loss", "norm", "options"]] = ""
    frame.loc[clean, "p"] = 0.0
    frame = frame.drop_duplicates([*ROW, "stage", "seed"], keep="last").rename(columns={"stage": "figure"})
    rows = [*ROW, "figure"]
    found = [over_seeds(frame, rows)]
    after, before = (frame[frame["figure"] == stage] for stage in ("after", "before"))
    found.append(_differences(after, before, [*ROW, "seed"], CHANGE))
    named = _named(baseline, frame)
    if named:
        found += _to_baseline(frame, named)
    figures = pd.concat([part for part in found if not part.empty], ignore_index=True)
    return Comparison(_ordered(figures, frame), named, tuple(_notes(runs, frame)))


def over_seeds(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation and 95 % interval of `accuracy` in each group, as `Comparison.figures` has them.

    Args:
        frame: With `accuracy`, `seed`, and where one seed has an interval of its own `accuracy_low`, `accuracy_high`.
        by: The columns of a group.

    Example:
        >>> found = over_seeds(pd.DataFrame({"a": "x", "seed": [0, 1], "accuracy": [0.5, 0.7]}), ["a"])
        >>> found[["mean", "sd", "low", "high"]].round(3).values.tolist()
        [[0.6, 0.141, -0.671, 1.871]]
    """
    ends = {"accuracy_low": math.nan, "accuracy_high": math.nan}
    groups = frame.assign(**{k: v for k, v in ends.items() if k not in frame}).sort_values("seed", kind="stable")
    found = groups.groupby(list(by), sort=False, dropna=False).agg(
        mean=("accuracy", "mean"), sd=("accuracy", "std"), count=("accuracy", "size"), low=("accuracy_low", "first"),
        high=("accuracy_high", "first"), seeds=("seed", tuple), values=("accuracy", tuple),
    )  # fmt: skip
    half = t.ppf(0.975, np.maximum(found["count"] - 1, 1)) * found["sd"] / np.sqrt(found["count"])
    several = found["count"] > 1
    found["low"] = (found["mean"] - half).where(several, found["low"])
    found["high"] = (found["mean"] + half).where(several, found["high"])
    return found.reset_index()


def _differences(these: pd.DataFrame, those: pd.DataFrame, on: Sequence[str], figure: str) -> pd.DataFrame:
    """Differences in accuracy, paired by seed and of the same number of images, over seeds; each row is of `these`."""
    pairs = these.merge(those[[*on, "accuracy"]], on=list(on), suffixes=("", "_other"))
    pairs = pairs.assign(accuracy=pairs["accuracy"] - pairs["accuracy_other"], figure=figure)
    return over_seeds(pairs[[*ROW, "figure", "seed", "accuracy"]], [*ROW, "figure"])


def _to_baseline(frame: pd.DataFrame, baseline: str) -> list[pd.DataFrame]:
    """Differences of all other rows at the first stage that both have: of the same network (arm) where it has many."""
    kind, mate = ("arm", "network") if baseline in set(frame["arm"]) else ("network", "arm")
    of = frame[kind] == baseline
    on = [*MEASUREMENT, "figure", "seed"] + ([mate] if frame[of][mate].nunique() > 1 else [])
    left = frame[~of]
    found = []
    for stage in FINAL:
        here = _differences(left[left["figure"] == stage], frame[of], on, DIFFERENCE)
        found.append(here)
        left = left.merge(here[ROW], on=ROW, how="left", indicator=True).query("_merge == 'left_only'")
        left = left.drop(columns="_merge")
    return found


def _named(baseline: str | None, frame: pd.DataFrame) -> str:
    """The arm or the network that is meant, whatever the spaces after its commas."""
    if baseline is None:
        return ""
    names = list(dict.fromkeys([*frame["arm"], *frame["network"]]))
    found = [name for name in names if name.replace(", ", ",") == baseline.replace(", ", ",")]
    if not found:
        known = "; ".join(f"'{name}'" for name in names[:16])
        raise SettingError(f"--baseline '{baseline}' names no arm and no network; there are {known}")
    return str(found[0])


def filtered(frame: pd.DataFrame, filters: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rows of a frame of `to_frame` whose columns have one of the values named.

    Raises:
        SettingError: If there is no such filter, or it leaves nothing.
    """
    columns = ["arm", "stage", "network", "checkpoint", "data", "split", "n", "seed", "attack", *OF_ATTACKS]
    readers: Mapping[str, Callable[[str], Any]] = {
        "delta": lambda text: parse_budget(text, "delta"), "p": lambda text: parse_number(text, "p"),
        "n": lambda text: parse_number(text, "n"), "seed": lambda text: parse_number(text, "seed"),
        "attack": lambda text: "none" if text == "clean" else text,
    }  # fmt: skip
    columns = [column for column in columns if column in frame]
    kept = pd.Series(True, index=frame.index)
    for column, texts in filters.items():
        if column not in columns:
            raise unknown("filter", column, columns, f"{column}={','.join(texts)}")
        values = [readers.get(column, str)(text) for text in texts]
        if column == "delta":
            chosen = frame["delta"].map(lambda own: any(math.isclose(own, value, rel_tol=1e-6) for value in values))  # noqa: B023
        else:
            chosen = frame[column].isin(values)
        kept &= chosen | ((frame["attack"] == "none") if column in OF_ATTACKS else False)
        if not kept.any():
            known = ", ".join(map(str, frame[column].unique()[:12]))
            raise SettingError(f"{column}={','.join(texts)} leaves no record; there are {known}")
    return frame[kept].copy()


def _ordered(figures: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Clean rows first, budgets increasing, attacks and arms as they first occur, arms beside each other."""
    rank = {c: {v: i for i, v in enumerate(frame[c].unique())} for c in ("arm", "network", "data", "split", "name")}
    ranks = {f"_{c}": figures[c].map(places) for c, places in rank.items()}
    by = ["_data", "_split", "n", "norm", "delta", "_name", "p", "options", "_network", "_arm"]
    return figures.assign(**ranks).sort_values(by, kind="stable")[figures.columns].reset_index(drop=True)


def _notes(runs: Sequence[Run], frame: pd.DataFrame) -> list[str]:
    notes = []
    for arm in dict.fromkeys(run.arm for run in runs):
        twice = contradictions(runs, arm)
        if twice:
            seeds = ", ".join(map(str, twice))
            notes.append(f"Several runs of {arm} have the seed {seeds}: the one read last counts.")
    if (frame.groupby(["data", "split", "n"])["images"].nunique() > 1).any():
        notes.append("Runs on equally many images of one data set scored different images: their rows mix them.")
    return notes
