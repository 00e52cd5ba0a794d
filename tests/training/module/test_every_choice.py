"""The training step for every choice."""

from __future__ import annotations

import copy
import math

import lightning as L
import pytest
import torch
from small_training import (
    ATTACKS,
    DELTA,
    ESTIMATORS,
    OBJECTIVES,
    QUIET,
    distributional,
    fit,
    module_for,
    same,
    small_cnn,
    with_batchnorm,
)

from wdat.errors import SettingError
from wdat.objectives import Objective
from wdat.threat import ThreatModel

pytestmark = QUIET


class Watch(L.Callback):
    """Looks at the gradients before and after the attack, and at the losses."""

    def __init__(self, module):
        self.losses, self.untouched = [], []
        inner = module.attack

        def attack(network, x, y, threat, context=None):
            before = [p.grad for p in network.parameters()]
            values = [None if g is None else g.clone() for g in before]
            flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in network.modules()]
            result = inner(network, x, y, threat, context)
            after = [p.grad for p in network.parameters()]
            self.untouched.append(
                all(a is b and (v is None or torch.equal(a, v)) for a, b, v in zip(after, before, values, strict=True))
                and flags == [(m.training, [p.requires_grad for p in m.parameters()]) for m in network.modules()]
            )
            assert not result.x_adv.requires_grad
            return result

        module.attack = type(
            "Watched", (), {"__call__": staticmethod(attack), "__getattr__": lambda _, k: getattr(inner, k)}
        )()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/loss")})


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_choice_trains(data, chosen, attack, objective, estimator):
    network = small_cnn()
    before = copy.deepcopy(network)
    module = module_for(
        network,
        chosen("objective", objective),
        chosen("attack", attack),
        chosen("threat", "w2_linf"),
        chosen("sensitivity", estimator),
    )
    watch = Watch(module)
    fit(module, data, 2, callbacks=[watch])
    names = {"loss"} if objective == "pgd_at" else {"loss", "loss_clean"}
    names |= {"loss_pointwise"} if objective in ("trades", "combined", "pgd_at") else set()
    names |= {"loss_distributional"} if objective in ("wdat", "combined") else set()
    assert len(watch.losses) == 2
    for losses in watch.losses:
        assert set(losses) == {f"train/{name}" for name in names}
        assert all(map(math.isfinite, losses.values()))
    for old, new in zip(before.parameters(), network.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()
    assert watch.untouched == ([True, True] if objective in ("wdat", "combined") else [])


@pytest.mark.parametrize("threat", ["winf_linf", "w2_l2", "winf_l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_threat_trains(data, chosen, threat, attack):
    network = small_cnn()
    before = copy.deepcopy(network)
    own = chosen("threat", threat)
    module = fit(module_for(network, attack=chosen("attack", attack), threat=own), data, 2)
    assert not same(network, before)
    result = module.last_attack
    assert result.threat == (own.pointwise() if attack in ("pgd", "fgsm") else own)
    bound = 4 * own.delta if attack in ("wpgd_budget", "wfgsm") and not own.is_pointwise else None
    bound = own.delta if result.threat.is_pointwise else bound
    if bound:
        assert float(result.distances.max()) <= bound * 1.0001


def test_the_reported_loss_is_the_sum_of_its_terms(data, chosen):
    module = module_for(with_batchnorm(), chosen("objective", "combined"), distributional())
    watch = Watch(module)
    fit(module, data, 3, callbacks=[watch])
    for terms in watch.losses:
        parts = (terms[f"train/loss_{name}"] for name in ("clean", "pointwise", "distributional"))
        assert terms["train/loss"] == pytest.approx(sum(a * b for a, b in zip((1, 3, 3), parts, strict=True)), rel=1e-5)


def test_an_impossible_pair_is_refused_before_any_work():
    with pytest.raises(SettingError, match=r"threat\.p"):
        module_for(small_cnn(), threat=ThreatModel(1, "linf", DELTA))
    module_for(small_cnn(), Objective(), threat=ThreatModel(1, "linf", DELTA))  # doesn't use the attack
