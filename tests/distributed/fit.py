"""Trains the same network in several settings, in one process or as one of several; returns or saves the weights.

fit.py WORK.json    with torchrun's environment; each process writes its weights to OUT.RANK
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.strategies import DDPStrategy
from small_problems import small_network
from torch import Tensor, nn

from wdat import models
from wdat.attacks import build
from wdat.data import ImageDataModule
from wdat.sensitivity import with_pool
from wdat.training.callbacks import RobustEvaluation
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

CONF = Path(__file__).absolute().parents[2] / "conf"


def trainer(world: int, options: dict[str, Any]) -> L.Trainer:
    """On the CPU, quiet, in float64; divided over processes that were started already."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)) if world > 1 else "auto"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision="64-true", enable_model_summary=False,
        use_distributed_sampler=False, inference_mode=False, num_sanity_val_steps=0, **quiet,
        **{"max_epochs": 2, "limit_val_batches": 0, **options},
    )  # fmt: skip


def evaluated(network: nn.Module) -> None:
    """BatchNorm with the running statistics it has, its own weights trained."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def fitted(work: dict[str, Any], case: dict[str, Any], world: int) -> dict[str, Tensor]:
    """The weights after training in one setting, and what was logged of validation."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["model=small_cnn", "data=digits", *case["overrides"]])
    network = small_network(norm=case.get("norm", False))
    network.load_state_dict(torch.load(work["weights"], weights_only=True), strict=False)
    if case.get("head"):
        models.prepare(network, "head", image_shape=(1, 8, 8))
    data = ImageDataModule(
        "npz", 10, path=work["images"], batch_size=16, eval_batch_size=4, crop=1, flip=False, seed=cfg.seed,
        val_size=case.get("val_size", 3), limit_train=case.get("limit_train", 48),
        synthetic={"path": work["pool"], "sample": 40, **case["synthetic"]} if "synthetic" in case else None,
    )  # fmt: skip
    data.setup()
    sensitivity = instantiate(cfg.sensitivity)
    if data.pool is not None:
        chosen = data.synthetic
        sensitivity = with_pool(sensitivity, data.pool, data.pool_share, chosen.sample, chosen.every)
    module = WDATModule(
        network,
        instantiate(cfg.objective),
        instantiate(cfg.attack),
        instantiate(cfg.threat),
        sensitivity,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        Constant(),
        keep_eval=evaluated if case.get("norm") else models.keep_frozen_in_eval,
        seed=cfg.seed,
        notify=lambda text: None,
        reweighting=instantiate(cfg.reweighting),
        weight_perturbation=instantiate(cfg.weight_perturbation),
    )
    few = {"steps": 3, "step_size": 0.5}
    threat, attacks = instantiate(cfg.threat), [build("pgd", **few), build("wpgd", loss="ce", **few)]
    evaluation = RobustEvaluation(threat, attacks, batch_size=5)
    driver = trainer(world, {"callbacks": [evaluation], **case.get("trainer", {})})
    driver.fit(module, data)
    figures = {f"logged {k}": torch.as_tensor(v).double() for k, v in driver.callback_metrics.items()}
    return {**{k: v.clone() for k, v in network.state_dict().items()}, **figures}


def main() -> None:
    """Train in each setting, as one of several processes."""
    work = json.loads(Path(sys.argv[1]).read_text())
    world = int(os.environ["WORLD_SIZE"])
    found = [fitted(work, case, world) for case in work["cases"]]
    torch.save(found, f"{work['out']}.{os.environ['RANK']}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
