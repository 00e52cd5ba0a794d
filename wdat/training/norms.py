"""A pass over training images that measures what an attack divides its budget by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from wdat.attacks import Attack
from wdat.data.batch import Batch
from wdat.distributed import Processes
from wdat.evaluation.evaluator import Progress
from wdat.gradients import undisturbed
from wdat.threat import ThreatModel


class TrainingImages(Protocol):
    """What estimators that measure Υ themselves need of the data module."""

    n_train: int

    def train_batches(self, index: Tensor, step: int, rank: int, world: int) -> Iterator[Batch]:
        """This process's part of the training images `index`, augmented as in training."""
        ...


def training_norms(
    network: nn.Module,
    attack: Attack,
    threat: ThreatModel,
    data: TrainingImages,
    index: Tensor,
    step: int,
    to_device: Callable[[Batch], Batch],
    processes: Processes,
    progress: Progress | None = None,
) -> Tensor:
    """What the attack's allocation wants to know of training images, in passes shared by all processes.

    Args:
        network: Left as it was found.
        attack: Whose allocation it is.
        threat: The threat trained against.
        data: Gives the images.
        index: (M,), rows of the training set, the same on all processes.
        step: Fixes the augmentation.
        to_device: Moves a batch to where the network is, in its precision.
        processes: Share the passes.
        progress: Told of the images done.

    Returns:
        (M,), on all processes.
    """
    position, norms, done = [], [], 0
    with undisturbed(network):
        for batch in map(to_device, data.train_batches(index, step, processes.rank, processes.world_size)):
            position.append(batch.position)
            norms.append(attack.norms(network, batch.x, batch.y, threat))
            done += len(batch.position) * processes.world_size
            if progress:
                progress("gradient norms of the training images", min(done, len(index)), len(index))
    device = next(network.parameters()).device
    mine = torch.cat(norms) if norms else torch.empty(0, device=device)
    positions = torch.cat(position) if position else torch.empty(0, dtype=torch.int64, device=device)
    gathered = processes.gather(mine)
    ordered = torch.empty_like(gathered)
    ordered[processes.gather(positions)] = gathered
    return ordered
