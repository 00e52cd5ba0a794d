"""The words of a command line: Hydra's flags and overrides, in any order."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra._internal.utils import get_args_parser  # what `hydra.main` itself parses with

SHOWS = ("help", "hydra_help", "cfg", "info", "shell_completion", "experimental_rerun")

FILES = ("path", "root", "checkpoint", "certified", "resume")
"""Settings that name a file or a folder, by the last part of their keys."""


@dataclass(frozen=True)
class CommandLine:
    """Flags and overrides of `wdat train` or `wdat evaluate`.

    Attributes:
        flags: Hydra's flags that were given, by their long names, such as `{"config_name": "mine", "multirun": True}`.
        overrides: `key=value`, in the order in which Hydra applies them.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str]) -> CommandLine:
        """Read words; `~` at the beginning of a value is the user's home, as in a shell."""
        found = vars(get_args_parser().parse_intermixed_args(list(words)))
        overrides = tuple(_as_text(_at_home(override)) for override in found.pop("overrides"))
        return cls({name: value for name, value in found.items() if value not in (None, False)}, overrides)

    @property
    def words(self) -> list[str]:
        """The words that `parse` reads as this."""
        flags = [(f"--{name.replace('_', '-')}", value) for name, value in self.flags.items()]
        return [word for flag, value in flags for word in ([flag] if value is True else [flag, value])] + [
            *self.overrides
        ]

    @property
    def runs(self) -> bool:
        """Whether something is to run, rather than a text to be shown."""
        return not any(name in self.flags for name in SHOWS)

    def get(self, key: str) -> str:
        """The text that the last override of a key sets, without quotes; empty if there is none."""
        texts = [text for name, _, text in (o.partition("=") for o in self.overrides) if name.lstrip("+") == key]
        return unquoted(texts[-1]) if texts else ""

    def add(self, *overrides: str) -> CommandLine:
        """With further overrides, which win."""
        return replace(self, overrides=(*self.overrides, *overrides))


def _at_home(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key}={quoted(os.path.expanduser(value))}" if value.startswith("~") and "," not in value else override


def _as_text(override: str) -> str:
    """A file that is called like a number or a truth value is none: `data.path=2024`."""
    key, _, value = override.partition("=")
    if key.rpartition(".")[2] not in FILES or not re.fullmatch(
        r"[+-]?[\d_.]+(e[+-]?\d+)?|true|false|nan|inf", value, re.I
    ):
        return override
    return f"{key}={quoted(value)}"


def quoted(text: object) -> str:
    """Text as one value in Hydra's grammar, where commas, brackets and braces have meanings."""
    return "'" + str(text).replace("'", r"\'") + "'"


def unquoted(text: str) -> str:
    """The inverse of `quoted`; text without quotes as it is."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return text
