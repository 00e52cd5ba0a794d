"""What an attack asks about Υ, and what training tells an estimator."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from wdat.distributed import ALONE, Processes
from wdat.threat import power_mean


class Sample(NamedTuple):
    """The values that give Υ.

    Attributes:
        values: (M,), dual norms, or distances for the attacks that divide by these.
        counts: (M,), how many images have each value, or any weights in these proportions; None for one each.
    """

    values: Tensor
    counts: Tensor | None = None


class Sensitivity:
    """What an attack asks about Υ. This base class takes the images at hand for the whole set, as evaluation does.

    Attributes:
        q: Order of the mean: the threat's conjugate order q; its p where the values are distances.
        processes: The processes that share the set.
    """

    name: ClassVar[str] = "set"

    def __init__(self, q: float = 2.0, processes: Processes = ALONE) -> None:
        self.q = q
        self.processes = processes
        self._values: Tensor | None = None

    def observe(self, index: Tensor | None, norms: Tensor, most: int | None = None) -> None:
        """Take in dual norms that the attack has just computed.

        Args:
            index: (N,), rows of the images in the training set, each at most once in a global batch.
            norms: (N,), their dual norms.
            most: The most images that any process hands in, where that is known.
        """
        self._values = norms.detach()

    def sample(self) -> Sample | None:
        """The values that give Υ, all processes' together; None where the estimator keeps none."""
        return None if self._values is None else Sample(self.processes.gather(self._values))

    def upsilon(self) -> float:
        """Υ as it is now known; the same number on every process."""
        if self._values is None:
            raise RuntimeError("no gradient norms were observed yet; call observe first")
        return power_mean(self._values, self.q, self.processes)


class Estimator(Sensitivity):
    """Υ of the training set as training goes on.

    The module calls `wanted` before each step; if that names images, it measures their dual norms and hands them to
    `measured`. The attack then calls `observe` with the batch's fresh norms. State goes into the checkpoint.
    """

    of_batches: ClassVar[bool] = False  # goes by the batches alone, whatever they are drawn from

    def __init__(self) -> None:
        super().__init__()
        self.n_train = 0
        self.seed = 0

    def begin(self, n_train: int, q: float, seed: int, processes: Processes, distances: bool = False) -> None:
        """Tell the estimator about the training set; called before training, and again after a resume.

        Args:
            n_train: Number of training images.
            q: Order of the mean.
            seed: The seed of the run.
            processes: The processes that train together.
            distances: Whether the values are distances to the boundary rather than dual norms.
        """
        self.n_train, self.q, self.seed, self.processes = n_train, q, seed, processes

    def observe(self, index: Tensor | None, norms: Tensor, most: int | None = None) -> None:
        """Bring together what all processes observe, in one collective operation and one wait, and take it in."""
        norms = norms.detach()
        if self.processes.world_size == 1 and norms.device.type == "cpu":
            self.take(None if index is None else index.cpu(), norms)
            return
        # Numbers below 2^53 are whole in float64.
        columns = [norms.double()] if index is None else [norms.double(), index.to(norms.device).double()]
        found = self.processes.to_host(torch.stack(columns, 1), most)
        self.take(None if index is None else found[:, 1].long(), found[:, 0].to(norms.dtype))

    def take(self, rows: Tensor | None, norms: Tensor) -> None:
        """Take in what all processes have observed together.

        Args:
            rows: (N,), rows in the training set, on the CPU.
            norms: (N,), their fresh dual norms, on the CPU.
        """

    def wanted(self, step: int) -> Tensor | None:
        """Rows of the training set to measure before this step, the same on all processes; None for none."""
        return None

    def measured(self, index: Tensor, norms: Tensor) -> None:
        """Take in the norms of all wanted images (all processes' together)."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {"values": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._values = state["values"]
