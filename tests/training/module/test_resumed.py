"""Checkpoints of the module."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sampled import product
from small_training import (
    QUIET,
    SEED,
    Stop,
    digits,
    distributional,
    fit,
    module_for,
    same,
    small_cnn,
    trainer_for,
    with_batchnorm,
)

from wdat.sensitivity import Batch, Ema, Exact, Subsample, Table, with_pool

pytestmark = QUIET


KINDS = {
    "table": Table,
    "batch": Batch,
    "ema": Ema,
    "exact": partial(Exact, every=2),
    "subsample": partial(Subsample, 20, 2),
}


def saved(tmp_path, **options):
    return ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, save_last=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimator_is_in_the_checkpoint(data, tmp_path, kind):
    module = module_for(small_cnn(), sensitivity=KINDS[kind]())
    trainer_for(epochs=1, callbacks=[saved(tmp_path)], enable_checkpointing=True).fit(module, data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    wanted = {"name": kind, **module.sensitivity.state_dict()}
    assert set(checkpoint["sensitivity"]) == set(wanted)
    for key, value in checkpoint["sensitivity"].items():
        assert value is not None
        assert torch.equal(value, wanted[key]) if isinstance(value, torch.Tensor) else value == wanted[key]

    fresh = module_for(small_cnn(), sensitivity=KINDS[kind]())
    fresh.on_load_checkpoint(checkpoint)
    fresh.sensitivity.begin(48, 2.0, SEED, module.sensitivity.processes)  # as on_fit_start does afterwards
    assert fresh.sensitivity.upsilon() == module.sensitivity.upsilon()


def test_the_state_of_another_estimator_is_left_out(data, tmp_path):
    module = fit(module_for(small_cnn(), sensitivity=Ema()), data, 1)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other = module_for(small_cnn(), sensitivity=Batch())
    other.on_load_checkpoint(checkpoint)
    assert other.sensitivity.sample() is None
    other.on_load_checkpoint({})  # a checkpoint without any


# at the end of an epoch of three steps, and inside the next
@pytest.mark.parametrize(("kind", "steps", "pooled"), product(KINDS, [3, 4], [False, True], every=3))
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, kind, steps, pooled, pool):
    def read():
        return digits(synthetic={"path": pool, "sample": 30} if pooled else None)

    def make():
        sensitivity, data = KINDS[kind](), read()
        if pooled:
            sensitivity = with_pool(sensitivity, data.pool, data.pool_share, 30, None)
        return module_for(with_batchnorm(), sensitivity=sensitivity, scheduler=lambda t: 1 - 0.9 * t)

    whole = fit(make(), read(), -1, epochs=3)
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(InterruptedError):
        fit(make(), read(), -1, epochs=3, callbacks=[Stop(steps, path)])
    resumed = make()
    trainer = trainer_for(epochs=3)
    trainer.fit(resumed, read(), ckpt_path=path)
    assert trainer.global_step == 9
    assert same(resumed.network, whole.network)
    assert resumed.sensitivity.upsilon() == whole.sensitivity.upsilon()


def test_the_run_is_a_function_of_the_seed(data):
    def run(seed):
        return fit(module_for(small_cnn(), seed=seed, attack=distributional("pgd")), data, 2).network

    torch.manual_seed(1)
    one = run(1)
    torch.manual_seed(2)  # the global generator has no say
    assert same(run(1), one)
    assert not same(run(2), one)
