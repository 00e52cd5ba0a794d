"""Every file of every configuration group composes and builds what it names; the groups are those of the contract."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from sampled import product, sampled

from wdat import models
from wdat.attacks import PGD, WPGD, Knapsack
from wdat.cli.build import build
from wdat.cli.train import evaluation_of, optimizer_of
from wdat.data import ImageDataModule
from wdat.errors import SettingError
from wdat.models import LOCAL, zoo
from wdat.objectives import MART, PGDAT, TRADES, WDAT, AttackAT, Clean, Combined, DualAscent
from wdat.records import Facts, RecordFile
from wdat.threat import ThreatModel
from wdat.training.callbacks import AttackLog, BestCheckpoint, GracefulStop, LastCheckpoint, StepCost

CONF = Path(__file__).parents[1] / "conf"
TRAIN = {"loss": "kl", "radii_loss": "ce", "steps": 10, "step_size": 0.25}
LOCALLY = ("data=digits", "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1")

# Group: what the contract has and must be there, and what it has that may come later.
CONTRACT = {
    "model": (
        "Zhang2019 Rebuffi2021 Gowal2021 Wang2023 Cui2023 robustbench timm "
        "preact_resnet18 wrn_28_10 resnet2b resnet4b cnn_a small_cnn custom",
        "",
    ),
    "data": ("cifar10 cifar100 imagenet folder npz digits", ""),
    "threat": ("w2_linf winf_linf w2_l2 winf_l2", ""),
    "attack": ("wpgd_budget wpgd wfgsm pgd fgsm knapsack_budget critical wrm udr", "critical_draw"),
    "objective": ("wdat trades combined pgd_at mart clean", "attack_at dual_ascent"),
    "reweighting": ("none kl", ""),
    "weight_perturbation": ("none awp", ""),
    "sensitivity": ("table subsample exact batch ema", ""),
    "finetune": ("all head", "reset_head perturb"),
    "optimizer": ("sgd adamw", ""),
    "scheduler": ("cosine long_warmup steps one_cycle constant", ""),
    "evaluation": ("default", "wpgd"),
    "pretrain": ("default", ""),
    "experiment": (
        "quickstart critical_draw finetune_plain trades2019 rebuffi2021 rebuffi2021_pytorch wang2023 hendrycks2019",
        "",
    ),
    "logger": ("csv wandb tensorboard none", ""),
    "trainer": ("default", "cpu gpu ddp"),
    "callbacks": ("default", "none"),
    "certify": ("none crown smoothing", ""),
    "averaging": ("none ema ema_after_warmup", ""),
}


def choices(group):
    return sorted(f.stem for f in (CONF / group).glob("*.yaml") if not f.stem.startswith("_"))


@pytest.fixture
def composed(tmp_path):
    """`composed(*overrides)` is what the script would be given, its Hydra run directory a temporary one."""

    def run(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            here = f"hydra.runtime.output_dir='{tmp_path}'"
            config = compose("config", [*overrides, here], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        return config

    yield run
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize("group", sorted(CONTRACT))
def test_the_choices_are_those_of_the_contract(group):
    required, later = (set(names.split()) for names in CONTRACT[group])
    found = set(choices(group))
    assert required <= found, f"missing: {sorted(required - found)}"
    assert found <= required | later, f"not in the contract: {sorted(found - required - later)}"


def test_no_group_is_unknown_to_these_tests():
    assert {f.name for f in CONF.iterdir() if f.is_dir()} <= {*CONTRACT, "hydra"}


def test_the_flagship_is_what_the_contract_says(composed):
    config = composed("model=Rebuffi2021", "attack=wpgd")
    assert (config.model.name, config.data.source, instantiate(config.attack)) == (
        "Rebuffi2021",
        "cifar10",
        WPGD(**TRAIN),
    )
    threat = instantiate(config.threat)
    assert (threat.p, threat.norm, threat.delta) == (2, "linf", 8 / 255)
    assert zoo.resolve(config.model.name, config.model.dataset, config.model.threat_model).name == (
        "Rebuffi2021Fixing_28_10_cutmix_ddpm"
    )


def test_defaults_are_those_of_the_contract(composed):
    chosen = composed().hydra.runtime.choices
    wanted = {
        "data": "cifar10", "threat": "w2_linf", "attack": "wpgd_budget", "objective": "wdat", "finetune": "all",
        "optimizer": "sgd", "scheduler": "cosine", "logger": "csv", "evaluation": "default",
    }  # fmt: skip
    assert {group: chosen[group] for group in wanted} == wanted
    assert chosen.sensitivity == "table"
    assert composed().monitor == "val/acc_distributional"


KEYS = [
    "seed=3",
    "resume=null",
    "monitor=val/acc_clean",
    "trainer.devices=2",
    "trainer.num_nodes=2",
    "trainer.max_epochs=3",
    "data.limit_train=5",
    "data.limit_val=5",
    "data.limit_test=5",
    "data.path=x.npz",
    "model.checkpoint=x.pt",
    "model.name=x",
    "model.threat_model=L2",
    "threat.p=3",
    "threat.norm=l2",
    "threat.delta=2/255",
    "attack.loss=ce",
    "attack.radii_loss=dlr",
    "attack.steps=3",
    "attack.radius_max=null",
    "objective.beta_w=1",
    "sensitivity.every=2",
    "finetune.trainable=head",
    "finetune.init=perturb",
    "optimizer.lr=0.5",
    "evaluation.batch_size=7",
    "evaluation.attack_options.wpgd.steps=3",
    "hydra.run.dir=elsewhere",
]


def test_keys_of_the_contract_are_there(composed):
    config = composed("model=robustbench", *KEYS)
    assert composed("objective=combined", "objective.beta_p=1").objective.beta_p == 1
    for key in KEYS:
        name, value = key.split("=", 1)
        assert str(OmegaConf.select(config, name)) == ("None" if value == "null" else value), name


@pytest.mark.parametrize("choice", choices("threat"))
def test_threats(composed, choice):
    order, norm = choice.split("_")
    threat = instantiate(composed(f"threat={choice}").threat)
    assert isinstance(threat, ThreatModel)
    assert threat.norm == norm
    assert threat.p == (math.inf if order == "winf" else float(order[1:]))
    assert threat.delta == {"linf": 8 / 255, "l2": 128 / 255}[norm]


@pytest.mark.parametrize(("choice", "norm"), product(choices("attack"), ["linf", "l2"], every=3))
def test_attacks_serve_in_training(composed, choice, norm):
    attack = instantiate(composed(f"attack={choice}", f"threat=w2_{norm}").attack)
    assert attack.name == choice
    assert attack.threat_of(ThreatModel(2, norm, 0.1)).is_pointwise == (choice in ("fgsm", "pgd", "udr"))
    assert attack.loss == ("ce" if choice in ("wrm", "udr") else "kl")
    assert attack.radii_loss == ("margin" if attack.by_distance else "ce")
    if choice in ("wpgd_budget", "wfgsm"):
        assert attack.radius_max == 4
    if choice in ("fgsm", "wfgsm"):
        assert (attack.steps, attack.step_size) == (1, 1)


@pytest.mark.parametrize("choice", choices("objective"))
def test_objectives(composed, choice):
    objective = instantiate(composed(f"objective={choice}").objective)
    pgd = {"steps": 10, "step_size": 0.25}
    kl, ce = PGD(loss="kl", **pgd), PGD(loss="ce", **pgd)
    wanted = {
        "wdat": WDAT(beta_w=6),
        "trades": TRADES(beta_p=6, pointwise_attack=kl),
        "combined": Combined(beta_p=3, beta_w=3, pointwise_attack=kl),
        "pgd_at": PGDAT(pointwise_attack=ce),
        "attack_at": AttackAT(),
        "mart": MART(beta_p=5, pointwise_attack=ce),
        "dual_ascent": DualAscent(order=2),
        "clean": Clean(),
    }
    assert objective == wanted[choice] == type(objective)(), "a class and its file have the same defaults"


@pytest.mark.parametrize("choice", choices("sensitivity"))
def test_sensitivities(composed, choice):
    assert instantiate(composed(f"sensitivity={choice}").sensitivity).name == choice


@pytest.mark.parametrize("choice", choices("optimizer"))
def test_optimizers(composed, choice):
    config = composed(f"optimizer={choice}", "trainer.accelerator=cpu")
    optimizer = optimizer_of(config)([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.param_groups[0]["lr"] == config.optimizer.lr > 0


@pytest.mark.parametrize("choice", choices("scheduler"))
def test_schedulers(composed, choice):
    shape = instantiate(composed(f"scheduler={choice}").scheduler)
    factors = [shape(step / 1000) for step in range(1001)]
    assert all(0 <= f <= 1 for f in factors)
    assert max(factors) == 1
    assert (factors[-1] < 1) == (choice != "constant")


@pytest.mark.parametrize("choice", choices("finetune"))
def test_finetuning(composed, choice):
    network = LOCAL["small_cnn"](10)
    names = instantiate(composed(f"finetune={choice}").finetune)(network, image_shape=(3, 32, 32))
    every = [name for name, _ in network.named_parameters()]
    assert names == (every if choice != "head" else every[-2:])
    assert names == [name for name, p in network.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("choice", choices("data"))
def test_data(composed, choice):
    data = instantiate(composed(f"data={choice}", "data.path=file.npz", "seed=7").data)
    assert isinstance(data, ImageDataModule)
    assert (data.source, data.seed) == (choice, 7)
    assert data.num_classes == {"cifar100": 100, "imagenet": 1000}.get(choice, 10)


def test_evaluations_pass_as_many_images_as_the_data_allows():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sizes = {data: compose("evaluate", [f"data={data}"]).batch_size for data in ("cifar10", "imagenet")}
        assert compose("evaluate", ["data=imagenet", "batch_size=7"]).batch_size == 7
    assert sizes == {"cifar10": 512, "imagenet": 64}


@pytest.mark.parametrize("choice", sampled(choices("model"), 3))
def test_models(composed, choice):
    name = ("model.name=Wong2020Fast",) if choice == "robustbench" else ()
    config = composed("data=digits", f"model={choice}", *name, "seed=5").model
    if choice == "custom":
        return  # tests/cli
    if choice == "timm":
        assert (get_method(config._target_), config.num_classes, config.seed) == (models.load_timm, 10, 5)
        return  # tests/models/test_timm.py
    assert get_method(config._target_) is models.load_network
    assert (config.num_classes, config.seed, config.checkpoint) == (10, 5, None)
    if choice not in LOCAL:
        assert zoo.resolve(config.name, config.dataset, config.threat_model).name in zoo.names()
        return
    network = instantiate(config)
    assert not network.training
    with torch.no_grad():
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("choice", choices("trainer"))
def test_trainers(composed, choice):
    config = composed(f"trainer={choice}", "trainer.accelerator=cpu", "trainer.devices=1").trainer
    trainer = instantiate(config, logger=False)
    assert isinstance(trainer, L.Trainer)
    assert trainer.max_epochs == config.max_epochs


@pytest.mark.parametrize("choice", choices("callbacks"))
def test_callbacks(composed, choice, tmp_path):
    config = composed(*LOCALLY, f"callbacks={choice}", "monitor=val/acc_clean")
    built = list(map(instantiate, config.callbacks.values()))
    if choice != "default":
        assert built == []
        return
    assert isinstance(built.pop([*config.callbacks].index("robust_evaluation")), partial)
    assert {AttackLog, StepCost, BestCheckpoint, LastCheckpoint, GracefulStop} == set(map(type, built))
    (checkpoint,) = (c for c in built if isinstance(c, BestCheckpoint))
    assert (checkpoint.monitor, checkpoint.mode) == ("val/acc_clean", "max")
    assert Path(checkpoint.dirpath) == tmp_path / "checkpoints"


def test_evaluation_has_the_published_settings(composed):
    config = composed(*LOCALLY, "evaluation.curve=[0.25,3]", "threat.delta=0.1")
    threat, attack = instantiate(config.threat), instantiate(config.attack)
    evaluation = evaluation_of(config, threat, attack, RecordFile(None), Facts(), lambda *_: None)
    assert evaluation.attacks == [
        PGD(loss="ce", steps=50, step_size=1.875 / 50), WPGD(loss="redlr", steps=50, step_size=1.875 / 50),
        Knapsack(effort="default", batch_size=config.evaluation.batch_size),
    ]  # fmt: skip
    assert evaluation.deltas == pytest.approx([0.025, 0.3])
    assert evaluation.metrics == {
        "acc_clean", "acc_pointwise", "acc_distributional", "acc_wpgd", "acc_knapsack", "upsilon", "distance"
    }  # fmt: skip


@pytest.mark.parametrize("choice", choices("averaging"))
def test_averaging(choice):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+averaging={choice}"]).averaging
    averaging = instantiate(config)
    if choice == "none":
        assert averaging is None
    else:
        assert (averaging.decay, averaging.start) == (0.995, 0.025 if choice == "ema_after_warmup" else 0)


@pytest.mark.parametrize("choice", choices("logger"))
def test_loggers_write_into_the_run(composed, choice, tmp_path):
    offline = ("logger.offline=true",) if choice == "wandb" else ()
    logger = instantiate(composed(f"logger={choice}", *offline).logger)
    if choice == "none":
        assert logger is None
        return
    assert isinstance(logger, L.pytorch.loggers.Logger)
    assert Path(logger.save_dir) == tmp_path
    if choice == "wandb":
        return  # the next test
    logger.log_metrics({"train/loss": 1.5}, step=1)
    logger.save()
    logger.finalize("success")
    assert any(f.is_file() and f.stat().st_size for f in tmp_path.rglob("*"))


@pytest.mark.filterwarnings("default")  # wandb's own
def test_wandb_offline(composed, tmp_path):
    import wandb

    logger = instantiate(composed("logger=wandb", "logger.offline=true").logger)
    try:
        logger.log_metrics({"train/loss": 1.5}, step=1)
        assert logger.experiment.settings.mode in ("offline", "dryrun")
    finally:
        logger.finalize("success")
        wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


BUILT = ("threat", "attack", "objective", "sensitivity", "scheduler", "averaging")


def built(config):
    for group in BUILT:
        build(config[group], group)
    optimizer_of(config)
    OmegaConf.resolve(config.callbacks)
    OmegaConf.resolve(config.trainer)
    return config


@pytest.mark.parametrize("choice", choices("experiment"))
def test_experiments(composed, choice):
    built(composed(f"experiment={choice}", *LOCALLY))


GROUPS = ("threat", "attack", "objective", "sensitivity", "optimizer", "scheduler", "averaging")


@pytest.mark.parametrize(("turn", "experiment"), product(range(3), choices("experiment"), every=5))
def test_an_experiment_goes_with_every_other_choice(composed, experiment, turn):
    """An experiment's own settings must not reach into a choice that doesn't know them, one of each group."""
    position = 3 * turn + choices("experiment").index(experiment)  # over all experiments, every choice has its turn
    others = [f"{group}={choices(group)[position % len(choices(group))]}" for group in GROUPS]
    config = composed(f"experiment={experiment}", *LOCALLY, *others)
    if "objective=dual_ascent" in others and math.isinf(float(config.threat.p)):
        with pytest.raises(SettingError, match=r"threat\.p finite"):
            built(config)
    else:
        built(config)


def test_the_quickstart_needs_nothing_from_elsewhere(composed):
    config = composed("experiment=quickstart")
    assert (config.data.source, config.model.name, config.trainer.accelerator) == ("digits", "small_cnn", "cpu")
    assert config.pretrain.max_epochs > 0  # it starts from nothing
