"""Nearest adversarial points kept in the folder of an evaluation, whole and in the order of the set.

They are the same file whatever the number of processes that made it, and serve any number of processes that go on from
it. Only the first process touches the folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wdat.attacks.minimum_norm import NearestAdversarial
from wdat.distributed import Processes, gather_to_rank_zero, scatter_from_rank_zero, together
from wdat.errors import SettingError
from wdat.evaluation.evaluator import ImageTensors


def digest(images: ImageTensors, rows: Tensor, processes: Processes) -> str:
    """What tells one set of labelled images from another, on the first process; empty on the others.

    Args:
        images: This process's part of the set.
        rows: (N,), where its images stand in the set.
        processes: Hold the other parts.
    """
    pairs = zip(images.x.cpu(), images.y.tolist(), strict=True)
    each = [list(hashlib.sha256(x.contiguous().numpy().tobytes() + str(y).encode()).digest()) for x, y in pairs]
    mine = torch.tensor(each, dtype=torch.uint8).view(-1, hashlib.sha256().digest_size)
    whole = gather_to_rank_zero(mine.to(processes.device), rows.to(processes.device), processes)
    return "" if whole is None else hashlib.sha256(whole.numpy().tobytes()).hexdigest()


def save(file: Path, about: dict[str, Any], nearest: NearestAdversarial, rows: Tensor, processes: Processes) -> None:
    """Write all processes' nearest; a stop can't leave half a file.

    Args:
        file: Where to.
        about: What they are the nearest of, in plain values.
        nearest: This process's.
        rows: (N,), where its images stand in the set.
        processes: Hold the other nearest.
    """
    state: dict[str, Any] = {"about": about, "x_adv": gather_to_rank_zero(nearest.x_adv, rows, processes)}
    state["distances"] = gather_to_rank_zero(nearest.distances, rows, processes)
    state["stages"] = gather_to_rank_zero(nearest.stages, rows, processes)
    state["reach"] = nearest.reach
    state["effort"] = [(passes, gather_to_rank_zero(then, rows, processes)) for passes, then in nearest.effort]
    with together(processes):
        if processes.rank == 0:
            temporary = file.with_suffix(".tmp")
            torch.save(state, temporary)
            temporary.replace(file)


def _read(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What the file holds; None if that is about something else."""
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        if state["about"] != about:
            return None
        tensors = [state["x_adv"], state["distances"], state["stages"], *(then for _, then in state["effort"])]
        if {len(tensor) for tensor in tensors} != {about["n"]}:
            raise ValueError("it holds another number of images")
        return state
    except Exception as error:  # whatever a damaged file makes of itself
        raise SettingError(f"{file} can't be read: delete it; the nearest are searched again") from error


def load(file: Path, about: dict[str, Any], x: Tensor, rows: Tensor, processes: Processes) -> NearestAdversarial | None:
    """This process's part of nearest that were kept; None where the file isn't there or is about something else.

    Args:
        file: Where from.
        about: What they must be the nearest of.
        x: This process's images (N, C, H, W).
        rows: (N,), where they stand in the set.
        processes: Share the set.

    Raises:
        SettingError: If the file can't be read.
    """
    state: dict[str, Any] | None = None
    with together(processes):
        if processes.rank == 0 and file.exists():
            state = _read(file, about)
    if not processes.max(float(state is not None)):
        return None
    passes = [float(taken) for taken, _ in state["effort"]] if state else []
    stages = int(processes.max(float(len(passes))))
    none = x.new_empty(0)

    def part(name: str, like: Tensor) -> Tensor:
        return scatter_from_rank_zero(state[name] if state else None, like, rows, processes)

    effort = []
    for stage in range(stages):
        taken = processes.max(passes[stage] if state else 0.0)
        effort.append(
            (taken, scatter_from_rank_zero(state["effort"][stage][1] if state else None, none, rows, processes))
        )
    reach = processes.max(float(state["reach"]) if state else 0.0)
    points, distances, done = part("x_adv", x[:0]), part("distances", none), part("stages", rows[:0])
    return NearestAdversarial(points, distances, effort, reach, done)
