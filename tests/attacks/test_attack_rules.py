"""What every attack owes: a verified constraint, an undisturbed network, nothing silent."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import wdat
from wdat.attacks import ATTACKS, Attack, Context, build
from wdat.attacks.base import Moved
from wdat.errors import ConstraintError, SettingError
from wdat.sensitivity import Batch
from wdat.threat import ThreatModel

GRADIENT = ["fgsm", "pgd", "wfgsm", "wpgd", "wpgd_budget"]  # the others have tests of their own
THREAT = ThreatModel(2, "linf", 0.1)


def _attack(name, **options):
    return build(name, **({} if "fgsm" in name else {"steps": 4, "step_size": 0.4}), **options)


# --- verification


class _Cheat(Attack):
    name = "cheat"

    def __init__(self, moved):
        super().__init__()
        self.moved = moved

    def _run(self, network, x, y, threat, context):
        return self.moved(x)


def _put(x, value):
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


CHEATS = {
    "leaves its radius": lambda x: Moved((x + 0.2).clamp(0, 1), radii=torch.full((len(x),), 0.1).to(x)),
    "leaves the set's budget": lambda x: Moved((x + 0.2).clamp(0, 1), length=0.1),
    "leaves its radius on one image": lambda x: Moved(_put(x, 1 - x[0, 0, 0, 0].round()), radii=torch.zeros(len(x))),
    "leaves [0, 1] below": lambda x: Moved(_put(x, -1e-3), radii=torch.full((len(x),), 9.0)),
    "leaves [0, 1] above": lambda x: Moved(_put(x, 1.001), length=9.0),
    "returns NaN": lambda x: Moved(_put(x, math.nan), radii=torch.full((len(x),), 9.0)),
    "returns NaN in a set": lambda x: Moved(_put(x, math.nan), length=9.0),
    "returns inf": lambda x: Moved(_put(x, math.inf), length=math.inf),
    "has NaN radii": lambda x: Moved(x, radii=torch.full((len(x),), math.nan)),
    "has a NaN budget": lambda x: Moved(x, length=math.nan),
    "states no bound": lambda x: Moved(x),
    "returns too few images": lambda x: Moved(x[:-1], length=9.0),
    "returns one image that would broadcast": lambda x: Moved(x[:1], length=9.0),
    "returns another shape": lambda x: Moved(x.flatten(1), length=9.0),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", list(CHEATS))
def test_an_attack_that_cheats_is_caught(problem, how, training):
    network, x, y = problem(dtype=torch.float32)
    with pytest.raises(ConstraintError, match="cheat"):
        _Cheat(CHEATS[how])(network, x, y, THREAT, Context(training=training))


@pytest.mark.parametrize("how", list(CHEATS))
def test_an_attack_that_cheats_is_caught_by_who_is_left_to_ask(problem, how):
    network, x, y = problem(dtype=torch.float32)

    def ask():
        found = _Cheat(CHEATS[how])(network, x, y, THREAT, Context(training=True, deferred=True)).verification
        assert float(found.broken) == 1
        found.verify()

    with pytest.raises(ConstraintError, match="cheat"):
        ask()


def test_an_honest_attack_has_nothing_to_ask_about(problem):
    network, x, y = problem(dtype=torch.float32)
    for name in GRADIENT:
        result = _attack(name)(network, x, y, THREAT, Context(training=True, deferred=True))
        assert float(result.verification.broken) == 0
        result.verification.verify()


@pytest.mark.parametrize("n", [2, 5000])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_honest_rounding_is_no_breach(n, norm):
    """Large images and radii down to one rounding of a pixel."""
    x = torch.rand(4, 1, 1, n, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Flatten(), nn.Linear(n, 3))
    for delta in (1e-8, 1e-6, 1e-3, 1.0):
        for name in GRADIENT:
            _attack(name)(network, x, torch.tensor([0, 1, 2, 0]), ThreatModel(2, norm, delta))


# --- the network, the images and the random numbers are left as they were


def _batch_norm_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4)
        )
    network.train()
    network[1].eval()  # a mixture of modes
    network.add_module("last", nn.BatchNorm1d(4))
    network[0].weight.requires_grad_(False)
    return network


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_disturbed(problem, name, training):
    network = _batch_norm_network()
    _, x, y = problem(dtype=torch.float32)
    given, labels = x.clone(), y.clone()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    flags, wanted = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    random, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    result = _attack(name)(network, x, y, THREAT, Context(training=training))
    assert [m.training for m in network.modules()] == flags
    assert [p.requires_grad for p in network.parameters()] == wanted
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == grad_mode
    assert torch.equal(x, given)
    assert torch.equal(y, labels)
    assert not result.x_adv.requires_grad
    assert result.x_adv.dtype == x.dtype


def test_existing_weight_gradients_stay(problem):
    network, x, y = problem()
    nn.functional.cross_entropy(network(x), y).backward()
    before = [p.grad.clone() for p in network.parameters()]
    _attack("wpgd")(network, x, y, THREAT)
    assert all(torch.equal(p.grad, b) for p, b in zip(network.parameters(), before, strict=True))


def test_a_network_that_fails_is_restored_too(problem):
    network, x, y = problem()
    network.train()
    handle = network.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _attack("wpgd")(network, x, y, THREAT)
    handle.remove()
    assert all(m.training for m in network.modules())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", GRADIENT)
def test_attacks_work_where_gradients_are_off(problem, name, mode):
    network, x, y = problem()
    expected = _attack(name)(network, x, y, THREAT)
    with mode():
        found = _attack(name)(network, x * 1, y * 1, THREAT)
    assert_close(found.x_adv, expected.x_adv)
    assert not found.x_adv.is_inference()


def test_noise_and_clean_predictions_made_in_inference_mode_serve(problem):
    network, x, y = problem()
    with torch.inference_mode():
        context = Context(training=True, noise=lambda: torch.full_like(x, 1e-3), log_clean=network(x).log_softmax(1))
        result = _attack("pgd", loss="kl")(network, x * 1, y * 1, THREAT, context)
    assert float(result.distances.max()) > 0.01


def test_attacks_work_in_lightnings_validate_in_inference_mode(problem, tmp_path):
    lightning = pytest.importorskip("lightning")
    network, x, y = problem(dtype=torch.float32)
    network = nn.Sequential(network, nn.BatchNorm1d(4))
    found, expected = [], _attack("wpgd")(network, x, y, THREAT)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def validation_step(self, batch, _):
            assert torch.is_inference_mode_enabled()
            found.append(_attack("wpgd")(self.network, *batch, THREAT))

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        inference_mode=True,
    )
    data = torch.utils.data.TensorDataset(x, y)
    trainer.validate(Module(), torch.utils.data.DataLoader(data, batch_size=len(x)), verbose=False)
    assert len(found) == 1
    assert_close(found[0].x_adv, expected.x_adv)


# --- what doesn't change a result


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_the_batch_size_changes_nothing(problem, name, batch_size):
    network, x, y = problem()
    expected = _attack(name)(network, x, y, THREAT)
    found = _attack(name, batch_size=batch_size)(network, x, y, THREAT)
    assert_close(found.x_adv, expected.x_adv)
    assert found.accuracy == expected.accuracy
    assert found.distance == pytest.approx(expected.distance)
    assert found.set_size == len(x)


@pytest.mark.parametrize("name", GRADIENT)
def test_the_order_of_images_changes_nothing(problem, name):
    network, x, y = problem()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    expected = _attack(name)(network, x, y, THREAT)
    assert_close(_attack(name)(network, x[order], y[order], THREAT).x_adv, expected.x_adv[order])


@pytest.mark.parametrize("name", GRADIENT)
def test_channels_last_changes_nothing(problem, name):
    network, x, y = problem()
    expected = _attack(name)(network, x, y, THREAT)
    found = _attack(name)(network, x.contiguous(memory_format=torch.channels_last), y, THREAT)
    assert_close(found.x_adv, expected.x_adv)


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("cuts", [(7, 7, 12), (0, 5, 12), (4, 8, 12)])
def test_processes_with_uneven_and_empty_parts_equal_one(problem, together, name, cuts):
    network, x, y = problem()
    parts = [slice(0, cuts[0]), slice(cuts[0], cuts[1]), slice(cuts[1], cuts[2])]
    expected = _attack(name, loss="redlr")(network, x, y, THREAT)

    def one(processes):
        mine, rows = copy.deepcopy(network), parts[processes.rank]
        return _attack(name, loss="redlr")(mine, x[rows], y[rows], THREAT, Context(processes=processes))

    found = together(3, one)
    assert_close(torch.cat([f.x_adv for f in found]), expected.x_adv)
    for f in found:
        assert f.set_size == 12
        assert f.accuracy == pytest.approx(expected.accuracy)
        assert f.distance == pytest.approx(expected.distance)
        assert f.loss_mean == (None if expected.loss_mean is None else pytest.approx(expected.loss_mean))


def test_training_wpgd_couples_the_global_batch_over_processes(problem, together):
    network, x, y = problem()
    threat = ThreatModel(2, "l2", 0.3)

    def attack(mine, rows, processes):
        estimator = Batch()
        estimator.begin(len(x), threat.q, 0, processes)
        context = Context(processes=processes, sensitivity=estimator, index=torch.arange(12)[rows], training=True)
        return _attack("wpgd")(mine, x[rows], y[rows], threat, context).x_adv

    expected = attack(network, slice(None), wdat.distributed.ALONE)
    parts = [slice(0, 9), slice(9, 9), slice(9, 12)]
    assert_close(torch.cat(together(3, lambda p: attack(copy.deepcopy(network), parts[p.rank], p))), expected)


# --- nothing silent


class _Root(nn.Module):
    """Finite logits everywhere, and an infinite gradient where the first pixel is zero."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x[:, :1, 0, 0].sqrt() * torch.arange(4.0, dtype=x.dtype)


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("p", [2, math.inf])
def test_an_image_without_a_finite_gradient_is_dropped_counted_and_named(problem, name, p):
    network, x, y = problem()
    x = x.clamp(0.01, 1)
    x[3, 0, 0, 0] = 0.0
    with pytest.warns(UserWarning, match=f"{name}: 1 of 12 images"):
        result = _attack(name)(_Root(network), x, y, ThreatModel(p, "linf", 0.1))
    assert result.dropped == 1
    assert torch.equal(result.x_adv[3], x[3])
    others = torch.arange(12) != 3
    assert bool((result.distances[others] > 0).all())
    if p == 2 and "wfgsm" in name:  # its share goes to the others
        assert bool(result.x_adv.isfinite().all())
        assert ThreatModel(2, "linf", 0.1).length(result.radii) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["wfgsm", "wpgd", "wpgd_budget"])
@pytest.mark.parametrize("options", [{}, {"radius_max": 4.0}])
def test_no_gradient_at_all_warns_and_moves_nothing(problem, name, options):
    if options and name == "wpgd":
        return
    network, x, y = problem()
    y = (network(x).argmax(1) + 1) % 4  # everything misclassified: ReDLR is flat
    with pytest.warns(UserWarning, match=f"{name}.*zero"):
        result = _attack(name, loss="redlr", **options)(network, x, y, THREAT)
    assert torch.equal(result.x_adv, x)
    assert result.distance == 0.0


def test_training_with_no_gradient_at_all_warns_and_moves_nothing(problem):
    network, x, y = problem()
    y = (network(x).argmax(1) + 1) % 4
    batch = Batch()
    batch.begin(12, 2.0, 0, wdat.distributed.ALONE)
    for name in ("wpgd", "wpgd_budget"):
        with pytest.warns(UserWarning, match="zero"):
            result = _attack(name, loss="kl", radii_loss="redlr")(
                network, x, y, THREAT, Context(training=True, sensitivity=batch)
            )
        assert torch.equal(result.x_adv, x)


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget"])
def test_one_huge_finite_l2_gradient_spoils_no_other_image(problem, name):
    """A gradient of 1e20 is finite and its squares aren't, in float32."""
    network, x, y = problem(dtype=torch.float32)
    x[0, 0, 0, 0], x[1:, 0, 0, 0] = 1.0, 0.5

    class Steep(nn.Module):
        def forward(self, z):
            steep = (z[:, :1, 0, 0] - 0.9).relu() * 1e20
            return network(z) + (steep - steep.detach()) * torch.tensor([1.0, -1.0, 0.0, 0.5])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = _attack(name)(Steep(), x, y, ThreatModel(2, "l2", 0.3))
    assert bool(result.x_adv.isfinite().all())


@pytest.mark.parametrize("p", [2, math.inf])
def test_kl_is_never_nan_even_with_extreme_logits(problem, p):
    network, x, y = problem(dtype=torch.float32)
    with torch.no_grad():
        network[3].weight.mul_(1e4)
    for name in ("wpgd", "wpgd_budget"):
        result = _attack(name, loss="kl", radii_loss="margin")(network, x, y, ThreatModel(p, "linf", 0.1))
        assert math.isfinite(result.loss_mean)
        assert result.loss_mean >= 0
        assert result.dropped == 0


# --- settings and inputs


@pytest.mark.parametrize("name", ["wfgsm", "wpgd", "wpgd_budget"])
def test_p_1_is_refused(problem, name):
    with pytest.raises(SettingError, match=r"threat\.p > 1"):
        wdat.attack(*problem(), ThreatModel(1, "linf", 0.1), name)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x, y: (x + 1, y), r"\[0, 1\]"),
        (lambda x, y: (x - 0.5, y), r"\[0, 1\]"),
        (lambda x, y: (x * math.nan, y), r"\[0, 1\]"),
        (lambda x, y: ((255 * x).byte(), y), "float"),
        (lambda x, y: (x[:, 0, 0, 0], y), "images"),
        (lambda x, y: (x, y[:-1]), "labels"),
        (lambda x, y: (x, y[:, None]), "labels"),
        (lambda x, y: (x, y.float()), "labels"),
        (lambda x, y: (x, y + 4), "labels"),
        (lambda x, y: (x, y - 1), "labels"),
        (lambda x, y: (x, torch.full_like(y, -100)), "labels"),  # what cross-entropy silently ignores
        (lambda x, y: (x[:0], y[:0]), "empty"),
    ],
)
def test_inputs_that_can_not_be_used_are_refused(problem, change, word):
    network, x, y = problem()
    y[0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SettingError, match=word):
            wdat.attack(network, *change(x, y), THREAT, "wpgd")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("wpdg", {}, ["attack.name", "wpgd"]),
        ("wpgd", {"step": 3}, ["attack.step", "steps"]),
        ("pgd", {"loss": "cee"}, ["attack.loss", "ce"]),
        ("wpgd", {"radii_loss": "red_lr"}, ["attack.radii_loss", "redlr"]),
        ("wpgd", {"radii_loss": "kl"}, ["attack.radii_loss"]),
        ("wpgd", {"steps": 0}, ["attack.steps"]),
        ("wpgd", {"step_size": 0.0}, ["attack.step_size"]),
        ("wpgd", {"step_size": math.nan}, ["attack.step_size"]),
        ("wpgd", {"batch_size": 0}, ["attack.batch_size"]),
        ("wpgd_budget", {"radius_max": 0.5}, ["attack.radius_max"]),
    ],
)
def test_unknown_names_and_impossible_options_are_named(problem, name, options, words):
    with pytest.raises(SettingError) as error:
        build(name, **options)(*problem(), THREAT)
    assert all(word in str(error.value) for word in words)


def test_private_fields_are_no_options():
    with pytest.raises(SettingError, match="option"):
        build("wpgd", _loss=None)


def test_dlr_needs_three_classes(problem):
    with pytest.raises(SettingError, match="three classes"):
        wdat.attack(*problem(classes=2), THREAT, loss="redlr")


def test_two_classes_serve_the_other_losses(problem):
    network, x, y = problem(classes=2)
    for loss in ("ce", "margin", "kl"):
        assert wdat.attack(network, x, y, THREAT, loss=loss, steps=3).accuracy <= 1


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_states_what_it_is(problem, name, dtype):
    network, x, y = problem(dtype=dtype)
    result = _attack(name)(network, x, y, THREAT)
    assert result.x_adv.dtype == dtype
    assert result.threat == (THREAT.pointwise() if ATTACKS[name].pointwise else THREAT)
    assert_close(result.distances, (result.x_adv - x).flatten(1).abs().amax(1))
    assert result.distance == pytest.approx(result.threat.length(result.distances))
    assert result.distance <= 0.1 * (1 + 1e-5)
    assert torch.equal(result.correct, network(result.x_adv).argmax(1) == y)
    assert result.accuracy == float(result.correct.double().mean())
    assert result.accuracy < float((network(x).argmax(1) == y).double().mean())
    assert result.set_size == 12
    assert result.dropped == 0
