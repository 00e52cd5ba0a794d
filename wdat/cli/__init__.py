"""The command line: train and evaluate, the folder of a run, and what the terminal shows."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""Hydra's groups: inside an installed package, beside a checkout's."""

COMMANDS = ("train", "evaluate", "models", "collect", "report")
USAGE = """\
usage: wdat COMMAND ...

Wasserstein distributional adversarial training of image classifiers.

commands:
  train     fine-tune a network: wdat train experiment=quickstart
  evaluate  measure the robustness of a network: wdat evaluate model=... "attacks=[pgd,wpgd,knapsack]"
  models    list the networks of RobustBench's zoo, export a trained one
  collect   one table of the records of many runs
  report    write the report of runs anew

wdat COMMAND --help tells more; wdat --version prints the version."""


def main() -> None:
    """Run the command that the first word names with the words after it."""
    import_module("wdat.terminal").prepare_environment()
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("train", "evaluate"):
        import_module("wdat.cli.app").run(command, skip=2)
    elif command == "--version":
        print("wdat", import_module("wdat").__version__)
    elif command in ("-h", "--help"):
        print(USAGE)
    else:
        with import_module("wdat.cli.console").readable_errors():
            if command not in COMMANDS:
                raise import_module("wdat.errors").unknown("command", command, COMMANDS, "wdat --help")
            import_module(f"wdat.cli.{command}").main(sys.argv[2:])
