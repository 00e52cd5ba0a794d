"""What a run shows beside its metrics in W&B and TensorBoard: configuration, tables, pictures and files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from wdat.records import EXAMPLES, Record, budget_name
from wdat.reporting.frame import having, paired, to_frame
from wdat.reporting.report import classes, picture
from wdat.reporting.tables import Grid, before_after, markdown
from wdat.terminal import without_secrets

OF_SETS = (
    "acc_clean", "acc_pointwise", "acc_wpgd", "acc_knapsack", "acc_distributional", "upsilon", "distance",
)  # fmt: skip
METRICS = {  # group: names, the same with every logger
    "train": ("loss", "loss_clean", "loss_pointwise", "loss_distributional", "upsilon", "radius_max", "top1_share",
              "zero_radii"),
    "val": OF_SETS,
    "test": OF_SETS,
    "cost": ("seconds_per_step", "images_per_second"),
}  # fmt: skip
AXES = {"train": "trainer/global_step", "val": "epoch", "test": "trainer/global_step", "cost": "trainer/global_step"}
FILES = ("records.json", "report.html", "curve.png")


@rank_zero_only
def begin(loggers: Iterable[Logger], cfg: DictConfig) -> None:
    """Begin the run of W&B, if there is one, and log the configuration.

    Args:
        loggers: The trainer's.
        cfg: As `conf/config.yaml` composes it.
    """
    values = configuration(cfg)
    for logger in loggers:
        if isinstance(logger, lightning_loggers.WandbLogger):
            logger.experiment.config.update(values, allow_val_change=True)
            for group, names in METRICS.items():
                for name in names:
                    logger.experiment.define_metric(f"{group}/{name}", step_metric=AXES[group])
        elif isinstance(logger, lightning_loggers.TensorBoardLogger):
            text = OmegaConf.to_yaml(OmegaConf.create(_escaped(values)))
            logger.experiment.add_text("configuration", f"```yaml\n{text}\n```")


@rank_zero_only
def finish(loggers: Iterable[Logger], records: Sequence[Record], run: Path, best: Path | None, step: int) -> None:
    """Log the results of a finished run.

    Args:
        loggers: The trainer's.
        records: Those of the run.
        run: Its folder, with `records.json`, `report.html` and `curve.png`.
        best: The chosen checkpoint, which goes to W&B if `logger.log_checkpoint` is set.
        step: The trainer's step.
    """
    for logger in loggers:
        if isinstance(logger, lightning_loggers.WandbLogger):
            _to_wandb(logger, records, run, best, step)
        elif isinstance(logger, lightning_loggers.TensorBoardLogger):
            _to_tensorboard(logger.experiment, records, run, step)


def configuration(cfg: DictConfig) -> dict[str, Any]:
    """The configuration in plain values that may be shown to others.

    What comes from the environment or from this machine stands as it is written, such as `${oc.env:HOME}`, also where
    another setting refers to it; values under names such as `token` and `password` are hidden.
    """
    raw = OmegaConf.create(_escaped(OmegaConf.to_container(cfg, resolve=False)))
    return without_secrets(OmegaConf.to_container(raw, resolve=True))  # type: ignore[no-any-return]


def _escaped(value: Any) -> Any:
    """Plain values in which `${name:...}`, the call of a resolver, stays what it is; missing values become None."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return None if value == "???" else re.sub(r"\$\{(?=[\w.]+:)", r"\\${", value)
    return value


def examples(records: Sequence[Record], folder: Path) -> pd.DataFrame:
    """Images that each attack on the test set moved furthest at the last stage.

    Args:
        records: Those of a run.
        folder: Its folder, where their pictures are.

    Returns:
        Columns `attack, threat, budget, picture, radius, distance, classes`: the picture, a PIL image, has image,
        adversarial image and change side by side; the radius is the one that the attack granted the image, None where
        only the whole set is bounded; the distance is how far the image was moved.
    """
    frame = to_frame(records)
    frame = frame[(frame["split"] == "test") & having(frame, EXAMPLES)]
    last = frame[frame["stage"] == ("after" if (frame["stage"] == "after").any() else "before")]
    rows = []
    for r in last.itertuples():
        for example in r.details[EXAMPLES]:
            content = picture(example, folder)
            if content is not None:
                shown = Image.open(io.BytesIO(content)).convert("RGB")
                lengths = (budget_name(example.get(key), r.norm, r.delta) for key in ("granted", "radius"))
                rows.append([r.name, r.threat, r.budget, shown, *lengths, classes(example)])
    return pd.DataFrame(rows, columns=["attack", "threat", "budget", "picture", "radius", "distance", "classes"])


def _to_wandb(
    logger: lightning_loggers.WandbLogger, records: Sequence[Record], run: Path, best: Path | None, step: int
) -> None:
    import wandb

    shown: dict[str, Any] = {"results/before_after": wandb.Table(dataframe=paired(to_frame(records)))}
    if (run / "curve.png").exists():
        shown["results/accuracy_against_budget"] = wandb.Image(str(run / "curve.png"))
    table = examples(records, run)
    if len(table):
        table["picture"] = table["picture"].map(wandb.Image)
        shown["results/adversarial_examples"] = wandb.Table(columns=[*table.columns], data=table.to_numpy().tolist())
    logger.experiment.log({**shown, "trainer/global_step": step})
    results = wandb.Artifact(f"results-{logger.experiment.id}", type="results")
    for name in FILES:
        if (run / name).exists():
            results.add_file(str(run / name), name=name)
    logger.experiment.log_artifact(results)
    if best is not None and getattr(logger, "log_checkpoint", False):
        model = wandb.Artifact(f"checkpoint-{logger.experiment.id}", type="model")
        model.add_file(str(best), name=best.name)
        logger.experiment.log_artifact(model, aliases=["best"])


def _to_tensorboard(writer: Any, records: Sequence[Record], run: Path, step: int) -> None:
    writer.add_text("results/before_after", markdown(before_after(records)), step)
    if (run / "curve.png").exists():
        curve = np.asarray(Image.open(run / "curve.png").convert("RGB"))
        writer.add_image("results/accuracy_against_budget", curve, step, dataformats="HWC")
    table = examples(records, run)
    if len(table):
        sheet = np.concatenate([np.asarray(shown) for shown in table["picture"]])
        writer.add_image("results/adversarial_examples", sheet, step, dataformats="HWC")
        text = markdown(Grid(table.drop(columns="picture")))
        writer.add_text("results/adversarial_examples", text, step)
    writer.flush()
