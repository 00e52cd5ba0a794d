"""A trained network leaves: a state dict for RobustBench's own architecture, and a model card."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from wdat.errors import SettingError
from wdat.models import build, zoo
from wdat.models.card import Origin, card
from wdat.models.checkpoint import digest, load_checkpoint
from wdat.models.labels import label
from wdat.models.local import LOCAL
from wdat.records import Record, read
from wdat.threat import parse_budget

TARGET = "wdat.models.load_network"


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        weights: The state dict.
        card: The model card.
        notes: What to tell the user.
    """

    weights: Path
    card: Path
    notes: list[str]


def export(run: Path, out: Path | None = None, evaluations: Sequence[Path] = ()) -> Exported:
    """Write the weights and the model card of a run of `train.py`.

    The weights are those that the run's records after training were measured on: the checkpoint that the monitor
    chose, or the last one. With weight averaging, checkpoints hold the average.

    Args:
        run: The run's folder.
        out: Where to write; None for `export` in the run's folder.
        evaluations: Folders of runs of `evaluate.py` on the same checkpoint, whose records fill the card too.

    Raises:
        SettingError: There is no such run, it hasn't ended, something of it is missing or damaged, or an evaluation is
            of other weights.
    """
    config = _config(run)
    name, entry = _who(config, run)
    measured = [r for r in read(run / "records.json") if r.stage == "after" and r.split == "test"]
    after = list({(r.attack, r.loss, r.p, r.norm, r.delta): r for r in measured}.values())  # the latest of each
    checkpoint = _checkpoint(run, after)
    network = (
        build.architecture(entry)
        if entry
        else LOCAL[name](*(config.model.get(k) for k in ("num_classes", "mean", "std")))
    )
    load_checkpoint(network, checkpoint)
    records = [*after, *(r for place in evaluations for r in _evaluated(place, after[-1], network, checkpoint))]
    full = entry.name if entry else name
    values, notes = card(_origin(config, full, network, after[-1].data), records)
    if entry is None:
        notes.insert(0, _outside_the_zoo(name, network))
    folder = out or run / "export"
    stem = f"{full}-wdat"
    weights, page = folder / f"{stem}.pt", folder / f"{stem}.json"
    state = OrderedDict((key, value.contiguous()) for key, value in network.state_dict().items())
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _renamed(weights, lambda path: torch.save(state, path))
        _renamed(page, lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        raise SettingError(f"--out={folder} can't be written: {error}; name another folder") from error
    return Exported(weights, page, notes)


def _config(run: Path) -> DictConfig:
    """The configuration of a run, with what an export needs of it."""
    file = run / ".hydra" / "config.yaml"
    if not run.is_dir():
        raise SettingError(f"there is no run {run} (RUN_DIR): name the folder of a run of train.py")
    if not file.is_file():
        raise SettingError(f"{run} is no run of train.py (RUN_DIR): it has no .hydra/config.yaml")
    try:
        config = OmegaConf.load(file)
        for key in ("model.name", "model.num_classes", "data.source", "threat.p", "threat.norm", "threat.delta"):
            if OmegaConf.select(config, key, throw_on_missing=True) is None:
                raise KeyError(f"{key} is missing")
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(f"{file} is damaged, or of evaluate.py (RUN_DIR): {reason}") from error
    return config  # type: ignore[return-value]


def _who(config: DictConfig, run: Path) -> tuple[str, zoo.ZooEntry | None]:
    """The network's name as the run has it, and its entry in the zoo; None for a local network."""
    model = config.model
    if model.get("_target_", TARGET) != TARGET:
        raise SettingError(
            f"{run} trained a network of your own, {model.name} (RUN_DIR): wdat.models.load_checkpoint(network, FILE) "
            "gives it the weights of a checkpoint, and torch.save(network.state_dict(), FILE) writes them"
        )
    if model.name in LOCAL:
        return model.name, None
    return model.name, zoo.resolve(model.name, model.dataset, model.threat_model, others=LOCAL)


def _checkpoint(run: Path, after: Sequence[Record]) -> Path:
    """The checkpoint that a run's last records were measured on."""
    if not after:
        raise SettingError(
            f"{run} has no records after training (RUN_DIR): end it with python train.py resume={run}, which measures "
            "the network"
        )
    named = after[-1].checkpoint
    path = run / named
    # Records are text; no file outside the run is meant.
    if path.resolve().parent != (run / "checkpoints").resolve():
        raise SettingError(f"{run} has trained nothing (RUN_DIR): its records are of '{named}'")
    if not path.is_file():
        raise SettingError(f"{run} has no checkpoint {named} (RUN_DIR), which its records were measured on")
    return path


def _evaluated(place: Path, after: Record, network: nn.Module, checkpoint: Path) -> list[Record]:
    """The records of an evaluation, all of them of the checkpoint's network and of the run's own images."""
    file = place if place.is_file() else place / "records.json"
    if not file.is_file():
        raise SettingError(f"there are no records {file} (--records): name the folder of a run of evaluate.py")
    found = [r for r in read(file) if r.stage == "evaluate" and r.split == "test"]
    other = {r.checkpoint or r.network for r in found if not _is(r, after.network, checkpoint)}
    if not other and any(r.weights not in (None, digest(network)) for r in found):
        other = {f"weights that {checkpoint.name} has no more"}
    if not other and any(r.data != after.data for r in found):
        other = {f"data={', '.join(sorted({r.data for r in found}))}, the run's of data={after.data}"}
    if other or not found:
        what = f"of {', '.join(sorted(other))}" if other else "none of test images"
        raise SettingError(
            f"the records in {file} are {what} (--records): evaluate model.checkpoint={checkpoint} from this folder"
        )
    return found


def _is(record: Record, name: str, checkpoint: Path) -> bool:
    same = bool(record.checkpoint) and Path(record.checkpoint).expanduser().resolve() == checkpoint.resolve()
    return same and record.network == name


def _outside_the_zoo(name: str, network: nn.Module) -> str:
    """What to tell of a local network."""
    kind = type(network)
    if kind.__module__.startswith("robustbench."):
        return f"{name} is no name of robustbench's zoo; its architecture is {kind.__module__}.{kind.__name__}"
    return f"robustbench has no architecture {name}: only wdat loads these weights (model={name})"


def _origin(config: DictConfig, name: str, network: nn.Module, data: str) -> Origin:
    """What the card says beside accuracies."""
    model, threat = config.model, config.threat
    start = str(model.get("checkpoint") or "")
    return Origin(
        network=name,
        start=Path(start).name,
        fresh=not start and model.name in LOCAL,
        pool=_pool(config),
        dataset=config.data.source if config.data.source in zoo.CLASSES else data,
        architecture=name if type(network).__module__.startswith("wdat.") else label(network),
        p=float(threat.p),
        norm=str(threat.norm),
        delta=parse_budget(threat.delta, "threat.delta"),
        eps=str(threat.delta),
    )


def _pool(config: DictConfig) -> str:
    """The synthetic images of a run, in words."""
    path = OmegaConf.select(config, "data.synthetic.path")
    return f"{config.data.synthetic.fraction:g} of each batch from {Path(path).stem}" if path else ""


def _renamed(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name first, so that it is whole or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
