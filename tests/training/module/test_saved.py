"""What a training step keeps for its backward passes: the share of a GPU's memory that the method decides about."""

from __future__ import annotations

import pytest
import torch
from small_training import NETWORKS, QUIET, fit, module_for

from wdat.attacks import build
from wdat.objectives import TRADES, WDAT

pytestmark = QUIET
STEPS = {"loss": "kl", "steps": 4, "step_size": 0.5}


class Kept:
    """A tensor that a graph keeps, counted as long as it is kept."""

    alive = most = total = 0

    def __init__(self, tensor):
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        Kept.alive += self.bytes
        Kept.total += self.bytes
        Kept.most = max(Kept.most, Kept.alive)

    def __del__(self):
        Kept.alive -= self.bytes


def bytes_of(network, data, objective, attack):
    """The most bytes that are kept at a time in two steps, and all that were kept one after the other."""
    Kept.alive = Kept.most = Kept.total = 0
    module = module_for(network, objective, attack)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        fit(module, data, 2)
    return Kept.most, Kept.total


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", ["ce", "redlr"])
def test_a_wdat_step_keeps_no_more_than_a_trades_step(data, network, loss):
    budget = build("wpgd_budget", radii_loss=loss, radius_max=4.0, **STEPS)
    ours = bytes_of(NETWORKS[network](), data, WDAT(), budget)
    trades = bytes_of(NETWORKS[network](), data, TRADES(pointwise_attack=build("pgd", **STEPS)), budget)
    assert trades[0] > 0
    assert ours[0] <= 1.01 * trades[0], "but for a few numbers an image"
    assert ours[1] <= 1.01 * trades[1]
    if loss == "redlr":
        assert ours[1] < 0.8 * trades[1], "images without a radius take no steps"
