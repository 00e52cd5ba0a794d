"""The command `wdat`: what it says, how it starts, and what a job gives to a sweeper."""

from __future__ import annotations

import ast
import io
import math
import os
import subprocess
import sys
import sysconfig
import venv

import keeper
import pytest
from process_runner import start
from sampled import sampled
from script_runner import contents, run_script
from starters import QUICK, ROOT, SCRIPT

import wdat
from wdat import cli, terminal
from wdat.cli.app import figure
from wdat.records import Record, read

EVALUATE = ROOT / "evaluate.py"
EVALUATED = [
    "data=digits", "model=small_cnn", "trainer.accelerator=cpu", "trainer.devices=1", "data.limit_test=20",
    "threat.delta=0.002", "attacks=[fgsm]", "losses=[ce]",
]  # fmt: skip


def wdat_command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["wdat", *words])
    cli.main()
    return capsys.readouterr().out


def test_the_version_is_the_packages(monkeypatch, capsys):
    assert wdat_command(monkeypatch, capsys, "--version") == f"wdat {wdat.__version__}\n"


def test_every_command_is_explained(monkeypatch, capsys):
    usage = wdat_command(monkeypatch, capsys)
    assert usage == wdat_command(monkeypatch, capsys, "--help")
    assert all(f"\n  {command} " in usage for command in cli.COMMANDS)
    for command in cli.COMMANDS[2:]:
        with pytest.raises(SystemExit) as left:
            wdat_command(monkeypatch, capsys, command, "--help")
        assert left.value.code == 0
        assert f"wdat {command}" in capsys.readouterr().out or command == "collect"


def test_an_unknown_command_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        wdat_command(monkeypatch, capsys, "trian")
    assert left.value.code == 2
    assert "did you mean train" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "without"), [(SCRIPT, []), (EVALUATE, ["objective", "logger", "callbacks"])])
def test_the_help_lists_what_can_be_chosen(script, without):
    shown = run_script(script, "--help")
    assert shown.status == 0, shown.err
    choices = shown.out.partition("== Choices: group=name ==\n")[2].partition("\n==")[0]
    groups = dict(line.split(": ") for line in choices.split("\n") if line)
    assert {"model", "data", "threat", "trainer"} <= set(groups)
    assert not set(without) & set(groups)
    assert groups["data"].startswith("cifar10, cifar100, digits")
    assert not [name for names in groups.values() for name in names.split(", ") if name.startswith("_")]


# --- starting ---------------------------------------------------------------------------------------------------------

SLOW = (
    "torch",
    "scipy",
    "scipy.stats",
    "wandb",
    "robustbench",
    "matplotlib",
    "pandas",
    "jinja2",
    "sklearn",
    "lightning",
)


def imported(*codes):
    """Which of the slow packages are imported after each of some pieces of code, which run in one process."""
    said = f"\nimport sys; print([name for name in {SLOW} if name in sys.modules], file=sys.stderr)\n"
    code = "".join(code + said for code in codes)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ast.literal_eval(line) for line in done.stderr.splitlines()[-len(codes) :]]


def test_the_package_imports_nothing_slow_before_it_is_used():
    uses = ["import wdat", "wdat.attack, wdat.ThreatModel, wdat.Record, wdat.SettingError", "wdat.evaluate"]
    first, attacks, evaluation = imported(*uses)
    assert (first, attacks) == ([], ["torch"])
    assert not {"wandb", "robustbench", "pandas", "sklearn"} & set(evaluation)
    assert set(wdat.__all__) <= set(dir(wdat)) | set(wdat._HOMES)
    assert all(getattr(wdat, name) is not None for name in wdat.__all__)


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_the_help_is_shown_before_anything_slow_is_imported(script):
    code = "import sys; sys.argv[1:] = ['--help']\nfrom wdat.cli.app import run\n"
    assert imported(f"{code}try:\n    run({script!r})\nexcept SystemExit: pass") == [[]]


@pytest.mark.long
def test_any_terminal_and_a_notebooks_environment_do(tmp_path):
    odd = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://no_such.backend"}
    found = start(EVALUATE, *EVALUATED, "hydra.run.dir=run", folder=tmp_path, **odd)
    assert (found.status, found.err) == (0, "")
    assert "?" in found.out  # for W₂ and ≤


def test_letters_that_a_terminal_lacks_are_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    terminal.prepare_environment()
    print("Υ = 3", flush=True)
    assert raw.getvalue() == b"? = 3\n"
    assert "MPLBACKEND" not in os.environ


def test_secrets_are_known_by_their_names():
    values = {"logger": {"api_key": "x", "APIKEY": "x", "tokens": ["x"], "entity": "me", "password": None}, "seed": 1}
    hidden = {"api_key": "***", "APIKEY": "***", "tokens": ["***"], "entity": "me", "password": None}
    assert terminal.without_secrets(values) == {"logger": hidden, "seed": 1}


# --- figures ----------------------------------------------------------------------------------------------------------


def record(stage, attack, accuracy, p=2.0, delta=0.1, epoch=None):
    return Record(
        stage=stage, attack=attack, accuracy=accuracy, p=p, delta=delta, epoch=epoch, network="net", checkpoint="",
        data="digits", split="val", options={}, loss="ce", norm="linf", n=10, set_size=10, accuracy_low=0,
        accuracy_high=1, loss_mean=None, distance=0, seconds=0, seed=0, device="cpu",
    )  # fmt: skip


def test_a_training_gives_the_distributional_accuracy_of_its_best_epoch():
    records = [record("before", "wpgd", 0.9)]
    for epoch, accuracies in ((1, (0.5, 0.4, 0.3)), (2, (0.2, 0.6, 0.35)), (3, (0.5, 0.6, 0.2))):
        for attack, p, accuracy in zip(("pgd", "wpgd", "knapsack"), (math.inf, 2.0, 2.0), accuracies, strict=True):
            records.append(record("epoch", attack, accuracy, p, epoch=epoch))
    assert figure(records) == 0.35
    pointwise = [record("epoch", "pgd", 0.1 * epoch, math.inf, epoch=epoch) for epoch in (1, 2)]
    assert figure(pointwise) == 0.2


def test_an_evaluation_gives_the_knapsack_or_the_strongest_at_the_first_budget():
    found = [record("evaluate", "none", 0.9, delta=0), record("evaluate", "pgd", 0.3, math.inf)]
    found += [record("evaluate", "wpgd", 0.4), record("evaluate", "wpgd", 0.1, delta=0.2)]
    assert figure(found) == 0.3
    assert figure([*found, record("evaluate", "knapsack", 0.35)]) == 0.35
    assert figure(found[:1]) is None


@pytest.mark.parametrize(
    ("script", "settings"), sampled([(EVALUATE, EVALUATED), (SCRIPT, [*QUICK, "pretrain.max_epochs=0"])], 2)
)
def test_a_sweeper_is_given_the_figures(tmp_path, monkeypatch, script, settings):
    monkeypatch.chdir(tmp_path)
    keeper.RETURNED.clear()
    keep = "+hydra.callbacks.keep._target_=keeper.Keep"
    result = run_script(script, "-m", *settings, "seed=0,-1" if script is SCRIPT else "batch_size=5,0", keep)
    assert result.status == 2
    good, bad = keeper.RETURNED
    assert math.isnan(bad)
    (records,) = (read(file) for file in tmp_path.rglob("records.json"))
    assert good == figure(records)
    assert 0 <= good <= 1


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path):
    """The command `wdat` of a wheel that was installed into a fresh environment, which sees this one's other packages.

    The `.pth` files of that one, such as an editable `wdat`'s, don't count.
    """
    build = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    source, fresh = tmp_path / "source", tmp_path / "fresh"
    source.mkdir()
    for name in ("wdat", "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)

    def run(*words, folder=source):
        done = subprocess.run([str(w) for w in words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    wheel = run(sys.executable, "-W", "ignore", "-c", build, tmp_path).splitlines()[-1]
    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    others = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    (packages,) = fresh.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(dict.fromkeys(others)) + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", tmp_path / wheel)
    where = run(python, "-c", "import wdat; print(wdat.__file__)", folder=tmp_path)
    assert where.strip() == str(packages / "wdat" / "__init__.py")
    return fresh / "bin" / "wdat"


@pytest.mark.long
def test_an_installed_wheel_trains_in_an_empty_folder(tmp_path, command):
    empty = tmp_path / "empty"
    empty.mkdir()

    def wdat_of(*words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run([command, *words], cwd=empty, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    assert wdat_of("--version") == f"wdat {wdat.__version__}\n"
    assert contents(empty) == {}
    wdat_of("train", *QUICK, "trainer.devices=2")
    (file,) = empty.rglob("records.json")
    assert {r.commit for r in read(file)} == {None}
    assert "| clean " in wdat_of("collect", str(file))
