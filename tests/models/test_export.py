"""Export: what RobustBench's own class loads, and the card made from records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from script_runner import run_script
from torch import Tensor, nn

from wdat import records
from wdat.cli import models as command
from wdat.errors import SettingError
from wdat.models import build, load_network, zoo
from wdat.models.card import Origin, card
from wdat.models.export import export
from wdat.records import Record

R18 = "Rebuffi2021Fixing_R18_ddpm"
ROOT = Path(__file__).parents[2]


def record(**changes: Any) -> Record:
    """A clean record after training."""
    values: dict[str, Any] = {
        "stage": "after", "network": R18, "checkpoint": "checkpoints/best.ckpt", "data": "cifar10", "split": "test",
        "attack": "none", "options": {}, "loss": "ce", "p": 2.0, "norm": "linf", "delta": 0.0, "n": 1000,
        "set_size": 1000, "accuracy": 0.83456, "accuracy_low": 0.8, "accuracy_high": 0.9, "loss_mean": 0.5,
        "distance": 0.0, "seconds": 1.0, "seed": 3, "device": "cpu", "versions": {"wdat": "0.1.0"},
    }  # fmt: skip
    return Record(**{**values, **changes})


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a run as `train.py` leaves it."""

    def make(network: nn.Module, prefix: str = "network.", **model: Any) -> Path:
        run = tmp_path / "run"
        config = {
            "seed": 0,
            "data": {"source": "cifar10", "num_classes": 10},
            "model": {
                "_target_": "wdat.models.load_network", "num_classes": "${data.num_classes}", "checkpoint": None,
                "seed": "${seed}", **model,
            },
            "threat": {"p": 2, "norm": "linf", "delta": "8/255"},
            "trainer": {"default_root_dir": "${hydra:runtime.output_dir}"},
        }  # fmt: skip
        (run / ".hydra").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(config), run / ".hydra" / "config.yaml")
        (run / "checkpoints").mkdir()
        state = {prefix + key: value for key, value in network.state_dict().items()}
        current = {key: torch.zeros_like(value) for key, value in state.items()}  # under weight averaging
        content = {"state_dict": state, "current_model_state": current, "epoch": 1, "global_step": 7}
        content["pytorch-lightning_version"] = "2.6.0"
        torch.save(content, run / "checkpoints" / "best.ckpt")
        attacked = record(attack="pgd", p=float("inf"), delta=8 / 255, accuracy=0.5)
        measured = [replace(record(), stage="before", accuracy=0.1), record(), attacked]
        records.write(run / "records.json", [replace(r, network=model["name"]) for r in measured])
        return run

    return make


@pytest.fixture
def zoo_run(run_of: Callable[..., Path]) -> Path:
    torch.manual_seed(5)
    network = build.architecture(zoo.resolve(R18, "cifar10", "Linf"))
    return run_of(network, "network._orig_mod.", name=R18, dataset="cifar10", threat_model="Linf", root="models")


def test_robustbench_loads_it_strictly(zoo_run: Path, images: Tensor, tmp_path: Path) -> None:
    done = export(zoo_run)
    assert done.weights == zoo_run / "export" / f"{R18}-wdat.pt"
    torch.manual_seed(5)
    trained = build.architecture(zoo.resolve(R18, "cifar10", "Linf")).eval()
    theirs = zoo.resolve(R18, "cifar10", "Linf").settings["model"]().eval()
    assert type(theirs).__module__.startswith("robustbench.")
    theirs.load_state_dict(torch.load(done.weights, weights_only=True), strict=True)
    assert torch.allclose(theirs(images), trained(images), atol=1e-5)
    # By RobustBench's own loader too, from where it looks.
    place = tmp_path / "zoo" / "cifar10" / "Linf" / f"{R18}.pt"
    place.parent.mkdir(parents=True)
    shutil.copy(done.weights, place)
    loaded = zoo.robustbench().load_model(R18, str(tmp_path / "zoo"), "cifar10", "Linf")
    assert torch.equal(loaded(images), theirs(images))
    assert torch.equal(load_network(R18, checkpoint=done.weights)(images), trained(images))


def test_the_card(zoo_run: Path) -> None:
    done = export(zoo_run, zoo_run / "elsewhere")
    assert done.card == zoo_run / "elsewhere" / f"{R18}-wdat.json"
    assert json.loads(done.card.read_text()) == {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": None,
        "architecture": "PreActResNet-18",
        "eps": "8/255",
        "clean_acc": "83.46",
        "reported": None,
        "footnote": f"Fine-tuned from {R18} with wdat 0.1.0 (W_2, linf, δ = 8/255). Accuracies: clean on 1000 test "
        "images of cifar10, seed 3.",
        "autoattack_acc": None,
        "knapsack_acc": None,
    }
    said = " ".join(done.notes)
    for word in ("link, name, authors, venue, reported: null", "autoattack_acc: null", "additional_data: null"):
        assert word in said
    assert "robustbench has no" not in said


def test_evaluations_fill_the_card(zoo_run: Path, tmp_path: Path) -> None:
    common = {"stage": "evaluate", "checkpoint": str(zoo_run / "checkpoints" / "best.ckpt"), "n": 500}
    found = [
        record(**common, accuracy=0.9),
        record(**common, attack="autoattack", p=float("inf"), delta=8 / 255, accuracy=0.5312),
        record(**common, attack="autoattack", p=float("inf"), delta=4 / 255, accuracy=0.7),
        record(**common, attack="autoattack", p=float("inf"), norm="l2", delta=8 / 255, accuracy=0.8),
        record(**common, attack="knapsack", delta=8 / 255, accuracy=0.3),
        record(**common, attack="knapsack", p=1.0, delta=8 / 255, accuracy=0.2),
    ]
    records.write(tmp_path / "evaluation" / "records.json", found)
    done = export(zoo_run, evaluations=[tmp_path / "evaluation"])
    values = json.loads(done.card.read_text())
    assert (values["clean_acc"], values["autoattack_acc"], values["knapsack_acc"]) == ("83.46", "53.12", "30.00")
    assert "clean on 1000 test images; AutoAttack on 500 test images; knapsack on 500" in values["footnote"]
    assert not any("autoattack_acc" in note or "knapsack" in note for note in done.notes)

    records.write(tmp_path / "evaluation" / "records.json", [replace(found[1], checkpoint="other.pt")])
    with pytest.raises(SettingError, match=r"are of other.pt \(--records\)"):
        export(zoo_run, evaluations=[tmp_path / "evaluation"])
    for change, fault in (
        ({"weights": "0"}, "weights that best.ckpt has no more"),
        ({"data": "npz:own"}, "data=npz:own"),
    ):
        records.write(tmp_path / "evaluation" / "records.json", [replace(found[1], **change)])
        with pytest.raises(SettingError, match=fault):
            export(zoo_run, evaluations=[tmp_path / "evaluation"])
    with pytest.raises(SettingError, match=r"there are no records .*nowhere.records.json \(--records\)"):
        export(zoo_run, evaluations=[tmp_path / "nowhere"])


def test_a_local_network(run_of: Callable[..., Path], images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    network = load_network("resnet2b", seed=4)
    run = run_of(network, name="resnet2b", checkpoint="start.pt")
    command.main(["export", str(run)])
    shown = capsys.readouterr().out
    assert "robustbench has no architecture resnet2b: only wdat loads these weights (model=resnet2b)" in shown
    assert f"weights {run / 'export' / 'resnet2b-wdat.pt'}" in shown
    values = json.loads((run / "export" / "resnet2b-wdat.json").read_text())
    assert (values["architecture"], values["footnote"][:29]) == ("resnet2b", "Fine-tuned from start.pt with")
    assert torch.equal(
        load_network("resnet2b", checkpoint=run / "export" / "resnet2b-wdat.pt")(images), network(images)
    )


def test_fresh_weights_saw_no_further_images() -> None:
    origin = Origin("small_cnn", "", True, "", "digits", "small_cnn", 2.0, "linf", 0.1, "0.1")
    values, reasons = card(origin, [])
    assert values["additional_data"] is False
    assert values["footnote"] == "Trained from fresh weights with wdat (W_2, linf, δ = 0.1). Accuracies: none."
    assert [reason.partition(":")[0] for reason in reasons][1:] == ["clean_acc", "autoattack_acc", "knapsack_acc"]
    values, _ = card(replace(origin, pool="0.7 of each batch from 1m"), [])
    assert values["additional_data"] is True
    assert "δ = 0.1 and 0.7 of each batch from 1m)" in values["footnote"]


def test_records_of_weights_that_trained_on_are_left_behind(zoo_run: Path) -> None:
    """A run of an older version measured again after it had gone on."""
    kept = records.read(zoo_run / "records.json")
    records.write(zoo_run / "records.json", [*kept, *(replace(r, accuracy=0.9) for r in kept if r.stage == "after")])
    assert json.loads(export(zoo_run).card.read_text())["clean_acc"] == "90.00"


def remove(name: str) -> Callable[[Path], object]:
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(text)


def elsewhere(run: Path) -> None:
    records.write(run / "records.json", [record(network="small_cnn", checkpoint="../other/best.ckpt")])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("."), r"there is no run .* \(RUN_DIR\)"),
        (remove(".hydra"), r"is no run of train.py \(RUN_DIR\)"),
        (write(".hydra/config.yaml", "model: ["), r"config.yaml is damaged"),
        (write(".hydra/config.yaml", "model: {name: small_cnn}"), r"config.yaml is damaged.*num_classes is missing"),
        (remove("records.json"), r"has no records after training.*resume="),
        (write("records.json", "[]"), r"has no records after training"),
        (write("records.json", "{"), r"records.json isn't a list of records"),
        (remove("checkpoints/best.ckpt"), r"has no checkpoint checkpoints/best.ckpt"),
        (write("checkpoints/best.ckpt", "PK"), r"best.ckpt is "),
        (elsewhere, r"has trained nothing .*'../other/best.ckpt'"),
        (write("export", "a file"), r"--out=.*export can't be written"),
    ],
)
def test_what_cannot_be_exported(spoil: Callable[[Path], object], message: str, run_of: Callable[..., Path]) -> None:
    run = run_of(load_network("small_cnn"), name="small_cnn")
    spoil(run)
    with pytest.raises(SettingError, match=message):
        export(run)
    assert not (run / "export").is_dir()


def test_other_networks_are_refused(run_of: Callable[..., Path]) -> None:
    run = run_of(load_network("small_cnn"), name="resnet2b")
    with pytest.raises(SettingError, match=r"best.ckpt doesn't fit SmallResNet"):
        export(run)
    shutil.rmtree(run)
    run = run_of(load_network("small_cnn"), name="tiny", _target_="my.network.load")
    with pytest.raises(SettingError, match=r"trained a network of your own, tiny .*wdat.models.load_checkpoint"):
        export(run)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:wpgd. every gradient is zero")
def test_a_real_run_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.py`, `evaluate.py` on its checkpoint, `export`: the card holds the records' figures."""
    monkeypatch.chdir(tmp_path)
    few = ["data.limit_test=20", "data=digits", "model=small_cnn", "threat.delta=0.1"]
    steps = [f"evaluation.attack_options.{kind}.steps=2" for kind in ("pgd", "wpgd")]
    trained = run_script(
        ROOT / "train.py", *few, *steps, "trainer.max_epochs=1", "attack.steps=2", "data.limit_train=32",
        "data.limit_val=8", "evaluation.curve=[]", "averaging=ema", "trainer.accelerator=cpu", "hydra.run.dir=run",
    )  # fmt: skip
    assert trained.status == 0, trained.err
    evaluated = run_script(
        ROOT / "evaluate.py", *few, "model.checkpoint=run/checkpoints/best.ckpt", "attacks=[knapsack]", "deltas=[0.1]",
        "losses=[ce]", "trainer.accelerator=cpu", "hydra.run.dir=evaluation",
    )  # fmt: skip
    assert evaluated.status == 0, evaluated.err
    done = export(Path("run"), evaluations=[Path("evaluation")])
    values = json.loads(done.card.read_text())
    after = [r for r in records.read(Path("run/records.json")) if (r.stage, r.attack) == ("after", "none")][-1]
    knapsack = [r for r in records.read(Path("evaluation/records.json")) if r.attack == "knapsack"][-1]
    assert values["clean_acc"] == f"{100 * after.accuracy:.2f}"
    assert values["knapsack_acc"] == f"{100 * knapsack.accuracy:.2f}"
    average = torch.load("run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    written = torch.load(done.weights, weights_only=True)
    assert all(torch.equal(average[f"network.{key}"], value) for key, value in written.items())
