"""What a sweep costs, in plain epochs: `python -m sweeps.cost`.

A plain epoch is what plain training does: every training image through the network once forward and once backward.
The unit is that pair of passes, either pass counting a half. A run of W-DAT takes

    E (K + 2)                              training: K steps of the attack, E epochs
    + U                                    passes that measure Υ
    + E v (2 S_v + Q + 3.5)                validation after every epoch
    + 2 t (2 S + D + 5.5 + c (2 S + 2))    tests before and after training, at δ and c further budgets

with v and t the validation and test images as shares of the training images; S = 50 and S_v = 20 the steps of each of
the two gradient attacks of an evaluation on test and on validation images; D and Q the knapsack's search on these, one
for all budgets, of which the bound of its effort is counted. A training step costs K + 2: one pass at the clean images
that sets the radii, K − 1 inner steps, two passes for the loss. Half of one more with uniform radii; half of one less
where train and eval mode agree (no active BatchNorm); less with images of radius zero, which take no inner steps. So it
is an upper bound. U is 1 for `table`, which is filled once, and one more at each refill; for `exact` 1 every k steps;
for `subsample` its share of the training images every k steps; 0 for `batch` and `ema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig

from sweeps import grids

SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}  # training and test images
SEARCH = {  # forward and backward passes an image, at most
    ("quick", "linf"): 30, ("quick", "l2"): 30, ("default", "linf"): 110, ("default", "l2"): 320,
}  # fmt: skip


def plain_epochs(cfg: DictConfig, images: tuple[int, int, int] | None = None) -> float:
    """Passes of one run through the network, in plain epochs.

    Args:
        cfg: As `conf/config.yaml` composes it, with the objective `wdat`.
        images: Training, validation and test images; None for those of the data set that `cfg` names.
    """
    train, val, test = images or sizes(cfg)
    steps = max(1, train // cfg.data.batch_size)  # an incomplete batch is left out
    epochs = cfg.trainer.max_epochs
    trained = epochs * steps * cfg.data.batch_size / train
    step = cfg.attack.steps + (2.5 if is_pointwise(cfg) else 2)
    inner, search = evaluating(cfg)
    val_inner, val_search = evaluating(cfg, cfg.evaluation.validation_options or {})
    validated = epochs // cfg.trainer.check_val_every_n_epoch * val / train * (val_inner + val_search + 3.5)
    tested = 2 * test / train * (inner + search + 5.5 + len(cfg.evaluation.curve) * (inner + 2))
    return float(trained * step + measuring(cfg, epochs * steps, train) + validated + tested)


def evaluating(cfg: DictConfig, replaced: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """Passes of the gradient attacks of an evaluation and of the knapsack's search, in pairs of passes an image."""
    options = {name: {**cfg.evaluation.attack_options[name], **(replaced or {}).get(name, {})}
               for name in cfg.evaluation.attacks}  # fmt: skip
    search = SEARCH[options["knapsack"]["effort"], cfg.threat.norm] / 2 if "knapsack" in options else 0.0
    return sum(own["steps"] for name, own in options.items() if name != "knapsack"), search


def measuring(cfg: DictConfig, steps: int, train: int) -> float:
    """Passes over training images that only measure Υ, in plain epochs."""
    if is_pointwise(cfg):  # every radius is δ, whatever Υ is
        return 0.0
    every = cfg.sensitivity.get("every")
    passes = -(-steps // every) if every else 1
    kind = cfg.sensitivity._target_.rpartition(".")[2]
    shares = {"Exact": 1.0, "Table": 1.0, "Subsample": cfg.sensitivity.get("size", 0) / train, "Batch": 0.0, "Ema": 0.0}
    return float(shares[kind] * passes)


def is_pointwise(cfg: DictConfig) -> bool:
    """Whether the training attack gives every image the radius δ."""
    return bool(getattr(get_class(cfg.attack._target_), "pointwise", False))


def sizes(cfg: DictConfig) -> tuple[int, int, int]:
    """Training, validation and test images of the data set that a configuration names."""
    whole, test = SIZES[cfg.data.source]
    return whole - cfg.data.val_size, cfg.data.val_size, test


def costs(name: str) -> list[float]:
    """Each run of a sweep, in plain epochs."""
    return [plain_epochs(grids.composed(point)) for point in grids.points("hydra", name)]


def main() -> None:
    """Print what the sweeps cost."""
    for name in grids.names():
        found = costs(name)
        print(f"{name:20} {len(found):3} runs, {min(found):,.0f} to {max(found):,.0f}: {sum(found):7,.0f} plain epochs")


if __name__ == "__main__":
    main()
