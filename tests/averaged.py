"""What the tests of weight averaging share: a network, and callbacks that watch its weights."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from wdat.sensitivity import Table
from wdat.training.callbacks import ExponentialAveraging

QUIET = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings(r"ignore:.*module\(s\) in eval mode at the start of training"),
]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def with_batchnorm():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10)
    ).eval()  # fmt: skip


def weights(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def saved(path):
    """What a checkpoint holds: the average, the current weights, and the number of models averaged."""
    content = torch.load(path, weights_only=True)
    unprefixed = [
        {key.removeprefix("network."): value for key, value in content[part].items()}
        for part in ("state_dict", "current_model_state")
    ]
    return (*unprefixed, int(content["averaging_state"]["n_averaged"]))


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


class Trail(L.Callback):
    """The current weights before the first and after every step, and checkpoints where a folder is given."""

    def __init__(self, folder=None):
        self.folder, self.raw, self.seen = folder, [], []

    def on_train_start(self, trainer, pl_module):
        self.raw.append(weights(pl_module.network))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(weights(pl_module.network))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.raw.append(weights(pl_module.network))
        if self.folder:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Scored(L.Callback):
    """The weights that validation scores in its steps and that callbacks score after it, by the number of steps."""

    def __init__(self):
        self.steps, self.ends = {}, {}

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.steps[trainer.global_step] = weights(pl_module.network)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.ends[trainer.global_step] = weights(pl_module.network)


class Stop(L.Callback):
    """Raises at a hook, after so many steps, with a checkpoint where a path is given."""

    def __init__(self, hook, steps, error=InterruptedError, path=None):
        self.steps, self.error, self.path = steps, error, path
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        if trainer.global_step == self.steps and not trainer.sanity_checking:
            if self.path:
                trainer.save_checkpoint(self.path)
            raise self.error


def run(make, make_trainer, digits, folder, *others, start=0.5, epochs=3, **options):
    """A run that saves what it has at its end; the saved content, and the network's final weights."""
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = make_trainer(
        *others, ExponentialAveraging(0.9, start), last, enable_checkpointing=True, max_epochs=epochs
    )
    module = make(network=with_batchnorm(), sensitivity=Table(), scheduler=lambda t: 1 - 0.9 * t)
    trainer.fit(module, digits(), **options)
    return saved(folder / "last.ckpt"), weights(module.network)
