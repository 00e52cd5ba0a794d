"""train.py in this process, with the quickstart cut short."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from script_runner import run_script

SCRIPT = Path(__file__).parents[1] / "train.py"
LOCALLY = ["trainer.accelerator=cpu", "trainer.devices=1"]
EVALUATION = "evaluation.attack_options"
QUICK = [
    "experiment=quickstart", *LOCALLY, "trainer.check_val_every_n_epoch=1", "attack.steps=2", "evaluation.curve=[0.5]",
    "pretrain.max_epochs=6", "data.batch_size=32",
    "trainer.max_epochs=2", "trainer.log_every_n_steps=3", f"{EVALUATION}.pgd.steps=4",
    f"{EVALUATION}.pgd.step_size=0.5", f"{EVALUATION}.wpgd.steps=4",
    f"{EVALUATION}.wpgd.step_size=0.5", "data.limit_train=320", "data.limit_val=30", "data.limit_test=35",
    "optimizer.lr=0.005",
]  # fmt: skip

train = partial(run_script, SCRIPT)
