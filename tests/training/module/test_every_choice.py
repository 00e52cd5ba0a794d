"""The training step for every choice."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import lightning as L
import pytest
import torch
from sampled import sampled
from small_training import (
    ATTACKS,
    DELTA,
    ESTIMATORS,
    OBJECTIVES,
    QUIET,
    Outputs,
    distributional,
    fit,
    module_for,
    same,
    small_cnn,
    with_batchnorm,
)

from wdat.attacks import build
from wdat.data.batch import Batch
from wdat.distributed import ALONE, Processes
from wdat.errors import SettingError
from wdat.objectives import Clean
from wdat.threat import ThreatModel
from wdat.training.weight_perturbation import AWP

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


PAIRS = [  # every attack with every objective, and with each of them another estimator
    (attack, objective, ESTIMATORS[(i + j) % len(ESTIMATORS)])
    for i, attack in enumerate(ATTACKS)
    for j, objective in enumerate(OBJECTIVES)
    if objective != "dual_ascent"
] + [("critical", "dual_ascent", estimator) for estimator in ESTIMATORS if estimator != "ema"]


@pytest.mark.parametrize(("attack", "objective", "estimator"), sampled(PAIRS, 4))
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
    names = {"loss"} if objective in ("pgd_at", "attack_at", "mart", "dual_ascent") else {"loss", "loss_clean"}
    names |= {"loss_distances", "loss_misclassified"} if objective == "dual_ascent" else set()
    names |= {"loss_boosted"} if objective == "mart" else set()
    names |= {"loss_pointwise"} if objective in ("trades", "combined", "pgd_at", "mart") else set()
    names |= {"loss_distributional"} if objective in ("wdat", "combined", "attack_at") else set()
    assert len(watch.losses) == 2
    for losses in watch.losses:
        assert set(losses) == {f"train/{name}" for name in names}
        assert all(map(math.isfinite, losses.values()))
    for old, new in zip(before.parameters(), network.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert new.isfinite().all()
    attacked = {"loss_distributional", "loss_distances"} & names
    assert watch.untouched == ([True, True] if attacked else [])


@pytest.mark.parametrize("threat", ["winf_linf", "w2_l2", "winf_l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_threat_trains(data, chosen, threat, attack):
    if attack == "wrm" and threat.startswith("winf"):
        pytest.skip("refused: WRM puts a price on a finite power of the distance")
    network = small_cnn()
    before = copy.deepcopy(network)
    own = chosen("threat", threat)
    outputs = Outputs()
    fit(module_for(network, attack=chosen("attack", attack), threat=own), data, 2, callbacks=[outputs])
    assert not same(network, before)
    result = outputs.seen[-1]["attack_result"]
    assert result.threat == (own.pointwise() if attack in ("pgd", "fgsm", "udr") else own)
    bound = 4 * own.delta if attack in ("wpgd_budget", "wfgsm") and not own.is_pointwise else None
    bound = own.delta if result.threat.is_pointwise and attack != "udr" else bound
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
    module_for(small_cnn(), attack=build("knapsack_budget"), threat=ThreatModel(1, "linf", DELTA))


@pytest.mark.parametrize("attack", ["wpgd_budget", "critical_draw"])
def test_dual_ascent_asks_for_the_critical_distance(chosen, attack):
    with pytest.raises(SettingError, match=f"attack={attack}: objective=dual_ascent .* set attack=critical"):
        module_for(small_cnn(), chosen("objective", "dual_ascent"), build(attack))


def test_what_a_step_returns(data, chosen):
    """By name, for callbacks."""
    outputs = Outputs()
    module = module_for(small_cnn(), chosen("objective", "combined"))
    fit(module, data, 1, callbacks=[outputs])
    (found,) = outputs.seen
    assert set(found["terms"]) == {"loss", "loss_clean", "loss_pointwise", "loss_distributional"}
    assert found["terms"]["loss"] == pytest.approx(float(found["loss"]), rel=1e-6)
    assert found["attack_result"].x_adv.shape == (16, 3, 32, 32)
    assert found["upsilon"]() == module.sensitivity.upsilon()
    fit(module_for(small_cnn(), chosen("objective", "clean")), data, 1, callbacks=[outputs])
    assert (outputs.seen[-1]["attack_result"], outputs.seen[-1]["upsilon"]) == (None, None)


INNER = 3
PASSES = {  # of the network in one step: at the clean images, inner steps, at the perturbed images
    "clean": 1,
    "trades": 1 + INNER + 1,
    "wdat": INNER + 1,  # the clean pass is the first inner step
    "attack_at": INNER + 1,
    "pgd_at": INNER + 1,
    "mart": INNER + 2,
    "dual_ascent": INNER + 5 + 1,  # five of them forward only
    "combined": INNER + 1 + INNER + 1,
}


@pytest.mark.parametrize("name", PASSES)
def test_the_passes_of_a_step(data, name, chosen):
    """A step of W-DAT costs no more than one of TRADES; one clean pass serves all that can use it."""
    network, calls, trail = small_cnn(), [], []
    network.register_forward_hook(lambda *_: calls.append(1))
    objective = chosen("objective", name)
    if hasattr(objective, "pointwise_attack"):
        objective.pointwise_attack.steps = INNER

    class Count(L.Callback):
        def on_train_batch_end(self, *_):
            trail.append(len(calls))

    attack = distributional("critical" if name == "dual_ascent" else "wpgd_budget", inner=INNER)
    fit(module_for(network, objective, attack), data, 3, callbacks=[Count()])
    assert [after - before for before, after in pairwise(trail)] == 2 * [PASSES[name]]


@pytest.mark.parametrize(("name", "more"), [("pgd_at", 1), ("attack_at", 1), ("trades", 2), ("wdat", 2), ("mart", 2)])
def test_awp_costs_one_more_pass_of_each_set_of_images(data, name, more, chosen):
    network, calls, trail = small_cnn(), [], []
    network.register_forward_hook(lambda *_: calls.append(1))
    objective = chosen("objective", name)
    if hasattr(objective, "pointwise_attack"):
        objective.pointwise_attack.steps = INNER

    class Count(L.Callback):
        def on_train_batch_end(self, *_):
            trail.append(len(calls))

    module = module_for(network, objective, distributional(inner=INNER), weight_perturbation=AWP(start=0))
    fit(module, data, 3, callbacks=[Count()])
    assert [after - before for before, after in pairwise(trail)] == 2 * [PASSES[name] + more]


class Two(Processes):
    """One of two processes; what is only logged needn't be that of both."""

    world_size = 2

    def __init__(self, rank):
        self.rank = rank


def test_unequal_parts_of_a_batch_count_by_their_images(data, monkeypatch):
    """Processes average their gradients, so a part's loss must weigh as many images as it has."""
    whole = next(iter(data.train_dataloader()))._replace(size=5)
    parts = [slice(0, 3), slice(3, 5)]

    def part(rows):
        return Batch(*(t[rows] for t in (whole.x, whole.y, whole.index, whole.position)), 5, 0)

    def gradients(batch, processes):
        monkeypatch.setattr("wdat.training.module.current", lambda device: processes)
        module = module_for(small_cnn(), Clean())  # signs in an attack would amplify rounding
        module.log = lambda *arguments, **options: None
        module.train()
        loss = module.training_step(batch, 0)["loss"]
        return torch.autograd.grad(loss, list(module.network.parameters()))

    alone = gradients(part(slice(0, 5)), ALONE)
    shared = [gradients(part(rows), Two(k)) for k, rows in enumerate(parts)]
    for wanted, one, two in zip(alone, *shared, strict=True):
        torch.testing.assert_close((one + two) / 2, wanted, rtol=1e-4, atol=1e-6)
