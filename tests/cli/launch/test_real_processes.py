"""Runs in processes that Lightning, torchrun, submitit and SLURM have started."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from process_runner import TORCHRUN, end, start
from script_runner import run_script
from starters import QUICK, ROOT, SCRIPT, SLURM

from wdat.records import read
from wdat.training.loggers import read_rows


def torchrun(*arguments, folder):
    return start(*TORCHRUN, SCRIPT, *arguments, folder=folder)


def figures(run):
    """What a run has measured; the columns of costs are left out."""
    assert [f.relative_to(run) for f in run.rglob("*.csv")] == [Path("metrics/metrics.csv")]
    rows = read_rows(run / "metrics" / "metrics.csv")
    logged = [{k: v for k, v in row.items() if not k.startswith("cost/")} for row in rows]
    records = [
        (r.stage, r.epoch, r.attack, r.delta, r.n, r.seed, r.accuracy, r.loss_mean) for r in read(run / "records.json")
    ]
    assert logged
    assert records
    return logged, records


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run in two processes that Lightning has started."""
    folder = tmp_path_factory.mktemp("pair")
    found = start(SCRIPT, *QUICK, "trainer.devices=2", "hydra.run.dir=run", folder=folder)
    assert (found.status, found.err) == (0, "")
    return folder / "run"


@pytest.mark.long
def test_a_run_in_two_processes_has_one_file_of_metrics(pair):
    assert len(figures(pair)[0]) == 5  # two tests, two steps, one validation


@pytest.mark.long
def test_torchrun_and_lightning_give_the_same_run_in_one_folder(pair, tmp_path):
    found = torchrun(*QUICK, "trainer.devices=2", folder=tmp_path)
    assert found.status == 0, found.err
    assert found.out.count("64 training") == 1
    (config,) = tmp_path.rglob("config.yaml")
    assert config.parents[3] == tmp_path / "outputs", "a folder named after the time, as for one process"
    assert figures(config.parents[1]) == figures(pair)


@pytest.mark.long
def test_tasks_of_slurm_give_the_same_run_in_one_folder(pair, tmp_path):
    """Two processes with the variables that `srun --ntasks-per-node=2` sets."""
    alike = {**SLURM, "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1"}
    alike["MASTER_PORT"] = str(find_free_network_port())

    def task(number):
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        return start(SCRIPT, *QUICK, "trainer.devices=2", folder=tmp_path, **{**alike, **own})

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(task, range(2))
    assert (one.status, two.status) == (0, 0), one.err + two.err
    assert "64 training" in one.out
    assert two.out == ""
    assert figures(tmp_path / "outputs" / "slurm-77.1") == figures(pair)
    assert len(list(tmp_path.rglob("config.yaml"))) == 1


@pytest.mark.long
@pytest.mark.parametrize("starter", ["lightning", "torchrun"])
def test_a_run_with_an_added_setting_is_resumed_in_two_processes(tmp_path, starter):
    """`+key=value` may stand in a command line once only, so the old overrides must not be put in twice."""
    added = [*QUICK, "pretrain.max_epochs=0", "+trainer.max_time=00:01:00:00", f"hydra.run.dir={tmp_path / 'run'}"]
    assert run_script(SCRIPT, *added).status == 0
    again = [f"resume={tmp_path / 'run'}", "trainer.max_epochs=2", "trainer.devices=2"]
    found = torchrun(*again, folder=tmp_path) if starter == "torchrun" else start(SCRIPT, *again, folder=tmp_path)
    assert found.status == 0, found.err
    assert [int(row["step"]) for row in figures(tmp_path / "run")[0]] == [0, 0, 1, 1, 2, 3, 3, 4]


@pytest.mark.long
def test_torchrun_sweeps_in_one_group_of_processes(pair, tmp_path):
    found = torchrun("-m", *QUICK, "trainer.devices=2", "seed=0,3", folder=tmp_path)
    assert found.status == 0, found.err
    (sweep,) = {f.parents[1] for f in tmp_path.rglob("records.json")}
    assert figures(sweep / "0") == figures(pair)
    assert {seed for *_, seed, _, _ in figures(sweep / "1")[1]} == {3}


@pytest.mark.long
def test_submitit_gives_every_job_of_a_sweep_two_processes(pair, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=2"]
    found = start(
        SCRIPT, "-m", *QUICK, *launcher, "trainer.devices=2", "seed=0,3", "hydra.sweep.dir=sweep", folder=tmp_path
    )
    assert found.status == 0, found.err
    assert figures(tmp_path / "sweep" / "0") == figures(pair)
    assert {seed for *_, seed, _, _ in figures(tmp_path / "sweep" / "1")[1]} == {3}
    written = [f.read_text() for f in sorted((tmp_path / "sweep" / ".submitit").rglob("*_log.out"))]
    assert sorted(text.count("64 training") for text in written) == [0, 0, 1, 1], "one task of each job speaks"


@pytest.mark.long
def test_a_sweep_on_several_devices_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_script(SCRIPT, "-m", *QUICK, "trainer.devices=2", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert found.status == 2
    assert found.err.startswith("error: trainer.devices=2 in a sweep")
    assert not list(tmp_path.rglob("records.json"))


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(tmp_path, devices):
    longer = [*QUICK, "pretrain.max_epochs=0", "trainer.max_epochs=12", f"trainer.devices={devices}"]
    run, file = tmp_path / "run", tmp_path / "run" / "metrics" / "metrics.csv"
    command = [sys.executable, str(SCRIPT), *longer, f"hydra.run.dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(command, start_new_session=True, env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        until = time.monotonic() + 60
        while max((int(row["step"]) for row in read_rows(file)), default=-1) < 6 and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        end(killed)
    before = read_rows(file)
    assert 6 <= int(before[-1]["step"]) < 23, "stopped on the way"
    found = start(SCRIPT, f"resume={run}", folder=tmp_path)
    assert found.status == 0, found.err
    found = start(SCRIPT, *longer, "hydra.run.dir=whole", folder=tmp_path)
    assert found.status == 0, found.err
    (mine, records), (theirs, other) = figures(run), figures(tmp_path / "whole")
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for one, two in zip(mine, theirs, strict=True):
        assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in two.items()}, rel=1e-5)
    assert [r[:6] for r in records] == [r[:6] for r in other]
    assert all(math.isfinite(r[6]) for r in records)


CHILD = """
import os, sys, time
from wdat.cli.launch import end_with
end_with(int(sys.argv[1]), 0.1)
print("up", flush=True)
time.sleep(60)
"""


def test_a_process_ends_with_the_one_that_started_it():
    """As one that waits for the first process to open their meeting point, where that was killed."""
    parent = "import os, subprocess, sys, time\n"
    parent += "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent, CHILD], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == "", "ends only when the child has closed its output too"
    process.stdout.close()


def test_a_process_whose_starter_is_gone_already_ends():
    done = subprocess.run([sys.executable, "-c", CHILD, "999999999"], timeout=60, cwd=ROOT, capture_output=True)
    assert done.returncode == 1
