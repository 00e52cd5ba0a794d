"""The list of the zoo: what each network is, and why some can't be built here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import groupby

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from wdat import errors
from wdat.errors import SettingError
from wdat.models import build, zoo
from wdat.models.labels import label
from wdat.terminal import printable


@dataclass(frozen=True)
class Row:
    """One network of the zoo.

    Attributes:
        alias: Its short name, or `""`.
        name: Its full name.
        architecture: What its architecture is called; `""` if it can't be built.
        parameters: Their number, frozen ones included; None if it can't be built.
        dataset: A key of `zoo.CLASSES`.
        threat_model: One of `zoo.THREAT_MODELS`.
        fault: Why it can't be built here, or `""`.
    """

    alias: str
    name: str
    architecture: str
    parameters: int | None
    dataset: str
    threat_model: str
    fault: str


def chosen(dataset: str | None = None, threat_model: str | None = None, part: str = "") -> list[zoo.ZooEntry]:
    """The networks of a data set and a threat model (None for all) whose name or alias holds `part`, in any case.

    Raises:
        SettingError: There are none.
    """
    fitting = [e for e in zoo.entries() if dataset in (None, e.dataset) and threat_model in (None, e.threat_model)]
    if not fitting:
        raise SettingError(f"the zoo has no networks for {dataset}, {threat_model} (--dataset, --threat)")
    found = [e for e in fitting if part.lower() in f"{e.name} {_alias(e)}".lower()]
    if not found:
        raise errors.unknown("network", part, [*zoo.ALIASES, *(e.name for e in fitting)], "NAME")
    return found


def row(entry: zoo.ZooEntry) -> Row:
    """What is known of a network once its outline is built."""
    try:
        network = build.outline(entry)
    except SettingError as error:
        return Row(_alias(entry), entry.name, "", None, entry.dataset, entry.threat_model, str(error))
    count = sum(parameter.numel() for parameter in network.parameters())
    return Row(_alias(entry), entry.name, label(network), count, entry.dataset, entry.threat_model, "")


def table(rows: Sequence[Row]) -> Group:
    """A table for each part of the zoo."""
    parts = []
    for (dataset, threat), found in groupby(rows, lambda r: (r.dataset, r.threat_model)):
        members = list(found)
        part = Table(
            title=f"\n{dataset}, {threat}: {_networks(len(members))}", title_justify="left", title_style="bold",
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1),
        )  # fmt: skip
        aliased = any(r.alias for r in members)
        if aliased:
            part.add_column("alias", no_wrap=True)
        part.add_column("name", overflow="fold")
        part.add_column("architecture", overflow="fold")
        part.add_column("parameters", justify="right", no_wrap=True)
        for r in members:
            cells = [r.name, r.architecture or r.fault, "–" if r.parameters is None else f"{r.parameters / 1e6:.1f} M"]
            part.add_row(*(Text(printable(cell)) for cell in ([r.alias, *cells] if aliased else cells)))
        parts.append(part)
    return Group(*parts, Text(summary(rows)))


def summary(rows: Sequence[Row]) -> str:
    """How many there are and how many can be built."""
    failed = sum(r.parameters is None for r in rows)
    return f"{_networks(len(rows))}; " + (f"{failed} can't be built here" if failed else "all can be built here")


def tsv(rows: Sequence[Row]) -> str:
    """One line a network, tabs between the fields of `Row`, under a line with their names."""
    lines = [[f.name for f in fields(Row)], *(["" if v is None else str(v) for v in astuple(r)] for r in rows)]
    return "".join("\t".join(map(printable, line)) + "\n" for line in lines)


def as_json(rows: Sequence[Row]) -> str:
    """A list of objects with the fields of `Row`."""
    return json.dumps([asdict(r) for r in rows], indent=1) + "\n"


TEXTS: dict[str, Callable[[Sequence[Row]], str]] = {"tsv": tsv, "json": as_json}


def _networks(count: int) -> str:
    return f"{count} network" + ("s" if count != 1 else "")


def _alias(entry: zoo.ZooEntry) -> str:
    """The short name of an entry; aliases are for CIFAR-10 networks trained against Linf."""
    if (entry.dataset, entry.threat_model) != ("cifar10", "Linf"):
        return ""
    return next((short for short, full in zoo.ALIASES.items() if full == entry.name), "")
