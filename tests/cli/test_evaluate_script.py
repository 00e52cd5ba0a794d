"""The script that evaluates: what it writes, how it goes on, and what it says of bad input.

Most evaluations are made in this process, as `python evaluate.py` would make them but for the interpreter's start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import image
from sampled import sampled
from script_runner import run_script

from wdat import models
from wdat.data import ImageDataModule
from wdat.records import read

SCRIPT = Path(__file__).parents[2] / "evaluate.py"
QUICK = [
    "data=digits", "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1", "data.limit_test=40",
    "data.limit_val=30", "threat.delta=0.002", "curve=[]",
    "attack_options.pgd.steps=2", "attack_options.wpgd.steps=3", "attack_options.knapsack.steps=3",
    "attack_options.knapsack.starts=1", "attack_options.knapsack.targets=1",
]  # fmt: skip
WHOLE = [*QUICK, "deltas=[0.001,1/255]", "losses=[ce,redlr]"]


evaluate = partial(run_script, SCRIPT)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout, and nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    here = Path.cwd()
    os.chdir(folder.parent)
    try:
        result = evaluate(*WHOLE, f"hydra.run.dir={folder}")
    finally:
        os.chdir(here)
    assert result.status == 0, result.err
    return SimpleNamespace(folder=folder, result=result, records=read(folder / "records.json"))


@pytest.mark.long
def test_a_job_of_a_sweep_that_fails_ends_no_other(tmp_path):
    result = evaluate("-m", *QUICK, "attacks=[pgd]", "losses=[ce]", "deltas=[],[1/255]", f"hydra.sweep.dir={tmp_path}")
    assert result.status == 2
    assert "deltas and losses must each name at least one" in result.err
    assert result.err.splitlines()[-2] == "1 of 2 jobs failed:"
    assert {r.attack for r in read(tmp_path / "1" / "records.json")} == {"none", "pgd"}
    assert not (tmp_path / "0" / "records.json").exists()


def about(record):
    return (record.attack, record.loss, record.p, round(record.delta, 9))


def plain(folder):
    """The records without what a clock says."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in json.loads((folder / "records.json").read_text())]


# --- what an evaluation writes --------------------------------------------------------------------------------------


def test_one_record_for_each_attack_loss_and_budget(finished):
    inf, wanted = float("inf"), [("none", "ce", 2, 0), ("none", "redlr", 2, 0)]
    for delta in (0.001, round(1 / 255, 9)):
        wanted += [("pgd", "ce", inf, delta), ("pgd", "redlr", inf, delta)]
        wanted += [("wpgd", "ce", 2, delta), ("wpgd", "redlr", 2, delta), ("knapsack", "0-1", 2, delta)]
    assert [about(r) for r in finished.records] == wanted


def test_records_are_those_of_the_contract(finished):
    names = """stage network checkpoint data split attack options loss p norm delta n set_size accuracy accuracy_low
    accuracy_high loss_mean distance seconds seed device commit versions"""
    for record in json.loads((finished.folder / "records.json").read_text()):
        assert set(names.split()) <= set(record)
        assert 0 <= record["accuracy_low"] <= record["accuracy"] <= record["accuracy_high"] <= 1
        assert record["n"] == record["set_size"] == 40
        assert (record["stage"], record["split"], record["network"]) == ("evaluate", "test", "small_cnn")
        assert record["p"] == ("inf" if record["attack"] == "pgd" else 2)
        assert record["distance"] <= record["delta"] * (1 + 1e-5)
        if record["attack"] == "none":
            assert record["upsilon"] > 0
            assert record["loss_misclassified"] is not None
        else:
            assert record["details"]["histogram"]


def test_options_are_honoured(finished):
    steps = {r.attack: r.options["steps"] for r in finished.records if r.attack != "none"}
    assert steps == {"pgd": 2, "wpgd": 3, "knapsack": 3}


def test_the_clean_accuracy_is_that_of_a_forward_pass(finished):
    data = ImageDataModule("digits", 10, limit_test=40)
    data.prepare_data()
    data.setup()
    network = models.load_network("small_cnn", seed=0).eval()
    with torch.no_grad():
        hits = sum(int((network(b[0]).argmax(1) == b[1]).sum()) for b in data.test_dataloader())
    assert [r.accuracy for r in finished.records if r.attack == "none"] == [hits / 40, hits / 40]
    assert hits > 0


def test_more_budget_and_stronger_attacks_leave_less(finished):
    accuracy = {about(r): r.accuracy for r in finished.records}
    small, large = 0.001, round(1 / 255, 9)
    clean = accuracy["none", "ce", 2, 0]
    assert clean > accuracy["knapsack", "0-1", 2, small] >= accuracy["knapsack", "0-1", 2, large]


def test_report_and_picture(finished):
    files = {f.name for f in finished.folder.iterdir() if f.is_file()}
    assert {"records.json", "report.html", "curve.png"} <= files
    text = (finished.folder / "report.html").read_text()
    assert "small_cnn" in text
    assert "knapsack" in text
    picture = image.imread(finished.folder / "curve.png")
    assert min(picture.shape[:2]) > 100
    assert picture[..., :3].std() > 0.01


def test_what_the_terminal_shows(finished):
    out = finished.result.out
    assert "small_cnn, fresh weights (seed 0); digits, test images: 40 of 360, drawn by class (seed 0); on cpu" in out
    for name in ("records.json", "report.html", "curve.png"):
        assert str(finished.folder / name) in out
    assert "Traceback" not in out + finished.result.err
    assert "Warning" not in finished.result.err


def test_the_table_is_not_cut(finished):
    assert "…" not in finished.result.out
    assert finished.result.out.count("knapsack ≤") == 2


@pytest.mark.long
def test_the_same_again(finished, tmp_path):
    assert evaluate(*WHOLE, f"hydra.run.dir={tmp_path / 'again'}").status == 0
    assert plain(tmp_path / "again") == plain(finished.folder)


# --- going on -------------------------------------------------------------------------------------------------------


def test_resuming_adds_what_is_missing(finished, tmp_path):
    run = tmp_path / "run"
    few = [*QUICK, "deltas=[0.001]", "losses=[ce]", "attacks=[wpgd]"]
    assert evaluate(*few, f"hydra.run.dir={run}").status == 0
    before = json.loads((run / "records.json").read_text())
    assert len(before) == 2
    result = evaluate(f"resume={run}", "deltas=[0.001,1/255]", "losses=[ce,redlr]", "attacks=[pgd,wpgd,knapsack]")
    assert result.status == 0, result.err
    after = json.loads((run / "records.json").read_text())
    assert after[:2] == before  # seconds included: nothing was made again
    key = json.dumps
    assert sorted(map(key, plain(run))) == sorted(map(key, plain(finished.folder)))
    again = evaluate(f"resume={run}")
    assert again.status == 0
    assert json.loads((run / "records.json").read_text()) == after
    mixed = evaluate(*few, f"hydra.run.dir={run}")
    assert mixed.status == 2
    assert f"holds an evaluation: resume it with evaluate.py resume={run}, or name another folder" in mixed.err


@pytest.mark.long
def test_resuming_with_the_other_split(tmp_path):
    run, knapsack = tmp_path / "run", "attacks=[knapsack]"
    assert evaluate(*QUICK, "data.limit_val=40", knapsack, "losses=[ce]", f"hydra.run.dir={run}").status == 0
    result = evaluate(f"resume={run}", "split=val")
    assert result.status == 0, result.err
    assert [(r.attack, r.split) for r in read(run / "records.json")] == [
        ("none", "test"), ("knapsack", "test"), ("none", "val"), ("knapsack", "val"),
    ]  # fmt: skip


def test_resuming_what_is_no_evaluation(tmp_path):
    result = evaluate(f"resume={tmp_path / 'none'}")
    assert result.status == 2
    assert "resume=" in result.err
    assert "Traceback" not in result.err


def test_damaged_records_are_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.json").write_text("[{")
    (tmp_path / "run" / ".hydra").mkdir()
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(json.dumps([*QUICK, "attacks=[fgsm]"]))
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("deltas: [0.1]\n")
    result = evaluate(f"resume={tmp_path / 'run'}")
    assert result.status == 2
    assert "records.json isn't a list of records" in result.err
    assert (tmp_path / "run" / "records.json").read_text() == "[{"


# --- choices --------------------------------------------------------------------------------------------------------


def test_distances_are_saved(tmp_path):
    result = evaluate(*QUICK, "attacks=[knapsack]", "losses=[ce]", "save_distances=true", "hydra.run.dir=run")
    assert result.status == 0, result.err
    with np.load(tmp_path / "run" / "distances_linf.npz") as saved:
        assert saved["distances"].shape == saved["labels"].shape == (40,)
        clean = read(tmp_path / "run" / "records.json")[0].accuracy
        assert (saved["distances"] > 0).mean() == pytest.approx(clean)


def test_validation_images(tmp_path):
    result = evaluate(*QUICK, "attacks=[fgsm]", "losses=[ce]", "split=val", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert {(r.split, r.n) for r in read(tmp_path / "run" / "records.json")} == {("val", 30)}


def test_certified_radii(tmp_path):
    np.save(tmp_path / "radii.npy", np.zeros(40))
    result = evaluate(*QUICK, "attacks=[knapsack]", "losses=[ce]", "certified=radii.npy", "hydra.run.dir=run")
    assert result.status == 0, result.err
    records = {r.attack: r for r in read(tmp_path / "run" / "records.json")}
    assert records["certified"].accuracy == 0 <= records["knapsack"].accuracy
    assert "certified ≥" in result.out


def test_p_1_is_for_the_knapsack(tmp_path):
    result = evaluate(*QUICK, "threat.p=1", "attacks=[knapsack]", "losses=[ce]", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert [r.p for r in read(tmp_path / "run" / "records.json")] == [1, 1]


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "attacks=[wpgdd]": ["wpgdd", "wpgd"],
    "attacks=[knapsack_budget]": ["knapsack_budget", "knapsack"],
    "losses=[cee]": ["cee", "losses"],
    "losses=[kl]": ["kl", "losses"],
    "deltas=[abc]": ["deltas", "abc"],
    "deltas=[-0.1]": ["deltas", "-0.1"],
    "deltas=[]": ["deltas"],
    "deltas=8/255": ["deltas=8/255 must be a list: deltas=[8/255]"],
    "deltas=0.03": ["deltas=0.03 must be a list: deltas=[0.03]"],
    "losses=ce": ["losses=[ce]"],
    "attacks=null": ["attacks=[pgd,wpgd,knapsack]"],
    "threat.p=1": ["threat.p", "wpgd"],
    "split=train": ["split", "train"],
    "batch_size=0": ["batch_size"],
    "batch_size=2.5": ["batch_size=2.5"],
    "device=gpu": ["device", "trainer.accelerator"],
    "process_timeout=0": ["process_timeout", "timeout:{_target_:datetime.timedelta"],
    "trainer.accelerator=gpus": ["trainer.accelerator=gpus"],
    "trainer.strategy=fsdp": ["trainer.strategy=fsdp", "ddp"],
    "certified=none.npy": ["certified=none.npy"],
    "attack_options.wpgd.steps=0": ["wpgd", "steps=0"],
    "attack_options.wpgd.steps=abc": ["steps", "abc"],
    "attack_options.wpgd.step_size=-1": ["wpgd", "step_size=-1"],
    "attack_options.knapsack.steps=0": ["attack_options.knapsack.steps=0"],
    "+attack_options.wpgd.stepz=3": ["stepz", "steps"],
    "+attack_options.wpdg.steps=3": ["wpdg", "wpgd"],
}


@pytest.mark.parametrize("override", sampled(BAD, 3))
def test_bad_input_is_refused_before_any_work(tmp_path, override):
    result = evaluate(*QUICK, override, "hydra.run.dir=run")
    assert result.status == 2, result.out + result.err
    assert "Traceback" not in result.err
    assert result.err.startswith("error:")
    assert result.err.strip().count("\n") <= 1
    for word in BAD[override]:
        assert word in result.err
    assert not list(tmp_path.iterdir())


def test_distances_are_those_of_the_knapsack(tmp_path):
    result = evaluate(*QUICK, "attacks=[pgd]", "save_distances=true", "hydra.run.dir=run")
    assert result.status == 2
    assert "save_distances=true writes the distances of the knapsack: add it to attacks" in result.err


@pytest.mark.long
def test_as_a_process(tmp_path):
    environment = {**os.environ, "HYDRA_FULL_ERROR": "0", "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, str(SCRIPT), *QUICK, *arguments, "hydra.run.dir=run"]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=280
        )

    good = run("attacks=[fgsm]", "losses=[ce]")
    assert (good.returncode, good.stderr) == (0, "")
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.long
def test_the_budgets_are_those_of_a_training_run(tmp_path):
    run = tmp_path / "run"
    few = [argument for argument in QUICK if not argument.startswith("curve")]
    result = evaluate(*few, "losses=[ce]", "attacks=[wpgd]", f"hydra.run.dir={run}")
    assert result.status == 0, result.err
    assert [r.delta for r in read(run / "records.json") if r.attack == "wpgd"] == [0.002, 0.001, 0.004]
    assert "curve=2 must be a list: curve=[2]" in evaluate(*few, "curve=2", f"hydra.run.dir={tmp_path / 'no'}").err
