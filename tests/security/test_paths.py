"""No path leaves its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wdat.data import cifar
from wdat.data.npz import npz
from wdat.errors import SettingError
from wdat.evaluation.session import read_radii
from wdat.models import load_network, zoo
from wdat.threat import ThreatModel

ESCAPES = ["../../x", "/etc/passwd", "..", "Linf/../../x", "x" * 5000, "a\0b", "", "~no such/x"]


@pytest.mark.parametrize("name", ESCAPES, ids=lambda name: repr(name[:9]))
@pytest.mark.parametrize("key", ["name", "dataset", "threat_model"])
def test_names_of_networks_build_no_paths(tmp_path, name, key):
    settings = {"name": "Rebuffi2021", "root": tmp_path / "root", **{key: name}}
    with pytest.raises(SettingError, match=rf"model\.{key}"):
        load_network(**settings)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_weights_of_the_whole_zoo_lie_in_their_folder(tmp_path):
    count = 0
    for dataset in zoo.CLASSES:
        for threat_model in zoo.THREAT_MODELS:
            for name in zoo.names(dataset, threat_model):
                entry = zoo.resolve(name, dataset, threat_model)
                for file in zoo.weight_files(entry, tmp_path):
                    count += 1
                    hub = Path(torch.hub.get_dir()) / "checkpoints"
                    assert file.path.parent in (tmp_path / dataset / threat_model, hub)
                    assert file.path.name not in ("", ".", "..")
    assert count > 100


def test_a_name_in_the_zoo_that_is_a_path_is_refused(tmp_path, zoo_entry):
    for name in ("../../x", "/tmp/x"):
        with pytest.raises(SettingError, match=r"model\.name.*outside model\.root"):
            load_network(zoo_entry(name), root=tmp_path / "root")
    assert not zoo_entry.asked
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a\0b", "~no such/x", "a\udcffb", "/proc/x", ""], ids=lambda p: repr(p[:9])
)
def test_odd_paths_are_errors_in_our_words(zoo_entry, path):
    reads = {
        r"model\.checkpoint": lambda: load_network("small_cnn", checkpoint=path),
        r"data\.path": lambda: npz(path),
        "certified": lambda: read_radii(Path(path), 3),
        r"data\.root": lambda: cifar.cifar10(path, download=False),
        r"model\.(root|name)": lambda: load_network(zoo_entry("Tiny2024"), root=path),
    }
    for setting, read in reads.items():
        with pytest.raises(SettingError, match=setting):
            read()


@pytest.mark.parametrize("norm", ["../x", "linf/../../x", "/etc"])
def test_norms_in_file_names_are_the_known_ones(norm):
    with pytest.raises(SettingError, match=r"threat\.norm"):
        ThreatModel(2, norm, 0.1)
