"""An evaluation that stops and goes on: what is computed again, what isn't, and what is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from wdat.attacks import build
from wdat.attacks.knapsack import Knapsack
from wdat.errors import SettingError
from wdat.evaluation.evaluator import Evaluator, ImageTensors
from wdat.evaluation.session import Session
from wdat.records import Facts, RecordFile, read
from wdat.threat import ThreatModel

SEARCH = {"starts": 1, "targets": 1, "steps": 6, "bisections": 3}
THREAT = ThreatModel(2, "linf", 0.02)


@pytest.fixture(scope="module")
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(27, 4))
        x = torch.rand(10, 3, 3, 3)
        y = network(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    return network, ImageTensors(x, y)


@pytest.fixture
def session(problem, tmp_path):
    """`session(**options)` is a new one in the same folder, as a new interpreter would make it."""

    def make(facts=None, images=None, folder=tmp_path, **options):
        evaluator = Evaluator(problem[0], images or problem[1], facts=facts or Facts("net", "", "data", 0), **options)
        return Session(evaluator, RecordFile(folder / "records.json"), folder)

    return make


@pytest.fixture
def worked(monkeypatch):
    """What was really computed: attacks, clean passes and searches, in order."""
    calls = []

    def spy(kind, name, label):
        inner = getattr(kind, name)

        def method(self, *arguments, **options):
            calls.append(label(self, *arguments))
            return inner(self, *arguments, **options)

        monkeypatch.setattr(kind, name, method)

    spy(Evaluator, "attacked", lambda _, attack, threat: (attack.name, threat.delta))
    spy(Evaluator, "clean", lambda _, threat, loss: ("clean", loss))
    spy(Knapsack, "find", lambda _, network, x, y, norm, context=None: ("search", norm))
    return calls


def whole(session):
    """Two clean records, four attacks."""
    for loss in ("ce", "margin"):
        session.clean(THREAT, loss)
    for delta in (0.01, 0.02):
        for name in ("pgd", "wpgd"):
            session.attacked(build(name, steps=2), ThreatModel(2, "linf", delta))


def test_finished_records_are_never_computed_again(session, worked, tmp_path):
    whole(session())
    assert len(worked) == 6
    before = (tmp_path / "records.json").read_bytes()
    worked.clear()
    whole(session())
    assert worked == []
    assert (tmp_path / "records.json").read_bytes() == before


def test_nor_within_one_session(session, worked):
    one = session()
    whole(one)
    whole(one)
    assert len(worked) == len(one.results.records) == 6


@pytest.mark.parametrize("done", range(4))
def test_an_interrupted_evaluation_goes_on(session, worked, tmp_path, monkeypatch, done):
    inner, left = Evaluator.attacked, iter(range(done))

    def interrupted(self, *arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "attacked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole(session())
    kept = read(tmp_path / "records.json")
    assert len(kept) == 2 + done
    worked.clear()
    whole(session())
    assert worked == [("pgd", 0.01), ("wpgd", 0.01), ("pgd", 0.02), ("wpgd", 0.02)][done:]
    records = read(tmp_path / "records.json")
    assert records[: 2 + done] == kept
    assert [(r.attack, r.delta) for r in records[2:]] == [("pgd", 0.01), ("wpgd", 0.01), ("pgd", 0.02), ("wpgd", 0.02)]


CHANGES = {
    "steps": lambda s: s.attacked(build("wpgd", steps=3), THREAT),
    "step_size": lambda s: s.attacked(build("wpgd", steps=2, step_size=0.5), THREAT),
    "loss": lambda s: s.attacked(build("wpgd", steps=2, loss="margin"), THREAT),
    "radii_loss": lambda s: s.attacked(build("wpgd", steps=2, radii_loss="margin"), THREAT),
    "delta": lambda s: s.attacked(build("wpgd", steps=2), ThreatModel(2, "linf", 0.03)),
    "p": lambda s: s.attacked(build("wpgd", steps=2), ThreatModel(3, "linf", 0.02)),
    "norm": lambda s: s.attacked(build("wpgd", steps=2), ThreatModel(2, "l2", 0.02)),
    "attack": lambda s: s.attacked(build("wfgsm"), THREAT),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_computed_again(session, worked, change):
    session().attacked(build("wpgd", steps=2), THREAT)
    worked.clear()
    CHANGES[change](session())
    CHANGES[change](session())
    assert len(worked) == 1


def test_other_weights_under_the_same_name_are_refused(session, worked):
    weights = Facts("net", "best.ckpt", "data", 0, "0123")
    session(facts=weights).clean(THREAT, "ce")
    session(facts=weights).clean(THREAT, "ce")
    assert worked == [("clean", "ce")]
    with pytest.raises(SettingError, match=r"other weights that best.ckpt had then.*hydra\.run\.dir"):
        session(facts=replace(weights, weights="4567"))


def test_other_images_of_the_same_name_are_another_measurement(session, problem, worked):
    session().clean(THREAT, "ce")
    session(images=ImageTensors(problem[1].x.flip(0), problem[1].y.flip(0))).clean(THREAT, "ce")
    assert worked == 2 * [("clean", "ce")]


ELSEWHERE = {
    "network": {"facts": Facts("other", "", "data", 0)},
    "checkpoint": {"facts": Facts("net", "file.pt", "data", 0)},
    "data": {"facts": Facts("net", "", "other", 0)},
    "seed": {"facts": Facts("net", "", "data", 1)},
    "split": {"split": "val"},
}


@pytest.mark.parametrize("what", [*ELSEWHERE, "n"])
def test_another_network_or_set_is_another_measurement(session, problem, worked, what):
    session().attacked(build("wpgd", steps=2), THREAT)
    session().clean(THREAT, "ce")
    worked.clear()
    images = ImageTensors(problem[1].x[:9], problem[1].y[:9])
    again = session(**ELSEWHERE[what]) if what != "n" else session(images=images)
    again.attacked(build("wpgd", steps=2), THREAT)
    again.clean(THREAT, "ce")
    assert worked == [("wpgd", 0.02), ("clean", "ce")]


def test_the_batch_size_is_not_a_change(session, worked):
    session().attacked(build("wpgd", steps=2, batch_size=4), THREAT)
    session().attacked(build("wpgd", steps=2, batch_size=5), THREAT)
    assert len(worked) == 1


def test_pointwise_attacks_are_the_same_at_every_order(session, worked):
    session().attacked(build("pgd", steps=2), THREAT)
    session().attacked(build("pgd", steps=2), ThreatModel(3, "linf", 0.02))
    assert worked == [("pgd", 0.02)]


def test_clean_records_do_not_depend_on_the_budget(session, worked):
    session().clean(THREAT, "ce")
    session().clean(ThreatModel(2, "linf", 0.5), "ce")
    assert worked == [("clean", "ce")]


# --- nearest adversarial points ---


def searches(worked):
    return [norm for kind, norm in worked if kind == "search"]


def test_one_search_serves_every_smaller_budget_and_order(session, worked, tmp_path):
    one, attack = session(), build("knapsack", **SEARCH)
    for p in (1, 2, math.inf):
        for delta in (0.02, 0.005):
            one.attacked(attack, ThreatModel(p, "linf", delta))
    session().attacked(build("knapsack", **SEARCH), ThreatModel(4, "linf", 0.02))  # in a new interpreter
    assert searches(worked) == ["linf"]
    assert len(read(tmp_path / "records.json")) == 7


def test_kept_flips_give_what_fresh_ones_give(session, tmp_path):
    session().attacked(build("knapsack", **SEARCH), ThreatModel(2, "linf", 0.01))
    session().attacked(build("knapsack", **SEARCH), THREAT)
    (tmp_path / "fresh").mkdir()
    session(folder=tmp_path / "fresh").attacked(build("knapsack", **SEARCH), THREAT)
    kept, fresh = read(tmp_path / "records.json")[-1], read(tmp_path / "fresh" / "records.json")[0]
    assert (kept.accuracy, kept.distance) == (fresh.accuracy, fresh.distance)
    history = ("effort", "valid_up_to")  # the search went on where one for the smaller budget had ended
    kept, fresh = ({k: v for k, v in r.details.items() if k not in history} for r in (kept, fresh))
    assert kept == fresh


def test_an_attack_stopped_after_its_search_goes_on_from_it(session, worked, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "attacked", stopped)
        with pytest.raises(KeyboardInterrupt):
            session().attacked(build("knapsack", **SEARCH), THREAT)
    session().attacked(build("knapsack", **SEARCH), THREAT)
    assert searches(worked) == ["linf"]


@pytest.mark.parametrize("option", ["starts", "targets", "steps", "bisections", "fab", "seed"])
def test_another_search_is_made_anew(session, worked, option):
    session().attacked(build("knapsack", **SEARCH), THREAT)
    session().attacked(build("knapsack", **{**SEARCH, option: SEARCH.get(option, 0) + 1}), THREAT)
    assert searches(worked) == ["linf", "linf"]


@pytest.mark.parametrize("what", ELSEWHERE)
def test_flips_of_another_network_or_set_are_not_reused(session, worked, problem, what):
    session().attacked(build("knapsack", **SEARCH), THREAT)
    images = ImageTensors(problem[1].x.flip(0), problem[1].y.flip(0)) if what in ("split", "data") else None
    session(images=images, **ELSEWHERE[what]).attacked(build("knapsack", **SEARCH), THREAT)
    assert searches(worked) == ["linf", "linf"]


def test_each_norm_has_its_own_flips(session, worked, tmp_path):
    """Also where one attack object serves both: nearest of one norm say nothing of the other."""
    one, attack = session(), build("knapsack", **SEARCH)
    one.attacked(attack, ThreatModel(2, "l2", 0.05))
    one.attacked(attack, THREAT)
    assert searches(worked) == ["l2", "linf"]
    (tmp_path / "fresh").mkdir()
    session(folder=tmp_path / "fresh").attacked(build("knapsack", **SEARCH), THREAT)
    mixed, fresh = read(tmp_path / "records.json")[1], read(tmp_path / "fresh" / "records.json")[0]
    assert (mixed.accuracy, mixed.distance) == (fresh.accuracy, fresh.distance)


def test_saved_distances(session, worked, problem, tmp_path):
    attack, one = build("knapsack", **SEARCH), session()
    one.attacked(attack, THREAT)
    one.save_distances([build("pgd"), attack], "linf")
    session().save_distances([build("knapsack", **SEARCH)], "linf")
    assert searches(worked) == ["linf", "linf"], "a second one for the images that no budget asked for"
    with np.load(tmp_path / "distances_linf.npz") as saved:
        assert set(saved) == {"distances", "labels"}
        assert saved["labels"].tolist() == problem[1].y.tolist()
        nearest = build("knapsack", **SEARCH).find(problem[0], problem[1].x, problem[1].y, "linf")
        np.testing.assert_allclose(saved["distances"], nearest.distances, rtol=1e-6)
        assert saved["distances"][0] == 0


def test_certified_radii_are_recorded_once(session, tmp_path):
    radii = torch.full((10,), 0.01, dtype=torch.float64)
    for _ in range(2):
        session().certified(radii, "file.npy", THREAT)
    session().certified(radii, "other.npy", THREAT)
    records = read(tmp_path / "records.json")
    assert [r.options for r in records] == [{"file": "file.npy"}, {"file": "other.npy"}]
    assert (records[0].accuracy, records[0].attack, records[0].loss_mean) == (0, "certified", None)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"stage": "evaluate"}]', "[", "null"])
def test_a_damaged_file_of_records_is_refused(session, tmp_path, content):
    (tmp_path / "records.json").write_text(content)
    with pytest.raises(SettingError, match=r"records\.json isn't a list of records.*move it away"):
        session()
    assert (tmp_path / "records.json").read_text() == content


def test_records_are_written_one_by_one(session, tmp_path):
    one = session()
    for k, loss in enumerate(("ce", "margin"), 1):
        one.clean(THREAT, loss)
        assert len(json.loads((tmp_path / "records.json").read_text())) == k
    assert {f.name for f in tmp_path.iterdir()} == {"records.json"}
