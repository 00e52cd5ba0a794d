"""The case study: every arm is a run that composes, and the tables are made of what the runs left."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from sampled import sampled

from benchmarks import case_table
from benchmarks.case_arms import ARMS
from benchmarks.case_study import PASSES, Study
from sweeps import grids
from wdat.attacks.knapsack_allocation import solve
from wdat.errors import SettingError
from wdat.objectives import PGDAT, TRADES, AttackAT
from wdat.records import Record, RecordFile
from wdat.threat import ThreatModel, parse_budget

ROOT = Path(__file__).parents[2]
STUDY = Study("resnet2b", Path("out"), Path("FILE.npz"), autoattack=True)
TRAINED = [arm for arm in ARMS if ARMS[arm].settings]


def commands(arm):
    return STUDY.training(arm, 3), STUDY.evaluations(arm, 3)


@pytest.mark.parametrize("arm", sampled(TRAINED, 4))
def test_every_arm_composes_and_is_what_it_says(arm):
    cfg = grids.composed(commands(arm)[0][1:])
    objective, attack = instantiate(cfg.objective), instantiate(cfg.attack)
    delta = 2 / 255
    own = isinstance(objective, (TRADES, PGDAT))
    inner = objective.pointwise_attack if own else attack
    assert inner.steps * inner.step_size == pytest.approx(2.5, rel=1e-3)
    assert inner.loss == ("ce" if isinstance(objective, (PGDAT, AttackAT)) else "kl")
    assert (cfg.trainer.max_epochs, cfg.seed, cfg.data.flip) == (20, 3, True)
    assert cfg.data.crop == (4 if arm == "draw_crop" else 0)
    assert cfg.optimizer.lr == {"slow": 0.005, "slowest": 0.001}.get(arm.split("_")[-1], 0.02)
    wider = {"wdat_2": 2, "budget_at_2": 2, "wdat_3": 3}.get(arm, 1)
    assert instantiate(cfg.threat).delta == pytest.approx(wider * delta)
    reach = {"pgd_at_2": 2 * delta, "trades_2": 2 * delta, "pgd_at": delta, "trades": delta}
    if arm in reach:
        assert own
        assert parse_budget(objective.pointwise_delta) == pytest.approx(reach[arm])
    else:
        assert not own
        beta = {"combined": 3, "wdat_beta": 2}.get(arm, 6)
        assert isinstance(objective, AttackAT) or objective.beta_w == beta


def test_the_experiment_file_is_the_arm_that_was_best():
    arm = grids.composed(Study("cnn_a", Path("out"), Path("FILE.npz")).training("critical_draw", 3)[1:])
    file = grids.composed(["experiment=critical_draw", "threat.delta=2/255", "seed=3"])
    for key in ("attack", "objective", "averaging", "optimizer", "scheduler", "sensitivity", "finetune", "threat"):
        assert file[key] == arm[key], key
    assert (file.data.crop, file.data.flip, file.data.batch_size) == (0, arm.data.flip, arm.data.batch_size)
    assert file.trainer.max_epochs == arm.trainer.max_epochs


def test_what_an_epoch_costs_is_inner_steps_and_sets_of_images():
    passes = {arm: ARMS[arm].passes for arm in ("pgd_at", "critical_draw", "trades", "wdat_ce", "combined")}
    assert passes == {"pgd_at": 4, "critical_draw": 4, "trades": 5, "wdat_ce": 5, "combined": 9}


def test_at_equal_cost_arms_have_fewer_epochs_from_scratch():
    study = Study("resnet2b", Path("out"), Path("FILE.npz"), passes=45, scratch=True)
    trained = {arm: grids.composed(study.training(arm, 0)[1:]) for arm in ("trades", "combined")}
    assert {arm: cfg.trainer.max_epochs for arm, cfg in trained.items()} == {"trades": 9, "combined": 5}
    assert all(cfg.model.checkpoint is None for cfg in trained.values())


@pytest.mark.parametrize("arm", TRAINED)
def test_every_arm_costs_the_same(arm):
    study = Study("resnet2b", Path("out"), Path("FILE.npz"), passes=PASSES)
    assert f"trainer.max_epochs={PASSES // ARMS[arm].passes}" in study.training(arm, 0)
    assert PASSES % ARMS[arm].passes == 0


def test_passes_that_are_not_whole_epochs_are_refused():
    with pytest.raises(SettingError, match=r"--passes=80 .* combined, which costs 9 .* take 72, or 180"):
        Study("resnet2b", Path("out"), Path("FILE.npz"), passes=80).training("combined", 0)


def test_a_network_without_public_weights_is_trained_first_at_its_own_budget():
    study = Study("preact_resnet18", Path("out"), Path("FILE.npz"))
    first, trained = grids.composed(study.first()[1:]), grids.composed(study.training("pgd_at_2", 0)[1:])
    assert (first.model.checkpoint, first.trainer.max_epochs, first.optimizer.lr) == (None, 30, 0.1)
    assert instantiate(first.threat).p == math.inf
    assert Path(trained.model.checkpoint) == Path("out/preact_resnet18/first/train/checkpoints/last.ckpt")
    assert instantiate(trained.threat).delta == pytest.approx(8 / 255)
    assert parse_budget(trained.objective.pointwise_delta) == pytest.approx(16 / 255)
    assert trained.trainer.precision == first.trainer.precision == "bf16-mixed"
    evaluated = _evaluation(study.evaluations("as_found", 0)["test_jpeg"][1:])
    assert evaluated.model.checkpoint == trained.model.checkpoint


@pytest.mark.parametrize("arm", ["as_found", "pgd_at"])  # others differ from the second by the checkpoint's place
def test_every_evaluation_composes(arm):
    for name, command in commands(arm)[1].items():
        cfg = _evaluation(command[1:])
        assert cfg.split == ("val" if name == "val" else "test")
        assert set(cfg.attacks) >= {"pgd", "wpgd", "knapsack"}
        assert ("autoattack" in cfg.attacks) == (name == "test_original")
        assert cfg.save_distances


def _evaluation(overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("evaluate", overrides)


# --- tables ---------------------------------------------------------------------------------------------------------


def finish(place: Path, distances, clean, seed=0):
    """An evaluation's folder, as `evaluate.py` leaves it."""
    place.mkdir(parents=True)
    common = {
        "stage": "evaluate", "network": "resnet2b", "checkpoint": "", "data": "npz:tiny", "split": "test",
        "options": {}, "loss": "redlr", "norm": "linf", "n": len(distances), "set_size": len(distances),
        "accuracy_low": 0.0, "accuracy_high": 1.0, "loss_mean": None, "distance": 0.0, "seconds": 0.0, "seed": seed,
        "device": "cpu", "commit": "", "versions": {},
    }  # fmt: skip
    found = [("none", 2.0, 0.0, clean), ("pgd", math.inf, 2 / 255, clean - 0.1), ("wpgd", 2.0, 2 / 255, clean - 0.2)]
    RecordFile(place / "records.json").add(
        [Record(attack=a, p=p, delta=delta, accuracy=accuracy, **common) for a, p, delta, accuracy in found]
    )
    np.savez(place / "distances_linf.npz", distances=distances.numpy(), labels=np.zeros(len(distances)))


def test_the_tables_are_of_the_distances_and_records(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(300, generator=generator, dtype=torch.float64) * 0.05
    finish(tmp_path / "resnet2b/as_found/test_jpeg", base, 0.7)
    finish(tmp_path / "resnet2b/pgd_at/seed0/test_jpeg", base * 1.1, 0.71)
    for seed, factor in enumerate((1.3, 1.5)):
        finish(tmp_path / f"resnet2b/critical_draw/seed{seed}/test_jpeg", base * factor, 0.69, seed)

    found = case_table.rows(tmp_path)
    assert [(r["arm"], r["seeds"]) for r in found] == [("as_found", [0]), ("pgd_at", [0]), ("critical_draw", [0, 1])]
    threat = ThreatModel(2, "linf", 2 / 255)
    wanted = [solve(base * f, threat).accuracy for f in (1.0, 1.1, 1.3, 1.5)]
    draw = found[-1]
    assert draw["mean"]["w2"] == pytest.approx((wanted[2] + wanted[3]) / 2)
    assert draw["mean"]["pgd"] == pytest.approx(0.59)
    assert draw["base"]["by_seed"] == pytest.approx(
        {0: 100 * (wanted[2] - wanted[0]), 1: 100 * (wanted[3] - wanted[0])}
    )
    assert draw["control"]["mean"] == pytest.approx(100 * ((wanted[2] + wanted[3]) / 2 - wanted[1]))
    assert 0 < draw["base"]["images_low"] < draw["base"]["mean"] < draw["base"]["images_high"]
    assert draw["base"]["seeds_low"] < draw["base"]["mean"]
    assert "control" not in found[1]

    text = case_table.table(found, "resnet2b", "test_jpeg").splitlines()
    assert len(text) == 2 + 3
    assert f"| {100 * draw['mean']['w2']:.1f} (" in text[-1]
    assert f"{draw['base']['mean']:+.1f} [" in text[-1]


def test_from_scratch_arms_are_compared_with_the_control_that_was_named(tmp_path):
    d = torch.linspace(0, 0.05, 100, dtype=torch.float64)
    finish(tmp_path / "resnet2b/trades/seed0/test_jpeg", d, 0.7)
    finish(tmp_path / "resnet2b/wdat_ce/seed0/test_jpeg", d * 1.2, 0.7)
    head, _, trades, trained = case_table.table(
        case_table.rows(tmp_path, "trades"), "resnet2b", "test_jpeg"
    ).splitlines()
    assert "as found" not in head
    assert head.endswith("− control |")
    assert trades.endswith("|  |")
    assert "| +" in trained


def test_on_validation_images_nothing_is_compared_with_the_network_as_found(tmp_path):
    d = torch.linspace(0, 0.05, 100, dtype=torch.float64)
    finish(tmp_path / "resnet2b/as_found/val", d, 0.7)
    finish(tmp_path / "resnet2b/trades/seed0/val", d, 0.7)
    head, _, found, trades = case_table.table(case_table.rows(tmp_path), "resnet2b", "val").splitlines()
    assert "as found |" in found
    assert "− control" in head
    assert "− as found" not in head
    assert head.count("|") == trades.count("|")


@pytest.mark.parametrize("record", ["case_study", "case_search", "case_scratch"])
def test_the_page_has_the_tables_of_the_records(record):
    rows = json.loads((ROOT / f"results/{record}.json").read_text())["rows"]
    text = (ROOT / "docs/case-study.md").read_text()
    for network, test in {(row["network"], row["test"]) for row in rows}:
        assert case_table.table(rows, network, test) in text


def test_no_finished_row_is_an_error(tmp_path):
    with pytest.raises(SettingError, match="no finished row"):
        case_table.rows(tmp_path)


@pytest.mark.long
def test_a_row_runs_is_left_alone_when_finished_and_makes_a_table(shared, tmp_path):
    with np.load(shared / "data/cifar10_subset.npz") as file:
        arrays = {k: file[k][:1500] if k.endswith("train") else file[k][:40] for k in file.files}
    np.savez(tmp_path / "few.npz", **arrays)
    more = ["data.val_size=100", "data.batch_size=100", "trainer.check_val_every_n_epoch=1"]
    command = [sys.executable, "-m", "benchmarks.case_study", "--data", tmp_path / "few.npz", "--out", tmp_path / "out"]
    command += ["--arms", "as_found", "critical_draw", "--seeds", "1", "--epochs", "1", "--evaluate", "test_jpeg"]
    for _ in range(2):
        done = subprocess.run([*command, "--set", *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "train.py" not in done.stdout  # nothing was done twice
    record, drawn = tmp_path / "record.json", tmp_path / "case-study-resnet2b.png"
    made = [sys.executable, "-m", "benchmarks.case_table", tmp_path / "out", "--record", record, "--pictures", tmp_path]
    done = subprocess.run(made, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(record.read_text())["rows"]
    assert [(r["arm"], r["n"], r["seeds"]) for r in rows] == [("as_found", 40, [0]), ("critical_draw", 40, [1])]
    assert rows[1]["base"]["by_seed"].keys() == {"1"}
    assert drawn.stat().st_size > 10_000
