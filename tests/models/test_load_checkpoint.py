"""Weights from files: what is accepted, and what each refusal says."""

from __future__ import annotations

import contextlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wdat.errors import SettingError
from wdat.models import digest, load_checkpoint, load_network, title


def fresh(name: str = "resnet2b", seed: int = 1) -> nn.Module:
    return load_network(name, seed=seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def renamed(prefix: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((prefix + key, value) for key, value in fresh().state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", [False, True])
def test_plain_and_wrapped(prefix: str, nested: bool, tmp_path: Path) -> None:
    state: Any = renamed(prefix)
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "x.pt")
    network = fresh(seed=2)
    assert load_checkpoint(network, str(tmp_path / "x.pt")) is network
    assert same(network, fresh())


@pytest.mark.parametrize("prefix", ["network.", "network._orig_mod.", "network.module."])
def test_lightning_checkpoint_of_ours(prefix: str, tmp_path: Path) -> None:
    state: Any = {**renamed(prefix), "sensitivity.table": torch.zeros(4)}
    torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [{"lr": 0.1}]}, tmp_path / "x.ckpt")
    assert same(load_checkpoint(fresh(seed=2), tmp_path / "x.ckpt"), fresh())


def test_prefix_that_is_the_networks_own(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    source = Outer()
    torch.save(source.state_dict(), tmp_path / "x.pt")
    assert same(load_checkpoint(Outer(), tmp_path / "x.pt"), source)


def test_compiled_part_inside(tmp_path: Path) -> None:
    state = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in fresh().state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    assert same(load_checkpoint(fresh(seed=2), tmp_path / "x.pt"), fresh())


class Payload:
    """Would leave a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def write(kind: str, path: Path) -> None:
    """A file that can't be used, of the kind named."""
    if kind == "web page":
        path.write_text("\n<!DOCTYPE html><html><title>Quota exceeded</title></html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(bytes(range(7, 207)))
    elif kind == "truncated":
        torch.save(fresh().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "truncated legacy":
        torch.save(fresh().state_dict(), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "pickled":
        torch.save({"state_dict": fresh().state_dict(), "args": Payload(path.with_suffix(".trace"))}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"args": Payload(path.with_suffix(".trace"))}))
    elif kind == "folder":
        path.mkdir()
    elif kind == "numbers":
        torch.save({"epoch": 3, "lr": 0.1}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file"),
        ("folder", "there is no file"),
        ("empty", "is empty: fetch it again"),
        ("web page", r"is a web page \('Quota exceeded'\), not weights"),
        ("noise", "is damaged or no PyTorch file"),
        ("truncated", "is cut short: fetch or save it again"),
        ("truncated legacy", "is cut short"),
        ("pickled", r"nothing is unpickled here.*torch\.save\(network\.state_dict\(\), FILE\)"),
        ("bare pickle", "nothing is unpickled here"),
        ("numbers", "holds no state dict .* a dict of epoch, lr"),
        ("tensor", "holds no state dict .* Tensor"),
    ],
)
def test_unusable_files(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write(kind, path)
    network = fresh(seed=2)
    with pytest.raises(SettingError, match=message) as caught:
        load_checkpoint(network, path)
    assert "model.checkpoint" in str(caught.value)
    assert str(path) in str(caught.value)
    assert same(network, fresh(seed=2))
    assert not path.with_suffix(".trace").exists()


def test_another_architecture_names_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(fresh().state_dict(), path)
    with pytest.raises(SettingError, match=r"'conv1.weight' has shape \(8, 3, 3, 3\) in the file and \(16, 3, 3, 3\)"):
        load_checkpoint(fresh("resnet4b"), path)
    with pytest.raises(SettingError, match=r"the key '0\.weight' is missing in the file"):
        load_checkpoint(fresh("cnn_a"), path)
    with pytest.raises(SettingError, match=r"'linear2.weight' has shape \(10, 100\) in the file and \(7, 100\)"):
        load_checkpoint(load_network("resnet2b", num_classes=7), path)
    torch.save({**fresh().state_dict(), "linear3.weight": torch.zeros(1)}, path)
    with pytest.raises(SettingError, match=r"SmallResNet.*the network has no key 'linear3.weight'"):
        load_checkpoint(fresh(), path)


def test_whatever_is_damaged_is_refused_in_our_words(tmp_path: Path) -> None:
    """Files cut or overwritten at many places, in both of PyTorch's formats: loaded whole or refused, never a crash."""
    network = nn.Linear(4, 3)
    path = tmp_path / "x.pt"
    for new_format in (True, False):
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=new_format)
        whole = path.read_bytes()
        for place in range(1, len(whole), max(1, len(whole) // 60)):
            for damaged in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
                path.write_bytes(damaged)
                with contextlib.suppress(SettingError):
                    load_checkpoint(nn.Linear(4, 3), path)


def test_a_digest_tells_weights_from_others() -> None:
    """Buffers and scalars of any type count; running it changes nothing."""
    network, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    assert digest(network) == digest(other) == digest(network.to(torch.float32))
    other.num_batches_tracked += 1
    assert digest(network) != digest(other)
    assert digest(network) != digest(nn.BatchNorm2d(3).to(torch.bfloat16))
    other = nn.BatchNorm2d(3)
    other.weight.data[1] += 1e-7
    assert digest(network) != digest(other)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"name": "small_cnn", "dataset": "cifar100"}, "small_cnn"),
        ({"name": "Wang2023"}, "Wang2023"),
        ({"name": "Wang2023", "threat_model": "L2"}, "Wang2023 (cifar10, L2)"),
        ({"name": "Wang2023", "dataset": "cifar100", "threat_model": "Linf"}, "Wang2023 (cifar100, Linf)"),
    ],
)
def test_networks_of_other_parts_of_the_zoo_have_other_names(settings: dict[str, str], name: str) -> None:
    assert title(settings) == name
