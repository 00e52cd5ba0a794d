"""Shared by the tests of security: an environment with secrets, and networks that nobody downloads."""

from __future__ import annotations

import importlib

import pytest
from hostile import SECRETS
from torch import nn

from wdat.models import zoo


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout; the environment holds secrets and asks for unpickling."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def zoo_entry(monkeypatch):
    """`zoo_entry(name, constructor)` adds a network to RobustBench's dictionary; nothing can be downloaded."""
    zoo.robustbench()
    networks = importlib.import_module("robustbench.model_zoo.cifar10").linf
    asked = []
    monkeypatch.setattr("robustbench.utils.download_gdrive_new", lambda *a: asked.append(a))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: asked.append(a))

    def add(name, constructor=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))):
        monkeypatch.setitem(networks, name, {"model": constructor, "gdrive_id": "the-id"})
        return name

    add.asked = asked
    return add
