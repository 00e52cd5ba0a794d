"""Reads sweep files: what they say of themselves, and the runs that they ask for.

A run is the list of overrides that `train.py` is given. Both kinds of file state a grid; its runs are the product.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

FOLDER = Path(__file__).parent
CONF = FOLDER.parent / "conf"
KINDS = ("hydra", "wandb")
Point = tuple[str, ...]  # overrides of one run


def names() -> list[str]:
    """The questions, by name."""
    return sorted({file.stem for kind in KINDS for file in (FOLDER / kind).glob("*.yaml")})


def path(kind: str, name: str) -> Path:
    """The file of one kind (`hydra` or `wandb`) on one question."""
    return FOLDER / kind / f"{name}.yaml"


def header(kind: str, name: str) -> dict[str, str]:
    """The comment at the head of a file, by its words before a colon: Question, Look at, Cost, Run."""
    said: dict[str, str] = {}
    word = ""
    for line in path(kind, name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        started = re.match(r"# ([A-Z][a-z ]+?): +(.*)", line)
        word = started[1] if started else word
        said[word] = " ".join([*([said[word]] if word in said else []), started[2] if started else line[1:].strip()])
    return said


def load(kind: str, name: str) -> dict[str, Any]:
    """A file's content."""
    return dict(OmegaConf.to_container(OmegaConf.load(path(kind, name)), resolve=False))  # type: ignore[arg-type]


def axes(kind: str, name: str, instead: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """The values of each key that a file sets, as text.

    Args:
        kind: `hydra` or `wandb`; of a W&B file these are the parameters alone, not what its command fixes.
        name: Of the question.
        instead: Values, separated by commas, that take the place of the file's own, by key.
    """
    content, instead = load(kind, name), instead or {}
    if kind == "hydra":
        params = {key: str(value) for key, value in content["hydra"]["sweeper"]["params"].items()}
        params |= {key: value for key, value in instead.items() if key in params}
        return {key: _listed(key, value) for key, value in params.items()}
    found = {}
    for key, stated in content["parameters"].items():
        values = stated["values"] if "values" in stated else [stated["value"]]
        found[key] = _listed(key, instead[key]) if key in instead else [str(value) for value in values]
    return found


def _listed(key: str, values: str) -> list[str]:
    (override,) = OverridesParser.create().parse_overrides([f"{key}={values}"])
    if not override.is_sweep_override():
        return [values]
    return [str(value) for value in override.sweep_string_iterator()]


def points(kind: str, name: str, instead: Mapping[str, str] | None = None) -> list[Point]:
    """The runs that a file asks for, in order."""
    found = axes(kind, name, instead)
    return [tuple(f"{k}={v}" for k, v in zip(found, one, strict=True)) for one in itertools.product(*found.values())]


def composed(point: Sequence[str], config: str = "config") -> DictConfig:
    """What `train.py` is given for one run, Hydra's own part included.

    Args:
        point: Overrides.
        config: The configuration that they override: `config`, or a Hydra sweep's name.
    """
    first, second = (CONF, FOLDER / "hydra") if config == "config" else (FOLDER / "hydra", CONF)
    with initialize_config_dir(str(first), version_base="1.3"):
        return compose(config, [*point, f"hydra.searchpath=['file://{second}']"], return_hydra_config=True)


def expanded(
    sweep: Mapping[str, Any], point: Sequence[str], interpreter: str = "python", env: str = "/usr/bin/env"
) -> list[str]:
    """The command line of one run, from a W&B sweep's `command`, as W&B's agent makes it.

    Raises:
        ValueError: If the command has a macro that isn't known here.
    """
    macros = {
        "${env}": [env],
        "${interpreter}": [interpreter],
        "${program}": [str(sweep["program"])],
        "${args_no_hyphens}": list(point),
        "${args}": [f"--{argument}" for argument in point],
    }
    line: list[str] = []
    for word in map(str, sweep["command"]):
        if word.startswith("${") and word.endswith("}") and word not in macros:
            raise ValueError(f"{word} in a sweep's command: known are {', '.join(macros)}")
        line += macros.get(word, [word])
    return line
