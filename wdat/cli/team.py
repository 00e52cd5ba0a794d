"""The processes that run one script together: what the first tells the others, and their group.

`torchrun` and many schedulers start the same command several times and tell each process its place in the environment.
The first process alone reads the command line and writes files; it tells the others what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from wdat.cli.place import Place
from wdat.distributed import Processes, current
from wdat.errors import RunError, SettingError

CPU = torch.device("cpu")
PATIENCE = timedelta(seconds=300)  # for the others to start, and to be told the next task
FAREWELL = timedelta(seconds=5)  # for the others to hear of the end


class Team:
    """The processes of one script. Enter it before any work; on leaving, the group is given up and all end together.

    Args:
        place: Where this process stands; alone by default.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self.first = self.place.rank == 0
        self._store: Store | None = None
        self._told = 0
        self._joined = False

    def __enter__(self) -> Team:
        if self.place.world > 1:
            self._store = PrefixStore("wdat", _meet(self.place))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._joined:
            with contextlib.suppress(RuntimeError):  # broken already
                dist.destroy_process_group()
            self._joined = False
        if self._store is None:
            return
        status = error.code if isinstance(error, SystemExit) else int(error is not None)
        with contextlib.suppress(RuntimeError):
            if self.first:
                self._tell({"status": status if isinstance(status, int) else int(status is not None)})
                self._store.wait([f"left/{rank}" for rank in range(1, self.place.world)], FAREWELL)
            else:
                self._store.set(f"left/{self.place.rank}", "")
        self._store = None

    def tell(self, task: dict[str, Any]) -> None:
        """Give the others a task, in plain values; for the first process."""
        if self._store is not None:
            self._tell({"task": task})

    def _tell(self, told: dict[str, Any]) -> None:
        assert self._store is not None
        self._store.set(f"told/{self._told}", json.dumps(told))
        self._told += 1

    def tasks(self) -> Iterator[dict[str, Any]]:
        """What the first process tells this one to do, until it ends; then this one ends with the same status.

        Raises:
            RunError: If the first process has gone without a word.
        """
        assert self._store is not None
        for number in count():
            try:
                told = json.loads(self._store.get(f"told/{number}"))
            except RuntimeError as error:
                raise RunError(f"process {self.place.rank} can't reach the first one, which has gone") from error
            if "status" in told:
                if told["status"]:
                    sys.exit(told["status"])
                return
            yield told["task"]

    def join(self, timeout: float) -> Processes:
        """The group of all processes, for tensors on the CPU; `wdat.distributed.current` gives it for other devices.

        Args:
            timeout: Seconds that a process waits for the others, `process_timeout`.

        Raises:
            SettingError: If the timeout isn't positive.
            RunError: If the others don't come.
        """
        check_timeout(timeout)
        if self._store is not None and not self._joined:
            devices = torch.cuda.is_available() and dist.is_nccl_available()
            try:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if devices else "gloo",
                    store=PrefixStore("group", self._store),
                    rank=self.place.rank,
                    world_size=self.place.world,
                    timeout=timedelta(seconds=timeout),
                )
            except RuntimeError as error:
                raise RunError(f"process {self.place.rank} couldn't join the others ({_line(error)})") from error
            self._joined = True
        return current(CPU)


def check_timeout(timeout: Any) -> None:
    """Refuse a time limit that is no positive number of seconds."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise SettingError(f"process_timeout={timeout} must be a positive number of seconds; 1800 is usual")


def _meet(place: Place) -> Store:
    """The store through which the processes find each other."""
    at = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=PATIENCE))
    except (RuntimeError, ValueError) as error:
        raise SettingError(
            f"process {place.rank} of {place.world} finds no meeting point at {at} ({_line(error)}): choose another "
            f"MASTER_PORT, and start all within {PATIENCE.seconds} seconds"
        ) from error
    found: Store = store
    return found


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
