"""A module that remembers what a fit shows it, for the tests of data."""

from __future__ import annotations

import warnings

import torch
from lightning import LightningModule, Trainer

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Witness(LightningModule):
    """Learns next to nothing and remembers every training batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 4)
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.step, batch.index.tolist(), batch.x.clone()))
        return torch.nn.functional.cross_entropy(self.layer(batch.x.flatten(1).mean(1, keepdim=True)), batch.y)

    def validation_step(self, batch, batch_idx):
        self.validated += batch.index.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, epochs=2, checkpoint=None, **options):
    witness = Witness()
    trainer = Trainer(max_epochs=epochs, default_root_dir=folder, log_every_n_steps=1, **{**QUIET, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(GPU available|callbacks used to create).*")
        trainer.fit(witness, datamodule=data, ckpt_path=checkpoint)
    return witness
