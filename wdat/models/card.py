"""The model card of a trained network, in the fields of RobustBench's `model_info`, from records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wdat.records import Record

BY_HAND = ("link", "name", "authors", "venue", "reported")  # what a publication states


@dataclass(frozen=True)
class Origin:
    """What a card says beside accuracies.

    Attributes:
        network: Name of the network that was trained.
        start: The file that it started from; `""` for the zoo's own weights or fresh ones.
        fresh: Whether it started from fresh weights.
        pool: The synthetic images that it was trained on too, and their share; `""` for none.
        dataset: Name of the images it was trained on.
        architecture: What its architecture is called.
        p: The threat's Wasserstein order.
        norm: Its ground norm.
        delta: Its budget in pixel units.
        eps: The same as it was written, such as `8/255`.
    """

    network: str
    start: str
    fresh: bool
    pool: str
    dataset: str
    architecture: str
    p: float
    norm: str
    delta: float
    eps: str


def card(origin: Origin, records: Sequence[Record]) -> tuple[dict[str, Any], list[str]]:
    """The card of a network, and why fields of it are null.

    Accuracies are texts in percent with two decimals, as RobustBench has them.

    Args:
        origin: Of the network.
        records: All of them measured on the network that is exported.

    Returns:
        The card, to be written as JSON, and one line for each reason.
    """
    clean = _best([r for r in records if r.attack == "none"])
    autoattack = _best([r for r in records if r.attack == "autoattack" and _same(r, origin, math.inf)])
    knapsack = _best([r for r in records if r.attack == "knapsack" and _same(r, origin, origin.p)])
    values = {
        **dict.fromkeys(("link", "name", "authors")),
        "additional_data": True if origin.pool else False if origin.fresh else None,
        "number_forward_passes": 1,
        "dataset": origin.dataset,
        "venue": None,
        "architecture": origin.architecture,
        "eps": origin.eps,
        "clean_acc": _percent(clean),
        "reported": None,
        "footnote": _footnote(origin, {"clean": clean, "AutoAttack": autoattack, "knapsack": knapsack}),
        "autoattack_acc": _percent(autoattack),
        "knapsack_acc": _percent(knapsack),
    }
    reasons = [f"{', '.join(BY_HAND)}: null, to be filled by hand from your publication"]
    if not origin.fresh and not origin.pool:
        reasons.append(f"additional_data: null, because {origin.network} may have been trained on further images")
    ball = f"{origin.norm}, δ = {origin.eps}"
    if clean is None:
        reasons.append("clean_acc: null, because no record holds it")
    if autoattack is None:
        reasons.append(f"autoattack_acc: null, because no record is of AutoAttack at {ball}")
    if knapsack is None:
        reasons.append(f"knapsack_acc: null, because no record is of the knapsack at p = {origin.p:g}, {ball}")
    return values, reasons


def _same(record: Record, origin: Origin, p: float) -> bool:
    """Whether a record is of the card's ball, with order p."""
    return (record.norm, record.p) == (origin.norm, p) and math.isclose(record.delta, origin.delta, rel_tol=1e-6)


def _best(records: Sequence[Record]) -> Record | None:
    """The record of most images; among equals the strongest attack's."""
    return max(records, key=lambda r: (r.n, -r.accuracy), default=None)


def _percent(record: Record | None) -> str | None:
    return None if record is None else f"{100 * record.accuracy:.2f}"


def _footnote(origin: Origin, measured: dict[str, Record | None]) -> str:
    """Where the network and its figures come from."""
    begun = "Trained from fresh weights" if origin.fresh else f"Fine-tuned from {origin.start or origin.network}"
    found = {what: record for what, record in measured.items() if record is not None}
    figures = "; ".join(f"{what} on {r.n} test images" for what, r in found.items())
    clean = measured["clean"]
    where = f" of {clean.data}, seed {clean.seed}" if clean else ""
    trained = f" and {origin.pool}" if origin.pool else ""
    version = f" {clean.versions.get('wdat', '')}".rstrip() if clean else ""
    threat = f"W_{origin.p:g}, {origin.norm}, δ = {origin.eps}"
    return f"{begun} with wdat{version} ({threat}{trained}). Accuracies: {figures or 'none'}{where}."
