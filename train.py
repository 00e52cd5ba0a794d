"""Fine-tune a network with Wasserstein distributional adversarial training.

    python train.py model=Rebuffi2021 attack=wpgd
    python train.py experiment=quickstart
    python train.py resume=RUN_DIR

Compose, instantiate, fit, record; everything else is in the package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from wdat import models
from wdat.attacks import build
from wdat.cli.console import quiet_libraries, readable_errors
from wdat.cli.launch import agreed, check_launch, join_group, one_at_a_time
from wdat.cli.resume import check_folder, check_unused, resumed_arguments
from wdat.cli.sweep import Sweep
from wdat.distributed import distributed_errors
from wdat.errors import SettingError, unknown
from wdat.objectives import Objective
from wdat.records import Facts, RecordFile
from wdat.reporting import dashboard
from wdat.reporting.plots import accuracy_against_budget
from wdat.reporting.report import write_report
from wdat.reporting.tables import before_after, in_a_line
from wdat.sensitivity import Batch
from wdat.terminal import PlainConsole
from wdat.training import checkpointing as checkpoints
from wdat.training import loggers
from wdat.training.callbacks import RobustEvaluation, WorkProgress
from wdat.training.checkpointing import SafeCheckpointIO
from wdat.training.module import WDATModule
from wdat.training.optimizers import peak_rate
from wdat.training.schedulers import Cosine

MONITORS = ("val/acc_clean", "val/acc_pointwise", "val/acc_distributional")  # larger is better

SWEEP = Sweep()

PRECISIONS = ("32-true", "32", "bf16-mixed", "64-true", "64")


def train(cfg: DictConfig, run_dir: Path) -> RecordFile:
    """Run one training from its composed configuration.

    Args:
        cfg: As `conf/config.yaml` composes it.
        run_dir: Where checkpoints, records and pictures go.

    Returns:
        The records of the run.
    """
    check(cfg)
    check_launch(cfg.trainer, HydraConfig.get())
    L.seed_everything(cfg.seed, verbose=False)
    logger = instantiate(cfg.logger)  # first, because it may want a login
    threat = instantiate(cfg.threat)
    data = instantiate(cfg.data)
    data.suit(models.preprocessing(cfg.model))
    objective: Objective = instantiate(cfg.objective)
    attack = instantiate(cfg.attack)
    with one_at_a_time():
        data.prepare_data()
        network = instantiate(cfg.model)
    data.setup()
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(c) for c in (cfg.averaging, *cfg.callbacks.values()) if c],
        logger=logger,
        plugins=[SafeCheckpointIO()],
    )
    first = trainer.is_global_zero
    if first and not cfg.resume:
        # A run that stopped before it saved anything may be begun again.
        check_unused(run_dir, f"{checkpoints.FOLDER}/{checkpoints.LAST}", "a run")
    results = RecordFile(run_dir / "records.json" if first else None, fresh=not cfg.resume)
    facts = Facts(models.title(cfg.model), str(cfg.model.checkpoint or ""), data.name, cfg.seed)
    resume, notice = checkpoints.newest(run_dir) if cfg.resume else (None, None)
    if notice:
        say(notice)
    begun = checkpoints.steps(resume) if resume else 0
    if resume:
        loggers.go_on(trainer.loggers, begun)
    dashboard.begin(trainer.loggers, cfg)

    if cfg.pretrain.max_epochs and not resume:
        pretrain(cfg, network, data)
    trained = models.prepare(network, **cfg.finetune, seed=cfg.seed, image_shape=data.image_shape)
    models.accelerate(network, cfg.channels_last, cfg.compile)
    describe(cfg.model.name, network, trained, data.splits)
    if data.pool is not None:
        say(f"pool    {len(data.pool):,} synthetic images, {100 * data.pool_share:.0f} % of each batch")
    if not objective.uses_attack:
        say(f"this objective has no distributional term (beta_w = 0), so attack={cfg.attack.name} is not used")
    module = WDATModule(
        network,
        objective,
        attack,
        threat,
        instantiate(cfg.sensitivity),
        optimizer_of(cfg),
        instantiate(cfg.schedule.shape),
        keep_eval=models.keep_frozen_in_eval,
        seed=cfg.seed,
        exempt=cfg.schedule.get("exempt") or (),
    )
    module.notice = say
    trainer.precision_plugin.convert_module(module)  # Lightning does so only after it has restored the weights
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning declares nowhere
    evaluation = next(c for c in callbacks if isinstance(c, RobustEvaluation))
    progress = next((c.report for c in callbacks if isinstance(c, WorkProgress)), None)
    evaluation.describe(results, facts, progress)
    module.report = progress or module.report

    def measure(stage: str) -> None:
        evaluation.stage = stage
        trainer.test(module, data, verbose=False)
        say(f"{stage} training, test images: {in_a_line(evaluation.last)}")

    if not resume:
        measure("before")
    trainer.fit(module, data, ckpt_path=resume)
    results.forget("after")  # of a run that goes on: of other weights, or measured in part
    best = chosen(trainer, run_dir)
    if best:
        state = torch.load(best, map_location=module.device, weights_only=True)
        module.load_state_dict(state["state_dict"])
        evaluation.facts = replace(facts, checkpoint=os.path.relpath(best, run_dir))
    measure("after")
    if first:
        picture = run_dir / "curve.png"
        accuracy_against_budget(results.records, picture)
        report = run_dir / "report.html"
        write_report(results.records, report)
        table = before_after(results.records, [evaluation.pointwise.name, evaluation.distributional.name], threat.delta)
        console = PlainConsole(soft_wrap=False)
        console.print(table)
        files = {"checkpoint": best, "records": results.path, "report": report, "picture": picture}
        said = "\n".join(f"{name:<10} {path}" for name, path in files.items())
        console.print(said, highlight=False, soft_wrap=True)
        dashboard.finish(trainer.loggers, results.records, run_dir, best, trainer.global_step)
    return results


def chosen(trainer: L.Trainer, run_dir: Path) -> Path | None:
    """The checkpoint that the monitor chose; without validation, or where it can't be used, the last; None for none."""
    folder = run_dir / checkpoints.FOLDER
    last = folder / checkpoints.LAST
    best = Path(trainer.checkpoint_callback.best_model_path or last)  # type: ignore[union-attr]  # there is one
    for candidate in (best, last):
        # A resumed run takes the name from its checkpoint; no file outside the run is meant.
        if candidate.exists() and candidate.resolve().parent == folder.resolve():
            fault = checkpoints.damage(candidate)
            if fault is None:
                return candidate
            say(f"{candidate.name} can't be used ({fault})")
    return None


def check(cfg: DictConfig) -> None:
    """Refuse at once what Lightning would refuse in its own words, perhaps after an epoch."""
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise SettingError(f"seed={cfg.seed} must be a whole number from 0 to 2**32 - 1")
    epochs = cfg.trainer.max_epochs
    if not isinstance(epochs, int) or epochs < 0:
        raise SettingError(f"trainer.max_epochs={epochs} must be a whole number from 0: schedules scale to it")
    if str(cfg.trainer.precision) not in PRECISIONS:
        raise SettingError(
            f"trainer.precision={cfg.trainer.precision}: choose 32-true, or bf16-mixed, with which training and its "
            "attacks run faster and evaluation stays in float32 (float16 loses input gradients)"
        )
    if cfg.monitor not in MONITORS:
        raise unknown("metric", cfg.monitor, MONITORS, "monitor")


def optimizer_of(cfg: DictConfig) -> Callable[..., Optimizer]:
    """The optimiser, still without parameters, its rate that of the batch size."""
    per_batch = cfg.schedule.get("per_batch")
    if per_batch is None:
        return instantiate(cfg.schedule.optimizer)  # type: ignore[no-any-return]  # Hydra
    rate = peak_rate(cfg.schedule.optimizer.lr, cfg.data.batch_size, per_batch)
    say(f"rate    {rate:g} for batches of {cfg.data.batch_size} ({cfg.schedule.optimizer.lr:g} for {per_batch})")
    return instantiate(cfg.schedule.optimizer, lr=rate)  # type: ignore[no-any-return]  # likewise


def pretrain(cfg: DictConfig, network: nn.Module, data: L.LightningDataModule) -> None:
    """Plain training with cross-entropy, for a network without weights."""
    module = WDATModule(
        network,
        Objective(),
        build("pgd"),
        instantiate(cfg.threat),
        Batch(),
        partial(torch.optim.SGD, lr=cfg.pretrain.lr, momentum=0.9, weight_decay=5e-4),
        Cosine(),
        seed=cfg.seed,
    )
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        max_epochs=cfg.pretrain.max_epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[WorkProgress("plain training, epoch")],
    )
    trainer.fit(module, data)


def describe(name: str, network: nn.Module, trained: list[str], splits: dict[str, int]) -> None:
    """Say what is trained, on how many images."""
    _, total = models.describe(network)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    names = ", ".join(trained[:4]) + (f" and {len(trained) - 4} more" if len(trained) > 4 else "")
    say(f"network {name}: trains {count:,} of {total:,} parameters ({names})")
    train, val, test = (f"{splits[split]:,}" for split in ("train", "val", "test"))
    say(f"images  {train} training, {val} validation (taken from the training set), {test} test")


def say(text: str) -> None:
    """Print on the first process only."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        PlainConsole().print(text)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and train."""
    quiet_libraries()
    join_group()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    resume_hint = partial(checkpoints.resume_hint, run_dir)
    with readable_errors(), SWEEP.job(), loggers.own_run(), distributed_errors(resume_hint):
        train(cfg, run_dir)


if __name__ == "__main__":
    with readable_errors():
        sys.argv[1:] = agreed(sys.argv[1:], resumed_arguments)
        check_folder(sys.argv[1:])
    main()
    SWEEP.end()
