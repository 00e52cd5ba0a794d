"""Checkpoints that a stop, a full disk or a damaged file can't take away."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from wdat.errors import DIVERGED, RunError, SettingError
from wdat.models.reading import broken_part

FOLDER, LAST = "checkpoints", "last.ckpt"


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file beside the old checkpoint, then renames; keeps the checkpoint before.

    At every moment there is a whole checkpoint under the old name or the new one. Nothing is unpickled.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save, or leave what was there as it is.

        Raises:
            RunError: If a weight isn't finite, or the file can't be written.
        """
        path = Path(path)
        _check_finite(checkpoint.get("state_dict", {}), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        buffer = io.BytesIO()  # first, because torch.save hides what the file system says
        torch.save(checkpoint, buffer)
        try:
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                aside = path.with_name(path.name + ".old")
                aside.unlink(missing_ok=True)
                _twin(path, aside)  # so that `path` is never missing
                os.replace(aside, previous(path))
            os.replace(temporary, path)
        except OSError as error:
            for left in (temporary, path.with_name(path.name + ".old")):
                left.unlink(missing_ok=True)
            reason = error.strerror or _first_line(error)
            kept = f"; {path.name} is still that of before" if path.exists() else ""
            raise RunError(
                f"the checkpoint {path} couldn't be written ({reason}){kept}: make room, then use "
                f"resume={path.parent.parent}"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Tensors and plain values only, whatever `weights_only` says."""
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded


def _twin(path: Path, other: Path) -> None:
    """The same file under another name; a copy where the file system has no hard links, as exFAT and network drives."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _check_finite(weights: dict[str, Any], path: Path) -> None:
    broken = [k for k, v in weights.items() if isinstance(v, Tensor) and v.is_floating_point() and not _finite(v)]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise RunError(
            f"the weights {broken[0]}{more} are no longer finite, so {path.name} wasn't written"
            f"{' over' if path.exists() else ''}: {DIVERGED}, resume={path.parent.parent}"
        )


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is whole and can be loaded."""
    if not path.exists():
        return "it doesn't exist"
    try:
        if broken := broken_part(path):
            return f"its part {broken} is damaged"
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of itself
        return _first_line(error) or type(error).__name__
    missing = [key for key in ("state_dict", "loops", "optimizer_states") if key not in loaded]
    return f"it has no {missing[0]}" if missing else None


def steps(path: Path) -> int:
    """Steps that were made when a checkpoint was written; its tensors are not read."""
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def resume_hint(run: Path) -> str:
    """What the user can do with a run that has ended before its time."""
    if (run / FOLDER / LAST).exists():
        return f"continue with resume={run}"
    return "nothing was saved yet: start the run again"


def newest(run: Path) -> tuple[Path, str | None]:
    """The newest whole checkpoint of a run, and what to tell the user if it isn't the last one.

    Args:
        run: The run's folder.

    Raises:
        SettingError: If none can be used.
    """
    last = run / FOLDER / LAST
    fault = damage(last)
    if fault is None:
        return last, None
    before = previous(last)
    second = damage(before)
    if second is not None:
        raise SettingError(
            f"resume={run}: {last.name} can't be used ({fault}), nor can {before.name} ({second}); start the run again"
        )
    return before, (
        f"{last.name} can't be used ({fault}): resumed from the checkpoint before it, {before.name}, "
        f"step {steps(before)}"
    )
