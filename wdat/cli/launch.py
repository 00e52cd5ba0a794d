"""The processes of one run: what they agree on, and what can't work.

Lightning starts them itself (`trainer.devices=2`), or joins those that torchrun, SLURM's `srun`, or submitit (as the
jobs of a sweep) have started.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode

from wdat.cli.arguments import CommandLine
from wdat.errors import SettingError

if TYPE_CHECKING:  # this module is read before anything is known to run, so Lightning is imported where it is used
    from hydra.conf import HydraConf
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from omegaconf import DictConfig

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "single_device")
CLASSES = ("DDPStrategy", "SingleDeviceStrategy")
FIRST_PORT, PORTS = 10_000, 20_000  # below the ports that systems give away on their own
PATIENCE = timedelta(minutes=5)
STARTER = "WDAT_STARTED_BY"  # an environment variable: the process that Lightning starts others from
DRIVER = Path("/proc/driver/nvidia")
LAUNCHED = "hydra.job.name=train_ddp_process_"  # with which Lightning marks the processes that it starts


def rank() -> int:
    """This process's number as its starter has told it in the environment; 0 for the first, or where it is alone."""
    return max(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


def cluster() -> ClusterEnvironment | None:
    """What has started this process: torchrun or SLURM; None for a user, or for Lightning on the user's word.

    Raises:
        SettingError: If SLURM's variables don't fit together.
    """
    if not {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & set(os.environ):
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    try:
        return next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    except RuntimeError as error:
        raise SettingError(str(error)) from error


def agreed(line: CommandLine, prepare: Callable[[CommandLine, str], CommandLine]) -> CommandLine:
    """The command line that all processes of a run share: prepared once, with one folder.

    Processes that are started from outside each compose the configuration, and the time in the folder's name would
    differ between them.

    Args:
        line: As typed.
        prepare: What is made of it by the first process. Its second argument is the name of a folder that must not
            depend on the time; empty where it may.

    Returns:
        The prepared line; unchanged in the processes that Lightning has started from a prepared one.

    Raises:
        SettingError: If the processes can't agree on a folder; whatever `prepare` raises, on the first process.
    """
    if any(o.startswith(LAUNCHED) for o in line.overrides):
        return line
    environment = cluster()
    if environment is None or environment.world_size() == 1:
        return prepare(line, "")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _from_the_first(lambda: prepare(line, ""))
    job, step = (os.environ.get(f"SLURM_{name}_ID", "0") for name in ("JOB", "STEP"))
    return prepare(line, f"slurm-{job}.{step}")


def _from_the_first(decide: Callable[[], CommandLine]) -> CommandLine:
    """What the first of torchrun's processes decides, through the store by which they will find each other."""
    import torch.distributed as dist

    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise SettingError("torchrun keeps no store here: use --standalone or --rdzv_backend=c10d")
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=PATIENCE)  # type: ignore[attr-defined]
    key = f"wdat/arguments/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank() == 0:
        try:
            found = decide()
        except BaseException:
            store.set(key, "null")
            raise
        store.set(key, json.dumps(found.words))
        return found
    told: list[str] | None = json.loads(store.get(key))
    if told is None:
        sys.exit(2)  # the first process says why
    return CommandLine.parse(told)


def join_group() -> None:
    """Tell Lightning of the tasks of a job of submitit on one machine, in torchrun's words; SLURM's it knows.

    A process that Lightning has started ends with the one that started it.
    """
    env = os.environ
    if env.get("SUBMITIT_EXECUTOR") == "local":
        world, local = env["SUBMITIT_LOCAL_NTASKS"], env["SUBMITIT_LOCAL_LOCALID"]
        port = FIRST_PORT + int(env["SUBMITIT_LOCAL_JOB_ID"]) % PORTS  # the id is that of the job's process
        env.update(
            TORCHELASTIC_RUN_ID="submitit", RANK=env["SUBMITIT_LOCAL_GLOBALID"], LOCAL_RANK=local, WORLD_SIZE=world,
            LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    elif cluster() is None and rank() > 0 and STARTER in env:
        end_with(int(env[STARTER]))
    elif cluster() is None:
        env[STARTER] = str(os.getpid())  # for those that Lightning will start from here


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
            those that the settings ask for, or Lightning would start processes that repeat a sweep.
    """
    _check_strategy(trainer.strategy)
    devices, nodes = device_count(trainer.accelerator, trainer.devices), trainer.num_nodes
    if trainer.strategy == "single_device" and devices * nodes > 1:
        raise SettingError(
            f"trainer.strategy=single_device uses one of {devices * nodes} devices: trainer.strategy=ddp"
        )
    asked = f"trainer.devices={trainer.devices}" + (f" trainer.num_nodes={nodes}" if nodes != 1 else "")
    environment = cluster()
    if environment is not None:
        _check_started(environment, asked, devices, nodes)
    if "SUBMITIT_EXECUTOR" in os.environ and trainer.accelerator == "auto" and _hidden_devices():
        raise SettingError(
            f"submitit shows no GPU to its jobs: add hydra.launcher.gpus_per_node={devices}, or trainer.accelerator=cpu"
        )
    if environment is None and devices * nodes > 1 and hydra.mode == RunMode.MULTIRUN:
        raise SettingError(
            f"{asked} in a sweep: each process that Lightning starts would run the whole sweep. Use "
            f"hydra/launcher=submitit_local hydra.launcher.tasks_per_node={devices} (or submitit_slurm), start the "
            "sweep with torchrun, or set trainer.devices=1"
        )


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
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException

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


def _check_started(environment: ClusterEnvironment, asked: str, devices: int, nodes: int) -> None:
    env, world = os.environ, environment.world_size()
    started = world // int(env["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in env else int(env.get("SLURM_NNODES", 1))
    if (world, started) == (devices * nodes, nodes):
        return
    starters = {
        "SUBMITIT_EXECUTOR": f"hydra.launcher.tasks_per_node={devices}",
        "TORCHELASTIC_RUN_ID": f"torchrun --nproc_per_node={devices}",
        "SLURM_NTASKS": f"srun --ntasks-per-node={devices}",
    }
    raise SettingError(
        f"{asked}, but {world} processes have been started on {started} machines: set "
        f"trainer.devices={world // started} trainer.num_nodes={started}, or use "
        f"{next(use for name, use in starters.items() if name in env)}"
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
