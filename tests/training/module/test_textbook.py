"""The training step against an independent textbook loop of TRADES."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sampled import product
from small_training import DELTA, NETWORKS, QUIET, SEED, digits, distributional, fit, module_for, same, small_cnn
from torch import nn

from wdat.attacks import build
from wdat.data import ImageDataModule
from wdat.objectives import TRADES, WDAT
from wdat.seeding import normal
from wdat.threat import ThreatModel

pytestmark = QUIET


def textbook_trades(network, batches, steps, threat, inner=4, step_size=0.25, beta=6.0, dtype=torch.float32):
    """Zhang et al. 2019 as their paper has it, written without any of this project's code but its noise."""
    network = copy.deepcopy(network).to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    divergence = nn.KLDivLoss(reduction="sum", log_target=True)  # log probabilities, as rounding decides some signs
    for step in range(steps):
        x, y = batches[step].x.to(dtype), batches[step].y
        network.eval()
        with torch.no_grad():
            clean = F.log_softmax(network(x), dim=1)
        noise = normal(SEED, "noise", step, torch.arange(len(x)), x[0].numel()).view_as(x).to(dtype)
        x_adv = x + 0.001 * noise[batches[step].position]
        for _ in range(inner):
            x_adv = x_adv.detach().requires_grad_()
            loss = divergence(F.log_softmax(network(x_adv), dim=1), clean)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            if threat.norm == "linf":
                x_adv = x_adv.detach() + step_size * threat.delta * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, x - threat.delta), x + threat.delta)
            else:
                length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                offset = x_adv.detach() + step_size * threat.delta * gradient / length - x
                x_adv = x + offset.flatten(1).renorm(2, 0, threat.delta).view_as(x)
            x_adv = x_adv.clamp(0, 1)
        network.train()
        optimizer.zero_grad()
        logits = network(x)
        robust = divergence(F.log_softmax(network(x_adv.detach()), dim=1), F.log_softmax(logits, dim=1)) / len(x)
        (F.cross_entropy(logits, y) + beta * robust).backward()
        optimizer.step()
    return network


def trades(inner=4, **options):
    return TRADES(pointwise_attack=build("pgd", loss="kl", steps=inner, step_size=0.25), **options)


@pytest.mark.parametrize(("kind", "norm", "name"), product(NETWORKS, ["linf", "l2"], ["wpgd_budget", "pgd"], every=3))
def test_wdat_with_uniform_radii_is_trades_to_the_bit(data, kind, norm, name):
    threat = ThreatModel(math.inf if name == "wpgd_budget" else 2, norm, DELTA if norm == "linf" else 0.5)
    network = NETWORKS[kind]()
    ours = fit(module_for(copy.deepcopy(network), trades(), threat=threat), data, 5)
    wdat = fit(module_for(copy.deepcopy(network), WDAT(), distributional(name), threat), data, 5)
    assert same(wdat.network, ours.network)
    assert not same(wdat.network, network)


class Doubled(ImageDataModule):
    """The same images in double precision; everything else, and so the noise, as it is."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch._replace(x=batch.x.double())


@pytest.mark.parametrize(("kind", "norm", "objective"), product(NETWORKS, ["linf", "l2"], ["trades", "wdat"], every=3))
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 1), (torch.float64, 5)])  # signs amplify rounding
def test_both_are_textbook_trades(kind, norm, objective, dtype, steps):
    data = digits(kind=ImageDataModule if dtype == torch.float32 else Doubled)
    threat = ThreatModel(math.inf, norm, DELTA if norm == "linf" else 0.5)
    network = NETWORKS[kind]().to(dtype)
    loader = data.train_dataloader()
    batches = list(loader)
    loader.plan.set_epoch(1)
    batches += list(loader)
    wanted = textbook_trades(network, batches, steps, threat, dtype=dtype)
    terms = trades() if objective == "trades" else WDAT()
    found = fit(module_for(copy.deepcopy(network), terms, distributional(), threat), data, steps).network
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=1e-6, msg=key)
    change = max(
        float((new - old).detach().abs().max())
        for new, old in zip(found.parameters(), network.parameters(), strict=True)
    )
    assert change > 1e-3


def test_a_shared_budget_is_not_trades(data):
    """The control of the two tests above: what they compare does depend on the radii."""
    network = small_cnn()
    ours = fit(module_for(copy.deepcopy(network), trades()), data)
    wdat = fit(module_for(copy.deepcopy(network), WDAT(), distributional()), data)
    assert not same(wdat.network, ours.network)


def test_the_budget_of_the_pointwise_term_may_be_another(data):
    network = small_cnn()
    half = fit(module_for(copy.deepcopy(network), trades(pointwise_delta=DELTA / 2)), data)
    full = fit(module_for(copy.deepcopy(network), trades()), data)
    assert not same(half.network, full.network)
    small = fit(module_for(copy.deepcopy(network), trades(), threat=ThreatModel(2, "linf", DELTA / 2)), data)
    assert same(half.network, small.network)
