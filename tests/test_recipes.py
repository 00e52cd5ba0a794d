"""Recipes: their rates against the formulas of their sources, and real steps with all that they mean."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from sampled import sampled
from script_runner import run_script
from torch import nn

from wdat.cli.train import optimizer_of
from wdat.data import ImageDataModule
from wdat.models import LOCAL
from wdat.objectives import PGDAT, TRADES, WDAT, Clean
from wdat.sensitivity import Batch
from wdat.threat import ThreatModel
from wdat.training.module import WDATModule
from wdat.training.schedulers import OneCycle

ROOT = Path(__file__).parents[1]
FINE_TUNING = "fine-tuning"  # what train.py does without an experiment
PUBLISHED = ["trades2019", "hendrycks2019", "rebuffi2021", "rebuffi2021_pytorch", "wang2023"]
RECIPES = [FINE_TUNING, "finetune_plain", *PUBLISHED]
QUICK = ("rebuffi2021",)
TRAINED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in RECIPES]
EVALUATION = "evaluation.attack_options"
pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings(r"ignore:.*module\(s\) in eval mode at the start of training"),
]


def recipe(name):
    return [] if name == FINE_TUNING else [f"experiment={name}"]


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*overrides, "data=digits"])


def with_norms(num_classes=10):
    features = [nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LayerNorm(512)]
    return nn.Sequential(*features, nn.Linear(512, num_classes)).eval()


def images(**options):
    data = ImageDataModule("digits", 10, **{"batch_size": 16, "val_size": 16, "limit_train": 32, **options})
    data.setup()
    return data


class Trail(L.Callback):
    """Rate and momentum of each group at each step, as the optimiser has them."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])


def module_for(optimizer, shape, objective=None, **options):
    torch.manual_seed(3)
    threat = ThreatModel(2, "linf", 0.03)
    return WDATModule(with_norms(), objective or Clean(), None, threat, Batch(), optimizer, shape, **options)


def fit(module, data, epochs, *callbacks, path=None):
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=epochs, limit_val_batches=0, inference_mode=False,
        use_distributed_sampler=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=path)
    return trainer


# --- rates ----------------------------------------------------------------------------------------------------------

STEPS = 2  # in an epoch


def cosine(share):
    return 0.5 * (1 + math.cos(math.pi * share))


def one_cycle(peak, epochs):
    """As the port has it: `OneCycleLR(optimizer, max_lr=lr, pct_start=0.025, total_steps=epochs)`, once an epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, pct_start=0.025, total_steps=epochs)
    found = []
    for epoch in range(epochs):
        found += STEPS * [(optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"])]
        optimizer.step()
        if epoch < epochs - 1:
            scheduler.step()
    return found


def jax(batch_size, steps):
    """`get_cosine_schedule(.1 * max(batch_size / 256, 1.), steps, warmup_steps)` of the original."""
    warmup, peak = steps // 40, 0.1 * max(batch_size / 256, 1)
    curve = [peak * k / warmup if k < warmup else peak * cosine((k - warmup) / (steps - warmup)) for k in range(steps)]
    return [(rate, 0.9) for rate in curve]


def constant_momentum(rates):
    return [(rate, 0.9) for rate in rates]


CURVES = {  # epochs, overrides, and the formula
    FINE_TUNING: (
        20, [], constant_momentum([0.005 * (k / 2 if k < 2 else cosine((k - 2) / 38)) for k in range(40)])
    ),
    "finetune_plain": (
        20, [], constant_momentum([0.02 * (k / 8 if k < 8 else cosine((k - 8) / 32)) for k in range(40)])
    ),
    "trades2019": (76, [], constant_momentum([0.01 if epoch >= 75 else 0.1 for epoch in range(1, 77) for _ in "ab"])),
    "hendrycks2019": (
        5, [], constant_momentum([0.001 * (0.001 + (1 - 0.001) * cosine(k / 10)) for k in range(10)])
    ),
    "rebuffi2021": (40, [], jax(1024, 80)),
    "rebuffi2021 in batches of 512": (60, ["data.batch_size=512"], jax(512, 120)),
    "rebuffi2021_pytorch": (44, [], one_cycle(0.4, 44)),
    "wang2023": (60, [], one_cycle(0.2, 60)),
}  # fmt: skip


def test_every_recipe_has_its_formula():
    assert {name.split()[0] for name in CURVES} == set(RECIPES)


@pytest.mark.parametrize("name", sampled(CURVES, 3))
def test_the_rates_of_a_run_are_those_of_the_source(name):
    epochs, overrides, wanted = CURVES[name]
    cfg = composed(*recipe(name.split()[0]), f"trainer.max_epochs={epochs}", *overrides)
    trail = Trail()
    module = module_for(optimizer_of(cfg), instantiate(cfg.scheduler), exempt=cfg.optimizer.exempt)
    fit(module, images(), epochs, trail)
    assert len(trail.seen) == len(wanted) == STEPS * epochs
    for step, (groups, (rate, momentum)) in enumerate(zip(trail.seen, wanted, strict=True)):
        assert groups == len(groups) * [(pytest.approx(rate, rel=1e-6, abs=1e-12), pytest.approx(momentum))], step
    assert len(trail.seen[0]) == (2 if cfg.optimizer.exempt else 1)


# --- all that a recipe means ----------------------------------------------------------------------------------------

MEANS = {  # weight decay, Nesterov, exempt; label smoothing, whose; averaging from; batch size, objective and epochs
    FINE_TUNING: (0, True, [], 0, "all", None, 128, WDAT(), 20),
    "finetune_plain": (5e-4, True, [], 0, "all", None, 128, WDAT(), 20),
    "trades2019": (2e-4, False, [], 0, "all", None, 128, TRADES(), 76),
    "hendrycks2019": (5e-4, True, [], 0, "all", None, 128, PGDAT(), 5),
    "rebuffi2021": (5e-4, True, ["norm"], 0.1, "synthetic", 0, 1024, TRADES(), 400),
    "rebuffi2021_pytorch": (5e-4, True, ["norm"], 0.1, "all", 0.025, 1024, TRADES(), 400),
    "wang2023": (5e-4, True, ["norm"], 0.1, "all", 0.025, 512, TRADES(beta_p=5), 400),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name):
    cfg = composed(*recipe(name))
    averaging = instantiate(cfg.averaging)
    decay, nesterov, exempt, smoothing, smooth, start, batch_size, objective, epochs = MEANS[name]
    optimizer = optimizer_of(cfg)([torch.nn.Parameter(torch.ones(1))])
    found = [optimizer.defaults[key] for key in ("weight_decay", "nesterov", "momentum")]
    assert found == [decay, nesterov, 0.9]
    assert (list(cfg.optimizer.exempt), averaging and averaging.start) == (exempt, start)
    assert averaging is None or averaging.decay == 0.995
    assert (cfg.data.batch_size, cfg.trainer.max_epochs, cfg.attack.steps) == (batch_size, epochs, 10)
    assert instantiate(cfg.objective) == replace(objective, label_smoothing=smoothing, smooth=smooth)


def test_what_is_typed_wins_over_the_recipe():
    typed = ["averaging=none", "data.batch_size=64", "objective=wdat", "objective.beta_w=2", "trainer.max_epochs=3"]
    typed += ["objective.label_smoothing=0.3", "objective.smooth=synthetic", "optimizer.lr=0.01"]
    typed += ["optimizer.exempt=[norm,bias]", "scheduler=cosine"]
    for order in (["experiment=wang2023", *typed], [*typed, "experiment=wang2023"]):
        cfg = composed(*order)
        assert (cfg.averaging, cfg.data.batch_size, cfg.trainer.max_epochs) == (None, 64, 3)
        assert instantiate(cfg.objective) == WDAT(beta_w=2, label_smoothing=0.3, smooth="synthetic")
        assert (cfg.optimizer.lr, list(cfg.optimizer.exempt)) == (0.01, ["norm", "bias"])
        assert instantiate(cfg.scheduler).warmup == 0.05
    assert composed("experiment=rebuffi2021", "averaging=ema_after_warmup").averaging.start == 0.025


# --- three real steps -----------------------------------------------------------------------------------------------

THREE_STEPS = [
    "data=digits", "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1", "data.batch_size=16", "data.limit_train=48", "data.limit_val=8", "data.limit_test=8",
    "data.crop=1", "attack.steps=2", "evaluation.curve=[]", f"{EVALUATION}.pgd.steps=1",
    f"{EVALUATION}.wpgd.steps=1", f"{EVALUATION}.wpgd.loss=ce",
]  # fmt: skip


MORE = {  # of a recipe: the objective is that of all, for losses that can be compared
    name: [f"objective.label_smoothing={means[3]}", f"objective.smooth={means[4]}"] for name, means in MEANS.items()
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By schedule: what the terminal said, the losses of the steps, and the last checkpoint."""
    known = {}

    def one(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(LOCAL, "small_cnn", with_norms)
                given = [*recipe(name), *THREE_STEPS, "objective=wdat", *MORE.get(name, [])]
                result = run_script(ROOT / "train.py", *given, f"hydra.run.dir={folder}")
            assert (result.status, result.err) == (0, ""), result.err
            (log,) = folder.rglob("metrics.csv")
            rows = [r for r in csv.DictReader(log.read_text().splitlines()) if r["train/loss_clean"]]
            saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
            known[name] = SimpleNamespace(
                out=result.out, losses=[float(r["train/loss_clean"]) for r in rows], saved=saved,
                groups=saved["optimizer_states"][0]["param_groups"],
            )  # fmt: skip
        return known[name]

    return one


@pytest.mark.parametrize("name", TRAINED)
def test_three_steps_with_all_of_a_recipe(name, trained):
    run = trained(name)
    decay, nesterov, exempt, smoothing, smooth, averaging, *_ = MEANS[name]
    assert run.saved["global_step"] == len(run.losses) == 3

    cycled = name in ("rebuffi2021_pytorch", "wang2023")  # at the start of the third of three steps
    momentum = OneCycle(0.025, cycle_momentum=[0.85, 0.95]).momentum(2 / 3) if cycled else 0.9
    for group in run.groups:
        assert (group["nesterov"], group["momentum"]) == (nesterov, pytest.approx(momentum))
    assert [(len(g["params"]), g["weight_decay"]) for g in run.groups] == (
        [(4, decay), (4, 0)] if exempt else [(8, decay)]
    )

    names = [key for key in run.saved["state_dict"] if key.endswith(("weight", "bias"))]
    assert len(names) == 8
    current = run.saved.get("current_model_state")
    assert (current is None) == (averaging is None)
    if averaging is not None:
        moved = [not torch.equal(run.saved["state_dict"][key], current[key]) for key in names]
        assert all(moved), "the average is behind the weights"

    plain = trained(FINE_TUNING).losses[0]  # at the same weights, on the same images
    if smoothing and smooth == "all":
        assert abs(run.losses[0] - plain) > 1e-3
    else:
        assert run.losses[0] == pytest.approx(plain, rel=1e-6)
    assert run.out.count("there are no synthetic images") == (1 if smooth == "synthetic" else 0)
    assert ("rate    0.1 for batches of 16" in run.out) == (name == "rebuffi2021")


class Mixed(ImageDataModule):
    """Every other image counts as synthetic."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch._replace(synthetic=batch.position % 2 == 1)


class First(L.Callback):
    """The clean term of the first step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.loss = getattr(self, "loss", float(trainer.callback_metrics["train/loss_clean"]))


@pytest.mark.parametrize("name", ["rebuffi2021", "wang2023"])
def test_labels_of_synthetic_images_are_smoothed_in_training(name):
    objective = instantiate(composed(f"experiment={name}", "objective=clean").objective)
    data = Mixed("digits", 10, batch_size=16, val_size=16, limit_train=16)
    data.setup()
    first = First()
    module = module_for(partial(torch.optim.SGD, lr=0.1), lambda t: 1.0, objective)
    (batch,) = data.train_dataloader()
    logits = module_for(None, None).network.train()(batch.x).detach()
    share = torch.full((16,), 0.1) if name == "wang2023" else 0.1 * (batch.position % 2)
    target = nn.functional.one_hot(batch.y, 10) * (1 - share[:, None]) + share[:, None] / 10
    fit(module, data, 1, first)
    assert first.loss == pytest.approx(float(-(target * logits.log_softmax(1)).sum(1).mean()), rel=1e-5)


# --- going on -------------------------------------------------------------------------------------------------------


class Stop(L.Callback):
    """Stops a run after so many steps, with a checkpoint."""

    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.parametrize("exempt", [["norm"], []])
@pytest.mark.parametrize("steps", [4, 5])  # at the end of an epoch, and inside one
def test_a_recipe_goes_on_as_if_it_had_never_stopped(tmp_path, steps, exempt):
    def make():
        optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        return module_for(optimizer, OneCycle(0.25, 0.04, 4e-6, 6, [0.85, 0.95]), exempt=exempt)

    whole, trail = make(), Trail()
    fit(whole, images(), 6, trail)
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(InterruptedError):
        fit(make(), images(), 6, Stop(steps, path))
    resumed, rest = make(), Trail()
    fit(resumed, images(), 6, rest, path=path)
    assert rest.seen == trail.seen[steps:]
    for key, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[key], value), key
