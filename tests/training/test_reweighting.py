"""Worst-case weights against a general solver, and what a batch makes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from scipy.special import rel_entr

from wdat.distributed import ALONE, Processes
from wdat.errors import SettingError
from wdat.objectives import Term, total
from wdat.training.reweighting import SHAPES, KLReweighting, divergence, worst_weights

ORDERS = list(SHAPES)
UNIFORM = np.full(6, 1 / 6)


def kl(weights, order):
    pair = (np.full(len(weights), 1 / len(weights)), weights)
    return rel_entr(*(pair if order == "uniform_weights" else pair[::-1])).sum()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("radius", [0.01, 0.1, 0.5])
def test_the_weights_solve_their_problem(order, radius):
    losses = np.random.default_rng(0).exponential(size=6)
    found = worst_weights(losses, radius, order)
    solved = minimize(
        lambda a: -a @ losses, UNIFORM, method="SLSQP", bounds=[(1e-9, 1)] * 6, options={"ftol": 1e-12, "maxiter": 500},
        constraints=[{"type": "eq", "fun": lambda a: a.sum() - 1},
                     {"type": "ineq", "fun": lambda a: radius - kl(a, order)}],
    )  # fmt: skip
    assert solved.success
    np.testing.assert_allclose(found, solved.x, atol=2e-4)
    assert found @ losses >= solved.x @ losses - 1e-7


@given(arrays(np.float64, 8, elements=st.floats(0, 1e3)), st.floats(1e-3, 1), st.sampled_from(ORDERS))
def test_the_ball_is_used_up_and_larger_losses_weigh_more(losses, radius, order):
    found = worst_weights(losses, radius, order)
    assert found.sum() == pytest.approx(1)
    assert (np.diff(found[np.argsort(losses)]) >= -1e-12).all()
    reach = math.inf if order == "uniform_weights" else math.log(8 / (losses == losses.max()).sum())
    if np.ptp(losses) > 1e-6 and radius < 0.9 * reach:
        assert kl(found, order) == pytest.approx(radius, rel=1e-4)
        assert divergence(found, order) == pytest.approx(radius, rel=1e-4)


def test_weights_have_the_form_of_their_solution():
    losses = np.array([0.1, 0.4, 1.0, 2.0])
    inverse = 1 / worst_weights(losses, 0.1, "uniform_weights")
    np.testing.assert_allclose(np.diff(inverse) / np.diff(losses), np.diff(inverse)[0] / np.diff(losses)[0], rtol=1e-6)
    logs = np.log(worst_weights(losses, 0.1, "weights_uniform"))
    np.testing.assert_allclose(np.diff(logs) / np.diff(losses), np.diff(logs)[0] / np.diff(losses)[0], rtol=1e-6)


def test_what_a_ball_can_not_reach():
    np.testing.assert_allclose(worst_weights(np.array([1.0, 2.0, 2.0]), 5.0, "weights_uniform"), [0, 0.5, 0.5])
    for losses in ([2.0, 2.0], [1.0], [math.nan, 1.0], [math.inf, 1.0], []):
        n = len(losses)
        np.testing.assert_allclose(worst_weights(np.array(losses), 0.1, "weights_uniform"), np.full(n, 1 / max(n, 1)))


def test_an_objective_becomes_its_worst_weighted_mean():
    values = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(True)
    terms = {"clean": Term(values), "distributional": Term(values**2, 6.0)}
    losses = (values + 6 * values**2).detach().numpy()
    loss = total(KLReweighting(radius=0.2)(terms, ALONE))
    weights = worst_weights(losses, 0.2, "uniform_weights")
    assert float(loss.detach()) == pytest.approx(weights @ losses)
    (gradient,) = torch.autograd.grad(loss, values)
    np.testing.assert_allclose(gradient.numpy(), weights * (1 + 12 * values.detach().numpy()))


class Part(Processes):
    """One of two processes, which knows what the other has."""

    world_size = 2

    def __init__(self, rank, everyone):
        self.rank, self.everyone = rank, everyone

    def gather(self, values):
        assert torch.equal(values, self.everyone[self.everyone[:, 1] == self.rank])
        return self.everyone


def test_processes_weigh_their_images_among_all():
    losses = torch.tensor([0.3, 2.0, 0.1, 1.0, 0.7], dtype=torch.float64)
    ranks = torch.tensor([0.0, 0, 0, 1, 1], dtype=torch.float64)
    reweighting, everyone = KLReweighting(), torch.stack([losses, ranks], 1)
    parts = [reweighting.weights(losses[ranks == rank], Part(rank, everyone)) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(parts), reweighting.weights(losses, ALONE))
    assert float(torch.cat(parts).mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"radius": 0.0}, "reweighting.radius"), ({"radius": math.inf}, "reweighting.radius"),
     ({"order": "uniform"}, "reweighting.order.*uniform_weights")],
)  # fmt: skip
def test_impossible_settings_are_named(options, word):
    with pytest.raises(SettingError, match=word):
        KLReweighting(**options)


def test_a_batch_of_one_is_refused():
    with pytest.raises(SettingError, match=r"data\.batch_size=1.*at least 2"):
        KLReweighting().check(1)
    KLReweighting().check(2)
