"""What Hydra can't compose, told as everything else is: the setting at fault, and what to type."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wdat.cli import CONF
from wdat.cli.arguments import CommandLine
from wdat.errors import SettingError, quoted, unknown

SUCCEEDED = {
    "train": {"data.balanced": "every limit is drawn by class; leave it out"},
    "evaluate": {
        "data.balanced": "every limit is drawn by class; leave it out",
        "device": "trainer.accelerator=cpu (or gpu) and trainer.devices=1 choose the device",
        "process_timeout": "the strategy has a timeout: "
        "trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,timeout:{_target_:datetime.timedelta,"
        "seconds:1800}}",
    },
}
"""Settings that there were, and what takes their place."""

Compose = Callable[[CommandLine], DictConfig]


def check_keys(line: CommandLine, command: str) -> None:
    """Refuse settings that there were once, and a folder of configurations that isn't there.

    Args:
        line: As typed.
        command: `train` or `evaluate`.
    """
    folder = line.flags.get("config_dir")
    if folder is not None and not Path(folder).is_dir():
        raise SettingError(f"--config-dir={folder}: there is no such folder")
    for key in map(_key, line.overrides):
        if key in SUCCEEDED[command]:
            raise SettingError(f"{key}= is gone: {SUCCEEDED[command][key]}")


def composed(compose: Compose, line: CommandLine) -> DictConfig:
    """The configuration of a command line.

    Args:
        compose: Composes it by Hydra.
        line: As typed.

    Raises:
        SettingError: If an override can't be read, or names a setting or a choice that isn't there.
        HydraException: Whatever else Hydra refuses.
    """
    for override in line.overrides:
        try:
            OverridesParser.create().parse_override(override)
        except (OverrideParseException, HydraException) as error:
            raise _unreadable(override) from error
        if override.partition("=")[2] == "null" and (CONF / _key(override)).is_dir():
            raise _no_such_choice(_key(override), "null", _choices(_key(override)))
    try:
        return compose(line)
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if not group or error.options is None:
            raise
        raise _no_such_choice(group, name, error.options) from error
    except (HydraException, OmegaConfBaseException) as error:
        for override in line.overrides:
            if not override.startswith(("+", "~")) and f"'{_key(override)}'" in str(error):
                raise _no_such_setting(override, compose, line) from error
        raise


def check_single(line: CommandLine) -> None:
    """Refuse several values of one setting where nothing is swept.

    Raises:
        SettingError: If there are several.
    """
    for parsed in OverridesParser.create().parse_overrides(list(line.overrides)):
        if parsed.is_sweep_override():
            key, _, value = str(parsed.input_line).partition("=")
            raise SettingError(
                f'{key}={value} names several values: -m runs each of them, "{key}=[{value}]" is a list, and '
                f"{quoted(key, value)} is one text"
            )


def check_complete(cfg: DictConfig) -> None:
    """Refuse a run without a setting that has to be given.

    Raises:
        SettingError: If there is one.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)  # others may refer to it
    for key, value in _settings(plain):
        if value == "???":
            raise SettingError(f"{key} must be set: add {key}=... to the command line")


def _unreadable(override: str) -> SettingError:
    key, sign, value = override.partition("=")
    if not sign or not key:
        return SettingError(f"{override} is no setting: write key=value, such as threat.delta=8/255")
    return SettingError(
        f"{override} can't be read, because characters such as = , [ ] {{ }} ( ) : and quotes mean something to Hydra: "
        f"write {quoted(key, value)}"
    )


def _no_such_choice(group: str, name: str, options: Sequence[str]) -> SettingError:
    shown = [option for option in options if not option.startswith("_")]
    if name == "null" and "none" in shown:
        return SettingError(f"{group}=null: write {group}=none")
    missing = unknown("choice", name, shown, group)
    if group != "model":
        return missing
    from wdat.models import zoo  # robustbench takes seconds

    parts = [entry for entry in zoo.entries() if entry.name == name]
    if not parts:
        return SettingError(f"{missing}; a network of RobustBench's zoo is model=robustbench model.name=NAME")
    usual = [entry for entry in parts if (entry.dataset, entry.threat_model) == ("cifar10", "Linf")]
    where = "" if usual else f" model.dataset={parts[0].dataset} model.threat_model={parts[0].threat_model}"
    return SettingError(
        f"model={name} is a network of RobustBench's zoo: write model=robustbench model.name={name}{where}"
    )


def _no_such_setting(override: str, compose: Compose, line: CommandLine) -> SettingError:
    """The error for a key that isn't there, with those that are called alike."""
    key = _key(override)
    others = CommandLine(line.flags, tuple(o for o in line.overrides if _key(o) != key))
    try:
        known = _keys(compose(others))
    except (HydraException, OmegaConfBaseException):  # another one isn't there either
        known = []
    last = key.rpartition(".")[2]
    beside = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    same = [k for k in known if k.rpartition(".")[2] == last]
    if same:
        alike = dict.fromkeys([*difflib.get_close_matches(key, beside, n=1, cutoff=0.8), *same[:4]])
        return SettingError(f"there is no setting {key}: did you mean {', '.join(alike)}?")
    if (CONF / key).is_dir():
        return SettingError(f"{key} is no setting of this command")
    return SettingError(f"{unknown('setting', key, beside or known, override)}; +{key}=... adds one")


def _keys(cfg: DictConfig) -> list[str]:
    """The dotted keys of all settings, but for Hydra's own."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    return [key for key, _ in _settings({name: value for name, value in plain.items() if name != "hydra"})]


def _settings(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with what they stand for, groups included."""
    for name, inner in value.items():
        yield f"{prefix}{name}", inner
        if isinstance(inner, dict):
            yield from _settings(inner, f"{prefix}{name}.")


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml") if not file.stem.startswith("_"))
