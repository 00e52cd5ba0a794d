"""The average by hand."""

from __future__ import annotations

import pytest
import torch
from averaged import QUIET, Trail, same, saved, weights, with_batchnorm
from lightning.pytorch.callbacks import ModelCheckpoint

from wdat import models
from wdat.errors import SettingError
from wdat.sensitivity import Batch
from wdat.training.callbacks import ExponentialAveraging

pytestmark = QUIET


def by_hand(raw, names, decay, start):
    """The recursion in float64: the averages after each step from the weights before the first and after each."""
    averages = [raw[0]]
    for step, current in enumerate(raw[1:]):
        t = step - start
        d = min(decay, (1 + t) / (10 + t)) if t >= 0 else 0
        mixed = {key: d * averages[-1][key].double() + (1 - d) * current[key].double() for key in names}
        averages.append({**current, **mixed})
    return averages


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.25, 2), (0.5, 4)])
def test_the_average_is_the_recursion(start, first, digits, make, make_trainer, tmp_path):
    """Nine steps; with decay 0.3 the warm-up, 0.1, 2/11 and 3/12, is followed by 0.3."""
    trail, network = Trail(tmp_path), with_batchnorm()
    trainer = make_trainer(ExponentialAveraging(0.3, start), trail, max_epochs=3, precision="64-true")
    trainer.fit(make(network=network, sensitivity=Batch()), digits())
    names = [name for name, _ in network.named_parameters()]
    wanted = by_hand(trail.raw, names, 0.3, first)
    assert len(wanted) == 10
    for step in range(1, 10):
        average, current, count = saved(tmp_path / f"{step}.ckpt")
        assert same(current, trail.raw[step])
        assert count == step + 1
        assert same(average, current) == (step <= first), "the current weights before the start, and only then"
        for key, value in wanted[step].items():
            torch.testing.assert_close(average[key].double(), value.double(), rtol=0, atol=1e-12, msg=key)
    assert same(weights(network), average), "in the end the module holds the average"


def test_the_decay_of_the_recipe():
    averaging = ExponentialAveraging()
    assert [averaging.decay_at(t) for t in (-5, -1)] == [0, 0]
    assert [averaging.decay_at(t) for t in (0, 1, 8, 1789, 1790, 10**6)] == pytest.approx(
        [0.1, 2 / 11, 0.5, 1790 / 1799, 0.995, 0.995], abs=1e-12
    )


def test_single_precision_and_accumulated_steps(digits, make, make_trainer, tmp_path):
    """One update a step of the optimiser, not one a batch."""
    trail, network = Trail(tmp_path), with_batchnorm()
    averaging = ExponentialAveraging(0.3)
    trainer = make_trainer(averaging, trail, max_epochs=4, accumulate_grad_batches=3)
    trainer.fit(make(network=network), digits())
    raw = [trail.raw[0], *trail.raw[3::3]]
    wanted = by_hand(raw, [name for name, _ in network.named_parameters()], 0.3, 0)
    for step in range(1, 5):
        average, _, count = saved(tmp_path / f"{step}.ckpt")
        assert count == step + 1
        for key, value in wanted[step].items():
            torch.testing.assert_close(average[key].double(), value.double(), rtol=0, atol=1e-7, msg=key)


def test_statistics_are_the_current_ones(digits, make, make_trainer, tmp_path):
    trail, network = Trail(tmp_path), with_batchnorm()
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=2).fit(make(network=network), digits())
    average, current, _ = saved(tmp_path / "6.ckpt")
    assert all(torch.equal(average[name], current[name]) for name, _ in network.named_buffers())
    assert not torch.equal(average["4.weight"], current["4.weight"])
    assert not torch.equal(current["1.running_mean"], trail.raw[0]["1.running_mean"])


def test_what_is_frozen_stays_to_the_bit(digits, make, make_trainer, tmp_path):
    network = with_batchnorm()
    before = weights(network)
    trained = set(models.prepare(network, "head"))
    trail = Trail(tmp_path)
    module = make(network=network, keep_eval=models.keep_frozen_in_eval)
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=3).fit(module, digits())
    for found in (*saved(tmp_path / "7.ckpt")[:2], weights(network)):
        assert {key for key in before if not torch.equal(found[key], before[key])} == trained


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0.9", None, True])
@pytest.mark.parametrize("key", ["decay", "start"])
def test_settings_out_of_range_are_named(key, value):
    with pytest.raises(SettingError, match=rf"averaging\.{key}={value} must be a number in \[0, 1\)"):
        ExponentialAveraging(**{key: value})


def test_a_share_of_a_run_without_an_end_is_refused(digits, make, make_trainer):
    trainer = make_trainer(ExponentialAveraging(start=0.5), max_epochs=-1)
    with pytest.raises(SettingError, match=r"averaging\.start=0\.5 .*trainer\.max_epochs"):
        trainer.fit(make(), digits())


def test_checkpoints_that_would_leave_the_average_out_are_refused(digits, make, make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = make_trainer(ExponentialAveraging(), checkpoint, enable_checkpointing=True)
    with pytest.raises(SettingError, match="save_weights_only=false"):
        trainer.fit(make(), digits())


def test_the_average_is_where_the_module_will_be(make, make_trainer, monkeypatch):
    """Lightning calls `setup` before it moves the module; `meta` stands for a GPU."""
    averaging, module = ExponentialAveraging(), make(network=with_batchnorm())
    trainer = make_trainer(averaging)
    monkeypatch.setattr(trainer.strategy, "_root_device", torch.device("meta"))
    averaging.setup(trainer, module, "fit")
    assert {p.device.type for p in averaging._average_model.parameters()} == {"meta"}
    assert {b.device.type for b in averaging._average_model.module.buffers()} == {"meta"}
