"""Starts a script in several processes, as torchrun would or through it, and compares what they say."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(*command: object, folder: Path, timeout: float = 280, **variables: str) -> SimpleNamespace:
    """Run `python *command` and all that it starts: status, out and err; ended after so many seconds."""
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


def end(started: subprocess.Popen[Any]) -> None:
    """End a process and its children, which are in a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait(20)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """That of one process of several, as torchrun sets it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    about = {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
    return {**os.environ, **about, **{key: str(value) for key, value in place.items()}}


def run_together(
    folder: Path, script: Path, *arguments: object, world: int = 2, timeout: float = 280, **changes: str
) -> list[SimpleNamespace]:
    """Run a script in each of several processes: status, out and err of each.

    Processes that haven't ended in time are killed and the test fails with what they said.

    Args:
        folder: Where they run and where their output is kept.
        script: The script.
        arguments: Its arguments.
        world: How many processes.
        timeout: Seconds for all.
        changes: Of the environment.
    """
    port = free_port()
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    logs = [(folder / f"out_{rank}", folder / f"err_{rank}") for rank in range(world)]
    running = []
    for rank, (out, err) in enumerate(logs):
        with out.open("w") as stdout, err.open("w") as stderr:
            about = {**environment(rank, world, port), **changes}
            running.append(subprocess.Popen(command, stdout=stdout, stderr=stderr, env=about, cwd=folder))
    try:
        until = time.monotonic() + timeout
        for process in running:
            process.wait(max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pytest.fail("still running: " + str([err.read_text()[-1500:] for _, err in logs]))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [
        SimpleNamespace(status=process.returncode, out=out.read_text(), err=err.read_text())
        for process, (out, err) in zip(running, logs, strict=True)
    ]


def alike(one: Any, two: Any, *, rel: float, path: Sequence[object] = ()) -> None:
    """Assert that two nested plain values are equal, and floats to a relative precision."""
    if isinstance(one, dict) and isinstance(two, dict):
        assert set(one) == set(two), path
        for key in one:
            alike(one[key], two[key], rel=rel, path=[*path, key])
    elif isinstance(one, list) and isinstance(two, list):
        assert len(one) == len(two), path
        for k, (a, b) in enumerate(zip(one, two, strict=True)):
            alike(a, b, rel=rel, path=[*path, k])
    elif isinstance(one, float) or isinstance(two, float):
        assert two == pytest.approx(one, rel=rel, abs=1e-12), path
    else:
        assert one == two, path
