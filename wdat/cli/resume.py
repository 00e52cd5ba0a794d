"""The folder of a run: one that can be written, and going on with a stopped run in its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from wdat.errors import SettingError

KEY = "resume="
GROUPS = (
    "attack", "averaging", "callbacks", "data", "experiment", "finetune", "logger", "model", "objective", "schedule",
    "sensitivity", "threat", "trainer",
)  # fmt: skip
"""Folders of configurations, from which an override chooses a file by name."""
CHECKPOINTS = ("checkpoints/last.ckpt", "checkpoints/last.previous.ckpt")


def resumed_arguments(arguments: Sequence[str], checkpoints: Sequence[str] = CHECKPOINTS) -> list[str]:
    """The command line of a run to resume: the stopped run's overrides, then the new ones, then its folder.

    A run must go on in its own folder, because the choice of the best checkpoint is tied to it.

    Args:
        arguments: Overrides as typed, with or without `resume=RUN_DIR`.
        checkpoints: Files in the folder of which there must be one, or there is nothing to resume; empty for none.

    Returns:
        The arguments unchanged where there is nothing to resume.

    Raises:
        SettingError: If the folder isn't a run's, or has no checkpoint yet.
    """
    asked = [a for a in arguments if a.startswith(KEY)]
    folder = _unquoted(asked[-1][len(KEY) :]) if asked else ""
    if folder in ("", "null"):
        return list(arguments)
    run = Path(folder)
    overrides = run / ".hydra" / "overrides.yaml"
    if not os.path.isfile(overrides):
        raise SettingError(f"resume={run} is not the folder of a run: there is no {overrides}")
    if checkpoints and not any((run / name).exists() for name in checkpoints):
        raise SettingError(
            f"resume={run} has no {checkpoints[0]}: the run stopped before it saved anything; start it again"
        )
    new = [a for a in arguments if not a.startswith(KEY)]
    written: Any = OmegaConf.to_container(OmegaConf.load(overrides), resolve=False)  # what is in `${}` stays there
    old = [str(a) for a in written if not str(a).startswith(KEY) and a not in new]
    foreign = [a for a in old if _foreign(a)]
    if foreign:
        raise SettingError(
            f"resume={run}: {overrides} has {foreign[0]!r}, which can run programs from outside the project: if you "
            "trust it, repeat it on the command line"
        )
    quoted = "'" + str(run).replace("'", r"\'") + "'"  # in Hydra's grammar commas, brackets and braces have meanings
    flags, new = [a for a in new if a.startswith("-")], [a for a in new if not a.startswith("-")]
    return [*flags, *old, *new, f"hydra.run.dir={quoted}", f"{KEY}{quoted}"]


def _foreign(override: str) -> bool:
    """Whether an override is more than a setting: a flag, a class, a setting of Hydra's, or a file for a group.

    The folder to resume may be somebody else's. Hydra itself never records flags or its own settings there.
    """
    key, _, value = override.lstrip("+~").partition("=")
    group = key.partition("@")[0].partition("/")[0] in GROUPS
    elsewhere = group and (".." in value or "${" in value or value.strip("'\" [").startswith("/"))
    return override.startswith("-") or key.startswith("hydra") or "_target_" in override or elsewhere


def check_folder(arguments: Sequence[str]) -> None:
    """Refuse a folder that can't be written, before any work.

    Args:
        arguments: Overrides; `hydra.run.dir=FOLDER` is looked at, unless Hydra has yet to fill in a part of it.

    Raises:
        SettingError: If the folder can't be made or written.
    """
    asked = [a for a in arguments if a.startswith("hydra.run.dir=")]
    folder = _unquoted(asked[-1].partition("=")[2]) if asked else ""
    if not folder or "${" in folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingError(f"hydra.run.dir={folder} can't be written ({reason}): name another folder") from error


def check_unused(folder: Path, file: str, what: str) -> None:
    """Refuse to write over what a folder holds.

    Args:
        folder: Of the run that is about to begin.
        file: What tells that another one was there.
        what: What that was, in words.

    Raises:
        SettingError: If the file is there.
    """
    if (folder / file).exists():
        raise SettingError(f"hydra.run.dir={folder} holds {what}: go on with resume={folder}, or name another folder")


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text
