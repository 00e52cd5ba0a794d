"""What a run shows beside its metrics in W&B and TensorBoard: configuration, tables, pictures and files."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from wdat.records import Record
from wdat.reporting.figures import budget_name, order_name

OF_SETS = ("acc_clean", "acc_pointwise", "acc_distributional", "upsilon", "distance")
METRICS = {  # group: names, the same with every logger
    "train": ("loss", "loss_clean", "loss_pointwise", "loss_distributional", "upsilon", "radius_max", "top1_share",
              "zero_radii"),
    "val": OF_SETS,
    "test": OF_SETS,
    "cost": ("seconds_per_step", "images_per_second"),
}  # fmt: skip
AXES = {"train": "trainer/global_step", "val": "epoch", "test": "trainer/global_step", "cost": "trainer/global_step"}
FILES = ("records.json", "report.html", "curve.png")
SECRET = re.compile(r"(api_?key|token|passwd|password|secret|credentials?)$", re.IGNORECASE)
BEFORE_AFTER = [
    "attack", "loss", "kind", "budget", "delta", "images", "before", "before_low", "before_high", "after", "after_low",
    "after_high", "change",
]  # fmt: skip
EXAMPLES = [
    "attack", "budget", "image", "adversarial", "difference", "radius", "distance", "label", "clean_prediction",
    "prediction",
]  # fmt: skip
PICTURES = {"image": "image", "adversarial": "moved", "difference": "change"}  # column: its key in a record's examples


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
    another setting refers to it; values under names such as `token` and `password` are left out.
    """
    raw = OmegaConf.create(_escaped(OmegaConf.to_container(cfg, resolve=False)))
    return _without_secrets(OmegaConf.to_container(raw, resolve=True))  # type: ignore[no-any-return]


def _escaped(value: Any) -> Any:
    """Plain values in which `${name:...}`, the call of a resolver, stays what it is; missing values become None."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return None if value == "???" else re.sub(r"\$\{(?=[\w.]+:)", r"\\${", value)
    return value


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "(left out)" if v and SECRET.search(str(k)) else _without_secrets(v) for k, v in value.items()}
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def before_after(records: Sequence[Record]) -> list[list[Any]]:
    """Rows of the table `BEFORE_AFTER`: accuracies in [0, 1] on the test set, None where a stage wasn't measured."""
    found: dict[tuple[str, str, float, float], dict[str, Record]] = {}
    for r in records:
        if r.split == "test" and r.stage in ("before", "after"):
            found.setdefault((r.attack, r.loss, r.p, r.delta), {})[r.stage] = r
    rows = []
    for stages in found.values():
        before, after = stages.get("before"), stages.get("after")
        r = next(iter(stages.values()))
        clean = r.attack == "none"
        what = ["clean", r.loss, "–", "–"] if clean else [r.attack, r.loss, order_name(r.p), _budget(r)]
        change = after.accuracy - before.accuracy if before and after else None
        rows.append([*what, r.delta, r.n, *_interval(before), *_interval(after), change])
    return rows


def _budget(r: Record) -> str:
    return budget_name(r.delta, r.norm)


def _interval(r: Record | None) -> tuple[float | None, ...]:
    return (None, None, None) if r is None else (r.accuracy, r.accuracy_low, r.accuracy_high)


def examples(records: Sequence[Record]) -> list[list[Any]]:
    """Rows of the table `EXAMPLES`: images that each attack on the test set moved furthest after training.

    Pictures are PIL images. The radius is the one that the attack granted the image, None where only the whole set is
    bounded; the distance is how far the image was moved, both in pixel units.
    """
    having = [r for r in records if r.split == "test" and r.details.get("examples")]
    last = "after" if any(r.stage == "after" for r in having) else "before"
    chosen = {(r.attack, r.loss, r.delta): r for r in having if r.stage == last}
    return [
        [f"{r.attack} ({order_name(r.p)}, {r.loss})", _budget(r), *(_picture(e[key]) for key in PICTURES.values()),
         e.get("granted"), e["radius"], e["label"], e.get("clean_prediction"), e["prediction"]]
        for r in chosen.values() for e in r.details["examples"]
    ]  # fmt: skip


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def _to_wandb(
    logger: lightning_loggers.WandbLogger, records: Sequence[Record], run: Path, best: Path | None, step: int
) -> None:
    import wandb

    shown: dict[str, Any] = {"results/before_after": wandb.Table(columns=[*BEFORE_AFTER], data=before_after(records))}
    if (run / "curve.png").exists():
        shown["results/accuracy_against_budget"] = wandb.Image(str(run / "curve.png"))
    if rows := examples(records):
        media = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
        shown["results/adversarial_examples"] = wandb.Table(columns=[*EXAMPLES], data=media)
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
    writer.add_text("results/before_after", _markdown(BEFORE_AFTER, before_after(records)), step)
    if (run / "curve.png").exists():
        picture = np.asarray(Image.open(run / "curve.png").convert("RGB"))
        writer.add_image("results/accuracy_against_budget", picture, step, dataformats="HWC")
    if rows := examples(records):
        sheet = np.concatenate([np.concatenate([np.asarray(cell) for cell in _images(row)], 1) for row in rows], 0)
        writer.add_image("results/adversarial_examples", sheet, step, dataformats="HWC")
        plain = [name for name in EXAMPLES if name not in PICTURES]
        data = [[cell for cell in row if not isinstance(cell, Image.Image)] for row in rows]
        writer.add_text("results/adversarial_examples", _markdown(plain, data), step)
    writer.flush()


def _images(row: Sequence[Any]) -> list[Image.Image]:
    return [cell for cell in row if isinstance(cell, Image.Image)]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
