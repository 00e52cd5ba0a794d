"""What a person reads in the terminal: errors without tracebacks, and no noise of libraries."""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.text import Text

from wdat.cli.launch import rank
from wdat.errors import RunError, SettingError, Stopped, cause
from wdat.terminal import printable

LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"
GRACE = 10.0  # seconds
MEANT = (SettingError, RunError, MissingMandatoryValue)  # errors that speak to the user


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print what was meant for the user in a line or two, whatever it was wrapped in on its way, and leave.

    The status is 2 after a `SettingError`, 1 after a `RunError`, and 128 and the signal's number after a stop. Of
    several processes, those after the first are silent about a stop, and tell of an error only if the first one stays.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Stopped) else int(signal.SIGINT)
        if rank() == 0:
            Console(stderr=True, soft_wrap=True).print(Text(str(stop) or "stopped"))
        sys.exit(128 + number)
    except Exception as error:
        if rank() > 0:
            time.sleep(GRACE)  # whoever has started the processes ends this one when the first one has left
        status = complain(error)
        if status is None:
            raise
        sys.exit(status)


def complain(error: Exception) -> int | None:
    """Print what was meant for the user; the exit status, or None where nothing was and nothing is printed."""
    message = _message(error)
    if message is None:
        return None
    who = f"process {rank()}: " if rank() else ""
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", printable(who + message)))
    return 1 if isinstance(cause(error, *MEANT), RunError) else 2


def _message(error: BaseException) -> str | None:
    """What to tell the user of an error that is meant for them; None for any other error."""
    meant = cause(error, *MEANT)
    if isinstance(meant, MissingMandatoryValue):
        return f"{meant.full_key} must be set: add {meant.full_key}=... to the command line"
    if meant is not None:
        return str(meant)
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, (TypeError, ValueError)):
        return str(error).replace("\nfull_key: ", "; look at the setting ")
    return None


@contextmanager
def readable_warnings() -> Iterator[None]:
    """Inside, a warning is a line of its own, without the place in the code from which it comes."""
    before = warnings.formatwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"warning: {printable(' '.join(str(message).split()))}\n"

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def quiet_libraries() -> None:
    """Silence what libraries say about things that this project chose on purpose."""
    import lightning.pytorch  # noqa: F401  # its import sets the levels

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(LAUNCHER).setLevel(logging.INFO)  # says why it ends all processes
    for message in (
        ".*does not have many workers.*",  # images lie in memory; workers would only copy them
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",  # Lightning with new torch
        ".*pkg_resources is deprecated.*",  # robustbench
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        ".*module\\(s\\) in eval mode at the start of training.*",  # what is frozen
        ".*It is recommended to use .self.log.*sync_dist=True.*",  # figures are equal on all processes
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
