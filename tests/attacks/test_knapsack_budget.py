"""Training attacks by distance: radii by hand on a linear network, what a step costs, and short real trainings."""

from __future__ import annotations

import copy
import math
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from wdat import models
from wdat.attacks import Context, attack, build
from wdat.attacks.knapsack_allocation import solve
from wdat.data import ImageDataModule
from wdat.errors import SettingError
from wdat.objectives import TRADES, WDAT
from wdat.sensitivity import Batch, Ema, Exact, Subsample
from wdat.threat import ThreatModel
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

NAMES = ["knapsack_budget", "critical", "critical_draw"]
NORMS = ["linf", "l2"]
ORDERS = [1, 2, math.inf]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings(r"ignore:.*module\(s\) in eval mode at the start of training"),
]


def linear(n=16, wrong=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).double()
        x = 0.5 + 0.06 * torch.randn(n, 3, 3, 3, dtype=torch.float64).clamp(-3, 3)
        with torch.no_grad():
            network[1].bias.copy_(-(network[1].weight @ torch.full((27,), 0.5, dtype=torch.float64)))
            y = network(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % 4
    return network, x, y


def first_order(network, x, y, norm):
    """Margin over the dual norm of its gradient, image by image; 0 where misclassified."""
    w, b = network[1].weight.detach().numpy(), network[1].bias.detach().numpy()
    found = []
    for image, label in zip(x.flatten(1).numpy(), y.tolist(), strict=True):
        z = w @ image + b
        other = max((j for j in range(4) if j != label), key=lambda j: z[j])
        found.append(max(0.0, z[label] - z[other]) / np.linalg.norm(w[label] - w[other], 1 if norm == "linf" else 2))
    return torch.tensor(found)


def reach_by_hand(distances, p, delta):
    """The radius of critical: δ itself where the attacker is pointwise."""
    return delta if math.isinf(p) else critical_by_hand(distances, p, delta)


def critical_by_hand(distances, p, delta):
    """The largest distance that the cheapest-first attacker pays for, the fractional one included."""
    left, largest = float(len(distances)), 0.0
    for d in sorted(v for v in distances.tolist() if 0 < v < math.inf):
        if (math.isinf(p) and d > delta) or left <= 0:
            break
        largest = d
        left -= 0 if math.isinf(p) else (d / delta) ** p
    return largest


def running(values):
    """An estimator that knows these values of the whole training set."""
    estimator = Exact()
    estimator.measured(torch.arange(len(values)), values)
    return estimator


def attacked(name, network, x, y, threat, values, **options):
    settings = {"loss": "kl", "steps": 4, "step_size": 0.5, **options}
    draws = (1 + torch.arange(len(x), dtype=x.dtype)) / (len(x) + 1)
    context = Context(sensitivity=running(values), index=torch.arange(len(x)), uniform=lambda: draws, training=True)
    return build(name, **settings)(network, x, y, threat, context)


# --- radii ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("kappa", [0.5, 1.2])
def test_radii_of_knapsack_budget_by_hand(norm, p, kappa):
    network, x, y = linear()
    d = first_order(network, x, y, norm)
    delta = 0.7 * float(d.median())
    reach = critical_by_hand(d, p, delta)
    assert 0 < int(((d > 0) & (d <= reach)).sum()) < int((d > 0).sum())  # some are reached, some are not
    result = attacked("knapsack_budget", network, x, y, ThreatModel(p, norm, delta), d, kappa=kappa)
    wanted = torch.where(d <= reach * (1 + 1e-9), kappa * d, 0.0)
    # Values of the estimator and fresh ones may differ in rounding: the image at d* itself is left out.
    rest = (d / reach - 1).abs() > 1e-9
    torch.testing.assert_close(result.radii[rest], wanted[rest])
    assert (result.distances <= result.radii * (1 + 1e-9) + 1e-12).all()
    assert torch.equal(result.x_adv[result.radii == 0], x[result.radii == 0])
    moved = result.radii > 0
    assert (result.distances[moved] > 0.4 * result.radii[moved]).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", ORDERS)
def test_the_critical_image_itself_is_paid_for(norm, p):
    network, x, y = linear()
    network, x = network.float(), x.float()
    estimator = Batch()  # its values are the attack's own, so equality is to the bit
    context = Context(sensitivity=estimator, index=torch.arange(len(x)), training=True)
    delta = 0.7 * float(first_order(network.double(), x.double(), y, norm).median())
    result = build("knapsack_budget", loss="kl", steps=2)(network.float(), x, y, ThreatModel(p, norm, delta), context)
    reach = solve(estimator.sample().values, ThreatModel(p, norm, delta)).critical
    assert float(result.norms[result.radii > 0].max()) == reach


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", ORDERS)
def test_radii_of_critical_by_hand(norm, p):
    network, x, y = linear()
    d = first_order(network, x, y, norm)
    delta = 0.7 * float(d.median())
    result = attacked("critical", network, x, y, ThreatModel(p, norm, delta), d)
    reach = reach_by_hand(d, p, delta)
    torch.testing.assert_close(result.radii, torch.full_like(d, reach))
    assert (result.distances <= result.radii * (1 + 1e-9)).all()
    assert (result.distances > 0.4 * reach).all()
    assert math.isinf(p) or reach > delta  # what uniform radii at δ miss


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", ORDERS)
def test_radii_of_critical_draw_by_hand(norm, p):
    network, x, y = linear()
    d = first_order(network, x, y, norm)
    delta = 0.7 * float(d.median())
    result = attacked("critical_draw", network, x, y, ThreatModel(p, norm, delta), d)
    draws = [1.0 if math.isinf(p) else (i / 17) ** (1 / p) for i in range(1, 17)]
    torch.testing.assert_close(result.radii, reach_by_hand(d, p, delta) * torch.tensor(draws, dtype=d.dtype))
    assert (result.distances <= result.radii * (1 + 1e-9)).all()


@pytest.mark.parametrize("p", [1, 1.5, 2, 4])
def test_the_optimal_accuracy_moves_as_the_pointwise_accuracy_at_drawn_radii(p):
    d = torch.rand(400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    d[:40] = 0  # misclassified
    threat = ThreatModel(p, "linf", 0.2)
    before = solve(d, threat)
    draws = 4_000_000
    radii = before.critical * ((torch.arange(draws, dtype=torch.float64) + 0.5) / draws) ** (1 / p)

    def pointwise(distances):
        return float((torch.searchsorted(radii, distances) / draws).mean())

    moved = d * (1 + 1e-4 * (0.5 + torch.sin(torch.arange(400, dtype=torch.float64))))
    change = solve(moved, threat).accuracy - before.accuracy
    assert change > 1e-6
    assert pointwise(moved) - pointwise(d) == pytest.approx(change, rel=0.02)


def test_drawn_radii_need_draws():
    network, x, y = linear()
    context = Context(sensitivity=running(torch.ones(16)), index=torch.arange(16), training=True)
    with pytest.raises(ValueError, match=r"critical_draw.*Context\.uniform"):
        build("critical_draw")(network, x, y, ThreatModel(2, "linf", 0.1), context)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", ORDERS)
def test_the_table_decides_not_the_batch(name, p):
    """d* comes from the values of the training set: with nearer images there, the budget is spent on those."""
    network, x, y = linear()
    d = first_order(network, x, y, "l2")
    delta = 0.7 * float(d.median())
    elsewhere = torch.full((200,), 0.5 * delta, dtype=d.dtype)
    result = attacked(name, network, x, y, ThreatModel(p, "l2", delta), elsewhere)
    pointwise = math.isinf(p) and name != "knapsack_budget"
    assert float(result.radii.max()) <= (1 if pointwise else 1.2 * 0.5) * delta * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("p", "norm"), [(1, "linf"), (2, "l2"), (math.inf, "linf")])
def test_nothing_to_spend_and_nothing_to_spend_it_on(name, p, norm):
    network, x, y = linear()
    d = first_order(network, x, y, norm)
    none = attacked(name, network, x, y, ThreatModel(p, norm, 0), d)
    assert torch.equal(none.x_adv, x)
    pointwise = math.isinf(p) and name != "knapsack_budget"  # every radius is δ, whatever there is to spend it on
    y = (network(x).argmax(1) + 1) % 4  # everything is misclassified
    wrong = attacked(name, network, x, y, ThreatModel(p, norm, 0.1), torch.zeros(16, dtype=torch.float64))
    assert torch.equal(wrong.x_adv, x) != pointwise
    assert set(wrong.radii.tolist()) == {0.1 if pointwise else 0.0}
    flat = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)).double()
    nn.init.zeros_(flat[1].weight)
    nn.init.constant_(flat[1].bias[0], 1.0)
    labels = torch.zeros(16, dtype=torch.int64)  # classified correctly, without any gradient: never reached
    never = attacked(name, flat, x, labels, ThreatModel(p, norm, 0.1), torch.full((16,), math.inf))
    assert torch.equal(never.x_adv, x)
    assert never.radii.isfinite().all()


# --- cost -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Notes how many rows each forward pass has, and whether it was one for gradients of the images."""

    def __init__(self, network):
        super().__init__()
        self.network, self.rows, self.inputs = network, [], []

    def forward(self, x):
        (self.inputs if x.requires_grad else self.rows).append(len(x))
        return self.network(x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", ORDERS)
def test_images_beyond_take_no_inner_step(name, p):
    network, x, y = linear()
    d = first_order(network, x, y, "linf")
    delta = 0.7 * float(d.median())
    spy = Counting(network)
    result = attacked(name, spy, x, y, ThreatModel(p, "linf", delta), d * (1 + 1e-12), steps=5)
    inside = int(((d > 0) & (d <= critical_by_hand(d, p, delta))).sum()) if name == "knapsack_budget" else 16
    assert int((result.radii > 0).sum()) == inside
    assert spy.inputs == [16, *[inside] * 4]
    assert spy.rows == []


def digits(**options):
    settings = {"batch_size": 16, "val_size": 32, "limit_train": 48, "limit_test": 16, "flip": False, "seed": 11}
    data = ImageDataModule("digits", 10, **{**settings, **options})
    data.prepare_data()
    data.setup()
    return data


def fit(network, inner, sensitivity, objective=None, threat=None, steps=3, seen=None):
    module = WDATModule(
        network, objective or WDAT(), inner, threat or ThreatModel(2, "linf", 0.05), sensitivity,
        partial(torch.optim.SGD, lr=0.005), Constant(), models.keep_frozen_in_eval, seed=11, notify=print,
    )  # fmt: skip

    class See(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            if seen is not None:
                sample = module.sensitivity.sample()
                seen.append((outputs["attack_result"], None if sample is None else sample.values.clone()))

    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[See()],
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        inference_mode=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, digits())
    return module


def trained(steps=40):
    """A small network that classifies most of the images, so that there are distances."""
    network = models.load_network("small_cnn", seed=11)
    data = digits()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps // 3):
        for batch in data.train_dataloader():
            loss = nn.functional.cross_entropy(network(batch.x), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


@pytest.fixture(scope="module")
def network():
    return trained()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_less_than_a_trades_step(network, name):
    inner = {"loss": "kl", "steps": 4, "step_size": 0.5}
    trades = Counting(copy.deepcopy(network))
    fit(trades, build("wpgd_budget", **inner), Batch(), TRADES(pointwise_attack=build("pgd", **inner)))
    ours = Counting(copy.deepcopy(network))
    fit(ours, build(name, **inner), Batch())
    assert len(trades.inputs) == 3 * 4
    assert set(trades.inputs) == {16}
    assert len(ours.rows) == len(trades.rows) - 3  # one pass serves the clean loss and the first gradient
    assert len(ours.inputs) == len(trades.inputs)
    assert all(mine <= theirs for mine, theirs in zip(ours.inputs, trades.inputs, strict=True))
    if name != "knapsack_budget":
        assert ours.inputs == trades.inputs
    else:
        assert sum(ours.inputs) < sum(trades.inputs)


# --- real trainings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "estimator", "p"),
    [
        ("knapsack_budget", "exact", 2), ("knapsack_budget", "subsample", 1), ("knapsack_budget", "exact", math.inf),
        ("critical", "exact", 1), ("critical", "subsample", 2), ("critical_draw", "exact", 2),
        ("critical_draw", "subsample", math.inf),
    ],
)  # fmt: skip
def test_a_short_training(network, name, estimator, p):
    threat, seen = ThreatModel(p, "linf", 0.05), []
    sensitivity = Exact(every=1) if estimator == "exact" else Subsample(size=32, every=1)
    mine = copy.deepcopy(network)
    module = fit(mine, build(name, loss="kl", steps=3, step_size=0.5), sensitivity, threat=threat, seen=seen)
    assert len(seen) == 3
    for result, values in seen:
        assert len(values) == {"exact": 48, "subsample": 32}[estimator]
        reach = critical_by_hand(values.double(), p, 0.05)
        assert reach == pytest.approx(solve(values, threat).critical)
        if name != "knapsack_budget":
            reach = reach_by_hand(values.double(), p, 0.05)
        if name == "critical":
            torch.testing.assert_close(result.radii, torch.full((16,), reach), rtol=1e-5, atol=0)
        elif name == "critical_draw":
            assert float(result.radii.max()) <= reach * 1.00001
            assert (result.radii.unique().numel() == 1) == math.isinf(p)
        else:
            wanted = torch.where(result.norms <= reach, 1.2 * result.norms, 0.0)
            sure = (result.norms / reach - 1).abs() > 1e-5
            torch.testing.assert_close(result.radii[sure], wanted[sure])
        assert (result.distances <= result.radii * 1.00001 + 1e-6).all()
        if math.isinf(p):
            assert reach <= 0.05 * (1 + 1e-6)
    assert any(float(result.distances.max()) > 0 for result, _ in seen)
    assert all(v.isfinite().all() for v in module.network.state_dict().values())
    assert not torch.equal(next(mine.parameters()), next(network.parameters()))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ema_keeps_no_values(network, name):
    with pytest.raises(SettingError, match=rf"sensitivity=ema .*{name}.*subsample"):
        fit(copy.deepcopy(network), build(name, loss="kl", steps=2), Ema())


@pytest.mark.parametrize("name", NAMES)
def test_only_margins_measure_distances(name):
    with pytest.raises(SettingError, match=r"attack.radii_loss=ce.*margin"):
        build(name, radii_loss="ce")


@pytest.mark.parametrize("kappa", [0, -1.0, math.nan])
def test_kappa_is_positive(kappa):
    with pytest.raises(SettingError, match=r"attack.kappa=.*positive"):
        build("knapsack_budget", kappa=kappa)


@pytest.mark.parametrize("name", NAMES)
def test_they_do_not_evaluate(name):
    network, x, y = linear()
    with pytest.raises(SettingError, match=rf"{name}.*knapsack"):
        attack(network, x, y, ThreatModel(2, "linf", 0.1), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_cap_is_refused_not_ignored(name):
    with pytest.raises(SettingError, match=r"attack\.radius_max=4"):
        build(name, radius_max=4.0)


@pytest.mark.parametrize("name", ["critical", "critical_draw"])
def test_at_infinite_order_every_radius_is_delta(name):
    network, x, y = linear()
    d = first_order(network, x, y, "linf")
    result = attacked(name, network, x, y, ThreatModel(math.inf, "linf", 0.5 * float(d[d > 0].min())), d)
    torch.testing.assert_close(result.radii, torch.full_like(d, 0.5 * float(d[d > 0].min())))


@pytest.mark.parametrize("name", ["critical", "critical_draw"])
def test_critical_radii_have_no_kappa(name):
    with pytest.raises(SettingError, match=r"attack\.kappa=2"):
        build(name, kappa=2.0)
