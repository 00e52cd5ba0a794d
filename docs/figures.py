"""Makes the figures of these pages from the committed records and configurations.

    python -m docs.figures [FOLDER]

Writes `bracket.png`, `accuracy.png`, `distances.png`, `before_after.png` and `schedules.png` into FOLDER, by default
the folder of these pages. Records come from `results/`, their pictures from `wdat.reporting.plots`, schedules from
`conf/`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure

from wdat.records import Record
from wdat.reporting.frame import load_records, to_frame
from wdat.reporting.plots import accuracy_against_budget, house_style, radius_histogram, save
from wdat.training.optimizers import peak_rate

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
CONF = HERE.parent / "conf"
EPOCHS = {  # of the sources, to which the curves are drawn
    "fine-tuning": 20, "finetune_plain": 15, "hendrycks2019": 5, "trades2019": 76, "rebuffi2021": 400,
    "rebuffi2021_pytorch": 400, "wang2023": 400,
}  # fmt: skip
RECIPES = [name for name in EPOCHS if name != "fine-tuning"]  # the others: what train.py does by default
STEPS = 49  # of an epoch: 50,000 images in batches of 1024


def draw(folder: Path) -> list[Path]:
    """Draw every figure into a folder.

    Args:
        folder: Made if absent.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ("bracket", "accuracy", "distances", "before_after")
    bracket, accuracy, distances, before_after = (folder / f"{name}.png" for name in names)

    accuracy_against_budget(of_one_order(load_records(RESULTS / "leaderboard" / "cnn_a_cnn_a_adv.json")), bracket)

    evaluation = load_records(RESULTS / "evaluate" / "resnet2b_w2_l2.json")
    accuracy_against_budget(evaluation, accuracy)

    figure = radius_histogram(
        to_frame(evaluation).query("attack == 'wpgd' and loss == 'redlr' or attack == 'knapsack'")
    )
    assert figure is not None, "these records have histograms"
    save(figure, distances)

    accuracy_against_budget(load_records(RESULTS / "quickstart" / "seed0.json"), before_after)

    schedules = folder / "schedules.png"
    save(rates(), schedules)
    return [bracket, accuracy, distances, before_after, schedules]


def of_one_order(records: Sequence[Record], p: float = 2.0) -> list[Record]:
    """The records of an order, and PGD's at its budgets; without what the first-order estimate is made of."""
    kept = [r for r in records if r.p == p or (r.attack == "pgd" and r.p == math.inf)]
    return [replace(r, loss_misclassified=None) for r in kept]


@house_style()
def rates() -> Figure:
    """The learning rate of every schedule over the epochs of its source, and the warm-up of one and its port."""
    figure = Figure(figsize=(9.6, 8.4), layout="constrained")
    panels = [(name, 1.0) for name in EPOCHS] + [("rebuffi2021 and its port", 0.06)]
    for k, (title, shown) in enumerate(panels):
        axes = figure.add_subplot(4, 2, k + 1)
        names = [title] if title in EPOCHS else ["rebuffi2021", "rebuffi2021_pytorch"]
        for name in names:
            epochs, curve = _curve(name)
            count = int(shown * len(curve))
            axes.plot([i / STEPS for i in range(count)], curve[:count], linewidth=1.6, label=name)
        axes.set_title(
            f"{title}, {epochs} epochs" if shown == 1 else "the warm-up: per step, and per epoch", fontsize=9
        )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch", fontsize=9)
        axes.set_ylabel("rate", fontsize=9)
        axes.tick_params(labelsize=8)
        if len(names) > 1:
            axes.legend(fontsize=8, loc="lower right")
    return figure


def _curve(name: str) -> tuple[int, list[float]]:
    """Epochs of the source, and the rate at each step."""
    epochs = EPOCHS[name]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [f"experiment={name}"] if name in RECIPES else []
        cfg = compose("config", [*chosen, f"trainer.max_epochs={epochs}"])
    peak = peak_rate(cfg.optimizer.lr, cfg.data.batch_size, cfg.optimizer.per_batch)
    shape = instantiate(cfg.scheduler)
    steps = epochs * STEPS
    return epochs, [peak * shape(step / steps) for step in range(steps)]


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1]) if sys.argv[1:] else HERE):
        print(file)
