"""Training with CutMix: mixed batches reach the objective, and a resumed run draws alike."""

from __future__ import annotations

import pytest
from small_training import QUIET, Stop, digits, fit, module_for, same, small_cnn, trainer_for

from wdat.attacks import PGD
from wdat.objectives import MART, PGDAT

pytestmark = QUIET


@pytest.mark.parametrize("kind", [PGDAT, MART])
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, kind):
    def make():
        return module_for(small_cnn(), kind(pointwise_attack=PGD(loss="ce", steps=2, step_size=0.5)))

    def mixed():
        return digits(augmentation={"cutmix": 0.7, "erasing": 0.3})

    whole, path = fit(make(), mixed(), -1, epochs=2), tmp_path / "stopped.ckpt"
    with pytest.raises(InterruptedError):
        fit(make(), mixed(), -1, epochs=2, callbacks=[Stop(4, path)])
    resumed = make()
    trainer_for(epochs=2).fit(resumed, mixed(), ckpt_path=path)
    assert same(resumed.network, whole.network)
    assert not same(fit(make(), digits(), -1, epochs=2).network, whole.network)
