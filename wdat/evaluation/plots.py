"""Pictures made from records only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from wdat.records import Record

INK = {"before": "#8a8a8a", "after": "#1f5fa8"}


def accuracy_against_budget(records: Sequence[Record], path: Path) -> None:
    """Accuracy against δ under each attack, before and after, with 95 % intervals as bands.

    Args:
        records: Those of a run; stages `before` and `after` on the test set are drawn.
        path: The PNG to write.
    """
    chosen = [r for r in records if r.stage in INK and r.split == "test"]
    attacks = sorted({r.attack for r in chosen} - {"none"})
    styles = dict(zip(attacks, ["-", "--", ":", "-."] * len(attacks), strict=False))
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for stage, colour in INK.items():
        clean = [r for r in chosen if r.stage == stage and r.attack == "none"][-1:]
        for attack in attacks:
            latest = {r.delta: r for r in chosen if r.stage == stage and r.attack == attack}
            if not latest:
                continue
            points = clean + [latest[delta] for delta in sorted(latest)]
            deltas = [255 * r.delta for r in points]
            order = f"W_{points[-1].p:g}" if points[-1].p != float("inf") else "pointwise"
            axes.plot(
                deltas,
                [100 * r.accuracy for r in points],
                styles[attack],
                color=colour,
                marker="o",
                markersize=3.5,
                label=f"{stage}: {attack} ({order})",
            )
            low, high = [100 * r.accuracy_low for r in points], [100 * r.accuracy_high for r in points]
            axes.fill_between(deltas, low, high, color=colour, alpha=0.10, linewidth=0)
    about = chosen[-1] if chosen else None
    axes.set_xlabel(f"budget δ in units of 1/255{f' ({about.norm})' if about else ''}")
    axes.set_ylabel("accuracy in percent")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if about:
        axes.set_title(f"{about.network} on {about.data}, {about.n} test images", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
