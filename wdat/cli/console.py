"""What a person reads in the terminal: errors without tracebacks, and tables made from records."""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf.errors import MissingMandatoryValue
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wdat.cli.launch import rank
from wdat.errors import RunError, SettingError, Stopped, cause
from wdat.records import Record
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


def percent(value: float | None) -> str:
    """An accuracy in [0, 1] as text in percent; a dash for none."""
    return "–" if value is None else f"{100 * value:.2f}"


def _find(records: Sequence[Record], stage: str, attack: str, delta: float) -> Record | None:
    wanted = [r for r in records if r.stage == stage and r.split == "test" and r.attack == attack and r.delta == delta]
    return wanted[-1] if wanted else None


def figures(records: Sequence[Record]) -> str:
    """One line on one stage: accuracy clean and under each attack."""
    return ", ".join(f"{'clean' if r.attack == 'none' else r.attack} {percent(r.accuracy)} %" for r in records)


def before_after(records: Sequence[Record], attacks: Sequence[str], delta: float) -> Table:
    """Accuracy on the test set before and after, clean and under each attack, with 95 % intervals, and Υ.

    Args:
        records: Those of the run.
        attacks: Names of the attacks.
        delta: Their budget in pixel units.
    """
    columns = [("none", 0.0), *((attack, delta) for attack in attacks)]
    found = {(s, a): _find(records, s, a, d) for s in ("before", "after") for a, d in columns}
    clean = found["after", "none"] or found["before", "none"]
    about = "" if clean is None else f"{clean.network} on {clean.data}, {clean.n} test images, "
    about += "" if clean is None else f"{clean.norm} budget δ = {delta:.4g} ({255 * delta:.3g}/255)"
    table = Table(
        title=_literal(f"Accuracy in percent [95 % interval]\n{about}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("", no_wrap=True)
    for attack, _ in columns:
        table.add_column(
            _literal(_title(attack, found["after", attack] or found["before", attack])), justify="right", no_wrap=True
        )
    table.add_column(_literal(f"Υ\n{clean.loss if clean else ''}"), justify="right", no_wrap=True)
    for stage in ("before", "after"):
        cells = [_cell(found[stage, attack]) for attack, _ in columns]
        first = found[stage, "none"]
        table.add_row(stage, *cells, "–" if first is None or first.upsilon is None else f"{first.upsilon:.2f}")
    changes = []
    for attack, _ in columns:
        before, after = found["before", attack], found["after", attack]
        changes.append("–" if before is None or after is None else f"{100 * (after.accuracy - before.accuracy):+.2f}")
    table.add_section()
    table.add_row("change", *changes, "")
    return table


def _title(attack: str, record: Record | None) -> str:
    if record is None or attack == "none":
        return "clean" if attack == "none" else attack
    kind = "pointwise" if record.p == float("inf") else f"distributional W_{record.p:g}"
    return f"{kind}\n{attack} {record.loss}"


def _literal(text: str) -> Text:
    """Text that is shown as it is, whatever it says: brackets in names from records are no markup."""
    return Text(printable(text))


def _cell(r: Record | None) -> Text:
    if r is None:
        return Text("–")
    return Text(f"{percent(r.accuracy)} [{100 * r.accuracy_low:.1f}, {100 * r.accuracy_high:.1f}]")


def evaluation_table(records: Sequence[Record]) -> Table:
    """Accuracy with 95 % intervals, one row for each attack, loss and budget."""
    last = records[-1]
    about = f"{last.network} on {last.data}, {last.n} {last.split} images, {last.norm}"
    table = Table(
        title=_literal(f"Accuracy in percent [95 % interval]\n{about}"), title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for title in ("attack", "loss", "threat", "budget δ", "accuracy", "distance", "seconds"):
        table.add_column(title, justify="left" if title in ("attack", "loss", "threat") else "right", no_wrap=True)
    for r in records:
        clean = r.attack == "none"
        threat = "–" if clean else f"W_{r.p:g}"
        bound = {"upper": " ≤", "lower": " ≥"}.get(str(r.details.get("bound", "")), "")
        table.add_row(
            _literal("clean" if clean else r.attack + bound), _literal(r.loss), threat,
            "–" if clean else f"{r.delta:.3g}", _cell(r), "–" if clean else f"{r.distance:.3g}", f"{r.seconds:.1f}",
        )  # fmt: skip
    return table


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
