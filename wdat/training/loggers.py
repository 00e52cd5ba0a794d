"""Loggers that continue where a stopped run left off: one file of metrics, one folder of TensorBoard, one run of W&B.

Each is told when it is made at which step a run is resumed (`resumed_at`), None for a run that begins.
"""

from __future__ import annotations

import csv
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import loggers
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from wdat.errors import RunError, SettingError, unknown

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # of W&B
OFFLINE = ("offline", "dryrun")
WITHOUT_LOGIN = "log in with `wandb login`, set WANDB_MODE=offline to keep the run on this machine, or use logger=csv"


@contextmanager
def own_run() -> Iterator[None]:
    """End the run of W&B, if there is one, with the block: the next job of a sweep has its own.

    Says how to upload a run that was kept on this machine.
    """
    try:
        yield
    except BaseException:
        _finish(1)
        raise
    _finish(0)


def _finish(status: int) -> None:
    wandb = sys.modules.get("wandb")
    run = wandb.run if wandb is not None else None
    if wandb is None or run is None:
        return
    offline, folder = run.settings.mode in OFFLINE, run.settings.sync_dir
    wandb.finish(exit_code=status)
    if offline:
        print(f"W&B run kept on this machine; to upload it: wandb sync {shlex.quote(str(folder))}")


class CSVLogger(loggers.CSVLogger):
    """One file `metrics.csv` for a run, on any number of processes, however often it is stopped and resumed.

    A row is in the file as soon as it is logged.

    Args:
        save_dir: The folder of the run.
        name: The folder of the file in it.
        resumed_at: Rows of the steps before are kept, later ones dropped.
    """

    def __init__(self, save_dir: str | Path, name: str = "metrics", resumed_at: int | None = None) -> None:
        super().__init__(save_dir, name=name, version="", flush_logs_every_n_steps=1)
        self._below = resumed_at or 0

    @property
    def log_dir(self) -> str:
        """The folder of the file."""
        return self.root_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file, on the first process."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir, self._below)
        return self._experiment  # type: ignore[return-value]


class MetricsFile(ExperimentWriter):
    """Rows of metrics in a CSV file whose columns may grow.

    A row is appended; where it has a new column, the file is written anew under another name and then renamed, so a
    stop at any time leaves a whole file, perhaps with a part of its last row, which is dropped on reading.

    Args:
        log_dir: The folder of `metrics.csv`.
        below: Rows of an existing file are kept if their step is smaller than this.
    """

    def __init__(self, log_dir: str, below: float = 0) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        self._below = below

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the rows of the stopped run."""

    def save(self) -> None:
        """Write the rows logged since the last call.

        Raises:
            RunError: If the file can't be written.
        """
        if not self.metrics:
            return
        try:
            if set().union(*self.metrics) <= set(self.metrics_keys):
                with self._path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self.metrics_keys, lineterminator="\n").writerows(self.metrics)
            else:
                self._rewrite()
        except OSError as error:
            raise RunError(f"{self._path} couldn't be written ({error.strerror or error}): make room") from error
        self.metrics = []

    def _rewrite(self) -> None:
        rows: list[Mapping[str, Any]] = [*read_rows(self._path, self._below), *self.metrics]
        self._below = math.inf  # from now on every row of the file is this run's
        self.metrics_keys = sorted(set[str]().union(*rows))
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)


def read_rows(path: Path, below: float = math.inf) -> list[dict[str, str]]:
    """The whole rows of a file of metrics, without their empty cells.

    Args:
        path: The file; no rows if there is none.
        below: Only rows whose step is smaller.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    header, *rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines())) or [[]]
    whole = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    kept = [row for row in whole if row.get("step", "").isdigit() and int(row["step"]) < below]
    return [{key: value for key, value in row.items() if value != ""} for row in kept]


class TensorBoardLogger(loggers.TensorBoardLogger):
    """One folder for a run; TensorBoard hides what a stopped run had logged after the checkpoint it is resumed from.

    Args:
        save_dir: The folder of the run.
        resumed_at: What there is of this step and later is hidden.
        options: Those of Lightning's logger.
    """

    def __init__(self, save_dir: str | Path, resumed_at: int | None = None, **options: Any) -> None:
        super().__init__(save_dir, purge_step=resumed_at, **options)


class WandbLogger(loggers.WandbLogger):
    """One run of W&B for a run: its id is kept in `wandb_id.txt` in the run's folder.

    W&B can't take rows back: those after the checkpoint that a run is resumed from appear twice, with the same
    `trainer/global_step`. A job of a Hydra sweep is named by the sweep's folder and its own number, and grouped by the
    folder.

    Args:
        save_dir: The folder of the run.
        offline: Keep the run on this machine, as with WANDB_MODE=offline.
        log_checkpoint: Upload the chosen checkpoint too.
        resumed_at: Other than None, the stopped run of W&B is continued, if it had come so far.
        options: Those of Lightning's logger and of `wandb.init`; None leaves W&B its own choice.

    Raises:
        SettingError: On the first process, if the run would need an account and there is no login. Never asks for one.
    """

    def __init__(
        self,
        save_dir: str | Path,
        offline: bool = False,
        log_checkpoint: bool = False,
        resumed_at: int | None = None,
        **options: Any,
    ) -> None:
        given = {key: value for key, value in options.items() if value is not None}
        super().__init__(save_dir=save_dir, **{**_named_by_sweep(), **given})
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # W&B warns of Lightning's default
        self.log_checkpoint = log_checkpoint
        self._id_file = Path(save_dir) / "wandb_id.txt"
        if resumed_at is not None and self._id_file.exists():
            self._id = self._wandb_init["id"] = self._id_file.read_text(encoding="utf-8").strip()
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._settle("offline" if offline else _mode())

    def _settle(self, mode: str) -> None:
        """Choose the mode before W&B does, who would ask where there is a terminal."""
        import wandb

        if mode in OFFLINE:
            quiet = wandb.Settings(silent=True)  # `own_run` says how to upload the run
            self._wandb_init = {"settings": quiet, **self._wandb_init, "mode": "offline"}
        elif mode != "disabled" and not _logged_in():
            raise SettingError(f"logger=wandb needs a login to W&B, and there is none: {WITHOUT_LOGIN}")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B, on the first process."""
        if self._experiment is None:
            self._begin()
        return self._experiment

    def _begin(self) -> None:
        import wandb

        try:
            run = super().experiment
        except wandb.errors.Error as error:
            raise SettingError(f"W&B doesn't begin a run ({' '.join(str(error).split())}): {WITHOUT_LOGIN}") from error
        self._id_file.parent.mkdir(parents=True, exist_ok=True)
        self._id_file.write_text(f"{run.id}\n", encoding="utf-8")


def _mode() -> str:
    """How W&B is to be used: what the environment says, or else what `wandb offline` has stored."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or str(wandb.setup().settings.mode)
    if mode not in MODES:
        raise unknown("mode of W&B", mode, MODES, "WANDB_MODE")
    return mode


def _logged_in() -> bool:
    """Whether W&B finds credentials; nobody is asked, and nothing is sent."""
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # an older W&B, which only asks
        return bool(wandb.api.api_key)
    except wandb.errors.Error as error:
        raise SettingError(
            f"W&B can't use the login that it finds ({' '.join(str(error).split())}): {WITHOUT_LOGIN}"
        ) from error


def _named_by_sweep() -> dict[str, str]:
    """Group and name of a job of a Hydra sweep; nothing for a single run, or where the environment names them."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or hydra.mode != RunMode.MULTIRUN:
        return {}
    folder = Path(hydra.sweep.dir)
    group = folder.name if folder.is_absolute() else folder.as_posix()
    found = {"group": (group, "WANDB_RUN_GROUP"), "name": (f"{folder.name}-{hydra.job.num}", "WANDB_NAME")}
    return {key: text[-128:] for key, (text, variable) in found.items() if variable not in os.environ}
