"""The local networks: shapes, sizes, real weights, normalisation, seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wdat.errors import SettingError
from wdat.models import LOCAL, describe, digest, find_head, load_network

SIZES = {
    "resnet2b": 112_006,
    "cnn_a": 214_918,
    "resnet4b": 123_734,
    "small_cnn": 47_818,
}


@pytest.mark.parametrize("name", SIZES)
def test_shape_and_size(name: str, images: Tensor) -> None:
    network = load_network(name)
    assert network(images).shape == (3, 10)
    assert describe(network)[1] == SIZES[name]
    assert load_network(name, num_classes=7)(images).shape == (3, 7)
    assert not network.training
    assert not any("mean" in key or "std" in key for key in network.state_dict())


def test_preact_resnet18(images: Tensor) -> None:
    network = load_network("preact_resnet18", num_classes=7)
    assert network(images).shape == (3, 7)
    assert describe(network)[0] == "DMPreActResNet"
    assert find_head(network)[0] == "logits"


def test_wrn_28_10() -> None:
    with torch.device("meta"):
        network = LOCAL["wrn_28_10"](10)
    assert describe(network) == ("DMWideResNet", 36_479_194)


def test_keys_of_cnn_a() -> None:
    keys = [f"{place}.{kind}" for place in (0, 2, 5, 7) for kind in ("weight", "bias")]
    assert list(load_network("cnn_a").state_dict()) == keys


@pytest.mark.parametrize("name", SIZES)
def test_normalises_inside(name: str) -> None:
    """The mean image is the zero of the first convolution, whatever its weights."""
    network = load_network(name)
    first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    seen: list[Tensor] = []
    first.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    network(torch.stack([mean, mean + std])[:, :, None, None].expand(2, 3, 32, 32))
    assert torch.allclose(seen[0][0], torch.zeros(3, 32, 32), atol=1e-6)
    assert torch.allclose(seen[0][1], torch.ones(3, 32, 32), atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_normalises_by_the_constants_given(name: str, images: Tensor) -> None:
    """Other constants are another network with the same state dict, and another digest."""
    mean, std = [0.485, 0.456, 0.406], [0.225, 0.25, 0.3]
    usual, other = load_network(name), load_network(name, mean=mean, std=std)
    assert list(usual.state_dict()) == list(other.state_dict())
    assert digest(usual) != digest(other)
    shift = [torch.tensor(v).view(3, 1, 1) for v in (mean, std, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))]
    same = (images - shift[0]) / shift[1] * shift[3] + shift[2]  # what the usual constants make the same of
    assert torch.allclose(other(images), usual(same), atol=1e-4)


@pytest.mark.parametrize("given", [{"mean": [0.5, 0.5]}, {"mean": 0.5}, {"std": [0.2, 0.0, 0.2]}, {"std": ["a"] * 3}])
def test_constants_that_cant_be_used(given: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=r"model\.(mean|std)"):
        load_network("cnn_a", **given)


def test_a_network_of_the_zoo_has_its_own_constants() -> None:
    with pytest.raises(SettingError, match=r"model\.mean"):
        load_network("Rebuffi2021", mean=[0.5, 0.5, 0.5])


@pytest.mark.parametrize(("file", "right"), [("cifar_wide.pt", 528), ("kw_8px.pt", 266)])
def test_certified_networks_with_their_constants(file: str, right: int, shared: Path) -> None:
    """62.41 % and 31.44 % of 846 real test images."""
    mean, std = [0.485, 0.456, 0.406], [0.225, 0.225, 0.225]
    network = load_network("cnn_a", checkpoint=shared / "models" / file, mean=mean, std=std)
    assert _hits(network, shared) == right


def test_seed_alone_sets_the_weights() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_network("small_cnn", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = load_network("small_cnn", seed=3), load_network("small_cnn", seed=0)
    equal = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(equal)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(("name", "file"), [("resnet2b", "resnet2b.pt"), ("cnn_a", "cnn_a_adv.pt")])
def test_real_weights_load_strictly(name: str, file: str, shared: Path) -> None:
    network = load_network(name, checkpoint=shared / "models" / file)
    stored = torch.load(shared / "models" / file, weights_only=True)
    assert set(stored) == set(network.state_dict())
    assert all(torch.equal(stored[key], value) for key, value in network.state_dict().items())


def test_known_accuracy(shared: Path) -> None:
    """68.56 % of 846 real test images: 580 of them."""
    assert _hits(load_network("resnet2b", checkpoint=shared / "models" / "resnet2b.pt"), shared) == 580


def _hits(network: torch.nn.Module, shared: Path) -> int:
    with np.load(shared / "data" / "cifar10_subset.npz") as arrays:
        x = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(arrays["y_test"]).long()
    assert len(y) == 846
    with torch.no_grad():
        return int((network(x).argmax(1) == y).sum())
