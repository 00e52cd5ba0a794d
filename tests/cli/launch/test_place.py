"""Who started a process, and its place."""

from __future__ import annotations

import os

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only
from starters import SLURM, SUBMITIT, TORCHRUN

from wdat.cli import launch
from wdat.cli.launch import join_group
from wdat.cli.place import Place, outside


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
