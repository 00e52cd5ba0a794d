"""What is in RobustBench's model zoo: names, and where their weights lie. `build` makes the networks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from wdat import errors
from wdat.errors import SettingError
from wdat.models.weights import WeightFile

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


class AutoAttackFinder:
    """Finds `autoattack`, which robustbench 1.1.1 imports, in `pyautoattack`, which it requires.

    Python asks it last, so that a package `autoattack` that is installed comes first.
    """

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The package under the name that robustbench uses; None for all other names."""
        found = importlib.util.find_spec("pyautoattack") if name == "autoattack" else None
        if found is None or found.origin is None:
            return None
        folders = found.submodule_search_locations
        return importlib.util.spec_from_file_location(name, found.origin, submodule_search_locations=folders)


if AutoAttackFinder not in sys.meta_path:
    sys.meta_path.append(AutoAttackFinder)


@functools.cache
def robustbench() -> Any:
    """The package robustbench, without the warnings of its imports.

    It imports `autoattack` (see `AutoAttackFinder`), and `pkg_resources`, which setuptools has dropped in version 81.

    Raises:
        SettingError: A package that it needs is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its old imports from timm and setuptools warn, and nobody here can help it
        try:
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


def entries() -> list[ZooEntry]:
    """Every network of the zoo, in its own order."""
    return [ZooEntry(name, dataset, threat) for dataset, threat in _parts() for name in _zoo(dataset, threat)]


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
    """The files that `robustbench.load_model` will look for: one, or one per member of an ensemble.

    Args:
        entry: A network of the zoo.
        root: Folder of the weights.
    """
    timm_name = entry.timm_name
    ids = entry.settings["gdrive_id"]
    if timm_name:
        yield _on_hub(importlib.import_module("timm").get_pretrained_cfg(timm_name).url)
        return
    if ids == "" and entry.name == "Standard_R50":  # torchvision's
        yield _on_hub(importlib.import_module("torchvision.models").ResNet50_Weights.IMAGENET1K_V1.url)
        return
    if Path(entry.name).name != entry.name:
        raise SettingError(f"{entry} is no file name (model.name): its weights would lie outside model.root={root}")
    path = Path(entry.dataset, entry.threat_model, f"{entry.name}.pt")
    if isinstance(ids, list):
        for number, drive_id in enumerate(ids):
            yield _on_drive(root, path.with_name(f"{path.name}_m{number}.pt"), drive_id)
    elif ids:
        yield _on_drive(root, path, ids)


def _on_hub(url: str) -> WeightFile:
    """A file in the cache of torch.hub, where timm and torchvision look."""

    def fetch(to: str) -> None:
        torch.hub.download_url_to_file(url, to, progress=False)

    return WeightFile(Path(torch.hub.get_dir()), Path("checkpoints", url.rsplit("/", 1)[-1]), url, fetch)


def _on_drive(root: Path, place: Path, drive_id: str) -> WeightFile:
    """A file on Google Drive, fetched by RobustBench's own function."""

    def fetch(to: str) -> None:
        importlib.import_module("robustbench.utils").download_gdrive_new(drive_id, to)

    return WeightFile(root, place, f"https://drive.google.com/uc?id={drive_id}", fetch)


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
