"""Fine-tune a network with Wasserstein distributional adversarial training.

    python train.py model=Rebuffi2021 attack=wpgd
    python train.py experiment=quickstart
    python train.py resume=RUN_DIR

Everything is in the package: `wdat.cli.train`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from wdat.cli.console import quiet_libraries, readable_errors
from wdat.cli.launch import agreed, join_group
from wdat.cli.resume import check_folder, resumed_arguments
from wdat.cli.sweep import Sweep
from wdat.cli.train import train
from wdat.distributed import distributed_errors
from wdat.training import checkpointing as checkpoints
from wdat.training import loggers

SWEEP = Sweep()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and train."""
    quiet_libraries()
    join_group()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    resume_hint = partial(checkpoints.resume_hint, run_dir)
    with readable_errors(), SWEEP.job(), loggers.own_run(), distributed_errors(resume_hint):
        train(cfg, run_dir)


if __name__ == "__main__":
    with readable_errors():
        sys.argv[1:] = agreed(sys.argv[1:], resumed_arguments)
        check_folder(sys.argv[1:])
    main()
    SWEEP.end()
