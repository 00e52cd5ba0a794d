"""The jobs of a Hydra sweep: one that fails is told of and doesn't end the others."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from wdat.cli.console import complain
from wdat.cli.launch import cluster


class Sweep:
    """The jobs that this process runs one after the other; of a single run there is nothing to keep.

    Where several processes run a sweep together, or each job has a process of its own, an error ends the process: the
    others are not left to wait for it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()  # a launcher may copy this object into others
        self._jobs = 0
        self._failed: dict[str, int] = {}  # a line on each job, with the status that it would have left with

    def job(self, work: Callable[[], float | None]) -> float | None:
        """Do the work of a job within Hydra; tell of its error and go on with the next.

        Returns:
            The figure of the job; NaN where it failed, so that a sweeper that optimises counts it as failed.
        """
        hydra = HydraConfig.get()
        environment = cluster()
        together = environment is not None and environment.world_size() > 1
        if hydra.mode != RunMode.MULTIRUN or together or os.getpid() != self._process:
            return work()
        self._jobs += 1
        try:
            return work()
        except Exception as error:
            status = complain(error)
            if status is None:
                traceback.print_exception(error)
            self._failed[f"  #{hydra.job.num} {' '.join(hydra.overrides.task)}"] = status or 1
            return math.nan

    def end(self) -> None:
        """List the jobs that failed, if there are any, and leave: with status 2 if settings were at fault in all."""
        if self._failed:
            print(f"{len(self._failed)} of {self._jobs} jobs failed:", *self._failed, sep="\n", file=sys.stderr)
            sys.exit(min(self._failed.values()))
