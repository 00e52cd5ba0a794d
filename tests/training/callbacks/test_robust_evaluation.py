"""Robust evaluation inside Lightning's loops: the same numbers as outside, on the whole set."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import wdat
from wdat.attacks import build
from wdat.errors import SettingError
from wdat.records import Facts, RecordFile, read
from wdat.threat import ThreatModel
from wdat.training.callbacks import RobustEvaluation

KEYS = {"acc_clean", "acc_pointwise", "acc_distributional", "upsilon", "distance"}


def pixels_of(images):
    """All images of a split, in [0, 1]."""
    return images.pixels(torch.arange(len(images)), None).float() / 255


def outside(network, data, split, evaluation, threat):
    images = data.images(split)
    loader = [(pixels_of(images), images.labels)]
    return wdat.evaluate(network, loader, threat, [evaluation.pointwise, evaluation.distributional], losses=["ce"])


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("eval_batch_size", [8, 512])
def test_stand_alone_loops(split, inference, eval_batch_size, digits, make_module, make_evaluation, make_trainer):
    module, evaluation, data = make_module(), make_evaluation(), digits(eval_batch_size=eval_batch_size)
    trainer = make_trainer(evaluation, inference_mode=inference)
    run = trainer.validate if split == "val" else trainer.test
    (logged,) = run(module, data, verbose=False)
    assert set(logged) == {f"{split}/{key}" for key in KEYS}

    clean, pointwise, distributional = evaluation.last
    wanted = outside(module.network, data, split, evaluation, module.threat)
    assert [r.accuracy for r in evaluation.last] == [r.accuracy for r in wanted]
    assert distributional.distance == pytest.approx(wanted[2].distance, rel=1e-5)
    assert clean.upsilon == pytest.approx(wanted[0].upsilon, rel=1e-5)
    assert 0 < distributional.accuracy < clean.accuracy < 1, "these tests need accuracies inside (0, 1)"

    assert pointwise.distance < 0.9 * distributional.distance
    found = {key: logged[f"{split}/{key}"] for key in KEYS}
    assert found["acc_clean"] == clean.accuracy  # counted by torchmetrics
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
    assert {(r.split, r.stage, r.n, r.epoch) for r in evaluation.last} == {
        (split, "evaluate", {"val": 37, "test": 41}[split], None)
    }


def test_one_budget_for_the_whole_set(digits, make_module, make_evaluation, make_trainer):
    """Not one for each batch: neither the size of the batches nor that of the passes matters."""
    found = []
    for eval_batch_size, batch_size in ((37, 512), (5, 512), (16, 7)):
        evaluation = make_evaluation(batch_size=batch_size)
        make_trainer(evaluation).validate(make_module(), digits(eval_batch_size=eval_batch_size), verbose=False)
        found.append(evaluation.last[2])
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
    module, evaluation, data = make_module(), make_evaluation(curve=[0.5, 2]), digits()
    facts = Facts("net", "net.pt", "digits", 3)
    evaluation.describe(RecordFile(tmp_path / "records.json"), facts)
    trainer = make_trainer(evaluation, max_epochs=2, logger=CSVLogger(tmp_path))
    evaluation.stage = "before"
    trainer.test(module, data, verbose=False)
    trainer.fit(module, data)
    evaluation.stage = "after"
    trainer.test(module, data, verbose=False)

    records = read(tmp_path / "records.json")
    budgets = [("none", 0.0), ("pgd", 0.1), ("wpgd", 0.1), ("pgd", 0.05), ("wpgd", 0.05), ("pgd", 0.2), ("wpgd", 0.2)]
    at_test = [(s, "test", None, a, d) for s in ("before", "after") for a, d in budgets]
    at_val = [("epoch", "val", e, a, d) for e in (1, 2) for a, d in budgets[:3]]
    found = [(r.stage, r.split, r.epoch, r.attack, pytest.approx(r.delta)) for r in records]
    assert found == at_test[:7] + at_val + at_test[7:]
    assert {(r.network, r.checkpoint, r.data, r.seed) for r in records} == {("net", "net.pt", "digits", 3)}
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
    assert [(r.stage, r.epoch, r.n) for r in evaluation.results.records] == [("epoch", 1, 37)] * 3


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
    evaluation, told = make_evaluation(), []
    evaluation.describe(RecordFile(None), Facts(), lambda *what: told.append(what))
    make_trainer(evaluation).validate(make_module(), digits(), verbose=False)
    assert told == [(f"{name} ce", k, 5) for name in ("pgd", "wpgd") for k in range(1, 6)]


def test_at_p_inf_both_attacks_are_pointwise(digits, make_module, make_evaluation, make_trainer):
    evaluation = make_evaluation(pointwise_step=0.375)
    module = make_module(threat=ThreatModel(math.inf, "linf", 0.1))
    make_trainer(evaluation).validate(module, digits(), verbose=False)
    _, pointwise, distributional = evaluation.last
    assert pointwise.accuracy == distributional.accuracy
    assert distributional.distance <= 0.1 * (1 + 1e-5)


class Stranger(L.LightningModule):
    def validation_step(self, batch, batch_idx):
        pass


def test_other_modules_are_left_alone(make_evaluation, make_trainer, digits):
    evaluation = make_evaluation()
    make_trainer(evaluation).validate(Stranger(), digits(), verbose=False)
    assert evaluation.last == []


def test_what_stands_behind_acc_pointwise_must_be_pointwise():
    with pytest.raises(SettingError, match="pointwise"):
        RobustEvaluation(build("wpgd"), build("wpgd"))
