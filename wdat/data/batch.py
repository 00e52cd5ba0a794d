"""What a data loader hands to the module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One process's part of one global batch.

    Attributes:
        x: Images (B, C, H, W), float32, in [0, 1]; uint8 on the way from a data set to its loader.
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

    def finished(self, device: torch.device | None = None) -> Batch:
        """The batch on a device, by default its own, with images of uint8 as float32 in [0, 1].

        What lies in pinned memory is copied while the host goes on, and the division takes place on the device.
        """
        parts: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in self._asdict().items() if isinstance(v, Tensor)
        }
        return self._replace(**{**parts, "x": parts["x"].to(torch.float32) / 255})
