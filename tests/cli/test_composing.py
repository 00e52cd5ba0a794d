"""What can't be composed is told by the setting at fault, with what to type."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sampled import sampled
from script_runner import contents, run_script
from starters import QUICK, ROOT, SCRIPT

from wdat.cli.arguments import CommandLine
from wdat.cli.composing import check_keys, check_single
from wdat.errors import SettingError, quoted

EVALUATE = ROOT / "evaluate.py"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(tmp_path, *words, script=SCRIPT):
    """The line that a command ends with, which has changed nothing."""
    before = contents(tmp_path)
    result = run_script(script, *words)
    assert (result.status, result.out) == (2, "")
    assert contents(tmp_path) == before
    (line,) = result.err.splitlines()
    return line


PATHS = [
    "epoch=3-step=100.ckpt", "runs/lr=0.1,wd=5e-4/best.ckpt", "a[1].pt", "a,b.pt", "a~b.pt", "{x}.pt", "(copy).pt",
    "it's.pt", "C:\\nets\\a=b.pt", "a\\'b.pt", "$HOME=x.pt",
]  # fmt: skip


@pytest.mark.parametrize("path", sampled(PATHS, 5))
def test_a_path_that_hydra_takes_apart_is_told_how_to_quote(tmp_path, path):
    line = refused(tmp_path, *QUICK, f"model.checkpoint={path}")
    typed = quoted("model.checkpoint", path)
    assert typed in line
    echoed = subprocess.run(["/bin/sh", "-c", f"printf %s {typed}"], capture_output=True, text=True, check=True).stdout
    quoted_path = refused(tmp_path, *QUICK, echoed)  # what the shell makes of the advice
    assert "there is no file" in quoted_path
    assert f"{path} (model.checkpoint)" in quoted_path


def test_a_path_with_a_space_needs_the_shells_quotes_alone(tmp_path):
    assert "there is no file" in refused(tmp_path, *QUICK, "model.checkpoint=my net.pt")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    sampled(
        [
            (SCRIPT, ["seed"], "seed is no setting: write key=value"),
            (SCRIPT, ["model=small_cn"], "did you mean small_cnn"),
            (SCRIPT, ["objective=_smoothing,"], "objective"),
            (SCRIPT, ["objective=wdta"], "did you mean wdat"),
            (SCRIPT, ["logger=null"], "write logger=none"),
            (SCRIPT, ["data=null"], "known: cifar10, cifar100, digits"),
            (SCRIPT, ["threat.detla=0.1"], "did you mean threat.delta"),
            (SCRIPT, ["data.steps=4"], "did you mean attack.steps"),
            (SCRIPT, ["seed=0,1"], "-m runs each of them"),
            (SCRIPT, ["certify=crown"], "certify is no setting of this command"),
            (EVALUATE, ["objective=wdat"], "objective is no setting of this command"),
            (EVALUATE, ["delta=[0.1]"], "did you mean deltas"),
            (EVALUATE, ["attacks=pgd,wpgd"], '"attacks=[pgd,wpgd]" is a list'),
            (EVALUATE, ["--config-dir", "nowhere"], "--config-dir=nowhere: there is no such folder"),
            (EVALUATE, ["data=digits", "model=custom"], "model.network._target_ must be set"),
            (EVALUATE, ["data=digits", "model=robustbench"], "model.name must be set"),
            (
                EVALUATE,
                ["data=digits", "model=custom", "model.network._target_=script_runner"],
                "is a module: name a class",
            ),
            (EVALUATE, ["data=digits", "model=custom", "model.network._target_=my.Net"], "my.Net can't be imported"),
            (EVALUATE, ["data=npz", "data.path=2024"], "data.path=2024: no such file"),
            (EVALUATE, ["data=folder", "data.root=7"], "data.root=7 has no class folders"),
            (EVALUATE, ["data=digits", "model=small_cnn", "model.checkpoint=1e-3"], "there is no file"),
            (EVALUATE, ["data=digits", "model=small_cnn", "certified=true"], "certified=true: no such file"),
            (
                EVALUATE,
                ["data=digits", "data.num_classes=2", "losses=[ce,dlr]"],
                "losses=dlr needs at least three classes",
            ),
            (EVALUATE, ["data.balanced=true"], "every limit is drawn by class"),
        ],
        4,
    ),
)
def test_what_is_not_there_is_told_with_what_is(tmp_path, script, words, said):
    assert said in refused(tmp_path, *words, script=script)


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("Rade2021Helper_R18_ddpm", "model=robustbench model.name=Rade2021Helper_R18_ddpm"),
        ("Salman2020Do_R18", "model.name=Salman2020Do_R18 model.dataset=imagenet model.threat_model=Linf"),
        ("Rade2021Helpr_R18_ddpm", "model=robustbench model.name=NAME"),
    ],
)
def test_a_network_of_the_zoo_that_is_given_as_a_model_points_to_robustbench(tmp_path, name, typed):
    assert typed in refused(tmp_path, f"model={name}", script=EVALUATE)


def test_settings_that_are_gone_name_what_takes_their_place():
    line = CommandLine.parse(["device=cpu"])
    with pytest.raises(SettingError, match=r"trainer\.accelerator=cpu"):
        check_keys(line, "evaluate")
    check_keys(CommandLine.parse(["seed=1"]), "train")


def test_several_values_in_quotes_or_brackets_are_one():
    check_single(CommandLine.parse(["attacks=[pgd,wpgd]", "data.path='a,b.npz'", "seed=1"]))
    with pytest.raises(SettingError, match="names several values"):
        check_single(CommandLine.parse(["seed=1", "seed=range(3)"]))


def test_flags_may_stand_between_overrides(tmp_path):
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text((ROOT / "conf" / "model" / "small_cnn.yaml").read_text())
    words = ["data=digits", "--config-dir", str(folder.parent), "model=mine", "--cfg", "job", "model.num_classes=7"]
    shown = run_script(EVALUATE, *words)
    assert (shown.status, shown.err) == (0, "")
    assert "num_classes: 7" in shown.out
    assert "name: small_cnn" in shown.out


def test_nothing_slow_is_imported_to_refuse_a_choice():
    code = "import sys; sys.argv[1:] = ['objective=wdta']\nfrom wdat.cli.app import run\n"
    said = "try:\n    run('train')\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code + said], cwd=ROOT, check=True, capture_output=True)
