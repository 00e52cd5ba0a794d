"""Training on two real processes, each with half of every global batch: the weights of one process.

In float64, so that what differs is rounding; networks without BatchNorm, or with BatchNorm that keeps its statistics,
because batch statistics of two halves aren't those of the whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from runpy import run_path

import pytest
import torch

WORKER = Path(__file__).parent / "fit.py"
FEW = ["attack.steps=3", "threat.delta=0.05", "sensitivity.every=2"]
SHARED = ["threat=w2_linf", *FEW]
CASES = {
    "wpgd_budget table": {"overrides": ["attack=wpgd_budget", "sensitivity=table", *SHARED]},
    "wpgd exact": {"overrides": ["attack=wpgd", "sensitivity=exact", *SHARED]},
    "wfgsm subsample, combined": {
        "overrides": ["attack=wfgsm", "attack.steps=1", "objective=combined", "objective.pointwise_attack.steps=2",
                      "sensitivity=subsample", "sensitivity.size=9", "threat=w2_l2", "threat.delta=0.3"]
    },
    "pgd": {"overrides": ["attack=pgd", "sensitivity=batch", "attack.steps=3", "threat.delta=0.05"]},
    "knapsack_budget table": {"overrides": ["attack=knapsack_budget", "sensitivity=table", *SHARED]},
    "critical exact": {"overrides": ["attack=critical", "sensitivity=exact", *SHARED]},
    "wpgd_budget batch": {"overrides": ["attack=wpgd_budget", "sensitivity=batch", "attack.steps=3"]},
    "wpgd ema": {"overrides": ["attack=wpgd", "sensitivity=ema", "attack.steps=3", "threat.delta=0.05"]},
    "trades": {"overrides": ["objective=trades", "objective.pointwise_attack.steps=3", "threat.delta=0.05"]},
    "pgd_at": {"overrides": ["objective=pgd_at", "objective.pointwise_attack.steps=3", "threat.delta=0.05"]},
    "wrm table": {"overrides": ["attack=wrm", "objective=attack_at", *SHARED]},
    "udr": {"overrides": ["attack=udr", "objective=attack_at", "attack.steps=3", "attack.rate=5", "attack.every=2"]},
    "awp": {"overrides": ["objective=trades", "objective.pointwise_attack.steps=3", "threat.delta=0.05",
                          "weight_perturbation=awp", "weight_perturbation.start=0"]},
    "uniform radii": {"overrides": ["attack=wpgd_budget", "threat=winf_linf", "attack.steps=3", "threat.delta=0.05"]},
}  # fmt: skip
OTHERS = {
    "head": {"overrides": ["attack=wpgd_budget", *SHARED], "head": True},
    "fixed BatchNorm": {"overrides": ["attack=wpgd_budget", *SHARED], "norm": True},
    "unequal shares": {"overrides": ["attack=wpgd_budget", "sensitivity=batch", "attack.steps=3"], "limit_train": 7},
    "unequal shares, reweighted, awp": {
        "overrides": ["attack=wpgd_budget", "sensitivity=batch", "attack.steps=3", "reweighting=kl",
                      "weight_perturbation=awp", "weight_perturbation.start=0"],
        "limit_train": 7,
    },
    "unequal shares, table": {"overrides": ["attack=wpgd", "sensitivity=table", *SHARED], "limit_train": 7},
}  # fmt: skip
SAMPLE = (
    "wpgd_budget table",
    "wpgd exact",
    "critical exact",
    "head",
    "fixed BatchNorm",
    "unequal shares, reweighted, awp",
)
QUICK = {name: case for name, case in {**CASES, **OTHERS}.items() if name in SAMPLE}
POOLED = {
    f"pool, {name}": {"overrides": ["attack=wpgd_budget", "attack.steps=3", "threat.delta=0.05", *overrides],
                      "synthetic": settings}
    for name, overrides, settings in (
        ("table", ["sensitivity=table", "sensitivity.every=4"], {}),
        ("exact", ["sensitivity=exact", "sensitivity.every=2"], {"every": 2, "fraction": 0.5}),
        ("few originals", ["attack=wpgd"], {"fraction": 0.94}),  # of 16: the second process has none
    )
}  # fmt: skip
VALIDATED = {
    f"{n} validation images": {
        "overrides": ["attack=wpgd_budget", *SHARED], "norm": True, "val_size": n,
        "trainer": {"limit_val_batches": 1.0, "max_epochs": 1},
    } for n in (1, 9)
}  # fmt: skip


@pytest.fixture
def compared(tmp_path, launch, images, pool, weights):
    """`compared(cases)`: by case, the weights at the start, after one process and after each of two."""

    def run(cases):
        work = {"images": images, "pool": pool, "weights": weights, "out": tmp_path / "fitted"}
        work = {**{key: str(file) for key, file in work.items()}, "cases": cases}
        file = tmp_path / "work.json"
        file.write_text(json.dumps(work))
        found = launch(WORKER, file)
        assert [process.status for process in found] == [0, 0], [process.err[-3000:] for process in found]
        alone = run_path(str(WORKER), run_name="worker")["fitted"]
        one = [alone(work, case, 1) for case in cases]
        two = [torch.load(tmp_path / f"fitted.{rank}", weights_only=True) for rank in (0, 1)]
        return torch.load(weights, weights_only=True), one, *two

    return run


def same_weights(start, one, first, second, name, moved=1e-4):
    assert set(one) == set(first) == set(second)
    for key in one:
        assert torch.equal(first[key], second[key]), (name, key, "the processes differ")
        difference = float((one[key].double() - first[key].double()).abs().max())
        assert difference <= 1e-9, (name, key, difference)
    most = max(float((one[key] - start[key]).abs().max()) for key in start)
    assert most > moved, (name, "a run that changes nothing would agree anyway")


@pytest.mark.filterwarnings("ignore:.*module.s. in eval mode at the start of training")
@pytest.mark.parametrize(
    "cases",
    [QUICK, pytest.param(CASES, marks=pytest.mark.long), pytest.param(OTHERS, marks=pytest.mark.long)],
    ids=["quick", "whole", "in part and in unequal shares"],
)
def test_two_processes_train_what_one_does(compared, cases):
    start, one, first, second = compared(list(cases.values()))
    for name, *weights in zip(cases, one, first, second, strict=True):
        same_weights(start, *weights, name)


@pytest.mark.long
def test_also_with_a_pool_of_synthetic_images(compared):
    start, one, first, second = compared(list(POOLED.values()))
    for name, *weights in zip(POOLED, one, first, second, strict=True):
        same_weights(start, *weights, name)


@pytest.mark.filterwarnings("ignore:.*module.s. in eval mode at the start of training")
@pytest.mark.long
def test_a_process_may_have_nothing_to_validate(compared):
    """No image at all, or none in the last of its batches of 4; the network can't take an empty batch."""
    start, one, first, second = compared(list(VALIDATED.values()))
    for name, *weights in zip(VALIDATED, one, first, second, strict=True):
        same_weights(start, *weights, name)
        keys = {"acc_clean", "acc_pointwise", "acc_wpgd", "acc_knapsack", "acc_distributional", "upsilon", "distance"}
        assert {f"logged val/{key}" for key in keys} <= set(weights[0])
