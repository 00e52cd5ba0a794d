"""The loader that Lightning drives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from wdat.data.batch import Batch
from wdat.data.images import Choices, LabelledImages
from wdat.data.sampling import BatchPlan, TrainPlan
from wdat.errors import SettingError


class PlannedLoader(DataLoader[Any]):
    """Reads the batches of a plan.

    Args:
        images: The split.
        plan: Its batches. Lightning tells the plan the epoch.
        workers: Processes that read; 0 reads in this one. Batches are the same for any number, and in the same order.
        device: Where batches are wanted; None leaves them where the images are. To a GPU they go from pinned memory.
        again: Whether there are several passes, for which processes that read are kept.
    """

    def __init__(
        self,
        images: LabelledImages | Pass,
        plan: Iterable[BatchPlan],
        workers: int = 0,
        device: torch.device | None = None,
        again: bool = False,
    ) -> None:
        self.device = device
        on_host = images.labels.device.type == "cpu"
        # A generator of its own: the loader draws a seed for workers, which mustn't move the global stream.
        super().__init__(
            _Reader(images), batch_size=None, sampler=plan, num_workers=workers, generator=torch.Generator(),
            pin_memory=on_host and device is not None and device.type == "cuda",
            persistent_workers=again and workers > 0,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # as an iterator is all that is asked for
        for batch in super().__iter__():
            if isinstance(batch, SettingError):
                raise batch
            yield batch.finished(self.device)


class ResumableLoader(PlannedLoader):
    """A `PlannedLoader` whose position Lightning saves and restores, so that a run may go on inside an epoch."""

    def __init__(
        self, images: LabelledImages, plan: TrainPlan, workers: int = 0, device: torch.device | None = None
    ) -> None:
        super().__init__(images, plan, workers, device, again=True)
        self.plan = plan

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            self.plan.handed_out(batch.step)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The plan's position."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the plan's position."""
        self.plan.load_state_dict(state)


class Pass(Dataset[Batch]):
    """A split whose random choices are made.

    Args:
        images: The split.
        draws: The choices for all images of the pass, by position; None for none.
    """

    def __init__(self, images: LabelledImages, draws: Choices | None) -> None:
        self.images, self.labels = images, images.labels
        self.draws = draws

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """The planned batch."""
        return self.images.read(plan, self.draws)


class _Reader(Dataset[Any]):
    """Gives an error to the user back as an item: raised in a worker it would reach the user as a traceback."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __getitem__(self, plan: BatchPlan) -> Batch | SettingError:
        try:
            batch: Batch = self.images[plan]
            return batch
        except SettingError as error:
            return error
