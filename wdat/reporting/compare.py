"""Many runs compared: accuracies over seeds and paired differences to a baseline. Pure, from records only."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

from wdat.errors import SettingError
from wdat.records import Record
from wdat.reporting.figures import budget_name
from wdat.reporting.runs import Run, contradictions, measured

STAGES = ("before", "after", "evaluate")
FINAL = ("after", "evaluate", "before")  # what two arms are compared at: the first stage that both have


@dataclass(frozen=True)
class Spread:
    """Mean of values over seeds, each in [0, 1] or a difference of such.

    Attributes:
        sd: Standard deviation with n − 1 in the denominator; None for one value.
        low, high: 95 % t-interval of the mean; None for one value.
        seeds: Those that count, increasing.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One measurement of one arm's network.

    Attributes:
        records: By stage and seed.
        settings: The attack's settings, where another row differs in nothing else.
    """

    arm: str
    network: str
    data: str
    split: str
    attack: str
    loss: str
    p: float
    norm: str
    delta: float
    options: str
    records: Mapping[str, Mapping[int, Record]]
    settings: str = ""

    @property
    def measurement(self) -> tuple[Any, ...]:
        """What rows of different arms share where they may be compared."""
        return (self.data, self.split, self.attack, self.loss, self.p, self.norm, self.delta, self.options)

    @property
    def seeds(self) -> list[int]:
        """Those of any stage."""
        return sorted({seed for found in self.records.values() for seed in found})

    @property
    def sizes(self) -> list[int]:
        """Numbers of images scored, of any stage and seed; more than one where runs differ."""
        return sorted({r.n for found in self.records.values() for r in found.values()})

    @property
    def attack_name(self) -> str:
        """The attack, its loss and its order."""
        name = f"clean ({self.loss})" if self.attack == "none" else f"{self.attack} {self.loss}, W_{self.p:g}"
        return name + (f" ({self.settings})" if self.settings else "")

    @property
    def budget(self) -> str:
        """Norm and length."""
        return self.norm if self.attack == "none" else f"{self.norm} {budget_name(self.delta, self.norm)}"

    def over_seeds(self, stage: str) -> Spread | None:
        """Accuracy at a stage; None where nothing was measured."""
        found = self.records.get(stage, {})
        return spread({seed: r.accuracy for seed, r in found.items()})

    @property
    def change(self) -> Spread | None:
        """After minus before, of seeds that have both on the same number of images."""
        return paired(self.records.get("after", {}), self.records.get("before", {}))


@dataclass(frozen=True)
class Comparison:
    """Rows of any number of runs.

    Attributes:
        baseline: The arm or network that the others are compared to, or `""`.
        notes: What a reader must know of single rows.
    """

    rows: tuple[Row, ...]
    baseline: str = ""
    notes: tuple[str, ...] = ()

    @property
    def arms(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    @property
    def stages(self) -> list[str]:
        """Those that occur."""
        return [s for s in STAGES if any(s in row.records for row in self.rows)]

    def reference(self, row: Row) -> Row | None:
        """The baseline's row of the same measurement: of the same network (arm), or else the only one there is."""
        same = [other for other in self.rows if other.measurement == row.measurement]
        if self.baseline in self.arms:
            of = [other for other in same if other.arm == self.baseline]
            close = [other for other in of if other.network == row.network]
        else:
            of = [other for other in same if other.network == self.baseline]
            close = [other for other in of if other.arm == row.arm]
        chosen = close or of
        return chosen[0] if len(chosen) == 1 else None

    def difference(self, row: Row) -> tuple[str, Spread] | None:
        """Stage, and accuracy minus the baseline's, paired by seed; None for the baseline and without pairs."""
        other = self.reference(row)
        if other is None or other is row:
            return None
        for stage in FINAL:
            if stage in row.records and stage in other.records:
                found = paired(row.records[stage], other.records[stage])
                if found:
                    return stage, found
        return None


def spread(values: Mapping[int, float]) -> Spread | None:
    """Mean, standard deviation and 95 % t-interval of values by seed; None without values.

    Example:
        >>> found = spread({0: 0.5, 1: 0.7})
        >>> round(found.mean, 3), round(found.sd, 3), round(found.low, 3), round(found.high, 3)
        (0.6, 0.141, -0.671, 1.871)
    """
    if not values:
        return None
    seeds = tuple(sorted(values))
    listed = [values[seed] for seed in seeds]
    mean = statistics.fmean(listed)
    if len(listed) == 1:
        return Spread(mean, None, None, None, seeds)
    sd = statistics.stdev(listed)
    half = float(t.ppf(0.975, len(listed) - 1)) * sd / math.sqrt(len(listed))
    return Spread(mean, sd, mean - half, mean + half, seeds)


def paired(these: Mapping[int, Record], those: Mapping[int, Record]) -> Spread | None:
    """Differences in accuracy of seeds that both have, on the same number of images; None where there are none."""
    both = [seed for seed in these if seed in those and these[seed].n == those[seed].n]
    return spread({seed: these[seed].accuracy - those[seed].accuracy for seed in both})


def compare(runs: Sequence[Run], stages: Sequence[str] = STAGES, baseline: str | None = None) -> Comparison:
    """The rows of runs: one an arm, network, data set, attack, loss, budget and setting of the attack.

    Args:
        runs: With their arms; of equal measurements of one arm and seed the latest counts.
        stages: Which stages are read.
        baseline: An arm, or a network.

    Raises:
        SettingError: If no record is of these stages, or nothing is called as the baseline.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for r in run.records:
            if r.stage in stages:
                key = (run.arm, r.network, *measured(r))
                groups[key][r.stage][r.seed] = r
    if not groups:
        raise SettingError(f"no record is of stage {', '.join(stages)}; let a run finish, or name others")
    count: dict[tuple[Any, ...], int] = defaultdict(int)
    for key in groups:
        count[key[:-1]] += 1
    rows = tuple(_row(key, found, count[key[:-1]] > 1) for key, found in groups.items())
    if len({row.arm for row in rows}) > 1:  # what is to be compared stands together
        places = {measurement: i for i, measurement in enumerate(dict.fromkeys(row.measurement for row in rows))}
        rows = tuple(sorted(rows, key=lambda row: places[row.measurement]))
    return Comparison(rows, _named(baseline, rows), tuple(_notes(rows, runs)))


def _named(baseline: str | None, rows: Sequence[Row]) -> str:
    """The arm or the network that is meant, whatever the spaces after its commas."""
    if baseline is None:
        return ""
    names = list(dict.fromkeys([*(row.arm for row in rows), *(row.network for row in rows)]))
    found = [name for name in names if name.replace(", ", ",") == baseline.replace(", ", ",")]
    if not found:
        known = "; ".join(f"'{name}'" for name in names[:16])
        raise SettingError(f"--baseline '{baseline}' names no arm and no network; there are {known}")
    return found[0]


def _row(key: tuple[Any, ...], found: Mapping[str, Mapping[int, Record]], several: bool) -> Row:
    arm, network, data, split, attack, loss, p, norm, delta, options = key
    settings = options if several else ""
    return Row(arm, network, data, split, attack, loss, p, norm, delta, options, found, settings)


def _notes(rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    notes = []
    for arm in dict.fromkeys(run.arm for run in runs):
        twice = contradictions(runs, arm)
        if twice:
            notes.append(f"Several runs of {arm} have the seed {_listed(twice)}: the one read last counts.")
    uneven = [row for row in rows if len(row.sizes) > 1]
    if uneven:
        notes.append("n with a range: runs of that row scored different numbers of images. Their mean mixes test sets; "
                     "differences are of seeds with equal numbers only.")  # fmt: skip
    if any({tuple(sorted(found)) for found in row.records.values()} != {tuple(row.seeds)} for row in rows):
        notes.append("(n = k) behind a figure: only k of the row's seeds have it.")
    return notes


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
