"""Sweeps: every run that a file asks for composes, and the files say truly what they ask and cost.

Compositions only, but for the slow tests, which run sweeps at their smallest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import wandb
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sampled import sampled
from script_runner import run_script

from sweeps import cost, grids, smoke
from sweeps.table import table
from wdat import models
from wdat.cli.train import optimizer_of
from wdat.errors import SettingError
from wdat.objectives import WDAT
from wdat.records import Record, RecordFile

ROOT = Path(__file__).parents[1]
QUESTIONS = ("beta_and_delta", "loss_and_allocation", "networks_and_seeds", "rate_and_scope", "upsilon")
AXES = {
    "beta_and_delta": {"objective.beta_w": 4, "threat.delta": 3},
    "loss_and_allocation": {"attack": 8},
    "networks_and_seeds": {"model": 5, "seed": 3},
    "rate_and_scope": {"optimizer.lr": 3, "finetune.trainable": 2, "finetune.init": 3},
    "upsilon": {"sensitivity": 13},
}
FILES = [(kind, name) for kind in grids.KINDS for name in QUESTIONS]
PARTS = ("threat", "attack", "objective", "sensitivity")


def ends(runs):
    """The first and the last: between them every axis of a grid has changed."""
    return [runs[0], runs[-1]]


@pytest.fixture(scope="module")
def composed():
    """Two runs of every Hydra sweep, composed from the sweep's own file."""
    return {name: [grids.composed(point, name) for point in ends(grids.points("hydra", name))] for name in QUESTIONS}


@pytest.fixture(scope="module")
def repeated():
    """Every run, composed from its overrides alone."""
    return {name: [grids.composed(point) for point in grids.points("hydra", name)] for name in QUESTIONS}


@pytest.fixture(scope="module")
def prices(repeated):
    """What each run costs, in plain epochs."""
    return {name: [cost.plain_epochs(cfg) for cfg in repeated[name]] for name in QUESTIONS}


def settings(cfg):
    """What a run does, without Hydra's part."""
    return {k: v for k, v in OmegaConf.to_container(cfg, resolve=False).items() if k != "hydra"}


# --- what the files ask for -----------------------------------------------------------------------------------------


def test_each_question_has_a_file_of_both_kinds():
    for kind in grids.KINDS:
        assert sorted(file.stem for file in (grids.FOLDER / kind).glob("*.yaml")) == sorted(QUESTIONS)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_the_axes_are_those_of_the_question(kind, name):
    axes = grids.axes(kind, name)
    assert {key: len(values) for key, values in axes.items() if len(values) > 1} == AXES[name]
    for values in axes.values():
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", QUESTIONS)
def test_both_kinds_ask_for_the_same_runs(name):
    sweep = grids.load("wandb", name)
    elsewhere = {"logger=wandb", "-cd", "--config-dir", "sweeps/hydra"}

    def overrides(line):
        return {w for w in line if "=" in w and not w.startswith("hydra.run.dir=")} - elsewhere

    of_wandb = [overrides(grids.expanded(sweep, point)) for point in grids.points("wandb", name)]
    assert of_wandb == [set(point) for point in grids.points("hydra", name)]


@pytest.mark.long
@pytest.mark.parametrize("name", QUESTIONS)
def test_every_run_of_the_grid_composes_into_what_can_be_built(repeated, name):
    for cfg in repeated[name]:
        threat, attack, objective, _ = (instantiate(cfg[part]) for part in PARTS)
        attack.threat_of(threat)
        assert isinstance(objective, WDAT), "else neither attack nor sensitivity would matter"
        optimizer_of(cfg)([torch.nn.Parameter(torch.ones(1))])
        assert cfg.finetune.trainable in models.finetune.TRAINABLE
        assert cfg.finetune.init in models.finetune.INIT
        assert cfg.model._target_ == "wdat.models.load_network"


@pytest.mark.long
@pytest.mark.parametrize("name", QUESTIONS)
def test_no_two_runs_are_alike(repeated, name):
    found = Counter(str(settings(cfg)) for cfg in repeated[name])
    assert set(found.values()) == {1}


@pytest.mark.parametrize("name", sampled(QUESTIONS, 3))
def test_the_overrides_of_a_job_say_all_that_it_does(composed, name):
    """So that a job can be resumed and repeated without the sweep's file."""
    repeated = [grids.composed(point) for point in ends(grids.points("hydra", name))]
    assert [settings(cfg) for cfg in repeated] == [settings(cfg) for cfg in composed[name]]


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_job_has_a_readable_folder_of_its_own(composed, name):
    folders = []
    for number, cfg in enumerate(composed[name]):
        assert cfg.hydra.mode.name == "MULTIRUN"
        cfg.hydra.job.num, cfg.hydra.job.config_name = number, name
        folders.append(cfg.hydra.sweep.subdir)
        assert cfg.hydra.sweep.dir.startswith(f"multirun/{name}/")
        assert re.fullmatch(r"[\w=./-]+", folders[-1]), folders[-1]
        assert folders[-1].startswith(f"{number}_"), "unique where a further axis comes from the command line"
    assert len({folder.partition("_")[2] for folder in folders}) == len(folders), "the numbers aside"


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_job_runs_on_one_device(composed, name):
    """With several, every process would run the whole sweep."""
    assert {cfg.trainer.devices for cfg in composed[name]} == {1}


@pytest.mark.long
def test_each_variant_changes_what_its_name_says():
    default = {group: grids.composed([])[group] for group in ("attack", "sensitivity")}
    files = [file for group in default for file in (grids.FOLDER / "hydra" / group).glob("*.yaml")]
    assert len(files) == 12
    used = {word for name in QUESTIONS for point in grids.points("hydra", name) for word in point}
    for file in files:
        assert f"{file.parent.name}={file.stem}" in used
    words = {
        "redlr": ("attack", "radii_loss", "redlr"), "uncapped": ("attack", "radius_max", None),
        "window10": ("sensitivity", "window", 10), "uncorrected": ("sensitivity", "window", None),
        "refilled": ("sensitivity", "every", 382), "every1": ("sensitivity", "every", 1),
        "every10": ("sensitivity", "every", 10), "every100": ("sensitivity", "every", 100),
        "slow": ("sensitivity", "rate", 0.01), "fast": ("sensitivity", "rate", 0.5),
    }  # fmt: skip
    for file in files:
        group = file.parent.name
        base = "wpgd_budget" if group == "attack" else file.stem.partition("_")[0]
        plain, found = (grids.composed([f"{group}={choice}"])[group] for choice in (base, file.stem))
        wanted = [words[w] for w in file.stem.removeprefix(base).strip("_").split("_")]
        assert found == {**plain, **{key: value for _, key, value in wanted}}
        assert found != plain


# --- W&B ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_wandb_sweep_is_a_grid_over_a_metric_that_is_logged(name):
    sweep = grids.load("wandb", name)
    assert set(sweep) == {"program", "project", "name", "method", "metric", "parameters", "command"}
    assert (sweep["program"], sweep["method"], sweep["name"]) == ("train.py", "grid", name)
    assert sweep["metric"] == {"name": grids.composed([]).monitor, "goal": "maximize"}
    assert sweep["project"] == grids.composed(["logger=wandb"]).logger.project


@pytest.mark.parametrize("name", QUESTIONS)
def test_wandb_parameters_are_texts_that_hydra_reads_as_they_stand(name):
    for key, parameter in grids.load("wandb", name)["parameters"].items():
        assert re.fullmatch(r"[a-z_.]+", key), "W&B takes no special characters"
        assert list(parameter) == ["values"]
        for value in parameter["values"]:
            assert isinstance(value, (str, int, float)), "None would become the text `None`"
            assert not isinstance(value, bool)
            assert "e" not in str(value) or isinstance(value, str)


def test_no_wandb_parameter_lies_inside_another():
    """W&B may read dots as nesting."""
    for name in QUESTIONS:
        keys = list(grids.load("wandb", name)["parameters"])
        assert not [(a, b) for a in keys for b in keys if b.startswith(f"{a}.")]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_wandb_command_is_what_hydra_parses(composed, name, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    sweep = grids.load("wandb", name)
    assert "${args_no_hyphens}" in sweep["command"]
    assert not [word for word in sweep["command"] if word in ("${args}", "${args_no_boolean_flags}")]
    point = grids.points("wandb", name)[-1]
    env, interpreter, program, *words = grids.expanded(sweep, point)
    assert (env, interpreter, program) == ("/usr/bin/env", "python", "train.py")
    if words[0] == "--config-dir":
        assert (ROOT / words[1]).is_dir()
        words = words[2:]
    assert not [word for word in words if word.startswith("-")]
    cfg = grids.composed(words)
    assert cfg.hydra.runtime.choices.logger == "wandb"
    assert cfg.hydra.run.dir == f"outputs/{name}/abc123", "two agents may start a run in the same second"
    theirs, ours = (settings(c) for c in (cfg, composed[name][-1]))
    assert {**theirs, "logger": None} == {**ours, "logger": None}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_command_line_is_the_one_that_the_agent_makes(name):
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")  # not a public module of W&B
    sweep = grids.load("wandb", name)
    first = {key: parameter["values"][0] for key, parameter in sweep["parameters"].items()}
    macros = agent.create_sweep_command_args({"args": {key: {"value": value} for key, value in first.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    theirs = []
    for word in agent.create_sweep_command(list(sweep["command"])):
        theirs += macros[word[2:-1]] if re.fullmatch(r"\$\{.*\}", word) else [word]
    assert grids.expanded(sweep, grids.points("wandb", name)[0]) == theirs


def test_dashes_and_unknown_macros_are_noticed():
    sweep = {"program": "train.py", "command": ["${program}", "${args}"]}
    assert grids.expanded(sweep, ["seed=1"]) == ["train.py", "--seed=1"]
    with pytest.raises(ValueError, match=r"\$\{arguments\}"):
        grids.expanded({**sweep, "command": ["${arguments}"]}, [])


# --- what the files say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_header_says_what_is_asked_where_to_look_what_it_costs_and_how_to_run_it(kind, name):
    said = grids.header(kind, name)
    assert list(said) == ["Question", "Look at", "Cost", "Run"]
    assert said["Question"].endswith("?")
    command = {
        "hydra": f"python train.py -cd sweeps/hydra -cn {name}",
        "wandb": f"wandb sweep sweeps/wandb/{name}.yaml",
    }
    assert said["Run"].startswith(command[kind])
    assert all(len(line) <= 120 for line in grids.path(kind, name).read_text(encoding="utf-8").splitlines())


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_the_cost_stated_is_that_of_the_grid(prices, kind, name):
    found = prices[name]
    each = dict.fromkeys(f"{c:,.0f}" for c in (min(found), max(found)))
    runs = len(grids.points(kind, name))
    wanted = f"{runs} runs of {' to '.join(each)} plain epochs, {sum(found):,.0f} in all."
    assert grids.header(kind, name)["Cost"].startswith(wanted)


def test_the_cost_of_the_published_estimator_is_the_one_stated():
    found = cost.plain_epochs(grids.composed(["evaluation.curve=[]", "sensitivity=exact"]))
    assert f"takes {found:,.0f} plain epochs" in grids.header("hydra", "upsilon")["Look at"]


@pytest.mark.long
def test_the_costs_are_printed(prices, monkeypatch, capsys):
    monkeypatch.setattr(grids, "names", lambda: ["loss_and_allocation"])
    cost.main()
    found = prices["loss_and_allocation"]
    assert capsys.readouterr().out.split() == (
        f"loss_and_allocation 8 runs, {min(found):.0f} to {max(found):.0f}: {sum(found):,.0f} plain epochs".split()
    )


@pytest.mark.long
def test_the_readme_has_a_line_for_each_question(prices):
    text = (grids.FOLDER / "README.md").read_text(encoding="utf-8")
    for name in QUESTIONS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        found = prices[name]
        assert f"| {len(found)} | {sum(found):,.0f} |" in line


# --- what comes of a sweep ------------------------------------------------------------------------------------------


def job(folder, overrides, accuracies):
    """The folder of a finished job; accuracies: by epoch, clean, pointwise and distributional."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    about = {
        "network": "n", "checkpoint": "", "data": "d", "loss": "ce", "options": {}, "norm": "linf", "n": 4,
        "set_size": 4, "accuracy_low": 0.0, "accuracy_high": 1.0, "loss_mean": 1.0, "distance": 0.0, "seconds": 0.0,
        "seed": 0, "device": "cpu", "split": "val", "stage": "epoch",
    }  # fmt: skip
    results = RecordFile(folder / "records.json")
    for epoch, values in enumerate(accuracies, 1):
        attacks = zip(("none", "pgd", "wpgd"), (2.0, float("inf"), 2.0), values, strict=True)
        results.add([Record(**about, epoch=epoch, attack=a, p=p, delta=0.1, accuracy=v) for a, p, v in attacks])


def test_the_table_shows_what_was_varied_and_the_best_epoch(tmp_path):
    common = ["evaluation.curve=[]", "seed=0"]
    job(tmp_path / "10_c", [*common, "objective.beta_w=6"], [(0.9, 0.5, 0.25), (0.8, 0.5, 0.5), (0.7, 0.5, 0.5)])
    job(tmp_path / "2_b", [*common, "objective.beta_w=1"], [(1.0, 0.5, 0.125)])
    job(tmp_path / "0_a=8" / "255", [*common, "objective.beta_w=0.5"], [])
    assert table(tmp_path).splitlines() == [
        "| objective.beta_w | epoch | clean | pointwise | distributional |",
        "| --- | --- | --- | --- | --- |",
        "| 0.5 | – | – | – | – |",
        "| 1 | 1 | 100.00 | 50.00 | 12.50 |",
        "| 6 | 2 | 80.00 | 50.00 | 50.00 |",
    ]


def test_a_folder_without_runs_is_an_error_that_says_so(tmp_path):
    with pytest.raises(SettingError, match="holds no runs"):
        table(tmp_path)


# --- smoke ----------------------------------------------------------------------------------------------------------


def test_a_sweep_that_fails_is_a_status_and_a_line(monkeypatch, capsys, tmp_path):
    def fail(name, folder):
        raise smoke.FailedError("no reason")

    monkeypatch.setitem(smoke.RUNNERS, "wandb", fail)
    monkeypatch.setitem(smoke.RUNNERS, "hydra", lambda name, folder: 3)
    assert smoke.main(["upsilon", "--keep", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"hydra +upsilon +3 jobs +\d+\.\d s +ok", lines[0])
    assert re.fullmatch(r"wandb +upsilon +0 jobs +\d+\.\d s +FAILED: no reason", lines[1])
    assert smoke.main(["upsilon", "--kind", "hydra"]) == 0


def test_a_run_that_leaves_no_records_fails(tmp_path):
    with pytest.raises(smoke.FailedError, match="has the stages"):
        smoke.finished(tmp_path / "records.json")


def test_a_command_that_fails_shows_its_last_words(tmp_path):
    with pytest.raises(smoke.FailedError, match=r"(?s)status 3.*not today"):
        smoke.start([sys.executable, "-c", "print('not today'); raise SystemExit(3)"], tmp_path / "run")


@pytest.mark.filterwarnings("default")  # wandb's own
@pytest.mark.parametrize(
    ("rows", "found"),
    [([{"val/acc": 0.25, "epoch": 1}, {"loss": 2.0}, {"val/acc": 0.5, "epoch": 2}], [0.25, 0.5]), ([{"loss": 2.0}], []),
     ([{"val/acc": float("nan"), "epoch": 1}], None)],
)  # fmt: skip
def test_a_metric_must_have_been_logged_and_not_only_defined(rows, found, tmp_path, monkeypatch):
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    with wandb.init(dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True)) as run:
        run.define_metric("val/acc", step_metric="epoch")
        for row in rows:
            run.log(row)
    wandb.teardown()  # when its service has ended the file is whole
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"val/acc" in file.read_bytes(), "the dashboard defines what it shows"
    if found:
        assert smoke.logged(tmp_path, "val/acc") == found
    else:
        with pytest.raises(smoke.FailedError, match="as val/acc in 1 runs"):
            smoke.logged(tmp_path, "val/acc")


def test_the_smoke_test_downloads_nothing():
    for kind, name in FILES:
        for point in grids.points(kind, name, smoke.FEWER):
            chosen = {**smoke.SMALL, **dict(word.split("=", 1) for word in point)}
            assert chosen["data"] == "digits"
            assert chosen["model"] in ("small_cnn", "cnn_a")


@pytest.mark.long
def test_a_sweep_of_each_kind_really_runs_and_a_job_can_be_resumed(tmp_path, capsys):
    assert smoke.main(["loss_and_allocation", "--keep", str(tmp_path)]) == 0, capsys.readouterr().out
    folder = tmp_path / "hydra" / "loss_and_allocation"
    assert len(table(folder).splitlines()) == 2 + 8
    assert len(list(tmp_path.glob("wandb/*/smoke-*/wandb/offline-run-*"))) == 1
    resume = [f"resume={folder / '1_wpgd_budget_redlr'}", "trainer.max_epochs=2"]
    variants = "hydra.searchpath=[file://sweeps/hydra]"  # as the README of the sweeps says
    assert variants in (grids.FOLDER / "README.md").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py", *resume, variants], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "epoch 2/2" in done.stdout


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*every gradient is zero")  # of a network that knows nothing
@pytest.mark.parametrize(
    "choices",
    [
        ["model=small_cnn", "attack=wpgd_budget", "sensitivity=table", "evaluation.curve=[0.5]"],
        ["model=small_cnn", "attack=critical", "sensitivity=subsample", "sensitivity.size=20", "sensitivity.every=2"],
        ["model=preact_resnet18", "attack=wpgd_budget", "sensitivity=exact_every10"],
        ["model=preact_resnet18", "attack=pgd", "sensitivity=table"],
    ],
)
def test_the_formula_of_the_cost_counts_the_passes_of_a_run(choices, tmp_path, monkeypatch):
    sizes = {"train": 32, "val": 8, "test": 8}
    few = {**smoke.SMALL, "data.batch_size": 16, "attack.steps": 4, "pretrain.max_epochs": 0}
    few |= {f"data.limit_{split}": size for split, size in sizes.items()}
    few |= {"evaluation": "wpgd", "evaluation.validation_options": "{pgd: {steps: 3}}"}  # the knapsack has a bound only
    few |= dict(choice.split("=", 1) for choice in choices)
    point = [f"{key}={value}" for key, value in few.items()]
    counted, prepare = Counter(), models.prepare

    def forward(module, inputs, logits):
        n = len(logits)
        counted["forward"] += n
        if logits.requires_grad:
            logits.register_hook(lambda gradient: counted.update(backward=n))

    def prepared(network, *arguments, **options):
        names = prepare(network, *arguments, **options)
        network.register_forward_hook(forward)
        return names

    monkeypatch.setattr(models, "prepare", prepared)
    variants = f"hydra.searchpath=['file://{grids.FOLDER / 'hydra'}']"
    result = run_script(ROOT / "train.py", *point, variants, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.status == 0, result.err
    # A batch tells whether train and eval mode agree; an evaluation and each of its attacks try an image.
    evaluations = 1 + 2 * (1 + len(few["curve"].strip("[]").split()))
    once = 2 * int(few["data.batch_size"]) + 3 * evaluations
    found = (counted["forward"] - once + counted["backward"]) / (2 * sizes["train"])
    agree = 0.5 if few["model"] == "small_cnn" else 0.0  # half a pass less in an epoch, without BatchNorm
    agree *= 1 if few["attack"] != "pgd" else 0
    assert found == pytest.approx(cost.plain_epochs(grids.composed(point), tuple(sizes.values())) - agree, abs=0.01)
