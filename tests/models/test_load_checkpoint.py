"""Weights from files: what is accepted, and what each refusal says."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wdat.errors import SettingError
from wdat.models import check_finite, digest, load_checkpoint, load_network, origin, title
from wdat.models.local import CIFAR10_MEAN, CIFAR10_STD


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
    elif kind == "run":
        (path / "checkpoints").mkdir(parents=True)
        (path / "checkpoints" / "best.ckpt").touch()
    elif kind == "program":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    elif kind == "numbers":
        torch.save({"epoch": 3, "lr": 0.1}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file"),
        ("folder", r"is a folder .*: name a file$"),
        ("run", r"is a folder .*: name a file, such as .*best\.ckpt"),
        ("program", r"is a TorchScript program"),
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


def test_an_address_is_told_to_be_fetched() -> None:
    with pytest.raises(SettingError, match="is an address, and nothing is downloaded"):
        load_checkpoint(fresh(), "https://example.org/weights.pt")


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


# --- files of the world


PLACES = {
    "net": lambda s: {"net": s, "acc": 93.1, "epoch": 199},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": optimizer(), "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": optimizer(), "args": {"lr": 0.1}},
    "model beside an empty ema": lambda s: {"model": s, "ema": None},
    "deep": lambda s: {"checkpoint": {"model": {"weights": s}}, "step": 3},
    "the same twice": lambda s: {"state_dict": s, "model": dict(s)},
    "Lightning": lambda s: {
        "state_dict": s,
        "pytorch-lightning_version": "2.6.0",
        "current_model_state": other(),
        "callbacks": {"a": other()},
    },
}


def optimizer() -> dict[str, Any]:
    """The state of an optimiser of the same network."""
    network = fresh()
    made = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made.state_dict()


def other() -> dict[str, torch.Tensor]:
    return dict(fresh(seed=9).state_dict())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "network.", "net.", "model.module.", "module.model._orig_mod."]
)
@pytest.mark.parametrize("place", sorted(PLACES))
def test_the_one_state_dict_is_found_wherever_it_lies(place: str, prefix: str, tmp_path: Path) -> None:
    torch.save(PLACES[place](dict(renamed(prefix))), tmp_path / "x.pt")
    assert same(load_checkpoint(fresh(seed=2), tmp_path / "x.pt"), fresh())


@pytest.mark.parametrize(
    ("content", "names", "key"),
    [
        (lambda: {"model": other(), "ema": fresh().state_dict()}, "model, ema", "ema"),
        (
            lambda: {"state_dict": other(), "state_dict_ema": fresh().state_dict()},
            "state_dict, state_dict_ema",
            "state_dict_ema",
        ),
        (
            lambda: {"model": other(), "ema": {"module": fresh().state_dict(), "decay": 0.999}},
            "model, ema.module",
            "ema",
        ),
        (
            lambda: {"state_dict": {**{f"model.{k}": v for k, v in other().items()}, **renamed("ema_model.module.")}},
            "state_dict.model, state_dict.ema_model.module",
            "state_dict.ema_model.module",
        ),
        (
            lambda: {**{f"student.{k}": v for k, v in other().items()}, **renamed("teacher.")},
            "student, teacher",
            "teacher",
        ),
    ],
)
def test_several_networks_in_a_file_are_named(content: Any, names: str, key: str, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "x.pt")
    with pytest.raises(
        SettingError, match=rf"holds 2 networks that fit .*: {names}; choose one, model\.checkpoint_key="
    ):
        load_checkpoint(fresh(seed=2), tmp_path / "x.pt")
    assert same(load_checkpoint(fresh(seed=2), tmp_path / "x.pt", key), fresh())
    assert same(load_network("resnet2b", checkpoint=tmp_path / "x.pt", checkpoint_key=key), fresh())
    with pytest.raises(SettingError, match=r"nothing called mean_teacher \(model\.checkpoint_key\): it holds "):
        load_checkpoint(fresh(seed=2), tmp_path / "x.pt", "mean_teacher")


def test_of_several_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    torch.save({"generator": nn.Linear(2, 2).state_dict(), "classifier": fresh().state_dict()}, tmp_path / "x.pt")
    assert same(load_checkpoint(fresh(seed=2), tmp_path / "x.pt"), fresh())


def test_a_part_of_a_larger_network_is_not_taken_for_one(tmp_path: Path) -> None:
    torch.save({f"encoder.{k}": v for k, v in fresh().state_dict().items()}, tmp_path / "x.pt")
    with pytest.raises(SettingError, match=r"'conv1\.weight' is missing"):
        load_checkpoint(fresh(seed=2), tmp_path / "x.pt")
    torch.save(
        {"0.weight": torch.zeros(2, 3), "1.weight": torch.zeros(2, 2), "1.bias": torch.zeros(2)}, tmp_path / "x.pt"
    )
    with pytest.raises(SettingError, match="is missing"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "x.pt")


def test_an_average_of_weights_brings_its_counter(tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(fresh())
    torch.save(average.state_dict(), tmp_path / "x.pt")
    assert same(load_checkpoint(fresh(seed=2), tmp_path / "x.pt"), fresh())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(prefix: str, tmp_path: Path) -> None:
    save_file(dict(renamed(prefix)), tmp_path / "x.safetensors", {"format": "pt"})
    assert same(load_checkpoint(fresh(seed=2), tmp_path / "x.safetensors"), fresh())
    content = (tmp_path / "x.safetensors").read_bytes()
    for place in (9, 60, len(content) // 2, len(content) - 5):
        (tmp_path / "x.safetensors").write_bytes(content[:place])
        with pytest.raises(SettingError, match=r"is (cut short|damaged)"):
            load_checkpoint(fresh(seed=2), tmp_path / "x.safetensors")


def test_counters_of_batches_may_be_missing(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "x.pt")
    loaded = load_checkpoint(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), tmp_path / "x.pt")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in state.items())
    del state["1.running_mean"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(SettingError, match=r"the key '1\.running_mean' is missing"):
        load_checkpoint(network, tmp_path / "x.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    state = fresh().state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "x.pt")
    network = fresh(seed=2)
    with pytest.raises(
        SettingError, match=r"weights that are not finite \('layer1\.0\.conv1\.weight'; model\.checkpoint\)"
    ):
        load_checkpoint(network, tmp_path / "x.pt")
    assert same(network, fresh(seed=2))
    with torch.no_grad():
        network.conv1.bias[0] = value
    with pytest.raises(SettingError, match=r"mine has weights that are not finite \('conv1\.bias'"):
        check_finite(network, "mine")


def test_a_mask_may_be_infinite(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    torch.save(network.state_dict(), tmp_path / "x.pt")
    load_checkpoint(network, tmp_path / "x.pt")
    check_finite(network, "mine")


# --- normalisation


CIFAR = {"mean": torch.tensor(CIFAR10_MEAN), "std": torch.tensor(CIFAR10_STD)}
FORMS = {
    "normalize": lambda s: {"normalize.mean": CIFAR["mean"], "normalize.std": CIFAR["std"].view(1, 3, 1, 1), **s},
    "beside model": lambda s: {
        "normalize.mean": CIFAR["mean"], "normalize.std": CIFAR["std"], **{f"model.{k}": v for k, v in s.items()},
    },
    "in a sequence": lambda s: {"0.mean": CIFAR["mean"], "0.std": CIFAR["std"], **{f"1.{k}": v for k, v in s.items()}},
    "mu and sigma": lambda s: {"mu": CIFAR["mean"].view(3, 1, 1), "sigma": CIFAR["std"].view(3, 1, 1), **s},
    "rounded": lambda s: {"mean": torch.tensor([0.49139968, 0.48215841, 0.44653091]), **s},
}  # fmt: skip


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_same_normalisation_is_said_and_left_out(form: str, tmp_path: Path) -> None:
    torch.save(FORMS[form](dict(fresh().state_dict())), tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="equal the network's own and are left out"):
        network = load_checkpoint(fresh(seed=2), tmp_path / "x.pt")
    assert same(network, fresh())


@pytest.mark.parametrize("form", sorted(FORMS))
def test_another_normalisation_is_refused(form: str, tmp_path: Path) -> None:
    state = FORMS[form](dict(fresh().state_dict()))
    name = next(k for k in state if k.rpartition(".")[2] in ("mean", "mu"))
    state[name] = torch.tensor([0.485, 0.456, 0.406])
    torch.save(state, tmp_path / "x.pt")
    network = fresh(seed=2)
    with pytest.raises(SettingError) as caught:
        load_checkpoint(network, tmp_path / "x.pt")
    text = str(caught.value)
    assert f"was trained with {name} = (0.485, 0.456, 0.406), and SmallResNet has (0.4914, 0.4822, 0.4465)" in text
    assert "set model.mean and model.std" in text
    assert same(network, fresh(seed=2))


def test_a_network_without_normalisation_has_zero_and_one(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    torch.save({**network.state_dict(), "mean": torch.zeros(1), "std": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match="left out"):
        load_checkpoint(network, tmp_path / "x.pt")
    torch.save({**network.state_dict(), "mean": torch.full((3,), 0.5)}, tmp_path / "x.pt")
    with pytest.raises(SettingError, match=r"mean = \(0\.5, 0\.5, 0\.5\), and Linear has \(0, 0, 0\)"):
        load_checkpoint(network, tmp_path / "x.pt")


# --- another number of classes


def test_another_number_of_classes_where_the_head_is_drawn_anyway(tmp_path: Path) -> None:
    torch.save({"net": load_network("resnet2b", 7, seed=1).state_dict()}, tmp_path / "x.pt")
    with pytest.raises(SettingError, match=r"'linear2\.weight' has shape \(7, 100\) in the file and \(10, 100\)"):
        load_network("resnet2b", checkpoint=tmp_path / "x.pt")
    network = load_network("resnet2b", checkpoint=tmp_path / "x.pt", new_head=True, seed=2)
    source, drawn = fresh().state_dict(), fresh(seed=2).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, (drawn if name.startswith("linear2") else source)[name]) or name.startswith("linear2")
    assert torch.equal(network.linear2.weight, fresh(seed=2).linear2.weight)
    assert torch.equal(network.conv1.weight, load_network("resnet2b", 7, seed=1).conv1.weight)


def test_a_head_that_fits_is_loaded_and_nothing_else_may_be_spared(tmp_path: Path) -> None:
    torch.save(fresh().state_dict(), tmp_path / "x.pt")
    assert same(load_network("resnet2b", checkpoint=tmp_path / "x.pt", new_head=True, seed=2), fresh())
    for name in ("linear2.bias", "linear1.bias"):
        state = {k: v for k, v in fresh().state_dict().items() if k != name}
        torch.save(state, tmp_path / "x.pt")
        if name == "linear2.bias":
            load_network("resnet2b", checkpoint=tmp_path / "x.pt", new_head=True)
        else:
            with pytest.raises(SettingError, match=r"'linear1\.bias' is missing"):
                load_network("resnet2b", checkpoint=tmp_path / "x.pt", new_head=True)


@pytest.mark.parametrize(
    "name", ["epoch=3-step=100.ckpt", "a b.pt", "[1,2].pt", "~x~.pt", "it's.pt", "{a}.pt", "$HOME.pt", "ü.pt"]
)
def test_any_name_of_a_file_will_do(name: str, tmp_path: Path) -> None:
    torch.save(fresh().state_dict(), tmp_path / name)
    assert same(load_checkpoint(fresh(seed=2), str(tmp_path / name)), fresh())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "small_cnn", "seed": 3, "checkpoint": None}, "fresh weights (seed 3)"),
        ({"name": "small_cnn", "checkpoint": "a/x.pt"}, "weights of a/x.pt"),
        ({"name": "Rebuffi2021", "checkpoint": "x.pt", "checkpoint_key": "ema"}, "weights of x.pt (ema)"),
        ({"name": "Rebuffi2021"}, "RobustBench's weights"),
        ({"_target_": "my.Net", "name": "Net"}, "weights as its class makes them (no checkpoint)"),
    ],
)
def test_where_weights_come_from_is_said(settings: dict[str, Any], words: str) -> None:
    assert origin(settings) == words
