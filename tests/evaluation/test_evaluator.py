"""Attacks over a whole set, and the records they leave."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

import wdat
from wdat.attacks import build
from wdat.attacks.knapsack import Knapsack
from wdat.errors import SettingError
from wdat.evaluation import ImageTensors, evaluate
from wdat.evaluation.statistics import bootstrap_interval
from wdat.records import Facts
from wdat.threat import ThreatModel

CONTRACT = """
    stage network checkpoint data split attack options loss p norm delta n set_size accuracy accuracy_low
    accuracy_high loss_mean distance seconds seed device commit versions
"""
THREAT = ThreatModel(2, "linf", 0.1)
SHORT = {"wpgd": {"steps": 4, "step_size": 0.4}, "pgd": {"steps": 4, "step_size": 0.4}}


def _problem(n: int = 11):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        with torch.no_grad():
            network[3].weight.mul_(4)
        x = torch.rand(n, 3, 2, 2, dtype=torch.float64)
        y = network(x).argmax(1)
        y[::3] = torch.randint(4, y[::3].shape)
    return network, x, y


def _timeless(records):
    return [{**asdict(r), "seconds": 0} for r in records]


def test_records_have_the_fields_of_the_contract():
    network, x, y = _problem()
    records = evaluate(network, [(x, y)], THREAT, ["pgd", "wpgd"], losses=["ce", "redlr"], options=SHORT)
    assert [(r.attack, r.loss) for r in records] == [
        ("none", "ce"),
        ("none", "redlr"),
        ("pgd", "ce"),
        ("pgd", "redlr"),
        ("wpgd", "ce"),
        ("wpgd", "redlr"),
    ]
    for record in records:
        assert set(record.to_json()) >= set(CONTRACT.split())
        assert record.stage == "evaluate"
        assert record.n == record.set_size == 11
        assert record.norm == "linf"
        assert (record.accuracy_low, record.accuracy_high) == bootstrap_interval(round(11 * record.accuracy), 11)
        assert record.seconds > 0
        assert record.device == "cpu"
    for record in records[2:]:
        assert record.delta == 0.1
        assert record.p == (math.inf if record.attack == "pgd" else 2)
        assert record.distance <= 0.1 + 1e-9
        assert record.options["steps"] == 4
        assert record.upsilon is None
        assert "loss" not in record.options


def test_the_clean_record_states_accuracy_v0_w0_and_upsilon():
    network, x, y = _problem()
    record = evaluate(network, [(x, y)], THREAT, [])[0]
    z = network(x).detach()
    wrong = z.argmax(1) != y
    assert (record.attack, record.p, record.delta, record.distance, record.options) == ("none", 2.0, 0.0, 0.0, {})
    assert record.accuracy == accuracy_score(y, z.argmax(1))
    assert record.loss_mean == pytest.approx(log_loss(y, z.softmax(1), labels=range(4)))
    assert record.loss_misclassified == pytest.approx(
        log_loss(y[wrong], z.softmax(1)[wrong], labels=range(4)), rel=1e-9
    )
    n = []
    for i in range(11):
        image = x[i : i + 1].clone().requires_grad_(True)
        nn.functional.cross_entropy(network(image), y[i : i + 1]).backward()
        n.append(float(image.grad.abs().sum()))
    assert record.upsilon == pytest.approx(float(np.mean(np.square(n)) ** 0.5))


def test_w0_is_null_where_nothing_is_misclassified():
    network, x, _ = _problem()
    record = evaluate(network, [(x, network(x).argmax(1))], THREAT, [])[0]
    assert record.accuracy == 1.0
    assert record.loss_misclassified is None
    assert record.to_json()["loss_misclassified"] is None


def test_records_repeat_what_they_are_told():
    network, x, y = _problem()
    facts = Facts(network="n", checkpoint="c.pt", data="digits", seed=7)
    record = evaluate(network, [(x, y)], THREAT, [], stage="epoch", split="val", epoch=3, facts=facts)[0]
    assert (record.network, record.checkpoint, record.data, record.seed) == ("n", "c.pt", "digits", 7)
    assert (record.stage, record.split, record.epoch) == ("epoch", "val", 3)


def test_attacks_may_be_given_ready_made():
    network, x, y = _problem()
    attack = build("wpgd_budget", steps=3, loss="margin", radius_max=4.0)
    record = evaluate(network, [(x, y)], THREAT, [attack])[1]
    assert (record.attack, record.loss, record.options["radius_max"]) == ("wpgd_budget", "margin", 4.0)
    assert record.accuracy == attack(network, x, y, THREAT).accuracy


def test_two_runs_give_the_same_records_apart_from_seconds():
    network, x, y = _problem()
    runs = [evaluate(network, [(x, y)], THREAT, losses=["ce", "dlr"], options=SHORT) for _ in range(2)]
    assert _timeless(runs[0]) == _timeless(runs[1])


def test_neither_batches_nor_batch_size_change_the_records():
    network, x, y = _problem()
    whole = evaluate(network, ImageTensors(x, y), THREAT, options=SHORT)
    batches = list(zip(x.split(4), y.split(4), range(3), strict=True))  # further members are of no concern
    parts = evaluate(network, batches, THREAT, options=SHORT, batch_size=3)
    for a, b in zip(whole, parts, strict=True):
        assert (a.attack, a.accuracy, a.n) == (b.attack, b.accuracy, b.n)
        assert b.loss_mean == pytest.approx(a.loss_mean)
        assert b.distance == pytest.approx(a.distance)


def test_the_network_is_left_as_it_was_found():
    network, x, y = _problem()
    network = nn.Sequential(network, nn.BatchNorm1d(4).double(), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.inference_mode():
        evaluate(network, [(x * 1, y * 1)], THREAT, options=SHORT)
    assert all(m.training for m in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_tensors_made_in_inference_mode_serve():
    network, x, y = _problem()
    with torch.inference_mode():
        records = evaluate(network, ImageTensors(x * 1, y * 1), THREAT, options=SHORT)
    assert _timeless(records) == _timeless(evaluate(network, ImageTensors(x, y), THREAT, options=SHORT))


@pytest.mark.parametrize("cuts", [(7, 7), (0, 5), (4, 8), (11, 11)])
def test_processes_with_uneven_and_empty_parts_equal_one(together, cuts):
    network, x, y = _problem()
    alone = evaluate(network, ImageTensors(x, y), THREAT, losses=["ce", "redlr"], options=SHORT)
    parts = [slice(0, cuts[0]), slice(cuts[0], cuts[1]), slice(cuts[1], 11)]

    def one(processes):
        images = ImageTensors(x[parts[processes.rank]], y[parts[processes.rank]])
        mine = copy.deepcopy(network)
        return evaluate(mine, images, THREAT, losses=["ce", "redlr"], options=SHORT, processes=processes)

    for records in together(3, one):
        for a, b in zip(alone, records, strict=True):
            same = {"seconds": 0.0, "loss_mean": 0, "distance": 0, "upsilon": 0, "loss_misclassified": 0}
            assert asdict(replace(a, **same)) == asdict(replace(b, **same))
            for key in ("loss_mean", "distance", "upsilon", "loss_misclassified"):
                expected = getattr(a, key)
                assert getattr(b, key) == (None if expected is None else pytest.approx(expected))


def test_progress_is_told_per_attack():
    network, x, y = _problem()
    calls = []
    evaluate(network, [(x, y)], THREAT, ["wpgd"], options=SHORT, progress=lambda *a: calls.append(a))
    assert calls == [("wpgd ce", k, 4) for k in (1, 2, 3, 4)]


def test_dropped_images_are_counted():
    network, x, y = _problem()

    class Root(nn.Module):
        def forward(self, z):
            return network(z) + z[:, :1, 0, 0].sqrt() * torch.arange(4.0).double()

    x = x.clamp(0.01, 1)
    x[2, 0, 0, 0] = 0
    with pytest.warns(UserWarning, match="1 of 11"):
        records = evaluate(Root(), [(x, y)], THREAT, ["wpgd"], options=SHORT)
    assert [r.dropped for r in records] == [1, 1]


@pytest.mark.parametrize("empty", [[], ImageTensors(torch.zeros(0, 3, 2, 2).double(), torch.zeros(0).long())])
def test_an_empty_set_is_refused(empty):
    with pytest.raises(SettingError, match="empty"):
        evaluate(_problem()[0], empty, THREAT, [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attacks": ["wpdg"]}, ["wpgd"]),
        ({"losses": ["kl"]}, ["kl", "losses"]),
        ({"losses": ["cee"]}, ["losses", "ce"]),
        ({"options": {"wpgd": {"step": 1}}}, ["steps"]),
        ({"options": {"wpdg": {"steps": 1}}}, ["wpgd"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(changes, words):
    network, x, y = _problem()
    with pytest.raises(SettingError) as error:
        evaluate(network, [(x, y)], THREAT, **{"attacks": ["wpgd"], **changes})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("options", [{"loss": "margin"}, {"batch_size": 3}])
def test_options_that_evaluate_sets_itself_are_honoured_or_refused(options):
    network, x, y = _problem()
    try:
        records = evaluate(network, [(x, y)], THREAT, ["wpgd"], options={"wpgd": options})
    except SettingError:
        return
    record = records[-1]
    assert {**record.options, "loss": record.loss}.items() >= options.items()


@pytest.mark.parametrize("attacks", [[], ["wpgd"]])
@pytest.mark.parametrize("change", [lambda x: (255 * x).byte(), lambda x: 255 * x, lambda x: x - 0.5])
def test_images_that_can_not_be_used_are_refused(change, attacks):
    network, x, y = _problem()
    with pytest.raises(SettingError, match="images"):
        evaluate(network, [(change(x), y)], THREAT, attacks)


def test_the_front_door():
    network, x, y = _problem()
    records = wdat.evaluate(network, [(x, y)], wdat.ThreatModel("inf", "l2", "8/255"), attacks=["fgsm"])
    assert [type(r) for r in records] == [wdat.Record] * 2


def test_several_budgets_share_one_search_and_give_what_single_ones_give(monkeypatch):
    """The knapsack's points are searched once, for the largest budget; its seconds count once."""
    network, x, y = _problem(40)
    threat, further = ThreatModel(2, "linf", 0.02), [0.01, 0.04]
    single = [
        wdat.evaluate(network, [(x, y)], replace(threat, delta=d), ["wpgd", "knapsack"])[1:] for d in (0.02, *further)
    ]
    searches, find = [], Knapsack.find

    def counted(self, *arguments, **options):
        searches.append(1)
        return find(self, *arguments, **options)

    monkeypatch.setattr(Knapsack, "find", counted)
    together = wdat.evaluate(network, [(x, y)], threat, ["wpgd", "knapsack"], deltas=further, pictures=True)[1:]
    assert len(searches) == 1
    assert [(r.attack, r.delta) for r in together] == [(r.attack, r.delta) for part in single for r in part]
    wanted = [r.accuracy for part in single for r in part]
    assert [r.accuracy for r in together] == pytest.approx(wanted, abs=1e-9)
    assert 0 < wanted[1] < 1
    assert ["examples" in r.details for r in together] == [True, True, False, False, False, False]
