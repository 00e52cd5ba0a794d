"""Training from a composed configuration: build, test, fit, test the best, report."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from wdat import models
from wdat.cli.build import accepts, build, build_attacks, check_number_of_classes, try_optimizer
from wdat.cli.devices import synchronised, told
from wdat.cli.launch import device_count, one_at_a_time
from wdat.cli.run_folder import create
from wdat.data.sampling import check_divisible
from wdat.errors import SettingError, check_real, check_whole, unknown
from wdat.evaluation.evaluator import Progress, settings
from wdat.losses import check_classes
from wdat.objectives import Clean
from wdat.records import Facts, RecordFile
from wdat.reporting import dashboard
from wdat.reporting.plots import accuracy_against_budget
from wdat.reporting.report import write_report
from wdat.reporting.tables import before_after, in_a_line
from wdat.sensitivity import with_pool
from wdat.terminal import PlainConsole
from wdat.threat import ThreatModel
from wdat.training import checkpointing as checkpoints
from wdat.training.callbacks import RobustEvaluation, WorkProgress
from wdat.training.checkpointing import SafeCheckpointIO
from wdat.training.module import WDATModule
from wdat.training.optimizers import peak_rate
from wdat.training.requests import Requests
from wdat.training.schedulers import Cosine

MEASURES = "robust_evaluation"  # its name among the callbacks
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
    L.seed_everything(cfg.seed, verbose=False)
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    resume = newest(cfg, run_dir)
    results = RecordFile(run_dir / "records.json" if first else None, fresh=not cfg.resume)
    if first and cfg.logger is not None and cfg.logger.get("save_dir"):
        create(Path(cfg.logger.save_dir), setting="logger.save_dir")
    logger = build(cfg.logger, "logger")  # before longer work, because it may want a login
    data, threat, optimizer = build(cfg.data, "data"), build(cfg.threat, "threat"), optimizer_of(cfg)
    objective, attack = build(cfg.objective, "objective"), build(cfg.attack, "attack")
    reweighting, perturbation = (build(cfg[key], key) for key in ("reweighting", "weight_perturbation"))
    if reweighting is not None:
        reweighting.check(cfg.data.batch_size)
    scheduler, sensitivity = build(cfg.scheduler, "scheduler"), build(cfg.sensitivity, "sensitivity")
    facts = Facts(models.title(cfg.model), models.checkpoint_of(cfg.model), data.name, cfg.seed)
    progress = WorkProgress()
    evaluation = evaluation_of(cfg, threat, attack, results, facts, progress.report)
    requests = Requests()
    callbacks = [
        build(node, f"callbacks.{name}", **({"requests": requests} if accepts(node, "requests") else {}))
        for name, node in cfg.callbacks.items()
        if name != MEASURES
    ]
    callbacks += [build(cfg.averaging, "averaging"), evaluation, progress]

    redrawn = cfg.finetune.get("init") == "reset_head" and accepts(cfg.model, "new_head")

    with one_at_a_time():
        data.prepare_data()
    data.setup()  # refuses bad images before weights are downloaded
    with one_at_a_time():
        network = build(cfg.model, "model", **({"new_head": True} if redrawn else {}))
    check_fit(network, data.image_shape, cfg.data.num_classes, threat, attack, evaluation)
    if cfg.pretrain.max_epochs and not resume:
        pretrain(cfg, network, data, threat)
    trained = build(cfg.finetune, "finetune")(network, image_shape=data.image_shape)
    if data.pool is not None:
        sensitivity = with_pool(sensitivity, data.pool, data.pool_share, data.synthetic.sample, data.synthetic.every)
    module = WDATModule(
        network, objective, attack, threat, sensitivity, optimizer, scheduler, models.keep_frozen_in_eval, cfg.seed,
        cfg.optimizer.exempt, notify=notify, progress=progress.report, requests=requests, reweighting=reweighting,
        weight_perturbation=perturbation,
    )  # fmt: skip
    callbacks = [callback for callback in callbacks if callback is not None]
    sync = _synchronised(cfg, network)
    trainer: L.Trainer = build(
        cfg.trainer, "trainer", callbacks=callbacks, logger=logger, plugins=[SafeCheckpointIO()], sync_batchnorm=sync,
        enable_checkpointing=any(cfg.callbacks.get(name) is not None for name in ("checkpoint", "last_checkpoint")),
    )  # fmt: skip
    check_divisible(cfg.data.batch_size, trainer.world_size)
    notify(f"devices {told(trainer, cfg.data.batch_size, network, sync)}")
    describe(cfg, network, trained, data)
    trainer.precision_plugin.convert_module(module)  # Lightning does so only after it has restored the weights
    dashboard.begin(trainer.loggers, cfg)

    if not resume and evaluation is not None:
        trainer.test(module, data, verbose=False)
        notify(f"before training, test images: {measured(results, 'before', threat)}")
    trainer.fit(module, data, ckpt_path=resume)
    results.forget("after")  # of a resumed run: of other weights, or measured in part
    best = trainer.strategy.broadcast(chosen(trainer, run_dir) if first else None)
    if evaluation is not None:
        trainer.test(module, data, ckpt_path=best, verbose=False)
        notify(f"after training, test images: {measured(results, 'after', threat)}")
    if first:
        report(results, run_dir, best, [] if evaluation is None else [a.name for a in evaluation.attacks], threat.delta)
        dashboard.finish(trainer.loggers, results.records, run_dir, best, trainer.global_step)
    return results


def check(cfg: DictConfig) -> None:
    """Refuse at once what Lightning would refuse in its own words, perhaps after an epoch.

    Fills in what one part of the configuration knows of another where the files leave it open.
    """
    check_whole("seed", cfg.seed, 0)
    if cfg.seed >= 2**32:
        raise SettingError(f"seed={cfg.seed} must be below 2**32")
    for key, least in (("max_epochs", 0), ("check_val_every_n_epoch", 1), ("log_every_n_steps", 1)):
        check_whole(f"trainer.{key}", cfg.trainer[key], least)
    if cfg.trainer.gradient_clip_val is not None:
        check_real("trainer.gradient_clip_val", cfg.trainer.gradient_clip_val, "[0, inf)", "null for none")
    check_whole("pretrain.max_epochs", cfg.pretrain.max_epochs, 0)
    check_real("pretrain.lr", cfg.pretrain.lr, "(0, inf)")
    if str(cfg.trainer.precision) not in PRECISIONS:
        raise SettingError(
            f"trainer.precision={cfg.trainer.precision}: choose 32-true, or bf16-mixed, with which training and its "
            "attacks run faster and evaluation stays in float32 (float16 loses input gradients)"
        )
    if cfg.callbacks.get(MEASURES) is None:
        notify(f"without callbacks.{MEASURES} nothing is measured, and no checkpoint is chosen but the last")
        if cfg.callbacks.get("checkpoint") is not None and cfg.callbacks.checkpoint.get("monitor") == cfg.monitor:
            cfg.callbacks.checkpoint = None
    if "preprocessing" in cfg.data and cfg.data.preprocessing is None:
        cfg.data.preprocessing = models.preprocessing(cfg.model)


def newest(cfg: DictConfig, run_dir: Path) -> Path | None:
    """The checkpoint from which a run is resumed, of whose step the logger is told; None for a run that begins."""
    if not cfg.resume:
        return None
    resume, notice = checkpoints.newest(run_dir)
    if notice:
        notify(notice)
    if cfg.logger is not None and "resumed_at" in cfg.logger:
        cfg.logger.resumed_at = checkpoints.steps(resume)
    return resume


def evaluation_of(
    cfg: DictConfig, threat: ThreatModel, attack: Any, records: RecordFile, facts: Facts, progress: Progress
) -> RobustEvaluation | None:
    """What measures on validation and test images, None for nothing; refuses what couldn't be measured."""
    losses = {f"attack.{key}": getattr(attack, key, None) for key in ("loss", "radii_loss")}
    for setting, loss in losses.items():
        check_classes(loss or "", cfg.data.num_classes, setting)
    if cfg.callbacks.get(MEASURES) is None:
        return None
    attacks, options = build_attacks(cfg.evaluation)
    for factor in cfg.evaluation.curve:
        check_real("evaluation.curve", factor, "(0, inf)", "budgets in units of threat.delta")
    check_whole("evaluation.batch_size", cfg.evaluation.batch_size)
    try:
        evaluation: RobustEvaluation = build(cfg.callbacks[MEASURES], f"callbacks.{MEASURES}")(
            threat, attacks, losses=list(cfg.evaluation.losses), options=options,
            validation_options={**(cfg.evaluation.validation_options or {})},
            deltas=[factor * threat.delta for factor in cfg.evaluation.curve], batch_size=cfg.evaluation.batch_size,
            records=records, facts=facts, progress=progress, tf32=cfg.tf32,
        )  # fmt: skip
    except SettingError as error:
        raise SettingError(re.sub(r"(?<!\.)\battack_options\.", "evaluation.attack_options.", str(error))) from error
    known = sorted(f"val/{key}" for key in evaluation.metrics if key.startswith("acc_"))  # larger is better
    if cfg.monitor not in known:
        raise unknown("metric", cfg.monitor, known, "monitor")
    losses = {f"evaluation.losses[{k}]": loss for k, loss in enumerate(cfg.evaluation.losses)}
    losses |= {f"evaluation.attack_options.{a.name}.loss": settings(a).get("loss") for a in evaluation.attacks}
    for setting, loss in losses.items():
        check_classes(loss or "", cfg.data.num_classes, setting)
    return evaluation


def check_fit(
    network: nn.Module, shape: tuple[int, ...], classes: int, threat: ThreatModel, attack: Any,
    evaluation: RobustEvaluation | None,
) -> None:  # fmt: skip
    """Refuse, before any pass over the data, what doesn't fit images of this shape and so many classes."""
    check_number_of_classes(network, shape, classes)
    if evaluation is not None:
        evaluation.check(network, shape)
    if attack is not None:
        attack.check(shape, classes, threat)


def optimizer_of(cfg: DictConfig) -> Callable[..., Optimizer]:
    """The optimiser, still without parameters, its rate that of the batch size."""
    node = DictConfig({key: value for key, value in cfg.optimizer.items() if key not in ("per_batch", "exempt")})
    check_real("optimizer.lr", node.lr, "[0, inf)")
    rate = peak_rate(node.lr, cfg.data.batch_size, cfg.optimizer.per_batch)
    if cfg.optimizer.per_batch is not None:
        notify(f"rate    {rate:g} for batches of {cfg.data.batch_size} ({node.lr:g} for {cfg.optimizer.per_batch})")
    optimizer = build(node, "optimizer", lr=rate)
    try_optimizer(optimizer, "optimizer", node, [nn.Parameter(torch.zeros(1))])
    return optimizer  # type: ignore[no-any-return]  # Hydra


def pretrain(cfg: DictConfig, network: nn.Module, data: L.LightningDataModule, threat: ThreatModel) -> None:
    """Plain training with cross-entropy, for a network without weights."""
    optimizer = partial(torch.optim.SGD, lr=cfg.pretrain.lr, momentum=0.9, weight_decay=5e-4)
    module = WDATModule(network, Clean(), None, threat, None, optimizer, Cosine(), seed=cfg.seed)
    trainer: L.Trainer = build(
        cfg.trainer, "trainer", max_epochs=cfg.pretrain.max_epochs, limit_val_batches=0, logger=False,
        enable_checkpointing=False, callbacks=[WorkProgress("plain training, epoch")],
        sync_batchnorm=_synchronised(cfg, network),
    )  # fmt: skip
    trainer.fit(module, data)


def _synchronised(cfg: DictConfig, network: nn.Module) -> bool:
    world_size = device_count(cfg.trainer.accelerator, cfg.trainer.devices) * cfg.trainer.num_nodes
    on_gpus = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return synchronised(cfg.trainer, network, world_size, on_gpus)


def describe(cfg: DictConfig, network: nn.Module, trained: list[str], data: Any) -> None:
    """Say what is trained, on how many images."""
    _, total = models.describe(network)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    names = ", ".join(trained[:4]) + (f" and {len(trained) - 4} more" if len(trained) > 4 else "")
    notify(f"network {cfg.model.name}, {models.origin(cfg.model)}: trains {count:,} of {total:,} parameters ({names})")
    sizes = (f"{data.splits[split]:,}" for split in ("train", "val", "test"))
    notify("images  {} training, {} validation (taken from the training set), {} test".format(*sizes))
    limited = [f"{split} {words}" for split, words in data.selection.items() if not words.startswith("all ")]
    if limited:
        notify(f"limits  {'; '.join(limited)}")
    if data.images("train").in_files and str(cfg.sensitivity["_target_"]).endswith((".Table", ".Exact")):
        notify(
            f"sensitivity measures Υ by a pass that decodes all {data.splits['train']:,} training images; "
            "sensitivity=subsample decodes 1,024 of them every 10 steps"
        )
    if data.patches.cutmix and cfg.averaging is None:
        notify("data.augmentation.cutmix helps adversarial training only together with an average: averaging=ema")
    if data.pool is not None:
        notify(f"pool    {len(data.pool):,} synthetic images, {100 * data.pool_share:.0f} % of each batch")
    elif cfg.objective.get("label_smoothing") and cfg.objective.get("smooth") == "synthetic":
        notify(
            f"there are no synthetic images, so objective.label_smoothing={cfg.objective.label_smoothing} with "
            "objective.smooth=synthetic smooths nothing (objective.smooth=all smooths all labels)"
        )


def measured(results: RecordFile, stage: str, threat: ThreatModel) -> str:
    """One line on a stage: accuracy on test images, clean and under each attack at the threat's budget."""
    found = [r for r in results.records if r.stage == stage and r.delta in (0.0, threat.delta)]
    return in_a_line(found)


def chosen(trainer: L.Trainer, run_dir: Path) -> Path | None:
    """The checkpoint that the monitor chose; without validation, or where it can't be used, the last; None for none."""
    folder = run_dir / checkpoints.FOLDER
    last = folder / checkpoints.LAST
    best = Path(getattr(trainer.checkpoint_callback, "best_model_path", "") or last)
    for candidate in (best, last):
        # A resumed run takes the name from its checkpoint; no file outside the run is meant.
        if candidate.exists() and candidate.resolve().parent == folder.resolve():
            fault = checkpoints.damage(candidate)
            if fault is None:
                return candidate
            notify(f"{candidate.name} can't be used ({fault})")
    return None


def report(results: RecordFile, run_dir: Path, best: Path | None, attacks: list[str], delta: float) -> None:
    """Write the report and the picture, print the table, and name the files; those alone where nothing was measured."""
    console, files = PlainConsole(soft_wrap=False), {} if best is None else {"checkpoint": best}
    if results.records:
        picture, page = run_dir / "curve.png", run_dir / "report.html"
        accuracy_against_budget(results.records, picture)
        write_report(results.records, page)
        console.print(before_after(results.records, attacks, delta))
        files |= {"records": run_dir / "records.json", "report": page, "picture": picture}
    lines = "\n".join(f"{name:<10} {path}" for name, path in files.items())
    console.print(lines, highlight=False, soft_wrap=True)


def notify(text: str) -> None:
    """Print on the first process only."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        PlainConsole().print(text)
