"""Nothing is unpickled. What programs may call, ruff's rules S and the banned functions of pyproject.toml say."""

from __future__ import annotations

import ast
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import EVALUATE, EVALUATED, ROOT, TRAIN, TRAINED
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from script_runner import run_script

from wdat.data import cifar
from wdat.data.npz import npz
from wdat.errors import SettingError
from wdat.evaluation.session import read_radii
from wdat.models import load_network
from wdat.training.checkpointing import damage


class Payload:
    """Would leave a trace when unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def trap(tmp_path):
    """`trap(kind, path)` writes a pickle that runs code; `trap.sprung()` says whether it ran."""
    trace = tmp_path / "trace"

    def write(kind, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"state_dict": {"x": torch.zeros(1)}, "args": Payload(trace)}
        if kind == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        return path

    write.object, write.sprung = Payload(trace), trace.exists
    return write


KINDS = ["zip", "legacy", "pickle"]


def test_the_trap_would_spring(trap, tmp_path):
    """Guards the guard."""
    torch.load(trap("zip", tmp_path / "x.pt"), weights_only=False)
    assert trap.sprung()


@pytest.mark.parametrize(("kind", "name"), [*((kind, "network.pt") for kind in KINDS), ("zip", "last.ckpt")])
def test_a_checkpoint_runs_no_code(trap, tmp_path, kind, name):
    with pytest.raises(SettingError, match=r"nothing is unpickled here.*model\.checkpoint"):
        load_network("small_cnn", checkpoint=trap(kind, tmp_path / name))
    assert not trap.sprung()


@pytest.mark.parametrize("kind", ["zip"])
def test_what_is_resumed_runs_no_code(trap, tmp_path, kind):
    assert damage(trap(kind, tmp_path / "best.ckpt"))
    run = tmp_path / "run"
    for name in ("last.ckpt", "last.previous.ckpt", "best.ckpt"):
        trap(kind, run / "checkpoints" / name)
    (run / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(TRAINED), run / ".hydra" / "overrides.yaml")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        OmegaConf.save(compose("config", overrides=TRAINED), run / ".hydra" / "config.yaml")
    result = run_script(TRAIN, f"resume={run}")
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert "last.ckpt can't be used" in result.err
    assert not trap.sprung()


@pytest.mark.parametrize("kind", ["zip"])
def test_flips_that_were_kept_run_no_code(trap, tmp_path, kind):
    file = trap(kind, tmp_path / "run" / "nearest_linf.pt")
    result = run_script(EVALUATE, *EVALUATED, "data=digits", "data.limit_test=8", f"hydra.run.dir={file.parent}")
    assert not trap.sprung()
    assert result.status == 2, result.err
    assert "nearest_linf.pt" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", KINDS)
def test_the_zoos_weights_run_no_code(trap, tmp_path, zoo_entry, kind):
    trap(kind, tmp_path / "cifar10" / "Linf" / "Tiny2024.pt")
    with pytest.raises(SettingError, match=r"nothing is unpickled here.*model\.root"):
        load_network(zoo_entry("Tiny2024"), root=tmp_path)
    assert not trap.sprung()
    assert not zoo_entry.asked


def test_timms_weights_run_no_code(trap, tmp_path, zoo_entry, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trap("zip", tmp_path / "hub" / "checkpoints" / "debenedetti2022light-xcit-s-cifar10-linf.pth.tar")
    with pytest.raises(SettingError, match="nothing is unpickled here"):
        load_network("Debenedetti2022Light_XCiT-S12", root=tmp_path)
    assert not trap.sprung()
    assert not zoo_entry.asked


def test_constructors_of_the_zoo_run_no_code(trap, tmp_path, zoo_entry):
    """torchvision's and timm's loaders ask for unpickling; files in their caches are as little trusted as others."""
    file = trap("zip", tmp_path / "cache.pth")
    asks = zoo_entry("Asks2024", lambda: torch.load(file, weights_only=False))
    for checkpoint in (None, file):
        (tmp_path / "cifar10" / "Linf").mkdir(parents=True, exist_ok=True)
        torch.save({}, tmp_path / "cifar10" / "Linf" / "Asks2024.pt")
        with pytest.raises(SettingError, match="Asks2024"):
            load_network(asks, root=tmp_path, checkpoint=checkpoint)
        assert not trap.sprung()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1", "as it was"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_images_and_radii_run_no_code(trap, tmp_path):
    poison = np.array([trap.object, trap.object], dtype=object)
    file, single = tmp_path / "x.npz", tmp_path / "x.npy"
    np.savez(file, **dict.fromkeys(("x_train", "y_train", "x_test", "y_test", "radii"), poison))
    np.save(single, poison)
    for path in (file, single, trap("pickle", tmp_path / "p.npz"), trap("zip", tmp_path / "z.npz")):
        with pytest.raises(SettingError, match=re.escape(f"data.path={path}")):
            npz(path)
        with pytest.raises(SettingError, match=re.escape(f"certified={path}")):
            read_radii(path, 2)
    assert not trap.sprung()


def test_cifars_files_are_opened_only_if_they_are_the_published_ones(trap, tmp_path, monkeypatch):
    """They are pickles, which torchvision reads: by their published checksums, or not at all."""
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        trap("pickle", tmp_path / "cifar-10-batches-py" / name)
    with pytest.raises(SettingError, match=r"wrong checksum.*data\.download"):
        cifar.cifar10(tmp_path, download=False)
    monkeypatch.setattr(cifar, "fetch", lambda *_: None)  # as if they were exchanged after the first look
    with pytest.raises(SettingError, match=r"data\.root"):
        cifar.cifar10(tmp_path, download=False)
    assert not trap.sprung()


def test_every_load_says_that_nothing_is_unpickled():
    """What ruff has no rule for."""
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
    seen = set()
    for file in [*ROOT.glob("wdat/**/*.py"), *ROOT.glob("benchmarks/*.py"), TRAIN, EVALUATE]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in safe:
                seen.add(name)
                assert safe[name] in map(ast.unparse, node.keywords), f"{file}:{node.lineno}"
    assert seen == set(safe)


def test_configurations_name_only_classes_that_read_no_pickles():
    """And take nothing from the environment, which would be written into `.hydra`."""
    for file in (ROOT / "conf").rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        for target in re.findall(r"^[^#\n]*_target_:\s*(\S+)", text, re.M):
            assert target.startswith(("wdat.", "lightning.", "torch.optim.", "???")), file  # ??? must be typed
        assert "oc.env" not in text, file
