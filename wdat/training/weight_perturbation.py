"""AWP: the gradient of a step taken at weights that were moved against it (Wu, Xia, Wang 2020, arXiv 2004.05884)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.distributed import Processes
from wdat.errors import SettingError, check_real


@dataclass(frozen=True, kw_only=True)
class AWP:
    """Adversarial weight perturbation around any objective.

    v_l = γ ‖w_l‖ g_l/‖g_l‖ for each trained tensor of more than one dimension, g the gradient of the objective at the
    perturbed images, over the global batch. The update's gradient is taken at w + v, with the same images, and applied
    to w. BatchNorm's statistics are those of the pass at w + v alone. Published: γ 0.01 with PGD-AT, 0.005 with TRADES,
    after 10 of 200 epochs.

    A step costs one more forward and backward pass of each set of images in the objective: one more pass of each image
    for adversarial training, two more for TRADES, W-DAT and MART. Nothing is kept from step to step.

    Attributes:
        gamma: γ, in [0, 1]; 0 moves nothing.
        start: Share of the run after which it begins.
    """

    gamma: float = 0.01
    start: float = 0.05

    def __post_init__(self) -> None:
        hint = "a share of each tensor's norm; 0.01 with pgd_at, 0.005 with trades"
        check_real("weight_perturbation.gamma", self.gamma, "[0, 1]", hint)
        check_real("weight_perturbation.start", self.start, "[0, 1)", "a share of the run")

    @staticmethod
    def weights(network: nn.Module) -> list[nn.Parameter]:
        """What is moved.

        Raises:
            SettingError: If there is nothing.
        """
        found = [p for p in network.parameters() if p.requires_grad and p.dim() > 1]
        if not found:
            raise SettingError(
                "weight_perturbation=awp moves trained weights of more than one dimension, and the network trains "
                "none: set finetune=all, or weight_perturbation=none"
            )
        return found

    def move(self, network: nn.Module, loss: Tensor, processes: Processes) -> Moved:
        """Move the weights up the gradient of the loss.

        Args:
            network: With gradients; its `.grad` are left alone.
            loss: Of this process's part of the batch, such that the processes' mean is the global batch's.
            processes: All get the same weights.
        """
        weights = self.weights(network)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = zip(weights, gradients, strict=True)
        flat = torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs])
        processes.add(flat)
        moved = Moved(weights)
        with torch.no_grad():
            sizes = [weight.numel() for weight in weights]
            pieces: tuple[Tensor, ...] = flat.split(sizes)  # type: ignore[no-untyped-call]
            for weight, piece in zip(weights, pieces, strict=True):
                length = piece.norm()
                if bool(length > 0) and bool(length.isfinite()):
                    weight.add_(piece.view_as(weight) * (self.gamma * weight.norm() / length))
        return moved


class Moved:
    """Weights away from where they belong.

    Args:
        weights: As they are before they are moved.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.before = [weight.detach().clone() for weight in weights]

    def restore(self) -> None:
        """Put the weights back, to the bit."""
        with torch.no_grad():
            for weight, before in zip(self.weights, self.before, strict=True):
                weight.copy_(before)


@contextmanager
def kept_buffers(network: nn.Module) -> Iterator[None]:
    """Inside, passes in train mode leave no trace in BatchNorm's statistics or any other buffer."""
    before = [(buffer, buffer.detach().clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
