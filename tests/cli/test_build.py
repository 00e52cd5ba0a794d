"""Classes from the configuration: what a user can name, and what is refused before any work, by the setting's name."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from sampled import sampled
from torch import nn

from wdat.attacks import PGD, WPGD
from wdat.cli.build import build, build_attacks, check_number_of_classes
from wdat.cli.train import check, evaluation_of, optimizer_of
from wdat.errors import SettingError
from wdat.losses import check_classes
from wdat.records import Facts, RecordFile

CONF = Path(__file__).parents[2] / "conf"
LOCALLY = ("data=digits", "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1")
PARTS = ("attack", "objective", "sensitivity", "scheduler", "averaging", "data", "finetune")


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*LOCALLY, *overrides])


def built(cfg):
    """All that train.py builds before it reads an image, in its order."""
    check(cfg)
    found = {part: build(cfg[part], part) for part in PARTS}
    found["optimizer"] = optimizer_of(cfg)
    threat = build(cfg.threat, "threat")
    found["evaluation"] = evaluation_of(cfg, threat, found["attack"], RecordFile(None), Facts(), lambda *_: None)
    return found


EVALUATIONS = sorted(file.stem for file in (CONF / "evaluation").glob("[!_]*.yaml"))


@pytest.mark.parametrize("name", EVALUATIONS)
def test_each_evaluation_can_be_built(name):
    evaluation = built(composed(f"evaluation={name}"))["evaluation"]
    assert [attack.name for attack in evaluation.attacks][:2] == ["pgd", "wpgd"]


BAD = {  # overrides, and what the message must say
    "attack.steps=10.5": ["attack.steps=10.5", "whole number"],
    "attack.steps=10.0": ["attack.steps=10.0", "whole number"],
    "attack.steps=true": ["attack.steps=True", "whole number"],
    "attack.steps=null": ["attack.steps=None", "whole number"],
    "attack.step_size=inf": ["attack.step_size=inf", "(0, inf)"],
    "attack.step_size=nan": ["attack.step_size=nan"],
    "attack.step_size=fast": ["attack.step_size=fast"],
    "attack.radius_max=inf": ["attack.radius_max=inf", "null"],
    "attack=knapsack_budget attack.kappa=inf": ["attack.kappa=inf"],
    "attack.loss=cee": ["attack.loss", "ce"],
    "+attack.stepz=3": ["attack.stepz", "steps", "~attack.stepz"],
    "attack._target_=wdat.attacks.WPDG": ["attack._target_=wdat.attacks.WPDG", "can't be imported"],
    "attack._target_=nowhere.Attack": ["attack._target_=nowhere.Attack", "nowhere"],
    "objective=trades objective.pointwise_attack.steps=2.5": ["objective.pointwise_attack.steps=2.5"],
    "objective=trades +objective.pointwise_attack.stepz=2": ["objective.pointwise_attack.stepz"],
    "objective=trades objective.pointwise_attack._target_=wdat.attacks.WPGD": ["objective.pointwise_attack"],
    "objective.beta_w=six": ["objective.beta_w=six"],
    "data.batch_size=2.5": ["data.batch_size=2.5"],
    "sensitivity.window=2.5": ["sensitivity.window=2.5"],
    "sensitivity=subsample sensitivity.size=2.5": ["sensitivity.size=2.5"],
    "sensitivity=exact sensitivity.every=1.5": ["sensitivity.every=1.5"],
    "sensitivity=ema sensitivity.rate=2": ["sensitivity.rate=2", "(0, 1]"],
    "averaging=ema averaging.decay=1": ["averaging.decay=1", "[0, 1)"],
    "scheduler.warmup=1": ["scheduler.warmup=1", "[0, 1)"],
    "scheduler=steps scheduler.milestones=[75]": ["scheduler.milestones=75"],
    "scheduler=one_cycle scheduler.epochs=2.5": ["scheduler.epochs=2.5"],
    "optimizer.lr=-1": ["optimizer.lr=-1"],
    "optimizer.lr=inf": ["optimizer.lr=inf"],
    "optimizer.momentum=-1": ["optimizer", "momentum"],
    "optimizer.momentum=0": ["optimizer", "Nesterov"],
    "optimizer._target_=torch.optim.AdamW": ["optimizer.momentum", "AdamW", "~optimizer.momentum"],
    "optimizer.per_batch=0.5": ["optimizer.per_batch=0.5"],
    "evaluation.attacks=pgd": ["evaluation.attacks=[pgd]"],
    "evaluation.attacks=[wpdg]": ["evaluation.attacks", "wpgd"],
    "evaluation.attacks=[]": ["evaluation.attacks"],
    "evaluation.attacks=[critical]": ["evaluation.attacks", "knapsack"],
    "evaluation.attack_options.wpgd.steps=2.5": ["evaluation.attack_options.wpgd.steps=2.5"],
    "+evaluation.attack_options.wpgd.stepz=2": ["evaluation.attack_options.wpgd.stepz"],
    "evaluation.curve=[0]": ["evaluation.curve=0"],
    "evaluation.batch_size=0.5": ["evaluation.batch_size=0.5"],
    "evaluation.attacks=[pgd]": ["monitor", "val/acc_distributional", "val/acc_pointwise"],
    "monitor=val/acc_distribution": ["monitor", "val/acc_distributional"],
    "data.num_classes=2": ["evaluation.attack_options.wpgd.loss=redlr", "data.num_classes"],
    "data.num_classes=2 evaluation.attack_options.wpgd.loss=ce attack.radii_loss=dlr": ["attack.radii_loss=dlr"],
    "trainer.max_epochs=2.5": ["trainer.max_epochs=2.5"],
    "trainer.gradient_clip_val=inf": ["trainer.gradient_clip_val=inf"],
    "pretrain.max_epochs=1.5": ["pretrain.max_epochs=1.5"],
    "seed=1.5": ["seed=1.5"],
    "attack.radii_loss=kl": ["attack.radii_loss", "ce"],
    "attack.radius_max=0.5": ["attack.radius_max", "at least 1"],
    "threat.delta=-1": ["threat.delta", "negative"],
    "threat.delta=abc": ["threat.delta", "8/255"],
    "threat.p=0.5": ["threat.p", "at least 1"],
    "threat.p=1": ["threat.p", "> 1"],
    "threat.norm=l1": ["threat.norm", "l2"],
    "data.limit_train=0": ["data.limit_train", "null"],
    "data.batch_size=0": ["data.batch_size", "from 1"],
    "objective.beta_w=-1": ["objective.beta_w", "negative"],
    "objective.label_smoothing=1": ["objective.label_smoothing", "[0, 1)"],
    "objective.smooth=synthetics": ["objective.smooth", "synthetic"],
    "optimizer.per_batch=0": ["optimizer.per_batch", "null"],
    "sensitivity.every=0": ["sensitivity.every", "at least 1"],
    "averaging=ema averaging.start=1": ["averaging.start"],
    "sensitivity.window=0": ["sensitivity.window", "at least 1", "null"],
    "trainer.precision=16-mixed": ["trainer.precision=16-mixed", "bf16-mixed"],
    "sensitivity=subsample sensitivity.size=0": ["sensitivity.size", "at least 1"],
    "data.num_classes=2 attack.loss=redlr": ["attack.loss", "three classes"],
    "attack=wpgd data.num_classes=2 attack.radii_loss=redlr": ["attack.radii_loss"],
    "seed=-1": ["seed"],
    "trainer.max_epochs=-1": ["trainer.max_epochs"],
    "seed=4294967296": ["seed=4294967296"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", sampled(BAD, 5))
def test_what_cannot_be_used_is_refused_by_its_name(overrides):
    with pytest.raises(SettingError) as error:
        built(composed(*overrides.split()))
    for word in BAD[overrides]:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_the_files_have_can_be_built():
    found = built(composed())
    assert found["evaluation"].attacks[0].pointwise


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's own file, beside the project."""
    (tmp_path / "mine_of_the_user.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from torch import nn
            from wdat.attacks import PGD
            from wdat.objectives import Objective, Term

            class Net(nn.Module):
                def __init__(self, width=8):
                    super().__init__()
                    self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, 10))

                def forward(self, x):
                    return self.layers(x)

            class Slow(PGD):
                name = "slow"

            @dataclass(frozen=True, kw_only=True)
            class Twice(Objective):
                def __call__(self, network, batch, context):
                    return {"twice": Term(self.cross_entropy(context.logits(), batch), 2.0)}
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_of_the_user"
    sys.modules.pop("mine_of_the_user", None)


def test_a_network_of_the_users_own_class(mine, tmp_path):
    given = ["model=custom", f"model.network._target_={mine}.Net", "+model.network.width=5", "seed=3"]
    network = build(composed(*given).model, "model")
    assert (network.layers[1].out_features, network.training) == (5, False)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    again = build(composed(*given, "seed=4", f"model.checkpoint={tmp_path / 'weights.pt'}").model, "model")
    other = build(composed(*given, "seed=4").model, "model")
    assert torch.equal(again.layers[1].weight, network.layers[1].weight)
    assert not torch.equal(other.layers[1].weight, network.layers[1].weight), "fresh weights are those of the seed"
    assert composed(*given).model.name == f"{mine}.Net"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.network._target_=torch.nn.Linearr"], ["model.network._target_=torch.nn.Linearr"]),
        (["model.network._target_=torch.nn.Identity"], []),
        (["model.network._target_=builtins.dict"], ["model.network._target_", "nn.Module"]),
        (["model.network._target_=MINE.Net", "+model.network.widht=5"], ["model.network.widht", "width"]),
        (["model.network._target_=torch.nn.Linear"], ["in_features", "model"]),
        (["model.network._target_=torch.nn.LazyLinear", "+model.network.out_features=10"], ["lazy layers", "__init__"]),
        (["model.network._target_=torch.nn"], ["model.network._target_=torch.nn is a module"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_class_that_makes_no_network_is_named(mine, overrides, words):
    cfg = composed("model=custom", *(o.replace("MINE", mine) for o in overrides))
    if not words:
        assert isinstance(build(cfg.model, "model"), nn.Identity)
        return
    with pytest.raises(SettingError) as error:
        build(cfg.model, "model")
    for word in words:
        assert word in str(error.value)


def test_an_attack_and_an_objective_of_the_users_own_class(mine):
    found = built(composed(f"attack._target_={mine}.Slow", "attack.steps=2", f"objective={'clean'}",
                           f"objective._target_={mine}.Twice"))  # fmt: skip
    assert (found["attack"].name, found["attack"].steps) == ("slow", 2)
    assert type(found["objective"]).__name__ == "Twice"


def test_attacks_of_an_evaluation_by_name_or_class(mine):
    options = [f"+evaluation.attack_options.slow={{_target_: {mine}.Slow, steps: 3}}"]
    cfg = composed("evaluation.attacks=[pgd,slow,{_target_: wdat.attacks.WPGD, steps: 7}]", *options)
    attacks, named = build_attacks(cfg.evaluation)
    assert attacks[0] == "pgd"
    assert (attacks[1].name, attacks[1].steps, attacks[2]) == ("slow", 3, WPGD(steps=7))
    assert named["pgd"]["steps"] == 50
    assert "slow" not in named


def test_three_classes_are_enough():
    check_classes("redlr", 3, "losses")
    with pytest.raises(SettingError, match=r"losses=redlr needs at least three classes.*attack\.loss=ce"):
        check_classes("redlr", 2, "losses")


def test_nothing_is_built_of_null():
    assert build(None, "averaging") is None
    assert isinstance(build(composed("attack=pgd").attack, "attack"), PGD)


@pytest.fixture(autouse=True)
def no_run():
    yield
    HydraConfig.instance().cfg = None


def test_a_network_with_more_classes_than_the_data_is_told():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with pytest.warns(UserWarning, match=r"the network has 5 classes and data\.num_classes=4"):
        check_number_of_classes(network, (3, 2, 2), 4)
    check_number_of_classes(network, (3, 2, 2), 5)
