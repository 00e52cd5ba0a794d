"""Objectives against textbook formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from wdat.attacks import build
from wdat.errors import SettingError
from wdat.objectives import Objective

PGD = build("pgd", steps=2)


@pytest.fixture
def setting():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 4)).train()
    x = torch.rand(6, 3, 3, 3)
    return network, x, torch.randint(4, (6,)), (x + 0.1 * torch.rand_like(x)).clamp(0, 1), torch.rand_like(x)


def _gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


def _textbook_trades(network, x, x_adv, y, beta):
    """The loss of github.com/yaodongyu/TRADES."""
    clean, moved = network(x), network(x_adv)
    kl = nn.KLDivLoss(reduction="sum")(F.log_softmax(moved, dim=1), F.softmax(clean, dim=1)) / len(x)
    return F.cross_entropy(clean, y) + beta * kl


@pytest.mark.parametrize("which", ["trades", "wdat"])
def test_each_equals_the_textbook_with_its_gradients(setting, which):
    network, x, y, x_adv, _ = setting
    trades = which == "trades"
    objective = Objective(beta_p=6.0, pointwise_attack=PGD) if trades else Objective(beta_w=6.0)
    terms = objective(network, network(x), y, x_adv if trades else None, None if trades else x_adv)
    expected = _textbook_trades(network, x, x_adv, y, 6.0)
    assert_close(terms.loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(_gradients(network, terms.loss), _gradients(network, expected), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_close(terms.loss_clean, F.cross_entropy(network(x), y))
    assert (terms.loss_distributional is None) == trades
    assert (terms.loss_pointwise is None) != trades


def test_wdat_at_the_same_images_equals_trades_to_the_bit(setting):
    network, x, y, x_adv, _ = setting
    trades = Objective(beta_p=6.0, pointwise_attack=PGD)(network, network(x), y, x_adv, None)
    wdat = Objective(beta_w=6.0)(network, network(x), y, None, x_adv)
    assert torch.equal(trades.loss, wdat.loss)
    for a, b in zip(_gradients(network, trades.loss), _gradients(network, wdat.loss), strict=True):
        assert torch.equal(a, b)


def test_combined_is_the_sum_of_its_terms(setting):
    network, x, y, x_p, x_w = setting
    terms = Objective(beta_p=2.0, beta_w=3.0, pointwise_attack=PGD)(network, network(x), y, x_p, x_w)
    assert_close(terms.loss, terms.loss_clean + 2 * terms.loss_pointwise + 3 * terms.loss_distributional)
    assert not torch.equal(terms.loss_pointwise, terms.loss_distributional)


def test_pgd_at_is_cross_entropy_at_the_perturbed_images(setting):
    network, _, y, x_p, _ = setting
    objective = Objective(beta_p=1.0, clean=False, divergence=False, pointwise_attack=PGD)
    terms = objective(network, None, y, x_p, None)
    assert_close(terms.loss, F.cross_entropy(network(x_p), y))
    assert terms.loss_clean is None
    assert not objective.uses_attack


def test_clean_is_cross_entropy(setting):
    network, x, y, x_p, x_w = setting
    terms = Objective()(network, network(x), y, x_p, x_w)
    assert_close(terms.loss, F.cross_entropy(network(x), y))
    assert terms.loss_pointwise is terms.loss_distributional is None


# --- label smoothing ------------------------------------------------------------------------------------------------

MARKED = torch.tensor([True, False, True, True, False, False])


def _smoothed(logits, y, share):
    """Against probabilities written out: 1 − ε and the rest alike on all four classes."""
    target = F.one_hot(y, 4) * (1 - share[:, None]) + share[:, None] / 4
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize(("smooth", "share"), [("all", torch.full((6,), 0.1)), ("synthetic", 0.1 * MARKED)])
def test_smoothing_changes_the_clean_term_only(setting, smooth, share):
    network, x, y, x_p, x_w = setting
    weights = {"beta_p": 2.0, "beta_w": 3.0, "pointwise_attack": PGD}
    plain = Objective(**weights)(network, network(x), y, x_p, x_w, MARKED)
    smoothed = Objective(**weights, label_smoothing=0.1, smooth=smooth)(network, network(x), y, x_p, x_w, MARKED)
    assert_close(smoothed.loss_clean, _smoothed(network(x), y, share))
    assert abs(float((smoothed.loss_clean - plain.loss_clean).detach())) > 1e-3
    assert torch.equal(smoothed.loss_pointwise, plain.loss_pointwise)
    assert torch.equal(smoothed.loss_distributional, plain.loss_distributional)


@pytest.mark.parametrize("which", ["beta_p", "beta_w"])
def test_smoothing_reaches_the_cross_entropy_at_perturbed_images(setting, which):
    network, _, y, x_p, _ = setting
    at = {"clean": False, "divergence": False, "pointwise_attack": PGD, which: 1.0}
    images = (x_p, None) if which == "beta_p" else (None, x_p)
    terms = Objective(**at, label_smoothing=0.2)(network, None, y, *images)
    assert_close(terms.loss, F.cross_entropy(network(x_p), y, label_smoothing=0.2))


def test_smoothing_of_synthetic_images_leaves_the_others(setting):
    network, x, y, _, _ = setting
    plain, synthetic = Objective(), Objective(label_smoothing=0.1, smooth="synthetic")
    for marked in (None, torch.zeros(6, dtype=torch.bool)):
        assert_close(
            synthetic(network, network(x), y, None, None, marked).loss, plain(network, network(x), y, None, None).loss
        )
    each = synthetic.cross_entropy(network(x), y, MARKED)
    assert_close(each[~MARKED], F.cross_entropy(network(x), y, reduction="none")[~MARKED])
    assert_close(each[MARKED], F.cross_entropy(network(x), y, reduction="none", label_smoothing=0.1)[MARKED])


def test_without_smoothing_the_loss_is_the_same_to_the_bit(setting):
    network, x, y, _, _ = setting
    marked = Objective()(network, network(x), y, None, None, MARKED)
    assert torch.equal(marked.loss, F.cross_entropy(network(x), y, reduction="none").mean())


def test_the_gradient_passes_through_the_clean_prediction_too(setting):
    network, x, y, _, x_w = setting
    logits = network(x).detach().requires_grad_(True)
    loss = Objective(beta_w=1.0)(network, logits, y, None, x_w).loss_distributional
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(gradient.abs().sum()) > 0


def test_extreme_logits_give_finite_gradients(setting):
    network, x, y, _, x_w = setting
    with torch.no_grad():
        network[3].weight.mul_(1e4)
    loss = Objective(beta_w=6.0)(network, network(x), y, None, x_w).loss
    assert all(bool(g.isfinite().all()) for g in _gradients(network, loss))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"beta_p": -1.0}, "objective.beta_p"),
        ({"beta_w": math.nan}, "objective.beta_w"),
        ({"beta_p": 1.0}, "objective.pointwise_attack"),
        ({"beta_p": 1.0, "pointwise_attack": build("wpgd")}, "objective.pointwise_attack"),
        ({"pointwise_delta": "-1/255"}, "objective.pointwise_delta"),
        ({"label_smoothing": 1.0}, "objective.label_smoothing"),
        ({"label_smoothing": -0.1}, "objective.label_smoothing"),
        ({"label_smoothing": math.nan}, "objective.label_smoothing"),
        ({"smooth": "synthetics"}, "objective.smooth.*synthetic"),
    ],
)
def test_impossible_settings_are_named(arguments, word):
    with pytest.raises(SettingError, match=word):
        Objective(**arguments)


def test_an_objective_without_any_term_is_refused():
    with pytest.raises(SettingError, match="objective"):
        Objective(clean=False)


@pytest.mark.parametrize("missing", ["x_w", "logits"])
def test_a_missing_input_of_a_wanted_term_is_not_passed_over(setting, missing):
    """Otherwise `wdat` silently becomes clean training, or cross-entropy stands in for the divergence."""
    network, x, y, _, x_w = setting
    logits = None if missing == "logits" else network(x)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        Objective(beta_w=6.0)(network, logits, y, None, None if missing == "x_w" else x_w)


def test_budgets_are_read_as_text():
    assert Objective(pointwise_delta="8/255").pointwise_budget == 8 / 255
    assert Objective().pointwise_budget is None
