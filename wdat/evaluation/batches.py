"""Images and labels out of what callers call a loader: batches of several forms, data sets, pairs of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from wdat.data.batch import Batch
from wdat.data.images import LabelledImages
from wdat.data.loading import PlannedLoader
from wdat.data.sampling import ShardPlan
from wdat.errors import SettingError
from wdat.inputs import as_images, as_labels

IMAGES = ("image", "images", "img", "x", "pixel_values", "input", "inputs", "data")
"""What the images are called in batches that are dicts."""

LABELS = ("label", "labels", "y", "target", "targets", "fine_label")
"""What the labels are called there."""

_WANTED = "give batches (images, labels), such as a DataLoader's"


def batches_of(given: Any, batch_size: int) -> Iterable[Any]:
    """Batches: those of a loader as they come, those of a data set or of a pair of tensors made here.

    Args:
        given: What the caller hands over.
        batch_size: Images in the batches of a data set.

    Raises:
        SettingError: If it holds no batches.
    """
    if isinstance(given, LabelledImages):
        return PlannedLoader(given, ShardPlan(len(given), batch_size))
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        return _of_set(given, batch_size)
    if isinstance(given, Mapping) or _is_pair(given):
        return [given]
    if hasattr(given, "test_dataloader"):
        raise SettingError(f"the loader is a {type(given).__name__}: give one of its loaders, data.test_dataloader()")
    if isinstance(given, (str, Tensor, np.ndarray)) or not hasattr(given, "__iter__"):
        raise SettingError(f"the loader is a {type(given).__name__}: {_WANTED}, or (x, y)")
    found: Iterable[Any] = given
    return found


def members(batch: Any) -> tuple[Tensor, ...]:
    """Images and labels of one batch, and the rows in the split where it knows them.

    Raises:
        SettingError: If the batch isn't images and labels.
    """
    if isinstance(batch, Batch):
        return batch.x, batch.y, batch.index
    if isinstance(batch, Mapping):
        x, y = (next((name for name in names if name in batch), None) for names in (IMAGES, LABELS))
        if x is None or y is None:
            missing, names = ("images", IMAGES) if x is None else ("labels", LABELS)
            found = ", ".join(map(str, batch))
            raise SettingError(
                f"a batch has {found}, of which none is called {', '.join(names)}: name its {missing} so"
            )
        return _tensors(batch[x], batch[y])
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise SettingError(f"a batch is a {type(batch).__name__}, not images and labels: {_WANTED}")
    return _tensors(batch[0], batch[1])


def unrepeated(parts: tuple[Tensor, ...], loader: Any, seen: int) -> tuple[Tensor, ...]:
    """A batch without the images that a `DistributedSampler` repeats to make shards even, and with its rows.

    Args:
        parts: Images, labels and perhaps the rows, with which nothing is done here.
        loader: Where the batch comes from.
        seen: How many images this process has had from it before.

    Returns:
        Images, labels and, of such a loader, their places in the order of the whole set.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if len(parts) > 2 or not isinstance(sampler, DistributedSampler):
        return parts
    x, y = parts
    rows = sampler.rank + sampler.num_replicas * torch.arange(seen, seen + len(y), device=y.device)
    own = rows < len(sampler.dataset)  # type: ignore[arg-type]  # a sampler knows the size of its set
    return x[own], y[own], rows[own]


def drained(kept: list[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """What was kept, from the first on; the list lets it go, so that a set that is put together is held once."""
    kept.reverse()
    while kept:
        yield kept.pop()


def _tensors(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        x = x.astype(np.float32)
    return as_images(x, torch.nn.Module()), as_labels(y)


def _of_set(given: Dataset[Any], batch_size: int) -> Iterable[Any]:
    try:
        yield from DataLoader(given, batch_size)
    except TypeError as error:
        raise SettingError(
            f"the items of {type(given).__name__} can't be put into batches ({str(error).splitlines()[0][:120]}): give "
            "it transform=torchvision.transforms.ToTensor()"
        ) from error


def _is_pair(given: Any) -> bool:
    """Whether this is (x, y) itself, not two batches."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return False
    x, y = given
    arrays = all(isinstance(part, (Tensor, np.ndarray)) for part in given)
    return arrays and x.ndim >= 2 and y.ndim == 1 and len(x) == len(y)
