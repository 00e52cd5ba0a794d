"""Makes the figures of these pages from the committed records.

    python -m docs.figures [FOLDER]

Writes `accuracy.png`, `distances.png` and `before_after.png` into FOLDER, by default the folder of these pages. Records
come from `results/`, pictures from `wdat.evaluation.plots`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from wdat.evaluation.plots import accuracy_against_budget, radius_histogram, save
from wdat.records import read

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"


def draw(folder: Path) -> list[Path]:
    """Draw every figure into a folder.

    Args:
        folder: Made if absent.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    accuracy, distances, before_after = (folder / f"{name}.png" for name in ("accuracy", "distances", "before_after"))

    evaluation = read(RESULTS / "evaluate" / "resnet2b_w2_l2.json")
    hidden = [("none", "redlr"), ("pgd", "redlr")]  # a first-order estimate of 0; a line upon that of pgd ce
    accuracy_against_budget([r for r in evaluation if (r.attack, r.loss) not in hidden], accuracy)

    chosen = [r for r in evaluation if (r.attack, r.loss) in (("wpgd", "redlr"), ("knapsack", "0-1"))]
    figure = radius_histogram(chosen)
    assert figure is not None, "these records have histograms"
    axes = figure.axes[0]
    axes.set_xlim(right=1.04 * axes.get_xlim()[1])  # so that the line at d* isn't the edge
    save(figure, distances)

    accuracy_against_budget(read(RESULTS / "quickstart" / "seed0.json"), before_after)
    return [accuracy, distances, before_after]


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1]) if sys.argv[1:] else HERE):
        print(file)
