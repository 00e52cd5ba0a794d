"""What those who start processes set in the environment, and a short run."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train.py"
EVALUATION = "evaluation.attack_options"
QUICK = [
    "experiment=quickstart", "trainer.accelerator=cpu", "trainer.check_val_every_n_epoch=1", "attack.steps=2",
    "evaluation.curve=[]", "pretrain.max_epochs=1", "data.batch_size=32", "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    f"{EVALUATION}.pgd.steps=2", f"{EVALUATION}.pgd.step_size=0.5", f"{EVALUATION}.wpgd.steps=2",
    f"{EVALUATION}.wpgd.step_size=0.5", "data.limit_train=64", "data.limit_val=30", "data.limit_test=35",
]  # fmt: skip

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "some", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
}  # fmt: skip
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "31234",
}  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0",
}  # fmt: skip
