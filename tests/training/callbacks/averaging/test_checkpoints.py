"""Checkpoints and resumed runs with an average."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from averaged import QUIET, Stop, Trail, run, same, saved, weights
from sampled import sampled

from wdat import models
from wdat.training.callbacks import ExponentialAveraging

pytestmark = QUIET


@pytest.mark.parametrize("start", [0, 0.5])
@pytest.mark.parametrize(("hook", "steps"), sampled([
    ("on_train_batch_end", 3),  # at the end of an epoch of three steps, in its validation, in the next
    ("on_validation_batch_end", 3), ("on_train_batch_end", 4), ("on_train_batch_end", 5),
], 3))  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(hook, steps, start, digits, make, make_trainer, tmp_path):
    """To the bit: the average, the current weights and the number of updates; though the callback saves first."""
    one = partial(run, make, make_trainer, digits, start=start)
    (average, current, count), final = one(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        one(tmp_path / "stopped", Stop(hook, steps, path=tmp_path / "stopped.ckpt"))
    found, resumed = one(tmp_path / "resumed", ckpt_path=tmp_path / "stopped.ckpt")
    assert same(found[0], average)
    assert same(found[1], current)
    assert found[2] == count == 10
    assert same(resumed, final)
    assert same(final, average)
    assert not same(current, average)


def test_what_is_saved_before_the_first_step_of_a_resumed_run_is_what_it_resumed_from(
    digits, make, make_trainer, tmp_path
):
    """No step is counted twice, though the first file was written before the callback had its turn."""
    one = partial(run, make, make_trainer, digits, tmp_path, start=0)
    first, again = tmp_path / "first.ckpt", tmp_path / "again.ckpt"
    with pytest.raises(InterruptedError):
        one(Stop("on_train_batch_end", 4, path=first))
    with pytest.raises(InterruptedError):
        one(Stop("on_train_start", 4, path=again), ckpt_path=first)
    old, new = saved(first), saved(again)
    assert same(old[0], new[0])
    assert same(old[1], new[1])
    assert old[2] == new[2] == 5


def test_a_finished_run_that_is_resumed_ends_with_the_average_again(digits, make, make_trainer, tmp_path):
    one = partial(run, make, make_trainer, digits)
    (average, current, _), _ = one(tmp_path)
    found, resumed = one(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert same(resumed, average)
    assert same(found[1], current)


def test_a_longer_run_keeps_an_average_that_has_started(digits, make, make_trainer, tmp_path):
    """Of 6 steps it starts after 3, of 18 after 9: the step at which the first run stops."""
    one = partial(run, make, make_trainer, digits, tmp_path)
    one(epochs=2)
    stop = Stop("on_train_batch_end", 8, path=tmp_path / "longer.ckpt")
    with pytest.raises(InterruptedError):
        one(stop, epochs=6, ckpt_path=tmp_path / "last.ckpt")
    average, current, _ = saved(tmp_path / "longer.ckpt")
    assert not same(average, current)


def test_a_longer_run_starts_at_its_own_share(digits, make, make_trainer, tmp_path):
    """Stopped after 3 of 9 steps, before the average starts at 4; of 18 steps it starts after 9."""
    one = partial(run, make, make_trainer, digits, tmp_path)
    with pytest.raises(InterruptedError):
        one(Stop("on_train_batch_end", 3, path=tmp_path / "short.ckpt"))
    trail = Trail(tmp_path)
    one(trail, epochs=6, ckpt_path=tmp_path / "short.ckpt")
    started = {step: not same(*saved(tmp_path / f"{step}.ckpt")[:2]) for step in range(4, 19)}
    assert started == {step: step > 9 for step in range(4, 19)}


def test_the_network_reads_the_average_from_the_checkpoint(digits, make, make_trainer, tmp_path, network):
    module, trail = make(), Trail(tmp_path)
    make_trainer(ExponentialAveraging(0.9), trail, max_epochs=2).fit(module, digits())
    models.load_checkpoint(network, tmp_path / "6.ckpt")
    average, current, _ = saved(tmp_path / "6.ckpt")
    assert same(weights(network), average)
    assert same(weights(network), weights(module.network))
    assert not same(average, current)
    content = torch.load(tmp_path / "6.ckpt", weights_only=True)
    assert {"state_dict", "current_model_state", "averaging_state", "sensitivity"} <= set(content)
    assert content["state_dict"].keys() == content["current_model_state"].keys()


def test_after_training_a_checkpoint_holds_the_average_alone(digits, make, make_trainer, tmp_path):
    trainer, module = make_trainer(ExponentialAveraging(0.9)), make()
    trainer.fit(module, digits())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    content = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert "current_model_state" not in content
    assert same(content["state_dict"], weights(module))


def test_what_the_module_has_beside_weights_is_not_copied(digits, make, make_trainer):
    """Such as a progress display, which holds a lock."""

    class Display:
        def __init__(self):
            self.lock = threading.Lock()

        def report(self, label, done, total):
            pass

    module, averaging = make(progress=Display().report), ExponentialAveraging(0.9)
    for _ in range(2):
        make_trainer(averaging).fit(module, digits())
