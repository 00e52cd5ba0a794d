"""The processes of one run: what they agree on, and what can't work.

Lightning starts them itself (`trainer.devices=2`), or they are started from outside: by torchrun, by SLURM's `srun`, or
by submitit as the jobs of a sweep.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from hydra.conf import HydraConf
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from wdat.cli.place import Place, outside
from wdat.errors import SettingError

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "single_device")
CLASSES = ("DDPStrategy", "SingleDeviceStrategy")
FIRST_PORT, PORTS = 10_000, 20_000  # below the ports that systems give away on their own
PATIENCE = timedelta(minutes=5)
STARTER = "WDAT_STARTED_BY"  # an environment variable: the process that Lightning starts others from
DRIVER = Path("/proc/driver/nvidia")


def agreed(arguments: Sequence[str], prepare: Callable[[Sequence[str]], list[str]]) -> list[str]:
    """The command line that all processes of a run share: prepared once, with one folder.

    Processes that are started from outside each compose the configuration, and the time in the folder's name would
    differ between them. Only the first one writes the composed configuration and the log of the job.

    Args:
        arguments: Overrides as typed.
        prepare: What is made of them, such as `wdat.cli.resume.resumed_arguments`.

    Returns:
        The prepared arguments; unchanged in the processes that Lightning has started from prepared ones.

    Raises:
        SettingError: If the processes can't agree on a folder; whatever `prepare` raises, on the first process.
    """
    if any(a.startswith("hydra.job.name=train_ddp_process_") for a in arguments):  # Lightning's mark
        return list(arguments)
    place = outside()
    if place is None or place.world == 1:
        return prepare(arguments)
    if place.starter == "torchrun":
        found = _from_the_first(place, lambda: _with_folder(prepare(arguments), time.strftime("%Y-%m-%d/%H-%M-%S")))
    else:
        job, step = (os.environ.get(f"SLURM_{name}_ID", "0") for name in ("JOB", "STEP"))
        found = _with_folder(prepare(arguments), f"slurm-{job}.{step}")
    return found if place.rank == 0 else [*found, "hydra.output_subdir=null", "hydra/job_logging=stdout"]


def _with_folder(arguments: list[str], name: str) -> list[str]:
    """The arguments with a folder that doesn't depend on the time at which a process composes them."""
    sweep = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments)
    key, parent = ("hydra.sweep.dir", "multirun") if sweep else ("hydra.run.dir", "outputs")
    asked = [a for a in arguments if a.lstrip("+").startswith(f"{key}=")]
    if not asked:
        return [*arguments, f"{key}={parent}/{name}"]
    if "${now" in asked[-1]:
        raise SettingError(f"{asked[-1]}: every process would fill in its own time; name a folder, or leave {key} out")
    return arguments


def _from_the_first(place: Place, decide: Callable[[], list[str]]) -> list[str]:
    """What the first of torchrun's processes decides, through the store by which they will find each other."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise SettingError("torchrun keeps no store here: use --standalone or --rdzv_backend=c10d")
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=PATIENCE)  # type: ignore[attr-defined]
    key = f"wdat/arguments/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if place.rank == 0:
        try:
            found = decide()
        except BaseException:
            store.set(key, "null")
            raise
        store.set(key, json.dumps(found))
        return found
    told: list[str] | None = json.loads(store.get(key))
    if told is None:
        sys.exit(2)  # the first process says why
    return told


def join_group() -> None:
    """Take this process's place among the tasks of a job of submitit on one machine, in Lightning's words.

    On SLURM Lightning reads the place itself. A process that Lightning has started ends with the one that started it.
    """
    place = outside()
    if place is None and int(os.environ.get("LOCAL_RANK", 0)) > 0 and STARTER in os.environ:
        end_with(int(os.environ[STARTER]))
    elif place is None:
        os.environ[STARTER] = str(os.getpid())  # for those that Lightning will start from here
    if place is None or place.starter != "submitit" or place.world == 1:
        return
    port = FIRST_PORT + int(os.environ["SUBMITIT_LOCAL_JOB_ID"]) % PORTS  # the id is that of the job's process
    os.environ.update(
        RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), NODE_RANK="0",
        WORLD_SIZE=str(place.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.pop("SLURM_NTASKS", None)  # of the allocation in which the sweep may run: not these processes
    rank_zero_only.rank = place.rank  # type: ignore[attr-defined]


def end_with(starter: int, seconds: float = 1.0) -> None:
    """End this process when the one that started it is gone, which otherwise may be waited for until a time limit.

    Args:
        starter: That process's number; it may be gone already.
        seconds: How often to look.
    """

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_launch(trainer: DictConfig, hydra: HydraConf) -> None:
    """Refuse what would hang, run several times over, or attack a part of a network.

    Args:
        trainer: The settings of the trainer.
        hydra: Hydra's own, as `HydraConfig.get()` gives them.

    Raises:
        SettingError: If the strategy can't be used, the devices aren't there, the processes that were started are not
            those that the settings ask for, or Lightning would start processes that repeat a sweep or don't find the
            folder.
    """
    _check_strategy(trainer.strategy)
    devices, nodes = device_count(trainer.accelerator, trainer.devices), trainer.num_nodes
    if trainer.strategy == "single_device" and devices * nodes > 1:
        raise SettingError(
            f"trainer.strategy=single_device uses one of {devices * nodes} devices: trainer.strategy=ddp"
        )
    asked = f"trainer.devices={trainer.devices}" + (f" trainer.num_nodes={nodes}" if nodes != 1 else "")
    place = outside()
    if place is not None:
        _check_started(place, asked, devices, nodes)
        if place.starter == "submitit" and trainer.accelerator == "auto" and _hidden_devices():
            raise SettingError(
                f"submitit shows no GPU to its jobs: add hydra.launcher.gpus_per_node={devices}, or "
                "trainer.accelerator=cpu"
            )
    elif devices * nodes > 1 and hydra.mode == RunMode.MULTIRUN:
        raise SettingError(
            f"{asked} in a sweep: each process that Lightning starts would run the whole sweep. Use "
            f"hydra/launcher=submitit_local hydra.launcher.tasks_per_node={devices} (or submitit_slurm), start the "
            "sweep with torchrun, or set trainer.devices=1"
        )
    elif nodes > 1 and not _folder_is_named(hydra):
        raise SettingError(
            f"{asked}: every node would choose a folder for itself; start with torchrun, or name one for all with "
            "hydra.run.dir=FOLDER"
        )


def _folder_is_named(hydra: HydraConf) -> bool:
    overrides: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    return any(a.startswith("hydra.run.dir=") and "${now" not in a for a in overrides)


def _check_strategy(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else str(strategy.get("_target_", "")).rpartition(".")[2]
    if name in (*STRATEGIES, *CLASSES):
        return
    reason = "attacks need the whole network in every process"
    if any(word in name for word in ("spawn", "fork", "notebook")):
        reason = "what its processes have measured is lost with them"
    raise SettingError(f"trainer.strategy={name} can't be used ({reason}): use trainer.strategy=ddp, or auto")


def device_count(accelerator: str, devices: Any) -> int:
    """How many devices of this machine Lightning would use.

    Args:
        accelerator: As `trainer.accelerator`.
        devices: As `trainer.devices`: a number, a list of ids, or `auto`.

    Raises:
        SettingError: If they aren't there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                accelerator=accelerator, devices=devices, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
    except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise SettingError(f"trainer.accelerator={accelerator} trainer.devices={devices}: {error}") from error
    return trainer.num_devices


def _check_started(place: Place, asked: str, devices: int, nodes: int) -> None:
    if (place.world, place.nodes) == (devices * nodes, nodes):
        return
    wanted = f"trainer.devices={place.world // place.nodes} trainer.num_nodes={place.nodes}"
    other = {
        "torchrun": f"torchrun --nproc_per_node={devices}",
        "submitit": f"hydra.launcher.tasks_per_node={devices}",
        "SLURM": f"srun with --ntasks-per-node={devices}",
    }[place.starter]
    raise SettingError(
        f"{asked}, but {place.starter} has started {place.world} processes on {place.nodes} machines: set {wanted}, or "
        f"use {other}"
    )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let the processes of this user on this machine through the block one after the other, as for a download."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (Path(tempfile.gettempdir()) / f"wdat-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back with the file
        yield


def _hidden_devices() -> bool:
    return DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") == ""
