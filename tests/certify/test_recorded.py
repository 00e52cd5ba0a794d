"""Certificates in an evaluation: the records they make, and the classes that the command line names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from certify.conftest import image, seeded
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from wdat.attacks.knapsack import Knapsack
from wdat.certify import Crown, Smoothing
from wdat.errors import SettingError
from wdat.evaluation import ImageTensors
from wdat.evaluation.evaluator import Evaluator
from wdat.evaluation.session import Session
from wdat.records import Facts, RecordFile
from wdat.threat import ThreatModel

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def session(tmp_path):
    """`session()` is a new one in the same folder, as a new interpreter would make it."""
    network = seeded("mlp").float()
    x = torch.stack([image(seed) for seed in range(8)]).float()
    images = ImageTensors(x, network(x).argmax(1))

    def make():
        evaluator = Evaluator(network, images, facts=Facts("net", "net.pt", "data", 0))
        return Session(evaluator, RecordFile(tmp_path / "records.json"), tmp_path)

    return make


def test_one_record_a_budget_below_the_attack(session, monkeypatch):
    attack = Knapsack(starts=1, targets=1, steps=10)
    threats = [ThreatModel(2, "linf", delta) for delta in (0.005, 0.02)]
    first = session()
    for threat in threats:
        first.attacked(attack, threat)
    first.certify(Crown(), threats, [attack])
    records = first.results.records
    attacked, certified = ([r for r in records if r.attack == kind] for kind in ("knapsack", "certified"))
    for above, below in zip(attacked, certified, strict=True):
        assert below.accuracy <= above.accuracy
        assert (below.network, below.delta, below.images) == (above.network, above.delta, above.images)
        assert below.details["bound"] == "lower"
        assert below.options["method"] == "crown"
        assert below.seconds > 0
    monkeypatch.setattr(Crown, "__call__", lambda *arguments: pytest.fail("certified again"))
    again = session()
    again.certify(Crown(), threats, [attack])
    assert again.results.records == records


def test_without_an_attack(session):
    here = session()
    here.certify(Crown(), [ThreatModel(1, "linf", 0.01)])
    assert [r.attack for r in here.results.records] == ["certified"]


def test_the_randomised_classifier_has_its_own_name(session):
    here = session()
    here.certify(Smoothing(samples=50), [ThreatModel(2, "l2", 0.1)])
    (record,) = here.results.records
    assert record.network == "net, randomised, σ = 0.12"
    assert record.options["alpha"] == 0.001
    here.certify(Smoothing(samples=50), [ThreatModel(2, "l2", 0.1)])
    here.certify(Smoothing(samples=50, sigma=0.25), [ThreatModel(2, "l2", 0.1)])
    assert len(here.results.records) == 2


def test_a_norm_that_cant_be_certified_is_refused_before_any_work(session):
    here = session()
    with pytest.raises(SettingError, match="certify=smoothing"):
        here.certify(Smoothing(), [ThreatModel(2, "linf", 0.1)])
    assert not here.results.records


@pytest.mark.parametrize(("choice", "wanted"), [("none", None), ("crown", Crown()), ("smoothing", Smoothing(seed=3))])
def test_choices_of_the_command_line(choice, wanted):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+certify={choice}", "+seed=3", "+batch_size=500"])
    assert instantiate(config.certify) == wanted
