"""AutoAttack: verified, at least as strong as PGD, deterministic, and without traces."""

from __future__ import annotations

import random
import sys
import warnings

import numpy as np
import pytest
import torch
from sampled import product, sampled
from torch import nn
from torch.testing import assert_close

from wdat.attacks import Context, build
from wdat.attacks.autoattack import AutoAttack
from wdat.errors import SettingError
from wdat.threat import ThreatModel


def _trained(classes=5, n=40):
    """A small convolutional network trained on noisy patterns, with images of 8 × 8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patterns = torch.rand(classes, 3, 8, 8)
        y = torch.arange(8 * n) % classes
        x = (0.3 * patterns[y] + 0.7 * torch.rand(len(y), 3, 8, 8)).clamp(0, 1)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, classes)
        )
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
    return network.eval(), x[:n], y[:n]


QUICK = ("apgd-ce", "apgd-t", "fab-t")
THREATS = [ThreatModel("inf", "linf", 0.02), ThreatModel(2, "l2", 0.15)]


def _quick(**options):
    return AutoAttack(version="custom", attacks_to_run=QUICK, **options)


@pytest.mark.parametrize("threat", sampled(THREATS, 2), ids=lambda t: t.norm)
def test_is_at_least_as_strong_as_pgd_and_repeats_itself(threat):
    network, x, y = _trained(n=24)
    state, numbers, names = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trace = sys.gettrace()
    found = _quick()(network, x, y, threat)
    assert sys.gettrace() is trace
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numbers).all()
    assert random.getstate() == names
    assert found.threat.is_pointwise
    assert (found.distances <= threat.delta * (1 + 1e-5) + 1e-6).all()
    clean = (network(x).argmax(1) == y).float().mean()
    pgd = build("pgd", steps=20, step_size=0.1)(network, x, y, threat)
    assert 0 < found.accuracy <= pgd.accuracy < clean
    assert (found.x_adv[found.correct] == x[found.correct]).all()
    assert_close(_quick()(network, x, y, threat).x_adv, found.x_adv, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize(("version", "threat"), product(["standard", "plus", "rand"], THREATS, every=5))
def test_every_version_runs_in_any_layout(version, threat):
    network, x, y = _trained(n=4)
    network = network.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    wide = ThreatModel(threat.p, threat.norm, threat.delta * 20)  # so that nothing is left for the slow ones
    found = AutoAttack(version=version, batch_size=3)(network, x, y, wide)
    assert found.accuracy == 0


@pytest.mark.parametrize(
    ("name", "threat"), product(["apgd-ce", "apgd-dlr", "fab", "apgd-t", "fab-t", "square"], THREATS, every=3)
)
def test_every_attack_runs_alone_in_channels_last(name, threat):
    network, x, y = _trained(n=6)
    network = network.to(memory_format=torch.channels_last)
    wide = ThreatModel(threat.p, threat.norm, threat.delta * 6)
    attack = AutoAttack(version="custom", attacks_to_run=(name,))
    last = attack(network, x.to(memory_format=torch.channels_last), y, wide)
    plain = attack(network, x, y, wide)
    assert max(last.accuracy, plain.accuracy) < 1
    assert last.accuracy == pytest.approx(plain.accuracy, abs=1.01 / len(x))  # other kernels' rounding may tip an image


def test_no_budget_and_no_images():
    network, x, y = _trained(n=6)
    found = AutoAttack()(network, x, y, ThreatModel("inf", "linf", 0))
    assert_close(found.x_adv, x, rtol=0, atol=0)
    with pytest.raises(SettingError, match="empty"):
        AutoAttack()(network, x[:0], y[:0], THREATS[0])
    moved = AutoAttack()._run(network, x[:0], y[:0], THREATS[0], Context())
    assert moved.x_adv.shape == (0, 3, 8, 8)


@pytest.mark.long
def test_images_in_double_precision_and_progress():
    network, x, y = _trained(n=8)
    seen = []
    context = Context(progress=lambda done, total: seen.append((done, total)))
    found = _quick(batch_size=3)(network.double(), x.double(), y, THREATS[0], context)
    assert found.x_adv.dtype == torch.float64
    assert (found.distances <= 0.02 + 1e-9).all()
    assert seen == sorted(seen)
    assert seen[-1] == (24, 24)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_refused_with_a_remedy(classes):
    network, x, y = _trained(classes, n=6)
    with pytest.raises(SettingError, match=r"attack_options.autoattack.version=standard needs 4 classes.*apgd-ce"):
        AutoAttack()(network, x, y, THREATS[0])
    attack = AutoAttack(version="custom", attacks_to_run=("apgd-ce", "fab-t", "fab"))
    assert attack(network, x, y, ThreatModel("inf", "linf", 0.2)).accuracy < 1
    if classes == 2:
        with pytest.raises(SettingError, match=r"apgd-dlr .* needs 3 classes"):
            AutoAttack(version="rand")(network, x, y, THREATS[0])


def test_square_refuses_images_it_would_crash_on():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    x, y = torch.rand(3, 3, 4, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(SettingError, match=r"square .* 5 × 5"):
        AutoAttack()(network, x, y, THREATS[1])
    with pytest.raises(SettingError, match=r"square .* needs images \(N, C, H, W\)"):
        AutoAttack()(network, x.flatten(1), y, THREATS[0])
    assert _quick()(network, x.flatten(1), y, THREATS[0]).set_size == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "standart"}, "attack_options.autoattack.version.*standard"),
        ({"version": "custom"}, "attacks_to_run=None goes with attack_options.autoattack.version=custom"),
        ({"attacks_to_run": ("square",)}, "attack_options.autoattack.version=custom"),
        ({"version": "custom", "attacks_to_run": ("apgd",)}, "attack_options.autoattack.version"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(SettingError, match=message):
        AutoAttack(**options)


def test_one_name_or_a_list_is_as_good_as_a_tuple():
    assert AutoAttack(version="custom", attacks_to_run="square").sub_attacks == ("square",)
    assert AutoAttack(version="custom", attacks_to_run=["square", "fab"]).sub_attacks == ("square", "fab")


def test_a_randomised_network_is_reported():
    class Noisy(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x) + 0.1 * torch.randn(len(x), 1)

    network, x, y = _trained(n=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoAttack(version="custom", attacks_to_run=("apgd-ce",))(Noisy(network), x, y, THREATS[0])
    assert [str(w.message) for w in caught if "randomized" in str(w.message)]
