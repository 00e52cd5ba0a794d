"""What the training attack does: closed forms, and what reaches the log."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from small_training import Outputs

from wdat.attacks import AttackResult, build
from wdat.objectives import Clean
from wdat.threat import ThreatModel
from wdat.training.callbacks import AttackLog
from wdat.training.callbacks.attack_log import radius_figures

FIGURES = {"radius_max", "top1_share", "zero_radii"}


def result(radii, p=2.0, distances=None):
    radii = None if radii is None else torch.tensor(radii)
    moved = torch.tensor(distances) if distances else radii
    x = torch.zeros(len(moved), 1)
    return AttackResult(x, moved, 0.0, radii, ThreatModel(p, "linf", 0.1), None, None, len(x), 0)


def figures_of(result):
    return radius_figures(result.distances if result.radii is None else result.radii, result.threat.p)


@pytest.mark.parametrize(
    ("given", "largest", "share", "zeros"),
    [
        (result([0.1] * 10), 0.1, 0.1, 0.0),  # uniform: one of ten
        (result([3.0, 4.0]), 4.0, 16 / 25, 0.0),
        (result([3.0, 4.0], p=3), 4.0, 64 / 91, 0.0),
        (result([0.0, 0.0, 0.0, 0.5]), 0.5, 1.0, 0.75),
        (result([0.0, 0.0]), 0.0, 0.0, 1.0),
        (result([0.1] * 300), 0.1, 3 / 300, 0.0),  # 1 % of 300
        (result([2.0, *[1.0] * 100]), 2.0, (4 + 1) / 104, 0.0),  # 1 % of 101 images, rounded up
        (result([0.1] * 4, p=math.inf), 0.1, 0.25, 0.0),  # their share of the images
        (result([0.1] * 200, p=math.inf), 0.1, 0.01, 0.0),
        (result(None, distances=[3.0, 4.0, 0.0]), 4.0, 16 / 25, 1 / 3),  # no radii: distances
        (result([1e-30, 2e-30]), 2e-30, 0.8, 0.0),  # no underflow
        (result([1e-30, 2e-30], p=50.0), 2e-30, 1.0, 0.0),
    ],
)
def test_closed_forms(given, largest, share, zeros):
    found = figures_of(given)
    assert set(found) == FIGURES
    assert found["radius_max"] == pytest.approx(largest)
    assert found["top1_share"] == pytest.approx(share)
    assert found["zero_radii"] == pytest.approx(zeros)


def rows(folder):
    with open(next(folder.rglob("metrics.csv")), newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["wpgd_budget", "wpgd", "wfgsm"])
def test_figures_of_each_step_reach_the_file(name, digits, make_module, make_trainer, tmp_path):
    steps = {} if name == "wfgsm" else {"steps": 2}
    module = make_module(attack=build(name, loss="kl", **steps))
    outputs = Outputs()
    make_trainer(AttackLog(), outputs, logger=CSVLogger(tmp_path), limit_val_batches=0).fit(module, digits())
    logged = [row for row in rows(tmp_path) if "train/loss" in row]
    assert len(logged) == 3
    for row in logged:
        assert {f"train/{key}" for key in FIGURES | {"upsilon"}} <= set(row)
        assert 0 < row["train/radius_max"] <= 16 * 0.1
        assert 1 / 16 - 1e-6 <= row["train/top1_share"] <= 1
        assert 0 <= row["train/zero_radii"] < 1
    last = {f"train/{k}": v for k, v in figures_of(outputs.seen[-1]["attack_result"]).items()}
    last["train/upsilon"] = module.sensitivity.upsilon()
    assert {key: logged[-1][key] for key in last} == pytest.approx(last, rel=1e-5)


def test_a_pointwise_attack_has_no_sensitivity(digits, make_module, make_trainer):
    trainer = make_trainer(AttackLog(), limit_val_batches=0)
    trainer.fit(make_module(attack=build("pgd", loss="kl", steps=2)), digits())
    assert float(trainer.callback_metrics["train/radius_max"]) == pytest.approx(0.1)
    assert float(trainer.callback_metrics["train/top1_share"]) == pytest.approx(1 / 16)
    assert "train/upsilon" not in trainer.callback_metrics


def test_an_objective_without_the_attack_logs_nothing(digits, make_module, make_trainer):
    trainer = make_trainer(AttackLog(), limit_val_batches=0)
    trainer.fit(make_module(objective=Clean(), attack=None), digits())
    assert {key for key in trainer.callback_metrics if key.startswith("train/")} == {"train/loss", "train/loss_clean"}


@pytest.mark.parametrize(("every", "wanted"), [(2, [2, 3]), (5, [3]), (1, [1, 2, 3])])
def test_figures_are_taken_at_the_trainers_cadence_and_at_the_end(every, wanted, digits, make_module, make_trainer):
    """Reading them waits for the device, so not every step may do it."""
    module, names = make_module(), []
    trainer = make_trainer(AttackLog(), limit_val_batches=0, log_every_n_steps=every)
    module.log = lambda name, *others, **options: names.append((name, trainer.global_step))
    trainer.fit(module, digits())
    assert [step for name, step in names if name == "train/radius_max"] == wanted
