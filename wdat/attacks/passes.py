"""Counting what a search costs: images that go forward and backward through a network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from wdat.gradients import is_compiled


@dataclass
class Passes:
    """Images that have gone through a network so far.

    Attributes:
        forward: Images in forward passes, each as often as it went.
        backward: Images in backward passes, likewise; several gradients from one forward pass count several times.
    """

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Both directions."""
        return self.forward + self.backward


class Counted(nn.Module):
    """A network that counts; it gives what the network gives.

    Attributes:
        network: Takes images (N, ...), gives logits (N, K).
        passes: The count.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.passes = Passes()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images if is_compiled(self.network) else images.clone())  # it may write into it
        self.passes.forward += len(images)
        if logits.requires_grad:
            logits.register_hook(self._back)  # type: ignore[no-untyped-call]
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.passes.backward += len(gradient)
