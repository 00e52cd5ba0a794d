"""Architectures of RobustBench's zoo with random weights: the last layer is found, every init works, a step is made.

A small sample runs by default, every distinct architecture with `-m zoo` (`make test-zoo`).
"""

from __future__ import annotations

import copy
import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from wdat.errors import SettingError
from wdat.models import build, find_head, keep_frozen_in_eval, prepare, zoo

SAMPLE = [
    ("Rebuffi2021Fixing_R18_ddpm", "cifar10", "Linf"),
    ("Hendrycks2020AugMix_WRN", "cifar10", "corruptions"),
    ("Addepalli2022Efficient_RN18", "cifar100", "Linf"),
    ("Salman2020Do_R18", "imagenet", "Linf"),
]

HEADLESS = "Diffenderfer2021Winning_Binary"  # their last layer is a convolution
MIXED = ("Bai2023Improving", "Bai2024MixedNUTS")  # their members are frozen, or must stay in eval mode


def structure(network: nn.Module) -> str:
    """The same for two networks that differ in the values of their weights alone."""
    shapes = [(key, tuple(value.shape)) for key, value in network.state_dict().items()]
    return hashlib.sha256(f"{type(network)} {network} {shapes}".encode()).hexdigest()


def distinct() -> list[zoo.ZooEntry]:
    """The first network of each architecture; those that can't be built too, so that their tests fail."""
    found: dict[str, zoo.ZooEntry] = {}
    for entry in zoo.entries():
        try:
            found.setdefault(structure(build.outline(entry)), entry)
        except SettingError:
            found[str(entry)] = entry
    return list(found.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "every" in metafunc.fixturenames:
        asked = "zoo" in metafunc.config.option.markexpr
        metafunc.parametrize("every", distinct() if asked else [], ids=str)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("a test asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def check(entry: zoo.ZooEntry) -> None:
    """Find the last layer, start from each init, and train one step."""
    size = 224 if entry.dataset == "imagenet" else 32
    shape, classes = (3, size, size), zoo.CLASSES[entry.dataset]
    torch.manual_seed(0)
    network = build.architecture(entry)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    if entry.name.startswith(MIXED):
        assert network.eval()(x[:1]).shape == (1, classes)
        return
    if entry.name.startswith(HEADLESS):
        with pytest.raises(SettingError, match=r"no last linear layer \(finetune.trainable\)"):
            prepare(network, "head", image_shape=shape)
        step(network.train(), x)
        return
    name, head = find_head(network, shape)
    assert network.get_submodule(name) is head
    assert head.out_features == classes
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert len(prepare(network, "all", "perturb", image_shape=shape)) == len(trainable)
    before = copy.deepcopy(head.state_dict())
    trained = prepare(network, "head", "reset_head", image_shape=shape)
    assert trained == [f"{name}.{key}" for key, _ in head.named_parameters()]
    assert not torch.equal(head.weight, before["weight"])
    for _ in ("the last layer", "everything"):
        network.train()
        keep_frozen_in_eval(network)
        step(network, x)
        for parameter in trainable:
            parameter.requires_grad_(True)


def step(network: nn.Module, x: torch.Tensor) -> None:
    """One step of SGD, which moves what is trained and nothing else."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    loss = nn.functional.cross_entropy(network(x), torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite()
    moved = [p for p in parameters if p.grad is not None and bool(p.grad.any())]
    assert moved
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters)
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
    first = moved[-1].detach().clone()
    torch.optim.SGD(parameters, lr=0.1).step()
    assert not torch.equal(moved[-1], first)


@pytest.mark.filterwarnings("ignore")  # what third-party constructors say
@pytest.mark.parametrize("which", SAMPLE[::2], ids="-".join)
def test_sample(which: tuple[str, str, str]) -> None:
    check(zoo.resolve(*which))


@pytest.mark.zoo
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_every_architecture(every: zoo.ZooEntry) -> None:
    check(every)


@pytest.mark.parametrize(("asked", "whole"), [([], False), (["-m", "not slow"], False), (["-m", "zoo"], True)])
@pytest.mark.long
def test_only_when_asked(asked: list[str], whole: bool) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__, *asked]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
    assert ("test_sample[" in listed) is not whole
    assert (listed.count("test_every_architecture[") > 100) is whole
    assert ("test_every_architecture" in listed) is whole
