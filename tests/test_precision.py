"""Every evaluation is in IEEE float32, whatever the process has allowed, and leaves the settings as it found them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from small_training import digits, module_for, trainer_for
from torch import nn

import wdat
from benchmarks.pretended import accelerator, device_tensor, lend
from wdat.attacks import Context, build
from wdat.certify.crown import margin_bound
from wdat.certify.smoothing import Smoothing
from wdat.evaluation import ImageTensors
from wdat.precision import float32
from wdat.threat import ThreatModel
from wdat.training.callbacks import RobustEvaluation

THREAT = ThreatModel(2, "linf", 8 / 255)


def products():
    """What products are rounded to: by the old interface of PyTorch, or by the new one where that was used."""
    try:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        new = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        return tuple(value == "tf32" for value in new)


class Spy(nn.Module):
    def __init__(self, shape=(3, 4, 4)):
        super().__init__()
        self.linear = nn.Linear(torch.Size(shape).numel(), 10)
        self.seen = set()

    def forward(self, x):
        self.seen.add((*products(), torch.is_autocast_enabled("cpu")))
        return self.linear(torch.relu(x.flatten(1)))


@pytest.fixture(params=["old", "new"])
def coarse(request):
    """A process that allows TF32 everywhere, by either interface of PyTorch."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    new = [(place, place.fp32_precision) for place in (cudnn.conv, cudnn.rnn, matmul)] if _new() else []
    if request.param == "new" and not new:
        pytest.skip("this PyTorch has the old interface only")
    if request.param == "old":
        cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
    for place, _ in new if request.param == "new" else ():
        place.fp32_precision = "tf32"
    assert products() == (True, True)
    yield
    assert products() == (True, True), "an evaluation has left other settings behind"
    for place, value in new:
        place.fp32_precision = value
    cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def _new():
    return hasattr(torch.backends.cuda.matmul, "fp32_precision")


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


EXACT = {(False, False, False)}


@pytest.mark.parametrize("attack", ["fgsm", "wpgd", "knapsack", "autoattack"])
def test_evaluations_are_exact(coarse, attack):
    network = Spy()
    options = {"wpgd": {"steps": 2}, "knapsack": {"effort": "quick"}, "autoattack": {"version": "rand"}}
    kinds = {name: value for name, value in options.items() if name == attack and name != "autoattack"}
    x, y = torch.rand(6, 3, 4, 4), torch.arange(6)
    with torch.no_grad():
        network.linear.weight.mul_(10)
    with autocast():
        records = wdat.evaluate(network, [(x, y)], THREAT, [attack], options=kinds, pictures=True, deltas=[0.1])
    assert network.seen == EXACT
    assert all(record.compute["tf32"] is False for record in records)
    assert records[0].compute == {"name": "CPU", "precision": "float32", "tf32": False}


def test_tf32_is_a_choice_on_a_gpu(coarse):
    x, y = torch.rand(6, 3, 4, 4), torch.arange(6)
    network = Spy()
    records = wdat.evaluate(network, [(x, y)], THREAT, ["fgsm", "knapsack"], tf32=True)
    assert network.seen == EXACT, "a CPU has none"
    assert not any(record.compute["tf32"] for record in records)
    with accelerator():
        lend(network).seen.clear()
        tensors = ImageTensors(device_tensor(x), device_tensor(y))
        records = wdat.evaluate(network, tensors, THREAT, ["fgsm", "knapsack"], tf32=True)
    assert (True, True, False) in network.seen
    assert all(record.compute["tf32"] for record in records)
    assert {record.compute["name"] for record in records} == {"Pretended"}


def test_training_attacks_have_the_precision_of_training(coarse):
    network = Spy()
    attack = build("pgd", steps=2)
    with autocast():
        attack(network, torch.rand(6, 3, 4, 4), torch.arange(6), THREAT, Context(training=True))
    assert network.seen == {(True, True, True)}


def test_evaluations_of_a_training_are_exact(coarse):
    network = Spy((3, 32, 32))
    callback = RobustEvaluation(THREAT, ["fgsm"])
    module = module_for(network)
    trainer = trainer_for(1, callbacks=[callback], precision="bf16-mixed", limit_val_batches=1)
    trainer.validate(module, digits(), verbose=False)
    assert network.seen == EXACT


def test_certificates_are_exact(coarse):
    network = Spy()
    with autocast():
        Smoothing(sigma=0.25, samples=50)(network, torch.rand(2, 3, 4, 4), torch.arange(2), [])
    assert network.seen == EXACT
    plain = nn.Sequential(nn.Flatten(), Told(), nn.Linear(48, 10))
    with autocast():
        margin_bound(plain, torch.rand(3, 4, 4), 0, 0.01, "linf")
    assert Told.seen == EXACT


class Told(nn.ReLU):
    """A layer that CROWN runs forward."""

    seen: ClassVar = set()

    def forward(self, x):
        Told.seen.add((*products(), torch.is_autocast_enabled("cpu")))
        return super().forward(x)


def test_the_settings_are_restored_after_an_error(coarse):
    def fail():
        with float32(nn.Identity(), torch.zeros(0)):
            assert products() == (False, False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
