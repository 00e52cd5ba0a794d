"""What is refused before any work."""

from __future__ import annotations

import threading
import time

import pytest
from hydra.types import RunMode
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import OmegaConf
from starters import ROOT, SLURM, SUBMITIT, TORCHRUN

from wdat.cli import launch
from wdat.cli.launch import check_launch, join_group, one_at_a_time
from wdat.errors import SettingError


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
    join_group()
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
    join_group()
    with pytest.raises(SettingError) as found:
        check_launch(settings(**changes), hydra())
    for word in (f"trainer.devices={changes['devices']}", *remedies):
        assert word in str(found.value)


def test_gpus_that_submitit_hides_are_missed(place, monkeypatch, tmp_path):
    place(SUBMITIT, CUDA_VISIBLE_DEVICES="")
    join_group()
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
