"""Υ in the training step."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from small_training import QUIET, digits, fit, module_for, small_cnn

from wdat.attacks import build
from wdat.errors import SettingError
from wdat.sensitivity import Batch, Exact, Subsample

pytestmark = QUIET


def passes(module, data, monkeypatch, steps, **options):
    """What was measured and attacked, in order: (`pass`, images) and (`step`, number)."""
    events = []
    read, attack = data.train_batches, module.attack

    def train_batches(index, step, rank=0, world=1):
        batches = list(read(index, step, rank, world))
        events.append(("pass", step, sum(len(b.x) for b in batches)))
        return iter(batches)

    class Attack(type(attack)):
        def __call__(self, network, x, y, threat, context=None):
            events.append(("step", len([e for e in events if e[0] == "step"]), len(x)))
            return super().__call__(network, x, y, threat, context)

    monkeypatch.setattr(data, "train_batches", train_batches)
    attack.__class__ = Attack
    fit(module, data, steps, **options)
    return events


def test_exact_passes_over_all_images_before_each_step(data, monkeypatch):
    module = module_for(small_cnn(), sensitivity=Exact(every=1))
    events = passes(module, data, monkeypatch, 4)
    assert data.n_train == 48
    assert events == [event for k in range(4) for event in (("pass", k, 48), ("step", k, 16))]


@pytest.mark.parametrize(("every", "wanted"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (10, [0])])
def test_a_subsample_is_measured_every_few_steps(data, monkeypatch, every, wanted):
    module = module_for(small_cnn(), sensitivity=Subsample(size=20, every=every))
    events = passes(module, data, monkeypatch, 5)
    assert [(step, n) for kind, step, n in events if kind == "pass"] == [(step, 20) for step in wanted]


def test_exact_is_the_sensitivity_of_the_present_network(data):
    plain = digits(crop=0)
    module = fit(
        module_for(small_cnn(), sensitivity=Exact(every=1), optimizer=partial(torch.optim.SGD, lr=0.0)), plain, 2
    )
    images = plain.images("train")
    x = (images.pixels(torch.arange(48), None).float() / 255).requires_grad_()
    loss = F.cross_entropy(module.network.eval()(x), images.labels, reduction="sum")
    norms = torch.autograd.grad(loss, x)[0].flatten(1).abs().sum(1).double()
    assert module.sensitivity.upsilon() == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-5)
    torch.testing.assert_close(module.sensitivity.sample().values.double(), norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_a_pointwise_attack_measures_nothing(data, monkeypatch, attack):
    """Its radii are all δ, so a pass over the training set would be wasted."""
    module = module_for(small_cnn(), attack=build(attack, loss="kl"), sensitivity=Exact(every=1))
    assert [e for e in passes(module, data, monkeypatch, 2) if e[0] == "pass"] == []


@pytest.mark.parametrize("name", ["trades", "clean"])
def test_an_objective_without_the_attack_measures_nothing(data, monkeypatch, chosen, name):
    said = []
    module = module_for(small_cnn(), chosen("objective", name), sensitivity=Exact(every=1), notify=said.append)
    assert passes(module, data, monkeypatch, 2) == []
    assert [text for text in said if "attack=wpgd_budget is not used" in text] == said
    assert len(said) == 1, "it is said once"


def test_data_that_cannot_be_measured_are_refused(data):
    class Plain(L.LightningDataModule):
        def train_dataloader(self):
            return data.train_dataloader()

        def val_dataloader(self):
            return data.val_dataloader()

    with pytest.raises(SettingError, match=r"sensitivity=exact .*batch or ema"):
        fit(module_for(small_cnn(), sensitivity=Exact()), Plain(), 1)
    fit(module_for(small_cnn(), sensitivity=Batch()), Plain(), 1)
