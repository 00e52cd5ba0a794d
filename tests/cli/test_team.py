"""Where a process stands, what it may ask for, and a script that runs alone."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest
import torch

from wdat.cli.place import Place, place_of
from wdat.cli.team import Team, check_timeout
from wdat.distributed import ALONE
from wdat.errors import SettingError

SCRIPT = Path(__file__).parents[2] / "evaluate.py"
PLACE = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {**PLACE, "WORLD_SIZE": "1"}, {"RANK": "3"}])
def test_alone_without_others(environment):
    assert place_of(environment) == Place(0, 1, 0)


def test_the_place_that_torchrun_states():
    assert place_of(PLACE) == Place(rank=3, world=4, local_rank=1)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_what_is_missing_is_named_with_the_remedy(missing):
    for environment in ({k: v for k, v in PLACE.items() if k != missing}, {**PLACE, missing: ""}):
        with pytest.raises(SettingError, match=f"{missing} is not set.*torchrun.*unset WORLD_SIZE"):
            place_of(environment)


@pytest.mark.parametrize(("name", "value"), [("RANK", "-1"), ("RANK", "4"), ("WORLD_SIZE", "two"), ("RANK", "x")])
def test_what_is_odd_is_named(name, value):
    with pytest.raises(SettingError, match=f"{name}={value}"):
        place_of({**PLACE, name: value})


@pytest.mark.parametrize("timeout", [0, -1, None, "soon", True, float("nan")])
def test_a_time_limit_is_a_positive_number(timeout):
    with pytest.raises(SettingError, match="process_timeout"):
        check_timeout(timeout)


def test_a_team_of_one_waits_for_nobody():
    with Team() as team:
        assert team.first
        team.tell({"settings": {}})
        assert team.join(10) is ALONE


@pytest.fixture
def choose(monkeypatch):
    """`choose(name, gpus, **place)`: the device on a machine with that many GPUs."""
    choose_device = run_path(str(SCRIPT), run_name="script")["choose_device"]

    def run(name, gpus, **place):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return str(choose_device(name, Place(**place)))

    return run


def test_each_process_takes_its_own_gpu(choose):
    assert choose("auto", 0) == choose("cpu", 2) == choose("auto", 0, rank=1, world=2, local_rank=1) == "cpu"
    assert choose("auto", 2) == choose("cuda", 1) == "cuda"
    assert choose("cuda:1", 2) == "cuda:1"
    for name in ("auto", "cuda"):
        assert [choose(name, 2, rank=4 + k, world=8, local_rank=k) for k in (0, 1)] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("name", "gpus", "place", "words"),
    [
        ("cuda", 0, {}, "device=cuda isn't there"),
        ("cuda:1", 1, {}, "device=cuda:1 isn't there"),
        ("gpu", 1, {}, "device=gpu is unknown"),
        ("cuda:0", 2, {"rank": 1, "world": 2, "local_rank": 1}, "one GPU for 2 processes"),
        ("auto", 1, {"rank": 1, "world": 2, "local_rank": 1}, "finds 1 GPUs.*nproc_per_node=1.*device=cpu"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(choose, name, gpus, place, words):
    with pytest.raises(SettingError, match=words):
        choose(name, gpus, **place)
