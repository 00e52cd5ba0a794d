"""Who sees which weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from averaged import QUIET, Scored, Trail, same, saved, weights, with_batchnorm
from lightning.pytorch.callbacks import ModelCheckpoint
from sampled import sampled

import wdat
from wdat.attacks.budget import PGD
from wdat.sensitivity import Table
from wdat.training.callbacks import ExponentialAveraging

pytestmark = QUIET


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("last", [True, False])
def test_what_is_scored_is_what_is_saved(last, every, digits, make, make_trainer, tmp_path):
    """Whatever the order of the callbacks: the current weights before the start, afterwards the average."""
    averaging, trail, scored = ExponentialAveraging(0.9, start=0.5), Trail(), Scored()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", monitor="val/acc_clean", save_top_k=-1, auto_insert_metric_name=0)
    order = [trail, scored, averaging] if last else [averaging, trail, scored]
    options = {"enable_checkpointing": True, "max_epochs": 4, "check_val_every_n_epoch": every}
    make_trainer(*order, checkpoint, **options).fit(make(network=with_batchnorm()), digits())
    assert set(scored.ends) == set(range(3 * every, 13, 3 * every))
    for step, network in scored.ends.items():
        assert same(scored.steps[step], network)
        average, current, _ = saved(tmp_path / f"{step}.ckpt")
        assert same(network, average)
        assert same(current, trail.raw[step])
        assert same(average, current) == (step <= 6)
        assert not same(average, trail.raw[0]), "the initial weights are never scored"


def trajectory(make, make_trainer, make_evaluation, digits, *averaging):
    trail, network = Trail(), with_batchnorm()
    module = make(network=network, sensitivity=Table())
    trainer = make_trainer(*averaging, trail, make_evaluation(), max_epochs=3)
    trainer.fit(module, digits())
    return trail, module.sensitivity.upsilon()


def test_training_its_attack_and_upsilon_see_the_current_weights(digits, make, make_trainer, make_evaluation):
    """The trajectory, which depends on each of them, is that of a run without averaging."""
    run = partial(trajectory, make, make_trainer, make_evaluation, digits)
    (plain, upsilon), (averaged, other) = run(), run(ExponentialAveraging(0.9))
    assert len(plain.raw) == 10
    assert all(same(one, two) for one, two in zip(plain.raw, averaged.raw, strict=True))
    assert all(same(one, two) for one, two in zip(averaged.raw[:-1], averaged.seen, strict=True))
    assert other == upsilon


class Spy(PGD):
    """PGD that remembers the weights that it attacked."""

    def __call__(self, network, *others, **options):
        self.seen = [*getattr(self, "seen", []), weights(network)]
        return super().__call__(network, *others, **options)


def test_the_attack_in_training_is_given_the_current_weights(digits, make, make_trainer):
    spy, trail = Spy(loss="kl", steps=1), Trail()
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=2).fit(make(attack=spy), digits())
    assert len(spy.seen) == 6
    assert all(same(one, two) for one, two in zip(spy.seen, trail.raw[:-1], strict=True))


@pytest.mark.parametrize("last", [True, False])
def test_attacks_in_validation_are_given_the_average(
    last, digits, make, make_trainer, make_evaluation, network, tmp_path
):
    averaging, evaluation, trail = ExponentialAveraging(0.9), make_evaluation(), Trail(tmp_path)
    order = [evaluation, trail, averaging] if last else [averaging, evaluation, trail]
    module, data = make(), digits()
    trainer = make_trainer(*order)
    trainer.fit(module, data)
    images = data.images("val")

    def outside(state):
        network.load_state_dict(state)
        batches = [(images.pixels(torch.arange(len(images)), None).float() / 255, images.labels)]
        records = wdat.evaluate(network, batches, module.threat, evaluation.attacks, losses=["ce"])
        return records[0].upsilon, [r.loss_mean for r in records]

    last = evaluation.records.records[-3:]
    found = last[0].upsilon, [r.loss_mean for r in last]
    assert found == outside(weights(module.network))
    assert found != outside(trail.raw[-1])


@pytest.mark.parametrize("split", sampled(["validate", "test"], 2))
def test_evaluation_apart_from_training_scores_what_it_is_given(
    split, digits, make, make_trainer, make_evaluation, tmp_path
):
    """Before and after training with the same trainer, and with a checkpoint loaded into the module."""
    averaging, evaluation, trail = ExponentialAveraging(0.9), make_evaluation(), Trail(tmp_path)
    trainer = make_trainer(averaging, evaluation, trail, max_epochs=2)
    module, data = make(), digits()
    run = partial(getattr(trainer, split), module, data, verbose=False)

    def alone():
        plain = make_evaluation()
        getattr(make_trainer(plain), split)(module, data, verbose=False)
        return [(r.accuracy, r.loss_mean, r.upsilon) for r in plain.records.records[-3:]]

    def checked(ckpt_path=None):
        run(ckpt_path=ckpt_path)
        assert [(r.accuracy, r.loss_mean, r.upsilon) for r in evaluation.records.records[-3:]] == alone()
        return weights(module.network)

    initial = weights(module.network)
    assert same(checked(), initial)
    trainer.fit(module, data)
    final = weights(module.network)
    assert same(checked(), final)
    average, _, _ = saved(tmp_path / "2.ckpt")
    module.load_state_dict(torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"])
    assert same(checked(), average)
    module.network.load_state_dict(initial)
    assert same(checked(tmp_path / "2.ckpt"), average)
