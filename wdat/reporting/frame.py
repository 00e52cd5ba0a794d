"""Records as one DataFrame, from which every table and picture is made, and the figures derived from them.

Sources: [B] arXiv 2306.09844, the ratio R_δ and R^l.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wdat.errors import SettingError
from wdat.evaluation.results import Results
from wdat.records import Record, budget_name, read

STAGES = ("before", "after", "evaluate")
ATTACKS = {"none": "clean", "wpgd": "W-PGD", "wfgsm": "W-FGSM", "pgd": "PGD", "fgsm": "FGSM",
           "wpgd_budget": "W-PGD-budget", "autoattack": "AutoAttack"}  # fmt: skip
LOSSES = {"ce": "CE", "redlr": "ReDLR", "dlr": "DLR"}
COUNTED = "0-1"  # the loss of attacks that ascend none
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
FLOATS = dict.fromkeys(("loss_mean", "loss_misclassified", "upsilon", "distance"), float)
COLUMNS = [
    "stage", "epoch", "network", "checkpoint", "weights", "data", "split", "images", "n", "set_size", "seed", "attack",
    "options", "loss", "p", "norm", "delta", "name", "threat", "budget", "bound", "interval", "accuracy",
    "accuracy_low", "accuracy_high", "ratio", "loss_mean", "loss_misclassified", "upsilon", "distance", "seconds",
    "dropped", "device", "commit", "details",
]  # fmt: skip


def load_records(path: Path | str) -> Results:
    """The records of a file, or of the run in a folder, in a list that prints as a table.

    Args:
        path: `records.json` or another file of records, or the folder of a run.

    Raises:
        SettingError: If there is no such file, or it holds no records.
    """
    file = Path(path) / "records.json" if Path(path).is_dir() else Path(path)
    records = read(file)
    if not records:
        raise SettingError(f"{file} holds no records; name records.json or the folder of a run")
    return Results(records)


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record, in their order; of two measurements of the same thing (`Record.key`) the later one counts.

    Returns:
        The fields of a record (`options` as text; budgets that differ by rounding alone are one), and `name` ("PGD
        (CE)"), `threat` ("W₂" or "pointwise"), `budget` ("8/255"), `bound` (what the accuracy is of A_δ: "exact",
        "upper" or "lower"), `interval` (what the interval means: "images", "conditional" on fixed outcomes, or "solved
        anew" in each resample) and `ratio`, R_δ = A_δ/A [B], NaN where A is 0 or unknown. `details` holds dicts.
    """
    latest = {record.key: record for record in records}
    rows = []
    for key, r in latest.items():
        derived = {
            "name": attack_name(r.attack, r.loss), "threat": "" if r.attack == "none" else order_name(r.p),
            "budget": "" if r.attack == "none" else budget_name(r.delta, r.norm), "bound": _bound(r),
            "interval": _interval(r), "ratio": None,
        }  # fmt: skip
        own = {name: getattr(r, name) for name in COLUMNS if name not in derived}
        rows.append({**own, **derived, "options": key.options})
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"epoch": "Int64"} | FLOATS)
    frame["delta"] = frame.groupby(frame["delta"].map(lambda delta: float(f"{delta:.9g}")))["delta"].transform("first")
    of = ["stage", "epoch", "network", "checkpoint", "data", "split", "n", "seed"]
    clean = frame[frame["attack"] == "none"].drop_duplicates(of, keep="last")[[*of, "accuracy"]]
    base = frame[of].merge(clean, how="left", on=of)["accuracy"]
    frame["ratio"] = frame["accuracy"] / base.where(base > 0)
    return frame


def paired(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracies in [0, 1] on the test set before and after training, a row a measurement and number of images.

    Returns:
        Columns `attack, threat, budget, delta, images, before, before_low, before_high, after, after_low, after_high,
        change`, budgets increasing; NaN where a stage wasn't measured.
    """
    frame = frame[(frame["split"] == "test") & frame["stage"].isin(["before", "after"])].copy()
    frame.loc[frame["attack"] == "none", "loss"] = ""  # clean accuracy is the same whatever the loss
    keys = ["name", "threat", "budget", "delta", "n", "attack", "loss", "norm", "options"]
    frame = frame.drop_duplicates([*keys, "stage"], keep="last")
    found = frame[keys].drop_duplicates().sort_values("delta", kind="stable", ignore_index=True)
    for stage in ("before", "after"):
        names = {"accuracy": stage, "accuracy_low": f"{stage}_low", "accuracy_high": f"{stage}_high"}
        found = found.merge(frame[frame["stage"] == stage][[*keys, *names]].rename(columns=names), how="left", on=keys)
    found["change"] = found["after"] - found["before"]
    return found.drop(columns=["attack", "loss", "norm", "options"]).rename(columns={"name": "attack", "n": "images"})


def _bound(r: Record) -> str:
    """What an accuracy says of A_δ: `exact` for clean ones, `upper` under attack, `lower` for certified radii."""
    if r.attack == "none":
        return "exact"
    return str(r.details.get("bound") or ("lower" if r.attack == "certified" else "upper"))


def _interval(r: Record) -> str:
    if "critical_distance" in r.details or r.attack in ("knapsack", "certified"):
        return "solved anew"
    return "images" if r.attack == "none" or math.isinf(r.p) else "conditional"


def attack_name(attack: str, loss: str) -> str:
    """An attack as people write it, with the loss that it ascends.

    Example:
        >>> attack_name("wpgd", "redlr"), attack_name("knapsack", "0-1"), attack_name("none", "ce")
        ('W-PGD (ReDLR)', 'knapsack', 'clean')
    """
    name = ATTACKS.get(attack, attack)
    return name if loss in (COUNTED, "") or attack in ("none", "autoattack") else f"{name} ({loss_name(loss)})"


def loss_name(loss: str) -> str:
    """A loss as people write it."""
    return LOSSES.get(loss, loss)


def order_name(p: float) -> str:
    """The distance that an attack is bounded in: `W₂`, or `pointwise` at p = inf."""
    if math.isinf(p):
        return "pointwise"
    text = f"{p:g}"
    return f"W{text.translate(SUBSCRIPTS)}" if text.isdigit() else f"W_{text}"


def having(frame: pd.DataFrame, detail: str) -> pd.Series:
    """Which rows have something in their details under a name, as a mask."""
    return pd.Series([bool(details.get(detail)) for details in frame["details"]], index=frame.index, dtype=bool)


def percent(value: float | None, digits: int = 2) -> str:
    """An accuracy in [0, 1] as text in percent; a dash for none."""
    return "–" if value is None or pd.isna(value) else f"{100 * value:.{digits}f}"


def title_of(rows: pd.DataFrame) -> str:
    """Network, data and number of images of the last row, which all rows share."""
    r = rows.iloc[-1]
    return f"{r['network']} on {r['data']}, {r['n']:,} {r['split']} images"


@dataclass(frozen=True)
class Section:
    """What records must share to be compared: one network on one set of images, one norm and one order.

    Attributes:
        rows: As `to_frame` makes them: clean ones, then attacks by budget. Pointwise attacks (p = inf) belong to every
            order.
    """

    network: str
    checkpoint: str
    data: str
    split: str
    norm: str
    seed: int
    n: int
    p: float
    rows: pd.DataFrame

    @property
    def stages(self) -> list[str]:
        """Those that occur, in the order `before`, `after`, `evaluate`."""
        return [s for s in STAGES if (self.rows["stage"] == s).any()]

    @property
    def attacked(self) -> pd.DataFrame:
        """Its rows under attack."""
        return self.rows[self.rows["attack"] != "none"]

    @property
    def deltas(self) -> list[float]:
        """Budgets of the attacks, increasing."""
        return sorted(self.attacked["delta"].unique())

    @property
    def title(self) -> str:
        """Network, data and number of images."""
        return title_of(self.rows)

    def clean(self, stage: str) -> float | None:
        """Clean accuracy at a stage."""
        found = self.rows[(self.rows["stage"] == stage) & (self.rows["attack"] == "none")]["accuracy"]
        return None if found.empty else float(found.iloc[0])

    def estimates(self) -> Iterator[tuple[str, str, float, float]]:
        """Stage, loss, δ and A·R^l, wherever it can be stated."""
        for _, clean in self.rows[(self.rows["attack"] == "none") & (self.rows["p"] == self.p)].iterrows():
            for delta in self.deltas:
                value = first_order_estimate(clean, self.attacked, delta)
                if value is not None:
                    yield clean["stage"], clean["loss"], delta, value


def sections(frame: pd.DataFrame) -> list[Section]:
    """Rows that may be compared, in the order in which they first occur; those of stage `epoch` are left out.

    Args:
        frame: Of any number of runs. Checkpoints tell evaluations apart, but not a run's `before` from its `after`.
    """
    kept = frame[frame["stage"].isin(STAGES)]
    kept = kept.assign(checkpoint=kept["checkpoint"].where(kept["stage"] == "evaluate", ""))
    found = []
    shared = ["network", "checkpoint", "data", "split", "norm", "seed", "n"]
    for key, here in kept.groupby(shared, sort=False):
        clean, pointwise = here["attack"] == "none", here["p"] == math.inf
        for p in here["p"][clean | ~pointwise].unique() if (clean | ~pointwise).any() else [math.inf]:
            rows = here[(here["p"] == p) | (~clean & pointwise)]
            about = dict(zip(shared, key, strict=True))
            found.append(Section(**about, p=float(p), rows=rows.sort_values("delta", kind="stable")))
    return found


def first_order_estimate(clean: pd.Series, rows: pd.DataFrame, delta: float) -> float | None:
    """A·R^l with R^l = min over V of (W(0) − V)/(W(0) − V(0)), an ESTIMATE of a lower bound of A_δ [B], never a bound.

    V runs over V(0) + δΥ and the largest mean loss under attack, for the same stage, loss, p, norm and δ. It is valid
    as δ → 0 only: V(δ) exceeds both, so at usual budgets the estimate can exceed A_δ.

    Args:
        clean: The clean row of the loss.
        rows: Under attack; those of other losses, orders, norms, stages and budgets are passed over.
        delta: Budget in pixel units.

    Returns:
        In [0, A]; None where it can't be stated: nothing is misclassified, W(0) ≤ V(0), or no V is known.
    """
    low, high = clean["loss_mean"], clean["loss_misclassified"]
    if pd.isna(low) or pd.isna(high) or not high > low:
        return None
    same = rows["delta"] == delta
    for column in ("stage", "loss", "p", "norm"):
        same &= rows[column] == clean[column]
    values = [*rows.loc[same, "loss_mean"].dropna()]
    if not pd.isna(clean["upsilon"]):
        values.append(low + delta * clean["upsilon"])
    if not values:
        return None
    left = (high - max(values)) / (high - low)
    return float(clean["accuracy"] * min(max(left, 0.0), 1.0))
