"""Results kept in the folder of an evaluation as they come, one number an image, in the order of the set.

They are the same file whatever the number of processes that made it, and serve any number that goes on from it. Only
the first process touches the folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wdat.distributed import Processes, gather_to_rank_zero, scatter_from_rank_zero, together
from wdat.errors import SettingError

LEFT, PROVED, CAPPED = 0, 1, 2  # not looked at; found; at least as large as was asked for


def fingerprint(values: Tensor) -> str:
    """What tells one tensor from another: 16 hexadecimal digits of a SHA-256 sum."""
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


class Kept:
    """This process's part of the numbers, those kept before included.

    Args:
        file: Where they are; None keeps nothing.
        about: What they are of, in plain values; a file of something else is written anew.
        rows: (N,), where this process's images stand in the set.
        size: Images in the set.
        processes: Share the set.

    Attributes:
        values: (N,), float64, 0 where not known.
        states: (N,), `LEFT`, `PROVED` or `CAPPED`.
        seconds: CPU time that this process's numbers took, that of earlier calls included.

    Raises:
        SettingError: If the file can't be read.
    """

    def __init__(self, file: Path | None, about: dict[str, Any], rows: Tensor, size: int, processes: Processes) -> None:
        self._file, self._about, self._rows, self._processes = file, about, rows, processes
        self._size = size
        state: dict[str, Any] | None = None
        with together(processes):
            if file is not None and processes.rank == 0 and file.exists():
                state = self._read(file)
        self.values = torch.zeros(len(rows), dtype=torch.float64)
        self.states = torch.zeros(len(rows), dtype=torch.long)
        self._times = torch.zeros(len(rows), dtype=torch.float64)
        if processes.max(float(state is not None)):
            parts = (state or {}).get
            self.values = scatter_from_rank_zero(parts("values"), self.values[:0], rows, processes)
            self.states = scatter_from_rank_zero(parts("states"), self.states[:0], rows, processes)
            self._times = scatter_from_rank_zero(parts("seconds"), self._times[:0], rows, processes)

    @property
    def seconds(self) -> float:
        """CPU time that this process's numbers took."""
        return float(self._times.sum())

    def set(self, i: int, value: float, state: int, seconds: float) -> None:
        """The number of this process's image i."""
        self.values[i], self.states[i], self._times[i] = value, state, seconds

    def save(self) -> None:
        """Write all processes' numbers, at once or not at all."""
        if not self._processes.max(float(self._file is not None)):
            return
        state: dict[str, Any] = {"about": self._about}
        for name, part in (("values", self.values), ("states", self.states), ("seconds", self._times)):
            state[name] = gather_to_rank_zero(part, self._rows, self._processes)
        with together(self._processes):
            if self._file is not None and self._processes.rank == 0:
                temporary = self._file.with_suffix(".tmp")
                torch.save(state, temporary)
                temporary.replace(self._file)

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            if state["about"] != self._about:
                return None
            if {len(state[name]) for name in ("values", "states", "seconds")} != {self._size}:
                raise ValueError("it holds another number of images")
            return state
        except Exception as error:  # whatever a damaged file makes of itself
            raise SettingError(f"{file} can't be read: delete it; what it holds is computed again") from error
