"""Υ in the training step where synthetic images are mixed in."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_training import QUIET, digits, fit, module_for, small_cnn

from wdat.sensitivity import Batch, Exact, Table, with_pool

pytestmark = QUIET


@pytest.mark.parametrize("make", [partial(Exact, every=1), Table])
@pytest.mark.parametrize("every", [1, None])
def test_with_a_pool_it_is_that_of_the_mixture(pool, make, every):
    """Against a pass over the originals and the whole pool, of a network that stays as it is."""
    chosen = {"path": pool, "fraction": 0.6, "sample": 90, "every": every}
    plain = digits(crop=0, synthetic=chosen)
    sensitivity = with_pool(make(), plain.pool, plain.pool_share, 90, every)
    module = fit(module_for(small_cnn(), sensitivity=sensitivity, optimizer=partial(torch.optim.SGD, lr=0.0)), plain, 3)
    own, share = plain.images("train").originals, plain.pool_share
    drawn, labels = plain.pool.read(torch.arange(90))
    images = torch.cat([own.pixels(torch.arange(48), None), drawn])
    x = (images.float() / 255).requires_grad_()
    loss = F.cross_entropy(module.network.eval()(x), torch.cat([own.labels, labels]), reduction="sum")
    squares = torch.autograd.grad(loss, x)[0].flatten(1).abs().sum(1).double().square()
    assert share == 10 / 16
    wanted = float(((1 - share) * squares[:48].mean() + share * squares[48:].mean()).sqrt())
    assert abs(wanted / float(squares[:48].mean().sqrt()) - 1) > 0.02, "the originals alone are something else"
    found = module.sensitivity.upsilon()
    assert found == pytest.approx(wanted, rel=1e-5 if every else 0.15)  # by the thirty images that the batches drew


def test_estimators_that_go_by_the_batch_see_the_mixture(pool):
    data = digits(crop=0, synthetic={"path": pool})
    sensitivity = with_pool(Batch(), data.pool, data.pool_share, 90, None)
    module = fit(module_for(small_cnn(), sensitivity=sensitivity), data, 1)
    assert type(module.sensitivity) is Batch
    assert len(module.sensitivity.sample().values) == 16
