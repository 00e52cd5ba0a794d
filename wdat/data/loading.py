"""The loader that Lightning drives."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from wdat.batch import Batch
from wdat.data.images import ImageSet
from wdat.data.sampling import ShardPlan, TrainPlan


class PlannedLoader(DataLoader[Batch]):
    """Reads the batches of a plan, in this process.

    Args:
        images: The split.
        plan: Its batches. Lightning tells the plan the epoch.
    """

    def __init__(self, images: ImageSet, plan: TrainPlan | ShardPlan) -> None:
        # A generator of its own: the loader draws a seed for workers, which mustn't move the global stream.
        super().__init__(images, batch_size=None, sampler=plan, num_workers=0, generator=torch.Generator())


class ResumableLoader(PlannedLoader):
    """A `PlannedLoader` whose position Lightning saves and restores, so that a run may go on inside an epoch."""

    def __init__(self, images: ImageSet, plan: TrainPlan) -> None:
        super().__init__(images, plan)
        self.plan = plan

    def state_dict(self) -> dict[str, int]:
        """The plan's position."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the plan's position."""
        self.plan.load_state_dict(state)
