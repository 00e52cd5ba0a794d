"""Jobs of a sweep that fail."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from wdat.cli import sweep
from wdat.cli.sweep import Sweep
from wdat.errors import RunError, SettingError, Stopped


@pytest.fixture
def place(monkeypatch):
    """`place(mode, number, started)`: a job of Hydra's, in a process that somebody started."""

    def make(mode=RunMode.MULTIRUN, number=0, started=None):
        job, overrides = SimpleNamespace(num=number), SimpleNamespace(task=["data=digits", f"seed={number}"])
        hydra = SimpleNamespace(mode=mode, job=job, overrides=overrides)
        monkeypatch.setattr(sweep, "HydraConfig", SimpleNamespace(get=lambda: hydra))
        monkeypatch.setattr(sweep, "cluster", lambda: started)

    return make


def run(jobs, error=None):
    def work():
        if error:
            raise error
        return 0.5

    return jobs.job(work)


def test_jobs_that_fail_are_listed_and_the_others_go_on(place, capsys):
    jobs = Sweep()
    for number, error in enumerate([None, SettingError("seed=1 is bad"), KeyError("a defect"), RunError("no room")]):
        place(number=number)
        assert run(jobs, error) == (0.5 if error is None else pytest.approx(math.nan, nan_ok=True))
    with pytest.raises(SystemExit) as left:
        jobs.end()
    assert left.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: seed=1 is bad\n" in err
    assert "Traceback" in err
    assert "KeyError: 'a defect'" in err
    assert err.endswith("3 of 4 jobs failed:\n" + "".join(f"  #{n} data=digits seed={n}\n" for n in (1, 2, 3)))


def test_a_sweep_without_failures_ends_well(place, capsys):
    jobs = Sweep()
    place()
    run(jobs)
    jobs.end()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Stopped(15, "stopped"), SystemExit(3)])
def test_a_stop_ends_a_sweep(place, stop):
    place()
    with pytest.raises(type(stop)):
        run(Sweep(), stop)


def test_elsewhere_an_error_passes(place, monkeypatch):
    error, jobs = SettingError("x"), Sweep()
    for given in ({"mode": RunMode.RUN}, {"started": SimpleNamespace(world_size=lambda: 2)}):
        place(**given)
        with pytest.raises(SettingError):
            run(jobs, error)
    place()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(SettingError):
        run(jobs, error)
    jobs.end()
