"""What is trained and from where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wdat.errors import SettingError
from wdat.models import build, find_head, keep_frozen_in_eval, load_network, prepare, zoo


class Body(nn.Module):
    """A network with BatchNorm, dropout, a frozen constant and a linear layer that is defined before it is used."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.squeeze = nn.Linear(4, 5)
        self.expand = nn.Linear(5, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.plain(self.block(x * self.scale)).mean((2, 3))
        logits: Tensor = self.head(x + self.expand(self.squeeze(x)))
        return logits


def states(network: nn.Module) -> tuple[list[bool], dict[str, Tensor]]:
    return [m.training for m in network.modules()], {k: v.clone() for k, v in network.state_dict().items()}


HEADS = {"resnet2b": "linear2", "resnet4b": "linear2", "cnn_a": "7", "small_cnn": "9"}


@pytest.mark.parametrize(("name", "head"), HEADS.items())
def test_head_of_local_networks(name: str, head: str) -> None:
    network = load_network(name)
    found, layer = find_head(network)
    assert found == head
    assert layer is network.get_submodule(head)


@pytest.mark.parametrize(
    ("name", "threat_model", "head"),
    [("Rebuffi2021Fixing_R18_ddpm", "Linf", "logits"), ("Wong2020Fast", "Linf", "linear")],
)
def test_head_of_zoo_architectures(name: str, threat_model: str, head: str) -> None:
    assert find_head(build.architecture(zoo.resolve(name, "cifar10", threat_model)))[0] == head


def test_finding_the_head_leaves_the_network_as_found() -> None:
    network = Body().train()
    network.block[1].eval()
    flags, before = states(network)
    assert find_head(network)[0] == "head"
    after_flags, after = states(network)
    assert after_flags == flags
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(not module._forward_hooks for module in network.modules())


def test_head_whose_output_is_scaled() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3072, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.b(self.a(x.flatten(1))))

    assert find_head(Scaled())[0] == "b"


def test_no_head() -> None:
    network = nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten())
    with pytest.raises(SettingError, match=r"no last linear layer \(finetune.trainable\)"):
        prepare(network, "head")
    assert len(prepare(network, "all")) == 2
    with pytest.raises(SettingError, match=r"can't take an image of shape \(3, 8, 8\).*finetune.trainable"):
        find_head(load_network("small_cnn"), (3, 8, 8))


def test_all_leaves_fixed_constants_alone() -> None:
    network = Body()
    names = prepare(network, "all")
    assert "scale" not in names
    assert set(names) == {name for name, _ in network.named_parameters()} - {"scale"}


def test_head_freezes_the_rest() -> None:
    network = load_network("resnet2b")
    before = states(network)[1]
    assert prepare(network, "head") == ["linear2.weight", "linear2.bias"]
    assert [n for n, p in network.named_parameters() if p.requires_grad] == ["linear2.weight", "linear2.bias"]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_reset_head_redraws_it_alone_and_reproducibly(trainable: str) -> None:
    def head(seed: int) -> nn.Linear:
        network = load_network("resnet2b")
        before = states(network)[1]
        prepare(network, trainable, "reset_head", seed=seed)
        changed = {key for key, value in network.state_dict().items() if not torch.equal(before[key], value)}
        assert changed == {"linear2.weight", "linear2.bias"}
        return find_head(network)[1]

    state = torch.get_rng_state()
    first, again, other = head(0), head(0), head(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.abs().max() <= 100**-0.5  # the bound of nn.Linear's own draw


def test_perturbation_is_relative_and_reproducible() -> None:
    def moved(seed: int, scale: float = 0.1) -> dict[str, Tensor]:
        network = load_network("cnn_a")
        before = states(network)[1]
        prepare(network, "all", "perturb", scale=scale, seed=seed)
        return {
            key: (value - before[key]) / before[key].std(correction=0) for key, value in network.state_dict().items()
        }

    first, again, other = moved(0), moved(0), moved(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["5.weight"], other["5.weight"])
    assert first["5.weight"].std().item() == pytest.approx(0.1, rel=0.01)
    assert first["0.weight"].std().item() == pytest.approx(0.1, rel=0.1)
    assert all(not values.any() for values in moved(0, scale=0.0).values())


def test_perturbation_spares_what_is_frozen_or_constant() -> None:
    network = Body()
    before = states(network)[1]
    prepare(network, "all", "perturb", scale=0.5)
    after = network.state_dict()
    assert torch.equal(after["scale"], before["scale"])
    assert torch.equal(after["block.1.weight"], before["block.1.weight"])
    assert not torch.equal(after["block.0.weight"], before["block.0.weight"])
    assert torch.equal(after["plain.running_mean"], before["plain.running_mean"])


def test_perturbation_of_the_head_alone() -> None:
    network = load_network("resnet2b")
    before = states(network)[1]
    prepare(network, "head", "perturb")
    changed = {key for key, value in network.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"linear2.weight", "linear2.bias"}


def test_frozen_parts_stay_in_eval() -> None:
    network = Body()
    prepare(network, "head")
    network.train()
    keep_frozen_in_eval(network)
    assert network.training
    assert network.head.training
    assert not any(module.training for module in network.block.modules())
    assert not network.plain.training
    before = states(network)[1]
    network(torch.rand(4, 3, 8, 8))
    changed = {key for key, value in network.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"calls"}


def test_nothing_frozen_nothing_in_eval() -> None:
    network = Body()
    prepare(network, "all")
    network.train()
    keep_frozen_in_eval(network)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": "heads"}, r"'heads' \(finetune.trainable\): did you mean head"),
        ({"init": "reset"}, r"'reset' \(finetune.init\): did you mean reset_head"),
        ({"scale": -0.1}, "finetune.scale"),
        ({"scale": float("nan")}, "finetune.scale"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        prepare(load_network("small_cnn"), **settings)  # type: ignore[arg-type]


def test_nothing_to_train() -> None:
    with pytest.raises(SettingError, match="every parameter is frozen"):
        prepare(load_network("small_cnn").requires_grad_(False))


class Writes(nn.Module):
    """Normalises its images in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.sub_(0.5).div_(0.2))


def test_a_network_that_writes_into_its_images_is_trained_on_copies() -> None:
    network, x = Writes(), torch.rand(2, 3, 4, 4)
    given, wanted = x.clone(), network(x.clone())
    prepare(network, image_shape=(3, 4, 4))
    leaf = x.clone().requires_grad_(True)
    assert torch.equal(network(x), wanted)
    assert torch.equal(x, given)
    network(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad.flatten(1)[0], network.layers[1].weight.sum(0) / 0.2)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    prepare(plain, image_shape=(3, 4, 4))
    assert not plain._forward_pre_hooks
