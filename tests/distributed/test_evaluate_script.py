"""evaluate.py on two processes: the files of one, written and told by the first process alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from process_runner import ROOT, alike, run_together
from script_runner import run_script

from wdat.records import read

SCRIPT = ROOT / "evaluate.py"
QUICK = [
    "data=digits", "model=small_cnn", "device=cpu", "data.limit_test=41", "data.limit_val=30", "threat.delta=0.02",
    "attack_options.pgd.steps=2", "attack_options.wpgd.steps=3", "attack_options.knapsack.steps=3",
    "attack_options.knapsack.starts=2", "attack_options.knapsack.targets=1", "batch_size=16", "process_timeout=50",
]  # fmt: skip
WHOLE = [*QUICK, "save_distances=true", "deltas=[0.01,0.02]", "certified=radii.npy"]
FILES = {"records.json", "report.html", "curve.png", "nearest_linf.pt", "distances_linf.npz", "evaluate.log"}

alone = partial(run_script, SCRIPT)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    np.save("radii.npy", np.linspace(0, 0.01, 41))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of one process."""
    folder, here = tmp_path_factory.mktemp("single"), Path.cwd()
    os.chdir(folder)
    try:
        np.save("radii.npy", np.linspace(0, 0.01, 41))
        result = alone(*WHOLE, "hydra.run.dir=run")
    finally:
        os.chdir(here)
    assert result.status == 0, result.err
    return folder / "run"


def plain(folder):
    """The records without what a clock says."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in json.loads((folder / "records.json").read_text())]


def same_folder(one, two):
    assert {f.name for f in two.iterdir()} == {f.name for f in one.iterdir()} == FILES | {".hydra"}
    alike(plain(one), plain(two), rel=1e-5)
    with np.load(one / "distances_linf.npz") as a, np.load(two / "distances_linf.npz") as b:
        np.testing.assert_array_equal(a["labels"], b["labels"])
        np.testing.assert_allclose(a["distances"], b["distances"], rtol=1e-5)
    a, b = (torch.load(folder / "nearest_linf.pt", weights_only=True) for folder in (one, two))
    assert a["about"] == b["about"]
    torch.testing.assert_close(a["x_adv"], b["x_adv"])
    assert [passes for passes, _ in a["effort"]] == [passes for passes, _ in b["effort"]]


def test_torchrun_gives_the_folder_of_one_process(single, tmp_path):
    """Without hydra.run.dir, whose default holds the time: the first process chooses the folder for both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), *WHOLE]
    about = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=about, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("41 test images of digits on 2 processes (cpu)") == 1
    assert done.stdout.count("knapsack ≤") == 2
    (folder,) = [file.parent for file in (tmp_path / "outputs").rglob("records.json")]
    assert len(list((tmp_path / "outputs").rglob(".hydra"))) == 1
    same_folder(single, folder)


def test_one_process_may_go_on_from_two_and_two_from_one(single, tmp_path, monkeypatch):
    """What was found is kept: neither records nor nearest flips are computed again."""
    few = [*QUICK, "attacks=[knapsack]", "losses=[ce]", "deltas=[0.01]"]
    rest = ["attacks=[pgd,wpgd,knapsack]", "losses=[ce,redlr]", *WHOLE[len(QUICK) :]]
    assert [p.status for p in run_together(tmp_path, SCRIPT, *few, "hydra.run.dir=by_two")] == [0, 0]
    assert alone(*few, "hydra.run.dir=by_one").status == 0
    kept = {}
    for name in ("by_two", "by_one"):
        folder = tmp_path / name
        records = json.loads((folder / "records.json").read_text())
        kept[name] = (records, (folder / "nearest_linf.pt").stat().st_mtime_ns)
    assert len(kept["by_one"][0]) == len(kept["by_two"][0]) == 2

    assert alone("resume=by_two", *rest).status == 0
    found = run_together(tmp_path, SCRIPT, "resume=by_one", *rest)
    assert [p.status for p in found] == [0, 0], found[0].err
    for name, (records, written) in kept.items():
        folder = tmp_path / name
        assert json.loads((folder / "records.json").read_text())[:2] == records
        assert (folder / "nearest_linf.pt").stat().st_mtime_ns == written
        alike(sorted(map(json.dumps, plain(folder))), sorted(map(json.dumps, plain(folder))), rel=0)
        assert {str(about(r)) for r in read(folder / "records.json")} == {
            str(about(r)) for r in read(single / "records.json")
        }
    alike(by_kind(tmp_path / "by_two"), by_kind(tmp_path / "by_one"), rel=1e-5)
    alike(by_kind(tmp_path / "by_two"), by_kind(single), rel=1e-5)


def about(record):
    return (record.attack, record.loss, record.p, round(record.delta, 9))


def by_kind(folder):
    return {f"{r['attack']} {r['loss']} {r['delta']:.6f}": r for r in plain(folder)}


def test_fewer_images_than_processes(tmp_path):
    """One image: the second process has none."""
    found = run_together(tmp_path, SCRIPT, *QUICK, "losses=[ce]", "data.limit_test=1", "hydra.run.dir=two")
    assert [(p.status, p.err) for p in found] == [(0, ""), (0, "")]
    assert found[1].out == ""
    assert alone(*QUICK, "losses=[ce]", "data.limit_test=1", "hydra.run.dir=one").status == 0
    alike(plain(tmp_path / "one"), plain(tmp_path / "two"), rel=1e-5)
    assert {r.n for r in read(tmp_path / "two" / "records.json")} == {1}


def test_a_sweep_runs_each_job_once_on_all_processes(tmp_path):
    jobs = ["attacks=[fgsm]", "losses=[ce]", "seed=0,1", "hydra.sweep.dir=sweep"]
    found = run_together(tmp_path, SCRIPT, "-m", *QUICK, *jobs)
    assert [p.status for p in found] == [0, 0], found[0].err
    assert found[1].out == ""
    records = [read(tmp_path / "sweep" / str(job) / "records.json") for job in (0, 1)]
    assert [[r.seed for r in job] for job in records] == [[0, 0], [1, 1]]


def refused(found: list[SimpleNamespace], status: int = 2) -> str:
    """What the first process says of an error; the other one is silent."""
    first, second = found
    assert (first.status, second.status) == (status, status), first.err + second.err
    assert (second.out, second.err) == ("", "")
    assert "Traceback" not in first.err
    return first.err


BAD = {
    "attacks=[wpgdd]": ["wpgdd", "wpgd"],
    "device=cuda:0": ["device=cuda:0", "auto or cpu"],
    "model.checkpoint=missing.pt": ["model.checkpoint", "missing.pt"],
    "certified=missing.npy": ["certified=missing.npy"],
}


@pytest.mark.parametrize("override", BAD)
def test_bad_settings_are_said_once(tmp_path, override):
    message = refused(run_together(tmp_path, SCRIPT, *QUICK, override, "hydra.run.dir=run"))
    assert message.startswith("error: ")
    assert message.count("\n") <= 2
    for word in BAD[override]:
        assert word in message
    assert not (tmp_path / "run" / "records.json").exists()


def test_what_only_the_first_process_can_know_ends_both(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.json").write_text("[{")
    message = refused(run_together(tmp_path, SCRIPT, *QUICK, "hydra.run.dir=run"))
    assert "hydra.run.dir=run holds an evaluation: go on with resume=run" in message.replace(f"{tmp_path}/", "")
    (tmp_path / "run" / ".hydra").mkdir(exist_ok=True)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(json.dumps(QUICK))
    message = refused(run_together(tmp_path, SCRIPT, "resume=run"))
    assert "records.json isn't a list of records" in message
    shutil.rmtree(tmp_path / "run")
    message = refused(run_together(tmp_path, SCRIPT, *QUICK, "resume=nowhere"))
    assert "resume=nowhere" in message
    message = refused(run_together(tmp_path, SCRIPT, "data=nothing"), status=1)
    assert "data/nothing" in message


def test_an_incomplete_environment_is_named(tmp_path):
    first, second = run_together(tmp_path, SCRIPT, *QUICK, MASTER_PORT="")
    for process in (first, second):
        assert process.status == 2
        assert "MASTER_PORT is not set" in process.err
        assert "torchrun" in process.err
