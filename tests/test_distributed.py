"""Reductions over the processes that share a set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wdat
from wdat import distributed as module
from wdat.distributed import ALONE, Processes, current, distributed_errors, gather_to_rank_zero, scatter_from_rank_zero
from wdat.distributed import together as agreed
from wdat.errors import RunError, SettingError


def test_alone_gives_back_what_it_gets():
    assert ALONE.sum([1.0, 2.0]) == [1.0, 2.0]
    assert ALONE.max(3.0) == 3.0
    assert torch.equal(ALONE.gather(torch.arange(3)), torch.arange(3))
    assert (ALONE.rank, ALONE.world_size) == (0, 1)


def test_without_a_group_this_process_is_alone():
    assert current(torch.device("cpu")) is ALONE
    assert isinstance(ALONE, Processes)


def raising(processes, errors):
    """What each process raises after a block in which it has the error `errors[rank]`, or none."""
    try:
        with agreed(processes):
            if errors[processes.rank]:
                raise errors[processes.rank]
    except Exception as error:
        return error
    return None


def test_an_error_on_any_process_is_raised_on_all(together):
    fault = SettingError("data.path=x: no such file")
    found = together(3, lambda p: raising(p, [None, fault, None]))
    assert found[1] is fault
    for other in (found[0], found[2]):
        assert isinstance(other, SettingError)
        assert str(other) == "process 1: data.path=x: no such file"
    found = together(2, lambda p: raising(p, [KeyError("k"), None]))
    assert isinstance(found[0], KeyError)
    assert isinstance(found[1], RunError)
    assert str(found[1]) == "process 0: KeyError: 'k'"


def test_where_all_have_an_error_each_raises_its_own(together):
    faults = [SettingError("a"), ValueError("b"), RunError("c")]
    assert together(3, lambda p: raising(p, faults)) == faults


def test_without_an_error_nothing_is_raised(together):
    assert together(2, lambda p: raising(p, [None, None])) == [None, None]
    assert raising(ALONE, [None]) is None
    fault = KeyError("k")
    assert raising(ALONE, [fault]) is fault


def test_a_setting_is_told_whatever_it_was_wrapped_in(together):
    inner = SettingError("model.name=x is unknown")
    wrapped = RuntimeError("Error in call to target")
    wrapped.__cause__ = inner
    found = together(2, lambda p: raising(p, [None, wrapped]))
    assert isinstance(found[0], SettingError)
    assert str(found[0]) == "process 1: model.name=x is unknown"
    assert found[1] is wrapped


READ = "[/build/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:45: Connection reset by peer. This is advice. 🏖️"
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call failed\nLast error:\n"
)
LATE = "[/build/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 4000ms for send operation to complete"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (READ, "Read error [127.0.0.1]:45: Connection reset by peer"),
        (LATE, "Timed out waiting 4000ms for send operation to complete"),
        (NCCL, "NCCL: unhandled system error, ncclSystemError: System call failed; NCCL_DEBUG=INFO tells more"),
        ("Application timeout caused pair closure", "Application timeout caused pair closure"),
    ],
)
def test_processes_that_cannot_be_reached_are_told_of(monkeypatch, said, told):
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    with pytest.raises(RunError) as found, distributed_errors(lambda: "resume=RUN"), distributed_errors():
        raise RuntimeError(said)
    assert str(found.value).startswith(f"process 1 waited in vain for the others ({told}): one of them has failed")
    assert str(found.value).endswith("timeout); resume=RUN")


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 differ"), RunError("reset by peer"), ValueError("gloo/")]
)
def test_other_errors_have_nothing_to_do_with_processes(error):
    with pytest.raises(type(error)) as found, distributed_errors(lambda: "resume=RUN"):
        raise error
    assert found.value is error


@pytest.mark.parametrize("parts", [[[2, 0, 5, 1], [4, 3]], [[], [0, 1, 2, 3, 4]], [[1], [], [0, 2]], [[0]]])
def test_a_whole_set_is_brought_together_and_divided_anew(together, monkeypatch, parts):
    monkeypatch.setattr(module, "PIECE", 2)
    size = sum(map(len, parts))
    values = torch.arange(6.0).view(-1, 1).repeat(1, 3)[:size]

    def one(p):
        rows = torch.tensor(parts[p.rank], dtype=torch.int64)
        whole = gather_to_rank_zero(values[rows], rows, p)
        back = scatter_from_rank_zero(whole, values[:0], rows, p)
        other = torch.arange(p.rank, size, p.world_size)
        return whole, back, scatter_from_rank_zero(whole, values[:0], other, p)

    for rank, (whole, back, other) in enumerate(together(len(parts), one)):
        assert (whole is None) == (rank > 0)
        assert rank > 0 or torch.equal(whole, values)
        assert torch.equal(back, values[parts[rank]])
        assert torch.equal(other, values[rank :: len(parts)])


PROGRAM = """
import json, sys, warnings
from datetime import timedelta
import torch, torch.distributed as dist
from wdat.attacks import build, Context
from wdat.evaluation import ImageTensors, evaluate
from wdat.distributed import current
from wdat.threat import ThreatModel
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
p = current(torch.device("cpu"))
rows = torch.arange(3, dtype=torch.float32).view(3, 1) if rank == 0 else torch.zeros(0, 1)
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
x, y = torch.rand(9, 3, 2, 2), torch.arange(9) % 3
out = {"rank": p.rank, "world_size": p.world_size, "sum": p.sum([1.0 + rank, 1e16]), "max": p.max(float(rank)),
       "empty": p.gather(rows[:0]).shape[0], "gather": p.gather(rows).tolist(),
       "labels": p.gather(y[:2] if rank else y[:5]).tolist()}
for name, cut in (("uneven", 7), ("one_empty", 9)):
    mine = slice(0, cut) if rank == 0 else slice(cut, 9)
    records = evaluate(network, ImageTensors(x[mine], y[mine]), ThreatModel(2, "linf", 0.1), ["pgd", "wpgd"],
                       losses=["ce", "redlr"], options={"wpgd": {"steps": 5}}, processes=p)
    out[name] = [[r.attack, r.n, r.accuracy, r.loss_mean, r.distance, r.upsilon] for r in records]
dist.destroy_process_group()
print(json.dumps(out))
"""


@pytest.mark.long
def test_two_real_processes_with_uneven_and_empty_parts(tmp_path):
    root = str(Path(wdat.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        found = [json.loads(run.communicate(timeout=280)[0]) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert [f["rank"] for f in found] == [0, 1]
    for f in found:
        assert f["world_size"] == 2
        assert f["sum"] == [3.0, 2e16]
        assert f["max"] == 1.0
        assert f["empty"] == 0
        assert f["gather"] == [[0.0], [1.0], [2.0]]
        assert f["labels"] == [0, 1, 2, 0, 1, 0, 1]

    from wdat.evaluation import ImageTensors, evaluate
    from wdat.threat import ThreatModel

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x, y = torch.rand(9, 3, 2, 2), torch.arange(9) % 3
    alone = evaluate(
        network,
        ImageTensors(x, y),
        ThreatModel(2, "linf", 0.1),
        ["pgd", "wpgd"],
        losses=["ce", "redlr"],
        options={"wpgd": {"steps": 5}},
    )
    for f in found:
        for split in ("uneven", "one_empty"):
            for values, record in zip(f[split], alone, strict=True):
                assert values[:2] == [record.attack, record.n]
                numbers = [record.accuracy, record.loss_mean, record.distance, record.upsilon]
                assert values[2:] == [pytest.approx(v, rel=1e-5) if v is not None else None for v in numbers]
