"""The runs below folders: their records, the command that made each, and the arm of a comparison that it belongs to.

An **arm** is what runs share that differ in their seed alone. Its label is made of

1. the run's own overrides, where Hydra left `.hydra/overrides.yaml` beside the records, without those that all runs
   share and those that say where, how often or on what (`seed`, `hydra.*`, `resume`, `logger`, `model`, `data`, ...:
   the table has columns for them); an evaluation of a checkpoint in a run's folder takes that run's arm;
2. otherwise the folder of the records relative to the folder named, without the parts that state the seed
   (`trades/seed0` and `trades/1` are `trades`), or that folder's own name.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from wdat.errors import SettingError
from wdat.records import Key, Record, read
from wdat.terminal import without_secret

LABELS = ("auto", "overrides", "folder")
DEFAULTS = "defaults"  # the arm of runs with no setting of their own
ELSEWHERE = ("seed", "resume", "logger", "model", "model.name", "data", "device", "save_distances", "trainer.devices",
             "trainer.num_nodes", "trainer.accelerator")  # fmt: skip
EVALUATION = ("attacks", "deltas", "losses", "threat", "model", "data", "attack_options", "batch_size", "certified")


@dataclass(frozen=True)
class Run:
    """Records of one run.

    Attributes:
        path: The file that they were read from.
        records: At least one.
        command: The command line that made them, where it is known.
        overrides: The settings on that command line, in their order; None where they aren't known.
        folder: The folder relative to the one that was named, without what states the seed.
        arm: Label of what is compared.
    """

    path: Path
    records: tuple[Record, ...]
    command: str | None
    overrides: tuple[str, ...] | None
    folder: str
    arm: str = ""

    @property
    def seeds(self) -> list[int]:
        """Those of its records."""
        return sorted({r.seed for r in self.records})


def find(paths: Iterable[Path], labels: str = "auto") -> list[Run]:
    """All runs in files named, and in every JSON file of records below folders named, each with its arm.

    Args:
        paths: Files and folders; what is found twice counts once.
        labels: `overrides` or `folder` as in the head of this file; `auto` takes overrides where they are known.

    Raises:
        SettingError: If one of them holds no records.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        here = [(file, read_run(file, path)) for file in _files(path)]
        kept = {file.resolve(): run for file, run in here if run}
        if not kept:
            raise SettingError(f"{path} holds no records; name the folder of a run or of a multirun")
        found |= {file: run for file, run in kept.items() if file not in found}
    return label(list(found.values()), labels)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.json"), key=_natural)


def _natural(path: Path) -> list[Any]:
    """Order in which run 10 comes after run 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read_run(file: Path, root: Path) -> Run | None:
    """The run of a file; None where a JSON file below a folder, such as a logger's, is none of ours."""
    try:
        records = read(file)
    except SettingError:
        if root.is_file() or file.name == "records.json":
            raise
        return None
    if not records:
        return None
    overrides = overrides_of(file.parent)
    seeds = {r.seed for r in records}
    relative = [] if root.is_file() else list(file.parent.relative_to(root).parts)
    name = (root.parent if root.is_file() else root).resolve().name
    short = [p for part in relative if (p := without_seed(part, seeds))]
    short = short or [name if relative else without_seed(name, seeds) or name]  # the seed is stated once
    return Run(file, tuple(records), command_of(file.parent), overrides, "/".join(short))


def without_seed(name: str, seeds: Iterable[int]) -> str:
    """A part of a path without what states the seed.

    Example:
        >>> [without_seed(name, [1]) for name in ("seed1", "trades_seed=1", "1", "2", "wdat-s1", "model1")]
        ['', 'trades', '', '2', 'wdat', 'model1']
    """
    for seed in seeds:
        name = re.sub(rf"(^|[-_,. ])s(eed)?[-_=]?{seed}(?=$|[-_,. ])", "", name)
        name = "" if name == str(seed) else name
    return name.strip("-_,. ")


def overrides_of(folder: Path) -> tuple[str, ...] | None:
    """The settings that a run was given on its command line; None where Hydra left none in its folder."""
    values = _yaml(folder / ".hydra" / "overrides.yaml")
    return tuple(map(str, values)) if isinstance(values, list) else None


def command_of(folder: Path) -> str | None:
    """The command line that made a run, keys and passwords masked; None where its folder doesn't say."""
    overrides = overrides_of(folder)
    if overrides is None:
        return None
    settings = _yaml(folder / ".hydra" / "hydra.yaml")
    try:
        script = str(settings["hydra"]["job"]["name"])
    except (KeyError, TypeError):
        script = "train"
    return shlex.join(["python", f"{script}.py", *map(without_secret, overrides)])


def _yaml(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError):
        return None


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def label(runs: Sequence[Run], labels: str = "auto") -> list[Run]:
    """The runs with their arms; files that would be one run measured twice are told apart by their names."""
    settings = [None if labels == "folder" else _settings(run) for run in runs]
    if labels == "overrides" and None in settings:
        path = runs[settings.index(None)].path
        raise SettingError(
            f"{path} has no .hydra/overrides.yaml beside it, which --label overrides needs; leave it out"
        )
    known = [set(own) for own in settings if own is not None]
    common = set.intersection(*known) if len(known) > 1 else set()
    named = [
        replace(run, arm=run.folder if own is None else ", ".join(o for o in own if o not in common) or DEFAULTS)
        for run, own in zip(runs, settings, strict=True)
    ]
    if len(known) == 1 and len(runs) == 1:
        named = [replace(named[0], arm=named[0].folder)]
    clashing = {arm for arm, _ in Counter(run.arm for run in named).items() if contradictions(named, arm)}
    return [_refined(run) if run.arm in clashing else run for run in named]


def _refined(run: Run) -> Run:
    stem = without_seed(run.path.stem, run.seeds) if run.path.name != "records.json" else ""
    return replace(run, arm=f"{run.arm}/{stem}" if stem else run.arm)


def contradictions(runs: Sequence[Run], arm: str) -> list[int]:
    """Seeds of which several runs of an arm hold the same measurement with different accuracies."""
    seen: dict[Key, set[tuple[Path, float]]] = defaultdict(set)
    for run in (run for run in runs if run.arm == arm):
        own = (r for r in run.records if r.stage != "epoch")
        latest = {r.key._replace(checkpoint="", weights=None, images=None): r.accuracy for r in own}
        for key, accuracy in latest.items():
            seen[key].add((run.path, accuracy))
    return sorted({key.seed for key, values in seen.items() if len({accuracy for _, accuracy in values}) > 1})


def _settings(run: Run) -> list[str] | None:
    """The overrides that make the arm; None where they aren't known."""
    if run.overrides is None:
        return None
    evaluation = {r.stage for r in run.records} == {"evaluate"}
    hidden = (*ELSEWHERE, *EVALUATION) if evaluation else ELSEWHERE
    own = [o for o in run.overrides if _key(o) not in hidden and not _below(_key(o), ("hydra", "logger"))]
    if not evaluation:
        return own
    own = [o for o in own if not _below(_key(o), EVALUATION)]
    checkpoint = next((o.partition("=")[2] for o in run.overrides if _key(o) == "model.checkpoint"), None)
    return own if checkpoint is None else [*_trained(run, checkpoint), *own]


def _below(key: str, parents: Sequence[str]) -> bool:
    return any(key.startswith(f"{parent}.") for parent in parents)


def _trained(run: Run, checkpoint: str) -> list[str]:
    """The settings of the run that left a checkpoint, or the checkpoint's path without what states the seed."""
    settings = _yaml(run.path.parent / ".hydra" / "hydra.yaml")
    try:
        start = Path(str(settings["hydra"]["runtime"]["cwd"]))
    except (KeyError, TypeError):
        start = Path()
    file = Path(checkpoint.strip("'\""))
    for folder in list((start / file).parents)[:2]:
        overrides = overrides_of(folder)
        if overrides is not None:
            trained = replace(run, overrides=overrides, records=tuple(replace(r, stage="after") for r in run.records))
            return _settings(trained) or []
    parts = [p for part in file.parts if (p := without_seed(part, run.seeds))]
    return [f"model.checkpoint={'/'.join(parts[-3:])}"]
