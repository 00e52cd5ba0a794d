"""The folder of a run: what may be written into it, decided before anything is.

Hydra itself writes nothing (`NOTHING_BY_HYDRA`); `RunFolder` writes `.hydra` once it has found that the folder is free,
or that it belongs to the run that is resumed. A command that is refused leaves every folder as it was.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wdat.cli import origin
from wdat.errors import SettingError
from wdat.folders import absent, remove_empty
from wdat.records import read
from wdat.terminal import without_secret

NOTHING_BY_HYDRA = ("hydra.output_subdir=null", "hydra/job_logging=stdout")
OTHER = "name another folder (hydra.run.dir=...)"
ABSENT = object()
SCRIPTS = {"train": "train.py", "evaluate": "evaluate.py"}
FILES = ("config.yaml", "hydra.yaml", "overrides.yaml", origin.SIGNATURE)
CHECKPOINTS = ("checkpoints/last.ckpt", "checkpoints/last.previous.ckpt")
RESULTS = ("records.json", "checkpoints/*.ckpt", "nearest_*.pt")
ALLOWED = {
    "train": "its length, devices, loggers, evaluation and learning rate (trainer, logger, callbacks, ...)",
    "evaluate": "what is measured of the same network on the same data",
}
MAY_CHANGE = (
    "trainer", "logger", "callbacks", "evaluation", "resume", "optimizer.lr", "finetune.channels_last",
    "finetune.compile", "data.root", "data.download", "data.eval_batch_size", "data.on_device", "data.workers",
)  # fmt: skip
"""What a resumed training may change: its length, devices, loggers, evaluation and learning rate."""
FIXED = ("model", "data.source", "data.path", "data.num_classes")
"""What a resumed evaluation may not change: records of several networks or sets would share a folder."""
FILE_KEYS = ("data.path", "data.synthetic.path", "model.checkpoint")  # files that may be moved, but not renamed


def create(path: Path, exclusive: bool = False, setting: str = "hydra.run.dir") -> tuple[Path, list[Path]]:
    """Make a folder that can be written.

    Args:
        path: The folder, which may exist.
        exclusive: Whether it must be new; where it exists, a number is appended to its name. No two processes get the
            same one.
        setting: What names it.

    Returns:
        The folder, and the folders that were made, the outermost first.

    Raises:
        SettingError: If the folder can't be made or written.
    """
    made = absent(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if exclusive:
            path = _new(path)
            made = [*(folder for folder in made if folder in path.absolute().parents), path]
        path.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:  # such as a name with a null character
        remove_empty(made)
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingError(f"{setting}={path} can't be written ({reason}): name another folder") from error
    return path, made


def _new(path: Path) -> Path:
    """Make the first folder of `path`, `path_2`, `path_3`, ... that nobody has made yet."""
    for candidate in itertools.chain([path], (path.with_name(f"{path.name}_{k}") for k in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            break
    return candidate


class RunFolder:
    """The folder of one training or evaluation.

    Args:
        path: The folder.
        command: `train` or `evaluate`.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path, self.command = path, command

    def check(self, cfg: DictConfig) -> list[str]:
        """Refuse a run that would spoil what the folder holds.

        Args:
            cfg: The run's configuration.

        Returns:
            For a resumed run, a line for each setting that it changes.

        Raises:
            SettingError: If the folder holds another run, or one that can't be resumed with this configuration.
        """
        return self._check_resumed(cfg) if cfg.get("resume") else self._check_free()

    @contextlib.contextmanager
    def opened(self, cfg: DictConfig, hydra: DictConfig) -> Iterator[list[str]]:
        """Hold the folder for a run that begins or is resumed.

        Where the block fails before it has saved any result, the folder is again as it was.

        Args:
            cfg: The run's configuration.
            hydra: Hydra's own.

        Yields:
            What `check` returns.

        Raises:
            SettingError: As `check` does, or if another process is writing into the folder.
        """
        with self._locked():
            changes = self.check(cfg)
            folder = self.path / ".hydra"
            before, results = {name: _content(folder / name) for name in FILES}, self._results()
            about = {"config.yaml": cfg, "hydra.yaml": hydra, "overrides.yaml": hydra.hydra.overrides.task}
            texts = {name: OmegaConf.to_yaml(value).encode() for name, value in about.items()}
            signed = origin.signature(texts["hydra.yaml"], texts["overrides.yaml"], create=True)
            try:
                self._write(folder, {**texts, origin.SIGNATURE: signed})
                yield changes
            except BaseException:
                if self._results() == results:
                    with contextlib.suppress(OSError):  # a full disk: what it was about is raised
                        self._write(folder, before)
                raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes of this machine out; the lock goes with the process, however that ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SettingError(
                    f"another process is writing into hydra.run.dir={self.path}: wait for it, or name another folder"
                ) from error
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(handle)

    @staticmethod
    def _write(folder: Path, texts: dict[str, bytes | None]) -> None:
        """Write or delete files, each of them whole; a folder that is left empty goes too."""
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            if text is None:
                (folder / name).unlink(missing_ok=True)
                continue
            temporary = folder / f"{name}.tmp"
            temporary.write_bytes(text)
            os.replace(temporary, folder / name)
        remove_empty([folder])

    def _results(self) -> set[tuple[str, int, int]]:
        """What tells results from others: their names, sizes and times."""
        files = [(str(file), file.stat()) for pattern in RESULTS for file in self.path.glob(pattern)]
        return {(name, about.st_size, about.st_mtime_ns) for name, about in files}

    def _check_free(self) -> list[str]:
        records = read(self.path / "records.json")
        stages = {record.stage for record in records}
        epochs = {record.epoch for record in records if record.stage == "epoch"}
        here = f"hydra.run.dir={self.path} holds"
        if "evaluate" in stages:
            raise SettingError(f"{here} an evaluation: resume it with evaluate.py resume={self.path}, or {OTHER}")
        if any((self.path / name).exists() for name in CHECKPOINTS):
            raise SettingError(f"{here} a run: resume it with train.py resume={self.path}, or {OTHER}")
        # A training that stopped before its first checkpoint may begin again; a full disk may have left a best one.
        if "after" in stages or len(epochs) > 1 or (records and self.command == "evaluate"):
            raise SettingError(f"{here} the records of a run that has no checkpoint any more: {OTHER}")
        return []

    def check_kind(self) -> dict[str, Any]:
        """The settings that a run to be resumed was begun with, by their dotted keys.

        Raises:
            SettingError: If it is no run of this command.
        """
        begun = self.path / ".hydra" / "config.yaml"
        if not begun.is_file():
            raise SettingError(f"resume={self.path} is not the folder of a run: there is no {begun}")
        settings = _leaves(OmegaConf.to_container(OmegaConf.load(begun), resolve=False))
        kind = "evaluate" if "deltas" in settings else "train"
        if kind != self.command:
            what = "an evaluation" if kind == "evaluate" else "a training"
            measured = "" if kind == "evaluate" else f"; model.checkpoint={self.path}/checkpoints/best.ckpt is measured"
            raise SettingError(f"resume={self.path} is {what}: use {SCRIPTS[kind]} resume={self.path}{measured}")
        return settings

    def _check_resumed(self, cfg: DictConfig) -> list[str]:
        old = self.check_kind()
        if self.command == "train" and not any((self.path / name).exists() for name in CHECKPOINTS):
            raise SettingError(
                f"resume={self.path} has no {CHECKPOINTS[0]}: the run stopped before it saved anything; start it again"
            )
        read(self.path / "records.json")  # refuses what is damaged
        new = _leaves(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(cfg)), resolve=False))
        keys = [key for key in {**old, **new} if old.get(key, ABSENT) != new.get(key, ABSENT)]
        lines = {key: f"{_shown(key, new)} (it was {_shown(key, old).partition('=')[2]})" for key in keys}
        refused = [key for key in keys if not self._may_change(key, old.get(key), new.get(key))]
        if refused:
            more = f" and {len(refused) - 1} more settings" if len(refused) > 1 else ""
            raise SettingError(
                f"resume={self.path} can't be resumed with {lines[refused[0]]}{more}: a resumed run changes only "
                f"{ALLOWED[self.command]}; for other settings start a new run in another folder (hydra.run.dir=...)"
            )
        return [lines[key] for key in keys if key != "resume"]

    def _may_change(self, key: str, old: object, new: object) -> bool:
        if key in FILE_KEYS and old and new and Path(str(old)).name == Path(str(new)).name:
            return True
        if self.command == "evaluate":
            return not _below(key, FIXED)
        return _below(key, MAY_CHANGE)


def _below(key: str, parents: tuple[str, ...]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """The settings of a configuration by their dotted keys; a list is one setting."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    inner = [_leaves(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()]
    return {name: item for leaves in inner for name, item in leaves.items()}


def _shown(key: str, settings: dict[str, Any]) -> str:
    if key not in settings:
        return f"{key}=nothing"
    value = settings[key]
    return without_secret(f"{key}={'null' if value is None else value}")
