"""The command line of a run that is resumed: what it was begun with, as far as that can be trusted.

The folder may be somebody else's, and some overrides can run programs. What this user has begun on this machine carries
a signature, with a key that lies in the user's own files; all else must be repeated on the command line.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from wdat.cli import CONF
from wdat.cli.arguments import CommandLine, quoted
from wdat.errors import SettingError

SIGNATURE = "signature"
CONFIG_NAMES = ("config", "evaluate")


def resumed(line: CommandLine) -> CommandLine:
    """The command line of a run to resume: the stopped run's flags and overrides, then the new ones, then its folder.

    Args:
        line: As typed, with or without `resume=RUN_DIR`.

    Returns:
        The line unchanged where there is nothing to resume.

    Raises:
        SettingError: If the folder isn't a run's, or brings what could run programs of others.
    """
    folder = line.get("resume")
    if folder in ("", "null"):
        return line
    if "multirun" in line.flags:
        raise SettingError(f"resume={folder} resumes one run, not a sweep: leave out --multirun")
    run = Path(os.path.expanduser(folder))
    hydra, task = run / ".hydra" / "hydra.yaml", run / ".hydra" / "overrides.yaml"
    if not task.is_file():
        raise SettingError(f"resume={run} is not the folder of a run: there is no {task}")
    began = _begun_with(hydra, task)
    new = CommandLine(line.flags, tuple(o for o in line.overrides if not o.startswith("resume=")))
    flags = {name: value for name, value in began.flags.items() if name not in new.flags}
    old = tuple(o for o in began.overrides if o not in new.overrides)
    strange = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()] + list(filter(_foreign, old))
    if strange and not _signed(hydra, task):
        raise SettingError(
            f"resume={run}: {task.parent} has {strange[0]!r}, which can run programs from outside the project: if you "
            "trust it, repeat it on the command line"
        )
    here = ("hydra.mode=RUN", f"hydra.run.dir={quoted(run)}", f"resume={quoted(run)}")
    return CommandLine({**new.flags, **flags}, (*old, *new.overrides, *here))


def _begun_with(hydra: Path, task: Path) -> CommandLine:
    """The flags and overrides that choose a run's configuration."""
    written: Any = OmegaConf.to_container(OmegaConf.load(task), resolve=False)  # what is in `${}` stays there
    overrides = [str(o) for o in written if not str(o).startswith("resume=")]
    if not hydra.is_file():
        return CommandLine({}, tuple(overrides))
    about: Any = OmegaConf.load(hydra).hydra
    paths = [str(o) for o in about["overrides"]["hydra"] if str(o).startswith("hydra.searchpath=")]
    flags = {}
    if about["job"]["config_name"] not in CONFIG_NAMES:
        flags["config_name"] = about["job"]["config_name"]
    for source in about["runtime"]["config_sources"]:
        if source["provider"] == "command-line":
            flags["config_dir"] = source["path"]
    return CommandLine(flags, (*paths, *overrides))


def _foreign(override: str) -> bool:
    """Whether an override is more than a setting: a flag, a class, a setting of Hydra's, or a file for a group."""
    key, _, value = override.lstrip("+~").partition("=")
    group = (CONF / (key.partition("@")[0] or "-")).is_dir()  # whose choice names a file
    elsewhere = group and (".." in value or "${" in value or value.strip("'\" [").startswith("/"))
    return override.startswith("-") or key.startswith("hydra") or "_target_" in override or elsewhere


def signature(hydra: bytes, task: bytes, create: bool = False) -> bytes | None:
    """What only this user's own key makes of the flags and overrides of a run; None where there can be no key.

    Args:
        hydra: The content of `hydra.yaml`.
        task: The content of `overrides.yaml`.
        create: Whether to make a key where there is none.
    """
    key = _key(create)
    return key and hmac.new(key, hydra + b"\0" + task, hashlib.sha256).hexdigest().encode()


def _signed(hydra: Path, task: Path) -> bool:
    file = task.with_name(SIGNATURE)
    if not (file.is_file() and hydra.is_file()):
        return False
    own = signature(hydra.read_bytes(), task.read_bytes())
    return own is not None and hmac.compare_digest(own, file.read_bytes())


def _key(create: bool) -> bytes | None:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "wdat" / "key"
    try:
        if create and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
                new.write(secrets.token_bytes(32))
        return file.read_bytes()
    except FileExistsError:  # another process was faster
        return file.read_bytes()
    except OSError:
        return None
