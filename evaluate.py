"""Measure the distributional robustness of a network.

    python evaluate.py model=Rebuffi2021 "attacks=[pgd,wpgd,knapsack]" "deltas=[2/255,8/255]" "losses=[ce,redlr]"
    python evaluate.py model=resnet2b model.checkpoint=FILE data=npz data.path=FILE.npz threat=w2_l2 deltas=[0.25]
    python evaluate.py resume=RUN_DIR

Writes records.json, report.html and curve.png into its folder; everything else is in the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from wdat import ThreatModel
from wdat.attacks import ATTACKS
from wdat.console import evaluation_table, quiet_libraries, readable_errors
from wdat.errors import SettingError, unknown
from wdat.evaluation import ImageTensors
from wdat.evaluation.plots import accuracy_against_budget
from wdat.evaluation.report import write_report
from wdat.evaluation.run import Evaluator, plan
from wdat.evaluation.session import Session, read_radii
from wdat.records import Facts, RecordBook
from wdat.resume import check_folder, resumed_arguments
from wdat.threat import parse_budget


def choose_device(name: str) -> torch.device:
    """The device that the setting `device` names; `auto` takes a GPU if there is one.

    Raises:
        SettingError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"device={name} is unknown; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(f"device={name} isn't there; use auto or cpu")
    return device


def evaluate(cfg: DictConfig, run_dir: Path, console: Console) -> RecordBook:
    """Run one evaluation from its composed configuration.

    Args:
        cfg: As `conf/evaluate.yaml` composes it.
        run_dir: Where records, report and pictures go.
        console: Where progress is shown.

    Returns:
        The records of the evaluation.
    """
    if cfg.split not in ("test", "val"):
        raise unknown("split", cfg.split, ("test", "val"), "split")
    for name in cfg.attacks:
        if name not in ATTACKS:
            raise unknown("attack", name, ATTACKS, "attacks")
        if ATTACKS[name].by_distance:
            raise SettingError(f"attacks: {name} trains; to evaluate, use knapsack")
    if not cfg.deltas or not cfg.losses:
        raise SettingError("deltas and losses must each name at least one: deltas=[8/255] losses=[ce]")
    base: ThreatModel = instantiate(cfg.threat)
    threats = [ThreatModel(base.p, base.norm, parse_budget(delta, "deltas")) for delta in cfg.deltas]
    options = OmegaConf.to_container(cfg.attack_options, resolve=True)
    attacks = plan(list(cfg.attacks), list(cfg.losses), options, cfg.batch_size)  # type: ignore[arg-type]
    for attack in attacks:
        attack.threat_of(base)  # refuses an impossible pair before any work
    device = choose_device(cfg.device)
    book = RecordBook(run_dir / "records.json")

    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    network = instantiate(cfg.model).to(device).eval()
    loader = data.test_dataloader() if cfg.split == "test" else data.val_dataloader()
    images = ImageTensors.collect(loader, device)
    radii = read_radii(Path(cfg.certified), len(images.y)) if cfg.certified else None
    facts = Facts(cfg.model.name, str(cfg.model.checkpoint or ""), data.name, cfg.seed)
    console.print(f"{cfg.model.name}: {len(images.y)} {cfg.split} images of {data.name} on {device}")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as live:
        tasks: dict[str, TaskID] = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = live.add_task(label, total=total)
            live.update(tasks[label], completed=done)
            if done >= total:
                live.remove_task(tasks.pop(label))

        evaluator = Evaluator(
            network, images, cfg.batch_size, split=cfg.split, facts=facts, progress=report, pictures=True
        )
        session = Session(evaluator, book, run_dir)
        for loss in cfg.losses:
            session.clean(base, loss)
        for threat in threats:
            for attack in attacks:
                session.attacked(attack, threat)
            if radii is not None:
                session.certified(radii, str(cfg.certified), threat)
        if cfg.save_distances:
            session.save_distances(attacks, base.norm)

    accuracy_against_budget(book.records, run_dir / "curve.png")
    write_report(book.records, run_dir / "report.html")
    console.print(evaluation_table(book.records))
    for name in ("records.json", "report.html", "curve.png"):
        console.print(f"{name:<12} {run_dir / name}")
    return book


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and evaluate."""
    quiet_libraries()
    with readable_errors():
        evaluate(cfg, Path(HydraConfig.get().runtime.output_dir), Console(highlight=False, soft_wrap=True))


if __name__ == "__main__":
    with readable_errors():
        sys.argv[1:] = resumed_arguments(sys.argv[1:], checkpoint=None)
        check_folder(sys.argv[1:])
    main()
