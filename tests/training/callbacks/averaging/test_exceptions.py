"""Exceptions leave the current weights in the module."""

from __future__ import annotations

import signal

import pytest
from averaged import QUIET, Scored, Stop, Trail, same, saved, weights, with_batchnorm
from lightning.pytorch.callbacks import ModelCheckpoint
from sampled import product

from wdat.training.callbacks import ExponentialAveraging

pytestmark = QUIET


HOOKS = [
    "train_batch_start",
    "validation_batch_start",
    "validation_batch_end",
    "validation_epoch_end",
    "validation_end",
]


@pytest.fixture
def interruptible():
    """Lightning ignores further Ctrl-C after the first one; other tests shouldn't."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    ("hook", "error", "last"), product(HOOKS, [InterruptedError, KeyboardInterrupt], [True, False], every=3)
)
def test_after_an_exception_the_module_holds_its_current_weights(
    hook, error, last, digits, make, make_trainer, tmp_path, interruptible
):
    """And the average is saved as such, as it was."""
    averaging, trail = ExponentialAveraging(0.9), Trail(tmp_path / "trail")
    stop = Stop(f"on_{hook}", 6, error, tmp_path / "inside.ckpt")
    order = [trail, stop] if last else [stop, trail]
    order = [*order, averaging] if last else [averaging, *order]
    checkpoint = ModelCheckpoint(tmp_path / "thrown", save_on_exception=True, save_top_k=0)
    module = make(network=with_batchnorm())
    trainer = make_trainer(*order, checkpoint, enable_checkpointing=True, max_epochs=3)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(module, digits())
    assert len(trail.raw) == 7
    assert same(weights(module.network), trail.raw[6])
    (thrown,) = (tmp_path / "thrown").iterdir()
    whole = Trail(tmp_path / "whole")
    make_trainer(ExponentialAveraging(0.9), whole, max_epochs=2).fit(make(network=with_batchnorm()), digits())
    wanted, raw, _ = saved(tmp_path / "whole" / "6.ckpt")
    for path in (thrown, tmp_path / "inside.ckpt"):
        average, current, count = saved(path)
        assert same(average, wanted)
        assert same(current, raw)
        assert count == 7
    assert not same(wanted, raw)


def test_after_an_exception_validation_apart_from_training_scores_the_current_weights(digits, make, make_trainer):
    trail, scored, module = Trail(), Scored(), make(network=with_batchnorm())
    trainer = make_trainer(ExponentialAveraging(0.9), trail, scored, Stop("on_train_batch_start", 3), max_epochs=2)
    with pytest.raises(InterruptedError):
        trainer.fit(module, digits())
    assert not same(scored.ends.pop(3), trail.raw[3])
    trainer.validate(module, digits(), verbose=False)
    assert same(scored.ends[3], trail.raw[3])


def test_a_run_that_broke_off_can_be_started_again_with_the_same_callback(digits, make, make_trainer, tmp_path):
    averaging = ExponentialAveraging(0.9, 0.5)
    with pytest.raises(InterruptedError):
        make_trainer(averaging, Stop("on_validation_batch_end", 3), max_epochs=2).fit(make(), digits())
    found, wanted = Trail(tmp_path / "found"), Trail(tmp_path / "wanted")
    for each, trail in ((averaging, found), (ExponentialAveraging(0.9, 0.5), wanted)):
        module = make(network=with_batchnorm())
        make_trainer(each, trail, max_epochs=2).fit(module, digits())
    for step in range(1, 7):
        mine, theirs = (saved(trail.folder / f"{step}.ckpt") for trail in (found, wanted))
        assert same(mine[0], theirs[0])
        assert mine[2] == theirs[2] == step + 1
