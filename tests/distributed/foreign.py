"""A module that knows nothing of wdat, trained and validated by Lightning's own means; `foreign.py WEIGHTS RECORDS`.

Prints what was logged as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from small_problems import small_digits, small_network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wdat

N = 61  # odd, so that two processes have unequal shards


class Foreign(L.LightningModule):
    def __init__(self, weights: str) -> None:
        super().__init__()
        self.model = small_network()
        self.model.load_state_dict(torch.load(weights, weights_only=True), strict=False)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self.model(x), y), sync_dist=True)


def main(weights: str, records: str) -> dict[str, Any]:
    x, y = small_digits()
    loader = DataLoader(TensorDataset(x[:N].permute(0, 3, 1, 2).double() / 255, y[:N]), batch_size=8)
    threat = wdat.ThreatModel(p=2, norm="linf", delta=0.1)
    options = {"knapsack": {"effort": "quick"}, "wpgd": {"steps": 5}}
    callback = wdat.RobustEvaluation(
        threat, ["pgd", "wpgd", "knapsack"], network="model", options=options, records=records
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, precision="64-true",
    )  # fmt: skip
    (logged,) = trainer.validate(Foreign(weights), loader, verbose=False)
    return logged


if __name__ == "__main__":
    logged = main(*sys.argv[1:])
    print(json.dumps({**logged, "n": {r.n for r in wdat.load_records(Path(sys.argv[2]))}.pop()}))
