"""One evaluation, from its composed configuration to its report."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import lightning as L
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn

from wdat import models
from wdat.attacks import Attack
from wdat.certify import Certificate
from wdat.cli.build import build, build_attacks, check_number_of_classes
from wdat.cli.launch import one_at_a_time
from wdat.data.batch import Batch
from wdat.distributed import current, together
from wdat.errors import SettingError, Stopped, unknown
from wdat.evaluation import ImageTensors
from wdat.evaluation.batches import drained
from wdat.evaluation.evaluator import Evaluator, plan, settings, warn_of_masking
from wdat.evaluation.session import Session, read_radii
from wdat.losses import check_classes
from wdat.records import Facts, RecordFile
from wdat.reporting.plots import accuracy_against_budget
from wdat.reporting.report import write_report
from wdat.reporting.tables import evaluation_table
from wdat.terminal import PlainConsole
from wdat.threat import ThreatModel, parse_budget
from wdat.training.callbacks import WorkProgress

FILES = ("records.json", "report.html", "curve.png")


def evaluate(cfg: DictConfig, run_dir: Path) -> RecordFile:
    """Run one evaluation, on this process's share of the images.

    Args:
        cfg: As `conf/evaluate.yaml` composes it.
        run_dir: Where the records go.

    Returns:
        The records of the evaluation, on the first process all of them.
    """
    base, threats, attacks, certificate = planned(cfg)
    preprocessing = cfg.data.get("preprocessing") or models.preprocessing(cfg.model)
    data = build(cfg.data, "data", **({"preprocessing": preprocessing} if preprocessing else {}))
    with one_at_a_time():
        data.prepare_data()
    data.setup("test" if cfg.split == "test" else None)  # refuses bad images before weights are downloaded
    with one_at_a_time():
        network = build(cfg.model, "model")
    name = models.title(cfg.model)
    facts = Facts(name, models.checkpoint_of(cfg.model), data.name, cfg.seed, models.digest(network))
    progress = WorkProgress()
    trainer: L.Trainer = build(cfg.trainer, "trainer", logger=False, enable_checkpointing=False, callbacks=[progress])
    first = trainer.is_global_zero
    results = RecordFile(run_dir / FILES[0] if first else None)

    classes = cfg.data.num_classes

    def measure(images: ImageTensors, device: torch.device) -> None:
        everyone = current(device)
        evaluator = Evaluator(
            network, images, cfg.batch_size, split=cfg.split, facts=facts, processes=everyone, progress=progress.report,
            pictures=True, tf32=cfg.tf32,
        )  # fmt: skip
        if first:
            on = device if everyone.world_size == 1 else f"{everyone.world_size} processes ({device.type})"
            images_of = f"{data.name}, {cfg.split} images: {data.selection[cfg.split]}"
            PlainConsole().print(f"{name}, {models.origin(cfg.model)}; {images_of}; on {on}", soft_wrap=True)
        with together(everyone):
            if certificate is not None:
                certificate.check_network(network, images.x)
            radii = read_radii(Path(cfg.certified), evaluator.size) if cfg.certified else None
        evaluator.check(attacks, threats, list(cfg.losses))
        if first:
            check_number_of_classes(network, images.x.shape[1:], classes)
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
        if first:
            warn_of_masking(results.records)

    loop = trainer.test if cfg.split == "test" else trainer.validate
    with stopped_at_once(run_dir):
        loop(Measured(network, measure, run_dir), datamodule=data, verbose=False)
    return results


def show(results: RecordFile, run_dir: Path, console: PlainConsole) -> None:
    """Write the report and the picture, and print the table."""
    accuracy_against_budget(results.records, run_dir / "curve.png")
    write_report(results.records, run_dir / "report.html")
    console.print(evaluation_table(results.records))
    for name in FILES:
        console.print(f"{name:<12} {run_dir / name}")


class Measured(L.LightningModule):
    """A network whose loop of validation or test gathers this process's images, which are then measured as one set.

    Args:
        network: In eval mode where it is measured.
        measure: Called with the images and the device.
        run_dir: The folder to name when the run is stopped.
    """

    def __init__(
        self, network: nn.Module, measure: Callable[[ImageTensors, torch.device], None], run_dir: Path
    ) -> None:
        super().__init__()
        self.network, self.measure, self.run_dir = network, measure, run_dir
        self._batches: list[tuple[Tensor, ...]] = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the images, on the host: whether the device has room for all shows at the end."""
        self._batches.append(tuple(part.cpu() for part in (batch.x, batch.y, batch.index)))

    def on_test_epoch_end(self) -> None:
        """Measure them."""
        with together(current(self.device)):
            images = ImageTensors.join(drained(self._batches), self.device)
        # Lightning has taken the signals, and would wait for the end of all attacks.
        with stopped_at_once(self.run_dir):
            self.measure(images, self.device)

    validation_step, on_validation_epoch_end = test_step, on_test_epoch_end


@contextmanager
def stopped_at_once(run_dir: Path) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C raise `Stopped`: what is measured is recorded already."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, f"stopped by {signal.Signals(number).name}; resume with resume={run_dir}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def planned(cfg: DictConfig) -> tuple[ThreatModel, list[ThreatModel], list[Attack], Certificate | None]:
    """The threat, one for each budget, the attacks, and what certifies; refuses what can't be done before any work."""
    for key in ("attacks", "losses", "curve" if cfg.deltas is None else "deltas"):
        if not isinstance(cfg[key], ListConfig):
            usual = {"attacks": "pgd,wpgd,knapsack", "deltas": "8/255", "curve": "0.5,2", "losses": "ce,redlr"}[key]
            raise SettingError(f"{key}={cfg[key]} must be a list: {key}=[{cfg[key] or usual}]")
    if cfg.split not in ("test", "val"):
        raise unknown("split", cfg.split, ("test", "val"), "split")
    if cfg.save_distances and "knapsack" not in cfg.attacks:
        raise SettingError(
            "save_distances=true writes the distances of the knapsack: add it to attacks, or set it false"
        )
    if cfg.deltas == [] or not cfg.losses:
        raise SettingError("deltas and losses must each name at least one: deltas=[8/255] losses=[ce]")
    if isinstance(cfg.batch_size, bool) or not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise SettingError(f"batch_size={cfg.batch_size} must be a whole number of images from 1")
    if str(cfg.trainer.precision) not in ("32-true", "32"):
        raise SettingError(f"trainer.precision={cfg.trainer.precision}: evaluation is in float32; leave it 32-true")
    if cfg.certified and not Path(cfg.certified).is_file():
        raise SettingError(f"certified={cfg.certified}: no such file")
    base: ThreatModel = build(cfg.threat, "threat")
    if cfg.deltas is None:
        deltas = [base.delta, *(factor * base.delta for factor in cfg.curve)]
    else:
        deltas = [parse_budget(delta, "deltas") for delta in cfg.deltas]
    threats = [ThreatModel(base.p, base.norm, delta) for delta in deltas]
    chosen, options = build_attacks(cfg, "")
    attacks = plan(chosen, list(cfg.losses), options, cfg.batch_size)
    classes = cfg.data.num_classes
    named = [("losses", loss) for loss in cfg.losses]
    named += [(f"attack_options.{attack.name}.loss", settings(attack).get("loss")) for attack in attacks]
    for setting, loss in named:
        check_classes(loss or "", classes, setting)
    for attack in attacks:
        attack.threat_of(base)
    certificate: Certificate | None = build(cfg.certify, "certify")
    if certificate is not None:
        certificate.check(threats)
    return base, threats, attacks, certificate
