"""Where a process stands among those that run one script, as the environment tells it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.distributed as dist

from wdat.errors import SettingError


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: Its number, from 0.
        world: How many processes there are.
        local_rank: Its number on its machine, from 0.
        nodes: On how many machines they are.
        starter: `torchrun`, `submitit` (on one machine) or `SLURM`, where one of them has started it.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    nodes: int = 1
    starter: str = ""


def place_of(environment: Mapping[str, str]) -> Place:
    """The place that WORLD_SIZE, RANK and LOCAL_RANK state, as torchrun sets them; alone without WORLD_SIZE.

    Raises:
        SettingError: If WORLD_SIZE is more than 1 and one of the others, or the meeting point, is missing or no number.
    """
    world = _number(environment, "WORLD_SIZE") if environment.get("WORLD_SIZE") else 1
    if world <= 1:
        return Place()
    if not environment.get("MASTER_ADDR"):
        raise SettingError(_incomplete("MASTER_ADDR", "is not set"))
    _number(environment, "MASTER_PORT")
    rank, local_rank = _number(environment, "RANK"), _number(environment, "LOCAL_RANK")
    if rank >= world:
        raise SettingError(_incomplete(f"RANK={rank}", f"is not below WORLD_SIZE={world}"))
    return Place(rank, world, local_rank)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise SettingError(_incomplete(name, "is not set") if not text else _incomplete(f"{name}={text}", "is odd"))
    return int(text)


def _incomplete(what: str, fault: str) -> str:
    return (
        f"the environment asks for several processes, but {what} {fault}: start them with torchrun "
        "--nproc_per_node=N, set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE"
    )


def outside() -> Place | None:
    """This process's place, if it was started from outside; None for a user, or for Lightning on the user's word."""
    env = os.environ
    if dist.is_available() and dist.is_torchelastic_launched():
        place = place_of(env)
        return replace(place, nodes=place.world // int(env["LOCAL_WORLD_SIZE"]), starter="torchrun")
    if env.get("SUBMITIT_EXECUTOR") == "local":
        rank, world, local_rank = (int(env[f"SUBMITIT_LOCAL_{name}"]) for name in ("GLOBALID", "NTASKS", "LOCALID"))
        return Place(rank, world, local_rank, starter="submitit")
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        rank, local_rank = int(env.get("SLURM_PROCID", 0)), int(env.get("SLURM_LOCALID", 0))
        return Place(rank, int(env["SLURM_NTASKS"]), local_rank, int(env.get("SLURM_NNODES", 1)), "SLURM")
    return None
