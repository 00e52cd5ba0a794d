"""Switches for speed: a step with each of them agrees with the float32 one."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from functools import partial

import lightning as L
import pytest
import torch

import wdat
from benchmarks.near_ties import evaluation_images
from wdat import models
from wdat.attacks import build
from wdat.attacks.knapsack_allocation import solve
from wdat.data import ImageDataModule
from wdat.gradients import is_compiled, undisturbed
from wdat.models.local import LOCAL
from wdat.models.speed import precise
from wdat.objectives import WDAT
from wdat.sensitivity import Table
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

THREAT = wdat.ThreatModel(2, "linf", 0.1)
SEED = 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # torch.compile, of itself and its own dependencies:
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture(scope="module")
def data():
    data = ImageDataModule("digits", 10, val_size=300, batch_size=64, flip=False, seed=SEED)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def pretrained(data):
    network = models.load_network("small_cnn", seed=SEED).train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(4):
        for batch in data.train_dataloader():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(batch.x), batch.y).backward()
            optimizer.step()
    return network.eval()


def made(network, **options):
    """W-DAT of a network; the options are the attack's."""
    attack, optimizer = build("wpgd_budget", loss="kl", **options), partial(torch.optim.SGD, lr=0.01)
    return WDATModule(network, WDAT(), attack, THREAT, Table(), optimizer, Constant(), seed=SEED)


@dataclass
class Step:
    """What the first step of W-DAT does: the change of all weights, one behind the other, and Υ after it."""

    change: torch.Tensor
    upsilon: float

    def difference(self, other):
        """Relative to this step's change."""
        return float((other.change - self.change).norm() / self.change.norm())


def first_step(network, data, precision="32-true", **options):
    def weights():
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    before = weights()
    module = made(network, **{"steps": 5, "step_size": 0.4, "radius_max": 4.0, **options})
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, precision=precision,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        inference_mode=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return Step(weights() - before, module.sensitivity.upsilon())


@pytest.fixture(scope="module")
def plain(pretrained, data):
    return first_step(copy.deepcopy(pretrained), data)


def agree(step, plain, change, upsilon):
    assert plain.difference(step) < change
    assert step.upsilon == pytest.approx(plain.upsilon, rel=upsilon)


# One step, because rounding grows from step to step. bfloat16 has 8 bits: each product errs by up to 2^-8, a gradient
# behind six passes through six layers by a few times that, and the attack takes pixels with such gradients to the
# other side. In float32 the same is 2^-24, and one pixel of 64 images that changes sides moves the step by 1e-4.
BFLOAT16 = {"change": 0.25, "upsilon": 2**-7}
FLOAT32 = {"change": 1e-2, "upsilon": 1e-4}


def test_the_step_that_they_are_compared_on_depends_on_the_attack(pretrained, plain, data):
    one = first_step(copy.deepcopy(pretrained), data, steps=1)
    assert plain.difference(one) > 2 * BFLOAT16["change"]


def test_bf16_agrees(pretrained, plain, data):
    agree(first_step(copy.deepcopy(pretrained), data, "bf16-mixed"), plain, **BFLOAT16)


def test_channels_last_agrees(pretrained, plain, data):
    network = models.accelerate(copy.deepcopy(pretrained), channels_last=True)
    assert any(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.dim() == 4)
    agree(first_step(network, data), plain, **FLOAT32)


@pytest.mark.long
def test_a_compiled_network_agrees_and_keeps_its_names(pretrained, plain, data):
    """Everything but the code generator, which the slow test has."""
    network = copy.deepcopy(pretrained)
    network.compile(backend="aot_eager")
    agree(first_step(network, data), plain, **FLOAT32)
    assert list(network.state_dict()) == list(pretrained.state_dict())


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_all_switches_together_agree(pretrained, plain, data):
    network = models.accelerate(copy.deepcopy(pretrained), channels_last=True, compiled=True)
    assert is_compiled(network)
    agree(first_step(network, data, "bf16-mixed"), plain, **BFLOAT16)


def test_without_switches_nothing_changes():
    network = models.load_network("small_cnn")
    assert models.accelerate(network) is network
    assert not is_compiled(network)
    assert all(p.is_contiguous() for p in network.parameters())


class Types(torch.nn.Module):
    """Notes the precision of the logits in each mode."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, {"train": set(), "eval": set()}

    def forward(self, x):
        logits = self.network(x)
        trains = torch.is_autocast_enabled("cpu")
        self.seen["train" if trains else "eval"].add(logits.dtype)
        return logits


def test_training_and_its_attacks_run_in_bf16_and_evaluation_in_float32(pretrained, data):
    network = Types(copy.deepcopy(pretrained))
    seen = {}

    class Validation(L.Callback):
        def on_validation_start(self, trainer, module):
            seen["fit"] = dict(network.seen)
            network.seen = {"train": set(), "eval": set()}

        def on_validation_end(self, trainer, module):
            seen["validation"] = dict(network.seen)

    module = made(network, steps=2, step_size=0.5)
    trainer = L.Trainer(
        max_epochs=1, limit_train_batches=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        precision="bf16-mixed", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, inference_mode=False, callbacks=[Validation()],
    )  # fmt: skip
    trainer.fit(module, data)
    assert seen["fit"] == {"train": {torch.bfloat16}, "eval": set()}
    assert seen["validation"] == {"train": set(), "eval": {torch.float32}}


def test_the_last_layer_of_what_is_trained_is_exact_under_bf16(pretrained):
    """Of the same bf16 features: float64 products differ from float32 ones by rounding, from bf16 ones by 2^-9."""
    network, plain = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    names = models.prepare(network)
    assert names == [name for name, _ in plain.named_parameters()]
    assert list(network.state_dict()) == list(plain.state_dict())
    x = torch.rand(32, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = []
        head = models.find_head(network)[1]
        hook = head.register_forward_pre_hook(lambda module, given: features.append(given[0]))
        sharp, coarse = network(x), plain(x)
        hook.remove()
    wanted = torch.nn.functional.linear(
        features[0].double(), head.weight.detach().double(), head.bias.detach().double()
    )
    assert (features[0].dtype, sharp.dtype, coarse.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    size = float(wanted.abs().max())
    assert float((sharp - wanted).abs().max()) < 1e-5 * size
    assert float((coarse - wanted).abs().max()) > 1e-3 * size
    with torch.no_grad():
        assert torch.equal(network(x), plain(x))


def test_every_local_network_accepts_the_layout():
    for name in LOCAL:
        network = models.accelerate(models.load_network(name), channels_last=True)
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("norm", "delta"), [("linf", 2 / 255), ("l2", 0.25)])
def test_distances_in_bf16_are_those_of_float32_but_for_a_percent(shared, norm, delta):
    """First-order distances of 846 real images, by which `critical_draw` divides its budget (docs/cost.md)."""
    x, y = evaluation_images(shared / "data/cifar10_subset.npz")
    threat, attack = wdat.ThreatModel(2, norm, delta), build("critical_draw", loss="kl")
    network = models.load_network("resnet2b", checkpoint=str(shared / "models/resnet2b.pt")).eval()
    last = copy.deepcopy(network)
    precise(last, "linear2")

    def distances(network, enabled):
        with undisturbed(network), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return attack.norms(network, x, y, threat).double()

    exact = distances(network, False)
    wrong = {}
    for name, found in (("bf16", distances(network, True)), ("last layer in float32", distances(last, True))):
        assert ((found > 0) != (exact > 0)).sum() <= 5, "verdicts that rounding has turned"
        assert solve(found, threat).critical == pytest.approx(solve(exact, threat).critical, rel=0.01)
        both = (found > 0) & (exact > 0)
        wrong[name] = float(((found - exact).abs() / exact)[both].median())
    assert wrong["last layer in float32"] < wrong["bf16"] < 0.015
