"""The knapsack attack: its figures against closed forms, its images against independent forward passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampled import product, sampled
from torch import nn

from wdat import models
from wdat.attacks import Context, build
from wdat.attacks.knapsack import Knapsack, certified_figures
from wdat.attacks.knapsack_allocation import solve
from wdat.errors import SettingError
from wdat.evaluation.evaluator import Evaluator, ImageTensors
from wdat.evaluation.session import Session, read_radii
from wdat.records import RecordFile, read
from wdat.threat import ThreatModel

SEARCH = {"starts": 1, "targets": 3, "steps": 30, "bisections": 14}
NORMS = ["linf", "l2"]
ORDERS = [1, 2, math.inf]


def linear(classes=4, n=24, seed=0, wrong=4):
    """A linear network in double precision, and images far from the border of [0, 1]; `wrong` are misclassified."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(27, classes)).double()
        x = 0.5 + 0.06 * torch.randn(n, 3, 3, 3, dtype=torch.float64).clamp(-3, 3)
        with torch.no_grad():
            network[1].bias.copy_(-(network[1].weight @ torch.full((27,), 0.5, dtype=torch.float64)))
            y = network(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % classes
    return network, x, y


def closed_form(network, x, y, norm):
    """min over j of (z_y − z_j)/‖w_y − w_j‖_s, zero where misclassified; numpy, image by image."""
    w, b = network[1].weight.detach().numpy(), network[1].bias.detach().numpy()
    found = []
    for image, label in zip(x.flatten(1).numpy(), y.tolist(), strict=True):
        z = w @ image + b
        duals = {j: np.linalg.norm(w[label] - w[j], 1 if norm == "linf" else 2) for j in range(len(z)) if j != label}
        found.append(max(0.0, min((z[label] - z[j]) / dual for j, dual in duals.items())))
    return np.array(found)


def by_hand(distances, p, delta):
    """Accuracy that the cheapest-first attacker leaves, one image after another."""
    n = len(distances)
    left, right = float(n), float(n)
    for d in sorted(distances):
        if d == 0:
            right -= 1
        elif math.isinf(p):
            right -= d <= delta
        elif delta > 0 and left > 0:
            share = min(1.0, left / (d / delta) ** p)
            right, left = right - share, (left - (d / delta) ** p if share == 1 else 0.0)
    return right / n


def record_of(network, x, y, threat, pictures=False, **options):
    evaluator = Evaluator(network, ImageTensors(x, y), pictures=pictures)
    return evaluator.attacked(build("knapsack", **{**SEARCH, **options}), threat)


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_distances_on_a_linear_network_are_margin_over_dual_norm(classes, norm):
    network, x, y = linear(classes)
    nearest = build("knapsack", **SEARCH).find(network, x, y, norm)
    wanted = torch.from_numpy(closed_form(network, x, y, norm))
    torch.testing.assert_close(nearest.distances, wanted, rtol=5e-3, atol=1e-9)
    assert (nearest.distances >= wanted * (1 - 1e-9)).all()


@pytest.mark.parametrize(("norm", "p", "budget"), product(NORMS, [1, 1.5, 2, 7, math.inf], [0.3, 0.8, 1.5], every=4))
def test_accuracy_on_a_linear_network_is_the_knapsack_by_hand(norm, p, budget):
    network, x, y = linear()
    distances = closed_form(network, x, y, norm)
    delta = budget * float(np.median(distances))
    if math.isinf(p):  # a step function: δ goes to the middle of the widest gap nearby, beyond the search's error
        near = sorted(distances, key=lambda d: abs(d - delta))[:6]
        width, delta = max((b - a, (a + b) / 2) for a, b in zip(sorted(near), sorted(near)[1:], strict=False))
        assert width > 0.02 * delta
    found = record_of(network, x, y, ThreatModel(p, norm, delta)).accuracy
    wanted = by_hand(distances, p, delta)
    assert found == pytest.approx(wanted, abs=1e-9 if math.isinf(p) else 0.01)
    assert found >= wanted - 1e-9  # distances found are too large, never too small


@pytest.mark.parametrize(("norm", "p"), product(NORMS, ORDERS, every=4))
def test_the_materialised_set_is_what_forward_passes_say(norm, p):
    network, x, y = linear()
    threat = ThreatModel(p, norm, 0.7 * float(np.median(closed_form(network, x, y, norm))))
    record = record_of(network, x, y, threat)
    x_adv = build("knapsack", **SEARCH)(network, x, y, threat).x_adv
    correct = float((network(x_adv).argmax(1) == y).double().mean())
    offsets = (x_adv - x).flatten(1)
    moves = (offsets.abs().amax(1) if norm == "linf" else offsets.norm(dim=1)).numpy()
    distance = moves.max() if math.isinf(p) else np.mean(moves**p) ** (1 / p)
    assert record.details["materialised"] == pytest.approx({"accuracy": correct, "distance": distance})
    assert 0 <= correct - record.accuracy + 1e-12 < 1 / len(y) + 1e-12
    assert distance <= record.distance * (1 + 1e-6)
    assert record.distance <= threat.delta * (1 + 1e-9)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    clean = float((network(x).argmax(1) == y).double().mean())
    assert record.accuracy < clean  # the budget does something
    if not math.isinf(p):
        assert correct > record.accuracy  # and one image is attacked fractionally
        assert record.distance == pytest.approx(threat.delta)


@pytest.mark.parametrize("norm", NORMS)
def test_at_p_inf_it_is_the_share_with_a_distance_beyond_delta(norm):
    network, x, y = linear()
    distances = build("knapsack", **SEARCH).find(network, x, y, norm).distances
    delta = float(distances.median()) * 1.001
    record = record_of(network, x, y, ThreatModel(math.inf, norm, delta))
    assert record.accuracy == pytest.approx(float((distances > delta).double().mean()))
    assert record.details["materialised"]["accuracy"] == pytest.approx(record.accuracy)
    assert record.details["critical_distance"] == pytest.approx(float(distances[distances <= delta].max()))


def test_what_the_record_says():
    network, x, y = linear()
    record = record_of(network, x, y, ThreatModel(2, "linf", 0.01), pictures=True)
    details = record.details
    assert (record.attack, record.loss, record.p, record.delta, record.loss_mean) == ("knapsack", "0-1", 2, 0.01, None)
    assert details["bound"] == "upper"
    assert details["curve"][0] == [0.0, pytest.approx(20 / 24)]
    budgets, accuracies = zip(*details["curve"], strict=True)
    assert list(budgets) == sorted(budgets)
    assert list(accuracies) == sorted(accuracies, reverse=True)
    passes, then = zip(*details["effort"], strict=True)
    assert list(passes) == sorted(passes)
    assert list(then) == sorted(then, reverse=True)
    assert then[-1] == pytest.approx(record.accuracy, abs=1e-6)
    assert record.accuracy_low <= record.accuracy <= record.accuracy_high
    assert sum(details["histogram"]["counts"]) == len(y)
    assert {"accuracy", "distance"}.isdisjoint(details)  # fields of the record
    record.to_json()


# --- borders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", ORDERS)
def test_no_budget_is_the_clean_accuracy(norm, p):
    network, x, y = linear()
    record = record_of(network, x, y, ThreatModel(p, norm, 0))
    assert (record.accuracy, record.distance) == (pytest.approx(20 / 24), 0)
    assert record.details["materialised"] == {"accuracy": pytest.approx(20 / 24), "distance": 0}
    assert record.details["moved"] == 0


@pytest.mark.parametrize("p", ORDERS)
def test_the_largest_budget_leaves_nothing(p):
    network, x, y = linear()
    record = record_of(network, x, y, ThreatModel(p, "l2", x[0].numel() ** 0.5))
    assert (record.accuracy, record.details["materialised"]["accuracy"]) == (0, 0)
    assert 0 < record.distance < 10
    assert math.isfinite(record.details["critical_distance"])


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("delta", [0, 1e-30, 0.02])
def test_everything_misclassified(p, delta):
    network, x, y = linear(wrong=24)
    record = record_of(network, x, y, ThreatModel(p, "linf", delta))
    assert (record.accuracy, record.distance, record.details["moved"]) == (0, 0, 0)
    assert torch.equal(build("knapsack", **SEARCH)(network, x, y, ThreatModel(p, "linf", delta)).x_adv, x)


def test_a_larger_budget_goes_on_where_the_points_serve_a_smaller_one():
    network, x, y = linear()
    distances = closed_form(network, x, y, "l2")
    small, large = (ThreatModel(2, "l2", share * float(np.median(distances))) for share in (0.2, 0.6))
    attack = build("knapsack", **SEARCH)
    nearest = attack.find(network, x, y, "l2", threats=[small])
    assert nearest.serves(small)
    assert not nearest.serves(large)
    first, then = (build("knapsack", **SEARCH, nearest=nearest)(network, x, y, t).details for t in (small, large))
    assert small.delta * (1 - 1e-9) <= first["valid_up_to"] < large.delta <= then["valid_up_to"] * (1 + 1e-9)
    assert then["accuracy"] == pytest.approx(by_hand(distances, 2, large.delta), abs=0.01)
    assert len(first["effort"]) < len(then["effort"])
    whole = build("knapsack", **SEARCH, nearest=attack.find(network, x, y, "l2"))(network, x, y, small).details
    assert whole["valid_up_to"] is None
    assert whole["accuracy"] == pytest.approx(first["accuracy"], abs=1e-9)
    beyond = float(np.mean(distances > small.delta))
    assert first["pointwise_accuracy"] == pytest.approx(beyond, abs=1 / len(y) + 1e-9)


def test_an_evaluation_searches_further_for_a_larger_budget(tmp_path, monkeypatch):
    """One file of points serves all budgets; the further search has what was found as its start."""
    network, x, y = linear()
    calls, find = [], Knapsack.find

    def spy(self, *arguments, previous=None, **options):
        calls.append(previous)
        return find(self, *arguments, previous=previous, **options)

    monkeypatch.setattr(Knapsack, "find", spy)
    middle = float(np.median(closed_form(network, x, y, "linf")))
    attack = build("knapsack", **SEARCH)
    for share in (0.2, 0.1, 0.6, 0.5):
        session = Session(Evaluator(network, ImageTensors(x, y)), RecordFile(tmp_path / "records.json"), tmp_path)
        session.attacked(attack, ThreatModel(2, "linf", share * middle))
    assert [previous is None for previous in calls] == [True, False], "for 0.2 and, from there, for 0.6"
    records = read(tmp_path / "records.json")
    whole = attack.find(network, x, y, "linf")
    for record in records:
        wanted = solve(whole.distances, ThreatModel(2, "linf", record.delta)).accuracy
        assert record.accuracy == pytest.approx(wanted, abs=1e-9)
        assert record.details["valid_up_to"] >= record.delta * (1 - 1e-9)


def test_nothing_misclassified():
    network, x, y = linear(wrong=0)
    assert record_of(network, x, y, ThreatModel(2, "linf", 0)).accuracy == 1
    assert record_of(network, x, y, ThreatModel(2, "linf", 0.01)).accuracy < 1


class Constant(nn.Module):
    """The same logits everywhere, with the first class ahead."""

    def forward(self, x):
        return x.flatten(1)[:, :3] * 0 + torch.tensor([1.0, 0.0, 0.0], dtype=x.dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("p", ORDERS)
def test_constant_logits_are_never_flipped(norm, p):
    x, y = torch.rand(6, 3, 3, 3), torch.tensor([0, 0, 0, 0, 1, 2])
    with pytest.warns(UserWarning, match="no misclassified point was found anywhere for 4 of 4 images"):
        record = record_of(Constant(), x, y, ThreatModel(p, norm, 1))
    assert (record.accuracy, record.distance, record.details["moved"]) == (pytest.approx(4 / 6), 0, 0)
    assert (record.details["critical_distance"], record.details["unfound"]) == (0, 4)
    assert np.isfinite(record.details["curve"]).all()


# --- manners --------------------------------------------------------------------------------------------------------


def test_the_network_is_left_as_found():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
    network.train()
    network[1].eval()
    network[0].bias.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    flags = [m.training for m in network.modules()]
    build("knapsack", **SEARCH)(network, torch.rand(5, 3, 3, 3), torch.arange(5) % 3, ThreatModel(2, "l2", 0.1))
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert flags == [m.training for m in network.modules()]
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert all(p.grad is None for p in list(network.parameters())[1:])


@pytest.mark.parametrize(("norm", "p"), product(NORMS, ORDERS, every=4))
def test_two_processes_are_one(together, norm, p):
    network, x, y = linear()
    threat = ThreatModel(p, norm, 0.7 * float(np.median(closed_form(network, x, y, norm))))
    attack = build("knapsack", **{**SEARCH, "targets": 2})  # one start, so nothing is drawn
    alone = attack(network, x, y, threat)
    rows = [slice(0, 15), slice(15, 24)]  # one process's part is larger
    # The guard nearest flags of the network it is given, so each simulated process has its own.
    copies = [linear()[0] for _ in rows]

    def own(processes):
        mine = rows[processes.rank]
        return attack(copies[processes.rank], x[mine], y[mine], threat, Context(processes=processes))

    parts = together(2, own)
    torch.testing.assert_close(torch.cat([r.x_adv for r in parts]), alone.x_adv, rtol=1e-6, atol=1e-9)
    for r in parts:
        assert (r.accuracy, r.set_size) == (alone.accuracy, 24)
        for key in ("accuracy", "distance", "critical_distance", "moved", "curve"):
            assert np.asarray(r.details[key]) == pytest.approx(np.asarray(alone.details[key]), rel=1e-6, abs=1e-12), key


def test_impossible_searches_are_refused_when_the_attack_is_made():
    wrong = {"steps": 0, "starts": -1, "targets": -1, "bisections": -1, "fab": -1, "effort": "deep"}
    for option, value in wrong.items():
        with pytest.raises(SettingError, match=option):
            build("knapsack", **{option: value})


# --- certified radii ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ORDERS)
def test_certified_radii_give_a_lower_bound(p):
    network, x, y = linear()
    exact = torch.from_numpy(closed_form(network, x, y, "linf"))
    threat = ThreatModel(p, "linf", 0.8 * float(exact.median()))
    evaluator = Evaluator(network, ImageTensors(x, y))
    upper = evaluator.attacked(build("knapsack", **SEARCH), threat)
    lower = evaluator.bounded("certified", {"file": "f"}, threat, certified_figures(0.6 * exact, threat))
    assert lower.accuracy < upper.accuracy
    assert lower.accuracy == pytest.approx(by_hand((0.6 * exact).tolist(), p, threat.delta))
    assert lower.details["bound"] == "lower"
    assert lower.accuracy_low <= lower.accuracy <= lower.accuracy_high
    tight = evaluator.bounded("certified", {"file": "f"}, threat, certified_figures(exact, threat))
    assert tight.accuracy <= upper.accuracy + 1e-9


def test_files_of_certified_radii(tmp_path):
    radii = np.array([0.0, 0.1, np.inf])
    np.save(tmp_path / "a.npy", radii)
    np.savez(tmp_path / "a.npz", radii=radii.astype(np.float32), other=radii)
    assert read_radii(tmp_path / "a.npy", 3).tolist() == radii.tolist()
    assert read_radii(tmp_path / "a.npz", 3).tolist() == pytest.approx(radii.tolist())


BAD = {
    "negative": np.array([0.1, -0.1, 0.2]),
    "nan": np.array([0.1, np.nan, 0.2]),
    "short": np.array([0.1, 0.2]),
    "matrix": np.zeros((3, 1)),
    "scalar": np.array(0.1),
    "objects": np.array([0.1, None, "x"], dtype=object),
    "text": np.array(["a", "b", "c"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_of_certified_radii(tmp_path, kind):
    np.save(tmp_path / "bad.npy", BAD[kind], allow_pickle=True)
    with pytest.raises(SettingError, match=r"certified=.*bad\.npy") as error:
        read_radii(tmp_path / "bad.npy", 3)
    if kind == "short":
        assert "3 radii" in str(error.value)
        assert "(2,)" in str(error.value)


@pytest.mark.parametrize(
    "content", [None, b"", b"\x93NUMPY\x01\x00garbage", b"PK\x03\x04 not a zip", b"text", "folder"]
)
def test_unreadable_files_of_certified_radii(tmp_path, content):
    file = tmp_path / "bad.npz"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingError, match=r"certified=.*can't be read"):
        read_radii(file, 3)


def test_an_archive_without_radii_says_what_is_wanted(tmp_path):
    np.savez(tmp_path / "a.npz", distances=np.zeros(3))
    with pytest.raises(SettingError, match="radii"):
        read_radii(tmp_path / "a.npz", 3)


# --- a real network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "delta"), sampled([("linf", 2 / 255), ("l2", 0.1)], 2))
def test_on_a_real_network_it_is_stronger_than_wpgd(shared, norm, delta):
    weights, file = shared / "models" / "resnet2b.pt", shared / "data" / "cifar10_subset.npz"
    if not (weights.exists() and file.exists()):
        pytest.skip(f"no {weights} or no {file}")
    network = models.load_network("resnet2b", checkpoint=weights)
    with np.load(file) as arrays:
        x = torch.from_numpy(arrays["x_test"][:150]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(arrays["y_test"][:150]).long()
    evaluator, threat = Evaluator(network, ImageTensors(x, y), 150), ThreatModel(2, norm, delta)
    clean = evaluator.clean(threat, "ce").accuracy
    knapsack = build("knapsack", batch_size=150, starts=1, targets=2, steps=30)
    knapsack.nearest = knapsack.find(network, x, y, norm)
    optimum = evaluator.attacked(knapsack, threat)
    weakest = min(evaluator.attacked(build("wpgd", loss=loss, steps=30, step_size=1.875 / 30), threat).accuracy
                  for loss in ("ce", "redlr"))  # fmt: skip
    assert optimum.accuracy <= weakest < clean
    materialised = optimum.details["materialised"]
    assert 0 <= materialised["accuracy"] - optimum.accuracy + 1e-9 <= 1 / 150 + 1e-9
    assert materialised["distance"] <= delta * (1 + 1e-5)
    pointwise = evaluator.attacked(knapsack, threat.pointwise())
    assert pointwise.accuracy == pytest.approx(float((knapsack.nearest.distances > delta).float().mean()))
    assert pointwise.accuracy <= evaluator.attacked(build("pgd", steps=30, step_size=1.875 / 30), threat).accuracy
    assert optimum.accuracy <= pointwise.accuracy
