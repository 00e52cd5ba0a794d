"""The training step: against an independent textbook loop, for every choice, and what it leaves behind."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path

import lightning as L  # noqa: N812 (the customary name)
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from wdat import models
from wdat.attacks import build
from wdat.attacks.budget import PGD, WPGDBudget
from wdat.data import ImageDataModule
from wdat.errors import SettingError
from wdat.module import WDATModule
from wdat.objectives import Objective
from wdat.schedules import Constant
from wdat.seeding import generator
from wdat.sensitivity import Batch, Ema, Exact, Subsample, Table
from wdat.threat import ThreatModel

CONF = Path(__file__).parents[1] / "conf"
SEED = 11
DELTA = 8 / 255
EVERYONE = ThreatModel(math.inf, "linf", DELTA)
SHARED = ThreatModel(2, "linf", DELTA)
ATTACKS = ["wpgd_budget", "wpgd", "wfgsm", "pgd", "fgsm"]
OBJECTIVES = ["wdat", "trades", "combined", "pgd_at", "clean"]
ESTIMATORS = ["table", "subsample", "exact", "batch", "ema"]


def digits(kind=ImageDataModule, **options):
    settings = {"batch_size": 16, "val_size": 32, "limit_train": 48, "limit_test": 16, "flip": False, "seed": SEED}
    data = kind("digits", 10, **{**settings, **options})
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Ninety further digits, made a little different, as a file of a pool."""
    held = digits(limit_train=None).images("train")
    file = tmp_path_factory.mktemp("pool") / "pool.npz"
    images = held.images[-90:].permute(0, 2, 3, 1).numpy() // 2
    np.savez(file, image=images, label=held.labels[-90:].numpy())
    return file


def small_cnn():
    return models.load_network("small_cnn", seed=SEED)


def with_batchnorm():
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    ).eval()


NETWORKS = {"small_cnn": small_cnn, "batchnorm": with_batchnorm}
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def module_for(network, objective=None, attack=None, threat=SHARED, sensitivity=None, **options):
    settings = {"optimizer": SGD, "schedule": Constant(), "keep_eval": models.keep_frozen_in_eval, "seed": SEED}
    return WDATModule(
        network,
        objective or Objective(beta_w=6),
        attack or build("wpgd_budget", loss="kl", steps=2, step_size=0.5),
        threat,
        sensitivity or Batch(),
        **{**settings, **options},
    )


def trainer_for(steps=-1, epochs=100, callbacks=(), **options):
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "inference_mode": False,
        "use_distributed_sampler": False,
    }  # fmt: skip
    return L.Trainer(max_steps=steps, max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options})


def fit(module, data, steps=3, **options):
    trainer = trainer_for(steps, **options)
    trainer.fit(module, data)
    return module


def same(one, other):
    """Equality to the bit, of parameters and statistics."""
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings(r"ignore:.*module\(s\) in eval mode at the start of training"),
]


# --- TRADES ---------------------------------------------------------------------------------------------------------


def textbook_trades(network, batches, steps, threat, inner=4, step_size=0.25, beta=6.0, dtype=torch.float32):
    """Zhang et al. 2019 as their paper has it, written without any of this project's code but its noise."""
    network = copy.deepcopy(network).to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    divergence = nn.KLDivLoss(reduction="sum", log_target=True)  # log probabilities, as rounding decides some signs
    for step in range(steps):
        x, y = batches[step].x.to(dtype), batches[step].y
        network.eval()
        with torch.no_grad():
            clean = F.log_softmax(network(x), dim=1)
        noise = torch.randn(x.shape, generator=generator(SEED, "noise", step)).to(dtype)
        x_adv = x + 0.001 * noise[batches[step].place]
        for _ in range(inner):
            x_adv = x_adv.detach().requires_grad_()
            loss = divergence(F.log_softmax(network(x_adv), dim=1), clean)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            if threat.norm == "linf":
                x_adv = x_adv.detach() + step_size * threat.delta * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, x - threat.delta), x + threat.delta)
            else:
                length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                offset = x_adv.detach() + step_size * threat.delta * gradient / length - x
                x_adv = x + offset.flatten(1).renorm(2, 0, threat.delta).view_as(x)
            x_adv = x_adv.clamp(0, 1)
        network.train()
        optimizer.zero_grad()
        logits = network(x)
        robust = divergence(F.log_softmax(network(x_adv.detach()), dim=1), F.log_softmax(logits, dim=1)) / len(x)
        (F.cross_entropy(logits, y) + beta * robust).backward()
        optimizer.step()
    return network


def trades(inner=4, **options):
    return Objective(beta_p=6, pointwise_attack=build("pgd", loss="kl", steps=inner, step_size=0.25), **options)


def distributional(name="wpgd_budget", inner=4):
    return build(name, loss="kl", steps=inner, step_size=0.25)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["wpgd_budget", "pgd"])
def test_wdat_with_uniform_radii_is_trades_to_the_bit(data, kind, norm, name):
    threat = ThreatModel(math.inf if name == "wpgd_budget" else 2, norm, DELTA if norm == "linf" else 0.5)
    network = NETWORKS[kind]()
    ours = fit(module_for(copy.deepcopy(network), trades(), threat=threat), data, 5)
    wdat = fit(module_for(copy.deepcopy(network), Objective(beta_w=6), distributional(name), threat), data, 5)
    assert same(wdat.network, ours.network)
    assert not same(wdat.network, network)


class Doubled(ImageDataModule):
    """The same images in double precision; everything else, and so the noise, as it is."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch._replace(x=batch.x.double())


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["trades", "wdat"])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 1), (torch.float64, 5)])  # signs amplify rounding
def test_both_are_textbook_trades(kind, norm, objective, dtype, steps):
    data = digits(kind=ImageDataModule if dtype == torch.float32 else Doubled)
    threat = ThreatModel(math.inf, norm, DELTA if norm == "linf" else 0.5)
    network = NETWORKS[kind]().to(dtype)
    loader = data.train_dataloader()
    batches = list(loader)
    loader.plan.set_epoch(1)
    batches += list(loader)
    wanted = textbook_trades(network, batches, steps, threat, dtype=dtype)
    terms = trades() if objective == "trades" else Objective(beta_w=6)
    found = fit(module_for(copy.deepcopy(network), terms, distributional(), threat), data, steps).network
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=0, atol=1e-6, msg=key)
    change = max(
        float((new - old).detach().abs().max())
        for new, old in zip(found.parameters(), network.parameters(), strict=True)
    )
    assert change > 1e-3


def test_a_shared_budget_is_not_trades(data):
    """The control of the two tests above: what they compare does depend on the radii."""
    network = small_cnn()
    ours = fit(module_for(copy.deepcopy(network), trades()), data)
    wdat = fit(module_for(copy.deepcopy(network), Objective(beta_w=6), distributional()), data)
    assert not same(wdat.network, ours.network)


def test_the_budget_of_the_pointwise_term_may_be_another(data):
    network = small_cnn()
    half = fit(module_for(copy.deepcopy(network), trades(pointwise_delta=DELTA / 2)), data)
    full = fit(module_for(copy.deepcopy(network), trades()), data)
    assert not same(half.network, full.network)
    small = fit(module_for(copy.deepcopy(network), trades(), threat=ThreatModel(2, "linf", DELTA / 2)), data)
    assert same(half.network, small.network)


# --- what the attack is given ---------------------------------------------------------------------------------------


class Spy(PGD):
    """PGD that remembers what it was given."""

    def __call__(self, network, x, y, threat, context=None):
        with torch.no_grad():
            modes = [m.training for m in network.modules()]
            network.eval()
            self.seen = (context, x, network(x).log_softmax(1))
            for module, mode in zip(network.modules(), modes, strict=True):
                module.training = mode
        return super().__call__(network, x, y, threat, context)


class Dropping(nn.Module):
    """Identity in eval mode; in train mode it drops images' features, by the flag `training`, as timm's DropPath."""

    def forward(self, x):
        return x * 0.5 if self.training else x


def layered(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.Tanh(), layer, nn.Linear(16, 10))


AGREE = {"plain": lambda: nn.Identity(), "layernorm": lambda: nn.LayerNorm(16), "dropout_0": lambda: nn.Dropout(0.0)}
DIFFER = {
    "batchnorm": lambda: nn.BatchNorm1d(16),
    "dropout": lambda: nn.Dropout(0.5),
    "rrelu": lambda: nn.RReLU(),
    "own": lambda: Dropping(),
}


@pytest.mark.parametrize("layer", ["plain", "layernorm"])
def test_clean_log_probabilities_are_shared_where_the_modes_agree(data, layer):
    spy = Spy(loss="kl", steps=2)
    fit(module_for(layered(AGREE[layer]()), attack=spy), data, 2)
    context, _, wanted = spy.seen
    torch.testing.assert_close(context.log_clean, wanted)
    assert not context.log_clean.requires_grad


@pytest.mark.parametrize("layer", DIFFER)
def test_clean_log_probabilities_are_not_shared_where_the_modes_differ(data, layer):
    spy = Spy(loss="kl", steps=2)
    fit(module_for(layered(DIFFER[layer]()), attack=spy), data, 2)
    context, _, wanted = spy.seen
    if context.log_clean is not None:  # allowed only if they are those of eval mode
        torch.testing.assert_close(context.log_clean, wanted)


def test_frozen_batchnorm_is_shared_again(data):
    network = with_batchnorm()
    models.prepare(network, "head")
    spy = Spy(loss="kl", steps=2)
    fit(module_for(network, attack=spy), data, 2)
    assert spy.seen[0].log_clean is not None


class Kept(WPGDBudget):
    """W-PGD-budget that remembers what surrounded it."""

    def __call__(self, network, x, y, threat, context=None):
        self.context = context
        return super().__call__(network, x, y, threat, context)


@pytest.mark.parametrize("trained", ["all", "head"])
def test_one_clean_pass_serves_loss_and_radii_unless_the_backbone_is_frozen(data, trained):
    network = small_cnn()
    models.prepare(network, trained)
    kept = Kept(loss="kl", steps=2, step_size=0.5)
    fit(module_for(network, attack=kept), data, 2)
    assert (kept.context.clean_pass is not None) == (trained == "all")


def test_sharing_the_clean_pass_changes_nothing(data, monkeypatch):
    def trained():
        network = small_cnn()
        fit(module_for(network, sensitivity=Table()), data, 3)
        return network

    shared = trained()
    monkeypatch.setattr("wdat.module.is_compiled", lambda network: True)  # a compiled network can't share
    for mine, theirs in zip(shared.parameters(), trained().parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_noise_is_that_of_the_seed_and_the_step(data, precision):
    spy = Spy(loss="kl", steps=2)
    fit(module_for(small_cnn(), attack=spy), data, 3, precision=precision)
    context, x, _ = spy.seen
    wanted = 0.001 * torch.randn(x.shape, generator=generator(SEED, "noise", 2))
    torch.testing.assert_close(context.noise().float(), wanted)
    assert context.training


# --- every choice ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chosen():
    """`chosen(group, choice)` is that configuration, of the real files, its inner attacks cut to two steps."""
    known = {}

    def one(group, choice):
        if (group, choice) not in known:
            extra = ["objective.pointwise_attack.steps=2"] if choice in ("trades", "combined", "pgd_at") else []
            extra += ["attack.steps=2"] if "pgd" in choice and group == "attack" else []
            extra += ["sensitivity.every=2"] if choice in ("exact", "subsample") else []
            with initialize_config_dir(str(CONF), version_base="1.3"):
                known[group, choice] = compose("config", [f"{group}={choice}", *extra])[group]
        return instantiate(known[group, choice])

    return one


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


# --- modes and what is frozen ---------------------------------------------------------------------------------------


class Flags(L.Callback):
    """The train flags of the network at each training step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([m.training for m in pl_module.network.modules()])


def test_the_network_trains_in_train_mode_also_after_validation(data):
    flags = Flags()
    module = module_for(with_batchnorm())
    trainer_for(epochs=2, callbacks=[flags], limit_val_batches=1).fit(module, data)
    assert len(flags.seen) == 6
    assert all(map(all, flags.seen))


@pytest.mark.parametrize("prepared", [True, False])
def test_training_the_head_leaves_the_rest_alone(data, prepared):
    network = with_batchnorm()
    before = copy.deepcopy(network.state_dict())
    trained = models.prepare(network, "head")
    module = module_for(network, keep_eval=models.keep_frozen_in_eval if prepared else None)
    trainer_for(epochs=2, limit_val_batches=1).fit(module, data)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if "running" in key or "tracked" in key}
    assert changed == ({*trained} if prepared else {*trained} | statistics)
    assert set(trained) == {"7.weight", "7.bias"}


def test_only_what_is_trained_is_given_to_the_optimiser(data):
    network = small_cnn()
    models.prepare(network, "head")
    given = []

    def optimizer(parameters):
        given.extend(parameters)
        return SGD(parameters)

    fit(module_for(network, optimizer=optimizer), data, 1)
    assert {id(p) for p in given} == {id(p) for p in network.parameters() if p.requires_grad}


def test_the_schedule_scales_to_the_length_of_the_run(data):
    seen = []

    def shape(t):
        seen.append(t)
        return 1 - t / 2

    module = fit(module_for(small_cnn(), schedule=shape), data, -1, epochs=2)
    assert sorted(set(seen)) == pytest.approx([k / 6 for k in range(7)])  # two epochs of three steps
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.05 * 0.5)


# --- Υ --------------------------------------------------------------------------------------------------------------


def passes(module, data, monkeypatch, steps, **options):
    """What was measured and attacked, in order: (`pass`, images) and (`step`, number)."""
    events = []
    read, attack = data.train_batches, module.attack

    def train_batches(index, step, rank=0, world=1):
        batches = list(read(index, step, rank, world))
        events.append(("pass", step, sum(len(b.x) for b in batches)))
        return iter(batches)

    class Attack(type(attack)):
        def __call__(self, network, x, y, threat, context=None):
            events.append(("step", len([e for e in events if e[0] == "step"]), len(x)))
            return super().__call__(network, x, y, threat, context)

    monkeypatch.setattr(data, "train_batches", train_batches)
    attack.__class__ = Attack
    fit(module, data, steps, **options)
    return events


def test_exact_passes_over_all_images_before_each_step(data, monkeypatch):
    module = module_for(small_cnn(), sensitivity=Exact(every=1))
    events = passes(module, data, monkeypatch, 4)
    assert data.n_train == 48
    assert events == [event for k in range(4) for event in (("pass", k, 48), ("step", k, 16))]


@pytest.mark.parametrize(("every", "wanted"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (10, [0])])
def test_a_subsample_is_measured_every_few_steps(data, monkeypatch, every, wanted):
    module = module_for(small_cnn(), sensitivity=Subsample(size=20, every=every))
    events = passes(module, data, monkeypatch, 5)
    assert [(step, n) for kind, step, n in events if kind == "pass"] == [(step, 20) for step in wanted]


def test_exact_is_the_sensitivity_of_the_present_network(data):
    plain = digits(crop=0)
    module = fit(
        module_for(small_cnn(), sensitivity=Exact(every=1), optimizer=partial(torch.optim.SGD, lr=0.0)), plain, 2
    )
    images = plain.images("train")
    x = (images.images.float() / 255).requires_grad_()
    loss = F.cross_entropy(module.network.eval()(x), images.labels, reduction="sum")
    norms = torch.autograd.grad(loss, x)[0].flatten(1).abs().sum(1).double()
    assert module.sensitivity.upsilon() == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-5)
    torch.testing.assert_close(module.sensitivity.sample().values.double(), norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [partial(Exact, every=1), Table])
@pytest.mark.parametrize("every", [1, None])
def test_with_a_pool_it_is_that_of_the_mixture(pool, make, every):
    """Against a pass over the originals and the whole pool, of a network that stays as it is."""
    chosen = {"path": pool, "fraction": 0.6, "sample": 90, "every": every}
    plain = digits(crop=0, synthetic=chosen)
    module = fit(module_for(small_cnn(), sensitivity=make(), optimizer=partial(torch.optim.SGD, lr=0.0)), plain, 3)
    own, share = plain.images("train"), plain.pool_share
    drawn, labels = plain.pool.read(torch.arange(90))
    x = (torch.cat([own.images, drawn]).float() / 255).requires_grad_()
    loss = F.cross_entropy(module.network.eval()(x), torch.cat([own.labels, labels]), reduction="sum")
    squares = torch.autograd.grad(loss, x)[0].flatten(1).abs().sum(1).double().square()
    assert share == 10 / 16
    wanted = float(((1 - share) * squares[:48].mean() + share * squares[48:].mean()).sqrt())
    assert abs(wanted / float(squares[:48].mean().sqrt()) - 1) > 0.02, "the originals alone are something else"
    found = module.sensitivity.upsilon()
    assert found == pytest.approx(wanted, rel=1e-5 if every else 0.15)  # by the thirty images that the batches drew


def test_estimators_that_go_by_the_batch_see_the_mixture(pool):
    data = digits(crop=0, synthetic={"path": pool})
    module = fit(module_for(small_cnn(), sensitivity=Batch()), data, 1)
    assert type(module.sensitivity) is Batch
    assert len(module.sensitivity.sample().values) == 16


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_a_pointwise_attack_measures_nothing(data, monkeypatch, attack):
    """Its radii are all δ, so a pass over the training set would be wasted."""
    module = module_for(small_cnn(), attack=build(attack, loss="kl"), sensitivity=Exact(every=1))
    assert [e for e in passes(module, data, monkeypatch, 2) if e[0] == "pass"] == []


@pytest.mark.parametrize("name", ["trades", "clean"])
def test_an_objective_without_the_attack_measures_nothing(data, monkeypatch, chosen, name):
    module = module_for(small_cnn(), chosen("objective", name), sensitivity=Exact(every=1))
    assert passes(module, data, monkeypatch, 2) == []


def test_data_that_cannot_be_measured_are_refused(data):
    class Plain(L.LightningDataModule):
        def train_dataloader(self):
            return data.train_dataloader()

        def val_dataloader(self):
            return data.val_dataloader()

    with pytest.raises(SettingError, match=r"sensitivity=exact .*batch or ema"):
        fit(module_for(small_cnn(), sensitivity=Exact()), Plain(), 1)
    fit(module_for(small_cnn(), sensitivity=Batch()), Plain(), 1)


# --- checkpoints ----------------------------------------------------------------------------------------------------

KINDS = {
    "table": Table,
    "batch": Batch,
    "ema": Ema,
    "exact": partial(Exact, every=2),
    "subsample": partial(Subsample, 20, 2),
}


def saved(tmp_path, **options):
    return ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, save_last=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimator_is_in_the_checkpoint(data, tmp_path, kind):
    module = module_for(small_cnn(), sensitivity=KINDS[kind]())
    trainer_for(epochs=1, callbacks=[saved(tmp_path)], enable_checkpointing=True).fit(module, data)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    wanted = {"name": kind, **module.sensitivity.state_dict()}
    assert set(checkpoint["sensitivity"]) == set(wanted)
    for key, value in checkpoint["sensitivity"].items():
        assert value is not None
        assert torch.equal(value, wanted[key]) if isinstance(value, torch.Tensor) else value == wanted[key]

    fresh = module_for(small_cnn(), sensitivity=KINDS[kind]())
    fresh.on_load_checkpoint(checkpoint)
    fresh.sensitivity.begin(48, 2.0, SEED, module.sensitivity.processes)  # as on_fit_start does afterwards
    assert fresh.sensitivity.upsilon() == module.sensitivity.upsilon()


def test_the_state_of_another_estimator_is_left_out(data, tmp_path):
    module = fit(module_for(small_cnn(), sensitivity=Ema()), data, 1)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other = module_for(small_cnn(), sensitivity=Batch())
    other.on_load_checkpoint(checkpoint)
    assert other.sensitivity.sample() is None
    other.on_load_checkpoint({})  # a checkpoint without any


class Stop(L.Callback):
    """Stops a run after so many steps, as a kill would, with a checkpoint."""

    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [3, 4])  # at the end of an epoch of three steps, and inside the next
@pytest.mark.parametrize("pooled", [False, True])
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, kind, steps, pooled, pool):
    def make():
        return module_for(with_batchnorm(), sensitivity=KINDS[kind](), schedule=lambda t: 1 - 0.9 * t)

    def read():
        return digits(synthetic={"path": pool, "sample": 30} if pooled else None)

    whole = fit(make(), read(), -1, epochs=3)
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(InterruptedError):
        fit(make(), read(), -1, epochs=3, callbacks=[Stop(steps, path)])
    resumed = make()
    trainer = trainer_for(epochs=3)
    trainer.fit(resumed, read(), ckpt_path=path)
    assert trainer.global_step == 9
    assert same(resumed.network, whole.network)
    assert resumed.sensitivity.upsilon() == whole.sensitivity.upsilon()


def test_the_run_is_a_function_of_the_seed(data):
    def run(seed):
        return fit(module_for(small_cnn(), seed=seed, attack=distributional("pgd")), data, 2).network

    torch.manual_seed(1)
    one = run(1)
    torch.manual_seed(2)  # the global generator has no say
    assert same(run(1), one)
    assert not same(run(2), one)
