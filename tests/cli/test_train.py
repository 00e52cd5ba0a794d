"""The script: what a run writes, how it goes on, and what it says of bad input.

Most runs are made in this process, as `python train.py` would make them but for the interpreter's start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import image
from omegaconf import OmegaConf
from quick_run import EVALUATION, LOCALLY, QUICK, SCRIPT, train

import wdat
from wdat import models
from wdat.attacks import build
from wdat.data import ImageDataModule, digits
from wdat.models import zoo
from wdat.records import read


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout, and nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The quickstart, cut short."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    result = train(*QUICK, f"hydra.run.dir={folder}")
    assert result.status == 0, result.err
    records = read(folder / "records.json")
    best = str(folder / next(r.checkpoint for r in records if r.stage == "after"))
    return SimpleNamespace(
        folder=folder, result=result, records=records, best=Path(best),
        network=models.load_network("small_cnn", checkpoint=best),
        picture=image.imread(folder / "curve.png"),
        files={str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()},
        saved=torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True),
    )  # fmt: skip


# --- what a run writes ----------------------------------------------------------------------------------------------


def test_the_folder_of_a_run(finished):
    assert {"records.json", "curve.png", ".hydra/config.yaml", "checkpoints/last.ckpt"} <= finished.files
    assert any(f.startswith("metrics") and f.endswith("metrics.csv") for f in finished.files)
    config = OmegaConf.load(finished.folder / ".hydra" / "config.yaml")
    assert (config.model.name, config.data.limit_train, config.trainer.max_epochs) == ("small_cnn", 320, 2)


def test_stages_in_order(finished):
    found = [(r.stage, r.split, r.epoch, r.attack, round(r.delta, 4)) for r in finished.records]
    tested = [("none", 0), *((name, delta) for delta in (0.1, 0.05) for name in ("pgd", "wpgd", "knapsack"))]
    wanted = [("before", "test", None, *t) for t in tested]
    wanted += [("epoch", "val", epoch, *t) for epoch in (1, 2) for t in tested[:4]]
    assert found == wanted + [("after", "test", None, *t) for t in tested]


def test_records_are_those_of_the_contract(finished):
    names = """stage network checkpoint data split attack options loss p norm delta n set_size accuracy accuracy_low
    accuracy_high loss_mean distance seconds seed device commit versions"""
    content = json.loads((finished.folder / "records.json").read_text())
    for record in content:
        assert set(names.split()) <= set(record)
        assert 0 <= record["accuracy_low"] <= record["accuracy"] <= record["accuracy_high"] <= 1
        assert record["n"] == record["set_size"] == {"test": 35, "val": 30}[record["split"]]
        assert record["p"] == ("inf" if record["attack"] == "pgd" else 2)
        assert (record["network"], record["data"], record["seed"]) == ("small_cnn", "digits", 0)
        assert record["distance"] <= record["delta"] * (1 + 1e-5)
        if record["attack"] == "none":
            assert record["upsilon"] > 0
            assert record["loss_misclassified"] > 0


def best_attack(records):
    """Accuracy under the strongest distributional attack, by epoch."""
    found = [r for r in records if r.stage == "epoch" and r.attack in ("wpgd", "knapsack")]
    return {epoch: min(r.accuracy for r in found if r.epoch == epoch) for epoch in {r.epoch for r in found}}


def test_the_checkpoint_is_the_one_with_the_best_monitor(finished):
    scores = best_attack(finished.records)
    epoch = torch.load(finished.best, weights_only=True)["epoch"] + 1
    assert scores[epoch] == max(scores.values())


def test_evaluating_the_checkpoint_gives_the_recorded_numbers(finished):
    data = ImageDataModule("digits", 10, val_size=0.15, limit_test=35)
    data.setup()
    again = 0
    for record in finished.records:
        if record.stage != "after":
            continue
        threat = wdat.ThreatModel(2, record.norm, record.delta)
        loss = {} if record.attack == "knapsack" else {"loss": record.loss}
        attacks = [] if record.attack == "none" else [build(record.attack, **loss, **record.options)]
        found = wdat.evaluate(finished.network, data.test_dataloader(), threat, attacks, losses=["ce"])[-1]
        assert found.accuracy == record.accuracy
        assert found.loss_mean == (record.loss_mean and pytest.approx(record.loss_mean, rel=1e-4))
        again += 1
    assert again == 7
    accuracies = [r.accuracy for r in finished.records if r.stage == "after"]
    assert 0 < sorted(set(accuracies))[-2] < max(accuracies) < 1, "a run that tells the numbers apart"


def test_the_picture(finished):
    assert finished.picture.shape[0] >= 400
    assert finished.picture[..., :3].std() > 0.02
    blue = np.abs(finished.picture[..., :3] - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02
    assert blue.sum() > 50, "W-PGD after training"


def test_the_terminal(finished):
    out, err = finished.result.out, finished.result.err
    assert err == ""
    after = {r.attack: r.accuracy for r in finished.records if r.stage == "after" and r.delta in (0, 0.1)}
    for accuracy in after.values():
        assert f"{100 * accuracy:.2f} [" in out
    for what in (
        "47,818 of 47,818 parameters",
        "320 training, 30 validation",
        "35 test",
        "epoch 2/2",
        "before",
        "change",
    ):
        assert what in out
    for file in (finished.best, finished.folder / "records.json", finished.folder / "curve.png"):
        assert str(file) in out
    assert "Warning" not in out + err


def test_the_log_has_the_metrics_of_the_contract(finished):
    names = set()
    for file in finished.folder.rglob("metrics.csv"):
        names |= set(file.read_text().splitlines()[0].split(","))
    of_steps = ["loss", "loss_clean", "loss_distributional", "upsilon", "radius_max", "top1_share", "zero_radii"]
    of_sets = ["acc_clean", "acc_pointwise", "acc_wpgd", "acc_knapsack", "acc_distributional", "upsilon", "distance"]
    assert {f"train/{n}" for n in of_steps} <= names
    assert {f"{split}/{n}" for split in ("val", "test") for n in of_sets} <= names
    assert {"cost/seconds_per_step", "cost/images_per_second"} <= names


def test_the_checkpoint_knows_the_sensitivity(finished):
    assert finished.saved["sensitivity"]["name"] == "table"
    assert len(finished.saved["sensitivity"]["stored"]) > 0


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(finished):
    result = train(f"resume={finished.folder}", "trainer.max_epochs=3")
    assert result.status == 0, result.err
    return SimpleNamespace(result=result, records=read(finished.folder / "records.json"))


def test_a_resumed_run_keeps_its_records_and_adds_epochs(finished, resumed):
    kept = [r for r in finished.records if r.stage != "after"]  # the weights of then are no more
    old, new = resumed.records[: len(kept)], resumed.records[len(kept) :]
    assert old == kept
    assert [(r.stage, r.epoch) for r in new] == [("epoch", 3)] * 4 + [("after", None)] * 7
    assert resumed.result.err == ""


def test_a_resumed_run_starts_from_its_checkpoint(finished, resumed):
    """Not from fresh weights, and without plain training anew."""
    assert "plain training" not in resumed.result.out
    saved = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 2
    assert saved["global_step"] == finished.saved["global_step"] * 3 // 2


def test_a_resumed_run_remembers_the_best(finished, resumed):
    scores = best_attack(resumed.records)
    last = [r for r in resumed.records if r.stage == "after"][-1]
    epoch = torch.load(finished.folder / last.checkpoint, weights_only=True)["epoch"] + 1
    assert scores[epoch] == max(scores.values())
    assert last.checkpoint == "checkpoints/best.ckpt"


SHORT = [
    "evaluation=wpgd",
    "pretrain.max_epochs=0",
    "trainer.max_epochs=1",
    "data.limit_train=64",
    "evaluation.curve=[]",
]


@pytest.mark.long
def test_the_last_checkpoint_is_that_of_the_last_epoch(tmp_path):
    """Also where it isn't the best: here nothing is learnt, so no epoch is better than the first."""
    shorter = ["pretrain.max_epochs=0", "data.limit_train=64", "evaluation.curve=[]", "optimizer.lr=0"]
    assert train(*QUICK, *shorter, "hydra.run.dir=run").status == 0
    saved = {f.name: torch.load(f, weights_only=True)["epoch"] for f in Path("run/checkpoints").iterdir()}
    assert saved["last.ckpt"] == 1
    best = Path("run/checkpoints/best.ckpt").read_bytes()
    Path("run").rename("moved")
    result = train("resume=moved", "trainer.max_epochs=3")
    assert result.status == 0, result.err
    records = read(Path("moved/records.json"))
    assert [r.epoch for r in records if r.stage == "epoch" and r.attack == "none"] == [1, 2, 3]
    assert records[-1].checkpoint == "checkpoints/best.ckpt", "the best is remembered"
    assert Path("moved/checkpoints/best.ckpt").read_bytes() == best
    after = [(r.attack, r.loss, r.delta) for r in records if r.stage == "after"]
    assert len(after) == len(set(after)), "those of before it went on are gone"


@pytest.mark.long
def test_jobs_in_one_process_of_which_one_fails(tmp_path):
    shorter = ["pretrain.max_epochs=0", "trainer.max_epochs=1", "data.limit_train=64", "evaluation.curve=[]"]
    result = train("-m", *QUICK, *shorter, "seed=0,-1,7", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert result.status == 2
    said = result.err.splitlines()
    assert said[0].startswith("error: seed=-1 must be a whole number")
    assert said[1] == "1 of 3 jobs failed:"
    assert said[2].startswith("  #1 ")
    assert said[2].endswith(" seed=-1")
    assert len(said) == 3
    jobs = [read(tmp_path / "sweep" / str(job) / "records.json") for job in (0, 2)]
    assert [[r.seed for r in job] for job in jobs] == [[0] * 12, [7] * 12]
    assert [r.loss_mean for r in jobs[0]] != [r.loss_mean for r in jobs[1]]
    for job in (0, 2):
        assert (tmp_path / "sweep" / str(job) / "checkpoints" / "last.ckpt").exists()
        assert (tmp_path / "sweep" / str(job) / "curve.png").exists()


@pytest.mark.long
def test_a_run_in_float64_goes_on_to_the_bit(tmp_path):
    run = tmp_path / "run"
    few = ["pretrain.max_epochs=0", "data.limit_train=64", "evaluation.curve=[]", "trainer.precision=64-true"]
    assert train(*QUICK, *few, f"hydra.run.dir={run}").status == 0
    last = run / "checkpoints" / "last.ckpt"
    whole = torch.load(last, weights_only=True)["state_dict"]
    last.unlink()  # as if the run had stopped after its first epoch
    resumed = train(f"resume={run}")
    assert resumed.status == 0, resumed.err
    assert "step 2" in resumed.out
    found = torch.load(last, weights_only=True)["state_dict"]
    assert {value.dtype for value in found.values()} == {torch.float64}
    assert all(torch.equal(value, whole[key]) for key, value in found.items())


@pytest.mark.long
def test_the_switches_for_speed(tmp_path):
    shorter = ["pretrain.max_epochs=1", "trainer.max_epochs=1", "data.limit_train=64", "evaluation.curve=[]"]
    run = tmp_path / "run"
    result = train(
        *QUICK, *shorter, "trainer.precision=bf16-mixed", "finetune.channels_last=true", f"hydra.run.dir={run}"
    )
    assert (result.status, result.err) == (0, "")
    plain = train(*QUICK, *shorter, f"hydra.run.dir={tmp_path / 'plain'}")
    assert plain.status == 0
    for mine, theirs in zip(read(run / "records.json"), read(tmp_path / "plain" / "records.json"), strict=True):
        assert mine.accuracy == pytest.approx(theirs.accuracy, abs=0.05), mine.attack
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].keys()


@pytest.mark.long
def test_a_pool_of_synthetic_images(tmp_path):
    data = digits()
    np.savez("pool.npz", image=data.x_train[:200].permute(0, 2, 3, 1).numpy(), label=data.y_train[:200].numpy())
    pool = [
        "data.synthetic.path=pool.npz",
        "data.synthetic.fraction=0.5",
        "pretrain.max_epochs=1",
        "trainer.max_epochs=1",
    ]
    result = train(*QUICK, *pool, "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "pool    200 synthetic images, 50 % of each batch" in result.out
    assert {r.data for r in read(Path("run/records.json"))} == {"digits"}
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["sensitivity"]["name"] == "mixture"
    assert len(checkpoint["sensitivity"]["originals"]["stored"]) == 320
    assert checkpoint["global_step"] == 10
    result = train(*QUICK, "data.synthetic.path=none.npz")
    assert "data.synthetic.path=none.npz: no such file" in result.err
    assert "Traceback" not in result.err


@pytest.mark.long
def test_a_run_is_a_function_of_its_seed(tmp_path):
    shorter = [*SHORT, "pretrain.max_epochs=1"]
    values = []
    for name in ("one", "two"):
        assert train(*QUICK, *shorter, f"hydra.run.dir={tmp_path / name}").status == 0
        values.append([(r.accuracy, r.loss_mean) for r in read(tmp_path / name / "records.json")])
    assert values[0] == values[1]


@pytest.mark.long
def test_no_epochs_is_an_evaluation(tmp_path):
    result = train(*QUICK, "trainer.max_epochs=0", "pretrain.max_epochs=0", f"hydra.run.dir={tmp_path / 'run'}")
    assert (result.status, result.err) == (0, "")
    records = read(tmp_path / "run" / "records.json")
    before, after = ([r.accuracy for r in records if r.stage == s] for s in ("before", "after"))
    assert len(before) == 7
    assert before == after


@pytest.mark.long
@pytest.mark.parametrize("objective", ["trades", "clean"])
def test_an_objective_without_the_attack_says_so_once(tmp_path, objective):
    shorter = ["pretrain.max_epochs=0", "trainer.max_epochs=1", "data.limit_train=64", "evaluation.curve=[]"]
    result = train(*QUICK, *shorter, f"objective={objective}", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.status == 0, result.err
    assert result.out.count("attack=wpgd_budget is not used") == 1


@pytest.mark.long
def test_without_a_choice_of_checkpoint_the_last_one_is_tested(tmp_path):
    result = train(*QUICK, *SHORT, "callbacks.checkpoint=null", "logger=none", "hydra.run.dir=run")
    assert (result.status, result.err) == (0, "")
    assert [file.name for file in Path("run/checkpoints").iterdir()] == ["last.ckpt"]
    after = [r for r in read(Path("run/records.json")) if r.stage == "after"]
    assert {r.checkpoint for r in after} == {"checkpoints/last.ckpt"}
    assert "last.ckpt" in result.out
    assert not Path("run/metrics").exists()


def test_without_evaluation_nothing_is_measured_and_the_last_checkpoint_is_kept(tmp_path):
    result = train(*QUICK, *SHORT, "callbacks.robust_evaluation=null", "hydra.run.dir=run")
    assert (result.status, result.err) == (0, "")
    assert "nothing is measured" in result.out
    assert "last.ckpt" in result.out
    files = {file.name for file in Path("run").iterdir()}
    assert files & {"records.json", "report.html", "curve.png"} == set()
    assert [file.name for file in Path("run/checkpoints").iterdir()] == ["last.ckpt"]
    resumed = train("resume=run", "trainer.max_epochs=2")
    assert (resumed.status, resumed.err) == (0, "")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_without_callbacks_a_run_trains_and_saves_nothing(tmp_path):
    result = train(*QUICK, *SHORT, "callbacks=none", "hydra.run.dir=run")
    assert (result.status, result.err) == (0, "")
    assert "epoch 1/1" in result.out
    assert [file for file in Path("run").rglob("*") if file.suffix in (".ckpt", ".json", ".html")] == []


def script(*arguments, folder, timeout=280):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=timeout, env=environment)


SHORTER = [*QUICK, "trainer.max_epochs=1", "pretrain.max_epochs=1", "data.limit_train=64", "evaluation.curve=[]"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run in a process of its own."""
    folder = tmp_path_factory.mktemp("alone")
    return SimpleNamespace(done=script(*SHORTER, "hydra.run.dir=run", folder=folder), folder=folder / "run")


@pytest.mark.long
def test_from_a_shell(alone, tmp_path):
    """The same in a process of its own, where nothing is silenced or turned into errors by the tests."""
    found = script(*QUICK, "objective.smooth=everything", folder=tmp_path)
    wanted = "error: unknown choice of labels 'everything' (objective.smooth): known: all, synthetic\n"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", wanted)
    assert (alone.done.returncode, alone.done.stderr) == (0, "")
    assert "\x1b" not in alone.done.stdout, "no terminal, no colours"
    assert {r.stage for r in read(alone.folder / "records.json")} == {"before", "epoch", "after"}


@pytest.mark.long
def test_two_processes_measure_what_one_does(alone, tmp_path):
    """35 test images, an odd number: none is left out and none counted twice."""
    found, both = [], script(*SHORTER, "trainer.devices=2", f"hydra.run.dir={tmp_path}", folder=tmp_path)
    for done, folder in ((alone.done, alone.folder), (both, tmp_path)):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Warning" not in done.stderr
        assert "recommended to use `self.log" not in done.stderr + done.stdout
        found.append(read(folder / "records.json"))
        assert done.stdout.count("64 training") == 1
    for one, two in zip(*found, strict=True):
        assert (one.stage, one.attack, one.n, one.set_size) == (two.stage, two.attack, two.n, two.set_size)
        assert two.accuracy == pytest.approx(one.accuracy, abs=1.01 / one.n)  # rounding may tip an image
        assert two.loss_mean == (one.loss_mean and pytest.approx(one.loss_mean, rel=1e-3))


def test_a_real_network_on_real_images(shared, tmp_path):
    weights, images = shared / "models" / "resnet2b.pt", shared / "data" / "cifar10_subset.npz"
    if not weights.exists() or not images.exists():
        pytest.skip(f"no {weights} or {images}")
    result = train(
        "model=resnet2b", f"model.checkpoint={weights}", "data=npz", f"data.path={images}", "threat.delta=2/255",
        "attack=wpgd_budget", "trainer.max_epochs=1", "data.limit_train=64", "data.limit_val=60",
        "evaluation=wpgd", "evaluation.curve=[]", "evaluation.attack_options.pgd={steps: 10, step_size: 0.2}",
        "evaluation.attack_options.wpgd={steps: 10, step_size: 0.2}", *LOCALLY, "hydra.run.dir=run",
    )  # fmt: skip
    assert (result.status, result.err) == (0, "")
    records = read(Path("run/records.json"))
    before = {r.attack: r for r in records if r.stage == "before"}
    assert before["none"].n == 846
    assert before["none"].accuracy == 580 / 846
    assert 0.54 <= before["pgd"].accuracy <= 0.56
    assert before["wpgd"].accuracy < before["none"].accuracy
    assert before["wpgd"].distance <= 2 / 255 * (1 + 1e-5)
    assert {r.checkpoint for r in records if r.stage == "before"} == {str(weights)}
    assert [r.stage for r in records if r.attack == "none"] == ["before", "epoch", "after"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:wpgd. every gradient is zero")  # fresh weights classify nothing
def test_a_network_of_the_zoo_trains(tmp_path):
    name = "Rebuffi2021Fixing_R18_ddpm"
    network = models.build.architecture(zoo.resolve(name, "cifar10", "Linf"))
    place = tmp_path / "zoo" / "cifar10" / "Linf" / f"{name}.pt"
    place.parent.mkdir(parents=True)
    torch.save(network.state_dict(), place)
    few = ["data.limit_train=8", "data.limit_val=5", "data.limit_test=5", "data.batch_size=4"]
    short = [f"{EVALUATION}.{kind}.steps=2" for kind in ("pgd", "wpgd")]
    result = train(
        "model=robustbench", f"model.name={name}", "model.root=zoo", "data=digits", "trainer.max_epochs=1",
        "attack.steps=2", "evaluation=wpgd", "evaluation.curve=[]", *few, *short, *LOCALLY, "hydra.run.dir=run",
    )  # fmt: skip
    assert (result.status, result.err) == (0, "")
    records = read(Path("run/records.json"))
    assert {r.network for r in records} == {name}
    trained = torch.load(Path("run/checkpoints/last.ckpt"), weights_only=True)["state_dict"]
    before = network.state_dict()
    changed = {key for key in before if not torch.equal(before[key], trained[f"network.{key}"])}
    parameters = {key for key, _ in network.named_parameters() if network.get_parameter(key).requires_grad}
    assert parameters <= changed
    assert any("running_mean" in key for key in changed)
