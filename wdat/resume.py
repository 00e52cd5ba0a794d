"""Going on with a stopped run, in its own folder and with its own configuration."""

from __future__ import annotations

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


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text
