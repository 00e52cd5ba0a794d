"""The processes of a run: their places, the folder they agree on, and what is refused before any work."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hydra.types import RunMode
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import OmegaConf
from script_runner import run_script

from wdat import launch
from wdat.errors import SettingError
from wdat.launch import agreed, check_launch, join_group, one_at_a_time
from wdat.loggers import read_rows
from wdat.place import Place, outside
from wdat.records import read

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train.py"
EVALUATION = "callbacks.robust_evaluation"
QUICK = [
    "experiment=quickstart", "trainer.accelerator=cpu", "trainer.check_val_every_n_epoch=1", "attack.steps=2",
    "curve=[]", "pretrain.max_epochs=1", "data.batch_size=32", "trainer.max_epochs=1", "trainer.log_every_n_steps=1",
    f"{EVALUATION}.pointwise.steps=2", f"{EVALUATION}.pointwise.step_size=0.5", f"{EVALUATION}.distributional.steps=2",
    f"{EVALUATION}.distributional.step_size=0.5", "data.limit_train=64", "data.limit_val=30", "data.limit_test=35",
]  # fmt: skip

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "some", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
}  # fmt: skip
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "31234",
}  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """`place(**variables)`: the environment of a process, which is nobody's at first and as it was at last."""
    old = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC", "SUBMITIT", "SLURM")) or name in (*TORCHRUN, "NODE_RANK"):
            del os.environ[name]
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    yield os.environ.update
    os.environ.clear()
    os.environ.update(old)


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),  # started by Lightning
        (TORCHRUN, Place(3, 4, 1, 2, "torchrun")),
        (SUBMITIT, Place(1, 2, 1, 1, "submitit")),
        (SLURM, Place(0, 4, 0, 2, "SLURM")),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, None),
        ({**SLURM, **SUBMITIT}, Place(1, 2, 1, 1, "submitit")),
        ({**SLURM, **TORCHRUN}, Place(3, 4, 1, 2, "torchrun")),
        ({**SLURM, "SUBMITIT_EXECUTOR": "slurm"}, Place(0, 4, 0, 2, "SLURM")),
    ],
)
def test_who_started_a_process(place, variables, wanted):
    place(variables)
    assert outside() == wanted


def test_a_task_of_submitit_is_a_process_that_lightning_need_not_start(place):
    place(SUBMITIT, SLURM_NTASKS="1")
    join_group()
    wanted = {
        "RANK": "1", "LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "21234",
    }  # fmt: skip
    assert {name: os.environ[name] for name in wanted} == wanted
    assert "SLURM_NTASKS" not in os.environ, "or Lightning would take SLURM's word"
    assert rank_zero_only.rank == 1


@pytest.mark.parametrize("variables", [{}, TORCHRUN, SLURM, {**SUBMITIT, "SUBMITIT_LOCAL_NTASKS": "1"}])
def test_other_processes_keep_their_environment(place, variables):
    place(variables)
    before = dict(os.environ)
    join_group()
    said = {} if variables else {launch.STARTER: str(os.getpid())}  # for those that Lightning starts
    assert dict(os.environ) == before | said


def test_jobs_at_the_same_time_have_ports_of_their_own(place):
    ports = set()
    for job in range(30_000, 30_200):
        place(SUBMITIT, SUBMITIT_LOCAL_JOB_ID=str(job))
        join_group()
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 200
    assert 1024 < min(ports) <= max(ports) < 32_768


# --- one command line and one folder --------------------------------------------------------------------------------


def prepared(arguments):
    return [*arguments, "prepared=1"]


def no_preparation(arguments):
    raise AssertionError("prepared twice")


def test_one_process_prepares_its_own_arguments(place):
    assert agreed(["seed=1"], prepared) == ["seed=1", "prepared=1"]
    place(TORCHRUN, WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", RANK="0")
    assert agreed(["seed=1"], prepared) == ["seed=1", "prepared=1"]


def test_what_lightning_starts_has_prepared_arguments(place):
    place(LOCAL_RANK="1", WORLD_SIZE="2")
    given = ["seed=1", 'hydra.run.dir="run"', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert agreed(given, no_preparation) == given


QUIET = ["hydra.output_subdir=null", "hydra/job_logging=stdout"]


def test_processes_of_slurm_agree_by_the_number_of_the_job(place):
    place(SLURM)
    assert agreed(["seed=1"], prepared) == ["seed=1", "prepared=1", "hydra.run.dir=outputs/slurm-77.1"]
    assert agreed(["-m", "seed=1,2"], prepared)[-1] == "hydra.sweep.dir=multirun/slurm-77.1"
    named = agreed(["hydra.run.dir=here"], prepared)
    assert named == ["hydra.run.dir=here", "prepared=1"]
    place(SLURM_PROCID="3")
    assert agreed(["hydra.run.dir=here"], prepared) == [*named, *QUIET]


@pytest.mark.parametrize("given", [["hydra.run.dir=a/${now:%H}"], ["--multirun", "++hydra.sweep.dir='${now:%H}'"]])
def test_a_folder_named_after_the_time_is_refused(place, given):
    place(SLURM)
    with pytest.raises(SettingError, match=r"hydra\.(run|sweep)\.dir=.*its own time.*name a folder"):
        agreed(given, prepared)


def test_torchrun_without_a_store_is_refused(place):
    place(TORCHRUN, TORCHELASTIC_USE_AGENT_STORE="False")
    with pytest.raises(SettingError, match="--standalone"):
        agreed([], prepared)


@pytest.fixture
def store(place):
    found = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place(TORCHRUN, MASTER_PORT=str(found.port), TORCHELASTIC_USE_AGENT_STORE="True")
    return found


def test_the_first_of_torchruns_processes_decides_for_all(place, store, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2001-02-03/04-05-06")
    place(RANK="0")
    first = agreed(["typed=1"], prepared)
    assert first == ["typed=1", "prepared=1", "hydra.run.dir=outputs/2001-02-03/04-05-06"]
    place(RANK="3")
    assert agreed(["typed=1"], no_preparation) == [*first, *QUIET]


def test_the_others_wait_for_the_first_of_torchruns_processes(place, store):
    found = []
    second = threading.Thread(target=lambda: found.append(agreed(["hydra.run.dir=here"], no_preparation)))
    second.start()
    time.sleep(0.3)
    assert not found
    place(RANK="0")
    agreed(["hydra.run.dir=here"], prepared)
    second.join(20)
    assert found == [["hydra.run.dir=here", "prepared=1", *QUIET]]


def test_where_the_first_of_torchruns_processes_fails_the_others_leave(place, store):
    def fail(arguments):
        raise SettingError("resume=x is not the folder of a run")

    place(RANK="0")
    with pytest.raises(SettingError, match="resume=x"):
        agreed(["resume=x"], fail)
    place(RANK="1")
    with pytest.raises(SystemExit) as left:
        agreed(["resume=x"], no_preparation)
    assert left.value.code == 2


# --- what is refused ------------------------------------------------------------------------------------------------


def settings(**changes):
    found = OmegaConf.load(ROOT / "conf" / "trainer" / "default.yaml")
    return OmegaConf.merge(found, {"accelerator": "cpu", "devices": 1, **changes})


def hydra(mode=RunMode.RUN, *overrides):
    return OmegaConf.create({"mode": mode, "overrides": {"hydra": list(overrides)}})


SWEEP = hydra(RunMode.MULTIRUN)
DDP = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "gradient_as_bucket_view": True}
FSDP = {"_target_": "lightning.pytorch.strategies.FSDPStrategy"}


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", DDP])
def test_strategies_that_keep_the_network_whole(strategy):
    check_launch(settings(strategy=strategy, devices=2), hydra())


OTHERS = sorted(set(StrategyRegistry.available_strategies()) - set(launch.STRATEGIES))


@pytest.mark.parametrize("strategy", [*OTHERS, "dpp", FSDP])
def test_other_strategies_are_refused(strategy):
    with pytest.raises(SettingError, match=r"trainer\.strategy=.*use trainer\.strategy=ddp"):
        check_launch(settings(strategy=strategy), hydra())


def test_the_reason_is_the_strategys_own():
    with pytest.raises(SettingError, match="whole network"):
        check_launch(settings(strategy="fsdp"), hydra())
    with pytest.raises(SettingError, match="measured is lost"):
        check_launch(settings(strategy="ddp_spawn"), hydra())


def test_a_strategy_for_one_device_is_refused_for_two():
    check_launch(settings(strategy="single_device"), hydra())
    with pytest.raises(SettingError, match=r"single_device uses one of 2 devices"):
        check_launch(settings(strategy="single_device", devices=2), hydra())


@pytest.mark.parametrize(
    "changes", [{"devices": 0}, {"devices": "many"}, {"devices": -3}, {"accelerator": "cpus"}, {"accelerator": "tpu"}]
)
def test_devices_that_are_not_there_are_named(changes):
    with pytest.raises(SettingError, match=r"trainer\.accelerator=.* trainer\.devices="):
        check_launch(settings(**changes), hydra())


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(count)`: a machine with so many."""

    def make(count):
        for package in ("fabric", "pytorch"):
            monkeypatch.setattr(f"lightning.{package}.accelerators.cuda.num_cuda_devices", lambda: count)

    return make


@pytest.mark.parametrize("count", [0, 1])
def test_one_device_may_sweep(gpus, count):
    gpus(count)
    check_launch(settings(), SWEEP)
    check_launch(settings(accelerator="auto", devices="auto"), SWEEP)


@pytest.mark.parametrize("changes", [{"devices": 2}, {"devices": "auto"}, {"devices": [0, 1]}, {"devices": "2"}])
def test_a_sweep_in_which_lightning_starts_processes_is_refused(gpus, changes):
    gpus(2)
    changes = {"accelerator": "auto", **changes}
    check_launch(settings(**changes), hydra())
    with pytest.raises(SettingError) as found:
        check_launch(settings(**changes), SWEEP)
    for word in ("trainer.devices", "hydra/launcher=submitit_local hydra.launcher.tasks_per_node=2", "devices=1"):
        assert word in str(found.value)


@pytest.mark.parametrize(
    ("variables", "nodes"), [(SUBMITIT, 1), (SLURM, 2), (TORCHRUN, 2)], ids=["submitit", "SLURM", "torchrun"]
)
def test_a_sweep_in_which_others_started_the_processes_may_run(place, variables, nodes):
    place(variables)
    check_launch(settings(devices=2, num_nodes=nodes), SWEEP)


@pytest.mark.parametrize(
    ("variables", "changes", "remedies"),
    [
        (TORCHRUN, {"devices": 1}, ["trainer.devices=2 trainer.num_nodes=2", "--nproc_per_node=1"]),
        (TORCHRUN, {"devices": 4}, ["trainer.devices=2 trainer.num_nodes=2"]),
        (SUBMITIT, {"devices": 1}, ["trainer.devices=2", "hydra.launcher.tasks_per_node=1"]),
        ({**SUBMITIT, "SUBMITIT_LOCAL_NTASKS": "1"}, {"devices": 2}, ["hydra.launcher.tasks_per_node=2"]),
        (SLURM, {"devices": 2}, ["trainer.num_nodes=2"]),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, {"devices": 2}, ["srun", "--ntasks-per-node=2"]),
    ],
)
def test_processes_that_are_not_those_asked_for_are_refused(place, variables, changes, remedies):
    place(variables)
    with pytest.raises(SettingError) as found:
        check_launch(settings(**changes), hydra())
    for word in (f"trainer.devices={changes['devices']}", *remedies):
        assert word in str(found.value)


def test_nodes_without_a_common_folder_are_refused():
    for overrides in ((), ("hydra.run.dir=a/${now:%H}",)):
        with pytest.raises(SettingError, match=r"trainer\.num_nodes=2.*torchrun.*hydra\.run\.dir=FOLDER"):
            check_launch(settings(num_nodes=2), hydra(RunMode.RUN, *overrides))
    check_launch(settings(num_nodes=2), hydra(RunMode.RUN, "hydra.run.dir=here"))


def test_gpus_that_submitit_hides_are_missed(place, monkeypatch, tmp_path):
    place(SUBMITIT, CUDA_VISIBLE_DEVICES="")
    check_launch(settings(devices=2), hydra())
    monkeypatch.setattr(launch, "DRIVER", tmp_path)
    monkeypatch.setattr(launch, "device_count", lambda *_: 2)
    check_launch(settings(devices=2), hydra())
    with pytest.raises(SettingError, match=r"hydra\.launcher\.gpus_per_node=2"):
        check_launch(settings(devices=2, accelerator="auto"), hydra())


def test_one_process_at_a_time():
    inside, most = [], []

    def enter():
        with one_at_a_time():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] * 4


# --- real processes -------------------------------------------------------------------------------------------------


def start(*command, folder, timeout=140, **variables):
    """A command and all that it starts, which are ended after so many seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    started = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = started.communicate(timeout=timeout)
    finally:
        end(started)
    return SimpleNamespace(status=started.returncode, out=out, err=err)


def end(started):
    """End a process and its children, which are in a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait(20)


def torchrun(*arguments, folder):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *arguments, folder=folder)


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


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_run_in_two_processes_has_one_file_of_metrics(pair):
    assert len(figures(pair)[0]) == 5  # two tests, two steps, one validation


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_torchrun_and_lightning_give_the_same_run_in_one_folder(pair, tmp_path):
    found = torchrun(*QUICK, "trainer.devices=2", folder=tmp_path)
    assert found.status == 0, found.err
    assert found.out.count("64 training") == 1
    (config,) = tmp_path.rglob("config.yaml")
    (log,) = tmp_path.rglob("*.log")
    assert log.parent == config.parents[1]
    assert config.parents[3] == tmp_path / "outputs", "a folder named after the time, as for one process"
    assert figures(log.parent) == figures(pair)


@pytest.mark.slow
@pytest.mark.timeout(150)
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
    assert len(list(tmp_path.rglob("*.log"))) == len(list(tmp_path.rglob("config.yaml"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("starter", ["lightning", "torchrun"])
def test_a_run_with_an_added_setting_is_resumed_in_two_processes(tmp_path, starter):
    """`+key=value` may stand in a command line once only, so the old overrides must not be put in twice."""
    added = [*QUICK, "pretrain.max_epochs=0", "+trainer.max_time=00:01:00:00", f"hydra.run.dir={tmp_path / 'run'}"]
    assert run_script(SCRIPT, *added).status == 0
    again = [f"resume={tmp_path / 'run'}", "trainer.max_epochs=2", "trainer.devices=2"]
    found = torchrun(*again, folder=tmp_path) if starter == "torchrun" else start(SCRIPT, *again, folder=tmp_path)
    assert found.status == 0, found.err
    assert [int(row["step"]) for row in figures(tmp_path / "run")[0]] == [0, 0, 1, 1, 2, 3, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_torchrun_sweeps_in_one_group_of_processes(pair, tmp_path):
    found = torchrun("-m", *QUICK, "trainer.devices=2", "seed=0,3", folder=tmp_path)
    assert found.status == 0, found.err
    (sweep,) = {f.parents[1] for f in tmp_path.rglob("records.json")}
    assert figures(sweep / "0") == figures(pair)
    assert {seed for *_, seed, _, _ in figures(sweep / "1")[1]} == {3}


@pytest.mark.slow
@pytest.mark.timeout(150)
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


def test_a_sweep_on_several_devices_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_script(SCRIPT, "-m", *QUICK, "trainer.devices=2", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert found.status == 2
    assert found.err.startswith("error: trainer.devices=2 in a sweep")
    assert not list(tmp_path.rglob("records.json"))


@pytest.mark.slow
@pytest.mark.timeout(150)
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
from wdat.launch import end_with
end_with(int(sys.argv[1]), 0.1)
print("up", flush=True)
time.sleep(60)
"""


def test_a_process_ends_with_the_one_that_started_it():
    """As one that waits for the first process to open their meeting point, where that was killed."""
    parent = "import os, subprocess, sys, time\n"
    parent += "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])\ntime.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", parent, CHILD], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == "", "ends only when the child has closed its output too"
    process.stdout.close()


def test_a_process_whose_starter_is_gone_already_ends():
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "999999999"], timeout=60, cwd=Path(__file__).parents[1], capture_output=True
    )
    assert done.returncode == 1
