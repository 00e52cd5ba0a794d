"""What a data loader hands to the module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One process's part of one global batch.

    Attributes:
        x: Images (B, C, H, W), float, in [0, 1].
        y: Labels (B,), int64.
        index: (B,), int64: each image's row in its split, from 0; row r of a pool of synthetic images is n_train + r.
        position: (B,), int64: each image's position in the global batch.
        size: Number of images in the global batch, over all processes.
        step: The global batch's number since the start of training; 0 in evaluation.
        synthetic: (B,), bool: whether each image is of the pool; None where there is no pool.
        other: (B,), int64: the label of the smaller part of a mixed image, `y` that of the larger; None without mixing.
        share: (B,): the share of `y`; likewise.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a batch
    position: Tensor
    size: int
    step: int
    synthetic: Tensor | None = None
    other: Tensor | None = None
    share: Tensor | None = None
