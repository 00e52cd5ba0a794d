"""Evaluation on real processes: the figures of one process, on any number of them, for any number of images."""

from __future__ import annotations

import json
from pathlib import Path
from runpy import run_path

import pytest
from process_runner import alike

WORKER = Path(__file__).parent / "measure.py"
CASES = [(301, "float64"), (3, "float64"), (1, "float64")]
WORK = {
    "network": "small", "cases": CASES, "batch_size": 100, "p": 2, "delta": 0.05,
    "losses": ["ce", "redlr"], "attacks": ["pgd", "wpgd", "knapsack"],
    "options": {
        "pgd": {"steps": 10, "step_size": 0.2}, "wpgd": {"steps": 10, "step_size": 0.2},
        "knapsack": {"steps": 8, "starts": 2, "targets": 1, "bisections": 4, "fab": 3, "fab_targets": 1},
    },
}  # fmt: skip


@pytest.fixture
def measured(tmp_path, results):
    """`measured(**changes)`: the records of every set, made by this process alone, and those of two processes."""

    def run(**changes):
        work = {**WORK, **changes}
        file = tmp_path / "work.json"
        file.write_text(json.dumps(work))
        alone = run_path(str(WORKER), run_name="worker")["records"]
        return [alone(work, *case) for case in work["cases"]], results(WORKER, file)

    return run


def same_figures(alone, shared, case):
    """Equal up to rounding, which differs because the batches of two processes are others than those of one.

    In float64 rounding moves no decision. In float32 an image may lie within rounding of one, and moves the accuracy by
    1/n at most: also that of the knapsack, whose budget then pays for one image less or more. Two such images are
    allowed. A loss errs by some 2^-24, Υ of a loss with a near tie by that over the tie's gap.
    """
    n, precision = case
    exact = precision == "float64"
    for a, b in zip(alone, shared, strict=True):
        about = (case, a["attack"], a["loss"])
        assert (a["attack"], n, n) == (b["attack"], b["n"], b["set_size"]), about
        if exact:
            for one, two in zip(*(record["details"].get("effort", []) for record in (a, b)), strict=True):
                assert two[0] == pytest.approx(one[0], rel=0.02), "FAB stops by the batch, and batches are others"
                two[0] = one[0]
            alike(a, b, rel=1e-9, path=about)
            continue
        assert b["accuracy"] == pytest.approx(a["accuracy"], rel=1e-9, abs=2 / n), about
        for key, rel in (("loss_mean", 1e-5), ("loss_misclassified", 1e-5), ("upsilon", 1e-4)):
            alike(a[key], b[key], rel=rel, path=[*about, key])


@pytest.mark.parametrize("fab", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_processes_give_the_records_of_one(measured, images, weights, fab):
    """301 images (an odd number), 3, and 1, for which one process has an empty shard."""
    options = WORK["options"] | ({} if fab else {"knapsack": {**WORK["options"]["knapsack"], "fab": 0}})
    one, (first, second) = measured(images=str(images), weights=str(weights), options=options)
    assert first == second, "every process knows all figures"
    for case, alone, shared in zip(CASES, one, first, strict=True):
        same_figures(alone, shared, case)
    accuracies = [r["accuracy"] for r in one[0]]
    assert 0.5 < accuracies[0] < 1
    assert min(accuracies) < 0.9 * accuracies[0], "attacks that do nothing would agree anyway"


@pytest.mark.long
def test_a_real_network_on_real_images(measured, shared):
    weights, images = shared / "models" / "resnet2b.pt", shared / "data" / "cifar10_subset.npz"
    if not weights.exists() or not images.exists():
        pytest.skip(f"no {weights} or {images}")
    few = {"steps": 4, "step_size": 0.5}
    options = {"pgd": few, "wpgd": few, "knapsack": {"steps": 4, "starts": 2, "targets": 1, "bisections": 3}}
    one, (first, second) = measured(
        network="resnet2b", images=str(images), weights=str(weights), cases=[(301, "float32")], delta=2 / 255,
        options=options,
    )  # fmt: skip
    assert first == second
    same_figures(one[0], first[0], (301, "float32"))
