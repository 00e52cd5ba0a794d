"""The folder of a run can't be spoiled: what is refused changes nothing, in any folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from sampled import sampled
from script_runner import contents, run_script
from starters import QUICK, ROOT, SCRIPT

from wdat.cli.run_folder import RunFolder, create, remove_empty
from wdat.errors import SettingError
from wdat.records import read

EVALUATE = ROOT / "evaluate.py"
TRAINED = [*QUICK, "pretrain.max_epochs=0", "data.limit_train=32"]
EVALUATED = [
    "data=digits", "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1", "data.limit_test=20",
    "threat.delta=0.002", "curve=[]", "attacks=[fgsm]", "losses=[ce]",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training and an evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    for script, settings, name in ((SCRIPT, TRAINED, "training"), (EVALUATE, EVALUATED, "evaluation")):
        result = run_script(script, *settings, f"hydra.run.dir={folder / name}")
        assert result.status == 0, result.err
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A working folder with copies of both, and a training whose checkpoints were deleted."""
    folder = tmp_path / "here"
    shutil.copytree(finished, folder)
    shutil.copytree(folder / "training", folder / "without")
    shutil.rmtree(folder / "without" / "checkpoints")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return folder


REFUSED = {
    "another run in its folder": (SCRIPT, [*TRAINED, "threat.delta=0.3", "hydra.run.dir=training"], "holds a run"),
    "an evaluation in a training": (EVALUATE, [*EVALUATED, "hydra.run.dir=training"], "holds a run"),
    "an evaluation among its records": (EVALUATE, [*EVALUATED, "hydra.run.dir=without"], "no checkpoint any more"),
    "an evaluation of a resumed training": (EVALUATE, ["resume=training"], "use train.py resume=training"),
    "a training in an evaluation": (SCRIPT, [*TRAINED, "hydra.run.dir=evaluation"], "holds an evaluation"),
    "another evaluation": (EVALUATE, [*EVALUATED, "hydra.run.dir=evaluation"], "holds an evaluation"),
    "a training of a resumed evaluation": (SCRIPT, ["resume=evaluation"], "use evaluate.py resume=evaluation"),
    "where the checkpoints were deleted": (SCRIPT, [*TRAINED, "hydra.run.dir=without"], "no checkpoint any more"),
    "resumed without checkpoints": (SCRIPT, ["resume=without"], "start it again"),
    "another network": (SCRIPT, ["resume=training", "model=cnn_a"], "model.name=cnn_a (it was small_cnn)"),
    "another optimiser": (
        SCRIPT,
        ["resume=training", "optimizer._target_=torch.optim.Adam", "~optimizer.momentum", "~optimizer.nesterov"],
        "optimizer._target_=torch.optim.Adam (it was torch.optim.SGD) and 2 more",
    ),
    "a setting of the method": (SCRIPT, ["resume=training", "threat.delta=0.2"], "threat.delta=0.2 (it was 0.1)"),
    "a new setting": (SCRIPT, ["resume=training", "+attack.momentum=1"], "attack.momentum=1 (it was nothing)"),
    "an allowed one with a bad value": (SCRIPT, ["resume=training", "trainer.precision=no"], "trainer.precision=no"),
    "another network measured": (EVALUATE, ["resume=evaluation", "model.seed=5"], "model.seed"),
    "a sweep of resumed runs": (SCRIPT, ["-m", "resume=training", "seed=0,1"], "--multirun"),
    "a bad setting": (SCRIPT, [*TRAINED, "attack.steps=0"], "attack.steps"),
    "a bad setting, named": (SCRIPT, [*TRAINED, "attack.steps=0", "hydra.run.dir=new/deep"], "attack.steps"),
    "a bad setting, measured": (EVALUATE, [*EVALUATED, "deltas=[x]"], "deltas"),
    "an old name of a setting": (EVALUATE, [*EVALUATED, "device=cpu"], "trainer.accelerator=cpu"),
    "a precision": (EVALUATE, [*EVALUATED, "trainer.precision=bf16-mixed"], "float32"),
    "several devices in a sweep": (SCRIPT, ["-m", *TRAINED, "trainer.devices=2", "seed=0"], "in a sweep"),
}  # fmt: skip


@pytest.mark.parametrize("name", sampled(REFUSED, 3))
def test_a_refused_command_changes_nothing(here, name):
    script, words, said = REFUSED[name]
    before = contents(here)
    result = run_script(script, *words)
    assert result.status == 2, result.out + result.err
    assert said in result.err
    assert "Traceback" not in result.out + result.err
    left = contents(here)
    if "-m" in words:  # Hydra's own file of a sweep
        left = {name: text for name, text in left.items() if not name.startswith("multirun")}
    assert left == before


def test_what_hydra_refuses_leaves_no_folder(here):
    before = contents(here)
    assert run_script(SCRIPT, "data=nothing", "hydra.run.dir=new").status == 2
    assert run_script(SCRIPT, *TRAINED, "seed=0,1").status == 2
    assert run_script(SCRIPT, *TRAINED, "~attack.nothing").status == 1
    assert contents(here) == before


@pytest.mark.long
def test_a_refused_job_of_a_sweep_keeps_the_run_that_is_there(here):
    shutil.copytree("training", "sweep/0")
    before = contents(here / "sweep" / "0")
    result = run_script(EVALUATE, "-m", *EVALUATED, "seed=0,1", "hydra.sweep.dir=sweep")
    assert result.status == 2
    assert "holds a run" in result.err
    assert contents(here / "sweep" / "0") == before
    assert (here / "sweep" / "1" / "records.json").exists()


def test_a_folder_in_which_another_process_writes_is_refused(here):
    before = contents(here)
    handle = os.open("evaluation", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        result = run_script(EVALUATE, "resume=evaluation", "attacks=[fgsm,pgd]")
    finally:
        os.close(handle)
    assert (result.status, contents(here)) == (2, before)
    assert "another process is writing" in result.err


@pytest.mark.long
def test_what_a_resumed_run_changes_is_told_and_remembered(here):
    result = run_script(SCRIPT, "resume=training", "trainer.max_epochs=2")
    assert result.status == 0, result.err
    assert "resume  trainer.max_epochs=2 (it was 1)\n" in result.out
    assert OmegaConf.load("training/.hydra/config.yaml").trainer.max_epochs == 2
    assert [r.epoch for r in read(Path("training/records.json")) if r.attack == "none"] == [None, 1, 2, None]


@pytest.mark.long
def test_files_may_have_moved(here):
    file = here / "weights" / "small.pt"
    file.parent.mkdir()
    state = torch.load("training/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    torch.save({key.removeprefix("network."): value for key, value in state.items()}, file)
    assert run_script(EVALUATE, *EVALUATED, f"model.checkpoint={file}", "hydra.run.dir=moved").status == 0
    file.parent.rename("elsewhere")
    result = run_script(EVALUATE, "resume=moved", "model.checkpoint=elsewhere/small.pt", "attacks=[fgsm,pgd]")
    assert result.status == 0, result.err
    shutil.copy("elsewhere/small.pt", "elsewhere/other.pt")
    assert "model.checkpoint" in run_script(EVALUATE, "resume=moved", "model.checkpoint=elsewhere/other.pt").err


@pytest.fixture
def mine(here):
    """A configuration of the user's own, in a folder of its own."""
    (here / "my conf").mkdir()
    (here / "my conf" / "mine.yaml").write_text("defaults: [evaluate, _self_]\nseed: 7\n")
    return here


def test_a_resumed_run_remembers_its_configuration(mine):
    began = run_script(EVALUATE, "-cd", "my conf", "-cn", "mine", *EVALUATED, "hydra.run.dir=own")
    assert began.status == 0, began.err
    result = run_script(EVALUATE, "resume=own", "attacks=[fgsm,pgd]")
    assert result.status == 0, result.err
    assert [(r.attack, r.seed) for r in read(mine / "own" / "records.json")] == [("none", 7), ("fgsm", 7), ("pgd", 7)]
    shown = run_script(EVALUATE, "resume=own", "--cfg", "job")
    assert OmegaConf.create(shown.out).seed == 7, shown.err
    again = run_script(EVALUATE, "resume=own", "--config-dir", "my conf", "losses=[ce,redlr]")
    assert again.status == 0, again.err
    assert len(read(mine / "own" / "records.json")) == 6


@pytest.mark.long
def test_a_job_of_a_sweep_in_a_configuration_is_resumed_alone(mine):
    sweep = "  mode: MULTIRUN\n  sweep: {dir: swept}\n  sweeper: {params: {seed: '3,4'}}\n"
    (mine / "my conf" / "swept.yaml").write_text(f"defaults: [mine, _self_]\nhydra:\n{sweep}")
    began = run_script(EVALUATE, "-cd", "my conf", "-cn", "swept", *EVALUATED)
    assert began.status == 0, began.err
    result = run_script(EVALUATE, "resume=swept/1", "attacks=[fgsm,pgd]")
    assert result.status == 0, result.err
    found = [[(r.attack, r.seed) for r in read(mine / "swept" / job / "records.json")] for job in "01"]
    assert found == [[("none", 3), ("fgsm", 3)], [("none", 4), ("fgsm", 4), ("pgd", 4)]]


def test_flags_may_stand_between_overrides(mine):
    words = [*EVALUATED[:3], "--config-dir", "my conf", *EVALUATED[3:], "-cn", "mine", "hydra.run.dir=own"]
    assert run_script(EVALUATE, *words).status == 0
    assert {r.seed for r in read(mine / "own" / "records.json")} == {7}


@pytest.mark.parametrize(
    "flags", sampled([["hydra.run.dir='same/${now:%Y}'"], ["-m", "hydra.sweep.dir='same/${now:%Y}'"]], 2)
)
def test_runs_of_the_same_moment_have_folders_of_their_own(here, flags):
    for seed in (1, 2):
        assert run_script(EVALUATE, *EVALUATED, f"seed={seed}", *flags).status == 0
    found = {next(f.parents[-2].iterdir()).name: read(f) for f in Path("same").rglob("records.json")}
    seeds = [{r.seed for r in read(f)} for f in sorted(Path("same").rglob("records.json"))]
    assert found
    assert seeds == [{1}, {2}]
    names = sorted(f.name for f in Path("same").iterdir())
    assert names[1] == f"{names[0]}_2"


@pytest.mark.long
def test_home_is_the_users(here, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for word in ("hydra.run.dir=~/run1", "hydra.run.dir='~/run2'"):
        assert run_script(EVALUATE, *EVALUATED, word).status == 0
    assert run_script(EVALUATE, "resume=~/run1", "attacks=[fgsm,pgd]").status == 0
    assert sorted(f.name for f in (tmp_path / "home").iterdir()) == ["run1", "run2"]
    assert not list(here.rglob("~*"))


@pytest.mark.long
@pytest.mark.parametrize("stages", [["before"], ["before", "epoch"]])
def test_a_run_that_has_no_checkpoint_to_resume_may_begin_again(here, stages):
    records = json.loads((here / "without" / "records.json").read_text())
    (here / "without" / "records.json").write_text(json.dumps([r for r in records if r["stage"] in stages]))
    (here / "without" / "checkpoints").mkdir()
    shutil.copy("training/checkpoints/best.ckpt", "without/checkpoints")  # after it the disk was full
    result = run_script(SCRIPT, *TRAINED, "hydra.run.dir=without")
    assert result.status == 0, result.err
    assert [r.stage for r in read(here / "without" / "records.json")] == ["before"] * 4 + ["epoch"] * 4 + ["after"] * 4


def test_an_error_before_anything_was_saved_puts_the_folder_back(here):
    cfg = OmegaConf.load("training/.hydra/config.yaml")
    cfg.resume, before = "training", contents(here)
    hydra = OmegaConf.load("training/.hydra/hydra.yaml")

    def fail(saves):
        with RunFolder(Path("training"), "train").opened(cfg, hydra):
            assert OmegaConf.load("training/.hydra/config.yaml").resume == "training"
            if saves:
                Path("training/records.json").write_text("[]")
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail(saves=False)
    assert contents(here) == before
    with pytest.raises(KeyError):
        fail(saves=True)
    assert OmegaConf.load("training/.hydra/config.yaml").resume == "training", "which belongs to what was saved"


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(SettingError, match=r"hydra\.run\.dir=.*file.* can't be written"):
            create(folder)
    assert contents(tmp_path) == {"file": b"in the way"}


def test_folders_are_made_and_taken_back(tmp_path):
    (tmp_path / "there").mkdir()
    folder, made = create(tmp_path / "there" / "a" / "b")
    assert made == [tmp_path / "there" / "a", folder]
    assert create(folder, exclusive=True)[0] == tmp_path / "there" / "a" / "b_2"
    assert create(folder, exclusive=True)[0] == tmp_path / "there" / "a" / "b_3"
    assert create(folder) == (folder, [])
    remove_empty(made)
    assert not folder.exists()
    assert (tmp_path / "there" / "a").exists()
