"""Who started a process, and what it is told."""

from __future__ import annotations

import os

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from starters import SLURM, SUBMITIT, TORCHRUN

from wdat.cli import launch
from wdat.cli.launch import cluster, join_group, rank
from wdat.errors import SettingError


@pytest.mark.parametrize(
    ("variables", "kind", "number", "world"),
    [
        ({}, None, 0, 1),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None, 1, 1),  # started by Lightning
        (TORCHRUN, TorchElasticEnvironment, 3, 4),
        (SLURM, SLURMEnvironment, 0, 4),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, None, 0, 1),
        ({**SLURM, **SUBMITIT}, TorchElasticEnvironment, 1, 2),
        ({**SLURM, **TORCHRUN}, TorchElasticEnvironment, 3, 4),
        ({**SLURM, "SUBMITIT_EXECUTOR": "slurm", "SLURM_PROCID": "2"}, SLURMEnvironment, 2, 4),
    ],
)
def test_who_started_a_process(place, variables, kind, number, world):
    place(variables)
    if variables.get("SUBMITIT_EXECUTOR") == "local":
        join_group()
    found = cluster()
    assert type(found) is (kind or type(None))
    assert (rank(), found.world_size() if found else 1) == (number, world)


def test_variables_of_slurm_that_do_not_fit_are_named(place):
    place({name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(SettingError, match="ntasks-per-node"):
        cluster()


def test_a_task_of_submitit_is_a_process_that_lightning_need_not_start(place):
    place(SUBMITIT, SLURM_NTASKS="1")
    join_group()
    wanted = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "21234",
    }  # fmt: skip
    assert {name: os.environ[name] for name in wanted} == wanted


@pytest.mark.parametrize("variables", [{}, TORCHRUN, SLURM])
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
