"""evaluate.py on two processes: the files of one, written and told by the first process alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from process_runner import ROOT, TORCHRUN, alike, end, start
from script_runner import run_script

from wdat.records import read

SCRIPT = ROOT / "evaluate.py"
QUICK = [
    "data=digits", "model=small_cnn", "trainer.accelerator=cpu", "data.limit_test=301", "data.limit_val=30",
    "attack_options.pgd.steps=2", "attack_options.wpgd.steps=3", "attack_options.knapsack.steps=3",
    "attack_options.knapsack.starts=2", "attack_options.knapsack.targets=1", "batch_size=64", "threat.delta=0.02",
]  # fmt: skip
ONE, TWO = "trainer.devices=1", "trainer.devices=2"
WHOLE = [*QUICK, "save_distances=true", "deltas=[0.01,0.02]", "certified=radii.npy"]
FILES = {"records.json", "report.html", "curve.png", "nearest_linf.pt", "distances_linf.npz"}

alone = partial(run_script, SCRIPT)
by_two = partial(start, SCRIPT, TWO)
torchrun = partial(start, *TORCHRUN, SCRIPT, TWO)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    np.save("radii.npy", np.linspace(0, 0.01, 301))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of one process."""
    folder, here = tmp_path_factory.mktemp("single"), Path.cwd()
    os.chdir(folder)
    try:
        np.save("radii.npy", np.linspace(0, 0.01, 301))
        result = alone(*WHOLE, ONE, "hydra.run.dir=run")
    finally:
        os.chdir(here)
    assert result.status == 0, result.err
    return folder / "run"


def plain(folder):
    """The records without what a clock says."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in json.loads((folder / "records.json").read_text())]


def same_folder(one, two):
    assert {f.name for f in two.iterdir()} == {f.name for f in one.iterdir()} == FILES | {".hydra", "examples"}
    alike(plain(one), plain(two), rel=1e-5)
    with np.load(one / "distances_linf.npz") as a, np.load(two / "distances_linf.npz") as b:
        np.testing.assert_array_equal(a["labels"], b["labels"])
        np.testing.assert_allclose(a["distances"], b["distances"], rtol=1e-5)
    a, b = (torch.load(folder / "nearest_linf.pt", weights_only=True) for folder in (one, two))
    assert a["about"] == b["about"]
    torch.testing.assert_close(a["x_adv"], b["x_adv"])
    assert [passes for passes, _ in a["effort"]] == [passes for passes, _ in b["effort"]]


@pytest.mark.long
@pytest.mark.parametrize(
    "starter", [by_two, pytest.param(torchrun, marks=pytest.mark.long)], ids=["lightning", "torchrun"]
)
def test_two_processes_give_the_folder_of_one(single, tmp_path, starter):
    """Without hydra.run.dir, whose default holds the time: the first process chooses the folder for both."""
    done = starter(*WHOLE, folder=tmp_path)
    assert done.status == 0, done.err[-3000:]
    assert "Warning" not in done.err
    assert "Traceback" not in done.err
    assert done.out.count("digits, test images: 301 of 360, drawn by class (seed 0); on 2 processes (cpu)") == 1
    assert done.out.count("knapsack ≤") == 2
    (folder,) = [file.parent for file in (tmp_path / "outputs").rglob("records.json")]
    assert len(list((tmp_path / "outputs").rglob(".hydra"))) == 1
    same_folder(single, folder)


@pytest.mark.long
def test_one_process_may_resume_the_run_of_two_and_two_that_of_one(single, tmp_path):
    """What was found is kept: neither records nor nearest adversarial points are computed again."""
    few = [*QUICK, "attacks=[knapsack]", "losses=[ce]", "deltas=[0.01]"]
    rest = ["attacks=[pgd,wpgd,knapsack]", "losses=[ce,redlr]", *WHOLE[len(QUICK) :]]
    assert by_two(*few, "hydra.run.dir=by_two", folder=tmp_path).status == 0
    assert alone(*few, ONE, "hydra.run.dir=by_one").status == 0
    kept = {}
    for name in ("by_two", "by_one"):
        folder = tmp_path / name
        records = json.loads((folder / "records.json").read_text())
        kept[name] = (records, (folder / "nearest_linf.pt").stat().st_mtime_ns)
    assert len(kept["by_one"][0]) == len(kept["by_two"][0]) == 2

    assert alone("resume=by_two", ONE, *rest).status == 0
    found = by_two("resume=by_one", *rest, folder=tmp_path)
    assert found.status == 0, found.err
    for name, (records, written) in kept.items():
        folder = tmp_path / name
        assert json.loads((folder / "records.json").read_text())[:2] == records
        assert (folder / "nearest_linf.pt").stat().st_mtime_ns == written
        alike(by_kind(folder), by_kind(single), rel=1e-5)


def by_kind(folder):
    return {f"{r['attack']} {r['loss']} {r['delta']:.6f}": r for r in plain(folder)}


@pytest.mark.long
def test_fewer_images_than_processes(tmp_path):
    """One image: the second process has none."""
    few = [*QUICK, "losses=[ce]", "data.limit_test=1"]
    found = by_two(*few, "hydra.run.dir=two", folder=tmp_path)
    assert (found.status, found.err) == (0, "")
    assert alone(*few, ONE, "hydra.run.dir=one").status == 0
    alike(plain(tmp_path / "one"), plain(tmp_path / "two"), rel=1e-5)
    assert {r.n for r in read(tmp_path / "two" / "records.json")} == {1}


@pytest.mark.long
def test_a_sweep_runs_each_job_once_on_all_processes(tmp_path):
    found = torchrun("-m", *QUICK, "attacks=[fgsm]", "losses=[ce]", "seed=0,1", "split=val", folder=tmp_path)
    assert found.status == 0, found.err
    assert found.out.count("; on 2 processes (cpu)") == 2
    (sweep,) = {file.parents[1] for file in tmp_path.rglob("records.json")}
    records = [read(sweep / str(job) / "records.json") for job in (0, 1)]
    assert [[r.seed for r in job] for job in records] == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("starter", "override", "words"),
    [
        (by_two, "certified=missing.npy", ["certified=missing.npy"]),
        (torchrun, "certified=missing.npy", ["certified=missing.npy"]),
        (torchrun, "attacks=[wpgdd]", ["wpgdd", "wpgd"]),
    ],
    ids=["lightning", "torchrun", "torchrun, the first alone"],
)
@pytest.mark.long
def test_an_error_is_told_once_and_leaves_nothing(tmp_path, starter, override, words):
    """By all of them together, or by each of them for itself."""
    found = starter(*QUICK, override, "hydra.run.dir=run", folder=tmp_path)
    assert found.status != 0
    assert found.err.count("error: ") == 1
    assert all(word in found.err for word in words)
    if starter is by_two:  # torchrun says much of its own
        assert (found.status, found.err.count("\n")) == (2, 1)
    assert [f.name for f in tmp_path.iterdir()] == ["radii.npy"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_stop_is_at_once_and_keeps_what_is_recorded(tmp_path, number):
    command = [sys.executable, str(SCRIPT), *QUICK, TWO, "attack_options.wpgd.steps=100000", "hydra.run.dir=run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while len(read(tmp_path / "run" / "records.json")) < 4 and time.monotonic() < until:
            time.sleep(0.2)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    finally:
        end(process)
    assert process.returncode == 128 + number
    assert said == f"stopped by {number.name}; resume with resume={tmp_path / 'run'}\n"
    assert [r.attack for r in read(tmp_path / "run" / "records.json")] == ["none", "none", "pgd", "pgd"]
