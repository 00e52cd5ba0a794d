"""What a step costs, against a clock of our own."""

from __future__ import annotations

import csv
import time

import pytest
from lightning.pytorch.loggers import CSVLogger

from wdat.training.callbacks import StepCost
from wdat.training.callbacks import cost as cost_file


class Clock:
    """Advances by a second at every reading."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1
        return self.now


class Batch:
    size = 32


class Device:
    type = "cpu"


class Module:
    device = Device()

    def __init__(self):
        self.logged = []

    def log(self, name, value, **options):
        self.logged.append((name, value))


class Trainer:
    log_every_n_steps = 3
    is_last_batch = False
    global_step = 0


def test_seconds_and_images_since_the_last_log(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cost_file, "time", clock)
    callback, module, trainer = StepCost(), Module(), Trainer()
    callback.on_train_epoch_start(trainer, module)
    for step in range(1, 8):
        trainer.global_step, trainer.is_last_batch = step, step == 7
        callback.on_train_batch_start(trainer, module, Batch(), step - 1)
        clock.now += 10  # the step
        callback.on_train_batch_end(trainer, module, None, Batch(), step - 1)
    # The clock itself takes a second at each reading: three steps are 30 + 1 seconds, the last one 10 + 1.
    seconds = [31 / 3, 31 / 3, 11]
    assert [v for k, v in module.logged if k == "cost/seconds_per_step"] == pytest.approx(seconds)
    assert [v for k, v in module.logged if k == "cost/images_per_second"] == pytest.approx([32 / s for s in seconds])


def test_what_lies_between_two_epochs_is_not_counted(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cost_file, "time", clock)
    callback, module, trainer = StepCost(), Module(), Trainer()
    trainer.is_last_batch, trainer.global_step = True, 1
    for _ in range(2):
        callback.on_train_epoch_start(trainer, module)
        callback.on_train_batch_start(trainer, module, Batch(), 0)
        clock.now += 10
        callback.on_train_batch_end(trainer, module, None, Batch(), 0)
        clock.now += 1000  # an evaluation
    assert [v for k, v in module.logged if k == "cost/seconds_per_step"] == pytest.approx([11, 11])


def test_the_cost_reaches_the_file(digits, make_module, make_trainer, tmp_path):
    started = time.perf_counter()
    make_trainer(StepCost(), logger=CSVLogger(tmp_path), limit_val_batches=0).fit(make_module(), digits())
    elapsed = time.perf_counter() - started
    with open(next(tmp_path.rglob("metrics.csv")), newline="") as file:
        logged = [row for row in csv.DictReader(file) if row.get("cost/seconds_per_step")]
    assert len(logged) == 3
    seconds = [float(row["cost/seconds_per_step"]) for row in logged]
    assert 0 < sum(seconds) <= elapsed
    for row, each in zip(logged, seconds, strict=True):
        assert float(row["cost/images_per_second"]) == pytest.approx(16 / each, rel=1e-4)
