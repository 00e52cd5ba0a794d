"""The folder of a run: one that can be written, and going on with a stopped run in its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from wdat.errors import SettingError

KEY = "resume="


def resumed_arguments(arguments: Sequence[str], checkpoint: str | None = "checkpoints/last.ckpt") -> list[str]:
    """The command line of a run to resume: the stopped run's overrides, then the new ones, then its folder.

    A run must go on in its own folder, because the choice of the best checkpoint is tied to it.

    Args:
        arguments: Overrides as typed, with or without `resume=RUN_DIR`.
        checkpoint: The file in the folder without which there is nothing to resume; None for none.

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
    if not overrides.exists():
        raise SettingError(f"resume={run} is not the folder of a run: there is no {overrides}")
    if checkpoint and not (run / checkpoint).exists():
        raise SettingError(f"resume={run} has no {checkpoint}: the run stopped before its first epoch; start it again")
    old = [str(a) for a in OmegaConf.load(overrides) if not str(a).startswith(KEY)]
    new = [a for a in arguments if not a.startswith(KEY)]
    quoted = "'" + str(run).replace("'", r"\'") + "'"  # in Hydra's grammar commas, brackets and braces have meanings
    return [*old, *new, f"hydra.run.dir={quoted}", f"{KEY}{quoted}"]


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


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text
