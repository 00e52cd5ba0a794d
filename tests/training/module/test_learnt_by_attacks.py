"""What an attack learns while it trains is in the checkpoint, and a resumed run goes on with it."""

from __future__ import annotations

import pytest
from small_training import EVERYONE, QUIET, SHARED, Stop, digits, fit, module_for, same, trainer_for, with_batchnorm

from wdat.attacks import UDR, WRM
from wdat.objectives import AttackAT
from wdat.sensitivity import Table

pytestmark = QUIET
KINDS = {
    "wrm": (lambda: WRM(steps=2), SHARED),
    "udr": (lambda: UDR(steps=2, rate=5.0, every=2), EVERYONE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, kind):
    make_attack, threat = KINDS[kind]

    def make():
        return module_for(with_batchnorm(), AttackAT(), make_attack(), threat, Table())

    whole = fit(make(), digits(), -1, epochs=2)
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(InterruptedError):
        fit(make(), digits(), -1, epochs=2, callbacks=[Stop(4, path)])
    resumed = make()
    begun = resumed.attack.state_dict()
    trainer_for(epochs=2).fit(resumed, digits(), ckpt_path=path)
    assert same(resumed.network, whole.network)
    assert resumed.attack.state_dict() == whole.attack.state_dict() != begun
