"""The record of one result, typed, in and out of JSON. Tables and plots are made from records only."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from wdat.errors import SettingError

EXAMPLES = "examples"  # the folder beside `records.json` with the pictures of a record's examples


@cache
def source_commit() -> str | None:
    """The commit of the checkout this package runs from, marked `+` where files differ from it; None elsewhere.

    A package that is installed inside another repository has none.
    """
    checkout = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("wdat", "torch", "lightning", "torchmetrics", "robustbench", "pyautoattack"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Facts:
    """What all records of a run share: where a number comes from.

    Attributes:
        network: Name of the network.
        checkpoint: Its file; `fresh weights (seed 0)` of a network without one; `""` for the registry's own weights.
        data: Name of the data, with a note where it was re-encoded.
        seed: The run's seed.
        weights: What tells the network's weights from others, where it was taken.
    """

    network: str = "network"
    checkpoint: str = ""
    data: str = "data"
    seed: int = 0
    weights: str | None = None


class Key(NamedTuple):
    """What a record measures: two records with equal keys are two measurements of the same thing.

    Only `batch_size`, the seed of an attack where it is the run's, and the digest of weights that an epoch left are not
    part of it: none of them changes what is measured.
    """

    stage: str
    epoch: int | None
    network: str
    checkpoint: str
    weights: str | None
    data: str
    split: str
    images: str | None
    n: int
    seed: int
    attack: str
    options: str
    loss: str
    p: float
    norm: str
    delta: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One accuracy and what it was measured on.

    Attributes:
        stage: `before`, `epoch`, `after` or `evaluate`.
        attack: Name of the attack; `"none"` is the clean record, which adds `upsilon` and `loss_misclassified`.
        options: The attack's settings.
        loss: The loss that the attack ascended, or whose V(0), W(0) and Υ a clean record states.
        p: The attack's own Wasserstein order (inf for pointwise attacks).
        delta: The attack's own budget in pixel units of [0, 1]; 0 for clean records.
        n: Images scored.
        set_size: Images that shared the budget.
        accuracy: Accuracy in [0, 1] at the returned iterate.
        accuracy_low, accuracy_high: 95 % bootstrap interval over images, outcomes of the attack held fixed.
        loss_mean: Largest mean loss on the trajectory; for clean records V(0).
        distance: W_p length of the set's move in pixel units.
        seconds: Wall-clock time of the attack.
        upsilon: Υ of the set for that loss (clean records).
        loss_misclassified: W(0), mean loss over misclassified images (clean records); None if there are none.
        epoch: Epochs trained, for stage `epoch`.
        weights, images: Digests of what was measured, where they were taken (`evaluate.py` takes them).
        dropped: Images left out because their gradient was not finite.
        nonfinite: Images whose logits were not finite, at the images that the accuracy is of; they count as wrong.
        details: What only some attacks know, in plain values; `wdat.evaluation.details` lists the keys.
        compute: How the numbers were computed: `name` of the GPU, `precision` and `tf32`.
    """

    stage: str
    network: str
    checkpoint: str
    data: str
    split: str
    attack: str
    options: dict[str, Any]
    loss: str
    p: float
    norm: str
    delta: float
    n: int
    set_size: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss_mean: float | None
    distance: float
    seconds: float
    seed: int
    device: str
    commit: str | None = field(default_factory=source_commit)
    versions: dict[str, str] = field(default_factory=installed_versions)
    upsilon: float | None = None
    loss_misclassified: float | None = None
    epoch: int | None = None
    weights: str | None = None
    images: str | None = None
    dropped: int = 0
    nonfinite: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What is measured; resume, replacement, comparison and export tell records apart by it and by nothing else."""
        own = {k: v for k, v in self.options.items() if k != "batch_size" and (k, v) != ("seed", self.seed)}
        options = ", ".join(f"{k}={v}" for k, v in sorted(own.items()))
        weights = None if self.stage == "epoch" else self.weights
        delta = float(f"{self.delta:.9g}")
        where = (self.stage, self.epoch, self.network, self.checkpoint, weights, self.data, self.split, self.images)
        return Key(*where, self.n, self.seed, self.attack, options, self.loss, self.p, self.norm, delta)

    def to_json(self) -> dict[str, Any]:
        """Plain values; p = inf becomes the text `inf`, any other figure that isn't finite null, a picture base64."""
        out: dict[str, Any] = _finite(asdict(self))
        out["p"] = "inf" if math.isinf(self.p) else self.p
        return out

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """The inverse of `to_json`; unknown keys, from a newer version, are left out.

        Raises:
            TypeError: If a value is of another kind than its field: what a page or a picture shows is what it says.
        """
        known = {f.name: _KINDS[str(f.type)] for f in fields(cls)}
        kept: dict[str, Any] = {k: v for k, v in values.items() if k in known}
        kept["p"] = float(kept["p"])
        for name, value in kept.items():
            if not isinstance(value, known[name]) or isinstance(value, bool):
                raise TypeError(f"its {name} is a {type(value).__name__}")
        return cls(**kept)


_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {  # the kinds of JSON values that a field may have, by its annotation
    "str": (str,), "str | None": (str, type(None)),
    "int": (int,), "int | None": (int, type(None)),
    "float": (*_NUMBER, type(None)), "float | None": (*_NUMBER, type(None)),  # what isn't finite is written as null
    "dict[str, Any]": (dict,), "dict[str, str]": (dict,),
}  # fmt: skip


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, records: Sequence[Record]) -> list[Record]:
    """Write all records to a temporary file and rename it, so that a stop can't damage an older file.

    Pictures that are still in memory become PNG files in the folder `examples` beside it.

    Returns:
        The records as they are in the file, with the names of their pictures.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [_with_files(record, path.parent) for record in records]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([r.to_json() for r in kept], indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
    return kept


def _with_files(record: Record, folder: Path) -> Record:
    """The record with its pictures written, each named by what was measured."""
    examples = record.details.get(EXAMPLES)
    if not (isinstance(examples, list) and any(isinstance(e.get("picture"), bytes) for e in examples)):
        return record
    digest = hashlib.sha256(repr(record.key).encode(errors="backslashreplace")).hexdigest()[:10]
    about = re.sub(r"[^\w.]+", "_", f"{record.stage}-{record.attack}-{record.loss}", flags=re.ASCII)[:60]
    found = []
    for number, example in enumerate(examples):
        file = Path(EXAMPLES) / f"{about}-{digest}-{number}.png"
        (folder / EXAMPLES).mkdir(exist_ok=True)
        (folder / file).write_bytes(example["picture"])
        found.append({**example, "picture": file.as_posix()})
    return replace(record, details={**record.details, EXAMPLES: found})


def read(path: Path) -> list[Record]:
    """The records of a file, none if there is no file.

    Raises:
        SettingError: If the file isn't a list of records.
    """
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, list):
            raise TypeError("not a list")
        return [Record.from_json(v) for v in values]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise SettingError(f"{path} isn't a list of records ({error}); move it away and run again") from error


class RecordFile:
    """The records of a run, written through to `records.json` at every addition.

    Args:
        path: The file; None keeps the records in memory only (processes other than the first).
        fresh: Begin anew, whatever the file holds.
    """

    def __init__(self, path: Path | None, fresh: bool = False) -> None:
        self.path = path
        self.records = read(path) if path and not fresh else []

    def forget(self, stage: str) -> None:
        """Leave out the records of a stage, which is measured anew."""
        self.records = [record for record in self.records if record.stage != stage]

    def add(self, records: Iterable[Record]) -> None:
        """Append records and write the file; what is measured once more replaces the older record."""
        new = {record.key: record for record in records}
        self.records = [old for old in self.records if old.key not in new] + list(new.values())
        if self.path:
            self.records = write(self.path, self.records)


def budget_name(delta: float | None, norm: str, like: float | None = None) -> str:
    """A length in pixel units of [0, 1] as people write it; a dash for none.

    A linf length is a fraction of 255, unless the decimal is the shorter way to write the budget; l2 lengths are always
    decimals.

    Args:
        delta: The length.
        norm: Its ground norm.
        like: A budget; a measured length is written in the same way as the budget it belongs to.

    Example:
        >>> [budget_name(d, "linf") for d in (2 / 255, 0.5 / 255, 0.1, 0.031)]
        ['2/255', '0.5/255', '0.1', '0.031']
        >>> budget_name(0.25, "l2"), budget_name(0.0712345, "linf", like=0.1), budget_name(0.0712345, "linf", 8 / 255)
        ('0.25', '0.0712', '18.2/255')
    """
    if delta is None:
        return "–"
    if norm == "linf" and in_255ths(delta if like is None else like):
        return f"{255 * delta:.3g}/255" if like is not None else f"{255 * delta:.6g}/255"
    return f"{delta:.3g}" if like is not None else f"{delta:.6g}"


def in_255ths(delta: float) -> bool:
    """Whether a linf budget is written as a fraction of 255, which takes fewer digits than the decimal."""
    digits = [len(f"{value:.6g}".strip("0").replace(".", "").strip("0")) for value in (255 * delta, delta)]
    return delta != 0 and digits[0] <= digits[1]
