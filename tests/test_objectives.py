"""Objectives against textbook formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from wdat.attacks import build
from wdat.data.batch import Batch
from wdat.errors import SettingError
from wdat.losses import boosted_cross_entropy
from wdat.objectives import MART, PGDAT, TRADES, WDAT, AttackAT, Clean, Combined, DualAscent, total
from wdat.objectives.dual_ascent import crossing


class Given:
    """A step context with moved images that are known; remembers what it was asked for."""

    def __init__(self, network, x, x_p=None, x_w=None):
        self.network, self.x, self.x_p, self.x_w = network, x, x_p, x_w
        self.asked = []

    def logits(self):
        self.asked.append("logits")
        return self.network(self.x)

    def distributional(self, with_logits=False):
        self.asked.append("distributional")
        return self.x_w

    def pointwise(self, attack, delta=None, with_logits=False):
        self.asked.append(("pointwise", attack.name, delta))
        return self.x_p


@pytest.fixture
def setting():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 4)).train()
    x = torch.rand(6, 3, 3, 3)
    return network, x, torch.randint(4, (6,)), (x + 0.1 * torch.rand_like(x)).clamp(0, 1), torch.rand_like(x)


def terms_of(objective, network, x, y, x_p=None, x_w=None, synthetic=None):
    place = torch.arange(len(y))
    return objective(network, Batch(x, y, place, place, len(y), 0, synthetic), Given(network, x, x_p, x_w))


def loss_of(objective, *arguments):
    return total(terms_of(objective, *arguments))


def _gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


def _textbook_trades(network, x, x_adv, y, beta):
    """The loss of github.com/yaodongyu/TRADES."""
    clean, moved = network(x), network(x_adv)
    kl = nn.KLDivLoss(reduction="sum")(F.log_softmax(moved, dim=1), F.softmax(clean, dim=1)) / len(x)
    return F.cross_entropy(clean, y) + beta * kl


@pytest.mark.parametrize("objective", [TRADES(), WDAT()], ids=["trades", "wdat"])
def test_each_equals_the_textbook_with_its_gradients(setting, objective):
    network, x, y, x_adv, _ = setting
    terms = terms_of(objective, network, x, y, x_adv, x_adv)
    expected = _textbook_trades(network, x, x_adv, y, 6.0)
    assert_close(total(terms), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(_gradients(network, total(terms)), _gradients(network, expected), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_close(terms["clean"].values, F.cross_entropy(network(x), y, reduction="none"))
    assert set(terms) == {"clean", "pointwise" if isinstance(objective, TRADES) else "distributional"}


def test_wdat_at_the_same_images_equals_trades_to_the_bit(setting):
    network, x, y, x_adv, _ = setting
    trades, wdat = (loss_of(o, network, x, y, x_adv, x_adv) for o in (TRADES(), WDAT()))
    assert torch.equal(trades, wdat)
    for a, b in zip(_gradients(network, trades), _gradients(network, wdat), strict=True):
        assert torch.equal(a, b)


def test_combined_is_the_sum_of_its_terms(setting):
    network, x, y, x_p, x_w = setting
    terms = terms_of(Combined(beta_p=2.0, beta_w=3.0), network, x, y, x_p, x_w)
    clean, pointwise, distributional = (terms[k].values.mean() for k in ("clean", "pointwise", "distributional"))
    assert_close(total(terms), clean + 2 * pointwise + 3 * distributional)
    assert not torch.equal(pointwise, distributional)


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (Combined(beta_w=0.0), ["logits", ("pointwise", "pgd", None)]),
        (Combined(beta_p=0.0), ["distributional", "logits"]),
        (WDAT(beta_w=0.0), ["logits"]),
        (TRADES(beta_p=0), ["logits"]),
        (PGDAT(pointwise_delta="8/255"), [("pointwise", "pgd", 8 / 255)]),
        (AttackAT(), ["distributional"]),
        (MART(), ["logits", ("pointwise", "pgd", None)]),
        (MART(beta_p=0), [("pointwise", "pgd", None)]),
        (Clean(), ["logits"]),
    ],
    ids=str,
)
def test_nothing_is_asked_for_that_has_no_part(setting, objective, wanted):
    network, x, y, x_p, x_w = setting
    context, place = Given(network, x, x_p, x_w), torch.arange(6)
    objective(network, Batch(x, y, place, place, 6, 0), context)
    assert sorted(context.asked, key=str) == sorted(wanted, key=str)


def test_adversarial_training_is_cross_entropy_at_the_perturbed_images(setting):
    network, x, y, x_p, x_w = setting
    assert_close(loss_of(PGDAT(), network, x, y, x_p, x_w), F.cross_entropy(network(x_p), y))
    assert_close(loss_of(AttackAT(), network, x, y, x_p, x_w), F.cross_entropy(network(x_w), y))


@pytest.mark.parametrize("kind", [PGDAT, AttackAT])
def test_adversarial_training_may_have_a_bounded_loss(setting, kind):
    network, x, y, x_adv, _ = setting
    p = network(x_adv).softmax(1)[torch.arange(6), y]
    ours = loss_of(kind(gce_q=0.7), network, x, y, x_adv, x_adv)
    assert_close(ours, ((1 - p**0.7) / 0.7).mean())
    assert torch.equal(loss_of(kind(gce_q=0.0), network, x, y, x_adv, x_adv), F.cross_entropy(network(x_adv), y))


def test_mart_equals_the_textbook_with_its_gradients(setting):
    """The loss of github.com/YisenWang/MART, written out, without the small numbers that it adds within logarithms."""
    network, x, y, x_adv, _ = setting
    clean, moved = network(x).softmax(1), network(x_adv).softmax(1)
    rows = torch.arange(6)
    wrong = moved.clone()
    wrong[rows, y] = 0
    boosted = -moved[rows, y].log() - (1 - wrong.max(1).values).log()
    kl = (clean * (clean / moved).log()).sum(1)
    expected = boosted.mean() + 4.0 * (kl * (1 - clean[rows, y])).mean()
    ours = loss_of(MART(beta_p=4.0), network, x, y, x_adv)
    assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(_gradients(network, ours), _gradients(network, expected), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_clean_is_cross_entropy(setting):
    network, x, y, x_p, x_w = setting
    terms = terms_of(Clean(), network, x, y, x_p, x_w)
    assert set(terms) == {"clean"}
    assert_close(total(terms), F.cross_entropy(network(x), y))


# --- mixed images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (Clean(label_smoothing=0.1), lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1)),
        (PGDAT(), lambda z, y: F.cross_entropy(z, y, reduction="none")),
        (AttackAT(gce_q=1.0), lambda z, y: 1 - z.softmax(1).gather(1, y[:, None]).squeeze(1)),
        (MART(beta_p=0), lambda z, y: F.cross_entropy(z, y, reduction="none") + boosted_cross_entropy(z, y)),
    ],
    ids=lambda given: type(given).__name__,
)
def test_the_labels_of_a_mixed_image_count_by_their_shares(setting, objective, loss):
    network, x, y, x_adv, _ = setting
    other, share, place = (y + 1) % 4, torch.linspace(0.5, 1, 6), torch.arange(6)
    batch = Batch(x, y, place, place, 6, 0, None, other, share)
    logits = network(x if isinstance(objective, Clean) else x_adv)
    found = total(objective(network, batch, Given(network, x, x_adv, x_adv)))
    assert_close(found, (share * loss(logits, y) + (1 - share) * loss(logits, other)).mean())


# --- the dual on the distances --------------------------------------------------------------------------------------


def slow_crossing(margins):
    """One image: the first zero of the broken line through its margins, and the slope there."""
    g = len(margins) - 1
    if margins[0] > 0:
        return 0.0
    for k in range(1, g + 1):
        if margins[k] > 0:
            return (k - 1 + margins[k - 1] / (margins[k - 1] - margins[k])) / g
    return 1.0


def test_a_crossing_is_the_first_zero_of_a_broken_line():
    margins = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)) - 0.5
    t, slope = crossing(margins)
    assert_close(t, torch.tensor([slow_crossing(one.tolist()) for one in margins.T]), rtol=1e-5, atol=1e-6)
    holds = (margins <= 0).all(0)
    assert 0 < int(holds.sum()) < 200
    assert torch.equal(slope.isinf(), holds)
    steady, rise = crossing(torch.linspace(-3, 1, 5)[:, None])
    assert_close((steady, rise), (torch.tensor([0.75]), torch.tensor([4.0])))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5])
def test_dual_ascent_raises_the_distances_as_the_dual_weighs_them(order):
    """On a linear network t is known in closed form, and autograd differentiates it."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x, y = torch.rand(40, 3, 2, 2, dtype=torch.float64), torch.randint(2, (40,))
    network[1].weight.data.mul_(10)
    weight, sign = network[1].weight, (2 * y - 1).double()
    along = torch.sign(weight[0] - weight[1]).detach().reshape(3, 2, 2)  # lowers class 1
    moved = x + 0.05 * sign[:, None, None, None] * along
    with torch.no_grad():
        z = network(x)
        network[1].bias[1] += (z[:, 0] - z[:, 1]).mean()  # either side has images

    def margins(images):
        logits = network(images)
        return sign * (logits[:, 0] - logits[:, 1])

    start, end = margins(x), margins(moved)
    crossed = (start < 0) & (end > 0)
    assert 0 < int(crossed.sum()) < int((start < 0).sum())
    share = -start / (margins(moved) - start)
    slope = (end - start).detach()
    assert float(slope[crossed].min()) > 0.5, "no floor"
    wanted = torch.autograd.grad(-(share[crossed] ** order).sum() / 40, list(network.parameters()))
    terms = terms_of(DualAscent(order=order), network, x, y, x_w=moved)
    found = torch.autograd.grad(terms["distances"].values.mean(), list(network.parameters()), retain_graph=True)
    assert_close(found, wanted)
    errs = start > 0
    assert_close(
        terms["misclassified"].values, torch.where(errs, F.cross_entropy(network(x), y, reduction="none"), 0.0)
    )


# --- label smoothing ------------------------------------------------------------------------------------------------

MARKED = torch.tensor([True, False, True, True, False, False])


def _smoothed(logits, y, share):
    """Against probabilities written out: 1 − ε and the rest alike on all four classes."""
    target = F.one_hot(y, 4) * (1 - share[:, None]) + share[:, None] / 4
    return -(target * logits.log_softmax(1)).sum(1)


@pytest.mark.parametrize(("smooth", "share"), [("all", torch.full((6,), 0.1)), ("synthetic", 0.1 * MARKED)])
def test_smoothing_changes_the_clean_term_only(setting, smooth, share):
    network, x, y, x_p, x_w = setting
    plain = terms_of(Combined(), network, x, y, x_p, x_w, MARKED)
    smoothed = terms_of(Combined(label_smoothing=0.1, smooth=smooth), network, x, y, x_p, x_w, MARKED)
    assert_close(smoothed["clean"].values, _smoothed(network(x), y, share))
    assert float((smoothed["clean"].values - plain["clean"].values).detach().abs().max()) > 1e-3
    for name in ("pointwise", "distributional"):
        assert torch.equal(smoothed[name].values, plain[name].values)


@pytest.mark.parametrize("kind", [PGDAT, AttackAT])
def test_smoothing_reaches_the_cross_entropy_at_perturbed_images(setting, kind):
    network, x, y, x_adv, _ = setting
    loss = loss_of(kind(label_smoothing=0.2), network, x, y, x_adv, x_adv)
    assert_close(loss, F.cross_entropy(network(x_adv), y, label_smoothing=0.2))


def test_smoothing_of_synthetic_images_leaves_the_others(setting):
    network, x, y, _, _ = setting
    synthetic = Clean(label_smoothing=0.1, smooth="synthetic")
    for marked in (None, torch.zeros(6, dtype=torch.bool)):
        ours = loss_of(synthetic, network, x, y, None, None, marked)
        assert_close(ours, loss_of(Clean(), network, x, y))
    each = terms_of(synthetic, network, x, y, None, None, MARKED)["clean"].values
    assert_close(each[~MARKED], F.cross_entropy(network(x), y, reduction="none")[~MARKED])
    assert_close(each[MARKED], F.cross_entropy(network(x), y, reduction="none", label_smoothing=0.1)[MARKED])


def test_without_smoothing_the_loss_is_the_same_to_the_bit(setting):
    network, x, y, _, _ = setting
    marked = loss_of(Clean(), network, x, y, None, None, MARKED)
    assert torch.equal(marked, F.cross_entropy(network(x), y, reduction="none").mean())


def test_the_gradient_passes_through_the_clean_prediction_too(setting):
    network, x, y, _, x_w = setting
    place = torch.arange(6)
    logits = network(x).detach().requires_grad_(True)
    context = Given(lambda _: logits, x, None, x_w)
    terms = WDAT()(network, Batch(x, y, place, place, 6, 0), context)
    (gradient,) = torch.autograd.grad(terms["distributional"].values.sum(), logits)
    assert float(gradient.abs().sum()) > 0


def test_extreme_logits_give_finite_gradients(setting):
    network, x, y, _, x_w = setting
    with torch.no_grad():
        network[3].weight.mul_(1e4)
    loss = loss_of(WDAT(), network, x, y, None, x_w)
    assert all(bool(g.isfinite().all()) for g in _gradients(network, loss))


@pytest.mark.parametrize(
    ("kind", "arguments", "word"),
    [
        (TRADES, {"beta_p": -1.0}, "objective.beta_p.*negative"),
        (WDAT, {"beta_w": math.nan}, "objective.beta_w"),
        (WDAT, {"beta_w": math.inf}, "objective.beta_w"),
        (WDAT, {"beta_w": "6"}, "objective.beta_w"),
        (Combined, {"beta_w": -1.0}, "objective.beta_w"),
        (TRADES, {"pointwise_attack": build("wpgd")}, "objective.pointwise_attack"),
        (PGDAT, {"pointwise_delta": "-1/255"}, "objective.pointwise_delta"),
        (Clean, {"label_smoothing": 1.0}, r"objective.label_smoothing.*\[0, 1\)"),
        (Clean, {"label_smoothing": -0.1}, "objective.label_smoothing"),
        (WDAT, {"label_smoothing": math.nan}, "objective.label_smoothing"),
        (WDAT, {"smooth": "synthetics"}, "objective.smooth.*synthetic"),
        (MART, {"beta_p": -1.0}, "objective.beta_p"),
        (DualAscent, {"order": math.inf}, r"objective.order.*threat\.p finite"),
        (DualAscent, {"beta_clean": -1}, "objective.beta_clean"),
        (DualAscent, {"points": 0}, "objective.points"),
        (PGDAT, {"gce_q": 1.5}, r"objective.gce_q.*\[0, 1\]"),
        (AttackAT, {"gce_q": -0.1}, "objective.gce_q"),
        (AttackAT, {"gce_q": 0.5, "label_smoothing": 0.1}, "label_smoothing.*gce_q"),
    ],
)
def test_impossible_settings_are_named(kind, arguments, word):
    with pytest.raises(SettingError, match=word):
        kind(**arguments)
