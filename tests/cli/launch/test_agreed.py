"""One command line and one folder for all processes."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist
from starters import SLURM, TORCHRUN

from wdat.cli import launch
from wdat.cli.app import _prepared
from wdat.cli.arguments import CommandLine
from wdat.errors import SettingError


def agreed(words, prepare):
    return launch.agreed(CommandLine.parse(words), prepare).words


def prepared(line, name):
    return line.add("prepared=1", *([f"name={name}"] if name else []))


def no_preparation(line, name):
    raise AssertionError("prepared twice")


def test_one_process_prepares_its_own_arguments(place):
    assert agreed(["seed=1"], prepared) == ["seed=1", "prepared=1"]
    place(TORCHRUN, WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", RANK="0")
    assert agreed(["seed=1"], prepared) == ["seed=1", "prepared=1"]


def test_what_lightning_starts_has_prepared_arguments(place):
    place(LOCAL_RANK="1", WORLD_SIZE="2")
    given = ["seed=1", 'hydra.run.dir="run"', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert agreed(given, no_preparation) == given


@pytest.mark.long
def test_processes_of_slurm_agree_by_the_number_of_the_job(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(SLURM)
    assert agreed(["seed=1"], prepared) == ["seed=1", "prepared=1", "name=slurm-77.1"]
    for number in ("0", "3"):
        place(SLURM_PROCID=number)
        for words, folder in (
            (["data=digits"], "hydra.run.dir='outputs/slurm-77.1'"),
            (["-m", "seed=1,2"], "hydra.sweep.dir='multirun/slurm-77.1'"),
            (["hydra.run.dir=a/b_${now:%H}/c"], "hydra.run.dir='a/slurm-77.1'"),
            (["hydra.run.dir=here"], "hydra.run.dir='here'"),
        ):
            line, made = _prepared(CommandLine.parse(words), "train", "slurm-77.1")
            assert line.overrides[-1] == folder
            assert number == "0" or made == []


def test_nodes_that_lightning_starts_need_a_folder_by_name(place):
    line = CommandLine.parse(["trainer.num_nodes=2"])
    with pytest.raises(SettingError, match=r"trainer\.num_nodes=2.*torchrun.*hydra\.run\.dir=FOLDER"):
        _prepared(line, "train", "")
    place(NODE_RANK="1")
    assert _prepared(line.add("hydra.run.dir=here"), "train", "")[1] == []


def test_torchrun_without_a_store_is_refused(place):
    place(TORCHRUN, TORCHELASTIC_USE_AGENT_STORE="False")
    with pytest.raises(SettingError, match="--standalone"):
        agreed([], prepared)


@pytest.fixture
def store(place):
    found = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place(TORCHRUN, MASTER_PORT=str(found.port), TORCHELASTIC_USE_AGENT_STORE="True")
    return found


def test_the_first_of_torchruns_processes_decides_for_all(place, store):
    place(RANK="0", LOCAL_RANK="0")
    first = agreed(["typed=1", "-cn", "mine"], prepared)
    assert first == ["--config-name", "mine", "typed=1", "prepared=1"]
    place(RANK="3", LOCAL_RANK="1")
    assert agreed(["typed=1"], no_preparation) == first


def test_the_others_wait_for_the_first_of_torchruns_processes(place, store):
    found = []
    second = threading.Thread(target=lambda: found.append(agreed(["hydra.run.dir=here"], no_preparation)))
    second.start()
    time.sleep(0.3)
    assert not found
    place(RANK="0", LOCAL_RANK="0")
    agreed(["hydra.run.dir=here"], prepared)
    second.join(20)
    assert found == [["hydra.run.dir=here", "prepared=1"]]


def test_where_the_first_of_torchruns_processes_fails_the_others_leave(place, store):
    def fail(line, name):
        raise SettingError("resume=x is not the folder of a run")

    place(RANK="0", LOCAL_RANK="0")
    with pytest.raises(SettingError, match="resume=x"):
        agreed(["resume=x"], fail)
    place(RANK="1")
    with pytest.raises(SystemExit) as left:
        agreed(["resume=x"], no_preparation)
    assert left.value.code == 2
