"""Robust evaluation inside Lightning's loops: the same numbers as outside, on the whole set."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sampled import product
from torch.utils.data import DataLoader, TensorDataset

import wdat
from wdat.attacks import build
from wdat.errors import SettingError
from wdat.records import Facts, read
from wdat.threat import ThreatModel
from wdat.training.callbacks import RobustEvaluation

KEYS = {"acc_clean", "acc_pointwise", "acc_distributional", "upsilon", "distance"}


def pixels_of(images):
    """All images of a split, in [0, 1]."""
    return images.pixels(torch.arange(len(images)), None).float() / 255


def outside(network, data, split, evaluation, threat):
    images = data.images(split)
    loader = [(pixels_of(images), images.labels)]
    return wdat.evaluate(network, loader, threat, evaluation.attacks, losses=["ce"])


def last(evaluation):
    """Clean, pointwise and distributional record of the last set."""
    return evaluation.records.records[-3:]


@pytest.mark.parametrize(
    ("inference", "split", "eval_batch_size"), product([True, False], ["val", "test"], [8, 512], every=3)
)
def test_stand_alone_loops(split, inference, eval_batch_size, digits, make_module, make_evaluation, make_trainer):
    module, evaluation = make_module(), make_evaluation(pointwise_step=0.1)
    data = digits(eval_batch_size=eval_batch_size)
    trainer = make_trainer(evaluation, inference_mode=inference)
    run = trainer.validate if split == "val" else trainer.test
    (logged,) = run(module, data, verbose=False)
    assert set(logged) == {f"{split}/{key}" for key in KEYS}

    clean, pointwise, distributional = last(evaluation)
    wanted = outside(module.network, data, split, evaluation, module.threat)
    assert [r.accuracy for r in last(evaluation)] == [r.accuracy for r in wanted]
    assert distributional.distance == pytest.approx(wanted[2].distance, rel=1e-5)
    assert clean.upsilon == pytest.approx(wanted[0].upsilon, rel=1e-5)
    assert 0 < distributional.accuracy < clean.accuracy < 1, "these tests need accuracies inside (0, 1)"

    assert pointwise.distance < 0.9 * distributional.distance
    found = {key: logged[f"{split}/{key}"] for key in KEYS}
    assert found == pytest.approx(
        {
            "acc_clean": clean.accuracy,
            "acc_pointwise": pointwise.accuracy,
            "acc_distributional": distributional.accuracy,
            "upsilon": clean.upsilon,
            "distance": distributional.distance,
        }
    )
    assert (pointwise.p, distributional.p) == (math.inf, 2)
    assert {(r.split, r.stage, r.n, r.epoch) for r in last(evaluation)} == {
        (split, "before", {"val": 37, "test": 41}[split], None)
    }


def test_one_budget_for_the_whole_set(digits, make_module, make_evaluation, make_trainer):
    """Not one for each batch: neither the size of the batches nor that of the passes matters."""
    found = []
    for eval_batch_size, batch_size in ((37, 512), (5, 512), (16, 7)):
        evaluation = make_evaluation(batch_size=batch_size)
        make_trainer(evaluation).validate(make_module(), digits(eval_batch_size=eval_batch_size), verbose=False)
        found.append(last(evaluation)[2])
    for record in found:
        assert (record.n, record.set_size) == (37, 37)
        assert record.distance <= 0.1 * (1 + 1e-5)
        assert record.accuracy == found[0].accuracy
        assert record.distance == pytest.approx(found[0].distance, rel=1e-4)

    module, data = make_module(), digits()
    images = data.images("val")
    parts = [
        wdat.attack(module.network, pixels_of(images)[i : i + 5], images.labels[i : i + 5], module.threat,
                    loss="ce", steps=5, step_size=0.375)
        for i in range(0, 37, 5)
    ]  # fmt: skip
    distance = math.sqrt(sum(p.distance**2 * p.set_size for p in parts) / 37)
    assert distance != pytest.approx(found[0].distance, rel=1e-4), "a budget for each batch would have been noticed"


def test_stages_epochs_facts_and_the_file(digits, make_module, make_evaluation, make_trainer, tmp_path):
    facts = Facts("net", "net.pt", "digits", 3)
    evaluation = make_evaluation(deltas=[0.05, "51/255"], records=tmp_path / "records.json", facts=facts)
    module, data = make_module(), digits()
    trainer = make_trainer(evaluation, max_epochs=2, logger=CSVLogger(tmp_path))
    trainer.test(module, data, verbose=False)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert read(tmp_path / "records.json")[-1].checkpoint == "trained weights, not saved"
    evaluation.records.forget("after")
    trainer.save_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    trainer.test(module, data, ckpt_path=tmp_path / "checkpoints" / "best.ckpt", verbose=False)

    records = read(tmp_path / "records.json")
    budgets = [("none", 0.0), ("pgd", 0.1), ("wpgd", 0.1), ("pgd", 0.05), ("wpgd", 0.05), ("pgd", 0.2), ("wpgd", 0.2)]
    at_test = [(s, "test", None, a, d) for s in ("before", "after") for a, d in budgets]
    at_val = [("epoch", "val", e, a, d) for e in (1, 2) for a, d in budgets[:3]]
    found = [(r.stage, r.split, r.epoch, r.attack, pytest.approx(r.delta)) for r in records]
    assert found == at_test[:7] + at_val + at_test[7:]
    assert {(r.network, r.data, r.seed) for r in records} == {("net", "digits", 3)}
    wanted = {"before": "net.pt", "epoch": "net.pt", "after": "checkpoints/best.ckpt"}
    assert all(r.checkpoint == wanted[r.stage] for r in records), "the weights of a loaded checkpoint are named"
    assert {r.n for r in records if r.split == "test"} == {41}

    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {f"{split}/{key}" for split in ("val", "test") for key in KEYS} <= set(lines[0].split(","))
    at = lines[0].split(",").index("val/acc_distributional")
    values = [float(line.split(",")[at]) for line in lines[1:] if line.split(",")[at]]
    wanted = [r.accuracy for r in records if r.split == "val" and r.attack == "wpgd"]
    assert values == pytest.approx(wanted)


def test_sanity_checks_are_not_recorded(digits, make_module, make_evaluation, make_trainer):
    evaluation = make_evaluation()
    make_trainer(evaluation, num_sanity_val_steps=2).fit(make_module(), digits(eval_batch_size=8))
    assert [(r.stage, r.epoch, r.n) for r in evaluation.records.records] == [("epoch", 1, 37)] * 3


def test_training_goes_on_undisturbed(digits, make_module, make_evaluation, make_trainer, network):
    start = {k: v.clone() for k, v in network.state_dict().items()}

    def run(*callbacks):
        network.load_state_dict(start)
        module = make_module()
        make_trainer(*callbacks, max_epochs=2).fit(module, digits())
        return [p.detach().clone() for p in module.network.parameters()]

    plain, evaluated = run(), run(make_evaluation())
    assert all(torch.equal(a, b) for a, b in zip(plain, evaluated, strict=True))
    assert not torch.equal(plain[0], start["0.weight"])


def test_progress_is_told(digits, make_module, make_evaluation, make_trainer):
    told = []
    evaluation = make_evaluation(progress=lambda *what: told.append(what))
    make_trainer(evaluation).validate(make_module(), digits(), verbose=False)
    assert told == [(f"{name} ce", k, 5) for name in ("pgd", "wpgd") for k in range(1, 6)]


def test_at_p_inf_both_attacks_are_pointwise(digits, make_module, make_evaluation, make_trainer):
    evaluation = make_evaluation(pointwise_step=0.375, threat=ThreatModel(math.inf, "linf", 0.1))
    make_trainer(evaluation).validate(make_module(), digits(), verbose=False)
    _, pointwise, distributional = last(evaluation)
    assert pointwise.accuracy == distributional.accuracy
    assert distributional.distance <= 0.1 * (1 + 1e-5)


class Stranger(L.LightningModule):
    """A module of somebody else's, with a network under another name and nothing of ours."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("name", ["classifier", ""])
def test_any_module_and_any_loader_of_pairs(name, make_evaluation, make_trainer, digits, network):
    images = digits().images("val")
    x, y = pixels_of(images), images.labels
    loader = DataLoader(TensorDataset(x, y), 8)
    module = Stranger(network)
    module.forward = network.forward
    evaluation = make_evaluation(network=name, stage="evaluate")
    (logged,) = make_trainer(evaluation).validate(module, loader, verbose=False)
    wanted = wdat.evaluate(network, [(x, y)], evaluation.threat, evaluation.attacks)
    assert [r.accuracy for r in last(evaluation)] == [r.accuracy for r in wanted]
    assert {r.stage for r in last(evaluation)} == {"evaluate"}
    assert {key.removeprefix("val/") for key in logged} == KEYS
    assert logged["val/acc_clean"] == pytest.approx(wanted[0].accuracy)


def test_of_several_attacks_the_strongest_counts(digits, make_module, make_trainer):
    weak = {"steps": 1, "step_size": 0.01}
    threat = ThreatModel(2, "linf", 0.1)
    attacks = [build("pgd", **weak), build("pgd", steps=5), build("wpgd", **weak), build("wpgd_budget", steps=5)]
    evaluation = RobustEvaluation(threat, attacks)
    (logged,) = make_trainer(evaluation).validate(make_module(), digits(), verbose=False)
    _, *found = evaluation.records.records
    accuracies = [r.accuracy for r in found]
    assert logged["val/acc_pointwise"] == pytest.approx(min(accuracies[:2]))
    assert logged["val/acc_distributional"] == pytest.approx(min(accuracies[2:]))
    assert logged["val/acc_wpgd"] == pytest.approx(accuracies[2])
    assert logged["val/acc_wpgd_budget"] == pytest.approx(accuracies[3]) != pytest.approx(accuracies[2])
    assert {key.removeprefix("val/") for key in logged} == evaluation.metrics


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"attacks": []}, "evaluation.attacks"),
        ({"losses": []}, "evaluation.losses"),
        ({"attacks": ["wpdg"]}, "wpgd"),
        ({"deltas": ["-1/255"]}, "evaluation.deltas"),
        ({"options": {"wpgd": {"steps": 2.5}}}, "attack_options.wpgd.steps"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(arguments, word):
    with pytest.raises(SettingError, match=word):
        RobustEvaluation(ThreatModel(2, "linf", 0.1), **arguments)


def test_an_impossible_threat_is_refused_before_any_work():
    with pytest.raises(SettingError, match=r"threat\.p"):
        RobustEvaluation(ThreatModel(1, "linf", 0.1), ["wpgd"])


def test_validation_images_may_have_options_of_their_own(digits, make_module, make_trainer):
    options = {"knapsack": {"steps": 4, "targets": 1, "starts": 1}, "wpgd": {"steps": 3}}
    evaluation = RobustEvaluation(
        ThreatModel(2, "linf", 0.1), ["wpgd", "knapsack"], options=options, deltas=[0.05],
        validation_options={"knapsack": {"starts": 0}},
    )  # fmt: skip
    module, data, trainer = make_module(), digits(), make_trainer(evaluation)
    trainer.test(module, data, verbose=False)
    trainer.validate(module, data, verbose=False)
    found = [r for r in evaluation.records.records if r.attack == "knapsack"]
    assert [(r.split, r.options["starts"], r.options["steps"]) for r in found] == [
        ("test", 1, 4), ("test", 1, 4), ("val", 0, 4)
    ]  # fmt: skip
    assert {r.options["steps"] for r in evaluation.records.records if r.attack == "wpgd"} == {3}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"knapsak": {}}, r"evaluation\.validation_options\.knapsak"),
        ({"pgd": {"steps": 3}}, r"unknown attack given by name.*validation_options\.pgd"),
        ({"knapsack": {"effort": "fast"}}, r"evaluation\.validation_options\.knapsack\.effort.*quick"),
    ],
)
def test_options_of_validation_that_mean_nothing_are_refused(given, words):
    with pytest.raises(SettingError, match=words):
        RobustEvaluation(ThreatModel(2, "linf", 0.1), [build("pgd"), "knapsack"], validation_options=given)


def test_what_the_network_cannot_be_measured_with_is_refused_before_any_work(make_module):
    network = make_module().network
    RobustEvaluation(ThreatModel(2, "linf", 0.1)).check(network, (3, 32, 32))
    with pytest.raises(SettingError, match="can't take images"):
        RobustEvaluation(ThreatModel(2, "linf", 0.1)).check(network, (3, 64, 64))
    with pytest.raises(SettingError, match="more than 1"):
        RobustEvaluation(ThreatModel(2, "linf", 0.1), deltas=[1.5]).check(network, (3, 32, 32))
