"""RobustBench's zoo, without a network connection: names, files, downloads that fail, architectures."""

from __future__ import annotations

import errno
import importlib
import re
import warnings
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from torch import Tensor, nn

from wdat import models
from wdat.errors import SettingError
from wdat.models import LOCAL, build, load_network, zoo

NAME = "Rebuffi2021Fixing_R18_ddpm"


class Tiny(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))


def dictionary() -> dict[str, Any]:
    """RobustBench's own dictionary of the CIFAR-10 networks trained against Linf."""
    zoo.robustbench()
    part: dict[str, Any] = importlib.import_module("robustbench.model_zoo.cifar10").linf
    return part


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A small network with an entry of its own in RobustBench's dictionary."""
    monkeypatch.setitem(dictionary(), "Tiny2024", {"model": Tiny, "gdrive_id": "the-id"})
    return "Tiny2024"


@pytest.fixture
def downloader(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], object]], list[str]]:
    """Puts a function in the place of RobustBench's download; gives the list of the ids asked for."""

    def install(write: Callable[[Path], object]) -> list[str]:
        asked: list[str] = []

        def download(drive_id: str, path: str) -> None:
            asked.append(drive_id)
            write(Path(path))

        zoo.robustbench()
        monkeypatch.setattr("robustbench.utils.download_gdrive_new", download)
        return asked

    return install


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_alias_is_in_the_zoo() -> None:
    assert set(zoo.ALIASES.values()) <= set(zoo.names())
    assert zoo.resolve("Rebuffi2021", "cifar10", "Linf").name == "Rebuffi2021Fixing_28_10_cutmix_ddpm"


def test_import_does_not_warn_the_user() -> None:
    zoo.robustbench.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zoo.robustbench().__name__ == "robustbench"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("Rebufi2021", "Rebuffi2021"), ("resnet2", "resnet2b"), ("Zhang2019Theoreticaly", "Zhang2019Theoretically")],
)
def test_unknown_name_lists_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(SettingError, match=rf"unknown model '{name}' \(model.name\): did you mean .*{nearest}"):
        load_network(name)


def test_name_in_another_part_of_the_zoo() -> None:
    with pytest.raises(SettingError, match=r"Wang2023.* has it for model.dataset=cifar10 model.threat_model=Linf"):
        load_network("Wang2023", dataset="imagenet", num_classes=1000)


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"dataset": "cifar"}, "model.dataset"), ({"threat_model": "linf"}, "model.threat_model")],
)
def test_unknown_part(settings: dict[str, str], key: str) -> None:
    with pytest.raises(SettingError, match=rf"\({key}\): did you mean"):
        load_network("Wang2023", **settings)  # type: ignore[arg-type]


def test_number_of_classes() -> None:
    with pytest.raises(SettingError, match=r"has 10 classes and the data 100 \(model.num_classes\)"):
        load_network("Wang2023", num_classes=100)


def test_loads_a_file_put_where_robustbench_looks(tmp_path: Path, images: Tensor) -> None:
    source = load_network_from_seed(NAME)
    path = tmp_path / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
    network = load_network(NAME, root=tmp_path)
    assert not network.training
    assert torch.equal(network(images), source(images))
    # The same file as a checkpoint: built without a download, from an empty root.
    assert torch.equal(load_network(NAME, checkpoint=path, root=tmp_path / "none")(images), source(images))
    assert not (tmp_path / "none").exists()


def load_network_from_seed(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build.architecture(zoo.resolve(name, "cifar10", "Linf")).eval()


def test_download_takes_its_place_once(tiny: str, tmp_path: Path, downloader: Any) -> None:
    source = Tiny()
    asked = downloader(lambda path: torch.save(source.state_dict(), path))
    for _ in range(2):
        network = load_network(tiny, root=tmp_path)
    assert asked == ["the-id"]
    assert files(tmp_path) == ["cifar10/Linf/Tiny2024.pt"]
    assert torch.equal(network.state_dict()["1.weight"], source.state_dict()["1.weight"])


def no_connection(path: Path) -> None:
    path.with_suffix(".part").write_bytes(b"half")
    raise ConnectionError("Name or service not known\nand a second line")


class Other(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 11))


def cut_short(path: Path) -> None:
    torch.save(Tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])


def flipped(path: Path) -> None:
    """One bit of a weight differs, which `torch.load` doesn't notice."""
    torch.save(Tiny().state_dict(), path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    torch.load(path, weights_only=True)


def refused(path: Path) -> None:
    raise HTTPError("https://drive.google.com", 403, "Forbidden", Message(), None)


def quota(path: Path) -> None:
    raise type("FileURLRetrievalError", (Exception,), {})("Too many users have viewed\n\tor downloaded this file")


def full_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (no_connection, r"the server can't be reached: no network, or it is blocked \(Name or service not known"),
        (refused, "the server refuses .*403"),
        (quota, r"Google Drive gives no file, as when its daily quota is used up \(Too many users have viewed or"),
        (full_disk, "there is no room .*model.root"),
        (lambda path: path.write_text("<html><title>Quota exceeded</title>"), r"web page \('Quota exceeded'\)"),
        (lambda path: path.write_bytes(b""), "what arrived is empty"),
        (lambda path: path.write_bytes(b"PK\x03\x04 half a file"), "what arrived is cut short"),
        (cut_short, "what arrived is cut short"),
        (flipped, "what arrived is damaged in its part .*data"),
        (lambda path: torch.save({"args": Tiny()}, path), "nothing is unpickled here"),
        (lambda path: torch.save(Other().state_dict(), path), "not of this network: .*size mismatch for 1.weight"),
        (lambda path: torch.save({"epoch": torch.ones(1)}, path), "not of this network: .*Missing key"),
        (lambda path: None, "there is no file what arrived"),
    ],
)
def test_failed_download_leaves_nothing_behind(
    write: Callable[[Path], object], reason: str, tiny: str, tmp_path: Path, downloader: Any
) -> None:
    downloader(write)
    with pytest.raises(SettingError, match=reason) as caught:
        load_network(tiny, root=tmp_path)
    message = str(caught.value)
    assert "https://drive.google.com/uc?id=the-id" in message
    assert f"put them at {tmp_path / 'cifar10' / 'Linf' / 'Tiny2024.pt'}" in message
    assert "\n" not in message
    assert files(tmp_path) == []
    assert not (tmp_path / "cifar10").exists()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([Tiny(), Tiny()])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.models[0](x) + self.models[1](x)
        return logits


def test_ensemble_keeps_what_was_there_and_all_or_nothing_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloader: Any, images: Tensor
) -> None:
    monkeypatch.setitem(dictionary(), "Pair2024", {"model": Pair, "gdrive_id": ["a", "b"]})
    source = Pair()
    place = tmp_path / "cifar10" / "Linf"
    place.mkdir(parents=True)
    torch.save(source.models[0].state_dict(), place / "Pair2024.pt_m0.pt")
    asked = downloader(lambda path: torch.save(Other().state_dict(), path))
    with pytest.raises(SettingError, match="not of this network"):
        load_network("Pair2024", root=tmp_path)
    assert files(place) == ["Pair2024.pt_m0.pt"]
    asked += downloader(lambda path: torch.save(source.models[1].state_dict(), path))
    network = load_network("Pair2024", root=tmp_path)
    assert torch.equal(network(images), source(images))
    assert files(place) == ["Pair2024.pt_m0.pt", "Pair2024.pt_m1.pt"]
    assert not any(path.is_symlink() for path in place.iterdir())
    assert asked == ["b"]


def test_bad_file_in_place(tiny: str, tmp_path: Path, downloader: Any) -> None:
    asked = downloader(no_connection)
    path = tmp_path / "cifar10" / "Linf" / f"{tiny}.pt"
    path.parent.mkdir(parents=True)
    path.write_text("<!doctype html>")
    with pytest.raises(SettingError, match=r"is a web page.*\(model.root\); deleting it lets it be downloaded again"):
        load_network(tiny, root=tmp_path)
    torch.save(load_network("small_cnn").state_dict(), path)
    with pytest.raises(
        SettingError, match=r"Tiny2024 \(cifar10, Linf\) can't be loaded from .*Tiny2024.pt.*Missing key.*; deleting "
    ):
        load_network(tiny, root=tmp_path)
    assert asked == []


def test_files_of_an_ensemble(tmp_path: Path) -> None:
    entry = zoo.resolve("Chen2020Adversarial", "cifar10", "Linf")
    expected = [tmp_path / "cifar10" / "Linf" / f"Chen2020Adversarial.pt_m{place}.pt" for place in range(3)]
    assert [file.path for file in zoo.weight_files(entry, tmp_path)] == expected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, which can't be filled."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "dataset", "file"),
    [
        ("Debenedetti2022Light_XCiT-S12", "cifar10", "debenedetti2022light-xcit-s-cifar10-linf.pth.tar"),
        ("Standard_R50", "imagenet", "resnet50-0676ba61.pth"),
    ],
)
def test_networks_of_timm_and_torchvision(name: str, dataset: str, file: str, hub: Path) -> None:
    """Built without a download; their file goes to torch.hub's cache and is used from there without a network."""
    classes, size = zoo.CLASSES[dataset], 32 if dataset == "cifar10" else 64
    source = build.architecture(zoo.resolve(name, dataset, "Linf")).eval()
    with pytest.raises(SettingError, match="no network") as caught:
        load_network(name, classes, dataset=dataset, root=hub / "unused")
    assert str(hub / file) in str(caught.value)
    assert files(hub) == []
    hub.mkdir(parents=True)
    torch.save(source[1].state_dict(), hub / file)  # of what the normalisation is put before
    network = load_network(name, classes, dataset=dataset, root=hub / "unused")
    x = torch.rand(1, 3, size, size)
    assert torch.equal(network(x), source(x))
    assert torch.hub.get_dir() == str(hub.parent)


def test_a_file_for_torch_hub_takes_its_place(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build.architecture(zoo.resolve("Standard_R50", "imagenet", "Linf"))[1]
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda url, to, **_: torch.save(source.state_dict(), to))
    network = load_network("Standard_R50", 1000, dataset="imagenet")
    assert torch.equal(network[1].fc.weight, source.fc.weight)
    assert files(hub) == ["resnet50-0676ba61.pth"]


def test_constructor_that_fails_names_the_network(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> nn.Module:
        raise RuntimeError("Unknown model (xcit_of_old)")

    monkeypatch.setitem(dictionary(), tiny, {"model": missing, "gdrive_id": "the-id"})
    with pytest.raises(
        SettingError, match=r"Tiny2024 \(cifar10, Linf\) can't be built .*Unknown model \(xcit_of_old\)"
    ):
        build.architecture(zoo.resolve(tiny, "cifar10", "Linf"))


def test_swish_is_pytorchs_own(images: Tensor) -> None:
    """The same function and gradient as RobustBench's Swish, without its deprecated backward pass."""
    entry = zoo.resolve(NAME, "cifar10", "Linf")
    torch.manual_seed(0)
    theirs = entry.settings["model"]().eval()
    ours = load_network_from_seed(NAME)
    ours.load_state_dict(theirs.state_dict())
    assert any(type(module).__name__ == "Swish" for module in theirs.modules())
    gradients = []
    for network in (theirs, ours):
        x = images.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error" if network is ours else "ignore")
            gradients.append(torch.autograd.grad(network(x).logsumexp(1).sum(), x)[0])
    assert torch.allclose(theirs(images), ours(images), atol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_local_names_do_not_hide_zoo_names() -> None:
    assert not set(LOCAL) & (set(zoo.ALIASES) | set(zoo.names()))


def test_imagenets_networks_say_how_images_are_cut() -> None:
    named = {
        (name, threat): models.preprocessing({"name": name, "dataset": "imagenet", "threat_model": threat})
        for threat in ("Linf", "corruptions")
        for name in zoo.names("imagenet", threat)
    }
    assert named["Wong2020Fast", "Linf"] == "Crop288"
    assert named["Salman2020Do_R18", "Linf"] == named["Hendrycks2020AugMix", "corruptions"] == "Res256Crop224"
    assert named["Mo2022When_Swin-B", "Linf"] == "Res224"
    assert named["Liu2023Comprehensive_Swin-L", "Linf"] == "BicubicRes256Crop224"
    assert named["Debenedetti2022Light_XCiT-S12", "Linf"] == "BicubicRes224Crop224"  # timm's settings, here and below
    assert named["Tian2022Deeper_DeiT-B", "corruptions"] == "BicubicRes248Crop224"
    assert named["AlexNet", "corruptions"] == "Res224Crop224"
    assert all(name and re.fullmatch(r"(Bicubic)?(Res\d+)?(Crop\d+)?", name) for name in named.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "small_cnn"},
        {"name": "small_cnn", "dataset": "imagenet"},
        {"name": "Rebuffi2021", "dataset": "cifar10"},
    ],
)
def test_other_networks_want_nothing_special(settings: dict[str, Any]) -> None:
    assert models.preprocessing(settings) is None


def test_an_unknown_network_of_imagenet() -> None:
    with pytest.raises(SettingError, match=r"Salman2020Do_R17.*did you mean Salman2020Do_R18"):
        models.preprocessing({"name": "Salman2020Do_R17", "dataset": "imagenet"})


@pytest.mark.parametrize("there", [False, True])
def test_a_download_that_fails_leaves_no_empty_folders(tmp_path, monkeypatch, there):
    """Folders that were there stay."""
    zoo.robustbench()
    monkeypatch.setattr("robustbench.utils.download_gdrive_new", refuse_download)
    root = tmp_path / "deep" / "models"
    if there:
        root.mkdir(parents=True)
    with pytest.raises(SettingError, match="could not be downloaded"):
        load_network("Rebuffi2021", root=root)
    assert root.exists() == there
    assert list(tmp_path.rglob("*")) == ([tmp_path / "deep", root] if there else [])


def refuse_download(*_):
    raise OSError("no network")
