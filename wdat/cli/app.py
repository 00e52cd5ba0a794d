"""`wdat train` and `wdat evaluate`: from the words of a command line, through Hydra, to the run and its figure.

Nothing heavy is imported before it is known that something is to run.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser  # as `hydra.main` does
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wdat.cli import CONF
from wdat.cli.arguments import CommandLine, quoted
from wdat.cli.console import quiet_libraries, readable_errors
from wdat.cli.launch import agreed, check_launch, cluster, join_group, rank
from wdat.cli.origin import resumed
from wdat.cli.run_folder import NOTHING_BY_HYDRA, RunFolder, create
from wdat.cli.sweep import Sweep
from wdat.errors import SettingError
from wdat.folders import remove_empty
from wdat.records import Record
from wdat.terminal import PlainConsole, prepare_environment

CONFIGS = {"train": "config", "evaluate": "evaluate"}
SUCCEEDED = {
    "device": "trainer.accelerator=cpu (or gpu) and trainer.devices=1 choose the device",
    "process_timeout": "the strategy has a timeout: "
    "trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,timeout:{_target_:datetime.timedelta,"
    "seconds:1800}}",
}


def run(command: str, skip: int = 1) -> None:
    """Run a command with the flags and overrides of `sys.argv`.

    Args:
        command: `train` or `evaluate`.
        skip: How many words of `sys.argv` name the program and the command; Lightning starts its processes with
            `sys.argv`.
    """
    prepare_environment()
    OmegaConf.register_new_resolver("wdat.choices", _choices, replace=True)
    program, sweep = sys.argv[:skip], Sweep()
    made: list[Path] = []

    def prepare(line: CommandLine, name: str) -> CommandLine:
        line = resumed(line)
        if line.get("resume") not in ("", "null"):
            RunFolder(Path(line.get("resume")), command).check_kind()
        found, folders = _prepared(line, command, name)
        made.extend(folders)
        return found

    def task(cfg: DictConfig) -> float | None:
        with readable_errors():
            return sweep.job(partial(_job, command, cfg))

    with readable_errors():
        line = CommandLine.parse(sys.argv[skip:])
        _check_keys(line, command)
        line = agreed(line, prepare) if line.runs else resumed(line)
    sys.argv = [*program, *line.words]
    setbase("1.3")
    parser = get_args_parser()
    try:
        _run_hydra(parser.parse_args(line.words), parser, task, str(CONF), CONFIGS[command])
    finally:
        remove_empty(made)
    sweep.end()


def _check_keys(line: CommandLine, command: str) -> None:
    keys = {override.lstrip("+~").partition("=")[0] for override in line.overrides}
    for key in keys & set(SUCCEEDED) if command == "evaluate" else ():
        raise SettingError(f"{key}= is gone: {SUCCEEDED[key]}")


def _prepared(line: CommandLine, command: str, name: str) -> tuple[CommandLine, list[Path]]:
    """The command line with the name of its folder, which is made; and the folders that were made."""
    line = line.add(*NOTHING_BY_HYDRA, *([] if line.get("hydra.job.name") else [f"hydra.job.name={command}"]))
    try:
        cfg = _compose(line, command)
        sweep = "multirun" in line.flags or cfg.hydra.mode == RunMode.MULTIRUN
        key = "sweep" if sweep else "run"
        written: Any = OmegaConf.to_container(cfg.hydra[key], resolve=False)
        HydraConfig.instance().set_config(cfg)  # for interpolations such as ${hydra:job.name}
        folder = Path(str(cfg.hydra[key].dir)).expanduser()
    except (HydraException, OmegaConfBaseException):
        return line, []  # Hydra composes it once more, and tells what is wrong
    finally:
        HydraConfig.instance().cfg = None
    raw = str(written["dir"])
    before, timed, _ = raw.partition("${now")
    if timed and name:
        folder, timed = Path(*folder.parts[: before.count("/")], name), ""
    if timed and cluster() is None and cfg.trainer.num_nodes != 1:
        raise SettingError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: every node would choose a folder for itself; start with "
            "torchrun, or name one for all with hydra.run.dir=FOLDER"
        )
    made: list[Path] = []
    if rank() == 0 and (timed or not sweep):
        folder, made = create(folder, exclusive=bool(timed))
    if rank() == 0 and not sweep:
        try:
            RunFolder(folder, command).check(OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k != "hydra"]))
        except BaseException:
            remove_empty(made)
            raise
    literal = not sweep or timed or name or raw.startswith("~")  # else a sweep's may depend on what is swept
    return (line.add(f"hydra.{key}.dir={quoted(folder)}") if literal else line), made


def _compose(line: CommandLine, command: str) -> DictConfig:
    """The configuration that Hydra will compose, with Hydra's own part; values that are swept are left out."""
    setbase("1.3")
    search = create_config_search_path(str(Path(line.flags.get("config_path", CONF)).resolve()))
    if "config_dir" in line.flags:
        extra = f"file://{Path(line.flags['config_dir']).resolve()}"
        search.prepend("command-line", extra, anchor=SearchPathQuery(provider="schema"))
    try:
        return Hydra.create_main_hydra2(command, search).compose_config(
            line.flags.get("config_name", CONFIGS[command]), list(line.overrides), RunMode.MULTIRUN,
            validate_sweep_overrides=False,
        )  # fmt: skip
    finally:
        GlobalHydra.instance().clear()


def _job(command: str, cfg: DictConfig) -> float | None:
    """One run within Hydra; its figure."""
    prepare_environment()
    join_group()  # before Lightning is imported, which asks for the rank
    quiet_libraries()
    hydra, work = HydraConfig.get(), {"train": _train, "evaluate": _evaluate}[command]
    run_dir = Path(hydra.runtime.output_dir)
    check_launch(cfg.trainer, hydra)
    if rank() > 0:
        warnings.simplefilter("ignore")  # the first process has the same
        return figure(work(cfg, run_dir))
    try:
        with RunFolder(run_dir, command).opened(cfg, OmegaConf.create({"hydra": hydra})) as changes:
            for change in changes:
                PlainConsole().print(f"resume  {change}")
            return figure(work(cfg, run_dir))
    except BaseException:
        if hydra.mode == RunMode.MULTIRUN:
            with contextlib.suppress(OSError):
                os.removedirs(run_dir)  # as far as they are empty
        raise


def _train(cfg: DictConfig, run_dir: Path) -> list[Record]:
    from wdat.cli.devices import memory_errors
    from wdat.cli.train import train
    from wdat.distributed import distributed_errors
    from wdat.training import loggers
    from wdat.training.checkpointing import resume_hint

    def smaller() -> str:
        return (
            "set a smaller data.batch_size, or data.eval_batch_size if it was evaluated (results don't depend on that "
            f"one), trainer.precision=bf16-mixed, or more trainer.devices; {resume_hint(run_dir)}"
        )

    with loggers.own_run(), distributed_errors(partial(resume_hint, run_dir)), memory_errors(smaller):
        return train(cfg, run_dir).records


def _evaluate(cfg: DictConfig, run_dir: Path) -> list[Record]:
    from wdat.cli.devices import memory_errors
    from wdat.cli.evaluate import evaluate, show
    from wdat.distributed import distributed_errors

    resume = f"resume with resume={run_dir}"
    smaller = f"set a smaller batch_size, on which results don't depend; {resume}"
    with distributed_errors(lambda: resume), memory_errors(lambda: smaller):
        results = evaluate(cfg, run_dir)
    if rank() == 0:
        show(results, run_dir, PlainConsole())
    return results.records


def figure(records: Sequence[Record]) -> float | None:
    """What a sweeper maximises: the accuracy under the strongest attack; None if nothing was attacked.

    Of a training it is the distributional accuracy on validation images after the best epoch
    (`val/acc_distributional`), of an evaluation that at its first budget, under the knapsack where it was run.
    """
    attacked = [r for r in records if r.attack not in ("none", "certified")]
    epochs = [r for r in attacked if r.stage == "epoch"]
    if epochs:
        shared = [r for r in epochs if not math.isinf(r.p)] or epochs
        strongest = [min(r.accuracy for r in shared if r.epoch == epoch) for epoch in {r.epoch for r in shared}]
        return max(strongest)
    last = [r for r in attacked if r.stage == attacked[-1].stage]
    first = [r for r in last if r.delta == last[0].delta]
    return min((r.accuracy for r in [r for r in first if r.attack == "knapsack"] or first), default=None)


def _choices(*groups: str) -> str:
    """A line for each group of configurations, for the help; names that begin with `_` are parts of others."""
    loader = GlobalHydra.instance().config_loader()
    shown = groups or [g for g in loader.list_groups("") if g != "hydra"]
    lines = []
    for group in sorted(shown):
        options = [option for option in sorted(loader.get_group_options(group)) if not option.startswith("_")]
        lines.append(f"{group}: {', '.join(options)}")
    return "\n".join(lines)
