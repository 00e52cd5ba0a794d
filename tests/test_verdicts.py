"""Verdicts: logits that aren't finite are wrong, networks that write into their input change nothing, budgets fit."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from sampled import product
from torch import nn

import wdat
from wdat.errors import SettingError
from wdat.evaluation.details import examples
from wdat.losses import correct, nonfinite, predictions
from wdat.threat import ThreatModel

BROKEN = [math.nan, math.inf, -math.inf]
SHORT = {"steps": 3, "step_size": 0.4}
OPTIONS = {
    "fgsm": {}, "pgd": SHORT, "wfgsm": {}, "wpgd": SHORT, "wpgd_budget": SHORT,
    "knapsack": {"starts": 1, "targets": 1, "steps": 3},
    "autoattack": {"version": "custom", "attacks_to_run": ("apgd-ce",)},
}  # fmt: skip
NOISY = "ignore:.*(no finite gradient|not finite|gradient is zero)"


class Broken(nn.Module):
    """A linear network with logits of `value` for dark images."""

    def __init__(self, value: float, every: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 4)
        self.value = value
        self.classes = slice(None) if every else slice(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.inner(x.flatten(1))
        broken = torch.zeros_like(z)
        broken[:, self.classes] = self.value
        return torch.where(x.flatten(1).mean(1, keepdim=True) < 0.3, broken, z)


def problem(value: float, every: bool = True):
    """Sixteen images, of which the first eight have broken logits and label 0; the others are classified correctly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, x = Broken(value, every), torch.rand(16, 3, 4, 4)
        x[:8] *= 0.1
        with torch.no_grad():
            y = network(x).argmax(1)
        y[:8] = 0
    return network, x, y


@pytest.mark.parametrize("value", BROKEN)
def test_one_function_gives_the_verdict(value):
    z = torch.tensor([[2.0, 1.0, 0.0], [value, 1.0, 2.0], [value] * 3, [0.0, 3.0, 1.0]])
    assert predictions(z).tolist() == [0, -1, -1, 1]
    assert correct(z, torch.tensor([0, 0, 0, 1])).tolist() == [True, False, False, True]
    assert nonfinite(z) == 2


@pytest.mark.filterwarnings(NOISY)
@pytest.mark.parametrize(("value", "every", "name"), product(BROKEN, [True, False], sorted(OPTIONS), every=3))
def test_no_attack_counts_them_as_robust(name, value, every):
    network, x, y = problem(value, every)
    clean, attacked = wdat.evaluate(
        network, [(x, y)], ThreatModel(2, "linf", 0.001), name, options={name: OPTIONS[name]}
    )
    assert clean.accuracy == 0.5
    assert clean.nonfinite == 8
    assert attacked.accuracy <= 0.5
    assert attacked.nonfinite == 8
    assert attacked.to_json()["nonfinite"] == 8
    result = wdat.attack(network, x, y, ThreatModel(2, "linf", 0.001), name, **OPTIONS[name])
    assert not result.correct[:8].any()
    assert result.accuracy <= 0.5


def test_they_are_said():
    network, x, y = problem(math.nan)
    with pytest.warns(UserWarning, match="clean: 8 of 16 images have logits that are not finite"):
        wdat.evaluate(network, [(x, y)], ThreatModel(2, "linf", 0.001), [])
    with pytest.warns(UserWarning, match="pgd: 8 of 16 images have logits that are not finite"):
        wdat.attack(network, x, y, ThreatModel(2, "linf", 0.001), "pgd", **SHORT)


def test_the_count_is_that_of_all_processes(together):
    network, x, y = problem(math.nan)

    def one(processes):
        rows = slice(processes.rank, None, 3)
        return wdat.evaluate(network, [(x[rows], y[rows])], ThreatModel(2, "linf", 0.001), [], processes=processes)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert {(r.accuracy, r.nonfinite) for r in together(3, one)} == {(0.5, 8)}


@pytest.mark.filterwarnings(NOISY)
def test_pictures_show_no_class_for_them():
    network, x, y = problem(math.nan)
    result = wdat.attack(network, x[:4], y[:4], ThreatModel(2, "linf", 0.001), "pgd", **SHORT)
    shown = examples(network, x[:4], y[:4], result, torch.arange(4), classes=["a", "b", "c", "d"])
    assert {e["clean_prediction"] for e in shown} == {-1}
    assert {e["names"][1] for e in shown} == {"none"}


# --- networks that write into their input


class Subtracts(nn.Module):
    """Normalises in place, as much published code does."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.inner, self.copies = nn.Linear(48, 4), copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone() if self.copies else x
        return self.inner(x.sub_(0.5).div_(0.2).flatten(1))


class FirstReLU(nn.Module):
    """A first layer in place, after a shift that makes it matter."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Hardtanh(0.2, 0.8, inplace=not copies), nn.Flatten(), nn.Linear(48, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("kind", [Subtracts, FirstReLU])
def test_a_network_that_writes_into_its_input_is_attacked_like_one_that_does_not(kind, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, writing = kind(True), kind(False)
        writing.load_state_dict(plain.state_dict())
        x = torch.rand(6, 3, 4, 4)
        with torch.no_grad():
            y = plain(x).argmax(1)
    given = x.clone()
    threat = ThreatModel(2, "linf", 0.05)
    records = [wdat.evaluate(n, [(x, y)], threat, name, options={name: OPTIONS[name]}) for n in (plain, writing)]
    results = [wdat.attack(n, x, y, threat, name, **OPTIONS[name]) for n in (plain, writing)]
    assert torch.equal(x, given)
    assert torch.equal(results[0].x_adv, results[1].x_adv)
    for a, b in zip(*records, strict=True):
        assert (a.accuracy, a.loss_mean, a.distance, a.upsilon) == (b.accuracy, b.loss_mean, b.distance, b.upsilon)


# --- budgets


@pytest.mark.parametrize("delta", [8, "8", 1.01, "255/8"])
def test_a_budget_beyond_all_pixels_is_refused(delta):
    with pytest.raises(SettingError, match=r"threat\.delta=.* is more than 1, .*pixel units of \[0, 1\]"):
        ThreatModel(2, "linf", delta)
    assert ThreatModel(2, "linf", 1).delta == 1


def test_a_budget_names_what_may_be_meant():
    with pytest.raises(SettingError, match=r"did you mean 8/255\?"):
        ThreatModel("inf", "linf", 8)


@pytest.mark.parametrize("name", ["wpgd", "pgd", "knapsack", "autoattack"])
def test_a_budget_beyond_the_diameter_is_refused_in_l2(name):
    calls = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    network.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(3, 3, 4, 4), torch.arange(3)
    with pytest.raises(SettingError, match=r"is more than 6\.928, the largest distance of two images 3×4×4"):
        wdat.evaluate(network, [(x, y)], ThreatModel(2, "l2", 7), name)
    assert len(calls) <= 2, "before any work"
    with pytest.raises(SettingError, match="largest distance"):
        wdat.attack(network, x, y, ThreatModel(2, "l2", 7), name)
    ThreatModel(2, "l2", 6.9).check((3, 4, 4))


def test_what_an_attack_can_not_do_is_refused_before_the_others_begin():
    calls = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 24, 4))
    network.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(3, 3, 32, 24), torch.arange(3)
    with pytest.raises(SettingError, match=r"square of .*version=standard needs .* for l2 square ones"):
        wdat.evaluate(network, [(x, y)], ThreatModel("inf", "l2", 0.1), ["pgd", "wpgd", "autoattack"])
    assert len(calls) <= 2
    with pytest.raises(SettingError, match="square ones"):
        wdat.attack(network, x, y, ThreatModel("inf", "l2", 0.1), "autoattack")
    both = {"version": "custom", "attacks_to_run": ("apgd-ce", "square")}
    assert wdat.attack(network, x, y, ThreatModel("inf", "linf", 0.1), "autoattack", **both).set_size == 3


@pytest.mark.parametrize("attacks", [[], ["pgd"]])
def test_losses_that_need_more_classes_are_refused_first(attacks):
    network, x, y = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(3, 3, 2, 2), torch.tensor([0, 1, 0])
    with pytest.raises(SettingError, match="at least three classes"):
        wdat.evaluate(network, [(x, y)], ThreatModel(2, "linf", 0.1), attacks, losses=["ce", "redlr"])
