"""The list of the zoo: outlines without memory, names of architectures, the command line."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from wdat.cli import models as command
from wdat.errors import SettingError
from wdat.models import build, listing, load_network, zoo
from wdat.models.labels import label

ARCHITECTURES = {  # as in RobustBench's own tables, or the name of the class
    ("Zhang2019Theoretically", "cifar10", "Linf"): ("WideResNet-34-10", 48_262_586),
    ("Rebuffi2021Fixing_106_16_cutmix_ddpm", "cifar10", "Linf"): ("WideResNet-106-16", 415_475_162),
    ("Ding2020MMA", "cifar10", "Linf"): ("WideResNet-28-4", 5_849_050),
    ("Rebuffi2021Fixing_R18_ddpm", "cifar100", "Linf"): ("PreActResNet-18", 12_594_596),
    ("Augustin2020Adversarial", "cifar10", "L2"): ("ResNet-50", 23_520_842),
    ("Bai2023Improving_edm", "cifar10", "Linf"): ("CompositeModelWrapper", 566_924_394),  # asks for a GPU
    ("Bai2024MixedNUTS", "imagenet", "Linf"): ("NonLinMixedClassifier", 394_489_329),
    ("Standard_R50", "imagenet", "Linf"): ("ResNet-50", 25_557_032),  # asks for weights
    ("Salman2020Do_50_2", "imagenet", "Linf"): ("WideResNet-50-2", 68_883_240),
    ("Chen2024Data_WRN_50_2", "imagenet", "Linf"): ("WideResNet-50-2", 68_883_240),
    ("Liu2023Comprehensive_Swin-B", "imagenet", "Linf"): ("swin_base_patch4_window7_224", 87_768_224),
    ("Debenedetti2022Light_XCiT-S12", "imagenet", "Linf"): ("Xcit", 26_253_304),
}


@pytest.mark.parametrize("which", ARCHITECTURES, ids="-".join)
def test_rows(which: tuple[str, str, str]) -> None:
    found = listing.row(zoo.resolve(*which))
    assert (found.architecture, found.parameters, found.fault) == (*ARCHITECTURES[which], "")
    assert (found.name, found.dataset, found.threat_model) == which


def test_alias_only_where_it_leads() -> None:
    entries = listing.chosen(part="rebuffi2021fixing_28_10")
    assert [(listing.row(e).alias, e.dataset, e.threat_model) for e in entries] == [
        ("Rebuffi2021", "cifar10", "Linf"), ("", "cifar10", "L2"), ("", "cifar100", "Linf"),
    ]  # fmt: skip
    assert [e.name for e in listing.chosen(part="zhang2019T")] == ["Zhang2019Theoretically"]


def test_outlines_have_the_shapes_of_the_network_and_little_memory() -> None:
    entry = zoo.resolve("Rebuffi2021Fixing_R18_ddpm", "cifar10", "Linf")
    outline, network = build.outline(entry), build.architecture(entry)
    assert {k: v.shape for k, v in outline.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    held = sum(p.numel() for p in outline.parameters() if p.device.type != "meta")
    assert held < 0.05 * sum(p.numel() for p in network.parameters())
    assert all(p.device.type == "cpu" for p in network.parameters())
    assert torch.empty(2**20).device.type == "cpu"


def test_label_of_a_network_of_ones_own() -> None:
    class Own(nn.Module):
        pass

    assert label(Own()) == "Own"
    assert label(nn.Sequential(nn.Identity(), load_network("preact_resnet18"))) == "PreActResNet-18"


def test_what_is_chosen() -> None:
    assert len(listing.chosen()) > 200
    assert {(e.dataset, e.threat_model) for e in listing.chosen("cifar10", "L2")} == {("cifar10", "L2")}
    with pytest.raises(SettingError, match=r"no networks for cifar100, L2 \(--dataset, --threat\)"):
        listing.chosen("cifar100", "L2")
    with pytest.raises(SettingError, match=r"unknown network 'Wang2032' \(NAME\): did you mean Wang2023"):
        listing.chosen(part="Wang2032")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> zoo.ZooEntry:
    """A network that can't be built, with a reason that would steer a terminal."""

    def missing() -> nn.Module:
        raise RuntimeError("Unknown model \x1b[31m(xcit_of_old)")

    part = importlib.import_module("robustbench.model_zoo.cifar10").l2
    monkeypatch.setitem(part, "Broken2024", {"model": missing, "gdrive_id": "the-id"})
    return zoo.resolve("Broken2024", "cifar10", "L2")


def test_what_cannot_be_built_says_why(broken: zoo.ZooEntry) -> None:
    rows = [listing.row(broken), listing.row(zoo.resolve("Ding2020MMA", "cifar10", "L2"))]
    assert rows[0].parameters is None
    assert "can't be built (model.name): Unknown model" in rows[0].fault
    shown = io.StringIO()
    Console(file=shown, width=70).print(listing.table(rows))
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= 70
    assert "\x1b" not in text + listing.tsv(rows)
    for word in ("cifar10, L2: 2 networks", "Ding2020MMA", "WideResNet-28-4", "5.8 M", "1 can't be built here"):
        assert word in text
    assert "Unknown model" in " ".join(text.split())


def test_piped_it_is_one_line_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["Rebuffi2021Fixing_R18", "--dataset=cifar10"])
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "alias\tname\tarchitecture\tparameters\tdataset\tthreat_model\tfault",
        "\tRebuffi2021Fixing_R18_ddpm\tPreActResNet-18\t12548426\tcifar10\tLinf\t",
        "\tRebuffi2021Fixing_R18_cutmix_ddpm\tPreActResNet-18\t12548426\tcifar10\tL2\t",
    ]
    assert shown.err == ""


def test_json_and_the_same_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["list", "Ding2020", "--threat=Linf", "--format=json"])
    assert json.loads(capsys.readouterr().out) == [
        {
            "alias": "", "name": "Ding2020MMA", "architecture": "WideResNet-28-4", "parameters": 5849050,
            "dataset": "cifar10", "threat_model": "Linf", "fault": "",
        }
    ]  # fmt: skip


@pytest.mark.long
def test_a_reader_that_has_had_enough() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "wdat.cli.models", "Ding2020"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
