"""Measure the distributional robustness of a network.

    python evaluate.py model=Rebuffi2021 "attacks=[pgd,wpgd,knapsack]" "deltas=[2/255,8/255]" "losses=[ce,redlr]"
    python evaluate.py model=resnet2b model.checkpoint=FILE data=npz data.path=FILE.npz threat=w2_l2 deltas=[0.25]
    torchrun --standalone --nproc_per_node=4 evaluate.py model=Rebuffi2021
    python evaluate.py resume=RUN_DIR

Writes records.json, report.html and curve.png into its folder; everything else is in the package. Several processes
share the images and give the records of one; the first of them alone reads the command line, prints and writes.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from wdat import ThreatModel, models
from wdat.attacks import ATTACKS, Attack
from wdat.cli.console import evaluation_table, quiet_libraries, readable_errors
from wdat.cli.launch import one_at_a_time
from wdat.cli.place import Place, place_of
from wdat.cli.resume import check_folder, check_unused, resumed_arguments
from wdat.cli.sweep import Sweep
from wdat.cli.team import Team, check_timeout
from wdat.distributed import current, together
from wdat.errors import RunError, SettingError, cause, unknown
from wdat.evaluation import ImageTensors
from wdat.evaluation.evaluator import Evaluator, plan
from wdat.evaluation.session import Session, read_radii
from wdat.records import Facts, RecordFile
from wdat.reporting.plots import accuracy_against_budget
from wdat.reporting.report import write_report
from wdat.terminal import PlainConsole
from wdat.threat import parse_budget


def choose_device(name: str, place: Place) -> torch.device:
    """The device that the setting `device` names; `auto` takes a GPU if there is one, each process its own.

    Raises:
        SettingError: If there is no such device.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as error:
        raise SettingError(f"device={name} is unknown; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and place.world > 1:
        if ":" in name:
            raise SettingError(f"device={name} names one GPU for {place.world} processes; use auto or cpu")
        device = torch.device("cuda", place.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise SettingError(
            f"device={name} isn't there; use auto or cpu"
            if place.world == 1
            else f"device={name}: process {place.local_rank} of this machine finds {found} GPUs; start one process a "
            f"GPU (--nproc_per_node={max(found, 1)}), or use device=cpu"
        )
    return device


def planned(cfg: DictConfig) -> tuple[ThreatModel, list[ThreatModel], list[Attack]]:
    """The threat as configured, one for each budget, and the attacks; refuses what can't be done before any work."""
    for key in ("attacks", "deltas", "losses"):
        if not isinstance(cfg[key], ListConfig):
            usual = {"attacks": "pgd,wpgd,knapsack", "deltas": "8/255", "losses": "ce,redlr"}[key]
            raise SettingError(f"{key}={cfg[key]} must be a list: {key}=[{cfg[key] or usual}]")
    if cfg.split not in ("test", "val"):
        raise unknown("split", cfg.split, ("test", "val"), "split")
    for name in cfg.attacks:
        if name not in ATTACKS:
            raise unknown("attack", name, ATTACKS, "attacks")
        if ATTACKS[name].by_distance:
            raise SettingError(f"attacks: {name} trains; to evaluate, use knapsack")
    if cfg.save_distances and "knapsack" not in cfg.attacks:
        raise SettingError(
            "save_distances=true writes the distances of the knapsack: add it to attacks, or set it false"
        )
    if not cfg.deltas or not cfg.losses:
        raise SettingError("deltas and losses must each name at least one: deltas=[8/255] losses=[ce]")
    check_timeout(cfg.process_timeout)
    base: ThreatModel = instantiate(cfg.threat)
    threats = [ThreatModel(base.p, base.norm, parse_budget(delta, "deltas")) for delta in cfg.deltas]
    options = OmegaConf.to_container(cfg.attack_options, resolve=True)
    attacks = plan(list(cfg.attacks), list(cfg.losses), options, cfg.batch_size)  # type: ignore[arg-type]  # a mapping
    for attack in attacks:
        attack.threat_of(base)
    if (certificate := instantiate(cfg.certify)) is not None:
        certificate.check(threats)
    return base, threats, attacks


def load(cfg: DictConfig) -> tuple[Any, nn.Module]:
    """The data, read and split, and the network."""
    data = instantiate(cfg.data)
    data.suit(models.preprocessing(cfg.model))
    with one_at_a_time():
        data.prepare_data()
        network = instantiate(cfg.model)
    data.setup("test" if cfg.split == "test" else None)
    return data, network


def evaluate(cfg: DictConfig, run_dir: Path, console: PlainConsole, team: Team) -> RecordFile:
    """Run one evaluation from its composed configuration, on this process's share of the images.

    Args:
        cfg: As `conf/evaluate.yaml` composes it.
        run_dir: Where records, report and pictures go.
        console: Where progress is shown.
        team: The processes that run it.

    Returns:
        The records of the evaluation, on the first process all of them.
    """
    base, threats, attacks = planned(cfg)
    everyone = team.join(cfg.process_timeout)
    with together(everyone):
        device = choose_device(cfg.device, team.place)
        if team.first and not cfg.resume:
            check_unused(run_dir, "records.json", "an evaluation")
        results = RecordFile(run_dir / "records.json" if team.first else None)
        if device.type == "cuda" and team.place.world > 1:
            torch.cuda.set_device(device)
    with together(everyone):
        data, network = load(cfg)
        data.share(team.place.rank, team.place.world)
        loader = data.test_dataloader() if cfg.split == "test" else data.val_dataloader()
        images = ImageTensors.collect(loader, device)
        network = network.to(device).eval()
        if (certificate := instantiate(cfg.certify)) is not None:
            certificate.check_network(network, images.x)
    name = models.title(cfg.model)
    facts = Facts(name, str(cfg.model.checkpoint or ""), data.name, cfg.seed, models.digest(network))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet or not console.is_terminal) as live:
        tasks: dict[str, TaskID] = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = live.add_task(label, total=total)
            live.update(tasks[label], completed=done)
            if done >= total:
                live.remove_task(tasks.pop(label))

        evaluator = Evaluator(
            network, images, cfg.batch_size, split=cfg.split, facts=facts, processes=current(device), progress=report,
            pictures=True,
        )  # fmt: skip
        on = f"{device}" if team.place.world == 1 else f"{team.place.world} processes ({device.type})"
        console.print(f"{name}: {evaluator.size} {cfg.split} images of {data.name} on {on}")
        with together(everyone):
            radii = read_radii(Path(cfg.certified), evaluator.size) if cfg.certified else None
        session = Session(evaluator, results, run_dir)
        for loss in cfg.losses:
            session.clean(base, loss)
        for threat in threats:
            for attack in attacks:
                session.attacked(attack, threat)
            if radii is not None:
                session.certified(radii, str(cfg.certified), threat)
        if certificate is not None:
            session.certify(certificate, threats, attacks)
        if cfg.save_distances:
            session.save_distances(attacks, base.norm)
    return results


def show(results: RecordFile, run_dir: Path, console: PlainConsole) -> None:
    """Write the report and the picture, and print the table."""
    accuracy_against_budget(results.records, run_dir / "curve.png")
    write_report(results.records, run_dir / "report.html")
    console.print(evaluation_table(results.records))
    for name in ("records.json", "report.html", "curve.png"):
        console.print(f"{name:<12} {run_dir / name}")


def lead(team: Team) -> None:
    """What the first process does: compose the configuration, tell the others, evaluate and show."""
    sweep = Sweep()

    @hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
    def main(cfg: DictConfig) -> None:
        quiet_libraries()
        with readable_errors(), sweep.job():
            run_dir, console = Path(HydraConfig.get().runtime.output_dir), PlainConsole()
            planned(cfg)
            if team.place.world > 1:
                team.tell({"settings": OmegaConf.to_container(cfg, resolve=True), "folder": str(run_dir)})
            show(evaluate(cfg, run_dir, console, team), run_dir, console)

    with readable_errors():
        sys.argv[1:] = resumed_arguments(sys.argv[1:], checkpoints=())
        check_folder(sys.argv[1:])
    main()
    sweep.end()


def follow(team: Team) -> None:
    """What the other processes do, in silence: each evaluation that the first one tells them to make."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    with readable_errors():
        try:
            for task in team.tasks():
                evaluate(DictConfig(task["settings"]), Path(task["folder"]), PlainConsole(quiet=True), team)
        except Exception as error:
            if isinstance(cause(error, SettingError, RunError), SettingError):
                sys.exit(2)  # all have it, and the first one says it
            raise


if __name__ == "__main__":
    with readable_errors(), Team(place_of(os.environ)) as team:
        (lead if team.first else follow)(team)
