"""One command line and one folder for all processes."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist
from starters import SLURM, TORCHRUN

from wdat.cli.launch import agreed
from wdat.errors import SettingError


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
