"""The adapter to RobustBench's model zoo: the only file that knows the package and its quirks."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wdat import errors
from wdat.errors import SettingError
from wdat.models.weights import WeightFile, one_line

ALIASES = {
    "Zhang2019": "Zhang2019Theoretically",
    "Rebuffi2021": "Rebuffi2021Fixing_28_10_cutmix_ddpm",
    "Gowal2021": "Gowal2021Improving_28_10_ddpm_100m",
    "Wang2023": "Wang2023Better_WRN-28-10",
    "Cui2023": "Cui2023Decoupled_WRN-28-10",
}
"""Short names (ours) for zoo names."""

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
"""Data sets of the zoo and their numbers of classes."""

THREAT_MODELS = ("Linf", "L2", "corruptions")
"""What the networks of the zoo were trained against."""


@dataclass(frozen=True)
class ZooEntry:
    """One network of the zoo.

    Attributes:
        name: Full name in the zoo.
        dataset: A key of `CLASSES`.
        threat_model: One of `THREAT_MODELS`.
    """

    name: str
    dataset: str
    threat_model: str

    def __str__(self) -> str:
        return f"{self.name} ({self.dataset}, {self.threat_model})"

    @property
    def settings(self) -> dict[str, Any]:
        """RobustBench's own entry: the constructor as `model` and the place of the weights as `gdrive_id`."""
        settings: dict[str, Any] = _zoo(self.dataset, self.threat_model)[self.name]
        return settings

    @property
    def timm_name(self) -> str | None:
        """The name under which RobustBench registers the network in timm; None for most."""
        name = f"{self.name.lower().replace('-', '_')}_{self.dataset}_{self.threat_model.lower()}"
        robustbench()
        return name if importlib.import_module("timm").is_model(name) else None


@functools.cache
def robustbench() -> Any:
    """The package robustbench, imported with the cure that version 1.1.1 needs.

    It imports `autoattack`, which its requirements provide under the name `pyautoattack`, and `pkg_resources`, which
    setuptools has dropped in version 81.

    Raises:
        SettingError: A package that it needs is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its old imports from timm and setuptools warn, and nobody here can help it
        try:
            if importlib.util.find_spec("autoattack") is None:
                sys.modules["autoattack"] = importlib.import_module("pyautoattack")
            return importlib.import_module("robustbench")
        except ModuleNotFoundError as error:
            name = "setuptools<81" if error.name == "pkg_resources" else str(error.name)
            raise SettingError(f"robustbench can't be imported without {name}: pip install '{name}'") from error


def names(dataset: str = "cifar10", threat_model: str = "Linf") -> list[str]:
    """Full names of the zoo's networks for a data set and a threat model.

    Raises:
        SettingError: An unknown data set or threat model.
    """
    return list(_zoo(dataset, threat_model))


def resolve(name: str, dataset: str, threat_model: str, others: Iterable[str] = ()) -> ZooEntry:
    """The zoo's entry for an alias or a full name.

    Args:
        name: A key of `ALIASES` or a full name of the zoo.
        dataset: A key of `CLASSES`.
        threat_model: One of `THREAT_MODELS`, where the weights come from.
        others: Further names the user might have meant, for the message.

    Raises:
        SettingError: An unknown name, with the nearest ones, or one that is in another part of the zoo.
    """
    zoo = _zoo(dataset, threat_model)
    full = ALIASES.get(name, name)
    if full in zoo:
        return ZooEntry(full, dataset, threat_model)
    places = [f"model.dataset={d} model.threat_model={t}" for d, t in _parts() if full in _zoo(d, t)]
    if places:
        raise SettingError(
            f"the zoo has no {full} for {dataset}, {threat_model} (model.name): it has it for {' or '.join(places)}"
        )
    raise errors.unknown("model", name, [*others, *ALIASES, *zoo], "model.name")


def architecture(entry: ZooEntry) -> nn.Module:
    """The network of an entry with fresh weights.

    Nothing is downloaded, save by the few ImageNet entries whose constructors ask torchvision for weights.

    Raises:
        SettingError: It can't be built by the versions of timm and torch that are installed.
    """
    timm_name = entry.timm_name
    try:
        with _weights_only():
            if timm_name:
                network = importlib.import_module("timm").create_model(timm_name, num_classes=CLASSES[entry.dataset])
            else:
                network = entry.settings["model"]()
    except Exception as error:  # third-party constructors, some of which reach for the network or a GPU
        raise _unusable(entry, "can't be built", error) from error
    return _modern(network)


def load_zoo(name: str, dataset: str = "cifar10", threat_model: str = "Linf", root: str | Path = "models") -> nn.Module:
    """A network of the zoo with its weights, in eval mode, on the CPU.

    The weights are looked for where RobustBench looks, `{root}/{dataset}/{threat_model}/{full name}.pt` (timm's cache
    for the few networks that it registers in timm), and downloaded there if absent.

    Args:
        name: A key of `ALIASES` or a full name of the zoo.
        dataset: A key of `CLASSES`.
        threat_model: One of `THREAT_MODELS`.
        root: Folder of the weights.

    Raises:
        SettingError: An unknown name; weights that can't be had, with the place to put them by hand; weights that are
            damaged, need unpickling or belong to another network.
    """
    entry = resolve(name, dataset, threat_model)
    root = Path(os.path.expanduser(root))
    files = list(weight_files(entry, root))
    for file in files:
        file.ensure(str(entry))
    try:
        with _weights_only():
            network = robustbench().load_model(entry.name, str(root), dataset, threat_model)
    except Exception as error:  # third-party code on third-party files
        where = f" from {', '.join(str(file.path) for file in files)}" if files else ""
        raise _unusable(entry, f"can't be loaded{where}", error) from error
    return _modern(network).eval()


def preprocessing(entry: ZooEntry) -> str | None:
    """How RobustBench cuts images for a network, in the manner of its own names: `Res256Crop224`, `Crop288`.

    For networks that it registers in timm it takes timm's settings, which are put into the same words.

    Returns:
        The name; None for CIFAR, whose images are of one size.
    """
    if entry.dataset != "imagenet":
        return None
    timm_name = entry.timm_name
    if timm_name is None:
        return str(entry.settings["preprocessing"])
    settings = importlib.import_module("timm").get_pretrained_cfg(timm_name)
    size = settings.input_size[1]
    kind = "Bicubic" if settings.interpolation == "bicubic" else ""
    return f"{kind}Res{math.floor(size / settings.crop_pct)}Crop{size}"


def weight_files(entry: ZooEntry, root: Path) -> Iterator[WeightFile]:
    """The files that `robustbench.load_model` will look for: one, one per member of an ensemble, or none.

    Args:
        entry: A network of the zoo.
        root: Folder of the weights.
    """
    robustbench()
    timm_name = entry.timm_name
    if timm_name:
        url = importlib.import_module("timm").get_pretrained_cfg(timm_name).url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        yield WeightFile(path, url, lambda to: torch.hub.download_url_to_file(url, to, progress=False))
        return
    if Path(entry.name).name != entry.name:
        raise SettingError(f"{entry} is no file name (model.name): its weights would lie outside model.root={root}")
    path = root / entry.dataset / entry.threat_model / f"{entry.name}.pt"
    ids = entry.settings["gdrive_id"]
    if isinstance(ids, list):
        for place, drive_id in enumerate(ids):
            yield _on_drive(path.with_name(f"{path.name}_m{place}.pt"), drive_id)
    elif ids is not None and not (entry.dataset == "imagenet" and "Standard" in entry.name):
        yield _on_drive(path, ids)


def deepmind(kind: str, **settings: Any) -> nn.Module:
    """A CIFAR network of RobustBench's port of DeepMind's code, with CIFAR-10's normalisation inside.

    Args:
        kind: `"DMWideResNet"` or `"DMPreActResNet"`.
        settings: Arguments of the class, such as `num_classes` and `depth`.
    """
    network: nn.Module = getattr(_architectures("dm_wide_resnet"), kind)(**settings)
    return network


def _on_drive(path: Path, drive_id: str) -> WeightFile:
    """A file on Google Drive, fetched by RobustBench's own function."""

    def fetch(to: str) -> None:
        importlib.import_module("robustbench.utils").download_gdrive_new(drive_id, to)

    return WeightFile(path, f"https://drive.google.com/uc?id={drive_id}", fetch)


def _parts() -> list[tuple[str, str]]:
    """The parts of the zoo: data set and threat model."""
    robustbench()
    dicts = importlib.import_module("robustbench.model_zoo.models").model_dicts
    return [(dataset.value, threat.value) for dataset, zoo in dicts.items() for threat in zoo]


def _zoo(dataset: str, threat_model: str) -> dict[str, dict[str, Any]]:
    """One part of RobustBench's dictionary of networks."""
    if dataset not in CLASSES:
        raise errors.unknown("data set of the zoo", dataset, CLASSES, "model.dataset")
    if threat_model not in THREAT_MODELS:
        raise errors.unknown("threat model of the zoo", threat_model, THREAT_MODELS, "model.threat_model")
    robustbench()
    models = importlib.import_module("robustbench.model_zoo.models")
    enums = importlib.import_module("robustbench.model_zoo.enums")
    part = models.model_dicts[enums.BenchmarkDataset(dataset)].get(enums.ThreatModel(threat_model), {})
    return dict(part)


def _architectures(module: str) -> Any:
    """A module of RobustBench's architectures."""
    robustbench()
    return importlib.import_module(f"robustbench.model_zoo.architectures.{module}")


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Nothing is unpickled inside, by third parties neither, whatever they or the environment ask of `torch.load`.

    torchvision and timm ask for unpickling, and check a file's sum only when they download it.
    """
    force, spare = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, spare)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _modern(network: nn.Module) -> nn.Module:
    """The network with RobustBench's hand-written Swish replaced by the same function of PyTorch, `nn.SiLU`.

    The former's backward pass uses `ctx.saved_variables`, which warns at every call and is about to go.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Swish" and type(child).__module__.startswith("robustbench."):
                setattr(module, name, nn.SiLU())
    return network


def _unusable(entry: ZooEntry, what: str, error: Exception) -> SettingError:
    """The error for a network of the zoo that its own package can't handle."""
    return SettingError(f"{entry} {what} (model.name): {one_line(error)}")
