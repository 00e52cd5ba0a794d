"""Every file of every configuration group composes and builds what it names; the groups are those of the contract."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from wdat import models
from wdat.data import ImageDataModule
from wdat.models import LOCAL, zoo
from wdat.threat import ThreatModel
from wdat.training.callbacks import (
    AttackLog,
    BestCheckpoint,
    GracefulStop,
    LastCheckpoint,
    RobustEvaluation,
    StepCost,
    WorkProgress,
)

CONF = Path(__file__).parents[1] / "conf"
LOCALLY = ("data=digits", "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1")

# Group: what the contract has and must be there, and what it has that may come later.
CONTRACT = {
    "model": (
        "Zhang2019 Rebuffi2021 Gowal2021 Wang2023 Cui2023 robustbench "
        "preact_resnet18 wrn_28_10 resnet2b resnet4b cnn_a small_cnn",
        "",
    ),
    "data": ("cifar10 cifar100 imagenet folder npz digits", ""),
    "threat": ("w2_linf winf_linf w2_l2 winf_l2", ""),
    "attack": ("wpgd_budget wpgd wfgsm pgd fgsm knapsack_budget critical", "critical_draw"),
    "objective": ("wdat trades combined pgd_at clean", "attack_at"),
    "sensitivity": ("table subsample exact batch ema", ""),
    "finetune": ("all head", "reset_head perturb"),
    "schedule": (
        "finetune20 finetune_plain trades2019 rebuffi2021 rebuffi2021_pytorch wang2023 hendrycks2019",
        "",
    ),
    "logger": ("csv wandb tensorboard", ""),
    "trainer": ("default", "cpu gpu ddp"),
    "callbacks": ("default", "none"),
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
    assert {f.name for f in CONF.iterdir() if f.is_dir()} <= {*CONTRACT, "experiment", "hydra"}
    assert "quickstart" in choices("experiment")


def test_the_flagship_is_what_the_contract_says(composed):
    config = composed("model=Rebuffi2021", "attack=wpgd")
    assert (config.model.name, config.data.source, config.attack.name) == ("Rebuffi2021", "cifar10", "wpgd")
    threat = instantiate(config.threat)
    assert (threat.p, threat.norm, threat.delta) == (2, "linf", 8 / 255)
    assert zoo.resolve(config.model.name, config.model.dataset, config.model.threat_model).name == (
        "Rebuffi2021Fixing_28_10_cutmix_ddpm"
    )


def test_defaults_are_those_of_the_contract(composed):
    chosen = composed().hydra.runtime.choices
    wanted = {
        "data": "cifar10", "threat": "w2_linf", "attack": "wpgd_budget", "objective": "wdat", "finetune": "all",
        "schedule": "finetune20", "logger": "csv",
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
    "objective.beta_p=1",
    "objective.beta_w=1",
    "sensitivity.every=2",
    "finetune.trainable=head",
    "finetune.init=perturb",
    "hydra.run.dir=elsewhere",
]


def test_keys_of_the_contract_are_there(composed):
    config = composed("model=robustbench", *KEYS)
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


@pytest.mark.parametrize("choice", choices("attack"))
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_serve_in_training(composed, choice, norm):
    attack = instantiate(composed(f"attack={choice}", f"threat=w2_{norm}").attack)
    assert attack.name == choice
    assert attack.threat_of(ThreatModel(2, norm, 0.1)).is_pointwise == (choice in ("fgsm", "pgd"))
    assert (attack.loss, attack.radii_loss) == ("kl", "margin" if attack.by_distance else "ce")
    if choice in ("wpgd_budget", "wfgsm"):
        assert attack.radius_max == 4
    if choice in ("fgsm", "wfgsm"):
        assert (attack.steps, attack.step_size) == (1, 1)


@pytest.mark.parametrize("choice", choices("objective"))
def test_objectives(composed, choice):
    objective = instantiate(composed(f"objective={choice}").objective)
    terms = (objective.clean, objective.divergence, objective.beta_p > 0, objective.beta_w > 0)
    wanted = {
        "wdat": (True, True, False, True),
        "trades": (True, True, True, False),
        "combined": (True, True, True, True),
        "pgd_at": (False, False, True, False),
        "attack_at": (False, False, False, True),
        "clean": (True, True, False, False),
    }
    assert terms == wanted[choice]
    if choice in ("wdat", "trades"):
        assert objective.beta_p + objective.beta_w == 6
    if objective.beta_p > 0:
        assert objective.pointwise_attack.loss == ("ce" if choice == "pgd_at" else "kl")


@pytest.mark.parametrize("choice", choices("sensitivity"))
def test_sensitivities(composed, choice):
    assert instantiate(composed(f"sensitivity={choice}").sensitivity).name == choice


@pytest.mark.parametrize("choice", choices("schedule"))
def test_schedules(composed, choice):
    schedule = composed(f"schedule={choice}").schedule
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = instantiate(schedule.optimizer)([parameter])
    assert optimizer.param_groups[0]["lr"] == schedule.optimizer.lr > 0
    shape = instantiate(schedule.shape)
    factors = [shape(step / 1000) for step in range(1001)]
    assert all(0 <= f <= 1 for f in factors)
    assert max(factors) == 1 > factors[-1]


@pytest.mark.parametrize("choice", choices("finetune"))
def test_finetuning(composed, choice):
    network = LOCAL["small_cnn"](10)
    names = models.prepare(network, **composed(f"finetune={choice}").finetune, seed=0, image_shape=(3, 32, 32))
    every = [name for name, _ in network.named_parameters()]
    assert names == (every if choice != "head" else every[-2:])
    assert names == [name for name, p in network.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("choice", choices("data"))
def test_data(composed, choice):
    data = instantiate(composed(f"data={choice}", "data.path=file.npz", "seed=7").data)
    assert isinstance(data, ImageDataModule)
    assert (data.source, data.seed) == (choice, 7)
    assert data.num_classes == {"cifar100": 100, "imagenet": 1000}.get(choice, 10)


@pytest.mark.parametrize("choice", choices("model"))
def test_models(composed, choice):
    name = ("model.name=Wong2020Fast",) if choice == "robustbench" else ()
    config = composed("data=digits", f"model={choice}", *name, "seed=5").model
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
    config = composed(*LOCALLY, f"callbacks={choice}", "monitor=val/acc_clean", "curve=[0.25,3]")
    built = list(map(instantiate, config.callbacks.values()))
    if choice != "default":
        return
    wanted = {RobustEvaluation, AttackLog, StepCost, WorkProgress, BestCheckpoint, LastCheckpoint, GracefulStop}
    assert wanted == set(map(type, built))
    evaluation = next(c for c in built if isinstance(c, RobustEvaluation))
    assert evaluation.pointwise.pointwise
    assert not evaluation.distributional.pointwise
    for attack in (evaluation.pointwise, evaluation.distributional):  # the published settings
        assert (attack.steps, attack.step_size) == (50, pytest.approx(1.875 / 50))
        assert attack.loss in ("ce", "redlr")
    assert evaluation.curve == (0.25, 3)
    checkpoints = [c for c in built if isinstance(c, BestCheckpoint)]
    assert (checkpoints[0].monitor, checkpoints[0].mode) == ("val/acc_clean", "max")
    assert {Path(c.dirpath) for c in checkpoints} == {tmp_path / "checkpoints"}


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
    assert isinstance(logger, L.pytorch.loggers.Logger)
    assert Path(logger.save_dir) == tmp_path
    if choice == "wandb":
        return  # the next test
    logger.log_metrics({"train/loss": 1.5}, step=1)
    logger.save()
    logger.finalize("success")
    assert any(f.is_file() and f.stat().st_size for f in tmp_path.rglob("*"))


@pytest.mark.slow  # starts a service
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


@pytest.mark.parametrize("choice", choices("experiment"))
def test_experiments(composed, choice):
    config = composed(f"experiment={choice}", *LOCALLY)
    for group in ("threat", "attack", "objective", "sensitivity"):
        instantiate(config[group])
    assert OmegaConf.to_container(config, resolve=False)
    OmegaConf.resolve(config.callbacks)
    OmegaConf.resolve(config.trainer)


OTHERS = [f"{g}={c}" for g in ("threat", "attack", "objective", "sensitivity", "schedule") for c in choices(g)]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_an_experiment_goes_with_every_other_choice(composed, experiment, other):
    """An experiment's own settings must not reach into a choice that doesn't know them."""
    config = composed(f"experiment={experiment}", *LOCALLY, other)
    for group in ("threat", "attack", "objective", "sensitivity", "schedule"):
        instantiate(config[group])


def test_the_quickstart_needs_nothing_from_elsewhere(composed):
    config = composed("experiment=quickstart")
    assert (config.data.source, config.model.name, config.trainer.accelerator) == ("digits", "small_cnn", "cpu")
    assert config.pretrain.max_epochs > 0  # it starts from nothing
